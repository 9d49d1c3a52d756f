"""Tiles of JPEG-compressed TIFF slides, read straight from the file: the pixels of OpenSlide at a fraction of its cost.

About 85 % of an OpenSlide read is compositing. Where a slide is a plain grid of JPEG tiles, none is needed: the
compressed bytes are read by their offset and decoded by the same library (libjpeg-turbo) with the same settings;
through simplejpeg, since it hands on the library's warnings, by which OpenSlide tells damaged tiles.
What cannot be had identical this way is left to OpenSlide.
"""

import os
import struct
from collections.abc import Iterator
from io import FileIO
from typing import Self

import numpy as np

from extract.errors import SlideUnreadableError, TileDecodeError
from extract.slides.tiff.tile_cache import TileCache
from extract.slides.tiff.tile_grid import START_OF_IMAGE, NotDirectError, SlideFacts, TileGrid, find_grids

CACHE_BYTES = 128 << 20
"""Decoded source tiles kept per slide: two rows of 256 px tiles of a slide 80,000 px wide."""

_VENDORS = ("aperio", "generic-tiff")
"""OpenSlide's formats whose levels are plain grids of a TIFF page's tiles; in others tiles overlap or are padded."""

_MAX_REGION_PX = 4096
"""OpenSlide cuts larger reads into blocks of this side and rounds the corner of each."""

_NO_FRAME_HEADER = (0xC4, 0xC8, 0xCC)


class _UndecidedError(Exception):
    """A tile looks damaged: OpenSlide has the last word on it."""


