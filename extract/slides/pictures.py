"""Pictures without levels or scale: PNG, JPEG, BMP and WebP, decoded whole, strictly, and in bounded memory."""

import mmap
import os
import struct
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import IO, Any

import numpy as np
from PIL import BmpImagePlugin, Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

PLAIN_EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp"})
"""What is always read as a plain image."""

MAX_PIXELS = 2**31
"""Pictures are decoded whole. More than this are refused before they are decoded."""

SPOOLED_PX = 2**27
"""Pictures of more pixels are decoded into a file without a name in the folder for temporary files (three bytes a
pixel), not into memory; one at a time."""

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

_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA"})
_EXIF_ORIENTATION = 274
_BAND_ROWS = 1024
_LARGEST_DEFLATE_RATIO = 1032
_decoding_large = Lock()


class PictureRaster:
    """The pixels of a picture, decoded at the first read and kept until `close`; safe to read from several threads.

    A JPEG that libjpeg decodes with a warning, and a PNG with a chunk whose checksum is wrong, are errors: libraries
    fill what they cannot decode with grey.

    Attributes:
        reader: "image".
        note: what was not taken from the file.
        level_sizes: width and height, of one level.
        mpp: None: resolution tags of pictures are those of printers and screens.
        mpp_source: empty.
    """

    reader = "image"
    mpp = None
    mpp_source = ""

    def __init__(self, path: Path, max_pixels: int = MAX_PIXELS) -> None:
        """Look at the header.

        Raises:
            DECODE_ERRORS: one of these, where it is no picture that can be read.
        """
        self._path = path
        self._lock = Lock()
        self._decoded: np.ndarray | None = None
        self._failure: Exception | None = None
        width, height, orientation = _header(path, max_pixels)
        self.level_sizes = ((width, height),)
        self.note = f"EXIF orientation {orientation} is not applied: pixels are read as stored" * (orientation != 1)

    def close(self) -> None:
        """Let go of the pixels; a later read decodes them again."""
        with self._lock:
            self._decoded = None

    def read(self, level: int, left: int, top: int, right: int, bottom: int) -> np.ndarray:
        """Pixels uint8 [bottom - top, right - left, 3] that lie inside the picture.

        Raises:
            DECODE_ERRORS: one of these, where it cannot be decoded; then and at every later read.
        """
        return self._pixels()[top:bottom, left:right]

    def _pixels(self) -> np.ndarray:
        with self._lock:
            if self._decoded is None:
                # every tile would ask again: a broken picture is decoded, and fails, once
                if self._failure is not None:
                    raise self._failure
                try:
                    self._decoded = _decode(self._path, self.level_sizes[0])
                except DECODE_ERRORS as error:
                    self._failure = error
                    raise
            return self._decoded


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """A picture whose header was read; not by `Image.open`, which refuses large ones by a limit of its own."""
    with open(path, "rb") as file:
        image = _image_of(file, path)
        try:
            yield image
        finally:
            image.close()


def _image_of(file: IO[bytes], path: Path) -> Image.Image:
    """What the first bytes say it is, whatever its name.

    Raises:
        DECODE_ERRORS: one of these, where it is nothing of the kind.
    """
    head = file.read(12)
    file.seek(0)
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return PngImagePlugin.PngImageFile(file, os.fspath(path))
    if head.startswith(b"\xff\xd8\xff"):
        # a JPEG of several pictures is told by this
        return JpegImagePlugin.jpeg_factory(file, os.fspath(path))
    if head.startswith(b"BM"):
        return BmpImagePlugin.BmpImageFile(file, os.fspath(path))
    if head.startswith(b"RIFF") and head[8:] == b"WEBP":
        return WebPImagePlugin.WebPImageFile(file, os.fspath(path))
    raise ValueError(f"cannot identify image file {path.name!r}")


def _header(path: Path, max_pixels: int) -> tuple[int, int, int]:
    """Width, height and EXIF orientation of a picture that can be read."""
    with _opened(path) as image:
        width, height = image.size
        if width * height > max_pixels:
            raise ValueError(
                f"its {width} x {height} px are more than {max_pixels / 1e6:.0f} million pixels, and pictures are "
                f"decoded whole; convert it to a pyramidal TIFF with vips tiffsave IN OUT.tif --tile --pyramid "
                f"--compression jpeg --Q 90"
            )
        if image.mode not in _MODES:
            raise ValueError(f"its pixels are of kind {image.mode}, not 8-bit grey or RGB")
        frames = getattr(image, "n_frames", 1)
        if frames > 1:
            raise ValueError(f"it holds {frames} frames")
        if image.format == "PNG":
            _check_png_header(path, width * height)
        return width, height, _orientation(image)


