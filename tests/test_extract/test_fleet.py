"""The fleet: one process a device, slides from one queue, one exit code."""

import sys
from pathlib import Path

import pytest

from extract.errors import BackboneError
from extract.fleet import devices_of, run_fleet, with_device
from extract.store import open_store
from tests.test_extract.small import write_slide


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


def test_two_processes_embed_each_slide_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    for number in range(6):
        write_slide(tmp_path / "slides" / f"{number}.tif", 300, 260, seed=number)
    (tmp_path / "slides" / "broken.svs").write_text("no slide")
    arguments = ["extract", str(tmp_path / "slides"), "--store", str(tmp_path / "s.zarr"), "--tile-px", "64"]
    code = run_fleet(["cpu", "cpu"], [*arguments, "--device", "all"])
    sys.stdout.flush()
    printed = capfd.readouterr().out
    assert code == 1
    assert len(open_store(tmp_path / "s.zarr").slide_ids("efficientnet_lite0")) == 6
    lines = [line for line in printed.splitlines() if " slides: " in line]
    assert len(lines) == 2
    assert all(line.startswith("[cpu] 7 slides: ") and "1 failed" in line for line in lines)
    assert sum(int(line.split(" embedded")[0].split()[-1]) for line in lines) == 6
