"""What long commands show: a live line on a terminal, plain lines elsewhere, and tables."""

import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

_PLAIN_EVERY_S = 10.0
_TEXT_COLUMNS = ("which", "reason", "licence")
_WHOLE_COLUMNS = ("class", "name")


class LiveCount:
    """Counts finished things out of a total: a bar on a terminal, a line every ten seconds elsewhere.

    Safe to call from several threads.
    """

    def __init__(self, console: Console, what: str) -> None:
        self._console, self._what = console, what
        self._total, self._done, self._units = 0, 0, 0
        self._note = ""
        self._lock = threading.Lock()
        self._started = self._last_line = time.monotonic()
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._bar = Progress(*columns, TextColumn("{task.fields[note]}"), console=console, transient=True)

    def begin(self, total: int) -> None:
        """Start counting up to ``total``."""
        self._total, self._started = total, time.monotonic()
        self._last_line = self._started
        if self._bar is not None:
            self._bar.start()
            self._bar.add_task(self._what, total=total, note="")

    def add(self, done: int = 0, units: int = 0, note: str | None = None) -> None:
        """``done`` more things and ``units`` more of what rates are counted in are finished."""
        with self._lock:
            self._done += done
            self._units += units
            self._note = note if note is not None else self._note
            if self._bar is not None:
                self._bar.update(self._bar.task_ids[0], completed=self._done, note=escape(self._text()))
            elif time.monotonic() - self._last_line >= _PLAIN_EVERY_S:
                self._last_line = time.monotonic()
                self._console.print(f"{self._what} {self._done}/{self._total}  {self._text()}", markup=False)

    def say(self, line: str, style: str | None = None) -> None:
        """Print a line above the live line."""
        self._console.print(line, style=style, markup=False, soft_wrap=True, highlight=False)

    def end(self) -> None:
        """Remove the live line."""
        if self._bar is not None:
            self._bar.stop()

    def _text(self) -> str:
        seconds = max(time.monotonic() - self._started, 1e-9)
        rate = f"{self._units / seconds:.1f} tiles/s" if self._units else ""
        return "  ".join(part for part in (rate, self._note) if part)


@contextmanager
def counted_replicas(console: Console, out: Path) -> Iterator[Callable[[Any], None]]:
    """Counts the replicas of a command that may be stopped and gone on with; yields what to tell of its progress.

    Raises:
        typer.Exit: with code 130 at Ctrl-C, after a line that says where to go on.
    """
    count = LiveCount(console, "replicas")
    begun, shown = False, 0

    def report(progress: Any) -> None:
        nonlocal begun, shown
        if not begun:
            count.begin(progress.total)
            begun = True
        count.add(done=progress.done - shown, note=progress.what)
        shown = progress.done

    try:
        yield report
    except KeyboardInterrupt:
        count.end()
        say(console, f"stopped. What is done is kept in {out}; the same command goes on from there.")
        raise typer.Exit(130) from None
    finally:
        count.end()


class ExtractionProgress:
    """Shows an extraction: slides done, tiles/s, failures as they come."""

    def __init__(self, console: Console) -> None:
        self._count = LiveCount(console, "slides")

    def start(self, n_slides: int) -> None:
        """The run begins."""
        self._count.begin(n_slides)

    def tiles_done(self, n: int, stats: Any) -> None:
        """``n`` more tiles are embedded; ``stats`` is an `extract.engine.StreamStats`."""
        self._count.add(units=n, note=f"device busy {stats.device_busy:.0%}  waiting for {stats.bottleneck}")

    def slide_done(self, outcome: Any) -> None:
        """A slide is finished."""
        if outcome.outcome == "failed":
            # in short; the summary says what to do
            what, _, _ = plain_reason(outcome.slide_id, outcome.reason).partition(" → ")
            self._count.say(f"failed: {outcome.slide_id}: {what}", style="red")
        elif outcome.n_invalid and outcome.outcome == "embedded":
            self._count.say(f"{outcome.slide_id}: {outcome.n_invalid} of {outcome.n_tiles} tiles cannot be decoded")
        self._count.add(done=1)

    def warn(self, text: str) -> None:
        """Something that the user should know and that stops nothing."""
        self._count.say(f"warning: {text}", style="yellow")

    def end(self) -> None:
        """The run is over."""
        self._count.end()


def plain_reason(slide_id: str, reason: str) -> str:
    """What an error says of a slide, without the slide's name, for where that stands beside it."""
    name = re.escape(f"slide {slide_id!r}")
    reason = re.sub(rf"^{name}: | (in|of|for) {name}(?=\W|$)", "", reason)
    return re.sub(rf"{name}(?=\W|$)", "a slide", reason)


def print_table(console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; every column but the first and those of reasons is right-aligned."""
    console.print(title, style="bold", markup=False, soft_wrap=True, highlight=False)
    table = Table(box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    for i, column in enumerate(columns):
        left = i == 0 or column in _TEXT_COLUMNS
        table.add_column(
            column, justify="left" if left else "right", overflow="fold", no_wrap=not left or column in _WHOLE_COLUMNS
        )
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    console.print(table, highlight=False)


def print_metrics(console: Console, title: str, evaluation: dict[str, Any]) -> None:
    """Print the metrics of `mil.statistics.evaluate` with their intervals, and the per-class table."""
    names = {"macro_f1": "macro-F1", "balanced_accuracy": "balanced accuracy", "auroc": "AUROC", "accuracy": "accuracy"}
    rows = [[label, *_interval(evaluation[key], 3)] for key, label in names.items()]
    print_table(console, title, ["metric", "value", "95 % interval"], rows)
    columns = ["class", "slides", "pat.", "TP", "FP", "FN", "TN", "recall", "AUROC"]
    rows = []
    for name, values in evaluation["classes"].items():
        counts = [_stacked(values[key], 0) for key in ("tp", "fp", "fn", "tn")]
        rates = [_stacked(values[key], 2) for key in ("recall", "auroc")]
        rows.append([name, str(values["support"]), str(values["n_patients"]), *counts, *rates])
    print_table(
        console, "One class against the others; below each figure its 95 % interval over patients", columns, rows
    )


def _stacked(value: dict[str, float | None], digits: int) -> str:
    """The value, and its interval on the line below."""
    point, interval = _interval(value, digits)
    return f"{point}\n{interval.strip('[]').replace(' ', '–')}"


def _interval(value: dict[str, float | None], digits: int) -> tuple[str, str]:
    """The value and its interval as text; a dash where there is none."""
    point, low, high = (value[key] for key in ("value", "low", "high"))
    text = "–" if point is None else f"{point:.{digits}f}"
    return text, "–" if low is None or high is None else f"[{low:.{digits}f} {high:.{digits}f}]"


def counted(n: int, what: str) -> str:
    """A number of things: ``1 slide``, ``2 slides``."""
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def say(console: Console, line: str, style: str | None = None) -> None:
    """Print a line as it is: no markup, no colours for numbers, no breaks."""
    console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)
