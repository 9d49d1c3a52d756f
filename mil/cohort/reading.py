"""A label table becomes a cohort: its rows, the checks on them, and what was left out."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mil.arrays import FloatArray
from mil.cohort.cohort import MISSING_LABELS, Attrition, Cohort, refuse_unlearnable
from mil.cohort.identities import composed, refuse_alike
from mil.cohort.table import PATIENT_COLUMNS, SLIDE_COLUMNS, find_column, read_table
from mil.cohort.targets import CLASSIFICATION, MULTI_LABEL, find_strata, parse_values, target_columns
from mil.errors import CohortError, did_you_mean, listed


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
    known = _known_targets(path, named, task, target, columns, classes)
    nameless = tuple(f"row {row.line} (patient {row.patient_id!r})" for row in rows if not row.slide_id)
    respelled = _several_forms(cells[patient_at] for _, cells in records)
    cohort = Cohort(
        slide_ids=tuple(row.slide_id for row in known.rows),
        patient_ids=tuple(row.patient_id for row in known.rows),
        labels=known.labels,
        class_names=known.class_names,
        target=",".join(columns),
        attrition=replace(known.attrition, n_rows=len(rows), no_slide_id=nameless, respelled=respelled),
        task=task,
        values=known.values,
    )
    if for_training:
        refuse_unlearnable(cohort, f"{path}, column {target!r}")
    return cohort


class _Known(NamedTuple):
    """The rows whose target is known, and their targets as a cohort has them."""

    rows: list[_Row]
    attrition: Attrition
    labels: npt.NDArray[np.int64]
    class_names: tuple[str, ...]
    values: FloatArray | None


def _known_targets(
    path: Path, rows: list[_Row], task: str, target: str, columns: Sequence[str], classes: Sequence[str] | None
) -> _Known:
    if task == CLASSIFICATION:
        kept, attrition = _keep_labelled(path, rows, target, classes)
        class_names = tuple(sorted({row.label for row in kept}))
        labels = np.array([class_names.index(row.label) for row in kept], dtype=np.int64)
        return _Known(kept, attrition, labels, class_names, None)
    kept, attrition = _keep_valued(rows, task)
    values = _values(path, kept, task, columns)
    strata, names = find_strata(task, columns, values, [row.patient_id for row in kept])
    return _Known(kept, attrition, strata, names, values)


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
