"""The store: exact bytes, zero-copy reads, and units that are whole or absent whatever happens."""

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from extract.errors import (
    EntryNotFoundError,
    RecipeMismatchError,
    SlideNotFoundError,
    StoreError,
    StoreFullError,
    UnitCorruptError,
)
from extract.store import TileRecipe, TissueRecipe, ZarrStore, difference, open_store
from extract.store.base import decode_id, encode_id
from extract.store.fingerprint import sha256_of
from tests.conftest import REPOSITORY
from tests.test_extract.small import EXECUTION, feature_recipe, matrix, tiles_unit, tree

RECIPE = TileRecipe()
HOSTILE = [
    "../../etc/passwd",
    "..",
    ".",
    "/etc/passwd",
    "a/../../b",
    "a\\..\\b",
    "~root",
    "_private",
    "__pycache__",
    ".hidden",
    "nul\0byte",
    "new\nline",
    "<script>alert(1)</script>",
    "100 %",
    "a%2Fb",
    "CON",
    "日本語/スライド",
    "é composed",
    "e\u0301 decomposed",
    "x" * 5000,
    "ü" * 300,
    " leading and trailing ",
    "a~b",
]


@pytest.fixture
def store(tmp_path: Path) -> ZarrStore:
    """An empty store with one entry."""
    store = ZarrStore.create(tmp_path / "s.zarr", RECIPE)
    store.create_entry("tiny", feature_recipe())
    return store


def add(store: ZarrStore, slide_id: str, n: int = 5, invalid: list[int] | None = None, seed: int = 0) -> np.ndarray:
    """Commit tiles and features of a slide."""
    store.write_tiles(tiles_unit(slide_id, n, seed))
    features = matrix(n, seed=seed)
    features[invalid or []] = 0
    store.write_features("tiny", slide_id, features, invalid or [], EXECUTION)
    return features


# ---------------------------------------------------------------- reading


def test_what_goes_in_comes_out(store: ZarrStore):
    features, unit = add(store, "site A/slide 1", 7), tiles_unit("site A/slide 1", 7)
    opened = open_store(store.path)
    assert opened.tile_recipe == RECIPE
    assert opened.entries() == ["tiny"]
    assert opened.feature_recipe("tiny") == feature_recipe()
    assert opened.slide_ids() == opened.slide_ids("tiny") == list(opened) == ["site A/slide 1"]
    slide = opened["site A/slide 1"]
    assert np.array_equal(slide.features("tiny"), features)
    assert np.array_equal(slide.coords(), unit.coords)
    assert np.array_equal(slide.tissue_fraction, unit.tissue_fraction)
    assert np.array_equal(slide.thumbnail, unit.thumbnail)
    assert slide.record["slide_id"] == "site A/slide 1"
    assert slide.record["mpp"] == unit.record["mpp"]
    assert slide.feature_record("tiny")["execution"]["batch_size"] == EXECUTION.batch_size
    assert (opened.n_tiles("site A/slide 1", "tiny"), opened.dim("tiny"), len(opened)) == (7, 6, 1)
    assert (slide.features("tiny").dtype, slide.coords().dtype) == (np.float16, np.int32)


def test_the_tissue_mask_comes_back_as_it_was(store: ZarrStore, rng: np.random.Generator):
    mask = rng.random((90, 120)) < 0.5
    mask[:, :60] = True
    store.write_tiles(replace(tiles_unit("s"), tissue_mask=mask))
    back = store["s"].tissue_mask
    assert back.dtype == bool
    assert np.array_equal(back, mask)
    array = zarr.open_array(store.path / "tiles/s/tissue_mask", mode="r")
    assert (array.dtype, array.shape) == (np.uint8, mask.shape)
    assert array.nbytes_stored() < mask.size
    assert store["s"].record["sha256"]["tissue_mask"] == sha256_of(mask.astype(np.uint8))


def test_a_slide_without_a_tissue_mask_says_so(store: ZarrStore):
    store.write_tiles(tiles_unit("imported"))
    assert "tissue_mask" not in store["imported"].record["sha256"]
    with pytest.raises(StoreError, match=r"no tissue mask for slide 'imported' → .* → extract"):
        _ = store["imported"].tissue_mask


