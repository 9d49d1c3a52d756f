"""What was cut and how it was embedded: recipes as frozen trees of plain values."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from extract.errors import RecipeError, RecipeMismatchError

R = TypeVar("R")


def _as_floats(recipe: object, *names: str) -> None:
    """Make 1 and 1.0 the same recipe: equal values must have equal fingerprints."""
    for name in names:
        value = getattr(recipe, name)
        if value is not None:
            object.__setattr__(recipe, name, float(value))


UNKNOWN = "unknown:"
"""Begins a recipe field of imported features that nobody recorded; the hash of their source follows."""


def is_unknown(value: object) -> bool:
    """Whether a field of a recipe is not known: what an importer writes, equal to no value that is known."""
    return isinstance(value, str) and value.startswith(UNKNOWN)


def _check(valid: bool, what: str, got: object, expected: str) -> None:
    if not valid:
        raise RecipeError(f"got {what} {got!r} → expected {expected} → correct it")


@dataclass(frozen=True)
class PenRecipe:
    """Which pixels are ink or black rather than stain; ranges and values are 0 to 255, the others parts of one.

    The range of a pixel is its largest minus its smallest channel, its saturation is range / largest.

    Attributes:
        cool_tilt: blue, cyan and green ink: red is above the smallest channel by at most this part of the range.
        green_range: and, where green is at least blue, the range is at least this.
        green_saturation: and the saturation at least this.
        blue_range: and, where blue is larger, the range is at least this.
        blue_saturation: and the saturation at least this.
        red_tilt: red ink: green and blue differ by at most this part of the range.
        red_range: and the range is at least this.
        red_saturation: and the saturation at least this.
        black_value: black: the largest channel is at most this.
        black_range: and the range at most this.
    """

    cool_tilt: float = 0.15
    green_range: int = 30
    green_saturation: float = 0.25
    blue_range: int = 45
    blue_saturation: float = 0.55
    red_tilt: float = 0.2
    red_range: int = 130
    red_saturation: float = 0.75
    black_value: int = 80
    black_range: int = 16

    def __post_init__(self) -> None:
        shares = ("cool_tilt", "green_saturation", "blue_saturation", "red_tilt", "red_saturation")
        _as_floats(self, *shares)
        for name in shares:
            _check(0 <= getattr(self, name) <= 1, f"pen {name}", getattr(self, name), "0 to 1")
        for name in ("green_range", "blue_range", "red_range", "black_value", "black_range"):
            _check(0 <= getattr(self, name) <= 255, f"pen {name}", getattr(self, name), "0 to 255")


@dataclass(frozen=True)
class TissueRecipe:
    """How tissue is told from background, on a thumbnail whose pixel is ``tile / pixels_per_tile`` wide.

    Attributes:
        method: ``default`` (channel range, Otsu, morphology; tinted glass is made white first), ``saturation`` (the
            same with HSV saturation), ``mask`` (every slide comes with one) or ``none`` (everything is tissue). A mask
            given for a slide is used whatever the method, as an mpp from the slide table is.
        pixels_per_tile: thumbnail pixels along a tile's side, at least.
        thumbnail_px: thumbnail pixels along the slide's longer side, at least.
        threshold_low: smallest channel range, or saturation times 255, that Otsu may choose as threshold, 0 to 255.
        threshold_high: largest one; keeps Otsu from splitting pale from dark tissue on a field without background.
        closing_px: radius of the morphological closing and opening in thumbnail pixels.
        min_object_tiles: smaller pieces of tissue are dropped, and smaller pen marks ignored, in tile areas.
        min_hole_tiles: smaller holes are filled, in tile areas.
        exclude_pen: pen marks, black ink and black borders are no tissue; not applied to given masks.
        pen_margin_px: thumbnail pixels around a pen mark that go with it, for its pale rim.
        pen: which colours are ink.
    """

    method: str = "default"
    pixels_per_tile: int = 16
    thumbnail_px: int = 512
    threshold_low: int = 10
    threshold_high: int = 20
    closing_px: int = 2
    min_object_tiles: float = 0.25
    min_hole_tiles: float = 0.25
    exclude_pen: bool = True
    pen_margin_px: int = 3
    pen: PenRecipe = field(default_factory=PenRecipe)

    def __post_init__(self) -> None:
        _as_floats(self, "min_object_tiles", "min_hole_tiles")
        methods = ("default", "saturation", "mask", "none")
        _check(
            self.method in methods or is_unknown(self.method),
            "tissue method",
            self.method,
            "default, saturation, mask or none",
        )
        _check(self.pen_margin_px >= 0, "pen margin", self.pen_margin_px, "0 pixels or more")


@dataclass(frozen=True)
class QualityRecipe:
    """When a tile is flagged; flags inform, no tile is dropped for one.

    Attributes:
        sampling_px: colours are looked at on every so many-th row and column.
        blur_threshold: blurred where the mean squared second difference of green, divided by its standard deviation, is
            below this (in grey levels).
        blur_mpp: second differences are taken over pixels about this many µm apart.
        empty_range: a pixel is stained if its channel range is above this, 0 to 255.
        empty_fraction: empty where less than this part of the pixels is stained.
        pen_fraction: pen where at least this part of the pixels is ink or black.
        pen: which colours are ink.
    """

    sampling_px: int = 8
    blur_threshold: float = 0.25
    blur_mpp: float = 0.5
    empty_range: int = 10
    empty_fraction: float = 0.05
    pen_fraction: float = 0.1
    pen: PenRecipe = field(default_factory=PenRecipe)

    def __post_init__(self) -> None:
        _as_floats(self, "blur_threshold", "blur_mpp", "empty_fraction", "pen_fraction")
        _check(self.sampling_px > 0, "quality sampling", self.sampling_px, "every pixel (1) or fewer")
        _check(self.blur_mpp > 0, "blur scale", self.blur_mpp, "µm per pixel above 0, such as 0.5")
        for name in ("empty_fraction", "pen_fraction"):
            _check(0 <= getattr(self, name) <= 1, name.replace("_", " "), getattr(self, name), "0 to 1")


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
        gap_px: pixels left out between neighbouring tiles (the stride is ``tile_px + gap_px``).
        jitter_px: each slide's grid is moved right and down by 0 to this many pixels, drawn at random; 0 is no jitter.
        jitter_seed: seed of that draw; with the slide's id it decides the shift.
        quality: when a tile is flagged as blurred, empty or pen.
    """

    mpp: float | None = 0.5
    tile_px: int = 224
    overlap_px: int = 0
    edge: str = "shift"
    min_tissue_fraction: float = 0.25
    allow_upsampling: bool = False
    resampling: str = "area"
    tissue: TissueRecipe = field(default_factory=TissueRecipe)
    gap_px: int = 0
    jitter_px: int = 0
    jitter_seed: int = 0
    quality: QualityRecipe = field(default_factory=QualityRecipe)

    def __post_init__(self) -> None:
        _as_floats(self, "mpp", "min_tissue_fraction")
        valid_mpp = self.mpp is None or (math.isfinite(self.mpp) and self.mpp > 0)
        _check(valid_mpp, "mpp", self.mpp, "µm per pixel above 0, such as 0.5")
        if is_unknown(self.edge):
            # imported: what is not known is 0, and nothing will be cut by it
            return
        _check(self.tile_px > 0, "tile size", self.tile_px, "at least one pixel")
        _check(0 <= self.overlap_px < self.tile_px, "overlap", self.overlap_px, f"0 to {self.tile_px - 1} pixels")
        _check(self.edge in ("shift", "drop"), "edge", self.edge, "shift or drop")
        _check(0 <= self.min_tissue_fraction <= 1, "tissue fraction", self.min_tissue_fraction, "0 to 1")
        _check(self.resampling == "area", "resampling", self.resampling, "area")
        _check(self.gap_px >= 0, "gap", self.gap_px, "0 pixels or more")
        _check(not (self.gap_px and self.overlap_px), "gap", self.gap_px, "no gap where tiles overlap")
        stride = self.tile_px + self.gap_px - self.overlap_px
        _check(0 <= self.jitter_px < stride, "jitter", self.jitter_px, f"0 to {stride - 1} pixels (below the stride)")
        _check(self.jitter_seed >= 0, "jitter seed", self.jitter_seed, "0 or more")


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


