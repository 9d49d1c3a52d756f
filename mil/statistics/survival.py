"""Survival: how well risks rank who dies sooner, and the curves of groups.

Every patient has a time and an event: death at that time (True), or the end of observation (False).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mil.arrays import BoolArray, FloatArray
from mil.cohort.targets import SURVIVAL, find_strata
from mil.errors import EvaluationError
from mil.statistics.bootstrap import USUAL_RESAMPLING, Resampling, Spread
from mil.statistics.metrics import Headline, weightings

HEADLINES = (Headline("concordance", "Concordance index", "concordance", guess=0.5),)
# pairs are compared in blocks of this many rows, which bounds the memory
ROWS_AT_ONCE = 1_000
FEW_EVENTS = 10


def concordance(
    times: FloatArray,
    events: BoolArray,
    risks: FloatArray,
    weights: npt.ArrayLike | None = None,
    groups: Sequence[object] | None = None,
) -> FloatArray:
    """Harrell's concordance index, [B]: of the pairs in which it is known who died first, how many the risks rank so.

    Known is who died before the other's time, or at the time at which the other was last seen. Equal risks count one
    half. NaN where no pair can be compared.

    Args:
        times: [n].
        events: bool [n].
        risks: [n], higher for sooner.
        weights: [B, n], how often each is drawn; None weighs each once (B = 1).
        groups: [n]; only pairs of one group are compared, such as of patients that one model was tested on.

    References:
        Harrell, Lee and Mark, "Multivariable prognostic models", Statistics in Medicine 1996.
    """
    every = weightings(weights, len(times))
    group_of = np.array([""] * len(times) if groups is None else [str(each) for each in groups])
    right, known = np.zeros(len(every)), np.zeros(len(every))
    for group in np.unique(group_of):
        own = np.flatnonzero(group_of == group)
        died, weight = own[events[own]], every[:, own]
        for start in range(0, len(died), ROWS_AT_ONCE):
            rows = died[start : start + ROWS_AT_ONCE]
            time, risk = times[rows, None], risks[rows, None]
            later = (time < times[own]) | ((time == times[own]) & ~events[own])  # [rows, own]
            ranked = (risk > risks[own]) + 0.5 * (risk == risks[own])
            known += (every[:, rows] * (weight @ later.T.astype(np.float64))).sum(axis=1)
            right += (every[:, rows] * (weight @ (later * ranked).T)).sum(axis=1)
    result: FloatArray = np.full(len(every), np.nan)
    np.divide(right, known, out=result, where=known > 0)
    return result


class SurvivalCurve(NamedTuple):
    """Kaplan and Meier's estimate.

    Attributes:
        times: [steps], 0 and the times of death, ascending.
        alive: [steps], share that is alive after each.
        at_risk: [steps], how many were observed until just before it.
    """

    times: FloatArray
    alive: FloatArray
    at_risk: npt.NDArray[np.int64]


def kaplan_meier(times: FloatArray, events: BoolArray) -> SurvivalCurve:
    """The share alive over time.

    References:
        Kaplan and Meier, "Nonparametric estimation from incomplete observations", JASA 1958.
    """
    deaths = np.unique(times[events])
    at_risk = np.array([(times >= time).sum() for time in deaths], dtype=np.int64)
    died = np.array([(events & (times == time)).sum() for time in deaths], dtype=np.int64)
    alive = np.cumprod(1 - died / np.maximum(at_risk, 1))
    return SurvivalCurve(np.r_[0.0, deaths], np.r_[1.0, alive], np.r_[len(times), at_risk].astype(np.int64))


class Patients(NamedTuple):
    """Patients with their time, event, mean risk over slides, and group; [P] each, by sorted id and group."""

    ids: list[str]
    times: FloatArray
    events: BoolArray
    risks: FloatArray
    groups: list[str]


class PatientRows(NamedTuple):
    """Which slides are of one patient and group; P rows by sorted id and group.

    Attributes:
        ids: [P].
        groups: [P].
        first: [P], a slide of each.
        of_slide: [n], the row of every slide.
    """

    ids: list[str]
    groups: list[str]
    first: npt.NDArray[np.int64]
    of_slide: npt.NDArray[np.int64]

    @classmethod
    def of(cls, patient_ids: Sequence[str], groups: Sequence[object] | None = None) -> "PatientRows":
        """Those of n slides with these patients and groups, [n] each."""
        named = [str(group) for group in groups] if groups is not None else [""] * len(patient_ids)
        pairs = np.array(list(zip(patient_ids, named, strict=True)), dtype=np.str_).reshape(-1, 2)
        rows, first, of_slide = np.unique(pairs, axis=0, return_index=True, return_inverse=True)
        return cls(rows[:, 0].tolist(), rows[:, 1].tolist(), first, of_slide.ravel())

    def mean(self, values: FloatArray) -> FloatArray:
        """Mean over the slides of each row, [n] -> [P]."""
        mean: FloatArray = np.bincount(self.of_slide, values) / np.bincount(self.of_slide)
        return mean


def by_patient(
    values: FloatArray, risks: FloatArray, patient_ids: Sequence[str], groups: Sequence[object] | None = None
) -> Patients:
    """One row per patient and group: a patient dies once, however many slides there are.

    Args:
        values: [n, 2], time and event.
        risks: [n].
        patient_ids: [n].
        groups: [n].
    """
    rows = PatientRows.of(patient_ids, groups)
    times, events = values[rows.first, 0], values[rows.first, 1] == 1
    return Patients(rows.ids, times, events, rows.mean(risks), rows.groups)


def high_risk(patients: Patients) -> BoolArray:
    """Whether each patient's risk is above the median of its group, [P]."""
    high = np.zeros(len(patients.ids), dtype=bool)
    groups = np.array(patients.groups)
    for group in np.unique(groups):
        own = groups == group
        high[own] = patients.risks[own] > np.median(patients.risks[own])
    return high


