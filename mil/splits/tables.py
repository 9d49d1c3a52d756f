"""Splits that stand in files: a column of the label table, CLAM's `splits_k.csv`, or our own `splits.csv`.

Slide ids join by the rules of `join_store`: exactly, else by a unique file name, with or without its ending.
"""

import csv
import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from mil.cohort.cohort import MISSING_LABELS, Cohort
from mil.cohort.joining import SlideIndex
from mil.cohort.table import SLIDE_COLUMNS, find_column, read_table
from mil.errors import SplitError, listed
from mil.files import unguarded, write_csv
from mil.splits.fixed import fixed_splits, part_name
from mil.splits.record import SplitRecord, file_hash
from mil.splits.splits import PART_NAMES, TEST_CODE, UNUSED, UNUSED_CODE, Splits, number_of_repeat
from mil.splits.verification import verify_splits

OWN_FILE = "splits.csv"
_CLAM_FILE = re.compile(r"splits_(\d+)\.csv")


def read_column(path: str | Path, column: str, cohort: Cohort, slide_column: str | None = None) -> tuple[str, ...]:
    """A column of a table, for every slide of the cohort, [n]; empty where the table has no row or no value.

    Args:
        path: the table, as `read_cohort` reads it.
        column: its column.
        cohort: n slides, with the ids of a store or of this table.
        slide_column: column of the slide ids, when it is not called `slide_id`, `FILENAME` or `slide`.

    Raises:
        CohortError: no such table or column.
        SplitError: an id that fits several slides, or two rows that contradict each other.
    """
    path = Path(path)
    header, records = read_table(path)
    slide_at = find_column(path, header, "slide", slide_column, SLIDE_COLUMNS)
    value_at = find_column(path, header, "split", column, ())
    rows = ((cells[slide_at], cells[value_at]) for _, cells in records if cells[slide_at])
    values, _ = _join(rows, cohort, f"{path}, column {column!r}")
    return tuple(values)


def read_split_column(
    path: str | Path,
    column: str,
    cohort: Cohort,
    slide_column: str | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    validation_fraction: float = 0.2,
    split_seed: int = 0,
) -> Splits:
    """One fold from a column of the label table with the words train, val (or validation) and test.

    Args:
        path: the table.
        column: its column; an empty cell leaves the slide out.
        cohort: n slides.
        slide_column: see `read_column`.
        seeds: see `fixed_splits`, as the arguments that follow.
        validation_fraction: of the training part, where no slide is said to validate.
        split_seed: draws the validation part then.

    Raises:
        CohortError, SplitError: see `read_column` and `fixed_splits`.
    """
    path = Path(path)
    cells = read_column(path, column, cohort, slide_column)
    words = ["" if cell.lower() in MISSING_LABELS else cell for cell in cells]
    record = SplitRecord("fixed", {"column": column}, str(path), file_hash(path))
    return fixed_splits(cohort, [words], record, seeds, validation_fraction, split_seed)


def read_clam_splits(
    path: str | Path,
    cohort: Cohort,
    seeds: Sequence[int] = (0, 1, 2),
    validation_fraction: float = 0.2,
    split_seed: int = 0,
) -> Splits:
    """A fold per `splits_k.csv` of CLAM: columns train, val and test that list slide ids.

    CLAM draws the test part of each fold anew, so that a slide may be tested in several folds or in none; that is
    reported. Slides that the files name and the cohort lacks are reported too.

    Args:
        path: the folder that holds `splits_0.csv` and so on, or one such file.
        cohort: n slides.
        seeds: see `fixed_splits`, as the arguments that follow.
        validation_fraction: of a training part, where the val column is empty or absent.
        split_seed: draws the validation part then.

    Raises:
        CohortError: a file is no table.
        SplitError: no such files, a slide in two columns, a column without any slide of the cohort, or parts that
            `fixed_splits` refuses.
    """
    path = Path(path)
    files = _clam_files(path)
    parts, absent = [], dict[str, None]()
    for file in files:
        words, unknown = _read_clam_file(file, cohort)
        parts.append(words)
        absent.update(dict.fromkeys(unknown))
    record = SplitRecord("fixed", {"files": [file.name for file in files]}, str(path), file_hash(*files))
    splits = fixed_splits(cohort, parts, record, seeds, validation_fraction, split_seed)
    if not absent:
        return splits
    text = f"{len(absent)} slides of the split are not in the cohort ({listed(absent, 4)})"
    return replace(splits, warnings=(*splits.warnings, text))


