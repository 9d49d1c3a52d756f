"""Applying a run to slides without labels."""

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from aggregators import Aggregator, BagOutput
from extract.backbones.backbone import Backbone
from extract.errors import BackboneError
from extract.pipeline.extraction import run_extraction
from extract.store import FeatureRecipe, TileRecipe, open_store
from mil.bags.bags import Bags
from mil.bags.forward import fitting_packs
from mil.cohort.reading import read_cohort
from mil.deployment.inference import NO_TILE, predict
from mil.errors import BagError, CheckpointError, RunError
from mil.experiments.crossval import train
from mil.runs.ensemble import make_ensemble
from mil.runs.run import Run
from tests.test_extract.small import TILES, tiny_backbone, write_slide
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


def test_a_head_that_reads_positions_gets_them(store: MemoryStore, tmp_path: Path) -> None:
    head = {"name": "transformer", "embed_dim": 8, "heads": 2, "depth": 1, "positions": "sincos"}
    run = train(store, COHORT, head=head, **OPTIONS | {"folds": 2, "seeds": 1}).save(tmp_path / "run")
    expected = np.mean([each.probabilities for each in run.trained], axis=0)
    np.testing.assert_allclose(predict(run.folder, store, device="cpu").probabilities, expected, rtol=1e-5)


