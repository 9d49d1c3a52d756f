"""What must hold for a committed unit: its arrays, its record, and how they fit the recipes.

Every function returns the problems it found, in words; none means healthy.
"""

import hashlib
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from extract.store.core.fingerprint import fingerprint, sha256_of
from extract.store.core.recipes import FeatureRecipe, TileRecipe
from extract.store.core.unit import array_form

ARRAYS = ("coords", "tissue_fraction", "thumbnail", "tissue_mask")
"""What a tiles unit may hold."""

_FLAGS = ("blurred", "empty", "pen")
_BLOCK_BYTES = 1 << 20
_INFINITY = {"float16": (np.uint16, 0x7C00, 0x7FFF), "float32": (np.uint32, 0x7F80_0000, 0x7FFF_FFFF)}
"""Whole numbers of a dtype's size, the bits of its infinity, and all bits but the sign."""


def record_problems(record: Mapping[str, Any], recipe: TileRecipe) -> list[str]:
    """Whether a tiles record fits the tile recipe of its store; what it does not say is not checked."""
    problems = []
    unknown = sorted(set(record["sha256"]) - set(ARRAYS))
    if unknown:
        problems.append(f"its record names arrays that no unit has: {unknown}")
    if "tile_px" in record and recipe.tile_px and record["tile_px"] != recipe.tile_px:
        problems.append(f"tiles of {record['tile_px']} px in a store of {recipe.tile_px} px")
    mpp = record.get("mpp") or {}
    if "requested" in mpp and recipe.mpp is not None and mpp["requested"] not in (recipe.mpp, None):
        problems.append(f"tiles of {mpp['requested']} µm/px in a store of {recipe.mpp} µm/px")
    if "grid_tiles" in record and record["n_tiles"] > record["grid_tiles"]:
        problems.append(f"{record['n_tiles']} tiles of a grid of {record['grid_tiles']}")
    return problems


def array_problems(name: str, array: np.ndarray, record: Mapping[str, Any]) -> list[str]:
    """Whether an array of a tiles unit has its checksum, and the shape and dtype that belong to its name.

    Args:
        name: ``coords``, ``tissue_fraction``, ``thumbnail`` or ``tissue_mask``.
        array: as it is stored; a mask is uint8.
        record: the tiles record.
    """
    if sha256_of(np.ascontiguousarray(array)) != record["sha256"][name]:
        return [f"{name}: other bytes than were written (checksum)"]
    shape, dtype = array_form(name, array, record["n_tiles"])
    if (array.shape, array.dtype.name) != (shape, dtype):
        return [f"{name}: {array.dtype} {list(array.shape)}, expected {dtype} {list(shape)}"]
    return []


def fit_problems(arrays: Mapping[str, np.ndarray], record: Mapping[str, Any], recipe: TileRecipe) -> list[str]:
    """Whether the arrays of a tiles unit make sense: places on the slide, parts of one, one picture and its mask.

    Args:
        arrays: those whose own checks were passed.
        record: the tiles record.
        recipe: the tile recipe of the store.
    """
    problems = []
    if "coords" in arrays:
        problems += _coords_problems(arrays["coords"], record)
    fraction = arrays.get("tissue_fraction")
    if fraction is not None and not ((fraction >= 0) & (fraction <= 1 + 1e-6)).all():
        problems.append("tissue_fraction: values that are not between 0 and 1")
    picture, mask = arrays.get("thumbnail"), arrays.get("tissue_mask")
    if mask is None:
        return problems
    if picture is not None and picture.shape[:2] != mask.shape:
        problems.append(f"tissue_mask: {list(mask.shape)}, but the thumbnail is {list(picture.shape[:2])}")
    digest = (record.get("tissue") or {}).get("mask_sha256")
    if digest is not None and digest != sha256_of(np.packbits(mask.astype(bool))):
        problems.append("tissue_mask: not the mask that the tiles were cut by (tissue.mask_sha256)")
    return problems


