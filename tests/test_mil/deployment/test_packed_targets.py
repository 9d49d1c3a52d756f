"""Models of labels, numbers and survival at work: packed, averaged, exported, and scored on other cohorts."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import expit, logit

from mil.cohort.cohort import Attrition, Cohort
from mil.cohort.targets import MULTI_LABEL, REGRESSION, SURVIVAL
from mil.deployment.artefact import Artefact, read_artefact
from mil.deployment.cohort_counts import describe_targets
from mil.deployment.external import evaluate_external
from mil.deployment.inference import predict
from mil.deployment.model_card import write_card
from mil.deployment.packing import pack
from mil.errors import CohortError, RunError
from mil.evaluation.averaging import combine
from mil.evaluation.temperature import (
    apply_label_temperature,
    fit_label_temperature,
    scale_temperatures,
)
from mil.experiments.crossval import train
from mil.files import write_csv
from mil.runs.ensemble import make_ensemble
from mil.runs.run_folder import read_predictions
from mil.statistics.multi_label import evaluate_multi_label
from mil.statistics.regression import evaluate_regression
from mil.statistics.survival import evaluate_survival
from tests.test_mil.small import MemoryStore
from tests.test_mil.training.test_tasks import SETTINGS, TARGETS, make_task_cohort

FAST = SETTINGS | {"epochs": 3}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """Two runs of each task, of the same folds and other heads, not to be changed."""
    folder, found = tmp_path_factory.mktemp("runs"), {}
    for task in TARGETS:
        store, cohort = make_task_cohort(task)
        for head in (SETTINGS["head"], "mean"):
            name = f"{task} {head if isinstance(head, str) else 'abmil'}"
            train(store, cohort, **FAST | {"head": head, "seeds": 2}).save(folder / name)
        found[task] = [folder / f"{task} abmil", folder / f"{task} mean"]
    return found


@pytest.fixture(scope="module")
def models(runs: dict[str, list[Path]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artefact]:
    """The first run of each task, packed."""
    folder = tmp_path_factory.mktemp("models")
    return {task: pack(runs[task][0], folder / task) for task in TARGETS}


def header(path: Path) -> list[str]:
    with path.open(encoding="utf-8", newline="") as file:
        return next(csv.reader(file))


def change_risks(run: Path, folder: Path, change: Any) -> Path:
    """A copy of a run whose predictions.csv says other risks; ``change`` is given the row and its risk."""
    shutil.copytree(run, folder)
    with (folder / "predictions.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    table = [[*list(row.values())[:-1], repr(float(change(row, float(row["risk"]))))] for row in rows]
    write_csv(folder / "predictions.csv", [list(rows[0]), *table])
    return folder


# ---------------------------------------------------------------------------------------------- packed runs


@pytest.mark.parametrize("task", TARGETS)
def test_a_packed_model_says_what_its_run_was_worth(
    models: dict[str, Artefact], runs: dict[str, list[Path]], task: str
) -> None:
    record = read_artefact(models[task].folder).record
    of_run = json.loads((runs[task][0] / "metrics.json").read_text())["out_of_fold"]
    headline = {MULTI_LABEL: "macro_auroc", REGRESSION: "r2", SURVIVAL: "concordance"}[task]
    assert (record["task"], record["columns"], record["class_names"]) == (task, TARGETS[task].split(","), [])
    if task == MULTI_LABEL:
        assert record["out_of_fold_uncalibrated"] == of_run
        scaled = scale_temperatures(read_predictions(runs[task][0]))
        cohort, said = scaled.predictions.tested()
        assert record["out_of_fold"] == evaluate_multi_label(cohort.values, said, cohort.patient_ids, cohort.columns)
        assert list(models[task].temperatures.values()) == list(scaled.temperatures)
        assert set(record["calibration"]["out_of_fold"]) == set(cohort.columns)
    else:
        for key in ("value", "low", "high"):
            assert record["out_of_fold"][headline][key] == pytest.approx(of_run[headline][key], rel=1e-6)
        assert record["calibration"] is None
        assert set(models[task].temperatures.values()) == {1.0}
    assert record["replicas"][0]["task"]["task"] == task


@pytest.mark.parametrize("task", TARGETS)
def test_a_packed_model_predicts_as_its_run(
    models: dict[str, Artefact], runs: dict[str, list[Path]], tmp_path: Path, task: str
) -> None:
    store, _ = make_task_cohort(task)
    found, of_run = (predict(each, store, device="cpu") for each in (models[task].folder, runs[task][0]))
    for name, each in (("model", found), ("run", of_run)):
        each.write_csv(tmp_path / name)
    assert header(tmp_path / "model") == header(tmp_path / "run") == ["slide_id", *of_run.value_names]
    if task != MULTI_LABEL:
        np.testing.assert_array_equal(found.probabilities, of_run.probabilities)
        return
    alone = [predict(runs[task][0], store, replicas=[name], device="cpu") for name in found.replicas]
    values = [expit(logit(each.probabilities) / models[task].temperatures[each.replicas[0]]) for each in alone]
    np.testing.assert_allclose(found.probabilities, np.mean(values, axis=0), rtol=1e-6)


@pytest.mark.parametrize("task", TARGETS)
@pytest.mark.parametrize("wish", [{"coverage": 0.9}, {"accuracy": 0.9}, {"abstain_below": 0.6}])
def test_only_classes_are_abstained_from(
    runs: dict[str, list[Path]], tmp_path: Path, task: str, wish: dict[str, float]
) -> None:
    option = next(iter(wish)).replace("_", "-")
    with pytest.raises(RunError, match=rf"got {option}=0\.\d for a run of task {task} → .* leave --{option} out"):
        pack(runs[task][0], tmp_path / "model", **wish)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("task", TARGETS)
def test_the_card_speaks_of_the_target(models: dict[str, Artefact], task: str) -> None:
    text = (models[task].folder / "README.md").read_text(encoding="utf-8")
    assert text == write_card(models[task].record)
    parts = {
        MULTI_LABEL: ("each as the probability of a yes", "| her2 | 34 |", "| mean AUROC |", "temperature scaling"),
        REGRESSION: ("as a number in the unit", "| R² |", "a number is no probability"),
        SURVIVAL: ("the **risk** of **died**", "| concordance index |", "a risk is no probability"),
    }[task]
    for part in parts:
        assert part in text, part
    assert "stratum" not in text
    assert "part 1" not in text
    # several columns are none that could be named so
    assert "--labels LABELS --out FOLDER" in text


@pytest.mark.parametrize("n", [4, 24, 28, 30])
def test_the_median_time_is_where_half_have_died(n: int) -> None:
    """Of 24 patients, products of shares leave 0.5 and a little more."""
    ids = tuple(f"p{at:02d}" for at in range(n))
    values = np.stack([np.arange(1.0, n + 1), np.ones(n)], axis=1)
    cohort = Cohort(ids, ids, np.zeros(n, dtype=np.int64), ("a",), "months,died", Attrition(n, n), SURVIVAL, values)
    assert describe_targets(cohort) == {"died": {"patients": n, "events": n, "longest": n, "median": n / 2}}


def test_one_temperature_of_all_labels_is_the_best() -> None:
    rng = np.random.default_rng(0)
    truth = (rng.random((400, 3)) < 0.5).astype(float)
    chances = expit(3 * (rng.normal(size=truth.shape) + truth - 0.5))
    truth[::5, 1] = np.nan

    def loss(log_t: float) -> float:
        scaled, known = apply_label_temperature(chances, float(np.exp(log_t))), np.isfinite(truth)
        return float(-np.log(np.where(truth == 1, scaled, 1 - scaled)[known]).mean())

    best = minimize_scalar(loss, bounds=(-3, 3), method="bounded", options={"xatol": 1e-9})
    found = fit_label_temperature(chances, truth)
    assert found == pytest.approx(np.exp(best.x), rel=1e-4)
    # what is unknown has no say
    chances[::5, 1] = 0.999
    assert fit_label_temperature(chances, truth) == found


def test_temperatures_of_labels_come_from_validation_parts(runs: dict[str, list[Path]]) -> None:
    said = read_predictions(runs[MULTI_LABEL][0])
    expected = scale_temperatures(said).temperatures
    spoiled = np.where((said.parts == "validation")[..., None], said.probabilities, 0.5)
    assert scale_temperatures(replace(said, values=spoiled)).temperatures == expected
    spoiled = np.where((said.parts == "validation")[..., None], 0.3, said.probabilities)
    assert scale_temperatures(replace(said, values=spoiled)).temperatures != expected


# ---------------------------------------------------------------------------------------------- ensembles


@pytest.mark.parametrize("average", ["probabilities", "logits"])
def test_labels_are_averaged_one_by_one(average: str) -> None:
    one, other = np.array([[0.9, 0.2]]), np.array([[0.5, 0.2]])
    found = combine([one, other], average, MULTI_LABEL)
    expected = (one + other) / 2 if average == "probabilities" else expit((logit(one) + logit(other)) / 2)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("task", [MULTI_LABEL, REGRESSION])
def test_an_ensemble_is_the_mean_of_its_members(runs: dict[str, list[Path]], tmp_path: Path, task: str) -> None:
    made = make_ensemble(runs[task])
    said = [read_predictions(run).out_of_fold() for run in runs[task]]
    np.testing.assert_allclose(made.probabilities, np.mean(said, axis=0), rtol=1e-12)
    evaluate = evaluate_multi_label if task == MULTI_LABEL else evaluate_regression
    cohort = made.cohort
    expected = evaluate(cohort.values, made.probabilities, cohort.patient_ids, cohort.columns)
    assert made.metrics["out_of_fold"] == expected
    headline = {MULTI_LABEL: "macro_auroc", REGRESSION: "r2"}[task]
    for member in made.metrics["members"]:
        gain = expected[headline]["value"] - member[headline]["value"]
        assert member[f"gain_{headline}"]["difference"] == pytest.approx(gain, abs=1e-6)
    folder = made.save(tmp_path / "both")
    assert header(folder / "oof.csv") == header(runs[task][0] / "oof.csv")


def test_the_unit_of_a_members_risks_does_not_matter(runs: dict[str, list[Path]], tmp_path: Path) -> None:
    """Each fold's Cox model has a baseline, and each member a unit, of its own."""
    first, second = runs[SURVIVAL]
    other = change_risks(second, tmp_path / "other", lambda row, risk: 1000 * risk + 7 * int(row["fold"]))
    one, two = make_ensemble([first, second]), make_ensemble([first, other])
    np.testing.assert_allclose(one.probabilities, two.probabilities, atol=1e-5)
    assert one.metrics["out_of_fold"] == two.metrics["out_of_fold"]
    # without scales the second would decide alone
    alone = make_ensemble([second, other]).metrics["out_of_fold"]["concordance"]
    assert one.metrics["out_of_fold"]["concordance"]["value"] != alone["value"]
    assert alone["value"] == one.metrics["members"][1]["concordance"]["value"]


