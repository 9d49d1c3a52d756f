"""``mil plan`` and ``mil doctor``: what they print, and how they exit."""

import csv
import inspect
import json
from functools import partial
from pathlib import Path

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

import extract.planning.doctor
from extract.pipeline.extraction import run_extraction
from extract.planning.machine import Check
from extract.planning.plan import plan_extraction
from extract.planning.planned import ExtractionPlan, MeasuredRate, PlannedSlide
from mil.cli.slides import extract as cli_extract
from mil.cli.slides import plan as cli_plan
from tests.test_extract.small import tree, write_slide

app = typer.Typer(pretty_exceptions_enable=False)
app.command()(cli_plan.plan)
app.command()(cli_plan.doctor)
app.command()(cli_extract.extract)

TILING = ("--mpp", "0.5", "--tile-px", "64", "--runtime", "torch")


def run(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, " ".join(result.output.split())


@pytest.fixture
def slides(tmp_path: Path) -> Path:
    """One slide to be resampled, and one without a scale."""
    write_slide(tmp_path / "slides" / "fine.tif", 600, 500, mpp=0.3)
    write_slide(tmp_path / "slides" / "no scale.tif", mpp=None)
    return tmp_path / "slides"


def test_plan_takes_every_flag_of_extract():
    flags = inspect.signature(cli_plan.plan).parameters
    theirs = inspect.signature(cli_extract.extract).parameters
    assert set(flags) == set(theirs) | {"measure", "csv_file"}
    assert all(flags[name] == theirs[name] for name in theirs if name != "store")


def test_plan_prints_slides_totals_and_failures(slides: Path, tmp_path: Path):
    code, said = run("plan", slides, "--store", tmp_path / "s.zarr", *TILING, "--views", "1", "--no-measure")
    assert code == 1
    for part in (
        "fine",
        "0.3 → 0.5",
        "0, resampled",
        "1 slide: µm/px from openslide.mpp",
        "slides that will fail",
        "no scale",
        "--default-mpp",
        "2 slides: 1 to embed, 1 will fail",
        "efficientnet_lite0 (1280 x float16), efficientnet_lite0@view-1 (1280 x float16)",
        "free: enough",
        "which mil extract does again",
    ):
        assert part in said
    assert not (tmp_path / "s.zarr").exists()


def test_plan_of_a_good_cohort_measures_and_exits_with_0(slides: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("extract.planning.plan.plan_extraction", partial(plan_extraction, measure_s=0.2))
    code, said = run("plan", slides, *TILING, "--default-mpp", "0.5", "--device", "cpu")
    assert code == 0
    assert "2 slides: 2 to embed, 0 will fail" in said
    assert "1 slide: µm/px from --default-mpp" in said
    assert "to start, " in said
    assert "tiles of the first slides, " in said
    assert "on cpu (fp32, torch, batch size 4)" in said


def test_the_same_flags_make_the_same_recipe(slides: Path, tmp_path: Path):
    flags = [
        "--magnification",
        "40",
        "--tile-px",
        "48",
        "--gap-px",
        "5",
        "--min-tissue",
        "0.4",
        "--tissue",
        "saturation",
    ]
    flags += ["--edge", "drop", "--jitter-px", "7", "--jitter-seed", "3", "--keep-pen", "--default-mpp", "0.25"]
    flags += ["--allow-upsampling", "--runtime", "torch"]
    assert run("extract", slides, "--store", tmp_path / "s.zarr", *flags)[0] == 0
    before = tree(tmp_path, but=())
    code, said = run("plan", slides, "--store", tmp_path / "s.zarr", *flags)
    assert code == 0
    assert f"2 slides: 0 to embed, 2 complete in {tmp_path / 's.zarr'}, 0 will fail" in said
    assert tree(tmp_path, but=()) == before


def test_the_table_of_plan_is_written_whole(slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cli_plan, "_ROWS_SHOWN", 0)
    code, said = run("plan", slides, *TILING, "--no-measure", "--csv", tmp_path / "plan.csv")
    assert code == 1
    assert f"... and 1 more; {tmp_path / 'plan.csv'} lists all" in said
    with open(tmp_path / "plan.csv", newline="", encoding="utf-8") as file:
        rows = {row["slide_id"]: row for row in csv.DictReader(file)}
    assert rows["fine"]["outcome"] == "embed"
    assert int(rows["fine"]["n_tiles"]) > 0
    assert "--default-mpp" in rows["no scale"]["reason"]
    assert run("plan", slides, "--csv", tmp_path)[0] == 2


def test_plan_refuses_flags_that_contradict(slides: Path):
    assert run("plan", slides, "--native", "--mpp", "1")[0] == 2
    assert run("plan")[0] == 2


def test_repeated_tiles_are_said_to_be(capsys: pytest.CaptureFixture[str]):
    slide = PlannedSlide("a", "a.tif", "embed", n_tiles=600)
    rate = MeasuredRate(10.0, "cpu", 50, 12, 5.0, "reading")
    planned = ExtractionPlan((slide,), (), None, None, rate, 20.0, (), start_seconds=4.0)
    cli_plan._print_plan(Console(width=200), planned, None)
    said = capsys.readouterr().out
    assert "about 84 s on cpu: 4 s to start, 20 s to cut slides, then 10.0 tiles/s" in said
    assert "in 5.0 s with 12 tiles of the first slides, some of them again and again, waiting for reading" in said


def test_plan_that_is_stopped_says_so(slides: Path, monkeypatch: pytest.MonkeyPatch):
    def stop(**arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("extract.planning.plan.plan_extraction", stop)
    code, said = run("plan", slides)
    assert (code, said) == (130, "stopped. Nothing was written.")


CHECKS = (
    ("python", Check("python", "ok", "3.12")),
    ("gpu", Check("gpu", "error", "the driver is [old]", "update it")),
    ("disk", Check("disk", "warning", "slow", "another disk")),
)


def test_doctor_prints_a_line_per_check(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        extract.planning.doctor, "checkers", lambda folder: [(name, lambda c=c: c) for name, c in CHECKS]
    )
    code, said = run("doctor")
    assert code == 1
    assert "ok python: 3.12" in said
    assert "error gpu: the driver is [old] → update it" in said
    assert "warning disk: slow → another disk" in said
    assert "3 checks: 1 error, 1 warning" in said
    monkeypatch.setattr(extract.planning.doctor, "checkers", lambda folder: [("python", lambda: CHECKS[0][1])])
    assert run("doctor")[0] == 0


def test_doctor_speaks_json(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    seen = []

    def checkers(folder: Path) -> list[object]:
        seen.append(folder)
        return [(name, lambda c=c: c) for name, c in CHECKS]

    monkeypatch.setattr(extract.planning.doctor, "checkers", checkers)
    code, said = run("doctor", "--json", "--store", tmp_path / "new" / "s.zarr")
    assert code == 1
    assert json.loads(said)[1] == {
        "name": "gpu",
        "status": "error",
        "detail": "the driver is [old]",
        "fix": "update it",
    }
    assert seen == [tmp_path]


def test_a_store_of_other_flags_is_refused(slides: Path, tmp_path: Path):
    from extract.errors import RecipeMismatchError

    run_extraction(slides / "fine.tif", tmp_path / "s.zarr", mpp=0.5, tile_px=64, runtime="torch")
    with pytest.raises(RecipeMismatchError):
        run("plan", slides, "--store", tmp_path / "s.zarr", "--mpp", "0.5", "--tile-px", "48")
