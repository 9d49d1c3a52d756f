"""Images as slides: PNG, JPEG, BMP, WebP, and TIFFs whose pages are read by themselves."""

import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import numpy as np
from PIL import Image

from extract.errors import MissingMppError, SlideUnreadableError, TileDecodeError
from extract.geometry import ReadPlan, resample_area
from extract.slides.levels import trusted_levels
from extract.slides.pictures import DECODE_ERRORS, MAX_PIXELS, PLAIN_EXTENSIONS, SPOOLED_PX, PictureRaster
from extract.slides.slide_like import PRINTING_MPP, square_mpp, thumbnail_in_blocks
from extract.slides.tiff.gate import WrongPixelsError
from extract.slides.tiff.raster import TiffRaster


class Raster(Protocol):
    """Where the pixels of a `PlainImage` come from; see `extract.slides.tiff.raster.TiffRaster`."""

    @property
    def reader(self) -> str:
        """What reads it."""

    @property
    def note(self) -> str:
        """What was not taken from the file."""

    @property
    def level_sizes(self) -> tuple[tuple[int, int], ...]:
        """Width and height of each level."""

    @property
    def mpp(self) -> tuple[float, float] | None:
        """(x, y) in µm/px that the file states."""

    @property
    def mpp_source(self) -> str:
        """Who states it."""

    def read(self, level: int, left: int, top: int, right: int, bottom: int) -> np.ndarray:
        """Pixels uint8 [bottom - top, right - left, 3] that lie inside a level."""

    def close(self) -> None:
        """Let go of what is held."""


