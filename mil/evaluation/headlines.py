"""The headline metrics of every task: their records, their names within a sentence, and which are for what."""

from collections.abc import Callable

from mil.cohort.targets import CLASSIFICATION, MULTI_LABEL, REGRESSION, SURVIVAL
from mil.statistics import classification, multi_label, regression, survival
from mil.statistics.metrics import Headline

RECORDS = {
    task: {each.name: each for each in headlines}
    for task, headlines in (
        (CLASSIFICATION, classification.HEADLINES),
        (MULTI_LABEL, multi_label.HEADLINES),
        (REGRESSION, regression.HEADLINES),
        (SURVIVAL, survival.HEADLINES),
    )
}
"""By task and name, the first headline first."""

HEADLINES = {task: {name: each.title for name, each in records.items()} for task, records in RECORDS.items()}
"""The metrics of every task with their names, as tables and figures show them."""

LOWER_IS_BETTER = frozenset(
    {name for records in RECORDS.values() for name, each in records.items() if each.lower_is_better}
    | {"log_loss", "loss"}
)


def metric_name(task: str, metric: str) -> str:
    """A headline's name with a small first letter, unless it is a name or an abbreviation.

    >>> metric_name("classification", "macro_f1"), metric_name("regression", "r2")
    ('macro-F1', 'R²')
    """
    each = RECORDS[task][metric]
    return each.title if each.proper else each.title[0].lower() + each.title[1:]


def short_name(task: str, metric: str) -> str:
    """A headline's name for the head of a narrow column."""
    return RECORDS[task][metric].short or metric_name(task, metric)


def first_headline(task: str) -> str:
    """What the models of a task are ranked and compared by."""
    return next(iter(HEADLINES[task]))


def brief_metrics(task: str) -> tuple[str, ...]:
    """Those that are shown where there is little room."""
    return _chosen(task, lambda each: each.brief)


def replica_metrics(task: str) -> tuple[str, ...]:
    """Those that are told of one replica, whose test part is small, and drawn with their spread."""
    return _chosen(task, lambda each: each.of_replicas)


def ranking_metrics(task: str, n_columns: int = 1) -> tuple[str, ...]:
    """Those that boards have a column for; errors of several numbers have no common mean."""
    return _chosen(task, lambda each: each.ranks and (n_columns == 1 or not each.of_a_unit))


def selection_metrics(task: str, n_columns: int = 1) -> tuple[str, ...]:
    """What settings can be chosen by on validation parts; the first is usual."""
    names = sorted(ranking_metrics(task, n_columns), key=lambda name: not RECORDS[task][name].usual_choice)
    return (*names, *(("log_loss",) if task == CLASSIFICATION else ()))


def selection_name(task: str, metric: str) -> str:
    """`metric_name`, which knows the loss too."""
    return {"log_loss": "log-loss", "loss": "loss"}.get(metric) or metric_name(task, metric)


def tie_breaker(task: str) -> str:
    """The loss of a validation part, which decides between settings of equal score."""
    return "log_loss" if task == CLASSIFICATION else "loss"


def _chosen(task: str, wanted: Callable[[Headline], bool]) -> tuple[str, ...]:
    return tuple(name for name, each in RECORDS[task].items() if wanted(each))
