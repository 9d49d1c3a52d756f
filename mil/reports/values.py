"""Out-of-fold answers of a run as plain values for its page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mil.arrays import BoolArray, FloatArray
from mil.cohort.targets import MULTI_LABEL
from mil.errors import RunError
from mil.evaluation.headlines import RECORDS
from mil.evaluation.outcomes import Outcomes
from mil.evaluation.tables import stated_cohort, stated_outcomes, truth_names
from mil.reports.page import triple
from mil.runs.run_tables import RunFiles, finite, read_run
from mil.statistics.survival import Patients, by_patient, high_risk
from mil.visualization import plotting
from mil.visualization.plotting import ForestRow


@dataclass(frozen=True)
class Answers:
    """A run of other targets than classes.

    Attributes:
        run: the files.
        outcomes: truth [n, K], NaN where a label is unknown, and out-of-fold predictions.
    """

    run: RunFiles
    outcomes: Outcomes

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the K targets; time and event of survival."""
        return self.outcomes.cohort.columns

    @cached_property
    def fold_groups(self) -> list[int] | None:
        """The fold that tests each slide; None where some are tested by several, whose risks are means of models."""
        folds = [self.run.test_folds.get(row["slide_id"], []) for row in self.run.out_of_fold]
        return [each[0] for each in folds] if all(len(each) == 1 for each in folds) else None

    def shown(self, at: int, column: int) -> str:
        """A true number as its table has it."""
        return self.run.out_of_fold[at][f"target_{self.columns[column]}"]

    @cached_property
    def patients(self) -> Patients:
        """Of survival: one row a patient."""
        return by_patient(self.outcomes.truth, self.outcomes.predicted[:, 0], self.run.patient_ids, self.fold_groups)

    @cached_property
    def high(self) -> BoolArray:
        """Whether the risk of each of `patients` is above the median of its fold."""
        return high_risk(self.patients)


def read_answers(folder: Path, metrics: dict[str, Any]) -> Answers:
    """A run of other targets than classes, from its folder.

    Raises:
        RunError: a file is missing, lacks columns, or holds what is no number.
    """
    cohort = stated_cohort(metrics)
    names = (*truth_names(cohort), *cohort.prediction_names)
    run = read_run(folder, metrics, names)
    _require_numbers(run, names, may_lack=truth_names(cohort) if cohort.task == MULTI_LABEL else ())
    return Answers(run, stated_outcomes(run.out_of_fold, metrics))


def _require_numbers(run: RunFiles, names: Sequence[str], may_lack: Sequence[str]) -> None:
    """In columns of oof.csv."""
    for row in run.out_of_fold:
        for name in names:
            if finite(row[name]) is None and not (name in may_lack and row[name] == ""):
                raise RunError(
                    f"got {run.folder / 'oof.csv'} with {row[name]!r} in column {name!r} of slide {row['slide_id']!r} "
                    "→ expected a number → bring the file back from a copy of the run, or train again"
                )


def forest_rows(task: str, evaluation: Mapping[str, Any]) -> Any:
    """The headline metrics, of which all lie between 0 and 1."""
    # the figure has room for 18 letters, and the table beside it says "mean"
    records = RECORDS[task]
    short = {key: each.title.removeprefix("Mean ") for key, each in records.items()}
    rows = [
        ForestRow(label[:1].upper() + label[1:], *triple(evaluation[key]), reference=records[key].guessed())
        for key, label in short.items()
    ]
    return plotting.forest_plot(rows)


def rank_values(values: FloatArray) -> npt.NDArray[np.int64]:
    """Ranks [n, K] of the values in their columns, by which the page sorts: text has no order of signed numbers."""
    columns = [np.unique(column, return_inverse=True)[1] for column in values.T]
    return np.stack(columns, axis=1).astype(np.int64)


def patients_of(answers: Answers, rows: Sequence[int]) -> int:
    """How many patients these rows are of."""
    return len({answers.run.patient_ids[at] for at in rows})
