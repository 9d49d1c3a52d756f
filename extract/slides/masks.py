"""Given masks: PNG and other rasters, QuPath's GeoJSON, and tissue and tiles as GeoJSON for QuPath.

QuPath shows a slide whose file names ``openslide.bounds-x/y/width/height`` cropped to these bounds, and counts its
level-0 pixels from their corner (unless the image was added with ``--no-crop``). GeoJSON is read and written in that
frame: add ``bounds_l0[:2]`` to get level-0 pixels of the file. Slides without bounds and plain images have one frame.
"""

import hashlib
import json
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from extract.errors import MaskError
from extract.slides.pictures import DECODE_ERRORS

MASK_EXTENSIONS = (".png", ".bmp", ".tif", ".tiff", ".npy", ".geojson", ".json")
"""What a mask file may be. JPEG is not among them: it blurs labels."""

SAME_SHAPE_TOLERANCE = 0.01
"""A raster belongs to a slide when their aspect ratios agree within 1 %, or within one pixel of the raster."""

IGNORED_CLASS = "Ignore*"
"""QuPath's class for what is not to be measured; its outlines are cut out of the others."""

_OUTLINE_EXTENSIONS = (".geojson", ".json")
_RASTER_MODES = frozenset({"1", "L", "LA", "RGB", "RGBA", "I", "I;16", "I;16B", "I;16L", "F"})
_MAX_GEOJSON_BYTES = 2**28
_MAX_CROSSINGS = 2**23
_MAX_PIXELS = 2**27

_OVERHANG = 0.1
"""An outline may reach beyond the slide by a tenth of its size, as hand-drawn ones do; more is another slide's."""

_WITHOUT_AREA = frozenset({"Point", "MultiPoint", "LineString", "MultiLineString"})


def read_mask(
    path: str | Path,
    size_l0: tuple[int, int],
    bounds_l0: tuple[int, int, int, int],
    shape: tuple[int, int],
    classes: Collection[str] | None = None,
) -> np.ndarray:
    """Read a mask file on the frame of a slide's thumbnail, which shows ``bounds_l0``.

    Rasters (PNG, BMP, TIFF, NPY): whatever is above 0 is tissue, in any channel. A raster may have any size; its aspect
    ratio says whether it shows the slide's bounds or all of level 0. A thumbnail pixel is tissue when half of its area
    is. Of a pyramidal TIFF the coarsest level that is not coarser than the thumbnail is read.

    GeoJSON as QuPath exports it, in the frame that the module's docstring describes: all polygons are tissue, except
    those of the class ``Ignore*``, which are cut out. A thumbnail pixel is tissue when its centre is. Points and lines
    have no area and count for nothing.

    Args:
        path: the mask file.
        size_l0: width and height of the slide's level 0.
        bounds_l0: (x, y, width, height) of the scanned area.
        shape: height and width of the thumbnail.
        classes: names of the QuPath classes that are tissue; None takes all.

    Returns:
        bool [h, w].

    Raises:
        MaskError: the file is absent, damaged, of another slide, or holds no outline of these classes.
    """
    path = Path(path)
    if path.suffix.lower() not in MASK_EXTENSIONS:
        raise MaskError(f"got mask {path} → expected {' '.join(MASK_EXTENSIONS)} → save it as PNG or GeoJSON")
    if not path.is_file():
        raise MaskError(f"got mask {path} → there is no such file → check the path or pattern of the masks")
    if path.suffix.lower() in _OUTLINE_EXTENSIONS:
        return _draw(path, _read_outlines(path), bounds_l0, shape, classes)
    try:
        mask = _read_raster(path, shape)
    except DECODE_ERRORS as error:
        raise MaskError(
            f"got mask {path} → it cannot be read ({error or type(error).__name__}) → copy it again if it is damaged, "
            f"else save it as an 8-bit PNG in which tissue is above 0"
        ) from error
    return _resample(mask, _frame_l0(path, mask.shape, size_l0, bounds_l0), bounds_l0, shape)


