"""The benchmark: cells, baselines, verdicts, resume, page."""

import base64
import csv
import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from typer.testing import CliRunner

from mil.bags.stored import open_bags
from mil.cli import main as cli
from mil.cohort.cohort import Cohort
from mil.config import preflight as early
from mil.config.compose import compose_config
from mil.errors import BagError, ConfigError, RunError
from mil.evaluation.outcomes import Outcomes
from mil.experiments import benchmark as module
from mil.experiments.baselines import run_baselines
from mil.experiments.benchmark import BenchmarkProgress, benchmark
from mil.experiments.benchmark_config import compose_benchmark, head_title
from mil.experiments.crossval import train
from mil.experiments.leaderboard import Board, BoardRow, Entrant, rank, score
from mil.experiments.leaderboard_page import write_page
from mil.splits.folds import make_splits
from mil.statistics.paired_tests import holm
from mil.training.resume import kept_replicas
from tests.test_mil.small import FEATURES, MemoryStore, make_cohort, make_store

COHORT = make_cohort()
SMALL = {"name": "abmil", "embed_dim": 8, "attention_dim": 4}
OPTIONS: dict[str, Any] = {"folds": 3, "seeds": 2, "epochs": 3, "device": "cpu", "optimizer": {"lr": 0.02}}


@pytest.fixture(scope="module")
def store() -> MemoryStore:
    return make_store(COHORT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("boards") / "board ü"


@pytest.fixture(scope="module")
def board(store: MemoryStore, folder: Path) -> Board:
    return benchmark(store, COHORT, ["max", SMALL], folder, **OPTIONS)


def _rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "leaderboard.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_heads_and_baselines_are_ranked(board: Board) -> None:
    names = {row.name for row in board.rows}
    assert names == {
        "mean",
        "max",
        "abmil embed_dim=8 attention_dim=4",
        "majority class",
        "mean instance, logistic regression",
        "mean instance, 5 nearest neighbours",
    }
    assert [row.rank for row in board.rows] == list(range(1, 7))
    scores = [row.headline.value for row in board.rows]
    assert scores == sorted(scores, reverse=True)


def test_a_cell_is_the_same_training_as_mil_train(board: Board, store: MemoryStore, folder: Path) -> None:
    run = train(store, COHORT, head="max", **OPTIONS)
    (row,) = (row for row in board.rows if row.name == "max")
    expected = run.metrics["out_of_fold"]["macro_f1"]
    assert row.scores["macro_f1"].value == pytest.approx(expected["value"])
    assert row.scores["macro_f1"].low == pytest.approx(expected["low"])
    metrics = json.loads((folder / row.folder / "metrics.json").read_text())
    assert metrics["out_of_fold"]["confusion"] == run.metrics["out_of_fold"]["confusion"]
    assert row.cost is not None
    assert row.cost.parameters == run.trained[0].parameters
    assert (row.seed_low, row.seed_high) == (min(metrics["seed_macro_f1"]), max(metrics["seed_macro_f1"]))


def test_the_folder_holds_what_it_promises(board: Board, folder: Path) -> None:
    names = {path.name for path in folder.iterdir()}
    assert names >= {"config.yaml", "splits.csv", "leaderboard.csv", "leaderboard.html", "runs"}
    rows = _rows(folder)
    assert [row["name"] for row in rows] == [row.name for row in board.rows]
    assert float(rows[0]["macro_f1"]) == pytest.approx(board.rows[0].headline.value, abs=1e-5)
    assert not (folder / "unfinished").exists() or not list((folder / "unfinished").rglob("*.replica"))


def test_baselines_are_scikit_learns_on_the_same_folds(store: MemoryStore) -> None:
    splits = make_splits(COHORT, 3, 0, (0, 1), 0.2)
    found = {each.name: each for each in run_baselines(open_bags(store, COHORT.slide_ids, "tiny"), COHORT, splits)}
    means = np.stack([store.slides[name].astype(np.float64).mean(axis=0) for name in COHORT.slide_ids])
    for fold in range(3):
        test = splits.test_fold == fold
        model = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=2000))
        expected = model.fit(means[~test], COHORT.labels[~test]).predict_proba(means[test])
        logistic = found["mean instance, logistic regression"].outcomes.predicted[test]
        np.testing.assert_allclose(logistic, expected, atol=1e-5)
        share = np.bincount(COHORT.labels[~test]) / (~test).sum()
        np.testing.assert_allclose(found["majority class"].outcomes.predicted[test], np.tile(share, (test.sum(), 1)))
    for each in found.values():
        np.testing.assert_allclose(each.outcomes.predicted.sum(axis=1), 1)


