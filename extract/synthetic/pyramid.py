"""A pyramidal TIFF of an image."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import tifffile

from extract.slides.slide import SYNTHETIC_SOFTWARE
from extract.synthetic.drawing import Image, SyntheticError


def write_pyramid(
    path: str | Path,
    image: Image,
    mpp: float | None = None,
    levels: int = 3,
    tile_px: int = 256,
    quality: int = 85,
    downsample: int = 2,
    rounding: Literal["floor", "ceil"] = "floor",
    photometric: Literal["ycbcr", "rgb"] = "ycbcr",
) -> None:
    """Write an image as a tiled JPEG pyramid that OpenSlide opens as `generic-tiff`.

    Tiles are compressed as they are cut, so beside the image only the next level is held in memory. The bytes
    depend on the arguments alone.

    Args:
        image: [height, width, 3] level 0.
        mpp: µm per level-0 px, stored as the resolution tag; None stores none.
        levels: Number of levels, level 0 included.
        downsample: Nominal ratio of one level to the next. A side that it does not divide is rounded as `rounding`
            says, as scanners do, so 9999 x 400 px by 4 with "ceil" has a level downsample of 3.9998.
        photometric: How the JPEG tiles store colour: YCbCr with 2x2 subsampling, or plain RGB as in some Aperio files.

    Raises:
        SyntheticError: The image is not uint8 [h, w, 3], or the pyramid cannot have that many levels.
    """
    _check_pyramid(image, levels, downsample)
    with tifffile.TiffWriter(path) as writer:
        for level in range(levels):
            if level:
                image = _shrink(image, downsample, rounding)
            resolution = None if mpp is None else 1e4 / (mpp * downsample**level)
            writer.write(
                _tiles(image, tile_px),
                shape=image.shape,
                dtype=np.uint8,
                tile=(tile_px, tile_px),
                photometric="rgb",  # of what is given; outcolorspace is that of the file
                compression="jpeg",
                compressionargs={"level": quality, "outcolorspace": photometric.upper()},
                subsampling=(2, 2) if photometric == "ycbcr" else (1, 1),
                subfiletype=int(level > 0),
                resolution=None if resolution is None else (resolution, resolution),
                resolutionunit=None if resolution is None else "CENTIMETER",
                metadata=None,
                software=SYNTHETIC_SOFTWARE,
                maxworkers=1,
            )


def _check_pyramid(image: Image, levels: int, downsample: int) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise SyntheticError(
            f"got an image of {image.dtype} {list(image.shape)} → expected uint8 [height, width, 3] → convert it to RGB"
        )
    if levels < 1 or downsample < 2 or min(image.shape[:2]) // downsample ** (levels - 1) < 1:
        raise SyntheticError(
            f"got levels={levels}, downsample={downsample} for {image.shape[1]} x {image.shape[0]} px → expected "
            "at least one pixel on the last level → use fewer levels or a smaller downsample"
        )


def _tiles(image: Image, tile_px: int) -> Iterator[Image]:
    """Tiles in row-major order; the edge is repeated, so that JPEG does not ring into the last column."""
    height, width = image.shape[:2]
    for y in range(0, height, tile_px):
        for x in range(0, width, tile_px):
            tile = image[y : y + tile_px, x : x + tile_px]
            missing = ((0, tile_px - tile.shape[0]), (0, tile_px - tile.shape[1]), (0, 0))
            yield np.pad(tile, missing, mode="edge")


def _shrink(image: Image, downsample: int, rounding: Literal["floor", "ceil"]) -> Image:
    """Area average over downsample x downsample blocks, in strips so that a large level stays small in memory."""
    step = downsample
    height, width = ((n + (step - 1 if rounding == "ceil" else 0)) // step for n in image.shape[:2])
    small = np.empty((height, width, 3), np.uint8)
    strip = 256
    for top in range(0, height, strip):
        rows = image[top * step : (top + strip) * step, : width * step]
        count = min(strip, height - top)
        missing = ((0, max(0, count * step - rows.shape[0])), (0, width * step - rows.shape[1]), (0, 0))
        rows = np.pad(rows, missing, mode="edge")[: count * step]
        total = np.zeros((count, width, 3), np.uint16)
        for dy in range(step):
            for dx in range(step):
                total += rows[dy::step, dx::step]
        small[top : top + count] = (total + step * step // 2) // (step * step)
    return small


def break_tile(path: Path, x_l0: int, y_l0: int) -> tuple[int, int, int, int]:
    """Overwrite one compressed level-0 tile with zeros, as a bad disk sector does; returns its (x, y, w, h)."""
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[0]
        tile_px = page.tilewidth
        columns = -(-page.imagewidth // tile_px)
        index = (y_l0 // tile_px) * columns + x_l0 // tile_px
        offset, count = page.dataoffsets[index], page.databytecounts[index]
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(bytes(count))
    return x_l0 // tile_px * tile_px, y_l0 // tile_px * tile_px, tile_px, tile_px