def mask_sha256(path: str | Path) -> str:
    """SHA-256 of a mask file; the slide's tile record holds it.

    Raises:
        MaskError: the file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise MaskError(f"got mask {path} → it cannot be read ({error}) → check the path") from error


def _read_raster(path: Path, shape: tuple[int, int]) -> np.ndarray:
    """What is above 0 in a raster, bool [h, w].

    Raises:
        ValueError: it is too large, or of a kind that has no labels.
    """
    suffix = path.suffix.lower()
    if suffix == ".npy":
        return _above_zero(_of_bounded_size(np.load(path, mmap_mode="r", allow_pickle=False)))
    if suffix in (".tif", ".tiff"):
        return _above_zero(_read_tiff(path, shape))
    with Image.open(path, formats=("PNG", "BMP")) as image:
        _check_size(image.width, image.height)
        # the indices of a palette are arbitrary; black is the background in any of them
        labels = image.convert("RGBA") if image.mode in ("P", "PA") else image
        if labels.mode not in _RASTER_MODES:
            raise ValueError(f"its pixels are of kind {labels.mode}")
        return _above_zero(np.asarray(labels))


def _read_tiff(path: Path, shape: tuple[int, int]) -> np.ndarray:
    import tifffile

    with tifffile.TiffFile(path) as tiff:
        levels = tiff.series[0].levels
        sizes = [(level.keyframe.imagelength, level.keyframe.imagewidth) for level in levels]
        fine = [i for i, size in enumerate(sizes) if size[0] >= shape[0] and size[1] >= shape[1]]
        index = max(fine, default=0)
        page = levels[index].keyframe
        if page.photometric.name not in ("MINISBLACK", "RGB", "PALETTE"):
            raise ValueError(f"its pixels are of kind {page.photometric.name.lower()}")
        _check_size(page.imagewidth, levels[index].size // (page.imagewidth * page.samplesperpixel))
        labels = np.asarray(levels[index].asarray())
        if page.photometric.name == "PALETTE":
            return np.moveaxis(page.colormap[:, labels], 0, -1)
        is_planar = page.samplesperpixel > 1 and page.planarconfig.name == "SEPARATE"
        return np.moveaxis(labels, 0, -1) if is_planar else labels


def _check_size(width: int, height: int) -> None:
    if width * height > _MAX_PIXELS:
        raise ValueError(
            f"its {width} x {height} px are more than {_MAX_PIXELS / 1e6:.0f} million; any smaller size of the same "
            f"aspect ratio will do"
        )


def _of_bounded_size(labels: np.ndarray) -> np.ndarray:
    if labels.ndim != 2 or labels.dtype.kind not in "buif":
        raise ValueError(f"it holds {labels.dtype} {list(labels.shape)}, not numbers [h, w]")
    _check_size(labels.shape[1], labels.shape[0])
    return labels


def _above_zero(labels: np.ndarray) -> np.ndarray:
    """Bool [h, w] of labels [h, w] or colours [h, w, 1 to 4], of which 2 and 4 end with transparency."""
    if labels.ndim == 2:
        return np.asarray(labels > 0)
    if labels.ndim != 3 or labels.shape[2] > 4:
        raise ValueError(f"it holds an array {list(labels.shape)}, not one picture")
    n_colours = labels.shape[2] - (labels.shape[2] in (2, 4))
    mask = (labels[..., :n_colours] > 0).any(axis=2)
    return np.asarray(mask if n_colours == labels.shape[2] else mask & (labels[..., -1] > 0))


def _frame_l0(
    path: Path, shape: tuple[int, ...], size_l0: tuple[int, int], bounds_l0: tuple[int, int, int, int]
) -> tuple[int, int, int, int]:
    """The rectangle of level 0 that a raster shows: the bounds or everything."""
    height, width = shape
    if not (height and width):
        raise MaskError(f"got mask {path} of {width} x {height} px → it is empty → make it again")
    whole = (0, 0, *size_l0)
    fitting = [frame for frame in dict.fromkeys((bounds_l0, whole)) if _fits(width, height, frame)]
    if not fitting:
        raise MaskError(
            f"got mask {path} of {width} x {height} px (aspect ratio {width / height:.4g}) → the slide has "
            f"{size_l0[0]} x {size_l0[1]} ({size_l0[0] / size_l0[1]:.4g}) and its scanned area "
            f"{bounds_l0[2]} x {bounds_l0[3]} ({bounds_l0[2] / bounds_l0[3]:.4g}) → give the mask of this slide"
        )
    apart = max(abs(a - b) / max(size_l0) for a, b in zip(bounds_l0, whole, strict=True))
    if len(fitting) == 2 and apart > SAME_SHAPE_TOLERANCE and (width, height) not in (size_l0, bounds_l0[2:]):
        raise MaskError(
            f"got mask {path} of {width} x {height} px → it may show the whole slide ({size_l0[0]} x {size_l0[1]}) or "
            f"its scanned area ({bounds_l0[2]} x {bounds_l0[3]}), which have the same aspect ratio → make it exactly "
            f"as large as the one that it shows, or give GeoJSON"
        )
    exact = [frame for frame in fitting if frame[2:] == (width, height)]
    return (exact or fitting)[0]


def _fits(width: int, height: int, frame_l0: tuple[int, int, int, int]) -> bool:
    """Whether a raster has the aspect ratio of a rectangle of level 0."""
    expected = height * frame_l0[2] / frame_l0[3], width * frame_l0[3] / frame_l0[2]
    return bool(
        abs(width / expected[0] - 1) <= SAME_SHAPE_TOLERANCE
        or abs(width - expected[0]) <= 1
        or abs(height - expected[1]) <= 1
    )


def _resample(
    mask: np.ndarray,
    frame_l0: tuple[int, int, int, int],
    bounds_l0: tuple[int, int, int, int],
    shape: tuple[int, int],
) -> np.ndarray:
    """The part of a mask that shows the bounds, bool [h, w]; a pixel is set when half of its area is."""
    scale = np.array([mask.shape[1] / frame_l0[2], mask.shape[0] / frame_l0[3]])
    start = (np.array(bounds_l0[:2]) - frame_l0[:2]) * scale
    end = start + np.array(bounds_l0[2:]) * scale
    # bounds may begin before level 0 does, as they do in some MIRAX files; nothing is known of what is there
    before = np.maximum(np.ceil(-start - 1e-6), 0).astype(int)
    after = np.maximum(np.ceil(end - (mask.shape[1], mask.shape[0]) - 1e-6), 0).astype(int)
    if before.any() or after.any():
        mask = np.pad(mask, [(before[1], after[1]), (before[0], after[0])])
        start, end = start + before, end + before
    (left, top), (right, bottom) = np.maximum(start, 0).tolist(), np.minimum(end, mask.shape[::-1]).tolist()
    # an even value, so that half of it is a whole number
    picture = Image.fromarray(mask.astype(np.uint8) * 254)
    resized = picture.resize((shape[1], shape[0]), Image.Resampling.BOX, box=(left, top, right, bottom))
    return np.asarray(resized) >= 127


def _read_outlines(path: Path) -> list[tuple[str, list[np.ndarray]]]:
    """Class name and rings float64 [n, 2], in QuPath's frame, of every polygon in a GeoJSON file."""
    if path.stat().st_size > _MAX_GEOJSON_BYTES:
        raise MaskError(
            f"got mask {path} of {path.stat().st_size / 2**20:.0f} MiB → expected the outlines of tissue, at most "
            f"{_MAX_GEOJSON_BYTES / 2**20:.0f} MiB → export the tissue annotations only"
        )
    try:
        document = json.loads(path.read_text(encoding="utf-8-sig"), parse_constant=float)
        return [(name, [_ring(ring) for ring in rings]) for name, rings in _polygons(document)]
    except DECODE_ERRORS as error:
        raise MaskError(
            f"got mask {path} → it is no GeoJSON of outlines ({error or type(error).__name__}) → export it from QuPath "
            f"with File, Export objects as GeoJSON"
        ) from error


