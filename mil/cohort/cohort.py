"""The cohort: which slides, of which patients, with which label; and which rows were left out, and why."""

import csv
import io
import json
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt

from mil.cohort.targets import (
    CLASSIFICATION,
    MULTI_LABEL,
    SURVIVAL,
    FloatArray,
    check_values,
    find_strata,
    parse_values,
    target_columns,
)
from mil.errors import CohortError, did_you_mean, listed

SLIDE_COLUMNS = ("slide_id", "filename", "slide")
PATIENT_COLUMNS = ("patient_id", "case_id", "patient")
# What spreadsheets, R and pandas write for an empty cell. "none" is not among them: it is a real class in some tables.
MISSING_LABELS = frozenset({"na", "n/a", "#n/a", "nan", "<na>", "null"})
# Endings that tables add to ids. Anything else after a dot belongs to the name ("S1.A1", "TCGA-A1.0a7f").
SLIDE_SUFFIXES = (".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".svslide", ".czi", ".dcm")
OTHER_SUFFIXES = (".jpg", ".jpeg", ".png", ".h5", ".hdf5", ".pt", ".npy", ".zarr")
NO_COLUMN = {
    "slide": "pass slide_column=<its name>; a table of patients only must first be merged with a table of slides",
    "patient": "pass patient_column=<its name>; if every slide is a patient of its own, say so by passing "
    "patient_column=<the slide column>",
}


@dataclass(frozen=True)
class Attrition:
    """What became of every row of the table and of every slide of the store.

    `no_slide` (rows whose slide is not in the store) and `no_row` (slides of the store that no row names) are None
    until `join_store` has looked.
    """

    n_rows: int
    n_kept: int
    no_slide_id: tuple[str, ...] = ()
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
    def predicted_names(self) -> tuple[str, ...]:
        """What the values of a prediction are of: classes or columns."""
        return self.class_names if self.values is None else self.columns

    def is_predicted_like(self, other: "Cohort") -> bool:
        """Whether models of both say the same things, matched by name; time and event have an order."""
        names, others = self.predicted_names, other.predicted_names
        return self.task == other.task and (names == others if self.task == SURVIVAL else set(names) == set(others))

    @property
    def noun(self) -> str:
        """What `class_names` name."""
        return "class" if self.values is None else "stratum"

    @property
    def targets(self) -> npt.NDArray[np.int64] | FloatArray:
        """What is learned: `labels`, or `values` where there are some."""
        return self.labels if self.values is None else self.values

    def digest(self) -> str:
        """SHA-256 of target, slides, patients and labels, whatever their order; numbers to nine digits, as tables."""
        said = [self.class_names[label] for label in self.labels.tolist()]
        if self.values is not None:
            said = [repr([float(f"{value:.9g}") for value in row]) for row in self.values.tolist()]
        rows = sorted(zip(self.slide_ids, self.patient_ids, said, strict=True))
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

    Raises:
        CohortError: no such file, not a table, a column that is absent, an empty patient id, a slide that occurs
            twice, fewer than two classes, a class with fewer than two patients, or what `mil.cohort.targets` refuses.

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
        _Row(line, cells[slide_at], cells[patient_at], tuple(cells[at] for at in targets_at)) for line, cells in records
    ]
    named = [row for row in rows if row.slide_id]
    _refuse_duplicates(path, named)
    _refuse_empty_patients(path, named, header[patient_at])
    if task == CLASSIFICATION:
        kept, attrition = _keep_labelled(path, named, target, classes)
        values, class_names = None, tuple(sorted({row.label for row in kept}))
        labels = np.array([class_names.index(row.label) for row in kept], dtype=np.int64)
    else:
        kept, attrition = _keep_valued(named, task)
        values = _values(path, kept, task, columns)
        labels, class_names = find_strata(task, columns, values, [row.patient_id for row in kept])
    nameless = tuple(f"row {row.line} (patient {row.patient_id!r})" for row in rows if not row.slide_id)
    cohort = Cohort(
        slide_ids=tuple(row.slide_id for row in kept),
        patient_ids=tuple(row.patient_id for row in kept),
        labels=labels,
        class_names=class_names,
        target=",".join(columns),
        attrition=replace(attrition, n_rows=len(rows), no_slide_id=nameless),
        task=task,
        values=values,
    )
    if for_training:
        _refuse_unlearnable(cohort, f"{path}, column {target!r}")
    return cohort


