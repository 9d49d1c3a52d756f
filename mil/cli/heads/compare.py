"""``mil compare``: finished runs, paired on the same slides."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from mil.cli.console import counted, print_table, say, stacked_interval


def compare(
    runs: Annotated[
        list[Path], typer.Argument(help="Folders of mil train, sweep or ensemble; the first is the reference.")
    ],
    *,
    metric: Annotated[
        str | None,
        typer.Option(
            help="Of classes macro_f1 (the default), balanced_accuracy, auroc, accuracy; of labels macro_auroc, "
            "macro_f1, macro_balanced_accuracy; of numbers r2, pearson, spearman, mae, rmse; of survival concordance.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="CSV to write.", show_default=False)] = None,
) -> None:
    """Compare finished runs with the first of them, paired on the same slides.

    Example: `mil compare runs/mean runs/abmil runs/clam --metric macro_f1 --out compare.csv`
    """
    from mil.experiments.compare import compare_runs

    if out is not None and (out.is_dir() or not out.absolute().parent.is_dir()):
        raise typer.BadParameter(
            f"got {out} → expected a file in a folder that exists → correct it", param_hint="--out"
        )
    comparison = compare_runs(runs, metric)
    console = Console()
    _print(console, comparison)
    if out is not None:
        comparison.write_csv(out)
        say(console, f"written to {out}")


def _print(console: Console, comparison: Any) -> None:
    from mil.evaluation.headlines import metric_name, short_name

    if comparison.synthetic:
        console.print("SYNTHETIC DATA: these slides were drawn by a program.", style="bold", highlight=False)
    title, reference = metric_name(comparison.task, comparison.metric), comparison.rows[0].name
    slides, patients = counted(comparison.n_slides, "slide"), counted(comparison.n_patients, "patient")
    figures = [
        [row.name, *(stacked_interval(asdict(each)) for each in (row.value, row.difference)), _number(row.detectable)]
        for row in comparison.rows
    ]
    print_table(
        console,
        f"{comparison.target}: {slides}, {patients}; 95 % intervals over patients",
        ["name", short_name(comparison.task, comparison.metric), "difference", "detectable"],
        figures,
    )
    for row in comparison.rows[1:]:
        say(console, _sentence(row, reference, title))
    say(
        console,
        f"difference: minus {reference}; detectable: the true difference that a cohort like this one finds in four of "
        f"five cases.\n",
    )
    p_values = [[row.name, *map(_p, (row.p, row.p_holm, row.p_delong, row.p_t_test))] for row in comparison.rows[1:]]
    columns = ["name", "exchange", "Holm", "DeLong", "t test"]
    print_table(console, f"p values of the difference from {reference}", columns, p_values)
    say(
        console,
        f"exchange: {title}, exchanging predictions patient by patient; Holm: this for "
        f"{counted(len(p_values), 'comparison')}; DeLong: AUROC over patients, two classes or one label only; t test: "
        f"{title} over test folds, corrected for their common training slides.",
    )
    for warning in comparison.warnings:
        say(console, f"warning: {warning}", style="yellow")


def _sentence(row: Any, reference: str, title: str) -> str:
    """What was found about one run, in words."""
    if row.verdict in ("better", "worse"):
        return f"{row.name}: {row.verdict} than {reference}, difference in {title} {row.difference}."
    missed = "" if row.detectable is None else f"; one below {row.detectable:.3f} could easily be missed here"
    return f"{row.name}: no difference shown to {reference}{missed}."


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _p(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if value >= 0.001 else "<0.001"