class PlainImage:
    """An image read like a `Slide`; safe to read from several threads.

    Pictures (PNG, JPEG, BMP, WebP) are checked by their header at once, decoded whole at the first read and kept until
    `close`; above 134 million pixels into a temporary file. TIFFs are read piece by piece, with their levels. Decoding
    is strict. Grey becomes RGB and transparency becomes white. What has no plain 8-bit colours (16-bit grey, CMYK,
    several frames) is refused. Pixels are taken as they are stored: an EXIF orientation is not applied (masks and
    coordinates are made on stored pixels), and ``reader_note`` says so. Resolution tags of pictures are not believed:
    their scale comes from the slide table or ``--default-mpp``. TIFFs state it as OME-XML, ImageJ or TIFF do.

    Attributes:
        path: the file.
        name: how messages call the slide.
        size_l0: width and height in pixels.
        bounds_l0: (0, 0, width, height).
        downsamples: level-0 pixels per pixel of each level.
        level_sizes: width and height of each level.
        vendor: "image".
        synthetic: False.
        background: white, the colour of what lies outside the image.
        reader: "image", or "pages" for the pages of a TIFF.
        reader_note: what was not taken from the file; empty when there is nothing to say.

    Example:
        >>> with PlainImage("images/img_0001.png") as image:       # doctest: +SKIP
        ...     print(image.size_l0, image.native_mpp(default=0.5))
        (775, 522) (0.5, '--default-mpp')
    """

    def __init__(
        self, path: str | Path, name: str | None = None, max_pixels: int = MAX_PIXELS, vendor: str | None = None
    ) -> None:
        """Open ``path``.

        Args:
            path: the file.
            name: how messages call the slide; the file's name by default.
            max_pixels: pictures of more are refused.
            vendor: OpenSlide's name of the format of a TIFF; None where it knows none.

        Raises:
            SlideUnreadableError: the file is absent, empty, damaged, too large, or not a plain image.
        """
        self.path = Path(path)
        self.name = name or self.path.name
        self._raster = self._open(max_pixels, vendor)
        self.level_sizes: tuple[tuple[int, int], ...] = self._raster.level_sizes
        self.size_l0: tuple[int, int] = self.level_sizes[0]
        self.bounds_l0: tuple[int, int, int, int] = (0, 0, *self.size_l0)
        self.background: tuple[int, int, int] = (255, 255, 255)
        full = self.size_l0
        self.downsamples: tuple[float, ...] = tuple((full[0] / w + full[1] / h) / 2 for w, h in self.level_sizes)
        self._levels = tuple(range(len(self.level_sizes)))
        self._levels, note = trusted_levels(self.level_sizes, self.downsamples, self.read_region)
        self.downsamples = tuple(self.downsamples[i] for i in self._levels)
        self.level_sizes = tuple(self.level_sizes[i] for i in self._levels)
        self.vendor: str = "image"
        self.synthetic = False
        self.reader: str = self._raster.reader
        self.reader_note: str = "; ".join(filter(None, (self._raster.note, note)))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the pixels; a later read decodes them again."""
        self._raster.close()

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
        if self._raster.mpp is not None and self._raster.mpp[0] < PRINTING_MPP:
            return square_mpp(self._raster.mpp, self.name), self._raster.mpp_source
        return (default, "--default-mpp") if default is not None else (None, "missing")

    def missing_mpp(self) -> MissingMppError:
        """The error for an image whose scale is needed and unknown."""
        return MissingMppError(
            f"got plain image {self.name!r} → it carries no µm/px that can be trusted, and its scale must be known to "
            f"read it at a requested mpp → give it in the mpp column of --slides TABLE, or for all such images with "
            f"--default-mpp, or tile as it is with --native"
        )

    def read_tile(self, x_l0: int, y_l0: int, plan: ReadPlan, out: np.ndarray | None = None) -> np.ndarray:
        """Read one tile uint8 [tile_px, tile_px, 3] whose top-left corner is at (x, y).

        Args:
            x_l0: left edge in level-0 px.
            y_l0: upper edge in level-0 px.
            plan: the read plan of the image.
            out: uint8 [tile_px, tile_px, 3] to read into.

        Raises:
            SlideUnreadableError: the image cannot be decoded; a picture is one piece, so no tile of it can.
            TileDecodeError: a strip or TIFF tile of it cannot be decoded.
        """
        side = int(np.ceil(plan.tile_level - 1e-6))
        if not plan.resampled:
            return self.read_region(x_l0, y_l0, plan.level, (side, side), out)
        pixels = resample_area(self.read_region(x_l0, y_l0, plan.level, (side, side)), plan.tile_level, plan.tile_px)
        if out is None:
            return pixels
        out[...] = pixels
        return out

    def read_region(
        self, x_l0: int, y_l0: int, level: int, size: tuple[int, int], out: np.ndarray | None = None
    ) -> np.ndarray:
        """Read a region uint8 [h, w, 3]; what lies outside the image is white.

        Args:
            x_l0: left edge in level-0 px.
            y_l0: upper edge in level-0 px.
            level: index of the level.
            size: width and height in pixels of the level.
            out: uint8 [h, w, 3] to read into.

        Raises:
            SlideUnreadableError: the image cannot be decoded.
            TileDecodeError: a part of it cannot be decoded, or there is no such level.
        """
        if not 0 <= level < len(self._levels):
            raise TileDecodeError(
                f"slide {self.name!r} level {level}: the image has level 0 to {len(self._levels) - 1}"
            )
        x, y = (round(at / self.downsamples[level]) for at in (x_l0, y_l0))
        region = np.empty((size[1], size[0], 3), dtype=np.uint8) if out is None else out
        region[...] = self.background
        left, top = max(x, 0), max(y, 0)
        right, bottom = (min(at + n, end) for at, n, end in zip((x, y), size, self.level_sizes[level], strict=True))
        if left < right and top < bottom:
            try:
                pixels = self._raster.read(self._levels[level], left, top, right, bottom)
            except (SlideUnreadableError, TileDecodeError):
                raise
            except DECODE_ERRORS as error:
                raise self._unreadable(error) from error
            region[top - y : bottom - y, left - x : right - x] = pixels
        return region

    def read_thumbnail(self, downsample: float) -> tuple[np.ndarray, np.ndarray]:
        """A small picture, area-averaged.

        Args:
            downsample: pixels per thumbnail pixel, at least 1.

        Returns:
            uint8 [h, w, 3], and bool [h, w] that is False (and the picture white) where it cannot be decoded.

        Raises:
            SlideUnreadableError: the image cannot be decoded.
        """
        if len(self._levels) == 1 and self.size_l0[0] * self.size_l0[1] <= SPOOLED_PX:
            width, height = (max(round(side / downsample), 1) for side in self.size_l0)
            with suppress(TileDecodeError):
                picture = Image.fromarray(self.read_region(0, 0, 0, self.size_l0))
                shown = np.asarray(picture.resize((width, height), Image.Resampling.BOX))
                return shown, np.ones((height, width), dtype=bool)
        return thumbnail_in_blocks(self, downsample)

    def _open(self, max_pixels: int, vendor: str | None) -> Raster:
        if not self.path.exists():
            raise SlideUnreadableError(f"got {self.path} → there is no such file → check the path")
        if self.path.is_file() and os.path.getsize(self.path) == 0:
            raise SlideUnreadableError(f"got {self.path} → the file is empty (0 bytes) → copy it again")
        try:
            if self._is_picture:
                return PictureRaster(self.path, max_pixels)
            return TiffRaster(self.path, self.name, vendor)
        except WrongPixelsError as error:
            raise SlideUnreadableError(f"got {self.path} → {error}") from error
        except DECODE_ERRORS as error:
            raise self._unreadable(error) from error

    @property
    def _is_picture(self) -> bool:
        return self.path.suffix.lower() in PLAIN_EXTENSIONS

    def _unreadable(self, error: BaseException) -> SlideUnreadableError:
        what = "no plain image" if self._is_picture else "no whole slide that OpenSlide reads, and no plain image"
        return SlideUnreadableError(
            f"got {self.path} → {what} ({error or type(error).__name__}) → copy it again if it is damaged or cut "
            f"short, else save it as an 8-bit RGB PNG or as a pyramidal TIFF"
        )