def join_store(cohort: Cohort, available_slide_ids: Iterable[str], for_training: bool = True) -> Cohort:
    """Keep the slides that a store holds, under the store's ids, and complete the attrition.

    A row joins the slide of exactly its id; else the only slide of its file name, with or without a file's ending
    (`x.svs` joins `siteA/x`). Folders that both sides name must agree: `siteB/x` never joins `siteA/x`.

    Raises:
        CohortError: a row fits several slides, two rows fit one, nothing fits, or a class is left with fewer than
            two patients although it is ``for_training``.
    """
    available = tuple(dict.fromkeys(available_slide_ids))
    index = SlideIndex(available)
    found = [index.find(slide_id) for slide_id in cohort.slide_ids]
    _refuse_ambiguous(cohort.slide_ids, found)
    joined = {position: ids[0] for position, ids in enumerate(found) if ids}
    if not joined:
        raise CohortError(
            f"got no slide in common: table ids such as {listed(cohort.slide_ids, 3)}, store ids such as "
            f"{listed(available, 3)} → expected the same names → choose the table's slide column with slide_column="
        )
    old = cohort.attrition
    unlabelled = (*old.no_label, *old.missing_label, *old.other_class)
    has_row = set(joined.values()).union(*(index.find(slide_id) for slide_id in unlabelled))
    attrition = replace(
        old,
        n_kept=len(joined),
        no_slide=tuple(name for at, name in enumerate(cohort.slide_ids) if at not in joined),
        no_row=tuple(name for name in available if name not in has_row),
    )
    result = replace(cohort.subset(joined), slide_ids=tuple(joined.values()), attrition=attrition)
    where = f"slides of column {cohort.target!r} that the store holds"
    if attrition.no_slide:
        where = (
            f"{where} ({len(attrition.no_slide)} rows name slides that it lacks, such as "
            f"{listed(attrition.no_slide, 3)}; it "
            f"has {listed(available, 3)}; were leading zeros lost?)"
        )
    if result.values is not None:
        labels, class_names = find_strata(result.task, result.columns, result.values, result.patient_ids)
        result = replace(result, labels=labels, class_names=class_names)
    if for_training:
        _refuse_unlearnable(result, where)
    return result


class SlideIndex:
    """Store ids by file name, to find the one that a table means."""

    def __init__(self, slide_ids: Iterable[str]) -> None:
        self._exact = frozenset(slide_ids)
        self._full: dict[str, list[tuple[str, tuple[str, ...]]]] = defaultdict(list)
        self._stem: dict[str, list[tuple[str, tuple[str, ...]]]] = defaultdict(list)
        for slide_id in self._exact:
            full, stem = _path_parts(slide_id)
            self._full[full[-1]].append((slide_id, full))
            if stem != full:
                self._stem[stem[-1]].append((slide_id, stem))

    def find(self, slide_id: str) -> list[str]:
        """The store ids that this table id may mean: none, one, or several where it is ambiguous."""
        if slide_id in self._exact:
            return [slide_id]
        full, stem = _path_parts(slide_id)
        for wanted, names in ((full, self._full), (stem, self._full), (full, self._stem)):
            near = names.get(wanted[-1], [])
            same = [name for name, parts in near if parts == wanted]
            tails = [name for name, parts in near if _one_ends_with_other(parts, wanted)]
            if same or tails:
                return sorted(same or tails)
        return []