def _polygons(document: Any) -> Iterator[tuple[str, list[Any]]]:
    """Class name and coordinates of every polygon; without recursion, as files may be nested without end.

    Raises:
        ValueError: something that GeoJSON does not know.
    """
    pending: list[tuple[Any, str]] = [(document, "")]
    while pending:
        item, name = pending.pop()
        if isinstance(item, list):
            # QuPath up to 0.2 wrote the features as a bare list
            pending.extend((part, name) for part in item)
            continue
        kind = str(item.get("type")) if isinstance(item, dict) else type(item).__name__
        if kind == "FeatureCollection":
            pending.append((_list(item, "features"), name))
        elif kind == "Feature":
            # a feature without a geometry is allowed
            pending.append((item.get("geometry") or [], _class_name(item.get("properties"))))
        elif kind == "GeometryCollection":
            pending.append((_list(item, "geometries"), name))
        elif kind == "Polygon":
            yield name, _list(item, "coordinates")
        elif kind == "MultiPolygon":
            yield from ((name, rings) for rings in _list(item, "coordinates"))
        elif kind not in _WITHOUT_AREA:
            raise ValueError(f"it holds {kind[:40]!r} where a feature or a geometry is expected")


def _list(item: dict[str, Any], key: str) -> list[Any]:
    if not isinstance(item.get(key), list):
        raise ValueError(f"a {item['type']} without a list of {key}")
    return list(item[key])


def _class_name(properties: Any) -> str:
    """The QuPath class of a feature, such as ``Tumor`` or ``Tumor: Positive``; empty without one."""
    classification = properties.get("classification") if isinstance(properties, dict) else None
    if not isinstance(classification, dict):
        return ""
    names = classification.get("names")
    if isinstance(names, list):
        return ": ".join(map(str, names))
    return str(classification.get("name") or "")


