"""``mil store``: what is in a store, whether it is whole, and how it is mended, cleared and converted."""

import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from mil.cli.console import LiveCount, counted, print_table, say
from mil.cli.slides.store_report import (
    ROWS_SHOWN,
    print_findings,
    print_json,
    print_slides,
    print_summary,
    say_more,
    size_text,
)

store_app = typer.Typer(
    name="store",
    help="Embedding stores: list, verify, repair, remove, clear, convert, import and export.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}

StoreArgument = Annotated[Path, typer.Argument(help="The embedding store, such as cohort.zarr.")]
YesOption = Annotated[bool, typer.Option("--yes", help="Do it without asking.")]
QuickOption = Annotated[
    bool, typer.Option("--quick", help="Read no embeddings and pictures: records, sizes, coordinates and links only.")
]


@store_app.command("ls")
def list_store(
    store: StoreArgument,
    slides: Annotated[bool, typer.Option("--slides", help="One line per slide.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Everything, slides included, as JSON.")] = False,
) -> None:
    """Show what a store holds: slides, backbones, scales, what is complete, and what it weighs.

    Example: `mil store ls cohort.zarr`
    """
    from extract.store import open_store
    from extract.store.upkeep.summary import summarise

    console, summary = Console(), summarise(open_store(store))
    if as_json:
        print_json(console, asdict(summary) | {"path": str(summary.path)})
        return
    print_summary(console, summary)
    if slides:
        print_slides(console, summary)


@store_app.command()
def verify(
    store: StoreArgument,
    *,
    entries: Annotated[
        list[str] | None,
        typer.Option("--as", help="Features entry, may be given several times.  [default: all]", show_default=False),
    ] = None,
    slides: Annotated[
        Path | None,
        typer.Option(
            "--slides", help="Folder or table of the slides: check that they are what was cut.", show_default=False
        ),
    ] = None,
    quick: QuickOption = False,
    workers: Annotated[
        int | None, typer.Option(help="Files read at the same time.  [default: processors]", min=1, show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="What is wrong as JSON.")] = False,
) -> None:
    """Read everything in a store again and compare it with its checksums, records and recipes.

    Writes nothing but index.json, by which a store is listed faster. The exit code is 1 if anything is wrong.

    Example: `mil store verify cohort.zarr --slides slides/`
    """
    console = Console()
    findings = _verify(Console(stderr=True) if as_json else console, store, entries, slides, quick, workers)
    if as_json:
        print_json(console, [asdict(finding) | {"path": str(finding.path)} for finding in findings])
    else:
        print_findings(console, findings)
    if findings:
        raise typer.Exit(1)


@store_app.command()
def repair(store: StoreArgument, *, quick: QuickOption = False, yes: YesOption = False) -> None:
    """Verify a store and move what is damaged aside, so that the next mil extract makes it again.

    Nothing is deleted: damaged units go to STORE/quarantine, see mil store gc --quarantine. Embeddings whose tiles are
    moved stay, and are used again if the slide is cut as before.

    Example: `mil store repair cohort.zarr`
    """
    from extract.store import open_store
    from extract.store.core.remote_path import store_path
    from extract.store.upkeep.repair import check_on_disk, plan_repair, repair_store

    check_on_disk(store_path(store))
    console = Console()
    findings = _verify(console, store, None, None, quick, None)
    print_findings(console, findings)
    if not findings:
        return
    plan = plan_repair(findings)
    if plan.moves:
        say(console, f"{counted(len(plan.moves), 'unit')} ({size_text(plan.n_bytes)}) to move to {store}/quarantine:")
        for move in plan.moves[:ROWS_SHOWN]:
            say(console, f"  {move.path.relative_to(store)}")
        say_more(console, len(plan.moves))
        if not (yes or _agreed("Move them?")):
            say(console, "Nothing was moved.")
            raise typer.Exit(1)
        moved = repair_store(open_store(store, "r+"), plan)
        say(console, f"{counted(len(moved), 'unit')} moved. Now run the same mil extract again: it makes them anew.")
    if plan.left:
        say(
            console, f"{counted(len(plan.left), 'problem')} that moving mends not; see the fix of each above.", "yellow"
        )
        raise typer.Exit(1)


@store_app.command()
def gc(
    store: StoreArgument,
    *,
    older_than: Annotated[
        str, typer.Option(help="Only what was last changed that long ago: 90m, 12h, 7d. At least 10m.")
    ] = "1d",
    quarantine: Annotated[
        bool, typer.Option("--quarantine", help="Also what mil store repair moved aside that long ago.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Remove it; without this, it is only listed.")] = False,
) -> None:
    """Remove what stopped runs left: half-built units, and drafts that nobody works on.

    A draft keeps what a stopped run has computed of a slide: run mil extract again before, if it is to be used.

    Example: `mil store gc cohort.zarr --yes`
    """
    from extract.store import open_store
    from extract.store.upkeep.repair import find_garbage, gc_store

    console = Console()
    garbage = find_garbage(open_store(store, "r+"), _seconds(older_than), quarantine)
    kinds = Counter(piece.kind for piece in garbage)
    for piece in garbage[:ROWS_SHOWN]:
        say(console, f"  {piece.path.relative_to(store)}  {piece.kind}, {size_text(piece.n_bytes)}")
    say_more(console, len(garbage))
    total = size_text(sum(piece.n_bytes for piece in garbage))
    what = ", ".join(f"{kind}: {n}" for kind, n in sorted(kinds.items())) or "nothing to remove"
    if not garbage or not yes:
        hint = "; add --yes to remove them" if garbage else ""
        say(console, f"{what} ({total}){hint}")
        return
    say(console, f"{what}; {size_text(gc_store(garbage))} freed")


@store_app.command()
def remove(
    store: StoreArgument,
    slides: Annotated[list[str], typer.Argument(help="Ids of slides, as mil store ls --slides shows them.")],
    *,
    yes: Annotated[bool, typer.Option("--yes", help="Delete them; without this, they go into quarantine.")] = False,
) -> None:
    """Take slides out of a store: where they were cut, and their embeddings of every entry.

    They go to STORE/quarantine, from where they can be brought back; mil store gc --quarantine clears it. With --yes
    they are deleted. The next mil extract of a slide makes it anew; mil extract --redo ID does both in one step.

    Example: `mil store remove cohort.zarr case_07`
    """
    from extract.store import open_store
    from extract.store.core.files import remove as delete
    from extract.store.upkeep.repair import plan_removal, repair_store

    console, opened = Console(), open_store(store, "r+")
    plan = plan_removal(opened, slides)
    moved = repair_store(opened, plan)
    opened.write_index()
    what = f"{counted(len(moved), 'unit')} ({size_text(plan.n_bytes)}) of {counted(len(set(slides)), 'slide')}"
    if yes:
        for unit in moved:
            delete(unit)
        say(console, f"{what} deleted")
        return
    where = {unit.relative_to(store).parts[1] for unit in moved}
    say(console, f"{what} moved to {', '.join(f'{store}/quarantine/{name}' for name in sorted(where)) or 'nowhere'}")


@store_app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="The store to convert; it stays as it is.")],
    target: Annotated[Path, typer.Argument(help="The new store; what is complete in it already is kept.")],
    *,
    format: Annotated[Literal["zarr", "h5"], typer.Option("--format", help="Format of the new store.")],
) -> None:
    """Copy a store into another format, every checksum compared on the way.

    Example: `mil store convert cohort.zarr cohort.h5store --format h5`
    """
    from extract.store.upkeep.convert import convert_store

    console, started = Console(), time.monotonic()
    with _progress(console) as count:

        def report_unit(done: int, total: int, slide_id: str) -> None:
            if done == 1:
                count.begin(total)
            count.add(done=1, note=slide_id)

        report = convert_store(source, target, format, progress=report_unit)
    seconds = time.monotonic() - started
    counts = f"{counted(report.copied, 'unit')} copied, {report.skipped} there before, {len(report.failed)} failed"
    say(console, f"{target}: {counts}, in {seconds:.1f} s")
    if report.failed:
        rows = [[unit, reason] for unit, reason in report.failed.items()]
        print_table(console, "what could not be converted", ["slide", "reason"], rows[:ROWS_SHOWN])
        say_more(console, len(rows))
        say(console, f"fix: mil store repair {source}, then mil extract again, then this command again")
        raise typer.Exit(1)


