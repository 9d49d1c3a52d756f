"""Tiles of one slide: the read plan, the tissue mask, the grid, and what of it is kept."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from extract.errors import NoTissueError, ScaleError
from extract.geometry import Grid, ReadPlan, area_mm2, plan_read, tile_grid
from extract.slide import Slide
from extract.store import SlideFingerprint, TileRecipe, TilesUnit
from extract.store.fingerprint import sha256_of
from extract.tissue import tissue_fraction, tissue_mask


def plan_slide(slide: Slide, recipe: TileRecipe, mpp: float | None, default_mpp: float | None) -> tuple[ReadPlan, str]:
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
    slide: Slide,
    slide_id: str,
    recipe: TileRecipe,
    mpp: float | None = None,
    default_mpp: float | None = None,
) -> TilesUnit:
    """Cut a slide into tiles on tissue.

    Args:
        slide: an open slide.
        slide_id: its id in the store.
        recipe: tiling and tissue.
        mpp: µm/px of level 0 from the slide table; wins over the file.
        default_mpp: µm/px of level 0 for slides that name none.

    Raises:
        SlideError: the slide has no usable scale, is smaller than a tile, or shows no tissue.
    """
    plan, source = plan_slide(slide, recipe, mpp, default_mpp)
    grid = _grid(slide, recipe, plan)
    coords = grid.coords_l0()
    picture, readable = slide.read_thumbnail(_thumbnail_downsample(slide, recipe, plan))
    x0, y0, width_l0, height_l0 = slide.bounds_l0
    scale = np.array([picture.shape[1] / width_l0, picture.shape[0] / height_l0])
    tile_px = (plan.tile_l0 * scale[0], plan.tile_l0 * scale[1])
    mask, threshold = tissue_mask(picture, recipe.tissue, tile_px[0] * tile_px[1])
    # what the thumbnail could not show may be tissue: its tiles are tried one by one
    mask |= ~readable
    fraction = tissue_fraction(mask, (coords - (x0, y0)) * scale, tile_px)
    kept = (fraction >= recipe.min_tissue_fraction) | (recipe.tissue.method == "none")
    if not kept.any():
        raise NoTissueError(
            f"got at most {fraction.max():.0%} tissue in the {len(coords)} tiles of slide {slide_id!r} → expected "
            f"{recipe.min_tissue_fraction:.0%} in one of them → lower --min-tissue, or tile everything "
            f"with --tissue none"
        )
    record = {
        "mpp": {
            "native": plan.native_mpp,
            "requested": plan.requested_mpp,
            "achieved": plan.achieved_mpp,
            "source": source,
        },
        "size_l0": list(slide.size_l0),
        "bounds_l0": list(slide.bounds_l0),
        "vendor": slide.vendor,
        "level": plan.level,
        "downsample": plan.downsample,
        "tile_px": plan.tile_px,
        "tile_level": plan.tile_level,
        "tile_l0": plan.tile_l0,
        "shifted": _shifted(grid),
        "grid_tiles": len(coords),
        "thumbnail": {"origin_l0": [x0, y0], "downsample": [float(1 / scale[0]), float(1 / scale[1])]},
        "synthetic": slide.synthetic,
        "thumbnail_unreadable": int((~readable).sum()),
        "tissue": _tissue_record(mask, threshold, scale, plan),
        "slide": asdict(SlideFingerprint.of(slide.path)),
    }
    return TilesUnit(slide_id, coords[kept], fraction[kept], picture, record)


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


def _grid(slide: Slide, recipe: TileRecipe, plan: ReadPlan) -> Grid:
    x, y, width, height = slide.bounds_l0
    try:
        return tile_grid((x, y), (width, height), plan, recipe.overlap_px, recipe.edge)
    except ScaleError as error:
        raise ScaleError(f"slide {slide.name!r}: {error}") from error


def _thumbnail_downsample(slide: Slide, recipe: TileRecipe, plan: ReadPlan) -> float:
    """Level-0 pixels per thumbnail pixel: fine enough for the tiles, and for the eye."""
    longest = max(slide.bounds_l0[2:])
    return max(1.0, min(plan.tile_l0 / recipe.tissue.pixels_per_tile, longest / recipe.tissue.thumbnail_px))


def _shifted(grid: Grid) -> dict[str, int | None]:
    """Level-0 x of the column, and y of the row, that were moved inwards; None where none was."""
    return {
        "x_l0": int(grid.x_l0[-1]) if grid.x_shifted else None,
        "y_l0": int(grid.y_l0[-1]) if grid.y_shifted else None,
    }


def _tissue_record(
    mask: np.ndarray, threshold: float, scale: np.ndarray, plan: ReadPlan
) -> dict[str, float | str | None]:
    pixels_l0 = float(mask.sum()) / float(scale[0] * scale[1])
    return {
        "threshold": threshold,
        "fraction": float(mask.mean()),
        "area_mm2": None if plan.native_mpp is None else area_mm2(pixels_l0, plan.native_mpp),
        "mask_sha256": sha256_of(np.packbits(mask)),
    }
