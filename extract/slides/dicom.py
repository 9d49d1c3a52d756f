"""DICOM files: which series a file belongs to, and how large its level is, from its header alone."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

_TAGS = (
    "SeriesInstanceUID",
    "SOPInstanceUID",
    "Rows",
    "Columns",
    "TotalPixelMatrixRows",
    "TotalPixelMatrixColumns",
    "ImageType",
)
_NO_LEVELS = frozenset({"LABEL", "OVERVIEW", "THUMBNAIL", "LOCALIZER"})


@dataclass(frozen=True)
class DicomHeader:
    """What is read of a DICOM file: no text that may tell who the patient is.

    Attributes:
        series: SeriesInstanceUID.
        area: pixels of the whole level that the file holds, or holds a part of; 0 for labels and overviews.
    """

    series: str
    area: int


def read_header(path: Path) -> DicomHeader | None:
    """The header of a DICOM file; None where it is none, or names no series."""
    import pydicom
    from pydicom.errors import InvalidDicomError

    try:
        header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(_TAGS))
        series = str(header.get("SeriesInstanceUID", ""))
        kinds = {str(each).upper() for each in header.get("ImageType", ())}
        rows = _number(header.get("TotalPixelMatrixRows")) or _number(header.get("Rows"))
        columns = _number(header.get("TotalPixelMatrixColumns")) or _number(header.get("Columns"))
    except (InvalidDicomError, OSError, ValueError, TypeError, AttributeError, LookupError, NotImplementedError):
        return None
    except Exception:  # noqa: BLE001  a damaged header raises what it likes; whoever opens the slide says so
        return None
    return DicomHeader(series, 0 if kinds & _NO_LEVELS else rows * columns) if series else None


def series_files(path: Path) -> list[Path]:
    """The files beside a DICOM file that are of its series, itself included; it alone where its header is unreadable.

    The first is the one with the most pixels; equal ones are sorted by name.
    """
    mine = read_header(path)
    if mine is None:
        return [path]
    headers = {each: read_header(each) for each in sorted(path.parent.iterdir()) if is_dicom(each)}
    found = {each: header for each, header in headers.items() if header is not None and header.series == mine.series}
    return sorted(found, key=lambda each: (-found[each].area, each.name)) or [path]


def is_dicom(path: Path) -> bool:
    """Whether a file is named like a DICOM file."""
    return path.suffix.lower() == ".dcm" and path.is_file()


def _number(value: Any) -> int:
    return int(value) if value is not None else 0
