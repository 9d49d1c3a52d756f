"""What the extraction stage needs of a slide, whoever reads it."""

from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from extract.errors import MissingMppError, ScaleError, TileDecodeError
from extract.geometry import ReadPlan

PRINTING_MPP = 40.0
"""A resolution tag that says more than this (635 dpi or less) is a printing default, not a scale."""

_BLOCK_PX = 1024


class SlideLike(Protocol):
    """What the extraction stage needs of a slide; see `extract.slides.slide.Slide` for the meaning of each name."""

    path: Path
    name: str
    size_l0: tuple[int, int]
    bounds_l0: tuple[int, int, int, int]
    downsamples: tuple[float, ...]
    level_sizes: tuple[tuple[int, int], ...]
    vendor: str
    synthetic: bool
    background: tuple[int, int, int]

    @property
    def reader(self) -> str:
        """How tiles are read."""

    @property
    def reader_note(self) -> str:
        """Why they are read like this, or what was not taken from the file; may be empty."""

    def native_mpp(self, override: float | None = None, default: float | None = None) -> tuple[float | None, str]:
        """µm/px of level 0 and where it comes from."""

    def missing_mpp(self) -> MissingMppError:
        """The error for a slide whose scale is needed and unknown."""

    def read_tile(self, x_l0: int, y_l0: int, plan: ReadPlan, out: np.ndarray | None = None) -> np.ndarray:
        """One tile uint8 [tile_px, tile_px, 3]."""

    def read_region(
        self, x_l0: int, y_l0: int, level: int, size: tuple[int, int], out: np.ndarray | None = None
    ) -> np.ndarray:
        """A region uint8 [h, w, 3] of a level."""

    def read_thumbnail(self, downsample: float) -> tuple[np.ndarray, np.ndarray]:
        """A picture of the bounds uint8 [h, w, 3], and bool [h, w] where it could be read."""

    def close(self) -> None:
        """Give back what is held."""


def square_mpp(mpp: tuple[float, float], name: str) -> float:
    """µm/px of pixels that are square within one percent.

    Raises:
        ScaleError: they are not.
    """
    x, y = mpp
    if abs(x / y - 1) > 0.01:
        raise ScaleError(
            f"got pixels of {x:g} x {y:g} µm in slide {name!r} → expected square ones → "
            f"state one mpp for it in the slide table"
        )
    return x


def thumbnail_in_blocks(slide: SlideLike, downsample: float) -> tuple[np.ndarray, np.ndarray]:
    """A small picture of the bounds, area-averaged, read in blocks so that memory stays bounded.

    Args:
        slide: whose picture.
        downsample: level-0 pixels per thumbnail pixel, at least 1.

    Returns:
        uint8 [h, w, 3], and bool [h, w] that is False (and the picture white) where a block cannot be decoded.
    """
    x0, y0, width_l0, height_l0 = slide.bounds_l0
    width, height = max(round(width_l0 / downsample), 1), max(round(height_l0 / downsample), 1)
    level = max(i for i, level_ds in enumerate(slide.downsamples) if i == 0 or level_ds <= downsample * 1.001)
    level_ds = slide.downsamples[level]
    block = max(int(_BLOCK_PX * level_ds / downsample), 1)
    picture = np.full((height, width, 3), 255, dtype=np.uint8)
    readable = np.ones((height, width), dtype=bool)
    scale_x, scale_y = width_l0 / width, height_l0 / height
    for row in range(0, height, block):
        for column in range(0, width, block):
            rows, columns = min(block, height - row), min(block, width - column)
            corner = _on_grid(x0 + column * scale_x, level_ds), _on_grid(y0 + row * scale_y, level_ds)
            size = (columns * scale_x / level_ds, rows * scale_y / level_ds)
            target = (slice(row, row + rows), slice(column, column + columns))
            try:
                pixels = slide.read_region(*corner, level, (max(round(size[0]), 1), max(round(size[1]), 1)))
            except TileDecodeError:
                readable[target] = False
            else:
                picture[target] = np.asarray(Image.fromarray(pixels).resize((columns, rows), Image.Resampling.BOX))
    return picture, readable


def _on_grid(position_l0: float, downsample: float) -> int:
    """The nearest level-0 pixel that is a whole pixel of the level, where its downsample is a whole number."""
    if not downsample.is_integer():
        return round(position_l0)
    return round(position_l0 / downsample) * int(downsample)
