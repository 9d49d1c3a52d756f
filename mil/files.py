"""Writing the plain files of a run: whole or not at all."""

import csv
import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from uuid import uuid4

Row = Sequence[object]


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside ``path``, flush to disk, then rename: ``path`` is never seen half written."""
    partial = path.with_name(f"{path.name}.{uuid4().hex}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_csv(path: Path, rows: Iterable[Row]) -> None:
    """Write rows, the first being the header, as UTF-8."""
    buffer = io.StringIO(newline="")
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    write_atomically(path, buffer.getvalue().encode())


def probability_text(value: float) -> str:
    """A probability as every table writes it: nine significant digits.

    >>> probability_text(1 / 3)
    '0.333333333'
    """
    return f"{value:.9g}"
