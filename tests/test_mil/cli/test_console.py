"""What commands show: rates on a terminal, plain lines elsewhere, and names that cannot break the layout."""

import io

import pytest
from rich.console import Console

from mil.cli import console as shown
from mil.cli.activity import ACTIVITY
from mil.cli.console import (
    ExtractionProgress,
    LiveCount,
    interval_text,
    plain_reason,
    print_metrics,
    print_table,
    say_start,
    shortened,
    stacked_interval,
)


def plain() -> Console:
    return Console(file=io.StringIO(), width=100)


def text(console: Console) -> str:
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_narrow_terminal_cuts_no_figure_and_breaks_no_word() -> None:
    console = Console(file=io.StringIO(), width=40)
    cell = "-1.83\n[-2.43, -1.22]"
    print_table(console, "five", ["head", *"abcd"], [["mean instance, ridge regression", *[cell] * 4]])
    print_table(console, "five", ["name", *"abcd"], [["max--efficientnet_lite0", *[cell] * 4]])
    assert text(console).count("[-2.43, -1.22]") == 8
    for word in ("instance", "regression", "max--efficientnet_lite0"):
        assert word in text(console)


def test_elsewhere_than_on_a_terminal_a_line_comes_every_few_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(shown.time, "monotonic", lambda: now[0])
    console = plain()
    count = LiveCount(console, "slides")
    count.begin(9)
    for _ in range(25):
        now[0] += 1
        count.add(units=10, note="waiting for reading")
    count.end()
    lines = text(console).splitlines()
    assert len(lines) == 2
    assert lines[0] == "slides 0/9  10.0 tiles/s  waiting for reading"


def test_a_terminal_shows_one_live_line() -> None:
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    count = LiveCount(console, "slides")
    count.begin(3)
    count.add(done=1, note="[red]a note[/red]")
    count.end()
    assert "slides" in text(console)
    assert "1/3" in text(console)


def test_failures_are_said_as_they_come() -> None:
    from extract.pipeline.report import SlideOutcome

    console = plain()
    progress = ExtractionProgress(console)
    progress.start(3)
    progress.slide_done(SlideOutcome("a [b]", "a.tif", "failed", "got nothing → expected tissue"))
    progress.slide_done(SlideOutcome("c", "c.tif", "embedded", n_tiles=9, n_invalid=2))
    progress.slide_done(SlideOutcome("d", "d.tif", "embedded", n_tiles=9))
    progress.end()
    lines = text(console).splitlines()
    assert lines == ["failed: a [b]: got nothing", "c: 2 of 9 tiles cannot be decoded"]


@pytest.mark.parametrize(
    ("reason", "plain"),
    [
        ("slide 'a b': got 16 px → use less", "got 16 px → use less"),
        ("got no scale in slide 'a b' → give it", "got no scale → give it"),
        ("got slide 'a b' with no readable tile", "got a slide with no readable tile"),
        ("got slide 'a' → not this one", "got slide 'a' → not this one"),
        ("got a file for slide 'a b' (3 bytes) unlike that of slide 'a b'", "got a file (3 bytes) unlike that"),
    ],
)
def test_a_reason_beside_its_slide_does_not_name_it_again(reason: str, plain: str):
    assert plain_reason("a b", reason) == plain


def test_names_are_not_read_as_markup() -> None:
    console = plain()
    print_table(console, "[bold]title", ["slide", "reason"], [["[red]a[/red]", "x [/] y"]])
    assert "[bold]title" in text(console)
    assert "[red]a[/red]" in text(console)
    assert "x [/] y" in text(console)


def test_metrics_show_a_dash_where_nothing_can_be_claimed() -> None:
    known, unknown = {"value": 0.5, "low": 0.25, "high": 0.75}, {"value": None, "low": None, "high": None}
    no_interval = {"value": 3.0, "low": None, "high": None}
    rates = dict.fromkeys(("recall", "auroc"), known)
    counts = dict.fromkeys(("tp", "fp", "fn", "tn"), no_interval)
    evaluation = {
        "macro_f1": known,
        "balanced_accuracy": no_interval,
        "auroc": unknown,
        "accuracy": known,
        "classes": {"HER2(+)": {"support": 4, "n_patients": 1, **rates, **counts}},
    }
    console = plain()
    print_metrics(console, "title", evaluation)
    rows = {line.split("  ")[0].strip(): line.split() for line in text(console).splitlines() if line.strip()}
    assert rows["macro-F1"][1:] == ["0.500", "[0.250,", "0.750]"]
    assert rows["AUROC"][1:] == ["–", "–"]
    assert rows["HER2(+)"][1:] == ["4", "1", "3", "3", "3", "3", "0.50", "0.50"]


def test_an_estimate_has_one_notation() -> None:
    known, unknown = {"value": 0.5, "low": -0.25, "high": 0.75}, {"value": None, "low": None, "high": None}
    assert interval_text(known) == "0.500 [-0.250, 0.750]"
    assert interval_text(known, "+.2f") == "+0.50 [-0.25, +0.75]"
    assert stacked_interval(known) == "0.500\n[-0.250, 0.750]"
    assert interval_text(unknown) == stacked_interval(unknown) == "–"
    assert stacked_interval({"value": 3.0, "low": None, "high": None}, ".0f") == "3"


def test_long_lists_of_names_are_cut() -> None:
    assert shortened(["a", "b", "c", "d"]) == "a, b, c, d"
    assert shortened(list("abcdef")) == "a, b, c, d, and 2 more"
    assert shortened([]) == ""


def test_what_is_begun_is_said_at_once_and_once(capsys: pytest.CaptureFixture[str]) -> None:
    for what in ("loading", "loading", "reading"):
        say_start(what)
    ACTIVITY.end()
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "loading ...\nreading ...\n")
