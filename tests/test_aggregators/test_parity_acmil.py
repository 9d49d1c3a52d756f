"""ACMIL: same weights, same inputs, same outputs as the published code (tests/data/parity, numbers only)."""

import pytest
import torch
from torch.nn import functional

import aggregators.acmil
from aggregators import ACMIL, OfficialStateError
from aggregators.acmil import attention_likeness, draw_top_mask
from aggregators.segment import Segments
from tests.test_aggregators.fixtures import close, load_fixture, outputs_of, state_of

FILES = ["acmil_ga_k1", "acmil_ga_k5"]
CASES = ["n1", "n8", "n60"]
MASKED = -1e9  # what their code sets a masked score to


def _official(name):
    fixture = load_fixture(name)
    return fixture, ACMIL.from_official(state_of(fixture)).eval()


def _check_losses(head, output, label, expected, prefix=""):
    slide_loss = functional.cross_entropy(output.logits, label)
    close(slide_loss, expected[f"{prefix}slide_loss"])
    own_loss = head.auxiliary_loss(output, label, None)
    close(own_loss, expected[f"{prefix}sub_loss"] + expected[f"{prefix}diff_loss"])
    if head.branches > 1:
        segments = Segments((output.attention.shape[0],))
        close(attention_likeness(output.attention, segments)[0], expected[f"{prefix}diff_loss"])
    return slide_loss + own_loss


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", FILES)
def test_outputs_and_losses(name, case):
    fixture, head = _official(name)
    expected = outputs_of(fixture, case)
    output = head(fixture[f"input/{case}"][0])
    constant = fixture["state/attention.attention_weights.bias"]
    close((output.extras["attention_scores"] + constant).T, expected["attention_raw"][0])
    close(output.attention.T, expected["attention_branch_softmax"][0])
    close(output.attention.mean(1), expected["attention_bag"][0])
    close(output.extras["branch_logits"][0], expected["branch_logits"])
    close(output.embedding, expected["bag_embedding"])
    close(output.logits, expected["slide_logits"])
    close(output.logits.softmax(1), expected["slide_prob"])
    _check_losses(head, output, fixture[f"label/{case}"], expected)


@pytest.mark.parametrize("name", FILES)
def test_gradients_of_the_whole_loss(name):
    fixture, head = _official(name)
    expected = outputs_of(fixture, "n60")
    bags = fixture["input/n60"].requires_grad_()
    output = head(bags[0])
    loss = _check_losses(head, output, fixture["label/n60"], expected)
    close(loss, expected["total_loss"])
    loss.backward()
    close(bags.grad, expected["grad_input"])
    assert bags.grad.any()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", FILES)
def test_masked_training(name, case, monkeypatch):
    """With the mask that their code drew; that ours draws as many of the same candidates is checked too."""
    fixture, head = _official(name)
    expected = outputs_of(fixture, case)
    bag, mask = fixture[f"input/{case}"][0], expected["stkim_masked"].T
    scores = head(bag).extras["attention_scores"]
    ours = draw_top_mask(scores, Segments((len(bag),)), head.mask_top, head.mask_rate)
    assert torch.equal(ours.sum(0), mask.sum(0))
    highest = scores >= scores.topk(min(10, len(bag)), dim=0).values[-1]
    assert not (ours & ~highest).any()
    assert not (mask & ~highest).any()

    monkeypatch.setattr(aggregators.acmil, "draw_top_mask", lambda *_: mask)
    output = head.train()(bag)
    raw = output.extras["attention_scores"] + fixture["state/attention.attention_weights.bias"]
    close(raw.clamp_min(MASKED).T, expected["stkim_attention_raw"][0])
    close(output.extras["branch_logits"][0], expected["stkim_branch_logits"])
    close(output.logits, expected["stkim_slide_logits"])
    _check_losses(head, output, fixture[f"label/{case}"], expected, "stkim_")


@pytest.mark.parametrize("name", FILES)
def test_packed_bags(name):
    fixture, head = _official(name)
    offsets, labels = torch.tensor([0, 1, 9, 69]), torch.cat([fixture[f"label/{case}"] for case in CASES])
    output = head(torch.cat([fixture[f"input/{case}"][0] for case in CASES]), offsets)
    expected = [outputs_of(fixture, case) for case in CASES]
    close(output.logits, torch.cat([case["slide_logits"] for case in expected]))
    close(output.attention, torch.cat([case["attention_branch_softmax"][0] for case in expected], dim=1).T)
    own = torch.stack([case["sub_loss"] + case["diff_loss"] for case in expected]).mean()
    close(head.auxiliary_loss(output, labels, offsets), own)


def test_foreign_states_are_refused():
    state = state_of(load_fixture("acmil_ga_k5"))
    with pytest.raises(OfficialStateError, match=r"\['classifier.4.fc.bias'\] missing"):
        ACMIL.from_official({key: value for key, value in state.items() if key != "classifier.4.fc.bias"})
    with pytest.raises(OfficialStateError, match=r"\['extra'\] left over"):
        ACMIL.from_official({**state, "extra": torch.zeros(1)})
