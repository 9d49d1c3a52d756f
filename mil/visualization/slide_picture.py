"""A slide's small picture: its thumbnail as JPEG, and a transparent PNG over it with tissue outline and tiles."""

import io
from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageDraw

PICTURE_PX = 320
"""Longest side of a picture."""

JPEG_BYTES = 6_000
"""What a picture may weigh: cohorts have thousands."""

FLAGS = ("invalid", "pen", "empty", "blurred")
"""A tile with several flags is drawn in the colour of the first."""

COLOURS = {
    "tissue": "#111111",
    "tile": "#0072b2",
    "blurred": "#e69f00",
    "empty": "#56b4e9",
    "pen": "#009e73",
    "invalid": "#d01c1c",
}
"""Colours that those who cannot tell red from green can tell apart (after Okabe and Ito)."""

_LINE_FROM_PX = 5
"""Tiles smaller than this on the picture are filled: their outlines would hide everything."""

_QUALITIES = (80, 65, 50, 38)
_LINE_ALPHA, _FILL_ALPHA, _FLAG_ALPHA = 200, 40, 140


def shrink(thumbnail: np.ndarray) -> Image.Image:
    """A picture of at most `PICTURE_PX` of a thumbnail uint8 [h, w, 3]; a smaller one stays as it is."""
    picture = Image.fromarray(np.ascontiguousarray(thumbnail))
    picture.thumbnail((PICTURE_PX, PICTURE_PX), Image.Resampling.LANCZOS, reducing_gap=3.0)
    return picture


def encode_jpeg(picture: Image.Image) -> bytes:
    """The picture as JPEG of at most `JPEG_BYTES`: the best quality, and if need be the largest size, that fits."""
    while True:
        for quality in _QUALITIES:
            buffer = io.BytesIO()
            picture.save(buffer, "JPEG", quality=quality, optimize=True)
            if buffer.tell() <= JPEG_BYTES or max(picture.size) <= 16:
                return buffer.getvalue()
        width, height = picture.size
        picture = picture.resize((max(1, width * 4 // 5), max(1, height * 4 // 5)), Image.Resampling.LANCZOS)


def tile_boxes(coords_l0: np.ndarray, tile_l0: float, origin_l0: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Left, top, right and bottom of tiles, float64 [n_tiles, 4], in pixels of the picture.

    Args:
        coords_l0: int32 [n_tiles, 2], top-left (x, y) in level-0 px.
        tile_l0: side of a tile in level-0 px.
        origin_l0: (x, y) of the picture's corner in level-0 px.
        scale: picture pixels per level-0 pixel along x and y.
    """
    corners = (np.asarray(coords_l0, dtype=np.float64) - origin_l0) * scale
    return np.concatenate([corners, corners + tile_l0 * scale], axis=1)


def encode_overlay(
    size: tuple[int, int], mask: np.ndarray | None, boxes: np.ndarray, flags: Mapping[str, np.ndarray]
) -> bytes:
    """Tiles, coloured by their flag, and the outline of the tissue on a transparent ground, as PNG.

    Args:
        size: width and height of the picture.
        mask: bool [h, w] of the same frame, of any size; None draws no outline.
        boxes: [n_tiles, 4], see `tile_boxes`.
        flags: for names of `FLAGS` bool [n_tiles].
    """
    # palette index 0 is the ground; each colour has an index for lines and the next for fills
    index = {name: 2 * i + 1 for i, name in enumerate(COLOURS)}
    image = Image.new("P", size, 0)
    draw = ImageDraw.Draw(image)
    plain = ~np.logical_or.reduce([np.zeros(len(boxes), dtype=bool), *flags.values()])
    _draw_tiles(draw, size, boxes[plain], index["tile"], filled=False)
    for name in reversed(FLAGS):
        if name in flags:
            _draw_tiles(draw, size, boxes[flags[name]], index[name], filled=True)
    pixels = np.array(image)
    if mask is not None:
        pixels[_outline(mask, size)] = index["tissue"]
    return _encode_png(pixels)


def _draw_tiles(draw: ImageDraw.ImageDraw, size: tuple[int, int], boxes: np.ndarray, line: int, filled: bool) -> None:
    # neighbours share the line between them
    edges = np.clip(np.floor(boxes + 0.5), 0, np.array(size * 2) - 1).astype(int).tolist()
    is_small = len(boxes) > 0 and (boxes[0, 2:] - boxes[0, :2]).min() < _LINE_FROM_PX
    for left, top, right, bottom in edges:
        if is_small:
            draw.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), fill=line + 1)
        else:
            draw.rectangle((left, top, right, bottom), fill=line + 1 if filled else None, outline=line)


def _outline(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The outermost pixels of the tissue, bool [h, w] of the picture."""
    small = np.asarray(Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.BOX)) >= 128
    around = np.pad(small, 1)
    inside = around[:-2, 1:-1] & around[2:, 1:-1] & around[1:-1, :-2] & around[1:-1, 2:]
    return np.asarray(small & ~inside)


def _encode_png(pixels: np.ndarray) -> bytes:
    palette, alphas = [255, 255, 255], [0]
    for name, colour in COLOURS.items():
        palette += 2 * [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        alphas += [255 if name == "tissue" else _LINE_ALPHA, _FLAG_ALPHA if name in FLAGS else _FILL_ALPHA]
    image = Image.fromarray(pixels)
    image.putpalette(palette)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", transparency=bytes(alphas), bits=4, optimize=True)
    return buffer.getvalue()
