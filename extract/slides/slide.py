"""One slide file: its levels, its scale, and its pixels, read through OpenSlide or directly where that is the same."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, LifoQueue
from threading import Lock
from types import TracebackType
from typing import Any, Self

import numpy as np

from extract.errors import MissingMppError, RecipeError, SlideUnreadableError, TileDecodeError
from extract.geometry import ReadPlan, resample_area
from extract.slides.levels import trusted_levels
from extract.slides.parts import real_path
from extract.slides.slide_like import PRINTING_MPP, square_mpp, thumbnail_in_blocks
from extract.slides.tiff.direct import DirectReader
from extract.slides.tiff.gate import WrongPixelsError, choose_reading
from extract.slides.tiff.structure import TiffStructure, read_structure
from extract.slides.tiff.tile_grid import NotDirectError

SYNTHETIC_SOFTWARE = "Tessera synthetic slide"
"""Software tag of drawn slides, so that whatever is made of them can say so."""

_PROPERTIES = (
    "openslide.vendor",
    "openslide.background-color",
    *(f"openslide.mpp-{axis}" for axis in "xy"),
    *(f"openslide.bounds-{key}" for key in ("x", "y", "width", "height")),
    "tiff.Software",
)
"""All that is ever read of a slide's properties."""

READERS = ("auto", "direct", "openslide")
"""Ways to read tiles; ``auto`` reads directly where that was seen to give the same pixels as OpenSlide."""

