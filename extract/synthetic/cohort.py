"""A seeded cohort of synthetic slides whose truth is known: every pixel is drawn by this file, none is a patient's.

Each slide is a patchwork of ordinary tissues (collagen, fat, benign glands, lymphocytes, blood ...) whose mix varies
strongly from slide to slide and has the same distribution in all four classes. The classes differ only by a lesion on
about a tenth of the tissue. So an average over the tiles is swamped by the mix, and a head that attends finds the
lesion. The lesion polygons are kept, so that attention can be scored against them.

Frames: `_l0` is level-0 pixels, x to the right, y down; `_low` is the same divided by `_LOW_PX`. Stain amounts are
optical densities (natural logarithm); colour appears only in `_develop`.
"""

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import tifffile
from numpy.typing import NDArray
from scipy import fft, ndimage, spatial

from extract.errors import ExtractError
from extract.slides.slide import SYNTHETIC_SOFTWARE

Float = NDArray[np.float32]
Image = NDArray[np.uint8]
Polygon = NDArray[np.float64]
Window = tuple[slice, slice]
Rng = np.random.Generator

SUBTYPES = ("Luminal A", "Luminal B", "HER2(+)", "triple-negative")
NOTICE = "SYNTHETIC: drawn by a program, not taken from any patient; of no diagnostic or scientific value."

_LOW_PX = 16  # level-0 pixels a side of one cell of the low-resolution maps
_PERIOD_PX = 1024  # the ground textures repeat after this many pixels
_GLASS = 244  # grey level of the light that passes where there is no tissue
_VARIANTS = 32  # drawings a kind of nucleus or gland, each shown in 8 orientations


class SyntheticError(ExtractError, ValueError):
    """A synthetic slide cannot be drawn or written as asked."""


@dataclass(frozen=True)
class SyntheticSlide:
    """One slide of the cohort and the truth about it."""

    slide_id: str
    patient_id: str
    subtype: str
    path: Path
    size_l0: tuple[int, int]
    mpp: float
    mpp_in_file: bool
    lesions_l0: tuple[tuple[tuple[float, float], ...], ...]
    lesion_fraction: float
    broken_tile_l0: tuple[int, int, int, int] | None


@dataclass(frozen=True)
class SyntheticCohort:
    """What `make_cohort` wrote: the slides and the paths of the tables beside them."""

    folder: Path
    seed: int
    slides: tuple[SyntheticSlide, ...]

    @property
    def slides_folder(self) -> Path:
        return self.folder / "slides"

    @property
    def labels_path(self) -> Path:
        return self.folder / "labels.csv"

    @property
    def slides_table_path(self) -> Path:
        return self.folder / "slides.csv"

    @property
    def lesions_path(self) -> Path:
        return self.folder / "lesions.json"


@dataclass(frozen=True)
class _Tissue:
    """How one tissue is drawn: a ground, scattered nuclei, and patches (glands, nests) on top.

    eosin and haze are optical densities of the ground; contrast scales its texture; nuclei are (kind, spacing in
    level-0 px) pairs; patches names a kind of drawing and patch_px its spacing.
    """

    eosin: float
    haze: float
    texture: str
    contrast: float
    nuclei: tuple[tuple[str, float], ...] = ()
    patches: str | None = None
    patch_px: float = 0.0


_NORMAL = {
    "collagen": _Tissue(0.62, 0.02, "fibres", 0.45, (("spindle", 44),)),
    "loose": _Tissue(0.26, 0.08, "wisps", 0.6, (("spindle", 52), ("lymphocyte", 110))),
    "muscle": _Tissue(0.85, 0.08, "bundles", 0.3, (("cigar", 34),)),
    "fat": _Tissue(0.5, 0.02, "fat", 0.2, (("spindle", 120),)),
    "lobule": _Tissue(0.36, 0.08, "wisps", 0.4, (("spindle", 46),), "acinus", 52),
    "duct": _Tissue(0.6, 0.03, "fibres", 0.4, (("spindle", 50),), "duct", 128),
    "lymphoid": _Tissue(0.22, 0.16, "wisps", 0.3, (("lymphocyte", 15),)),
    "blood": _Tissue(0.3, 0.0, "wisps", 0.4, (("erythrocyte", 11), ("lymphocyte", 90))),
    "apocrine": _Tissue(0.5, 0.02, "fibres", 0.3, (("spindle", 56),), "apocrine", 96),
    "granulation": _Tissue(0.4, 0.14, "wisps", 0.5, (("plump", 27), ("lymphocyte", 48))),
}

# all lesions lie in a bluish stroma and shrink away from it; they differ in their cells and how these are arranged
_LESIONS = {
    "Luminal A": _Tissue(0.33, 0.22, "wisps", 0.4, (("plump", 50),), "tubule", 64),
    "Luminal B": _Tissue(0.33, 0.22, "wisps", 0.4, (("plump", 50),), "nest", 72),
    "HER2(+)": _Tissue(0.33, 0.22, "wisps", 0.4, (("plump", 50),), "comb", 82),
    "triple-negative": _Tissue(0.33, 0.22, "wisps", 0.4, (("plump", 50),), "sheet", 102),
}


# ---------------------------------------------------------------- pyramids


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


def _break_tile(path: Path, x_l0: int, y_l0: int) -> tuple[int, int, int, int]:
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


# ---------------------------------------------------------------- drawings that all slides share


@dataclass(frozen=True)
class _Patch:
    """A gland or nest: [s, s] coverage, eosin, haematoxylin and empty lumen."""

    cover: Float
    eosin: Float
    nuclei: Float
    clear: Float


