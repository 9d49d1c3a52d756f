"""Plain images as slides: PNG, JPEG, BMP, WebP and untiled TIFF; and which reader opens a file."""

import os
import struct
import zlib
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
from PIL import Image

from extract.errors import MissingMppError, SlideUnreadableError, TileDecodeError
from extract.geometry import ReadPlan, resample_area
from extract.slides.slide import Slide

PLAIN_EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp"})
"""What is always read as a plain image."""

TIFF_EXTENSIONS = frozenset({".tif", ".tiff"})
"""What is a plain image only where OpenSlide does not know the format."""

MAX_PIXELS = 2**27
"""Plain images are decoded whole: 134 million pixels are 0.4 GB, and for a moment three times that.
More are refused before they are decoded."""

DECODE_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    LookupError,
    ArithmeticError,
    RuntimeError,
    SyntaxError,
    ImportError,
    EOFError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
"""What Pillow, tifffile and NumPy raise on files that are damaged, hostile or not what their name says."""

_FORMATS = ("PNG", "JPEG", "BMP", "WEBP")
_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA"})
_EXIF_ORIENTATION = 274


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


def open_slide(path: str | Path, name: str | None = None, reader: str = "auto") -> SlideLike:
    """Open a file with the reader that fits it.

    PNG, JPEG, BMP and WebP are plain images. A TIFF is one when OpenSlide does not know its format at all; a TIFF that
    OpenSlide knows and finds damaged stays an error.

    Args:
        path: the file.
        name: how messages call the slide.
        reader: how a `Slide` reads its tiles; plain images have one way only.

    Raises:
        SlideUnreadableError: the file is absent, empty, damaged or of no known format.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix in PLAIN_EXTENSIONS or (suffix in TIFF_EXTENSIONS and _is_unknown_to_openslide(path)):
        return PlainImage(path, name)
    return Slide(path, name, reader)


class PlainImage:
    """An image file without levels, read like a `Slide`; safe to read from several threads.

    The header is checked at once; the pixels are decoded at the first read and kept until `close`. Grey becomes RGB and
    transparency becomes white. What has no plain 8-bit colours (16-bit grey, CMYK, several frames) is refused. Pixels
    are taken as they are stored: an EXIF orientation is not applied (masks and coordinates are made on stored pixels),
    and ``reader_note`` says so. Resolution tags are not believed: the scale comes from the slide table or
    ``--default-mpp``.

    Attributes:
        path: the file.
        name: how messages call the slide.
        size_l0: width and height in pixels.
        bounds_l0: (0, 0, width, height).
        downsamples: (1.0,), as there is one level.
        level_sizes: width and height of that level.
        vendor: "image".
        synthetic: False.
        background: white, the colour of what lies outside the image.
        reader: "image".
        reader_note: what was not taken from the file; empty when there is nothing to say.

    Example:
        >>> with PlainImage("images/img_0001.png") as image:       # doctest: +SKIP
        ...     print(image.size_l0, image.native_mpp(default=0.5))
        (775, 522) (0.5, '--default-mpp')
    """

    def __init__(self, path: str | Path, name: str | None = None, max_pixels: int = MAX_PIXELS) -> None:
        """Open ``path``.

        Raises:
            SlideUnreadableError: the file is absent, empty, damaged, too large, or not a plain image.
        """
        self.path = Path(path)
        self.name = name or self.path.name
        self._lock = Lock()
        self._decoded: np.ndarray | None = None
        self._failure = ""
        width, height, orientation = self._header(max_pixels)
        self.size_l0: tuple[int, int] = (width, height)
        self.bounds_l0: tuple[int, int, int, int] = (0, 0, width, height)
        self.downsamples: tuple[float, ...] = (1.0,)
        self.level_sizes: tuple[tuple[int, int], ...] = ((width, height),)
        self.vendor: str = "image"
        self.synthetic = False
        self.background: tuple[int, int, int] = (255, 255, 255)
        self.reader: str = "image"
        self.reader_note: str = (
            f"EXIF orientation {orientation} is not applied: pixels are read as stored" if orientation != 1 else ""
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the pixels; a later read decodes them again."""
        with self._lock:
            self._decoded = None

    def native_mpp(self, override: float | None = None, default: float | None = None) -> tuple[float | None, str]:
        """µm/px and where it comes from; (None, "missing") when neither value is given.

        Args:
            override: what the slide table says.
            default: ``--default-mpp``.
        """
        if override is not None:
            return override, "slide table"
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
            x_l0: left edge in pixels.
            y_l0: upper edge in pixels.
            plan: the read plan of the image.
            out: uint8 [tile_px, tile_px, 3] to read into.

        Raises:
            SlideUnreadableError: the image cannot be decoded; it is one piece, so no tile of it can.
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
            x_l0: left edge in pixels.
            y_l0: upper edge in pixels.
            level: 0.
            size: width and height in pixels.
            out: uint8 [h, w, 3] to read into.

        Raises:
            SlideUnreadableError: the image cannot be decoded.
            TileDecodeError: there is no such level.
        """
        if level != 0:
            raise TileDecodeError(f"slide {self.name!r} level {level}: a plain image has level 0 only")
        pixels, x, y = self._pixels(), int(x_l0), int(y_l0)
        region = np.empty((size[1], size[0], 3), dtype=np.uint8) if out is None else out
        region[...] = self.background
        left, top = max(x, 0), max(y, 0)
        right, bottom = min(x + size[0], self.size_l0[0]), min(y + size[1], self.size_l0[1])
        if left < right and top < bottom:
            region[top - y : bottom - y, left - x : right - x] = pixels[top:bottom, left:right]
        return region

    def read_thumbnail(self, downsample: float) -> tuple[np.ndarray, np.ndarray]:
        """A small picture, area-averaged.

        Args:
            downsample: pixels per thumbnail pixel, at least 1.

        Returns:
            uint8 [h, w, 3], and bool [h, w] that is all True.

        Raises:
            SlideUnreadableError: the image cannot be decoded.
        """
        width, height = (max(round(side / downsample), 1) for side in self.size_l0)
        picture = Image.fromarray(self._pixels()).resize((width, height), Image.Resampling.BOX)
        return np.asarray(picture), np.ones((height, width), dtype=bool)

    def _header(self, max_pixels: int) -> tuple[int, int, int]:
        """Width, height and EXIF orientation of an image that can be read."""
        if not self.path.exists():
            raise SlideUnreadableError(f"got {self.path} → there is no such file → check the path")
        if self.path.is_file() and os.path.getsize(self.path) == 0:
            raise SlideUnreadableError(f"got {self.path} → the file is empty (0 bytes) → copy it again")
        try:
            width, height, orientation = (_tiff_header if self._is_tiff else _picture_header)(self.path)
        except DECODE_ERRORS as error:
            raise self._unreadable(error) from error
        if width * height > max_pixels:
            raise SlideUnreadableError(
                f"got {self.path} of {width} x {height} px → plain images are decoded whole, and at most "
                f"{max_pixels / 1e6:.0f} million pixels are → convert it to a pyramidal TIFF, for instance with "
                f"vips tiffsave IN OUT.tif --tile --pyramid --compression jpeg --Q 90"
            )
        return width, height, orientation

    @property
    def _is_tiff(self) -> bool:
        return self.path.suffix.lower() in TIFF_EXTENSIONS

    def _pixels(self) -> np.ndarray:
        """The decoded image uint8 [h, w, 3]."""
        with self._lock:
            if self._decoded is None:
                # every tile would ask again: a broken image is decoded, and fails, once
                if self._failure:
                    raise SlideUnreadableError(self._failure)
                try:
                    self._decoded = (_decode_tiff if self._is_tiff else _decode_picture)(self.path)
                except DECODE_ERRORS as error:
                    unreadable = self._unreadable(error)
                    self._failure = str(unreadable)
                    raise unreadable from error
            return self._decoded

    def _unreadable(self, error: BaseException) -> SlideUnreadableError:
        what = "no whole slide that OpenSlide reads, and no plain image" if self._is_tiff else "no plain image"
        return SlideUnreadableError(
            f"got {self.path} → {what} ({error or type(error).__name__}) → copy it again if it is damaged or cut "
            f"short, else save it as an 8-bit RGB PNG or as a pyramidal TIFF"
        )


def _is_unknown_to_openslide(path: Path) -> bool:
    import openslide

    return path.is_file() and os.path.getsize(path) > 0 and openslide.OpenSlide.detect_format(path) is None


def _picture_header(path: Path) -> tuple[int, int, int]:
    with Image.open(path, formats=_FORMATS) as image:
        if image.mode not in _MODES:
            raise ValueError(f"its pixels are of kind {image.mode}, not 8-bit grey or RGB")
        frames = getattr(image, "n_frames", 1)
        if frames > 1:
            raise ValueError(f"it holds {frames} frames")
        return image.width, image.height, _orientation(image)


def _orientation(image: Image.Image) -> int:
    try:
        # of the base class: the PNG reader's own decodes the whole image to find a late EXIF block
        return int(Image.Image.getexif(image).get(_EXIF_ORIENTATION, 1))
    except DECODE_ERRORS:
        return 1


def _decode_picture(path: Path) -> np.ndarray:
    """The pixels uint8 [h, w, 3] of an image that `_picture_header` let pass."""
    with Image.open(path, formats=_FORMATS) as image:
        if not image.has_transparency_data:
            return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
        colours = image.convert("RGBA")
        canvas = Image.new("RGB", colours.size, "white")
        canvas.paste(colours, mask=colours.getchannel("A"))
        return np.asarray(canvas)


def _tiff_header(path: Path) -> tuple[int, int, int]:
    import tifffile

    with tifffile.TiffFile(path) as tiff:
        page = _plain_page(tiff)
        tag = page.tags.get("Orientation")
        # a damaged header may hold a list where one number belongs
        return int(page.imagewidth), int(page.imagelength), 1 if tag is None else int(tag.value)


def _plain_page(tiff: Any) -> Any:
    """The one page of a plain TIFF.

    Raises:
        ValueError: there are more pages, they are tiled, or they hold no 8-bit grey or RGB.
    """
    if len(tiff.pages) != 1:
        raise ValueError(f"it holds {len(tiff.pages)} pages")
    page = tiff.pages[0]
    if page.is_tiled:
        raise ValueError("it is tiled in a way that OpenSlide does not know")
    kind = f"{page.photometric.name.lower()} of {page.samplesperpixel} x {page.bitspersample} bits"
    # a JPEG inside a TIFF is the one YCbCr that is decoded to RGB
    is_colour = page.photometric.name == "RGB" or (page.photometric.name, page.compression.name) == ("YCBCR", "JPEG")
    is_grey = page.photometric.name == "MINISBLACK" and page.samplesperpixel == 1
    if page.dtype != np.uint8 or not (is_grey or (is_colour and page.samplesperpixel in (3, 4))):
        raise ValueError(f"its pixels are of kind {kind}, not 8-bit grey or RGB")
    ends = [offset + count for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True)]
    if not all(page.databytecounts) or max(ends) > tiff.filehandle.size:
        raise ValueError("the file ends before its pixels do")
    return page


def _decode_tiff(path: Path) -> np.ndarray:
    """The pixels uint8 [h, w, 3] of an image that `_tiff_header` let pass."""
    import tifffile

    with tifffile.TiffFile(path) as tiff:
        page = _plain_page(tiff)
        pixels = page.asarray()
        if page.samplesperpixel > 1 and page.planarconfig.name == "SEPARATE":
            pixels = np.moveaxis(pixels, 0, -1)
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[..., None], 3, axis=2)
    if pixels.shape[2] == 4:
        pixels = _on_white(pixels, page.extrasamples[:1])
    return np.ascontiguousarray(pixels)


def _on_white(pixels: np.ndarray, meaning: tuple[int, ...]) -> np.ndarray:
    """RGB of TIFF pixels uint8 [h, w, 4]; the fourth sample may be transparency (1: already multiplied in, 2: not)."""
    colours, alpha = pixels[..., :3], pixels[..., 3:].astype(np.uint16)
    if meaning == (1,):
        return np.minimum(colours + (255 - alpha), 255).astype(np.uint8)
    if meaning == (2,):
        return ((colours * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    return colours