def _ranked(entrants: list[Entrant], cohort: Cohort) -> tuple[BoardRow, ...]:
    means = {each.entry: each for each in entrants if each.name == "mean"}
    return rank(score(each, means[each.entry], cohort) for each in entrants)


def test_verdicts_need_an_interval_above_zero_and_a_small_corrected_p() -> None:
    cohort = make_cohort(n_patients=40)
    rng = np.random.default_rng(0)
    truth = np.eye(2)[cohort.labels]
    noise = rng.dirichlet([1, 1], len(cohort))
    poor, good = (Outcomes(cohort, (1 - skill) * noise + skill * truth) for skill in (0.1, 0.5))
    entrants = [
        Entrant("mean", "e", "head", poor),
        Entrant("good", "e", "head", good),
        Entrant("same", "e", "head", poor),
    ]
    entrants += [Entrant("failing", "e", "head", reason="no"), Entrant("logistic", "e", "baseline", good)]
    rows = {row.name: row for row in _ranked(entrants, cohort)}
    assert rows["mean"].verdict == "reference"
    assert rows["good"].verdict == "beats mean pooling"
    assert rows["same"].verdict == "does not beat mean pooling"
    assert (rows["failing"].verdict, rows["failing"].rank) == ("failed", None)
    assert (rows["logistic"].verdict, rows["logistic"].p) == ("", None)
    assert [rows[name].p_holm for name in ("good", "same")] == holm([rows["good"].p, rows["same"].p])
    assert rows["good"].difference.low > 0
    assert rows["same"].difference.value == 0


def test_heads_are_compared_on_their_own_features() -> None:
    cohort = make_cohort(n_patients=20)
    rng = np.random.default_rng(1)
    a, b, c = (Outcomes(cohort, rng.dirichlet([1, 1], len(cohort))) for _ in range(3))
    entrants = [Entrant("mean", "e", "head", a), Entrant("mean", "f", "head", b), Entrant("max", "f", "head", c)]
    rows = {(row.name, row.entry): row for row in _ranked(entrants, cohort)}
    assert rows["mean", "e"].verdict == rows["mean", "f"].verdict == "reference"
    difference = rows["max", "f"].headline.value - rows["mean", "f"].headline.value
    assert rows["max", "f"].difference.value == pytest.approx(difference)


class Stop(Exception):
    """Ends a benchmark from within."""


def test_a_stopped_benchmark_goes_on_and_ends_the_same(board: Board, store: MemoryStore, tmp_path: Path) -> None:
    def stop(progress: BenchmarkProgress) -> None:
        if progress.done >= 9:
            raise Stop

    with pytest.raises(Stop):
        benchmark(store, COHORT, ["max", SMALL], tmp_path / "b", progress=stop, **OPTIONS)
    seen: list[BenchmarkProgress] = []
    again = benchmark(store, COHORT, ["max", SMALL], tmp_path / "b", progress=seen.append, **OPTIONS)
    assert seen[-1].done == seen[-1].total == 18
    # the first cell was whole, the second half done
    assert not [each for each in seen if each.what.startswith("mean on tiny,")]
    volatile = {"seconds_per_replica", "peak_mb", "inference_ms"}
    tables = [[{k: v for k, v in row.items() if k not in volatile} for row in each.table()] for each in (board, again)]
    assert tables[0] == tables[1]