@dataclass(frozen=True)
class _Bank:
    """Drawings made once a cohort; slides differ by which they take, where, and in which orientation."""

    textures: dict[str, Float]
    nuclei: dict[str, list[Float]]
    patches: dict[str, list[_Patch]]


def _noise(rng: Rng, shape: tuple[int, int], sigma: tuple[float, float]) -> Float:
    """Periodic Gaussian noise [h, w] of unit variance, smoothed by sigma (y, x) px."""
    spectrum = fft.rfft2(rng.standard_normal(shape, np.float32))
    fy = np.exp(-2 * (np.pi * sigma[0] * np.fft.fftfreq(shape[0])) ** 2).astype(np.float32)
    fx = np.exp(-2 * (np.pi * sigma[1] * np.fft.rfftfreq(shape[1])) ** 2).astype(np.float32)
    smooth: Float = fft.irfft2(spectrum * fy[:, None] * fx, s=shape)
    smooth -= smooth.mean()
    smooth /= smooth.std()
    return smooth


def _fibres(rng: Rng, thickness: float, length: float, waviness: float) -> Float:
    """Wavy strands: noise drawn out along x, bent by a slow displacement; values in about -1..1."""
    side = (_PERIOD_PX, _PERIOD_PX)
    strands = _noise(rng, side, (thickness, length))
    bend_y, bend_x = (waviness * _noise(rng, side, (70, 70)) for _ in range(2))
    y, x = np.mgrid[: side[0], : side[1]].astype(np.float32)
    bent: Float = ndimage.map_coordinates(strands, [y + bend_y, x + bend_x], order=1, mode="grid-wrap")
    np.tanh(bent, out=bent)
    return bent


def _fat_cells(rng: Rng, spacing: float) -> Float:
    """Septa between fat cells: 1 on the thin walls, 0 in the empty cells."""
    half = _PERIOD_PX // 2
    count = int((_PERIOD_PX / spacing) ** 2)
    centres = rng.uniform(0, half, (count, 2))
    y, x = np.mgrid[:half, :half]
    points = np.stack([y.ravel(), x.ravel()], axis=1) + 0.5
    near, _ = spatial.cKDTree(centres, boxsize=half).query(points, k=2)
    gap = ((near[:, 1] - near[:, 0]).reshape(half, half) * 2).astype(np.float32)
    full = ndimage.zoom(gap, 2, order=1, mode="grid-wrap", grid_mode=True)
    septa: Float = np.clip(1.6 - full / 4.0, 0, 1).astype(np.float32)
    return septa


def _polar(side: int) -> tuple[Float, Float]:
    """Distance from the centre in px and angle, both [side, side]."""
    axis = np.arange(side, dtype=np.float32) - (side - 1) / 2
    return np.hypot(axis[:, None], axis), np.arctan2(axis[:, None], axis[None, :])


def _wobble(rng: Rng, angle: Float, strength: float) -> Float:
    """A closed outline's radius as a factor around 1: a few harmonics of the angle."""
    factor = np.ones_like(angle)
    for order in range(2, 7):
        factor += strength / order * rng.normal() * np.cos(order * angle + rng.uniform(0, 2 * np.pi))
    np.maximum(factor, 0.4, out=factor)
    return factor


def _nucleus(
    rng: Rng,
    length: float,
    width: float,
    density: float,
    rim: float = 0.3,
    chromatin: float = 0.2,
    nucleoli: int = 0,
    irregular: float = 0.06,
    spread: float = 0.1,
) -> Float:
    """One nucleus [s, s] as an optical density; length and width are diameters in px, spread their variation."""
    scale = float(np.exp(spread * rng.normal()))
    a, b = length * scale / 2, width * scale * float(np.exp(0.5 * spread * rng.normal())) / 2
    side = int(2 * max(a, b) * 1.3) + 5
    radius, angle = _polar(side)
    turned = angle + rng.uniform(0, 2 * np.pi)
    ellipse = radius * np.sqrt((np.cos(turned) / a) ** 2 + (np.sin(turned) / b) ** 2)
    depth = ellipse / _wobble(rng, turned, irregular * 3)
    inside = np.clip((1 - depth) * min(a, b) / 1.5 + 0.3, 0, 1)
    grain = ndimage.gaussian_filter(rng.standard_normal((side, side), np.float32), 1.2) * 3
    tone = 1 - rim / 2 + rim * np.exp(-(((depth - 0.85) / 0.2) ** 2)) + chromatin * grain
    for _ in range(nucleoli):
        y, x = rng.normal((side - 1) / 2, min(a, b) * 0.3, 2)
        axis = np.arange(side)
        tone += 1.1 * np.exp(-((axis[:, None] - y) ** 2 + (axis - x) ** 2) / (2 * (0.09 * length) ** 2))
    nucleus: Float = (density * inside * np.clip(tone, 0.1, 2)).astype(np.float32)
    return nucleus


