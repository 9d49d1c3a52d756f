"""Trackers, with the real packages, offline."""

import json
import socket
import sys
import time
from pathlib import Path
from typing import Any, Literal

import pytest

from mil.config.compose import compose_config
from mil.config.train import TrainConfig
from mil.errors import ConfigError, MissingExtraError
from mil.experiments.tracking import (
    TRACKERS,
    Tracking,
    WandbTracker,
    tracker_places,
    what_leaves,
    without_paths,
)
from mil.training.replica import EpochRecord

RECORDS = [EpochRecord(epoch, 0.01 / epoch, 1.0 / epoch, 1.1 / epoch, 0.5, 0.1) for epoch in (1, 2, 3)]
CONFIG = {
    "head": {"name": "abmil", "dropout": 0.5},
    "folds": 3,
    "target": "subtype",
    "store": "/hospital-disk/cohort.zarr",
    "labels": "/hospital-disk/labels.csv",
    "init": None,
}
METRICS = {
    "task": "classification",
    "out_of_fold": {
        name: {"value": value}
        for name, value in (("macro_f1", 0.7), ("balanced_accuracy", 0.6), ("auroc", None), ("accuracy", 0.8))
    },
}


def _run_folder(folder: Path) -> Path:
    folder.mkdir()
    (folder / "metrics.json").write_text(json.dumps(METRICS))
    (folder / "oof.csv").write_text("slide_id,patient_id\nS-DOE,PATIENT-DOE\n")
    (folder / "report.html").write_text("<p>report")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "fold0-seed0.safetensors").write_bytes(b"weights")
    return folder


def _track(names: list[str], tmp_path: Path, files: Literal["none", "all"] = "none") -> None:
    tracking = Tracking(names, "abmil on subtype", CONFIG, tmp_path / "track", files)
    for record in RECORDS:
        tracking.log_epoch("fold0-seed0", record)
    sys.stdout.write("PRINTED-DOE\n")
    tracking.log_metrics(METRICS)
    tracking.log_files(_run_folder(tmp_path / "run"))
    tracking.close()
    tracking.close()


def test_tensorboard_holds_curves_figures_and_settings(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _track(["tensorboard"], tmp_path)
    (folder,) = (tmp_path / "track").iterdir()
    (line,) = tracker_places(["tensorboard"], tmp_path / "track" / "abmil on subtype")
    assert line.startswith(f"tensorboard: event files in {folder}; ")
    assert tracker_places(["tensorboard"], tmp_path / "track" / "another") == []
    events = EventAccumulator(str(folder))
    events.Reload()
    losses = [event.value for event in events.Scalars("fold0-seed0/train_loss")]
    assert losses == pytest.approx([record.train_loss for record in RECORDS])
    assert [event.step for event in events.Scalars("fold0-seed0/lr")] == [1, 2, 3]
    assert events.Scalars("out_of_fold/macro_f1")[0].value == pytest.approx(0.7)
    assert "out_of_fold/auroc" not in events.Tags()["scalars"]


@pytest.mark.parametrize("files", ["none", "all"])
def test_mlflow_holds_parameters_and_curves_and_what_else_may_leave(
    files: Literal["none", "all"], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    _track(["mlflow"], tmp_path, files)
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("tessera")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["head.dropout"] == "0.5"
    assert run.data.metrics["out_of_fold/macro_f1"] == 0.7
    history = client.get_metric_history(run.info.run_id, "fold0-seed0/validation_loss")
    assert [point.value for point in history] == [record.validation_loss for record in RECORDS]
    sent = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert sent == ({"metrics.json", "oof.csv", "report.html"} if files == "all" else set())
    assert ("store" in run.data.params) == (files == "all")
    assert "init" not in run.data.params or files == "all"
    (line,) = tracker_places(["mlflow"], tmp_path / "run")
    assert line == f"mlflow: run run of experiment tessera in {(tmp_path / 'mlruns').as_uri()}"


@pytest.mark.parametrize("files", ["none", "all"])
def test_wandb_works_offline(files: Literal["none", "all"], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    for name, value in (("WANDB_MODE", "offline"), ("WANDB_SILENT", "true"), ("WANDB_DATA_DIR", str(tmp_path / "d"))):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "c"))
    _track(["wandb"], tmp_path, files)
    (run,) = (tmp_path / "track" / "wandb").glob("offline-run-*")
    (line,) = tracker_places(["wandb"], tmp_path / "track" / "run")
    assert line == f"wandb: offline run in {run}; wandb sync {run} sends it"
    (log,) = run.glob("*.wandb")
    # a process of its own writes it, and may lag behind on a busy machine
    deadline, wanted = time.monotonic() + 60, (b"fold0-seed0/train_loss", b"out_of_fold/macro_f1", b"dropout")
    while time.monotonic() < deadline and not all(text in log.read_bytes() for text in wanted):
        time.sleep(0.2)
    for text in wanted:
        assert text in log.read_bytes()
    written = b"".join(path.read_bytes() for path in run.rglob("*") if path.is_file())
    assert (b"oof.csv" in written) == (files == "all")
    assert (b"/hospital-disk" in written) == (files == "all")
    host = socket.gethostname().encode()
    # two or three letters are found in any compressed file
    hosts = (host,) if len(host) > 5 else ()
    for private in (*hosts, sys.argv[0].encode(), b"PRINTED-DOE"):
        assert private not in log.read_bytes()
    assert not (run / "files" / "output.log").exists()
    assert not (run / "files" / "wandb-metadata.json").exists()


def test_a_line_says_what_leaves_and_where_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    line = what_leaves(["wandb", "tensorboard"], "none")
    assert "wandb (online), tensorboard (files beside the run)" in line
    assert "without paths" in line
    assert "track.files=all" in line
    assert "patient ids" in what_leaves(["wandb"], "all")


def test_every_setting_that_names_a_file_stays(tmp_path: Path) -> None:
    config = TrainConfig(store=tmp_path / "a", labels=tmp_path / "b", init=tmp_path / "c", track=("wandb",))
    assert str(tmp_path) not in json.dumps(without_paths(config.to_dict()))
    assert str(tmp_path) in json.dumps(config.to_dict())


@pytest.mark.parametrize("text", ["track.files=all", "track_files=all"])
def test_files_are_sent_where_it_is_said_so(text: str) -> None:
    assert compose_config([text, "track=[wandb]"]).track_files == "all"
    assert compose_config(["track=[wandb]"]).track_files == "none"


def test_no_tracker_is_no_work(tmp_path: Path) -> None:
    _track([], tmp_path)
    assert not (tmp_path / "track").exists()


def test_unknown_trackers_are_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"wandd.*did you mean 'wandb'"):
        Tracking(["wandd"], "run", {}, tmp_path)


