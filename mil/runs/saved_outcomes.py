"""What a run, a sweep or an ensemble predicts out of fold, read back from its folder, whatever the target."""

from pathlib import Path

from mil.errors import RunError
from mil.evaluation.alignment import join_runs
from mil.evaluation.outcomes import Outcomes
from mil.evaluation.tables import stated_outcomes
from mil.files import read_csv_dicts
from mil.runs.ensemble import read_ensemble
from mil.runs.folders import is_ensemble
from mil.runs.run_folder import RunFolder, read_predictions


def read_outcomes(run: RunFolder) -> Outcomes:
    """The out-of-fold predictions of a folder of `mil train`, `mil sweep` or `mil ensemble`, beside the truth.

    For survival they are those of each fold's models; of an ensemble they are made again from its members.

    Raises:
        RunError: a file is missing, or does not hold what was written.
    """
    run.require_target()
    try:
        with open(run.path / "oof.csv", encoding="utf-8", errors="surrogateescape", newline="") as file:
            outcomes = stated_outcomes(read_csv_dicts(file), run.metrics)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = error.strerror if isinstance(error, OSError) else f"{type(error).__name__} {error}"
        raise RunError(
            f"got {run.path} as run folder → its oof.csv cannot be read ({what}) → give the --out "
            f"folder of a finished mil train"
        ) from error
    if outcomes.cohort.kind.has_scale:
        return outcomes
    return _of_members(run.path) if is_ensemble(run.path) else run.predictions().outcomes()


def _of_members(folder: Path) -> Outcomes:
    members, averaging = read_ensemble(folder)
    return join_runs([read_predictions(member) for member in members], averaging.average).outcomes()
