"""Training many replicas of one head on one set of bags."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from mil.bags import Bags
from mil.training import EpochRecord, IntArray, PartArray, Replica, TrainedReplica, train_replica
from mil.unfinished import UnfinishedTraining


@dataclass(frozen=True)
class Progress:
    """Where a training is: after epoch ``record`` of replica number ``index`` (from 0) of ``n_replicas``.

    ``trained`` is set instead of ``record`` once the replica is done.
    """

    index: int
    n_replicas: int
    replica: Replica
    record: EpochRecord | None = None
    trained: TrainedReplica | None = None


OnProgress = Callable[[Progress], None]


def train_replicas(
    bags: Bags,
    labels: IntArray,
    replicas: Sequence[Replica],
    parts: Sequence[PartArray],
    n_classes: int,
    device: torch.device,
    progress: OnProgress | None = None,
    unfinished: UnfinishedTraining | None = None,
) -> list[TrainedReplica]:
    """Train every replica on the same bags, which are read into memory once.

    They run one after another; a replica's result is the same in any list.

    Args:
        bags: n bags.
        labels: int64 [n].
        replicas: what to train.
        parts: for each replica the part of every bag, [n] of "train", "validation" or "test".
        n_classes: classes.
        device: where to train.
        progress: called after each epoch and each replica.
        unfinished: keeps what is done; replicas that it holds are not trained again.

    Raises:
        BagError: features that are not finite.
        TrainingDivergedError: a loss that is not finite.
    """
    report = progress or (lambda _: None)
    trained = []
    for index, (replica, part) in enumerate(zip(replicas, parts, strict=True)):

        def epoch_done(record: EpochRecord, index: int = index, replica: Replica = replica) -> None:
            report(Progress(index, len(replicas), replica, record=record))

        kept = unfinished.load(replica, bags, n_classes) if unfinished is not None else None
        if kept is None:
            saved = unfinished.epoch(replica) if unfinished is not None else None
            kept = train_replica(bags, labels, replica, part, n_classes, device, epoch_done, saved)
            if unfinished is not None:
                unfinished.keep(kept)
        trained.append(kept)
        report(Progress(index, len(replicas), replica, trained=trained[-1]))
    return trained
