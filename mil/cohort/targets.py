"""Targets that are no single class: several labels, numbers, survival; read from a table, and cut into strata.

Splits keep classes even over folds. These targets have none, so every slide gets a *stratum* in their place: the
quarter in which a number lies, the rarest label that a slide has, early or late death or none.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mil.arrays import FloatArray, IntArray
from mil.errors import CohortError, listed

CLASSIFICATION, MULTI_LABEL, REGRESSION, SURVIVAL = TASKS = ("classification", "multilabel", "regression", "survival")
COLUMNS = {
    MULTI_LABEL: "one or more columns of 0 and 1, such as er,pr,her2",
    REGRESSION: "one or more columns of numbers, such as ki67",
    SURVIVAL: "two columns, the time and whether the event happened then, such as months,died",
}


# What a spreadsheet, R and cBioPortal write for yes and no.
YES = frozenset({"1", "1.0", "true", "yes", "positive", "pos", "dead", "deceased", "event"})
NO = frozenset({"0", "0.0", "false", "no", "negative", "neg", "alive", "living", "censored"})
_CBIOPORTAL = re.compile(r"([01]):[A-Za-z ]+")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
STRATA = 4


@dataclass(frozen=True)
class TargetKind:
    """What sets one kind of target apart from the others.

    Attributes:
        has_classes: every slide is of one class; else there are columns of values, and strata for the splits.
        has_probabilities: what is predicted are probabilities, of classes or of labels.
        has_scale: predictions of several models have one scale. Risks have none, so that patients are compared within
            the fold of one model, and models are averaged in units of their spread.
        prediction: a column of predictions, with the class or column in the place of ``{}``.
    """

    has_classes: bool
    has_probabilities: bool
    has_scale: bool
    prediction: str

    def prediction_names(self, names: Sequence[str]) -> tuple[str, ...]:
        """Columns of predictions of these classes or columns, each once.

        >>> KINDS[REGRESSION].prediction_names(["ki67"]), KINDS[SURVIVAL].prediction_names(["months", "died"])
        (('predicted_ki67',), ('risk',))
        """
        return tuple(dict.fromkeys(self.prediction.format(name) for name in names))


KINDS = {
    CLASSIFICATION: TargetKind(has_classes=True, has_probabilities=True, has_scale=True, prediction="p_{}"),
    MULTI_LABEL: TargetKind(has_classes=False, has_probabilities=True, has_scale=True, prediction="p_{}"),
    REGRESSION: TargetKind(has_classes=False, has_probabilities=False, has_scale=True, prediction="predicted_{}"),
    SURVIVAL: TargetKind(has_classes=False, has_probabilities=False, has_scale=False, prediction="risk"),
}
"""By task."""


def target_columns(task: str, target: str) -> tuple[str, ...]:
    """The columns that ``target`` names, separated by commas.

    Raises:
        CohortError: an unknown task, an empty or repeated name, or not two columns for survival.
    """
    if task not in TASKS:
        raise CohortError(f"got task {task!r} → expected one of {listed(TASKS)} → choose one of these")
    if task == CLASSIFICATION:
        return (target,)
    columns = tuple(name.strip() for name in target.split(","))
    twice = len(set(columns)) < len(columns)
    if twice or not all(columns) or (task == SURVIVAL and len(columns) != 2):
        raise CohortError(f"got target {target!r} for {task} → expected {COLUMNS[task]} → name them so")
    return columns


def parse_values(path: Path, task: str, columns: Sequence[str], cells: Sequence[str], where: str) -> FloatArray:
    """The values of one row, [columns].

    Args:
        path: the table, for the message.
        task: not classification.
        columns: their names.
        cells: their text; an empty one of a multi-label target is unknown, NaN.
        where: names the row.

    Raises:
        CohortError: a cell that cannot be read so, or a time below zero.
    """
    values = np.full(len(columns), np.nan)
    for at, (column, cell) in enumerate(zip(columns, cells, strict=True)):
        answer = task == MULTI_LABEL or (task == SURVIVAL and at == 1)
        if cell:
            read = _answer(cell) if answer else _number(cell)
            if read is None or (task == SURVIVAL and read < 0):
                expected = (
                    "0 or 1 (or yes/no, true/false, positive/negative, dead/alive)"
                    if answer
                    else f"{'a time of 0 or more' if task == SURVIVAL else 'a number'}, with a point before decimals"
                )
                raise CohortError(
                    f"{path}: got {cell!r} in column {column!r} for {where} → expected {expected} → mend the cell, or "
                    f"empty it, which leaves it out"
                )
            values[at] = read
    return values


def _answer(cell: str) -> float | None:
    # cBioPortal writes "1:DECEASED" and "0:LIVING"
    found = _CBIOPORTAL.fullmatch(cell)
    text = found[1] if found else cell.lower()
    return 1.0 if text in YES else 0.0 if text in NO else None


def _number(cell: str) -> float | None:
    if not _NUMBER.fullmatch(cell):
        return None
    value = float(cell)
    return value if math.isfinite(value) else None


def find_strata(
    task: str, columns: Sequence[str], values: FloatArray, patient_ids: Sequence[str]
) -> tuple[IntArray, tuple[str, ...]]:
    """What splits keep even: the stratum [n] of every slide, and the names of the strata.

    A stratum of fewer than two patients, which no split could hold in training and test, joins the largest.

    Args:
        task: not classification.
        columns: names of the targets.
        values: [n, columns].
        patient_ids: [n].
    """
    found = {MULTI_LABEL: _label_strata, REGRESSION: _number_strata, SURVIVAL: _survival_strata}[task]
    names = found(columns, values)
    counts = Counter(name for name, _ in set(zip(names, patient_ids, strict=True)))
    largest = max(counts, key=lambda name: (counts[name], name), default="")
    names = [name if counts[name] >= 2 else largest for name in names]
    order = sorted(set(names))
    return np.array([order.index(name) for name in names], dtype=np.int64), tuple(order)


def _number_strata(columns: Sequence[str], values: FloatArray) -> list[str]:
    """By the quarters of the first column."""
    column = values[:, 0]
    edges = np.unique(np.quantile(column, np.linspace(0, 1, STRATA + 1)[1:-1])) if len(column) else np.empty(0)
    parts = np.searchsorted(edges, column, side="left")
    if len(np.unique(parts)) < 2:
        # more than three quarters are the largest number
        parts = np.searchsorted(edges, column, side="right")
    return [f"{columns[0]}: part {at + 1}" for at in parts.tolist()]


def _label_strata(columns: Sequence[str], values: FloatArray) -> list[str]:
    """By the rarest label that a slide has, so that the rarest are spread most evenly."""
    rarest_first = np.argsort(np.nansum(values, axis=0), kind="stable").tolist()
    return [next((columns[at] for at in rarest_first if row[at] == 1), "none of them") for row in values]


def _survival_strata(columns: Sequence[str], values: FloatArray) -> list[str]:
    """By event and no event, and events by the half of their times."""
    times, events = values[:, 0], values[:, 1] == 1
    middle = float(np.median(times[events])) if events.any() else 0.0
    early = np.where(times <= middle, f"{columns[1]}, early", f"{columns[1]}, late")
    found: list[str] = np.where(events, early, f"no {columns[1]}").tolist()
    return found


def check_values(where: str, task: str, columns: Sequence[str], values: FloatArray, patient_ids: Sequence[str]) -> None:
    """Refuse targets that nothing can be learned from.

    Raises:
        CohortError: a number that is the same everywhere, a label that fewer than two patients have or lack, fewer
            than two patients with the event, or slides of one patient with different times.
    """
    patients = np.array(patient_ids)
    if task == SURVIVAL:
        _check_survival(where, columns, values, patients)
        return
    for at, column in enumerate(columns):
        if task == REGRESSION and len(np.unique(values[:, at])) < 2:
            raise CohortError(
                f"{where}: got {len(values)} slides with the same number in column {column!r} → expected numbers that "
                f"differ → check the column"
            )
        for answer, verb in ((1.0, "have"), (0.0, "lack")) if task == MULTI_LABEL else ():
            who = np.unique(patients[values[:, at] == answer])
            if len(who) < 2:
                raise CohortError(
                    f"{where}: got {len(who)} patient(s) that {verb} label {column!r} → expected 2 or more, so that "
                    f"one can be trained on while another is tested → leave the label out of the target"
                )


def _check_survival(where: str, columns: Sequence[str], values: FloatArray, patients: npt.NDArray[np.str_]) -> None:
    died = np.unique(patients[values[:, 1] == 1])
    if len(died) < 2:
        raise CohortError(
            f"{where}: got {len(died)} patient(s) with an event in column {columns[1]!r} → expected 2 or more → check "
            f"that the target is time,event in this order"
        )
    check_times(where, columns, values, patients)


def check_times(where: str, columns: Sequence[str], values: FloatArray, patients: npt.NDArray[np.str_]) -> None:
    """Refuse slides of one patient with different times or events: nobody dies twice.

    Args:
        where: names the table, for the message.
        columns: names of time and event.
        values: [n, 2].
        patients: [n].

    Raises:
        CohortError: there are some.
    """
    for patient in np.unique(patients).tolist():
        own = np.unique(values[patients == patient], axis=0)
        if len(own) > 1:
            raise CohortError(
                f"{where}: got patient {patient!r} with {len(own)} different pairs of {listed(columns)} → expected one "
                f"time and event per patient → write the same into all rows of the patient"
            )
