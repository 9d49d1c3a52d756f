"""One gate for every TIFF: whether OpenSlide reads it rightly, or the pages themselves must be read, or neither.

OpenSlide opens more than it reads rightly: of several planes it shows the first, of 16 bits it shows the upper eight,
an Orientation tag turns every TIFF tile in its own place, and a fourth sample of no stated meaning becomes
transparency. What it would read wrongly is read from the TIFF's pages where that is right, else refused.
"""

from extract.errors import ExtractError
from extract.slides.tiff.structure import Directory, TiffStructure

MINISWHITE, MINISBLACK, RGB, PALETTE, YCBCR = 0, 1, 2, 3, 6
JPEG = 7

_NAMES = {
    MINISWHITE: "miniswhite",
    MINISBLACK: "minisblack",
    RGB: "rgb",
    PALETTE: "palette",
    4: "mask",
    5: "separated (CMYK)",
    YCBCR: "ycbcr",
    8: "cielab",
    9: "icclab",
    32803: "colour filter array",
}
_SAMPLES = {MINISWHITE: (1,), MINISBLACK: (1,), RGB: (3, 4), PALETTE: (1,), YCBCR: (3, 4)}
_TURNED_BY_NOBODY = (JPEG, 33003, 33005, 34712)
"""Compressions whose tiles OpenSlide decodes itself in vendors' formats; it turns none of them."""

_OPENSLIDE_COMPRESSIONS = (1, 5, JPEG, 8, 32946, 32773)
_ALPHA = (1, 2)
_REDUCE = "for instance with vips copy 'IN[page=0]' OUT.tif[tile,pyramid,compression=jpeg,Q=90]"


class WrongPixelsError(ExtractError, ValueError):
    """A TIFF that nothing here reads rightly; the message is what it is, an arrow, and what to do."""


def choose_reading(structure: TiffStructure, vendor: str | None) -> str:
    """Who reads a TIFF rightly: "openslide", or "pages" for its pages by themselves.

    Args:
        structure: what its directories say.
        vendor: OpenSlide's name of the format; None where it knows none.

    Raises:
        WrongPixelsError: nobody does.
    """
    if vendor not in (None, "generic-tiff"):
        _check_vendor_format(structure, str(vendor))
        return "openslide"
    _check_kind(structure.first)
    if _has_planes(structure):
        _check_planes(structure)
        return "pages"
    if vendor is None:
        _check_alone(structure)
        return "pages"
    first = structure.first
    openslide_reads = (
        first.orientation == 1
        and not structure.sub_directories
        and (first.samples < 4 or first.extra[:1] in [(each,) for each in _ALPHA])
        and first.compression in _OPENSLIDE_COMPRESSIONS
    )
    is_plain_ycbcr = first.photometric == YCBCR and first.compression != JPEG and first.orientation == 1
    if openslide_reads or is_plain_ycbcr or not first.decodable:
        return "openslide"
    _check_decodable(first)
    return "pages"


def _check_vendor_format(structure: TiffStructure, vendor: str) -> None:
    """OpenSlide knows which pages of a vendor's format are what; not what their samples are."""
    largest = max((each for each in structure.directories if each.tiled), key=lambda each: each.area, default=None)
    if largest is None:
        return
    _check_kind(largest)
    if largest.orientation != 1 and largest.compression not in _TURNED_BY_NOBODY:
        raise WrongPixelsError(
            f"its Orientation tag is {largest.orientation}, by which every TIFF tile would be turned in its own place "
            f"→ remove the tag (tiffset -u 274 FILE), or convert it to a pyramidal TIFF"
        )
    same = [each for each in structure.directories if each.size == largest.size and each.tiled]
    if vendor in ("aperio", "trestle") and len(same) > 1:
        raise WrongPixelsError(_planes_message(len(same), "pages of full size"))


def _check_kind(page: Directory) -> None:
    """Samples are 8-bit grey, palette or RGB."""
    is_kind = page.bits == 8 and page.is_integer and page.samples in _SAMPLES.get(page.photometric, ())
    if not is_kind:
        name = _NAMES.get(page.photometric, f"photometric interpretation {page.photometric}")
        number = "" if page.is_integer else " (floating point or signed)"
        raise WrongPixelsError(
            f"its pixels are of kind {name} of {page.samples} x {page.bits} bits{number}, not 8-bit grey or RGB → save "
            f"it as 8-bit RGB, with the brightness that people should see"
        )


def _check_decodable(page: Directory) -> None:
    """The colours of a page can be had without OpenSlide."""
    if not page.decodable:
        raise WrongPixelsError(f"its compression {page.compression} is not known → save it with another, such as JPEG")
    if page.photometric == YCBCR and page.compression != JPEG:
        raise WrongPixelsError(
            f"its colours are YCbCr in compression {page.compression}, which is read as JPEG alone → save it as RGB"
        )


def _has_planes(structure: TiffStructure) -> bool:
    """Whether the first page is one plane of several."""
    return len(structure.full_size) > 1 or structure.imagej_planes > 1 or _ome_planes(structure) > 1


def _ome_planes(structure: TiffStructure) -> int:
    if structure.ome is None:
        return 1
    channels, depths, times = structure.ome.planes
    # where XML does not describe its channels, the samples of a pixel look like some
    return (1 if channels == structure.first.samples else channels) * depths * times


def _check_planes(structure: TiffStructure) -> None:
    """Planes are red, green and blue of one picture, and lie in the first three pages."""
    planes = structure.directories[:3]
    is_rgb = structure.ome is not None and structure.ome.is_rgb and len(structure.full_size) == 3
    alike = len({(each.size, each.samples, each.photometric, each.reduced) for each in planes}) == 1
    if not (is_rgb and alike and len(planes) == 3 and (planes[0].samples, planes[0].photometric) == (1, MINISBLACK)):
        raise WrongPixelsError(_planes_message(*_count_planes(structure)))


def _count_planes(structure: TiffStructure) -> tuple[int, str]:
    """How many planes there are, and what they are."""
    if structure.ome is not None and _ome_planes(structure) > 1:
        channels, depths, times = structure.ome.planes
        names = ", ".join(filter(None, structure.ome.channel_names[:4]))
        said = f"{channels} channels{f' ({names})' if names else ''}, {depths} z-planes, {times} time points"
        return _ome_planes(structure), f"planes by its OME-XML: {said}"
    if structure.imagej_planes > 1:
        return structure.imagej_planes, "planes by ImageJ's description"
    return len(structure.full_size), "pages as large as the first"


def _planes_message(count: int, what: str) -> str:
    return (
        f"it holds {count} {what}, of which the first alone would be read as if it were the slide → where they are the "
        f"colours of one picture, name the channels Red, Green and Blue in its OME-XML or save it as RGB; else choose "
        f"one plane, or make an RGB picture of those that matter, {_REDUCE}"
    )


def _check_alone(structure: TiffStructure) -> None:
    """A file that OpenSlide does not know is one picture, and smaller versions of it."""
    others = [each for each in structure.directories[1:] if not each.reduced]
    if others:
        raise WrongPixelsError(
            f"it holds {len(others) + 1} pages that are no smaller versions of the first → save the one that is the "
            f"slide as a file of its own, {_REDUCE}"
        )
    _check_decodable(structure.first)
