"""External cohorts: scored on what the model never met, and loud about what it did."""

import csv
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mil.deployment.external import ExternalEvaluation, evaluate_external
from mil.deployment.inference import predict
from mil.deployment.packing import pack
from mil.errors import CheckpointError, CohortError, RunError
from mil.experiments.crossval import train
from mil.runs.ensemble import make_ensemble
from mil.statistics import classification as statistics
from tests.test_mil.small import FEATURES, MemoryStore, make_cohort, make_features, make_store

COHORT = make_cohort(18)
OPTIONS = {"folds": 3, "seeds": 1, "epochs": 2, "device": "cpu"}
NAMES = ("Luminal A", "triple-negative")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    head = {"name": "abmil", "embed_dim": 8, "attention_dim": 4}
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(make_store(COHORT), COHORT, head=head, **OPTIONS).save(folder)
    return folder


@pytest.fixture(scope="module")
def model(run: Path) -> Path:
    return pack(run, run.parent / "model", coverage=0.8).folder


@pytest.fixture(scope="module")
def external() -> MemoryStore:
    labels = np.arange(12) % 2
    return MemoryStore({f"ext {at:02d}": bag for at, bag in enumerate(make_features(12, labels, seed=7))})


def write_labels(path: Path, rows: Sequence[tuple[str, str, str]]) -> Path:
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("slide_id", "patient_id", "truth"), *rows])
    return path


def rows_of(store: MemoryStore) -> list[tuple[str, str, str]]:
    return [(slide, f"q{at // 2}", NAMES[at % 2]) for at, slide in enumerate(sorted(store.slides))]


@pytest.fixture
def labels(external: MemoryStore, tmp_path: Path) -> Path:
    return write_labels(tmp_path / "labels.csv", rows_of(external))


def test_figures_are_those_of_its_predictions(
    run: Path, model: Path, external: MemoryStore, labels: Path, tmp_path: Path
) -> None:
    for folder in (run, model):
        found = evaluate_external(folder, external, labels, "truth", device="cpu")
        said = predict(folder, external, slide_ids=found.cohort.slide_ids, device="cpu")
        patients = [row[1] for row in rows_of(external)]
        expected = statistics.evaluate(np.arange(12) % 2, said.probabilities, patients, NAMES)
        assert found.metrics["external"] == expected
        assert found.metrics["trained_on"] == 0
    assert found.metrics["abstention"]["below"] == said.abstain_below
    found.save(tmp_path / "out")
    with open(tmp_path / "out" / "predictions.csv", encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["predicted"] for row in table] == said.predicted
    assert [row["target"] for row in table] == [NAMES[at % 2] for at in range(12)]
    assert [row["abstained"] == "true" for row in table] == said.abstained.tolist()


def test_looks_are_counted(run: Path, external: MemoryStore, labels: Path, tmp_path: Path) -> None:
    found = evaluate_external(run, external, labels, "truth", device="cpu")
    assert [found.save(tmp_path / name).metrics["looks"] for name in "ab"] == [1, 2]
    assert json.loads((tmp_path / "b" / "metrics.json").read_text())["looks"] == 2
    with pytest.raises(RunError, match="not empty"):
        found.save(tmp_path / "a")


def test_labels_keep_the_models_order_of_classes(run: Path, external: MemoryStore, tmp_path: Path) -> None:
    swapped = [(slide, patient, NAMES[1 - NAMES.index(name)]) for slide, patient, name in rows_of(external)]
    right = evaluate_external(run, external, write_labels(tmp_path / "a.csv", rows_of(external)), "truth", device="cpu")
    wrong = evaluate_external(run, external, write_labels(tmp_path / "b.csv", swapped), "truth", device="cpu")
    scores = [each.metrics["external"]["accuracy"]["value"] for each in (right, wrong)]
    assert sum(scores) == pytest.approx(1)
    assert scores[0] > 0.5


