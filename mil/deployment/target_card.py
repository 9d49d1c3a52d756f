"""What the card of a model of labels, numbers or survival says in its own words; see `mil.deployment.model_card`."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mil.cohort.targets import MULTI_LABEL, REGRESSION, SURVIVAL
from mil.evaluation.headlines import metric_name

Cells = Sequence[object]
_CALIBRATION = ("brier", "nll", "ece")


class CardTable(NamedTuple):
    """Columns and rows."""

    columns: Sequence[str]
    rows: Sequence[Cells]


NOUNS = {MULTI_LABEL: "probability", REGRESSION: "number", SURVIVAL: "risk"}
"""What is averaged over replicas."""


def what_it_predicts(record: Mapping[str, Any]) -> str:
    """The middle of a sentence: what is predicted of a whole-slide image."""
    names = ", ".join(f"**{name}**" for name in record["columns"])
    if record["task"] == MULTI_LABEL:
        return f"Predicts {names} of a whole-slide image, each as the probability of a yes"
    if record["task"] == REGRESSION:
        return f"Predicts {names} of a whole-slide image, as a number in the unit of its label table"
    time, event = record["columns"]
    return f"Predicts the **risk** of **{event}** from a whole-slide image, higher for an event at fewer **{time}**"


def average_in_words(record: Mapping[str, Any]) -> str:
    """What an ensemble says, without how many members it has."""
    if record["task"] == SURVIVAL:
        return "the mean risk, each member's in units of its spread among validation slides,"
    if record["average"] == "logits":
        return "the geometric mean of the odds, as a probability,"
    return f"the mean {NOUNS[record['task']]}"


def data_table(data: Mapping[str, Any], task: str) -> CardTable:
    """What the cohort was made of, from `mil.deployment.cohort_counts.describe_targets`."""
    names = {
        MULTI_LABEL: ("known", "positive", "patients"),
        REGRESSION: ("mean", "deviation", "lowest", "highest"),
        SURVIVAL: ("patients", "events", "median", "longest"),
    }[task]
    first = {MULTI_LABEL: "label", REGRESSION: "number", SURVIVAL: "event"}[task]
    shown = (
        {"patients": "patients with a yes"}
        if task == MULTI_LABEL
        else {"median": "median time", "longest": "longest time"}
    )
    rows = [(name, *(_number(each[key]) for key in names)) for name, each in data["targets"].items()]
    return CardTable((first, *(shown.get(name, name) for name in names)), rows)


def result_table(record: Mapping[str, Any]) -> CardTable | None:
    """Figures out of fold of every label, or every number where there are several."""
    targets = record["out_of_fold"].get("targets", {})
    if record["task"] == MULTI_LABEL:
        keys = {"auroc": "AUROC", "f1": "F1", "sensitivity": "sensitivity", "specificity": "specificity"}
        rows = [
            (name, each["known"], each["positive"], *(both(each[key]) for key in keys))
            for name, each in targets.items()
        ]
        return CardTable(("label", "known", "positive", *keys.values()), rows)
    if len(targets) < 2:
        return None
    names = [key for key in next(iter(targets.values())) if key != "n_patients"]
    rows = [(name, *(both(each[key]) for key in names)) for name, each in targets.items()]
    return CardTable(("number", *(metric_name(REGRESSION, key) for key in names)), rows)


def calibration_table(found: Mapping[str, Any]) -> CardTable:
    """Calibration of every label out of fold, and before calibration where there was one."""
    after, before = found["out_of_fold"], found["uncalibrated"]
    rows = []
    for name, measures in after.items():
        cells = [_measure(measures, key) for key in _CALIBRATION]
        cells += [_measure(before[name], key) for key in _CALIBRATION] if before else []
        rows.append((name, *cells, f"{measures['ece_if_calibrated']['high']:.3f}"))
    titles = ("Brier score", "log-likelihood", "ECE")
    earlier = tuple(f"{title} before" for title in titles) if before else ()
    return CardTable(("label", *titles, *earlier, "ECE of the calibrated, at most"), rows)


def no_calibration(task: str) -> str:
    """Why there is none."""
    return f"None: a {NOUNS[task]} is no probability."


def own_limit(record: Mapping[str, Any]) -> str:
    """What a reader of these predictions must not believe."""
    if record["task"] == MULTI_LABEL:
        return (
            "It knows the labels above and nothing else. One temperature serves all of them, and each is predicted "
            "without regard to which labels can go together."
        )
    if record["task"] == REGRESSION:
        return (
            "It has seen no numbers beyond the lowest and highest above: what it says there, or of slides of another "
            "kind, is a guess, and nothing tells how unsure it is."
        )
    return (
        "A risk ranks the patients of one cohort. It is neither a probability nor a time, and risks of other models "
        "cannot be compared with it."
    )


def both(entry: Mapping[str, float | None]) -> str:
    """A value and its interval."""
    low, high = entry["low"], entry["high"]
    interval = "–" if low is None or high is None else f"{low:.3f} to {high:.3f}"
    return f"{'–' if entry['value'] is None else format(entry['value'], '.3f')} ({interval})"


def _measure(measures: Mapping[str, Any], key: str) -> str:
    value = measures[key] if key == "ece" else measures[key]["value"]
    return "–" if value is None else f"{value:.3f}"


def _number(value: float | int | None) -> str:
    return "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