def test_slides_that_a_fold_tests_have_no_say_in_its_scale(runs: dict[str, list[Path]], tmp_path: Path) -> None:
    run = runs[SURVIVAL][0]
    other = change_risks(run, tmp_path / "other", lambda row, risk: risk if row["split"] == "validation" else 9.0)
    for fold in (0, 1, None):
        assert read_predictions(run).scale(fold) == read_predictions(other).scale(fold)
    # rounding gives 0.1, as often as a fold has it, a deviation of 1e-17
    for flat, risk in (("zero", 0.0), ("tenth", 0.1)):
        change_risks(run, tmp_path / flat, lambda row, _, risk=risk: risk if row["fold"] == "1" else _)
        with pytest.raises(RunError, match="run of abmil whose risks are the same for all of fold 1 validation slides"):
            make_ensemble([runs[SURVIVAL][1], tmp_path / flat])


@pytest.mark.parametrize("task", TARGETS)
def test_an_ensemble_is_a_look_at_the_cohort_of_its_members(
    runs: dict[str, list[Path]], tmp_path: Path, task: str
) -> None:
    shutil.copy(runs[task][0].parent / "looks.jsonl", tmp_path)
    folder = make_ensemble(runs[task]).save(tmp_path / "both")
    assert json.loads((folder / "metrics.json").read_text())["looks"] == 3


