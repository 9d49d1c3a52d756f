"""Where lesions were planted, and which tiles they cover."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from extract.synthetic.drawing import Float, Polygon, SyntheticError


def lesion_tiles(
    lesions: dict[str, list[Polygon]], slide_id: str, coords: NDArray[np.integer], tile_l0: float
) -> Float:
    """Fraction of each tile that lesions cover, by exact area.

    Args:
        lesions: As `read_lesions` gives them.
        coords: [n, 2] top-left corners (x, y) in level-0 px.
        tile_l0: Side of a tile in level-0 px.

    Returns:
        float32 [n] in 0..1.

    Raises:
        SyntheticError: The cohort has no such slide.
    """
    if slide_id not in lesions:
        raise SyntheticError(
            f"got slide {slide_id!r} → expected one of the {len(lesions)} slides of lesions.json → check the slide id"
        )
    area = np.zeros(len(coords), np.float64)
    for polygon in lesions[slide_id]:
        low, high = polygon.min(axis=0), polygon.max(axis=0)
        touching = ((coords + tile_l0 > low) & (coords < high)).all(axis=1)
        for index in np.flatnonzero(touching):
            area[index] += area_within(polygon, coords[index].astype(np.float64), tile_l0)
    return np.minimum(area / tile_l0**2, 1).astype(np.float32)


def area_within(polygon: Polygon, corner: NDArray[np.float64], side: float) -> float:
    """Area of a polygon inside a square: Sutherland-Hodgman clipping, then the shoelace formula."""
    points = polygon - corner
    for axis in (0, 1):
        for sign, bound in ((1.0, 0.0), (-1.0, -side)):
            inner = sign * points[:, axis] - bound
            clipped = []
            for here, after in pairwise([*range(len(points)), 0]):
                if inner[here] >= 0:
                    clipped.append(points[here])
                if (inner[here] >= 0) != (inner[after] >= 0):
                    step = inner[here] / (inner[here] - inner[after])
                    clipped.append(points[here] + step * (points[after] - points[here]))
            if not clipped:
                return 0.0
            points = np.array(clipped)
    x, y = points.T
    return float(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2)


def read_lesions(path: str | Path) -> dict[str, list[Polygon]]:
    """The polygons [k, 2] (x, y in level-0 px) of each slide in a `lesions.json`."""
    slides = json.loads(Path(path).read_text(encoding="utf-8"))["slides"]
    return {name: [np.array(polygon) for polygon in slide["polygons_l0"]] for name, slide in slides.items()}
