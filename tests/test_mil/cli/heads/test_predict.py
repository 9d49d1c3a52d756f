"""Packing, predicting and evaluating as a person types it."""

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from extract.backbones.backbone import Backbone
from extract.pipeline.extraction import run_extraction
from extract.store import TilesUnit, create_store, open_store
from mil.cli import main as cli
from mil.cohort.reading import read_cohort
from mil.experiments.crossval import train
from tests.test_extract.small import EXECUTION, TILES, tiny_backbone, write_slide

N = 8


@dataclass(frozen=True)
class Result:
    """How a command ended, and all that it printed, line breaks aside."""

    code: int
    text: str


Mil = Callable[..., Result]


@pytest.fixture
def mil(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Mil:
    """Runs ``mil ARGUMENTS``."""

    def load(*_: object, **__: object) -> Backbone:
        return tiny_backbone()

    def run(*arguments: str | Path) -> Result:
        monkeypatch.setattr("extract.backbones.backbone.load_backbone", load)
        monkeypatch.setattr("sys.argv", ["mil", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "300")
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        printed = capsys.readouterr()
        return Result(code, " ".join((printed.out + " " + printed.err).split()))

    return run


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with slides, their store and labels, and two runs."""
    folder = tmp_path_factory.mktemp("home")
    for at in range(N):
        write_slide(folder / "slides" / f"s{at}.tif", 260, 200, seed=at)
    rows = "".join(f"s{at},p{at},{'xy'[at % 2]}\n" for at in range(N))
    (folder / "labels.csv").write_text("slide_id,patient_id,kind\n" + rows)
    store, cohort = folder / "c.zarr", read_cohort(folder / "labels.csv", "kind")
    run_extraction(folder / "slides", store, tiny_backbone(), recipe=TILES, runtime="torch", isolation=False)
    for head in ("abmil", "mean"):
        train(open_store(store), cohort, head=head, folds=2, seeds=1, epochs=2, device="cpu").save(folder / head)
    return folder


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_pack_then_predict_slides(mil: Mil, home: Path, tmp_path: Path) -> None:
    packed = mil("pack", home / "abmil", "--out", tmp_path / "model", "--abstain-below", "0.99")
    assert packed.code == 0, packed.text
    assert "abstaining below 0.990 (out of fold)" in packed.text
    assert "card" in packed.text
    arguments = ("predict", "--run", tmp_path / "model", home / "slides", "--out", tmp_path / "p.csv")
    found = mil(*arguments, "--attention", tmp_path / "maps", "--device", "cpu")
    assert found.code == 0, found.text
    assert f"{N} slides by the mean of 2 replicas" in found.text
    rows = rows_of(tmp_path / "p.csv")
    assert [row["slide_id"] for row in rows] == [f"s{at}" for at in range(N)]
    assert all(row["abstained"] == str(float(row["confidence"]) < 0.99).lower() for row in rows)
    assert open_store(tmp_path / "p.zarr").tile_recipe == TILES
    with np.load(tmp_path / "maps" / "s3.npz") as kept:
        assert len(kept["attention"]) == len(kept["coords"])


def test_a_slide_that_fails_ends_with_1_and_keeps_the_others(mil: Mil, home: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    shutil.copy(home / "slides" / "s1.tif", tmp_path / "in")
    (tmp_path / "in" / "bad.tif").write_bytes(b"nothing")
    found = mil("predict", "--run", home / "abmil", tmp_path / "in", "--out", tmp_path / "p.csv")
    assert found.code == 1
    assert "slides that failed" in found.text
    assert "bad" in found.text
    assert [row["slide_id"] for row in rows_of(tmp_path / "p.csv")] == ["s1"]


def test_a_stored_slide_without_tiles_ends_with_1_and_keeps_the_others(mil: Mil, home: Path, tmp_path: Path) -> None:
    store, source = create_store(tmp_path / "s.zarr", TILES), open_store(home / "c.zarr")
    store.create_entry("tiny", source.feature_recipe("tiny"))
    slide, n = source["s1"], source["s1"].n_tiles
    for slide_id, invalid in (("good", ()), ("bare", range(n))):
        facts = dict(slide.record)
        mask = np.zeros((2, 2), dtype=bool)
        store.write_tiles(
            TilesUnit(slide_id, slide.array("coords"), slide.tissue_fraction, slide.thumbnail, facts, mask)
        )
        features = np.zeros((n, slide.features("tiny").shape[1]), slide.features("tiny").dtype)
        store.write_features("tiny", slide_id, features, list(invalid), EXECUTION)
    found = mil("predict", "--run", home / "abmil", "--store", tmp_path / "s.zarr", "--out", tmp_path / "p.csv")
    assert found.code == 1, found.text
    assert "it has no valid tile in the store" in found.text
    assert "label table" not in found.text
    assert [row["slide_id"] for row in rows_of(tmp_path / "p.csv")] == ["good"]


def test_a_threshold_of_each_fold_is_told_as_a_range(mil: Mil, home: Path, tmp_path: Path) -> None:
    packed = mil("pack", home / "abmil", "--out", tmp_path / "model", "--coverage", "0.5")
    assert packed.code == 0, packed.text
    record = json.loads((tmp_path / "model" / "model.json").read_text())
    low, high = sorted(record["abstention"]["out_of_fold"]["below_by_fold"])
    assert f"abstaining below {low:.3f} to {high:.3f} (out of fold)" in packed.text


def test_the_submission(mil: Mil, home: Path, tmp_path: Path) -> None:
    arguments = ("predict", "--run", home / "mean", "--store", home / "c.zarr", "--out", tmp_path / "s.csv")
    form = ("--format", "submission", "--columns", "sample_index,label")
    found = mil(*arguments, *form, "--label-map", "x=0", "--label-map", "y=1")
    assert found.code == 0, found.text
    rows = rows_of(tmp_path / "s.csv")
    assert len(rows) == N
    assert {row["label"] for row in rows} <= {"0", "1"}
    assert set(rows[0]) == {"sample_index", "label"}
    (tmp_path / "s.csv").unlink()
    assert "two different names" in mil(*arguments, "--format", "submission", "--columns", "id").text
    assert "add 'y'" in mil(*arguments, *form, "--label-map", "x=0").text
    assert "CLASS=LABEL" in mil(*arguments, *form, "--label-map", "x").text
    assert not (tmp_path / "s.csv").exists()


def test_a_submission_has_a_label_where_the_model_abstains_and_names_the_slide(
    mil: Mil, home: Path, tmp_path: Path
) -> None:
    assert mil("pack", home / "mean", "--out", tmp_path / "model", "--abstain-below", "1.0").code == 0
    arguments = ("predict", "--run", tmp_path / "model", "--store", home / "c.zarr", "--out", tmp_path / "s.csv")
    found = mil(*arguments, "--format", "submission")
    assert found.code == 0, found.text
    assert len(rows_of(tmp_path / "s.csv")) == N
    assert f"abstained from {N} slides, of confidence below 1.000: s0, s1" in found.text
    assert "A submission has a label for every slide" in found.text
    assert "A submission" not in mil(*arguments).text


def test_an_external_cohort_of_one_class_is_warned_of(mil: Mil, home: Path, tmp_path: Path) -> None:
    arguments = ("evaluate", "--run", home / "mean", "--store", home / "c.zarr", "--target", "kind", "--class", "x")
    found = mil(*arguments, "--labels", home / "labels.csv", "--overlap", "mark", "--out", tmp_path / "out")
    assert found.code == 0, found.text
    assert "warning: all 4 slides are of class 'x'" in found.text


def test_evaluate_refuses_the_training_cohort_and_marks_it_loudly(mil: Mil, home: Path, tmp_path: Path) -> None:
    arguments = ("evaluate", "--run", home / "mean", "--store", home / "c.zarr", "--target", "kind")
    arguments += ("--labels", home / "labels.csv", "--out", tmp_path / "out")
    refused = mil(*arguments)
    assert refused.code == 2
    assert "was trained on" in refused.text
    marked = mil(*arguments, "--overlap", "mark")
    assert marked.code == 0, marked.text
    assert "NOT AN EXTERNAL COHORT" in marked.text
    assert "looked at 1 time " in marked.text
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["trained_on"] == N
    assert "not empty" in mil(*arguments, "--overlap", "mark").text


def test_an_ensemble_is_made_and_predicts(mil: Mil, home: Path, tmp_path: Path) -> None:
    made = mil("ensemble", home / "abmil", home / "mean", "--out", tmp_path / "both")
    assert made.code == 0, made.text
    assert "gain in macro-F1" in made.text
    found = mil("predict", "--run", tmp_path / "both", "--store", home / "c.zarr", "--out", tmp_path / "p.csv")
    assert found.code == 0, found.text
    assert "mean of 4 replicas" in found.text
    slides = mil("predict", "--run", tmp_path / "both", home / "slides", "--out", tmp_path / "q.csv")
    assert slides.code == 0, slides.text
    assert rows_of(tmp_path / "q.csv") == rows_of(tmp_path / "p.csv")


def test_a_packed_ensemble_predicts_slides_and_the_store_alike(mil: Mil, home: Path, tmp_path: Path) -> None:
    assert mil("ensemble", home / "abmil", home / "mean", "--out", tmp_path / "both").code == 0
    packed = mil("pack", tmp_path / "both", "--out", tmp_path / "model", "--coverage", "0.5")
    assert packed.code == 0, packed.text
    assert "1-abmil (abmil, tiny)" in packed.text
    assert "4 replicas" in packed.text
    predict = ("predict", "--run", tmp_path / "model", "--device", "cpu", "--out")
    stored = mil(*predict, tmp_path / "p.csv", "--store", home / "c.zarr")
    assert stored.code == 0, stored.text
    straight = mil(*predict, tmp_path / "q.csv", home / "slides")
    assert straight.code == 0, straight.text
    assert rows_of(tmp_path / "q.csv") == rows_of(tmp_path / "p.csv")
    assert "abstained" in rows_of(tmp_path / "p.csv")[0]


def test_wrong_input_ends_with_2_and_says_why(
    mil: Mil, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mil.deployment.onnx_export._PACKAGES", ("onnx_that_is_not_there",))
    predict = ("predict", "--run", home / "mean", "--out", tmp_path / "p.csv")
    cases = {
        "neither --store nor slides": predict,
        "--default-mpp without slides": (*predict, "--store", home / "c.zarr", "--default-mpp", "0.5"),
        "a folder that exists": ("predict", "--run", home / "mean", "--store", "x", "--out", tmp_path / "no" / "p.csv"),
        "no metrics.json": ("predict", "--run", tmp_path, "--store", home / "c.zarr", "--out", tmp_path / "p.csv"),
        "got no slide in": (*predict, tmp_path),
        "leave entry and slide_ids out": (*predict, home / "slides", "--as", "tiny"),
        "did you mean 'kind'": (
            *("evaluate", "--run", home / "mean", "--store", home / "c.zarr", "--target", "knd"),
            *("--labels", home / "labels.csv", "--out", tmp_path / "e"),
        ),
        "give one": ("pack", home / "mean", "--out", tmp_path / "m", "--coverage", "0.9", "--abstain-below", "0.5"),
        "got no onnx": ("export-onnx", home / "mean", "--out", tmp_path / "onnx"),
        "a file → expected a folder": (*predict, "--store", home / "c.zarr", "--attention", home / "labels.csv"),
        "two or more different runs": ("ensemble", home / "mean", "--out", tmp_path / "both"),
    }
    for words, arguments in cases.items():
        result = mil(*arguments)
        assert result.code == 2, (words, result)
        assert words in result.text, result.text
    assert sorted(path.name for path in tmp_path.iterdir()) == []


def test_a_damaged_model_and_an_empty_store_are_refused(mil: Mil, home: Path, tmp_path: Path) -> None:
    assert mil("pack", home / "mean", "--out", tmp_path / "model").code == 0
    weights = tmp_path / "model" / "checkpoints" / "fold0-seed0.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    predict = ("predict", "--run", tmp_path / "model", "--out", tmp_path / "p.csv", "--store")
    assert "damaged or edited" in mil(*predict, home / "c.zarr").text
    weights.write_bytes(content)
    empty = create_store(tmp_path / "e.zarr", TILES)
    assert "without features" in mil(*predict, tmp_path / "e.zarr").text
    empty.create_entry("tiny", open_store(home / "c.zarr").feature_recipe("tiny"))
    assert "got no slides" in mil(*predict, tmp_path / "e.zarr").text
    assert not (tmp_path / "p.csv").exists()
