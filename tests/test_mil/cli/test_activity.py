"""A command says what it is at within its first moment, and again until something else is printed."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from mil.cli import activity
from mil.cli.activity import FIRST, Activity
from mil.cli.console import LiveCount, say
from mil.cli.main import app
from tests.conftest import REPOSITORY


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> Activity:
    monkeypatch.setattr(activity, "EVERY_S", 0.2)
    monkeypatch.setattr(activity, "_LOOK_S", 0.02)
    made = Activity()
    monkeypatch.setattr("mil.cli.console.ACTIVITY", made)
    return made


def test_it_is_said_again_until_something_is_printed(fast: Activity, capsys: pytest.CaptureFixture[str]):
    fast.begin(["train", "--store", "x"])
    time.sleep(0.7)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"{FIRST['train']} ..."
    assert 2 <= len(lines[1:]) <= 4
    assert all(line.startswith(f"{FIRST['train']} ... ") and line.endswith(" s") for line in lines[1:])
    for _ in range(20):
        say(Console(), "something else")
        time.sleep(0.02)
    assert capsys.readouterr().err == ""
    fast.end()
    time.sleep(0.4)
    assert capsys.readouterr().err == ""


def test_a_count_that_nothing_is_added_to_is_shown_again(fast: Activity, capsys: pytest.CaptureFixture[str]):
    fast.begin(["train"])
    capsys.readouterr()
    count = LiveCount(Console(), "replicas")
    count.begin(15)
    count.add(done=1, note="fold0")
    time.sleep(0.7)
    count.end()
    printed = capsys.readouterr()
    assert printed.out.splitlines()[0].startswith("replicas 1/15")
    assert 2 <= len(printed.out.splitlines()) <= 4
    assert printed.err == ""
    time.sleep(0.4)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("finishing ... ")
    fast.end()


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["config", "show"], [], ["nonsense"]])
def test_what_is_done_in_a_moment_is_not_announced(
    fast: Activity, capsys: pytest.CaptureFixture[str], arguments: list[str]
):
    fast.begin(arguments)
    fast.end()
    assert capsys.readouterr().err == ""


def test_every_name_is_that_of_a_command():
    commands = {info.name or info.callback.__name__ for info in app.registered_commands if info.callback}
    for group in app.registered_groups:
        inner = group.typer_instance
        assert inner is not None
        commands |= {
            f"{group.name} {each.name or each.callback.__name__}" for each in inner.registered_commands if each.callback
        }
    assert set(FIRST) <= commands


def test_the_first_line_comes_before_anything_is_loaded(tmp_path: Path):
    """No module but the standard library's and those of the start is there when it is printed."""
    code = (
        "import sys\n"
        "from mil.cli import activity\n"
        "seen = []\n"
        "activity.Activity._print = lambda self, line: seen.append(sorted(sys.modules))\n"
        "from mil.cli.start import main\n"
        "sys.argv = ['mil', 'plan', 'x', '--store', 's']\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print([name for name in seen[0] if name.split('.')[0] in ('numpy', 'torch', 'typer', 'rich', 'PIL')])\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_the_version_is_told():
    done = subprocess.run(
        [sys.executable, "-m", "mil", "--version"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("mil 0.")
