"""``mil train``, ``mil report`` and ``mil demo``."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from extract.store.core.remote_path import StorePath
from mil.cli.console import TargetOption, TaskOption, counted, say, say_start
from mil.cli.slides import extract as cli_extract


def train(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Settings: head=abmil folds=5 seeds=3 optimizer.lr=1e-4 ...", show_default=False),
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
    out: Annotated[Path, typer.Option(help="Folder for the results; must be new or empty.")],
    slide_column: Annotated[str | None, typer.Option(help="Column of slide ids.", show_default=False)] = None,
    patient_column: Annotated[str | None, typer.Option(help="Column of patient ids.", show_default=False)] = None,
    config: Annotated[
        Path | None, typer.Option(help="config.yaml of an earlier run, to run it again.", show_default=False)
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in --out.")] = False,
) -> None:
    """Cross-validate a head on cached bags, grouped by patient, and write a report.

    A training that was stopped goes on from what is done when the same command is given again.

    Example: `mil train --store cohort.zarr --labels labels.csv --target subtype --out runs/abmil head=abmil`
    """
    from mil.config.compose import compose_config
    from mil.config.preflight import check_inputs
    from mil.runs.folders import check_run_folder

    values = {"store": store, "labels": labels, "target": target, "task": task}
    values |= {"slide_column": slide_column, "patient_column": patient_column}
    given = {name: str(value) for name, value in values.items() if value is not None}
    say_start("reading settings, labels and store, loading torch")
    check_run_folder(out.absolute(), overwrite)
    check_inputs("a training", overrides or [], config, given)
    settings = compose_config(overrides or [], config, given)
    # torch and all that needs it, once nothing is left to be mistyped
    from mil.experiments.crossval import run_training
    from mil.experiments.tracking import tracker_places, what_leaves
    from mil.tuning.sweep_config import cautions_of

    console, lines = Console(), list[str]()
    if settings.track:
        say(console, what_leaves(settings.track, settings.track_files))
    try:
        with _replica_progress(console, f"replicas of {settings.head.name}") as progress:
            run = run_training(
                settings, out, progress, overwrite, lambda folder: lines.append(_try_report(folder, settings.store))
            )
    except KeyboardInterrupt:
        say(console, f"stopped. {_kept(out)}; the same command goes on from there.")
        raise typer.Exit(130) from None
    _print_run(console, run, [] if config is None or labels is not None else cautions_of(config))
    # it was written before the folder had its name
    report = out / "report.html"
    say(console, f"results {out}, report {report}" if report.is_file() else f"results {out}; {lines[0]}")
    for line in tracker_places(settings.track, out.absolute()):
        say(console, line)


def _kept(out: Path) -> str:
    """What of a stopped training the next one will find."""
    from mil.training.resume import kept_replicas, unfinished_folder

    return f"{counted(kept_replicas(unfinished_folder(out.absolute())), 'finished replica')} kept"


@contextmanager
def _replica_progress(console: Console, what: str) -> Iterator[Any]:
    """Counts replicas, with the epoch and validation loss of the one in training."""
    from mil.cli.console import LiveCount

    count = LiveCount(console, what)
    begun = False

    def report(progress: Any) -> None:
        nonlocal begun
        if not begun:
            count.begin(progress.n_replicas)
            begun = True
        if progress.record is not None:
            record = progress.record
            count.add(note=f"{progress.replica.name} epoch {record.epoch} val loss {record.validation_loss:.3f}")
        if progress.trained is not None:
            count.add(done=1)

    try:
        yield report
    finally:
        count.end()


def _print_run(console: Console, run: Any, cautions: Sequence[str]) -> None:
    from mil.cli.console import print_metrics, print_table, print_target_metrics, shortened
    from mil.cohort.targets import CLASSIFICATION

    metrics = run.metrics
    if metrics["synthetic"]:
        console.print(
            "SYNTHETIC DATA: these slides were drawn by mil demo and say nothing about tumours.", style="bold"
        )
    rows = [[reason, str(count), shortened(ids)] for reason, count, ids in metrics["cohort"]["attrition"] if count]
    print_table(console, "where the rows and slides went", ["rows and slides", "count", "which"], rows)
    seeds = counted(len(run.config.seeds), "seed")
    title = f"{metrics['target']} by {metrics['head']}: mean out-of-fold prediction over {seeds}"
    if metrics["task"] == CLASSIFICATION:
        print_metrics(console, title, metrics["out_of_fold"])
    else:
        print_target_metrics(console, title, metrics["task"], metrics["out_of_fold"])
    for warning in (*metrics["warnings"], *cautions):
        say(console, f"warning: {warning}", style="yellow")
    looks = metrics["looks"]
    console.print(
        f"The test folds of this cohort have been looked at {looks} time{'s' if looks != 1 else ''} in "
        f"this folder of runs.",
        highlight=False,
        soft_wrap=True,
    )


def _report(console: Console, folder: Path, store: StorePath | None) -> None:
    """Write the report and say where."""
    say(console, _write_report(folder, store))


def _try_report(folder: Path, store: StorePath | None) -> str:
    """As `_write_report`; no fault of a page may cost the training behind it."""
    try:
        return _write_report(folder, store)
    except Exception as error:  # noqa: BLE001
        return f"no report: {error}; mil report writes it again"


def _write_report(folder: Path, store: StorePath | None) -> str:
    """Write the report; returns where, or what is missing for it."""
    from extract.errors import ExtractError
    from extract.store import open_store
    from mil.errors import MissingExtraError
    from mil.reports.report import write_report

    slides = open_store(store) if store is not None else None

    def thumbnail(slide_id: str) -> Any:
        try:
            return None if slides is None else slides[slide_id].thumbnail
        except ExtractError:
            # a slide that has left the store since costs its picture, not the report
            return None

    try:
        path = write_report(folder, thumbnail)
    except MissingExtraError as error:
        return f"no report: {error}"
    return f"results {folder}, report {path}"


def report(
    run: Annotated[Path, typer.Argument(help="The folder that mil train wrote.")],
    store: Annotated[Path | None, typer.Option(help="The store, for thumbnails.", show_default=False)] = None,
) -> None:
    """Write a run's report.html again.

    Example: `mil report runs/abmil --store cohort.zarr`
    """
    _report(Console(), run, store)


def demo(
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings, as in mil train.", show_default=False)
    ] = None,
    *,
    out: Annotated[Path, typer.Option(help="Folder for slides, store and runs.")] = Path("demo"),
    seed: Annotated[int, typer.Option(help="Seed of the synthetic cohort.", min=0)] = 0,
) -> None:
    """Run everything on a small SYNTHETIC cohort: draw slides, embed, train two heads, report.

    The slides imitate H&E and differ by planted lesions; they say nothing about real tumours. Runs again resume.

    Example: `mil demo --out demo`
    """
    import time

    from extract.pipeline.extraction import run_extraction
    from mil.cli.console import ExtractionProgress
    from mil.demo import draw_cohort, judge, train_heads

    console, started = Console(), time.monotonic()
    console.print("SYNTHETIC DATA: drawing a cohort that imitates H&E", style="bold", highlight=False)
    slides = draw_cohort(out / "cohort", seed)
    store, progress = out / "cohort.zarr", ExtractionProgress(console)
    try:
        extraction = run_extraction(
            slides, store, table=out / "cohort" / "slides.csv", mpp=0.5, progress=progress, runtime="torch"
        )
    except KeyboardInterrupt:
        raise cli_extract.stopped() from None
    finally:
        progress.end()
    cli_extract.print_extraction(console, extraction)
    with ExitStack() as stack:
        runs = train_heads(
            store,
            out / "cohort" / "labels.csv",
            out,
            overrides or [],
            lambda head: stack.enter_context(_replica_progress(console, f"replicas of {head}")),
        )
    _print_demo(console, judge(store, out / "cohort", runs))
    for run in runs:
        _report(console, run.folder or out, store)
    console.print(f"SYNTHETIC DATA. {time.monotonic() - started:.0f} s in all.", style="bold", highlight=False)


def _print_demo(console: Console, result: Any) -> None:
    from mil.cli.console import interval_text, print_metrics, print_table
    from mil.cohort.targets import CLASSIFICATION
    from mil.evaluation.headlines import metric_name, replica_metrics

    metrics = replica_metrics(CLASSIFICATION)
    print_metrics(console, "SYNTHETIC cohort, subtype by abmil, out of fold", result.runs[-1].metrics["out_of_fold"])
    rows = []
    for run in result.runs:
        scores = [run.metrics["out_of_fold"][key] for key in metrics]
        rows.append([run.config.head.name, *map(interval_text, scores)])
    print_table(
        console, "SYNTHETIC cohort, by head", ["head", *(metric_name(CLASSIFICATION, key) for key in metrics)], rows
    )
    gain = interval_text(dict(zip(("value", "low", "high"), result.gain, strict=True)), "+.3f")
    console.print(
        f"ABMIL minus mean pooling in macro-F1: {gain}, paired over patients.\n"
        f"Out-of-fold attention finds planted lesion tiles with AUROC {result.lesion_auroc:.3f} (mean of "
        f"{result.n_slides} slides).",
        highlight=False,
        soft_wrap=True,
    )
