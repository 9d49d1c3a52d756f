"""Where the random numbers of training come from: a generator, or one stream for every bag."""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from operator import index

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from aggregators.errors import BagInputError
from aggregators.segment import Segments

_LEVELS = 1 << 16
_MOST = 1 << 63


class BagDraws:
    """Random numbers that belong to the bags of a packed batch: each bag has a seed and draws from it alone.

    What a bag draws does not depend on what it travels with, so a head that trains on some bags of a batch, or on half
    of them at a time, draws for each what it would have drawn in the whole batch. Draws of one bag follow one another;
    an object serves one forward.

    Args:
        seeds: one per bag, at least 0 and below 2⁶³, drawn at random from these: bags of one seed draw alike, and the
            second draw of a bag is the first of a bag whose seed is the next number.

    Raises:
        BagInputError: a seed out of this range.

    Example:
        >>> from aggregators import create_aggregator
        >>> head, bags = create_aggregator("abmil", in_dim=8, n_classes=2), torch.ones(5, 8)
        >>> both = head(bags, torch.tensor([0, 2, 5]), generator=BagDraws([71, 8204])).logits
        >>> second = head(bags[2:], generator=BagDraws([8204])).logits
        >>> torch.allclose(both[1:], second)
        True
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self._seeds = [index(seed) for seed in seeds]
        if not all(0 <= seed < _MOST for seed in self._seeds):
            raise BagInputError(f"got seeds {self._seeds} → expected each at least 0 and below 2⁶³ → take others")
        self._drawn = [0] * len(self._seeds)
        self._segments = Segments((1,) * len(self._seeds))

    def along(self, segments: Segments) -> "BagDraws":
        """The same streams for values whose rows are cut into bags otherwise, such as with a class token each.

        Raises:
            BagInputError: another number of bags.
        """
        if segments.bags != len(self._seeds):
            raise BagInputError(
                f"got {len(self._seeds)} seeds for {segments.bags} bags → expected one per bag → pass BagDraws of them"
            )
        other = BagDraws(self._seeds)
        other._drawn, other._segments = self._drawn, segments
        return other

    def next_seed(self, bag: int) -> int:
        """The seed of a bag's next draw."""
        self._drawn[bag] += 1
        # that these are neighbours does not matter: both kinds of generator scramble them
        return (self._seeds[bag] + self._drawn[bag]) % _MOST

    def keep(self, values: Tensor, p: float) -> Tensor:
        """What to multiply values [rows, ...] by for dropout with probability p: 0, or 1 / (1 - p)."""
        ends = list(accumulate(self._segments.sizes, initial=0))
        if values.shape[0] != ends[-1]:
            raise BagInputError(
                f"got {values.shape[0]} rows → expected {ends[-1]}, those of the bags → pass along(generator, segments)"
            )
        seeds = [self.next_seed(bag) for bag in range(len(self._seeds))]
        if values.device.type != "cpu" or torch.compiler.is_compiling():
            return generated_scale(values, p, seeds, ends)
        kept = np.empty(tuple(values.shape), dtype=np.bool_)
        for seed, (start, stop) in zip(seeds, pairwise(ends), strict=True):
            kept[start:stop] = _kept(seed, kept[start:stop].shape, p)
        return _scaled(kept, values, p)


DrawSource = torch.Generator | BagDraws | None
"""What a head draws from in training; None means torch's global generator."""


def along(source: DrawSource, segments: Segments) -> DrawSource:
    """The source for rows that are cut into bags otherwise; only draws that belong to bags care.

    Example:
        >>> along(None, Segments((2, 1))) is None
        True
    """
    return source.along(segments) if isinstance(source, BagDraws) else source


def one_each(source: DrawSource, bags: int) -> DrawSource:
    """The source for values [bags, ...], one row per bag."""
    return along(source, Segments((1,) * bags))


def bag_generator(source: DrawSource, bag: int, device: torch.device) -> torch.Generator | None:
    """The generator for what a head draws for one bag alone."""
    if isinstance(source, BagDraws):
        return torch.Generator(device).manual_seed(source.next_seed(bag))
    return source


def keep_scale(values: Tensor, p: float, source: DrawSource) -> Tensor:
    """What dropout multiplies values by: 0 with probability p, else 1 / (1 - p).

    On a CPU the bits are SFC64's, sixteen for each value (p is met to 1 / 131,072), which takes a tenth of the time of
    torch's `bernoulli_`; the source gives its seed. A GPU and a compiled head use `bernoulli_`.

    Example:
        >>> sorted(set(keep_scale(torch.zeros(100), 0.5, torch.Generator().manual_seed(0)).tolist()))
        [0.0, 2.0]
    """
    if isinstance(source, BagDraws):
        return source.keep(values, p)
    if values.device.type != "cpu" or torch.compiler.is_compiling():
        drawn = torch.empty(values.shape, dtype=values.dtype, device=values.device)
        return drawn.bernoulli_(1 - p, generator=source).div_(1 - p)
    seed = int(torch.empty((), dtype=torch.int64).random_(generator=source))
    return _scaled(_kept(seed, tuple(values.shape), p), values, p)


def generated_scale(values: Tensor, p: float, seeds: Sequence[int], ends: Sequence[int]) -> Tensor:
    """As `keep_scale`, from torch's generators, one per bag: what a GPU and a compiled head do."""
    scale = torch.empty(values.shape, dtype=values.dtype, device=values.device)
    stream = torch.Generator(values.device)
    for seed, (start, stop) in zip(seeds, pairwise(ends), strict=True):
        scale[start:stop].bernoulli_(1 - p, generator=stream.manual_seed(seed))
    return scale.div_(1 - p)


def _kept(seed: int, shape: tuple[int, ...], p: float) -> npt.NDArray[np.bool_]:
    """True with probability 1 - p."""
    count = int(np.prod(shape, dtype=np.int64))
    words: npt.NDArray[np.uint64] = np.random.SFC64(seed).random_raw(-(-count // 4))
    kept: npt.NDArray[np.bool_] = words.view(np.uint16)[:count].reshape(shape) >= round(p * _LEVELS)
    return kept


def _scaled(kept: npt.NDArray[np.bool_], like: Tensor, p: float) -> Tensor:
    return torch.from_numpy(kept).to(like.dtype).mul_(1 / (1 - p))
