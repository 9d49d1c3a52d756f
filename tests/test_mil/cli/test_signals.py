"""A command that is told to end, or whose terminal is closed, clears away what it has begun."""

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

_COMMAND = """
import sys, time
from pathlib import Path
from extract.signals import exit_when_stopped
from mil.files import new_folder
exit_when_stopped()
with new_folder(Path(sys.argv[1])) as partial:
    (partial / "begun").write_text("x")
    print("begun", flush=True)
    while True:
        time.sleep(0.01)
        print("at work", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_as_an_error_would(tmp_path: Path, number: signal.Signals):
    command = [sys.executable, "-c", _COMMAND, str(tmp_path / "run")]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"begun\n"
        assert len(list(tmp_path.iterdir())) == 1
        child.send_signal(number)
        child.communicate()
    assert child.returncode == 128 + number
    assert list(tmp_path.iterdir()) == []


def test_a_terminal_that_closes_ends_it_so_too(tmp_path: Path):
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", _COMMAND, str(tmp_path / "run")]
    child = subprocess.Popen(
        command, cwd=REPOSITORY, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    )
    os.close(theirs)
    deadline = time.monotonic() + 60
    while not list(tmp_path.iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.read(ours, 5)
    os.close(ours)
    # the terminal is no controlling one of a new session: its shell would hand the signal on
    child.send_signal(signal.SIGHUP)
    child.wait(timeout=60)
    assert list(tmp_path.iterdir()) == []


def test_under_nohup_a_terminal_may_close(tmp_path: Path):
    ignore = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    command = [sys.executable, "-c", ignore + _COMMAND, str(tmp_path / "run")]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        child.send_signal(signal.SIGHUP)
        for _ in range(3):
            assert child.stdout.readline() == b"at work\n"
        child.terminate()
        child.communicate()
    assert child.returncode == 143
