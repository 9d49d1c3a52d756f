"""One slide file: its levels, its scale, and pixels read from it through OpenSlide."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, LifoQueue
from types import TracebackType
from typing import Any, Self

import numpy as np
from PIL import Image

from extract.errors import MissingMppError, ScaleError, SlideUnreadableError, TileDecodeError
from extract.geometry import ReadPlan, resample_area

SYNTHETIC_SOFTWARE = "Tessera synthetic slide"
"""Software tag of drawn slides, so that whatever is made of them can say so."""

_PRINTING_MPP = 40.0
"""A plain TIFF whose resolution tag says more than this (635 dpi or less) carries a printing default, not a scale."""

_BLOCK_PX = 1024


class Slide:
    """A slide opened with OpenSlide; safe to read from several threads.

    Every reading thread borrows a handle of its own from a small pool: OpenSlide gives up a whole handle at its first
    decoding error, and one broken tile must not cost the others.

    Attributes:
        path: the file.
        name: how messages call the slide.
        size_l0: width and height of level 0 in pixels.
        bounds_l0: (x, y, width, height) of the scanned area; all of level 0 where the file does not say.
        downsamples: level-0 pixels per pixel of each level.
        level_sizes: width and height of each level.
        vendor: OpenSlide's name of the format.
        synthetic: whether `extract.synthetic` drew it.

    Example:
        >>> with Slide("slides/a.svs") as slide:                   # doctest: +SKIP
        ...     print(slide.size_l0, slide.native_mpp())
        (46000, 32914) (0.499, 'openslide.mpp')
    """

    def __init__(self, path: str | Path, name: str | None = None) -> None:
        """Open ``path``.

        Raises:
            SlideUnreadableError: the file is absent, empty, not a slide, or damaged.
        """
        self.path = Path(path)
        self.name = name or self.path.name
        self._idle: LifoQueue[Any] = LifoQueue()
        handle = self._open()
        self._properties: dict[str, str] = dict(handle.properties)
        self.size_l0: tuple[int, int] = handle.dimensions
        self.downsamples: tuple[float, ...] = handle.level_downsamples
        self.level_sizes: tuple[tuple[int, int], ...] = handle.level_dimensions
        self.vendor: str = self._properties.get("openslide.vendor", "unknown")
        self.synthetic = self._properties.get("tiff.Software") == SYNTHETIC_SOFTWARE
        self.bounds_l0 = self._bounds()
        self._background = _parse_colour(self._properties.get("openslide.background-color", "ffffff"))
        self._idle.put(handle)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close every idle handle."""
        while True:
            try:
                self._idle.get_nowait().close()
            except Empty:
                return

    def native_mpp(self, override: float | None = None, default: float | None = None) -> tuple[float | None, str]:
        """µm/px of level 0 and where it comes from; (None, "missing") when nothing says it.

        Args:
            override: what the slide table says; wins over the file.
            default: ``--default-mpp``; used when the file says nothing.

        Raises:
            ScaleError: the file's pixels are not square.
        """
        if override is not None:
            return override, "slide table"
        x, y = (_positive(self._properties.get(f"openslide.mpp-{axis}")) for axis in "xy")
        if x is not None and y is not None and not (self.vendor == "generic-tiff" and x >= _PRINTING_MPP):
            if abs(x / y - 1) > 0.01:
                raise ScaleError(
                    f"got pixels of {x:g} x {y:g} µm in slide {self.name!r} → expected square ones → "
                    f"state one mpp for it in the slide table"
                )
            return x, "openslide.mpp"
        return (default, "--default-mpp") if default is not None else (None, "missing")

    def missing_mpp(self) -> MissingMppError:
        """The error for a slide whose scale is needed and unknown."""
        tag = _positive(self._properties.get("openslide.mpp-x"))
        said = f"a printing default of {tag:g} µm/px" if tag else "no µm/px"
        return MissingMppError(
            f"got {said} in slide {self.name!r} → its scale must be known to read it at a requested mpp → give it in "
            f"the mpp column of --slides TABLE, or for all such slides with --default-mpp, or tile as it "
            f"is with --native"
        )

    def read_tile(self, x_l0: int, y_l0: int, plan: ReadPlan) -> np.ndarray:
        """Read one tile uint8 [tile_px, tile_px, 3] whose top-left corner is at (x, y) in level-0 px.

        Raises:
            TileDecodeError: the tile cannot be decoded.
        """
        side = int(np.ceil(plan.tile_level - 1e-6))
        pixels = self.read_region(x_l0, y_l0, plan.level, (side, side))
        return resample_area(pixels, plan.tile_level, plan.tile_px) if plan.resampled else pixels

    def read_region(self, x_l0: int, y_l0: int, level: int, size: tuple[int, int]) -> np.ndarray:
        """Read a region uint8 [h, w, 3]; what lies outside the slide has the slide's background colour.

        Raises:
            TileDecodeError: the region cannot be decoded.
        """
        from openslide import OpenSlideError

        try:
            with self._borrow() as handle:
                rgba = np.asarray(handle.read_region((int(x_l0), int(y_l0)), level, size))
        except OpenSlideError as error:
            raise TileDecodeError(f"slide {self.name!r} at ({x_l0}, {y_l0}) level {level}: {error}") from error
        if rgba[..., 3].min() == 255:
            return np.ascontiguousarray(rgba[..., :3])
        alpha = rgba[..., 3:].astype(np.uint16)
        mixed = rgba[..., :3] * alpha + np.array(self._background, dtype=np.uint16) * (255 - alpha)
        return ((mixed + 127) // 255).astype(np.uint8)

    def read_thumbnail(self, downsample: float) -> tuple[np.ndarray, np.ndarray]:
        """A small picture of the bounds, area-averaged, read in blocks so that memory stays bounded.

        Args:
            downsample: level-0 pixels per thumbnail pixel, at least 1.

        Returns:
            uint8 [h, w, 3], and bool [h, w] that is False (and the picture white) where a block cannot be decoded.
        """
        x0, y0, width_l0, height_l0 = self.bounds_l0
        width, height = max(round(width_l0 / downsample), 1), max(round(height_l0 / downsample), 1)
        level = max(i for i, level_ds in enumerate(self.downsamples) if i == 0 or level_ds <= downsample * 1.001)
        block = max(int(_BLOCK_PX * self.downsamples[level] / downsample), 1)
        picture = np.full((height, width, 3), 255, dtype=np.uint8)
        readable = np.ones((height, width), dtype=bool)
        scale_x, scale_y = width_l0 / width, height_l0 / height
        for row in range(0, height, block):
            for column in range(0, width, block):
                rows, columns = min(block, height - row), min(block, width - column)
                corner = (round(x0 + column * scale_x), round(y0 + row * scale_y))
                size = (columns * scale_x / self.downsamples[level], rows * scale_y / self.downsamples[level])
                target = (slice(row, row + rows), slice(column, column + columns))
                try:
                    pixels = self.read_region(*corner, level, (max(round(size[0]), 1), max(round(size[1]), 1)))
                except TileDecodeError:
                    readable[target] = False
                else:
                    picture[target] = np.asarray(Image.fromarray(pixels).resize((columns, rows), Image.Resampling.BOX))
        return picture, readable

    def _open(self) -> Any:
        import openslide

        if not self.path.exists():
            raise SlideUnreadableError(f"got {self.path} → there is no such file → check the path")
        if self.path.is_file() and os.path.getsize(self.path) == 0:
            raise SlideUnreadableError(f"got {self.path} → the file is empty (0 bytes) → copy it again")
        try:
            return openslide.OpenSlide(self.path)
        except openslide.OpenSlideUnsupportedFormatError as error:
            raise SlideUnreadableError(
                f"got {self.path} → no whole slide that OpenSlide reads: another kind of file, or cut "
                f"short → compare its size "
                f"with the source's, or convert it to a pyramidal TIFF"
            ) from error
        except (openslide.OpenSlideError, OSError) as error:
            raise SlideUnreadableError(
                f"got {self.path} → it does not open ({error}) → copy it again if it is damaged, else "
                f"convert it to a pyramidal TIFF"
            ) from error

    @contextmanager
    def _borrow(self) -> Iterator[Any]:
        """A handle for one read; it goes back to the pool only if the read succeeded."""
        try:
            handle = self._idle.get_nowait()
        except Empty:
            handle = self._open()
        try:
            yield handle
        except BaseException:
            handle.close()
            raise
        self._idle.put(handle)

    def _bounds(self) -> tuple[int, int, int, int]:
        values = [self._properties.get(f"openslide.bounds-{key}") for key in ("x", "y", "width", "height")]
        if all(value is not None for value in values):
            x, y, width, height = (int(value) for value in values if value is not None)
            if width > 0 and height > 0:
                return x, y, min(width, self.size_l0[0] - x), min(height, self.size_l0[1] - y)
        return 0, 0, *self.size_l0


def _positive(text: str | None) -> float | None:
    """The number in a property if it is one, finite and above zero."""
    try:
        value = float(text) if text is not None else 0.0
    except ValueError:
        return None
    return value if np.isfinite(value) and value > 0 else None


def _parse_colour(text: str) -> tuple[int, int, int]:
    """The colour of ``openslide.background-color`` (RRGGBB)."""
    return int(text[0:2], 16), int(text[2:4], 16), int(text[4:6], 16)
