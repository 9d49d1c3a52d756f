"""A model that a stranger packed: nothing outside its folder is read, and no number is used that predicts nothing."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from extract.store import fingerprint
from mil.deployment.artefact import read_artefact
from mil.deployment.inference import predict
from mil.deployment.packing import pack
from mil.errors import CheckpointError, MilError
from mil.experiments.crossval import train
from tests.test_mil.small import make_cohort, make_store

COHORT = make_cohort()


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    run = train(make_store(COHORT), COHORT, head="mean", folds=2, seeds=1, epochs=1, device="cpu").save(home / "run")
    return pack(run.folder, home / "model").folder


@pytest.fixture
def model(packed: Path, tmp_path: Path) -> Path:
    return shutil.copytree(packed, tmp_path / "model")


def _reseal(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the record and give it the hash that belongs to it, as a forger would."""
    record = json.loads((folder / "model.json").read_text())
    change(record)
    record["sha256"] = fingerprint({name: value for name, value in record.items() if name != "sha256"})
    (folder / "model.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    "name", ["../../../../etc/passwd", "/etc/passwd", "..", "a/../../b", ".", "", "a\\b", "C:x", 3]
)
@pytest.mark.parametrize("what", ["files", "replicas"])
def test_names_that_lead_out_are_refused(name: Any, what: str, model: Path):
    if what == "files":
        _reseal(model, lambda record: record["files"].update({str(name) if name == 3 else name: "0" * 64}))
    else:
        _reseal(model, lambda record: record["replicas"][0].update(name=name))
    with pytest.raises(CheckpointError, match=r"got .*model.* → expected"):
        read_artefact(model)


def test_a_member_of_another_folder_is_refused(model: Path):
    _reseal(model, lambda record: record.update(members=[{"name": "../../other"}], average="probabilities"))
    with pytest.raises(CheckpointError, match="no file of this folder"):
        read_artefact(model)


@pytest.mark.parametrize("kind", ["link", "device", "pipe", "linked folder"])
def test_links_devices_and_pipes_are_not_read(kind: str, model: Path, tmp_path: Path):
    card = model / "README.md"
    match kind:
        case "link":
            shutil.move(card, tmp_path / "elsewhere")
            card.symlink_to(tmp_path / "elsewhere")
        case "device":
            card.unlink()
            card.symlink_to("/dev/zero")
        case "pipe":
            card.unlink()
            os.mkfifo(card)
        case _:
            shutil.move(model / "checkpoints", tmp_path / "elsewhere")
            (model / "checkpoints").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_artefact(model)


def test_the_folder_itself_may_be_a_link(model: Path, tmp_path: Path):
    (tmp_path / "link").symlink_to(model)
    assert read_artefact(tmp_path / "link").replicas == read_artefact(model).replicas


@pytest.mark.parametrize("temperature", [0, 0.0, -1.0, float("nan"), float("inf"), "1", None, [1]])
def test_a_temperature_that_makes_no_prediction_is_refused(temperature: Any, model: Path):
    path, record = model / "model.json", json.loads((model / "model.json").read_text())
    record["replicas"][0]["temperature"] = temperature
    if (isinstance(temperature, float) and temperature != temperature) or temperature == float("inf"):
        path.write_text(json.dumps(record))
        with pytest.raises(MilError):
            read_artefact(model)
        return
    _reseal(model, lambda each: each["replicas"][0].update(temperature=temperature))
    with pytest.raises(CheckpointError, match="temperature"):
        read_artefact(model)


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"a":' * 50_000, b"[]", b"3", b"\xff\xfe\x00\x01"])
def test_a_record_that_is_none_is_told(content: bytes, model: Path):
    (model / "model.json").write_bytes(content)
    with pytest.raises(MilError, match="model"):
        read_artefact(model)


def test_predictions_that_are_no_numbers_are_refused(model: Path, monkeypatch: pytest.MonkeyPatch):
    import torch

    from mil.deployment import inference

    monkeypatch.setattr(inference, "decode", lambda record, logits: torch.full_like(logits.double(), float("nan")))
    with pytest.raises(MilError, match="not finite for 24 of 24 slides"):
        predict(model, make_store(COHORT), device="cpu")
