"""What a person can mistype is told before torch is loaded."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from extract.store import TileRecipe, create_store
from mil.config.preflight import check_board_names, check_inputs
from mil.errors import CohortError, ConfigError
from tests.conftest import REPOSITORY

LABELS = "slide_id,patient_id,subtype\n" + "".join(f"s{i},p{i},{'ab'[i % 2]}\n" for i in range(8))
CODE = """
import contextlib, io, json, sys
from mil.cli.main import main
for arguments in json.loads(sys.argv[1]):
    sys.argv, said, code = ["mil", *arguments], io.StringIO(), 0
    with contextlib.redirect_stderr(said):
        try: main()
        except SystemExit as end: code = end.code
    print(json.dumps([code, said.getvalue(), "torch" in sys.modules]))
"""
CASES: list[tuple[dict[str, str], tuple[str, ...]]] = [
    ({"--labels": "label.csv"}, ("label.csv", "did you mean 'labels.csv'")),
    ({"--target": "subtipe"}, ("'subtipe'", "did you mean 'subtype'")),
    ({"--store": "d.zarr"}, ("there is nothing", "mil extract")),
    ({"--store": ""}, ("got no store", "--store")),
    ({"--out": "taken"}, ("folder with --out",)),
    ({"--out": "file"}, ("it is a file",)),
    ({"--out": "file/b"}, ("cannot be written", "--out")),
    ({"--config": "none.yaml"}, ("none.yaml", "cannot be read")),
    ({"": "fold=3"}, ("unknown key fold", "did you mean 'folds'")),
    ({"": "folds=many"}, ("folds='many'", "whole number")),
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an empty store, a label table, and folders that are taken."""
    folder = tmp_path_factory.mktemp("early")
    create_store(folder / "c.zarr", TileRecipe())
    (folder / "labels.csv").write_text(LABELS)
    (folder / "taken").mkdir()
    (folder / "taken" / "mine.txt").touch()
    (folder / "file").touch()
    return folder


@pytest.mark.parametrize("command", ["train", "benchmark", "sweep"])
def test_it_is_told_without_torch(home: Path, command: str) -> None:
    commands = []
    for changed, _ in CASES:
        flags = {"--store": "c.zarr", "--labels": "labels.csv", "--target": "subtype", "--out": "new"} | changed
        settings = [flags.pop("")] if "" in flags else []
        settings += ["head=mean,max"] if command == "sweep" else []
        commands.append([command, *(part for flag in flags.items() if flag[1] for part in flag), *settings])
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "COLUMNS": "200"}
    call = [sys.executable, "-P", "-c", CODE, json.dumps(commands)]
    done = subprocess.run(call, cwd=home, env=environment, capture_output=True, text=True, check=True)
    ends = [json.loads(line) for line in done.stdout.splitlines()]
    for (_, words), (code, said, heavy) in zip(CASES, ends, strict=True):
        assert code == 2, said
        assert all(word in said for word in words), said
        assert not heavy, said
    assert not (home / "new").exists()


def test_heads_of_a_board_are_checked(tmp_path: Path) -> None:
    for heads in ("heads=[abml]", "heads=[mean,{name: abml}]"):
        with pytest.raises(ConfigError, match="did you mean 'abmil'"):
            check_board_names([heads], None)
    with pytest.raises(ConfigError, match=r"head.gated for head=mean → a key of abmil"):
        check_board_names(["heads=[{name: mean, gated: true}]"], None)
    (tmp_path / "config.yaml").write_text("stores: [a]\nheads: [{name: abml}]\nfolds: 3\n")
    with pytest.raises(ConfigError, match="did you mean 'abmil'"):
        check_board_names([], tmp_path / "config.yaml")
    check_board_names(["heads=all", "backbones=[a]", "folds=3"], None)


def test_what_is_given_goes_before_what_is_written(home: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(f"store: {home / 'c.zarr'}\nlabels: none.csv\ntarget: subtype\n")
    labels = str(home / "labels.csv")
    check_inputs("a training", [], tmp_path / "config.yaml", {"labels": labels})
    check_inputs("a training", [f"labels='{labels}'"], tmp_path / "config.yaml", {})
    check_inputs("a training", ["labels=other.csv"], tmp_path / "config.yaml", {"labels": labels})
    with pytest.raises(CohortError, match=r"none\.csv"):
        check_inputs("a training", [], tmp_path / "config.yaml", {})


def test_targets_of_other_tasks_are_read_too(home: Path, tmp_path: Path) -> None:
    table = tmp_path / "times.csv"
    table.write_text("slide_id,patient_id,months,died\n" + "".join(f"s{i},p{i},{i + 1},{i % 2}\n" for i in range(8)))
    given = {"store": str(home / "c.zarr"), "labels": str(table), "target": "months,died"}
    check_inputs("a training", ["task=survival"], None, given)
    with pytest.raises(CohortError, match="months,died"):
        check_inputs("a training", [], None, given)
    with pytest.raises(CohortError, match="'dead'"):
        check_inputs("a training", ["task=survival"], None, given | {"target": "months,dead"})
    table.write_text(table.read_text().replace("s3,p3,4,", "s3,p3,four,"))
    with pytest.raises(CohortError, match="slide s3"):
        check_inputs("a training", ["task=survival"], None, given)


def test_a_store_behind_a_url_is_not_asked(home: Path) -> None:
    given = {"store": "s3://bucket/c.zarr", "labels": str(home / "labels.csv"), "target": "subtype"}
    check_inputs("a training", [], None, given)