def _verify(
    console: Console, path: Path, entries: Sequence[str] | None, slides: Path | None, quick: bool, workers: int | None
) -> list[Any]:
    """Findings about a store, with progress and a line that says what was looked at."""
    from extract.errors import ExtractError
    from extract.slides.parts import slide_fingerprint
    from extract.store import Store, open_store
    from extract.store.core.remote_path import store_path
    from extract.store.upkeep.verify import verify_store

    at = store_path(path)
    store = _open(at)
    if not isinstance(store, Store):
        return [store]
    files = None if slides is None else _slide_files(console, store, slides)
    started, n_bytes, units = time.monotonic(), 0, 0
    with _progress(console) as count:

        def report(done: int, total: int, read: int) -> None:
            nonlocal n_bytes, units
            if not units:
                count.begin(total)
            n_bytes, units = n_bytes + read, done
            rate = n_bytes / max(time.monotonic() - started, 1e-9)
            count.add(done=1, note=f"{size_text(n_bytes)}  {size_text(rate)}/s")

        findings = verify_store(store, entries, workers, report, quick, files, slide_fingerprint)
    with suppress(ExtractError):
        open_store(at, "r+").write_index(anew=True)
    seconds = time.monotonic() - started
    read = "records and sizes" if quick else f"{size_text(n_bytes)} ({size_text(n_bytes / max(seconds, 1e-9))}/s)"
    wrong = f"{counted(len(findings), 'problem')}" if findings else "nothing is wrong"
    say(console, f"{at}: {counted(units, 'unit')}, {read} in {seconds:.1f} s: {wrong}")
    return findings