@pytest.mark.parametrize("task", TARGETS)
def test_what_cannot_be_told_of_a_member_is_left_empty(runs: dict[str, list[Path]], tmp_path: Path, task: str) -> None:
    """Nobody has the event, all have a label, or one number: no headline is defined, and no gain in it."""
    copies = [shutil.copytree(run, tmp_path / run.name) for run in runs[task]]
    same = {MULTI_LABEL: {"target_er": 1, "target_her2": 1}, REGRESSION: {"target_ki67": 5}}
    for copy in copies:
        with (copy / "predictions.csv").open(encoding="utf-8", newline="") as file:
            rows = [row | same.get(task, {"target_died": 0}) for row in csv.DictReader(file)]
        write_csv(copy / "predictions.csv", [list(rows[0]), *(list(row.values()) for row in rows)])
    made = make_ensemble(copies)
    made.save(tmp_path / "both")
    (gain,) = (value for key, value in made.metrics["members"][0].items() if key.startswith("gain_"))
    assert gain == {"difference": None, "low": None, "high": None}


def test_members_for_survival_share_their_folds(runs: dict[str, list[Path]], tmp_path: Path) -> None:
    store, cohort = make_task_cohort(SURVIVAL)
    train(store, cohort, **FAST | {"folds": 3}).save(tmp_path / "three")
    with pytest.raises(RunError, match="tested in different folds → expected the same folds"):
        make_ensemble([runs[SURVIVAL][0], tmp_path / "three"])