def _coords_problems(coords: np.ndarray, record: Mapping[str, Any]) -> list[str]:
    """Tiles lie on the slide; those of a grid are in row-major order, each once."""
    problems = []
    if "size_l0" in record and "tile_l0" in record and len(coords):
        # a tile may stick out by half a pixel of the level that is read, and is then rounded to level-0 pixels
        slack_l0 = 0.5 * record.get("downsample", 1.0) + 1
        last_l0 = np.asarray(record["size_l0"]) - record["tile_l0"] + slack_l0
        outside = int(((coords < -slack_l0) | (coords > last_l0)).any(axis=1).sum())
        if outside:
            problems.append(f"coords: {outside} of {len(coords)} tiles are outside the slide")
    if "grid_tiles" in record:
        place = coords[:, 1].astype(np.int64) * (1 << 32) + coords[:, 0]
        if (np.diff(place) <= 0).any():
            problems.append("coords: not in row-major order, or twice the same")
    return problems


def commit_problems(record: Mapping[str, Any], tiles: Mapping[str, Any] | None) -> list[str]:
    """Whether the record of a features unit is consistent in itself and with the tiles; their link is not checked.

    Args:
        record: of the features unit.
        tiles: record of the tiles; None where it cannot be used.
    """
    n = record["n_tiles"]
    problems = []
    if tiles is not None and n != tiles["n_tiles"]:
        problems.append(f"{n} rows for {tiles['n_tiles']} tiles")
    if fingerprint(record["execution"]) != record["execution_fingerprint"]:
        problems.append("its record of how it was computed does not match its fingerprint")
    problems += _row_problems("invalid_rows", record["invalid_rows"], n)
    for name, rows in record["flagged_rows"].items():
        problems += _row_problems(f"flagged_rows.{name}", rows, n)
        if name not in _FLAGS:
            problems.append(f"flagged_rows.{name}: unknown; flags are {', '.join(_FLAGS)}")
    return problems


def _row_problems(name: str, rows: Sequence[Any], n: int) -> list[str]:
    whole = all(type(row) is int and 0 <= row < n for row in rows)
    ascending = whole and all(a < b for a, b in pairwise(rows))
    return [] if ascending else [f"{name}: expected ascending row numbers below {n}, got {_shorten(rows)}"]


def _shorten(rows: Sequence[Any]) -> str:
    return f"{list(rows[:5])}{' ...' if len(rows) > 5 else ''}"


def matrix_problems(
    matrix: np.ndarray, record: Mapping[str, Any], recipe: FeatureRecipe | None, quick: bool = False
) -> list[str]:
    """Whether embeddings are those of the record: shape, dtype, checksum, finite, invalid rows zero.

    Args:
        matrix: [n_tiles, dim], mapped or in memory; read once.
        record: of the features unit.
        recipe: of the entry, or None where it is unknown.
        quick: look at shape and dtype only.
    """
    expected = (record["n_tiles"], matrix.shape[-1] if recipe is None else recipe.dim)
    dtype = matrix.dtype.name if recipe is None else recipe.dtype
    if (matrix.shape, matrix.dtype.name) != (expected, dtype):
        return [f"features: {matrix.dtype} {list(matrix.shape)}, expected {dtype} {list(expected)}"]
    if quick:
        return []
    checksum, finite = _read_matrix(matrix)
    problems = [] if checksum == record["sha256"] else ["features: other bytes than were written (checksum)"]
    if not finite:
        problems.append("features: values that are not finite")
    rows = [row for row in record["invalid_rows"] if type(row) is int and 0 <= row < len(matrix)]
    if matrix[rows].any():
        problems.append("features: rows of tiles that could not be decoded are not zero")
    return problems


def _read_matrix(matrix: np.ndarray) -> tuple[str, bool]:
    """Checksum of a matrix, and whether all of it is finite; one pass, each block while it is in the cache."""
    bits, infinity, without_sign = _INFINITY[matrix.dtype.name]
    digest, finite = hashlib.sha256(), True
    step = max(_BLOCK_BYTES // max(matrix.shape[1] * matrix.itemsize, 1), 1)
    for start in range(0, len(matrix), step):
        block = np.ascontiguousarray(matrix[start : start + step])
        if not block.size:
            continue
        digest.update(block.data.cast("B"))
        # without their signs, the bits of finite values are whole numbers below those of infinity; this is five times
        # faster than isfinite
        finite &= int((block.view(bits) & bits(without_sign)).max()) < infinity
    return digest.hexdigest(), finite
