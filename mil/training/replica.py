"""A replica, (fold, seed, settings) of one head, and what its training leaves."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from aggregators import Aggregator
from mil.bags.bags import Bags
from mil.config.train import TrainConfig

PartArray = npt.NDArray[np.str_]


@dataclass(frozen=True)
class ReplicaId:
    """Which replica of a run: a fold and a seed."""

    fold: int
    seed: int

    @property
    def name(self) -> str:
        """Such as ``fold0-seed2``; names the checkpoint and the rows of every table."""
        return f"fold{self.fold}-seed{self.seed}"


@dataclass(frozen=True)
class Replica(ReplicaId):
    """One head to be trained: a fold, a seed and the hyper-parameters."""

    config: TrainConfig


@dataclass(frozen=True)
class EpochRecord:
    """What an epoch did; epochs count from 1, ``lr`` is that of its last step.

    Both losses are the task's first alone (of classes the class-weighted cross-entropy), whatever loss is minimised,
    and without what some heads add to it (their auxiliary loss), so that they can be compared. The score is balanced
    accuracy; of labels the mean AUROC, of numbers R², of survival the concordance index.
    """

    epoch: int
    lr: float
    train_loss: float
    validation_loss: float
    validation_score: float
    seconds: float


@dataclass(frozen=True, eq=False)
class TrainedReplica:
    """A trained head at its best epoch.

    Attributes:
        replica: what was trained.
        head: on the CPU, in evaluation mode, with the weights of the best epoch.
        values: float64 [n, values], predicted of every bag whatever its part, see `mil.training.tasks.decode`.
        history: one record per epoch that ran.
        best_epoch: epoch of the lowest validation loss.
        seconds: wall time.
        inference_seconds: of it, the final prediction of all bags.
        peak_bytes: most memory while it was trained, see `PeakMemory`; None where that cannot be measured.
        task: record of the task, see `mil.training.tasks.Task`.
    """

    replica: Replica
    head: Aggregator
    values: npt.NDArray[np.float64]
    history: tuple[EpochRecord, ...]
    best_epoch: int
    seconds: float
    inference_seconds: float
    peak_bytes: int | None
    task: Mapping[str, Any]

    @property
    def probabilities(self) -> npt.NDArray[np.float64]:
        """`values`, as version 0.1 calls them."""
        return self.values

    @property
    def parameters(self) -> int:
        """Numbers that the head learned."""
        return sum(parameter.numel() for parameter in self.head.parameters() if parameter.requires_grad)


EpochDone = Callable[[EpochRecord], None]


class SavedEpoch(Protocol):
    """Where a replica, or a stack of them, keeps its state between epochs."""

    def load(self) -> dict[str, Any] | None:
        """The state that was saved last, if there is any."""
        ...

    def due(self) -> bool:
        """Whether enough has been done since the last to save again."""
        ...

    def save(self, state: dict[str, Any]) -> None:
        """Replace the saved state."""
        ...

    def discard(self) -> None:
        """It is no longer needed."""
        ...


class ReplicaKeeper(Protocol):
    """What training asks of whoever keeps its replicas, so that one that was stopped goes on."""

    def load(self, replica: Replica, bags: Bags, n_outputs: int) -> TrainedReplica | None:
        """A replica that was finished before, or None."""
        ...

    def keep(self, trained: TrainedReplica) -> None:
        """Write a finished replica down; its saved epoch is no longer needed."""
        ...

    def epoch(self, replica: Replica) -> SavedEpoch:
        """Where a replica keeps its state between epochs."""
        ...

    def stack(self, replicas: Sequence[Replica]) -> SavedEpoch:
        """Where replicas that are trained together keep theirs."""
        ...
