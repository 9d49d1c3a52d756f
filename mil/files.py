"""The plain files of a run: written whole or not at all, and JSON read back."""

import csv
import errno
import glob
import hashlib
import io
import json
import os
import re
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from mil.errors import RunError

Row = Sequence[object]

_PARTIAL = re.compile(r"\.(?P<host>[0-9a-f]{8})-(?P<pid>\d+)-[0-9a-f]{8}\.partial$")
_DAY_S = 86_400.0
_FORMULA = re.compile(r"'*[=+\-@\t\r]")
_GUARDED = re.compile(r"'+[=+\-@\t\r]")
_NUMBER = re.compile(r"[+-]?((\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|nan|inf)")


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


def require_writable(folder: Path, what: str, option: str = "--out") -> None:
    """Refuse a folder that takes no files, or cannot be made; nothing is left behind.

    Args:
        folder: need not exist yet.
        what: what it is or is for, as the message names it.
        option: the flag that gives another one.

    Raises:
        RunError: it cannot be written.
    """
    there = folder.absolute()
    while not os.path.lexists(there):
        there = there.parent
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise RunError(
            f"got {what} → {there} cannot be written ({error.strerror}) → make it writable, or give another folder "
            f"with {option}"
        ) from error


def write_json(path: Path, content: object) -> None:
    """Write plain values as JSON; what UTF-8 cannot hold is escaped."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(path, text.encode("utf-8", "backslashreplace"))


def read_json(path: Path) -> Any:
    """Plain values of a JSON file; NaN, which Python writes and JSON does not know, is None.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no JSON, or nested deeper than anything that is written here.
    """
    return parse_json(path.read_bytes())


def parse_json(content: bytes) -> Any:
    """The same of the content of a file.

    Raises:
        ValueError: as in `read_json`.
    """
    try:
        return json.loads(content, parse_constant=lambda _: None)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def read_regular_file(folder: Path, name: str) -> bytes:
    """A file of a stranger's folder: no link on the way to it, no device, no pipe.

    Args:
        folder: as somebody named it; it may itself be a link.
        name: of the file in it, with slashes.

    Raises:
        OSError: it is not there, cannot be read, or is not a plain file of this folder.
    """
    at, flags = os.open(folder, os.O_RDONLY | os.O_DIRECTORY), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        *folders, last = name.split("/")
        for each in folders:
            inner = os.open(each, flags | os.O_DIRECTORY, dir_fd=at)
            os.close(at)
            at = inner
        with open(os.open(last, flags, dir_fd=at), "rb") as file:
            facts = os.fstat(file.fileno())
            if not stat.S_ISREG(facts.st_mode):
                raise OSError(errno.EINVAL, "it is no plain file", name)
            return file.read(facts.st_size)
    finally:
        os.close(at)


@contextmanager
def new_folder(folder: Path, overwrite: bool = False) -> Iterator[Path]:
    """A folder to fill beside ``folder``, put in its place when the block ends: a folder that exists is whole.

    After any error, nothing of it is left, and what was there before still is.

    Args:
        folder: where the results are to lie.
        overwrite: replace whatever is there, which the caller has looked at; else it must be new or empty.

    Raises:
        RunError: ``folder`` is taken, or cannot be written, as on a full disk.

    Example:
        >>> with new_folder(Path("runs/scores")) as partial:                     # doctest: +SKIP
        ...     write_json(partial / "scores.json", {"auroc": 0.8})
    """
    if not overwrite:
        check_new_folder(folder)
    _clear_leftovers(folder)
    partial = folder.with_name(f".{folder.name}.{_host()}-{os.getpid()}-{uuid4().hex[:8]}.partial")
    try:
        with tell_full_disk(folder):
            partial.mkdir(parents=True)
            yield partial
            _put_in_place(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _clear_leftovers(folder: Path) -> None:
    """Remove what processes that were killed have left of this folder; of another machine's, what is a day old."""
    for left in folder.parent.glob(f".{glob.escape(folder.name)}.*.partial"):
        owner = _PARTIAL.search(left.name)
        if owner is None:
            continue
        with suppress(OSError):
            old = time.time() - left.stat().st_mtime > _DAY_S
            if old or (owner["host"] == _host() and not _is_running(int(owner["pid"]))):
                shutil.rmtree(left, ignore_errors=True)


