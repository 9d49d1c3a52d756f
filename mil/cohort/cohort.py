"""The cohort: which slides, of which patients, with which label; and which rows were left out, and why."""

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mil.arrays import FloatArray
from mil.cohort.identities import composed, refuse_alike
from mil.cohort.table import PATIENT_COLUMNS, SLIDE_COLUMNS, find_column, read_table
from mil.cohort.targets import (
    CLASSIFICATION,
    KINDS,
    MULTI_LABEL,
    TargetKind,
    check_values,
    find_strata,
    parse_values,
    target_columns,
)
from mil.errors import CohortError, did_you_mean, listed

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


@dataclass(frozen=True)
class _Row:
    """One line of the table, as written but for surrounding blanks."""

    line: int
    slide_id: str
    patient_id: str
    labels: tuple[str, ...]

    @property
    def label(self) -> str:
        """That of a target of one column."""
        return self.labels[0]


def read_cohort(
    path: str | Path,
    target: str,
    slide_column: str | None = None,
    patient_column: str | None = None,
    classes: Sequence[str] | None = None,
    for_training: bool = True,
    task: str = CLASSIFICATION,
    distinct_patients: bool = False,
) -> Cohort:
    """Read a label table: CSV, UTF-8 with or without byte-order mark, separated by comma, semicolon or tab.

    Every cell is text ("001" and "NA" are ids like any other); blanks around a cell are dropped. An empty label means
    "no label", and so do NA, N/A, nan and null unless `classes` names them; such rows are listed in the attrition.

    Args:
        path: the table.
        target: column of the labels; for other tasks than classification one or several, separated by commas, see
            `mil.cohort.targets.COLUMNS`.
        slide_column: column of the slide ids; by default `slide_id` (also CLAM's), `FILENAME` (STAMP's) or `slide`.
        patient_column: column of the patient ids; by default `patient_id`, `case_id` (CLAM's) or `PATIENT` (STAMP's).
            The slide column again states that every slide is a patient of its own.
        classes: the labels to keep; by default all. Rows of other classes are listed in the attrition.
        for_training: require what folds need, two classes of two patients each.
        task: what the target is: a class, several labels, numbers, or survival.
        distinct_patients: patients whose ids look like two spellings of one (see `mil.cohort.identities`) are
            different people. Forms that Unicode calls the same are one patient always.

    Raises:
        CohortError: no such file, not a table, a column that is absent, an empty patient id, patient ids that look like
            two spellings of one, a slide that occurs twice, fewer than two classes, a class with fewer than two
            patients, or what `mil.cohort.targets` refuses.

    Example:
        >>> read_cohort("labels.csv", target="months,died", task="survival")      # doctest: +SKIP
    """
    path = Path(path)
    columns = target_columns(task, target)
    if task != CLASSIFICATION and classes:
        raise CohortError(f"got classes for {task} → expected none, as it has no classes → leave classes out")
    header, records = read_table(path)
    slide_at = find_column(path, header, "slide", slide_column, SLIDE_COLUMNS)
    patient_at = find_column(path, header, "patient", patient_column, PATIENT_COLUMNS)
    targets_at = [find_column(path, header, "target", column, ()) for column in columns]
    if {slide_at, patient_at} & set(targets_at):
        raise CohortError(
            f"{path}: got {target!r} as target and as id column → expected a column of labels → choose the target "
            f"from {listed(name for name in header if name)}"
        )
    rows = [
        _Row(line, cells[slide_at], composed(cells[patient_at]), tuple(cells[at] for at in targets_at))
        for line, cells in records
    ]
    named = [row for row in rows if row.slide_id]
    _refuse_duplicates(path, named)
    _refuse_empty_patients(path, named, header[patient_at])
    if not distinct_patients and patient_at != slide_at:
        refuse_alike(f"{path}, column {header[patient_at]!r}", _slides_of_patients(named))
    if task == CLASSIFICATION:
        kept, attrition = _keep_labelled(path, named, target, classes)
        values, class_names = None, tuple(sorted({row.label for row in kept}))
        labels = np.array([class_names.index(row.label) for row in kept], dtype=np.int64)
    else:
        kept, attrition = _keep_valued(named, task)
        values = _values(path, kept, task, columns)
        labels, class_names = find_strata(task, columns, values, [row.patient_id for row in kept])
    nameless = tuple(f"row {row.line} (patient {row.patient_id!r})" for row in rows if not row.slide_id)
    respelled = _several_forms(cells[patient_at] for _, cells in records)
    cohort = Cohort(
        slide_ids=tuple(row.slide_id for row in kept),
        patient_ids=tuple(row.patient_id for row in kept),
        labels=labels,
        class_names=class_names,
        target=",".join(columns),
        attrition=replace(attrition, n_rows=len(rows), no_slide_id=nameless, respelled=respelled),
        task=task,
        values=values,
    )
    if for_training:
        refuse_unlearnable(cohort, f"{path}, column {target!r}")
    return cohort


