"""A Zarr store at a URL: the objects of `ZarrStore`, in an object store, where there is no rename.

A unit is there when its ``zarr.json`` is, which is written last, after what was written before it has been read back.
Units are built in a temporary folder exactly as on a disk, so a store can be copied to a disk and back by any tool.

Objects are written unless they are there already (``If-None-Match``), so of two writers of one unit the second changes
nothing. A service that cannot do so lets the later one win; the units of two writers are equal as a rule.

Nobody is told who is at work on what, and no rows are saved within a slide: a killed run goes on with the next slide.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np

from extract.errors import StoreUnreachableError, UnitCorruptError
from extract.store.core.draft import Draft
from extract.store.core.files import clear_when_full
from extract.store.core.recipes import Execution
from extract.store.core.remote_path import RemotePath, StorePath, age_of
from extract.store.core.run_log import RunLog
from extract.store.formats.nodes import chunk_path, raw_layout, read_with_zarr
from extract.store.formats.remote_log import RemoteRunLog
from extract.store.formats.zarr_store import ZarrStore

_LIST_S = 10.0
"""For so long a list of objects is trusted in what it says is there; never in what it says is not."""

_UPLOAD_S = 60.0
"""An object without a record may be of a writer at work; after so long without one, its writer is dead."""

_TRIES = 3


@dataclass(frozen=True)
class _Listing:
    """What lies in a folder of units.

    Attributes:
        at: when it was asked for.
        ages: age of the record of each unit that has one.
        sizes: bytes of each unit, without record too.
    """

    at: float
    ages: dict[str, int] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)


class RemoteDraft(Draft):
    """A draft that claims nothing and saves nothing: without renames and appends, a slide is done as a whole."""

    def __init__(self, dim: int, dtype: str) -> None:
        # nothing is ever made of this name
        super().__init__(Path("draft"), dim, dtype)

    def save(self, *_: object) -> None:
        """Nothing."""

    def touch(self) -> None:
        """Nothing."""

    def discard(self) -> None:
        """Nothing."""

    def release(self) -> None:
        """Nothing."""


class RemoteStore(ZarrStore):
    """A Zarr store at a URL. Reading copies: arrays are in memory, and a slice of rows is all that is sent."""

    def __init__(self, path: str | StorePath, mode: Any = "r+") -> None:
        self._listings: dict[StorePath, _Listing] = {}
        self._last: tuple[object, np.ndarray] | None = None
        super().__init__(path, mode)

    # ---------------------------------------------------------------- what is there

    def slide_ids(self, entry: str | None = None) -> list[str]:
        """Sorted ids of the slides with complete tiles, or with complete features in ``entry``."""
        if entry is not None:
            self._list(self.path / "tiles")
        return super().slide_ids(entry)

    def leftovers(self) -> list[StorePath]:
        """Units without a record: of dead writers, or of some at work."""
        folders = [self._folder(entry) for entry in (None, *self.entries())]
        found = [(folder, self._list(folder)) for folder in folders]
        return sorted(folder / name for folder, listing in found for name in listing.sizes.keys() - listing.ages)

    def size_of(self, path: StorePath) -> int:
        """Bytes of a unit, or of anything else in the store; 0 for what is not there."""
        listing = self._recent(path.parent)
        if listing is not None and path.name in listing.sizes:
            return listing.sizes[path.name]
        return sum(int(info["size"]) for info in cast(RemotePath, path).files().values())

    def _unit_names(self, folder: StorePath) -> list[str]:
        return sorted(self._list(folder).ages)

    def _is_complete(self, unit: StorePath) -> bool:
        return self._age(str(unit)[len(self._prefix) :]) is not None

    def _age(self, unit: str) -> int | None:
        path = self.path / unit
        listing = self._recent(path.parent)
        if listing is not None and path.name in listing.ages:
            return listing.ages[path.name]
        return cast(RemotePath, path / self.entry_name).age()

    def _list(self, folder: StorePath) -> _Listing:
        """Ask what lies in a folder of units."""
        listing = _Listing(time.monotonic())
        for name, info in cast(RemotePath, folder).files().items():
            unit, _, below = name.partition("/")
            if not below:
                continue
            listing.sizes[unit] = listing.sizes.get(unit, 0) + int(info["size"])
            if below == self.entry_name:
                listing.ages[unit] = age_of(info)
        self._listings[folder] = listing
        return listing

    def _recent(self, folder: StorePath) -> _Listing | None:
        """What was said of a folder a moment ago."""
        listing = self._listings.get(folder)
        return listing if listing is not None and time.monotonic() - listing.at < _LIST_S else None

    # ---------------------------------------------------------------- reading

    def _read_array(self, unit: StorePath, name: str, rows: slice | np.ndarray | None = None) -> np.ndarray:
        if not isinstance(unit, RemotePath):
            # it is being built, in a folder of this machine
            return super()._read_array(unit, name, rows)
        node = unit if name == "features" else unit / name
        layout = raw_layout(node)
        if layout is None:
            return read_with_zarr(node, rows)
        shape, dtype = layout
        if math.prod(shape) == 0:
            return np.empty(shape, dtype) if rows is None else np.empty(shape, dtype)[rows]
        chunk = cast(RemotePath, chunk_path(node, shape))
        return self._read_whole(chunk, shape, dtype) if rows is None else _read_rows(chunk, shape, dtype, rows)

    def _read_whole(self, chunk: RemotePath, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        """A whole matrix; the last one is kept, since it is often read for its checksum and then for its rows."""
        age = chunk.age()
        if age is None:
            raise _cut(chunk, 0, math.prod(shape) * dtype.itemsize)
        last = self._last
        if last is None or last[0] != (chunk, age, shape, dtype):
            last = (chunk, age, shape, dtype), _read(chunk, 0, None, shape, dtype)
            self._last = last
        return last[1]

    # ---------------------------------------------------------------- writing

    def draft(self, entry: str, slide_id: str, execution: Execution) -> Draft:
        """Begin to compute a slide's embeddings; there are never any rows of an earlier run."""
        self._check_writable()
        recipe = self.feature_recipe(entry)
        return RemoteDraft(recipe.dim, recipe.dtype)

    def clear_draft(self, slide_id: str, entry: str) -> None:
        """Nothing: there are no drafts."""
        self._check_writable()

    def is_claimed(self, slide_id: str, entry: str) -> bool:
        """Never: there are no claims."""
        return False

    def start_run(self) -> RunLog:
        """Open a new log of this run under ``runs/``; see `RemoteRunLog`."""
        self._check_writable()
        return RemoteRunLog(cast(RemotePath, self.path / "runs"))

    def _make_way(self, unit: StorePath, is_good: Callable[[], bool]) -> None:
        # a writer may be at work on a unit without a record; whoever is next takes over what is equal
        if not (unit / self.entry_name).is_file() or is_good():
            return
        (unit / self.entry_name).unlink(missing_ok=True)
        self._listings.pop(unit.parent, None)
        for name in cast(RemotePath, unit).files():
            (unit / name).unlink(missing_ok=True)

    def _commit(self, final: StorePath, build: Callable[[Path], None], needed_bytes: int) -> None:
        unit = cast(RemotePath, final)
        there = unit.files()
        if self.entry_name in there:
            return
        with TemporaryDirectory(prefix="tessera-") as folder:
            partial = Path(folder, "unit")
            with clear_when_full(partial, needed_bytes):
                build(partial)
            files = {path.relative_to(partial).as_posix(): path for path in partial.rglob("*") if path.is_file()}
            record = files.pop(self.entry_name).read_bytes()
            for stray in there.keys() - files.keys():
                (unit / stray).unlink(missing_ok=True)
            for name, file in sorted(files.items()):
                if not self._write(unit, name, file.read_bytes()):
                    return
            try:
                (unit / self.entry_name).create(record)
            except FileExistsError:
                # another writer of the same objects was first
                return

    def _write(self, unit: RemotePath, name: str, data: bytes) -> bool:
        """Write an object of a unit and read it back; False if another writer has committed the unit meanwhile."""
        file = unit / name
        for _ in range(_TRIES):
            try:
                file.create(data)
            except FileExistsError:
                if _holds(file, data):
                    return True
                if self._is_committed_soon(unit):
                    return False
                file.write_bytes(data)
            if _holds(file, data):
                return True
        raise StoreUnreachableError(
            f"got other bytes back from {file} than were written → expected the same → somebody else writes there, or "
            f"the service is at fault; run the same command again"
        )

    def _is_committed_soon(self, unit: RemotePath) -> bool:
        """Whether the writer of another object in this place commits the unit before it counts as dead."""
        deadline = time.monotonic() + _UPLOAD_S
        while not (unit / self.entry_name).is_file():
            if time.monotonic() > deadline:
                return False
            time.sleep(min(1.0, _UPLOAD_S / 10))
        return True


