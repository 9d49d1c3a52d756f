"""A finished training and its folder of plain files."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mil.cohort.cohort import Cohort
from mil.config.train import TrainConfig
from mil.errors import RunError, listed
from mil.evaluation.replica_predictions import ReplicaPredictions
from mil.evaluation.tables import out_of_fold_rows
from mil.files import Row, new_folder, write_csv, write_json
from mil.runs.folders import check_run_folder
from mil.runs.look_ledger import Look
from mil.splits.splits import Splits
from mil.splits.tables import write_splits
from mil.training.checkpoint import CheckpointRecord, save_checkpoint
from mil.training.replica import EpochRecord, TrainedReplica

RUN_FILES = frozenset(
    "config.yaml splits.csv predictions.csv history.csv oof.csv metrics.json checkpoints figures report.html".split()  # noqa: SIM905
)
"""What a run folder holds, the report included; nothing else is ever deleted."""


@dataclass(frozen=True, eq=False)
class Run:
    """A finished training.

    Attributes:
        config: what was asked for, all defaults filled in.
        cohort: the slides that were used.
        splits: their parts.
        trained: the replicas, with their heads on the CPU.
        predictions: of every replica for every slide.
        metrics: the content of ``metrics.json``; its ``looks`` counts this run alone until it is saved, and then the
            saved runs of the same cohort beside it.
        entry: the features entry.
        recipes: feature and tile recipe as plain values.
        folder: where the run was saved, or None.

    Example:
        >>> run = train(store, cohort, head="abmil", folds=5, seeds=3)           # doctest: +SKIP
        >>> run.metrics["out_of_fold"]["macro_f1"]                               # doctest: +SKIP
        {'value': 0.71, 'low': 0.6, 'high': 0.8}
    """

    config: TrainConfig
    cohort: Cohort
    splits: Splits
    trained: tuple[TrainedReplica, ...]
    predictions: ReplicaPredictions
    metrics: dict[str, Any]
    entry: str
    recipes: tuple[dict[str, Any], dict[str, Any]]
    folder: Path | None = None

    def save(
        self, folder: str | Path, overwrite: bool = False, complete: Callable[[Path], None] | None = None
    ) -> "Run":
        """Write the run folder and return the run with its ``folder``.

        The files are written beside the folder and renamed into place, so a folder that exists is whole. The look at
        the test folds is added to the ledger ``looks.jsonl`` beside the run folders, and counted in the metrics.

        Args:
            folder: where to write it.
            overwrite: replace an earlier run there.
            complete: adds files to the folder, such as a report, before it is put in its place.

        Raises:
            RunError: ``folder`` exists and is not empty, unless ``overwrite``; or it cannot be written.
        """
        folder = Path(folder).absolute()
        check_folder(folder, overwrite)
        look = Look.at(folder, self.cohort, self.config.head.name, self.entry)
        saved = replace(self, folder=folder, metrics=self.metrics | {"looks": look.count_earlier() + 1})
        with new_folder(folder, overwrite=True) as partial:
            _write_run(partial, saved)
            if complete is not None:
                complete(partial)
            look.append()
        return saved


def check_folder(folder: Path, overwrite: bool) -> None:
    """Refuse a run folder that is taken or cannot be written, see `check_run_folder`.

    Raises:
        RunError: ``folder`` is a file, holds anything while ``overwrite`` is False, holds anything besides a finished
            run (which replacing would delete), or its parent takes no files.
    """
    check_run_folder(folder, overwrite)
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    foreign = names - RUN_FILES
    if foreign or (names and "metrics.json" not in names):
        what = f"besides a run it holds {listed(sorted(foreign))}" if foreign else "it holds no finished run"
        raise RunError(f"got {folder} to overwrite → {what} → only a run is replaced; give another folder with --out")


def _write_run(folder: Path, run: Run) -> None:
    """Write every file of a run into an empty folder."""
    (folder / "config.yaml").write_text(run.config.to_yaml(), encoding="utf-8")
    write_splits(folder / "splits.csv", run.splits, run.cohort)
    write_csv(folder / "predictions.csv", run.predictions.rows())
    write_csv(folder / "history.csv", _history_rows(run.trained))
    write_csv(folder / "oof.csv", out_of_fold_rows(*run.predictions.tested()))
    (folder / "checkpoints").mkdir()
    for each in run.trained:
        save_checkpoint(folder / "checkpoints" / f"{each.replica.name}.safetensors", each.head, _record(run, each))
    write_json(folder / "metrics.json", run.metrics)


def _record(run: Run, trained: TrainedReplica) -> CheckpointRecord:
    return CheckpointRecord(
        head=run.config.head.name,
        keywords=dict(run.config.head.keywords),
        in_dim=trained.head.in_dim,
        class_names=run.cohort.stated_classes,
        target=run.cohort.target,
        entry=run.entry,
        feature_recipe=run.recipes[0],
        tile_recipe=run.recipes[1],
        replica=trained.replica.name,
        fold=trained.replica.fold,
        seed=trained.replica.seed,
        best_epoch=trained.best_epoch,
        config=run.config.to_dict(),
        versions=run.metrics["versions"],
        outputs=0 if run.cohort.has_classes else trained.head.n_classes,
        task=trained.task,
    )


def _history_rows(trained: Iterable[TrainedReplica]) -> Iterator[Row]:
    names = list(EpochRecord.__dataclass_fields__)
    yield ("replica", "fold", "seed", *names)
    for each in trained:
        for record in each.history:
            values = [getattr(record, name) for name in names]
            yield (each.replica.name, each.replica.fold, each.replica.seed, *values)