def _nuclei_bank(rng: Rng) -> dict[str, list[Float]]:
    """Drawings of every kind of nucleus; sizes are for 0.5 µm/px."""
    kinds: dict[str, Callable[[], Float]] = {
        "spindle": lambda: _nucleus(rng, 30, 6, 0.85, spread=0.2),
        "cigar": lambda: _nucleus(rng, 40, 8, 0.75, rim=0.1, spread=0.15),
        "lymphocyte": lambda: _nucleus(rng, 12, 11.5, 1.25, rim=0.1),
        "plump": lambda: _nucleus(rng, 22, 12, 0.8, chromatin=0.25, spread=0.2),
        "erythrocyte": lambda: _nucleus(rng, 13, 12, 0.6, rim=0.5, chromatin=0.05),
        "benign": lambda: _nucleus(rng, 15, 12, 0.95),
        "uniform": lambda: _nucleus(rng, 17, 15, 0.9, spread=0.06),
        "crowded": lambda: _nucleus(rng, 21, 17, 1.15, rim=0.5, chromatin=0.3, irregular=0.08, spread=0.15),
        "vesicular": lambda: _nucleus(rng, 25, 23, 0.7, rim=0.8, nucleoli=1, spread=0.12),
        "giant": lambda: _nucleus(rng, 38, 29, 0.9, 0.8, 0.4, int(rng.integers(1, 4)), 0.08, 0.3),
        "debris": lambda: _nucleus(rng, 6, 5, 1.5, spread=0.35),
        "mitosis": lambda: _nucleus(rng, 20, 8, 1.7, rim=0.0, chromatin=0.5, irregular=0.3),
    }
    return {kind: [draw() for _ in range(_VARIANTS)] for kind, draw in kinds.items()}


def _put(canvas: Float, stamp: Float, y: float, x: float) -> None:
    """Draw a nucleus, cut at the canvas's edge; it hides what lies under it, so that crowded ones show."""
    top, left = int(y) - stamp.shape[0] // 2, int(x) - stamp.shape[1] // 2
    y0, x0 = max(top, 0), max(left, 0)
    target = canvas[y0 : top + stamp.shape[0], x0 : left + stamp.shape[1]]
    if target.size:
        part = stamp[y0 - top :, x0 - left :][: target.shape[0], : target.shape[1]]
        np.maximum(target, part, out=target)
        np.copyto(target, part, where=part > 0.3)


def _lobes(rng: Rng, depth: Float, angle: Float, radius: float, cleft: float) -> tuple[Float, Float]:
    """Coverage of a patch with its cleft, and of its body alone; the cleft is a crescent, widest on a random side."""
    width = cleft * (0.5 + 0.5 * np.cos(angle - rng.uniform(0, 2 * np.pi)))
    cover, inside = (np.clip((edge - depth) * radius / 2 + 0.5, 0, 1) for edge in (1 + width, 1))
    return cover.astype(np.float32), inside.astype(np.float32)


def _gland(
    rng: Rng,
    nuclei: dict[str, list[Float]],
    radius: float,
    lumen: float,
    rings: Sequence[tuple[str, float, float]],
    eosin: float,
    secretion: float = 0.0,
    cleft: float = 0.0,
) -> _Patch:
    """A tube cut across: epithelium around a lumen, with rings of nuclei.

    radius is in px, lumen and the rings' (kind, radius, spacing px) radii are fractions of it; secretion is the
    optical density of what the lumen holds; cleft, a fraction of the radius, is the width of the empty crescent beside.
    """
    radius *= float(np.exp(0.15 * rng.normal()))
    side = int(2.8 * radius) + 8
    distance, angle = _polar(side)
    stretch = 1 + rng.uniform(0, 0.35) * np.cos(angle - rng.uniform(0, np.pi)) ** 2
    depth = distance / (radius * _wobble(rng, angle, 0.12)) * stretch
    cover, inside = _lobes(rng, depth, angle, radius, cleft)
    open_ = np.clip((lumen - depth) * radius / 2 + 0.5, 0, 1)
    stain = np.zeros((side, side), np.float32)
    for kind, where, spacing in rings:
        around = max(3, int(2 * np.pi * where * radius / spacing))
        for turn in 2 * np.pi * (np.arange(around) + rng.uniform(-0.3, 0.3, around)) / around:
            row, column = int(side / 2 + radius * np.sin(turn)), int(side / 2 + radius * np.cos(turn))
            reach = where * distance[row, column] / max(depth[row, column], 1e-3) * rng.normal(1, 0.04)
            stamp = nuclei[kind][rng.integers(_VARIANTS)]
            _put(stain, stamp, side / 2 + reach * np.sin(turn), side / 2 + reach * np.cos(turn))
    body = eosin * (1 - open_) + secretion * open_
    clear = 1 - inside + open_ * (secretion == 0)
    return _Patch(*(layer.astype(np.float32) for layer in (cover, body, stain * (1 - open_) * inside, clear)))


def _nest(
    rng: Rng,
    nuclei: dict[str, list[Float]],
    radius: float,
    kind: str,
    cell_px: float,
    eosin: float,
    membrane: float = 0.0,
    mitoses: float = 0.0,
    haze: float = 0.12,
    cleft: float = 0.16,
) -> _Patch:
    """A solid nest of cells with an empty cleft on one side.

    membrane is the optical density of the lines between neighbouring cells, mitoses the share of dividing cells, haze
    the haematoxylin of the cytoplasm, cleft a fraction of the radius.
    """
    radius *= float(np.exp(0.15 * rng.normal()))
    side = int(3.0 * radius) + 8
    distance, angle = _polar(side)
    stretch = 1 + rng.uniform(0, 0.6) * np.cos(angle - rng.uniform(0, np.pi)) ** 2
    depth = distance / (radius * _wobble(rng, angle, 0.15)) * stretch
    cover, inside = _lobes(rng, depth, angle, radius, cleft)
    centres = _jittered_grid(rng, side, side, cell_px, jitter=0.16)
    body = np.full((side, side), eosin)
    if membrane:
        y, x = np.mgrid[:side, :side]
        near, _ = spatial.cKDTree(centres).query(np.stack([y.ravel(), x.ravel()], axis=1), k=2)
        gap = (near[:, 1] - near[:, 0]).reshape(side, side)
        body += membrane * np.exp(-((gap / 3.2) ** 2))
    stain = np.zeros((side, side), np.float32)
    for y_px, x_px in centres:
        if depth[int(y_px), int(x_px)] < 1 - cell_px / 5 / radius:
            chosen = "mitosis" if rng.random() < mitoses else kind
            _put(stain, nuclei[chosen][rng.integers(_VARIANTS)], y_px, x_px)
    layers = (cover, body, np.maximum(stain, haze) * inside, 1 - inside)
    return _Patch(*(layer.astype(np.float32) for layer in layers))


