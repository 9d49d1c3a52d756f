"""A CSV of slides, patients and labels: its delimiter, its header, its columns by whatever name."""

import csv
import io
from pathlib import Path

from mil.errors import CohortError, did_you_mean, listed

SLIDE_COLUMNS = ("slide_id", "filename", "slide")
PATIENT_COLUMNS = ("patient_id", "case_id", "patient")
NO_COLUMN = {
    "slide": "pass slide_column=<its name>; a table of patients only must first be merged with a table of slides",
    "patient": "pass patient_column=<its name>; if every slide is a patient of its own, say so by passing "
    "patient_column=<the slide column>",
}


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
