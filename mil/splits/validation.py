"""Validation parts, drawn from what is not tested."""

import numpy as np
import numpy.typing as npt

from mil.arrays import BoolArray, IntArray
from mil.errors import SplitError, listed
from mil.splits.patients import Patients
from mil.splits.splits import TEST_CODE, TRAIN_CODE, VALIDATION_CODE, CodeArray

VALIDATION_DRAWS = 64


def draw_parts(
    patients: Patients, tests: BoolArray, split_seed: int, seeds: tuple[int, ...], validation_fraction: float
) -> CodeArray:
    """Codes [n_folds, len(seeds), n] of given test patients [n_folds, P], with validation parts drawn beside them."""
    codes = np.full((len(tests), len(seeds), len(patients.of_slide)), TRAIN_CODE, dtype=np.int8)
    for fold, test in enumerate(tests):
        codes[fold][:, test[patients.of_slide]] = TEST_CODE
        for at, seed in enumerate(seeds):
            rng = np.random.default_rng((split_seed, fold, seed))
            chosen = draw_validation(patients, test, validation_fraction, rng)
            codes[fold, at, chosen[patients.of_slide]] = VALIDATION_CODE
    return codes


def check_draws(split_seed: int, seeds: tuple[int, ...], validation_fraction: float) -> None:
    """Refuse what no validation part can be drawn with.

    Raises:
        SplitError: seeds that are negative, repeated or none at all, or a fraction outside 0 to 1.
    """
    if not seeds or len(set(seeds)) < len(seeds) or min(*seeds, split_seed) < 0:
        raise SplitError(
            f"got seeds {listed(seeds)} and split_seed {split_seed} → expected one or more different seeds, 0 or more "
            f"→ change the seeds"
        )
    if not 0 < validation_fraction < 1:
        raise SplitError(
            f"got validation_fraction={validation_fraction} → expected a value between 0 and 1 (both excluded), "
            f"because early stopping needs a validation part → pass 0.2, for example"
        )


def draw_validation(patients: Patients, test: BoolArray, fraction: float, rng: np.random.Generator) -> BoolArray:
    """The patients [P] that validate beside these test patients: the first of the best draws."""
    rest = np.flatnonzero(~test)
    wanted = fraction * patients.counts[rest].sum(axis=0)
    # A class of one remaining patient belongs to training: no draw can be blamed for lacking it.
    coverable = patients.holds[rest].sum(axis=0) > 1
    best, best_cost = None, np.inf
    for attempt in range(VALIDATION_DRAWS):
        chosen = _grow_validation(patients, rest, wanted, attempt % 2 == 0, rng)
        held = patients.counts[chosen].sum(axis=0)
        off_size = abs(held.sum() / wanted.sum() - 1)
        # Within a third of the wanted size is as good as exact; a further quarter weighs like one class.
        cost = int((held[coverable] == 0).sum()) + 4 * max(0.0, off_size - 1 / 3)
        if cost < best_cost - 1e-9:
            best, best_cost = chosen, cost
        if cost == 0:
            break
    chosen_mask = np.zeros(len(patients.ids), dtype=bool)
    chosen_mask[best] = True
    return chosen_mask


def _grow_validation(
    patients: Patients, rest: IntArray, wanted: npt.NDArray[np.float64], cover: bool, rng: np.random.Generator
) -> IntArray:
    """Draw patients one by one, never the last one of a class; `cover` starts with one of every class if it can.

    Then a patient is taken whenever it brings the slides per class closer to `wanted` [C]. Never empty.
    """
    order = rng.permutation(rest)
    holders = patients.holds[rest].sum(axis=0)
    held = np.zeros(len(wanted))
    chosen: list[int] = []

    def take(candidate: int) -> None:
        nonlocal holders, held
        chosen.append(candidate)
        holders = holders - patients.holds[candidate]
        held = held + patients.counts[candidate]

    def can_spare(candidate: int) -> bool:
        return candidate not in chosen and bool((holders - patients.holds[candidate] > 0).all())

    for index in np.argsort(holders, kind="stable") if cover else ():
        spare = (each for each in order[patients.holds[order, index]] if held[index] == 0 and can_spare(each))
        for candidate in list(spare)[:1]:
            take(candidate)
    for candidate in order:
        closer = np.abs(held + patients.counts[candidate] - wanted).sum() < np.abs(held - wanted).sum()
        if closer and can_spare(candidate):
            take(candidate)
    if not chosen:
        take(next(candidate for candidate in order if can_spare(candidate)))
    return np.array(chosen, dtype=np.int64)