def count_events(patient_ids: Sequence[str], events: BoolArray) -> int:
    """Patients with the event; arguments [n]."""
    return len({patient for patient, event in zip(patient_ids, events.tolist(), strict=True) if event})


def evaluate_survival(
    values: npt.ArrayLike,
    risks: npt.ArrayLike,
    patient_ids: Sequence[str],
    groups: Sequence[object] | None = None,
    resampling: Resampling = USUAL_RESAMPLING,
    n_slides: int | None = None,
) -> dict[str, Any]:
    """Concordance with its interval over resampled patients, ready for `metrics.json`.

    Args:
        values: [n, 2], time and event of every slide's patient.
        risks: [n]; a patient's is the mean over the slides.
        patient_ids: [n].
        groups: [n], the models that were asked; risks of different models are not compared. A slide that several
            tested stands there several times.
        resampling: how intervals are made; stratified, it draws patients among those who died as early or late, or did
            not, see `find_strata`.
        n_slides: how many slides there are, where some stand there several times; n by default.

    Returns:
        `n_slides`, `n_patients`, `n_events` (patients), `replicates`, `confidence`, `concordance` as {value, low,
        high}, `warnings`. There is no p of a log-rank test between those of high and low risk: folds share their
        training patients, which makes it too small.

    Raises:
        EvaluationError: shapes that do not fit, or a risk that is not finite.
    """
    known, predicted = np.asarray(values, dtype=np.float64), np.asarray(risks, dtype=np.float64)
    if (
        known.shape != (len(patient_ids), 2)
        or predicted.shape != (len(patient_ids),)
        or not np.isfinite(predicted).all()
    ):
        raise EvaluationError(
            f"got times and events {known.shape} and risks {predicted.shape} for {len(patient_ids)} patients → "
            f"expected [n, 2] and [n] finite numbers → give what one run predicted"
        )
    patients = by_patient(known, predicted, patient_ids, groups)

    def statistic(weights: FloatArray) -> dict[str, FloatArray]:
        return {"concordance": concordance(patients.times, patients.events, patients.risks, weights, patients.groups)}

    truth = np.stack([patients.times, patients.events], axis=1)
    strata = find_strata(SURVIVAL, ("time", "event"), truth, patients.ids)[0] if resampling.stratified else None
    spread = Spread.of(statistic, patients.ids, resampling, strata)
    n_events = count_events(patients.ids, patients.events)
    what = "the interval is too narrow to be trusted" if n_events >= 2 else "no interval is given"
    few = f"{n_events} patient(s) have the event: {what}"
    return {
        "n_slides": n_slides or len(known),
        "n_patients": len(set(patients.ids)),
        "n_events": n_events,
        **resampling.describe(),
        "concordance": spread.entry("concordance", n_events >= 2),
        "warnings": [few] if n_events < FEW_EVENTS else [],
    }
