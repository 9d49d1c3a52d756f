"""What scripts of other tools look for beside tile corners, derived from how the slide was cut."""

from collections.abc import Mapping
from typing import Any

from extract.geometry import mpp_to_magnification
from extract.store.core.recipes import TileRecipe


def coords_attributes(record: Mapping[str, Any], recipe: TileRecipe, name: str, folder: str) -> dict[str, Any]:
    """Attributes of ``coords`` as TRIDENT and CLAM name them. What is not known is left out.

    Args:
        record: of the slide's tiles.
        recipe: of the store.
        name: of the file, without its extension.
        folder: of the file, within the store.

    Returns:
        patch_size: side of a tile in its own pixels.
        patch_size_level0: the same in level-0 px, rounded.
        level0_magnification, target_magnification: 10 / mpp of level 0 and of the tiles; TRIDENT and CLAM put slides
            into classes of 20 and 40, these are as exact as the mpp.
        level0_width, level0_height: in level-0 px.
        overlap: pixels that neighbouring tiles share, in tile pixels.
        patch_level, downsample: the level that was read, where its pixels were taken as they are.
        name, savetodir: as given.

    References:
        The fields are those of TRIDENT (Zhang et al. 2025) and CLAM (Lu et al. 2021).
    """
    mpp, size = record.get("mpp"), record.get("size_l0")
    native, achieved = (mpp.get("native"), mpp.get("achieved")) if isinstance(mpp, Mapping) else (None, None)
    tile_px = record.get("tile_px", recipe.tile_px)
    found = {
        "patch_size": tile_px or None,
        "patch_size_level0": None if record.get("tile_l0") is None else round(record["tile_l0"]),
        "level0_magnification": _magnification(native),
        "target_magnification": _magnification(achieved),
        "level0_width": size[0] if size else None,
        "level0_height": size[1] if size else None,
        "overlap": recipe.overlap_px if tile_px else None,
    }
    if "level" in record and record.get("tile_level") == tile_px:
        found |= {"patch_level": record["level"], "downsample": float(record["downsample"])}
    return {key: value for key, value in found.items() if value is not None} | {"name": name, "savetodir": folder}


def _magnification(mpp: float | None) -> int | float | None:
    """As a whole number where it is one: some scripts count on that."""
    if mpp is None:
        return None
    exact = mpp_to_magnification(mpp)
    return round(exact) if abs(exact - round(exact)) < 1e-9 else exact
