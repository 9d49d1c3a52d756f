"""Bags: the cached instances of every slide, and the packs that heads read.

A pack holds whole or sampled bags one after another, `instances [total, dim]` cut by `offsets [bags + 1]`; there is no
padding. Whatever memory the bags are in, the same request gives the same bytes.
"""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mil.arrays import IntArray
from mil.errors import BagError, listed

Memory = Literal["auto", "mmap", "ram"]


# Bags are copied into RAM when they take at most this part of what is free.
RAM_SHARE = 0.5
_CHUNK_ROWS = 512
_DRAW_ROWS = 1


class Pack(NamedTuple):
    """Bags one after another.

    Attributes:
        instances: [total, dim], in the dtype of the store.
        offsets: int64 [bags + 1], on the CPU; bag i is instances[offsets[i]:offsets[i + 1]].
        bags: int64 [bags], which bags these are.
        coords: int32 [total, 2], level-0 px, on the CPU; None where the bags were opened without.
    """

    instances: Tensor
    offsets: Tensor
    bags: IntArray
    coords: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Moments:
    """Per bag: instances [n], mean [n, dim] and sum of squared deviations [n, dim], in float64."""

    counts: IntArray
    means: npt.NDArray[np.float64]
    deviations: npt.NDArray[np.float64]

    def mean_std(self, bags: IntArray) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation [dim] over all instances of some bags; 0 for a feature that never varies."""
        counts = self.counts[bags, None].astype(np.float64)
        total = counts.sum()
        mean = (counts * self.means[bags]).sum(axis=0) / total
        between = (counts * (self.means[bags] - mean) ** 2).sum(axis=0)
        std = np.sqrt((self.deviations[bags].sum(axis=0) + between) / total)
        # what is left of a constant after rounding is no deviation
        std[std <= 1e-6 * np.abs(mean)] = 0.0
        return torch.from_numpy(mean), torch.from_numpy(std)


class Bags:
    """The instances of n slides, in RAM or memory-mapped.

    Args:
        slide_ids: [n].
        features: n matrices [n_instances, dim] of one dtype, such as the store's memory-mapped views.
        memory: ``ram`` copies them into one matrix, ``mmap`` leaves them where they are, ``auto`` copies when they
            take at most half of the free memory.
        coords: for heads that use positions, n matrices [n_instances, 2] in level-0 px.
        views: augmented views of all bags, each n matrices of the shapes of `features`; they stay where they are.

    Raises:
        BagError: no bags, a bag without instances, bags of different width, or coords of another number.

    Example:
        >>> bags = Bags(["a", "b"], [np.zeros((3, 8), np.float16), np.ones((2, 8), np.float16)])
        >>> bags.pack(np.array([1, 0])).offsets.tolist()
        [0, 2, 5]
    """

    def __init__(
        self,
        slide_ids: Sequence[str],
        features: Sequence[npt.NDArray[Any]],
        memory: Memory = "auto",
        coords: Sequence[npt.NDArray[Any]] | None = None,
        views: Sequence[Sequence[npt.NDArray[Any]]] = (),
    ) -> None:
        room = {"ram": math.inf, "mmap": -1.0}[memory] if memory != "auto" else RAM_SHARE * _free_bytes()
        # each bag is opened once: it may have to be mapped, checked, or fetched for it
        forms, copies, size = [], [], 0
        for matrix in features:
            forms.append((matrix.shape, matrix.dtype))
            size += matrix.nbytes
            if size <= room:
                copies.append(np.array(matrix))
            else:
                copies.clear()
        _check(slide_ids, forms)
        self.slide_ids = tuple(slide_ids)
        self.n_instances: IntArray = np.array([shape[0] for shape, _ in forms], dtype=np.int64)
        self.dim, self._dtype = int(forms[0][0][1]), forms[0][1]
        self.memory: Literal["mmap", "ram"] = "ram" if size <= room else "mmap"
        self._matrices = copies if self.memory == "ram" else features
        self._views = tuple(views)
        self._coords = None if coords is None else [np.asarray(each, dtype=np.int32) for each in coords]
        if self._coords is not None and [len(each) for each in self._coords] != self.n_instances.tolist():
            raise BagError(
                f"got coords of {listed(map(len, self._coords))} tiles for bags of {listed(self.n_instances.tolist())} "
                f"instances → expected one (x, y) per instance → open both from one entry"
            )

    def __len__(self) -> int:
        return len(self.slide_ids)

    @property
    def n_views(self) -> int:
        """Augmented views that every bag has beside itself."""
        return len(self._views)

    def views_digest(self) -> str:
        """SHA-256 of the first and last instance of every bag in every view; tells other views from these."""
        digest = sha256()
        for view in self._views:
            for bag in range(len(self)):
                matrix = view[bag]
                digest.update(repr(matrix.shape).encode() + matrix[0].tobytes() + matrix[-1].tobytes())
        return digest.hexdigest()

    def coords_digest(self) -> str:
        """SHA-256 of where the instances lie; of nothing where the bags were opened without."""
        digest = sha256()
        for coords in self._coords or ():
            digest.update(coords.tobytes())
        return digest.hexdigest()

    @property
    def itemsize(self) -> int:
        """Bytes of one number."""
        return int(self._dtype.itemsize)

    def pack(
        self, bags: IntArray, rows: Mapping[int, IntArray] | None = None, views: Mapping[int, int] | None = None
    ) -> Pack:
        """Gather bags, in this order.

        Args:
            bags: [k], which.
            rows: for some of them, the instances to take; the others are taken whole.
            views: for some of them, the augmented view to take, from 1; the others are taken as they are.

        Raises:
            BagError: a view has other instances than its bag.
        """
        rows, views = rows or {}, views or {}
        counts = [len(rows[bag]) if bag in rows else self.n_instances[bag] for bag in bags.tolist()]
        offsets = np.cumsum([0, *counts], dtype=np.int64)
        instances = np.empty((offsets[-1], self.dim), self._dtype)
        # one after another: a pack of small bags may hold more of them than files can be open
        for bag, start, stop in zip(bags.tolist(), offsets, offsets[1:], strict=False):
            matrix = self._view(bag, views[bag]) if views.get(bag) else self._matrices[bag]
            instances[start:stop] = matrix[rows[bag]] if bag in rows else matrix
        return Pack(torch.from_numpy(instances), torch.from_numpy(offsets), bags, self._pack_coords(bags, rows))

    def _view(self, bag: int, view: int) -> npt.NDArray[Any]:
        matrix = self._views[view - 1][bag]
        if matrix.shape != (self.n_instances[bag], self.dim):
            raise BagError(
                f"got {matrix.shape} in view {view} of slide {self.slide_ids[bag]!r} → expected "
                f"{(int(self.n_instances[bag]), self.dim)} as in the slide itself → run mil extract with --views again"
            )
        return matrix

    def _pack_coords(self, bags: IntArray, rows: Mapping[int, IntArray]) -> Tensor | None:
        """The coords of a pack's instances."""
        if self._coords is None:
            return None
        pieces = [self._coords[bag][rows[bag]] if bag in rows else self._coords[bag] for bag in bags.tolist()]
        return torch.from_numpy(np.concatenate(pieces))

    def draw(self, bags: IntArray, budget: int | None, seed: int, epoch: int) -> dict[int, IntArray]:
        """Draw ``budget`` instances of every larger bag, without replacement.

        A draw depends on (seed, epoch, bag) alone, so it is the same whatever else is drawn.
        """
        if budget is None:
            return {}
        larger = bags[self.n_instances[bags] > budget]
        return {
            bag: np.sort(
                np.random.default_rng((_DRAW_ROWS, seed, epoch, bag)).choice(
                    self.n_instances[bag], size=budget, replace=False, shuffle=False
                )
            )
            for bag in larger.tolist()
        }

    def packs(self, bags: IntArray, max_instances: int) -> Iterator[Pack]:
        """Whole bags, in this order, in packs of at most ``max_instances`` (a larger bag has a pack of its own)."""
        start, total = 0, 0
        for stop, bag in enumerate(bags.tolist()):
            if stop > start and total + self.n_instances[bag] > max_instances:
                yield self.pack(bags[start:stop])
                start, total = stop, 0
            total += int(self.n_instances[bag])
        if start < len(bags):
            yield self.pack(bags[start:])

    @cached_property
    def moments(self) -> Moments:
        """Moments of every bag, from one pass over all instances that holds 512 rows at a time.

        Raises:
            BagError: a feature is not finite; the slides are named.
        """
        means = np.empty((len(self), self.dim))
        deviations = np.empty((len(self), self.dim))
        for bag in range(len(self)):
            means[bag], deviations[bag] = _moments(self._matrices[bag])
        broken = [self.slide_ids[bag] for bag in np.flatnonzero(~np.isfinite(deviations).all(axis=1))]
        if broken:
            raise BagError(
                f"got features that are not finite in {len(broken)} of {len(self)} slides: {listed(broken)} → expected "
                f"finite numbers → extract these slides again, or leave them out of the label table"
            )
        return Moments(self.n_instances, means, deviations)


