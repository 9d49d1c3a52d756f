"""Folders for results: taken ones and those that cannot be written are refused, free ones stay as they are."""

from collections.abc import Callable
from pathlib import Path

import pytest

from mil.errors import RunError
from mil.runs.folders import check_board_folder, check_run_folder, check_sweep_folder

CHECKS = (check_run_folder, check_board_folder, check_sweep_folder)


def make(folder: Path, **files: str) -> Path:
    folder.mkdir()
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text)
    return folder


@pytest.mark.parametrize("check", CHECKS)
def test_a_new_or_an_empty_folder_is_taken_and_not_made(check: Callable[[Path], None], tmp_path: Path) -> None:
    check(tmp_path / "a" / "b")
    check(make(tmp_path / "empty"))
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
    assert list((tmp_path / "empty").iterdir()) == []


@pytest.mark.parametrize("check", CHECKS)
def test_a_file_and_what_cannot_be_written_are_refused(check: Callable[[Path], None], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="it is a file"):
        check(tmp_path / "file")
    with pytest.raises(RunError, match=r"file cannot be written \(Not a directory\) → make it writable, or give anoth"):
        check(tmp_path / "file" / "b")


@pytest.mark.parametrize("check", CHECKS)
def test_a_folder_of_something_else_is_refused(check: Callable[[Path], None], tmp_path: Path) -> None:
    with pytest.raises(RunError, match="with --out"):
        check(make(tmp_path / "other", mine_txt="x"))
    with pytest.raises(RunError, match="with --out"):
        check(make(tmp_path / "run", metrics_json="{}", config_yaml="sweep: {}"))


def test_what_was_begun_is_gone_on_with(tmp_path: Path) -> None:
    check_board_folder(make(tmp_path / "board", config_yaml="heads: [mean]"))
    check_sweep_folder(make(tmp_path / "sweep", config_yaml="sweep: {}"))
    check_run_folder(make(tmp_path / "run", metrics_json="{}"), overwrite=True)
    with pytest.raises(RunError, match="something else"):
        check_sweep_folder(tmp_path / "board")
