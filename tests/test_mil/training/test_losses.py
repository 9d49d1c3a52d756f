"""Losses against scikit-learn, torch, and sums written out by hand."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor
from torch.nn import functional

from mil.config.options import TASK_LOSSES
from mil.config.sections import LossConfig
from mil.training.losses import (
    bag_loss,
    balanced_class_weights,
    class_numbers,
    cox_loss,
    discrete_survival_loss,
    focal_loss,
    huber_loss,
    log_loss,
    multi_label_loss,
    ordinal_loss,
    probabilities,
    smoothed,
    soft_labels,
    squared_error,
    weighted_cross_entropy,
)

LOGITS = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TARGETS = torch.tensor([0, 0, 0, 1, 2, 2])
WEIGHTS = torch.tensor([0.5, 2.0, 1.25], dtype=torch.float64)
CLASS_LOSSES = TASK_LOSSES["classification"]
every_loss = pytest.mark.parametrize("config", [LossConfig(name) for name in CLASS_LOSSES], ids=CLASS_LOSSES)


def test_balanced_weights_are_scikit_learns() -> None:
    labels = np.array([0] * 7 + [1] * 2 + [2] * 11)
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    np.testing.assert_allclose(balanced_class_weights(labels, 3), expected, rtol=1e-6)


def test_a_class_that_does_not_occur_weighs_nothing() -> None:
    assert balanced_class_weights(np.array([0, 2]), 3).tolist() == [pytest.approx(1 / 3 * 2)] * 1 + [
        0.0,
        pytest.approx(2 / 3),
    ]


def test_over_the_whole_training_part_the_loss_is_torchs_weighted_mean() -> None:
    labels = np.array([0, 0, 0, 1, 2, 2])
    logits, targets = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), torch.from_numpy(labels)
    weights = balanced_class_weights(labels, 3)
    expected = functional.cross_entropy(logits, targets, weight=weights)
    torch.testing.assert_close(weighted_cross_entropy(logits, targets, weights), expected)
    assert log_loss(logits, targets, weights) == pytest.approx(float(expected), rel=1e-6)


def test_a_pack_of_one_class_keeps_its_weight() -> None:
    logits, targets = torch.zeros(2, 2), torch.tensor([1, 1])
    light = weighted_cross_entropy(logits, targets, torch.tensor([1.0, 0.5]))
    heavy = weighted_cross_entropy(logits, targets, torch.tensor([1.0, 2.0]))
    assert float(heavy) == pytest.approx(4 * float(light))


def test_probabilities_sum_to_one_in_float64() -> None:
    values = probabilities(torch.tensor([[800.0, -800.0, 0.0], [0.1, 0.2, 0.3]]))
    assert values.dtype == torch.float64
    np.testing.assert_allclose(values.sum(dim=1), 1, atol=1e-15)


@every_loss
def test_soft_labels_of_one_class_are_that_class(config: LossConfig) -> None:
    hard = bag_loss(config, LOGITS, TARGETS, WEIGHTS)
    torch.testing.assert_close(bag_loss(config, LOGITS, soft_labels(TARGETS, LOGITS), WEIGHTS), hard)
    assert class_numbers(soft_labels(TARGETS, LOGITS)).tolist() == TARGETS.tolist()


@pytest.mark.parametrize("config", [LossConfig(), LossConfig("focal", gamma=1.5)])
def test_mixed_labels_cost_the_mix_of_their_costs(config: LossConfig) -> None:
    one, other = TARGETS, TARGETS.flip(0)
    mixed = 0.3 * soft_labels(one, LOGITS) + 0.7 * soft_labels(other, LOGITS)
    expected = 0.3 * bag_loss(config, LOGITS, one, WEIGHTS) + 0.7 * bag_loss(config, LOGITS, other, WEIGHTS)
    torch.testing.assert_close(bag_loss(config, LOGITS, mixed, WEIGHTS), expected)


@every_loss
def test_a_loss_is_a_mean_over_bags(config: LossConfig) -> None:
    each = [bag_loss(config, LOGITS[at : at + 1], TARGETS[at : at + 1], WEIGHTS) for at in range(6)]
    torch.testing.assert_close(torch.stack(each).mean(), bag_loss(config, LOGITS, TARGETS, WEIGHTS))


@every_loss
def test_gradients_are_finite_and_right_where_the_prediction_is_sure(config: LossConfig) -> None:
    logits = torch.tensor([[60.0, 0.0, -60.0], [-300.0, 300.0, 0.0]], dtype=torch.float64, requires_grad=True)
    for targets in (torch.tensor([0, 1]), torch.tensor([2, 0])):
        (gradient,) = torch.autograd.grad(bag_loss(config, logits, targets, WEIGHTS), logits)
        assert gradient.isfinite().all()
    inputs = LOGITS.clone().requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x: bag_loss(config, x, TARGETS, WEIGHTS), inputs)


def test_label_smoothing_is_torchs() -> None:
    expected = functional.cross_entropy(LOGITS, TARGETS, weight=WEIGHTS, label_smoothing=0.2, reduction="sum") / 6
    torch.testing.assert_close(bag_loss(LossConfig(label_smoothing=0.2), LOGITS, TARGETS, WEIGHTS), expected)
    assert smoothed(torch.eye(2), 0.2).tolist() == [pytest.approx([0.9, 0.1]), pytest.approx([0.1, 0.9])]


def test_focal_loss_is_the_papers_formula() -> None:
    chance = LOGITS.softmax(dim=1)[torch.arange(6), TARGETS]
    expected = (WEIGHTS[TARGETS] * (1 - chance) ** 2 * -chance.log()).mean()
    torch.testing.assert_close(focal_loss(LOGITS, TARGETS, WEIGHTS, 2.0), expected)
    plain = weighted_cross_entropy(LOGITS, TARGETS, WEIGHTS)
    torch.testing.assert_close(focal_loss(LOGITS, TARGETS, WEIGHTS, 0.0), plain)
    assert expected < plain


def test_ordinal_loss_is_that_of_the_questions_whether_the_class_is_above() -> None:
    chances = LOGITS.softmax(dim=1)
    above = torch.stack([chances[:, 1:].sum(dim=1), chances[:, 2]], dim=1)
    questions = torch.stack([TARGETS > 0, TARGETS > 1], dim=1).double()
    each = functional.binary_cross_entropy(above, questions, reduction="none").mean(dim=1)
    torch.testing.assert_close(ordinal_loss(LOGITS, TARGETS, WEIGHTS), (WEIGHTS[TARGETS] * each).mean())


def test_with_two_classes_the_ordinal_loss_is_the_cross_entropy() -> None:
    targets = TARGETS.clamp_max(1)
    expected = weighted_cross_entropy(LOGITS[:, :2], targets, WEIGHTS[:2])
    torch.testing.assert_close(ordinal_loss(LOGITS[:, :2], targets, WEIGHTS[:2]), expected)


def test_a_class_further_off_costs_more_only_where_classes_have_an_order() -> None:
    near, far = torch.tensor([[0.0, 4.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.0, 0.0, 4.0]])
    target, weights = torch.tensor([0]), torch.ones(4)
    assert ordinal_loss(near, target, weights) < ordinal_loss(far, target, weights)
    torch.testing.assert_close(
        weighted_cross_entropy(near, target, weights), weighted_cross_entropy(far, target, weights)
    )


def test_unknown_labels_take_no_part() -> None:
    targets = torch.tensor([[1.0, 0.0, float("nan")]] * 6, dtype=torch.float64)
    expected = functional.binary_cross_entropy_with_logits(LOGITS[:, :2], targets[:, :2], pos_weight=WEIGHTS[:2])
    logits = LOGITS.clone().requires_grad_(True)
    loss = multi_label_loss(logits, targets, WEIGHTS)
    torch.testing.assert_close(loss.detach(), expected)
    loss.backward()
    assert (logits.grad[:, 2] == 0).all()
    assert multi_label_loss(LOGITS, torch.full_like(LOGITS, float("nan"))) == 0


def test_squared_and_huber_errors() -> None:
    predictions, targets = torch.tensor([[0.0], [3.0]]), torch.tensor([[0.5], [0.0]])
    assert squared_error(predictions, targets) == pytest.approx((0.25 + 9) / 2)
    assert huber_loss(predictions, targets, delta=2.0) == pytest.approx((0.125 + 2 * (3 - 1)) / 2)


def test_discrete_survival_is_the_likelihood_written_out() -> None:
    intervals, events = torch.tensor([0, 1, 2, 2, 0, 1]), torch.tensor([True, True, False, True, False, False])
    hazards, total = LOGITS.sigmoid(), 0.0
    for row, interval, event in zip(hazards.tolist(), intervals.tolist(), events.tolist(), strict=True):
        likelihood = np.prod([1 - hazard for hazard in row[:interval]])
        total -= np.log(likelihood * (row[interval] if event else 1 - row[interval]))
    assert discrete_survival_loss(LOGITS, intervals, events) == pytest.approx(total / 6)


def test_chances_of_all_that_may_happen_sum_to_one() -> None:
    logits = LOGITS[:1].expand(4, 3)
    intervals, events = torch.tensor([0, 1, 2, 2]), torch.tensor([True, True, True, False])
    likelihoods = [
        torch.exp(-discrete_survival_loss(logits[at : at + 1], intervals[at : at + 1], events[at : at + 1]))
        for at in range(4)
    ]
    assert float(sum(likelihoods)) == pytest.approx(1.0)


def _cox_by_hand(risks: Tensor, times: Tensor, events: Tensor) -> float:
    terms = [
        np.log(sum(np.exp(float(risks[j])) for j in range(len(times)) if times[j] >= times[i])) - float(risks[i])
        for i in range(len(times))
        if events[i]
    ]
    return float(np.mean(terms))


def test_cox_is_the_partial_likelihood_written_out_with_ties() -> None:
    risks, times = LOGITS[:, 0], torch.tensor([5.0, 3.0, 3.0, 8.0, 1.0, 5.0])
    events = torch.tensor([True, True, True, False, True, False])
    assert cox_loss(risks, times, events) == pytest.approx(_cox_by_hand(risks, times, events))
    torch.testing.assert_close(cox_loss(risks + 100, times, events), cox_loss(risks, times, events))
    assert cox_loss(risks, times, torch.zeros(6, dtype=torch.bool)) == 0


@pytest.mark.parametrize(
    "loss",
    [
        lambda x: discrete_survival_loss(x, torch.tensor([0, 1, 2, 2, 0, 1]), torch.arange(6) % 2 == 0),
        lambda x: cox_loss(x[:, 0], torch.arange(6.0), torch.arange(6) % 2 == 0),
        lambda x: multi_label_loss(x, (LOGITS > 0).double()),
        lambda x: huber_loss(x, LOGITS * 2),
        lambda x: squared_error(x, LOGITS * 2),
    ],
)
def test_the_gradients_of_other_losses_are_right(loss: Callable[[Tensor], Tensor]) -> None:
    assert torch.autograd.gradcheck(loss, LOGITS.clone().requires_grad_(True))
    big = (LOGITS * 500).requires_grad_(True)
    assert torch.autograd.grad(loss(big), big)[0].isfinite().all()