def _path_parts(slide_id: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The folders and name of an id, and the same without a file's ending."""
    # macOS writes file names decomposed (NFD), spreadsheets composed (NFC): the same letters to a reader.
    path = PurePosixPath(unicodedata.normalize("NFC", slide_id).replace("\\", "/"))
    parts = path.parts or (slide_id,)
    stem = path.stem if path.suffix.lower() in (*SLIDE_SUFFIXES, *OTHER_SUFFIXES) else parts[-1]
    return parts, (*parts[:-1], stem)


def _one_ends_with_other(one: tuple[str, ...], other: tuple[str, ...]) -> bool:
    shared = min(len(one), len(other))
    return one[-shared:] == other[-shared:]


def read_table(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Column names, and (line number, cells) of every row that is not blank."""
    text = _read_text(path)
    delimiter = _find_delimiter(path, text)
    try:
        lines = _parse(text, delimiter)
    except csv.Error as error:
        raise CohortError(
            f"{path}: got a table that does not parse ({error}) → expected CSV with balanced quotes → mend the quotes"
        ) from error
    header = lines[0][1]
    for line, cells in lines[1:]:
        if len(cells) != len(header):
            raise CohortError(
                f"{path}: got {len(cells)} cells in row {line} → expected {len(header)}, as in the header, separated "
                f"by {delimiter!r} → quote cells that hold the separator, or fill in the missing ones"
            )
    if len(lines) == 1:
        raise CohortError(f"{path}: got a header and no rows → expected a row per slide → check the export")
    return header, lines[1:]


def _read_text(path: Path) -> str:
    if not path.is_file():
        beside = [each.name for each in path.parent.glob("*.[ct]sv")] if path.parent.is_dir() else []
        raise CohortError(
            f"got {path}, {'a folder' if path.is_dir() else 'which does not exist'} → expected a label table (CSV) → "
            f"{did_you_mean(path.name, beside)}check the path"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise CohortError(
            f"{path}: got bytes that are not UTF-8 (byte {error.start}) → expected a CSV file in UTF-8 → export the "
            f"table as 'CSV UTF-8'"
        ) from error
    if not text.strip():
        raise CohortError(f"{path}: got an empty file → expected a header and a row per slide → check the export")
    return text


def _find_delimiter(path: Path, text: str) -> str:
    """The one of comma, semicolon and tab that splits the header, and every row alike."""
    splitting = [each for each in ",;\t" if _header_width(text, each) > 1]
    if len(splitting) > 1:
        splitting = [each for each in splitting if _is_rectangular(text, each)] or splitting
    if len(splitting) == 1:
        return splitting[0]
    first = text.strip().splitlines()[0]
    raise CohortError(
        f"{path}: got the header {first!r}, split by {listed(splitting) if splitting else 'no separator'} → expected "
        f"at least two columns, separated by comma, semicolon or tab → export with one separator"
    )


def _parse(text: str, delimiter: str) -> list[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
    rows = ([cell.strip() for cell in cells] for cells in reader)
    return [(reader.line_num, cells) for cells in rows if any(cells)]


def _header_width(text: str, delimiter: str) -> int:
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    return len(next((cells for cells in lines if any(cell.strip() for cell in cells)), []))


def _is_rectangular(text: str, delimiter: str) -> bool:
    try:
        return len({len(cells) for _, cells in _parse(text, delimiter)}) == 1
    except csv.Error:
        return False


def find_column(path: Path, header: list[str], role: str, asked: str | None, known: tuple[str, ...]) -> int:
    """Position of the column that was asked for, else of the first known name (in any case)."""
    names = (asked,) if asked is not None else known
    for name in names:
        spelled = [at for at, each in enumerate(header) if (each if asked is not None else each.lower()) == name]
        if len(spelled) > 1:
            raise CohortError(
                f"{path}: got {len(spelled)} columns named {name!r} → expected one {role} column → rename the others"
            )
        if spelled:
            return spelled[0]
    columns = listed((name for name in header if name), limit=30)
    if asked is not None:
        raise CohortError(
            f"{path}: got {asked!r} as {role} column → expected one of {columns} → "
            f"{did_you_mean(asked, header)}name one of these columns"
        )
    raise CohortError(
        f"{path}: got the columns {columns} and no {role} column → expected one of {listed(known)} → " + NO_COLUMN[role]
    )


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


def _refuse_unlearnable(cohort: Cohort, where: str) -> None:
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


def _refuse_ambiguous(slide_ids: tuple[str, ...], found: list[list[str]]) -> None:
    owners: dict[str, str] = {}
    for slide_id, candidates in zip(slide_ids, found, strict=True):
        if len(candidates) > 1:
            raise CohortError(
                f"got table id {slide_id!r}, which fits several slides of the store: {listed(candidates)} → expected "
                f"one → write the store's id of the slide that is meant into the table"
            )
        for candidate in candidates:
            if candidate in owners:
                raise CohortError(
                    f"got table ids {owners[candidate]!r} and {slide_id!r}, which both fit the slide {candidate!r} of "
                    f"the store → expected one row per slide → delete one, or write the store's ids into the table"
                )
            owners[candidate] = slide_id
