"""``mil plan`` and ``mil doctor``: what an extraction will do, and whether the installation is fit for it."""

import csv
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from mil.cli.console import duration_text
from mil.cli.slides.flags import ExtractionFlags, with_extraction_flags

_NEARLY_ALL = 0.95
_ROWS_SHOWN = 40


@with_extraction_flags
def plan(
    *,
    store: Annotated[
        Path | None,
        typer.Option(
            "--store", help="The store, if it is known: what is complete in it is left out.", show_default=False
        ),
    ] = None,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure/--no-measure", help="Embed some tiles for a few seconds, to say how long all will take."
        ),
    ] = True,
    csv_file: Annotated[
        Path | None, typer.Option("--csv", help="Also write one line per slide to this file.", show_default=False)
    ] = None,
    **given: Any,
) -> None:
    """Say what mil extract will do with the same flags: tiles, disk space, time, and the slides that will fail.

    Writes nothing into the store. The exit code is 1 if a slide will fail, or the whole run will.

    Example: `mil plan slides/ --store cohort.zarr --mpp 0.5`
    """
    if csv_file is not None and (csv_file.is_dir() or not csv_file.absolute().parent.is_dir()):
        raise typer.BadParameter(
            f"got {csv_file} → expected a file in a folder that exists → correct it", param_hint="--csv"
        )
    flags = ExtractionFlags(**given)
    flags.check()
    console = Console()
    try:
        planned = _plan(console, flags, store, measure)
    except KeyboardInterrupt:
        console.print("stopped. Nothing was written.")
        raise typer.Exit(130) from None
    if csv_file is not None:
        _write_csv(csv_file, planned)
    _print_plan(console, planned, csv_file)
    if planned.failed or planned.problems:
        raise typer.Exit(1)


def _plan(console: Console, flags: ExtractionFlags, store: Path | None, measure: bool) -> Any:
    """The plan; its start-up counts the libraries too, which an extraction loads once more."""
    began = time.monotonic()
    from extract.pipeline.fleet import devices_of
    from extract.planning.plan import plan_extraction

    loaded_s = time.monotonic() - began
    keywords = flags.keywords(devices_of(flags.device)[0])
    progress = _PlanProgress(console)
    try:
        planned = plan_extraction(store=store, measure=measure, progress=progress, **keywords)
    finally:
        progress.end()
    return replace(planned, start_seconds=planned.start_seconds + loaded_s)


class _PlanProgress:
    """Shows slides as they are planned, and that the rate is being measured."""

    def __init__(self, console: Console) -> None:
        from mil.cli.console import LiveCount

        self._count, self._tiles = LiveCount(console, "slides planned"), 0

    def start(self, n_slides: int) -> None:
        """Slides are being cut."""
        self._count.begin(n_slides)

    def slide_done(self, slide: Any) -> None:
        """One more slide is planned."""
        self._tiles += slide.n_tiles
        self._count.add(done=1, note=f"{self._tiles} tiles")

    def measuring(self, device: str) -> None:
        """All are planned, and the rate is being measured."""
        self._count.say(f"embedding some tiles on {device} to measure the rate ...")

    def end(self) -> None:
        """Planning is over."""
        self._count.end()


def _write_csv(file: Path, planned: Any) -> None:
    from extract.planning.planned import PlannedSlide

    with open(file, "w", newline="", encoding="utf-8") as target:
        writer = csv.DictWriter(target, [field.name for field in fields(PlannedSlide)])
        writer.writeheader()
        writer.writerows(asdict(slide) for slide in planned.slides)


def _print_plan(console: Console, planned: Any, csv_file: Path | None) -> None:
    """Print the slides, the totals, and what will fail."""
    from mil.cli.console import plain_reason, print_table

    rows = [_row(slide) for slide in planned.to_embed]
    if rows:
        print_table(
            console, "slides to embed", ["slide", "tiles", "µm/px", "level", "mm²", "reader"], rows[:_ROWS_SHOWN]
        )
    if len(rows) > _ROWS_SHOWN:
        hidden = len(rows) - _ROWS_SHOWN
        where = f"{csv_file} lists all" if csv_file is not None else "--csv FILE lists all"
        console.print(f"... and {hidden} more; {where}", markup=False, soft_wrap=True, highlight=False)
    if planned.failed:
        failed = [[slide.slide_id, plain_reason(slide.slide_id, slide.reason)] for slide in planned.failed]
        print_table(console, "slides that will fail", ["slide", "reason"], failed)
    for line in (*_notes(planned.to_embed), *planned.not_taken.lines(), *_totals(planned)):
        console.print(line, markup=False, soft_wrap=True, highlight=False)
    for problem in planned.problems:
        console.print(f"problem: {problem}", style="red", markup=False, soft_wrap=True, highlight=False)


