"""Which bags and instances a step sees."""

import numpy as np
import pytest

from mil.bags.bags import Bags
from mil.bags.samplers import balanced_order, draw_instances, draw_seeds, natural_order, sampled_order, step_packs
from mil.errors import ConfigError

LABELS = np.array([0] * 30 + [1] * 8 + [2] * 2)
PATIENTS = [f"p{at // 4}" if at < 24 else f"q{at}" for at in range(40)]
TRAINING = np.arange(40) % 4 != 3
BAGS = Bags([f"s{at}" for at in range(4)], [np.arange(2.0 * n).reshape(n, 2) for n in (1, 3, 200, 400)])
EVERYONE = np.arange(4)


def test_the_natural_order_has_every_bag_once_and_belongs_to_seed_and_epoch() -> None:
    orders = {(seed, epoch): natural_order(40, seed, epoch) for seed in (0, 1) for epoch in (1, 2)}
    assert all(sorted(order) == list(range(40)) for order in orders.values())
    assert len({order.tobytes() for order in orders.values()}) == 4
    assert np.array_equal(natural_order(40, 1, 2), orders[1, 2])


@pytest.mark.parametrize("sampler", ["class_balanced", "patient_balanced"])
def test_a_balanced_order_has_every_group_alike_and_training_bags_alone(sampler: str) -> None:
    groups = LABELS if sampler == "class_balanced" else np.array(PATIENTS)
    epochs = [sampled_order(sampler, TRAINING, LABELS, PATIENTS, 0, epoch) for epoch in range(1, 401)]
    drawn = np.concatenate(epochs)
    assert all(len(order) == TRAINING.sum() for order in epochs)
    assert TRAINING[drawn].all()
    names, counts = np.unique(groups[drawn], return_counts=True)
    assert set(names) == set(groups[TRAINING])
    expected = len(drawn) / len(names)
    # five standard deviations of a binomial count
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected)
    # and within a group every bag alike
    bags = np.flatnonzero(TRAINING & (groups == groups[0]))
    within = np.bincount(drawn, minlength=40)[bags]
    assert np.abs(within - within.mean()).max() < 5 * np.sqrt(within.mean())


def test_balanced_draws_belong_to_seed_and_epoch() -> None:
    orders = [balanced_order(LABELS, TRAINING, seed, epoch) for seed, epoch in ((0, 1), (0, 2), (1, 1), (0, 1))]
    assert np.array_equal(orders[0], orders[3])
    assert len({order.tobytes() for order in orders}) == 3


def test_patients_are_asked_for() -> None:
    with pytest.raises(ConfigError, match="patient_balanced without"):
        sampled_order("patient_balanced", TRAINING, LABELS, None, 0, 1)


def test_steps_keep_the_packs_of_all_bags_and_of_these_the_training_bags() -> None:
    order = natural_order(40, 0, 1)
    steps = step_packs(order, TRAINING, 6, 3)
    assert len(steps) == 3
    assert np.array_equal(np.concatenate([pack for step in steps for pack in step]), order[TRAINING[order]])
    assert np.array_equal(steps[1][0], order[18:24][TRAINING[order[18:24]]])
    assert step_packs(order, np.zeros(40, dtype=bool), 6, 3) == [[], [], []]


def test_a_seed_of_a_draw_is_the_bags_alone_and_each_time_that_it_was_drawn_it_has_another() -> None:
    several = draw_seeds(np.array([7, 2, 7, 7]), 40, 0, 1)
    assert len(set(several)) == 4
    assert several[:2] == draw_seeds(np.array([7, 2]), 40, 0, 1)
    assert several[1] == draw_seeds(np.array([2]), 40, 0, 1)[0]
    assert several[::2] == draw_seeds(np.array([7, 7]), 40, 0, 1)
    others = draw_seeds(np.array([7, 2]), 40, 1, 1), draw_seeds(np.array([7, 2]), 40, 0, 2)
    assert len({*several, *others[0], *others[1]}) == 8


def test_instances_are_left_out_with_their_probability_and_one_stays() -> None:
    kept = [draw_instances(BAGS, EVERYONE, None, 0.25, 0, epoch) for epoch in range(1, 101)]
    parts = [len(rows[3]) / 400 for rows in kept]
    assert np.mean(parts) == pytest.approx(0.75, abs=0.01)
    assert len(set(parts)) > 10
    assert all((np.diff(rows[3]) > 0).all() for rows in kept)
    assert all(rows[0].tolist() == [0] for rows in kept)
    assert {len(draw_instances(BAGS, EVERYONE, None, 0.999, 0, epoch)[1]) for epoch in range(50)} == {1}
    ones = np.bincount([draw_instances(BAGS, EVERYONE, None, 0.999, 0, epoch)[1][0] for epoch in range(300)])
    assert ones.min() > 60


def test_instance_dropout_acts_on_what_the_budget_draws_and_depends_on_the_bag_alone() -> None:
    budget = BAGS.draw(EVERYONE, 150, 5, 2)
    both = draw_instances(BAGS, EVERYONE, 150, 0.5, 5, 2)
    assert set(both[3]) < set(budget[3])
    assert len(both[3]) < 110
    alone = draw_instances(BAGS, np.array([3]), 150, 0.5, 5, 2)
    assert np.array_equal(alone[3], both[3])
    assert draw_instances(BAGS, EVERYONE, 150, 0.0, 5, 2).keys() == budget.keys()
    assert not np.array_equal(draw_instances(BAGS, EVERYONE, 150, 0.5, 6, 2)[3], both[3])
