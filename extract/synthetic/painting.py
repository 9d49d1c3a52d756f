"""A synthetic slide painted: ground, normal tissue, lesions, stain."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from extract.synthetic.drawing import (
    GLASS,
    LOW_PX,
    PERIOD_PX,
    VARIANTS,
    Float,
    Image,
    Polygon,
    Rng,
    Window,
    fill_polygon,
    jittered_grid,
    put,
    smooth_noise,
    wobble,
)
from extract.synthetic.textures import Bank, Patch


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
    start_y, start_x = rng.integers(PERIOD_PX, size=2)
    return np.roll(texture[::step_y, ::step_x], (start_y, start_x), axis=(0, 1))


def _rows(texture: Float, top: int, bottom: int, width: int) -> Float:
    """Rows top..bottom, `width` wide, of the plane that a periodic texture fills."""
    band = texture[np.arange(top, bottom) % PERIOD_PX]
    return np.concatenate([band] * (-(-width // PERIOD_PX)), axis=1)[:, :width]


def _strips(window: Window) -> Iterator[tuple[int, int]]:
    """Few rows at a time, so that the intermediate arrays stay in the processor's cache."""
    for top in range(window[0].start, window[0].stop, 64):
        yield top, min(top + 64, window[0].stop)


def _enlarge(low: Float, first: int, last: int) -> Float:
    """Rows first..last of a low-resolution map enlarged by `LOW_PX` along its first axis, linearly."""
    position = np.clip((np.arange(first, last, dtype=np.float32) + 0.5) / LOW_PX - 0.5, 0, len(low) - 1)
    before = position.astype(int)
    after = np.minimum(before + 1, len(low) - 1)
    enlarged: Float = low[before] + (position - before).astype(np.float32)[:, None] * (low[after] - low[before])
    return enlarged


def tissue_outline(rng: Rng, height: int, width: int) -> Float:
    """Tissue outline on the low-resolution grid: positive inside, about 0.1 a `LOW_PX` cell at the edge."""
    y, x = (np.linspace(-1, 1, n, dtype=np.float32) for n in (height, width))
    angle = np.arctan2(y[:, None], x[None, :])
    power = rng.uniform(2.0, 3.2)
    distance = (np.abs(y[:, None]) ** power + np.abs(x) ** power) ** (1 / power)
    reach = 0.83 * np.clip(wobble(rng, angle, 0.16), 0.72, 1.08)
    roughness = 0.03 * smooth_noise(rng, (height, width), (3, 3))
    outline: Float = ((reach - distance + roughness) * min(height, width) * 0.05).astype(np.float32)
    border = np.minimum.outer(
        np.minimum(np.arange(height), np.arange(height)[::-1]), np.minimum(np.arange(width), np.arange(width)[::-1])
    )
    return np.where(border < 2, -1, outline).astype(np.float32)


def _mix(rng: Rng, height: int, width: int) -> Float:
    """Share of each normal tissue [kinds, h, w] on the low-resolution grid; a slide holds few kinds, in regions."""
    share = rng.dirichlet(np.full(len(_NORMAL), 0.45)) + 1e-4
    field = np.stack([smooth_noise(rng, (height, width), (6.5, 6.5)) for _ in share])
    logits = (field + np.log(share)[:, None, None]) / 0.15
    weight = np.exp(logits - logits.max(axis=0))
    mix: Float = (weight / weight.sum(axis=0)).astype(np.float32)
    return mix


