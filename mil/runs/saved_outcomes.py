"""What a run, a sweep or an ensemble said out of fold, read back from its folder, whatever the target."""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mil.cohort.targets import SURVIVAL
from mil.errors import RunError
from mil.evaluation.alignment import join_runs
from mil.evaluation.fold_scores import by_fold, outcomes_of, read_fold_scores
from mil.evaluation.outcomes import Outcomes
from mil.runs.ensemble import read_ensemble
from mil.runs.folders import is_ensemble
from mil.runs.run_folder import RunFolder, read_predictions


@dataclass(frozen=True, eq=False)
class SavedOutcomes:
    """Truth and predictions of a folder.

    Attributes:
        outcomes: of every slide that was tested.
        metrics: the ``metrics.json``.
    """

    outcomes: Outcomes
    metrics: dict[str, Any]


def read_outcomes(folder: Path, *needed: str) -> SavedOutcomes:
    """The out-of-fold predictions of a folder of `mil train`, `mil sweep` or `mil ensemble`.

    For survival, what each fold's models said: of an ensemble it is made again from its members.

    Args:
        folder: where it lies.
        needed: keys that ``metrics.json`` must hold.

    Raises:
        RunError: a file is missing, or does not hold what was written.
    """
    run = RunFolder.open(folder, *needed)
    run.require_target()
    metrics = run.metrics
    try:
        with open(folder / "oof.csv", encoding="utf-8", errors="surrogateescape", newline="") as file:
            outcomes = outcomes_of(list(csv.DictReader(file)), metrics)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = error.strerror if isinstance(error, OSError) else f"{type(error).__name__} {error}"
        raise RunError(
            f"got {folder} as run folder → its oof.csv cannot be read ({what}) → give the --out "
            f"folder of a finished mil train"
        ) from error
    if outcomes.cohort.task == SURVIVAL:
        ensemble = is_ensemble(folder)
        outcomes = _of_members(folder) if ensemble else by_fold(read_fold_scores(folder, metrics))
    return SavedOutcomes(outcomes, metrics)


def _of_members(folder: Path) -> Outcomes:
    members, averaging = read_ensemble(folder)
    return join_runs([read_predictions(member) for member in members], averaging.average).outcomes()
