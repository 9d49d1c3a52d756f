"""Augmented views: what a policy does to a tile before it is embedded, the same in every run.

A tile's draws come from a generator of its own, started from the recipe, the number of the view and the tile's key.
torchvision's transforms draw from torch's global generator and take none; `_DrawFrom` hands them ours. So neither the
batch nor the threads nor other draws change a view, no lock is held, and the global generator is not touched.

A policy is a row of names in `POLICIES`, a name a function of (tile [3, s, s], strength). Strength 0 leaves all but the
flips undone; at 1 a transform goes as far as its constants here say.

torchvision is imported on first use: it takes two seconds, and most runs make no views.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from extract.errors import RecipeError
from extract.store.core.fingerprint import fingerprint
from extract.store.core.recipes import AugmentRecipe

MAX_LIGHT = {"brightness": 0.25, "contrast": 0.25, "saturation": 0.25}
"""Reach of the colour jitter at strength 1, as `v2.ColorJitter` takes it; hue has its own."""

MAX_HUE = 0.05
"""Reach of the hue at strength 1, in turns. It costs three times what the rest of the jitter does."""

MAX_STAIN = 0.1
"""Reach of the stain jitter at strength 1, twice the light setting of Tellez et al. 2019; their strong one, 0.2, gives
empty glass the colour of tissue."""

MAX_BLUR_PX = 2.0
"""Standard deviation of the blur at strength 1."""

BINS = 31
"""Magnitudes of RandAugment and TrivialAugment in `v2`."""

MAX_BIN = 15
"""The one at strength 1, the middle: beyond it tiles turn black or plain grey. RandAugment's usual one is 9."""

LEFT_OUT = ("Solarize", "Equalize", "AutoContrast")
"""Operations of theirs that are not drawn: the first turns bright glass black, the others have no magnitude and take
the stain away."""

GLASS = 243
"""Grey of empty glass, for the corners that a rotation or shift leaves open."""

STAINS = ((0.65, 0.70, 0.29), (0.07, 0.99, 0.11), (0.27, 0.57, 0.78))
"""Optical densities in R, G, B of haematoxylin, eosin and DAB (Ruifrok and Johnston 2001), to be given length 1."""


def augment(tiles: Tensor, keys: Sequence[int], recipe: AugmentRecipe, view: int) -> Tensor:
    """Change tiles as a policy says; each one by draws of its own.

    Args:
        tiles: uint8 [n, s, s, 3] on any device.
        keys: one per tile, from `tile_key`.
        recipe: policy, strength and seed.
        view: number of the view, from 0.

    Returns:
        uint8 [n, s, s, 3]. The bytes of a tile depend on (recipe, view, key) and its pixels only.

    Raises:
        RecipeError: the tiles are not square uint8 RGB, or there is not one key for each.
    """
    n_tiles, height, width, channels = tiles.shape if tiles.ndim == 4 else (0, 0, 0, 0)
    if tiles.dtype != torch.uint8 or channels != 3 or height != width or n_tiles != len(keys):
        raise RecipeError(
            f"got tiles {tiles.dtype} {list(tiles.shape)} and {len(keys)} keys → expected uint8 [n, s, s, 3] and n "
            f"keys → pass whole tiles as they were read"
        )
    start = fingerprint(recipe)
    changed = torch.empty_like(tiles)
    for i, key in enumerate(keys):
        with _DrawFrom(_generator(start, view, key)):
            tile = tiles[i].permute(2, 0, 1).contiguous()
            for name in POLICIES[recipe.policy]:
                tile = STEPS[name](tile, recipe.strength)
        changed[i] = tile.permute(1, 2, 0)
    return changed


def tile_key(slide_fingerprint: str, row: int) -> int:
    """Key of a tile: 64 bits from its slide's fingerprint and its row in the coordinates."""
    return int.from_bytes(hashlib.blake2b(f"{slide_fingerprint}|{row}".encode(), digest_size=8).digest())