def _patch_bank(rng: Rng, nuclei: dict[str, list[Float]]) -> dict[str, list[_Patch]]:
    """Drawings of every kind of gland and nest: the benign ones first, then those of the lesions."""
    kinds: dict[str, Callable[[], _Patch]] = {
        "acinus": lambda: _gland(rng, nuclei, 23, 0.22, (("benign", 0.62, 12), ("benign", 0.95, 20)), 0.4, 0.15),
        "duct": lambda: _gland(rng, nuclei, 50, 0.55, (("benign", 0.72, 12), ("benign", 0.95, 17)), 0.42, 0.1),
        "apocrine": lambda: _gland(rng, nuclei, 42, 0.3, (("benign", 0.8, 22),), 1.0, 0.2),
        "tubule": lambda: _gland(rng, nuclei, 30, 0.5, (("uniform", 0.76, 15),), 0.5, cleft=0.2),
        "nest": lambda: _nest(rng, nuclei, 38, "crowded", 20, 0.4, mitoses=0.06),
        "comb": lambda: _nest(rng, nuclei, 48, "vesicular", 35, 0.5, membrane=1.3, haze=0.04),
        "sheet": lambda: _nest(rng, nuclei, 60, "giant", 32, 0.35, mitoses=0.06, haze=0.2),
    }
    return {kind: [draw() for _ in range(_VARIANTS)] for kind, draw in kinds.items()}


def _make_bank(seed: int) -> _Bank:
    rng = np.random.default_rng([seed, 0])
    textures = {
        "fibres": _fibres(rng, 3.0, 60, 26),
        "wisps": _fibres(rng, 2.0, 14, 30),
        "bundles": _fibres(rng, 5.0, 120, 12),
        "fat": _fat_cells(rng, 92),
        "grain": _noise(rng, (_PERIOD_PX, _PERIOD_PX), (0.6, 0.6)),
        "cloud": _noise(rng, (_PERIOD_PX, _PERIOD_PX), (6, 6)),
    }
    nuclei = _nuclei_bank(rng)
    return _Bank(textures, nuclei, _patch_bank(rng, nuclei))


# ---------------------------------------------------------------- one slide


@dataclass(frozen=True)
class _Canvas:
    """The stains of one slide, each [h, w]: optical densities, and clear = 1 where there is no tissue."""

    eosin: Float
    nuclei: Float
    blood: Float
    clear: Float


@dataclass(frozen=True)
class _Stain:
    """Look of one slide: each stain's optical density in R, G, B [3, 3], blur weight and sensor noise (grey levels)."""

    colours: Float
    blur: float
    noise: float


def _turn(texture: Float, rng: Rng) -> Float:
    """The periodic texture in a random orientation, moved at random."""
    if rng.random() < 0.5:
        texture = texture.T
    step_y, step_x = rng.choice([-1, 1], 2)
    start_y, start_x = rng.integers(_PERIOD_PX, size=2)
    return np.roll(texture[::step_y, ::step_x], (start_y, start_x), axis=(0, 1))