def _host() -> str:
    """A short name of this machine that is safe in file names."""
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


@contextmanager
def tell_full_disk(folder: Path) -> Iterator[None]:
    """Say of files that cannot be written which results they belong to, and what helps.

    Raises:
        RunError: in place of any OSError of the block.
    """
    try:
        yield
    except OSError as error:
        raise RunError(f"got {error} while writing {folder} → free some space or choose another --out") from error


def check_new_folder(folder: Path) -> None:
    """Refuse a folder that holds anything, or is a file.

    Raises:
        RunError: it does.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        what = "it exists and is not empty" if folder.is_dir() else "it is a file"
        raise RunError(f"got {folder} as folder to write → {what} → give a new folder with --out")


def _put_in_place(partial: Path, folder: Path) -> None:
    """Rename ``partial`` to ``folder``; an older folder is moved aside first, and back if that fails."""
    if not folder.exists():
        partial.rename(folder)
        return
    older = folder.with_name(f".{folder.name}.{uuid4().hex}.replaced")
    folder.rename(older)
    try:
        partial.rename(folder)
    except OSError:
        older.rename(folder)
        raise
    shutil.rmtree(older)


def write_csv(path: Path, rows: Iterable[Row]) -> None:
    """Write rows, the first being the header, as UTF-8; a name that is not UTF-8 keeps its bytes."""
    buffer = io.StringIO(newline="")
    plain = csv.writer(buffer, lineterminator="\n")
    # a carriage return is no reason to quote for Python before 3.13, and ends a row for every reader
    quoting = csv.writer(buffer, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    for row in rows:
        writer = quoting if any("\r" in cell for cell in row if isinstance(cell, str)) else plain
        writer.writerow([guarded(cell) for cell in row])
    write_atomically(path, buffer.getvalue().encode("utf-8", "surrogateescape"))


def guarded(cell: object) -> object:
    """A cell of a table; text that a spreadsheet would take for a formula stands behind an apostrophe.

    Ids and names of classes come from strangers' tables, and CSV has no other way to say that a cell is text (OWASP,
    CSV injection). Numbers stay numbers; `unguarded` gives the text back.

    >>> [guarded(each) for each in ("=1+1", "-0.5", "a", -2)]
    ["'=1+1", '-0.5', 'a', -2]
    """
    formula = isinstance(cell, str) and _FORMULA.match(cell) and not _NUMBER.fullmatch(cell)
    return f"'{cell}" if formula else cell


def unguarded(cell: str) -> str:
    """The text that `guarded` was given."""
    return cell[1:] if _GUARDED.match(cell) else cell


def read_csv_rows(file: Iterable[str]) -> Iterator[list[str]]:
    """The rows of a table that `write_csv` wrote, header included.

    Raises:
        csv.Error: it is no CSV.
    """
    for row in csv.reader(file):
        yield [unguarded(cell) for cell in row]


def read_csv_dicts(file: Iterable[str]) -> list[dict[str, str]]:
    """The same by the names of the header; cells that a short row lacks are empty, and blank rows left out.

    Raises:
        csv.Error: it is no CSV.
    """
    rows = read_csv_rows(file)
    header = next(rows, [])
    return [dict(zip(header, [*row, *[""] * len(header)], strict=False)) for row in rows if row]


def probability_text(value: float) -> str:
    """A probability as every table writes it: nine significant digits.

    >>> probability_text(1 / 3)
    '0.333333333'
    """
    return f"{value:.9g}"
