"""Repair moves damage aside and leaves a store that verifies; clearing up never touches what is at work."""

import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from extract.store import Store, open_store
from extract.store.upkeep.repair import YOUNGEST_S, find_garbage, gc_store, plan_repair, repair_store
from extract.store.upkeep.summary import summarise
from extract.store.upkeep.verify import Finding, verify_store
from tests.test_extract.healthy import FORMATS, healthy_store, unit_files, whole_unit
from tests.test_extract.small import EXECUTION, matrix, tree

DAY_S = 86400.0


@pytest.fixture(params=FORMATS)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """A healthy store of three slides and two entries."""
    return healthy_store(tmp_path / "store", request.param)


def spoil(unit: Path) -> None:
    for path in unit_files(unit):
        path.write_bytes(b"?")


def make_old(path: Path, age_s: float) -> None:
    """Set the times of a file, or of a folder and all in it, back."""
    then = time.time() - age_s
    for each in (*path.rglob("*"), path):
        os.utime(each, (then, then))


# ---------------------------------------------------------------- repair


def test_a_repaired_store_verifies_and_lost_nothing(store: Store):
    units = [store.tiles_path("a"), store.feature_path("b", "tiny"), store.feature_path("b", "wide")]
    for unit in units:
        spoil(unit)
    before = tree(store.path)
    moved = repair_store(store, plan_repair(verify_store(store)))
    names = [path.relative_to(store.path / "quarantine").parts[1:] for path in sorted(moved)]
    assert names == [unit.relative_to(store.path).parts for unit in sorted(units)]
    assert verify_store(store) == []
    # every file is somewhere, with the bytes that it had
    after = {
        name.split("/", 2)[2] if name.startswith("quarantine/") else name: content
        for name, content in tree(store.path).items()
    }
    assert after == before


def test_what_was_moved_can_be_made_again_and_embeddings_outlive_their_tiles(store: Store):
    healthy = tree(store.path)
    spoil(store.tiles_path("a"))
    spoil(store.feature_path("b", "tiny"))
    repair_store(store, plan_repair(verify_store(store)))
    assert "a" not in store
    assert not store.has_features("b", "tiny")
    store.write_tiles(whole_unit("a", seed=0))
    features = matrix(6, seed=1)
    features[2] = 0
    store.write_features("tiny", "b", features, [2], EXECUTION, {"blurred": [1, 4], "pen": []})
    assert store.has_features("a", "tiny")
    assert store.has_features("a", "wide")
    assert verify_store(store) == []
    assert {name: content for name, content in tree(store.path).items() if not name.startswith("quarantine")} == healthy


def test_embeddings_of_other_tiles_are_not_used_after_a_repair(store: Store):
    shutil.rmtree(store.tiles_path("a"), ignore_errors=True)
    store.tiles_path("a").unlink(missing_ok=True)
    store.write_tiles(whole_unit("a", seed=9))
    plan = plan_repair(verify_store(store))
    assert [move.path for move in plan.moves] == [store.tiles_path("a")]
    repair_store(store, plan)
    assert verify_store(store) == []
    store.write_tiles(whole_unit("a", seed=9))
    assert not store.has_features("a", "tiny")


def test_an_entry_without_a_recipe_goes_as_a_whole(store: Store):
    (store.path / "features" / "tiny" / store.entry_name).write_text("?")
    repair_store(store, plan_repair(verify_store(store)))
    assert open_store(store.path).entries() == ["wide"]
    assert verify_store(store) == []


def test_what_moving_does_not_mend_is_left_alone(store: Store, tmp_path: Path):
    finding = Finding("a", None, "slide file: changed", tmp_path / "a.svs", "bring it back", movable=False)
    plan = plan_repair([finding])
    assert (plan.moves, plan.left, plan.n_bytes) == ((), (finding,), 0)
    assert repair_store(store, plan) == []
    assert not (store.path / "quarantine").exists()


def test_a_unit_that_was_made_anew_meanwhile_is_not_moved(store: Store):
    unit = store.feature_path("a", "tiny")
    spoil(unit)
    plan = plan_repair(verify_store(store))
    features = matrix(6)
    features[2] = 0
    store.write_features("tiny", "a", features, [2], EXECUTION)
    if not store.has_features("a", "tiny"):
        pytest.fail("the writer replaces a damaged unit")
    assert repair_store(store, plan) == []
    assert store.has_features("a", "tiny")


