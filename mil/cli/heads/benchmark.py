"""``mil benchmark``: heads and features compared on one cohort."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from mil.cli.console import (
    TargetOption,
    TaskOption,
    counted,
    counted_replicas,
    duration_text,
    print_table,
    say,
    say_start,
    stacked_interval,
)


def benchmark(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="Settings: heads=[mean,abmil] (or heads=all) backbones=[...] folds=5 seeds=3 ...", show_default=False
        ),
    ] = None,
    *,
    store: Annotated[
        list[Path] | None,
        typer.Option(help="An embedding store; repeat it for several. Required without --config.", show_default=False),
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="Label table (CSV); required without --config.", show_default=False)
    ] = None,
    target: TargetOption = None,
    task: TaskOption = None,
    out: Annotated[Path, typer.Option(help="Folder of the board; one that was stopped is gone on with.")],
    slide_column: Annotated[str | None, typer.Option(help="Column of slide ids.", show_default=False)] = None,
    patient_column: Annotated[str | None, typer.Option(help="Column of patient ids.", show_default=False)] = None,
    config: Annotated[
        Path | None, typer.Option(help="config.yaml of an earlier board, to run it again.", show_default=False)
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a board in --out that has other settings.")
    ] = False,
) -> None:
    """Compare heads (and features) on the same slides, folds and seeds; writes a leaderboard.

    Mean pooling is always on it, and so are guessing and classical learners on mean instances: for classes logistic
    regression and nearest neighbours, for labels logistic, for numbers ridge, for survival Cox regression.

    Example: `mil benchmark --store cohort.zarr --labels labels.csv --target subtype --out board heads=[max,abmil]`
    """
    from mil.config.preflight import check_board_names, check_inputs
    from mil.runs.folders import check_board_folder

    values: dict[str, Any] = {"labels": labels, "target": target, "task": task}
    values |= {"slide_column": slide_column, "patient_column": patient_column}
    given: dict[str, Any] = {name: str(value) for name, value in values.items() if value is not None}
    if store:
        given["stores"] = [str(path) for path in store]
    say_start("reading settings, labels and stores, loading torch")
    check_board_folder(out.absolute())
    check_board_names(overrides or [], config)
    check_inputs("a benchmark", overrides or [], config, given)
    # torch and all that needs it, once little is left to be mistyped
    from mil.experiments.benchmark import run_benchmark
    from mil.experiments.benchmark_config import compose_benchmark

    settings = compose_benchmark(overrides or [], config, given)
    console = Console()
    with counted_replicas(console, out) as report:

        def shown(progress: Any) -> None:
            if progress.costs:
                _print_costs(console, progress.costs)
            report(progress)

        board = run_benchmark(settings, out, shown, overwrite)
    _print(console, board, out)
    if any(row.verdict == "failed" for row in board.rows):
        raise typer.Exit(1)


def _print_costs(console: Console, costs: Sequence[Any]) -> None:
    """What each head costs at most, in the order in which they are trained."""
    several = len({cost.entry for cost in costs}) > 1
    rows = [
        [
            f"{cost.head} on {cost.entry}" if several else cost.head,
            f"{cost.n_parameters:,}" if cost.n_parameters else "–",
            "–" if math.isnan(cost.seconds) else duration_text(cost.seconds),
        ]
        for cost in costs
    ]
    print_table(console, "cost at most, cheapest first", ["head", "parameters", "time"], rows)


_VERDICTS = {"beats mean pooling": "yes", "does not beat mean pooling": "no"}


def _print(console: Console, board: Any, out: Path) -> None:
    from mil.evaluation.headlines import brief_metrics, short_name

    if board.synthetic:
        console.print("SYNTHETIC DATA: these slides were drawn by a program.", style="bold", highlight=False)
    several = len({row.entry for row in board.rows}) > 1
    shown = brief_metrics(board.task)
    rows = []
    for row in board.rows:
        name = f"{row.name} on {row.entry}" if several else row.name
        p = "–" if row.p_holm is None else f"{row.p_holm:.3f}"
        scores = (stacked_interval(asdict(each)) for each in (*(row.scores[key] for key in shown), row.difference))
        rows.append([name, *scores, p, _VERDICTS.get(row.verdict) or row.verdict or row.kind])
    columns = ["head", *(short_name(board.task, key) for key in shown), "minus mean", "p Holm", "beats mean"]
    slides, patients = counted(board.n_slides, "slide"), counted(board.n_patients, "patient")
    print_table(console, f"{board.target}: {slides}, {patients}; 95 % intervals over patients", columns, rows)
    for row in board.rows:
        if row.reason:
            say(console, f"failed: {row.name} on {row.entry}: {row.reason}", style="red")
    for warning in board.warnings:
        say(console, f"warning: {warning}", style="yellow")
    page = out / "leaderboard.html"
    if page.is_file():
        say(console, f"leaderboard {out / 'leaderboard.csv'}, page {page}")
    else:
        say(console, f'leaderboard {out / "leaderboard.csv"}; for the page: pip install "tessera-mil[report]"')
