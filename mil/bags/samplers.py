"""Which bags and which of their instances a training step sees; every draw belongs to (seed, epoch)."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from mil.arrays import BoolArray, IntArray
from mil.bags.bags import Bags
from mil.errors import ConfigError

# what a draw is for; 1 draws the instances of a budget, in mil.bags.bags
_DRAW_ORDER = 0
_DRAW_KEPT = 2
_DRAW_BAGS = 3
_DRAW_VIEW = 4
_DRAW_SEEDS = 5


def natural_order(n_bags: int, seed: int, epoch: int) -> IntArray:
    """The order of all bags, which belongs to the seed: replicas of one seed share their packs."""
    return np.random.default_rng((_DRAW_ORDER, seed, epoch)).permutation(n_bags)


def balanced_order(groups: Sequence[object] | IntArray, training: BoolArray, seed: int, epoch: int) -> IntArray:
    """As many training bags as there are, drawn with replacement, every group equally likely.

    Args:
        groups: [n], the class or the patient of every bag.
        training: [n], which bags are drawn from.
        seed: of the replica.
        epoch: each draws anew.
    """
    bags = np.flatnonzero(training)
    _, member, counts = np.unique(np.asarray(groups)[bags], return_inverse=True, return_counts=True)
    chances = 1 / (len(counts) * counts[member])
    drawn: IntArray = np.random.default_rng((_DRAW_BAGS, seed, epoch)).choice(bags, size=len(bags), p=chances)
    return drawn


def sampled_order(
    sampler: str,
    training: BoolArray,
    labels: IntArray,
    patients: Sequence[str] | None,
    seed: int,
    epoch: int,
) -> IntArray:
    """The bags of an epoch, in order.

    Args:
        sampler: ``natural``, ``class_balanced`` or ``patient_balanced``.
        training: [n], the replica's training bags.
        labels: [n].
        patients: [n]; only ``patient_balanced`` needs them.
        seed: of the replica.
        epoch: counts from 1.

    Raises:
        ConfigError: ``patient_balanced`` without patients.
    """
    if sampler == "natural":
        return natural_order(len(training), seed, epoch)
    if sampler == "class_balanced":
        return balanced_order(labels, training, seed, epoch)
    if patients is None:
        raise ConfigError(
            "got sampler=patient_balanced without the patients of the bags → expected one per bag → pass patients= to "
            "train_replica, or use sampler=class_balanced"
        )
    return balanced_order(patients, training, seed, epoch)


def step_packs(order: IntArray, training: BoolArray, batch_bags: int, accumulate: int) -> list[list[IntArray]]:
    """Cut an order into packs of ``batch_bags``, and these into steps of ``accumulate`` packs.

    Of every pack the training bags are kept; a step whose packs have none is an empty list.
    """
    packs = [order[start : start + batch_bags] for start in range(0, len(order), batch_bags)]
    members = [pack[training[pack]] for pack in packs]
    steps = [members[start : start + accumulate] for start in range(0, len(members), accumulate)]
    return [[pack for pack in step if len(pack)] for step in steps]


def draw_instances(
    bags: Bags, members: IntArray, budget: int | None, dropout: float, seed: int, epoch: int
) -> dict[int, IntArray]:
    """The instances of some bags that a step sees; bags that are not named are taken whole.

    Args:
        bags: all bags.
        members: [k], which bags.
        budget: most instances of a bag; None is no bound.
        dropout: probability with which each of those is left out; one always stays.
        seed: of the replica.
        epoch: each draws anew. A draw depends on (seed, epoch, bag) alone.
    """
    rows = bags.draw(members, budget, seed, epoch)
    if dropout == 0:
        return rows
    return {
        bag: _keep_some(rows.get(bag), int(bags.n_instances[bag]), dropout, (seed, epoch, bag))
        for bag in members.tolist()
    }


def _keep_some(rows: IntArray | None, n: int, dropout: float, key: tuple[int, int, int]) -> IntArray:
    """Leave each of ``rows``, or of all ``n``, out with a probability, but never all of them."""
    rows = np.arange(n) if rows is None else rows
    draws = np.random.default_rng((_DRAW_KEPT, *key)).random(len(rows))
    kept = draws >= dropout
    # the one that came nearest
    kept[draws.argmax()] = True
    return rows[kept]


def draw_seeds(members: IntArray, n_bags: int, seed: int, step: int) -> list[int]:
    """What the head's own draws, such as dropout, start from: a seed for each of some bags.

    Args:
        members: [k], which bags; one that a sampler drew several times has a seed for each.
        n_bags: bags there are.
        seed: of the replica.
        step: each draws anew. A draw depends on (seed, step, bag) alone, and on how often the bag was named before.
    """
    seen: Counter[int] = Counter()
    before = []
    for bag in members.tolist():
        before.append(seen[bag])
        seen[bag] += 1
    every = np.random.default_rng((_DRAW_SEEDS, seed, step)).integers(2**62, size=(max(seen.values()), n_bags))
    found: list[int] = every[before, members].tolist()
    return found


def seeds_of_pieces(seeds: Sequence[int], n: int) -> list[int]:
    """Seeds for ``n`` bags that an augmentation made of the bags with these seeds; these, where as many are left."""
    if n == len(seeds):
        return list(seeds)
    found: list[int] = np.random.default_rng([_DRAW_SEEDS, *seeds]).integers(2**62, size=n).tolist()
    return found


def draw_views(bags: Bags, members: IntArray, seed: int, epoch: int) -> dict[int, int]:
    """The view of every bag in an epoch: itself (0) and each of its augmented views equally likely.

    A draw depends on (seed, epoch, bag) alone.
    """
    return {
        bag: int(np.random.default_rng((_DRAW_VIEW, seed, epoch, bag)).integers(bags.n_views + 1))
        for bag in members.tolist()
    }
