"""Augmentation of cached bags in training: noise, mixtures of bags, pseudo-bags; gentle first, stronger later.

All of it works on embeddings, after the backbone, so it costs next to nothing; augmented views of the tiles themselves
are cached by ``mil extract --views`` and drawn by `mil.bags.bags`. Every draw comes from the generator that is handed
in, so that it belongs to the replica's seed, epoch and step.

References:
    Zhang et al., "mixup: Beyond empirical risk minimization", ICLR 2018; Yang et al., "ReMix", MICCAI 2022 (mixing
    bags); Zhang et al., "DTFD-MIL", CVPR 2022 (pseudo-bags); Mueller and Hutter, "TrivialAugment", ICCV 2021 (one
    operation at a random strength). Deviation: bags are mixed by exchanging drawn instances, without ReMix's
    prototypes.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mil.config.sections import AugmentConfig


class Batch(NamedTuple):
    """A packed batch on its way into a head.

    Attributes:
        instances: float [total, dim].
        offsets: int64 [bags + 1], on the CPU.
        targets: float [bags, C], rows sum to one; a mixed bag belongs to several classes in part.
    """

    instances: Tensor
    offsets: Tensor
    targets: Tensor

    def split(self) -> list[Tensor]:
        """One view [size, dim] per bag."""
        return list(torch.split(self.instances, (self.offsets[1:] - self.offsets[:-1]).tolist()))


def enabled(config: AugmentConfig) -> tuple[str, ...]:
    """Names of what is switched on."""
    names = tuple(name for name in ("noise", "bag_mixup", "embedding_mixup") if getattr(config, name))
    return (*names, "pseudo_bags") if config.pseudo_bags > 1 else names


def strength(config: AugmentConfig, epoch: int, epochs: int) -> float:
    """Part of the full strength in an epoch (from 1): 0 at the start and 1 once the ramp is over.

    Example:
        >>> grows = AugmentConfig(noise=1.0, schedule="linear", ramp=0.5)
        >>> [strength(grows, epoch, 9) for epoch in (1, 3, 5, 9)]
        [0.0, 0.5, 1.0, 1.0]
    """
    if config.schedule == "constant":
        return 1.0
    done = min(1.0, (epoch - 1) / max(1.0, config.ramp * (epochs - 1)))
    return done if config.schedule == "linear" else (1 - math.cos(math.pi * done)) / 2


def augment(batch: Batch, config: AugmentConfig, level: float, scale: Tensor, generator: torch.Generator) -> Batch:
    """Apply what is switched on at a part of its strength.

    Args:
        batch: training bags.
        config: what to do.
        level: part of the full strength, 0 to 1; 0 changes nothing.
        scale: [dim], deviation of every feature over the training part.
        generator: of the CPU.
    """
    names = enabled(config)
    if level <= 0 or not names:
        return batch
    if config.policy == "random":
        chosen = int(torch.randint(len(names), (1,), generator=generator))
        names, level = (names[chosen],), level * float(torch.rand(1, generator=generator))
    for name in names:
        batch = _OPERATIONS[name](batch, config, level, scale, generator)
    return batch


def _noise(batch: Batch, config: AugmentConfig, level: float, scale: Tensor, generator: torch.Generator) -> Batch:
    drawn = torch.randn(batch.instances.shape, generator=generator).to(batch.instances)
    width = (level * config.noise * scale).to(batch.instances)
    return batch._replace(instances=batch.instances + width * drawn)


def _bag_mixup(batch: Batch, config: AugmentConfig, level: float, scale: Tensor, generator: torch.Generator) -> Batch:
    """Every bag hands a share of its instances over to another bag, and that share of its label."""
    bags, shares = batch.split(), _shares(config.bag_mixup, level, batch, generator)
    order = torch.randperm(len(bags), generator=generator).tolist()
    mixed, targets = [], []
    for bag, other, share in zip(range(len(bags)), order, shares, strict=True):
        size = bags[bag].shape[0]
        taken = min(round(share * size), size - 1)
        kept = bags[bag][_rows(size, size - taken, generator)]
        lent = bags[other][_rows(bags[other].shape[0], taken, generator)]
        mixed += [kept, lent]
        part = lent.shape[0] / (kept.shape[0] + lent.shape[0])
        targets.append((1 - part) * batch.targets[bag] + part * batch.targets[other])
    sizes = [mixed[at].shape[0] + mixed[at + 1].shape[0] for at in range(0, len(mixed), 2)]
    return Batch(torch.cat(mixed), _offsets(sizes), torch.stack(targets))


def _embedding_mixup(
    batch: Batch, config: AugmentConfig, level: float, scale: Tensor, generator: torch.Generator
) -> Batch:
    """Instances of every bag are moved towards drawn instances of another bag."""
    bags, shares = batch.split(), _shares(config.embedding_mixup, level, batch, generator)
    order = torch.randperm(len(bags), generator=generator).tolist()
    mixed, targets = [], []
    for bag, other, share in zip(range(len(bags)), order, shares, strict=True):
        drawn = torch.randint(bags[other].shape[0], (bags[bag].shape[0],), generator=generator)
        mixed.append((1 - share) * bags[bag] + share * bags[other][drawn.to(bags[other].device)])
        targets.append((1 - share) * batch.targets[bag] + share * batch.targets[other])
    return batch._replace(instances=torch.cat(mixed), targets=torch.stack(targets))


def _pseudo_bags(batch: Batch, config: AugmentConfig, level: float, scale: Tensor, generator: torch.Generator) -> Batch:
    """Every bag is dealt out into several, never an empty one."""
    wanted = 1 + round(level * (config.pseudo_bags - 1))
    pieces, targets = [], []
    for bag, target in zip(batch.split(), batch.targets, strict=True):
        order = torch.randperm(bag.shape[0], generator=generator).to(bag.device)
        parts = order.tensor_split(min(wanted, bag.shape[0]))
        pieces += [bag[part.sort().values] for part in parts]
        targets += [target] * len(parts)
    return Batch(torch.cat(pieces), _offsets([piece.shape[0] for piece in pieces]), torch.stack(targets))


_OPERATIONS: dict[str, Callable[[Batch, AugmentConfig, float, Tensor, torch.Generator], Batch]] = {
    "noise": _noise,
    "bag_mixup": _bag_mixup,
    "embedding_mixup": _embedding_mixup,
    "pseudo_bags": _pseudo_bags,
}


def _shares(alpha: float, level: float, batch: Batch, generator: torch.Generator) -> list[float]:
    """The other bag's share for every bag, at most one half: Beta(alpha, alpha) folded at its middle."""
    # torch's Beta takes no generator; two gamma draws of one shape make one
    draws = _gamma(alpha, 2 * len(batch.targets), generator).view(2, -1)
    share = draws[0] / draws.sum(dim=0)
    return [level * min(each, 1 - each) for each in share.tolist()]


def _gamma(shape: float, n: int, generator: torch.Generator) -> Tensor:
    """Gamma(shape, 1) draws [n], float64."""
    return torch._standard_gamma(torch.full((n,), shape, dtype=torch.float64), generator=generator).clamp(min=1e-300)


def _rows(size: int, n: int, generator: torch.Generator) -> Tensor:
    """``n`` of ``size`` rows, in their order; all of them when fewer are there."""
    return torch.randperm(size, generator=generator)[:n].sort().values


def _offsets(sizes: list[int]) -> Tensor:
    return torch.tensor([0, *sizes], dtype=torch.int64).cumsum(0)