def test_columns_are_matched_by_name(runs: dict[str, list[Path]], tmp_path: Path) -> None:
    store, cohort = make_task_cohort(MULTI_LABEL)
    assert cohort.values is not None
    turned = replace(cohort, target="her2,er", values=cohort.values[:, ::-1])
    train(store, turned, **FAST).save(tmp_path / "turned")
    first = runs[MULTI_LABEL][0]
    folder = make_ensemble([first, tmp_path / "turned"]).save(tmp_path / "both")
    members = [predict(each, store, device="cpu") for each in (first, tmp_path / "turned")]
    expected = (members[0].probabilities + members[1].probabilities[:, ::-1]) / 2
    np.testing.assert_allclose(predict(folder, store, device="cpu").probabilities, expected, rtol=1e-12)
    made = make_ensemble([first, tmp_path / "turned"])
    alone = read_predictions(tmp_path / "turned").out_of_fold()[:, ::-1]
    mean = (read_predictions(first).out_of_fold() + alone) / 2
    np.testing.assert_allclose(made.probabilities, mean, rtol=1e-12)


def test_members_of_other_targets_are_refused(runs: dict[str, list[Path]], tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"of task regression, target ki67, and .* of task multilabel, target er,her2"):
        make_ensemble([runs[REGRESSION][0], runs[MULTI_LABEL][0]])
    for task in (REGRESSION, SURVIVAL):
        with pytest.raises(RunError, match=f"average=logits for runs of task {task} → .*leave --average out"):
            make_ensemble(runs[task], "logits")
    store, cohort = make_task_cohort(REGRESSION)
    train(store, replace(cohort, target="grade"), **FAST).save(tmp_path / "grade")
    with pytest.raises(RunError, match="the same columns"):
        make_ensemble([runs[REGRESSION][0], tmp_path / "grade"])
    folder = make_ensemble(runs[REGRESSION]).save(tmp_path / "both")
    with pytest.raises(RunError, match="name its members instead"):
        make_ensemble([folder, runs[REGRESSION][0]])