def test_zarr_python_reads_the_same_bytes(store: ZarrStore):
    features = add(store, "a/b c", 11)
    group = zarr.open_group(store.path, mode="r")
    name = encode_id("a/b c")
    assert group.metadata.zarr_format == 3
    array = group[f"features/tiny/{name}"]
    assert array[:].tobytes() == features.tobytes()
    assert array.chunks == array.shape == (11, 6)
    assert array.attrs["tessera"]["slide_id"] == "a/b c"
    unit = tiles_unit("a/b c", 11)
    assert group[f"tiles/{name}/coords"][:].tobytes() == unit.coords.tobytes()
    assert group[f"tiles/{name}/tissue_fraction"][:].tobytes() == unit.tissue_fraction.tobytes()
    assert group[f"tiles/{name}/thumbnail"][:].tobytes() == unit.thumbnail.tobytes()
    assert group.attrs["tessera"]["format"] == 1
    assert sorted(group["tiles"].group_keys()) == [name]
    assert sorted(group["features/tiny"].array_keys()) == [name]


def test_the_chunk_file_is_the_matrix(store: ZarrStore):
    features = add(store, "s")
    assert (store.path / "features" / "tiny" / "s" / "c" / "0" / "0").read_bytes() == features.tobytes()


def test_features_are_a_read_only_view_of_the_file(store: ZarrStore):
    add(store, "s")
    view = store["s"].features("tiny")
    assert not view.flags.owndata
    assert not view.flags.writeable
    base = view
    while isinstance(base.base, np.ndarray):
        base = base.base
    assert isinstance(base, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        view[0, 0] = 1
    # the view shows the file itself
    chunk = store.path / "features" / "tiny" / "s" / "c" / "0" / "0"
    with open(chunk, "r+b") as file:
        file.write(np.float16(42).tobytes())
    assert view[0, 0] == 42


def test_invalid_rows_are_handed_out_by_no_reader(store: ZarrStore):
    features = add(store, "s", 6, invalid=[4, 1])
    slide = store["s"]
    assert slide.feature_record("tiny")["invalid_rows"] == [1, 4]
    assert slide.valid("tiny").tolist() == [True, False, True, True, False, True]
    assert np.array_equal(slide.features("tiny"), features[[0, 2, 3, 5]])
    assert np.array_equal(slide.coords("tiny"), slide.coords()[[0, 2, 3, 5]])
    assert len(slide.coords()) == 6
    assert store.n_tiles("s", "tiny") == 4


def test_an_array_that_zarr_python_rewrote_is_still_read(store: ZarrStore):
    features = add(store, "s", 9)
    node = store.path / "features" / "tiny" / "s"
    attributes = json.loads((node / "zarr.json").read_text())["attributes"]
    shutil.rmtree(node)
    array = zarr.create_array(node, shape=(9, 6), dtype="float16", chunks=(4, 6), attributes=attributes)
    array[:] = features
    assert np.array_equal(store["s"].features("tiny"), features)


def test_float32_entries(store: ZarrStore):
    store.create_entry("wide", feature_recipe(dtype="float32"))
    store.write_tiles(tiles_unit("s"))
    features = matrix(dtype="float32") * 1e6
    store.write_features("wide", "s", features, [], EXECUTION)
    assert np.array_equal(store["s"].features("wide"), features)
    assert store["s"].features("wide").dtype == np.float32


# ---------------------------------------------------------------- what is absent


def test_absent_things_are_named_with_what_there_is(store: ZarrStore):
    add(store, "patient 12")
    with pytest.raises(SlideNotFoundError, match=r"patient 13.*patient 12"):
        store["patient 13"]
    with pytest.raises(KeyError):
        store["patient 13"]
    with pytest.raises(EntryNotFoundError, match=r"'uni'.*\['tiny'\]"):
        store["patient 12"].features("uni")
    with pytest.raises(EntryNotFoundError):
        store.slide_ids("uni")
    with pytest.raises(EntryNotFoundError):
        store.feature_recipe("../tiles")
    store.write_tiles(tiles_unit("cut only"))
    assert store.slide_ids() == ["cut only", "patient 12"]
    assert store.slide_ids("tiny") == ["patient 12"]
    with pytest.raises(EntryNotFoundError, match="cut only"):
        store["cut only"].features("tiny")


def test_opening_what_is_no_store_is_an_error(tmp_path: Path):
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(StoreError, match="mil extract"):
            open_store(path)


@pytest.mark.parametrize("kind", ["folder", "file", "zarr group"])
def test_a_folder_that_is_no_store_is_refused_untouched(tmp_path: Path, kind: str):
    path = tmp_path / "precious"
    if kind == "folder":
        path.mkdir()
        (path / "thesis.txt").write_text("all of it")
    elif kind == "file":
        path.write_text("all of it")
    else:
        zarr.create_group(path, attributes={"mine": 1})
    before = tree(tmp_path)
    with pytest.raises(StoreError):
        ZarrStore.create(path, RECIPE)
    assert tree(tmp_path) == before


def test_a_store_of_another_format_or_edited_by_hand_is_refused(store: ZarrStore):
    node = store.path / "zarr.json"
    original = json.loads(node.read_text())
    for key, value, message in (("format", 2, "format 2"), ("fingerprint", "0", "by hand")):
        changed = json.loads(json.dumps(original))
        changed["attributes"]["tessera"][key] = value
        node.write_text(json.dumps(changed))
        with pytest.raises(StoreError, match=message):
            open_store(store.path)
    node.write_text(json.dumps(original)[:-20])
    with pytest.raises(UnitCorruptError):
        open_store(store.path)


# ---------------------------------------------------------------- recipes


@pytest.mark.parametrize(
    ("change", "field"),
    [({"mpp": 0.25}, "mpp: 0.5 → 0.25"), ({"tissue": TissueRecipe(closing_px=3)}, "tissue.closing_px: 2 → 3")],
)
def test_another_tile_recipe_is_refused_by_field(store: ZarrStore, change: dict, field: str):
    store.write_tiles(tiles_unit("a"))
    before = tree(store.path)
    with pytest.raises(RecipeMismatchError, match=field):
        ZarrStore.create(store.path, replace(RECIPE, **change))
    assert tree(store.path) == before
    assert difference(ZarrStore.create(store.path, RECIPE).tile_recipe, RECIPE) == []


def test_another_feature_recipe_is_refused_by_field(store: ZarrStore):
    for change, field in (
        ({"weights_sha256": "1" * 64}, "weights_sha256"),
        ({"pooling": "avg"}, "pooling: model → avg"),
    ):
        with pytest.raises(RecipeMismatchError, match=field):
            store.create_entry("tiny", feature_recipe(**change))
    store.create_entry("tiny", feature_recipe())
    store.create_entry("other", feature_recipe(pooling="avg"))
    assert store.entries() == ["other", "tiny"]


@pytest.mark.parametrize("name", ["", "../x", "A", "a b", "a/b", ".hidden", "é", "a@view", "a@view-", "zarr.json\n"])
def test_entry_names_are_plain(store: ZarrStore, name: str):
    before = tree(store.path.parent)
    with pytest.raises(StoreError, match="entry name"):
        store.create_entry(name, feature_recipe())
    assert tree(store.path.parent) == before


def test_an_entry_is_not_called_zarr_json(store: ZarrStore):
    with pytest.raises(StoreError, match="entry name"):
        store.create_entry("zarr.json", feature_recipe())


def test_views_are_entries_of_their_own(store: ZarrStore):
    store.create_entry("tiny@view-3", feature_recipe(view="view-3"))
    assert store.entries() == ["tiny", "tiny@view-3"]


# ---------------------------------------------------------------- ids


@pytest.mark.parametrize("slide_id", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_id_stays_inside_the_store(tmp_path: Path, slide_id: str):
    store = ZarrStore.create(tmp_path / "deep" / "s.zarr", RECIPE)
    store.create_entry("tiny", feature_recipe())
    features = add(store, slide_id)
    folders = {path.name for path in (store.path / "tiles").iterdir() if path.is_dir()}
    assert (
        folders == {encode_id(slide_id)} == {p.name for p in (store.path / "features" / "tiny").iterdir() if p.is_dir()}
    )
    assert {path.name for path in tmp_path.iterdir()} == {"deep"}
    assert {path.name for path in (tmp_path / "deep").iterdir()} == {"s.zarr"}
    assert store.slide_ids() == store.slide_ids("tiny") == [slide_id]
    assert np.array_equal(store[slide_id].features("tiny"), features)
    assert store[slide_id].record["slide_id"] == slide_id
    assert zarr.open_group(store.path, mode="r")[f"features/tiny/{encode_id(slide_id)}"].shape == features.shape


@settings(max_examples=300)
@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=400))
def test_file_names_of_ids_are_safe_and_reversible(slide_id: str):
    name = encode_id(slide_id)
    assert name.isascii()
    assert len(name) <= 200
    assert not set(name) & set('/\\:*?"<>| ')
    assert not name.startswith((".", "_"))
    assert decode_id(name) in (slide_id, None)
    if len(name) < 150:
        assert decode_id(name) == slide_id


