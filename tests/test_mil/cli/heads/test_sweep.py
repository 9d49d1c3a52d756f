"""``mil sweep`` as a person types it."""

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mil.cli import main as cli
from mil.config import preflight as early
from mil.config.compose import compose_config
from mil.errors import CohortError, ConfigError
from mil.tuning import sweep as module
from mil.tuning.sweep_config import cautions_of
from mil.tuning.trials import SweepProgress
from tests.test_mil.small import make_cohort, make_store

COHORT = make_cohort()
SHARED = ["folds=2", "seeds=2", "epochs=2", "device=cpu"]


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command up to what is swept, on a store in memory."""
    store = make_store(COHORT)
    for where in (module, early):
        monkeypatch.setattr(where, "open_store", lambda path: store)
    monkeypatch.setenv("COLUMNS", "120")
    rows = zip(COHORT.slide_ids, COHORT.patient_ids, COHORT.labels, strict=True)
    lines = [f"{slide},{patient},{COHORT.class_names[label]}" for slide, patient, label in rows]
    (tmp_path / "labels.csv").write_text("slide_id,patient_id,subtype\n" + "\n".join(lines) + "\n")
    given = ["--store", "cohort.zarr", "--labels", str(tmp_path / "labels.csv"), "--target", "subtype"]
    return ["sweep", *given, "--out", str(tmp_path / "s")]


def test_a_sweep_is_told_and_runs_again_from_its_config(arguments: list[str], tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.app, [*arguments, "head=mean,max", "optimizer.lr=1e-3,0.1", *SHARED])
    assert result.exit_code == 0, result.output
    text = " ".join(result.output.split())
    for words in (
        "the best of 4 settings in all folds: mean validation AUROC",
        "subtype: the procedure out of fold, its search included",
        "The test folds of this cohort have been looked at 1 time in this folder of runs.",
        "best setting over all folds: head=",
        "of the variance between trials, optimizer.lr explains:",
    ):
        assert words in text
    assert (tmp_path / "s" / "sweep.html").is_file()
    assert compose_config([], tmp_path / "s" / "best.yaml").target == "subtype"
    assert cautions_of(tmp_path / "s" / "best.yaml")
    assert cautions_of(tmp_path / "s" / "config.yaml") == []
    again = ["sweep", "--config", str(tmp_path / "s" / "config.yaml"), "--out", str(tmp_path / "t")]
    result = CliRunner().invoke(cli.app, again)
    assert result.exit_code == 0, result.output
    for name in ("oof.csv", "chosen.csv", "best.yaml", "config.yaml"):
        assert (tmp_path / "s" / name).read_bytes() == (tmp_path / "t" / name).read_bytes()
    assert "looked at 2 times" in " ".join(result.output.split())


def test_ctrl_c_keeps_what_is_done(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = module.run_sweep

    def interrupted(config: Any, out: Any, report: Any) -> Any:
        def stop(progress: SweepProgress) -> None:
            report(progress)
            if progress.done == 5:
                raise KeyboardInterrupt

        return run(config, out, stop)

    monkeypatch.setattr(module, "run_sweep", interrupted)
    swept = ["optimizer.lr=1e-3,0.1", "head=mean", *SHARED]
    result = CliRunner().invoke(cli.app, [*arguments, *swept])
    assert result.exit_code == 130
    assert "the same command goes on from there" in " ".join(result.output.split())
    monkeypatch.setattr(module, "run_sweep", run)
    assert CliRunner().invoke(cli.app, [*arguments, *swept]).exit_code == 0


def test_a_search_takes_its_options(arguments: list[str], tmp_path: Path) -> None:
    options = ["--method", "random", "--trials", "2", "--select", "log_loss", "--seed", "4"]
    result = CliRunner().invoke(
        cli.app, [*arguments, *options, "optimizer.lr=interval(1e-4,1e-1)", "head=mean", *SHARED]
    )
    assert result.exit_code == 0, result.output
    assert "mean validation log-loss" in " ".join(result.output.split())
    text = (tmp_path / "s" / "config.yaml").read_text()
    assert "optimizer.lr: tag(log,interval(0.0001,0.1))" in text
    assert all(line in text for line in ("method: random", "trials: 2", "select: log_loss", "seed: 4"))


@pytest.mark.parametrize(
    ("swept", "match"),
    [
        (["hed=mean,max"], r"unknown key hed → .* did you mean 'head'"),
        (["head=mean"], r"got nothing to sweep"),
        (["task=classification,regression"], r"got task=classification,regression → all settings of a sweep share"),
        (["store=a,b", "head=mean,max"], r"got store=a,b → all settings of a sweep share"),
        (["optimizer.lr=interval(1e-4"], r"expected group=option or a.b=value"),
    ],
)
def test_wrong_input_is_told_and_nothing_is_made(
    arguments: list[str], tmp_path: Path, swept: list[str], match: str
) -> None:
    with pytest.raises(ConfigError, match=match):
        CliRunner().invoke(cli.app, [*arguments, *swept], catch_exceptions=False)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("command", ["sweep", "benchmark"])
def test_the_task_is_a_flag(arguments: list[str], tmp_path: Path, command: str) -> None:
    given = [command, *arguments[1:], "--task", "regression"]
    with pytest.raises(CohortError, match=r"got 'Luminal A' in column 'subtype' .* expected a number"):
        CliRunner().invoke(cli.app, [*given, "optimizer.lr=0.1,0.2"][: None if command == "sweep" else -1],
                           catch_exceptions=False)  # fmt: skip


def test_store_and_target_are_needed(tmp_path: Path) -> None:
    command = ["sweep", "--labels", str(tmp_path / "l.csv"), "--out", str(tmp_path / "s"), "epochs=2,3"]
    with pytest.raises(ConfigError, match=r"got no store and no target → .* give --store --target"):
        CliRunner().invoke(cli.app, command, catch_exceptions=False)
