"""Zarr v3 nodes: groups and arrays of one raw chunk, whose chunk file *is* the matrix and is memory-mapped."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from extract.errors import StoreError, UnitCorruptError
from extract.store.files import write_json
from extract.store.fingerprint import sha256_of

_ZARR_TYPES = {"float16": "<f2", "float32": "<f4", "int32": "<i4"}


def group_metadata(record: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata of a Zarr v3 group with our attributes."""
    return {"zarr_format": 3, "node_type": "group", "attributes": {"tessera": dict(record)}}


def _raw_layout(shape: tuple[int, ...], data_type: str) -> dict[str, Any]:
    """How an array lies on disk: one uncompressed little-endian chunk in the file ``c/0/...``."""
    return {
        "data_type": data_type,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(shape)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
    }


def array_metadata(array: np.ndarray, record: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata of a Zarr v3 array of one raw chunk, with our attributes."""
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(array.shape),
        **_raw_layout(array.shape, array.dtype.name),
        "fill_value": 0,
        "attributes": {"tessera": dict(record)},
    }


def read_record(node: Path) -> dict[str, Any]:
    """Our attributes of a Zarr node."""
    try:
        with open(node / "zarr.json", encoding="utf-8") as file:
            record: dict[str, Any] = json.load(file)["attributes"]["tessera"]
            return record
    except FileNotFoundError as error:
        raise StoreError(f"got {node} → there is no zarr.json: not a store, or an incomplete unit") from error
    except (ValueError, LookupError, TypeError) as error:
        raise UnitCorruptError(
            f"got {node / 'zarr.json'} → it is damaged or not ours ({error!r}) → extract again"
        ) from error


def map_array(folder: Path) -> np.ndarray:
    """Map the array's single raw chunk; fall back to zarr-python when it is stored in any other way."""
    try:
        metadata = json.loads((folder / "zarr.json").read_bytes())
        shape = tuple(int(n) for n in metadata["shape"])
        layout = {key: metadata[key] for key in ("data_type", "chunk_grid", "chunk_key_encoding", "codecs")}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UnitCorruptError(
            f"got {folder / 'zarr.json'} → unreadable ({error}) → extract the slide again"
        ) from error
    if layout["data_type"] not in _ZARR_TYPES or layout != _raw_layout(shape, layout["data_type"]):
        import zarr

        return np.asarray(zarr.open_array(folder, mode="r")[:])
    dtype = np.dtype(_ZARR_TYPES[layout["data_type"]])
    chunk = folder / "/".join(["c", *("0" for _ in shape)])
    expected = int(np.prod(shape)) * dtype.itemsize
    size = chunk.stat().st_size if chunk.is_file() else -1
    if size != expected:
        raise UnitCorruptError(
            f"got {max(size, 0)} bytes in {chunk} → its record says {expected} → the file is damaged; "
            f"delete the folder "
            f"{folder} and run mil extract again"
        )
    return np.memmap(chunk, dtype=dtype, mode="r", shape=shape).view(np.ndarray)


def write_array(folder: Path, array: np.ndarray, record: Mapping[str, Any] | None = None) -> None:
    """Write an array as one raw chunk, the metadata last."""
    chunk = folder / "/".join(["c", *("0" for _ in array.shape)])
    chunk.parent.mkdir(parents=True)
    little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    # not ndarray.tofile: its error on a full disk has no errno
    with open(chunk, "wb") as file:
        file.write(little.data.cast("B"))
    write_json(folder / "zarr.json", array_metadata(array, record or {}))


def check_equal(array: np.ndarray, checksum: str, slide_id: str) -> None:
    if sha256_of(array) != checksum:
        raise UnitCorruptError(f"got other bytes back than were written for slide {slide_id!r} → check the disk")