def test_a_finished_board_takes_another_head_without_training_the_others(
    store: MemoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark(store, COHORT, ["mean"], tmp_path, **OPTIONS)
    trained = []

    def spy(source: Any, cohort: Any, config: Any, *rest: Any) -> Any:
        trained.append(config.head.name)
        return cross_validate(source, cohort, config, *rest)

    cross_validate = module.cross_validate
    monkeypatch.setattr(module, "cross_validate", spy)
    benchmark(store, COHORT, ["mean", "max"], tmp_path, **OPTIONS)
    assert trained == ["max"]
    benchmark(store, COHORT, ["mean", "max"], tmp_path, overwrite=True, **OPTIONS | {"epochs": 2})
    assert trained == ["max", "mean", "max"]


def test_a_head_that_fails_costs_its_row(store: MemoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(source: Any, cohort: Any, config: Any, *rest: Any) -> Any:
        if config.head.name == "max":
            raise RuntimeError("out of <b>memory</b>")
        return cross_validate(source, cohort, config, *rest)

    cross_validate = module.cross_validate
    monkeypatch.setattr(module, "cross_validate", fail)
    board = benchmark(store, COHORT, ["max", SMALL], tmp_path, **OPTIONS)
    assert board.rows[-1].name == "max"
    assert board.rows[-1].reason == "out of <b>memory</b>"
    assert len(board.rows) == 6
    page = (tmp_path / "leaderboard.html").read_text()
    assert "out of &lt;b&gt;memory" in page
    assert "<b>memory" not in page


def test_features_that_are_not_finite_stop_the_benchmark(tmp_path: Path) -> None:
    store = make_store(COHORT)
    store.slides[COHORT.slide_ids[3]][0, 0] = np.nan
    with pytest.raises(BagError, match="slide 03"):
        benchmark(store, COHORT, ["max"], tmp_path, **OPTIONS)


def test_several_features_share_slides(tmp_path: Path) -> None:
    one = make_store(COHORT, recipes={"tiny": FEATURES, "other": replace(FEATURES, backbone="other")})
    two = make_store(COHORT, path=Path("second.zarr"))
    del two.slides[COHORT.slide_ids[0]]
    board = benchmark([one, two], COHORT, ["mean"], tmp_path, **OPTIONS)
    entries = {row.entry for row in board.rows if row.kind == "head"}
    assert entries == {"tiny (cohort.zarr)", "other (cohort.zarr)", "tiny (second.zarr)"} or entries == {
        "tiny (cohort.zarr)",
        "other (cohort.zarr)",
        "tiny (second.zarr)",
    }
    assert board.n_slides == len(COHORT) - 1
    chosen = benchmark([one, two], COHORT, ["mean"], None, ["other"], **OPTIONS)
    assert {row.entry for row in chosen.rows} == {"other"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["heads=[abml]"], r"abml.*did you mean 'abmil'"),
        (["heads=[mean,{name: abmil, gatd: true}]"], r"gatd.*did you mean 'head.gated'"),
        (["heads=[{gated: true}]"], r"expected a name"),
        (["heads=[abmil,abmil]"], r"abmil twice"),
        (["heads=[]"], r"heads=\[\].*expected a list"),
        (["head=abmil"], r"head=abmil.*heads=\[\.\.\.\]"),
        (["head.dropout=0.5"], r"takes heads="),
        (["fold=3"], r"unknown key fold.*did you mean 'folds'"),
        (["heads=[mean"], r"expected group=option"),
    ],
)
def test_wrong_settings_are_told(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose_benchmark(overrides)


def test_unknown_backbones_are_told(store: MemoryStore) -> None:
    with pytest.raises(ConfigError, match=r"'uni'.*hold 'tiny'"):
        benchmark(store, COHORT, ["mean"], backbones=["uni"], **OPTIONS)


def test_settings_are_read_back(tmp_path: Path) -> None:
    config = compose_benchmark(
        ["heads=[max,{name: abmil, gated: false}]", "folds=3", "optimizer=sgd", "backbones=[tiny]"],
        values={"stores": ["/data/a.zarr", "s3://bucket/b.zarr"], "labels": "/data/l.csv", "target": "subtype"},
    )
    assert [head_title(head) for head in config.heads] == ["mean", "max", "abmil gated=False"]
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert compose_benchmark(file=tmp_path / "config.yaml") == config
    assert compose_config(values={"folds": 3}).folds == config.train.folds


def test_all_heads_can_be_asked_for() -> None:
    config = compose_benchmark(["heads=all"])
    assert len(config.heads) >= 17
    assert config.heads[0].name == "mean"


def test_foreign_folders_are_left_alone(store: MemoryStore, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(RunError, match="holds something else"):
        benchmark(store, COHORT, ["mean"], tmp_path, **OPTIONS)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(RunError, match="is a file"):
        benchmark(store, COHORT, ["mean"], file, **OPTIONS)
    run = train(store, COHORT, head="mean", **OPTIONS).save(tmp_path / "run")
    with pytest.raises(RunError, match="holds a run of mil train"):
        benchmark(store, COHORT, ["mean"], run.folder, **OPTIONS)


def test_the_page_escapes_and_needs_no_network(board: Board, tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    rows = tuple(replace(row, entry=evil) for row in board.rows)
    page = tmp_path / "page.html"
    write_page(page, replace(board, target=evil, class_names=(evil, "b"), rows=rows, warnings=(evil,)))
    text = page.read_text()
    assert evil not in text
    assert text.count("&lt;script&gt;alert(1)&lt;/script&gt;") > 3
    assert "http://" not in text
    assert "https://" not in text
    assert "default-src 'none'" in text


def test_the_page_holds_the_one_script_that_its_policy_admits(board: Board, tmp_path: Path) -> None:
    write_page(tmp_path / "page.html", board)
    text = (tmp_path / "page.html").read_text()
    (script,) = re.findall(r"<script>(.*?)</script>", text, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text
    assert "aria-sort" in script


def test_one_seed_has_no_spread(board: Board, tmp_path: Path) -> None:
    row = next(row for row in board.rows if row.name == "max")
    one = Entrant("max", row.entry, "head", Outcomes(COHORT, np.full((len(COHORT), 2), 0.5)), (0.4333,))
    assert score(one, None, COHORT).seed_low is None
    assert score(replace(one, seed_scores=(0.4333, 0.5)), None, COHORT).seed_low == 0.4333
    write_page(tmp_path / "page.html", replace(board, rows=(replace(row, seed_low=None, seed_high=None),)))
    cells = re.findall(r"<td[^>]*>(.*?)</td>", (tmp_path / "page.html").read_text(), flags=re.DOTALL)
    assert cells[7] == "–"


def test_synthetic_slides_are_said_to_be(tmp_path: Path, board: Board) -> None:
    page = tmp_path / "page.html"
    write_page(page, replace(board, synthetic=True))
    assert "SYNTHETIC DATA" in page.read_text()
    write_page(page, board)
    assert "SYNTHETIC DATA" not in page.read_text()


def test_a_board_prints_itself(board: Board) -> None:
    text = str(board)
    assert "subtype: 24 slides of 12 patients" in text
    assert "majority class" in text


def test_the_command(store: MemoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = tmp_path / "labels.csv"
    lines = [
        f"{s},{p},{COHORT.class_names[c]}"
        for s, p, c in zip(COHORT.slide_ids, COHORT.patient_ids, COHORT.labels, strict=True)
    ]
    labels.write_text("slide_id,patient_id,subtype\n" + "\n".join(lines) + "\n")
    for where in (module, early):
        monkeypatch.setattr(where, "open_store", lambda path: store)
    arguments = ["benchmark", "--store", "cohort.zarr", "--labels", str(labels), "--target", "subtype"]
    arguments += ["--out", str(tmp_path / "b"), "heads=[max]", "folds=2", "seeds=1", "epochs=2", "device=cpu"]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    assert "leaderboard.html" in result.output.replace("\n", "")
    assert "does not beat" in result.output or "beats" in result.output
    with pytest.raises(ConfigError, match=r"got no store and no target"):
        CliRunner().invoke(
            cli.app, ["benchmark", "--labels", str(labels), "--out", str(tmp_path / "c")], catch_exceptions=False
        )


def test_other_splits_are_compared_on_the_slides_they_test(store: MemoryStore, tmp_path: Path) -> None:
    board = benchmark(store, COHORT, ["max"], tmp_path / "b", **OPTIONS | {"repeats": 2, "seeds": 1, "epochs": 1})
    assert all(row.verdict != "failed" for row in board.rows)
    assert board.n_slides == len(COHORT)


def test_two_stores_of_one_name_are_told_apart(tmp_path: Path) -> None:
    stores = [make_store(COHORT, path=Path(f"/{folder}/cohort.zarr")) for folder in "ab"]
    board = benchmark(stores, COHORT, ["mean"], tmp_path, **OPTIONS | {"epochs": 1, "seeds": 1})
    heads = [row for row in board.rows if row.kind == "head"]
    assert len({row.folder for row in heads}) == len({row.entry for row in heads}) == 2
    with pytest.raises(ConfigError, match="expected each once"):
        benchmark([stores[0], stores[0]], COHORT, ["mean"], tmp_path / "twice", **OPTIONS)


def test_impossible_cells_are_told_before_any_is_trained(
    store: MemoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "cross_validate", lambda *_: pytest.fail("trained"))
    heads = ["mean", {"name": "abmil", "input_norm": "layer"}]
    with pytest.raises(ConfigError, match=r"head\.input_norm=layer with standardize=train"):
        benchmark(store, COHORT, heads, tmp_path, **OPTIONS)


def test_a_board_of_other_settings_is_not_replaced_unasked(store: MemoryStore, tmp_path: Path) -> None:
    options = OPTIONS | {"epochs": 1, "seeds": 1}
    benchmark(store, COHORT, ["mean"], tmp_path, **options)
    with pytest.raises(RunError, match=r"seeds \[0\] → \[0, 1\].*--overwrite"):
        benchmark(store, COHORT, ["mean"], tmp_path, **options | {"seeds": 2})
    board = benchmark(store, COHORT, ["mean"], tmp_path, overwrite=True, **options | {"seeds": 2})
    assert {row.seed_low for row in board.rows if row.kind == "head"} != {None}
    (tmp_path / "config.yaml").write_text("space: {}\n")
    with pytest.raises(RunError, match="not that of a board"):
        benchmark(store, COHORT, ["mean"], tmp_path, **options)


def test_replicas_of_a_cell_that_failed_are_kept(
    store: MemoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Any, *_: Any, **__: Any) -> None:
        raise RunError("got no space left")

    with monkeypatch.context() as patched:
        patched.setattr("mil.runs.run.Run.save", full)
        board = benchmark(store, COHORT, ["mean"], tmp_path, **OPTIONS)
        assert [row.verdict for row in board.rows if row.name == "mean"] == ["failed"]
    assert kept_replicas(tmp_path / "unfinished" / "mean--tiny") == 6
    seen: list[BenchmarkProgress] = []
    benchmark(store, COHORT, ["mean"], tmp_path, progress=seen.append, **OPTIONS)
    assert not [each for each in seen if "epoch" in each.what]
    assert not (tmp_path / "unfinished").exists()


def test_looks_are_those_of_the_whole_cohort(store: MemoryStore, tmp_path: Path) -> None:
    patients = list(dict.fromkeys(COHORT.patient_ids))
    part = {patient: ["train", "train", "val", "test"][at // 2 % 4] for at, patient in enumerate(patients)}
    lines = [
        f"{s},{p},{COHORT.class_names[c]},{part[p]}"
        for s, p, c in zip(COHORT.slide_ids, COHORT.patient_ids, COHORT.labels, strict=True)
    ]
    table = tmp_path / "labels.csv"
    table.write_text("slide_id,patient_id,subtype,part\n" + "\n".join(lines) + "\n")
    fixed = {"split": "fixed", "split_column": "part", "labels": str(table), "seeds": 1, "epochs": 1}
    board = benchmark(store, COHORT, ["max"], tmp_path / "b", **OPTIONS | fixed)
    assert board.facts["looks at the test folds"] == 2
    assert board.n_slides == sum(word == "test" for word in (part[p] for p in COHORT.patient_ids))


def test_trackers_are_refused(store: MemoryStore) -> None:
    with pytest.raises(ConfigError, match="tells no trackers"):
        benchmark(store, COHORT, ["mean"], **OPTIONS | {"track": ["wandb"]})
