"""The plain files of a run folder, read back for its report and checked for their keys and columns."""

import io
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mil.errors import RunError
from mil.files import read_csv_dicts, read_csv_rows
from mil.runs.run_folder import RunFolder

METRICS_KEYS = (
    "target",
    "class_names",
    "head",
    "entry",
    "created",
    "versions",
    "cohort",
    "warnings",
    "looks",
    "synthetic",
    "out_of_fold",
    "per_replica",
)
COLUMNS = {
    "history.csv": ("replica", "fold", "seed", "epoch", "train_loss", "validation_loss"),
    "splits.csv": ("fold", "slide_id", "split"),
}

Table = list[dict[str, str]]


@dataclass(frozen=True)
class RunFiles:
    """What a report is made of.

    Attributes:
        folder: where the run lies.
        metrics: content of ``metrics.json``.
        out_of_fold: rows of ``oof.csv``, one a slide.
        history: rows of ``history.csv``, one an epoch of a replica.
        splits: rows of ``splits.csv``.
        config: text of ``config.yaml``.
    """

    folder: Path
    metrics: dict[str, Any]
    out_of_fold: Table
    history: Table
    splits: Table
    config: str

    @property
    def evaluation(self) -> dict[str, Any]:
        """The metrics of the test folds with their intervals."""
        return dict(self.metrics["out_of_fold"])

    @property
    def replicas(self) -> list[dict[str, Any]]:
        """Fold, seed and scores of every replica."""
        return list(self.metrics["per_replica"])

    @cached_property
    def patient_ids(self) -> list[str]:
        """Of the slides of ``oof.csv``."""
        return [row["patient_id"] for row in self.out_of_fold]

    @property
    def folds(self) -> list[int]:
        """Their numbers, ascending."""
        return sorted({int(replica["fold"]) for replica in self.replicas})

    @property
    def seeds(self) -> list[int]:
        """Ascending."""
        return sorted({int(replica["seed"]) for replica in self.replicas})

    @cached_property
    def test_folds(self) -> dict[str, list[int]]:
        """The folds that test each slide, the same for every seed; several where folds are repeated."""
        found = sorted({(row["slide_id"], int(row["fold"])) for row in self.splits if row["split"] == "test"})
        folds: dict[str, list[int]] = defaultdict(list)
        for slide_id, fold in found:
            folds[slide_id].append(fold)
        return dict(folds)

    @cached_property
    def rows_by_fold(self) -> dict[int, list[int]]:
        """Rows of ``oof.csv`` that each fold tests; a fold may test none."""
        rows: dict[int, list[int]] = {fold: [] for fold in self.folds}
        for at, row in enumerate(self.out_of_fold):
            for fold in self.test_folds.get(row["slide_id"], []):
                rows[fold].append(at)
        return rows


def read_metrics(folder: Path) -> dict[str, Any]:
    """The content of ``metrics.json`` with all that a report needs.

    Raises:
        RunError: it is missing, is no JSON or lacks keys.
    """
    run = RunFolder.open(folder, *METRICS_KEYS)
    return {"task": run.task} | run.metrics


def read_run(folder: Path, metrics: dict[str, Any], columns: Sequence[str]) -> RunFiles:
    """The other files of a run folder.

    Args:
        folder: where it lies.
        metrics: see `read_metrics`.
        columns: what ``oof.csv`` must hold, besides slides and patients.

    Raises:
        RunError: a file is missing or lacks columns.
    """
    wanted = {"oof.csv": ("slide_id", "patient_id", *columns)} | COLUMNS
    tables = {name: _read_table(folder, name, names) for name, names in wanted.items()}
    config = _read_text(folder, "config.yaml")
    return RunFiles(folder, metrics, tables["oof.csv"], tables["history.csv"], tables["splits.csv"], config)


def finite(text: str) -> float | None:
    """A field of a table as a finite number, or None."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _read_text(folder: Path, name: str) -> str:
    try:
        # a slide id that is not UTF-8 keeps its bytes, as `mil.files.write_csv` wrote them
        return (folder / name).read_text(encoding="utf-8", errors="surrogateescape")
    except FileNotFoundError as error:
        raise RunError(
            f"got the run folder {folder} without {name} → expected a finished run → "
            "let `mil train` finish there, or give the folder that it named at its end"
        ) from error


def _read_table(folder: Path, name: str, columns: Sequence[str]) -> Table:
    text = _read_text(folder, name)
    header = next(read_csv_rows(io.StringIO(text, newline="")), [])
    missing = [column for column in columns if column not in header]
    if missing:
        raise RunError(
            f"got {folder / name} with the columns {', '.join(header) or 'none'} → expected "
            f"also {', '.join(missing)} → train again with this version of tessera-mil"
        )
    return read_csv_dicts(io.StringIO(text, newline=""))
