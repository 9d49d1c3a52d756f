"""``mil store import`` and ``mil store export``: features of other tools, in and out."""

import csv
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from mil.cli.console import LiveCount, counted, print_table, say

_ROWS_SHOWN = 20
_QUESTIONS = "What the files do not say"


def import_features(
    source: Annotated[Path, typer.Argument(help="A file of features, or a folder that is searched.")],
    *,
    store: Annotated[Path, typer.Option("--store", help="The embedding store; made if it is not there.")],
    entry: Annotated[
        str | None,
        typer.Option(
            "--as", help="Name of the features entry.  [default: the backbone's, or imported]", show_default=False
        ),
    ] = None,
    format: Annotated[
        Literal["zarr", "h5"] | None, typer.Option("--format", help="Format of a new store.", show_default="zarr")
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option(
            help="Layout of the files: trident, clam, pt, stamp, slideflow, atlaspatch, wsidata, classic, plain.  "
            "[default: recognised from their content]",
            show_default=False,
            rich_help_panel=_QUESTIONS,
        ),
    ] = None,
    coords: Annotated[
        Literal["px", "um"] | None,
        typer.Option(
            help="Unit of the coordinates: level-0 pixels or µm.", show_default=False, rich_help_panel=_QUESTIONS
        ),
    ] = None,
    origin: Annotated[
        Literal["corner", "centre"] | None,
        typer.Option(
            help="What they point at: a tile's top-left corner or centre.",
            show_default=False,
            rich_help_panel=_QUESTIONS,
        ),
    ] = None,
    mpp: Annotated[
        float | None,
        typer.Option(
            help="µm per level-0 pixel, of every slide.", min=0, show_default=False, rich_help_panel=_QUESTIONS
        ),
    ] = None,
    mpps: Annotated[
        Path | None,
        typer.Option(
            help="CSV with slide_id, mpp, where slides differ.", show_default=False, rich_help_panel=_QUESTIONS
        ),
    ] = None,
    tile_px: Annotated[
        int | None,
        typer.Option(help="Side of a tile in level-0 pixels.", min=1, show_default=False, rich_help_panel=_QUESTIONS),
    ] = None,
    no_coords: Annotated[
        bool,
        typer.Option("--no-coords", help="Leave coordinates behind: trains, no heatmaps.", rich_help_panel=_QUESTIONS),
    ] = False,
    dataset: Annotated[
        str | None,
        typer.Option(
            help="Which feature matrix, where files hold several.", show_default=False, rich_help_panel=_QUESTIONS
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="A name for how the features were made. You say that all imports of this name were made alike; "
            "without one, a head is never applied to another import.",
            show_default=False,
            rich_help_panel=_QUESTIONS,
        ),
    ] = None,
) -> None:
    """Import features of TRIDENT, CLAM, STAMP, slideflow, AtlasPatch or LazySlide, or a classic MIL table.

    The layout is recognised from the content. What can be read in several ways is refused with a question. Files that
    cannot be taken are listed, the others are imported; repeat the command to go on with an import that was stopped.
    Labels of a classic table are written beside the store.

    Example: `mil store import trident/features_uni_v1 --store cohort.zarr --as uni`
    """
    from extract.store.foreign import Answers, import_bags

    answers = Answers(layout, coords, origin, mpp, _read_mpps(mpps), tile_px, dataset, no_coords)
    console, started = Console(), time.monotonic()
    try:
        with _progress(console) as progress:
            report = import_bags(source, store, entry, answers, format, recipe, progress)
    except KeyboardInterrupt:
        say(console, f"stopped. {store} is valid; run the same command again to go on.")
        raise typer.Exit(130) from None
    _print_import(console, store, report, time.monotonic() - started)
    if report.labels and report.entry is not None:
        _write_labels(console, store, report)
    if report.of("failed"):
        raise typer.Exit(1)


