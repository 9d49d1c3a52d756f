"""``mil score``: finished runs, scored again from their saved predictions."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from mil.console import counted, interval_text, print_table, say, stacked_interval

SUMMARY = {"macro_f1": "macro-F1", "balanced_accuracy": "bal. accuracy", "auroc": "AUROC", "accuracy": "accuracy"}
OF_CLASS = {"recall": "recall", "precision": "precision", "f1": "F1", "auroc": "AUROC"}


def score(
    runs: Annotated[list[Path], typer.Argument(help="Folders of mil train, sweep or ensemble.", show_default=False)],
    *,
    interval: Annotated[str, typer.Option(help="percentile or bca (bias-corrected and accelerated).")] = "percentile",
    strata: Annotated[bool, typer.Option("--strata", help="Resample patients within their classes.")] = False,
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

    Nothing is trained. Thresholds are chosen on validation parts and judged on test folds.

    Example: `mil score runs/abmil --interval bca --strata --sensitivity 0.95 --out scores`
    """
    from mil.artefact import check_new_folder
    from mil.bootstrap import Resampling
    from mil.rescoring import score_runs

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
    from mil.rescoring import OperatingTarget

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
    rows = [[run.name, *(stacked_interval(run.metrics[key]) for key in SUMMARY)] for run in scores.runs]
    print_table(console, f"out of fold; {_how(scores.resampling)}", ["name", *SUMMARY.values()], rows)
    for run in scores.runs:
        _print_run(console, run)
    looks = max(run.facts["looks"] for run in scores.runs)
    who = "the run" if len(scores.runs) == 1 else "the runs"
    say(
        console,
        f"Nothing was trained and no look is counted: this is what {who} said of test folds that have been looked at "
        f"{'once' if looks == 1 else f'{looks} times'} in the folder that they lie in.",
    )


def _how(resampling: Any) -> str:
    """The kind of the intervals in words."""
    kind = "BCa" if resampling.interval == "bca" else "percentile"
    strata = " within their classes" if resampling.stratified else ""
    return (
        f"{100 * resampling.confidence:g} % {kind} intervals, {counted(resampling.replicates, 'resample')} of the "
        f"patients{strata}"
    )


def _print_run(console: Console, run: Any) -> None:
    facts, metrics = run.facts, run.metrics
    what = f"{run.name}: {facts['target']} by {facts['head']}"
    size = f"{counted(metrics['n_slides'], 'slide')}, {counted(metrics['n_patients'], 'patient')}"
    rows = [
        [name, str(each["support"]), str(each["n_patients"]), *(stacked_interval(each[key], ".2f") for key in OF_CLASS)]
        for name, each in metrics["classes"].items()
    ]
    columns = ["class", "slides", "pat.", *OF_CLASS.values()]
    print_table(console, f"{what}, {size}; one class against the others", columns, rows)
    if run.operating:
        _print_operating(console, run)
    _print_abstention(console, run)
    for warning in run.warnings:
        say(console, f"warning: {warning}", style="yellow")


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