@pytest.mark.parametrize("name", TRACKERS)
def test_an_absent_package_is_one_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=rf'pip install "tessera-mil\[{name}\]"'):
        Tracking([name], "run", {}, tmp_path)


def test_a_tracker_that_fails_ends_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    class Fragile:
        def __init__(self, *_: Any) -> None:
            told.append("start")

        def log_epoch(self, *_: Any) -> None:
            told.append("epoch")
            raise ConnectionError("server away")

        def close(self, failed: bool = False) -> None:
            told.append("close")

    monkeypatch.setattr("mil.experiments.tracking._KINDS", {"wandb": Fragile})
    with pytest.warns(UserWarning, match="Fragile failed and is told no more: server away"):
        _track(["wandb"], tmp_path)
    assert told == ["start", "epoch", "close"]


@pytest.mark.parametrize(
    ("name", "remedy"), [("wandb", "WANDB_MODE=offline"), ("mlflow", "MLFLOW_TRACKING_URI"), ("tensorboard", "folder")]
)
def test_a_tracker_that_cannot_start_is_one_line(
    name: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[bool] = []

    class Started:
        def __init__(self, *_: Any) -> None:
            pass

        def close(self, failed: bool = False) -> None:
            told.append(failed)

    def refuse(*_: Any) -> None:
        raise RuntimeError("api_key not configured\n\nTraceback of somebody else")

    monkeypatch.setattr("mil.experiments.tracking._KINDS", dict.fromkeys(TRACKERS, Started) | {name: refuse})
    others = [each for each in TRACKERS if each != name]
    with pytest.raises(ConfigError, match="RuntimeError: api_key not configured") as caught:
        Tracking([*others, name], "run", {}, tmp_path)
    assert remedy in str(caught.value)
    assert "\n" not in str(caught.value)
    # those that had started know of it
    assert told == [True, True]


def test_a_training_that_ends_badly_is_no_finished_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    tracking = Tracking(["mlflow"], "abmil", CONFIG, tmp_path / "track")
    tracking.close(failed=True)
    tracking.close()
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("tessera").experiment_id])
    assert run.info.status == "FAILED"


@pytest.mark.parametrize(("failed", "code"), [(True, 1), (False, 0)])
def test_wandb_gets_an_exit_code(failed: bool, code: int) -> None:
    codes: list[int] = []

    class Run:
        def finish(self, exit_code: int) -> None:
            codes.append(exit_code)

    tracker = WandbTracker.__new__(WandbTracker)
    tracker._run = Run()
    tracker.close(failed)
    assert codes == [code]