def export_features(
    store: Annotated[Path, typer.Argument(help="The embedding store.")],
    *,
    format: Annotated[
        Literal["trident", "clam", "spatialdata"], typer.Option("--format", help="Which tool's files to write.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the files; must be new or empty.")],
    entry: Annotated[
        str | None, typer.Option("--as", help="Features entry.  [default: the only one]", show_default=False)
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that are there.")] = False,
) -> None:
    """Write the bags of an entry as TRIDENT's or CLAM's files, or as SpatialData groups.

    Example: `mil store export cohort.zarr --format trident --out features_uni`
    """
    from extract.store import open_store
    from extract.store.foreign import export_store

    console, started = Console(), time.monotonic()
    try:
        with _progress(console) as progress:
            outcomes = export_store(open_store(store), out, format, entry, overwrite, progress)
    except KeyboardInterrupt:
        say(console, f"stopped. {out} holds whole files; run the same command again to go on.")
        raise typer.Exit(130) from None
    failed = [each for each in outcomes if each.outcome == "failed"]
    done, seconds = len(outcomes) - len(failed), time.monotonic() - started
    say(console, f"{out}: {counted(done, 'slide')} written, {len(failed)} failed, in {seconds:.1f} s")
    _print_failures(console, failed)
    if failed:
        raise typer.Exit(1)


@contextmanager
def _progress(console: Console) -> Iterator[Any]:
    """Counts slides; the first failures are told as they come."""
    count, begun = LiveCount(console, "slides"), False

    def report(total: int, outcome: Any) -> None:
        nonlocal begun
        if not begun:
            count.begin(total)
            begun = True
        count.add(done=1, note=outcome.slide_id)

    try:
        yield report
    finally:
        count.end()


def _print_import(console: Console, store: Path, report: Any, seconds: float) -> None:
    counts = Counter(each.outcome for each in report.outcomes)
    rows = sum(each.n_rows for each in report.of("imported"))
    layouts = " and ".join(report.layouts) or "no layout"
    say(
        console,
        f"{store}, entry {report.entry or '–'}: {counts['imported']} imported from {layouts} ({rows} rows), "
        f"{counts['complete']} there before, {counts['failed']} failed, in {seconds:.1f} s",
    )
    bare = [each for each in report.outcomes if each.outcome != "failed" and not each.has_coords]
    if bare:
        say(
            console,
            f"{counted(len(bare), 'slide')} without coordinates: they train and predict; no heatmaps.",
            "yellow",
        )
    if report.skipped:
        first = next(iter(report.skipped.items()))
        say(console, f"{counted(len(report.skipped), 'file')} left out, such as {first[0]}: {first[1]}")
    for line in report.not_taken.lines():
        say(console, line)
    _print_failures(console, report.of("failed"))


def _print_failures(console: Console, failed: Sequence[Any]) -> None:
    if not failed:
        return
    rows = [[each.slide_id, each.reason] for each in failed]
    print_table(console, "what could not be taken", ["slide", "reason"], rows[:_ROWS_SHOWN])
    if len(rows) > _ROWS_SHOWN:
        say(console, f"  and {len(rows) - _ROWS_SHOWN} more")


def _write_labels(console: Console, store: Path, report: Any) -> None:
    from extract.store.foreign import write_labels

    path = store.with_name(f"{store.name.removesuffix(store.suffix)}.labels.csv")
    taken = {each.slide_id for each in report.outcomes if each.outcome != "failed"}
    write_labels(path, {slide_id: label for slide_id, label in report.labels.items() if slide_id in taken})
    say(console, f"labels {path}: mil train --store {store} --labels {path} --target label --out RUN")


def _read_mpps(table: Path | None) -> dict[str, float]:
    """µm/px by slide id."""
    if table is None:
        return {}
    try:
        with open(table, encoding="utf-8-sig", newline="") as file:
            values = {row["slide_id"]: float(row["mpp"]) for row in csv.DictReader(file)}
    except (KeyError, ValueError, TypeError) as error:
        raise _bad_mpps(table, repr(error)) from error
    wrong = [slide_id for slide_id, value in values.items() if not 0 < value < float("inf")]
    if wrong:
        raise _bad_mpps(table, f"mpp {values[wrong[0]]} of {wrong[0]!r}")
    return values


def _bad_mpps(table: Path, what: str) -> typer.BadParameter:
    return typer.BadParameter(
        f"got {table}: {what} → expected the columns slide_id and mpp, µm per pixel above 0 → correct it",
        param_hint="--mpps",
    )
