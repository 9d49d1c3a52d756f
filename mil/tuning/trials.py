"""Trials of a sweep: settings trained on the training part of a fold and scored on its validation parts.

What a replica says of its test part is kept nowhere: not in memory, not on disk. `TrialTrainer.test` computes it for
the replicas of chosen settings, when all choices have been made.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from mil.arrays import FloatArray
from mil.bags.bags import Bags
from mil.bags.forward import bag_logits
from mil.cohort.cohort import Cohort
from mil.cohort.targets import CLASSIFICATION
from mil.config.train import TrainConfig
from mil.errors import ConfigError, TrainingDivergedError
from mil.evaluation.headlines import LOWER_IS_BETTER, selection_metrics, tie_breaker
from mil.evaluation.outcomes import Outcomes
from mil.splits.splits import Splits
from mil.statistics.classification import summarise
from mil.statistics.metrics import class_auroc, confusion
from mil.training.replica import Replica, TrainedReplica
from mil.training.replicas import Progress, train_replicas
from mil.training.resume import training_key
from mil.training.tasks import count_outputs, decode
from mil.tuning.score_ledger import LEDGER, ScoreLedger, SeedScore
from mil.tuning.sealed_replicas import SealedReplicas
from mil.tuning.sweep_config import Setting

COMPLETE, PRUNED, FAILED = "complete", "pruned", "failed"
_SMALLEST = 1e-15


@dataclass(frozen=True, eq=False)
class Trial:
    """One setting in one fold.

    Attributes:
        fold: the outer fold.
        number: in the order of trying, from 0.
        setting: what was tried.
        key: names the setting's training, see `mil.training.resume.training_key`.
        scores: one a seed; fewer when it was pruned.
        state: "complete", "pruned" or "failed".
    """

    fold: int
    number: int
    setting: Setting
    key: str
    scores: tuple[SeedScore, ...]
    state: str = COMPLETE

    @property
    def seconds(self) -> float:
        """Of all its trainings."""
        return sum(score.seconds for score in self.scores)

    @property
    def reason(self) -> str:
        """Why it failed, or empty."""
        return next((score.reason for score in self.scores if score.reason), "")

    def mean(self, metric: str) -> float | None:
        """Mean over the seeds in which the metric is defined; None where it is in none, or the trial failed."""
        known = [score.metrics[metric] for score in self.scores if score.metrics.get(metric) is not None]
        values = [value for value in known if value is not None]
        return float(np.mean(values)) if values and self.state != FAILED else None

    @property
    def loss(self) -> float | None:
        """Mean loss, which decides between equal scores."""
        return self.mean("log_loss") if self.mean("loss") is None else self.mean("loss")


def best_trial(trials: Sequence[Trial], metric: str) -> Trial | None:
    """The complete trial of the best mean; of equal ones that of the lower loss, then the earlier.

    Small validation parts give many settings the same area under the curve, which the loss tells apart.
    """
    return min(
        (trial for trial in trials if trial.state == COMPLETE and trial.mean(metric) is not None),
        key=lambda trial: (*rank_of(trial.mean(metric), trial.loss, metric), trial.number),
        default=None,
    )


def rank_of(score: float | None, loss: float | None, metric: str) -> tuple[float, float]:
    """What settings are sorted by; the lowest is the best, the absent are last."""
    if score is None:
        return math.inf, math.inf
    return score if metric in LOWER_IS_BETTER else -score, math.inf if loss is None else loss


def validation_metrics(labels: npt.NDArray[np.int64], scores: FloatArray) -> dict[str, float | None]:
    """What settings for classes can be chosen by, of a validation part: labels [m] and probabilities [m, C]."""
    matrix = confusion(labels, scores.argmax(axis=1), scores.shape[1])
    truth = scores[np.arange(len(labels)), labels]
    values = summarise(matrix, class_auroc(labels, scores))
    values["log_loss"] = -np.log(np.maximum(truth, _SMALLEST)).mean(keepdims=True)
    found = {name: float(values[name][0]) for name in selection_metrics(CLASSIFICATION)}
    return {name: None if math.isnan(value) else value for name, value in found.items()}


def score_validation(outcomes: Outcomes, loss: float | None = None) -> dict[str, float | None]:
    """What settings can be chosen by, whatever the task.

    Args:
        outcomes: what a replica says of its validation part.
        loss: of the epoch that the replica kept; classes have a log-loss of their own, free of class weights.
    """
    cohort = outcomes.cohort
    if cohort.has_classes:
        return validation_metrics(cohort.labels, outcomes.predicted)
    found = {name: float(value[0]) for name, value in outcomes.scores().items()}
    scores = {name: None if math.isnan(value) else value for name, value in found.items()}
    return scores | {tie_breaker(cohort.task): loss if loss is not None and math.isfinite(loss) else None}


@dataclass(frozen=True, eq=False)
class SweepData:
    """What all settings share.

    Attributes:
        bags: n bags.
        cohort: their slides.
        splits: their parts.
        device: where to train.
    """

    bags: Bags
    cohort: Cohort
    splits: Splits
    device: torch.device


@dataclass(frozen=True)
class SweepProgress:
    """Where a sweep is: ``done`` of ``total`` replicas, working on ``what``."""

    done: int
    total: int
    what: str


OnSweepProgress = Callable[[SweepProgress], None]


class TrialTrainer:
    """Trains settings in folds and scores them on validation parts; what was done before is not done again.

    Args:
        data: what all settings share.
        folder: keeps what is done until the sweep is over.
        total: replicas that the sweep trains at most.
        report: called as replicas and epochs are done.
        shares_loss: whether a loss may decide between equal scores, see `SweepConfig.shares_loss`.
    """

    def __init__(
        self,
        data: SweepData,
        folder: Path,
        total: int,
        report: OnSweepProgress | None = None,
        shares_loss: bool = True,
    ) -> None:
        self.data, self._shares_loss = data, shares_loss
        self._ledger = ScoreLedger(folder / LEDGER)
        self._sealed = SealedReplicas(folder, self.key, data.splits)
        self._keys: dict[str, str] = {}
        self._total, self._done, self._report = total, 0, report or (lambda _: None)
        self._best: dict[int, Trial] = {}

    def key(self, config: TrainConfig) -> str:
        """Names a setting's training by all that decides its result."""
        text = repr(config)
        if text not in self._keys:
            data = self.data
            self._keys[text] = training_key(config, data.cohort, data.splits, data.bags, data.device)
        return self._keys[text]

    def train(self, setting: Setting, pairs: Sequence[tuple[int, int]], what: str) -> None:
        """Have the replicas of some (fold, seed) trained and scored; one that cannot be costs itself alone."""
        key = self.key(setting.config)
        missing = [pair for pair in pairs if self._ledger.get(key, *pair) is None]
        self.skip(len(pairs) - len(missing), what)
        if missing:
            self._train_missing(setting, missing, what)

    def _train_missing(self, setting: Setting, pairs: Sequence[tuple[int, int]], what: str) -> None:
        key = self.key(setting.config)
        try:
            self._replicas(setting, pairs, lambda progress: self._progress(key, progress, what))
        except (TrainingDivergedError, ConfigError, MemoryError, torch.OutOfMemoryError) as error:
            rest = [pair for pair in pairs if self._ledger.get(key, *pair) is None]
            if len(pairs) == 1:
                self._ledger.add(key, *pairs[0], SeedScore(reason=str(error).partition("\n")[0]))
                self.skip(1, what)
                return
            for pair in rest:
                self._train_missing(setting, [pair], what)

    def _replicas(
        self, setting: Setting, pairs: Sequence[tuple[int, int]], progress: Callable[[Progress], None] | None = None
    ) -> list[TrainedReplica]:
        data = self.data
        replicas = [Replica(fold, seed, setting.config) for fold, seed in pairs]
        parts = [data.splits.parts(fold, seed) for fold, seed in pairs]
        cohort, n_outputs = data.cohort, count_outputs(setting.config, data.cohort)
        return train_replicas(
            data.bags,
            cohort.targets,
            replicas,
            parts,
            n_outputs,
            data.device,
            progress,
            self._sealed,
            cohort.patient_ids,
        )

    def _progress(self, key: str, progress: Progress, what: str) -> None:
        """Score a finished replica on its validation part, and tell of epochs."""
        replica, trained = progress.replica, progress.trained
        if trained is None:
            epoch = f" epoch {progress.record.epoch}" if progress.record is not None else ""
            self._report(SweepProgress(self._done, self._total, f"{what}, {replica.name}{epoch}"))
            return
        within = np.flatnonzero(self.data.splits.parts(replica.fold, replica.seed) == "validation")
        outcomes = Outcomes(self.data.cohort.subset(within), trained.values[within])
        loss = next(each.validation_loss for each in trained.history if each.epoch == trained.best_epoch)
        found = score_validation(outcomes, loss)
        self._ledger.add(key, replica.fold, replica.seed, SeedScore(found, round(trained.seconds, 3)))
        self.skip(1, what)

    def skip(self, replicas: int, what: str) -> None:
        """Some replicas are over, trained or not."""
        self._done += replicas
        self._report(SweepProgress(self._done, self._total, what))

    def trial(self, fold: int, number: int, setting: Setting, seeds: Sequence[int], state: str = COMPLETE) -> Trial:
        """The trial of a setting whose replicas of these seeds are trained."""
        key = self.key(setting.config)
        found = [self._ledger.get(key, fold, seed) for seed in seeds]
        scores = tuple(score for score in found if score is not None)
        failed = any(score.reason for score in scores)
        if not self._shares_loss:
            scores = tuple(replace(each, metrics={**each.metrics, "loss": None}) for each in scores)
        return Trial(fold, number, setting, key, scores, FAILED if failed else state)

    def keep_if_best(self, trial: Trial, metric: str) -> None:
        """Keep the weights of the best setting of each fold, and no others."""
        before = self._best.get(trial.fold)
        best = best_trial([each for each in (before, trial) if each is not None], metric)
        for each in (before, trial):
            if each is not None and (best is None or each.key != best.key):
                self._sealed.discard(each.key, each.fold)
        if best is not None:
            self._best[trial.fold] = best

    def test(self, trial: Trial) -> list[TrainedReplica]:
        """The replicas of a chosen trial, with what they say of every slide, that of the test part included."""
        replicas = self._replicas(trial.setting, [(trial.fold, seed) for seed in self.data.splits.seeds])
        everything = np.arange(len(self.data.bags))
        opened = []
        for each in replicas:
            logits = bag_logits([each.head.to(self.data.device)], self.data.bags, everything, self.data.device)[0]
            opened.append(replace(each, values=decode(each.task, logits).numpy(), head=each.head.cpu()))
        return opened


def describe_failures(trials: Sequence[Trial]) -> list[str]:
    """A warning per setting that failed somewhere."""
    found: dict[str, tuple[int, str]] = {}
    for trial in trials:
        if trial.state == FAILED:
            count, reason = found.get(trial.setting.title, (0, trial.reason))
            found[trial.setting.title] = (count + 1, reason)
    return [f"{title} failed in {count} folds and was not chosen there: {why}" for title, (count, why) in found.items()]
