"""``mil models``: what it lists, pulls and verifies, and how it fails."""

import json
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from extract.backbones.architectures import create_architecture
from extract.backbones.backbone import load_backbone
from extract.backbones.presets import PRESETS
from extract.errors import BackboneError
from mil.cli.slides.models import app


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def test_the_table_lists_every_preset(cache: Path):
    folder = cache / "models--owkin--phikon" / "snapshots" / PRESETS["phikon"].revision
    folder.mkdir(parents=True)
    (folder / "model.safetensors").touch()
    code, output = run("list")
    assert code == 0
    rows = {line.split()[0]: line for line in output.splitlines() if line.split()}
    assert set(PRESETS) <= set(rows)
    assert "2560 (cls+avg)" in rows["virchow2"]
    assert rows["phikon"].split()[-2:] == ["no", "cached"]
    assert rows["uni"].split()[-2:] == ["yes", "no"]
    assert "448" in rows["conch"]
    assert "wheel" in rows["efficientnet_lite0"]


def test_json_has_every_fact():
    code, output = run("list", "--json")
    facts = {row["name"]: row for row in json.loads(output)}
    assert code == 0
    assert set(facts) == set(PRESETS)
    assert facts["virchow2"]["dims"] == {"cls": 1280, "avg": 1280, "cls+avg": 2560}
    assert facts["virchow2"]["dim"] == 2560
    assert facts["uni"]["revision"] == PRESETS["uni"].revision
    assert facts["uni"]["weights"] == "no"


def test_pulling_says_what_is_missing_and_goes_on():
    code, output = run("pull", "UNI", "phikon", "efficientnet_lite0")
    lines = [line for line in output.splitlines() if line]
    assert code == 1
    assert len([line for line in lines if line.startswith("error:")]) == 2
    assert "MahmoodLab/UNI" in output
    assert "HF_HUB_OFFLINE" in output
    assert "a wheel that is installed" in lines[-1]


def test_an_unknown_preset_is_refused_before_anything_is_pulled():
    with pytest.raises(BackboneError, match=r"unj.*did you mean \['uni'"):
        run("pull", "phikon", "unj")


def test_the_default_is_verified():
    code, output = run("verify", "efficientnet_lite0", "--device", "cpu")
    assert code == 0
    assert load_backbone().recipe.weights_sha256 in output
    assert "1280, declared 1280" in output
    assert output.rstrip().endswith("verified")


def test_weights_that_are_not_the_presets_fail(tmp_path: Path):
    state = create_architecture(PRESETS["resnet50_layer3"]).state_dict()
    save_file(
        {
            key: torch.full_like(value, float("nan")) if key == "layer3.5.bn3.weight" else value
            for key, value in state.items()
        },
        tmp_path / "w.safetensors",
    )
    code, output = run("verify", "resnet50_layer3", "--weights", str(tmp_path / "w.safetensors"), "--device", "cpu")
    assert code == 1
    assert "NOT FINITE" in output
    assert "NOT verified" in output
