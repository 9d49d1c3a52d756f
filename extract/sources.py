"""Which slides a run is about: files, folders, and the slide table; and the ids they get."""

import csv
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from extract.errors import SlideTableError

SLIDE_EXTENSIONS = frozenset(
    {".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".bif", ".svslide", ".vms", ".vmu", ".dcm", ".czi"}
)
"""What is taken from folders; files named one by one may have any extension."""

_COLUMNS = ("path", "slide_id", "patient_id", "mpp")


@dataclass(frozen=True)
class SlideSource:
    """One slide to extract.

    Attributes:
        path: the file.
        slide_id: its id in the store.
        mpp: µm/px of level 0 from the slide table, or None.
    """

    path: Path
    slide_id: str
    mpp: float | None = None


def find_slides(inputs: Sequence[str | Path], table: str | Path | None = None) -> list[SlideSource]:
    """Collect slides from files and folders, and what the slide table says of them.

    A slide's id is its path relative to the given folder without the extension; for a file named directly, its stem.
    Where two ids are equal apart from case, the extension is kept, and then the folder's name. The files of one DICOM
    series are one slide.

    Args:
        inputs: files and folders; may be empty when there is a table.
        table: CSV with ``path`` or ``slide_id`` (or both) and optionally ``mpp``; paths are relative to the table.
            Without ``inputs`` its rows are the slides, otherwise it overrides what it names.

    Returns:
        Slides sorted by id.

    Raises:
        SlideTableError: no slide at all, a table that cannot be used, or ids that stay ambiguous.
    """
    rows = _read_table(Path(table)) if table is not None else []
    if inputs:
        found = _merge_series(_walk(inputs))
        sources = _override(_name(found), rows, table)
    else:
        sources = [_from_row(row, table) for row in rows]
    if not sources:
        raise SlideTableError(
            f"got no slide in {[str(i) for i in inputs] or str(table)} → folders are searched for "
            f"{' '.join(sorted(SLIDE_EXTENSIONS))} → name the files themselves if they end differently"
        )
    _check_unique(sources)
    return sorted(sources, key=lambda source: source.slide_id)


def _walk(inputs: Iterable[str | Path]) -> list[tuple[Path, Path]]:
    """(root, file) pairs, each file once."""
    pairs: dict[Path, tuple[Path, Path]] = {}
    for given in map(Path, inputs):
        if not given.is_dir():
            pairs.setdefault(given.absolute(), (given.parent, given))
            continue
        for folder, subfolders, files in os.walk(given):
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            for name in sorted(files):
                if Path(name).suffix.lower() in SLIDE_EXTENSIONS and not name.startswith("."):
                    path = Path(folder, name)
                    pairs.setdefault(path.absolute(), (given, path))
    return list(pairs.values())


def _merge_series(pairs: list[tuple[Path, Path]]) -> list[tuple[Path, Path]]:
    """Keep one file of each DICOM series; OpenSlide finds the others beside it."""
    import openslide

    seen: set[tuple[Path, str]] = set()
    kept = []
    for root, path in pairs:
        if path.suffix.lower() == ".dcm":
            try:
                with openslide.OpenSlide(path) as slide:
                    series = slide.properties.get("dicom.SeriesInstanceUID", str(path))
            except (openslide.OpenSlideError, OSError):
                series = str(path)
            if (path.parent, series) in seen:
                continue
            seen.add((path.parent, series))
        kept.append((root, path))
    return kept


def _name(pairs: list[tuple[Path, Path]]) -> list[SlideSource]:
    """Give each file the shortest of its three possible ids that no other file has."""
    forms = [
        [
            path.relative_to(root).with_suffix("").as_posix(),
            path.relative_to(root).as_posix(),
            (Path(root.resolve().name) / path.relative_to(root)).as_posix(),
        ]
        for root, path in pairs
    ]
    ids = [form[0] for form in forms]
    for depth in (1, 2):
        groups = defaultdict(list)
        for i, slide_id in enumerate(ids):
            groups[slide_id.casefold()].append(i)
        for group in groups.values():
            if len(group) > 1:
                for i in group:
                    ids[i] = forms[i][depth]
    return [SlideSource(path, slide_id) for (_, path), slide_id in zip(pairs, ids, strict=True)]


def _read_table(table: Path) -> list[dict[str, str]]:
    if not table.is_file():
        raise SlideTableError(f"got slide table {table} → there is no such file → check the path")
    try:
        text = table.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise SlideTableError(f"got slide table {table} → it is not UTF-8 ({error}) → save it as UTF-8 CSV") from error
    reader = csv.DictReader(text.splitlines())
    _check_columns(table, list(reader.fieldnames or []))
    return [_check_row(table, reader.line_num, row) for row in reader]


def _check_columns(table: Path, columns: list[str]) -> None:
    if "path" not in columns and "slide_id" not in columns:
        raise SlideTableError(
            f"got slide table {table} with columns {columns} → expected path or slide_id → rename one"
        )
    if "mask" in columns:
        raise SlideTableError(
            f"got a mask column in slide table {table} → masks are not read by this version → remove the column; "
            f"--tissue none tiles everything"
        )
    unknown = sorted(set(columns) - set(_COLUMNS))
    if unknown:
        raise SlideTableError(
            f"got columns {unknown} in slide table {table} → expected {list(_COLUMNS)} → remove or rename them"
        )


def _check_row(table: Path, line: int, row: dict[str, str]) -> dict[str, str]:
    if None in row or None in row.values():
        raise SlideTableError(
            f"got line {line} of slide table {table} with another number of values than its header → expected one a "
            f"column → write decimals with a point, and quote values that hold a comma"
        )
    cells = {key: value.strip() for key, value in row.items()}
    if not cells.get("path") and not cells.get("slide_id"):
        raise SlideTableError(
            f"got line {line} of slide table {table} without path and slide_id → fill one or remove it"
        )
    return cells


def _from_row(row: dict[str, str], table: str | Path | None) -> SlideSource:
    if not row.get("path"):
        raise SlideTableError(
            f"got a row without path in slide table {table} ({row}) → a table used alone names the files "
            f"→ fill the path column"
        )
    path = Path(table or ".").parent / row["path"]
    return SlideSource(path, row.get("slide_id") or path.stem, _mpp(row, table))


def _override(sources: list[SlideSource], rows: list[dict[str, str]], table: str | Path | None) -> list[SlideSource]:
    """Apply the table's rows to the slides that they name, by path or by id."""
    by_path = {source.path.absolute().resolve(): i for i, source in enumerate(sources)}
    by_id = {source.slide_id: i for i, source in enumerate(sources)}
    result, named = list(sources), set()
    for row in rows:
        path = (Path(table or ".").parent / row["path"]).resolve() if row.get("path") else None
        index = by_path.get(path) if path else by_id.get(row["slide_id"])
        if index is None or index in named:
            what = "that names none of the slides given" if index is None else "for a slide that has one already"
            raise SlideTableError(
                f"got a row {what} in slide table {table}: {row} → expected one row a slide, its path relative to the "
                f"table → correct or remove it"
            )
        named.add(index)
        source = result[index]
        result[index] = replace(source, slide_id=row.get("slide_id") or source.slide_id, mpp=_mpp(row, table))
    return result


def _mpp(row: dict[str, str], table: str | Path | None) -> float | None:
    text = row.get("mpp", "")
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise SlideTableError(
            f"got mpp {text!r} in slide table {table} ({row}) → expected µm per pixel, such as 0.25 → correct it"
        )
    return value


def _check_unique(sources: list[SlideSource]) -> None:
    groups: dict[str, list[SlideSource]] = defaultdict(list)
    for source in sources:
        groups[source.slide_id.casefold()].append(source)
    for group in groups.values():
        if len(group) > 1:
            raise SlideTableError(
                f"got {len(group)} slides with the id {group[0].slide_id!r} (capitals do not count): "
                f"{[str(source.path) for source in group]} → ids must be unique → name them in a slide table"
            )
