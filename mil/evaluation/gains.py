"""What the average of several models gains over each of them, in the metric that their task is ranked by."""

import math
from typing import Any

from mil.cohort.targets import CLASSIFICATION, HEADLINES
from mil.evaluation.headlines import first_headline
from mil.evaluation.paired import Pair
from mil.evaluation.predictions import Outcomes


def member_metrics(task: str) -> tuple[str, ...]:
    """The metrics that members are shown with: the one that gains are of, and one more where there is one."""
    return ("macro_f1", "auroc") if task == CLASSIFICATION else tuple(HEADLINES[task])[:2]


def gain_name(task: str) -> str:
    """The key of a gain, such as ``gain_macro_f1``."""
    return f"gain_{first_headline(task)}"


def gain_over(together: Outcomes, alone: Outcomes) -> dict[str, Any]:
    """The first headline of an average minus that of a member, by `gain_name`, with its interval over patients.

    None where the headline is undefined, as concordance is of patients without an event.
    """
    task = together.cohort.task
    found = Pair(together, alone, first_headline(task)).difference()
    defined = None if math.isnan(found.difference) else found.difference
    return {gain_name(task): found._asdict() | {"difference": defined}}
