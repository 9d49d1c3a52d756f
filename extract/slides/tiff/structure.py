"""What the directories of a TIFF file say of its pixels, read without decoding one."""

import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from extract.slides.tiff.descriptions import OmePixels, imagej_mpp, imagej_planes, read_ome

MAX_PAGES = 256
"""Directories that are looked at; asking for their number would follow a chain that never ends."""

BROKEN_TIFF = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
)
"""What tifffile raises on a damaged file."""

_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_MICRONS = {2: 25_400.0, 3: 10_000.0}  # values of TIFF's ResolutionUnit: inch, centimetre
_ORIENTATION, _X_RESOLUTION, _Y_RESOLUTION, _RESOLUTION_UNIT, _SUBFILE = 274, 282, 283, 296, 254


@dataclass(frozen=True)
class Directory:
    """One directory (page) of a TIFF; names and numbers are those of the TIFF 6.0 specification.

    Attributes:
        size: width and height in pixels.
        samples: samples per pixel.
        bits: bits per sample.
        is_integer: whether samples are unsigned integers.
        photometric: PhotometricInterpretation.
        planar: PlanarConfiguration, 1 (RGBRGB) or 2 (a plane for each sample).
        compression: Compression.
        orientation: Orientation, 1 where it does not say.
        extra: ExtraSamples.
        tiled: whether it is stored in tiles, else in strips.
        reduced: whether NewSubfileType says that it is a smaller version of another one.
        decodable: whether tifffile knows the compression.
        page: tifffile's page; it is read only while the file is open.
    """

    size: tuple[int, int]
    samples: int
    bits: int
    is_integer: bool
    photometric: int
    planar: int
    compression: int
    orientation: int
    extra: tuple[int, ...]
    tiled: bool
    reduced: bool
    decodable: bool
    page: Any = field(repr=False, compare=False, default=None)

    @classmethod
    def of(cls, page: Any) -> Self:
        """What a page of tifffile says; raises one of `BROKEN_TIFF` where a damaged header holds nonsense."""
        import tifffile

        return cls(
            size=(int(page.imagewidth), int(page.imagelength)),
            samples=int(page.samplesperpixel),
            bits=int(page.bitspersample),
            is_integer=int(page.sampleformat or 1) in (1, 4),
            photometric=int(page.photometric),
            planar=int(page.planarconfig or 1),
            compression=int(page.compression),
            orientation=int(_tag(page, _ORIENTATION, 1)),
            extra=tuple(int(each) for each in page.extrasamples),
            tiled=bool(page.is_tiled),
            reduced=bool(int(_tag(page, _SUBFILE, 0)) & 1),
            decodable=int(page.compression) in tifffile.TIFF.DECOMPRESSORS,
            page=page,
        )

    @property
    def area(self) -> int:
        """Pixels."""
        return self.size[0] * self.size[1]


@dataclass(frozen=True)
class TiffStructure:
    """The directories of a TIFF, and what its description says of planes and scale.

    Attributes:
        directories: the pages of the main chain, in order.
        sub_directories: those below the first page, from the largest to the smallest; the levels of an OME-TIFF.
        ome: what an OME-XML description says of the first image; None where there is none.
        imagej_planes: channels, slices and frames by an ImageJ description, multiplied; 1 where there is none.
        stated_mpp: (x, y) in µm/px by a description or by resolution tags, as far as these are no printing default.
        mpp_source: where it comes from.
    """

    directories: tuple[Directory, ...]
    sub_directories: tuple[Directory, ...]
    ome: OmePixels | None
    imagej_planes: int
    stated_mpp: tuple[float, float] | None
    mpp_source: str

    @property
    def first(self) -> Directory:
        """The page that OpenSlide takes for level 0 of a generic TIFF."""
        return self.directories[0]

    @property
    def full_size(self) -> tuple[Directory, ...]:
        """The pages that are no smaller version and are as large as the first one, itself included."""
        return tuple(each for each in self.directories if not each.reduced and each.area >= self.first.area)

    @classmethod
    def of(cls, tiff: Any) -> Self:
        """The structure of an open `tifffile.TiffFile`; raises one of `BROKEN_TIFF`."""
        pages = list(main_pages(tiff))
        if not pages:
            raise ValueError("it holds no page")
        directories = tuple(Directory.of(page) for page in pages)
        below = sorted(_below(pages[0]), key=lambda each: -each.area)
        description = str(getattr(pages[0], "description", "") or "")
        ome = read_ome(description)
        mpp, source = _stated_mpp(pages[0], description, ome)
        return cls(directories, tuple(below), ome, imagej_planes(description), mpp, source)


def is_tiff(path: Path) -> bool:
    """Whether a file begins like a TIFF, whatever its name is."""
    try:
        with open(path, "rb") as file:
            return file.read(4) in _MAGIC
    except OSError:
        return False


def read_structure(path: Path) -> TiffStructure | None:
    """The structure of a TIFF file; None where it is no TIFF, or so damaged that its directories cannot be read."""
    import tifffile

    if not is_tiff(path):
        return None
    try:
        with tifffile.TiffFile(path) as tiff:
            return TiffStructure.of(tiff)
    except BROKEN_TIFF:
        return None


def main_pages(tiff: Any) -> Iterator[Any]:
    """The pages of the main chain one by one.

    Raises:
        ValueError: there are more than `MAX_PAGES`.
    """
    for i in range(MAX_PAGES):
        try:
            page = tiff.pages[i]
        except IndexError:
            return
        yield page
    with suppress(IndexError):
        tiff.pages[MAX_PAGES]
        raise ValueError(f"more than {MAX_PAGES} TIFF pages")


def sub_pages(page: Any) -> list[Any]:
    """The pages below a page (SubIFDs); none where there are none."""
    if not getattr(page, "subifds", None):
        return []
    return [page.pages[i] for i in range(min(len(page.subifds), MAX_PAGES))]


def _below(page: Any) -> list[Directory]:
    return [Directory.of(each) for each in sub_pages(page)]


def _tag(page: Any, code: int, default: Any) -> Any:
    tag = page.tags.get(code)
    return default if tag is None else tag.value


def _stated_mpp(page: Any, description: str, ome: OmePixels | None) -> tuple[tuple[float, float] | None, str]:
    """µm/px along x and y, and who says so: OME-XML, then ImageJ, then the resolution tags."""
    if ome is not None and ome.mpp is not None:
        return ome.mpp, "OME PhysicalSize"
    resolution = tuple(_ratio(_tag(page, code, None)) for code in (_X_RESOLUTION, _Y_RESOLUTION))
    if not all(resolution):
        return None, ""
    per_unit = imagej_mpp(description) or _MICRONS.get(int(_tag(page, _RESOLUTION_UNIT, 2)))
    if per_unit is None:
        return None, ""
    source = "ImageJ unit" if imagej_mpp(description) else "TIFF resolution"
    return (per_unit / resolution[0], per_unit / resolution[1]), source


def _ratio(value: Any) -> float:
    """The number of a RATIONAL tag if it is above zero, else 0."""
    try:
        numerator, denominator = value
        return max(float(numerator) / float(denominator), 0.0)
    except (TypeError, ValueError, ArithmeticError):
        return 0.0