def _check_png_header(path: Path, n_pixels: int) -> None:
    """Pillow drops the lower half of 16-bit colours, and believes any size."""
    with open(path, "rb") as file:
        bits = file.read(25)[24]
    if bits == 16:
        raise ValueError("its pixels have 16 bits a colour, not 8-bit grey or RGB")
    if n_pixels * bits // 8 > os.path.getsize(path) * _LARGEST_DEFLATE_RATIO:
        raise ValueError("the file is too short to hold its pixels")


def _orientation(image: Image.Image) -> int:
    try:
        # of the base class: the PNG reader's own decodes the whole image to find a late EXIF block
        return int(Image.Image.getexif(image).get(_EXIF_ORIENTATION, 1))
    except DECODE_ERRORS:
        return 1


def _decode(path: Path, size: tuple[int, int]) -> np.ndarray:
    """The pixels uint8 [h, w, 3] of a picture that `_header` let pass."""
    if size[0] * size[1] <= SPOOLED_PX:
        return _decode_into(path, np.empty((size[1], size[0], 3), dtype=np.uint8))
    with _decoding_large:
        return _decode_into(path, _unnamed_file((size[1], size[0], 3)))


def _unnamed_file(shape: tuple[int, int, int]) -> np.ndarray:
    """An array uint8 ``shape`` in a file that is gone when the array is.

    Raises:
        OSError: there is no room for it.
    """
    n_bytes = int(np.prod(shape))
    with tempfile.TemporaryFile() as file:
        try:
            # a page that finds no room later would end the process
            os.posix_fallocate(file.fileno(), 0, n_bytes)
        except OSError as error:
            folder = tempfile.gettempdir()
            raise OSError(f"{n_bytes / 1e9:.1f} GB are needed in {folder} ({error}); set TMPDIR to a disk") from error
        return np.memmap(file, np.uint8, "r+", shape=shape)


def _decode_into(path: Path, pixels: np.ndarray) -> np.ndarray:
    with _opened(path) as image:
        kind, mode, is_clear = image.format, image.mode, not image.has_transparency_data
        if kind == "JPEG" and mode in ("L", "RGB"):
            return _decode_jpeg(path, mode, pixels)
        if kind == "PNG":
            _check_png(path)
            if mode == "RGB" and is_clear and pixels.size > 3 * SPOOLED_PX:
                return _decode_large_png(path, pixels)
        for top in range(0, image.height, _BAND_ROWS):
            band = image.crop((0, top, image.width, min(top + _BAND_ROWS, image.height)))
            pixels[top : top + band.height] = np.asarray(band.convert("RGB") if is_clear else _on_white(band))
    return pixels


def _on_white(image: Image.Image) -> Image.Image:
    colours = image.convert("RGBA")
    canvas = Image.new("RGB", colours.size, "white")
    canvas.paste(colours, mask=colours.getchannel("A"))
    return canvas


def _decode_jpeg(path: Path, mode: str, pixels: np.ndarray) -> np.ndarray:
    import simplejpeg

    data = path.read_bytes()
    if mode == "L":
        pixels[...] = simplejpeg.decode_jpeg(data, "GRAY", strict=True)
    else:
        simplejpeg.decode_jpeg(data, "RGB", buffer=pixels.reshape(-1), strict=True)
    return pixels


def _decode_large_png(path: Path, pixels: np.ndarray) -> np.ndarray:
    """Into the array itself; Pillow would take four bytes a pixel of memory beside it."""
    import imagecodecs

    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        imagecodecs.png_decode(data, out=pixels)
    return pixels


def _check_png(path: Path) -> None:
    """Pillow checks neither the checksums of pixels nor that they end.

    Raises:
        ValueError: a chunk is damaged or missing.
    """
    with open(path, "rb") as file:
        seen = b""
        for seen, offset, is_right in _png_chunks(file):
            if not is_right:
                raise ValueError(f"chunk {seen.decode('latin-1')} at byte {offset} is damaged: its checksum is wrong")
        if seen != b"IEND":
            raise ValueError("the file ends before its pixels do")


def _png_chunks(file: Any) -> Iterator[tuple[bytes, int, bool]]:
    """Name, place, and whether the checksum is right, of every chunk up to the last."""
    offset = file.seek(8)
    while len(head := file.read(8)) == 8:
        (length,), name = struct.unpack(">I", head[:4]), head[4:]
        checksum, left = zlib.crc32(name), length
        while left and (part := file.read(min(left, 1 << 20))):
            checksum, left = zlib.crc32(part, checksum), left - len(part)
        yield name, offset, file.read(4) == struct.pack(">I", checksum)
        if name == b"IEND":
            return
        offset += length + 12
