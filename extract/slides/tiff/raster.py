"""The pixels of a TIFF read from its own pages: strips or tiles, colours or planes of colours, levels or none."""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from extract.errors import SlideUnreadableError, TileDecodeError
from extract.slides.tiff.gate import JPEG, MINISWHITE, PALETTE, RGB, WrongPixelsError, choose_reading
from extract.slides.tiff.structure import Directory, TiffStructure, sub_pages
from extract.slides.tiff.tile_cache import TileCache
from extract.slides.tiff.tile_grid import ADOBE_RGB, ADOBE_YCBCR, START_OF_IMAGE

CACHE_BYTES = 256 << 20
"""Decoded strips and TIFF tiles kept per slide."""

MAX_SEGMENT_PX = 2**27
"""Largest strip or TIFF tile that is decoded: it is one piece, and takes three bytes a pixel."""

_UNCOMPRESSED = 1
_ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class _Plane:
    """Where the pieces (strips or TIFF tiles) of one page lie, and what decodes them.

    Attributes:
        directory: the page.
        segment: width and height of a piece in pixels.
        offsets: uint64 [planes, rows, columns], place in the file.
        counts: uint64 [planes, rows, columns], bytes.
        tables: JPEG tables that all pieces share.
        colours: uint8 [256, 3] of a palette.
        decode: tifffile's decoder of a piece.
    """

    directory: Directory
    segment: tuple[int, int]
    offsets: np.ndarray
    counts: np.ndarray
    tables: bytes
    colours: np.ndarray | None
    decode: Callable[..., Any]

    @classmethod
    def of(cls, directory: Directory) -> "_Plane":
        """The pieces of a page whose file is open.

        Raises:
            WrongPixelsError: they are not all there, or too large to be decoded.
        """
        page, (width, height) = directory.page, directory.size
        segment = (page.tilewidth, page.tilelength) if directory.tiled else (width, min(page.rowsperstrip, height))
        if min(segment) < 1:
            raise WrongPixelsError(f"it is stored in pieces of {segment[0]} x {segment[1]} px → copy it again")
        planes = directory.samples if directory.planar == 2 else 1
        shape = (planes, -(-height // segment[1]), -(-width // segment[0]))
        offsets, counts = (np.array(each, dtype=np.uint64) for each in (page.dataoffsets, page.databytecounts))
        if offsets.size != math.prod(shape) or counts.size != offsets.size:
            raise WrongPixelsError(f"it lists {offsets.size} pieces where {math.prod(shape)} belong → copy it again")
        # a TIFF tile that is not there is background, as scanners leave it out; a strip that is not there is missing
        gone = not counts.all() and not directory.tiled
        if gone or int((offsets + counts).max()) > page.parent.filehandle.size:
            raise WrongPixelsError("the file ends before its pixels do → copy it again")
        tables, colours = (page.jpegtables or b"")[2:-2], None
        if directory.photometric == PALETTE:
            # 16 bits a colour, of which screens show the upper eight
            colours = (np.asarray(page.colormap).reshape(3, 256).T >> 8).astype(np.uint8)
        plane = cls(directory, segment, offsets.reshape(shape), counts.reshape(shape), tables, colours, page.decode)
        return plane._by_rows()._checked()

    @property
    def samples(self) -> int:
        """Samples per pixel of one piece."""
        return 1 if self.directory.planar == 2 else self.directory.samples

    def _by_rows(self) -> "_Plane":
        """A strip that is not compressed, as strips of a few rows: any of its rows can be read alone."""
        page, (width, rows) = self.directory, self.segment
        planes, strips, _ = self.offsets.shape
        splits = strips == 1 or rows % _ROWS_AT_ONCE == 0
        if page.compression != _UNCOMPRESSED or page.tiled or rows <= _ROWS_AT_ONCE or planes > 1 or not splits:
            return self
        starts, bytes_a_row = np.arange(0, page.size[1], _ROWS_AT_ONCE), width * page.samples
        if int(self.counts.sum()) < bytes_a_row * page.size[1]:
            raise WrongPixelsError("the file ends before its pixels do → copy it again")
        strip = starts // rows
        offsets = self.offsets.ravel()[strip] + ((starts - strip * rows) * bytes_a_row).astype(np.uint64)
        counts = (np.minimum(page.size[1] - starts, _ROWS_AT_ONCE) * bytes_a_row).astype(np.uint64)
        shape = (1, len(starts), 1)
        return replace(
            self, segment=(width, _ROWS_AT_ONCE), offsets=offsets.reshape(shape), counts=counts.reshape(shape)
        )

    def _checked(self) -> "_Plane":
        width, height = self.segment
        if width * height > MAX_SEGMENT_PX:
            raise WrongPixelsError(
                f"it is stored in pieces of {width} x {height} px, each of which is decoded whole, and at most "
                f"{MAX_SEGMENT_PX / 1e6:.0f} million pixels are → convert it to a pyramidal TIFF, for instance with "
                f"vips tiffsave IN OUT.tif --tile --pyramid --compression jpeg --Q 90"
            )
        return self


class TiffRaster:
    """Regions of a TIFF's levels, decoded piece by piece; safe to read from several threads.

    Pixels are those that are stored: an Orientation tag is not applied. Grey and palettes become RGB, stated
    transparency becomes white, and a fourth sample of no stated meaning is left out. JPEG is decoded strictly: what
    cannot be decoded is an error and no grey.

    Attributes:
        reader: "pages", or "image" for one picture in strips.
        note: what was not taken from the file, or why OpenSlide does not read it.
        level_sizes: width and height of each level.
        mpp: (x, y) in µm/px that the file states; None where it does not.
        mpp_source: who states it.
    """

    def __init__(self, path: Path, name: str, vendor: str | None = None) -> None:
        """Find the pieces of every level.

        Args:
            path: the file.
            name: how messages call the slide.
            vendor: OpenSlide's name of the format; None where it knows none.

        Raises:
            WrongPixelsError: it is no 8-bit picture of one plane, or pieces are missing or too large.
            BROKEN_TIFF: one of `extract.slides.tiff.structure.BROKEN_TIFF`, where the file is damaged.
        """
        import tifffile

        self._path, self.name = path, name
        self._file: FileIO | None = None
        self._opening = Lock()
        with tifffile.TiffFile(path) as tiff:
            structure = TiffStructure.of(tiff)
            choose_reading(structure, vendor)
            self._levels = [[_Plane.of(each) for each in level] for level in _levels(structure)]
        self._cache = TileCache(max(CACHE_BYTES, 3 * max(_area(level[0].segment) for level in self._levels)))
        self.level_sizes = tuple(level[0].directory.size for level in self._levels)
        self.mpp, self.mpp_source = structure.stated_mpp, structure.mpp_source
        self.note = _note(structure)
        self.reader = "image" if not structure.first.tiled and len(self._levels[0]) == 1 else "pages"

    def close(self) -> None:
        """Close the file and let go of what was decoded; a later read opens it again."""
        self._cache.clear()
        with self._opening:
            if self._file is not None:
                self._file.close()
                self._file = None

    def read(self, level: int, left: int, top: int, right: int, bottom: int) -> np.ndarray:
        """Pixels uint8 [bottom - top, right - left, 3] that lie inside a level.

        Raises:
            TileDecodeError: a piece of it cannot be decoded.
            SlideUnreadableError: the file cannot be read any more.
        """
        width, height = self._levels[level][0].segment
        region = np.empty((bottom - top, right - left, 3), dtype=np.uint8)
        for row in range(top // height, -(-bottom // height)):
            y0, y1 = max(row * height, top), min((row + 1) * height, bottom)
            for column in range(left // width, -(-right // width)):
                x0, x1 = max(column * width, left), min((column + 1) * width, right)
                piece = self._piece(level, row, column)
                part = piece[y0 - row * height : y1 - row * height, x0 - column * width : x1 - column * width]
                region[y0 - top : y1 - top, x0 - left : x1 - left] = part
        return region

    def _piece(self, level: int, row: int, column: int) -> np.ndarray:
        return self._cache.get((level, row, column), lambda: self._decode(level, row, column))

    def _decode(self, level: int, row: int, column: int) -> np.ndarray:
        """One strip or TIFF tile uint8 [h, w, 3], all planes together."""
        samples = []
        for plane in self._levels[level]:
            for sample in range(len(plane.offsets)):
                try:
                    samples.append(self._decode_one(plane, sample, row, column))
                except SlideUnreadableError:
                    raise
                except Exception as error:
                    raise self._damaged(level, row, error) from error
        stored = samples[0] if len(samples) == 1 else np.concatenate(samples, axis=2)
        return _as_rgb(stored, self._levels[level][0])

    def _decode_one(self, plane: _Plane, sample: int, row: int, column: int) -> np.ndarray:
        """The samples uint8 [h, w, s] of one piece of one plane."""
        place = sample, row, column
        if not plane.counts[place]:
            return np.full((plane.segment[1], plane.segment[0], plane.samples), 255, dtype=np.uint8)
        data = self._bytes(int(plane.offsets[place]), int(plane.counts[place]))
        width, height = plane.segment
        rows = height if plane.directory.tiled else min(height, plane.directory.size[1] - row * height)
        count = plane.samples
        if plane.directory.compression == JPEG and count in (1, 3):
            return _decode_jpeg(data, plane, (rows, width, count))
        if plane.directory.compression == _UNCOMPRESSED:
            return np.frombuffer(data, np.uint8, rows * width * count).reshape(rows, width, count)
        index = int(np.ravel_multi_index(place, plane.offsets.shape))
        pixels, _, _ = plane.decode(data, index)
        if pixels is None or pixels.size != rows * width * count:
            # a strip that is cut short comes back with fewer rows
            raise ValueError(f"it decodes to {0 if pixels is None else pixels.size} samples of {rows * width * count}")
        return np.asarray(pixels, dtype=np.uint8).reshape(rows, width, count)

    def _bytes(self, offset: int, count: int) -> bytes:
        try:
            with self._opening:
                self._file = self._file or FileIO(self._path)
            data = os.pread(self._file.fileno(), count, offset)
        except OSError as error:
            raise self._lost(str(error)) from error
        if len(data) < count:
            raise self._lost(f"{len(data)} of {count} bytes at {offset}")
        return data

    def _lost(self, problem: str) -> SlideUnreadableError:
        return SlideUnreadableError(
            f"got {problem} from slide {self.name!r} → its file cannot be read on now → see to the disk or the "
            f"network, then run the same command again"
        )

    def _damaged(self, level: int, row: int, error: BaseException) -> TileDecodeError:
        height = self._levels[level][0].segment[1]
        what = "TIFF tiles" if self._levels[level][0].directory.tiled else "strip"
        return TileDecodeError(
            f"slide {self.name!r} level {level}, {what} of rows {row * height} to {(row + 1) * height - 1}: "
            f"{error or type(error).__name__} → the file is damaged there; copy it again"
        )


def _levels(structure: TiffStructure) -> list[list[Directory]]:
    """The pages of every level, one or three planes each, the largest first."""
    is_planes = len(structure.full_size) == 3 and structure.first.samples == 1
    top = list(structure.directories[:3]) if is_planes else [structure.first]
    levels = [top]
    if is_planes:
        below = [[Directory.of(page) for page in sub_pages(each.page)] for each in top]
        smaller = [list(planes) for planes in zip(*below, strict=False)]
    else:
        chained = [each for each in structure.directories[1:] if each.reduced and each.tiled]
        smaller = [[each] for each in (*structure.sub_directories, *chained)]
    for planes in sorted(smaller, key=lambda planes: -planes[0].area):
        if all(_is_alike(each, top[0]) for each in planes) and planes[0].area < levels[-1][0].area:
            levels.append(planes)
    return levels


def _is_alike(level: Directory, top: Directory) -> bool:
    """Whether a smaller page holds samples of the same kind; a label or a preview may not."""
    mine, its = ((each.samples, each.bits, each.photometric, each.orientation) for each in (level, top))
    ratio = (top.size[0] / level.size[0]) / (top.size[1] / level.size[1]) if min(level.size) > 0 else 0.0
    return mine == its and 0.9 < ratio < 1.1


def _note(structure: TiffStructure) -> str:
    first = structure.first
    if first.orientation != 1:
        return f"orientation {first.orientation} is not applied: pixels are read as stored"
    if len(structure.full_size) == 3 and first.samples == 1:
        return "three planes are read as red, green and blue"
    if structure.sub_directories:
        return "its levels lie in SubIFDs, which OpenSlide does not read"
    if first.samples == 4 and first.extra[:1] not in ((1,), (2,)):
        return "a fourth sample of no stated meaning is left out"
    return ""


def _decode_jpeg(data: bytes, plane: _Plane, shape: tuple[int, int, int]) -> np.ndarray:
    """A JPEG piece uint8 ``shape``; strict: libjpeg fills what it cannot decode with grey and only warns."""
    import simplejpeg

    colours = b"" if shape[2] == 1 else ADOBE_RGB if plane.directory.photometric == RGB else ADOBE_YCBCR
    stream = START_OF_IMAGE + colours + plane.tables + data[2:]
    height, width, *_ = simplejpeg.decode_jpeg_header(stream, strict=True)
    if (height, width) != shape[:2]:
        raise ValueError(f"got a JPEG of {width} x {height} px → expected {shape[1]} x {shape[0]}")
    pixels: np.ndarray = simplejpeg.decode_jpeg(stream, "GRAY" if shape[2] == 1 else "RGB", strict=True)
    return pixels.reshape(shape)


def _as_rgb(stored: np.ndarray, plane: _Plane) -> np.ndarray:
    """Samples uint8 [h, w, s] as RGB uint8 [h, w, 3]."""
    if plane.colours is not None:
        return np.asarray(plane.colours[stored[..., 0]])
    if stored.shape[2] == 1:
        grey = 255 - stored if plane.directory.photometric == MINISWHITE else stored
        return np.repeat(grey, 3, axis=2)
    if stored.shape[2] == 4:
        return np.ascontiguousarray(_on_white(stored, plane.directory.extra[:1]))
    return stored


def _on_white(pixels: np.ndarray, meaning: tuple[int, ...]) -> np.ndarray:
    """RGB of pixels uint8 [h, w, 4]; the fourth sample may be transparency (1: already multiplied in, 2: not)."""
    colours, alpha = pixels[..., :3], pixels[..., 3:].astype(np.uint16)
    if meaning == (1,):
        return np.minimum(colours + (255 - alpha), 255).astype(np.uint8)
    if meaning == (2,):
        return ((colours * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    return colours


def _area(size: Sequence[int]) -> int:
    return size[0] * size[1]
