"""DSMIL: same weights, same inputs, same outputs as the published code (tests/data/parity, numbers only)."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional

from aggregators import DSMIL, OfficialStateError
from tests.test_aggregators.fixtures import close, load_fixture, outputs_of, parity_folder, state_of

FILES = ["dsmil_c1", "dsmil_c2", "dsmil_c2_linear_q", "dsmil_c2_passing_v", "dsmil_c4"]
CASES = ["n1", "n7", "n50", "n200"]
TRAINED = {"dsmil_trained_c16": "dsmil_c16_aggregator.pth", "dsmil_trained_tcga": "dsmil_tcga_aggregator.pth"}
TRAINED_CASES = ["n1", "n60", "n200"]


def _check(head, fixture, case):
    expected = outputs_of(fixture, case)
    output = head(fixture[f"input/{case}"])
    max_logits = output.extras["max_logits"]
    close(output.instance_logits, expected["instance_scores"])
    close(output.attention, expected["attention"])
    close(output.embedding, expected["bag_embedding"].flatten(1))
    close(output.logits, expected["bag_logits"])
    close(max_logits[0], expected["max_logits"])
    assert torch.equal(output.extras["critical_index"][0], expected["critical_index"])
    close(output.logits.sigmoid(), expected["bag_prob"])
    close((output.logits.sigmoid() + max_logits.sigmoid()) / 2, expected["average_prob"])
    _check_losses(head, output, fixture[f"label/{case}"], expected)


def _check_losses(head, output, label, expected):
    bag_loss = functional.binary_cross_entropy_with_logits(output.logits[0], label)
    own_loss = head.auxiliary_loss(output, label.unsqueeze(0), None)
    close(bag_loss, expected["bag_loss"])
    close(own_loss, expected["max_loss"])
    close((bag_loss + own_loss) / 2, expected["loss"])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", FILES)
def test_outputs_and_losses(name, case):
    fixture = load_fixture(name)
    _check(DSMIL.from_official(state_of(fixture)).eval(), fixture, case)


@pytest.mark.parametrize("name", FILES)
def test_gradients(name):
    fixture = load_fixture(name)
    head = DSMIL.from_official(state_of(fixture)).eval()
    instances, label = fixture["input/n50"].requires_grad_(), fixture["label/n50"].unsqueeze(0)
    output = head(instances)
    bag_loss = functional.binary_cross_entropy_with_logits(output.logits, label)
    ((bag_loss + head.auxiliary_loss(output, label, None)) / 2).backward()
    close(instances.grad, fixture["output/n50/grad_input"])
    assert instances.grad.any()


@pytest.mark.parametrize("name", FILES)
def test_packed_bags(name):
    fixture = load_fixture(name)
    head = DSMIL.from_official(state_of(fixture)).eval()
    instances = torch.cat([fixture[f"input/{case}"] for case in CASES])
    offsets, labels = torch.tensor([0, 1, 8, 58, 258]), torch.stack([fixture[f"label/{case}"] for case in CASES])
    output = head(instances, offsets)
    close(output.logits, torch.cat([fixture[f"output/{case}/bag_logits"] for case in CASES]))
    close(output.attention, torch.cat([fixture[f"output/{case}/attention"] for case in CASES]))
    losses = torch.stack([fixture[f"output/{case}/max_loss"] for case in CASES])
    close(head.auxiliary_loss(output, labels, offsets), losses.mean())
    critical = torch.stack([fixture[f"output/{case}/critical_index"] for case in CASES])
    assert torch.equal(output.extras["critical_index"], critical + offsets[:-1, None])


@pytest.mark.parametrize("name", TRAINED)
def test_trained_weights(name: str, data_folder: Path):
    state = torch.load(data_folder / "mil_checkpoints" / TRAINED[name], weights_only=True, map_location="cpu")
    head = DSMIL.from_official(state).eval()
    assert head.in_dim == 512
    assert head.n_classes == (1 if name.endswith("c16") else 2)
    fixture = load_fixture(name, parity_folder(data_folder))
    for case in TRAINED_CASES:
        _check(head, fixture, case)


def test_foreign_states_are_refused():
    state = state_of(load_fixture("dsmil_c2"))
    with pytest.raises(OfficialStateError, match=r"\['b_classifier.q.2.bias'\] missing"):
        DSMIL.from_official({key: value for key, value in state.items() if key != "b_classifier.q.2.bias"})
    with pytest.raises(OfficialStateError, match=r"\['extra'\] left over"):
        DSMIL.from_official({**state, "extra": torch.zeros(1)})
