"""What long commands show: a live line on a terminal, plain lines elsewhere, and tables."""

import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE
from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from mil.cli.activity import ACTIVITY, EVERY_S

TargetOption = Annotated[
    str | None,
    typer.Option(help="Column to predict, or several: er,pr,her2; required without --config.", show_default=False),
]
TaskOption = Annotated[
    str | None,
    typer.Option(
        help="What the target is: classification (default), multilabel, regression, or survival (--target time,event).",
        show_default=False,
    ),
]
"""What every command that trains is told of the target."""
Estimate = Mapping[str, float | None]
_LONGEST_WORD, _LONGEST_NAME = 12, 40
"""A longer word may be broken over lines, and a longer name cut, where room is short."""
_TEXT_COLUMNS = ("which", "reason", "licence")
_WHOLE_COLUMNS = ("class", "name", "target")


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
        # a bar shows by itself that time passes
        ACTIVITY.follow(None if self._bar is not None else self._print_line)
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
            elif time.monotonic() - self._last_line >= EVERY_S:
                self._print_line()

    def say(self, line: str, style: str | None = None) -> None:
        """Print a line above the live line."""
        ACTIVITY.printed()
        self._console.print(line, style=style, markup=False, soft_wrap=True, highlight=False)

    def end(self) -> None:
        """Remove the live line."""
        if self._bar is not None:
            self._bar.stop()
        ACTIVITY.rest("finishing")

    def _print_line(self) -> None:
        self._last_line = time.monotonic()
        ACTIVITY.printed()
        self._console.print(f"{self._what} {self._done}/{self._total}  {self._text()}", markup=False)

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
        """``n`` more tiles are embedded; ``stats`` is an `extract.pipeline.jobs.StreamStats`."""
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

    def at(self, what: str) -> None:
        """What is done before the first slide."""
        ACTIVITY.at(what)

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
    """Print a table; every column but the first and those of reasons is right-aligned.

    No figure is cut: a table that a narrow terminal cannot hold is wider than it.
    """
    console.print(title, style="bold", markup=False, soft_wrap=True, highlight=False)
    table = Table(box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    needed = 2 + len(columns)
    for i, column in enumerate(columns):
        left = i == 0 or column in _TEXT_COLUMNS
        words = [part for row in rows for part in (row[i].split() if left else row[i].split("\n"))]
        longest = max(map(cell_len, words), default=0)
        whole = column in _WHOLE_COLUMNS
        if left:
            longest = min(longest, _LONGEST_NAME if whole else _LONGEST_WORD)
        needed += max(longest, cell_len(column))
        table.add_column(
            column,
            justify="left" if left else "right",
            overflow="fold",
            no_wrap=not left or whole,
            min_width=longest,
        )
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    table.width = needed if needed > console.width else None
    console.print(table, highlight=False, crop=False)


def print_metrics(console: Console, title: str, evaluation: dict[str, Any]) -> None:
    """Print the metrics of `mil.statistics.classification.evaluate` with their intervals, and the per-class table."""
    from mil.evaluation.headlines import HEADLINES, metric_name

    task, rows = "classification", []
    for key in HEADLINES[task]:
        point, interval = _parts(evaluation[key], ".3f")
        rows.append([metric_name(task, key), point, interval or "–"])
    print_table(console, title, ["metric", "value", "95 % interval"], rows)
    columns = ["class", "slides", "pat.", "TP", "FP", "FN", "TN", "recall", "AUROC"]
    rows = []
    for name, values in evaluation["classes"].items():
        counts = [_narrow_interval(values[key], ".0f") for key in ("tp", "fp", "fn", "tn")]
        rates = [_narrow_interval(values[key], ".2f") for key in ("recall", "auroc")]
        rows.append([name, str(values["support"]), str(values["n_patients"]), *counts, *rates])
    print_table(
        console, "One class against the others; below each figure its 95 % interval over patients", columns, rows
    )


def print_target_metrics(
    console: Console, title: str, task: str, evaluation: dict[str, Any], compared: str = "within their test fold"
) -> None:
    """Print the metrics of labels, numbers or survival with their intervals, and a table per label or number.

    Args:
        console: where to.
        title: above the table.
        task: one of `mil.cohort.targets.TASKS`, but for classification.
        evaluation: see `mil.evaluation.outcomes.Outcomes.evaluate`.
        compared: with whom the patients of survival are compared.
    """
    from mil.evaluation.headlines import HEADLINES

    rows = []
    for key, label in HEADLINES[task].items():
        point, interval = _parts(evaluation[key], ".3f")
        rows.append([label, point, interval or "–"])
    print_table(console, title, ["metric", "value", "95 % interval"], rows)
    targets = evaluation.get("targets", {})
    if len(targets) > 1 or task == "multilabel":
        counts = [key for key in ("known", "positive") if key in next(iter(targets.values()))]
        left_out = (*counts, "n_patients", "balanced_accuracy")
        metrics = [key for key in next(iter(targets.values())) if key not in left_out]
        rows = [
            [name, *(str(values[key]) for key in counts), *(_narrow_interval(values[key], ".2f") for key in metrics)]
            for name, values in targets.items()
        ]
        columns = ["target", *counts, *(key.replace("_", " ") for key in metrics)]
        print_table(console, "Each target; below each figure its 95 % interval over patients", columns, rows)
    elif task == "survival":
        say(
            console,
            f"{counted(evaluation['n_patients'], 'patient')}, {counted(evaluation['n_events'], 'event')}; patients are "
            f"compared {compared}",
        )


def interval_text(estimate: Estimate, form: str = ".3f", between: str = " ") -> str:
    """An estimate as every command writes it; a dash where there is none.

    Args:
        estimate: ``value``, ``low`` and ``high``.
        form: how each number is formatted.
        between: what stands between value and interval.

    >>> interval_text({"value": 0.5, "low": 0.4, "high": 0.6})
    '0.500 [0.400, 0.600]'
    """
    point, interval = _parts(estimate, form)
    return f"{point}{between}{interval}" if interval else point


def stacked_interval(estimate: Estimate, form: str = ".3f") -> str:
    """`interval_text` for a table's cell: the interval is on the line below the value."""
    return interval_text(estimate, form, between="\n")


def _narrow_interval(estimate: Estimate, form: str) -> str:
    """As `stacked_interval`, without brackets: six such columns fit beside a class name into 80 letters."""
    return stacked_interval(estimate, form).replace("[", "").replace("]", "").replace(", ", "–")


def _parts(estimate: Estimate, form: str) -> tuple[str, str]:
    """Value and interval as text; a dash for a value that there is not, nothing for such an interval."""
    value, low, high = (estimate[key] for key in ("value", "low", "high"))
    point = "–" if value is None else format(value, form)
    return point, "" if low is None or high is None else f"[{low:{form}}, {high:{form}}]"


def shortened(names: Sequence[str], most: int = 4) -> str:
    """The first ``most`` names, and how many more there are.

    >>> shortened(["a", "b", "c"], most=2)
    'a, b, and 1 more'
    """
    more = len(names) - most
    return ", ".join(names[:most]) + (f", and {more} more" if more > 0 else "")


def say_start(what: str) -> None:
    """Say what takes seconds before something is shown; every ten seconds again until then."""
    ACTIVITY.at(what)


def counted(n: int, what: str) -> str:
    """A number of things: ``1 slide``, ``2 slides``."""
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def say(console: Console, line: str, style: str | None = None) -> None:
    """Print a line as it is: no markup, no colours for numbers, no breaks."""
    ACTIVITY.printed()
    console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)


def duration_text(seconds: float) -> str:
    """Seconds, minutes, or hours and minutes."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
