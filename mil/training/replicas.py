"""Training many replicas of one head on one set of bags."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from extract.memory import keep_freed_memory
from mil.bags.bags import Bags
from mil.bags.forward import MAX_INSTANCES
from mil.training.loop import train_replica
from mil.training.replica import EpochRecord, PartArray, Replica, ReplicaKeeper, TrainedReplica
from mil.training.stackable import stacks
from mil.training.stacked import train_stacked
from mil.training.tasks import TargetArray


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


# what a stack's forward and backward hold of a pack, in copies of its instances in float32
COPIES_OF_INSTANCES = 8
STACKED_ON_CPU = 8

OnProgress = Callable[[Progress], None]


def train_replicas(
    bags: Bags,
    targets: TargetArray,
    replicas: Sequence[Replica],
    parts: Sequence[PartArray],
    n_outputs: int,
    device: torch.device,
    progress: OnProgress | None = None,
    keeper: ReplicaKeeper | None = None,
    patients: Sequence[str] | None = None,
    stacked: bool | None = None,
) -> list[TrainedReplica]:
    """Train every replica on the same bags, which are read into memory once.

    On a GPU the replicas that can be are trained together (`mil.training.stacked`), as many at once as its memory
    holds; all others run one after another, and on a CPU all do, where stacking gains nothing. A replica's result is
    the same in any list: to the last bit one by one, to float tolerance stacked.

    Args:
        bags: n bags.
        targets: classes int64 [n], or float64 [n, columns] of other tasks, see `mil.cohort.cohort.Cohort.targets`.
        replicas: what to train.
        parts: for each replica the part of every bag, [n] of "train", "validation" or "test".
        n_outputs: logits per bag, see `mil.training.tasks.count_outputs`.
        device: where to train.
        progress: called after each epoch and each replica.
        keeper: keeps what is done; replicas that it holds are not trained again.
        patients: [n], whose slide each bag is.
        stacked: whether to stack; None does on a GPU.

    Raises:
        BagError: features that are not finite.
        TrainingDivergedError: a loss that is not finite.
    """
    if device.type == "cpu":
        keep_freed_memory()
    ledger = _Ledger(list(replicas), progress or (lambda _: None), keeper)
    ledger.load(bags, n_outputs)
    groups, alone = [], ledger.missing()
    if device.type == "cuda" if stacked is None else stacked:
        most = _at_once(bags, replicas, device)
        found, rest = stacks([replicas[index] for index in alone], bags, n_outputs, most)
        groups, alone = [[alone[at] for at in group] for group in found], [alone[at] for at in rest]
    for group in groups:
        chosen, own_parts = [replicas[index] for index in group], [parts[index] for index in group]
        saved = keeper.stack(chosen) if keeper is not None else None
        try:
            trained = train_stacked(
                bags, targets, chosen, own_parts, n_outputs, device, ledger.epoch_done(group), saved
            )
        except torch.OutOfMemoryError:
            warnings.warn(
                f"got too little memory for {len(group)} replicas at once → they are trained one by one", stacklevel=2
            )
            alone = sorted(alone + group)
            continue
        for index, each in zip(group, trained, strict=True):
            ledger.finish(index, each)
        if saved is not None:
            saved.discard()
    for index in alone:
        saved = keeper.epoch(replicas[index]) if keeper is not None else None
        told = partial(ledger.epoch_done([index]), 0)
        ledger.finish(
            index,
            train_replica(bags, targets, replicas[index], parts[index], n_outputs, device, told, saved, patients),
        )
    return ledger.trained()


@dataclass
class _Ledger:
    """Which replicas are done, in the order of the list, and who is told."""

    replicas: list[Replica]
    report: OnProgress
    keeper: ReplicaKeeper | None
    done: dict[int, TrainedReplica] = field(default_factory=dict)

    def load(self, bags: Bags, n_outputs: int) -> None:
        """Take over what an earlier training has finished."""
        if self.keeper is None:
            return
        for index, replica in enumerate(self.replicas):
            trained = self.keeper.load(replica, bags, n_outputs)
            if trained is not None:
                self._note(index, trained)

    def missing(self) -> list[int]:
        """What is still to be trained."""
        return [index for index in range(len(self.replicas)) if index not in self.done]

    def epoch_done(self, group: Sequence[int]) -> Callable[[int, EpochRecord], None]:
        """Tells of an epoch of the replica at a place in a group."""

        def tell(at: int, record: EpochRecord) -> None:
            index = group[at]
            self.report(Progress(index, len(self.replicas), self.replicas[index], record=record))

        return tell

    def finish(self, index: int, trained: TrainedReplica) -> None:
        """Keep a replica and tell."""
        if self.keeper is not None:
            self.keeper.keep(trained)
        self._note(index, trained)

    def trained(self) -> list[TrainedReplica]:
        """All of them, in order."""
        return [self.done[index] for index in range(len(self.replicas))]

    def _note(self, index: int, trained: TrainedReplica) -> None:
        self.done[index] = trained
        self.report(Progress(index, len(self.replicas), self.replicas[index], trained=trained))


def _at_once(bags: Bags, replicas: Sequence[Replica], device: torch.device) -> int:
    """Replicas in one stack, so that a pack's activations take at most half of the free memory of a GPU."""
    if device.type != "cuda":
        return STACKED_ON_CPU
    config = replicas[0].config
    largest = int(bags.n_instances.max())
    rows = min(largest, config.instance_budget or largest) * config.batch_bags
    rows = max(rows, min(MAX_INSTANCES, int(bags.n_instances.sum())))
    free, _ = torch.cuda.mem_get_info(device)
    return max(1, int(free / 2 / (rows * bags.dim * 4 * COPIES_OF_INSTANCES)))
