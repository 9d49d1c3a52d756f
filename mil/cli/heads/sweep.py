"""``mil sweep``: settings chosen within folds."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from mil.cli.console import (
    TargetOption,
    TaskOption,
    counted,
    counted_replicas,
    print_metrics,
    print_table,
    print_target_metrics,
    say,
    say_start,
)

_MOST_ROWS = 10


def sweep(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="What to sweep, head=abmil,mean optimizer.lr=interval(1e-5,1e-2), and what all settings share, "
            "folds=5 seeds=3 ...",
            show_default=False,
        ),
    ] = None,
    *,
    store: Annotated[
        Path | None, typer.Option(help="The embedding store; required without --config.", show_default=False)
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="Label table (CSV); required without --config.", show_default=False)
    ] = None,
    target: TargetOption = None,
    task: TaskOption = None,
    out: Annotated[Path, typer.Option(help="Folder for the results; a sweep that was stopped is gone on with.")],
    method: Annotated[
        str | None, typer.Option(help="grid, random or tpe; a grid if all are lists, else tpe.", show_default=False)
    ] = None,
    trials: Annotated[
        int | None, typer.Option(help="Settings per fold, for random and tpe (20).", show_default=False)
    ] = None,
    select: Annotated[
        str | None,
        typer.Option(
            help="What chooses, on validation parts: of classes auroc (default), macro_f1, balanced_accuracy or "
            "log_loss; of labels macro_auroc, macro_f1, ...; of numbers r2, pearson, ...; of survival concordance.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of random draws and of the search (0).", show_default=False)] = None,
    slide_column: Annotated[str | None, typer.Option(help="Column of slide ids.", show_default=False)] = None,
    patient_column: Annotated[str | None, typer.Option(help="Column of patient ids.", show_default=False)] = None,
    config: Annotated[
        Path | None, typer.Option(help="config.yaml of an earlier sweep, to run it again.", show_default=False)
    ] = None,
) -> None:
    """Choose settings on the validation parts of every fold, and judge the choosing on its test part.

    The out-of-fold figures are those of the procedure, the search included. best.yaml holds the setting that is best
    over all folds, for `mil train --config`.

    Example: `mil sweep --store cohort.zarr --labels labels.csv --target subtype --out sweeps/lr
    head=abmil,mean optimizer.lr=1e-4,3e-4,1e-3`
    """
    from mil.config.preflight import check_inputs
    from mil.runs.folders import check_sweep_folder
    from mil.tuning.search_space import parse_space
    from mil.tuning.sweep_config import compose_sweep

    values: dict[str, Any] = {"store": store, "labels": labels, "target": target, "task": task}
    values |= {"slide_column": slide_column, "patient_column": patient_column}
    given = {name: str(value) for name, value in values.items() if value is not None}
    say_start("reading settings, labels and store, loading torch")
    check_sweep_folder(out.absolute())
    # what is swept has no one value to check, and keys that cannot be swept are told here
    _, plain = parse_space(overrides or [])
    check_inputs("a sweep", plain, config, given)
    settings = compose_sweep(overrides or [], config, given, method=method, trials=trials, select=select, seed=seed)
    # torch and all that needs it, once nothing is left to be mistyped
    from mil.tuning.sweep import run_sweep

    console = Console()
    with counted_replicas(console, out) as report:
        found = run_sweep(settings, out, report)
    _print(console, found, out)


def _print(console: Console, found: Any, out: Path) -> None:
    metrics = found.metrics
    if metrics["synthetic"]:
        console.print("SYNTHETIC DATA: these slides were drawn by a program.", style="bold", highlight=False)
    _print_settings(console, found)
    title = f"{metrics['target']}: the procedure out of fold, its search included"
    if metrics["task"] == "classification":
        print_metrics(console, title, metrics["out_of_fold"])
    else:
        print_target_metrics(console, title, metrics["task"], metrics["out_of_fold"])
    for warning in metrics["warnings"]:
        say(console, f"warning: {warning}", style="yellow")
    for each in found.importances:
        share = "too few trials to say" if each.share is None else f"{100 * each.share:.0f} %"
        say(console, f"of the variance between trials, {each.dimension.key} explains: {share}")
    looks = counted(metrics["looks"], "time")
    say(console, f"The test folds of this cohort have been looked at {looks} in this folder of runs.")
    say(console, f"best setting over all folds: {found.best.title}, in {out / 'best.yaml'}")
    _write_page(console, found, out)


def _print_settings(console: Console, found: Any) -> None:
    """The best settings over all folds."""
    from mil.evaluation.headlines import selection_name
    from mil.tuning.search_space import value_name

    score = selection_name(found.cohort.task, found.config.select)
    columns = [*(dimension.key for dimension in found.config.space), score, "folds"]
    rows = []
    for each in found.averages[:_MOST_ROWS]:
        values = [value_name(value) for value in each.setting.values.values()]
        rows.append([*values, f"{each.score:.3f}", str(each.n_chosen)])
    n = counted(len(found.averages), "setting")
    title = f"the best of {n} in all folds: mean validation {score}, and how many folds chose it"
    print_table(console, title, columns, rows)


def _write_page(console: Console, found: Any, out: Path) -> None:
    """Write the page, or say what is missing for it."""
    from mil.errors import MissingExtraError
    from mil.tuning.sweep_page import write_sweep_page

    try:
        path = write_sweep_page(out, found)
    except MissingExtraError as error:
        say(console, f"results {out}; no page: {error}")
    else:
        say(console, f"results {out}, page {path}")