class DirectReader:
    """Reads regions of a tiled JPEG TIFF, pixel by pixel what OpenSlide gives; safe to read from several threads.

    Example:
        >>> with Slide("slides/a.svs") as slide:                     # doctest: +SKIP
        ...     reader = DirectReader.open(slide)
        ...     pixels = reader.read_region(0, 0, 0, (256, 256))
    """

    def __init__(self, slide: SlideFacts, grids: tuple[TileGrid, ...], cache_bytes: int = CACHE_BYTES) -> None:
        """Read the tiles of ``grids``, one per level; `open` finds them.

        Raises:
            NotDirectError: the file cannot be opened.
        """
        self.name = slide.name
        self.grids = grids
        self.cache = TileCache(cache_bytes)
        self._background = slide.background
        try:
            self._file = FileIO(slide.path)
        except OSError as error:
            raise NotDirectError(f"the file does not open: {error}") from error
        self._file_bytes = os.fstat(self._file.fileno()).st_size

    @classmethod
    def open(cls, slide: SlideFacts, cache_bytes: int = CACHE_BYTES) -> Self:
        """Find the tiles of every level of ``slide``.

        Args:
            slide: a `Slide`.
            cache_bytes: bound of the decoded source tiles that are kept.

        Raises:
            NotDirectError: the slide cannot be read directly; says why.
        """
        if slide.vendor not in _VENDORS:
            raise NotDirectError(f"format {slide.vendor!r} where {' or '.join(_VENDORS)} is read directly")
        return cls(slide, find_grids(slide), cache_bytes)

    def close(self) -> None:
        """Close the file and drop the cache; from then on nothing is read directly."""
        self._file.close()
        self.cache.clear()

    def read_region(
        self, x_l0: int, y_l0: int, level: int, size: tuple[int, int], out: np.ndarray | None = None
    ) -> np.ndarray | None:
        """Read a region uint8 [h, w, 3] with the background colour outside the slide.

        Args:
            x_l0: left edge in level-0 px.
            y_l0: upper edge in level-0 px.
            level: index of the level.
            size: width and height in pixels of the level.
            out: uint8 [h, w, 3] to read into; its content is undefined after an error.

        Returns:
            The pixels, or None where OpenSlide must read them: the corner lies between pixels of the level, a tile
            is missing or looks damaged, or the region exceeds 4096 px.

        Raises:
            TileDecodeError: a source tile cannot be what the file says it is.
            SlideUnreadableError: the file cannot be read any more.
        """
        grid = self.grids[level]
        corner = grid.corner(x_l0, y_l0)
        if corner is None or max(size) > _MAX_REGION_PX or self._file.closed:
            return None
        (x, y), (width, height) = corner, size
        right, bottom = min(x + width, grid.size[0]), min(y + height, grid.size[1])
        columns, rows = _touched(x, right, grid.tile[0]), _touched(y, bottom, grid.tile[1])
        if grid.missing is not None and grid.missing[rows.start : rows.stop, columns.start : columns.stop].any():
            return None
        is_tile = (
            min(corner) >= 0
            and (x + width, y + height) == (right, bottom)
            and (x % grid.tile[0], y % grid.tile[1]) == (0, 0)
        )
        try:
            if is_tile and size == grid.tile:
                tile = self._decode(level, rows.start, columns.start)
                return tile if out is None else _filled(out, tile)
            region = np.empty((height, width, 3), dtype=np.uint8) if out is None else out
            return self._assemble(level, (x, y, right, bottom), rows, columns, region)
        except _UndecidedError:
            return None

    def sample(self, per_level: int = 8) -> Iterator[tuple[int, int, int, tuple[int, int]]]:
        """Places (x_l0, y_l0, level, size) of source tiles to compare with OpenSlide, all levels in turn.

        Of each level the last tile, and from equal runs of tiles, the last column and the last row the one of most
        bytes: glass compresses to little and shows little. At most every eighth tile, but two, since comparing costs
        as much as a plain read.
        """
        chosen = [self._chosen(grid, per_level) for grid in self.grids]
        for turn in range(per_level):
            for level, places in enumerate(chosen):
                if turn < len(places):
                    yield *places[turn], level, self.grids[level].tile

    def _chosen(self, grid: TileGrid, count: int) -> list[tuple[int, int]]:
        """Up to ``count`` corners (x, y) in level-0 px of tiles that can be compared."""
        count = min(count, max(2, grid.counts.size // 8))
        index = np.arange(grid.counts.size).reshape(grid.counts.shape)
        inner = np.array_split(index.ravel(), max(count - 4, 1))
        runs = [index[-1, -1:], *inner, index[:, -1], index[-1], index[0, :1]]
        tiles = [int(run[np.argmax(grid.counts.flat[run])]) for run in runs if len(run)]
        places = []
        for tile in dict.fromkeys(tiles):
            row, column = divmod(tile, grid.counts.shape[1])
            if grid.missing is not None and grid.missing[row, column]:
                continue
            x_l0, y_l0 = (round(i * n * grid.downsample) for i, n in zip((column, row), grid.tile, strict=True))
            if grid.corner(x_l0, y_l0) == (column * grid.tile[0], row * grid.tile[1]):
                places.append((x_l0, y_l0))
        return places[:count]

    def _assemble(
        self, level: int, box: tuple[int, int, int, int], rows: range, columns: range, region: np.ndarray
    ) -> np.ndarray:
        """Fill ``region`` from the source tiles in ``rows`` and ``columns``; ``box`` is x, y, right, bottom."""
        (x, y, right, bottom), (width, height) = box, self.grids[level].tile
        if x < 0 or y < 0 or (right - x, bottom - y) != (region.shape[1], region.shape[0]):
            region[:] = self._background
        for row in rows:
            top, under = max(row * height, y), min((row + 1) * height, bottom)
            for column in columns:
                left, beyond = max(column * width, x), min((column + 1) * width, right)
                tile = self._tile(level, row, column)
                part = tile[top - row * height : under - row * height, left - column * width : beyond - column * width]
                region[top - y : under - y, left - x : beyond - x] = part
        return region

    def _tile(self, level: int, row: int, column: int) -> np.ndarray:
        return self.cache.get((level, row, column), lambda: self._decode(level, row, column))

    def _decode(self, level: int, row: int, column: int) -> np.ndarray:
        """One source tile uint8 [h, w, 3]."""
        import simplejpeg

        grid = self.grids[level]
        data = self._compressed(level, row, column)
        found = _frame_size(data)
        if found != (*grid.tile, 3):
            # checked before decoding: a progressive frame of 65,535² px would take 25 GB
            got = "no JPEG frame" if found is None else "a JPEG of {} x {} px and {} channels".format(*found)
            raise self._damaged(level, row, column, f"got {got} → expected {grid.tile[0]} x {grid.tile[1]} px and 3")
        pixels = _room(*grid.tile)
        try:
            # strict: libjpeg fills what it cannot decode with grey and only warns, which OpenSlide takes for an error
            simplejpeg.decode_jpeg(grid.head + data[2:], "RGB", buffer=pixels.reshape(-1), strict=True)
        except ValueError as error:
            raise _UndecidedError from error
        return pixels

    def _compressed(self, level: int, row: int, column: int) -> bytes:
        grid = self.grids[level]
        offset, count = int(grid.offsets[row, column]), int(grid.counts[row, column])
        limit = 4 * 3 * grid.tile[0] * grid.tile[1] + (64 << 10)
        if count > limit or offset + count > self._file_bytes:
            got = f"got {count} bytes at {offset} of a file of {self._file_bytes}"
            raise self._damaged(level, row, column, f"{got} → expected at most {limit} inside it")
        try:
            data = os.pread(self._file.fileno(), count, offset)
        except OSError as error:
            raise self._lost(str(error)) from error
        if len(data) < count:
            raise self._lost(f"{len(data)} of {count} bytes at {offset}")
        return data

    def _lost(self, problem: str) -> SlideUnreadableError:
        """The disk failed or the file shrank: not one tile's fault, and it may be better the next time."""
        return SlideUnreadableError(
            f"got {problem} from slide {self.name!r} → its file cannot be read on now → see to the disk or the "
            f"network, then run the same command again"
        )

    def _damaged(self, level: int, row: int, column: int, problem: str) -> TileDecodeError:
        grid = self.grids[level]
        x_l0, y_l0 = (round(i * n * grid.downsample) for i, n in zip((column, row), grid.tile, strict=True))
        place = f"slide {self.name!r} at ({x_l0}, {y_l0}) level {level}"
        return TileDecodeError(f"{place}: {problem} → the file is damaged there; copy it again")


def _room(width: int, height: int) -> np.ndarray:
    """An empty tile uint8 [height, width, 3] that starts 16 bytes beside a multiple of 32.

    libjpeg-turbo writes past the cache where rows are 32-byte aligned, which costs 20 to 40 % of a decode, and the
    caller reads the pixels next.
    """
    count = height * width * 3
    block = np.empty(count + 32, dtype=np.uint8)
    first = (16 - block.ctypes.data) % 32
    return block[first : first + count].reshape(height, width, 3)


def _filled(out: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    out[:] = pixels
    return out


def _touched(first: int, end: int, side: int) -> range:
    """The source tiles of ``side`` pixels that pixels ``first`` to ``end`` of a level touch; none before pixel 0."""
    first = max(first, 0)
    return range(first // side, -(-end // side)) if first < end else range(0)


def _frame_size(data: bytes) -> tuple[int, int, int] | None:
    """Width, height and channels that the frame header of a JPEG stream declares; None if there is none."""
    at = 2 if data.startswith(START_OF_IMAGE) else len(data)
    while at + 10 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in _NO_FRAME_HEADER:
            height, width, channels = struct.unpack_from(">HHB", data, at + 5)
            return width, height, channels
        at += 1 if marker == 0xFF else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None
