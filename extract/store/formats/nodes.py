"""Zarr v3 nodes: groups and arrays of one raw chunk, whose chunk file *is* the matrix and is memory-mapped."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from extract.errors import StoreError, StoreUnreachableError, UnitCorruptError
from extract.store.core.files import write_json
from extract.store.core.fingerprint import fingerprint
from extract.store.core.remote_path import StorePath, local_path
from extract.store.core.rows import take_rows

_ZARR_TYPES = {"float16": "<f2", "float32": "<f4", "int32": "<i4"}


def group_metadata(record: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata of a Zarr v3 group with our attributes."""
    return {"zarr_format": 3, "node_type": "group", "attributes": _attributes(record)}


def _raw_layout(shape: tuple[int, ...], data_type: str) -> dict[str, Any]:
    """How an array lies on disk: one raw little-endian chunk in the file ``c/0/...``, none if it is empty."""
    return {
        "data_type": data_type,
        # a chunk has a length of at least one, also where there is no row
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [max(n, 1) for n in shape]}},
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
        "attributes": _attributes(record),
    }


def _attributes(record: Mapping[str, Any]) -> dict[str, Any]:
    """Our attributes of a node, with the checksum of its record where it has one."""
    return {"tessera": dict(record)} | ({"tessera_sha256": fingerprint(record)} if record else {})


def record_in(metadata: Any) -> dict[str, Any]:
    """Our attributes in the metadata of a node.

    Raises:
        LookupError, TypeError: there are none.
        ValueError: they do not match their checksum.
    """
    attributes = metadata["attributes"]
    record: dict[str, Any] = attributes["tessera"]
    if attributes["tessera_sha256"] != fingerprint(record):
        raise ValueError("its record does not match its checksum")
    return record


def read_record(node: StorePath) -> dict[str, Any]:
    """Our attributes of a Zarr node."""
    try:
        text = (node / "zarr.json").read_bytes()
    except FileNotFoundError as error:
        raise StoreError(f"got {node} → there is no zarr.json: not a store, or an incomplete unit") from error
    try:
        return record_in(json.loads(text))
    except (ValueError, LookupError, TypeError) as error:
        raise UnitCorruptError(
            f"got {node / 'zarr.json'} → it is damaged or not ours ({error!r}) → run mil store repair, then mil "
            f"extract again"
        ) from error


def map_array(folder: StorePath, rows: slice | np.ndarray | None = None) -> np.ndarray:
    """Map the array's single raw chunk, or read it with zarr-python when it is stored in any other way.

    Args:
        folder: the array's node.
        rows: what `row_index` returned; None for all.
    """
    layout = raw_layout(folder)
    if layout is None:
        return read_with_zarr(folder, rows)
    array = _map_chunk(folder, *layout)
    return array if rows is None else array[rows]


def raw_layout(folder: StorePath) -> tuple[tuple[int, ...], np.dtype[Any]] | None:
    """Shape and dtype of an array that is one raw chunk; None if it is stored in any other way.

    Raises:
        UnitCorruptError: its metadata cannot be read.
    """
    try:
        metadata = json.loads((folder / "zarr.json").read_bytes())
        shape = tuple(int(n) for n in metadata["shape"])
        layout = {key: metadata[key] for key in ("data_type", "chunk_grid", "chunk_key_encoding", "codecs")}
        raw = layout["data_type"] in _ZARR_TYPES and layout == _raw_layout(shape, layout["data_type"])
    except StoreUnreachableError:
        raise
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UnitCorruptError(
            f"got {folder / 'zarr.json'} → unreadable ({error}) → run mil store repair, then mil extract again"
        ) from error
    return (shape, np.dtype(_ZARR_TYPES[layout["data_type"]])) if raw else None


def chunk_path(folder: StorePath, shape: tuple[int, ...]) -> StorePath:
    """Where the single chunk of an array of this shape lies."""
    return folder / "/".join(["c", *("0" for _ in shape)])


def _map_chunk(folder: StorePath, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    expected = math.prod(shape) * dtype.itemsize
    if expected == 0:
        return np.empty(shape, dtype)
    chunk = local_path(chunk_path(folder, shape))
    size = chunk.stat().st_size if chunk.is_file() else -1
    if size != expected:
        raise UnitCorruptError(
            f"got {max(size, 0)} bytes in {chunk} → its record says {expected} → the file is damaged; "
            f"delete the folder {folder} and run mil extract again"
        )
    return np.memmap(chunk, dtype=dtype, mode="r", shape=shape).view(np.ndarray)


def read_with_zarr(folder: StorePath, rows: slice | np.ndarray | None = None) -> np.ndarray:
    """Read an array, or some of its rows, with zarr-python, whatever its chunks and codecs; a URL through fsspec.

    Raises:
        UnitCorruptError: it cannot be read.
    """
    import zarr

    try:
        array = zarr.open_array(str(folder), mode="r")
        return take_rows(array.oindex if array.shape else array, array.shape, rows)
    except (OSError, ValueError, LookupError, TypeError, RuntimeError) as error:
        raise UnitCorruptError(
            f"got {folder} → unreadable ({error}) → run mil store repair, then mil extract again"
        ) from error


def write_array(folder: Path, array: np.ndarray, record: Mapping[str, Any] | None = None) -> None:
    """Write an array as one raw chunk, the metadata last."""
    folder.mkdir(parents=True)
    if array.size:
        chunk = local_path(chunk_path(folder, array.shape))
        chunk.parent.mkdir(parents=True)
        little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
        # not ndarray.tofile: its error on a full disk has no errno
        with open(chunk, "wb") as file:
            file.write(little.data.cast("B"))
    write_json(folder / "zarr.json", array_metadata(array, record or {}))


def write_picture(folder: Path, picture: np.ndarray) -> None:
    """Write the thumbnail or its mask compressed: they are looked at, not trained on."""
    import zarr

    zarr.create_array(folder, data=picture, chunks=picture.shape, compressors=zarr.codecs.ZstdCodec(level=3))