_COMPARE_SECONDS = 0.3
"""Time for comparing the two ways of reading a slide, at its first tile; the first tile of each level always is."""


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
        synthetic: whether `extract.synthetic.cohort` drew it.
        background: colour (r, g, b) of what lies outside the scanned area.

    Example:
        >>> with Slide("slides/a.svs") as slide:                   # doctest: +SKIP
        ...     print(slide.size_l0, slide.native_mpp())
        (46000, 32914) (0.499, 'openslide.mpp')
    """

    def __init__(
        self,
        path: str | Path,
        name: str | None = None,
        reader: str = "auto",
        structure: TiffStructure | None = None,
    ) -> None:
        """Open ``path``.

        Args:
            path: the file.
            name: how messages call the slide; the file's name by default.
            reader: one of `READERS`. ``auto`` and ``direct`` compare a sample of tiles with OpenSlide's.
            structure: what the directories of a TIFF say, where it was read before.

        Raises:
            SlideUnreadableError: the file is absent, empty, not a slide, or damaged; it is a TIFF that OpenSlide opens
                and does not read rightly; or ``direct`` was asked for and does not give OpenSlide's pixels.
            RecipeError: there is no such reader.
        """
        if reader not in READERS:
            raise RecipeError(f"got reader={reader!r} → expected one of {', '.join(READERS)} → choose one of them")
        self.path = Path(path)
        self.name = name or self.path.name
        self._idle: LifoQueue[Any] = LifoQueue()
        handle = self._open()
        # by name only: the rest is free text, and may tell who the patient is
        self._properties = {key: handle.properties[key] for key in _PROPERTIES if key in handle.properties}
        self.vendor: str = self._properties.get("openslide.vendor", "unknown")
        structure = structure or read_structure(self.path)
        self._check_pixels(structure)
        self._stated_mpp, self._mpp_source = _described_mpp(structure)
        self.size_l0: tuple[int, int] = handle.dimensions
        self.synthetic = self._properties.get("tiff.Software") == SYNTHETIC_SOFTWARE
        self.bounds_l0 = self._bounds()
        self.background = _parse_colour(self._properties.get("openslide.background-color", "ffffff"))
        self._idle.put(handle)
        self._find_levels(handle.level_dimensions, handle.level_downsamples)
        self._choice: tuple[DirectReader | None, str] | None = None
        self._choosing = Lock()
        self._same_levels: set[int] = set()
        if reader == "openslide":
            self._choice = None, "OpenSlide was asked for"
        elif reader == "direct" and self.reader != "direct":
            self.close()
            raise SlideUnreadableError(
                f"got reader='direct' for slide {self.name!r}: {self.reader_note} → expected a slide whose tiles can "
                f"be read directly → use reader='auto', which reads this one through OpenSlide"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close every idle handle and the direct reader."""
        if self._choice is not None and self._choice[0] is not None:
            self._choice[0].close()
        while True:
            try:
                self._idle.get_nowait().close()
            except Empty:
                return

    @property
    def reader(self) -> str:
        """How tiles are read: "direct" (OpenSlide where that is not the same) or "openslide"."""
        return "direct" if self._choose()[0] is not None else "openslide"

    @property
    def reader_note(self) -> str:
        """Why tiles are not read directly, and which levels are not read; empty where there is nothing to say."""
        return "; ".join(filter(None, (self._choose()[1], self._levels_note)))

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
        if self._stated_mpp is not None:
            return square_mpp(self._stated_mpp, self.name), self._mpp_source
        x, y = (_positive(self._properties.get(f"openslide.mpp-{axis}")) for axis in "xy")
        if x is not None and y is not None and not (self.vendor == "generic-tiff" and x >= PRINTING_MPP):
            return square_mpp((x, y), self.name), "openslide.mpp"
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

    def read_tile(self, x_l0: int, y_l0: int, plan: ReadPlan, out: np.ndarray | None = None) -> np.ndarray:
        """Read one tile uint8 [tile_px, tile_px, 3] whose top-left corner is at (x, y) in level-0 px.

        Args:
            x_l0: left edge in level-0 px.
            y_l0: upper edge in level-0 px.
            plan: the read plan of the slide.
            out: uint8 [tile_px, tile_px, 3] to read into; its content is undefined after an error.

        Raises:
            TileDecodeError: the tile cannot be decoded.
        """
        side = int(np.ceil(plan.tile_level - 1e-6))
        if not plan.resampled:
            return self.read_region(x_l0, y_l0, plan.level, (side, side), out)
        pixels = resample_area(self.read_region(x_l0, y_l0, plan.level, (side, side)), plan.tile_level, plan.tile_px)
        return _placed(pixels, out)

    def read_region(
        self, x_l0: int, y_l0: int, level: int, size: tuple[int, int], out: np.ndarray | None = None
    ) -> np.ndarray:
        """Read a region uint8 [h, w, 3]; what lies outside the slide has the slide's background colour.

        Args:
            x_l0: left edge in level-0 px.
            y_l0: upper edge in level-0 px.
            level: index of the level.
            size: width and height in pixels of the level.
            out: uint8 [h, w, 3] to read into; its content is undefined after an error.

        Raises:
            TileDecodeError: the region cannot be decoded.
        """
        direct, _ = self._choose()
        if direct is not None and level in self._same_levels:
            pixels = direct.read_region(x_l0, y_l0, level, size, out)
            if pixels is not None:
                return pixels
        return _placed(self._read_openslide(x_l0, y_l0, level, size), out)

    def _read_openslide(self, x_l0: int, y_l0: int, level: int, size: tuple[int, int]) -> np.ndarray:
        """Read a region through OpenSlide."""
        from openslide import OpenSlideError

        try:
            with self._borrow() as handle:
                rgba = np.asarray(handle.read_region((int(x_l0), int(y_l0)), self._levels[level], size))
        except OpenSlideError as error:
            raise TileDecodeError(f"slide {self.name!r} at ({x_l0}, {y_l0}) level {level}: {error}") from error
        if rgba[..., 3].min() == 255:
            return np.ascontiguousarray(rgba[..., :3])
        alpha = rgba[..., 3:].astype(np.uint16)
        mixed = rgba[..., :3] * alpha + np.array(self.background, dtype=np.uint16) * (255 - alpha)
        return ((mixed + 127) // 255).astype(np.uint8)

    def _choose(self) -> tuple[DirectReader | None, str]:
        """The direct reader or None, and why not; decided at the first tile, since comparing takes time."""
        if self._choice is None:
            with self._choosing:
                if self._choice is None:
                    self._choice = self._try_direct()
        return self._choice

    def _try_direct(self) -> tuple[DirectReader | None, str]:
        try:
            direct = DirectReader.open(self)
        except NotDirectError as error:
            return None, str(error)
        note = self._compare(direct)
        if note:
            direct.close()
        return (None, note) if note else (direct, "")

    def _compare(self, direct: DirectReader) -> str:
        """Read a sample of tiles both ways; what speaks against the direct one, or nothing.

        A damaged tile is left out of the sample. A level of which nothing could be compared stays with OpenSlide.
        """
        deadline = time.monotonic() + _COMPARE_SECONDS
        for place in direct.sample():
            level = place[2]
            if time.monotonic() > deadline and level in self._same_levels:
                continue
            try:
                expected = self._read_openslide(*place)
            except TileDecodeError:
                continue
            try:
                got = direct.read_region(*place)
            except TileDecodeError as error:
                return f"OpenSlide decodes a tile that the direct reader does not: {error}"
            if got is None:
                continue
            if not np.array_equal(got, expected):
                return f"the pixels differ from OpenSlide's at {place[:2]} of level {level}"
            self._same_levels.add(level)
        return "" if 0 in self._same_levels else "no tile of level 0 could be compared with OpenSlide's"

    def read_thumbnail(self, downsample: float) -> tuple[np.ndarray, np.ndarray]:
        """A small picture of the bounds, area-averaged, read in blocks so that memory stays bounded.

        Args:
            downsample: level-0 pixels per thumbnail pixel, at least 1.

        Returns:
            uint8 [h, w, 3], and bool [h, w] that is False (and the picture white) where a block cannot be decoded.
        """
        return thumbnail_in_blocks(self, downsample)

    def _check_pixels(self, structure: TiffStructure | None) -> None:
        """What OpenSlide opens is not always read rightly.

        Raises:
            SlideUnreadableError: it is not.
        """
        if structure is None:
            return
        try:
            reading = choose_reading(structure, self.vendor)
        except WrongPixelsError as error:
            raise SlideUnreadableError(f"got {self.path} → {error}") from error
        if reading != "openslide":
            raise SlideUnreadableError(
                f"got {self.path} → OpenSlide opens it, and would not show its pixels as they are stored → "
                f"open it as mil extract does, which reads the pages of the TIFF themselves"
            )

    def _find_levels(self, sizes: tuple[tuple[int, int], ...], downsamples: tuple[float, ...]) -> None:
        """Keep the levels that show the same as level 0."""
        self._levels: tuple[int, ...] = tuple(range(len(sizes)))
        self._levels, self._levels_note = trusted_levels(sizes, downsamples, self._read_openslide)
        self.downsamples: tuple[float, ...] = tuple(downsamples[i] for i in self._levels)
        self.level_sizes: tuple[tuple[int, int], ...] = tuple(sizes[i] for i in self._levels)

    def _open(self) -> Any:
        import openslide

        if not self.path.exists():
            raise SlideUnreadableError(f"got {self.path} → there is no such file → check the path")
        if self.path.is_file() and os.path.getsize(self.path) == 0:
            raise SlideUnreadableError(f"got {self.path} → the file is empty (0 bytes) → copy it again")
        try:
            return openslide.OpenSlide(real_path(self.path))
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


def _described_mpp(structure: TiffStructure | None) -> tuple[tuple[float, float] | None, str]:
    """µm/px by a description in a TIFF; of resolution tags OpenSlide takes care."""
    if structure is None or structure.stated_mpp is None or structure.mpp_source == "TIFF resolution":
        return None, ""
    return (structure.stated_mpp, structure.mpp_source) if structure.stated_mpp[0] < PRINTING_MPP else (None, "")


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


def _placed(pixels: np.ndarray, out: np.ndarray | None) -> np.ndarray:
    """The pixels, in ``out`` if there is one."""
    if out is None:
        return pixels
    out[:] = pixels
    return out
