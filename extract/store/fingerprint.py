"""Recipes, and the fingerprints that keep two recipes from being mixed.

A recipe is a frozen tree of plain values. Its fingerprint is the SHA-256 of the whole tree as canonical JSON, so a new
field can never be forgotten. How something was computed is not *what* was computed: that is `Execution`, recorded and
hashed apart.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

from extract.errors import RecipeError, RecipeMismatchError

R = TypeVar("R")

_SAMPLE_BYTES = 1 << 20


def _as_floats(recipe: object, *names: str) -> None:
    """Make 1 and 1.0 the same recipe: equal values must have equal fingerprints."""
    for name in names:
        value = getattr(recipe, name)
        if value is not None:
            object.__setattr__(recipe, name, float(value))


def _check(valid: bool, what: str, got: object, expected: str) -> None:
    if not valid:
        raise RecipeError(f"got {what} {got!r} → expected {expected} → correct it")


@dataclass(frozen=True)
class TissueRecipe:
    """How tissue is told from background, on a thumbnail whose pixel is ``tile / pixels_per_tile`` wide.

    Attributes:
        method: ``default`` (channel range, Otsu, morphology) or ``none`` (everything is tissue).
        pixels_per_tile: thumbnail pixels along a tile's side, at least.
        thumbnail_px: thumbnail pixels along the slide's longer side, at least.
        threshold_low: smallest channel range that Otsu may choose as threshold, 0 to 255.
        threshold_high: largest one; keeps Otsu from splitting pale from dark tissue on a field without background.
        closing_px: radius of the morphological closing and opening in thumbnail pixels.
        min_object_tiles: smaller pieces of tissue are dropped, in tile areas.
        min_hole_tiles: smaller holes are filled, in tile areas.
    """

    method: str = "default"
    pixels_per_tile: int = 16
    thumbnail_px: int = 512
    threshold_low: int = 10
    threshold_high: int = 20
    closing_px: int = 2
    min_object_tiles: float = 0.25
    min_hole_tiles: float = 0.25

    def __post_init__(self) -> None:
        _as_floats(self, "min_object_tiles", "min_hole_tiles")
        _check(self.method in ("default", "none"), "tissue method", self.method, "default or none")


@dataclass(frozen=True)
class TileRecipe:
    """How a slide is cut into tiles; one per store.

    Attributes:
        mpp: µm/px of the tiles, or None for the native resolution of each slide.
        tile_px: side of a tile in pixels.
        overlap_px: pixels that neighbouring tiles share.
        edge: ``shift`` (the last row and column move inwards) or ``drop``.
        min_tissue_fraction: a tile is kept if at least this part of its area is tissue.
        allow_upsampling: whether a scale finer than level 0 was permitted.
        resampling: filter for scales between levels.
        tissue: how tissue is found.
    """

    mpp: float | None = 0.5
    tile_px: int = 224
    overlap_px: int = 0
    edge: str = "shift"
    min_tissue_fraction: float = 0.25
    allow_upsampling: bool = False
    resampling: str = "area"
    tissue: TissueRecipe = field(default_factory=TissueRecipe)

    def __post_init__(self) -> None:
        _as_floats(self, "mpp", "min_tissue_fraction")
        valid_mpp = self.mpp is None or (math.isfinite(self.mpp) and self.mpp > 0)
        _check(valid_mpp, "mpp", self.mpp, "µm per pixel above 0, such as 0.5")
        _check(self.tile_px > 0, "tile size", self.tile_px, "at least one pixel")
        _check(0 <= self.overlap_px < self.tile_px, "overlap", self.overlap_px, f"0 to {self.tile_px - 1} pixels")
        _check(self.edge in ("shift", "drop"), "edge", self.edge, "shift or drop")
        _check(0 <= self.min_tissue_fraction <= 1, "tissue fraction", self.min_tissue_fraction, "0 to 1")
        _check(self.resampling == "area", "resampling", self.resampling, "area")


@dataclass(frozen=True)
class TransformRecipe:
    """How uint8 tiles become the backbone's input: ``(resize(tile) / 255 - mean) / std``.

    Attributes:
        input_px: side of the backbone's input; tiles of another size are resized.
        interpolation: filter of that resize (antialiased).
        mean: per channel, in units of 0 to 1.
        std: per channel, in units of 0 to 1.
    """

    input_px: int
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            object.__setattr__(self, name, tuple(float(value) for value in getattr(self, name)))


@dataclass(frozen=True)
class FeatureRecipe:
    """What a row of an entry's feature matrix is.

    Attributes:
        backbone: the name given to ``--backbone``.
        architecture: the timm architecture it stands for.
        revision: revision of the weights' source.
        weights_sha256: SHA-256 over names, dtypes, shapes and bytes of the loaded weights, whatever file they came in.
        pooling: ``model`` (the model's own), ``avg``, ``cls`` or ``cls+avg``.
        transform: from uint8 tiles to the input.
        dim: features per tile.
        dtype: ``float16`` or ``float32``.
        view: ``identity``, or the name of an augmented view.
        context_mpp: µm/px of a context view, or None.
    """

    backbone: str
    architecture: str
    revision: str
    weights_sha256: str
    pooling: str
    transform: TransformRecipe
    dim: int
    dtype: str = "float16"
    view: str = "identity"
    context_mpp: float | None = None

    def __post_init__(self) -> None:
        _as_floats(self, "context_mpp")


@dataclass(frozen=True)
class Execution:
    """How an entry was computed; recorded with each slide, not part of the recipe."""

    precision: str
    runtime: str
    device: str
    batch_size: int
    versions: Mapping[str, str]


def to_dict(recipe: Any) -> dict[str, Any]:
    """The recipe as a tree of JSON values."""
    plain: dict[str, Any] = json.loads(canonical_json(recipe))
    return plain


def canonical_json(value: Any) -> str:
    """JSON with sorted keys, no white space and exact floats; equal values give equal text."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def fingerprint(recipe: Any) -> str:
    """SHA-256 (hex) of the whole recipe, a dataclass or its `to_dict`."""
    return hashlib.sha256(canonical_json(recipe).encode(errors="surrogatepass")).hexdigest()


def from_dict(cls: type[R], values: Mapping[str, Any]) -> R:
    """Rebuild a recipe of type ``cls`` from `to_dict`.

    Raises:
        RecipeMismatchError: a field is missing or unknown, as when a newer version wrote it.
    """
    nested = {"tissue": TissueRecipe, "transform": TransformRecipe}
    names = {f.name for f in fields(cls)}  # type: ignore[arg-type]
    if set(values) != names:
        odd = sorted(set(values) ^ names)
        raise RecipeMismatchError(
            f"got a {cls.__name__} whose fields differ in {odd} → this version knows {sorted(names)} → "
            f"read the store with the version that wrote it"
        )
    arguments = {
        key: from_dict(nested[key], value) if key in nested else tuple(value) if isinstance(value, list) else value
        for key, value in values.items()
    }
    return cls(**arguments)


def difference(one: Any, other: Any, prefix: str = "") -> list[str]:
    """The fields in which two recipes differ, as ``name: a → b`` with dotted names; empty when equal."""
    a, b = (value if isinstance(value, Mapping) else to_dict(value) for value in (one, other))
    lines = []
    for key in sorted(set(a) | set(b)):
        left, right = a.get(key, "absent"), b.get(key, "absent")
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            lines += difference(left, right, f"{prefix}{key}.")
        elif left != right:
            lines.append(f"{prefix}{key}: {left} → {right}")
    return lines


@dataclass(frozen=True)
class SlideFingerprint:
    """Which file a slide was: its size, and a SHA-256 of its first, middle and last MiB.

    This is a *sample* of the file, not a hash of all of it: gigabytes are not read twice. A change elsewhere in a file
    of the same size goes unseen.
    """

    size_bytes: int
    sampled_sha256: str

    @classmethod
    def of(cls, path: Path) -> Self:
        """Fingerprint the file at ``path``."""
        size = os.path.getsize(path)
        digest = hashlib.sha256(str(size).encode())
        with open(path, "rb") as file:
            for start in sorted({0, max(size // 2 - _SAMPLE_BYTES // 2, 0), max(size - _SAMPLE_BYTES, 0)}):
                file.seek(start)
                digest.update(file.read(_SAMPLE_BYTES))
        return cls(size, digest.hexdigest())


def sha256_of(array: Any) -> str:
    """SHA-256 (hex) of an array's bytes in C order."""
    return hashlib.sha256(memoryview(array).cast("B")).hexdigest()
