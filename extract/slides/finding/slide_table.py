"""The slide table: which slides there are, their ids, scales, masks and patients, as a CSV says it."""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from extract.errors import SlideTableError
from extract.slides.finding.mask_rule import MaskRule
from extract.slides.finding.source import SlideSource

_COLUMNS = ("path", "slide_id", "patient_id", "mpp", "mask")
_DELIMITERS = (",", ";", "\t")
_LINE = "line of the table"


def read_table(table: Path) -> list[dict[str, str]]:
    """The rows of a slide table, checked one by one; cells by column, a blank cell is empty.

    Raises:
        SlideTableError: it is not there, is no such CSV, or says something twice.
    """
    if not table.is_file():
        raise SlideTableError(f"got slide table {table} → there is no such file → check the path")
    try:
        text = table.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise SlideTableError(f"got slide table {table} → it is not UTF-8 ({error}) → save it as UTF-8 CSV") from error
    header, lines = _parse(table, text)
    _check_columns(table, header)
    rows = [_check_row(table, number, dict(zip(header, cells, strict=False)), len(cells)) for number, cells in lines]
    _check_once(table, rows)
    return rows


def _parse(table: Path, text: str) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Column names, and (line, cells) of every row that is not blank.

    Spreadsheets write commas, semicolons or tabs, as their language has it: the header tells which.
    """
    header = text.partition("\n")[0]
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=max(_DELIMITERS, key=header.count), strict=True)
    try:
        lines = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader]
    except csv.Error as error:
        raise SlideTableError(
            f"got line {reader.line_num} of slide table {table} → it is no CSV ({error}) → save it as UTF-8 CSV"
        ) from error
    lines = [(number, cells) for number, cells in lines if any(cells)]
    return (lines[0][1], lines[1:]) if lines else ([], [])


def _check_columns(table: Path, columns: list[str]) -> None:
    if "path" not in columns and "slide_id" not in columns:
        raise SlideTableError(
            f"got slide table {table} with columns {columns} → expected path or slide_id → rename one"
        )
    unknown = sorted(set(columns) - set(_COLUMNS))
    if unknown:
        raise SlideTableError(
            f"got columns {unknown} in slide table {table} → expected {list(_COLUMNS)} → remove or rename them"
        )
    if len(set(columns)) < len(columns):
        raise SlideTableError(f"got columns {columns} in slide table {table} → expected each once → remove the others")


def _check_row(table: Path, line: int, cells: dict[str, str], n_values: int) -> dict[str, str]:
    if n_values != len(cells):
        raise SlideTableError(
            f"got line {line} of slide table {table} with another number of values than its header → expected one a "
            f"column → write decimals with a point, and quote values that hold a comma"
        )
    if not cells.get("path") and not cells.get("slide_id"):
        raise SlideTableError(
            f"got line {line} of slide table {table} without path and slide_id → fill one or remove it"
        )
    # no column has this name
    return cells | {_LINE: str(line)}


def _check_once(table: Path, rows: Sequence[dict[str, str]]) -> None:
    """No row says again what an earlier one did; one file may be two slides, with different ids and masks."""
    lines: dict[tuple[str, str], str] = {}
    for row in rows:
        key = (str(resolved(row["path"], table)) if row.get("path") else "", row.get("slide_id", ""))
        other = lines.setdefault(key, row[_LINE])
        if other != row[_LINE]:
            what = row.get("path") or row["slide_id"]
            raise SlideTableError(
                f"got {what!r} in lines {other} and {row[_LINE]} of slide table {table} → expected one row a slide → "
                f"remove one of them, or give each a slide_id of its own"
            )


def from_row(row: dict[str, str], table: str | Path | None, rule: MaskRule | None) -> SlideSource:
    """The slide that a row names by its path.

    Raises:
        SlideTableError: it names none.
    """
    if not row.get("path"):
        raise SlideTableError(
            f"got line {row[_LINE]} of slide table {table} without path → a table used alone names the files "
            f"→ fill the path column"
        )
    path = Path(table or ".").parent / row["path"]
    source = SlideSource(path, path.stem, mask=rule.mask_of(path.parent, path) if rule else None)
    return _apply(source, row, table)


def _apply(source: SlideSource, row: dict[str, str], table: str | Path | None) -> SlideSource:
    """The source with what its row says; a cell left blank says nothing."""
    return replace(
        source,
        slide_id=row.get("slide_id") or source.slide_id,
        mpp=_mpp(row, table),
        mask=Path(table or ".").parent / row["mask"] if row.get("mask") else source.mask,
        patient_id=row.get("patient_id") or None,
    )


def resolved(path: str, table: str | Path | None) -> Path:
    """A path that the table says, relative to the table."""
    return (Path(table or ".").parent / path).resolve()


def override(sources: list[SlideSource], rows: list[dict[str, str]], table: str | Path | None) -> list[SlideSource]:
    """Apply the table's rows to the slides that they name, by path or by id."""
    by_path = {source.path.absolute().resolve(): i for i, source in enumerate(sources)}
    by_id = {source.slide_id: i for i, source in enumerate(sources)}
    result, named = list(sources), dict[int, str]()
    for row in rows:
        path = resolved(row["path"], table) if row.get("path") else None
        index = by_path.get(path) if path else by_id.get(row["slide_id"])
        if index is None:
            raise SlideTableError(
                f"got {row.get('path') or row['slide_id']!r} in line {row[_LINE]} of slide table {table} → it names "
                f"none of the slides given → paths are relative to the table; correct or remove it"
            )
        if index in named:
            raise SlideTableError(
                f"got lines {named[index]} and {row[_LINE]} of slide table {table} for one slide, "
                f"{sources[index].path} → expected one row a slide → remove one of them"
            )
        named[index] = row[_LINE]
        result[index] = _apply(result[index], row, table)
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
            f"got mpp {text!r} in line {row[_LINE]} of slide table {table} → expected µm per pixel, such as 0.25 with "
            f"a point → correct it"
        )
    return value
