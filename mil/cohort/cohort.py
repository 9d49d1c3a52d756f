"""The cohort: which slides, of which patients, with which label; and which rows were left out, and why."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from hashlib import sha256

import numpy as np
import numpy.typing as npt

from mil.arrays import FloatArray
from mil.cohort.targets import (
    CLASSIFICATION,
    KINDS,
    TargetKind,
    check_values,
    target_columns,
)
from mil.errors import CohortError, listed

# What spreadsheets, R and pandas write for an empty cell. "none" is not among them: it is a real class in some tables.
MISSING_LABELS = frozenset({"na", "n/a", "#n/a", "nan", "<na>", "null"})


@dataclass(frozen=True)
class Attrition:
    """What became of every row of the table and of every slide of the store.

    `respelled` are patients whose id the table writes in several forms that Unicode calls the same; they are one here.
    `no_slide` (rows whose slide is not in the store) and `no_row` (slides of the store that no row names) are None
    until `join_store` has looked.
    """

    n_rows: int
    n_kept: int
    no_slide_id: tuple[str, ...] = ()
    respelled: tuple[str, ...] = ()
    no_label: tuple[str, ...] = ()
    missing_label: tuple[str, ...] = ()
    other_class: tuple[str, ...] = ()
    no_slide: tuple[str, ...] | None = None
    no_row: tuple[str, ...] | None = None

    def rows(self) -> list[tuple[str, int, tuple[str, ...]]]:
        """(reason, count, ids) in the order in which rows are lost, ending with what is kept."""
        lost = [
            ("rows without a slide id", self.no_slide_id),
            ("rows without a label (empty cell)", self.no_label),
            ("rows whose label reads as missing (NA, nan, null)", self.missing_label),
            ("rows of a class that was not asked for", self.other_class),
            ("rows whose slide is not in the store", self.no_slide),
            ("slides in the store without a row", self.no_row),
        ]
        body = [(reason, len(ids), ids) for reason, ids in lost if ids is not None]
        if self.respelled:
            body.append(
                ("patients written in several Unicode forms (each is one)", len(self.respelled), self.respelled)
            )
        return [("rows in the table", self.n_rows, ()), *body, ("slides kept", self.n_kept, ())]


@dataclass(frozen=True, eq=False)
class Cohort:
    """Labelled slides of one target, in the order of the table.

    Where the target is not a class, `values` holds it, and the "classes" are the strata that splits keep even (see
    `mil.cohort.targets.find_strata`).

    Attributes:
        slide_ids: [n] unique.
        patient_ids: [n]; a patient may have several slides, with several labels.
        labels: int64 [n], index into `class_names`.
        class_names: sorted, spelled as in the table.
        target: the column the labels come from, or several, separated by commas.
        attrition: what was left out on the way here.
        task: one of `mil.cohort.targets.TASKS`.
        values: float64 [n, columns] of numbers, of labels (0, 1, NaN where unknown) or of time and event; None for
            classes.

    Example:
        >>> cohort = read_cohort("labels.csv", target="subtype")      # doctest: +SKIP
        >>> cohort = join_store(cohort, store.slide_ids("uni2"))      # doctest: +SKIP
    """

    slide_ids: tuple[str, ...]
    patient_ids: tuple[str, ...]
    labels: npt.NDArray[np.int64]
    class_names: tuple[str, ...]
    target: str
    attrition: Attrition
    task: str = CLASSIFICATION
    values: FloatArray | None = None

    def __len__(self) -> int:
        return len(self.slide_ids)

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns of `targets`."""
        return target_columns(self.task, self.target)

    @property
    def kind(self) -> TargetKind:
        """What sets its target apart from others."""
        return KINDS[self.task]

    @property
    def has_classes(self) -> bool:
        """Whether every slide is of one class; else `values` hold the target."""
        return self.kind.has_classes

    @property
    def stated_classes(self) -> tuple[str, ...]:
        """The classes, as files and models state them: none of other targets."""
        return self.class_names if self.has_classes else ()

    @property
    def predicted_names(self) -> tuple[str, ...]:
        """What the values of a prediction are of: classes or columns."""
        return self.class_names if self.has_classes else self.columns

    @property
    def prediction_names(self) -> tuple[str, ...]:
        """Columns of tables that hold predictions, such as ``p_<class>``."""
        return self.kind.prediction_names(self.predicted_names)

    def is_predicted_like(self, other: "Cohort") -> bool:
        """Whether models of both say the same things, matched by name; time and event have an order."""
        names, others = self.predicted_names, other.predicted_names
        same = set(names) == set(others) if self.kind.has_scale else names == others
        return self.task == other.task and same

    @property
    def noun(self) -> str:
        """What `class_names` name."""
        return "class" if self.has_classes else "stratum"

    @property
    def targets(self) -> npt.NDArray[np.int64] | FloatArray:
        """What is learned: `labels`, or `values` where there are some."""
        return self.labels if self.values is None else self.values

    def digest(self) -> str:
        """SHA-256 of target, slides, patients and labels, whatever their order; numbers to nine digits, as tables."""
        truths = [self.class_names[label] for label in self.labels.tolist()]
        if self.values is not None:
            truths = [repr([float(f"{value:.9g}") for value in row]) for row in self.values.tolist()]
        rows = sorted(zip(self.slide_ids, self.patient_ids, truths, strict=True))
        what = self.target if self.values is None else [self.task, self.target]
        return sha256(json.dumps([what, rows]).encode()).hexdigest()

    def subset(self, indices: Iterable[int]) -> "Cohort":
        """The slides at these positions, in this order; classes and attrition stay as they are."""
        chosen = [int(index) for index in indices]
        return replace(
            self,
            slide_ids=tuple(self.slide_ids[index] for index in chosen),
            patient_ids=tuple(self.patient_ids[index] for index in chosen),
            labels=self.labels[np.array(chosen, dtype=np.int64)],
            values=None if self.values is None else self.values[np.array(chosen, dtype=np.int64)],
        )


def refuse_unlearnable(cohort: Cohort, where: str) -> None:
    """Refuse a cohort that no folds can be made of.

    Raises:
        CohortError: fewer than two classes, a class of one patient, or equal values; ``where`` names the table.
    """
    if cohort.values is not None:
        check_values(where, cohort.task, cohort.columns, cohort.values, cohort.patient_ids)
    _refuse_small_classes(cohort, where)


def _refuse_small_classes(cohort: Cohort, where: str) -> None:
    """Two classes or more, each of two patients or more: with one, no patient-grouped split can train and test it."""
    patients: dict[int, set[str]] = {index: set() for index in range(len(cohort.class_names))}
    for label, patient in zip(cohort.labels.tolist(), cohort.patient_ids, strict=True):
        patients[label].add(patient)
    if len(patients) < 2 and cohort.values is not None:
        raise CohortError(
            f"{where}: got targets that are alike but for fewer than 2 patients → expected some that differ, for "
            f"training and for testing → check the target columns"
        )
    if len(patients) < 2:
        raise CohortError(
            f"{where}: got {len(patients)} class(es), {listed(cohort.class_names) or 'no labelled slide'} → expected "
            f"two or more → check the target column"
        )
    small = [
        f"{cohort.class_names[at]!r} ({listed(sorted(who)) or 'none'})" for at, who in patients.items() if len(who) < 2
    ]
    if small:
        raise CohortError(
            f"{where}: got fewer than 2 patients for class {', '.join(small)} → expected 2 or more in every class, so "
            f"that one can be trained on while another is tested → add slides of other patients, merge the class with "
            f"another in the table, or empty its cells, which leaves it out"
        )