def _holds(file: RemotePath, data: bytes) -> bool:
    try:
        return file.read_bytes() == data
    except FileNotFoundError:
        return False


def _read_rows(chunk: RemotePath, shape: tuple[int, ...], dtype: np.dtype[Any], rows: slice | np.ndarray) -> np.ndarray:
    """Some rows; what is sent reaches from the lowest to the highest."""
    index = np.arange(shape[0])[rows]
    if not index.size:
        return np.empty((0, *shape[1:]), dtype)
    first, stop = int(index.min()), int(index.max()) + 1
    part = _read(chunk, first, stop, (stop - first, *shape[1:]), dtype)
    return part if len(index) == len(part) and (np.diff(index) == 1).all() else part[index - first]


def _read(chunk: RemotePath, first: int, stop: int | None, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """Rows of a raw chunk in memory, read-only; all of it where ``stop`` is None."""
    row_bytes = math.prod(shape[1:]) * dtype.itemsize
    span = (None, None) if stop is None else (first * row_bytes, stop * row_bytes)
    try:
        data = chunk.read_range(*span)
    except FileNotFoundError:
        data = b""
    if len(data) != shape[0] * row_bytes:
        raise _cut(chunk, len(data), shape[0] * row_bytes)
    return np.frombuffer(data, dtype).reshape(shape)


def _cut(chunk: RemotePath, there: int, expected: int) -> UnitCorruptError:
    return UnitCorruptError(
        f"got {there} bytes of {chunk} → its record says {expected} → the unit is damaged; remove its objects and run "
        f"mil extract again"
    )