def _ring(points: Any) -> np.ndarray:
    ring = np.array(points, dtype=np.float64)
    if ring.ndim != 2 or len(ring) < 3 or ring.shape[1] < 2:
        raise ValueError(f"a ring of shape {list(ring.shape)} where three or more points (x, y) are expected")
    if not np.isfinite(ring).all():
        raise ValueError("a coordinate that is not a finite number")
    return ring[:, :2]


def _draw(
    path: Path,
    outlines: Sequence[tuple[str, list[np.ndarray]]],
    bounds_l0: tuple[int, int, int, int],
    shape: tuple[int, int],
    classes: Collection[str] | None,
) -> np.ndarray:
    """The outlines of these classes, less the ignored ones, bool [h, w]."""
    tissue, ignored = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
    size_l0 = np.array(bounds_l0[2:])
    found = False
    for name, rings in outlines:
        is_ignored = name == IGNORED_CLASS
        if not rings or not (is_ignored or classes is None or name in classes):
            continue
        found = found or not is_ignored
        _check_place(path, rings, size_l0)
        scaled = [ring * (shape[1], shape[0]) / size_l0 for ring in rings]
        try:
            _fill(ignored if is_ignored else tissue, scaled)
        except ValueError as error:
            raise MaskError(f"got mask {path} → {error} → simplify its outlines") from error
    if not tissue.any():
        names = sorted({name or "(no class)" for name, _ in outlines})
        raise MaskError(
            f"got mask {path} with {len(outlines)} outlines of the classes {names[:20]} → "
            f"{'they cover no pixel' if found else 'none is tissue'} → expected one or more of "
            f"{'any class but ' + IGNORED_CLASS if classes is None else sorted(classes)} → correct the file or the "
            f"classes"
        )
    return tissue & ~ignored


def _check_place(path: Path, rings: list[np.ndarray], size_l0: np.ndarray) -> None:
    low, high = (
        np.min([ring.min(axis=0) for ring in rings], axis=0),
        np.max([ring.max(axis=0) for ring in rings], axis=0),
    )
    if (low < -_OVERHANG * size_l0).any() or (high > (1 + _OVERHANG) * size_l0).any():
        raise MaskError(
            f"got mask {path} with an outline from {_point(low)} to {_point(high)} → the scanned area of the slide has "
            f"{size_l0[0]} x {size_l0[1]} level-0 px, counted from its top-left corner as QuPath does → give the mask "
            f"of this slide, in pixels and without --no-crop"
        )


def _point(xy: np.ndarray) -> str:
    return f"({xy[0]:.6g}, {xy[1]:.6g})"


def _fill(mask: np.ndarray, rings: list[np.ndarray]) -> None:
    """Set the pixels of ``mask`` whose centres lie in a polygon; rings within rings are holes (even-odd rule).

    Raises:
        ValueError: the outline winds about too much for a picture of this size.
    """
    shape = np.array([mask.shape[1], mask.shape[0]])
    low = np.clip(np.floor(np.min([ring.min(axis=0) for ring in rings], axis=0)), 0, shape).astype(int)
    high = np.clip(np.ceil(np.max([ring.max(axis=0) for ring in rings], axis=0)), 0, shape).astype(int)
    width, height = high - low
    if width <= 0 or height <= 0:
        return
    borders = np.zeros((height, width + 1), dtype=bool)
    for ring in rings:
        borders ^= _borders(ring - low, height, width)
    mask[low[1] : high[1], low[0] : high[0]] |= np.logical_xor.accumulate(borders[:, :-1], axis=1)


def _borders(ring: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bool [height, width + 1]: in each row, the first pixel centres behind an odd number of crossings of the ring."""
    start, end = ring, np.roll(ring, -1, axis=0)
    first = np.clip(np.ceil(np.minimum(start[:, 1], end[:, 1]) - 0.5), 0, height).astype(np.int64)
    last = np.clip(np.ceil(np.maximum(start[:, 1], end[:, 1]) - 0.5), 0, height).astype(np.int64)
    n_rows = last - first
    total = int(n_rows.sum())
    if total > _MAX_CROSSINGS:
        raise ValueError(f"an outline of {len(ring)} points crosses the rows of the thumbnail {total} times")
    edge = np.repeat(np.arange(len(ring)), n_rows)
    row = np.arange(total) - np.repeat(n_rows.cumsum() - n_rows, n_rows) + first[edge]
    slope = (end[edge, 0] - start[edge, 0]) / (end[edge, 1] - start[edge, 1])
    x = start[edge, 0] + (row + 0.5 - start[edge, 1]) * slope
    column = np.clip(np.ceil(x - 0.5), 0, width).astype(np.int64)
    counts = np.bincount(row * (width + 1) + column, minlength=height * (width + 1))
    return np.asarray(counts.reshape(height, width + 1) % 2 == 1)
