"""Tiles of one slide: the read plan, the tissue mask, the grid, and what of it is kept."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from extract.errors import MaskError, NoTissueError, ScaleError
from extract.geometry import Grid, ReadPlan, area_mm2, context_coords, plan_context, plan_read, tile_grid
from extract.slides.masks import mask_sha256, read_mask
from extract.slides.parts import slide_fingerprint
from extract.slides.slide_like import SlideLike
from extract.store import TileRecipe, TilesUnit
from extract.store.core.fingerprint import sha256_of
from extract.tiling.tissue import tissue_fraction, tissue_mask


def plan_slide(
    slide: SlideLike, recipe: TileRecipe, mpp: float | None, default_mpp: float | None
) -> tuple[ReadPlan, str]:
    """The read plan of a slide and the source of its mpp.

    Raises:
        MissingMppError: the recipe asks for an mpp and the slide has none.
        ScaleError: the scale cannot be had from this slide.
    """
    native, source = slide.native_mpp(mpp, default_mpp)
    if native is None and recipe.mpp is not None:
        raise slide.missing_mpp()
    try:
        return plan_read(native, slide.downsamples, recipe.mpp, recipe.tile_px, recipe.allow_upsampling), source
    except ScaleError as error:
        raise ScaleError(f"slide {slide.name!r}: {error}") from error


def cut_slide(
    slide: SlideLike,
    slide_id: str,
    recipe: TileRecipe,
    mpp: float | None = None,
    default_mpp: float | None = None,
    mask: Path | None = None,
) -> TilesUnit:
    """Cut a slide into tiles on tissue.

    Args:
        slide: an open slide.
        slide_id: its id in the store.
        recipe: tiling and tissue.
        mpp: µm/px of level 0 from the slide table; wins over the file.
        default_mpp: µm/px of level 0 for slides that name none.
        mask: file with the slide's tissue mask (PNG or QuPath GeoJSON); wins over the recipe's method.

    Raises:
        SlideError: the slide has no usable scale, is smaller than a tile, or shows no tissue, or its mask is unusable.
    """
    plan, source = plan_slide(slide, recipe, mpp, default_mpp)
    shift_px = grid_shift(recipe, slide_id)
    grid = _grid(slide, recipe, plan, shift_px)
    coords = grid.coords_l0()
    tissue = _find_tissue(slide, recipe, plan, mask)
    fraction = tissue_fraction(tissue.mask, (coords - slide.bounds_l0[:2]) * tissue.scale, tissue.tile_px(plan))
    kept = (fraction >= recipe.min_tissue_fraction) | (tissue.method == "none")
    if not kept.any():
        raise NoTissueError(
            f"got at most {fraction.max():.0%} tissue in the {len(coords)} tiles of slide {slide_id!r} → expected "
            f"{recipe.min_tissue_fraction:.0%} in one of them → lower --min-tissue, or tile everything "
            f"with --tissue none"
        )
    record = {
        **_slide_record(slide),
        **_plan_record(plan, source),
        **_grid_record(grid, shift_px),
        **_tissue_record(slide, tissue, plan),
    }
    return TilesUnit(slide_id, coords[kept], fraction[kept], tissue.picture, record, tissue.mask)


def grid_shift(recipe: TileRecipe, slide_id: str) -> tuple[int, int]:
    """How far a slide's grid is moved right and down, in tile pixels: one draw per slide, (0, 0) without jitter.

    x and y are the first and the second eight bytes (big-endian) of the SHA-256 of ``"<jitter_seed>:<slide_id>"``, each
    modulo ``jitter_px + 1``: uniform over 0 to ``jitter_px``, the same on every machine, whatever the other slides are.
    """
    digest = hashlib.sha256(f"{recipe.jitter_seed}:{slide_id}".encode(errors="surrogateescape")).digest()
    x, y = (int.from_bytes(digest[8 * i : 8 * i + 8], "big") % (recipe.jitter_px + 1) for i in (0, 1))
    return x, y


def context_tiles(record: Mapping[str, Any], coords: np.ndarray, context_mpp: float) -> tuple[ReadPlan, np.ndarray]:
    """Where the context tiles of a cut slide lie, and how they are read: the same centres at a coarser scale.

    Args:
        record: the record of the slide's tiles unit.
        coords: int32 [n, 2], its tiles' corners in level-0 px.
        context_mpp: µm/px of the context tiles.

    Returns:
        The read plan, and int32 [n, 2] corners in level-0 px; see `extract.geometry.context_coords`.

    Raises:
        ScaleError: the slide's scale is unknown, or the context is not coarser than the tiles.
    """
    plan = recorded_plan(record)
    try:
        context = plan_context(plan, record["downsamples"], context_mpp)
    except ScaleError as error:
        raise ScaleError(f"slide {record['slide_id']!r}: {error}") from error
    return context, context_coords(coords, plan, context)


def recorded_plan(record: Mapping[str, Any]) -> ReadPlan:
    """The read plan by which a committed slide was cut; a later run reads the same pixels, whatever it is told."""
    mpp = record["mpp"]
    return ReadPlan(
        level=record["level"],
        downsample=record["downsample"],
        tile_px=record["tile_px"],
        tile_level=record["tile_level"],
        tile_l0=record["tile_l0"],
        native_mpp=mpp["native"],
        requested_mpp=mpp["requested"],
        achieved_mpp=mpp["achieved"],
    )


@dataclass(frozen=True)
class _Tissue:
    """Tissue on the thumbnail; ``scale`` is thumbnail pixels per level-0 pixel along x and y."""

    picture: np.ndarray
    mask: np.ndarray
    threshold: float
    method: str
    scale: np.ndarray
    unreadable_px: int
    given_sha256: str | None

    def tile_px(self, plan: ReadPlan) -> tuple[float, float]:
        """Width and height of a tile in thumbnail pixels."""
        return float(plan.tile_l0 * self.scale[0]), float(plan.tile_l0 * self.scale[1])


def _find_tissue(slide: SlideLike, recipe: TileRecipe, plan: ReadPlan, mask_file: Path | None) -> _Tissue:
    """Read the thumbnail and tell tissue on it, or read the mask that came with the slide."""
    picture, readable = slide.read_thumbnail(_thumbnail_downsample(slide, recipe, plan))
    _, _, width_l0, height_l0 = slide.bounds_l0
    scale = np.array([picture.shape[1] / width_l0, picture.shape[0] / height_l0])
    tile_area_px = plan.tile_l0**2 * float(scale[0] * scale[1])
    given, given_sha256 = None, None
    try:
        if mask_file is not None:
            given = read_mask(mask_file, slide.size_l0, slide.bounds_l0, picture.shape[:2])
            given_sha256 = mask_sha256(mask_file)
        mask, threshold = tissue_mask(picture, recipe.tissue, tile_area_px, given)
    except MaskError as error:
        raise MaskError(f"slide {slide.name!r}: {error}") from error
    if given is None:
        # what the thumbnail could not show may be tissue: its tiles are tried one by one
        mask |= ~readable
    method = recipe.tissue.method if given is None else "mask"
    return _Tissue(picture, mask, threshold, method, scale, int((~readable).sum()), given_sha256)


def _grid(slide: SlideLike, recipe: TileRecipe, plan: ReadPlan, shift_px: tuple[int, int]) -> Grid:
    x, y, width, height = slide.bounds_l0
    try:
        return tile_grid((x, y), (width, height), plan, recipe.overlap_px, recipe.edge, recipe.gap_px, shift_px)
    except ScaleError as error:
        raise ScaleError(f"slide {slide.name!r}: {error}") from error


def _thumbnail_downsample(slide: SlideLike, recipe: TileRecipe, plan: ReadPlan) -> float:
    """Level-0 pixels per thumbnail pixel: fine enough for the tiles, and for the eye."""
    longest = max(slide.bounds_l0[2:])
    return max(1.0, min(plan.tile_l0 / recipe.tissue.pixels_per_tile, longest / recipe.tissue.thumbnail_px))


def _slide_record(slide: SlideLike) -> dict[str, Any]:
    """What the file is."""
    return {
        "size_l0": list(slide.size_l0),
        "bounds_l0": list(slide.bounds_l0),
        "downsamples": list(slide.downsamples),
        "vendor": slide.vendor,
        "synthetic": slide.synthetic,
        "slide": slide_fingerprint(slide.path).to_record(),
    }


def _plan_record(plan: ReadPlan, source: str) -> dict[str, Any]:
    """At which scale, and from which level, tiles are read; `recorded_plan` reads it back."""
    return {
        "mpp": {
            "native": plan.native_mpp,
            "requested": plan.requested_mpp,
            "achieved": plan.achieved_mpp,
            "source": source,
        },
        "level": plan.level,
        "downsample": plan.downsample,
        "tile_px": plan.tile_px,
        "tile_level": plan.tile_level,
        "tile_l0": plan.tile_l0,
    }


def _grid_record(grid: Grid, shift_px: tuple[int, int]) -> dict[str, Any]:
    """The whole grid: its tiles, its jitter, and the columns (x) and rows (y) that were moved inwards, None if none."""
    return {
        "grid_tiles": len(grid.x_l0) * len(grid.y_l0),
        "jitter_px": list(shift_px),
        "shifted": {
            "x_l0": int(grid.x_l0[-1]) if grid.x_shifted else None,
            "y_l0": int(grid.y_l0[-1]) if grid.y_shifted else None,
        },
        "shifted_first": {
            "x_l0": int(grid.x_l0[0]) if grid.x_first_shifted else None,
            "y_l0": int(grid.y_l0[0]) if grid.y_first_shifted else None,
        },
    }


def _tissue_record(slide: SlideLike, tissue: _Tissue, plan: ReadPlan) -> dict[str, Any]:
    """The thumbnail's frame, and how much tissue was found on it, by which method."""
    pixels_l0 = float(tissue.mask.sum()) / float(tissue.scale[0] * tissue.scale[1])
    return {
        "thumbnail": {
            "origin_l0": list(slide.bounds_l0[:2]),
            "downsample": [float(1 / tissue.scale[0]), float(1 / tissue.scale[1])],
        },
        "thumbnail_unreadable": tissue.unreadable_px,
        "tissue": {
            "method": tissue.method,
            "threshold": tissue.threshold,
            "fraction": float(tissue.mask.mean()),
            "area_mm2": None if plan.native_mpp is None else area_mm2(pixels_l0, plan.native_mpp),
            "mask_sha256": sha256_of(np.packbits(tissue.mask)),
            "given_sha256": tissue.given_sha256,
        },
    }
