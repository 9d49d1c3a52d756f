"""Heads in evaluation: all instances of every bag, whole bags packed up to a bound on memory."""

import warnings
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from aggregators import Aggregator, BagOutput
from mil.bags.bags import Bags, Pack
from mil.errors import BagError, listed

# 16,384 instances of 1,280 float32 features are 84 MB.
MAX_INSTANCES = 16_384


@torch.inference_mode()
def forward_packs(
    heads: Sequence[Aggregator],
    bags: Bags,
    indices: npt.NDArray[np.int64],
    device: torch.device,
    max_instances: int = MAX_INSTANCES,
) -> Iterator[tuple[Pack, list[BagOutput]]]:
    """Apply every head to every pack; a pack is read once for all heads.

    Raises:
        BagError: a logit is not finite, which finite features and weights do not give; the slides are named.
    """
    for head in heads:
        head.eval()
    for pack in bags.packs(indices, max_instances):
        instances, offsets = pack.instances.to(device), pack.offsets.to(device)
        coords = None if pack.coords is None else pack.coords.to(device)
        outputs = [head(instances, offsets, coords) for head in heads]
        _check_finite(outputs, pack, bags)
        yield pack, outputs


def fitting_packs(
    heads: Sequence[Aggregator],
    bags: Bags,
    indices: npt.NDArray[np.int64],
    device: torch.device,
    bound: int = MAX_INSTANCES,
) -> Iterator[tuple[Pack, list[BagOutput]]]:
    """As `forward_packs`, with half as many instances at once whenever memory does not hold a pack.

    Raises:
        BagError: a slide that memory does not hold even alone, or as in `forward_packs`.
    """
    left = indices
    while len(left):
        try:
            for pack, outputs in forward_packs(heads, bags, left, device, bound):
                left = left[len(pack.bags) :]
                yield pack, outputs
        except torch.OutOfMemoryError as error:
            bound = _halved(bags, left, bound, error)


def _halved(bags: Bags, left: npt.NDArray[np.int64], bound: int, error: torch.OutOfMemoryError) -> int:
    """Half of what the pack held that did not fit."""
    sizes = bags.n_instances[left]
    # as `Bags.packs` fills a pack: bags in order up to the bound, and one at least
    count = max(1, int(np.searchsorted(sizes.cumsum(), bound, side="right")))
    if count == 1:
        raise BagError(
            f"got too little memory for slide {bags.slide_ids[left[0]]!r} alone, of {sizes[0]} tiles → expected room "
            f"for all tiles of a slide → use device=cpu, or a GPU with more memory free"
        ) from error
    held = int(sizes[:count].sum())
    warnings.warn(
        f"got too little memory for {held} tiles of {count} slides at once → half as many are taken from here on, "
        f"which gives the same predictions",
        stacklevel=2,
    )
    return held // 2


def bag_logits(heads: Sequence[Aggregator], bags: Bags, indices: npt.NDArray[np.int64], device: torch.device) -> Tensor:
    """Logits [heads, bags, C] in float32 on the CPU, from all instances of every bag; memory bounds the packs."""
    packs = [
        torch.stack([output.logits.float() for output in outputs]).cpu()
        for _, outputs in fitting_packs(heads, bags, indices, device)
    ]
    return torch.cat(packs, dim=1)


def _check_finite(outputs: Sequence[BagOutput], pack: Pack, bags: Bags) -> None:
    finite = torch.stack([output.logits.isfinite().all(dim=-1) for output in outputs]).all(dim=0)
    if not bool(finite.all()):
        names = [bags.slide_ids[bag] for bag in pack.bags[~finite.cpu().numpy()].tolist()]
        raise BagError(
            f"got predictions that are not finite for {listed(names)} → expected finite features and weights → "
            f"check the store (mil store verify) and extract these slides again"
        )