def _lay_ground(
    canvas: _Canvas, window: Window, tissue: _Tissue, weight: Callable[[int, int], Float], bank: Bank, rng: Rng
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


def _scatter(canvas: _Canvas, window: Window, tissue: _Tissue, inside: NDArray[np.bool_], bank: Bank, rng: Rng) -> None:
    """Draw nuclei and patches whose centre lies inside; `inside` covers the window at any resolution."""
    top, left = window[0].start, window[1].start
    height, width = window[0].stop - top, window[1].stop - left

    def places(spacing: float) -> Float:
        points = jittered_grid(rng, height, width, spacing)
        cells = (points * (inside.shape[0] / height, inside.shape[1] / width)).astype(int)
        kept = inside[cells[:, 0], cells[:, 1]] & (rng.random(len(points)) < 0.9)
        moved: Float = points[kept] + np.array([top, left], np.float32)
        return moved

    for kind, spacing in tissue.nuclei:
        layer = canvas.blood if kind == "erythrocyte" else canvas.nuclei
        points = places(spacing)
        for (y, x), choice in zip(points.tolist(), rng.integers(VARIANTS, size=len(points)).tolist(), strict=True):
            put(layer, bank.nuclei[kind][choice], y, x)
    if tissue.patches:
        for y, x in places(tissue.patch_px):
            _put_patch(
                canvas, bank.patches[tissue.patches][rng.integers(VARIANTS)], int(y), int(x), int(rng.integers(8))
            )


def _put_patch(canvas: _Canvas, patch: Patch, y: int, x: int, orientation: int) -> None:
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


def paint_normal(height: int, width: int, bank: Bank, rng: Rng) -> _Canvas:
    """A sheet of ordinary tissue [height, width] without outline or lesion."""
    canvas = _Canvas(*(np.zeros((height, width), np.float32) for _ in range(4)))
    mix = _mix(rng, -(-height // LOW_PX), -(-width // LOW_PX))
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
    return max(int(filled[0]) - 1, 0) * LOW_PX, min((int(filled[-1]) + 2) * LOW_PX, size_px)


def paint_lesion(canvas: _Canvas, polygon: Polygon, subtype: str, bank: Bank, rng: Rng) -> None:
    """Replace the tissue inside a polygon (x, y in level-0 px) by the subtype's lesion."""
    height, width = canvas.eosin.shape
    x0, y0 = np.maximum(np.floor(polygon.min(axis=0)).astype(int), 0)
    x1, y1 = np.minimum(np.ceil(polygon.max(axis=0)).astype(int), (width, height))
    window = (slice(int(y0), int(y1)), slice(int(x0), int(x1)))
    inside = fill_polygon(polygon - (x0, y0), y1 - y0, x1 - x0)
    weight = ndimage.gaussian_filter(inside.astype(np.float32), 2.0)
    for layer in (canvas.eosin, canvas.nuclei, canvas.blood, canvas.clear):
        layer[window] *= 1 - weight
    _lay_ground(canvas, window, _LESIONS[subtype], lambda a, b: weight[a - y0 : b - y0], bank, rng)
    _scatter(canvas, window, _LESIONS[subtype], inside, bank, rng)


def develop(canvas: _Canvas, outline_low: Float, stain: _Stain, bank: Bank, rng: Rng) -> Image:
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
            light = GLASS * np.exp(-(h * nuclei + e * eosin + b * blood))
            for axis in (light, light.T):
                axis[1:-1] += stain.blur * (axis[2:] + axis[:-2] - 2 * axis[1:-1])
            image[top:bottom, :, channel] = np.clip(light + noise, 0, 255)[top - first : bottom - first]
    return image


def draw_stain(patient_rng: Rng, rng: Rng) -> _Stain:
    """The laboratory and day (patient) and the single slide each move strength and hue of the stains."""
    colours = np.array([[0.96, 1.28, 0.54], [0.16, 0.78, 0.42], [0.22, 1.1, 0.92]])
    colours *= np.exp(0.16 * patient_rng.normal(size=(3, 1)) + 0.07 * patient_rng.normal(size=(3, 3)))
    colours *= np.exp(0.08 * rng.normal(size=(3, 1)) + 0.03 * rng.normal(size=(3, 3)))
    return _Stain(colours.astype(np.float32), float(rng.uniform(0.04, 0.2)), float(rng.uniform(1.5, 4)))


def place_lesions(tissue_low: NDArray[np.bool_], rng: Rng) -> list[Polygon]:
    """One or two disjoint outlines inside the tissue that cover 8 to 14 % of it, as (x, y) in level-0 px."""
    target_low = rng.uniform(0.08, 0.14) * tissue_low.sum()
    shares = [1.0] if rng.random() < 0.5 else [0.6, 0.4]
    free = tissue_low.copy()
    y, x = np.mgrid[: free.shape[0], : free.shape[1]]
    polygons = []
    for share in shares:
        angle = np.linspace(0, 2 * np.pi, 48, endpoint=False, dtype=np.float32)
        radius = wobble(rng, angle, 0.2)
        radius *= np.sqrt(share * target_low / (0.5 * np.sin(2 * np.pi / 48) * np.sum(radius * np.roll(radius, 1))))
        room = ndimage.distance_transform_edt(np.pad(free, 1))[1:-1, 1:-1]
        fits = np.argwhere(room >= min(float(radius.max()) + 1, 0.999 * room.max()))
        row, column = fits[rng.integers(len(fits))]
        points = np.stack([column + 0.5 + radius * np.cos(angle), row + 0.5 + radius * np.sin(angle)], axis=1)
        polygons.append(np.round(points.astype(np.float64) * LOW_PX, 1))
        free &= (x - column) ** 2 + (y - row) ** 2 > (float(radius.max()) + 2) ** 2
    return polygons
