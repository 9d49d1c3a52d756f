"""Checkpoints: what is saved comes back, and nothing else is accepted."""

import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from aggregators import Aggregator, create_aggregator
from extract.store import TileRecipe, fingerprint, to_dict
from mil.errors import CheckpointError
from mil.training.checkpoint import (
    CheckpointRecord,
    load_checkpoint,
    package_versions,
    require_recipes,
    save_checkpoint,
)
from tests.test_mil.small import FEATURES

RECORD = CheckpointRecord(
    head="abmil",
    keywords={"embed_dim": 8, "input_norm": "standardize"},
    in_dim=6,
    class_names=("Luminal A", "HER2(+)"),
    target="subtype",
    entry="tiny",
    feature_recipe=to_dict(FEATURES),
    tile_recipe=to_dict(TileRecipe()),
    replica="fold0-seed0",
    fold=0,
    seed=0,
    best_epoch=3,
    config={"epochs": 4},
    versions=package_versions(),
)


@pytest.fixture
def head() -> Aggregator:
    made = create_aggregator("abmil", in_dim=6, n_classes=2, embed_dim=8, input_norm="standardize")
    made.input_norm.fit(torch.arange(6.0), torch.full((6,), 2.0))
    return made.eval()


@pytest.fixture
def path(tmp_path: Path, head: Aggregator) -> Path:
    path = tmp_path / "fold0-seed0.safetensors"
    save_checkpoint(path, head, RECORD)
    return path


def test_head_and_record_come_back(path: Path, head: Aggregator) -> None:
    loaded, record = load_checkpoint(path)
    assert record == RECORD
    instances = torch.randn(5, 6)
    assert torch.equal(loaded(instances).logits, head(instances).logits)
    assert not loaded.training
    assert sorted(file.name for file in path.parent.iterdir()) == ["fold0-seed0.json", "fold0-seed0.safetensors"]


def test_the_json_names_the_fingerprints(path: Path) -> None:
    plain = json.loads(path.with_suffix(".json").read_text())
    assert plain["feature_fingerprint"] == fingerprint(FEATURES)
    assert plain["tile_fingerprint"] == fingerprint(TileRecipe())


def test_equal_recipes_pass() -> None:
    require_recipes(RECORD, FEATURES, TileRecipe(), "entry 'tiny'")


@pytest.mark.parametrize(
    ("features", "tiles", "names"),
    [
        ({"weights_sha256": "1" * 64}, {}, ["feature recipe: weights_sha256", "1" * 64]),
        ({"transform": replace(FEATURES.transform, input_px=256)}, {}, ["transform.input_px: 224 → 256"]),
        ({"pooling": "cls", "dtype": "float32"}, {}, ["pooling", "dtype"]),
        ({}, {"mpp": 0.25}, ["tile recipe: mpp: 0.5 → 0.25"]),
    ],
)
def test_another_recipe_is_refused_with_the_fields_that_differ(
    features: dict[str, object], tiles: dict[str, object], names: list[str]
) -> None:
    with pytest.raises(CheckpointError) as caught:
        require_recipes(RECORD, replace(FEATURES, **features), replace(TileRecipe(), **tiles), "entry 'tiny' of x")
    assert all(name in str(caught.value) for name in [*names, "entry 'tiny' of x", "fold0-seed0"])


def test_weights_of_another_checkpoint_are_refused(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="SHA-256"):
        load_checkpoint(path)


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_a_missing_file_is_named(path: Path, suffix: str) -> None:
    path.with_suffix(suffix).unlink()
    with pytest.raises(CheckpointError, match=f"fold0-seed0{suffix}"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "change",
    [{"keywords": {"embed_dim": 4}}, {"in_dim": 7}, {"head": "none"}, {"keywords": {"depth": 1}}, {"format": 99}],
)
def test_a_record_that_does_not_fit_is_an_error(path: Path, change: dict[str, object]) -> None:
    record = path.with_suffix(".json")
    record.write_text(json.dumps(json.loads(record.read_text()) | change))
    with pytest.raises(CheckpointError, match="version"):
        load_checkpoint(path)


@pytest.mark.parametrize("text", ["", "[]", "{", "{}"])
def test_a_record_that_is_none_is_an_error(path: Path, text: str) -> None:
    path.with_suffix(".json").write_text(text)
    with pytest.raises(CheckpointError):
        load_checkpoint(path)


def test_a_killed_write_leaves_no_checkpoint(tmp_path: Path, head: Aggregator, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []

    def killed(path: Path, content: bytes) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(path)
        path.write_bytes(content)

    monkeypatch.setattr("mil.training.checkpoint.write_atomically", killed)
    path = tmp_path / "a.safetensors"
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, head, RECORD)
    with pytest.raises(CheckpointError, match=r"a\.json"):
        load_checkpoint(path)


@pytest.mark.parametrize("value", [None, True, -1, 1e300, "x", [], {}, [[1]], {"a": 1}, 10**30])
def test_no_value_of_a_record_ends_in_another_error(path: Path, value: object) -> None:
    file = path.with_suffix(".json")
    whole = json.loads(file.read_text())
    for name in whole:
        file.write_text(json.dumps(whole | {name: value}))
        with suppress(CheckpointError):
            load_checkpoint(path)
    for name in whole["keywords"]:
        file.write_text(json.dumps(whole | {"keywords": whole["keywords"] | {name: value}}))
        with pytest.raises(CheckpointError):
            load_checkpoint(path)


def test_a_record_of_brackets_is_an_error(path: Path) -> None:
    path.with_suffix(".json").write_text('{"format": ' + "[" * 100_000)
    with pytest.raises(CheckpointError, match="JSON"):
        load_checkpoint(path)
