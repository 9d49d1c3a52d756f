"""The benchmarks run: one small step of each, so that they never rot."""

import csv
import math
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from aggregators import list_aggregators
from benchmarks import (
    bench_aggregators,
    bench_demo,
    bench_extract,
    bench_first_end,
    bench_reading,
    bench_runtimes,
    bench_statistics,
    bench_store,
    bench_training,
    classic_mil,
    extras_cost,
    glas_quality,
    many_replicas,
    mnist_bags,
    our_recipe,
    plain_pipeline,
    published_tables,
    torchmil_peer,
)
from benchmarks.ceiling_cohort import CohortSize, Difficulty, draw_cohort
from benchmarks.entrants import Entrant
from benchmarks.glas_quality import Trained
from benchmarks.published_protocol import best_cut, best_test_epoch
from benchmarks.quality_curve import Curve, CurveWriter, Task
from extract.store import TileRecipe, TissueRecipe
from mil.bags.bags import Bags
from mil.bags.forward import bag_logits
from mil.errors import TrainingDivergedError
from mil.splits.folds import make_splits
from mil.statistics.metrics import auroc
from mil.training.loop import train_replica
from mil.training.losses import probabilities
from mil.training.replica import Replica
from tests.conftest import REPOSITORY
from tests.test_extract.small import write_slide
from tests.test_mil.small import make_cohort, make_store


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_first_end_measures_every_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slides = tmp_path / "slides"
    lines = ["slide_id,patient_id,label"]
    for i in range(10):
        write_slide(slides / f"s{i}.tif", 400, 400, mpp=0.62, seed=i)
        lines.append(f"s{i},p{i},{'ab'[i % 2]}")
    (tmp_path / "labels.csv").write_text("\n".join(lines) + "\n")
    arguments = ["--size-px", "700", "--repeats", "1", "--epochs", "2", "--out", str(tmp_path / "r.csv")]
    bench_first_end.main([*arguments, "--glas", str(slides), "--labels", str(tmp_path / "labels.csv")])
    rows = rows_of(tmp_path / "r.csv")
    metrics = {(row["subject"], row["metric"]) for row in rows}
    for subject in ("large slide", "glas"):
        assert {(subject, name) for name in ("reading alone", "backbone alone", "end to end")} <= metrics
    assert ("glas", "training epoch, abmil, one replica") in metrics
    assert all(float(row["median"]) > 0 and row["torch"] and row["cores"] for row in rows)


def test_demo_summarises_over_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from extract.synthetic.cohort import make_cohort

    small = partial(make_cohort, patients_per_class=3, slides_per_patient=1, size_l0=(512, 512))
    monkeypatch.setattr("extract.synthetic.cohort.make_cohort", small)
    out = str(tmp_path / "d.csv")
    rows = bench_demo.main(["--seeds", "1", "2", "--out", out, "folds=3", "seeds=1", "epochs=1", "device=cpu"])
    gains = [row.median for row in rows if row.metric == "gain in macro-F1" and row.subject != "all data seeds"]
    (summary,) = [row for row in rows if row.metric.startswith("gain in macro-F1, mean")]
    assert len(gains) == 2
    assert summary.median == pytest.approx(sum(gains) / 2)
    assert summary.low <= summary.median <= summary.high
    assert len(rows_of(tmp_path / "d.csv")) == len(rows)


def test_runtimes_are_timed_and_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_runtimes, "INPUT_PX", 64)
    arguments = ["--models", "test_resnet", "--batch-sizes", "2", "--repeats", "1", "--seconds", "0.01"]
    bench_runtimes.main([*arguments, "--out", str(tmp_path / "r.csv")])
    medians = {row["metric"]: float(row["median"]) for row in rows_of(tmp_path / "r.csv")}
    assert {"torch, batch 2", "torch, batch 2, CPU time", "torch, smallest cosine with torch"} <= set(medians)
    assert all(value > 0 for value in medians.values())
    assert min(value for metric, value in medians.items() if "cosine" in metric) > 0.9999


