"""Frames, units and tile grids: the one place where coordinates are converted.

Frames are part of the names. ``_l0`` is the level-0 pixel frame of the slide file, ``_level`` the pixel frame of the
level that is read, ``_px`` are tile pixels at the requested scale. ``mpp`` is micrometres per pixel.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from extract.errors import ScaleError

MPP_AT_MAGNIFICATION_1 = 10.0
"""A magnification of 20 is taken as 0.5 µm/px and 40 as 0.25, the field's convention; ``mpp`` is the truth."""

SAME_SCALE_TOLERANCE = 0.01
"""A level within 1 % of the requested mpp is read unresampled."""


def magnification_to_mpp(magnification: float) -> float:
    """Micrometres per pixel of an objective magnification: 20 gives 0.5.

    Raises:
        ScaleError: the magnification is not above 0.
    """
    if not (math.isfinite(magnification) and magnification > 0):
        raise ScaleError(f"got magnification {magnification:g} → expected one above 0, such as 20 → correct it")
    return MPP_AT_MAGNIFICATION_1 / magnification


def area_mm2(n_pixels: float, mpp: float) -> float:
    """Area in mm² of ``n_pixels`` square pixels of ``mpp`` micrometres."""
    return n_pixels * (mpp / 1000.0) ** 2


@dataclass(frozen=True)
class ReadPlan:
    """From which level a tile is read, and how large it is in each frame.

    Attributes:
        level: index of the level that is read.
        downsample: level-0 pixels per pixel of that level.
        tile_px: side of the tile that is handed out, in pixels.
        tile_level: side of the square read from the level, in its pixels; equal to ``tile_px`` when not resampled.
        tile_l0: side of the tile in level-0 pixels.
        native_mpp: µm/px of level 0, or None when unknown (``--native`` on a file without mpp).
        requested_mpp: µm/px asked for, or None for ``--native``.
        achieved_mpp: µm/px of the tile that is handed out, or None when the native mpp is unknown.
    """

    level: int
    downsample: float
    tile_px: int
    tile_level: float
    tile_l0: float
    native_mpp: float | None
    requested_mpp: float | None
    achieved_mpp: float | None

    @property
    def resampled(self) -> bool:
        """Whether tiles are area-resampled after reading."""
        return self.tile_level != self.tile_px


def plan_read(
    native_mpp: float | None,
    downsamples: Sequence[float],
    mpp: float | None,
    tile_px: int,
    allow_upsampling: bool = False,
) -> ReadPlan:
    """Choose the level to read so that tiles come out at ``mpp`` exactly.

    A level within 1 % of ``mpp`` is read as it is. Otherwise the coarsest level that is finer than ``mpp`` is read and
    area-resampled. ``mpp=None`` reads level 0 as it is.

    Args:
        native_mpp: µm/px of level 0; may be None only with ``mpp=None``.
        downsamples: level-0 pixels per pixel of each level, ascending.
        mpp: requested µm/px, or None for the native resolution.
        tile_px: side of the tile in pixels at that scale.
        allow_upsampling: permit a request finer than level 0.

    Raises:
        ScaleError: the request is finer than level 0 and upsampling was not asked for.
    """
    if mpp is None or native_mpp is None:
        return ReadPlan(0, 1.0, tile_px, float(tile_px), float(tile_px), native_mpp, mpp, native_mpp)
    level_mpps = [native_mpp * downsample for downsample in downsamples]
    same = [i for i, level_mpp in enumerate(level_mpps) if abs(level_mpp / mpp - 1) <= SAME_SCALE_TOLERANCE]
    if same:
        level = min(same, key=lambda i: abs(level_mpps[i] / mpp - 1))
        tile_level, achieved = float(tile_px), level_mpps[level]
    else:
        finer = [i for i, level_mpp in enumerate(level_mpps) if level_mpp < mpp]
        if not finer and not allow_upsampling:
            raise ScaleError(
                f"got a request for {mpp:g} µm/px of a slide whose finest level has {native_mpp:g} → "
                f"upsampling invents "
                f"detail and is refused → use --mpp {native_mpp:g} or coarser, --native, or --allow-upsampling"
            )
        level = max(finer) if finer else 0
        tile_level, achieved = tile_px * mpp / level_mpps[level], mpp
    tile_l0 = tile_level * downsamples[level]
    return ReadPlan(level, downsamples[level], tile_px, tile_level, tile_l0, native_mpp, mpp, achieved)


@dataclass(frozen=True)
class Grid:
    """Tile origins along x and y in level-0 px; ``shifted`` tells whether the last one was moved inwards."""

    x_l0: np.ndarray
    y_l0: np.ndarray
    x_shifted: bool
    y_shifted: bool

    def coords_l0(self) -> np.ndarray:
        """Top-left corners int32 [n, 2] as (x, y) in row-major order."""
        y, x = np.meshgrid(self.y_l0, self.x_l0, indexing="ij")
        return np.stack([x.ravel(), y.ravel()], axis=1).astype(np.int32)


