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


def mpp_to_magnification(mpp: float) -> float:
    """The magnification that ``mpp`` micrometres per pixel are called: 0.5 gives 20; inverse of the above."""
    return MPP_AT_MAGNIFICATION_1 / mpp


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
    """Tile origins along x and y in level-0 px.

    ``x_shifted`` and ``y_shifted`` tell whether the last column and row were moved inwards, ``x_first_shifted`` and
    ``y_first_shifted`` whether the first ones were, as happens on a jittered grid.
    """

    x_l0: np.ndarray
    y_l0: np.ndarray
    x_shifted: bool
    y_shifted: bool
    x_first_shifted: bool = False
    y_first_shifted: bool = False

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
    gap_px: int = 0,
    shift_px: tuple[int, int] = (0, 0),
) -> Grid:
    """Lay tiles over a rectangle of the slide.

    Origins lie on the pixel grid of the level that is read and are then rounded to level-0 pixels; rounding never
    accumulates. Where a level's downsample is a whole number, reading interpolates nothing. Elsewhere (3.9998)
    OpenSlide positions between pixels, by at most half a level-0 pixel, and blends neighbours. With ``edge="shift"``
    a remainder gets one more tile that is moved inwards until it fits: at the right and bottom, and on a shifted grid
    at the left and top too; where tiles have a gap, only if it then overlaps no other. With ``"drop"`` remainders are
    left out.

    Args:
        origin_l0: top-left corner of the rectangle (the slide's bounds) in level-0 px.
        size_l0: width and height of the rectangle in level-0 px.
        plan: the read plan of the slide.
        overlap_px: pixels that neighbouring tiles share, at the tile's scale.
        edge: ``"shift"`` or ``"drop"``.
        gap_px: pixels between neighbouring tiles, at the tile's scale.
        shift_px: the grid starts this many pixels (x, y) right of and below the corner, at the tile's scale; less
            where no tile would fit otherwise.

    Raises:
        ScaleError: the rectangle is smaller than one tile.
    """
    steps = [(plan.tile_px - overlap_px + gap_px) * plan.tile_level / plan.tile_px]
    steps += [shift * plan.tile_level / plan.tile_px for shift in shift_px]
    clear_level = math.ceil(plan.tile_level) if gap_px else 1
    axes = [
        _axis(origin_l0[i], size_l0[i], plan, steps[0], steps[i + 1], clear_level if edge == "shift" else None)
        for i in (0, 1)
    ]
    if any(len(positions) == 0 for positions, _, _ in axes):
        raise ScaleError(
            f"got a slide of {size_l0[0]} x {size_l0[1]} level-0 px → one tile covers {plan.tile_l0:.0f} px there → "
            f"use a smaller --tile-px or a finer --mpp"
        )
    (x_l0, x_first, x_last), (y_l0, y_first, y_last) = axes
    return Grid(x_l0, y_l0, x_last, y_last, x_first, y_first)


