"""What training a head will cost, told before it is trained: a step of it is measured on bags of the cohort's sizes."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from aggregators import create_aggregator
from mil.bags.bags import Bags
from mil.bags.devices import resolve_device
from mil.cohort.cohort import Cohort
from mil.config.train import TrainConfig
from mil.training.tasks import count_outputs

_MOST_INSTANCES = 32_768
_MEASURED_S = 0.05
_VALIDATION = 1.25
"""What the passes over the validation part add to those over the training part."""


@dataclass(frozen=True)
class HeadCost:
    """What a head costs.

    Attributes:
        head: its title.
        entry: the features that it reads.
        n_parameters: numbers that are fitted; 0 where it could not be built.
        seconds: of all of its replicas, if none stops early; NaN where it could not be measured.
    """

    head: str
    entry: str
    n_parameters: int
    seconds: float


class Priced(Protocol):
    """What a cost is measured of: a head on a source of features."""

    @property
    def title(self) -> str:
        """How the head is called."""

    @property
    def train(self) -> TrainConfig:
        """Its training."""

    @property
    def source(self) -> Any:
        """Its features: ``name`` and ``bags``."""

    @property
    def where(self) -> str:
        """For progress."""


_Cell = TypeVar("_Cell", bound=Priced)


def measure_costs(
    cells: Sequence[Sequence[_Cell]], cohort: Cohort, n_replicas: int, tell: Callable[[str], None]
) -> dict[_Cell, HeadCost]:
    """The cost of every cell; ``tell`` hears which one is being measured."""
    costs = {}
    for cell in (each for its_cells in cells for each in its_cells):
        tell(f"measuring the cost of {cell.where}")
        n_outputs = count_outputs(cell.train, cohort)
        costs[cell] = measure_cost(cell.title, cell.source.name, cell.train, cell.source.bags, n_outputs, n_replicas)
    return costs


def cheapest_first(cells: Sequence[_Cell], costs: Mapping[_Cell, HeadCost]) -> list[_Cell]:
    """The cells of one source by their cost, the first one first: mean pooling, with which the others are compared."""
    first, *others = cells
    # what could not be measured comes last
    return [first, *sorted(others, key=lambda cell: (math.isnan(costs[cell].seconds), costs[cell].seconds))]


def measure_cost(title: str, entry: str, train: TrainConfig, bags: Bags, n_outputs: int, n_replicas: int) -> HeadCost:
    """Measure some steps of a head on random instances, in bags as large as those of the cohort.

    Replicas that stop early, or that are trained together, cost less than is told here.

    Args:
        title: how the head is called.
        entry: how its features are called.
        train: its training; the head itself is ``train.head``.
        bags: whose sizes count.
        n_outputs: logits per bag.
        n_replicas: folds times seeds.
    """
    device = resolve_device(train.device)
    try:
        # torch's own generator stays as it was
        with torch.random.fork_rng():
            head = create_aggregator(train.head.name, in_dim=bags.dim, n_classes=n_outputs, **train.head.keywords)
            step = _step(head.to(device), train, bags, device)
            step()
            seconds = _least(step, device)
    except (RuntimeError, ValueError, TypeError, MemoryError):
        # whatever it is, training the head says it, as a row of the board
        return HeadCost(title, entry, 0, math.nan)
    steps = math.ceil(len(bags.n_instances) * (train.folds - 1) / train.folds / train.batch_bags)
    whole = seconds * _scale(train, bags) * steps * train.epochs * n_replicas * _VALIDATION
    return HeadCost(title, entry, sum(each.numel() for each in head.parameters()), whole)


def _sizes(train: TrainConfig, bags: Bags) -> np.ndarray:
    """Instances of the bags of one step: quantiles of those of the cohort."""
    middle = (np.arange(train.batch_bags) + 0.5) / train.batch_bags
    sizes = np.maximum(np.quantile(bags.n_instances, middle).astype(np.int64), 1)
    return sizes if train.instance_budget is None else np.minimum(sizes, train.instance_budget)


def _scale(train: TrainConfig, bags: Bags) -> float:
    """By how much a step is larger than what is measured of it."""
    return max(float(_sizes(train, bags).sum()) / _MOST_INSTANCES, 1.0)


def _step(head: torch.nn.Module, train: TrainConfig, bags: Bags, device: torch.device) -> Callable[[], None]:
    """Forward and back once."""
    sizes = np.maximum((_sizes(train, bags) / _scale(train, bags)).astype(np.int64), 1)
    generator = torch.Generator().manual_seed(0)
    instances = torch.randn(int(sizes.sum()), bags.dim, generator=generator).to(device)
    side = math.ceil(math.sqrt(len(instances)))
    at = torch.arange(len(instances), device=device)
    coords = torch.stack([at % side, at // side], dim=1).float() * 256
    offsets = torch.tensor([0, *np.cumsum(sizes)], device=device)
    head.train()

    def step() -> None:
        head.zero_grad(set_to_none=True)
        head(instances, offsets, coords=coords).logits.sum().backward()

    return step


def _least(step: Callable[[], None], device: torch.device) -> float:
    """The shortest of the steps that fit into the time, at least two: others are disturbed."""
    began = time.perf_counter()
    times: list[float] = []
    while len(times) < 2 or (time.perf_counter() - began < _MEASURED_S and len(times) < 20):
        started = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times)