@pytest.mark.parametrize("task", TARGETS)
def test_a_packed_ensemble_averages_its_packed_members(runs: dict[str, list[Path]], tmp_path: Path, task: str) -> None:
    store, _ = make_task_cohort(task)
    folder = make_ensemble(runs[task]).save(tmp_path / "both")
    model = pack(folder, tmp_path / "model")
    found = predict(model.folder, store, device="cpu")
    members = [predict(model.folder / "members" / name, store, device="cpu") for name in ("1-abmil", "2-mean")]
    values = [each.probabilities for each in members]
    if task == SURVIVAL:
        scales = [read_predictions(run).scale() for run in runs[task]]
        values = [(each - scale.centre) / scale.deviation for each, scale in zip(values, scales, strict=True)]
    np.testing.assert_allclose(found.probabilities, np.mean(values, axis=0), rtol=1e-9)
    assert found.value_names == members[0].value_names
    if task != MULTI_LABEL:
        np.testing.assert_array_equal(predict(folder, store, device="cpu").probabilities, found.probabilities)
    assert "of 2 members, each the mean of its replicas" in (model.folder / "README.md").read_text(encoding="utf-8")


# ---------------------------------------------------------------------------------------------- other cohorts


def external(task: str) -> tuple[MemoryStore, Cohort, list[list[str]]]:
    """Slides that no training met, and the rows of their label table."""
    store, cohort = make_task_cohort(task, seed=5)
    assert cohort.values is not None
    cells = [["" if np.isnan(value) else repr(value) for value in row] for row in cohort.values.tolist()]
    ids = [f"ext {slide_id}" for slide_id in cohort.slide_ids]
    store = MemoryStore(dict(zip(ids, store.slides.values(), strict=True)))
    return store, cohort, [[slide_id, f"x{slide_id}", *row] for slide_id, row in zip(ids, cells, strict=True)]


@pytest.mark.parametrize("task", TARGETS)
def test_other_cohorts_are_scored_by_what_is_predicted(models: dict[str, Artefact], tmp_path: Path, task: str) -> None:
    store, cohort, rows = external(task)
    names = ["slide_id", "patient_id", *TARGETS[task].split(",")]
    write_csv(tmp_path / "labels.csv", [names, *rows])
    found = evaluate_external(models[task].folder, store, tmp_path / "labels.csv", device="cpu").save(tmp_path / "out")
    said = predict(models[task].folder, store, device="cpu").probabilities
    patients = [row[1] for row in rows]
    if task == SURVIVAL:
        expected = evaluate_survival(cohort.values, said[:, 0], patients)
    else:
        evaluate = evaluate_multi_label if task == MULTI_LABEL else evaluate_regression
        expected = evaluate(cohort.values, said, patients, cohort.columns)
    assert found.metrics["external"] == expected
    assert found.metrics["task"] == task
    assert (found.metrics["calibration"] is not None) == (task == MULTI_LABEL)
    own = predict(models[task].folder, store, device="cpu").value_names
    truth = [f"target_{name}" for name in names[2:]]
    assert header(tmp_path / "out" / "predictions.csv") == ["slide_id", "patient_id", *truth, *own, "trained_on"]


def test_a_patient_with_two_times_is_refused(models: dict[str, Artefact], tmp_path: Path) -> None:
    store, _, rows = external(SURVIVAL)
    rows[1][1] = rows[0][1]
    write_csv(tmp_path / "labels.csv", [["slide_id", "patient_id", "months", "died"], *rows])
    with pytest.raises(CohortError, match=r"labels\.csv: got patient 'xext s00' with 2 different pairs"):
        evaluate_external(models[SURVIVAL].folder, store, tmp_path / "labels.csv", device="cpu")