def test_labels_index_the_models_classes_where_the_table_lacks_some(external: MemoryStore, tmp_path: Path) -> None:
    names = ("Absent", *NAMES)
    labels = (np.arange(36) // 2 % 3).astype(np.int64)
    cohort = replace(COHORT, labels=labels, class_names=names)
    store = MemoryStore(dict(zip(cohort.slide_ids, make_features(36, labels), strict=True)))
    train(store, cohort, head="mean", **OPTIONS).save(tmp_path / "run")
    table = write_labels(tmp_path / "l.csv", rows_of(external))
    found = evaluate_external(tmp_path / "run", external, table, "truth", device="cpu")
    assert [found.cohort.class_names[label] for label in found.cohort.labels] == [NAMES[at % 2] for at in range(12)]
    assert found.metrics["external"]["classes"]["Absent"]["support"] == 0
    assert found.metrics["external"]["classes"][NAMES[0]]["support"] == 6


def test_classes_that_the_model_does_not_know_are_listed(run: Path, external: MemoryStore, tmp_path: Path) -> None:
    strange = [(slide, f"q{at}", ("luminal a", "benign")[at % 2]) for at, slide in enumerate(sorted(external.slides))]
    with pytest.raises(CohortError, match=r"'benign', 'luminal a'.*does not know") as caught:
        evaluate_external(run, external, write_labels(tmp_path / "a.csv", strange), "truth", device="cpu")
    assert "'Luminal A'" in str(caught.value)
    rows = [*rows_of(external)[:-2], ("ext 10", "q5", "benign"), ("ext 11", "q8", "benign")]
    mixed = write_labels(tmp_path / "b.csv", rows)
    found = evaluate_external(run, external, mixed, "truth", device="cpu", classes=NAMES)
    assert len(found.cohort) == 10
    assert ("rows of a class that was not asked for", 2, ["ext 10", "ext 11"]) in found.metrics["attrition"]


@pytest.mark.parametrize(
    ("slide", "patient", "shown"),
    [("siteB/SLIDE 07.svs", "q0", "siteB/SLIDE 07.svs"), ("ext 00", "p3", "'p3'")],
    ids=["slide", "patient"],
)
def test_what_was_trained_on_is_refused_dropped_or_marked(
    run: Path, model: Path, external: MemoryStore, tmp_path: Path, slide: str, patient: str, shown: str
) -> None:
    slides = {slide if name == "ext 00" else name: bag for name, bag in external.slides.items()}
    store = replace(external, slides=slides)
    # both slides of the patient are known by the patient, one by its own name
    rows = [
        (slide if name == "ext 00" else name, patient if who == "q0" else who, label)
        for name, who, label in rows_of(external)
    ]
    n_known = 2 if patient == "p3" else 1
    table = write_labels(tmp_path / "labels.csv", rows)
    for folder in (run, model):
        with pytest.raises(RunError, match="was trained on") as caught:
            evaluate_external(folder, store, table, "truth", device="cpu")
        assert shown in str(caught.value)
        dropped = evaluate_external(folder, store, table, "truth", device="cpu", overlap="drop")
        assert len(dropped.cohort) == 12 - n_known
        assert dropped.metrics["attrition"][-2][1] == n_known
        assert dropped.metrics["external"]["n_slides"] == 12 - n_known
        marked = evaluate_external(folder, store, table, "truth", device="cpu", overlap="mark")
        assert marked.metrics["trained_on"] == n_known == marked.trained_on.sum()
        assert "NOT of an external cohort" in marked.metrics["warnings"][0]


def test_the_training_cohort_itself_leaves_nothing(run: Path, tmp_path: Path) -> None:
    rows = [
        (slide, patient, NAMES[label])
        for slide, patient, label in zip(COHORT.slide_ids, COHORT.patient_ids, COHORT.labels, strict=True)
    ]
    table = write_labels(tmp_path / "labels.csv", rows)
    with pytest.raises(RunError, match="evaluate another cohort"):
        evaluate_external(run, make_store(COHORT), table, "truth", device="cpu", overlap="drop")


def test_an_ensemble_knows_the_slides_of_all_members(
    run: Path, external: MemoryStore, labels: Path, tmp_path: Path
) -> None:
    other = train(make_store(COHORT), COHORT, head="mean", **OPTIONS).save(tmp_path / "mean")
    folder = make_ensemble([run, other.folder]).save(tmp_path / "both")
    found = evaluate_external(folder, external, labels, "truth", device="cpu")
    assert found.metrics["head"] == "abmil, mean"
    rows = [(slide, patient.replace("q", "p"), name) for slide, patient, name in rows_of(external)]
    with pytest.raises(RunError, match="was trained on"):
        evaluate_external(folder, external, write_labels(tmp_path / "l.csv", rows), "truth", device="cpu")


def test_slides_without_features_go_to_the_attrition(run: Path, external: MemoryStore, tmp_path: Path) -> None:
    rows = [*rows_of(external), ("ext 77", "q9", NAMES[0])]
    found = evaluate_external(run, external, write_labels(tmp_path / "l.csv", rows), "truth", device="cpu")
    assert ("rows whose slide is not in the store", 1, ["ext 77"]) in found.metrics["attrition"]


def test_wrong_input_is_named(run: Path, external: MemoryStore, labels: Path, tmp_path: Path) -> None:
    with pytest.raises(CohortError, match="did you mean 'truth'"):
        evaluate_external(run, external, labels, "thruth", device="cpu")
    with pytest.raises(RunError, match="did you mean 'drop'"):
        evaluate_external(run, external, labels, "truth", device="cpu", overlap="drp")
    with pytest.raises(RunError, match=r"no metrics\.json"):
        evaluate_external(tmp_path, external, labels, "truth", device="cpu")
    other = replace(external, recipes={"tiny": replace(FEATURES, revision="2")})
    with pytest.raises(CheckpointError, match="revision: 1 → 2"):
        evaluate_external(run, other, labels, "truth", device="cpu")


def test_a_class_of_one_patient_or_of_none_can_be_evaluated(run: Path, external: MemoryStore, tmp_path: Path) -> None:
    slides = sorted(external.slides)
    one = [(slide, "q0" if at == 1 else f"q{at}", NAMES[int(at == 1)]) for at, slide in enumerate(slides)]
    found = evaluate_external(run, external, write_labels(tmp_path / "a.csv", one), "truth", device="cpu")
    scores = found.metrics["external"]
    assert scores["macro_f1"]["value"] is not None
    assert scores["macro_f1"]["low"] is None
    assert any("has 1 patient" in text for text in scores["warnings"])
    alone = [(slide, f"q{at}", NAMES[0]) for at, slide in enumerate(slides)]
    found = evaluate_external(run, external, write_labels(tmp_path / "b.csv", alone), "truth", device="cpu")
    assert found.metrics["external"]["auroc"]["value"] is None
    assert any("has no slides" in text for text in found.metrics["external"]["warnings"])
    assert "all 12 slides are of class 'Luminal A'" in found.metrics["warnings"][0]
    assert not any("are of class" in text for text in evaluate_both(run, external, tmp_path).metrics["warnings"])


def evaluate_both(run: Path, external: MemoryStore, folder: Path) -> ExternalEvaluation:
    return evaluate_external(run, external, write_labels(folder / "c.csv", rows_of(external)), "truth", device="cpu")


def test_what_the_weights_started_from_counts_too(run: Path, external: MemoryStore, tmp_path: Path) -> None:
    cohort = replace(COHORT, slide_ids=tuple(f"b {at}" for at in range(36)), patient_ids=tuple("abcdefghi" * 4))
    labels = np.array(["abcdefghi".index(who) % 2 for who in cohort.patient_ids], dtype=np.int64)
    cohort = replace(cohort, labels=labels)
    store = MemoryStore(dict(zip(cohort.slide_ids, make_features(36, labels), strict=True)))
    start = shutil.copytree(run, tmp_path / "start") / "checkpoints" / "fold0-seed0.safetensors"
    head = {"name": "abmil", "embed_dim": 8, "attention_dim": 4}
    later = train(store, cohort, head=head, init=str(start), **OPTIONS | {"folds": 2}).save(tmp_path / "later").folder
    rows = [("slide 03" if name == "ext 00" else name, who, label) for name, who, label in rows_of(external)]
    slides = {"slide 03" if name == "ext 00" else name: bag for name, bag in external.slides.items()}
    table, known = write_labels(tmp_path / "l.csv", rows), replace(external, slides=slides)
    with pytest.raises(RunError, match="got 1 of 12 slides that the model was trained on"):
        evaluate_external(later, known, table, "truth", device="cpu")
    shutil.rmtree(tmp_path / "start")
    found = evaluate_external(later, known, table, "truth", device="cpu")
    assert "the weights grew from" in found.metrics["warnings"][0]
