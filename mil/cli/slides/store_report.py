"""What ``mil store`` prints of a store: its summary, its slides, what is wrong with it, and sizes for people."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from mil.cli.console import counted, print_table, say

ROWS_SHOWN = 40
"""Rows of a table; of the others their number is told."""


def print_summary(console: Console, summary: Any) -> None:
    """What a store holds, as ``mil store ls`` says it.

    Args:
        console: where to.
        summary: `extract.store.upkeep.summary.StoreSummary`.
    """
    lines = [
        f"{summary.path}: {summary.format}, {counted(len(summary.slides), 'slide')}, {summary.n_tiles} tiles of "
        f"{summary.tiles}, {size_text(summary.n_bytes)} on disk",
        f"µm/px of level 0: {_range_text(summary.mpp_range('native_mpp'))}; "
        f"of the tiles: {_range_text(summary.mpp_range('achieved_mpp'))}",
    ]
    if any(slide.synthetic for slide in summary.slides):
        lines.append("SYNTHETIC DATA: some of these slides were drawn by a program.")
    for line in lines:
        say(console, line)
    rows = [
        [
            _entry_text(entry),
            "unreadable" if entry.dim is None else f"{entry.dim} {entry.dtype}",
            str(entry.rows),
            size_text(entry.n_bytes),
            _state_counts(entry),
        ]
        for entry in summary.entries
    ]
    print_table(console, "features", ["entry", "each", "rows", "size", "which"], rows)
    _print_remarks(console, summary)


def _entry_text(entry: Any) -> str:
    """Name of an entry, and of its backbone where that is another."""
    from extract.store.core.recipes import is_unknown

    if entry.backbone in (None, entry.name):
        return str(entry.name)
    return f"{entry.name} ({'backbone unknown' if is_unknown(entry.backbone) else entry.backbone})"


def _state_counts(entry: Any) -> str:
    """How many slides have what: ``12 complete, 3 without``."""
    states = ("complete", "partial", "without", "damaged", "waiting")
    counts = {state: getattr(entry, state) for state in states}
    return ", ".join(f"{n} {state}" for state, n in counts.items() if n or state == "complete")


def _print_remarks(console: Console, summary: Any) -> None:
    """What else is in the folder, and what to do about it."""
    damaged = [slide for slide in summary.slides if slide.problem not in (None, "no tiles")]
    waiting = sum(slide.problem == "no tiles" for slide in summary.slides)
    remarks = []
    if damaged or any(entry.damaged for entry in summary.entries):
        which = f": {damaged[0].slide_id}" if damaged else ""
        remarks.append(f"some units cannot be used{which}; see mil store verify {summary.path}")
    if waiting:
        remarks.append(f"{counted(waiting, 'slide')} with features but no tiles; mil extract cuts them again")
    if summary.n_leftovers:
        remarks.append(
            f"{counted(summary.n_leftovers, 'leftover')} of runs, stopped or at work "
            f"({size_text(summary.leftover_bytes)}); see mil store gc {summary.path}"
        )
    if summary.quarantine_bytes:
        remarks.append(
            f"{size_text(summary.quarantine_bytes)} in quarantine; see mil store gc {summary.path} --quarantine"
        )
    for remark in remarks:
        say(console, remark, "yellow")


def print_slides(console: Console, summary: Any) -> None:
    """A table of a store's slides."""
    rows = [
        [
            slide.slide_id,
            "–" if slide.n_tiles is None else str(slide.n_tiles),
            _number(slide.native_mpp),
            _number(slide.achieved_mpp),
            size_text(slide.n_bytes),
            _states(slide.entries, slide.problem),
        ]
        for slide in summary.slides
    ]
    print_table(console, "slides", ["slide", "tiles", "level 0", "µm/px", "size", "which"], rows)


def _states(entries: Mapping[str, str], problem: str | None) -> str:
    """The entries of a slide by what they are: ``complete: a, b; partial: c``."""
    if problem is not None and problem != "no tiles":
        return "tiles damaged"
    by_state: dict[str, list[str]] = {}
    for name, state in entries.items():
        by_state.setdefault(state, []).append(name)
    return "; ".join(f"{state}: {', '.join(names)}" for state, names in sorted(by_state.items())) or "no features"


def print_findings(console: Console, findings: Sequence[Any]) -> None:
    """A table of what is wrong, and each fix once."""
    if not findings:
        return
    rows = [
        [finding.slide_id or "–", finding.entry or ("tiles" if finding.slide_id else "store"), finding.what]
        for finding in findings
    ]
    print_table(console, "what is wrong", ["slide", "which", "reason"], rows[:ROWS_SHOWN])
    say_more(console, len(rows), "; --json lists all")
    for fix, n in Counter(finding.fix for finding in findings).items():
        say(console, f"fix for {n}: {fix}" if n < len(findings) else f"fix: {fix}")


def size_text(n_bytes: float) -> str:
    """A size for people: 1.2 GB, 34 MB, 5.6 kB."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= size:
            return f"{n_bytes / size:.3g} {unit}" if n_bytes < 999.5 * size else f"{n_bytes / size:.0f} {unit}"
    return f"{n_bytes:.0f} B"


def _range_text(values: tuple[float, float] | None) -> str:
    if values is None:
        return "unknown"
    low, high = (f"{value:.4g}" for value in values)
    return low if low == high else f"{low} to {high}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def say_more(console: Console, n: int, hint: str = "") -> None:
    """That a list of ``n`` lines was cut after `ROWS_SHOWN`, if it was."""
    if n > ROWS_SHOWN:
        say(console, f"  and {n - ROWS_SHOWN} more{hint}")


def print_json(console: Console, value: Any) -> None:
    """A value as JSON that a program can read: neither wrapped nor coloured."""
    console.print(json.dumps(value, indent=1), markup=False, highlight=False, soft_wrap=True)
