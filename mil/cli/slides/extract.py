"""``mil extract``: what it prints, and how it stops."""

import shlex
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from mil.cli.console import say_start
from mil.cli.slides.flags import ExtractionFlags, with_extraction_flags
from mil.files import require_writable


@contextmanager
def resumable() -> Iterator[None]:
    """Within it Ctrl-C ends the command with one line that says how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        raise stopped() from None


def stopped() -> typer.Exit:
    """Say that nothing is lost and how to go on; exit as a shell expects after Ctrl-C."""
    again = shlex.join(["mil", *sys.argv[1:]])
    Console(stderr=True).print(f"stopped. What was finished is kept. To go on: {again}", markup=False, soft_wrap=True)
    return typer.Exit(130)


@resumable()
@with_extraction_flags
def extract(
    *, store: Annotated[Path, typer.Option("--store", help="The embedding store, such as cohort.zarr.")], **given: Any
) -> None:
    """Cut slides into tissue tiles and store their embeddings.

    Resumes where an earlier run stopped, inside a slide too. Slides that fail are listed with the reason, and the exit
    code is 1; it is 3 where none failed but another process is still at work on some.

    Example: `mil extract slides/ --store cohort.zarr --mpp 0.5`
    """
    flags = ExtractionFlags(**given)
    flags.check()
    say_start("looking for slides and what the store holds of them")
    _check_store(store)
    from extract.pipeline.fleet import check_claims, devices_of, run_fleet
    from extract.store.core.remote_path import store_path

    devices = devices_of(flags.device)
    if len(devices) > 1:
        check_claims(store_path(store))
        _redo_once(store, flags)
        raise typer.Exit(run_fleet(devices, (sys.executable, "-P", "-m", "mil"), sys.argv[1:]))
    _run(store, flags.keywords(devices[0]))


def _redo_once(store: Path, flags: ExtractionFlags) -> None:
    """Move slides that are to be done again out of the store, before several processes share the work."""
    from extract.pipeline.extraction import redo
    from extract.store import open_store

    if flags.redo and store.exists():
        config = _config(flags.keywords("cpu"))
        redo(open_store(store, "r+"), config, config.slides.find())


def _config(keywords: dict[str, Any]) -> Any:
    """The keywords of `extract.run_extraction` as a configuration."""
    from extract.pipeline.config import ExtractionConfig

    named = ("slides", "backbone", "entry", "recipe")
    others = {name: value for name, value in keywords.items() if name not in named}
    slides, backbone, entry, recipe = [keywords.get(name) for name in named]
    return ExtractionConfig.of(slides or [], backbone or [], entry, recipe, **others)


def _check_store(store: Path) -> None:
    """Refuse a new store where none can be made; one that is there says itself what is wrong with it."""
    from extract.store.core.remote_path import RemotePath, store_path

    path = store_path(store)
    if not isinstance(path, RemotePath) and not path.exists():
        require_writable(path, f"store {path}", "--store")


def _run(store: Path, keywords: dict[str, Any]) -> None:
    """Extract, with progress, and print what became of it.

    Raises:
        typer.Exit: slides failed, or were left to others.
    """
    from extract.pipeline.fleet import LEFT_TO_OTHERS
    from extract.pipeline.shortcut import find_complete
    from mil.cli.console import ExtractionProgress

    console = Console()
    progress = ExtractionProgress(console)
    config = _config(keywords)
    try:
        # before torch is loaded, which takes longer than looking
        report = find_complete(store, config, progress)
        if report is None:
            say_start("loading the backbone")
            from extract.pipeline.extraction import extract_slides

            report = extract_slides(config, store, progress)
    finally:
        progress.end()
    print_extraction(console, report)
    if report.failed:
        raise typer.Exit(1)
    if report.count("elsewhere"):
        raise typer.Exit(LEFT_TO_OTHERS)


def print_extraction(console: Console, report: Any) -> None:
    """Print what became of a run: counts and rates, invalid tiles, slides that failed and why."""
    console.print(_counts_text(report), soft_wrap=True, highlight=False)
    _print_readers_and_tiles(console, report.outcomes)
    _print_slides_not_done(console, report)
    for line in report.not_taken.lines():
        console.print(line, markup=False, soft_wrap=True, highlight=False)
    where = (
        f"store {report.store}, {'entry' if len(report.entries) == 1 else 'entries'} {', '.join(report.entries)}, log "
        f"{report.log}"
        if report.store.exists()
        else "no slide could be cut, so no store was made"
    )
    console.print(where, markup=False, soft_wrap=True, highlight=False)


def _counts_text(report: Any) -> str:
    stats = report.stats
    tiles = sum(o.n_tiles for o in report.outcomes)
    rate = (
        f", {stats.tiles / report.seconds:.1f} tiles/s, device busy {stats.device_busy:.0%}, waiting for "
        f"{stats.bottleneck}"
        if stats.tiles
        else ""
    )
    resumed = sum(o.n_resumed for o in report.outcomes)
    saved = f" ({resumed} of them saved before)" if resumed else ""
    elsewhere = f"{report.count('elsewhere')} left to other processes, " if report.count("elsewhere") else ""
    slides = "1 slide" if len(report.outcomes) == 1 else f"{len(report.outcomes)} slides"
    return (
        f"{slides}: {report.count('embedded')} embedded, {report.count('complete')} complete before, {elsewhere}"
        f"{len(report.failed)} failed; {tiles} tiles{saved} in {report.seconds:.1f} s{rate}"
    )


def _print_readers_and_tiles(console: Console, outcomes: Sequence[Any]) -> None:
    """How slides were read where that is worth a word; tiles that were flagged, and those that could not be decoded."""
    from mil.cli.console import print_table

    readers = Counter(o.reader for o in outcomes if o.reader)
    if set(readers) - {"direct", "image"}:
        print_table(console, "how slides were read", ["reader", "slides"], [[r, str(n)] for r, n in readers.items()])
    flagged = {name: sum(o.flagged.get(name, 0) for o in outcomes) for name in ("blurred", "empty", "pen")}
    if any(flagged.values()):
        counts = ", ".join(f"{n} {name}" for name, n in flagged.items() if n)
        console.print(f"tiles flagged, and kept: {counts}", soft_wrap=True, highlight=False)
    invalid = [[o.slide_id, str(o.n_invalid), str(o.n_tiles)] for o in outcomes if o.n_invalid]
    if invalid:
        print_table(console, "tiles that cannot be decoded (left out)", ["slide", "invalid", "tiles"], invalid)


def _print_slides_not_done(console: Console, report: Any) -> None:
    from mil.cli.console import plain_reason, print_table

    for what, title in (("failed", "slides that failed"), ("elsewhere", "slides left to other processes")):
        rows = [[o.slide_id, plain_reason(o.slide_id, o.reason)] for o in report.outcomes if o.outcome == what]
        if rows:
            print_table(console, title, ["slide", "reason"], rows)
    left = report.count("elsewhere")
    if left:
        who = "1 slide is" if left == 1 else f"{left} slides are"
        line = f"{who} being extracted by another process; run this command again when that has ended, to be sure"
        console.print(line, style="yellow", markup=False, soft_wrap=True, highlight=False)