def _axis(
    origin_l0: int, size_l0: int, plan: ReadPlan, stride_level: float, start_level: float, clear_level: int | None
) -> tuple[np.ndarray, bool, bool]:
    """Tile origins along one axis in level-0 px, and whether the first and the last were moved inwards.

    A tile is added at an end that is not covered if it lies at least ``clear_level`` pixels from its neighbour; None
    adds none.
    """
    first = math.ceil(origin_l0 / plan.downsample)
    room = (origin_l0 + size_l0) / plan.downsample - first - plan.tile_level
    # sizes are fractional and files are not: a tile that sticks out by less than half a pixel still fits
    if room < -0.5:
        return np.empty(0, dtype=np.int64), False, False
    last = first + max(math.floor(room), 0)
    start = min(round(start_level), last - first)
    count = int((room - start + 0.5) // stride_level) + 1
    positions = np.minimum(first + start + np.round(np.arange(count) * stride_level).astype(np.int64), last)
    at_start = clear_level is not None and positions[0] - first >= clear_level
    at_end = clear_level is not None and last - positions[-1] >= clear_level
    positions = np.array([*([first] if at_start else []), *positions, *([last] if at_end else [])])
    return np.round(positions * plan.downsample).astype(np.int64), bool(at_start), bool(at_end)


def plan_context(plan: ReadPlan, downsamples: Sequence[float], context_mpp: float) -> ReadPlan:
    """How context tiles are read: as many pixels as a tile, at a coarser scale, by the rules of `plan_read`.

    Args:
        plan: the read plan of the tiles.
        downsamples: level-0 pixels per pixel of each level, ascending.
        context_mpp: µm/px of the context tiles.

    Raises:
        ScaleError: the slide's scale is unknown, or the context is not coarser than the tiles.
    """
    if plan.native_mpp is None or plan.achieved_mpp is None:
        raise ScaleError(
            f"got a context of {context_mpp:g} µm/px of a slide whose scale is unknown → expected a known mpp → give "
            f"it in the mpp column of --slides TABLE or with --default-mpp"
        )
    if not context_mpp > plan.achieved_mpp:
        raise ScaleError(
            f"got a context of {context_mpp:g} µm/px → expected one coarser than the tiles' {plan.achieved_mpp:g} → "
            f"use such as {4 * plan.achieved_mpp:g}"
        )
    return plan_read(plan.native_mpp, downsamples, context_mpp, plan.tile_px)


def context_coords(coords: np.ndarray, plan: ReadPlan, context: ReadPlan) -> np.ndarray:
    """Where the context tiles lie whose centres are those of the tiles.

    Corners are rounded to pixels of the level that the context is read from, so centres agree within half a pixel of
    that level (and half a level-0 pixel more where its downsample is no whole number). Context tiles may stick out of
    the slide; what lies outside is background.

    Args:
        coords: int32 [n, 2], top-left corners of the tiles in level-0 px.
        plan: the read plan of the tiles.
        context: the read plan of the context tiles.

    Returns:
        int32 [n, 2], top-left corners of the context tiles in level-0 px; may be negative.
    """
    corners_l0 = np.asarray(coords, dtype=np.float64) + (plan.tile_l0 - context.tile_l0) / 2
    corners_level = np.round(corners_l0 / context.downsample)
    return np.asarray(np.round(corners_level * context.downsample), dtype=np.int32)


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
    factor = length / tile_px
    if factor.is_integer() and 1 <= factor <= 16 and min(pixels.shape[:2]) >= length:
        return _mean_of_blocks(pixels, int(factor), tile_px)
    height, width, channels = pixels.shape
    rows = _weighted_rows(pixels.reshape(height, -1), *area_weights(length, tile_px, height))
    columns = _swap_axes(rows.reshape(tile_px, width, channels)).reshape(width, -1)
    mixed = _weighted_rows(columns, *area_weights(length, tile_px, width))
    mixed += np.float32(0.5)
    return _swap_axes(mixed.astype(np.uint8).reshape(tile_px, tile_px, channels))


def _mean_of_blocks(pixels: np.ndarray, factor: int, tile_px: int) -> np.ndarray:
    """Mean of every ``factor`` x ``factor`` block in whole numbers, rounded half up; ``factor`` is at most 16."""
    channels = pixels.shape[2]
    blocks = pixels[: tile_px * factor, : tile_px * factor].reshape(tile_px, factor, -1)
    # 16 x 16 pixels of 255 and half a divisor still fit 16 bits
    rows = blocks[:, 0].astype(np.uint16)
    for i in range(1, factor):
        rows += blocks[:, i]
    result = np.empty((tile_px, tile_px, channels), dtype=np.uint8)
    for channel in range(channels):
        # one channel at a time, since NumPy is slow over an inner axis of three
        total = rows[:, channel :: factor * channels].copy()
        for j in range(1, factor):
            total += rows[:, channel + j * channels :: factor * channels]
        total += factor * factor // 2
        result[..., channel] = total // (factor * factor)
    return result


def _weighted_rows(lines: np.ndarray, index: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Sum of ``lines[index[tap]] * weight[tap]`` over the taps: [n_in, m] to float32 [n_out, m]."""
    lines = lines.astype(np.float32, copy=False)
    total: np.ndarray = lines[index[0]]
    total *= weight[0][:, None]
    for taken, share in zip(index[1:], weight[1:], strict=True):
        part = lines[taken]
        part *= share[:, None]
        total += part
    return total


def _swap_axes(image: np.ndarray) -> np.ndarray:
    """An image [a, b, channels] as contiguous [b, a, channels]; a pixel moves as one item, three times as fast."""
    whole = image.view(np.dtype((np.void, image.itemsize * image.shape[2])))[..., 0]
    return np.ascontiguousarray(whole.T).view(image.dtype).reshape(image.shape[1], image.shape[0], image.shape[2])
