"""Time to quality: how a validation AUROC grows with the time spent on training, and nothing else.

The clock runs while a contestant prepares and trains, and stands still while it is looked at. Wall and CPU time are
both kept: CPU time is what a busy machine changes less.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mil.statistics.metrics import auroc
from mil.training.losses import probabilities

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
Kind = Literal["wall", "cpu"]


@dataclass(frozen=True, eq=False)
class Task:
    """What every contestant gets.

    Attributes:
        slide_ids: n names.
        bags: n matrices [n_instances, dim] of one dtype.
        labels: int64 [n].
        training: the slides to learn from.
        validation: the slides on which the AUROC is taken; no contestant sees their labels.
        n_classes: C.
        device: where to train.
    """

    slide_ids: Sequence[str]
    bags: Sequence[npt.NDArray[Any]]
    labels: IntArray
    training: IntArray
    validation: IntArray
    n_classes: int
    device: torch.device

    @property
    def dim(self) -> int:
        """Features per instance."""
        return int(self.bags[0].shape[1])

    @property
    def training_instances(self) -> int:
        """Of all training bags."""
        return sum(len(self.bags[slide]) for slide in self.training.tolist())

    def score(self, logits: Tensor) -> float:
        """AUROC of logits [validation, C]; NaN when one is not finite, which reaches no target."""
        if not bool(logits.isfinite().all()):
            return math.nan
        return float(auroc(self.labels[self.validation], probabilities(logits).numpy())[0])


class Clock:
    """A stop watch for wall and CPU time."""

    def __init__(self, device: torch.device) -> None:
        self.wall = self.cpu = 0.0
        self._device = device
        self._started = (0.0, 0.0)

    def start(self) -> None:
        """Go on."""
        self._wait()
        self._started = time.perf_counter(), time.process_time()

    def stop(self) -> None:
        """Stand still."""
        self._wait()
        self.wall += time.perf_counter() - self._started[0]
        self.cpu += time.process_time() - self._started[1]

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


@dataclass(frozen=True, eq=False)
class Curve:
    """One training: at the end of every epoch the time spent so far and the AUROC.

    Attributes:
        wall: seconds.
        cpu: seconds of all threads.
        aurocs: on the validation slides.
        last: what was said of them after the last epoch, probabilities [validation, C].
    """

    wall: tuple[float, ...]
    cpu: tuple[float, ...]
    aurocs: tuple[float, ...]
    last: FloatArray

    @property
    def final(self) -> float:
        """AUROC after the last epoch."""
        return self.aurocs[-1]

    def arrives(self, target: float) -> bool:
        """Whether any epoch ends at the target or above."""
        return any(value >= target for value in self.aurocs)

    def seconds_to(self, target: float, kind: Kind) -> float:
        """Seconds until the first epoch that ends at the target or above; infinity if none does."""
        seconds = self.wall if kind == "wall" else self.cpu
        return next((at for at, value in zip(seconds, self.aurocs, strict=True) if value >= target), math.inf)

    def seconds_per_epoch(self, kind: Kind) -> float:
        """Median over epochs, without what came before the first one and without the first, which warms up."""
        seconds = self.wall if kind == "wall" else self.cpu
        return float(np.median(np.diff(seconds))) if len(seconds) > 1 else seconds[0]


class CurveWriter:
    """Writes a curve down while a contestant trains; the clock stands still while the AUROC is taken."""

    def __init__(self, task: Task) -> None:
        self.clock = Clock(task.device)
        self._task = task
        self._points: list[tuple[float, float, float]] = []
        self._last = np.empty((0, task.n_classes))
        self.clock.start()

    def epoch_done(self, logits: Callable[[], Tensor]) -> None:
        """Note the time, then take the AUROC of what ``logits`` gives, [validation, C]."""
        self.clock.stop()
        found = logits()
        self._points.append((self.clock.wall, self.clock.cpu, self._task.score(found)))
        self._last = probabilities(found).numpy()
        self.clock.start()

    def curve(self) -> Curve:
        """What was written so far."""
        wall, cpu, aurocs = zip(*self._points, strict=True)
        return Curve(wall, cpu, aurocs, self._last)


class Contestant(Protocol):
    """A way to train that is driven epoch by epoch."""

    def start(self, task: Task, lr: float, seed: int) -> None:
        """Prepare, on the clock."""
        ...

    def train_epoch(self) -> None:
        """One pass over the training slides, on the clock."""
        ...

    def logits(self) -> Tensor:
        """[validation, C] on the CPU, from all instances, in evaluation mode, off the clock."""
        ...


def follow(contestant: Contestant, task: Task, lr: float, seed: int, epochs: int) -> Curve:
    """Train a contestant for some epochs and write its curve."""
    writer = CurveWriter(task)
    contestant.start(task, lr, seed)
    for _ in range(epochs):
        contestant.train_epoch()
        writer.epoch_done(contestant.logits)
    return writer.curve()