@settings(max_examples=200)
@given(st.lists(st.text(st.sampled_from("aA.%_~/ é2F"), min_size=1, max_size=6), unique=True, min_size=2))
def test_two_ids_never_share_a_file_name(ids: list[str]):
    assert len({encode_id(slide_id) for slide_id in ids}) == len(ids)


def test_long_ids_with_one_beginning_differ_in_their_digest(store: ZarrStore):
    ids = ["x" * 1000 + end for end in "ab"]
    for seed, slide_id in enumerate(ids):
        add(store, slide_id, seed=seed)
    assert store.slide_ids() == ids
    assert not np.array_equal(store[ids[0]].features("tiny"), store[ids[1]].features("tiny"))


def test_an_empty_id_is_refused(store: ZarrStore):
    with pytest.raises(StoreError, match="empty"):
        store.write_tiles(tiles_unit(""))


@pytest.mark.parametrize("slide_id", ["zarr.json", "scan.partial"])
def test_an_id_like_a_name_of_the_stores_own_is_kept(store: ZarrStore, slide_id: str):
    features = add(store, slide_id)
    assert store.slide_ids("tiny") == [slide_id]
    assert np.array_equal(store[slide_id].features("tiny"), features)


def test_an_id_from_a_file_name_that_is_not_utf_8_is_kept(store: ZarrStore):
    slide_id = os.fsdecode("Präparat".encode("latin-1"))
    add(store, slide_id)
    assert store.slide_ids() == [slide_id]


