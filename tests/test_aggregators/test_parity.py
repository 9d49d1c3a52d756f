"""Same weights, same inputs, same outputs as the published code (tests/data/parity, numbers only)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from aggregators import ABMIL, OfficialStateError, TransformerAggregator, create_aggregator

PARITY = Path(__file__).resolve().parents[1] / "data" / "parity"
ABMIL_FILES = ["abmil_attention", "abmil_gated"]
ABMIL_CASES = ["n1", "n10", "n64", "n10_saturated"]
MILLAB_FILES = ["transformer_millab", "transformer_millab_mlp"]
MILLAB_CASES = ["n1", "n7", "n50", "n300"]
POOLING_CASES = ["n1", "n2", "n7", "n50", "n1000", "n50_large", "n7_ties"]


def _load(name):
    with np.load(PARITY / f"{name}.npz", allow_pickle=False) as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def _state(fixture):
    return {key.removeprefix("state/"): value for key, value in fixture.items() if key.startswith("state/")}


def _close(got, expected, tolerance=1e-5):
    torch.testing.assert_close(got, expected.to(got.dtype), rtol=tolerance, atol=1e-5)


def _tolerance(case):
    """Logits of the saturated case are near 350 and its scores near 14: the rounding of float32 differs between
    machines and moves the published code's own output by up to 2e-5 of its size."""
    return 1e-4 if case == "n10_saturated" else 1e-5


def _clamped_loss(logit, label):
    """AttentionDeepMIL's loss: the probability is clamped in float32 before the logarithm."""
    probability = torch.sigmoid(logit).clamp(1e-5, 1 - 1e-5)
    return -(label * probability.log() + (1 - label) * (1 - probability).log())


@pytest.mark.parametrize("case", ABMIL_CASES)
@pytest.mark.parametrize("name", ABMIL_FILES)
def test_abmil_outputs(name, case):
    fixture = _load(name)
    output = ABMIL.from_official(_state(fixture)).eval()(fixture[f"input/{case}"])
    _close(output.logits, fixture[f"output/{case}/logit"], _tolerance(case))
    _close(output.attention.T, fixture[f"output/{case}/attention"], _tolerance(case))
    _close(output.embedding, fixture[f"output/{case}/embedding"], _tolerance(case))
    _close(output.logits.sigmoid(), fixture[f"output/{case}/Y_prob"])
    predicted = (output.logits.sigmoid() >= 0.5).float()
    assert torch.equal(predicted, fixture[f"output/{case}/Y_hat"])
    for label in (0, 1):
        _close(_clamped_loss(output.logits, label), fixture[f"output/{case}/loss_y{label}"])
        assert (predicted != label).float().item() == pytest.approx(fixture[f"output/{case}/error_y{label}"].item())


@pytest.mark.parametrize("case", ABMIL_CASES)
@pytest.mark.parametrize("name", ABMIL_FILES)
def test_abmil_gradients_of_the_clamped_loss(name, case):
    fixture = _load(name)
    head = ABMIL.from_official(_state(fixture)).eval()
    instances = fixture[f"input/{case}"].requires_grad_()
    _clamped_loss(head(instances).logits, fixture[f"label/{case}"]).sum().backward()
    _close(instances.grad, fixture[f"output/{case}/grad_input"])
    assert bool(instances.grad.any()) == (case != "n10_saturated")  # inside the clamped region it is zero


@pytest.mark.parametrize("name", ABMIL_FILES)
def test_abmil_on_packed_bags(name):
    fixture = _load(name)
    cases = ["n1", "n10", "n64"]
    head = ABMIL.from_official(_state(fixture)).eval()
    output = head(torch.cat([fixture[f"input/{case}"] for case in cases]), torch.tensor([0, 1, 11, 75]))
    _close(output.logits, torch.cat([fixture[f"output/{case}/logit"] for case in cases]))
    _close(output.attention, torch.cat([fixture[f"output/{case}/attention"] for case in cases], dim=1).T)


def test_abmil_skips_the_convolutions_of_a_whole_model_and_nothing_else():
    state = _state(_load("abmil_gated"))
    ABMIL.from_official({**state, "feature_extractor_part1.0.weight": torch.zeros(20, 1, 5, 5)})
    with pytest.raises(OfficialStateError, match=r"\['extra'\] left over"):
        ABMIL.from_official({**state, "extra": torch.zeros(1)})
    del state["attention_U.0.bias"]
    with pytest.raises(OfficialStateError, match=r"\['attention_U.0.bias'\] missing"):
        ABMIL.from_official(state)


