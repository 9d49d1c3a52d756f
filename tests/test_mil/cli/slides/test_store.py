"""``mil store``: what it prints, what it changes, and its exit codes."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from extract.errors import EntryNotFoundError, StoreError
from extract.store import Store, open_store
from mil.cli.main import app
from mil.cli.slides.store_report import size_text
from tests.test_extract.healthy import FORMATS, healthy_store, unit_files
from tests.test_extract.small import tree


@pytest.fixture(params=FORMATS)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """A healthy store of three slides and two entries."""
    return healthy_store(tmp_path / "cohort", request.param)


def run(*arguments: object, answer: str | None = None) -> tuple[int, str]:
    result = CliRunner(env={"COLUMNS": "120"}).invoke(app, ["store", *map(str, arguments)], input=answer)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def spoil(unit: Path) -> None:
    for path in unit_files(unit):
        path.write_bytes(b"?")


def test_ls_shows_entries_and_slides(store: Store):
    code, output = run("ls", store.path, "--slides")
    assert code == 0
    assert f"{store.format}, 3 slides, 18 tiles of 64 px at 0.5 µm/px" in output
    rows = {line.split()[0]: line for line in output.splitlines() if line.split()}
    assert "6 float32" in rows["wide"]
    assert "3 complete" in rows["tiny"]
    assert "complete: tiny, wide" in rows["b"]


def test_ls_tells_what_is_missing_damaged_and_left(store: Store):
    spoil(store.feature_path("a", "tiny"))
    unit = store.feature_path("b", "tiny")
    shutil.rmtree(unit) if unit.is_dir() else unit.unlink()
    (store.path / "tiles" / f"~{'0' * 32}.partial").write_bytes(bytes(2000))
    code, output = run("ls", store.path)
    assert code == 0
    assert "1 complete, 1 without, 1 damaged" in output
    assert "mil store verify" in output
    assert "1 leftover of runs, stopped or at work (2 kB)" in output


def test_ls_as_json_is_json(store: Store):
    code, output = run("ls", store.path, "--json")
    facts = json.loads(output)
    assert code == 0
    assert facts["path"] == str(store.path)
    assert [entry["complete"] for entry in facts["entries"]] == [3, 3]
    assert facts["slides"][0]["entries"] == {"tiny": "complete", "wide": "complete"}


def test_verify_of_a_healthy_store_says_so(store: Store):
    code, output = run("verify", store.path)
    assert code == 0
    assert "9 units" in output
    assert "nothing is wrong" in output
    assert run("verify", store.path, "--quick")[0] == 0


def test_verify_says_what_is_wrong_and_the_fix(store: Store):
    spoil(store.feature_path("a", "tiny"))
    before = tree(store.path)
    code, output = run("verify", store.path)
    assert code == 1
    assert "1 problem" in output
    (row,) = [line for line in output.splitlines() if line.split()[:2] == ["a", "tiny"]]
    assert "damaged" in row or "unreadable" in row
    assert f"fix: mil store repair {store.path}, then mil extract again" in output
    assert tree(store.path) == before
    assert run("verify", store.path, "--as", "wide")[0] == 0


def test_verify_as_json_is_json_whatever_it_finds(store: Store):
    assert json.loads(CliRunner().invoke(app, ["store", "verify", str(store.path), "--json"]).stdout) == []
    spoil(store.tiles_path("a"))
    result = CliRunner().invoke(app, ["store", "verify", str(store.path), "--json"])
    assert result.exit_code == 1
    (finding,) = json.loads(result.stdout)
    assert (finding["slide_id"], finding["entry"], finding["path"]) == ("a", None, str(store.tiles_path("a")))


def test_verify_compares_the_files_of_the_slides(store: Store, tmp_path: Path):
    (tmp_path / "slides").mkdir()
    (tmp_path / "slides" / "a.svs").write_bytes(b"not what was cut")
    code, output = run("verify", store.path, "--slides", tmp_path / "slides")
    assert code == 1
    assert "comparing 1 slide file; 2 of the store have no file there" in output
    assert "slide file: 16 bytes" in output
    (tmp_path / "slides" / "a.svs").rename(tmp_path / "slides" / "other.svs")
    code, output = run("verify", store.path, "--slides", tmp_path / "slides")
    assert code == 2
    assert "none of its 1 slides is in the store" in " ".join(output.replace("│", " ").split())


def test_a_store_whose_own_record_is_damaged_is_a_finding(store: Store):
    (store.path / store.root_name).write_text("?")
    for command in (["verify"], ["repair", "--yes"]):
        code, output = run(*command, store.path)
        assert code == 1
        assert "bring" in output


def test_no_store_and_no_entry_are_errors(store: Store, tmp_path: Path):
    with pytest.raises(StoreError, match="as store"):
        run("verify", tmp_path)
    with pytest.raises(EntryNotFoundError, match="wide"):
        run("verify", store.path, "--as", "wdie")


@pytest.mark.parametrize("answer", ["n\n", "", None])
def test_repair_without_a_yes_changes_nothing(store: Store, answer: str | None):
    spoil(store.feature_path("a", "tiny"))
    before = tree(store.path)
    code, output = run("repair", store.path, answer=answer)
    assert code == 1
    assert "Nothing was moved" in output
    assert str(store.feature_path("a", "tiny").relative_to(store.path)) in output
    assert tree(store.path) == before


@pytest.mark.parametrize(("flags", "answer"), [(["--yes"], None), ([], "y\n")])
def test_repair_moves_damage_aside(store: Store, flags: list[str], answer: str | None):
    spoil(store.feature_path("a", "tiny"))
    code, output = run("repair", store.path, *flags, answer=answer)
    assert code == 0
    assert "1 unit moved" in output
    assert run("verify", store.path)[0] == 0
    code, output = run("repair", store.path)
    assert (code, "nothing is wrong" in output) == (0, True)
    assert "in quarantine" in run("ls", store.path)[1]


def test_gc_lists_first_and_removes_when_told(store: Store):
    partial = store.path / "tiles" / f"~{'0' * 32}.partial"
    partial.write_bytes(bytes(2000))
    then = time.time() - 3 * 86400
    os.utime(partial, (then, then))
    code, output = run("gc", store.path)
    assert (code, partial.exists()) == (0, True)
    assert "half-built unit: 1 (2 kB); add --yes" in output
    assert "nothing to remove" in run("gc", store.path, "--older-than", "4d", "--yes")[1]
    code, output = run("gc", store.path, "--older-than", "2.5d", "--yes")
    assert (code, partial.exists()) == (0, False)
    assert "2 kB freed" in output
    assert run("gc", store.path, "--older-than", "soon")[0] == 2


def test_gc_removes_what_was_moved_aside_when_told(store: Store):
    spoil(store.feature_path("a", "tiny"))
    run("repair", store.path, "--yes")
    assert "nothing to remove" in run("gc", store.path, "--older-than", "0s", "--yes")[1]
    assert "quarantine: 1" in run("gc", store.path, "--older-than", "0s", "--quarantine", "--yes")[1]
    assert "quarantine" not in run("ls", store.path)[1]


@pytest.mark.parametrize(("source", "target"), [("zarr", "h5"), ("h5", "zarr")])
def test_convert_there_and_back_changes_nothing(tmp_path: Path, source: str, target: str):
    store = healthy_store(tmp_path / "one", source)
    code, output = run("convert", store.path, tmp_path / "two", "--format", target)
    assert code == 0
    assert "9 units copied, 0 there before, 0 failed" in output
    assert run("verify", tmp_path / "two")[0] == 0
    assert run("convert", tmp_path / "two", tmp_path / "three", "--format", source)[0] == 0
    assert tree(tmp_path / "three") == tree(store.path)
    assert open_store(tmp_path / "two").format == target


def test_convert_reports_what_is_damaged_and_goes_on(store: Store, tmp_path: Path):
    damaged, unusable = store.feature_path("a", "tiny"), store.feature_path("b", "tiny")
    # the matrix is damaged in one, the record in the other
    file = damaged / "c" / "0" / "0" if damaged.is_dir() else damaged
    matrix = store["a"].matrix("tiny").tobytes()
    file.write_bytes(file.read_bytes().replace(matrix, matrix[::-1]))
    spoil(unusable)
    other = {"zarr": "h5", "h5": "zarr"}[store.format]
    code, output = run("convert", store.path, tmp_path / "two", "--format", other)
    assert code == 1
    assert "7 units copied, 0 there before, 2 failed" in output
    assert output.count("[tiny]") == 2
    assert f"fix: mil store repair {store.path}" in output
    assert run("verify", tmp_path / "two")[0] == 0


def test_sizes_are_for_people():
    texts = {0: "0 B", 999: "999 B", 1500: "1.5 kB", 999_600: "1000 kB", 34_000_000: "34 MB", 1_230_000_000: "1.23 GB"}
    assert {n: size_text(n) for n in texts} == texts


def test_every_command_has_an_example():
    group = typer.main.get_command(app).commands["store"]  # type: ignore[attr-defined]
    for name, command in group.commands.items():
        assert f"mil store {name}" in (command.help or ""), name