class ResidentBags(Bags):
    """Bags in the memory of a GPU, where packs are gathered without a copy across the bus; equal to the others.

    Args:
        bags: the same bags.
        device: where to hold them.

    Example:
        >>> bags = Bags(["a", "b"], [np.zeros((3, 8), np.float16), np.ones((2, 8), np.float16)])
        >>> resident = ResidentBags(bags, torch.device("cpu"))
        >>> bool((resident.pack(np.array([1, 0])).instances == bags.pack(np.array([1, 0])).instances).all())
        True
    """

    def __init__(self, bags: Bags, device: torch.device) -> None:
        self.__dict__.update(vars(bags))
        self.moments = bags.moments
        self._starts = np.cumsum([0, *self.n_instances])[:-1]
        dtype = torch.from_numpy(np.empty(0, self._dtype)).dtype
        self._resident = torch.empty((int(self.n_instances.sum()), self.dim), dtype=dtype, device=device)
        # one by one, so that the host never holds a second copy
        for bag, start in enumerate(self._starts.tolist()):
            matrix = torch.from_numpy(np.ascontiguousarray(self._matrices[bag]))
            self._resident[start : start + len(matrix)].copy_(matrix)

    def pack(
        self, bags: IntArray, rows: Mapping[int, IntArray] | None = None, views: Mapping[int, int] | None = None
    ) -> Pack:
        """As `Bags.pack`, with the instances on the device; views come from where they are."""
        rows = rows or {}
        if views:
            return super().pack(bags, rows, views)
        taken = [
            self._starts[bag] + rows.get(bag, np.arange(self.n_instances[bag], dtype=np.int64)) for bag in bags.tolist()
        ]
        offsets = np.cumsum([0, *map(len, taken)], dtype=np.int64)
        chosen = torch.from_numpy(np.concatenate(taken)).to(self._resident.device, non_blocking=True)
        instances = self._resident.index_select(0, chosen)
        return Pack(instances, torch.from_numpy(offsets), bags, self._pack_coords(bags, rows))


