"""What the description in a TIFF says of its planes and its scale: OME-XML and ImageJ's lines."""

import math
import re
from dataclasses import dataclass
from xml.etree import ElementTree

_OME_UNITS = {
    "µm": 1.0,
    "μm": 1.0,
    "um": 1.0,
    "nm": 1e-3,
    "mm": 1e3,
    "cm": 1e4,
    "m": 1e6,
    "in": 25_400.0,
    "Å": 1e-4,
    "pm": 1e-6,
}
"""µm per unit of OME's UnitsLength that people use; relative ones (pixel, reference frame) are no scale."""

_IMAGEJ_UNITS = {
    **dict.fromkeys(("micron", "microns", "um", "µm", "μm", "\\u00b5m", "micrometer", "micrometre"), 1.0),
    **dict.fromkeys(("nm", "nanometer"), 1e-3),
    **dict.fromkeys(("mm", "millimeter"), 1e3),
    **dict.fromkeys(("cm", "centimeter"), 1e4),
}

_COLOUR_NAMES = (("red", "r"), ("green", "g"), ("blue", "b"))
_COLOURS = (0xFF0000, 0x00FF00, 0x0000FF)


@dataclass(frozen=True)
class OmePixels:
    """What OME-XML says of the first image (https://www.openmicroscopy.org/Schemas/OME/2016-06).

    Attributes:
        planes: (channels, z-planes, time points); a channel of several samples counts once.
        channel_names: name of each channel; empty where it has none.
        channel_colours: 0xRRGGBB of each channel; None where it says none.
        in_order: whether plane i lies in page i.
        mpp: (x, y) in µm/px, None where it does not say.
    """

    planes: tuple[int, int, int]
    channel_names: tuple[str, ...]
    channel_colours: tuple[int | None, ...]
    in_order: bool
    mpp: tuple[float, float] | None

    @property
    def is_rgb(self) -> bool:
        """Whether the planes are the colours red, green and blue of one picture, by their names or their colours."""
        if self.planes != (3, 1, 1) or not self.in_order:
            return False
        names = [name.strip().casefold().removeprefix("channel ") for name in self.channel_names]
        named = all(name in known for name, known in zip(names, _COLOUR_NAMES, strict=True))
        # a channel that has a name of its own (DAPI shown in blue) is no colour of a picture
        return named or (not any(names) and self.channel_colours == _COLOURS)


def read_ome(description: str) -> OmePixels | None:
    """What an OME-XML description says; None for any other text."""
    if "<OME" not in description[:4096] and "<ome:OME" not in description[:4096]:
        return None
    try:
        root = ElementTree.fromstring(description)
    except (ElementTree.ParseError, ValueError, LookupError):
        return None
    pixels = next((each for each in root.iter() if _name(each) == "Pixels"), None)
    if pixels is None:
        return None
    channels = [each for each in pixels if _name(each) == "Channel"]
    samples = sum(_count(each.get("SamplesPerPixel")) for each in channels)
    stated = _count(pixels.get("SizeC"))
    # where channels are not described, each sample may be a plane
    n_channels = len(channels) if channels and samples >= stated else stated
    return OmePixels(
        (n_channels, _count(pixels.get("SizeZ")), _count(pixels.get("SizeT"))),
        tuple(_channel(channels, i, "Name") for i in range(min(n_channels, 64))),
        tuple(_colour(_channel(channels, i, "Color")) for i in range(min(n_channels, 64))),
        _in_order([each for each in pixels if _name(each) == "TiffData"]),
        _physical_size(pixels),
    )


def imagej_mpp(description: str) -> float | None:
    """µm per unit of the resolution tags by ImageJ's ``unit=`` line; None where there is none."""
    unit = _imagej(description).get("unit", "").strip().casefold()
    return _IMAGEJ_UNITS.get(unit)


def imagej_planes(description: str) -> int:
    """Channels, slices and frames of an ImageJ stack, multiplied; 1 for any other text."""
    values = _imagej(description)
    counts = [_count(values.get(key)) for key in ("channels", "slices", "frames")]
    return max(math.prod(counts), _count(values.get("images")))


def _imagej(description: str) -> dict[str, str]:
    if not description.startswith("ImageJ="):
        return {}
    return dict(re.findall(r"^(\w+)=(.*)$", description[:65536], re.MULTILINE))


def _name(element: ElementTree.Element) -> str:
    """The tag without its namespace."""
    return str(element.tag).rpartition("}")[2]


def _count(text: str | None) -> int:
    """A number of planes; 1 where there is none."""
    try:
        return max(int(text or 1), 1)
    except ValueError:
        return 1


def _channel(channels: list[ElementTree.Element], i: int, key: str) -> str:
    return channels[i].get(key, "") if i < len(channels) else ""


def _colour(text: str) -> int | None:
    """0xRRGGBB of OME's signed 32-bit RGBA."""
    try:
        return (int(text) >> 8) & 0xFFFFFF
    except ValueError:
        return None


def _in_order(tiff_data: list[ElementTree.Element]) -> bool:
    """Whether the planes of the first image lie in the first pages, one after the other, in this file."""
    at = 0
    for each in tiff_data:
        first = int(_digits(each.get("IFD"))), int(_digits(each.get("FirstC")))
        if first != (at, at) and (at or first != (0, 0)):
            return False
        at += _count(each.get("PlaneCount"))
    return True


def _digits(text: str | None) -> str:
    return text if text is not None and text.isdigit() else "0"


def _physical_size(pixels: ElementTree.Element) -> tuple[float, float] | None:
    sizes = []
    for axis in "XY":
        try:
            value = float(pixels.get(f"PhysicalSize{axis}", "nan"))
        except ValueError:
            return None
        value *= _OME_UNITS.get(pixels.get(f"PhysicalSize{axis}Unit", "µm"), math.nan)
        if not (math.isfinite(value) and value > 0):
            return None
        sizes.append(value)
    return sizes[0], sizes[1]