def read_split_file(
    path: str | Path,
    cohort: Cohort,
    seeds: Sequence[int] = (0, 1, 2),
    validation_fraction: float = 0.2,
    split_seed: int = 0,
) -> Splits:
    """Splits from whatever file or folder holds some: our `splits.csv`, a run folder, or CLAM's files.

    Args:
        path: a file, or a folder of one of these.
        cohort: n slides.
        seeds: those to train with; a `splits.csv` has to hold them.
        validation_fraction: see `read_clam_splits`; not read for a `splits.csv`.
        split_seed: the same.

    Raises:
        SplitError: no splits there, or splits that `read_splits` or `read_clam_splits` refuses.
        CohortError: a file is no table.
    """
    path = Path(path)
    own = path / OWN_FILE if path.is_dir() else path
    if own.is_file() and tuple(read_table(own)[0]) == SPLIT_COLUMNS:
        return read_splits(own, cohort, fixed=True).with_seeds(tuple(seeds))
    return read_clam_splits(path, cohort, seeds, validation_fraction, split_seed)


def _clam_files(path: Path) -> list[Path]:
    """The files of the folds, in their order."""
    if path.is_file():
        return [path]
    numbered = [(int(match[1]), file) for file in path.glob("*") if (match := _CLAM_FILE.fullmatch(file.name))]
    folds = sorted(number for number, _ in numbered)
    if not folds or folds != list(range(len(folds))):
        got = (
            f"splits {', '.join(map(str, folds))}" if folds else "no splits_0.csv" if path.is_dir() else "no such path"
        )
        raise SplitError(
            f"{path}: got {got} → expected splits_0.csv, splits_1.csv and so on without a gap, or {OWN_FILE} → check "
            f"the path, or name one file"
        )
    return [file for _, file in sorted(numbered)]


def _read_clam_file(path: Path, cohort: Cohort) -> tuple[list[str], list[str]]:
    """The part of every slide [n], and the ids that no slide has."""
    header, records = read_table(path)
    names = {at: part_name(name) for at, name in enumerate(header) if name}
    columns = {at: name for at, name in names.items() if name not in (None, UNUSED)}
    if not {"train", "test"} <= set(columns.values()) or len(set(columns.values())) < len(columns):
        raise SplitError(
            f"{path}: got the columns {listed(name for name in header if name)} → expected train, val and test, each "
            f"listing slide ids, or {listed(SPLIT_COLUMNS)} → pass CLAM's splits_k.csv or the splits.csv of a run"
        )
    rows = [(cells[at], name or "") for _, cells in records for at, name in columns.items() if cells[at]]
    if {slide_id.lower() for slide_id, _ in rows} <= {"true", "false"}:
        raise SplitError(
            f"{path}: got True and False for slide ids → expected the file that lists slides by part → pass "
            f"{path.name.replace('_bool', '')}, which CLAM writes beside it"
        )
    words, unknown = _join(rows, cohort, str(path))
    for part in dict.fromkeys(name for _, name in rows):
        if part not in words:
            examples = listed((slide_id for slide_id, name in rows if name == part), 3)
            raise SplitError(
                f"{path}: got {part} slides such as {examples}, none of them in the cohort → expected ids such as "
                f"{listed(cohort.slide_ids, 3)} → use the split of this cohort; were leading zeros lost?"
            )
    return words, unknown


def _join(rows: Iterable[tuple[str, str]], cohort: Cohort, where: str) -> tuple[list[str], list[str]]:
    """The value of every slide [n] ("" where there is none), and the ids that no slide has, from (id, value) rows."""
    index = SlideIndex(cohort.slide_ids)
    values: dict[str, tuple[str, str]] = {}
    unknown = []
    for slide_id, value in rows:
        found = index.find(slide_id)
        if len(found) > 1:
            raise SplitError(
                f"{where}: got slide {slide_id!r}, which fits {listed(found)} → expected the id of one slide → write "
                f"the store's id"
            )
        if not found:
            unknown.append(slide_id)
            continue
        other_id, other = values.setdefault(found[0], (slide_id, value))
        if other != value:
            also = "" if other_id == slide_id else f" and {other_id!r}"
            raise SplitError(
                f"{where}: got slide {slide_id!r}{also} as {other!r} and as {value!r} → expected one value per slide → "
                f"delete the row that does not hold"
            )
    return [values.get(slide_id, ("", ""))[1] for slide_id in cohort.slide_ids], unknown


SPLIT_COLUMNS = ("fold", "seed", "slide_id", "patient_id", "split")


def split_rows(splits: Splits, cohort: Cohort) -> Iterator[tuple[int, int, str, str, str]]:
    """Rows of `splits.csv`, in the order of `SPLIT_COLUMNS`: one per fold, seed and slide."""
    for fold in range(splits.n_folds):
        for seed in splits.seeds:
            parts = splits.parts(fold, seed).tolist()
            for slide_id, patient_id, part in zip(cohort.slide_ids, cohort.patient_ids, parts, strict=True):
                yield fold, seed, slide_id, patient_id, part


