"""Where the compressed tiles of a TIFF slide lie in its file, level by level."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np

from extract.errors import ExtractError
from extract.slides.tiff.structure import BROKEN_TIFF, main_pages

START_OF_IMAGE = b"\xff\xd8"

_MAX_TILE_PX = 4096
_JPEG, _RGB, _YCBCR, _CONTIGUOUS = 7, 2, 6, 1  # values of TIFF tags
ADOBE_RGB = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00"
ADOBE_YCBCR = ADOBE_RGB[:-1] + b"\x01"


class NotDirectError(ExtractError, ValueError):
    """The slide, or a level of it, cannot be read directly; the message is the reason."""


class SlideFacts(Protocol):
    """What `DirectReader.open` must know of a slide; a `Slide` is one."""

    path: Path
    name: str
    vendor: str
    background: tuple[int, int, int]
    downsamples: tuple[float, ...]
    level_sizes: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class TileGrid:
    """Where the compressed tiles of one level lie in the file.

    Attributes:
        downsample: level-0 pixels per pixel of the level.
        size: width and height of the level.
        tile: width and height of a source tile.
        offsets: uint64 [rows, columns], place in the file.
        counts: uint64 [rows, columns], compressed bytes.
        head: what stands before each tile's own JPEG stream: its colour space and the tables shared by all tiles.
        missing: which tiles the file leaves out and OpenSlide paints in its own way, bool [rows, columns]; None where
            none is.
    """

    downsample: float
    size: tuple[int, int]
    tile: tuple[int, int]
    offsets: np.ndarray
    counts: np.ndarray
    head: bytes
    missing: np.ndarray | None

    @classmethod
    def of_page(cls, page: Any, downsample: float) -> Self:
        """The grid of a TIFF page.

        Raises:
            NotDirectError: the page is not what this module reads.
        """
        size, tile = (page.imagewidth, page.imagelength), (page.tilewidth, page.tilelength)
        shape = (-(-size[1] // tile[1]), -(-size[0] // tile[0])) if min(tile) > 0 else (0, 0)
        wanted = {
            "compression": (int(page.compression), (_JPEG,)),
            "photometric interpretation": (int(page.photometric), (_RGB, _YCBCR)),
            "planar configuration": (int(page.planarconfig), (_CONTIGUOUS,)),
            "samples per pixel": (page.samplesperpixel, (3,)),
            "bits per sample": (page.bitspersample, (8,)),
            "number of tile offsets": (len(page.dataoffsets), (shape[0] * shape[1],)),
            "number of tile sizes": (len(page.databytecounts), (shape[0] * shape[1],)),
        }
        for what, (value, allowed) in wanted.items():
            if value not in allowed:
                raise NotDirectError(f"{what} {value} where {' or '.join(map(str, allowed))} is read directly")
        if not 0 < min(tile) <= max(tile) <= _MAX_TILE_PX:
            raise NotDirectError(f"TIFF tiles of {tile[0]} x {tile[1]} px where up to {_MAX_TILE_PX} are read directly")
        offsets, counts = (np.array(v, dtype=np.uint64).reshape(shape) for v in (page.dataoffsets, page.databytecounts))
        # the TIFF says the colour space, not the stream: Aperio's RGB decoded as YCbCr is off by up to 254
        colours = ADOBE_RGB if int(page.photometric) == _RGB else ADOBE_YCBCR
        head = START_OF_IMAGE + colours + (page.jpegtables or b"")[2:-2]
        missing = np.asarray((offsets == 0) | (counts == 0))
        return cls(downsample, size, tile, offsets, counts, head, missing if missing.any() else None)

    def corner(self, x_l0: int, y_l0: int) -> tuple[int, int] | None:
        """A place in level-0 px as whole pixels of the level, or None where OpenSlide would interpolate."""
        x, y = x_l0 / self.downsample, y_l0 / self.downsample
        return (int(x), int(y)) if x.is_integer() and y.is_integer() else None


def find_grids(slide: SlideFacts) -> tuple[TileGrid, ...]:
    """The tile grid of every level, each in the one TIFF page that has its size.

    Raises:
        NotDirectError: a level has no such page, or several, or one that is not read directly; or the file is broken.
    """
    import tifffile

    try:
        with tifffile.TiffFile(slide.path) as tiff:
            tiled = [page for page in main_pages(tiff) if page.is_tiled]
            grids = []
            for level, (size, downsample) in enumerate(zip(slide.level_sizes, slide.downsamples, strict=True)):
                pages = [page for page in tiled if (page.imagewidth, page.imagelength) == size]
                if len(pages) != 1:
                    raise NotDirectError(f"level {level} has {len(pages)} tiled TIFF pages of its size, not one")
                grids.append(TileGrid.of_page(pages[0], downsample))
                if slide.vendor == "aperio" and level and grids[-2].missing is not None:
                    # OpenSlide does not trust what was made from missing tiles
                    grids[-1] = replace(grids[-1], missing=np.ones(grids[-1].counts.shape, dtype=bool))
    except NotDirectError:
        raise
    except BROKEN_TIFF as error:
        raise NotDirectError(f"its TIFF structure cannot be read: {error}") from error
    return tuple(grids)
