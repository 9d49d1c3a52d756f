"""Which reader opens a slide file."""

import os
from pathlib import Path

from extract.errors import SlideUnreadableError
from extract.slides.image import PlainImage
from extract.slides.pictures import PLAIN_EXTENSIONS
from extract.slides.slide import Slide
from extract.slides.slide_like import SlideLike
from extract.slides.tiff.gate import WrongPixelsError, choose_reading
from extract.slides.tiff.structure import is_tiff, read_structure


def open_slide(path: str | Path, name: str | None = None, reader: str = "auto") -> SlideLike:
    """Open a file with the reader that shows its pixels as they are.

    PNG, JPEG, BMP and WebP are plain images. Every TIFF is looked at: what OpenSlide would show wrongly (planes of
    colours, pixels turned by a tag) is read from its pages, and so is what OpenSlide does not know; what nobody reads
    rightly (16 bits, channels of fluorescence, z-planes) is refused. A TIFF that OpenSlide knows and finds damaged
    stays an error.

    Args:
        path: the file.
        name: how messages call the slide.
        reader: how a `Slide` reads its tiles; images have one way only.

    Raises:
        SlideUnreadableError: the file is absent, empty, damaged, of no known format, or of pixels that nobody reads
            rightly.
    """
    path = Path(path)
    if path.suffix.lower() in PLAIN_EXTENSIONS:
        return PlainImage(path, name)
    if not (path.is_file() and os.path.getsize(path) > 0 and is_tiff(path)):
        return Slide(path, name, reader)
    import openslide

    vendor, structure = openslide.OpenSlide.detect_format(path), read_structure(path)
    if structure is None:
        return PlainImage(path, name) if vendor is None else Slide(path, name, reader)
    try:
        if choose_reading(structure, vendor) == "pages":
            return PlainImage(path, name, vendor=vendor)
    except WrongPixelsError as error:
        raise SlideUnreadableError(f"got {path} → {error}") from error
    return Slide(path, name, reader, structure)
