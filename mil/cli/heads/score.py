"""``mil score``: finished runs, scored again from their saved predictions."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from mil.cli.console import counted, interval_text, print_table, say, stacked_interval

OF_CLASS = {"recall": "recall", "precision": "precision", "f1": "F1", "auroc": "AUROC"}


def score(
    runs: Annotated[list[Path], typer.Argument(help="Folders of mil train, sweep or ensemble.", show_default=False)],
    *,
    interval: Annotated[str, typer.Option(help="percentile or bca (bias-corrected and accelerated).")] = "percentile",
    strata: Annotated[
        bool, typer.Option("--strata", help="Resample patients within their classes (or strata).")
    ] = False,
    replicates: Annotated[int, typer.Option(help="Bootstrap resamples of the patients.")] = 2000,
    confidence: Annotated[float, typer.Option(help="Of the intervals.")] = 0.95,
    seed: Annotated[int, typer.Option(help="Of the resamples.", min=0)] = 0,
    sensitivity: Annotated[
        float | None, typer.Option(help="Operating points that find this share of a class.", show_default=False)
    ] = None,
    specificity: Annotated[
        float | None, typer.Option(help="Or that leave this share of the others alone.", show_default=False)
    ] = None,
    youden: Annotated[bool, typer.Option("--youden", help="Or those of the highest Youden index.")] = False,
    class_name: Annotated[
        str | None,
        typer.Option("--class", help="The class of the operating point; all by default.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for JSON, CSV and figures; must be new or empty.", show_default=False)
    ] = None,
) -> None:
    """Score finished runs from what they saved: intervals of other kinds, operating points, abstention.

    Nothing is trained. Thresholds are chosen on validation parts and judged on test folds. Operating points,
    calibration and abstention are of classes; labels, numbers and survival have intervals alone.

    Example: `mil score runs/abmil --interval bca --strata --sensitivity 0.95 --out scores`
    """
    from mil.files import check_new_folder
    from mil.reports.rescore import score_runs
    from mil.statistics.bootstrap import Resampling

    operating = _operating(sensitivity, specificity, youden, class_name)
    resampling = Resampling(replicates, seed, confidence, interval, strata)
    if out is not None:
        # before the work, not after
        check_new_folder(out)
    scores = score_runs(runs, resampling, operating)
    console = Console()
    _print(console, scores)
    if out is not None:
        _save(console, scores, out)


def _operating(sensitivity: float | None, specificity: float | None, youden: bool, class_name: str | None) -> Any:
    """What operating points are asked for; None for none."""
    from mil.reports.rescore import OperatingTarget

    targeted = sensitivity is not None or specificity is not None
    if youden and targeted:
        raise typer.BadParameter(
            "got --youden and a target → expected one way to choose thresholds → leave one out", param_hint="--youden"
        )
    if not youden and not targeted:
        if class_name is not None:
            raise typer.BadParameter(
                f"got {class_name!r} and no operating point → expected what its threshold is to reach → add "
                f"--sensitivity 0.95, --specificity 0.95 or --youden",
                param_hint="--class",
            )
        return None
    return OperatingTarget(sensitivity, specificity, class_name)


def _save(console: Console, scores: Any, out: Path) -> None:
    from mil.errors import MissingExtraError

    folder = scores.save(out)
    try:
        scores.draw(folder)
    except MissingExtraError as error:
        say(console, f"no figure: {error}")
    say(console, f"written to {out}")


def _print(console: Console, scores: Any) -> None:
    if any(run.facts["synthetic"] for run in scores.runs):
        say(console, "SYNTHETIC DATA: these slides were drawn by a program.", style="bold")
    for task in dict.fromkeys(run.task for run in scores.runs):
        _print_summary(console, task, [run for run in scores.runs if run.task == task], scores.resampling)
    for run in scores.runs:
        _print_run(console, run)
    looks = max(run.facts["looks"] for run in scores.runs)
    who = "the run" if len(scores.runs) == 1 else "the runs"
    say(
        console,
        f"Nothing was trained and no look is counted: this is what {who} said of test folds that have been looked at "
        f"{'once' if looks == 1 else f'{looks} times'} in the folder that they lie in.",
    )


def _print_summary(console: Console, task: str, runs: list[Any], resampling: Any) -> None:
    """The headline metrics of runs of one task."""
    from mil.evaluation.headlines import HEADLINES, short_name

    names = [key for key in HEADLINES[task] if any(run.metrics[key]["value"] is not None for run in runs)]
    # errors have digits before the point
    form = ".2f" if task == "regression" else ".3f"
    rows = [[run.name, *(stacked_interval(run.metrics[key], form) for key in names)] for run in runs]
    columns = [short_name(task, key) for key in names]
    print_table(console, f"out of fold; {_how(resampling, task)}", ["name", *columns], rows)


def _how(resampling: Any, task: str) -> str:
    """The kind of the intervals in words."""
    kind = "BCa" if resampling.interval == "bca" else "percentile"
    within = "classes" if task == "classification" else "strata"
    strata = f" within their {within}" if resampling.stratified else ""
    return (
        f"{100 * resampling.confidence:g} % {kind} intervals, {counted(resampling.replicates, 'resample')} of the "
        f"patients{strata}"
    )


def _print_run(console: Console, run: Any) -> None:
    if run.task == "classification":
        _print_classes(console, run)
    else:
        _print_targets(console, run)
    if run.operating:
        _print_operating(console, run)
    if run.abstention is not None:
        _print_abstention(console, run)
    for warning in run.warnings:
        say(console, f"warning: {warning}", style="yellow")


def _print_classes(console: Console, run: Any) -> None:
    rows = [
        [name, str(each["support"]), str(each["n_patients"]), *(stacked_interval(each[key], ".2f") for key in OF_CLASS)]
        for name, each in run.metrics["classes"].items()
    ]
    columns = ["class", "slides", "pat.", *OF_CLASS.values()]
    print_table(console, f"{_what(run)}; one class against the others", columns, rows)


def _print_targets(console: Console, run: Any) -> None:
    """Labels or numbers one by one; a single number and survival have the summary alone."""
    from mil.cohort.targets import REGRESSION
    from mil.evaluation.headlines import HEADLINES, short_name

    targets = run.metrics.get("targets", {})
    if len(targets) < 2 and run.task != "multilabel":
        events = f", {counted(run.metrics['n_events'], 'event')}" if run.task == "survival" else ""
        note = "; patients are compared within their test fold" if run.task == "survival" else ""
        say(console, f"{_what(run)}{events}{note}\n")
        return
    labels = run.task == "multilabel"
    names = ("auroc", "f1", "sensitivity", "specificity") if labels else tuple(HEADLINES[REGRESSION])
    rows = []
    for name, each in targets.items():
        having = [f"{each['positive']} of {each['known']}"] if labels else []
        rows.append([name, *having, *(stacked_interval(each[key], ".2f") for key in names)])
    heads = {key: OF_CLASS.get(key, key) if labels else short_name(REGRESSION, key) for key in names}
    columns = ["target", *(["slides"] if labels else []), *heads.values()]
    print_table(console, f"{_what(run)}; one target at a time", columns, rows)


def _what(run: Any) -> str:
    """A run and how much there is of it."""
    metrics = run.metrics
    size = f"{counted(metrics['n_slides'], 'slide')}, {counted(metrics['n_patients'], 'patient')}"
    return f"{run.name}: {run.facts['target']} by {run.facts['head']}, {size}"


def _print_operating(console: Console, run: Any) -> None:
    rows = []
    for point in run.operating:
        cuts = point["thresholds"].values()
        between = dict.fromkeys(f"{cut:.3f}" for cut in (min(cuts), max(cuts)))
        rates = [stacked_interval(point[name]) for name in ("sensitivity", "specificity")]
        rows.append([point["class"], " to ".join(between), *rates])
    title = f"{run.name}: thresholds of {run.operating[0]['chosen_by']}, judged on test folds"
    print_table(console, title, ["class", "threshold", "sensitivity", "specificity"], rows)


def _print_abstention(console: Console, run: Any) -> None:
    rows = []
    for each in run.abstention["coverages"]:
        figures = [str(each["n_slides"]), f"{each['confidence']:.3f}", stacked_interval(each["accuracy"])]
        rows.append([f"{100 * each['asked']:g} %", *figures])
    print_table(
        console,
        f"{run.name}: answering only the slides of highest probability",
        ["answered", "slides", "confidence from", "accuracy"],
        rows,
    )
    calibration = run.calibration
    say(
        console,
        f"calibration error {calibration['ece']:.3f} (were the probabilities exactly right: "
        f"{calibration['ece_if_calibrated']['mean']:.3f} on average), Brier score "
        f"{interval_text(calibration['brier'])}, log-loss {interval_text(calibration['nll'])}\n",
    )
