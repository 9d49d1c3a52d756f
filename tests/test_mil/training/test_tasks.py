"""Training on labels, numbers and survival: what is learned, written, read back and refused."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from aggregators import list_aggregators
from mil.bags.bags import Bags
from mil.cohort.cohort import Attrition, Cohort
from mil.cohort.targets import find_strata
from mil.config.compose import compose_config
from mil.deployment.inference import predict
from mil.errors import CohortError, ConfigError
from mil.experiments.crossval import train
from mil.training.checkpoint import load_checkpoint
from mil.training.loop import train_replica
from mil.training.losses import discrete_survival_loss
from mil.training.replica import Replica
from mil.training.tasks import count_outputs, create_task, decode
from tests.test_mil.small import DIM, FAST, MemoryStore, fast_config

CPU = torch.device("cpu")
N = 40
SETTINGS = {"folds": 2, "seeds": 1, "head": {"name": "abmil", "embed_dim": 8, "attention_dim": 4}, "epochs": 12,
            "optimizer": {"lr": 0.02}, "device": "cpu"}  # fmt: skip
TARGETS = {"multilabel": "er,her2", "regression": "ki67", "survival": "months,died"}


def make_task_cohort(task: str, seed: int = 0) -> tuple[MemoryStore, Cohort]:
    """Bags whose mean shift decides the target."""
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(N, 2))
    features = [(rng.normal(size=(6, DIM)) + np.r_[3 * each, np.zeros(DIM - 2)]).astype(np.float16) for each in hidden]
    values = {
        "multilabel": (hidden > 0).astype(float),
        "regression": 100 + 20 * hidden[:, :1],
        "survival": np.stack([10 * np.exp(-hidden[:, 0]), rng.random(N) < 0.7], axis=1).astype(float),
    }[task]
    if task == "multilabel":
        values[::7, 1] = np.nan
    ids = tuple(f"s{at:02d}" for at in range(N))
    columns = TARGETS[task].split(",")
    labels, names = find_strata(task, columns, values, ids)
    cohort = Cohort(ids, ids, labels, names, TARGETS[task], Attrition(N, N), task, values)
    return MemoryStore(dict(zip(ids, features, strict=True))), cohort


@pytest.mark.parametrize(("task", "metric", "least"), [
    ("multilabel", "macro_auroc", 0.8), ("regression", "r2", 0.5), ("survival", "concordance", 0.75),
])  # fmt: skip
def test_a_head_learns_the_target_and_the_folder_says_it(tmp_path, task, metric, least):
    store, cohort = make_task_cohort(task)
    run = train(store, cohort, **SETTINGS)
    assert run.metrics["out_of_fold"][metric]["value"] > least
    assert run.metrics["task"] == task
    assert run.metrics["class_names"] == []
    assert {metric} <= set(run.metrics["per_replica"][0])
    folder = run.save(tmp_path / "run").folder
    with open(folder / "oof.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    said = {"multilabel": "p_her2", "regression": "predicted_ki67", "survival": "risk"}[task]
    column = cohort.columns[-1]
    assert len(rows) == N
    expected = run.predictions.out_of_fold()[:, -1]
    np.testing.assert_allclose([float(row[said]) for row in rows], expected, rtol=1e-8)
    truth = ["" if np.isnan(value) else f"{value:.9g}" for value in cohort.values[:, -1]]
    assert [row[f"target_{column}"] for row in rows] == truth
    assert json.loads((folder / "metrics.json").read_text())["task"] == task


@pytest.mark.parametrize("task", TARGETS)
def test_a_checkpoint_gives_the_same_values(tmp_path, task):
    store, cohort = make_task_cohort(task)
    run = train(store, cohort, **SETTINGS)
    folder = run.save(tmp_path / "run").folder
    head, record = load_checkpoint(folder / "checkpoints" / "fold1-seed0.safetensors")
    assert record.class_names == ()
    with torch.inference_mode():
        for at in (0, 5):
            bag = torch.from_numpy(store.slides[cohort.slide_ids[at]]).float()
            values = decode(record.task, head(bag).logits)[0].numpy()
            np.testing.assert_allclose(values, run.predictions.probabilities[1, at], rtol=1e-5)


@pytest.mark.parametrize("task", TARGETS)
def test_the_same_seed_gives_the_same_bytes_and_the_test_part_is_not_seen(task):
    store, cohort = make_task_cohort(task)
    first, again = train(store, cohort, **SETTINGS), train(store, cohort, **SETTINGS)
    np.testing.assert_array_equal(first.predictions.probabilities, again.predictions.probabilities)
    # other truths in the test part of fold 0 change nothing that its replica says
    test = first.predictions.parts[0] == "test"
    changed = cohort.values.copy()
    changed[test] = changed[test][::-1]
    config = first.config
    parts = first.predictions.parts[0]
    bags = Bags(cohort.slide_ids, [store.slides[name] for name in cohort.slide_ids])
    outputs = count_outputs(config, cohort)
    both = (cohort.values, changed)
    found = [train_replica(bags, values, Replica(0, 0, config), parts, outputs, CPU) for values in both]
    np.testing.assert_array_equal(found[0].probabilities, found[1].probabilities)


@pytest.mark.parametrize(("task", "loss"), [("regression", "huber"), ("survival", "cox")])
def test_the_other_losses_learn_too(task, loss):
    store, cohort = make_task_cohort(task)
    run = train(store, cohort, **SETTINGS, loss=loss, batch_bags=20 if loss == "cox" else 8)
    metric = "r2" if task == "regression" else "concordance"
    assert run.metrics["out_of_fold"][metric]["value"] > (0.5 if task == "regression" else 0.75)


def test_numbers_are_standardised_over_the_training_part_alone():
    _, cohort = make_task_cohort("regression")
    parts = np.array(["train"] * 20 + ["validation"] * 10 + ["test"] * 10)
    task = create_task(fast_config("task=regression", "target=ki67"), cohort.values, parts, 1, CPU)
    own = cohort.values[:20]
    assert task.record["mean"] == pytest.approx(own.mean(axis=0).tolist())
    assert task.record["deviation"] == pytest.approx(own.std(axis=0).tolist())
    told = decode(task.record, task.targets(np.arange(N)))
    np.testing.assert_allclose(told.numpy(), cohort.values, rtol=1e-5)


def test_intervals_of_time_hold_equally_many_deaths_of_all_but_the_test_part():
    _, cohort = make_task_cohort("survival")
    config = fast_config("task=survival", 'target="months,died"', "loss=discrete_survival", "loss.intervals=3")
    parts = np.array(["train"] * 20 + ["validation"] * 10 + ["test"] * 10)
    task = create_task(config, cohort.values, parts, 3, CPU)
    deaths = cohort.values[:30][cohort.values[:30, 1] == 1, 0]
    counts = np.bincount(np.digitize(deaths, task.record["edges"]), minlength=3)
    assert counts.max() - counts.min() <= 1
    logits = torch.randn(N, 3, generator=torch.Generator().manual_seed(0))
    members = np.arange(N)
    intervals = torch.from_numpy(np.digitize(cohort.values[:, 0], task.record["edges"]))
    expected = discrete_survival_loss(logits, intervals, torch.from_numpy(cohort.values[:, 1] == 1))
    torch.testing.assert_close(task.losses(logits, task.targets(members)).minimised, expected)
    # who is expected to survive fewer intervals has the higher risk
    doomed = decode(task.record, torch.tensor([[9.0, 9, 9], [-9, -9, -9]]))
    assert doomed[0] > doomed[1]


def test_labels_weigh_their_positive_slides_by_the_negative_ones():
    values = np.array([[1, 0], [0, 0], [0, 1], [0, np.nan], [1, 1]], dtype=float)
    parts = np.array(["train"] * 4 + ["validation"])
    config = fast_config("task=multilabel", 'target="a,b"')
    task = create_task(config, values, parts, 2, CPU)
    # label a: 1 positive, 3 negative; label b: 1 positive, 2 negative, 1 unknown
    logits = torch.zeros(4, 2)
    found = task.losses(logits, task.targets(np.arange(4))).minimised
    # the mean over known labels within a slide, then over slides
    assert float(found) == pytest.approx(np.log(2) * ((3 + 1) / 2 + (1 + 1) / 2 + (1 + 2) / 2 + 1) / 4)
    none = create_task(replace(config, class_weights="none"), values, parts, 2, CPU)
    assert float(none.losses(logits, none.targets(np.arange(4))).minimised) == pytest.approx(np.log(2))


@pytest.mark.parametrize("task", TARGETS)
@pytest.mark.parametrize("head", list_aggregators())
def test_every_head_trains_on_every_task_or_says_that_it_cannot(task, head):
    store, cohort = make_task_cohort(task)
    settings = {"folds": 2, "seeds": 1, "epochs": 1, "device": "cpu"}
    own_loss = {"clam_sb", "clam_mb"} | (set() if task == "multilabel" else {"dsmil", "dtfd", "acmil"})
    if head in own_loss:
        with pytest.raises(ConfigError, match="learns from classes by a loss of its own"):
            train(store, cohort, head, **settings)
        head = {"name": head, "bag_weight": 1.0} if head.startswith("clam") else "abmil"
    run = train(store, cohort, head, **settings)
    assert np.isfinite(run.predictions.probabilities).all()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task=regression", "loss=focal"], "expected one of mse, huber"),
        (["loss=cox"], "task=survival"),
        (["task=regression", "loss.label_smoothing=0.1"], "smoothing is for classes"),
        (["task=survival", "sampler=class_balanced"], "no classes to balance"),
        (["task=survival", "augment.embedding_mixup=0.4"], "times cannot be mixed"),
        (["task=survival", "loss=cox", "batch_bags=8"], "batch_bags=16 or more"),
        (["task=survival", "loss=cox", "batch_bags=16", "accumulate=2"], "accumulate=1"),
        (["task=regresion"], "regression"),
        (["task=regression", "loss=huber", "loss.delta=0"], "above 0"),
        (["task=survival", "loss=discrete_survival", "loss.intervals=1"], "at least 2"),
    ],
)
def test_settings_that_do_not_fit_the_task_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        compose_config([*FAST, *overrides])


def test_the_loss_follows_the_task_and_a_saved_configuration_runs_again():
    assert compose_config(["task=survival"]).loss.name == "discrete_survival"
    assert compose_config(["task=multilabel"]).loss.name == "bce"
    assert compose_config(["loss.label_smoothing=0.1"]).loss.label_smoothing == 0.1
    config = compose_config(["task=regression", "loss=huber", "loss.delta=2"])
    assert compose_config(file=config.to_dict()) == config


def test_a_cohort_of_another_task_is_refused():
    store, cohort = make_task_cohort("regression")
    with pytest.raises(ConfigError, match="task"):
        train(store, cohort, **SETTINGS, loss="cox")
    with pytest.raises(CohortError):
        len(replace(cohort, task="survival").columns)


def test_noise_and_pseudo_bags_work_on_every_task():
    for task in TARGETS:
        store, cohort = make_task_cohort(task)
        augment = {"name": "none", "noise": 0.2, "pseudo_bags": 2}
        more = {} if task == "survival" else {"bag_mixup": 0.3}
        run = train(store, cohort, **SETTINGS | {"epochs": 2}, augment=augment | more)
        assert np.isfinite(run.predictions.probabilities).all()


@pytest.mark.parametrize("task", TARGETS)
def test_a_run_is_applied_to_new_slides(tmp_path, task):
    store, cohort = make_task_cohort(task)
    run = train(store, cohort, **SETTINGS)
    folder = run.save(tmp_path / "run").folder
    found = predict(folder, store, slide_ids=["s05", "s01"], device="cpu")
    expected = run.predictions.probabilities[:, [5, 1]].mean(axis=0)
    np.testing.assert_allclose(found.probabilities, expected, rtol=1e-5)
    names = {"multilabel": ("p_er", "p_her2"), "regression": ("predicted_ki67",), "survival": ("risk",)}[task]
    assert found.value_names == names
    found.write_csv(tmp_path / "said.csv")
    with open(tmp_path / "said.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["slide_id"] for row in rows] == ["s05", "s01"]
    np.testing.assert_allclose([[float(row[name]) for name in names] for row in rows], expected, rtol=1e-5)


def test_cox_needs_an_event_to_validate_on():
    _, cohort = make_task_cohort("survival")
    values = cohort.values.copy()
    values[20:30, 1] = 0
    parts = np.array(["train"] * 20 + ["validation"] * 10 + ["test"] * 10)
    config = fast_config("task=survival", "target=[months,died]", "loss=cox", "batch_bags=16")
    with pytest.raises(ConfigError, match="10 slides without an event"):
        create_task(config, values, parts, 1, CPU)


def test_a_patient_is_validated_once_however_many_slides():
    values = np.array([[1.0, 1], [2, 1], [2, 1], [2, 1]])
    parts = np.array(["validation"] * 4)
    config = fast_config("task=survival", "target=[months,died]", "loss=cox", "batch_bags=16")
    logits = torch.tensor([[1.0], [3.0], [0.0], [-1.0]])
    # by slide two of three pairs are right; the mean risk of the second patient, 2/3, is below that of the first
    by_patient = create_task(config, values, parts, 1, CPU, ["a", "b", "b", "b"])
    assert by_patient.validate(logits, np.arange(4))[1] == 1
    assert create_task(config, values, parts, 1, CPU).validate(logits, np.arange(4))[1] == pytest.approx(2 / 3)


def test_with_repeats_patients_are_compared_within_a_fold():
    store, cohort = make_task_cohort("survival")
    run = train(store, cohort, **SETTINGS, repeats=2)
    found = run.metrics["out_of_fold"]
    assert (found["n_slides"], found["n_patients"]) == (N, N)
    right = known = 0.0
    for replica, parts in zip(run.predictions.probabilities, run.predictions.parts, strict=True):
        test = np.flatnonzero(parts == "test")
        times, events, risks = cohort.values[test, 0], cohort.values[test, 1] == 1, replica[test, 0]
        sooner = events[:, None] & ((times[:, None] < times) | ((times[:, None] == times) & ~events))
        right += (sooner * ((risks[:, None] > risks) + 0.5 * (risks[:, None] == risks))).sum()
        known += sooner.sum()
    assert found["concordance"]["value"] == pytest.approx(right / known)


def test_numbers_of_other_units_have_no_common_error():
    store, cohort = make_task_cohort("regression")
    both = replace(cohort, target="ki67,age", values=np.hstack([cohort.values, cohort.values / 7]))
    found = train(store, both, **SETTINGS | {"epochs": 1}).metrics["out_of_fold"]
    assert found["mae"]["value"] is None
    assert found["targets"]["age"]["mae"]["value"] > 0
    assert found["r2"]["value"] is not None
