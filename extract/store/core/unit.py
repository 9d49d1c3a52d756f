"""The two units of a slide: where it was cut, and one embedding per tile; their names, arrays and records."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any
from urllib.parse import quote, unquote

import numpy as np

from extract.errors import StoreError
from extract.store.core.fingerprint import fingerprint, sha256_of, to_dict
from extract.store.core.recipes import Execution

_SAFE_NAME_BYTES = 200


@dataclass(frozen=True)
class TilesUnit:
    """Where a slide was cut.

    Attributes:
        slide_id: the slide's id.
        coords: int32 [n_tiles, 2], top-left (x, y) in level-0 px, row-major order. Imported units may lack this and
            the other arrays: None where they are not known; without coords the record holds ``n_tiles``.
        tissue_fraction: float32 [n_tiles], part of each tile's area that is tissue.
        thumbnail: uint8 [h, w, 3].
        record: plain JSON values: mpp and its source, sizes, frames, the slide's fingerprint.
        tissue_mask: bool [h, w] on the thumbnail.
    """

    slide_id: str
    coords: np.ndarray | None
    tissue_fraction: np.ndarray | None
    thumbnail: np.ndarray | None
    record: Mapping[str, Any]
    tissue_mask: np.ndarray | None = None


PICTURES = ("thumbnail", "tissue_mask")
"""Arrays of a tiles unit that are looked at, not trained on: a backend may compress them."""

Form = tuple[tuple[int, ...], str]
"""Shape of an array, and name of its dtype."""


def array_form(name: str, array: np.ndarray, n_tiles: int) -> Form:
    """What shape and dtype an array of a tiles unit must have; a picture may be of any height and width.

    Args:
        name: ``coords``, ``tissue_fraction``, ``thumbnail`` or ``tissue_mask``; another name may be of any form.
        array: as it is stored; a mask is uint8.
        n_tiles: tiles of the slide.
    """
    forms: dict[str, Form] = {
        "coords": ((n_tiles, 2), "int32"),
        "tissue_fraction": ((n_tiles,), "float32"),
        "thumbnail": ((*array.shape[:2], 3), "uint8"),
        "tissue_mask": (array.shape[:2], "uint8"),
    }
    return forms.get(name, (array.shape, array.dtype.name))


def tiles_arrays(unit: TilesUnit) -> dict[str, np.ndarray]:
    """The arrays that a tiles unit has, by name, as they are stored: contiguous, the mask as uint8."""
    given = {
        "coords": (unit.coords, np.int32),
        "tissue_fraction": (unit.tissue_fraction, np.float32),
        "thumbnail": (unit.thumbnail, np.uint8),
        "tissue_mask": (unit.tissue_mask, np.uint8),
    }
    return {
        name: np.ascontiguousarray(array, dtype=dtype) for name, (array, dtype) in given.items() if array is not None
    }


def tiles_record(unit: TilesUnit, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The record of a tiles unit: its own, the slide's id, the number of tiles, and the checksum of every array."""
    checksums = {name: sha256_of(array) for name, array in arrays.items()}
    n_tiles = unit.record["n_tiles"] if unit.coords is None else len(unit.coords)
    return {**unit.record, "slide_id": unit.slide_id, "n_tiles": n_tiles, "sha256": checksums}


def features_record(
    tiles: Mapping[str, Any],
    matrix: np.ndarray,
    invalid_rows: Sequence[int],
    execution: Execution,
    flagged_rows: Mapping[str, list[int]] | None,
) -> dict[str, Any]:
    """The commit record of a features unit.

    Args:
        tiles: record of the tiles that were embedded.
        matrix: [n_tiles, dim], contiguous.
        invalid_rows: rows whose tile could not be decoded.
        execution: how the rows were computed.
        flagged_rows: rows of each quality flag, or None where flags were not looked for.
    """
    return {
        "slide_id": tiles["slide_id"],
        "n_tiles": len(matrix),
        "sha256": sha256_of(matrix),
        "tiles_sha256": fingerprint(tiles),
        "invalid_rows": sorted(invalid_rows),
        "flagged_rows": dict(flagged_rows or {}),
        "execution": to_dict(execution),
        "execution_fingerprint": fingerprint(execution),
    }


def has_checksum(array: np.ndarray, checksum: str) -> bool:
    """Whether an array has the SHA-256 that was written down for it."""
    return sha256_of(np.ascontiguousarray(array)) == checksum


def encode_id(slide_id: str) -> str:
    """The file name of a slide id: percent-encoded, never empty, hidden, reserved, or longer than file systems allow.

    An id whose encoding is longer than 200 bytes keeps its beginning and gets a digest; its record holds the whole id.
    """
    name = quote(slide_id, safe="", errors="surrogateescape").replace("~", "%7E")
    if name.startswith((".", "_")) or name == "zarr.json":
        name = f"%{ord(name[0]):02X}{name[1:]}"
    if not name:
        raise StoreError("got an empty slide id → a slide needs a name → give one in the slide table")
    if len(name) > _SAFE_NAME_BYTES:
        name = f"{name[: _SAFE_NAME_BYTES - 40]}~{sha256(slide_id.encode(errors='surrogateescape')).hexdigest()[:32]}"
    return name


def decode_id(name: str) -> str | None:
    """The slide id of a file name, or None when only the unit's record has it."""
    return None if "~" in name else unquote(name, errors="surrogateescape")