def _refuse_duplicates(path: Path, rows: list[_Row]) -> None:
    by_slide: dict[str, list[_Row]] = defaultdict(list)
    for row in rows:
        by_slide[row.slide_id].append(row)
    twice = {name: same for name, same in by_slide.items() if len(same) > 1}
    if not twice:
        return
    details = []
    for name, same in list(twice.items())[:8]:
        text = f"{name!r} in rows {', '.join(str(row.line) for row in same)}"
        for noun, values in (("labels", {r.label for r in same}), ("patients", {r.patient_id for r in same})):
            text += f" with {noun} {' and '.join(repr(each) for each in sorted(values))}" if len(values) > 1 else ""
        details.append(text)
    more = f" and {len(twice) - 8} more" if len(twice) > 8 else ""
    raise CohortError(
        f"{path}: got {len(twice)} slide id(s) more than once: {'; '.join(details)}{more} → expected one row per slide "
        f"→ delete the rows that do not hold"
    )


def _slides_of_patients(rows: list[_Row]) -> dict[str, list[str]]:
    slides: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        slides[row.patient_id].append(f"{row.slide_id}, row {row.line}")
    return slides


def _several_forms(written: Iterable[str]) -> tuple[str, ...]:
    """Patients that are written in more than one form."""
    forms: dict[str, set[str]] = defaultdict(set)
    for each in written:
        forms[composed(each)].add(each)
    return tuple(sorted(name for name, those in forms.items() if len(those) > 1))


def _refuse_empty_patients(path: Path, rows: list[_Row], column: str) -> None:
    empty = [row for row in rows if not row.patient_id]
    if empty:
        where = listed((f"{row.slide_id} (row {row.line})" for row in empty), limit=5)
        raise CohortError(
            f"{path}: got no patient id in column {column!r} for {where} → expected a patient for every slide, because "
            f"folds are split by patient → fill in the column"
        )


def _keep_labelled(
    path: Path, rows: list[_Row], target: str, classes: Sequence[str] | None
) -> tuple[list[_Row], Attrition]:
    """Rows that have one of the classes asked for, and where the others went."""
    present = sorted({row.label for row in rows if row.label})
    for name in classes or ():
        if name not in present:
            raise CohortError(
                f"{path}: got {name!r} in classes → expected labels of column {target!r}: {listed(present, 30)} → "
                f"{did_you_mean(name, present)}name classes that occur"
            )
    wanted = set(classes) if classes else {each for each in present if each.lower() not in MISSING_LABELS}
    lost: dict[str, list[str]] = {"no_label": [], "missing_label": [], "other_class": []}
    kept = []
    for row in rows:
        if row.label in wanted:
            kept.append(row)
            continue
        missing = "missing_label" if row.label.lower() in MISSING_LABELS else "other_class"
        lost[missing if row.label else "no_label"].append(row.slide_id)
    reasons = {reason: tuple(ids) for reason, ids in lost.items()}
    return kept, Attrition(n_rows=len(rows), n_kept=len(kept), **reasons)


def _keep_valued(rows: list[_Row], task: str) -> tuple[list[_Row], Attrition]:
    """Rows whose target is known, and those without; of several labels one that is known is enough."""
    lost: dict[str, list[str]] = {"no_label": [], "missing_label": []}
    kept = []
    for row in rows:
        known = [_known(cell) for cell in row.labels]
        if all(known) or (task == MULTI_LABEL and any(known)):
            kept.append(row)
            continue
        lost["missing_label" if any(cell and not _known(cell) for cell in row.labels) else "no_label"].append(
            row.slide_id
        )
    reasons = {reason: tuple(ids) for reason, ids in lost.items()}
    return kept, Attrition(n_rows=len(rows), n_kept=len(kept), **reasons)


def _values(path: Path, rows: list[_Row], task: str, columns: Sequence[str]) -> FloatArray:
    """The targets of these rows, [n, columns]."""
    found = [
        parse_values(
            path,
            task,
            columns,
            [cell if _known(cell) else "" for cell in row.labels],
            f"slide {row.slide_id} (row {row.line})",
        )
        for row in rows
    ]
    return np.array(found, dtype=np.float64).reshape(len(rows), len(columns))


def _known(cell: str) -> bool:
    return bool(cell) and cell.lower() not in MISSING_LABELS


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
