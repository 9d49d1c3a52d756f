"""Names of metrics within a sentence, and which of them are better when lower."""

from mil.cohort.targets import CLASSIFICATION, MULTI_LABEL, REGRESSION, SURVIVAL
from mil.statistics.regression import OF_A_UNIT

LOWER_IS_BETTER = frozenset({*OF_A_UNIT, "log_loss", "loss"})

SHORT_NAMES = {
    "balanced_accuracy": "bal. accuracy",
    "macro_balanced_accuracy": "mean bal. accuracy",
    "pearson": "Pearson",
    "spearman": "Spearman",
    "mae": "MAE",
    "rmse": "RMSE",
    "concordance": "concordance",
}
"""Where a table has no room for the whole name."""

_PROPER = ("AUROC", "R²", "Pearson", "Spearman")


def metric_name(task: str, metric: str) -> str:
    """A headline's name with a small first letter, unless it is a name or an abbreviation.

    >>> metric_name("classification", "macro_f1"), metric_name("regression", "r2")
    ('macro-F1', 'R²')
    """
    name = HEADLINES[task][metric]
    return name if name.startswith(_PROPER) else name[0].lower() + name[1:]


def selection_metrics(task: str, n_columns: int = 1) -> tuple[str, ...]:
    """What settings can be chosen by on validation parts; the first is usual."""
    if task == CLASSIFICATION:
        return ("auroc", "macro_f1", "balanced_accuracy", "log_loss")
    return tuple(name for name in HEADLINES[task] if n_columns == 1 or name not in OF_A_UNIT)


def selection_name(task: str, metric: str) -> str:
    """`metric_name`, which knows the loss too."""
    return {"log_loss": "log-loss", "loss": "loss"}.get(metric) or metric_name(task, metric)


def tie_breaker(task: str) -> str:
    """The loss of a validation part, which decides between settings of equal score."""
    return "log_loss" if task == CLASSIFICATION else "loss"


def first_headline(task: str) -> str:
    """What the models of a task are ranked and compared by."""
    return next(iter(HEADLINES[task]))


def short_name(task: str, metric: str) -> str:
    """A headline's name for the head of a narrow column."""
    return SHORT_NAMES.get(metric) or metric_name(task, metric)


HEADLINES = {
    CLASSIFICATION: {
        "macro_f1": "Macro-F1",
        "balanced_accuracy": "Balanced accuracy",
        "auroc": "AUROC",
        "accuracy": "Accuracy",
    },
    MULTI_LABEL: {
        "macro_auroc": "Mean AUROC",
        "macro_f1": "Mean F1",
        "macro_balanced_accuracy": "Mean balanced accuracy",
    },
    REGRESSION: {
        "r2": "R²",
        "pearson": "Pearson's correlation",
        "spearman": "Spearman's correlation",
        "mae": "Mean absolute error",
        "rmse": "Root mean squared error",
    },
    SURVIVAL: {"concordance": "Concordance index"},
}
"""The metrics of every task with their names, as tables and figures show them."""