def write_splits(path: str | Path, splits: Splits, cohort: Cohort) -> None:
    """Write `splits.csv`, from which `read_splits` gives the same parts back."""
    write_csv(Path(path), itertools.chain([SPLIT_COLUMNS], split_rows(splits, cohort)))


def read_splits(path: str | Path, cohort: Cohort, fixed: bool = False) -> Splits:
    """Read a `splits.csv` for exactly these slides, and verify it as if it had just been drawn.

    Slide ids join by the rules of `mil.cohort.joining.join_store`.

    Args:
        path: the file.
        cohort: n slides.
        fixed: accept slides that are unused, or tested in no fold or in several, as splits from elsewhere have them.

    Raises:
        SplitError: the file is no split file, is of other slides or patients, misses a (fold, seed), tests a slide in
            no fold or in several (unless `fixed`), or breaks another promise of `make_splits`.
    """
    path = Path(path)
    table = _read_parts(path, cohort)
    folds = 1 + max(fold for fold, _ in table)
    seeds = tuple(sorted({seed for _, seed in table}))
    missing = [f"fold {f}, seed {s}" for f in range(folds) for s in seeds if len(table[f, s]) != len(cohort)]
    if missing:
        raise SplitError(
            f"{path}: got no row for some of the {len(cohort)} slides in {listed(missing)} → expected every slide in "
            f"every fold and seed → make the splits anew for this cohort"
        )
    code = {name: at for at, name in enumerate(PART_NAMES.tolist())}
    codes = np.array(
        [[[code[table[f, s][x]] for x in cohort.slide_ids] for s in seeds] for f in range(folds)], dtype=np.int8
    )
    test = codes == TEST_CODE
    uneven = number_of_repeat(test[:, 0]) is None or (codes == UNUSED_CODE).any()
    if (test != test[:, :1]).any() or (uneven and not fixed):
        raise SplitError(
            f"{path}: got a slide that is tested in no fold, in several, or for some seeds only → expected one test "
            f"fold per slide (and repeat), common to all seeds → make the splits anew"
        )
    record = SplitRecord("file", {"seeds": list(seeds)}, str(path), file_hash(path), "given")
    return verify_splits(Splits(codes, None, seeds, record), cohort)


def _read_parts(path: Path, cohort: Cohort) -> defaultdict[tuple[int, int], dict[str, str]]:
    """The part of every slide by (fold, seed), as written."""
    if not path.is_file():
        raise SplitError(f"got {path}, which is no file → expected a splits.csv → check the path")
    patient_of = dict(zip(cohort.slide_ids, cohort.patient_ids, strict=True))
    index = SlideIndex(cohort.slide_ids)
    table: defaultdict[tuple[int, int], dict[str, str]] = defaultdict(dict)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != SPLIT_COLUMNS:
            raise SplitError(
                f"{path}: got the columns {listed(reader.fieldnames or ())} → expected {listed(SPLIT_COLUMNS)} → pass "
                f"the splits.csv of a run"
            )
        for cells in reader:
            where = f"{path}, row {reader.line_num}"
            row = {name: unguarded(cells[name] or "") for name in SPLIT_COLUMNS}
            slide_id = _check_split_row(where, row, index, patient_of)
            parts = table[int(row["fold"]), int(row["seed"])]
            if slide_id in parts:
                raise SplitError(
                    f"{where}: got slide {slide_id!r} again → expected it once per fold and seed → delete it"
                )
            parts[slide_id] = row["split"]
    if not table:
        raise SplitError(f"{path}: got no rows → expected one per fold, seed and slide → make the splits anew")
    return table


def _check_split_row(where: str, row: dict[str, str], index: SlideIndex, patient_of: dict[str, str]) -> str:
    """The cohort's id of the slide of a row that fits the cohort."""
    slide_id, patient_id = row["slide_id"], row["patient_id"]
    found = index.find(slide_id)
    if len(found) > 1:
        raise SplitError(
            f"{where}: got slide {slide_id!r}, which fits {listed(found)} → expected the id of one slide → write the "
            f"store's id into the file"
        )
    slide_id = found[0] if found else slide_id
    if patient_of.get(slide_id) != patient_id:
        expected = f"patient {patient_of[slide_id]!r}" if slide_id in patient_of else "slides of this cohort only"
        raise SplitError(
            f"{where}: got slide {slide_id!r} of patient {patient_id!r} → expected {expected} → use the label table "
            f"and the store the splits were made for, or make them anew"
        )
    if row["split"] not in PART_NAMES or not (row["fold"].isdecimal() and row["seed"].isdecimal()):
        raise SplitError(
            f"{where}: got fold {row['fold']!r}, seed {row['seed']!r}, split {row['split']!r} → expected two integers "
            f"and one of {listed(PART_NAMES.tolist())} → mend the row"
        )
    return slide_id
