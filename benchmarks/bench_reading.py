"""Tiles per second of one thread: OpenSlide, the direct reader, and the bare loop of the direct reader's decoder.

    python -m benchmarks.bench_reading [SLIDES...]

A 30,000 x 30,000 px Aperio-like SVS is written (JPEG quality 70, 256 px tiles, shared JPEG tables), and the slides
given are read too. Aligned: the file's own tiles, one after another, without a cache. Unaligned: tiles of the same size
on a grid that is off by 100 px, in row order, with each reader's default cache. The bare loop is ``os.pread`` and
``imagecodecs.jpeg8_decode`` of the source tiles that these need, each once. All ways take turns in every repeat; before
that, the pixels of every tile are compared with OpenSlide's. Seconds are CPU seconds of the one reading thread, with
the file in the page cache, so that a busy machine does not change them much.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import openslide
import simplejpeg
import tifffile

from benchmarks.machine import Result, print_results, write_results
from extract.memory import keep_freed_memory
from extract.slides.slide import Slide
from extract.slides.tiff.tile_grid import TileGrid, find_grids
from extract.synthetic.cohort import make_large_slide

TILE_PX = 256
OFFSET_PX = 100
FEW_TILES = 50
DESCRIPTION = "Aperio Image Library v11.2.1\r\n{px}x{px} ({tile}x{tile}) JPEG/RGB Q=70|AppMag = 20|MPP = 0.4990"

Corner = tuple[int, int]


def split_tables(data: bytes) -> tuple[bytes, bytes]:
    """A JPEG stream as one without its quantisation and Huffman tables, and one of only those."""
    at, tables, rest = 2, [], []
    while data[at + 1] != 0xDA:
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        (tables if data[at + 1] in (0xDB, 0xC4) else rest).append(data[at:end])
        at = end
    return b"\xff\xd8" + b"".join(rest) + data[at:], b"\xff\xd8" + b"".join(tables) + b"\xff\xd9"


def write_aperio(path: Path, size_px: int, quality: int = 70) -> None:
    """A square SVS of ``size_px`` with levels 1, 4 and 16, tiled with the encoded tiles of one drawn block."""
    with tempfile.TemporaryDirectory() as folder:
        make_large_slide(Path(folder) / "block.tif", 2560, block_px=2000)
        block = tifffile.imread(Path(folder) / "block.tif")[256:-256, 256:-256]
    with tifffile.TiffWriter(path, bigtiff=False) as file:
        for level_px in (size_px, size_px // 4, size_px // 16):
            tiled = np.tile(block, (max(TILE_PX // len(block), 1),) * 2 + (1,))
            cuts = [
                [tiled[y : y + TILE_PX, x : x + TILE_PX] for x in range(0, len(tiled), TILE_PX)]
                for y in range(0, len(tiled), TILE_PX)
            ]
            encoded = [[imagecodecs.jpeg8_encode(np.ascontiguousarray(c), level=quality) for c in row] for row in cuts]
            across = -(-level_px // TILE_PX)
            file.write(
                (split_tables(encoded[r % len(cuts)][c % len(cuts)])[0] for r in range(across) for c in range(across)),
                shape=(level_px, level_px, 3),
                dtype=np.uint8,
                tile=(TILE_PX, TILE_PX),
                photometric="rgb",
                compression="jpeg",
                subsampling=(2, 2),
                jpegtables=split_tables(encoded[0][0])[1],
                description=DESCRIPTION.format(px=size_px, tile=TILE_PX) if level_px == size_px else None,
                metadata=None,
            )
            block = (
                block[: len(block) // 4 * 4].reshape(len(block) // 4, 4, -1, 4, 3).mean(axis=(1, 3)).astype(np.uint8)
            )


def corners(size: Corner, tile: Corner, first: int, count: int) -> list[Corner]:
    """The first ``count`` whole tiles in row order from row ``size / 3`` on of a grid that starts at ``first``."""
    xs = range(first, size[0] - tile[0] + 1, tile[0])
    ys = range(first, size[1] - tile[1] + 1, tile[1])
    start = len(ys) // 3 if len(xs) * len(ys) > 2 * count else 0
    return [(x, y) for y in ys[start:] for x in xs][:count]


def touched(grid: TileGrid, places: Sequence[Corner]) -> list[tuple[int, int]]:
    """(row, column) of each source tile under tiles of the same size at ``places``, once, in the order of need."""
    width, height = grid.tile
    cells = ((r, c) for x, y in places for r in _span(y, height) for c in _span(x, width))
    return list(dict.fromkeys(cells))


def _span(start: int, side: int) -> range:
    return range(start // side, (start + side - 1) // side + 1)


def bare_loop(path: Path, grid: TileGrid, cells: Sequence[tuple[int, int]], decode: Callable[[bytes], Any]) -> float:
    """Seconds to read and decode source tiles."""
    places = [(int(grid.counts[cell]), int(grid.offsets[cell])) for cell in cells]
    file = os.open(path, os.O_RDONLY)
    started = time.thread_time()
    for count, offset in places:
        decode(os.pread(file, count, offset))
    seconds = time.thread_time() - started
    os.close(file)
    return seconds


def decoders(grid: TileGrid) -> dict[str, Callable[[bytes], Any]]:
    """Ways to decode a source tile: the product's, and imagecodecs' for comparison."""
    tables, space = b"\xff\xd8" + grid.head[18:] + b"\xff\xd9", "RGB" if grid.head[17] == 0 else "YCBCR"

    def by_imagecodecs(data: bytes) -> Any:
        return imagecodecs.jpeg8_decode(data, tables=tables, colorspace=space, outcolorspace="RGB")

    return {
        "bare loop": lambda data: simplejpeg.decode_jpeg(grid.head + data[2:]),
        "bare loop, imagecodecs": by_imagecodecs,
    }


def openslide_loop(path: Path, places: Sequence[Corner], tile: Corner, cached: bool, mode: str = "RGBA") -> float:
    """Seconds of plain ``read_region`` calls; ``mode="RGB"`` adds the conversion to what the others give."""
    with openslide.OpenSlide(path) as handle:
        if not cached:
            handle.set_cache(openslide.OpenSlideCache(0))
        handle.read_region((0, 0), 0, tile)
        started = time.thread_time()
        for place in places:
            pixels = handle.read_region(place, 0, tile)
            if mode != "RGBA":
                np.asarray(pixels.convert(mode))
        return time.thread_time() - started


def direct_loop(path: Path, places: Sequence[Corner], tile: Corner, out: np.ndarray | None = None) -> float:
    """Seconds of the same reads by a slide that reads directly; it keeps no aligned tile in its cache."""
    with Slide(path, reader="direct") as slide:
        started = time.thread_time()
        for x, y in places:
            slide.read_region(x, y, 0, tile, out)
        return time.thread_time() - started


def identical(path: Path, places: Sequence[Corner], tile: Corner) -> float:
    """Percentage of pixels that are OpenSlide's."""
    same = 0
    with Slide(path, reader="direct") as slide, openslide.OpenSlide(path) as handle:
        for place in places:
            expected = np.asarray(handle.read_region(place, 0, tile))[..., :3]
            same += int((slide.read_region(*place, 0, tile) == expected).all(axis=-1).sum())
    return 100 * same / (len(places) * tile[0] * tile[1])