AUGMENT_POLICIES = ("flip", "colour", "hed", "blur", "randaugment", "trivialaugment", "pathology")
"""Names of the augmentation policies; `extract.backbones.views` says what each does."""


@dataclass(frozen=True)
class AugmentRecipe:
    """How the tiles of an augmented view are changed before they are embedded.

    The draws for a tile depend on this recipe, the number of the view and the tile, and on nothing else.

    Attributes:
        policy: one of `AUGMENT_POLICIES`.
        strength: 0 (nothing but flips) to 1 (as far as the policy goes).
        seed: starts the draws; another seed gives other views.
        revision: counts changes of what the policies do to a pixel. The version of torchvision is part of how a view
            was computed, not of what it is: it stands with the other versions in `Execution`.
    """

    policy: str = "pathology"
    strength: float = 0.5
    seed: int = 0
    revision: int = 1

    def __post_init__(self) -> None:
        _as_floats(self, "strength")
        _check(self.policy in AUGMENT_POLICIES, "augmentation policy", self.policy, ", ".join(AUGMENT_POLICIES))
        _check(0 <= self.strength <= 1, "augmentation strength", self.strength, "0 to 1")
        _check(self.seed >= 0, "augmentation seed", self.seed, "a whole number from 0")
        _check(self.revision >= 1, "augmentation revision", self.revision, "a whole number from 1")


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
        augment: how the tiles of an augmented view are changed, or None.
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
    augment: AugmentRecipe | None = None

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


def from_dict(cls: type[R], values: Mapping[str, Any]) -> R:
    """Rebuild a recipe of type ``cls`` from `to_dict`.

    Raises:
        RecipeMismatchError: a field is missing or unknown, as when a newer version wrote it.
    """
    nested = {
        "tissue": TissueRecipe,
        "pen": PenRecipe,
        "quality": QualityRecipe,
        "transform": TransformRecipe,
        "augment": AugmentRecipe,
    }
    names = {f.name for f in fields(cls)}  # type: ignore[arg-type]
    if set(values) != names:
        odd = sorted(set(values) ^ names)
        raise RecipeMismatchError(
            f"got a {cls.__name__} whose fields differ in {odd} → this version knows {sorted(names)} → "
            f"read the store with the version that wrote it"
        )
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        if key in nested and value is not None:
            arguments[key] = from_dict(nested[key], value)
        else:
            arguments[key] = tuple(value) if isinstance(value, list) else value
    return cls(**arguments)


def tiles_text(recipe: TileRecipe) -> str:
    """Size and scale of a store's tiles, for people: ``224 px at 0.5 µm/px``."""
    size = f"{recipe.tile_px} px" if recipe.tile_px else "unknown size"
    if recipe.mpp is not None:
        return f"{size} at {recipe.mpp:g} µm/px"
    return f"{size} at {'an unknown scale' if is_unknown(recipe.edge) else 'native resolution'}"