def test_the_table_has_one_row_per_slide(run: Run, store: MemoryStore, tmp_path: Path) -> None:
    predictions = predict(run.folder, store, device="cpu")
    predictions.write_csv(tmp_path / "p.csv")
    with open(tmp_path / "p.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["slide_id", "predicted", "p_Luminal A", "p_triple-negative", "confidence"]
    assert all(float(row["confidence"]) == max(float(row[f"p_{name}"]) for name in COHORT.class_names) for row in rows)
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


def test_the_submission_has_one_label_per_slide(run: Run, store: MemoryStore, tmp_path: Path) -> None:
    predictions = predict(run.folder, store, device="cpu")
    labels = {"Luminal A": "0", "triple-negative": "1"}
    predictions.write_submission(tmp_path / "s.csv", ("id", "class"), labels)
    with open(tmp_path / "s.csv", encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["id", "class"]
    expected = zip(COHORT.slide_ids, predictions.predicted, strict=True)
    assert rows == [[slide, labels[name]] for slide, name in expected]
    predictions.write_submission(tmp_path / "s.csv")
    assert (tmp_path / "s.csv").read_text().startswith("sample_index,label\n")


@pytest.mark.parametrize(
    ("columns", "labels", "message"),
    [
        (("id",), None, "two different names"),
        (("id", "id"), None, "two different names"),
        (("id", ""), None, "two different names"),
        (("id", "y"), {"Luminal A": "0"}, "add 'triple-negative'"),
        (("id", "y"), {"luminal a": "0", "triple-negative": "1"}, "did you mean 'Luminal A'"),
    ],
)
def test_a_submission_that_cannot_be_written_is_refused(
    run: Run,
    store: MemoryStore,
    tmp_path: Path,
    columns: tuple[str, ...],
    labels: dict[str, str] | None,
    message: str,
) -> None:
    with pytest.raises(RunError, match=message):
        predict(run.folder, store, device="cpu").write_submission(tmp_path / "s.csv", columns, labels)
    assert not (tmp_path / "s.csv").exists()


def test_a_slide_without_tiles_fails_alone(run: Run, store: MemoryStore, tmp_path: Path) -> None:
    bare = make_store(COHORT)
    bare.slides["slide 07"] = bare.slides["slide 07"][:0]
    expected, found = predict(run.folder, store, device="cpu"), predict(run.folder, bare, device="cpu")
    kept = [slide_id for slide_id in COHORT.slide_ids if slide_id != "slide 07"]
    assert list(found.slide_ids) == kept
    assert found.failed == (("slide 07", NO_TILE),)
    rows = [COHORT.slide_ids.index(slide_id) for slide_id in kept]
    np.testing.assert_allclose(found.probabilities, expected.probabilities[rows], rtol=1e-5)
    other = train(store, COHORT, head="mean", **OPTIONS).save(tmp_path / "mean")
    ensemble = make_ensemble([run.folder, other.folder]).save(tmp_path / "both")
    together = predict(ensemble, bare, device="cpu")
    assert (list(together.slide_ids), together.failed) == (kept, found.failed)
    with pytest.raises(BagError, match="no valid tile"):
        predict(run.folder, bare, slide_ids=["slide 07", "slide 08"], device="cpu")
    empty = MemoryStore({"slide 07": bare.slides["slide 07"]})
    with pytest.raises(RunError, match="none with a valid tile: 'slide 07'"):
        predict(run.folder, empty, device="cpu")


def test_an_ensemble_predicts_the_mean_of_its_members(run: Run, store: MemoryStore, tmp_path: Path) -> None:
    other = train(store, COHORT, head="mean", **OPTIONS | {"folds": 2, "seeds": 1}).save(tmp_path / "mean")
    folder = make_ensemble([run.folder, other.folder]).save(tmp_path / "both")
    together = predict(folder, store, device="cpu")
    members = [predict(each, store, device="cpu") for each in (run.folder, other.folder)]
    expected = np.mean([each.probabilities for each in members], axis=0)
    np.testing.assert_allclose(together.probabilities, expected, rtol=1e-12)
    assert len(together.replicas) == 8
    assert "mean/fold1-seed0" in together.replicas
    with pytest.raises(RunError, match="a member's"):
        predict(folder, store, device="cpu", attention=True)


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six slides of six patients, with a label table."""
    folder = tmp_path_factory.mktemp("slides")
    for at in range(6):
        write_slide(folder / "s" / f"a~{at}.tif", 260, 200, seed=at)
    rows = "".join(f"a~{at},p{at},{'xy'[at % 2]}\n" for at in range(6))
    (folder / "labels.csv").write_text("slide_id,patient_id,kind\n" + rows)
    return folder


@pytest.fixture(scope="module")
def slide_run(slides: Path) -> Path:
    """A run on their features."""
    run_extraction(slides / "s", slides / "c.zarr", tiny_backbone(), recipe=TILES, runtime="torch", isolation=False)
    cohort = read_cohort(slides / "labels.csv", "kind")
    run = train(open_store(slides / "c.zarr"), cohort, head="abmil", folds=2, seeds=1, epochs=2, device="cpu")
    return run.save(slides / "run").folder or slides


QUICK = {"runtime": "torch", "isolation": False}


@pytest.fixture
def backbone(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Makes the tiny backbone loadable by its name; the names that were asked for."""
    asked: list[str] = []

    def load(name: str, *_: object, **__: object) -> Backbone:
        asked.append(name)
        return tiny_backbone()

    monkeypatch.setattr("extract.backbones.backbone.load_backbone", load)
    return asked


def test_slides_are_embedded_by_the_recipe_of_the_model(
    slides: Path, slide_run: Path, backbone: list[str], tmp_path: Path
) -> None:
    direct = predict(
        slide_run, tmp_path / "n.zarr", device="cpu", attention=True, slides=slides / "s", extraction=QUICK
    )
    stored = predict(slide_run, slides / "c.zarr", device="cpu")
    assert direct.slide_ids == stored.slide_ids
    np.testing.assert_array_equal(direct.probabilities, stored.probabilities)
    made = open_store(tmp_path / "n.zarr")
    assert made.tile_recipe == TILES
    assert backbone == ["tiny"]
    files = direct.write_attention(tmp_path / "maps", made)
    assert [file.name for file in files] == [f"a%7E{at}.npz" for at in range(6)]
    with np.load(files[3]) as kept:
        assert str(kept["slide_id"]) == "a~3"
        np.testing.assert_array_equal(kept["attention"], direct.attention["a~3"])
        np.testing.assert_array_equal(kept["coords"], made["a~3"].coords("tiny"))
        assert kept["attention"].shape == (len(kept["coords"]), 1)
        assert float(kept["tile_l0"]) == 64


def test_a_slide_that_fails_is_listed_and_the_others_are_predicted(
    slides: Path, slide_run: Path, backbone: list[str], tmp_path: Path
) -> None:
    (tmp_path / "bad.tif").write_bytes(b"not a slide")
    given = [slides / "s" / "a~0.tif", tmp_path / "bad.tif"]
    found = predict(slide_run, tmp_path / "n.zarr", device="cpu", slides=given, extraction=QUICK)
    assert found.slide_ids == ("a~0",)
    assert [slide_id for slide_id, _ in found.failed] == ["bad"]
    with pytest.raises(RunError, match="none of which could be embedded"):
        predict(slide_run, tmp_path / "o.zarr", device="cpu", slides=given[1], extraction=QUICK)


def test_an_entry_of_other_weights_is_left_alone(
    slides: Path, slide_run: Path, backbone: list[str], tmp_path: Path
) -> None:
    other = tiny_backbone(weights_sha256="1" * 64)
    run_extraction(slides / "s" / "a~0.tif", tmp_path / "n.zarr", other, recipe=TILES, **QUICK)
    found = predict(slide_run, tmp_path / "n.zarr", device="cpu", slides=slides / "s" / "a~1.tif", extraction=QUICK)
    assert found.slide_ids == ("a~1",)
    assert found.entry.startswith("tiny-")
    assert open_store(tmp_path / "n.zarr").slide_ids("tiny") == ["a~0"]


def test_another_scale_or_backbone_is_refused_before_anything_is_read(
    slides: Path, slide_run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def load(**changes: object) -> None:
        monkeypatch.setattr("extract.backbones.backbone.load_backbone", lambda *_, **__: tiny_backbone(**changes))

    store, given = tmp_path / "n.zarr", {"device": "cpu", "slides": slides / "s", "extraction": QUICK}
    load(weights_sha256="1" * 64)
    with pytest.raises(CheckpointError, match=r"weights 111111111111.* of weights 000000000000"):
        predict(slide_run, store, **given)
    load(revision="2")
    with pytest.raises(CheckpointError, match="revision: 1 → 2"):
        predict(slide_run, store, **given)
    assert not store.exists()
    load()
    coarse = replace(TILES, mpp=1.0)
    run_extraction(slides / "s" / "a~0.tif", store, tiny_backbone(), recipe=coarse, **QUICK)
    with pytest.raises(CheckpointError, match=r"mpp: 0\.5 → 1"):
        predict(slide_run, store, **given)


def test_a_backbone_that_is_not_installed_is_named(
    slides: Path, slide_run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def absent(*_: object, **__: object) -> FeatureRecipe:
        raise BackboneError("got backbone 'tiny' → no such weights → mil models pull tiny")

    monkeypatch.setattr("extract.backbones.backbone.load_backbone", absent)
    with pytest.raises(CheckpointError, match=r"needs features of backbone 'tiny'.*mil models pull"):
        predict(slide_run, tmp_path / "n.zarr", device="cpu", slides=slides / "s")


def test_imported_features_cannot_be_made_from_slides(store: MemoryStore, tmp_path: Path) -> None:
    recipes = {"theirs": replace(FEATURES, weights_sha256="unknown:abc")}
    imported = make_store(COHORT, recipes=recipes)
    run = train(imported, COHORT, head="mean", folds=2, seeds=1, epochs=1, device="cpu").save(tmp_path / "run")
    with pytest.raises(CheckpointError, match="imported features"):
        predict(run.folder, tmp_path / "n.zarr", device="cpu", slides=tmp_path)


def test_slides_and_an_entry_contradict_each_other(run: Run, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="leave entry and slide_ids out"):
        predict(run.folder, tmp_path / "n.zarr", "tiny", device="cpu", slides=tmp_path)


class _Hungry(Aggregator):
    """The mean of a bag; runs out of memory above some instances at once."""

    def __init__(self, most: int) -> None:
        super().__init__(in_dim=2, n_classes=2)
        self.most = most
        self.asked: list[int] = []

    def aggregate(self, instances, segments, coords, generator):
        self.asked.append(len(instances))
        if len(instances) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        means = torch.stack([bag.mean(0) for bag in segments.split(instances)])
        return BagOutput(means, means, None, None, {})


def said(head: Aggregator, bags: Bags, bound: int) -> list[list[float]]:
    packs = fitting_packs([head], bags, np.arange(len(bags)), torch.device("cpu"), bound)
    return torch.cat([outputs[0].logits for _, outputs in packs]).tolist()


SIZES = (7, 1, 4, 4, 9, 2, 2, 5)


@pytest.fixture
def bags() -> Bags:
    rng = np.random.default_rng(0)
    matrices = [rng.normal(size=(size, 2)).astype(np.float32) for size in SIZES]
    return Bags([f"s{at}" for at in range(len(SIZES))], matrices)


def test_packs_that_memory_does_not_hold_are_halved(bags: Bags) -> None:
    expected = said(_Hungry(1000), bags, 1000)
    head = _Hungry(10)
    with pytest.warns(UserWarning, match="too little memory for 34 tiles of 8 slides at once"):
        found = said(head, bags, 1000)
    assert found == expected
    # 34 do not fit, nor do 17 (16 of them); from 8 on, and slides of their own, all do
    assert head.asked == [34, 16, 8, 8, 9, 4, 5]


def test_a_slide_that_memory_does_not_hold_alone_is_named(bags: Bags) -> None:
    with pytest.warns(UserWarning, match="half as many"), pytest.raises(BagError, match="slide 's4' alone, of 9 tiles"):
        said(_Hungry(8), bags, 1000)
