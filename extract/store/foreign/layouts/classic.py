"""Classic MIL tables: one file holds all bags, one row an instance.

    .npz    x [n, dim], bag [n] (which bag each row is of), y (a label per bag, in the order of the bags, or per row)
    .csv    a column ``bag``, perhaps a column ``label``, ``class``, ``target`` or ``y``; every other column is a number

Bags of an .npz are called ``bag-000``, ``bag-001`` ... after their number; those of a .csv as the table calls them.
"""

import csv
import zipfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from extract.errors import ForeignFileError
from extract.store.foreign.layouts.base import NO, SURE, Answers, ForeignBag, ForeignFile, ForeignLayout
from extract.store.foreign.layouts.matrices import clean_features

BAG_COLUMN = "bag"
LABEL_COLUMNS = ("label", "class", "target", "y")


@dataclass(frozen=True, eq=False)
class ClassicTable:
    """All bags of a file.

    Attributes:
        features: [n, dim], all instances.
        rows: rows of each bag, in the order of the file.
        labels: label of each bag; empty where there are none.
    """

    features: np.ndarray
    rows: dict[str, np.ndarray]
    labels: dict[str, str]


class ClassicNpz(ForeignLayout):
    """``x``, ``bag`` and ``y`` in an .npz."""

    name = "classic"
    kind = "npz"

    def fits(self, file: ForeignFile) -> int:
        """Sure when ``x`` and ``bag`` are there."""
        with _open_npz(file.path) as archive:
            return SURE if {"x", "bag"} <= set(archive.files) else NO

    def slide_ids(self, file: ForeignFile) -> list[str]:
        """The bags."""
        return list(_table(file).rows)

    def read(self, file: ForeignFile, slide_id: str, answers: Answers) -> ForeignBag:
        """The rows of one bag."""
        table = _table(file)
        return ForeignBag(slide_id, clean_features(table.features[table.rows[slide_id]], slide_id))

    def labels(self, file: ForeignFile) -> dict[str, str]:
        """Label by bag."""
        return _table(file).labels


class ClassicCsv(ClassicNpz):
    """A .csv with a column ``bag``."""

    kind = "csv"

    def fits(self, file: ForeignFile) -> int:
        """Sure when there is a column ``bag``."""
        with open(file.path, encoding="utf-8-sig", newline="", errors="replace") as text:
            header = next(csv.reader(text), [])
        return SURE if BAG_COLUMN in header and len(header) > 1 else NO


def _table(file: ForeignFile) -> ClassicTable:
    status = file.path.stat()
    return _read_table(file.path, file.kind, (status.st_size, status.st_mtime_ns))


@lru_cache(maxsize=1)
def _read_table(path: Path, kind: str, stamp: tuple[int, int]) -> ClassicTable:
    return _read_csv(path) if kind == "csv" else _read_npz(path)


def _open_npz(path: Path) -> "np.lib.npyio.NpzFile":
    try:
        archive = np.load(path, allow_pickle=False)
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise ForeignFileError(f"got {path} → it cannot be read as .npz ({error}) → copy it again") from error
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise ForeignFileError(f"got {path} → it holds one array → expected x, bag and y → save them with numpy.savez")
    return archive


def _read_npz(path: Path) -> ClassicTable:
    try:
        with _open_npz(path) as archive:
            features, bag = np.asarray(archive["x"]), np.asarray(archive["bag"])
            y = np.asarray(archive["y"]) if "y" in archive.files else None
    except (ValueError, zipfile.BadZipFile) as error:
        raise ForeignFileError(f"got {path} → an array of it cannot be read ({error}) → copy it again") from error
    if bag.ndim != 1 or features.ndim != 2 or len(bag) != len(features):
        raise ForeignFileError(
            f"got x {features.shape} and bag {bag.shape} in {path} → expected [n, dim] and [n], one number per instance"
            f" → save them so"
        )
    numbers = np.unique(bag)
    digits = max(3, len(str(numbers.max()))) if bag.dtype.kind in "iu" and len(bag) else 0
    names = [f"bag-{number:0{digits}d}" if digits else str(number) for number in numbers.tolist()]
    rows = {name: np.flatnonzero(bag == number) for name, number in zip(names, numbers, strict=True)}
    if y is None:
        return ClassicTable(features, rows, {})
    if y.shape == (len(names),):
        return ClassicTable(features, rows, {name: str(label) for name, label in zip(names, y.tolist(), strict=True)})
    if y.shape != bag.shape:
        raise ForeignFileError(
            f"got y of shape {y.shape} in {path} → expected a label for each of {len(names)} bags, or of {len(bag)} "
            f"instances → correct the file, or leave y out"
        )
    return ClassicTable(features, rows, {name: _one_label(y[at].tolist(), name, path) for name, at in rows.items()})


def _read_csv(path: Path) -> ClassicTable:
    try:
        with open(path, encoding="utf-8-sig", newline="") as text:
            header, *lines = [line for line in csv.reader(text) if line]
    except (ValueError, csv.Error) as error:
        raise ForeignFileError(f"got {path} → it cannot be read as CSV ({error}) → save it as UTF-8 text") from error
    ragged = next((at for at, line in enumerate(lines, 2) if len(line) != len(header)), None)
    if ragged is not None or not lines or len(set(header)) != len(header):
        problem = "no rows, or two columns of one name" if ragged is None else f"row {ragged} has other columns"
        raise ForeignFileError(f"got {path} → {problem} → expected one header and one row per instance → correct it")
    label = next((name for name in LABEL_COLUMNS if name in header), None)
    columns = [at for at, name in enumerate(header) if name not in (BAG_COLUMN, label)]
    bags = [line[header.index(BAG_COLUMN)].strip() for line in lines]
    features = np.array(
        [[_number(line[at], header[at], row, path) for at in columns] for row, line in enumerate(lines, 2)]
    )
    rows: dict[str, list[int]] = {}
    for row, bag in enumerate(bags):
        rows.setdefault(bag, []).append(row)
    if "" in rows:
        raise ForeignFileError(f"got {path} → row {rows[''][0] + 2} names no bag → expected a bag in every row")
    at = {bag: np.array(found) for bag, found in rows.items()}
    if label is None:
        return ClassicTable(features, at, {})
    values = [line[header.index(label)].strip() for line in lines]
    labels = {bag: _one_label([values[row] for row in found], bag, path) for bag, found in rows.items()}
    return ClassicTable(features, at, labels)


def _number(text: str, column: str, row: int, path: Path) -> float:
    try:
        return float(text)
    except ValueError:
        raise ForeignFileError(
            f"got {text!r} in row {row}, column {column!r} of {path} → expected a number → remove columns that are no "
            f"features; the label's column is named {' or '.join(LABEL_COLUMNS)}"
        ) from None


def _one_label(values: list[object], bag: str, path: Path) -> str:
    """The label that all instances of a bag share."""
    if len(set(values)) > 1:
        raise ForeignFileError(
            f"got labels {sorted(map(str, set(values)))[:4]} within bag {bag!r} of {path} → expected one label per bag "
            f"→ instance labels cannot be trained on; write the bag's label in each of its rows"
        )
    return str(values[0])