def test_reading_compares_pixels_and_rates(tmp_path: Path) -> None:
    slide = write_slide(tmp_path / "small.tif", 640, 448)
    arguments = ["--size-px", "1500", "--tiles", "4", "--repeats", "1", "--out", str(tmp_path / "r.csv"), str(slide)]
    bench_reading.main(arguments)
    rows = rows_of(tmp_path / "r.csv")
    same = [float(row["median"]) for row in rows if "identical" in row["metric"]]
    assert same == [100] * 4
    assert {row["subject"] for row in rows} == {"large SVS", "small.tif"}
    assert sum(row["metric"].endswith("direct / OpenSlide") for row in rows) == 4
    assert all(float(row["median"]) > 0 for row in rows)


def test_extraction_is_compared_with_the_plain_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure, rates = plain_pipeline.measure, dict[tuple[str, int], float]()

    def measure_once(paths: Sequence[Path], coords: np.ndarray, name: str, *rest: Any) -> float:
        """A process for each backbone and count of slides; other batch sizes take seconds to say the same."""
        if (name, len(paths)) not in rates:
            rates[name, len(paths)] = measure(paths, coords, name, *rest)
        return rates[name, len(paths)]

    monkeypatch.setattr(plain_pipeline, "measure", measure_once)
    monkeypatch.setattr(bench_extract, "PLAIN_BATCHES", (2,))
    sizes = ["--size-px", "512", "--large-px", "512", "--copies", "2", "--slides", "1", "2"]
    options = ["--repeats", "1", "--search-tiles", "4", "--runtimes", "torch"]
    bench_extract.main([*sizes, *options, "--out", str(tmp_path / "r.csv")])
    rows = rows_of(tmp_path / "r.csv")
    metrics = {row["metric"] for row in rows}
    assert {"plain pipeline, batch 64", "tessera, torch", "tessera, torch / plain at 64"} <= metrics
    assert {"rate, mean colour", "memory, this process and its reader"} <= metrics
    assert all(float(row["median"]) > 0 for row in rows)


def test_the_comparison_on_a_gpu_runs_on_a_cpu_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_extract, "backbone_rate", partial(bench_extract.backbone_rate, seconds=0.1))
    bench_reading.write_aperio(tmp_path / "a.svs", 512)
    options = Namespace(
        device="cpu", backbones=["test_resnet"], batches=[2, 4], repeats=1, precision="fp32", compile=False
    )
    recipe = TileRecipe(tile_px=64, tissue=TissueRecipe(method="none"))
    results = bench_extract.compare_on_gpu(options, [tmp_path / "a.svs"], recipe)
    assert [row.metric.split(",")[0] for row in results] == [
        "backbone alone",
        "backbone alone",
        "end to end",
        "end to end / backbone alone",
        "device busy",
    ]
    assert all(row.median > 0 for row in results)


def test_the_store_is_compared_with_other_layouts(tmp_path: Path) -> None:
    sizes = ["--rows", "64", "--dim", "8", "--slides", "2", "--picked", "4", "--listed", "3", "--repeats", "1"]
    bench_store.main([*sizes, "--dtypes", "float16", "--folder", str(tmp_path), "--out", str(tmp_path / "r.csv")])
    rows = rows_of(tmp_path / "r.csv")
    subjects = {row["subject"].partition(", ")[2] for row in rows if "float16" in row["subject"]}
    ours = {"tessera, zarr", "tessera, h5"}
    assert subjects - ours == {
        "memory copy",
        "torch .pt",
        "safetensors",
        "Zarr, defaults",
        "HDF5, contiguous",
        "HDF5, one row a chunk",
    }
    assert ours < subjects
    assert all(float(row["median"]) > 0 for row in rows)
    assert {row["subject"] for row in rows} >= {"checksums", "3 slides"}