@pytest.mark.parametrize("case", MILLAB_CASES)
@pytest.mark.parametrize("name", MILLAB_FILES)
def test_transformer_outputs(name, case):
    fixture = _load(name)
    output = TransformerAggregator.from_official(_state(fixture), heads=4).eval()(fixture[f"input/{case}"])
    _close(output.logits, fixture[f"output/{case}/logits"])
    _close(output.embedding, fixture[f"output/{case}/embedding"])


@pytest.mark.parametrize("case", MILLAB_CASES)
@pytest.mark.parametrize("name", MILLAB_FILES)
def test_transformer_attention(name, case):
    """The fixture holds the first block's attention, which is what a head cut after that block gives out."""
    fixture = _load(name)
    first_block = {key: value for key, value in _state(fixture).items() if not key.startswith("blocks.1.")}
    output = TransformerAggregator.from_official(first_block, heads=4).eval()(fixture[f"input/{case}"])
    instances = fixture[f"output/{case}/attention_block0_cls"][1:]
    _close(output.extras["attention_scores"][:, 0].exp(), instances)
    _close(output.attention[:, 0], instances / instances.sum())


@pytest.mark.parametrize("name", MILLAB_FILES)
def test_transformer_on_packed_bags(name):
    fixture = _load(name)
    head = TransformerAggregator.from_official(_state(fixture), heads=4).eval()
    instances = torch.cat([fixture[f"input/{case}"] for case in MILLAB_CASES])
    output = head(instances, torch.tensor([0, 1, 8, 58, 358]))
    _close(output.logits, torch.cat([fixture[f"output/{case}/logits"] for case in MILLAB_CASES]))


def test_the_quirk_of_the_official_mlp_shows_only_when_asked_for():
    fixture = _load("transformer_millab_mlp")
    official = TransformerAggregator.from_official(_state(fixture), heads=4).eval()
    ours = TransformerAggregator(48, 3, embed_dim=64, heads=4, mlp_ratio=2.0).eval()
    ours.load_state_dict(official.state_dict())
    difference = ours(fixture["input/n50"]).logits - official(fixture["input/n50"]).logits
    assert difference.abs().max() > 1e-3


def test_transformer_refuses_foreign_states():
    state = _state(_load("transformer_millab"))
    with pytest.raises(OfficialStateError, match=r"\['blocks.1.norm.bias'\] missing"):
        TransformerAggregator.from_official({k: v for k, v in state.items() if k != "blocks.1.norm.bias"}, heads=4)
    stem = {key: value for key, value in state.items() if not key.startswith("blocks.")}
    with pytest.raises(OfficialStateError, match="no attention block"):
        TransformerAggregator.from_official(stem, heads=4)


@pytest.mark.parametrize("case", POOLING_CASES)
@pytest.mark.parametrize("name", ["mean", "max"])
def test_pooling_of_instances(name, case):
    fixture = _load("pooling_numpy")
    head = create_aggregator(name, in_dim=32, n_classes=3).eval().double()  # as the reference was computed
    head.classifier.load_state_dict({"weight": fixture["state/weight"], "bias": fixture["state/bias"]})
    output = head(fixture[f"input/{case}"])
    _close(output.embedding[0], fixture[f"output/{case}/{name}_embedding"])
    _close(output.logits[0], fixture[f"output/{case}/{name}_embedding_then_linear"])
    if name == "mean":
        _close(output.instance_logits, fixture[f"output/{case}/instance_logits"])
        _close(output.logits[0], fixture[f"output/{case}/mean_of_logits"])


@pytest.mark.parametrize("case", POOLING_CASES)
@pytest.mark.parametrize("name", ["mean", "max"])
def test_pooling_of_hidden_features(name, case):
    fixture = _load("pooling_numpy")
    head = create_aggregator(name, in_dim=32, n_classes=3, embed_dim=16).eval().double()
    for layer, theirs in ((head.projection.linear, "hidden"), (head.classifier, "out")):
        layer.load_state_dict({kind: fixture[f"state/{theirs}_{kind}"] for kind in ("weight", "bias")})
    _close(head(fixture[f"input/{case}"]).logits[0], fixture[f"output/{case}/mlp_{name}_embedding_logits"])


def test_gradient_of_tied_maxima_does_not_depend_on_their_order():
    fixture = _load("pooling_numpy")
    instances = fixture["input/n7_ties"].clone().requires_grad_()
    head = create_aggregator("max", in_dim=32, n_classes=3)
    functional.cross_entropy(head(instances).logits, torch.tensor([1])).backward()
    assert torch.equal(instances.grad[0], instances.grad[3])
    assert torch.equal(instances.grad[0], instances.grad[5])
