"""Replicas of a sweep, whose test part stays sealed."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from extract.store import fingerprint
from mil.bags.bags import Bags
from mil.config.train import TrainConfig
from mil.splits.splits import Splits
from mil.training.replica import Replica, SavedEpoch, TrainedReplica
from mil.training.resume import UnfinishedTraining, discard_unfinished


class SealedReplicas:
    """Keeps replicas of many settings, each setting and fold in a folder of its own, without their test predictions.

    A `mil.training.replica.ReplicaKeeper`.

    Args:
        folder: holds all of them.
        key_of: names a configuration's training.
        splits: which slides are tested.
    """

    def __init__(self, folder: Path, key_of: Callable[[TrainConfig], str], splits: Splits) -> None:
        self._folder, self._key_of, self._splits = folder, key_of, splits

    def load(self, replica: Replica, bags: Bags, n_outputs: int) -> TrainedReplica | None:
        """A replica that was finished before, or None; its test predictions are NaN."""
        return self._training(replica).load(replica, bags, n_outputs)

    def keep(self, trained: TrainedReplica) -> None:
        """Write a finished replica down without what it says of its test part."""
        replica = trained.replica
        tested = self._splits.parts(replica.fold, replica.seed) == "test"
        sealed = np.where(tested[:, None], np.nan, trained.values)
        self._training(replica).keep(replace(trained, values=sealed))

    def epoch(self, replica: Replica) -> SavedEpoch:
        """Where a replica keeps its state between epochs."""
        return self._training(replica).epoch(replica)

    def stack(self, replicas: Sequence[Replica]) -> SavedEpoch:
        """Where replicas that are trained together, of several folds or settings, keep theirs."""
        key = fingerprint({"keys": [self._key_of(replica.config) for replica in replicas]})
        return UnfinishedTraining(self._folder / "stacks", key).stack(replicas)

    def discard(self, key: str, fold: int) -> None:
        """Forget a setting in a fold."""
        discard_unfinished(self._place(key, fold))

    def _training(self, replica: Replica) -> UnfinishedTraining:
        key = self._key_of(replica.config)
        return UnfinishedTraining(self._place(key, replica.fold), key)

    def _place(self, key: str, fold: int) -> Path:
        return self._folder / f"fold{fold}-{key[:16]}"