def test_classic_sets_are_scored_under_every_protocol(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    bag, labels = np.repeat(np.arange(12), 3), np.arange(12) % 2
    instances = rng.normal(size=(36, 4)) + 3 * labels[bag, None]
    np.savez(tmp_path / "made_up.npz", x=instances.astype(np.float32), bag=bag, y=labels.astype(np.int8))
    sizes = ["--sets", "made_up", "--folds", "2", "--repeats", "2", "--epochs", "2"]
    classic_mil.main(["--data", str(tmp_path), *sizes, "--out", str(tmp_path / "r.csv")])
    rows = rows_of(tmp_path / "r.csv")
    assert {row["subject"] for row in rows} == {f"made_up, {title}" for title in classic_mil.CONTENDERS}
    scores = {(row["subject"], row["metric"]): float(row["median"]) for row in rows}
    for title in classic_mil.CONTENDERS:
        # folds with as many positive as negative bags: the best epoch at its best cut cannot lose to the last one
        subject = f"made_up, {title}"
        assert scores[subject, classic_mil.BEST_EPOCH] >= scores[subject, classic_mil.LAST_EPOCH]
    assert all(float(row["low"]) <= float(row["median"]) <= float(row["high"]) for row in rows)


def test_honest_scores_do_not_depend_on_test_labels(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    instances, bag, labels = rng.normal(size=(36, 4)), np.repeat(np.arange(12), 3), np.arange(12) % 2
    np.savez(tmp_path / "made_up.npz", x=instances.astype(np.float32), bag=bag, y=labels.astype(np.int8))
    mil_set = classic_mil.read_set(tmp_path / "made_up.npz")
    splits = make_splits(mil_set.cohort, 2, seeds=(0,))
    other = replace(mil_set.cohort, labels=np.where(splits.test_fold == 0, 1 - labels, labels))
    configs = classic_mil.settings(classic_mil.CONTENDERS["mean"], 2)
    found = [
        classic_mil.best_validated(classic_mil.MilSet(mil_set.bags, cohort), configs, splits, 0)
        for cohort in (mil_set.cohort, other)
    ]
    assert np.array_equal(found[0].probabilities, found[1].probabilities)


def test_choosing_on_the_test_fold_makes_noise_look_good() -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(10) % 2
    folds = rng.random((200, 40, 10))
    honest = np.mean([(fold[-1] >= 0.5) == labels for fold in folds])
    chosen = np.mean([best_test_epoch(labels, fold) for fold in folds])
    assert abs(honest - 0.5) < 0.05
    assert chosen > 0.8
    assert best_cut(np.array([0, 0, 1]), np.array([0.6, 0.7, 0.9])) == pytest.approx(0.8)


def test_the_page_shows_what_the_result_files_say(tmp_path: Path) -> None:
    page, results = REPOSITORY / "docs" / "benchmarks.md", REPOSITORY / "benchmarks" / "results"
    assert published_tables.renewed(page, results) == page.read_text(encoding="utf-8")
    figures = {("50 bags of 10", "AUROC, max"): {"median": "0.9", "low": "0.85", "high": "0.951"}}
    assert "| max | 0.900 [0.850, 0.951] | not yet run |" in published_tables.mnist_table(figures)


def test_mnist_bags_hold_the_target_or_not(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(40) % 10
    pixels = rng.integers(0, 50, (40, 28, 28)) + 200 * (labels == 9)[:, None, None]
    for part in ("npm10k", "t10k"):
        np.savez(tmp_path / f"mnist_{part}.npz", x=pixels.astype(np.uint8), y=labels.astype(np.uint8))
    bags = mnist_bags.draw_bags(labels, 30, 10, rng)
    holds = [(labels[rows] == 9).any() for rows in np.split(bags.rows, bags.offsets[1:-1])]
    assert holds == (bags.labels == 1).tolist()
    sizes = ["--sizes", "10", "--bags", "10", "--test-bags", "20", "--seeds", "1", "--epochs", "3"]
    mnist_bags.main(["--data", str(tmp_path), *sizes, "--heads", "max", "mean", "--out", str(tmp_path / "r.csv")])
    areas = {row["metric"]: float(row["median"]) for row in rows_of(tmp_path / "r.csv")}
    assert set(areas) == {"AUROC, max", "AUROC, mean"}
    assert areas["AUROC, max"] > 0.9


SMALL_COHORT = CohortSize(slides=40, fewest=20, most=40, dim=8)
CLEAR = Difficulty("clear", share=0.3, distance=20.0)


def test_the_ceiling_is_the_exact_posterior() -> None:
    """Perfect when witnesses are many and far, chance when there are none, and calibrated in between."""
    slides = np.arange(400)
    size = replace(SMALL_COHORT, slides=400)
    assert draw_cohort(size, CLEAR, 0).ceiling(slides) == 1
    absent = draw_cohort(size, Difficulty("absent", share=1e-9, distance=1.0), 0)
    assert absent.ceiling(slides) == pytest.approx(0.5, abs=0.1)
    middling = draw_cohort(size, Difficulty("middling", share=0.1, distance=2.0), 0)
    of_label = middling.posterior[slides, middling.labels]
    # a calibrated posterior expects of the true class what it expects of itself
    assert of_label.mean() == pytest.approx((middling.posterior**2).sum(axis=1).mean(), abs=0.03)
    again = draw_cohort(size, Difficulty("middling", share=0.1, distance=2.0), 0)
    assert all((one == other).all() for one, other in zip(middling.bags, again.bags, strict=True))


def test_time_to_quality_counts_from_the_first_epoch_that_arrives() -> None:
    curve = Curve(wall=(1.0, 2.0, 4.0), cpu=(2.0, 4.0, 8.0), aurocs=(0.5, 0.8, 0.7), last=np.empty((0, 2)))
    assert curve.seconds_to(0.75, "wall") == 2
    assert curve.seconds_to(0.81, "cpu") == math.inf
    assert curve.seconds_per_epoch("wall") == 1.5
    slow = Curve((3.0,), (3.0,), (0.9,), np.empty((0, 2)))
    never = bench_training.Setting(Entrant("a", False, lambda *_: curve), 1e-3, [curve, slow])
    assert never.seconds_to(0.9, "wall") == [math.inf, 3]
    assert never.censored_to(0.9, "wall") == [4, 3]
    assert bench_training.soonest({1e-4: slow, 1e-3: curve}) == 1e-4
    assert bench_training.soonest({1e-4: replace(curve, aurocs=(0.1, 0.2, math.nan)), 1e-3: curve}) == 1e-3


def test_training_is_compared_on_synthetic_cohorts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_training, "EASY", replace(CLEAR, name="easy"))
    monkeypatch.setattr(bench_training, "RECIPES", bench_training.RECIPES[:1])
    sizes = ["--slides", "40", "--instances", "20", "40", "--dim", "8", "--seeds", "1", "--transformer-width", "8"]
    epochs = ["--common-epochs", "2", "--torchmil-epochs", "2", "--transformer-epochs", "2", "--our-epochs", "30"]
    options = ["--difficulties", "easy", "--cohorts", "2", "3", "--grid", "1e-2", "--out", str(tmp_path / "r.csv")]
    entrants = ["--entrants", "common", "torchmil-abmil", "torchmil-transformer", "ours"]
    bench_training.main([*sizes, *epochs, *options, *entrants])
    rows = rows_of(tmp_path / "r.csv")
    ours = bench_training.RECIPES[0].name
    rivals = ["common recipe", *(["torchmil ABMIL, batch 16"] if torchmil_peer.is_installed() else [])]
    by_cohort = {name: [row for row in rows if row["subject"].startswith(name)] for name in ("easy 2,", "easy 3,")}
    assert [len(found) for found in by_cohort.values()] == [len(rows) / 2] * 2
    # what sixteen slides say of a rate is luck: the first cohort is one where the rate fits
    medians = {row["metric"]: float(row["median"]) for row in by_cohort["easy 2,"]}
    assert medians["ceiling: AUROC of the exact posterior"] == 1
    assert medians[f"{ours}, lr 0.01: final AUROC"] > 0.8
    for rival in rivals:
        assert 0 < medians[f"to {rival}, lr 0.0002: {ours}, lr 0.01, times faster, cpu"] < math.inf


def test_the_followed_training_is_the_usual_one() -> None:
    """Epoch by epoch, the AUROC is that of the head which the same training without a follower ends with."""
    task, _ = bench_training.make_task(SMALL_COHORT, CLEAR, 0, torch.device("cpu"))
    recipe = our_recipe.Recipe("small", {"head": "abmil", "batch_bags": 4})
    curve = our_recipe.train(recipe, task, 1e-2, 0, epochs=3)
    slides, parts = our_recipe.learned_slides(task)
    bags = Bags([task.slide_ids[slide] for slide in slides], [task.bags[slide] for slide in slides])
    replica = Replica(0, 0, recipe.config(1e-2, 3))
    trained = train_replica(bags, task.labels[slides], replica, parts, task.n_classes, task.device)
    logits = bag_logits([trained.head], Bags(task.slide_ids, task.bags), task.validation, task.device)[0]
    expected = float(auroc(task.labels[task.validation], probabilities(logits).numpy())[0])
    assert curve.aurocs[trained.best_epoch - 1] == pytest.approx(expected, abs=1e-6)
    assert list(curve.wall) == sorted(curve.wall)
    assert len(curve.aurocs) == 3


def test_many_replicas_are_compared_with_lean_training() -> None:
    plan = many_replicas.Plan(SMALL_COHORT, folds=3, seeds=1, epochs=2, timed_replicas=2, timed_epochs=1)
    rows = many_replicas.compare(plan, torch.device("cpu"))
    metrics = {row.metric: row.median for row in rows}
    assert metrics["lean batch 1 / tessera"] > 0
    assert metrics["tessera, arithmetic of training"] > 0
    assert {"tessera, test AUROC", "lean batch 1, test AUROC"} <= set(metrics)
    parts = [many_replicas._parts(40, 3, fold) for fold in range(3)]
    assert (sum((part == "test").astype(int) for part in parts) == 1).all()


def test_every_head_is_timed(tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "r.csv")]
    bench_aggregators.main(["--sizes", "8", "16", "--dim", "16", "--repeats", "1", *out])
    rows = rows_of(tmp_path / "r.csv")
    timed = {row["subject"] for row in rows if row["metric"] == "1 x 16: forward and backward"}
    assert set(list_aggregators()) <= timed
    assert all(float(row["median"]) > 0 for row in rows if "forward" in row["metric"])


def test_a_step_beyond_the_limit_is_left_out(tmp_path: Path) -> None:
    arguments = ["--sizes", "8", "4000", "--dim", "8", "--repeats", "1", "--limit-s", "1e-6", "--heads", "mean"]
    rows = bench_aggregators.main([*arguments, "--out", str(tmp_path / "r.csv")])
    assert [row.metric for row in rows if "left out" in row.metric] == ["1 x 4000: left out, expected"]


def test_quality_on_a_stored_cohort(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Learnable classes: every entrant ranks the test folds; each slide is tested once and chooses nothing there."""
    cohort = make_cohort(n_patients=20, slides_each=1)
    monkeypatch.setattr(glas_quality, "open_store", lambda path: make_store(cohort))
    for name, value in (("FOLDS", 2), ("EPOCHS", 12), ("OWN_LR", {}), ("RECIPE_LR", 1e-2)):
        monkeypatch.setattr(glas_quality, name, value)
    monkeypatch.setattr(glas_quality, "DEFAULTS", our_recipe.Recipe("defaults", {"batch_bags": 2}))
    monkeypatch.setattr(torchmil_peer, "is_installed", lambda: False)
    lines = [
        f"{slide},{patient},{cohort.class_names[label]}"
        for slide, patient, label in zip(cohort.slide_ids, cohort.patient_ids, cohort.labels, strict=True)
    ]
    (tmp_path / "labels.csv").write_text("\n".join(["slide_id,patient_id,subtype", *lines]) + "\n")
    folds = glas_quality.read_folds(tmp_path, tmp_path / "labels.csv", "subtype", torch.device("cpu"))
    assert sorted(np.concatenate([fold.test for fold in folds.parts]).tolist()) == list(range(20))
    for fold in folds.parts:
        assert sorted([*fold.task.training, *fold.validation, *fold.test]) == list(range(20))
        assert fold.task.validation.tolist() == [*fold.validation, *fold.test]
    recipes = [our_recipe.Recipe("ours", {"batch_bags": 1})]
    arguments = ["--store", str(tmp_path), "--labels", str(tmp_path / "labels.csv"), "--target", "subtype"]
    monkeypatch.setattr(bench_training, "RECIPES", recipes)
    grid = ["--grid", "1e-7", "1e-2"]
    rows = bench_training.main([*arguments, "--seeds", "2", *grid, "--out", str(tmp_path / "r.csv")])
    scores = {row.metric.split(":")[0]: row for row in rows if "mean test AUROC of" in row.metric}
    names = ["common recipe", "ours", "defaults", glas_quality.THEIRS.name]
    rates = [f"{name}, {rate}" for rate in ("lr 0.01", "rate chosen") for name in names]
    pools = ["tessera, recipe and rate chosen"]
    assert list(scores) == [*rates, *pools]
    assert all(row.median > 0.7 for row in scores.values())
    taken = [row for row in rows if " takes " in row.metric]
    assert len(taken) == 2 * (len(names) + len(pools))
    assert {row.median for row in taken} == {1e-2}
    assert not any("common recipe" in row.metric for row in taken if row.metric.startswith("tessera"))
    differences = [row for row in rows if " minus " in row.metric]
    assert len(differences) == 3 + 4
    for row in differences:
        ours, theirs = row.metric.split(":")[0].split(" minus ")
        assert row.median == pytest.approx(scores[ours].median - scores[theirs].median, abs=1e-12)
        assert row.low <= row.median <= row.high


def _four_slides_twice() -> glas_quality.Folds:
    """Two folds of the same eight slides: two to train, two to validate, four to test, two patients of two slides."""
    labels, slides = np.array([0, 1, 0, 1, 1, 0, 1, 0]), np.arange(8)
    task = Task([str(slide) for slide in slides], [], labels, slides[:2], slides[2:], 2, torch.device("cpu"))
    part = glas_quality.Fold(task, slides[2:4], slides[4:])
    return glas_quality.Folds("store", ["a", "a", "b", "b", "c", "c", "d", "d"], [part, part])


def _candidate(lr: float, validation: Sequence[bool], test: Sequence[bool], sure: float = 0.9) -> Trained:
    """Per fold: whether the validation and the test part are ranked rightly."""
    right = np.array([[0.5 + sure / 2, 0.5 - sure / 2], [0.5 - sure / 2, 0.5 + sure / 2]])
    said = {}
    for fold, (seen, unseen) in enumerate(zip(validation, test, strict=True)):
        asked = [right if seen else 1 - right, *[1 - right if unseen else right] * 2]
        said[fold] = [np.concatenate(asked)]
    return Trained(f"rate {lr:g}", True, lr, said)


def test_every_fold_takes_what_ranks_its_own_validation_part() -> None:
    """Whatever does better on the test part; the loss decides between equal ranks, and never against a better one."""
    folds = _four_slides_twice()
    good, bad = _candidate(1.0, (True, True), (False, False)), _candidate(2.0, (False, False), (True, True))
    judged = glas_quality.judge("a", folds, [bad, good])
    assert judged.scores().tolist() == [[0.0]]
    assert judged.taken == {0: ("rate 1", 1.0), 1: ("rate 1", 1.0)}
    mixed = _candidate(3.0, (True, False), (True, True)), _candidate(4.0, (False, True), (False, False))
    assert [lr for _, lr in glas_quality.judge("a", folds, mixed).taken.values()] == [3.0, 4.0]
    unsure = _candidate(5.0, (True, True), (True, True), sure=0.1)
    assert glas_quality.judge("a", folds, [unsure, good]).taken[0][1] == 1.0
    wrong_but_unsure = _candidate(6.0, (False, False), (True, True), sure=1e-6)
    assert glas_quality.judge("a", folds, [wrong_but_unsure, unsure]).taken[0][1] == 5.0
    biased = np.array([[0.99, 0.01], [0.98, 0.02]] * 3)
    ranks = Trained("biased", True, 7.0, {0: [biased], 1: [biased]})
    assert glas_quality.judge("a", folds, [wrong_but_unsure, ranks]).taken[0][1] == 7.0


def test_a_rate_outside_the_grid_is_shown_and_never_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The best of a pool may be any of its entrants, and a fold whose test part holds one class is not trained."""
    folds = _four_slides_twice()
    one_class = replace(folds.parts[0], test=np.array([4, 6]))
    pair = np.array([[0.9, 0.1], [0.1, 0.9]])
    right = np.concatenate([pair, 1 - pair, 1 - pair])
    seeds: list[int] = []

    def entrant(name: str, ours: bool, best: float) -> Entrant:
        def train(task: Task, lr: float, seed: int) -> Curve:
            seeds.append(seed)
            return Curve((1.0,), (1.0,), (1.0,), right if lr == best else 1 - right)

        return Entrant(name, ours, train)

    rivals = [entrant("r", False, 1.0), entrant("s", False, 3.0)]
    everybody = [*rivals, entrant("a", True, 5.0), entrant("b", True, 2.0), entrant("c", True, 7.0)]
    monkeypatch.setattr(glas_quality, "_entrants", lambda *_: everybody)
    monkeypatch.setattr(glas_quality, "OWN_LR", {"a": 5.0, "r": 1.0})
    monkeypatch.setattr(glas_quality, "RECIPE_LR", 2.0)
    three = replace(folds, parts=[*folds.parts, one_class])
    found = glas_quality.compare(three, 2, [], [1, 2])
    assert seeds.count(0) == seeds.count(1) == len(seeds) / 2
    rows = {row.metric.removesuffix(" of 2 folds, last epoch"): row for row in found}
    single = {name: rows[f"{name}: mean test AUROC"].median for name in ("r, lr 1", "a, lr 5", "b, lr 2", "c, lr 2")}
    assert single == {"r, lr 1": 1, "a, lr 5": 1, "b, lr 2": 1, "c, lr 2": 0}
    assert rows["a, rate chosen: mean test AUROC"].median == 0
    assert rows["tessera, recipe and rate chosen: mean test AUROC"].median == 1
    assert rows["tessera, recipe and rate chosen: fold 1 takes b at learning rate"].median == 2
    assert rows["rivals, recipe and rate chosen: fold 0 takes r at learning rate"].median == 1
    assert not any("fold 2" in metric for metric in rows)


def test_differences_are_drawn_by_patient_and_averaged_over_seeds_and_folds() -> None:
    """Of patients c and d, the second is ranked wrongly by ours: replicates are their mixtures, all others are 0."""
    folds = _four_slides_twice()
    right, wrong = np.array([[0.9, 0.1], [0.1, 0.9]]), np.array([[0.4, 0.6], [0.6, 0.4]])
    half, whole = 1 - np.concatenate([right, wrong]), 1 - np.concatenate([right, right])
    ours = glas_quality.Judged("o", True, folds, {0: [half, half], 1: [half, half]}, {})
    rival = glas_quality.Judged("r", False, folds, {0: [whole, whole], 1: [whole, whole]}, {})
    assert ours.scores().tolist() == [[0.75], [0.75]]
    weights = np.array([[1, 1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 0, 0, 1, 1], [1, 1, 1, 1, 1, 0, 1, 0]])
    np.testing.assert_array_equal(ours.scores(weights)[0], [1, 0, np.nan])
    row = glas_quality.difference(ours, rival)
    assert (row.median, row.low, row.high, row.n) == (-0.25, -1.0, 0.0, 4)
    other = 1 - np.concatenate([wrong, right])
    row = glas_quality.difference(ours, replace(rival, said={0: [other, other], 1: [other, other]}))
    assert (row.median, row.low, row.high) == (0.0, -1.0, 1.0)
    one_patient = replace(folds, patient_ids=[*"aabb", *"cccc"])
    row = glas_quality.difference(replace(ours, folds=one_patient), replace(rival, folds=one_patient))
    assert (row.median, row.low, row.high) == (-0.25, -0.25, -0.25)
    seeds = glas_quality.Judged("s", True, folds, {0: [whole, 1 - whole], 1: [whole, 1 - whole]}, {})
    assert glas_quality.difference(seeds, rival).median == -0.5


def test_a_run_that_diverged_says_the_same_of_all_slides() -> None:
    task = _four_slides_twice().parts[0].task
    broken = np.full((6, 2), 0.5)
    broken[0] = np.nan
    curve = Curve((1.0,), (1.0,), (math.nan,), broken)
    partly = Entrant("a", False, lambda task, lr, seed: curve)

    def diverge(task: Task, lr: float, seed: int) -> Curve:
        raise TrainingDivergedError("loss is NaN")

    for entrant in (partly, Entrant("b", True, diverge)):
        np.testing.assert_array_equal(glas_quality._last(entrant, task, 1.0, 0), np.full((6, 2), 0.5))


def test_a_curve_keeps_what_was_said_last() -> None:
    labels = np.array([0, 1])
    task = Task(["a", "b"], [], labels, np.arange(2), np.arange(2), 2, torch.device("cpu"))
    writer = CurveWriter(task)
    for logits in (torch.zeros(2, 2), torch.tensor([[9.0, 0.0], [0.0, 0.0]])):
        writer.epoch_done(lambda logits=logits: logits)
    np.testing.assert_allclose(writer.curve().last[:, 1], [1 / (1 + np.exp(9.0)), 0.5])


def test_no_label_outside_the_training_part_reaches_our_training() -> None:
    rng = np.random.default_rng(0)
    bags = [rng.normal(size=(5, 4)).astype(np.float16) for _ in range(12)]
    recipe = our_recipe.Recipe("ours", {"head": {"name": "abmil", "embed_dim": 4}, "batch_bags": 2})

    def last(labels: np.ndarray) -> np.ndarray:
        slides = np.arange(12)
        task = Task([str(slide) for slide in slides], bags, labels, slides[:6], slides[6:], 3, torch.device("cpu"))
        return our_recipe.train(recipe, task, 1e-2, 0, 3).last

    labels = np.arange(12) % 3
    np.testing.assert_array_equal(last(labels), last(np.where(np.arange(12) < 6, labels, 0)))


def test_statistics_are_those_of_scikit_learn_and_are_timed(tmp_path: Path) -> None:
    sizes = ["--patients", "60", "--report-patients", "24", "--replicates", "20", "--looped", "5", "--folds", "2"]
    bench_statistics.main([*sizes, "--seeds", "1", "--repeats", "1", "--out", str(tmp_path / "r.csv")])
    medians = {row["metric"]: float(row["median"]) for row in rows_of(tmp_path / "r.csv")}
    apart = [value for metric, value in medians.items() if metric.startswith("largest difference")]
    assert len(apart) == 4
    assert max(apart) < 1e-9
    assert medians["20 resamples: tessera, times faster"] > 0
    assert medians["report: page, SVG and PNG figures"] > 0
    assert {"2000 resamples: calibration", "2000 resamples: abstention"} <= set(medians)


def test_every_extra_is_timed_beside_the_bare_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras_cost, "EXTRAS", {name: extras_cost.EXTRAS[name] for name in ("noise", "lookahead")})
    rows = extras_cost.compare(CohortSize(20, 20, 60, 8), epochs=2, repeats=2)
    metrics = {row.metric: row for row in rows}
    assert metrics["all off: time of the bare loop"].median > 0
    assert {"noise: time of all off", "lookahead: time of all off"} <= set(metrics)
    assert all(row.n == 2 for row in rows)


def test_every_extra_is_another_configuration_than_the_plain_one() -> None:
    plain = extras_cost._config(5, {})
    for name, options in extras_cost.EXTRAS.items():
        assert extras_cost._config(5, options) != plain, name
