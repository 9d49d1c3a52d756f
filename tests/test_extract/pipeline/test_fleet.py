"""The fleet: one process a device, slides from one queue, one exit code."""

import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from extract.errors import BackboneError
from extract.pipeline.fleet import devices_of, run_fleet, with_device
from extract.store import open_store
from tests.test_extract.small import write_slide

MIL = (sys.executable, "-P", "-m", "mil")


@pytest.mark.parametrize(
    ("text", "devices"), [("cuda:0,cuda:1", ["cuda:0", "cuda:1"]), ("auto", ["auto"]), ("cpu", ["cpu"])]
)
def test_devices_are_named(text: str, devices: list[str]):
    assert devices_of(text) == devices


@pytest.mark.parametrize("text", ["cuda:0,cuda:0", "cuda:0,", ""])
def test_a_device_named_twice_or_not_at_all_is_refused(text: str):
    with pytest.raises(BackboneError, match="each device once"):
        devices_of(text)


def test_all_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(BackboneError, match="mil doctor"):
        devices_of("all")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    assert devices_of("all") == ["cuda:0", "cuda:1", "cuda:2"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["extract", "s", "--device", "all", "--store", "x"],
        ["extract", "s", "--device=all", "--store", "x"],
        ["extract", "s", "--store", "x"],
    ],
)
def test_each_process_gets_its_own_device(arguments: list[str]):
    assert with_device(arguments, "cuda:1") == ["extract", "s", "--store", "x", "--device", "cuda:1"]


def test_slides_behind_two_dashes_stay_there():
    arguments = ["extract", "--store", "x", "--device", "all", "--", "-a.svs", "--device"]
    expected = ["extract", "--store", "x", "--device", "cpu", "--", "-a.svs", "--device"]
    assert with_device(arguments, "cpu") == expected


def test_no_process_outlives_one_that_could_not_be_started(monkeypatch: pytest.MonkeyPatch):
    started: list[subprocess.Popen[str]] = []
    popen = subprocess.Popen

    def second_fails(command: list[str], **keywords: Any) -> "subprocess.Popen[str]":
        if started:
            raise OSError("no more processes")
        started.append(popen([sys.executable, "-c", "import time; time.sleep(60)"], **keywords))
        return started[0]

    monkeypatch.setattr(subprocess, "Popen", second_fails)
    with pytest.raises(OSError, match="no more processes"):
        run_fleet(["cpu", "cpu"], MIL, ["extract", "slides"])
    assert started[0].returncode == -signal.SIGTERM


@pytest.mark.parametrize(("codes", "code"), [((0, 3), 0), ((3, 3), 3), ((1, 3), 1), ((-9, 0), 9)])
def test_what_one_leaves_to_another_is_the_others_to_account_for(
    monkeypatch: pytest.MonkeyPatch, codes: tuple[int, ...], code: int
):
    processes = iter([SimpleNamespace(stdout=None, wait=lambda end=end: end) for end in codes])
    monkeypatch.setattr("extract.pipeline.fleet._start", lambda command: next(processes))
    assert run_fleet(["cpu", "cuda:0"], MIL, ["extract"]) == code


def test_two_processes_embed_each_slide_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    for number in range(6):
        write_slide(tmp_path / "slides" / f"{number}.tif", 300, 260, seed=number)
    (tmp_path / "slides" / "broken.svs").write_text("no slide")
    arguments = ["extract", str(tmp_path / "slides"), "--store", str(tmp_path / "s.zarr"), "--tile-px", "64"]
    code = run_fleet(["cpu", "cpu"], MIL, [*arguments, "--device", "all"])
    sys.stdout.flush()
    printed = capfd.readouterr().out
    assert code == 1
    assert len(open_store(tmp_path / "s.zarr").slide_ids("efficientnet_lite0")) == 6
    lines = [line for line in printed.splitlines() if " slides: " in line]
    assert len(lines) == 2
    assert all(line.startswith("[cpu] 7 slides: ") and "1 failed" in line for line in lines)
    assert sum(int(line.split(" embedded")[0].split()[-1]) for line in lines) == 6