def _row(slide: Any) -> list[str]:
    return [
        slide.slide_id,
        str(slide.n_tiles),
        _number(slide.native_mpp) + (f" → {_number(slide.achieved_mpp)}" if slide.resampled else ""),
        f"{slide.level}, resampled" if slide.resampled else str(slide.level),
        "–" if slide.tissue_mm2 is None else f"{slide.tissue_mm2:.2f}",
        slide.reader or "–",
    ]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _notes(slides: Sequence[Any]) -> list[str]:
    """Where the scales come from, and why slides are not read the fastest way; each with the number of slides."""
    notes = Counter(f"µm/px from {slide.mpp_source}" for slide in slides)
    notes += Counter(f"read by {slide.reader}: {slide.reader_note}" for slide in slides if slide.reader_note)
    full = sum(slide.tissue_part is not None and slide.tissue_part > _NEARLY_ALL for slide in slides)
    if full:
        what = "fields of view? Else glass is taken for tissue; see mil sheet, and --tissue-threshold"
        notes[f"tissue covers more than {_NEARLY_ALL:.0%}: {what}"] = full
    return [f"{_count(n, 'slide')}: {note}" for note, n in notes.items()]


def _totals(planned: Any) -> list[str]:
    """Counts, size and time."""
    counts = [f"{len(planned.to_embed)} to embed", f"{len(planned.failed)} will fail"]
    if planned.complete:
        counts.insert(1, f"{len(planned.complete)} complete in {planned.store}")
    entries = ", ".join(f"{entry.name} ({entry.dim} x {entry.dtype})" for entry in planned.entries)
    size = f"{planned.n_tiles} tiles, {_size(planned.cache_bytes)} of embeddings: {entries}"
    if planned.free_bytes is not None:
        fits = "enough" if planned.free_bytes >= planned.cache_bytes else "NOT ENOUGH"
        size += f"; {_size(planned.free_bytes)} free: {fits}"
    lines = [f"{_count(len(planned.slides), 'slide')}: {', '.join(counts)}", size]
    if planned.rate is not None:
        rate = planned.rate
        again = ", some of them again and again" if rate.n_different < rate.n_tiles else ""
        lines.append(
            f"about {duration_text(planned.seconds)} on {rate.device}: {duration_text(planned.start_seconds)} to "
            f"start, {duration_text(planned.cut_seconds)} to cut slides, then {rate.tiles_per_s:.1f} tiles/s; measured "
            f"in {rate.seconds:.1f} s with {_count(rate.n_different, 'tile')} of the first slides{again}, waiting for "
            f"{rate.bottleneck}"
        )
    else:
        lines.append(f"cutting takes {duration_text(planned.cut_seconds)}, which mil extract does again")
    return lines


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"


def doctor(
    store: Annotated[
        Path | None,
        typer.Option(help="Where the store lies or will lie.  [default: the present folder]", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The checks as JSON.")] = False,
) -> None:
    """Check the installation: GPU and driver, readers, weights, precision, disk; and say what to do.

    The exit code is 1 if something does not work.

    Example: `mil doctor --store cohort.zarr`
    """
    from extract.planning.doctor import run_doctor

    console = Console()
    checks = run_doctor(store, (lambda check: None) if as_json else (lambda check: _print_check(console, check)))
    errors, warnings = (sum(check.status == status for check in checks) for status in ("error", "warning"))
    if as_json:
        text = json.dumps([asdict(check) for check in checks], indent=2, ensure_ascii=False)
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    else:
        console.print(
            f"{_count(len(checks), 'check')}: {_count(errors, 'error')}, {_count(warnings, 'warning')}", highlight=False
        )
    if errors:
        raise typer.Exit(1)


def _print_check(console: Console, check: Any) -> None:
    """One line: status, part, what was found, and the fix."""
    style = {"ok": "green", "warning": "yellow", "error": "bold red"}[check.status]
    fix = f" → {check.fix}" if check.fix else ""
    console.print(f"{check.status:<7}", style=style, end=" ", highlight=False)
    console.print(f"{check.name}: {check.detail}{fix}", markup=False, soft_wrap=True, highlight=False)
