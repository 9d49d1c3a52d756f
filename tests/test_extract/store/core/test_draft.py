"""Drafts: what a killed run had saved is found again, exactly; damaged rows are not; one worker a slide."""

import errno
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from extract.errors import SlideClaimedError, StoreFullError
from extract.store import ZarrStore
from extract.store.core.draft import LEASE_S, Draft, clear_draft, is_claimed
from tests.test_extract.small import EXECUTION, TILES, feature_recipe, tiles_unit

SUBJECT = {"features": "f", "tiles": "t", "execution": "e"}
ROWS = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float16)
FLAGS = np.arange(20, dtype=np.uint8)


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    return tmp_path / "features" / "tiny" / "site%20A%2Fa"


def begin(unit: Path, subject: dict = SUBJECT) -> Draft:
    return Draft.open(unit, subject, 3, "float16")


def left_behind(unit: Path, *stops: int) -> Draft:
    """A draft whose process died after saving up to each of these rows."""
    draft = begin(unit)
    for stop in stops:
        draft.save(ROWS[:stop], [1, 7, 12], FLAGS[:stop])
    die(unit)
    return draft


def die(unit: Path) -> None:
    """Let the draft's process be one that is gone."""
    path = unit.with_name(f"~{unit.name}.draft")
    lines = path.read_text().splitlines()
    header = json.loads(lines[0])
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    path.write_text("\n".join([json.dumps(header | {"pid": gone.pid}), *lines[1:]]) + "\n")


def files(unit: Path) -> list[str]:
    return sorted(path.name for path in unit.parent.iterdir())


@pytest.mark.parametrize("stops", [(5,), (5, 9), (1, 2, 3, 20)])
def test_saved_rows_are_found_again(unit: Path, stops: tuple[int, ...]):
    left_behind(unit, *stops)
    draft = begin(unit)
    assert draft.features.dtype == np.float16
    assert np.array_equal(draft.features, ROWS[: stops[-1]])
    assert draft.invalid_rows == [row for row in (1, 7, 12) if row < stops[-1]]
    assert np.array_equal(draft.flags, FLAGS[: stops[-1]])
    # and again after the next death, the rows of both lives
    draft.save(ROWS, [1, 7, 12], FLAGS)
    die(unit)
    assert np.array_equal(begin(unit).features, ROWS)


def test_saving_fewer_rows_than_before_changes_nothing(unit: Path):
    draft = begin(unit)
    draft.save(ROWS[:9], [], FLAGS[:9])
    draft.save(ROWS[:4], [], FLAGS[:4])
    die(unit)
    assert len(begin(unit).features) == 9


@pytest.mark.parametrize("field", list(SUBJECT))
def test_rows_of_another_subject_are_dropped(unit: Path, field: str):
    left_behind(unit, 9)
    assert len(begin(unit, SUBJECT | {field: "other"}).features) == 0
    assert len(files(unit)) == 1


@pytest.mark.parametrize(
    ("harm", "kept"),
    [
        (lambda rows, path: rows.write_bytes(rows.read_bytes()[:-1]), 5),
        (lambda rows, path: rows.write_bytes(bytes([rows.read_bytes()[0] ^ 1]) + rows.read_bytes()[1:]), 0),
        (lambda rows, path: rows.write_bytes(rows.read_bytes()[:-1] + b"\x99"), 5),
        (lambda rows, path: rows.unlink(), 0),
        (lambda rows, path: path.write_text(path.read_text()[:-10]), 5),
        (lambda rows, path: path.write_text("\n".join(path.read_text().splitlines()[:2]) + "\nrubbish\n"), 5),
        (lambda rows, path: path.write_bytes(b""), 0),
        (lambda rows, path: path.write_bytes(b"\xff\x00"), 0),
    ],
)
def test_damaged_rows_are_not_taken_over(unit: Path, harm: Callable[[Path, Path], None], kept: int):
    left_behind(unit, 5, 9)
    (rows,) = unit.parent.glob("*.rows")
    path = unit.with_name(f"~{unit.name}.draft")
    harm(rows, path)
    os.utime(path, (0, 0))
    draft = begin(unit)
    assert np.array_equal(draft.features, ROWS[:kept])