# ---------------------------------------------------------------- damage and change


def test_a_truncated_chunk_is_detected_on_reading(store: ZarrStore):
    add(store, "s")
    for chunk in ("features/tiny/s/c/0/0", "tiles/s/coords/c/0/0"):
        file = store.path / chunk
        content = file.read_bytes()
        file.write_bytes(content[:-2])
        with pytest.raises(UnitCorruptError, match=r"extract"):
            store["s"].features("tiny") if "features" in chunk else store["s"].coords()
        file.unlink()
        with pytest.raises(UnitCorruptError):
            store["s"].features("tiny") if "features" in chunk else store["s"].coords()
        file.write_bytes(content)
    assert len(store["s"].features("tiny")) == 5


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe"])
def test_a_damaged_record_is_detected_on_reading(store: ZarrStore, content: bytes):
    add(store, "s")
    (store.path / "features/tiny/s/zarr.json").write_bytes(content)
    with pytest.raises(UnitCorruptError):
        store["s"].features("tiny")


@pytest.mark.parametrize("content", [b"[]", b"null", b'{"attributes": null}', b'{"attributes": {}}'])
def test_a_record_that_is_no_object_is_detected_on_reading(store: ZarrStore, content: bytes):
    add(store, "s")
    (store.path / "features/tiny/s/zarr.json").write_bytes(content)
    with pytest.raises(UnitCorruptError):
        store["s"].features("tiny")


def test_features_of_other_tiles_are_refused_and_made_anew(store: ZarrStore):
    add(store, "s", 5)
    shutil.rmtree(store.path / "tiles" / "s")
    store.write_tiles(tiles_unit("s", 8, seed=3))
    assert not store.has_features("s", "tiny")
    with pytest.raises(UnitCorruptError, match="other tiles"):
        store["s"].features("tiny")
    with pytest.raises(UnitCorruptError, match="other tiles"):
        store.n_tiles("s", "tiny")
    again = matrix(8, seed=9)
    store.write_features("tiny", "s", again, [], EXECUTION)
    assert store.has_features("s", "tiny")
    assert np.array_equal(store["s"].features("tiny"), again)


def test_features_of_other_tiles_are_not_listed_as_complete(store: ZarrStore):
    add(store, "s", 5)
    shutil.rmtree(store.path / "tiles" / "s")
    store.write_tiles(tiles_unit("s", 8, seed=3))
    assert store.slide_ids("tiny") == []


def test_features_of_tiles_of_another_scale_or_file_are_refused(store: ZarrStore):
    unit = tiles_unit("s", 5)
    store.write_tiles(unit)
    store.write_features("tiny", "s", matrix(), [], EXECUTION)
    shutil.rmtree(store.path / "tiles" / "s")
    store.write_tiles(replace(unit, record={**unit.record, "tile_l0": 128.0, "slide": {"sampled_sha256": "other"}}))
    assert not store.has_features("s", "tiny")


