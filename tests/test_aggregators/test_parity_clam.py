"""CLAM gives what the authors' code gives: logits, attention, clusters, losses and gradients."""

import pytest
import torch
from torch.nn import functional

from aggregators import ClamMB, ClamSB, OfficialStateError
from tests.test_aggregators.fixtures import close, load_fixture, outputs_of, state_of

BUILDERS = {"clam_sb": ClamSB, "clam_sb_ungated": ClamSB, "clam_mb": ClamMB}
CASES = {"clam_sb": ["n9", "n16", "n50", "n200"], "clam_sb_ungated": ["n16", "n50"]}
CASES["clam_mb"] = CASES["clam_sb"]
PAIRS = [(name, case) for name, cases in CASES.items() for case in cases]
every_case = pytest.mark.parametrize(("name", "case"), PAIRS, ids=["-".join(pair) for pair in PAIRS])


def _head(name, fixture, **keywords):
    return BUILDERS[name].from_official(state_of(fixture), **keywords).eval()


def _check_outputs(head, fixture, case):
    output, expected = head(fixture[f"input/{case}"]), outputs_of(fixture, case)
    state = state_of(fixture)
    bias = next(state[key] for key in state if key.endswith(("attention_c.bias", "3.module.2.bias")))
    close(output.logits, expected["logits"])
    close(output.logits.softmax(1), expected["Y_prob"])
    assert torch.equal(output.logits.argmax(1), expected["Y_hat"].flatten())
    close((output.extras["attention_scores"] + bias).T, expected["attention_raw"])
    close(output.attention.T, expected["attention_softmax"])
    close(output.embedding.view_as(expected["embedding"]), expected["embedding"])
    close(output.extras["cluster_logits"].transpose(0, 1), expected["inst_logits_all"])
    assert torch.equal(output.attention.topk(8, dim=0).indices.T, expected["top_ids"])
    assert torch.equal((-output.attention).topk(8, dim=0).indices.T, expected["bottom_ids"])


def _check_losses(build, fixture, case):
    expected = outputs_of(fixture, case)
    for subtyping in (0, 1):
        head = build(subtyping=bool(subtyping))
        output = head(fixture[f"input/{case}"])
        for label in fixture[f"label/{case}"].tolist():
            targets, name = torch.tensor([label]), f"y{label}_sub{subtyping}"
            cross_entropy = functional.cross_entropy(output.logits, targets)
            close(cross_entropy, expected[f"ce_y{label}"])
            close(head.instance_loss(output, targets, None)[0], expected[f"inst_loss_{name}"])
            total = 0.7 * (cross_entropy + head.auxiliary_loss(output, targets, None))
            close(total, expected[f"total_loss_{name}"])


def _check_gradients(build, fixture):
    for subtyping in (0, 1):
        head, instances = build(subtyping=bool(subtyping)), fixture["input/n16"].clone().requires_grad_()
        output, targets = head(instances), torch.tensor([1])
        task = functional.cross_entropy(output.logits, targets)
        (0.7 * (task + head.auxiliary_loss(output, targets, None))).backward()
        close(instances.grad, fixture[f"output/n16/grad_input_y1_sub{subtyping}"])


@every_case
def test_outputs(name, case):
    fixture = load_fixture(name)
    _check_outputs(_head(name, fixture), fixture, case)


@every_case
def test_losses(name, case):
    fixture = load_fixture(name)
    _check_losses(lambda **keywords: _head(name, fixture, **keywords), fixture, case)


@pytest.mark.parametrize("name", BUILDERS)
def test_gradients_of_the_total_loss(name):
    fixture = load_fixture(name)
    _check_gradients(lambda **keywords: _head(name, fixture, **keywords), fixture)


@pytest.mark.parametrize("name", BUILDERS)
def test_packed_bags(name):
    fixture, cases = load_fixture(name), CASES[name]
    head = _head(name, fixture, subtyping=True)
    bags = [fixture[f"input/{case}"] for case in cases]
    offsets = torch.tensor([0, *(len(bag) for bag in bags)]).cumsum(0)
    output = head(torch.cat(bags), offsets)
    close(output.logits, torch.cat([fixture[f"output/{case}/logits"] for case in cases]))
    close(output.attention.T, torch.cat([fixture[f"output/{case}/attention_softmax"] for case in cases], dim=1))
    losses = head.instance_loss(output, torch.ones(len(cases), dtype=torch.int64), offsets)
    close(losses, torch.stack([fixture[f"output/{case}/inst_loss_y1_sub1"] for case in cases]))


def test_overlapping_clusters_of_a_small_bag_are_the_quirk():
    """Of 9 instances the authors' code puts 7 into both clusters; ours takes the 4 highest and the 4 lowest."""
    fixture = load_fixture("clam_sb")
    losses = {}
    for official in (True, False):
        head = _head("clam_sb", fixture, official=official)
        for case in ("n9", "n16"):
            output = head(fixture[f"input/{case}"])
            losses[official, case] = head.instance_loss(output, torch.tensor([0]), None).item()
    assert losses[True, "n16"] == losses[False, "n16"]
    assert abs(losses[True, "n9"] - losses[False, "n9"]) > 1e-3


def test_foreign_states_are_refused():
    state = state_of(load_fixture("clam_sb"))
    with pytest.raises(OfficialStateError, match=r"expected attention_net\.0 and \.3"):
        ClamSB.from_official({"classifiers.weight": torch.zeros(2, 4)})
    with pytest.raises(OfficialStateError, match=r"\['classifiers.bias'\] missing"):
        ClamSB.from_official({name: value for name, value in state.items() if name != "classifiers.bias"})
    with pytest.raises(OfficialStateError, match=r"classifiers.0.bias.* missing"):
        ClamMB.from_official(state)
    with pytest.raises(OfficialStateError, match=r"\['extra'\] left over"):
        ClamSB.from_official({**state, "extra": torch.zeros(1)})


def test_dropout_in_the_ungated_net_moves_a_layer_by_one():
    state = state_of(load_fixture("clam_sb_ungated"))
    moved = {name.replace("module.2.", "module.3."): value for name, value in state.items()}
    instances = torch.randn(5, 32)
    heads = [ClamSB.from_official(parameters).eval() for parameters in (state, moved)]
    assert torch.equal(heads[0](instances).logits, heads[1](instances).logits)


@pytest.mark.data
def test_the_trained_checkpoint_of_the_authors_demo(data_folder):
    checkpoint, fixtures = (
        data_folder / "mil_checkpoints" / "CLAM_demo_s_0_checkpoint.pt",
        data_folder.parent / "parity",
    )
    if not checkpoint.is_file() or not (fixtures / "clam_sb_trained_demo.npz").is_file():
        pytest.skip("the trained CLAM checkpoint or its outputs are not here")
    state = torch.load(checkpoint, weights_only=True, map_location="cpu")
    fixture = load_fixture("clam_sb_trained_demo", fixtures)

    def build(**keywords):
        return ClamSB.from_official(state, **keywords).eval()

    for case in ("n16", "n40"):
        _check_outputs(build(), fixture, case)
        _check_losses(build, fixture, case)
    _check_gradients(build, fixture)