def _generator(start: str, view: int, key: int) -> torch.Generator:
    digest = hashlib.blake2b(f"{start}|{view}|{key}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest))


class _DrawFrom(TorchFunctionMode):
    """Within it, this thread's random numbers come from one generator, on the CPU whatever the device of the tiles."""

    DRAWS = frozenset(
        getattr(place, name)
        for place, names in (
            (torch, ("rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial")),
            (torch.Tensor, ("uniform_", "normal_", "random_", "bernoulli_")),
        )
        for name in names
    )

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.generator = generator

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self.DRAWS:
            kwargs = {**kwargs, "generator": self.generator}
        return func(*args, **kwargs)


def _v2() -> Any:
    from torchvision.transforms import v2

    return v2


def _flip(tile: Tensor, strength: float) -> Tensor:
    """One of the eight ways to lay down a square, all alike likely; has no strength."""
    turns, mirrored = divmod(int(torch.randint(8, ())), 2)
    tile = torch.rot90(tile, turns, (1, 2))
    return tile.flip(2) if mirrored else tile


def _colour(tile: Tensor, strength: float) -> Tensor:
    """Brightness, contrast, saturation and hue, in a random order."""
    changed: Tensor = _v2().ColorJitter(**_light_at(strength), hue=MAX_HUE * strength)(tile)
    return changed


def _light(tile: Tensor, strength: float) -> Tensor:
    """Brightness, contrast and saturation, in a random order; for where the stains already change the hue."""
    changed: Tensor = _v2().ColorJitter(**_light_at(strength))(tile)
    return changed


def _light_at(strength: float) -> dict[str, float]:
    return {name: reach * strength for name, reach in MAX_LIGHT.items()}


def _blur(tile: Tensor, strength: float) -> Tensor:
    """A Gaussian blur of a random width up to the strength's."""
    if strength == 0:
        return tile
    widest_px = MAX_BLUR_PX * strength
    kernel_px = 2 * math.ceil(3 * widest_px) + 1
    blurred: Tensor = _v2().GaussianBlur(kernel_px, (0.01, widest_px))(tile)
    return blurred


def _hed(tile: Tensor, strength: float) -> Tensor:
    """More or less of each stain: ``concentration_i * a_i + b_i``, ``a_i`` in 1 ± reach and ``b_i`` in ± reach.

    The stains of Ruifrok and Johnston split a pixel's optical density (natural logarithm) into concentrations; the
    changed ones are put together again. A pixel is taken as ``(value + 1) / 256``, so that black has a density too.

    References:
        Ruifrok and Johnston, Quantification of histochemical staining by color deconvolution, 2001.
        Tellez et al., Quantifying the effects of data augmentation and stain color normalization in convolutional
        neural networks for computational pathology, 2019. Deviation: none known but the treatment of black.
    """
    reach = MAX_STAIN * strength
    if reach == 0:
        return tile
    split, join = _stain_matrices()
    draws = torch.rand(2, 3, dtype=torch.float64) * 2 - 1
    scale, shift = 1 + reach * draws[0], reach * draws[1]
    # densities are rows of RGB: split, scale and join are one matrix; its twelve numbers go to the device in one copy
    # that nothing waits for
    matrix = torch.cat([split * scale @ join, (shift @ join)[None]])
    matrix = matrix.to(tile.device, torch.float32, non_blocking=True)
    density = -torch.log((tile.flatten(1).float() + 1) / 256)  # [3, s * s]
    density = torch.addmm(matrix[3][:, None], matrix[:3].T, density)
    values = torch.exp(-density) * 256 - 1
    return values.round_().clamp_(0, 255).to(torch.uint8).view_as(tile)


@cache
def _stain_matrices() -> tuple[Tensor, Tensor]:
    """Optical density to stains, and stains to optical density; both float64 [3, 3], for rows on the left."""
    stains = torch.tensor(STAINS, dtype=torch.float64)
    stains /= stains.norm(dim=1, keepdim=True)
    return torch.linalg.inv(stains), stains


Magnitudes = Callable[[int, int, int], Tensor | None]


def _lowest(magnitudes: Magnitudes) -> Magnitudes:
    """The first bins of the whole range of magnitudes, where `v2` would spread the bins over it."""

    def first(bins: int, height: int, width: int) -> Tensor | None:
        whole = magnitudes(BINS, height, width)
        return None if whole is None else whole[:bins]

    return first


def _operations(transform: Any) -> dict[str, tuple[Magnitudes, bool]]:
    """The operations that a transform draws from, without those left out: name → (magnitudes, whether signed)."""
    space = transform._AUGMENTATION_SPACE.items()
    return {name: (_lowest(magnitudes), signed) for name, (magnitudes, signed) in space if name not in LEFT_OUT}


def _randaugment(tile: Tensor, strength: float) -> Tensor:
    """Two random operations, both of the magnitude that the strength says.

    References:
        Cubuk et al., RandAugment: Practical automated data augmentation with a reduced search space, 2020. Deviations:
        no `LEFT_OUT`, and glass instead of black where a tile is moved away.
    """
    transform = _v2().RandAugment(magnitude=round(MAX_BIN * strength), num_magnitude_bins=BINS, fill=GLASS)
    transform._AUGMENTATION_SPACE = _operations(transform)
    changed: Tensor = transform(tile)
    return changed


def _trivialaugment(tile: Tensor, strength: float) -> Tensor:
    """One random operation of a random magnitude up to the one that the strength says.

    References:
        Müller and Hutter, TrivialAugment: Tuning-free yet state-of-the-art data augmentation, 2021. Deviations: as
        for RandAugment, and its range ends at the strength.
    """
    transform = _v2().TrivialAugmentWide(num_magnitude_bins=1 + round(MAX_BIN * strength), fill=GLASS)
    transform._AUGMENTATION_SPACE = _operations(transform)
    changed: Tensor = transform(tile)
    return changed


STEPS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "flip": _flip,
    "colour": _colour,
    "light": _light,
    "hed": _hed,
    "blur": _blur,
    "randaugment": _randaugment,
    "trivialaugment": _trivialaugment,
}

POLICIES: dict[str, tuple[str, ...]] = {
    **{name: (name,) for name in STEPS if name != "light"},
    # in the order in which they arise: section, stain, scanner, focus
    "pathology": ("flip", "hed", "light", "blur"),
}