def tile_grid(
    origin_l0: tuple[int, int],
    size_l0: tuple[int, int],
    plan: ReadPlan,
    overlap_px: int = 0,
    edge: str = "shift",
) -> Grid:
    """Lay tiles over a rectangle of the slide.

    Origins lie on the pixel grid of the level that is read and are then rounded to level-0 pixels; rounding never
    accumulates. Where a level's downsample is a whole number, reading interpolates nothing. Elsewhere (3.9998)
    OpenSlide positions between pixels, by at most half a level-0 pixel, and blends neighbours. With ``edge="shift"``
    a remainder at the right or bottom gets one more tile that is moved inwards until it fits; with ``"drop"`` the
    remainder is left out.

    Args:
        origin_l0: top-left corner of the rectangle (the slide's bounds) in level-0 px.
        size_l0: width and height of the rectangle in level-0 px.
        plan: the read plan of the slide.
        overlap_px: pixels that neighbouring tiles share, at the tile's scale.
        edge: ``"shift"`` or ``"drop"``.

    Raises:
        ScaleError: the rectangle is smaller than one tile.
    """
    stride_level = (plan.tile_px - overlap_px) * plan.tile_level / plan.tile_px
    axes = [_axis(origin_l0[i], size_l0[i], plan, stride_level, edge) for i in (0, 1)]
    if any(len(positions) == 0 for positions, _ in axes):
        raise ScaleError(
            f"got a slide of {size_l0[0]} x {size_l0[1]} level-0 px → one tile covers {plan.tile_l0:.0f} px there → "
            f"use a smaller --tile-px or a finer --mpp"
        )
    (x_l0, x_shifted), (y_l0, y_shifted) = axes
    return Grid(x_l0, y_l0, x_shifted, y_shifted)


def _axis(origin_l0: int, size_l0: int, plan: ReadPlan, stride_level: float, edge: str) -> tuple[np.ndarray, bool]:
    """Tile origins along one axis in level-0 px, and whether the last one was moved inwards."""
    first = math.ceil(origin_l0 / plan.downsample)
    room = (origin_l0 + size_l0) / plan.downsample - first - plan.tile_level
    # sizes are fractional and files are not: a tile that sticks out by less than half a pixel still fits
    if room < -0.5:
        return np.empty(0, dtype=np.int64), False
    count = int((room + 0.5) // stride_level) + 1
    last = first + max(math.floor(room), 0)
    positions = np.minimum(first + np.round(np.arange(count) * stride_level).astype(np.int64), last)
    shifted = edge == "shift" and last > positions[-1]
    if shifted:
        positions = np.append(positions, last)
    return np.round(positions * plan.downsample).astype(np.int64), bool(shifted)


@lru_cache(maxsize=64)
def area_weights(length: float, n_out: int, n_in: int) -> tuple[np.ndarray, np.ndarray]:
    """Exact area weights along one axis: output pixel j covers ``[j·s, (j + 1)·s)`` with ``s = length / n_out``.

    Returns:
        ``index`` int64 [taps, n_out] of input pixels and ``weight`` float32 [taps, n_out] that sums to one over taps.
    """
    step = length / n_out
    left = step * np.arange(n_out)
    right = left + step
    first = np.floor(left + 1e-9).astype(np.int64)
    taps = int(np.max(np.ceil(right - 1e-9).astype(np.int64) - first))
    index = first + np.arange(max(taps, 1))[:, None]
    weight = np.clip(np.minimum(right, index + 1) - np.maximum(left, index), 0.0, None)
    return np.clip(index, 0, n_in - 1), (weight / weight.sum(axis=0)).astype(np.float32)


def resample_area(pixels: np.ndarray, length: float, tile_px: int) -> np.ndarray:
    """Area-resample the top-left square of an image to ``tile_px`` x ``tile_px``.

    Every output pixel is the mean of the area that it covers, fractions of pixels included (a separable box filter).

    Args:
        pixels: uint8 [h, w, 3].
        length: side of the square in pixels of ``pixels``; may be fractional, at most h and w rounded up.
        tile_px: side of the result.

    Returns:
        uint8 [tile_px, tile_px, 3], rounded half up.
    """
    rows, row_weights = area_weights(length, tile_px, pixels.shape[0])
    columns, column_weights = area_weights(length, tile_px, pixels.shape[1])
    partial = np.zeros((tile_px, *pixels.shape[1:]), dtype=np.float32)
    for index, weight in zip(rows, row_weights, strict=True):
        partial += pixels[index] * weight[:, None, None]
    result = np.zeros((tile_px, tile_px, pixels.shape[2]), dtype=np.float32)
    for index, weight in zip(columns, column_weights, strict=True):
        result += partial[:, index] * weight[:, None]
    return (result + 0.5).astype(np.uint8)
