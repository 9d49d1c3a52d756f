"""The bootstrap over patients: resamples, the jackknife beside them, and intervals of both.

Slides of one patient resemble each other, so that patients, not slides, are drawn with replacement, each with all its
slides.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr, ndtri

from mil.arrays import FloatArray, IntArray
from mil.errors import EvaluationError, did_you_mean, listed

Statistic = Callable[[FloatArray], dict[str, FloatArray]]
"""Takes weights [B, n], how often each slide was drawn, and returns named arrays [B, ...]."""

INTERVALS = ("percentile", "bca")
# Replicates are scored in pieces of at most this many weights, so that memory does not grow with the cohort.
WEIGHTS_AT_ONCE = 4_000_000


def patient_bootstrap(
    statistic: Statistic,
    patient_ids: Sequence[str],
    replicates: int = 2000,
    seed: int = 0,
    stratify: npt.ArrayLike | None = None,
) -> dict[str, FloatArray]:
    """Values of a statistic under resampling of patients with replacement.

    Args:
        statistic: see `Statistic`.
        patient_ids: [n], the patient of every slide. The draws do not depend on the order of the slides.
        replicates: number of resamples.
        seed: of the draws; two statistics with the same seed see the same resamples.
        stratify: [n] labels; patients are drawn among those of the same classes, see `patient_strata`. None draws all
            patients at once.

    Returns:
        The named arrays, [replicates, ...].

    References:
        Field and Welsh, "Bootstrapping clustered data", JRSS B 2007 (the cluster bootstrap); Davison and Hinkley,
        "Bootstrap Methods and their Application", 1997, section 3.2 (strata).
    """
    _check_replicates(replicates)
    patients, patient_of = np.unique(np.array(patient_ids), return_inverse=True)
    strata = patient_strata(patient_ids, stratify)
    rng = np.random.default_rng(seed)
    # a generator of its own makes the draws of a stratum the same, however many replicates are scored at once
    generators = [rng, *rng.spawn(len(strata) - 1)]
    at_once = max(1, WEIGHTS_AT_ONCE // len(patient_of))
    pieces = []
    for start in range(0, replicates, at_once):
        times = np.empty((min(at_once, replicates - start), len(patients)))
        for members, generator in zip(strata, generators, strict=True):
            times[:, members] = _times_drawn(len(members), len(times), generator)
        pieces.append(statistic(times[:, patient_of]))
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}


def patient_jackknife(statistic: Statistic, patient_ids: Sequence[str]) -> dict[str, FloatArray]:
    """Values of a statistic without each of the P patients in turn, [P, ...], in the order of their sorted ids."""
    patients, patient_of = np.unique(np.array(patient_ids), return_inverse=True)
    at_once = max(1, WEIGHTS_AT_ONCE // len(patient_of))
    pieces = []
    for start in range(0, len(patients), at_once):
        left_out = np.arange(start, min(start + at_once, len(patients)))
        pieces.append(statistic((left_out[:, None] != patient_of).astype(np.float64)))
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}


def patient_strata(patient_ids: Sequence[str], labels: npt.ArrayLike | None = None) -> list[IntArray]:
    """Patients of the same set of classes, as positions among their sorted ids; one stratum of all without labels.

    Args:
        patient_ids: [n].
        labels: [n]; a patient with slides of classes 0 and 2 is in a stratum with others of just these classes.
    """
    patients, patient_of = np.unique(np.array(patient_ids), return_inverse=True)
    if labels is None:
        return [np.arange(len(patients))]
    values, label_of = np.unique(np.asarray(labels), return_inverse=True)
    occurs = np.zeros((len(patients), len(values)), dtype=np.uint8)
    occurs[patient_of, label_of] = 1
    sets, stratum_of = np.unique(occurs, axis=0, return_inverse=True)
    return [np.flatnonzero(stratum_of.ravel() == at) for at in range(len(sets))]


def percentile_interval(values: FloatArray, confidence: float = 0.95) -> tuple[float, float] | None:
    """The middle `confidence` of replicate values [B], without the undefined (NaN) ones; None if all are.

    References:
        Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13.
    """
    check_confidence(confidence)
    return _quantiles(values, np.array([(1 - confidence) / 2, (1 + confidence) / 2]))


def bca_interval(
    values: FloatArray,
    value: float,
    left_out: FloatArray,
    confidence: float = 0.95,
    strata: Sequence[IntArray] | None = None,
) -> tuple[float, float] | None:
    """The bias-corrected and accelerated interval, without undefined (NaN) values; None where it does not exist.

    It moves the two quantiles of the percentile interval by the bias of the replicates (how many lie below the value)
    and by how fast their spread changes with the value (the skewness of the jackknife). Where all replicates lie on one
    side of the value, the bias is unbounded and there is no interval.

    Args:
        values: [B] replicates.
        value: the statistic of the slides as they are.
        left_out: [P] its jackknife over patients.
        confidence: such as 0.95.
        strata: positions of the patients of each stratum, where the replicates were drawn by strata.

    References:
        Efron, "Better bootstrap confidence intervals", JASA 1987; ties count one half.
    """
    check_confidence(confidence)
    defined = values[~np.isnan(values)]
    if defined.size == 0:
        return None
    below = ((defined < value).mean() + (defined <= value).mean()) / 2
    if not 0 < below < 1:
        return None
    shift = ndtri(below)
    moved = shift + ndtri([(1 - confidence) / 2, (1 + confidence) / 2])
    acceleration = _acceleration(left_out, [np.arange(len(left_out))] if strata is None else strata)
    return _quantiles(defined, ndtr(shift + moved / (1 - acceleration * moved)))


def check_confidence(confidence: float) -> None:
    """Refuse what is no confidence level.

    Raises:
        EvaluationError: it is not between 0 and 1.
    """
    if not 0 < confidence < 1:
        raise EvaluationError(
            f"got confidence={confidence} → expected a share between 0 and 1 → pass 0.95, for example"
        )


def check_interval(interval: str) -> None:
    """Refuse what is no kind of interval.

    Raises:
        EvaluationError: it is none of `INTERVALS`.
    """
    if interval not in INTERVALS:
        raise EvaluationError(
            f"got interval {interval!r} → expected one of {listed(INTERVALS)} → "
            f"{did_you_mean(interval, INTERVALS)}choose one of these"
        )


def _check_replicates(replicates: int) -> None:
    if replicates < 1:
        raise EvaluationError(f"got replicates={replicates} → expected 1 or more → pass 2000, for example")


@dataclass(frozen=True)
class Resampling:
    """How intervals are made, checked when it is made.

    Attributes:
        replicates: number of bootstrap resamples.
        seed: of the resamples.
        confidence: of the intervals, such as 0.95.
        interval: "percentile" or "bca".
        stratified: draw patients among those of the same strata, for classes those with the same set of them.

    Raises:
        EvaluationError: an impossible value.
    """

    replicates: int = 2000
    seed: int = 0
    confidence: float = 0.95
    interval: str = "percentile"
    stratified: bool = False

    def __post_init__(self) -> None:
        _check_replicates(self.replicates)
        check_confidence(self.confidence)
        check_interval(self.interval)

    def describe(self) -> dict[str, Any]:
        """How intervals were made, for `metrics.json`; what is usual is left out."""
        usual = self.interval == "percentile" and not self.stratified
        unusual = {} if usual else {"interval": self.interval, "stratified": self.stratified}
        return {"replicates": self.replicates, "confidence": self.confidence, **unusual}


USUAL_RESAMPLING = Resampling()


@dataclass(frozen=True, eq=False)
class Spread:
    """A statistic on the slides as they are, on resamples of patients and, for BCa, without each patient.

    Attributes:
        value: named values, [...].
        resampled: the same names, [B, ...].
        left_out: the same names, [P, ...]; None for percentile intervals.
        strata: positions of the patients that were drawn among themselves.
        confidence: of the intervals.
    """

    value: dict[str, FloatArray]
    resampled: dict[str, FloatArray]
    left_out: dict[str, FloatArray] | None
    strata: list[IntArray]
    confidence: float

    @classmethod
    def of(
        cls,
        statistic: Statistic,
        patient_ids: Sequence[str],
        resampling: Resampling = USUAL_RESAMPLING,
        strata: IntArray | None = None,
    ) -> "Spread":
        """Score a statistic, see `mil.statistics.bootstrap.patient_bootstrap`.

        Args:
            statistic: see `Statistic`.
            patient_ids: [n].
            resampling: how intervals are made.
            strata: [n], such as classes; heeded where the resampling is stratified.
        """
        stratify = strata if resampling.stratified else None
        once = statistic(np.ones((1, len(patient_ids))))
        return cls(
            value={name: array[0] for name, array in once.items()},
            resampled=patient_bootstrap(statistic, patient_ids, resampling.replicates, resampling.seed, stratify),
            left_out=patient_jackknife(statistic, patient_ids) if resampling.interval == "bca" else None,
            strata=patient_strata(patient_ids, stratify),
            confidence=resampling.confidence,
        )

    def entry(self, name: str, claimable: bool = True, column: int | None = None) -> dict[str, float | None]:
        """{value, low, high} of a name, or of one of its columns; None what is undefined or not to be claimed."""
        at = ... if column is None else (..., column)
        value = float(self.value[name][at])
        interval = self._interval(name, at, value) if claimable and not math.isnan(value) else None
        low, high = interval or (None, None)
        return {"value": None if math.isnan(value) else value, "low": low, "high": high}

    def _interval(self, name: str, at: Any, value: float) -> tuple[float, float] | None:
        resampled = self.resampled[name][at]
        if self.left_out is None:
            return percentile_interval(resampled, self.confidence)
        return bca_interval(resampled, value, self.left_out[name][at], self.confidence, self.strata)


def _times_drawn(total: int, size: int, generator: np.random.Generator) -> IntArray:
    """How often each of `total` patients is drawn in `size` resamples of `total` draws, [size, total]."""
    drawn = generator.integers(total, size=(size, total)) + total * np.arange(size)[:, None]
    return np.bincount(drawn.ravel(), minlength=size * total).reshape(size, total)


def _acceleration(left_out: FloatArray, strata: Sequence[IntArray]) -> float:
    """A sixth of the skewness that the jackknife [P] gives the statistic; 0 where it does not vary."""
    cubes = squares = 0.0
    for members in strata:
        values = left_out[members]
        values = values[~np.isnan(values)]
        if values.size > 1:
            pull = (values.mean() - values) * (values.size - 1) / values.size
            cubes += float((pull**3).sum())
            squares += float((pull**2).sum())
    return cubes / (6 * squares**1.5) if squares > 0 else 0.0


def _quantiles(values: FloatArray, shares: FloatArray) -> tuple[float, float] | None:
    defined = values[~np.isnan(values)]
    if defined.size == 0:
        return None
    low, high = np.quantile(defined, shares)
    return float(low), float(high)
