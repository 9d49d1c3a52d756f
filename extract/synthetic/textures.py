"""Patches of tissue that are stamped many times: fibres, fat, nuclei, glands, nests."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage, spatial

from extract.synthetic.drawing import PERIOD_PX, VARIANTS, Float, Rng, jittered_grid, polar, put, smooth_noise, wobble


@dataclass(frozen=True)
class Patch:
    """A gland or nest: [s, s] coverage, eosin, haematoxylin and empty lumen."""

    cover: Float
    eosin: Float
    nuclei: Float
    clear: Float


@dataclass(frozen=True)
class Bank:
    """Drawings made once a cohort; slides differ by which they take, where, and in which orientation."""

    textures: dict[str, Float]
    nuclei: dict[str, list[Float]]
    patches: dict[str, list[Patch]]


def _fibres(rng: Rng, thickness: float, length: float, waviness: float) -> Float:
    """Wavy strands: noise drawn out along x, bent by a slow displacement; values in about -1..1."""
    side = (PERIOD_PX, PERIOD_PX)
    strands = smooth_noise(rng, side, (thickness, length))
    bend_y, bend_x = (waviness * smooth_noise(rng, side, (70, 70)) for _ in range(2))
    y, x = np.mgrid[: side[0], : side[1]].astype(np.float32)
    bent: Float = ndimage.map_coordinates(strands, [y + bend_y, x + bend_x], order=1, mode="grid-wrap")
    np.tanh(bent, out=bent)
    return bent


def _fat_cells(rng: Rng, spacing: float) -> Float:
    """Septa between fat cells: 1 on the thin walls, 0 in the empty cells."""
    half = PERIOD_PX // 2
    count = int((PERIOD_PX / spacing) ** 2)
    centres = rng.uniform(0, half, (count, 2))
    y, x = np.mgrid[:half, :half]
    points = np.stack([y.ravel(), x.ravel()], axis=1) + 0.5
    near, _ = spatial.cKDTree(centres, boxsize=half).query(points, k=2)
    gap = ((near[:, 1] - near[:, 0]).reshape(half, half) * 2).astype(np.float32)
    full = ndimage.zoom(gap, 2, order=1, mode="grid-wrap", grid_mode=True)
    septa: Float = np.clip(1.6 - full / 4.0, 0, 1).astype(np.float32)
    return septa


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
    radius, angle = polar(side)
    turned = angle + rng.uniform(0, 2 * np.pi)
    ellipse = radius * np.sqrt((np.cos(turned) / a) ** 2 + (np.sin(turned) / b) ** 2)
    depth = ellipse / wobble(rng, turned, irregular * 3)
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
    return {kind: [draw() for _ in range(VARIANTS)] for kind, draw in kinds.items()}


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
) -> Patch:
    """A tube cut across: epithelium around a lumen, with rings of nuclei.

    radius is in px, lumen and the rings' (kind, radius, spacing px) radii are fractions of it; secretion is the
    optical density of what the lumen holds; cleft, a fraction of the radius, is the width of the empty crescent beside.
    """
    radius *= float(np.exp(0.15 * rng.normal()))
    side = int(2.8 * radius) + 8
    distance, angle = polar(side)
    stretch = 1 + rng.uniform(0, 0.35) * np.cos(angle - rng.uniform(0, np.pi)) ** 2
    depth = distance / (radius * wobble(rng, angle, 0.12)) * stretch
    cover, inside = _lobes(rng, depth, angle, radius, cleft)
    open_ = np.clip((lumen - depth) * radius / 2 + 0.5, 0, 1)
    stain = np.zeros((side, side), np.float32)
    for kind, where, spacing in rings:
        around = max(3, int(2 * np.pi * where * radius / spacing))
        for turn in 2 * np.pi * (np.arange(around) + rng.uniform(-0.3, 0.3, around)) / around:
            row, column = int(side / 2 + radius * np.sin(turn)), int(side / 2 + radius * np.cos(turn))
            reach = where * distance[row, column] / max(depth[row, column], 1e-3) * rng.normal(1, 0.04)
            stamp = nuclei[kind][rng.integers(VARIANTS)]
            put(stain, stamp, side / 2 + reach * np.sin(turn), side / 2 + reach * np.cos(turn))
    body = eosin * (1 - open_) + secretion * open_
    clear = 1 - inside + open_ * (secretion == 0)
    return Patch(*(layer.astype(np.float32) for layer in (cover, body, stain * (1 - open_) * inside, clear)))


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
) -> Patch:
    """A solid nest of cells with an empty cleft on one side.

    membrane is the optical density of the lines between neighbouring cells, mitoses the share of dividing cells, haze
    the haematoxylin of the cytoplasm, cleft a fraction of the radius.
    """
    radius *= float(np.exp(0.15 * rng.normal()))
    side = int(3.0 * radius) + 8
    distance, angle = polar(side)
    stretch = 1 + rng.uniform(0, 0.6) * np.cos(angle - rng.uniform(0, np.pi)) ** 2
    depth = distance / (radius * wobble(rng, angle, 0.15)) * stretch
    cover, inside = _lobes(rng, depth, angle, radius, cleft)
    centres = jittered_grid(rng, side, side, cell_px, jitter=0.16)
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
            put(stain, nuclei[chosen][rng.integers(VARIANTS)], y_px, x_px)
    layers = (cover, body, np.maximum(stain, haze) * inside, 1 - inside)
    return Patch(*(layer.astype(np.float32) for layer in layers))


def _patch_bank(rng: Rng, nuclei: dict[str, list[Float]]) -> dict[str, list[Patch]]:
    """Drawings of every kind of gland and nest: the benign ones first, then those of the lesions."""
    kinds: dict[str, Callable[[], Patch]] = {
        "acinus": lambda: _gland(rng, nuclei, 23, 0.22, (("benign", 0.62, 12), ("benign", 0.95, 20)), 0.4, 0.15),
        "duct": lambda: _gland(rng, nuclei, 50, 0.55, (("benign", 0.72, 12), ("benign", 0.95, 17)), 0.42, 0.1),
        "apocrine": lambda: _gland(rng, nuclei, 42, 0.3, (("benign", 0.8, 22),), 1.0, 0.2),
        "tubule": lambda: _gland(rng, nuclei, 30, 0.5, (("uniform", 0.76, 15),), 0.5, cleft=0.2),
        "nest": lambda: _nest(rng, nuclei, 38, "crowded", 20, 0.4, mitoses=0.06),
        "comb": lambda: _nest(rng, nuclei, 48, "vesicular", 35, 0.5, membrane=1.3, haze=0.04),
        "sheet": lambda: _nest(rng, nuclei, 60, "giant", 32, 0.35, mitoses=0.06, haze=0.2),
    }
    return {kind: [draw() for _ in range(VARIANTS)] for kind, draw in kinds.items()}


def make_bank(seed: int) -> Bank:
    """Draw the textures, nuclei and patches that all slides of a cohort are painted with."""
    rng = np.random.default_rng([seed, 0])
    textures = {
        "fibres": _fibres(rng, 3.0, 60, 26),
        "wisps": _fibres(rng, 2.0, 14, 30),
        "bundles": _fibres(rng, 5.0, 120, 12),
        "fat": _fat_cells(rng, 92),
        "grain": smooth_noise(rng, (PERIOD_PX, PERIOD_PX), (0.6, 0.6)),
        "cloud": smooth_noise(rng, (PERIOD_PX, PERIOD_PX), (6, 6)),
    }
    nuclei = _nuclei_bank(rng)
    return Bank(textures, nuclei, _patch_bank(rng, nuclei))
