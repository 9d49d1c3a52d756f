"""The draft of a features unit: rows saved while a slide is computed, and the sign that someone is at work on it.

A draft is two files beside the place of the unit, which no reader takes for one:

    ~<slide>.draft           JSON lines: who works, on what; then one line per saved run of rows, with its checksum
    ~<slide>.<token>.rows    the saved rows, raw
    ~<slide>.left            the draft of an earlier worker, while it is taken over

A run that was killed goes on after the last row whose checksum holds. The sign is a lease with a heartbeat (the
draft's modification time): it spares two workers the same slide. Correctness does not need it: the unit is committed
whole, from memory, by whoever comes first.
"""

import glob
import hashlib
import json
import os
import socket
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import numpy as np

from extract.errors import SlideClaimedError
from extract.store.core.files import clear_when_full, sync
from extract.store.core.fingerprint import sha256_of

LEASE_S = 120.0
"""A draft without a heartbeat for so long is free to be taken over."""


class Draft:
    """Rows of one slide on their way into the store.

    Open one with `Draft.open`. Whoever holds it calls `touch` more often than every `LEASE_S` seconds, and ends it with
    `discard` (the unit is committed, or will never be) or `release` (interrupted: the saved rows stay).

    Attributes:
        features: [n_saved, dim], rows that an earlier run saved, in order from row 0.
        invalid_rows: which of them could not be decoded.
        flags: uint8 [n_saved], quality flags of the saved rows.
    """

    def __init__(self, unit: Path, dim: int, dtype: str) -> None:
        self._unit = unit
        self._path, self._aside = _draft_path(unit), _aside_path(unit)
        self._token = uuid.uuid4().hex
        self._rows = unit.with_name(f"~{unit.name}.{self._token}.rows")
        self.features = np.empty((0, dim), dtype=dtype)
        self.invalid_rows: list[int] = []
        self.flags = np.empty(0, dtype=np.uint8)
        self._n_saved = 0

    @classmethod
    def open(cls, unit: Path, subject: Mapping[str, Any], dim: int, dtype: str) -> Self:
        """Begin a draft, or go on with one that was left behind.

        Args:
            unit: where the unit will lie.
            subject: what the rows depend on (recipes, tiles, execution); saved rows of another subject are dropped.
            dim: features per row.
            dtype: dtype of the rows.

        Raises:
            SlideClaimedError: another process is at work on this slide.
            StoreFullError: no space left.
        """
        draft = cls(unit, dim, dtype)
        with clear_when_full(draft._path):
            unit.parent.mkdir(parents=True, exist_ok=True)
            left = draft._path.exists() or draft._aside.exists()
            if left:
                draft._take_over(subject)
            draft._begin(subject)
            draft._save_again()
            if left:
                # only now: a process that dies before has lost nothing
                draft._sweep()
        return draft

    def save(self, features: np.ndarray, invalid_rows: Sequence[int], flags: np.ndarray) -> None:
        """Make the first rows safe; those that were saved before are not written again.

        Args:
            features: [n, dim], the finished rows from row 0 on.
            invalid_rows: rows that could not be decoded.
            flags: uint8 [n].
        """
        start, stop = self._n_saved, len(features)
        # a draft that was taken over is another's to save; the unit may still be committed by either
        if stop <= start or not self._is_ours():
            return
        new = np.ascontiguousarray(features[start:stop])
        line = {
            "rows": stop,
            "sha256": sha256_of(new),
            "invalid": [row for row in sorted(invalid_rows) if start <= row < stop],
            "flags": flags[start:stop].tobytes().hex(),
        }
        with clear_when_full(self._unit, new.nbytes):
            # what a full disk left of an earlier attempt is written over
            with open(self._rows, "r+b" if self._rows.exists() else "wb") as file:
                file.truncate(start * new[0].nbytes)
                file.seek(0, os.SEEK_END)
                file.write(new.data.cast("B"))
            sync(self._rows)
            with suppress(FileNotFoundError):
                self._append(line)
                sync(self._path)
        self._n_saved = stop

    def touch(self) -> None:
        """The heartbeat."""
        with suppress(OSError):
            os.utime(self._path)

    def discard(self) -> None:
        """Remove the draft; its rows first, so that no rows are ever without one."""
        self._rows.unlink(missing_ok=True)
        if self._is_ours():
            self._path.unlink(missing_ok=True)

    def release(self) -> None:
        """Leave the saved rows to whoever comes next; without any the draft is removed."""
        if not self._n_saved or not self._is_ours():
            self.discard()
            return
        # without this line the rows are there too, once the lease has ended
        with suppress(OSError):
            self._append({"released": True})

    def _append(self, line: Mapping[str, Any]) -> None:
        """Add a line to the journal, never making one: another worker may just have taken it away."""
        with open(os.open(self._path, os.O_WRONLY | os.O_APPEND), "w", encoding="utf-8") as journal:
            journal.write(json.dumps(line) + "\n")

    def _begin(self, subject: Mapping[str, Any]) -> None:
        header = {"token": self._token, **_worker(), "subject": dict(subject)}
        try:
            with open(self._path, "x", encoding="utf-8") as journal:
                journal.write(json.dumps(header) + "\n")
        except FileExistsError:
            raise self._claimed() from None
        except OSError:
            # a draft without a header would claim the slide until its lease ends
            self._path.unlink(missing_ok=True)
            raise

    def _save_again(self) -> None:
        """Save the rows that were taken over, in this draft; without space the earlier one stays."""
        try:
            self.save(self.features, self.invalid_rows, self.flags)
        except OSError:
            self.discard()
            raise

    def _take_over(self, subject: Mapping[str, Any]) -> None:
        """Load the rows of a draft that nobody works on and move it aside; or of one that lies aside already.

        Of several takers all may succeed: they do the same work twice, and commit the same unit.
        """
        lines = _read_lines(self._path)
        if _is_alive(self._path, lines):
            raise self._claimed(lines)
        try:
            if len(lines) < 2 and self._aside.exists():
                # its worker died before it had saved what lies aside
                os.unlink(self._path)
            else:
                os.rename(self._path, self._aside)
        except FileNotFoundError:
            # a worker died between this step and the next, or is there now: whoever begins first goes on
            pass
        lines = _read_lines(self._aside)
        rows = self._unit.with_name(f"~{self._unit.name}.{lines[0].get('token', '') if lines else ''}.rows")
        if lines and lines[0].get("subject") == json.loads(json.dumps(dict(subject))):
            self._load(rows, lines[1:])

    def _sweep(self) -> None:
        """Remove what earlier workers on this slide left."""
        for path in _rows_of(self._unit):
            if path != self._rows:
                path.unlink(missing_ok=True)
        self._aside.unlink(missing_ok=True)

    def _load(self, rows: Path, lines: Sequence[Mapping[str, Any]]) -> None:
        """The longest run of saved rows whose checksums hold."""
        try:
            content = rows.read_bytes()
        except OSError:
            return
        row_bytes = self.features.shape[1] * self.features.itemsize
        start, flags = 0, b""
        for line in lines:
            if not isinstance(line.get("rows"), int):
                break
            stop = line["rows"]
            piece = content[start * row_bytes : stop * row_bytes]
            if len(piece) != (stop - start) * row_bytes or hashlib.sha256(piece).hexdigest() != line["sha256"]:
                break
            self.invalid_rows += line["invalid"]
            flags += bytes.fromhex(line["flags"])
            start = stop
        dim = self.features.shape[1]
        self.features = np.frombuffer(content[: start * row_bytes], self.features.dtype).reshape(start, dim)
        self.flags = np.frombuffer(flags, np.uint8)

    def _is_ours(self) -> bool:
        lines = _read_lines(self._path)
        return bool(lines) and lines[0].get("token") == self._token

    def _claimed(self, lines: Sequence[Mapping[str, Any]] = ()) -> SlideClaimedError:
        who = lines or _read_lines(self._path)
        at = f"process {who[0].get('pid')} on {who[0].get('host')}" if who else "another process"
        return SlideClaimedError(
            f"got a slide that {at} is at work on → each slide needs one worker → let it finish; if that process is "
            f"gone, run the same command again in {LEASE_S:.0f} s"
        )


