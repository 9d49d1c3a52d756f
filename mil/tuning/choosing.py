"""Which settings are trained, and which of them a fold chooses by its validation part."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mil.errors import RunError
from mil.evaluation.headlines import LOWER_IS_BETTER
from mil.splits.splits import Splits
from mil.tuning.search_space import Dimension, value_name
from mil.tuning.sweep_config import Setting, SweepConfig
from mil.tuning.tpe import TpeStudy, forget_studies
from mil.tuning.trials import COMPLETE, PRUNED, Trial, TrialTrainer, best_trial, rank_of


@dataclass(frozen=True, eq=False)
class SettingAverage:
    """A setting that was trained in every fold.

    Attributes:
        setting: which.
        score: mean over folds of the mean validation score over seeds.
        loss: the same of the loss, which decides between equal scores; of classes it is the log-loss. None where
            settings differ in their loss.
        n_chosen: folds that chose it.
    """

    setting: Setting
    score: float
    loss: float | None
    n_chosen: int


def train_listed(trainer: TrialTrainer, settings: Sequence[Setting], config: SweepConfig) -> list[Trial]:
    """Train every setting of a list in every fold."""
    splits = trainer.data.splits
    pairs = [(fold, seed) for fold in range(splits.n_folds) for seed in splits.seeds]
    trials = []
    for number, setting in enumerate(settings):
        trainer.train(setting, pairs, f"setting {number + 1} of {len(settings)}: {setting.title}")
        for fold in range(splits.n_folds):
            trial = trainer.trial(fold, number, setting, splits.seeds)
            trainer.keep_if_best(trial, config.select)
            trials.append(trial)
    return sorted(trials, key=lambda trial: (trial.fold, trial.number))


def search_settings(trainer: TrialTrainer, config: SweepConfig, file: Path) -> list[Trial]:
    """Search settings in every fold by what that fold's validation parts have shown."""
    forget_studies(file)
    trials: list[Trial] = []
    for fold in range(trainer.data.splits.n_folds):
        seed = int(np.random.default_rng((config.seed, fold)).integers(2**31))
        study = TpeStudy(config.space, f"fold{fold}", file, seed, config.select not in LOWER_IS_BETTER)
        known: dict[str, Trial] = {}
        for number in range(config.trials or 0):
            trial = _next_trial(trainer, study, config, fold, number, known)
            if trial is not None:
                known[trial.key] = trial
                trainer.keep_if_best(trial, config.select)
        trials += known.values()
    return trials


def _next_trial(
    trainer: TrialTrainer, study: TpeStudy, config: SweepConfig, fold: int, number: int, known: Mapping[str, Trial]
) -> Trial | None:
    """Train what the search asks for; None where that was tried before."""
    token, values = study.ask()
    setting = config.setting(values)
    earlier = known.get(trainer.key(setting.config))
    what = f"fold {fold}, trial {number + 1} of {config.trials}: {setting.title}"
    if earlier is not None:
        trainer.skip(len(trainer.data.splits.seeds), what)
        study.tell(token, earlier.mean(config.select), earlier.state == PRUNED)
        return None
    trial = _train_until_hopeless(trainer, study, token, config.select, (fold, number, setting), what)
    study.tell(token, trial.mean(config.select), trial.state == PRUNED)
    return trial


def _train_until_hopeless(
    trainer: TrialTrainer, study: TpeStudy, token: Any, select: str, of: tuple[int, int, Setting], what: str
) -> Trial:
    """Train a setting seed by seed, until it fails or falls behind the median of earlier ones."""
    fold, number, setting = of
    seeds = trainer.data.splits.seeds
    for step in range(len(seeds)):
        trainer.train(setting, [(fold, seeds[step])], what)
        trial = trainer.trial(fold, number, setting, seeds[: step + 1])
        score, rest = trial.mean(select), len(seeds) - step - 1
        if trial.state != COMPLETE or not rest:
            trainer.skip(rest, what)
            return trial
        if score is not None and study.is_hopeless(token, step, score):
            trainer.skip(rest, what)
            return trainer.trial(fold, number, setting, seeds[: step + 1], PRUNED)
    raise RuntimeError("a trial has seeds")


def choose_trials(trials: Sequence[Trial], splits: Splits, select: str) -> list[Trial]:
    """The best trial of each fold.

    Raises:
        RunError: every setting failed in some fold.
    """
    chosen = []
    for fold in range(splits.n_folds):
        own = [trial for trial in trials if trial.fold == fold]
        best = best_trial(own, select)
        if best is None:
            reason = next((trial.reason for trial in own if trial.reason), "no score")
            raise RunError(
                f"got no setting that could be trained in fold {fold} (the first said: {reason}) → expected one at "
                f"least → sweep other values, such as lower learning rates, with a new --out"
            )
        chosen.append(best)
    return chosen


def average_settings(
    trainer: TrialTrainer, trials: Sequence[Trial], chosen: Sequence[Trial], config: SweepConfig
) -> list[SettingAverage]:
    """Settings by their mean over all folds, the best first.

    A search tries other settings in every fold; what it chose in one is trained in the others here, for this average
    alone: the choices of the folds stand.
    """
    splits = trainer.data.splits
    candidates = {trial.key: trial.setting for trial in (trials if config.method != "tpe" else chosen)}
    kept = {(trial.key, trial.fold) for trial in chosen}
    found = []
    for key, setting in candidates.items():
        pairs = [(fold, seed) for fold in range(splits.n_folds) for seed in splits.seeds if (key, fold) not in kept]
        if config.method == "tpe":
            trainer.train(setting, pairs, f"chosen setting in the other folds: {setting.title}")
        own = [trainer.trial(fold, 0, setting, splits.seeds) for fold in range(splits.n_folds)]
        score, loss = _mean_of([trial.mean(config.select) for trial in own]), _mean_of([trial.loss for trial in own])
        n_chosen = sum((key, fold) in kept for fold in range(splits.n_folds))
        if score is not None:
            found.append(SettingAverage(setting, score, loss, n_chosen))
    if not found:
        raise RunError(
            "got no setting that could be trained in every fold → expected one at least → sweep other values, such as "
            "lower learning rates, with a new --out"
        )
    return sorted(found, key=lambda each: rank_of(each.score, each.loss, config.select))


def _mean_of(values: Sequence[float | None]) -> float | None:
    """None where one is missing."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if len(known) == len(values) else None


def warn_of_edges(space: Sequence[Dimension], best: Setting) -> Iterator[str]:
    """Numbers whose best is at an end of what was tried: a better one may lie beyond."""
    for dimension in space:
        value = best.values[dimension.key]
        end = dimension.end_of(value)
        if end:
            text = f"the best {dimension.key}, {value_name(value)}, is the {end} that was tried"
            yield f"{text}: a better one may lie beyond"