def _rows(texture: Float, top: int, bottom: int, width: int) -> Float:
    """Rows top..bottom, `width` wide, of the plane that a periodic texture fills."""
    band = texture[np.arange(top, bottom) % _PERIOD_PX]
    return np.concatenate([band] * (-(-width // _PERIOD_PX)), axis=1)[:, :width]


def _strips(window: Window) -> Iterator[tuple[int, int]]:
    """Few rows at a time, so that the intermediate arrays stay in the processor's cache."""
    for top in range(window[0].start, window[0].stop, 64):
        yield top, min(top + 64, window[0].stop)


def _enlarge(low: Float, first: int, last: int) -> Float:
    """Rows first..last of a low-resolution map enlarged by `_LOW_PX` along its first axis, linearly."""
    position = np.clip((np.arange(first, last, dtype=np.float32) + 0.5) / _LOW_PX - 0.5, 0, len(low) - 1)
    before = position.astype(int)
    after = np.minimum(before + 1, len(low) - 1)
    enlarged: Float = low[before] + (position - before).astype(np.float32)[:, None] * (low[after] - low[before])
    return enlarged


def _outline(rng: Rng, height: int, width: int) -> Float:
    """Tissue outline on the low-resolution grid: positive inside, about 0.1 a `_LOW_PX` cell at the edge."""
    y, x = (np.linspace(-1, 1, n, dtype=np.float32) for n in (height, width))
    angle = np.arctan2(y[:, None], x[None, :])
    power = rng.uniform(2.0, 3.2)
    distance = (np.abs(y[:, None]) ** power + np.abs(x) ** power) ** (1 / power)
    reach = 0.83 * np.clip(_wobble(rng, angle, 0.16), 0.72, 1.08)
    roughness = 0.03 * _noise(rng, (height, width), (3, 3))
    outline: Float = ((reach - distance + roughness) * min(height, width) * 0.05).astype(np.float32)
    border = np.minimum.outer(
        np.minimum(np.arange(height), np.arange(height)[::-1]), np.minimum(np.arange(width), np.arange(width)[::-1])
    )
    return np.where(border < 2, -1, outline).astype(np.float32)


def _mix(rng: Rng, height: int, width: int) -> Float:
    """Share of each normal tissue [kinds, h, w] on the low-resolution grid; a slide holds few kinds, in regions."""
    share = rng.dirichlet(np.full(len(_NORMAL), 0.45)) + 1e-4
    field = np.stack([_noise(rng, (height, width), (6.5, 6.5)) for _ in share])
    logits = (field + np.log(share)[:, None, None]) / 0.15
    weight = np.exp(logits - logits.max(axis=0))
    mix: Float = (weight / weight.sum(axis=0)).astype(np.float32)
    return mix


def _jittered_grid(rng: Rng, height: int, width: int, spacing: float, jitter: float = 0.24) -> Float:
    """Points (y, x) about `spacing` px apart: a triangular grid, each point moved at random, in row-major order."""
    rows, columns = int(height / (spacing * 0.87)) + 1, int(width / spacing) + 1
    y, x = np.mgrid[:rows, :columns].astype(np.float32)
    x += 0.5 * (y % 2)
    points = np.stack([y * 0.87, x], axis=-1).reshape(-1, 2) * spacing
    points += rng.normal(0, jitter * spacing, points.shape)
    inside = (points >= 0).all(axis=1) & (points < (height, width)).all(axis=1)
    kept: Float = points[inside].astype(np.float32)
    return kept


def _lay_ground(
    canvas: _Canvas, window: Window, tissue: _Tissue, weight: Callable[[int, int], Float], bank: _Bank, rng: Rng
) -> None:
    """Add one tissue's ground to the window; weight(top, bottom) is its share of the window's pixels in those rows."""
    texture = _turn(bank.textures[tissue.texture], rng)
    columns = window[1]
    eosin, contrast, haze = (np.float32(n) for n in (tissue.eosin, tissue.contrast * tissue.eosin, tissue.haze))
    for top, bottom in _strips(window):
        share = weight(top, bottom)
        drawn = _rows(texture, top, bottom, columns.stop - columns.start)
        if tissue.texture == "fat":
            canvas.clear[top:bottom, columns] += share * (1 - drawn)
            canvas.eosin[top:bottom, columns] += eosin * share
        else:
            canvas.eosin[top:bottom, columns] += share * (eosin + contrast * drawn)
        canvas.nuclei[top:bottom, columns] += haze * share


def _scatter(
    canvas: _Canvas, window: Window, tissue: _Tissue, inside: NDArray[np.bool_], bank: _Bank, rng: Rng
) -> None:
    """Draw nuclei and patches whose centre lies inside; `inside` covers the window at any resolution."""
    top, left = window[0].start, window[1].start
    height, width = window[0].stop - top, window[1].stop - left

    def places(spacing: float) -> Float:
        points = _jittered_grid(rng, height, width, spacing)
        cells = (points * (inside.shape[0] / height, inside.shape[1] / width)).astype(int)
        kept = inside[cells[:, 0], cells[:, 1]] & (rng.random(len(points)) < 0.9)
        moved: Float = points[kept] + np.array([top, left], np.float32)
        return moved

    for kind, spacing in tissue.nuclei:
        layer = canvas.blood if kind == "erythrocyte" else canvas.nuclei
        points = places(spacing)
        for (y, x), choice in zip(points.tolist(), rng.integers(_VARIANTS, size=len(points)).tolist(), strict=True):
            _put(layer, bank.nuclei[kind][choice], y, x)
    if tissue.patches:
        for y, x in places(tissue.patch_px):
            _put_patch(
                canvas, bank.patches[tissue.patches][rng.integers(_VARIANTS)], int(y), int(x), int(rng.integers(8))
            )


def _put_patch(canvas: _Canvas, patch: _Patch, y: int, x: int, orientation: int) -> None:
    """Replace what lies under a patch; patches that would cross the canvas's edge are left out."""

    def turned(layer: Float) -> Float:
        return np.rot90(layer[:, ::-1] if orientation & 4 else layer, orientation & 3)

    side = patch.cover.shape[0]
    top, left = y - side // 2, x - side // 2
    if top < 0 or left < 0 or top + side > canvas.eosin.shape[0] or left + side > canvas.eosin.shape[1]:
        return
    window = (slice(top, top + side), slice(left, left + side))
    cover = turned(patch.cover)
    for layer, drawing in ((canvas.eosin, patch.eosin), (canvas.nuclei, patch.nuclei), (canvas.clear, patch.clear)):
        layer[window] += cover * (turned(drawing) - layer[window])
    canvas.blood[window] *= 1 - cover


def _paint_normal(height: int, width: int, bank: _Bank, rng: Rng) -> _Canvas:
    """A sheet of ordinary tissue [height, width] without outline or lesion."""
    canvas = _Canvas(*(np.zeros((height, width), np.float32) for _ in range(4)))
    mix = _mix(rng, -(-height // _LOW_PX), -(-width // _LOW_PX))
    present = [(tissue, low) for tissue, low in zip(_NORMAL.values(), mix, strict=True) if low.max() > 0.05]
    for tissue, low in present:
        # most tissues fill a part of the slide only
        top, bottom = _extent(low.max(axis=1), height)
        left, right = _extent(low.max(axis=0), width)
        wide = np.ascontiguousarray(_enlarge(low.T, left, right).T)
        window = (slice(top, bottom), slice(left, right))
        _lay_ground(canvas, window, tissue, partial(_enlarge, wide), bank, rng)
    # every ground comes before any drawing: a ground is added, a drawing replaces what is there
    for tissue, low in present:
        _scatter(canvas, (slice(0, height), slice(0, width)), tissue, low > 0.5, bank, rng)
    return canvas


def _extent(share_low: Float, size_px: int) -> tuple[int, int]:
    """First and last level-0 px, with a margin for the interpolation, where a low-resolution profile is not zero."""
    filled = np.flatnonzero(share_low > 1e-3)
    return max(int(filled[0]) - 1, 0) * _LOW_PX, min((int(filled[-1]) + 2) * _LOW_PX, size_px)


def _paint_lesion(canvas: _Canvas, polygon: Polygon, subtype: str, bank: _Bank, rng: Rng) -> None:
    """Replace the tissue inside a polygon (x, y in level-0 px) by the subtype's lesion."""
    height, width = canvas.eosin.shape
    x0, y0 = np.maximum(np.floor(polygon.min(axis=0)).astype(int), 0)
    x1, y1 = np.minimum(np.ceil(polygon.max(axis=0)).astype(int), (width, height))
    window = (slice(int(y0), int(y1)), slice(int(x0), int(x1)))
    inside = _filled(polygon - (x0, y0), y1 - y0, x1 - x0)
    weight = ndimage.gaussian_filter(inside.astype(np.float32), 2.0)
    for layer in (canvas.eosin, canvas.nuclei, canvas.blood, canvas.clear):
        layer[window] *= 1 - weight
    _lay_ground(canvas, window, _LESIONS[subtype], lambda a, b: weight[a - y0 : b - y0], bank, rng)
    _scatter(canvas, window, _LESIONS[subtype], inside, bank, rng)


def _filled(polygon: Polygon, height: int, width: int) -> NDArray[np.bool_]:
    """Mask [height, width] of the pixels whose centre lies inside a polygon, by the even-odd rule."""
    crossings = np.zeros((height, width + 1), np.int32)
    rows = np.arange(height) + 0.5
    for (xa, ya), (xb, yb) in pairwise([*polygon, polygon[0]]):
        crossed = np.flatnonzero((rows >= min(ya, yb)) & (rows < max(ya, yb)))
        if len(crossed):
            x = xa + (rows[crossed] - ya) * (xb - xa) / (yb - ya)
            crossings[crossed, np.clip(np.ceil(x - 0.5), 0, width).astype(int)] += 1
    inside: NDArray[np.bool_] = np.cumsum(crossings[:, :width], axis=1) % 2 == 1
    return inside


def _develop(canvas: _Canvas, outline_low: Float, stain: _Stain, bank: _Bank, rng: Rng) -> Image:
    """Stains to colour [h, w, 3] by the law of Beer and Lambert, then blur and noise; outside the outline is glass."""
    height, width = canvas.eosin.shape
    uneven, grain = (_turn(bank.textures[name], rng) for name in ("cloud", "grain"))
    wide = np.ascontiguousarray(_enlarge(outline_low.T, 0, width).T)
    image = np.empty((height, width, 3), np.uint8)
    for top, bottom in _strips((slice(0, height), slice(0, width))):
        first, last = max(top - 1, 0), min(bottom + 1, height)  # one row more on each side for the blur
        rows = slice(first, last)
        cloud = _rows(uneven, first, last, width)
        present = np.clip(12 * _enlarge(wide, first, last) + 0.7 * cloud + 0.5, 0, 1)
        present *= np.clip(1 - canvas.clear[rows], 0, 1) * (1 + 0.05 * cloud)
        eosin = canvas.eosin[rows] * (1 - 0.55 * np.minimum(canvas.nuclei[rows], 1)) * present
        nuclei, blood = canvas.nuclei[rows] * present, canvas.blood[rows] * present
        noise = stain.noise * _rows(grain, first, last, width)
        for channel, (h, e, b) in enumerate(stain.colours.T.tolist()):
            light = _GLASS * np.exp(-(h * nuclei + e * eosin + b * blood))
            for axis in (light, light.T):
                axis[1:-1] += stain.blur * (axis[2:] + axis[:-2] - 2 * axis[1:-1])
            image[top:bottom, :, channel] = np.clip(light + noise, 0, 255)[top - first : bottom - first]
    return image


def _draw_stain(patient_rng: Rng, rng: Rng) -> _Stain:
    """The laboratory and day (patient) and the single slide each move strength and hue of the stains."""
    colours = np.array([[0.96, 1.28, 0.54], [0.16, 0.78, 0.42], [0.22, 1.1, 0.92]])
    colours *= np.exp(0.16 * patient_rng.normal(size=(3, 1)) + 0.07 * patient_rng.normal(size=(3, 3)))
    colours *= np.exp(0.08 * rng.normal(size=(3, 1)) + 0.03 * rng.normal(size=(3, 3)))
    return _Stain(colours.astype(np.float32), float(rng.uniform(0.04, 0.2)), float(rng.uniform(1.5, 4)))


# ---------------------------------------------------------------- lesions


def _place_lesions(tissue_low: NDArray[np.bool_], rng: Rng) -> list[Polygon]:
    """One or two disjoint outlines inside the tissue that cover 8 to 14 % of it, as (x, y) in level-0 px."""
    target_low = rng.uniform(0.08, 0.14) * tissue_low.sum()
    shares = [1.0] if rng.random() < 0.5 else [0.6, 0.4]
    free = tissue_low.copy()
    y, x = np.mgrid[: free.shape[0], : free.shape[1]]
    polygons = []
    for share in shares:
        angle = np.linspace(0, 2 * np.pi, 48, endpoint=False, dtype=np.float32)
        radius = _wobble(rng, angle, 0.2)
        radius *= np.sqrt(share * target_low / (0.5 * np.sin(2 * np.pi / 48) * np.sum(radius * np.roll(radius, 1))))
        room = ndimage.distance_transform_edt(np.pad(free, 1))[1:-1, 1:-1]
        fits = np.argwhere(room >= min(float(radius.max()) + 1, 0.999 * room.max()))
        row, column = fits[rng.integers(len(fits))]
        points = np.stack([column + 0.5 + radius * np.cos(angle), row + 0.5 + radius * np.sin(angle)], axis=1)
        polygons.append(np.round(points.astype(np.float64) * _LOW_PX, 1))
        free &= (x - column) ** 2 + (y - row) ** 2 > (float(radius.max()) + 2) ** 2
    return polygons


def lesion_tiles(
    lesions: dict[str, list[Polygon]], slide_id: str, coords: NDArray[np.integer], tile_l0: float
) -> Float:
    """Fraction of each tile that lesions cover, by exact area.

    Args:
        lesions: As `read_lesions` gives them.
        coords: [n, 2] top-left corners (x, y) in level-0 px.
        tile_l0: Side of a tile in level-0 px.

    Returns:
        float32 [n] in 0..1.

    Raises:
        SyntheticError: The cohort has no such slide.
    """
    if slide_id not in lesions:
        raise SyntheticError(
            f"got slide {slide_id!r} → expected one of the {len(lesions)} slides of lesions.json → check the slide id"
        )
    area = np.zeros(len(coords), np.float64)
    for polygon in lesions[slide_id]:
        low, high = polygon.min(axis=0), polygon.max(axis=0)
        touching = ((coords + tile_l0 > low) & (coords < high)).all(axis=1)
        for index in np.flatnonzero(touching):
            area[index] += _area_within(polygon, coords[index].astype(np.float64), tile_l0)
    return np.minimum(area / tile_l0**2, 1).astype(np.float32)


def _area_within(polygon: Polygon, corner: NDArray[np.float64], side: float) -> float:
    """Area of a polygon inside a square: Sutherland-Hodgman clipping, then the shoelace formula."""
    points = polygon - corner
    for axis in (0, 1):
        for sign, bound in ((1.0, 0.0), (-1.0, -side)):
            inner = sign * points[:, axis] - bound
            clipped = []
            for here, after in pairwise([*range(len(points)), 0]):
                if inner[here] >= 0:
                    clipped.append(points[here])
                if (inner[here] >= 0) != (inner[after] >= 0):
                    step = inner[here] / (inner[here] - inner[after])
                    clipped.append(points[here] + step * (points[after] - points[here]))
            if not clipped:
                return 0.0
            points = np.array(clipped)
    x, y = points.T
    return float(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2)


def read_lesions(path: str | Path) -> dict[str, list[Polygon]]:
    """The polygons [k, 2] (x, y in level-0 px) of each slide in a `lesions.json`."""
    slides = json.loads(Path(path).read_text(encoding="utf-8"))["slides"]
    return {name: [np.array(polygon) for polygon in slide["polygons_l0"]] for name, slide in slides.items()}


# ---------------------------------------------------------------- the cohort


@dataclass(frozen=True)
class _Plan:
    """What is decided about a slide before it is drawn."""

    index: int
    patient: int
    subtype: str
    path: Path
    size_l0: tuple[int, int]
    mpp: float
    mpp_in_file: bool
    broken: bool


def make_cohort(
    folder: str | Path,
    seed: int = 0,
    patients_per_class: int = 8,
    slides_per_patient: int = 2,
    size_l0: tuple[int, int] = (1792, 1344),
    mpp: float = 0.5,
    mpp_missing_every: int = 8,
    broken_tile: bool = True,
    workers: int = 2,
) -> SyntheticCohort:
    """Write a cohort: `slides/*.tif`, `labels.csv`, `slides.csv`, `lesions.json` and `README.txt`.

    The same arguments give the same bytes, whatever the number of workers.

    Args:
        size_l0: (width, height) of every slide; about 60 % of it is tissue.
        mpp: µm per level-0 px of every slide. The drawings have their natural size at 0.5.
        mpp_missing_every: Every n-th slide lacks the mpp in its file and has it in `slides.csv`; 0 for none.
        broken_tile: Make one level-0 tile of one slide, on tissue and clear of lesions, undecodable.
        workers: Threads.

    Raises:
        SyntheticError: A count is below one, or the slides are too small to hold a lesion.
    """
    if min(patients_per_class, slides_per_patient, workers) < 1 or min(size_l0) < 384:
        raise SyntheticError(
            f"got patients_per_class={patients_per_class}, slides_per_patient={slides_per_patient}, workers={workers}, "
            f"size_l0={size_l0} → expected counts of at least 1 and sides of at least 384 px → raise them"
        )
    folder = Path(folder)
    (folder / "slides").mkdir(parents=True, exist_ok=True)
    patients = np.random.default_rng([seed, 1]).permutation(np.repeat(SUBTYPES, patients_per_class)).tolist()
    subtypes = [subtype for subtype in patients for _ in range(slides_per_patient)]
    has_mpp = [not mpp_missing_every or (i + 1) % mpp_missing_every > 0 for i in range(len(subtypes))]
    broken = len(subtypes) // 2 if broken_tile else -1
    plans = []
    for i, subtype in enumerate(subtypes):
        patient, number = divmod(i, slides_per_patient)
        path = folder / "slides" / f"SYN-{patient + 1:03d}-{number + 1}.tif"
        plans.append(_Plan(i, patient, subtype, path, size_l0, mpp, has_mpp[i], i == broken))
    bank = _make_bank(seed)
    with ThreadPoolExecutor(workers) as pool:
        slides = tuple(pool.map(lambda plan: _make_slide(plan, seed, bank), plans))
    cohort = SyntheticCohort(folder, seed, slides)
    _write_tables(cohort)
    return cohort


def _make_slide(plan: _Plan, seed: int, bank: _Bank) -> SyntheticSlide:
    # separate streams: what is normal on a slide does not depend on its class
    patient_rng = np.random.default_rng([seed, 2, plan.patient])
    rng = np.random.default_rng([seed, 3, plan.index])
    lesion_rng = np.random.default_rng([seed, 4, plan.index])
    width, height = plan.size_l0
    outline_low = _outline(rng, -(-height // _LOW_PX), -(-width // _LOW_PX))
    stain = _draw_stain(patient_rng, rng)
    canvas = _paint_normal(height, width, bank, rng)
    polygons = _place_lesions(outline_low > 0, lesion_rng)
    for polygon in polygons:
        _paint_lesion(canvas, polygon, plan.subtype, bank, lesion_rng)
    image = _develop(canvas, outline_low, stain, bank, rng)
    write_pyramid(plan.path, image, plan.mpp if plan.mpp_in_file else None)
    broken = _break_tile(plan.path, *_pick_tile(outline_low, polygons)) if plan.broken else None
    cells = sum(_area_within(polygon, np.zeros(2), float(max(plan.size_l0))) for polygon in polygons) / _LOW_PX**2
    return SyntheticSlide(
        slide_id=plan.path.stem,
        patient_id=f"SYN-{plan.patient + 1:03d}",
        subtype=plan.subtype,
        path=plan.path,
        size_l0=plan.size_l0,
        mpp=plan.mpp,
        mpp_in_file=plan.mpp_in_file,
        lesions_l0=tuple(tuple((x, y) for x, y in polygon.tolist()) for polygon in polygons),
        lesion_fraction=round(float(cells / (outline_low > 0).sum()), 4),
        broken_tile_l0=broken,
    )


def _pick_tile(outline_low: Float, polygons: list[Polygon], tile_px: int = 256) -> tuple[int, int]:
    """Corner of the TIFF tile with the most tissue among those that touch no lesion, or the least of it."""
    step = tile_px // _LOW_PX
    height, width = outline_low.shape
    corners = np.array([(x, y) for y in range(0, height, step) for x in range(0, width, step)])
    tissue = np.array([(outline_low[y : y + step, x : x + step] > 0).sum() / step**2 for x, y in corners])
    lesion = lesion_tiles({"": polygons}, "", corners * _LOW_PX, tile_px)
    x, y = corners[np.argmax(tissue - 2 * lesion)] * _LOW_PX
    return int(x), int(y)


def _write_tables(cohort: SyntheticCohort) -> None:
    with cohort.labels_path.open("w", newline="", encoding="utf-8") as file:
        labels = csv.writer(file, lineterminator="\n")
        labels.writerow(["slide_id", "patient_id", "subtype"])
        labels.writerows([slide.slide_id, slide.patient_id, slide.subtype] for slide in cohort.slides)
    with cohort.slides_table_path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["path", "slide_id", "mpp"])
        for slide in cohort.slides:
            mpp = "" if slide.mpp_in_file else slide.mpp
            table.writerow([slide.path.relative_to(cohort.folder).as_posix(), slide.slide_id, mpp])
    truth = {
        "notice": NOTICE,
        "frame": "level-0 pixels, (x, y), x to the right, y down, origin at the top left of the slide",
        "seed": cohort.seed,
        "slides": {
            slide.slide_id: {
                "subtype": slide.subtype,
                "size_l0": slide.size_l0,
                "mpp": slide.mpp,
                "lesion_fraction_of_tissue": slide.lesion_fraction,
                "broken_tile_l0": slide.broken_tile_l0,
                "polygons_l0": slide.lesions_l0,
            }
            for slide in cohort.slides
        },
    }
    cohort.lesions_path.write_text(json.dumps(truth, indent=1) + "\n", encoding="utf-8")
    (cohort.folder / "README.txt").write_text(_readme(cohort), encoding="utf-8")


def _readme(cohort: SyntheticCohort) -> str:
    return f"""{NOTICE}

These {len(cohort.slides)} slides, the patients and the labels are invented (seed {cohort.seed}).
The class names are those of breast cancer subtypes so that the example reads like
a real one; the drawings teach nothing about the disease.

slides/        pyramidal TIFF files; some carry no micrometres per pixel, and one has a tile that cannot be decoded
labels.csv     slide_id, patient_id, subtype
slides.csv     path (relative to this folder), slide_id, mpp for the slides whose file has none
lesions.json   the true lesion outlines in level-0 pixels, and the broken tile
"""


def make_large_slide(
    path: str | Path, size_px: int = 8000, seed: int = 0, mpp: float = 0.5, block_px: int = 2000
) -> None:
    """Write one square slide, nearly all tissue, for benchmarks.

    Mirrored copies of one drawn block of block_px fill it, so that drawing takes no longer than for a small slide.

    Raises:
        SyntheticError: The block is below 384 px or larger than the slide.
    """
    if not 384 <= block_px <= size_px:
        raise SyntheticError(
            f"got size_px={size_px}, block_px={block_px} → expected 384 <= block_px <= size_px → change either"
        )
    rng = np.random.default_rng([seed, 5])
    bank = _make_bank(seed)
    canvas = _paint_normal(block_px, block_px, bank, rng)
    block = _develop(canvas, np.ones((1, 1), np.float32), _draw_stain(rng, rng), bank, rng)
    # reflected at each seam, so that none is seen
    position = np.arange(size_px) % (2 * block_px)
    position = np.minimum(position, 2 * block_px - 1 - position)
    image = block[position][:, position]
    margin = size_px // 40
    for glass in (image[:margin], image[-margin:], image[:, :margin], image[:, -margin:]):
        glass[:] = _GLASS
    write_pyramid(path, image, mpp, levels=4)
