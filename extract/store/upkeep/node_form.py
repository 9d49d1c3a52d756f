"""Whether the metadata of a Zarr unit is, to the byte, what was written.

Checksums cover the arrays. The JSON around them has none, so it is written out again from what it says and compared:
a changed key, number or blank shows.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from extract.store.core.remote_path import StorePath
from extract.store.core.unit import PICTURES
from extract.store.formats.nodes import array_metadata, group_metadata


def tiles_form_problems(unit: StorePath, record: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> list[str]:
    """Problems in the metadata of a tiles unit.

    Args:
        unit: its folder.
        record: its record.
        arrays: those that could be read.
    """
    problems = _problems(unit, "record", group_metadata(record))
    for name, array in arrays.items():
        expected = _picture_metadata(array) if name in PICTURES else array_metadata(array, {})
        problems += _problems(unit / name, name, expected)
    return problems


def features_form_problems(unit: StorePath, record: Mapping[str, Any], matrix: np.ndarray) -> list[str]:
    """Problems in the metadata of a features unit, which another program may have chunked anew."""
    expected = array_metadata(matrix, record)
    metadata = json.loads((unit / "zarr.json").read_bytes())
    if any(metadata.get(key) != expected[key] for key in ("chunk_grid", "chunk_key_encoding", "codecs")):
        import zarr

        # what zarr-python makes of it has no key that zarr-python does not know
        understood = json.loads(json.dumps(zarr.open_array(str(unit), mode="r").metadata.to_dict()))
        expected = {**_without_defaults(understood), "attributes": expected["attributes"]}
    return _problems(unit, "features", expected)


def _problems(node: StorePath, name: str, expected: Mapping[str, Any]) -> list[str]:
    text = (node / "zarr.json").read_bytes()
    metadata = json.loads(text)
    if _without_defaults(metadata) != expected:
        return [f"{name}: its metadata is not what was written"]
    # ours is indented by one blank, zarr-python's by two
    if text not in (json.dumps(metadata, indent=1).encode(), json.dumps(metadata, indent=2).encode()):
        return [f"{name}: its metadata file was changed after it was written"]
    return []


def _without_defaults(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata without storage transformers, which zarr-python names though there are none."""
    return {key: value for key, value in metadata.items() if (key, value) != ("storage_transformers", [])}


def _picture_metadata(picture: np.ndarray) -> dict[str, Any]:
    """Metadata of a picture of one compressed chunk, as zarr-python writes it."""
    metadata = array_metadata(picture, {})
    codecs = [{"name": "bytes"}, {"name": "zstd", "configuration": {"level": 3, "checksum": False}}]
    return metadata | {"codecs": codecs, "attributes": {}}