def test_a_slide_at_work_is_claimed_and_says_by_whom(unit: Path):
    assert not is_claimed(unit)
    first = begin(unit)
    assert is_claimed(unit)
    with pytest.raises(SlideClaimedError, match=rf"process {os.getpid()} on {socket.gethostname()}"):
        begin(unit)
    first.discard()
    assert not is_claimed(unit)
    assert files(unit) == []
    begin(unit)


def test_a_claim_of_another_machine_ends_with_its_heartbeat(unit: Path):
    first = begin(unit)
    first.save(ROWS[:9], [], FLAGS[:9])
    path = unit.with_name(f"~{unit.name}.draft")
    header, *rest = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps(json.loads(header) | {"host": "elsewhere"}), *rest]) + "\n")
    with pytest.raises(SlideClaimedError):
        begin(unit)
    old = time.time() - LEASE_S - 1
    os.utime(path, (old, old))
    first.touch()
    with pytest.raises(SlideClaimedError):
        begin(unit)
    os.utime(path, (old, old))
    second = begin(unit)
    assert len(second.features) == 9
    # the first one wakes up: what it does harms neither the second nor the store
    first.save(ROWS, [], FLAGS)
    first.discard()
    second.save(ROWS[:12], [], FLAGS[:12])
    die(unit)
    assert np.array_equal(begin(unit).features, ROWS[:12])


def test_a_process_number_that_was_given_again_is_not_taken_for_the_worker(unit: Path):
    begin(unit).save(ROWS[:3], [], FLAGS[:3])
    path = unit.with_name(f"~{unit.name}.draft")
    header, *rest = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps(json.loads(header) | {"started": "1"}), *rest]) + "\n")
    assert len(begin(unit).features) == 3


def test_an_interrupted_run_leaves_its_rows_to_the_next_at_once(unit: Path):
    draft = begin(unit)
    draft.save(ROWS[:6], [], FLAGS[:6])
    draft.release()
    assert not is_claimed(unit)
    assert len(begin(unit).features) == 6


def test_an_interrupted_run_without_rows_leaves_nothing(unit: Path):
    begin(unit).release()
    assert files(unit) == []


@pytest.mark.parametrize("step", ["_begin", "_save_again", "_sweep"])
def test_a_worker_that_dies_while_it_takes_over_loses_no_rows(unit: Path, monkeypatch: pytest.MonkeyPatch, step: str):
    left_behind(unit, 9)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Draft, step, killed)
        with pytest.raises(KeyboardInterrupt):
            begin(unit)
    if step != "_begin":
        die(unit)
    assert not is_claimed(unit)
    draft = begin(unit)
    assert np.array_equal(draft.features, ROWS[:9])
    draft.discard()
    assert files(unit) == []


def test_a_full_disk_while_a_draft_is_taken_over_loses_no_rows(unit: Path, monkeypatch: pytest.MonkeyPatch):
    left_behind(unit, 9)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("extract.store.core.draft.sync", full)
        with pytest.raises(StoreFullError):
            begin(unit)
    assert not is_claimed(unit)
    assert np.array_equal(begin(unit).features, ROWS[:9])


def test_what_is_swept_is_not_of_a_slide_whose_name_goes_on(unit: Path):
    neighbour = unit.with_name(unit.name + ".b")
    left_behind(neighbour, 9)
    left_behind(unit, 5)
    begin(unit)
    die(unit)
    clear_draft(unit)
    assert np.array_equal(begin(neighbour).features, ROWS[:9])


def test_a_store_lists_no_draft_and_keeps_rows_by_recipe_tiles_and_execution(tmp_path: Path):
    store = ZarrStore.create(tmp_path / "s.zarr", TILES)
    store.create_entry("tiny", feature_recipe(3))
    store.write_tiles(tiles_unit("a", 20))
    store.draft("tiny", "a", EXECUTION).save(ROWS, [], FLAGS)
    assert store.slide_ids("tiny") == []
    assert store.is_claimed("a", "tiny")
    assert "a" in store
    die(tmp_path / "s.zarr" / "features" / "tiny" / "a")
    assert len(store.draft("tiny", "a", EXECUTION).features) == 20