def place_bags(bags: Bags, device: torch.device) -> Bags:
    """Hold the bags in the memory of a GPU when they take at most half of what is free there; else leave them."""
    if device.type != "cuda" or isinstance(bags, ResidentBags):
        return bags
    free, _ = torch.cuda.mem_get_info(device)
    size = int(bags.n_instances.sum()) * bags.dim * bags.itemsize
    return ResidentBags(bags, device) if size <= RAM_SHARE * free else bags


def _check(slide_ids: Sequence[str], forms: Sequence[tuple[tuple[int, ...], np.dtype[Any]]]) -> None:
    """Refuse bags that do not fit together, by the shape and dtype of each."""
    if not forms:
        raise BagError("got no slides → expected at least one bag → check the slide ids and the store")
    empty = [slide_id for slide_id, (shape, _) in zip(slide_ids, forms, strict=True) if shape[0] == 0]
    if empty:
        raise BagError(
            f"got no valid tile in {len(empty)} slides: {listed(empty)} → expected at least one instance per bag → "
            f"see why in the store's runs/*.jsonl, or leave them out of the label table"
        )
    width, first = forms[0][0][1:], forms[0][1]
    for slide_id, (shape, dtype) in zip(slide_ids, forms, strict=True):
        if (dtype, shape[1:]) != (first, width):
            raise BagError(
                f"got features {dtype} {shape} in slide {slide_id!r} → expected {first} (n, "
                f"{', '.join(map(str, width))}) as in slide {slide_ids[0]!r} → extract both with one recipe"
            )


def _moments(matrix: npt.NDArray[Any]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Mean and sum of squared deviations [dim] of one bag, chunk by chunk (Chan's update)."""
    count, mean, deviation = 0, np.zeros(matrix.shape[1]), np.zeros(matrix.shape[1])
    for start in range(0, len(matrix), _CHUNK_ROWS):
        chunk = torch.from_numpy(np.array(matrix[start : start + _CHUNK_ROWS])).float()
        # sums over rows as products, which are several times as fast
        even = torch.full((1, len(chunk)), 1 / len(chunk), dtype=chunk.dtype)
        # centred first, so that float32 squares lose nothing to a large mean; what rounding leaves of it is added
        around = even @ chunk  # [1, dim]
        chunk -= around
        chunk_mean = (around.double() + (even @ chunk).double())[0].numpy()
        squares = (even @ chunk.square_()).double()[0].numpy() * len(chunk)
        gap, count = chunk_mean - mean, count + len(chunk)
        weight = len(chunk) / count
        mean += gap * weight
        deviation += squares + gap**2 * weight * (count - len(chunk))
    return mean, deviation


def _free_bytes() -> float:
    """Memory that this process may still take: what the machine has free, or its control group if that is less."""
    free = float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = Path("/sys/fs/cgroup/memory.current").read_text().strip()
    except OSError:
        return free
    return free if limit == "max" else min(free, float(limit) - float(used))
