"""Shapes, noise and colours that synthetic tissue is drawn with."""

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy import fft

from extract.errors import ExtractError

Float = NDArray[np.float32]
Image = NDArray[np.uint8]
Polygon = NDArray[np.float64]
Window = tuple[slice, slice]
Rng = np.random.Generator
LOW_PX = 16  # level-0 pixels a side of one cell of the low-resolution maps
PERIOD_PX = 1024  # the ground textures repeat after this many pixels
GLASS = 244  # grey level of the light that passes where there is no tissue
VARIANTS = 32  # drawings a kind of nucleus or gland, each shown in 8 orientations


class SyntheticError(ExtractError, ValueError):
    """A synthetic slide cannot be drawn or written as asked."""


def smooth_noise(rng: Rng, shape: tuple[int, int], sigma: tuple[float, float]) -> Float:
    """Periodic Gaussian noise [h, w] of unit variance, smoothed by sigma (y, x) px."""
    spectrum = fft.rfft2(rng.standard_normal(shape, np.float32))
    fy = np.exp(-2 * (np.pi * sigma[0] * np.fft.fftfreq(shape[0])) ** 2).astype(np.float32)
    fx = np.exp(-2 * (np.pi * sigma[1] * np.fft.rfftfreq(shape[1])) ** 2).astype(np.float32)
    smooth: Float = fft.irfft2(spectrum * fy[:, None] * fx, s=shape)
    smooth -= smooth.mean()
    smooth /= smooth.std()
    return smooth


def polar(side: int) -> tuple[Float, Float]:
    """Distance from the centre in px and angle, both [side, side]."""
    axis = np.arange(side, dtype=np.float32) - (side - 1) / 2
    return np.hypot(axis[:, None], axis), np.arctan2(axis[:, None], axis[None, :])


def wobble(rng: Rng, angle: Float, strength: float) -> Float:
    """A closed outline's radius as a factor around 1: a few harmonics of the angle."""
    factor = np.ones_like(angle)
    for order in range(2, 7):
        factor += strength / order * rng.normal() * np.cos(order * angle + rng.uniform(0, 2 * np.pi))
    np.maximum(factor, 0.4, out=factor)
    return factor


def put(canvas: Float, stamp: Float, y: float, x: float) -> None:
    """Draw a nucleus, cut at the canvas's edge; it hides what lies under it, so that crowded ones show."""
    top, left = int(y) - stamp.shape[0] // 2, int(x) - stamp.shape[1] // 2
    y0, x0 = max(top, 0), max(left, 0)
    target = canvas[y0 : top + stamp.shape[0], x0 : left + stamp.shape[1]]
    if target.size:
        part = stamp[y0 - top :, x0 - left :][: target.shape[0], : target.shape[1]]
        np.maximum(target, part, out=target)
        np.copyto(target, part, where=part > 0.3)


def jittered_grid(rng: Rng, height: int, width: int, spacing: float, jitter: float = 0.24) -> Float:
    """Points (y, x) about `spacing` px apart: a triangular grid, each point moved at random, in row-major order."""
    rows, columns = int(height / (spacing * 0.87)) + 1, int(width / spacing) + 1
    y, x = np.mgrid[:rows, :columns].astype(np.float32)
    x += 0.5 * (y % 2)
    points = np.stack([y * 0.87, x], axis=-1).reshape(-1, 2) * spacing
    points += rng.normal(0, jitter * spacing, points.shape)
    inside = (points >= 0).all(axis=1) & (points < (height, width)).all(axis=1)
    kept: Float = points[inside].astype(np.float32)
    return kept


def fill_polygon(polygon: Polygon, height: int, width: int) -> NDArray[np.bool_]:
    """Mask [height, width] of the pixels whose centre lies inside a polygon, by the even-odd rule."""
    crossings = np.zeros((height, width + 1), np.int32)
    rows = np.arange(height) + 0.5
    for (xa, ya), (xb, yb) in pairwise([*polygon, polygon[0]]):
        crossed = np.flatnonzero((rows >= min(ya, yb)) & (rows < max(ya, yb)))
        if len(crossed):
            x = xa + (rows[crossed] - ya) * (xb - xa) / (yb - ya)
            crossings[crossed, np.clip(np.ceil(x - 0.5), 0, width).astype(int)] += 1
    inside: NDArray[np.bool_] = np.cumsum(crossings[:, :width], axis=1) % 2 == 1
    return inside
