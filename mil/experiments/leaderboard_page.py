"""The leaderboard as one HTML page: sortable, self-contained, printable."""

from pathlib import Path

from mil.evaluation.headlines import HEADLINES, metric_name
from mil.evaluation.paired import Interval
from mil.experiments.leaderboard import Board, BoardRow
from mil.files import write_atomically
from mil.visualization.html_page import load_template


def write_page(path: Path, board: Board) -> None:
    """Write ``leaderboard.html``.

    Raises:
        MissingExtraError: jinja2 is not installed.
    """
    template = load_template("leaderboard.html", "the page of a leaderboard", key=_key, size=_size)
    scores = [each for row in board.rows for each in (row.headline.low, row.headline.high) if each is not None]
    low, high = (min(scores), max(scores)) if scores else (0.0, 1.0)
    several = len({row.entry for row in board.rows}) > 1
    page = template.render(
        board=board,
        names=HEADLINES[board.task],
        score=metric_name(board.task, board.metrics[0]),
        several=several,
        bar=lambda interval: _bar(interval, low, high),
        baseline=_baseline,
    )
    # an id that is not UTF-8 reaches us with lone surrogates, which no HTML file can hold
    write_atomically(path, page.encode("utf-8", "backslashreplace"))


def _key(value: float | None) -> float:
    """What a column is sorted by; the absent come last."""
    return -1e9 if value is None else value


def _size(number: float | None) -> str:
    """A number in at most four digits.

    >>> _size(657_284), _size(0.0123), _size(None)
    ('657 k', '0.0123', '–')
    """
    if number is None:
        return "–"
    for factor, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.3g} {letter}"
    return f"{number:.3g}"


def _bar(interval: Interval, low: float, high: float) -> dict[str, float] | None:
    """Where an interval lies between the lowest and the highest of the board, in per cent."""
    if interval.value is None or interval.low is None or interval.high is None or high <= low:
        return None
    left, right, at = (100 * (each - low) / (high - low) for each in (interval.low, interval.high, interval.value))
    return {"left": left, "width": right - left, "at": at}


def _baseline(row: BoardRow) -> bool:
    return row.kind == "baseline"
