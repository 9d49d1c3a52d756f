"""Applying a run to slides without labels."""

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from extract.store import TileRecipe
from mil.crossval import train
from mil.errors import BagError, CheckpointError, RunError
from mil.inference import predict
from mil.run import Run
from tests.test_mil.small import FEATURES, MemoryStore, make_cohort, make_store

COHORT = make_cohort()
OPTIONS = {"folds": 3, "seeds": 2, "epochs": 2, "device": "cpu"}


@pytest.fixture(scope="module")
def store() -> MemoryStore:
    return make_store(COHORT)


@pytest.fixture(scope="module")
def run(store: MemoryStore, tmp_path_factory: pytest.TempPathFactory) -> Run:
    head = {"name": "abmil", "embed_dim": 8, "attention_dim": 4, "branches": 2}
    return train(store, COHORT, head=head, **OPTIONS).save(tmp_path_factory.mktemp("runs") / "run")


def test_the_default_is_the_mean_probability_of_all_replicas(run: Run, store: MemoryStore) -> None:
    predictions = predict(run.folder, store, device="cpu")
    assert predictions.slide_ids == COHORT.slide_ids
    expected = np.mean([each.probabilities for each in run.trained], axis=0)
    np.testing.assert_allclose(predictions.probabilities, expected, rtol=1e-5)
    assert predictions.predicted == [COHORT.class_names[index] for index in expected.argmax(axis=1)]
    assert predictions.attention is None
    assert len(predictions.replicas) == 6


def test_some_replicas_and_some_slides(run: Run, store: MemoryStore) -> None:
    names, slides = ["fold2-seed1", "fold0-seed0"], ["slide 05", "slide 01"]
    predictions = predict(run.folder, store, slide_ids=slides, replicas=names, device="cpu")
    chosen = [each.probabilities[[5, 1]] for each in run.trained if each.replica.name in names]
    np.testing.assert_allclose(predictions.probabilities, np.mean(chosen, axis=0), rtol=1e-5)
    assert predictions.slide_ids == tuple(slides)
    assert predictions.replicas == ("fold0-seed0", "fold2-seed1")


def test_attention_is_the_mean_over_replicas_tile_by_tile(run: Run, store: MemoryStore) -> None:
    import torch

    slides = ["slide 05", "slide 01", "slide 02"]
    attention = predict(run.folder, store, slide_ids=slides, device="cpu", attention=True).attention
    assert list(attention) == slides
    for slide in slides:
        heads = [each.head(torch.from_numpy(store.slides[slide])).attention for each in run.trained]
        np.testing.assert_allclose(attention[slide], torch.stack(heads).mean(dim=0).detach(), rtol=1e-4)
        assert attention[slide].shape == (len(store.slides[slide]), 2)
        np.testing.assert_allclose(attention[slide].sum(axis=0), 1, rtol=1e-5)


def test_a_head_without_attention_says_so(store: MemoryStore, tmp_path: Path) -> None:
    run = train(store, COHORT, head="mean", **OPTIONS | {"folds": 2, "seeds": 1}).save(tmp_path / "run")
    assert predict(run.folder, store, device="cpu").probabilities.shape == (len(COHORT), 2)
    with pytest.raises(RunError, match="head=abmil"):
        predict(run.folder, store, device="cpu", attention=True)


def test_the_table_has_one_row_per_slide(run: Run, store: MemoryStore, tmp_path: Path) -> None:
    predictions = predict(run.folder, store, device="cpu")
    predictions.write_csv(tmp_path / "p.csv")
    with open(tmp_path / "p.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["slide_id", "predicted", "p_Luminal A", "p_triple-negative"]
    assert [row["slide_id"] for row in rows] == list(COHORT.slide_ids)
    assert [row["predicted"] for row in rows] == predictions.predicted


def test_the_fitting_entry_is_found_and_another_recipe_is_refused(run: Run) -> None:
    other = replace(FEATURES, weights_sha256="1" * 64)
    several = make_store(COHORT, recipes={"renamed": FEATURES, "tiny": other})
    assert predict(run.folder, several, device="cpu").entry == "renamed"
    with pytest.raises(CheckpointError, match="weights_sha256"):
        predict(run.folder, several, entry="tiny", device="cpu")
    with pytest.raises(CheckpointError, match="weights_sha256"):
        predict(run.folder, make_store(COHORT, recipes={"a": other, "b": other}), device="cpu")
    with pytest.raises(CheckpointError, match=r"mpp: 0\.5 → 0\.25"):
        predict(run.folder, make_store(COHORT, tile_recipe=TileRecipe(mpp=0.25)), device="cpu")


def test_what_is_not_there_is_named(run: Run, store: MemoryStore, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no metrics\.json"):
        predict(tmp_path, store)
    with pytest.raises(RunError, match="did you mean 'fold0-seed0'"):
        predict(run.folder, store, replicas=["fold0seed0"])
    with pytest.raises(RunError, match="empty list"):
        predict(run.folder, store, replicas=[])
    with pytest.raises(BagError, match="'nowhere'"):
        predict(run.folder, store, slide_ids=["nowhere"])