def loops(path: Path, grid: TileGrid, places: Sequence[Corner], aligned: bool) -> Iterator[tuple[str, float]]:
    """Every way of reading ``places`` once: its name and its seconds."""
    cells = touched(grid, places)
    yield "OpenSlide", openslide_loop(path, places, grid.tile, cached=not aligned)
    yield "OpenSlide to RGB", openslide_loop(path, places, grid.tile, not aligned, "RGB")
    yield "direct", direct_loop(path, places, grid.tile)
    buffer = np.empty((grid.tile[1], grid.tile[0], 3), dtype=np.uint8)
    yield "direct, into a buffer", direct_loop(path, places, grid.tile, buffer)
    for name, decode in decoders(grid).items():
        yield name, bare_loop(path, grid, cells, decode)


def measure(subject: str, path: Path, aligned: bool, count: int, repeats: int) -> list[Result]:
    """Rates of every way on one grid of tiles, their ratios within a repeat, and the identical pixels."""
    with Slide(path, reader="direct") as slide:
        grid = find_grids(slide)[0]
    places = corners(grid.size, grid.tile, 0 if aligned else OFFSET_PX, count)
    label = f"{'aligned' if aligned else 'unaligned'} {grid.tile[0]} px"
    rows = [
        Result.of(subject, f"{label}: identical pixels, {len(places)} tiles", "%", [identical(path, places, grid.tile)])
    ]
    if len(places) < min(count, FEW_TILES):
        return rows  # too few to time
    seconds: dict[str, list[float]] = {}
    for _ in range(repeats):
        for name, value in loops(path, grid, places, aligned):
            seconds.setdefault(name, []).append(value)
    for name, values in seconds.items():
        rows.append(Result.of(subject, f"{label}: {name}", "tiles/s", [len(places) / value for value in values]))
    for slow in ("OpenSlide", "OpenSlide to RGB", "bare loop"):
        ratios = [s / f for f, s in zip(seconds["direct"], seconds[slow], strict=True)]
        rows.append(Result.of(subject, f"{label}: direct / {slow}", "ratio", ratios))
    return rows


def main(arguments: Sequence[str] | None = None) -> list[Result]:
    """Measure everything and write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slides", nargs="*", type=Path, help="tiled JPEG slides to read besides")
    parser.add_argument("--size-px", type=int, default=30_000, help="side of the SVS that is written")
    parser.add_argument("--tiles", type=int, default=1200, help="tiles read in a repeat, at most")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/reading.csv"))
    options = parser.parse_args(arguments)
    keep_freed_memory()  # as a run does
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "large.svs"
        write_aperio(written, options.size_px)
        for subject, path in [("large SVS", written), *((path.name, path) for path in options.slides)]:
            for aligned in (True, False):
                results += measure(subject, path, aligned, options.tiles, options.repeats)
    print_results(results)
    write_results(options.out, results)
    return results


if __name__ == "__main__":
    main()