def test_columns_of_other_tables_are_found_by_name_or_place(models: dict[str, Artefact], tmp_path: Path) -> None:
    store, _, rows = external(MULTI_LABEL)
    model = models[MULTI_LABEL].folder
    write_csv(tmp_path / "a.csv", [["slide_id", "patient_id", "er", "her2"], *rows])
    write_csv(tmp_path / "b.csv", [["slide_id", "patient_id", "ER status", "HER2 status"], *rows])
    expected = evaluate_external(model, store, tmp_path / "a.csv", device="cpu").metrics
    turned = evaluate_external(model, store, tmp_path / "a.csv", "her2, er", device="cpu").metrics
    assert turned["external"] == expected["external"]
    renamed = evaluate_external(model, store, tmp_path / "b.csv", "ER status,HER2 status", device="cpu").metrics
    assert renamed["external"]["macro_auroc"] == expected["external"]["macro_auroc"]
    assert "'ER status' as 'er', 'HER2 status' as 'her2'" in renamed["warnings"][0]
    for table, target, problem in (
        ("b.csv", None, "'er' as target column"),
        ("a.csv", "er", "or as many others in this order"),
        ("a.csv", "her2,patient_id", "or as many others in this order"),
        ("a.csv", "er,patient_id", "as target and as id column"),
    ):
        with pytest.raises(CohortError, match=problem):
            evaluate_external(model, store, tmp_path / table, target, device="cpu")
    with pytest.raises(CohortError, match="survival 'months,died' → expected these columns"):
        evaluate_external(models[SURVIVAL].folder, store, tmp_path / "a.csv", "died,months", device="cpu")


def test_a_submission_holds_one_number_or_is_refused(models: dict[str, Artefact], tmp_path: Path) -> None:
    store, _ = make_task_cohort(REGRESSION)
    found = predict(models[REGRESSION].folder, store, device="cpu")
    found.write_submission(tmp_path / "s.csv", ("case", "ki67"))
    with (tmp_path / "s.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    np.testing.assert_allclose([float(row["ki67"]) for row in rows], found.probabilities[:, 0], rtol=1e-8)
    assert [row["case"] for row in rows] == list(found.slide_ids)
    with pytest.raises(RunError, match="label map for a model of a number"):
        found.write_submission(tmp_path / "t.csv", label_map={"a": "1"})
    for task in (MULTI_LABEL, SURVIVAL):
        said = predict(models[task].folder, store, device="cpu")
        with pytest.raises(RunError, match="leave --format submission out"):
            said.write_submission(tmp_path / "t.csv")
        with pytest.raises(RunError, match=f"got predictions of '{said.value_names[0]}'.* → expected classes"):
            _ = said.predicted
    assert not (tmp_path / "t.csv").exists()


# ---------------------------------------------------------------------------------------------- ONNX


def in_words(task: dict[str, Any], logits: np.ndarray, temperature: float) -> np.ndarray:
    """What onnx.json says that becomes of a file's logits."""
    if task["task"] == MULTI_LABEL:
        return expit(logits / temperature)
    if task["task"] == REGRESSION:
        return logits * task["deviation"] + task["mean"]
    return -np.cumprod(1 - expit(logits), axis=1).sum(axis=1, keepdims=True)


@pytest.mark.parametrize("task", TARGETS)
def test_an_exported_head_says_how_logits_become_values(models: dict[str, Artefact], tmp_path: Path, task: str) -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    import onnxruntime

    from mil.deployment.onnx_export import export_onnx

    store, _ = make_task_cohort(task)
    export_onnx(models[task].folder, tmp_path / "out", replicas=["fold1-seed0"])
    written = json.loads((tmp_path / "out" / "onnx.json").read_text())
    assert (written["task"], written["columns"]) == (task, TARGETS[task].split(","))
    bag, values = store.slides["s05"].astype(np.float32), []
    for each in written["files"]:
        session = onnxruntime.InferenceSession((tmp_path / "out" / each["file"]).read_bytes())
        logits = session.run(["logits"], {"instances": bag})[0]
        values.append(in_words(each["task"], logits.astype(np.float64), each["temperature"]))
    replicas = [each["replica"] for each in written["files"]]
    expected = predict(models[task].folder, store, slide_ids=["s05"], device="cpu", replicas=replicas)
    np.testing.assert_allclose(np.mean(values, axis=0), expected.probabilities, rtol=1e-4)
    assert written["value_names"] == list(expected.value_names)