def test_features_without_tiles_are_not_listed_as_complete(store: ZarrStore):
    add(store, "s")
    shutil.rmtree(store.path / "tiles" / "s")
    assert store.slide_ids("tiny") == []


@pytest.mark.parametrize(
    "features",
    [matrix(4), matrix(5, 7), matrix(dtype="float32"), np.zeros((5,), np.float16)],
    ids=["rows", "dim", "dtype", "1-d"],
)
def test_features_that_do_not_fit_are_refused(store: ZarrStore, features: np.ndarray):
    store.write_tiles(tiles_unit("s"))
    before = tree(store.path)
    with pytest.raises(StoreError, match="'s'"):
        store.write_features("tiny", "s", features, [], EXECUTION)
    assert tree(store.path) == before


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_not_finite_are_not_stored(store: ZarrStore, value: float):
    store.write_tiles(tiles_unit("s"))
    features = matrix()
    features[2, 3] = value
    with pytest.raises(StoreError, match="finite"):
        store.write_features("tiny", "s", features, [], EXECUTION)
    assert store.slide_ids("tiny") == []
    assert not list((store.path / "features" / "tiny").glob("*.partial"))


def test_features_of_an_uncut_slide_are_refused(store: ZarrStore):
    with pytest.raises(SlideNotFoundError):
        store.write_features("tiny", "s", matrix(), [], EXECUTION)


# ---------------------------------------------------------------- two writers


def test_the_second_commit_of_a_unit_changes_nothing(store: ZarrStore):
    first = add(store, "s", seed=0)
    before = tree(store.path)
    store.write_tiles(tiles_unit("s", 5, seed=1))
    store.write_features("tiny", "s", matrix(seed=1), [], EXECUTION)
    assert tree(store.path) == before
    assert np.array_equal(store["s"].features("tiny"), first)


def test_writers_racing_on_one_unit_end_in_one_commit(store: ZarrStore, monkeypatch: pytest.MonkeyPatch):
    barrier, rename, renames = threading.Barrier(4), os.rename, []

    def together(source: Path, target: Path) -> None:
        barrier.wait(timeout=20)
        try:
            rename(source, target)
        except OSError as error:
            renames.append(error.errno)
            raise
        renames.append(0)

    monkeypatch.setattr("extract.store.zarr_store.os.rename", together)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: store.write_tiles(tiles_unit("s")), range(4)))
        list(pool.map(lambda _: store.write_features("tiny", "s", matrix(), [], EXECUTION), range(4)))
    assert renames.count(0) == 2
    assert len(renames) == 8
    assert np.array_equal(store["s"].features("tiny"), matrix())
    assert not [path for path in store.path.rglob("*") if ".partial" in path.name]


def test_writers_racing_to_replace_stale_features_both_succeed(store: ZarrStore, monkeypatch: pytest.MonkeyPatch):
    add(store, "s", 5)
    shutil.rmtree(store.path / "tiles" / "s")
    store.write_tiles(tiles_unit("s", 8, seed=3))
    barrier, has_features = threading.Barrier(2), ZarrStore.has_features

    def both_see_stale(self: ZarrStore, slide_id: str, entry: str) -> bool:
        stale = has_features(self, slide_id, entry)
        barrier.wait(timeout=20)
        return stale

    monkeypatch.setattr(ZarrStore, "has_features", both_see_stale)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: store.write_features("tiny", "s", matrix(8), [], EXECUTION), range(2)))
    assert np.array_equal(store["s"].features("tiny"), matrix(8))


def test_a_store_whose_making_was_killed_can_be_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "s.zarr"

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("extract.store.zarr_store.replace_json", killed)
        with pytest.raises(KeyboardInterrupt):
            ZarrStore.create(path, RECIPE)
    store = ZarrStore.create(path, RECIPE)
    store.create_entry("tiny", feature_recipe())
    add(store, "s")


def test_workers_racing_to_make_a_store_all_get_it(tmp_path: Path):
    def make(path: Path) -> None:
        store = ZarrStore.create(path, RECIPE)
        store.create_entry("tiny", feature_recipe())

    failures = []
    for number in range(20):
        with ThreadPoolExecutor(4) as pool:
            for future in [pool.submit(make, tmp_path / f"{number}.zarr") for _ in range(4)]:
                if future.exception():
                    failures.append(future.exception())
    assert not failures


# ---------------------------------------------------------------- crashes and full disks


