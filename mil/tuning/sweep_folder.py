"""The folder of a sweep: what is written, and in which words."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from mil.cohort.cohort import Cohort
from mil.config.train import TrainConfig
from mil.evaluation.headlines import tie_breaker
from mil.evaluation.replica_predictions import ReplicaPredictions
from mil.evaluation.tables import out_of_fold_rows
from mil.files import Row, tell_full_disk, write_atomically, write_csv, write_json
from mil.runs.look_ledger import Look
from mil.splits.splits import Splits
from mil.splits.tables import write_splits
from mil.training.checkpoint import package_versions
from mil.training.resume import discard_unfinished
from mil.tuning.choosing import SettingAverage
from mil.tuning.importance import Importance
from mil.tuning.search_space import override_text
from mil.tuning.sweep_config import CHOSEN, Setting, SweepConfig
from mil.tuning.trials import PRUNED, Trial

PROCEDURE = (
    "The out-of-fold figures judge the whole procedure, the search included: the test slides of each fold were "
    "predicted by the setting that the fold's own validation parts chose. They are the figures of no single setting."
)
UNFINISHED, STUDY = "unfinished", "study.log"


@dataclass(frozen=True, eq=False)
class Sweep:
    """A finished sweep.

    Attributes:
        config: what was asked for.
        cohort: the slides that were used.
        splits: their parts.
        trials: every setting in every fold that tried it.
        chosen: one trial a fold.
        averages: settings that were trained in all folds, the best first.
        importances: the dimensions, those that explain most of the validation score first.
        predictions: of the chosen settings' replicas alone.
        metrics: the content of ``metrics.json``.
        folder: where it was written, or None.

    Example:
        >>> found = sweep(store, cohort, {"optimizer.lr": [1e-4, 1e-3]})         # doctest: +SKIP
        >>> found.best.values, found.metrics["out_of_fold"]["auroc"]["value"]    # doctest: +SKIP
        ({'optimizer.lr': 0.001}, 0.83)
    """

    config: SweepConfig
    cohort: Cohort
    splits: Splits
    trials: tuple[Trial, ...]
    chosen: tuple[Trial, ...]
    averages: tuple[SettingAverage, ...]
    importances: tuple[Importance, ...]
    predictions: ReplicaPredictions
    metrics: dict[str, Any]
    folder: Path | None = None

    @property
    def best(self) -> Setting:
        """The setting with the best mean over the validation parts of all folds: the one to train for new slides."""
        return self.averages[0].setting

    @property
    def sensitivities(self) -> tuple[Importance, ...]:
        """The name that `importances` had in 0.1."""
        warnings.warn("Sweep.sensitivities is Sweep.importances now", DeprecationWarning, stacklevel=2)
        return self.importances


def sweep_metrics(found: Sweep, entry: str, warnings: Sequence[str]) -> dict[str, Any]:
    """The content of ``metrics.json``; the test parts are scored here, once."""
    config = found.config
    cohort = found.cohort
    out_of_fold = found.predictions.outcomes().evaluate()
    validation = [trial.mean(config.select) for trial in found.chosen]
    section = {
        "method": config.method,
        "select": config.select,
        "seed": config.seed,
        "space": {dimension.key: dimension.plain() for dimension in config.space},
        "n_settings": len({trial.key for trial in found.trials}),
        "n_trials": len(found.trials),
        "n_pruned": sum(trial.state == PRUNED for trial in found.trials),
        "chosen": [dict(trial.setting.values) for trial in found.chosen],
        "chosen_validation": float(np.mean([score for score in validation if score is not None])),
        "best": dict(found.best.values),
        "best_validation": found.averages[0].score,
        "explained": {each.dimension.key: each.share for each in found.importances},
        "note": PROCEDURE,
    }
    return {
        "target": cohort.target,
        "task": cohort.task,
        "class_names": list(cohort.stated_classes),
        "head": f"sweep of {', '.join(dimension.key for dimension in config.space)}",
        "entry": entry,
        "n_replicas": len(found.predictions.replicas),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": package_versions(),
        "split": found.splits.record.to_dict(),
        "cohort": {"attrition": [[reason, count, list(ids)] for reason, count, ids in cohort.attrition.rows()]},
        "warnings": [*found.splits.warnings, *out_of_fold["warnings"], *warnings],
        "looks": 1,
        "out_of_fold": out_of_fold,
        "sweep": section,
    }


def write_sweep(folder: Path, found: Sweep, entry: str) -> Sweep:
    """Write what a sweep found; ``metrics.json``, which says that it is whole, comes last."""
    look = Look.at(folder, found.cohort, found.metrics["head"], entry)
    found = replace(found, metrics=found.metrics | {"looks": look.count_earlier() + 1})
    with tell_full_disk(folder):
        _write_tables(folder, found)
        look.append()
        write_json(folder / "metrics.json", found.metrics)
    discard_unfinished(folder / UNFINISHED)
    return found


def _write_tables(folder: Path, found: Sweep) -> None:
    """Every file but ``metrics.json``."""
    write_splits(folder / "splits.csv", found.splits, found.cohort)
    write_csv(folder / "trials.csv", _trial_rows(found))
    write_csv(folder / "chosen.csv", _chosen_rows(found))
    write_csv(folder / "settings.csv", _setting_rows(found))
    write_atomically(folder / "best.yaml", best_yaml(found).encode())
    write_csv(folder / "predictions.csv", found.predictions.rows())
    write_csv(folder / "oof.csv", out_of_fold_rows(*found.predictions.tested()))


def best_yaml(found: Sweep) -> str:
    """The best setting as a whole configuration for `mil train`, with a word on what it may be used for."""
    best, select = found.averages[0], found.config.select
    config: TrainConfig = best.setting.config
    head = [
        f"The setting of the best mean validation {select}, {best.score:.4g}, over all folds: {best.setting.title}",
        CHOSEN,
        "What it scores out of fold on this cohort is too good; the honest figure is that of the sweep.",
    ]
    return "".join(f"# {line}\n" for line in head) + config.to_yaml()


def _cells(setting: Setting) -> list[str]:
    """The values of a setting as an override has them."""
    return [override_text(key, value).partition("=")[2] for key, value in setting.values.items()]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def _trial_rows(found: Sweep) -> Iterator[Row]:
    select, seeds = found.config.select, found.splits.seeds
    keys = [dimension.key for dimension in found.config.space]
    seed_columns = [f"{select}_seed{seed}" for seed in seeds]
    loss = f"mean_{tie_breaker(found.cohort.task)}"
    yield ("fold", "trial", *keys, "state", f"mean_{select}", *seed_columns, loss, "seconds", "reason")
    for trial in found.trials:
        scores = [_number(score.metrics.get(select)) for score in trial.scores]
        scores += [""] * (len(seeds) - len(scores))
        means = [_number(trial.mean(select)), _number(trial.loss)]
        where = (trial.fold, trial.number, *_cells(trial.setting), trial.state)
        yield (*where, means[0], *scores, means[1], f"{trial.seconds:.3f}", trial.reason)


def _chosen_rows(found: Sweep) -> Iterator[Row]:
    select = found.config.select
    yield ("fold", "trial", *(dimension.key for dimension in found.config.space), f"validation_{select}")
    for trial in found.chosen:
        yield (trial.fold, trial.number, *_cells(trial.setting), _number(trial.mean(select)))


def _setting_rows(found: Sweep) -> Iterator[Row]:
    """Settings that were trained in all folds, the best first."""
    keys = [dimension.key for dimension in found.config.space]
    loss = f"mean_validation_{tie_breaker(found.cohort.task)}"
    yield (*keys, f"mean_validation_{found.config.select}", loss, "folds_that_chose_it")
    for each in found.averages:
        yield (*_cells(each.setting), _number(each.score), _number(each.loss), each.n_chosen)
