"""Scores of trials, kept line by line, and replicas whose test part stays sealed."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from mil.bags.bags import Bags
from mil.config.train import TrainConfig
from mil.splits.splits import Splits
from mil.training.replica import Replica, SavedEpoch, TrainedReplica
from mil.training.resume import UnfinishedTraining, discard_unfinished

LEDGER = "scores.jsonl"


@dataclass(frozen=True)
class SeedScore:
    """How one replica did on its validation part.

    Attributes:
        metrics: by name, those of `mil.evaluation.headlines.selection_metrics` and `tie_breaker`; None where undefined.
        seconds: of its training.
        reason: why there is no score, or empty.
    """

    metrics: Mapping[str, float | None] = field(default_factory=dict)
    seconds: float = 0.0
    reason: str = ""


# ---------------------------------------------------------------------------------------------------- what is kept


class ScoreLedger:
    """Scores of finished replicas, a line of JSON each, so that a sweep that was stopped goes on."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._scores: dict[tuple[str, int, int], SeedScore] = {}
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        for line in lines:
            try:
                fields = json.loads(line)
                key = (fields.pop("key"), fields.pop("fold"), fields.pop("seed"))
                self._scores[key] = SeedScore(**fields)
            except (ValueError, KeyError, TypeError):
                # the last line of a run that was killed while it wrote; that replica is scored again
                continue

    def get(self, key: str, fold: int, seed: int) -> SeedScore | None:
        """The score of a replica, if there is one."""
        return self._scores.get((key, fold, seed))

    def add(self, key: str, fold: int, seed: int, score: SeedScore) -> None:
        """Write one down."""
        self._scores[key, fold, seed] = score
        content = {"key": key, "fold": fold, "seed": seed, **vars(score)}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with open(self._path, "a", encoding="utf-8") as file:
            # a line of its own even after one that was cut short
            file.write("\n" + json.dumps(content, allow_nan=False) + "\n")


class SealedReplicas(UnfinishedTraining):
    """Keeps replicas of many settings, each setting and fold in a folder of its own, without their test predictions.

    Args:
        folder: holds all of them.
        key_of: names a configuration's training.
        splits: which slides are tested.
    """

    def __init__(self, folder: Path, key_of: Callable[[TrainConfig], str], splits: Splits) -> None:
        self._root, self._key_of, self._splits = folder, key_of, splits

    def load(self, replica: Replica, bags: Bags, n_classes: int) -> TrainedReplica | None:
        """A replica that was finished before, or None; its test predictions are NaN."""
        return self._kept(replica).load(replica, bags, n_classes)

    def keep(self, trained: TrainedReplica) -> None:
        """Write a finished replica down without what it says of its test part."""
        replica = trained.replica
        tested = self._splits.parts(replica.fold, replica.seed) == "test"
        sealed = np.where(tested[:, None], np.nan, trained.probabilities)
        self._kept(replica).keep(replace(trained, probabilities=sealed))

    def epoch(self, replica: Replica) -> SavedEpoch:  # type: ignore[override]
        """Where a replica keeps its state between epochs."""
        return self._kept(replica).epoch(replica)

    def discard(self, key: str, fold: int) -> None:
        """Forget a setting in a fold."""
        discard_unfinished(self._place(key, fold))

    def _kept(self, replica: Replica) -> UnfinishedTraining:
        key = self._key_of(replica.config)
        return UnfinishedTraining(self._place(key, replica.fold), key)

    def _place(self, key: str, fold: int) -> Path:
        return self._root / f"fold{fold}-{key[:16]}"
