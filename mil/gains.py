"""What the average of several models gains over each of them, in the metric that their task is ranked by."""

from typing import Any

from mil.metric_names import first_headline
from mil.outcomes import Outcomes
from mil.pairs import Pair
from mil.targets import CLASSIFICATION, HEADLINES


def member_metrics(task: str) -> tuple[str, ...]:
    """The metrics that members are shown with: the one that gains are of, and one more where there is one."""
    return ("macro_f1", "auroc") if task == CLASSIFICATION else tuple(HEADLINES[task])[:2]


def gain_name(task: str) -> str:
    """The key of a gain, such as ``gain_macro_f1``."""
    return f"gain_{first_headline(task)}"


def gain_over(together: Outcomes, alone: Outcomes) -> dict[str, Any]:
    """The first headline of an average minus that of a member, by `gain_name`, with its interval over patients."""
    task = together.cohort.task
    return {gain_name(task): Pair(together, alone, first_headline(task)).difference()._asdict()}
