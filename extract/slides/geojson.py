"""Tissue and tiles as GeoJSON that QuPath opens."""

from collections.abc import Mapping
from typing import Any

import numpy as np

_TISSUE_COLOUR = (150, 80, 170)
_TILE_COLOUR = (60, 140, 200)


def tissue_geojson(mask: np.ndarray, bounds_l0: tuple[int, int, int, int]) -> dict[str, Any]:
    """Outlines of a mask as GeoJSON annotations that QuPath opens in the right place.

    Args:
        mask: bool [h, w] on the thumbnail's frame, which shows ``bounds_l0``.
        bounds_l0: (x, y, width, height) of the scanned area.

    Returns:
        A FeatureCollection with one polygon, holes included, for each connected piece.
    """
    scale = np.array([bounds_l0[2] / mask.shape[1], bounds_l0[3] / mask.shape[0]])
    # half a second to import, which most runs never need
    from scipy import ndimage

    labels, _ = ndimage.label(mask)
    features = []
    for label, window in enumerate(ndimage.find_objects(labels), start=1):
        corner = np.array([window[1].start, window[0].start])
        rings = [((ring + corner) * scale).round(2).tolist() for ring in _trace(labels[window] == label)]
        features.append(_feature(rings, "annotation", "Tissue", _TISSUE_COLOUR))
    return {"type": "FeatureCollection", "features": features}


def tiles_geojson(
    coords_l0: np.ndarray,
    tile_l0: float,
    bounds_l0: tuple[int, int, int, int],
    flags: Mapping[str, np.ndarray] | None = None,
) -> dict[str, Any]:
    """Tiles as GeoJSON tile objects that QuPath opens in the right place.

    Args:
        coords_l0: int [n_tiles, 2], top-left (x, y) in level-0 px.
        tile_l0: side of a tile in level-0 px.
        bounds_l0: (x, y, width, height) of the scanned area.
        flags: for each name bool [n_tiles]; a flagged tile's class is ``Tile: <name>``.

    Returns:
        A FeatureCollection with one square a tile.
    """
    square = np.array([[0, 0], [1, 0], [1, 1], [0, 1], [0, 0]]) * tile_l0
    corners = np.asarray(coords_l0, dtype=np.float64) - bounds_l0[:2]
    features = []
    for i, corner in enumerate(corners):
        name = ": ".join(["Tile", *(flag for flag, flagged in (flags or {}).items() if flagged[i])])
        features.append(_feature([(square + corner).round(2).tolist()], "tile", name, _TILE_COLOUR))
    return {"type": "FeatureCollection", "features": features}


def _feature(
    rings: list[list[list[float]]], object_type: str, class_name: str, colour: tuple[int, ...]
) -> dict[str, Any]:
    return {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": rings},
        "properties": {
            "objectType": object_type,
            "classification": {"name": class_name, "color": list(colour)},
        },
    }


def _trace(piece: np.ndarray) -> list[np.ndarray]:
    """Outline of one 4-connected piece bool [h, w], then its holes: closed rings (x, y) in pixels from its corner."""
    # a frame of background closes the outlines at the picture's edge; the centre of pixel 0 is at 1 in it and at 0.5
    # in pixel coordinates
    from skimage.measure import find_contours

    rings = [ring[:, ::-1] - 0.5 for ring in find_contours(np.pad(piece, 1), 0.5, fully_connected="low")]
    return sorted((_without_midpoints(ring) for ring in rings), key=_area, reverse=True)


def _area(ring: np.ndarray) -> float:
    x, y = ring[:-1].T
    return float(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2)


def _without_midpoints(ring: np.ndarray) -> np.ndarray:
    """A closed ring without the points that lie on a straight line between their neighbours."""
    points = ring[:-1]
    before, after = points - np.roll(points, 1, axis=0), np.roll(points, -1, axis=0) - points
    kept = points[np.abs(before[:, 0] * after[:, 1] - before[:, 1] * after[:, 0]) > 1e-9]
    return np.concatenate([kept, kept[:1]])
