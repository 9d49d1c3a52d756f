"""HDF5 files of a store: laid out in memory, written by ourselves, and memory-mapped on reading.

HDF5 writes no file of ours: its library may crash the process when the disk fills up while a file is closed. It lays
the file out in memory and says where each array belongs; the arrays themselves are then written there, uncopied.
"""

import json
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache, wraps
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from extract.errors import StoreError, UnitCorruptError
from extract.store.core.rows import take_rows

T = TypeVar("T")

_LAYOUT = {"libver": ("v108", "v108"), "alignment_threshold": 1, "alignment_interval": 64}
"""Metadata has checksums and is readable since HDF5 1.8; arrays begin at multiples of 64 bytes, fit for mapping."""

_RECORD, _RECORD_SHA256 = "tessera", "tessera_sha256"
_SETTLED_NS = 2_000_000_000


def write_h5(
    path: Path,
    record: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray],
    attributes: Mapping[str, Mapping[str, Any]],
    compressed: Collection[str] = (),
) -> None:
    """Write an HDF5 file; equal content gives equal bytes.

    Args:
        path: where there is nothing.
        record: goes into the root's attribute ``tessera`` as JSON, its checksum into ``tessera_sha256``.
        arrays: contiguous, by name; the largest last.
        attributes: of some of them.
        compressed: names of arrays to compress; the others lie raw and in one piece.
    """
    import h5py

    image, text = BytesIO(), json.dumps(record)
    little = {name: np.ascontiguousarray(array, array.dtype.newbyteorder("<")) for name, array in arrays.items()}
    places = []
    with h5py.File(image, "w", **_LAYOUT) as file:
        _set_attributes(file, {_RECORD: text, _RECORD_SHA256: sha256(text.encode()).hexdigest()})
        for name, array in little.items():
            if name in compressed and array.size:
                dataset = file.create_dataset(name, data=array, chunks=array.shape, compression="gzip")
            else:
                dataset = _reserve(file, name, array)
                places.append((dataset.id.get_offset(), array))
            _set_attributes(dataset, attributes.get(name, {}))
    with open(path, "wb") as out:
        out.write(image.getbuffer())
        for offset, array in places:
            if array.size:
                out.seek(offset)
                out.write(array.data.cast("B"))


def _set_attributes(node: Any, attributes: Mapping[str, Any]) -> None:
    """Set attributes, texts as strings of fixed length.

    HDF5 keeps strings of variable length in a heap without a checksum: with one bit of it changed, its library may
    look for the string for ever.
    """
    for key, value in attributes.items():
        node.attrs[key] = np.bytes_(value.encode()) if isinstance(value, str) else value


def _reserve(file: Any, name: str, array: np.ndarray) -> Any:
    """A contiguous dataset whose bytes are not written yet."""
    import h5py

    layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    layout.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    layout.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    layout.set_obj_track_times(False)
    # beyond 8 attributes HDF5 would make a heap of 8 KiB for them
    layout.set_attr_phase_change(64, 0)
    space, kind = h5py.h5s.create_simple(array.shape), h5py.h5t.py_create(array.dtype, logical=True)
    h5py.h5d.create(file.id, name.encode(), kind, space, layout)
    return file[name]


@contextmanager
def open_h5(path: Path) -> Iterator[Any]:
    """An HDF5 file for reading, unlocked: network file systems often have no locks.

    Raises:
        UnitCorruptError: it is absent or damaged, or what is read of it is.
    """
    try:
        with _open(path) as file:
            yield file
    except (StoreError, PermissionError):
        raise
    except (OSError, ValueError, LookupError, TypeError, RuntimeError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> UnitCorruptError:
    return UnitCorruptError(f"got {path} → it is damaged or not ours ({error}) → delete it and run mil extract again")


def _open(path: Path) -> Any:
    import h5py

    try:
        return h5py.File(path, "r", locking=False)
    except OSError as error:
        if "locking flag" not in str(error):
            raise
        # this process has it open with locks; HDF5 insists that both agree
        return h5py.File(path, "r")


def _remember(read: Callable[..., T]) -> Callable[..., T]:
    """Keep what was read of a file while the file stays as it is: opening one costs a tenth of reading a slide."""
    remembered = lru_cache(maxsize=2048)(lambda facts, *arguments: read(*arguments))

    @wraps(read)
    def look(path: Path, *arguments: Any) -> T:
        try:
            facts = os.stat(path)
        except OSError:
            return read(path, *arguments)
        # a file may be written twice within one tick of the clock
        if time.time_ns() - facts.st_mtime_ns < _SETTLED_NS:
            return read(path, *arguments)
        return remembered((facts.st_mtime_ns, facts.st_size, facts.st_ino), path, *arguments)

    return look


@_remember
def _record_text(path: Path) -> str:
    """The record in a file, as it stands there."""
    with open_h5(path) as file:
        text, checksum = bytes(file.attrs[_RECORD]), bytes(file.attrs[_RECORD_SHA256])
        if sha256(text).hexdigest() != checksum.decode():
            raise ValueError("its record does not match its checksum")
        return text.decode()


def read_record(path: Path) -> dict[str, Any]:
    """The record in a file.

    Raises:
        UnitCorruptError: there is none, or it does not match its checksum.
    """
    text = _record_text(path)
    try:
        record = json.loads(text)
    except ValueError as error:
        raise _damaged(path, error) from error
    if not isinstance(record, dict):
        raise _damaged(path, TypeError("its record is no object"))
    return record


@_remember
def _place(path: Path, name: str) -> tuple[int, np.dtype[Any], tuple[int, ...]] | None:
    """Offset, dtype and shape of an array that lies raw and in one piece; None for others."""
    with open_h5(path) as file:
        data = file[name]
        offset = _raw_offset(data)
        return None if offset is None else (offset, data.dtype, data.shape)


def read_array(path: Path, name: str, rows: slice | np.ndarray | None = None) -> np.ndarray:
    """An array of a file, or some of its rows; mapped where it lies raw and in one piece.

    Args:
        path: the file.
        name: name of the array.
        rows: what `row_index` returned; None for all.

    Raises:
        UnitCorruptError: it is absent or damaged.
    """
    place = _place(path, name)
    if place is None:
        with open_h5(path) as file:
            return take_rows(file[name], file[name].shape, rows)
    offset, dtype, shape = place
    try:
        array = np.memmap(path, dtype, "r", offset, shape).view(np.ndarray)
    except PermissionError:
        raise
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error
    return array if rows is None else array[rows]


def read_attributes(path: Path, name: str) -> dict[str, Any]:
    """The attributes of an array."""
    with open_h5(path) as file:
        found = {key: getattr(value, "tolist", lambda value=value: value)() for key, value in file[name].attrs.items()}
        return {key: value.decode() if isinstance(value, bytes) else value for key, value in found.items()}


def _raw_offset(data: Any) -> int | None:
    """Where a dataset begins in its file; None where its bytes are not the array."""
    plain = data.dtype.kind in "iuf" and data.dtype.isnative and data.chunks is None and data.external is None
    offset = data.id.get_offset() if plain and not data.is_virtual else None
    # NumPy would read a misaligned array slowly, and torch not at all
    return offset if offset is not None and offset % data.dtype.itemsize == 0 else None