def test_two_repairs_in_one_second_keep_both_units(store: Store):
    for _ in range(2):
        spoil(store.feature_path("a", "tiny"))
        repair_store(store, plan_repair(verify_store(store)))
        features = matrix(6)
        features[2] = 0
        store.write_features("tiny", "a", features, [2], EXECUTION)
    name = store.feature_path("a", "tiny").relative_to(store.path)
    assert len(list((store.path / "quarantine").glob(f"*/{name}"))) == 2


# ---------------------------------------------------------------- clearing up


def leave_behind(store: Store) -> dict[str, Path]:
    """What a killed writer leaves: a half-built unit, and a draft with rows of a slide without features."""
    half_built = store.path / "tiles" / f"~{'0' * 32}.partial"
    half_built.mkdir()
    (half_built / "part").write_bytes(bytes(1000))
    unit = store.feature_path("a", "tiny")
    shutil.rmtree(unit) if unit.is_dir() else unit.unlink()
    draft = store.draft("tiny", "a", EXECUTION)
    draft.save(matrix(3), [], np.zeros(3, np.uint8))
    (rows,) = unit.parent.glob("~*.rows")
    return {"partial": half_built, "draft": unit.with_name(f"~{unit.name}.draft"), "rows": rows}


def release(left: dict[str, Path]) -> None:
    """As if the worker had stopped."""
    with open(left["draft"], "a") as file:
        file.write('{"released": true}\n')


def test_garbage_is_found_removed_and_counted(store: Store):
    left = leave_behind(store)
    release(left)
    for path in left.values():
        make_old(path, 2 * DAY_S)
    garbage = find_garbage(store, DAY_S)
    assert {piece.path for piece in garbage} == set(left.values())
    assert {piece.kind for piece in garbage} == {"half-built unit", "draft", "saved rows"}
    healthy = {name: content for name, content in tree(store.path).items() if "~" not in name}
    assert gc_store(garbage) == sum(piece.n_bytes for piece in garbage) > 1000
    assert tree(store.path) == healthy
    assert store.leftovers() == []


def test_a_draft_at_work_stays_however_old_it_claims_to_be(store: Store):
    left = leave_behind(store)
    make_old(left["rows"], 9 * DAY_S)
    make_old(left["partial"], 9 * DAY_S)
    # the heartbeat is fresh
    assert {piece.path for piece in find_garbage(store, 0)} == {left["partial"]}


def test_a_draft_that_is_taken_up_after_the_look_stays(store: Store):
    left = leave_behind(store)
    release(left)
    for path in left.values():
        make_old(path, 2 * DAY_S)
    garbage = find_garbage(store, DAY_S)
    store.draft("tiny", "a", EXECUTION)
    assert gc_store(garbage) == 1000
    assert store.is_claimed("a", "tiny")


def test_what_is_young_stays(store: Store):
    left = leave_behind(store)
    release(left)
    assert find_garbage(store, 0) == []
    make_old(left["partial"], DAY_S)
    # a file in a half-built unit that is being written makes all of it young
    os.utime(left["partial"] / "part")
    assert find_garbage(store, 0) == []
    for path in left.values():
        make_old(path, YOUNGEST_S + 60)
    assert find_garbage(store, DAY_S) == []
    assert len(find_garbage(store, 0)) == 3


def test_quarantine_is_removed_only_when_asked_and_old(store: Store):
    spoil(store.feature_path("a", "tiny"))
    repair_store(store, plan_repair(verify_store(store)))
    make_old(next((store.path / "quarantine").iterdir()), 2 * DAY_S)
    assert find_garbage(store, DAY_S) == []
    assert find_garbage(store, 3 * DAY_S, quarantine=True) == []
    garbage = find_garbage(store, DAY_S, quarantine=True)
    assert gc_store(garbage) == sum(piece.n_bytes for piece in garbage) > 0
    assert list((store.path / "quarantine").iterdir()) == []
    assert summarise(store).quarantine_bytes == 0
