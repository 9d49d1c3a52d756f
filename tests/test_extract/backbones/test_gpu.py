"""What is said of GPUs, by faked facts: loud where torch cannot use one, silent where all is well."""

import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from extract.backbones.gpu import (
    MINIMUM_DRIVER,
    WHEELS,
    GpuFacts,
    check_device,
    find_devices,
    find_driver,
    gpu_warnings,
    install_line,
    runs_on,
)

GOOD = GpuFacts(("/dev/nvidia0",), "580.65.06", "2.15.0+cu132", "13.2", True)
BARE = GpuFacts((), None, "2.15.0+cu132", "13.2", False)


def the_warning(facts: GpuFacts) -> str:
    warnings = gpu_warnings(facts)
    assert len(warnings) == 1
    assert warnings[0].count(" → ") == 2
    return warnings[0]


@pytest.mark.parametrize("facts", [GOOD, BARE, replace(BARE, torch_cuda=None)])
def test_nothing_is_said_where_nothing_is_wrong(facts: GpuFacts):
    assert gpu_warnings(facts) == []


@pytest.mark.parametrize(("driver", "index"), [("535.183.01", "cu126"), ("570.86.10", "cu126"), ("525.60.13", "cu126")])
def test_an_old_driver_is_told_with_a_torch_that_fits_it(driver: str, index: str):
    text = the_warning(replace(GOOD, driver=driver, usable=False))
    assert driver in text
    assert "CUDA 13.2" in text
    assert "update the driver to 580 or newer" in text
    assert f'pip install "torch>=2.10" torchvision --index-url https://download.pytorch.org/whl/{index}' in text


def test_a_driver_too_old_for_every_torch_must_be_updated():
    text = the_warning(replace(GOOD, driver="470.82.01", usable=False))
    assert "update the driver to 580" in text
    assert "pip install" not in text


@pytest.mark.parametrize(("driver", "index"), [("580.65.06", "cu130"), ("535.183.01", "cu126"), (None, "cu130")])
def test_a_torch_without_cuda_beside_a_gpu_is_told_with_the_build_for_its_driver(driver: str | None, index: str):
    text = the_warning(replace(GOOD, driver=driver, torch_version="2.15.0+cpu", torch_cuda=None, usable=False))
    assert "built without CUDA" in text
    assert text.endswith(f"whl/{index}")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"driver": None}, "no NVIDIA driver answers"),
        ({"driver": "590.10.01"}, "reboot"),
        ({"driver": "580.65.06"}, "reboot"),
        ({"visible": ""}, "unset CUDA_VISIBLE_DEVICES"),
        ({"visible": "-1"}, "unset CUDA_VISIBLE_DEVICES"),
        ({"devices": ()}, "--gpus all"),
    ],
)
def test_other_reasons_are_told_apart(changes: dict[str, object], said: str):
    assert said in the_warning(replace(GOOD, usable=False, **changes))  # type: ignore[arg-type]


def test_a_gpu_without_kernels_is_told():
    assert "NVIDIA X (sm_61)" in the_warning(replace(GOOD, unsupported=("NVIDIA X (sm_61)",)))


def test_every_build_that_is_recommended_has_a_known_driver():
    assert set(WHEELS) <= set(MINIMUM_DRIVER)
    for cuda, index in WHEELS.items():
        assert re.fullmatch(rf"cu{cuda}\d", index)
        assert index in install_line(MINIMUM_DRIVER[cuda])
        assert index not in install_line(MINIMUM_DRIVER[cuda] - 1)


@pytest.mark.parametrize(
    ("built", "capability", "runs"),
    [
        (["sm_80", "sm_90"], (8, 0), True),
        (["sm_80"], (8, 6), True),
        (["sm_86"], (8, 0), False),
        (["sm_80"], (9, 0), False),
        (["compute_80"], (9, 0), True),
        (["compute_90"], (8, 0), False),
        (["sm_90a"], (9, 0), True),
        (["sm_120"], (12, 0), True),
        (["sm_100f"], (12, 0), False),
        (["sm_75", "sm_120"], (6, 1), False),
        ([], (6, 1), True),
    ],
)
def test_which_kernels_run_where(built: list[str], capability: tuple[int, int], runs: bool):
    assert runs_on(built, capability) is runs


@pytest.mark.parametrize(
    "text",
    [
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024\nGCC version:  12\n",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  535.183.01  Release Build  (x@y)  Thu 2024\n",
    ],
)
def test_the_driver_is_read_from_the_kernel_module(tmp_path: Path, text: str):
    (tmp_path / "version").write_text(text)
    assert find_driver(tmp_path / "version") == "535.183.01"


@pytest.mark.parametrize(("script", "driver"), [("echo 550.54.14", "550.54.14"), ("exit 9", None), ("echo no", None)])
def test_the_driver_is_else_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, driver: str | None):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_driver(tmp_path / "absent") == driver


def test_device_files_of_gpus_are_told_from_others(tmp_path: Path):
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / name).touch()
    assert [Path(each).name for each in find_devices(tmp_path)] == ["nvidia0", "nvidia1"]


def test_whoever_asks_for_the_cpu_is_told_nothing():
    bad = replace(GOOD, usable=False, driver="470.82.01")
    assert check_device("cpu", lambda: bad) == []
    assert len(check_device("auto", lambda: bad)) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_look_costs_nothing():
    if find_devices():
        pytest.skip("there is a GPU that torch cannot use")
    check_device()
    started = time.perf_counter()
    assert check_device() == [] or find_driver() is not None
    assert time.perf_counter() - started < 0.05