def test_killed_writers_leave_whole_units_or_none(tmp_path: Path):
    rounds = int(os.environ.get("TESSERA_CRASH_ROUNDS", "30"))
    command = [sys.executable, "-m", "tests.test_extract.crash_writer", str(tmp_path), str(rounds), "1"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60 + 2 * rounds)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["wrong"] == []
    # the kills hit writers at work, some of them within a unit
    assert result["hits"] >= rounds // 3
    assert result["partials"] >= 1


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize(
    "step",
    ["zarr_store.write_array", "zarr_store.write_json", "zarr_store._write_picture", "files.sync", "files.os.rename"],
)
def test_a_full_disk_at_any_step_leaves_the_store_as_it_was(
    store: ZarrStore, monkeypatch: pytest.MonkeyPatch, step: str, code: int
):
    add(store, "kept")
    before = tree(store.path)

    def full(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(f"extract.store.{step}", full)
        with pytest.raises(StoreFullError, match=r"needs about 0\.0 MB.*free some space"):
            store.write_tiles(tiles_unit("new"))
    assert tree(store.path) == before
    assert not [path for path in store.path.rglob("*") if ".partial" in path.name]
    assert np.array_equal(open_store(store.path)["kept"].features("tiny"), matrix())
    add(store, "new")
    assert store.slide_ids("tiny") == ["kept", "new"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if done.returncode != 0:
        pytest.skip("mounting a small file system is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_really_full_disk_says_how_much_is_needed_and_spoils_nothing(small_disk: Path):
    store = ZarrStore.create(small_disk / "s.zarr", RECIPE)
    store.create_entry("wide", feature_recipe(dim=4096))
    store.write_tiles(tiles_unit("a", 100))
    store.write_features("wide", "a", matrix(100, 4096), [], EXECUTION)
    store.write_tiles(tiles_unit("b", 300))
    before = tree(store.path)
    with pytest.raises(StoreFullError, match=r"MB free.*needs about 2\.5 MB"):
        store.write_features("wide", "b", matrix(300, 4096), [], EXECUTION)
    assert tree(store.path) == before
    assert not [path for path in store.path.rglob("*") if ".partial" in path.name]
    assert np.array_equal(open_store(store.path)["a"].features("wide"), matrix(100, 4096))


def test_a_store_can_be_made_once_there_is_space_again(small_disk: Path):
    filler = small_disk / "filler"
    with pytest.raises(OSError, match="space"):
        filler.write_bytes(bytes(4 << 20))
    with pytest.raises(StoreFullError):
        ZarrStore.create(small_disk / "s.zarr", RECIPE)
    filler.unlink()
    ZarrStore.create(small_disk / "s.zarr", RECIPE)


# ---------------------------------------------------------------- the run log


def test_a_run_log_is_one_json_line_per_slide(store: ZarrStore):
    log = store.start_run()
    lines = [{"slide_id": 'é/\n"x"', "outcome": "failed"}, {"run": {"seconds": 1.5}}]
    for line in lines:
        log.append(line)
    assert [json.loads(line) for line in log.path.read_text(encoding="utf-8").splitlines()] == lines
    assert log.path.parent == store.path / "runs"


def test_one_flipped_byte_is_found_when_features_are_verified(tmp_path: Path):
    store = ZarrStore.create(tmp_path / "s.zarr", RECIPE)
    store.create_entry("tiny", feature_recipe())
    store.write_tiles(tiles_unit("a"))
    store.write_features("tiny", "a", matrix(), [], EXECUTION)
    store["a"].verify_features("tiny")
    chunk = store["a"].feature_path("tiny") / "c" / "0" / "0"
    content = bytearray(chunk.read_bytes())
    content[3] ^= 1
    chunk.write_bytes(content)
    with pytest.raises(UnitCorruptError, match=r"slide 'a'.*checksum"):
        store["a"].verify_features("tiny")


def test_a_store_in_which_nothing_was_cut_takes_another_recipe(tmp_path: Path):
    ZarrStore.create(tmp_path / "s.zarr", RECIPE)
    other = ZarrStore.create(tmp_path / "s.zarr", replace(RECIPE, mpp=9.0))
    assert open_store(tmp_path / "s.zarr").tile_recipe == other.tile_recipe == replace(RECIPE, mpp=9.0)
    other.write_tiles(tiles_unit("a"))
    with pytest.raises(RecipeMismatchError, match="mpp"):
        ZarrStore.create(tmp_path / "s.zarr", RECIPE)