def clear_draft(unit: Path) -> None:
    """Remove what is left of a draft whose unit is complete: its worker died between the two."""
    path, aside = _draft_path(unit), _aside_path(unit)
    if (path.exists() or aside.exists()) and not _is_alive(path, _read_lines(path)):
        for left in (*_rows_of(unit), aside, path):
            left.unlink(missing_ok=True)


def is_claimed(unit: Path) -> bool:
    """Whether someone is at work on the unit that will lie at this path."""
    path = _draft_path(unit)
    return _is_alive(path, _read_lines(path))


def _draft_path(unit: Path) -> Path:
    return unit.with_name(f"~{unit.name}.draft")


def _aside_path(unit: Path) -> Path:
    return unit.with_name(f"~{unit.name}.left")


def _rows_of(unit: Path) -> list[Path]:
    """Saved rows of all workers on a unit."""
    # a token has 32 characters: "a.*.rows" would take the rows of slide a.b too
    return list(unit.parent.glob(f"~{glob.escape(unit.name)}.{'?' * 32}.rows"))


def _worker() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": _process_start(os.getpid())}


def _process_start(pid: int) -> str:
    """When a process of this machine started, so that a later one with its number is not taken for it; or ''."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _is_alive(path: Path, lines: Sequence[Mapping[str, Any]]) -> bool:
    """Whether someone still works on a draft: not released, its process there, its heartbeat fresh."""
    if lines and "released" in lines[-1]:
        return False
    try:
        fresh = time.time() - path.stat().st_mtime < LEASE_S
    except FileNotFoundError:
        return False
    if lines and lines[0].get("host") == socket.gethostname():
        return fresh and _is_running(int(lines[0].get("pid", -1)), str(lines[0].get("started", "")))
    return fresh


def _is_running(pid: int, started: str) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return _process_start(pid) == started


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a draft; what a crash cut short is left out."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    lines = []
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            break
        if not isinstance(value, dict):
            break
        lines.append(value)
    return lines
