"""The doctor: every check answers, finds what was broken on purpose, and leaves nothing behind."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from extract.backbones.gpu import GpuFacts
from extract.planning import doctor, machine
from extract.planning.doctor import guarded, run_doctor
from extract.planning.machine import Check

UNUSABLE = GpuFacts(("/dev/nvidia0",), "535.183.01", "2.15.0+cu132", "13.2", False)


@pytest.fixture(scope="module")
def checks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Check]:
    """All checks of this machine, for a store that is not there yet."""
    folder = tmp_path_factory.mktemp("doctor")
    seen: list[Check] = []
    found = run_doctor(folder / "not" / "yet.zarr", seen.append)
    assert found == seen
    assert list(folder.iterdir()) == []
    return {check.name: check for check in found}


def test_a_machine_that_runs_these_tests_has_no_error(checks: dict[str, Check]):
    assert [check for check in checks.values() if check.status == "error" and check.name != "gpu"] == []


def test_every_part_is_checked_once_under_its_name(checks: dict[str, Check], tmp_path: Path):
    names = [name for name, _ in doctor.checkers(tmp_path)]
    assert len(set(names)) == len(names)
    assert list(checks) == names


def test_tiles_are_decoded_directly_and_the_backbone_is_the_recorded_one(checks: dict[str, Check]):
    assert "directly" in checks["reading"].detail
    assert "features as recorded" in checks["backbone"].detail
    assert "survives a kill" in checks["isolation"].detail


def test_a_check_that_raises_is_an_error_of_that_part():
    def broken() -> Check:
        raise ImportError("libjpeg.so: cannot open\nmore")

    found = guarded("imagecodecs", broken)
    assert found.status == "error"
    assert "libjpeg.so: cannot open" in found.detail
    assert found.fix == "pip install --force-reinstall imagecodecs"


def test_an_absent_library_is_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(doctor.LIBRARIES, "timm", "no_such_module")
    assert guarded("timm", lambda: doctor.check_library("timm")).status == "error"


@pytest.mark.parametrize(
    ("facts", "status"),
    [
        (UNUSABLE, "error"),
        (replace(UNUSABLE, visible=""), "warning"),
        (replace(UNUSABLE, devices=()), "warning"),
        (replace(UNUSABLE, devices=(), driver=None), "ok"),
        (replace(UNUSABLE, usable=True), "ok"),
    ],
)
def test_a_gpu_that_cannot_be_used_is_an_error(facts: GpuFacts, status: str):
    gpu = {"name": "NVIDIA H100", "memory_bytes": 85e9, "capability": "9.0", "bf16": True}
    found = doctor.check_gpu(lambda: facts, lambda: [gpu])
    assert found.status == status
    assert bool(found.fix) == (status != "ok")
    if facts.usable:
        assert "NVIDIA H100 (85 GB, bf16)" in found.detail


def test_a_direct_reader_with_other_pixels_is_an_error(monkeypatch: pytest.MonkeyPatch):
    real = doctor.Slide.read_region

    def off_by_one(self: doctor.Slide, *args: object) -> np.ndarray:
        pixels = real(self, *args)  # type: ignore[arg-type]
        return pixels + np.uint8(1) if self.reader == "direct" else pixels

    monkeypatch.setattr(doctor.Slide, "read_region", off_by_one)
    assert doctor.check_reading().status == "error"


def test_other_features_than_recorded_are_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "_MEASURE_S", 0.0)
    monkeypatch.setattr(doctor, "REFERENCE", tuple(value * 1.2 for value in doctor.REFERENCE))
    assert "other features" in doctor.check_backbone("cpu").detail
    monkeypatch.setattr(doctor, "WEIGHTS_SHA256", "0" * 64)
    assert "SHA-256" in doctor.check_backbone("cpu").detail


def test_a_token_is_never_shown(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecretsecret")
    found = doctor.check_hub()
    assert "a token is set" in found.detail
    assert "secret" not in found.detail + found.fix


def test_an_absent_extra_is_no_warning_but_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(doctor.EXTRAS, "report", ("no_such_module",))
    found = doctor.check_extra("report")
    assert (found.status, found.fix) == ("ok", 'pip install "tessera-mil[report]"')


@pytest.mark.parametrize(
    ("kind", "status"), [("ext4", "ok"), ("nfs4", "warning"), ("cifs", "warning"), ("tmpfs", "warning")]
)
def test_the_file_system_is_that_of_the_deepest_mount(tmp_path: Path, kind: str, status: str):
    (tmp_path / "my slides" / "deep").mkdir(parents=True)
    mounts = tmp_path / "mounts"
    point = str(tmp_path.resolve() / "my slides").replace(" ", "\\040")
    mounts.write_text(f"/dev/sda1 / xfs rw 0 0\nserver:/x {point} {kind} rw 0 0\n/dev/sdb1 {point}other btrfs rw 0 0\n")
    found = doctor.check_file_system(tmp_path / "my slides" / "deep", mounts)
    assert found.status == status
    assert f"on {kind}" in found.detail
    assert machine.file_system_of(tmp_path, mounts) == "xfs"
    assert list((tmp_path / "my slides" / "deep").iterdir()) == []


def test_a_disk_where_folders_cannot_be_renamed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(source: object, target: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "rename", refuse)
    found = doctor.check_file_system(tmp_path)
    assert found.status == "error"
    assert "renamed" in found.detail
    assert list(tmp_path.iterdir()) == []


def test_a_full_or_slow_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "_LOW_DISK_BYTES", 0)
    monkeypatch.setattr(machine, "_time_file", lambda file, n_bytes: (12.0, 900.0))
    assert doctor.check_disk(tmp_path, 1 << 20).status == "warning"
    monkeypatch.setattr(machine, "_time_file", lambda file, n_bytes: (120.0, 900.0))
    assert doctor.check_disk(tmp_path, 1 << 20).status == "ok"
    assert doctor.check_disk(tmp_path, 1 << 60).status == "error"


def test_limits_of_containers_are_read(tmp_path: Path):
    assert machine.cpu_quota(tmp_path) is None
    assert machine.memory_limit(tmp_path) is None
    (tmp_path / "cpu.max").write_text("250000 100000\n")
    (tmp_path / "memory.max").write_text("2147483648\n")
    assert machine.cpu_quota(tmp_path) == 2.5
    assert machine.memory_limit(tmp_path) == 2 << 30
    (tmp_path / "cpu.max").write_text("max 100000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.cpu_quota(tmp_path) is None
    assert machine.memory_limit(tmp_path) is None


def test_too_few_open_files_are_told_with_the_command(monkeypatch: pytest.MonkeyPatch):
    import resource

    monkeypatch.setattr(resource, "getrlimit", lambda kind: (256, 4096))
    found = doctor.check_open_files()
    assert (found.status, found.fix) == ("warning", "ulimit -n 4096")