def _open(path: Any) -> Any:
    from extract.store.upkeep.verify import open_or_find

    return open_or_find(path)


@contextmanager
def _progress(console: Console) -> Iterator[Any]:
    count = LiveCount(console, "units")
    try:
        yield count
    finally:
        count.end()


def _slide_files(console: Console, store: Any, slides: Path) -> dict[str, Path]:
    """The files of the store's slides, found as mil extract finds them."""
    from extract.slides.finding.sources import find_slides

    sources = find_slides([slides]) if slides.is_dir() else find_slides([], table=slides)
    ids = set(store.unit_paths())
    files = {source.slide_id: source.path for source in sources if source.slide_id in ids}
    if not files:
        raise typer.BadParameter(
            f"got {slides} → none of its {len(sources)} slides is in the store → name the folder or table that mil "
            f"extract was given",
            param_hint="--slides",
        )
    absent = len(ids) - len(files)
    note = f"; {absent} of the store have no file there and are not compared" if absent else ""
    say(console, f"comparing {counted(len(files), 'slide file')}{note}")
    return files


def _agreed(question: str) -> bool:
    """Ask; no answer, as where nobody sits at a terminal, is no."""
    try:
        return typer.confirm(question)
    except typer.Abort:
        return False


def _seconds(text: str) -> float:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smhd])\s*", text)
    if match is None:
        raise typer.BadParameter(
            f"got {text!r} → expected a number and s, m, h or d → write for instance 12h or 7d",
            param_hint="--older-than",
        )
    return float(match[1]) * _SECONDS[match[2]]
