"""Instance-level heads give what the formulas and the published codes give on the same weights and inputs."""

import pytest
import torch

from aggregators import InstanceMax, MeanPool, OfficialStateError, create_aggregator
from tests.test_aggregators.fixtures import close, load_fixture, outputs_of, state_of

POOLING_CASES = ["n1", "n2", "n7", "n50", "n1000", "n50_large", "n7_ties"]
CLAM_CASES = ["n1", "n7", "n50"]
ACMIL_CASES = ["n1", "n7", "n40"]
POOLED = [
    *(("lse", {"temperature": 1 / r}, f"lse_r{r}") for r in (0.1, 1, 5, 20)),
    *(("lse", {"temperature": 1 / r, "normalised": False}, f"lse_unnormalised_r{r}") for r in (0.1, 1, 5, 20)),
    *(("topk", {"k": k}, f"topk_mean_k{k}") for k in (1, 3, 8)),
    *(("topk", {"k": k, "weighting": "softmax"}, f"topk_softmax_weighted_k{k}") for k in (1, 3, 8)),
    ("instance_max", {}, "max_of_logits"),
]


def _linear_head(name, fixture, **keywords):
    head = create_aggregator(name, in_dim=32, n_classes=3, **keywords).eval().double()  # as the reference was computed
    head.classifier.load_state_dict({"weight": fixture["state/weight"], "bias": fixture["state/bias"]})
    return head


@pytest.mark.parametrize("case", POOLING_CASES)
@pytest.mark.parametrize(("name", "keywords", "reference"), POOLED, ids=[reference for *_, reference in POOLED])
def test_pooling_of_instance_logits(name, keywords, reference, case):
    fixture = load_fixture("pooling_numpy")
    output = _linear_head(name, fixture, **keywords)(fixture[f"input/{case}"])
    close(output.logits[0], fixture[f"output/{case}/{reference}"])
    close(output.instance_logits, fixture[f"output/{case}/instance_logits"])


@pytest.mark.parametrize("case", POOLING_CASES)
@pytest.mark.parametrize("name", ["mean", "max"])
def test_pooling_of_hidden_instance_logits(name, case):
    fixture = load_fixture("pooling_numpy")
    head = create_aggregator({"max": "instance_max"}.get(name, name), in_dim=32, n_classes=3, embed_dim=16).double()
    for layer, theirs in ((head.projection.linear, "hidden"), (head.classifier, "out")):
        layer.load_state_dict({kind: fixture[f"state/{theirs}_{kind}"] for kind in ("weight", "bias")})
    output = head(fixture[f"input/{case}"])
    close(output.logits[0], fixture[f"output/{case}/mlp_{name}_of_logits"])
    close(output.instance_logits, fixture[f"output/{case}/mlp_instance_logits"])


@pytest.mark.parametrize("name", ["clam_maxmil_binary", "clam_maxmil_multiclass"])
def test_one_instance_speaks_for_the_bag_in_clam(name):
    fixture = load_fixture(name)
    head = InstanceMax.from_official(state_of(fixture)).eval()
    packed = head(torch.cat([fixture[f"input/{case}"] for case in CLAM_CASES]), torch.tensor([0, 1, 8, 58]))
    for bag, case in enumerate(CLAM_CASES):
        expected, output = outputs_of(fixture, case), head(fixture[f"input/{case}"])
        close(output.logits, expected["top_instance_logits"])
        close(packed.logits[bag : bag + 1], expected["top_instance_logits"])
        close(output.embedding, expected["top_features"])
        close(output.logits.softmax(1), expected["Y_prob"])
        close(output.instance_logits.softmax(1), expected["instance_probs"])
        assert torch.equal(output.logits.argmax(1), expected["Y_hat"].flatten())


@pytest.mark.parametrize(("name", "builder"), [("acmil_maxmil", InstanceMax), ("acmil_meanmil", MeanPool)])
def test_pooled_logits_in_acmil(name, builder):
    fixture = load_fixture(name)
    head = builder.from_official(state_of(fixture)).eval()
    packed = head(torch.cat([fixture[f"input/{case}"][0] for case in ACMIL_CASES]), torch.tensor([0, 1, 8, 48]))
    for bag, case in enumerate(ACMIL_CASES):
        expected, output = outputs_of(fixture, case), head(fixture[f"input/{case}"][0])
        close(output.logits, expected["logits"])
        close(packed.logits[bag : bag + 1], expected["logits"])
        close(output.instance_logits, expected["instance_logits"][0])


def test_the_quirk_of_clam_shows_only_when_asked_for():
    fixture = load_fixture("clam_maxmil_multiclass")
    official = InstanceMax.from_official(state_of(fixture)).eval()
    ours = InstanceMax(64, 4, 512).eval()
    ours.load_state_dict(official.state_dict())
    instances = fixture["input/n50"]
    assert (ours(instances).logits >= official(instances).logits).all()
    assert not torch.equal(ours(instances).logits, official(instances).logits)


def test_foreign_states_are_refused():
    state = state_of(load_fixture("clam_maxmil_binary"))
    with pytest.raises(OfficialStateError, match=r"got a state dict of fc\.0\.bias, fc\.0\.weight → expected"):
        InstanceMax.from_official({name: value for name, value in state.items() if name.startswith("fc")})
    with pytest.raises(OfficialStateError, match=r"\['fc.0.bias'\] missing"):
        InstanceMax.from_official({name: value for name, value in state.items() if name != "fc.0.bias"})
    with pytest.raises(OfficialStateError, match=r"\['head.0.bias'"):
        MeanPool.from_official(state)
