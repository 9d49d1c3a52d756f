"""What every store backend has to do: its tests subclass `StoreConformance` and say how it lies on disk."""

import errno
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from extract.errors import (
    EntryNotFoundError,
    RecipeMismatchError,
    SlideClaimedError,
    SlideNotFoundError,
    StoreError,
    StoreFullError,
    UnitCorruptError,
)
from extract.store import Store, TileRecipe, TilesUnit, TissueRecipe, create_store, difference, open_store
from extract.store.core.fingerprint import sha256_of
from extract.store.core.remote_path import RemotePath
from extract.store.core.unit import encode_id
from extract.store.formats.opening import BACKENDS
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
    "zarr.json",
    "entry.json",
    "tessera.json",
    "scan.partial",
    "scan.h5",
    "runs",
    os.fsdecode("Präparat".encode("latin-1")),
]


def add(store: Store, slide_id: str, n: int = 5, invalid: list[int] | None = None, seed: int = 0) -> np.ndarray:
    """Commit tiles and features of a slide."""
    store.write_tiles(tiles_unit(slide_id, n, seed))
    features = matrix(n, seed=seed)
    features[invalid or []] = 0
    store.write_features("tiny", slide_id, features, invalid or [], EXECUTION)
    return features


def flip_byte(file: Path, content: bytes) -> None:
    """Change one byte of ``content`` where it lies in a file."""
    whole = bytearray(file.read_bytes())
    whole[whole.index(content) + len(content) // 2] ^= 1
    file.write_bytes(whole)


def take_away(unit: Path) -> None:
    """Delete a unit: a folder, a file, or objects."""
    if isinstance(unit, RemotePath):
        for part in list(unit.rglob("*")):
            part.unlink()
        return
    shutil.rmtree(unit) if unit.is_dir() else unit.unlink()


def move(unit: Path, target: Path) -> None:
    """Give a unit another path."""
    if not isinstance(unit, RemotePath):
        os.rename(unit, target)
        return
    for part in list(unit.rglob("*")):
        (target / part.relative_to(unit)).write_bytes(part.read_bytes())
        part.unlink()


def partials(store: Store) -> list[Path]:
    """What half-built units there are."""
    return [path for path in store.path.rglob("*") if ".partial" in path.name]


class StoreConformance:
    """The tests of all backends.

    Attributes:
        format: name of the backend.
        placing: the function that gives a finished unit its final name.
        steps: functions of the package that a full disk can stop.
        claims: whether a slide that someone is at work on is claimed.
    """

    format: str
    placing: str
    steps: tuple[str, ...]
    claims = True

    def array_file(self, unit: Path, name: str) -> Path:
        """The file in which the bytes of a raw array lie."""
        raise NotImplementedError

    def record_file(self, unit: Path) -> Path:
        """The file in which a unit's record lies."""
        raise NotImplementedError

    def make(self, path: Path, recipe: TileRecipe = RECIPE) -> Store:
        """A store of this backend."""
        return create_store(path, recipe, self.format)

    @pytest.fixture
    def store(self, tmp_path: Path) -> Store:
        """An empty store with one entry."""
        store = self.make(tmp_path / "store")
        store.create_entry("tiny", feature_recipe())
        return store

    # ---------------------------------------------------------------- reading

    def test_what_goes_in_comes_out(self, store: Store):
        features, unit = add(store, "site A/slide 1", 7), tiles_unit("site A/slide 1", 7)
        opened = open_store(store.path)
        assert (opened.format, type(opened)) == (self.format, type(store))
        assert opened.tile_recipe == RECIPE
        assert opened.entries() == ["tiny"]
        assert opened.feature_recipe("tiny") == feature_recipe()
        slide = opened["site A/slide 1"]
        assert np.array_equal(slide.features("tiny"), features)
        assert np.array_equal(slide.coords(), unit.coords)
        assert np.array_equal(slide.tissue_fraction, unit.tissue_fraction)
        assert np.array_equal(slide.thumbnail, unit.thumbnail)
        assert slide.record["slide_id"] == "site A/slide 1"
        assert slide.record["mpp"] == unit.record["mpp"]
        assert slide.feature_record("tiny")["execution"]["batch_size"] == EXECUTION.batch_size
        assert (opened.n_tiles("site A/slide 1", "tiny"), opened.dim("tiny"), slide.n_tiles) == (7, 6, 7)
        assert (slide.features("tiny").dtype, slide.coords().dtype) == (np.float16, np.int32)
        assert slide.entries() == ["tiny"]
        slide.verify_tiles()
        slide.verify_features("tiny")

    def test_a_store_is_a_collection_of_slide_ids(self, store: Store):
        add(store, "b")
        store.write_tiles(tiles_unit("a"))
        assert list(store) == store.slide_ids() == ["a", "b"]
        assert store.slide_ids("tiny") == ["b"]
        assert len(store) == 2
        assert "a" in store
        assert "c" not in store
        assert "" not in store
        assert 3 not in store

    def test_what_is_inside_is_told(self, store: Store):
        add(store, "a", 5, invalid=[2])
        store.write_tiles(tiles_unit("b"))
        text = repr(open_store(store.path))
        for part in (type(store).__name__, "2 slides", "224 px", "0.5 µm/px", "tiny: 1 slides, float16 [n, 6]"):
            assert part in text
        text = repr(store["a"])
        for part in ("'a'", "5 tiles", "0.5 µm/px", "tiny: float16 [4, 6]", "1 tiles could not be decoded"):
            assert part in text

    def test_the_tissue_mask_comes_back_as_it_was(self, store: Store, rng: np.random.Generator):
        mask = rng.random((90, 120)) < 0.5
        store.write_tiles(replace(tiles_unit("s"), tissue_mask=mask))
        back = store["s"].tissue_mask
        assert back.dtype == bool
        assert np.array_equal(back, mask)
        assert store["s"].record["sha256"]["tissue_mask"] == sha256_of(mask.astype(np.uint8))

    def test_arrays_that_an_imported_slide_lacks_are_told(self, store: Store):
        unit = TilesUnit("s", None, None, None, {"n_tiles": 5})
        store.write_tiles(unit)
        store.write_features("tiny", "s", matrix(), [], EXECUTION)
        slide = open_store(store.path)["s"]
        assert np.array_equal(slide.features("tiny"), matrix())
        slide.verify_tiles()
        slide.verify_features("tiny")
        for name in ("coords", "tissue_fraction", "thumbnail", "tissue_mask"):
            with pytest.raises(StoreError, match=rf"no {name.replace('_', '[ _]')} (for|of) slide 's' → .* → extract"):
                slide.coords("tiny") if name == "coords" else getattr(slide, name)
        assert "unknown scale" in repr(slide)

    def test_float32_entries(self, store: Store):
        store.create_entry("wide", feature_recipe(dtype="float32"))
        store.write_tiles(tiles_unit("s"))
        features = matrix(dtype="float32") * 1e6
        store.write_features("wide", "s", features, [], EXECUTION)
        assert np.array_equal(store["s"].features("wide"), features)
        assert store["s"].features("wide").dtype == np.float32

    def test_features_are_a_read_only_view_of_the_file(self, store: Store):
        features = add(store, "s")
        view = store["s"].features("tiny")
        assert not view.flags.writeable
        assert view.flags.aligned
        for part in (view, store["s"].features("tiny", rows=slice(1, 4)), store["s"].coords()):
            base = part
            while isinstance(base.base, np.ndarray):
                base = base.base
            assert isinstance(base, np.memmap)
        with pytest.raises(ValueError, match="read-only"):
            view[0, 0] = 1
        # the view shows the file itself
        flip_byte(self.array_file(store.feature_path("s", "tiny"), "features"), features.tobytes())
        assert not np.array_equal(view, features)

    def test_invalid_rows_are_handed_out_by_no_reader(self, store: Store):
        features = add(store, "s", 6, invalid=[4, 1])
        slide = store["s"]
        assert slide.feature_record("tiny")["invalid_rows"] == [1, 4]
        assert slide.valid("tiny").tolist() == [True, False, True, True, False, True]
        assert np.array_equal(slide.features("tiny"), features[[0, 2, 3, 5]])
        assert np.array_equal(slide.coords("tiny"), slide.coords()[[0, 2, 3, 5]])
        assert len(slide.coords()) == len(slide.matrix("tiny")) == 6
        assert store.n_tiles("s", "tiny") == 4

    @pytest.mark.parametrize("invalid", [[], [0, 7]], ids=["all valid", "invalid rows"])
    @pytest.mark.parametrize(
        "rows",
        [
            slice(2, 7, 2),
            slice(None, None, -1),
            slice(3, 3),
            [4, 0, 4],
            [-1],
            [],
            np.array([5, 1]),
            np.arange(8) % 3 == 0,
        ],
        ids=str,
    )
    def test_chosen_rows_are_rows_of_all(self, store: Store, rows: object, invalid: list[int]):
        add(store, "s", 8 + len(invalid), invalid)
        slide = store["s"]
        index = rows if isinstance(rows, slice | np.ndarray) else np.array(rows, dtype=int)
        assert np.array_equal(slide.features("tiny", rows=rows), slide.features("tiny")[index])
        assert np.array_equal(slide.coords("tiny", rows=rows), slide.coords("tiny")[index])

    @pytest.mark.parametrize("rows", [[8], [-9], [0.5], [[1, 2]], 3, "1", [True, False]], ids=str)
    def test_rows_that_are_not_there_are_refused(self, store: Store, rows: object):
        add(store, "s", 8)
        with pytest.raises(StoreError, match="'s'"):
            store["s"].features("tiny", rows=rows)

    def test_a_slide_without_tiles_is_a_slide(self, store: Store):
        add(store, "none", 0)
        slide = open_store(store.path)["none"]
        assert slide.features("tiny").shape == (0, 6)
        assert slide.coords().shape == (0, 2)
        assert slide.tissue_fraction.shape == (0,)
        slide.verify_tiles()
        slide.verify_features("tiny")
        assert store.slide_ids("tiny") == ["none"]

    def test_equal_stores_have_equal_bytes(self, store: Store, tmp_path: Path):
        add(store, "s")
        other = self.make(tmp_path / "other")
        other.create_entry("tiny", feature_recipe())
        add(other, "s")
        assert tree(other.path) == tree(store.path)

    # ---------------------------------------------------------------- what is absent

    def test_absent_things_are_named_with_what_there_is(self, store: Store):
        add(store, "patient 12")
        with pytest.raises(SlideNotFoundError, match=r"patient 13.*patient 12"):
            store["patient 13"]
        with pytest.raises(KeyError):
            store["patient 13"]
        with pytest.raises(EntryNotFoundError, match=r"'uni'.*\['tiny'\]"):
            store["patient 12"].features("uni")
        for entry in ("uni", "../tiles"):
            with pytest.raises(EntryNotFoundError):
                store.slide_ids(entry)
            with pytest.raises(EntryNotFoundError):
                store.feature_recipe(entry)
        store.write_tiles(tiles_unit("cut only"))
        with pytest.raises(EntryNotFoundError, match="cut only"):
            store["cut only"].features("tiny")

    @pytest.mark.parametrize("kind", ["folder", "file"])
    def test_a_folder_that_is_no_store_is_refused_untouched(self, tmp_path: Path, kind: str):
        path = tmp_path / "precious"
        if kind == "folder":
            path.mkdir()
        (path / "thesis.txt" if kind == "folder" else path).write_text("all of it")
        before = tree(tmp_path)
        with pytest.raises(StoreError, match="not a store"):
            self.make(path)
        with pytest.raises(StoreError, match="mil extract"):
            open_store(path)
        assert tree(tmp_path) == before

    def test_another_format_is_refused(self, store: Store):
        add(store, "s")
        before = tree(store.path)
        for other in set(BACKENDS) - {self.format}:
            with pytest.raises(StoreError, match=f"'{other}'.*'{self.format}'.*convert"):
                create_store(store.path, RECIPE, other)
        with pytest.raises(StoreError, match="parquet"):
            create_store(store.path, RECIPE, "parquet")
        assert create_store(store.path, RECIPE).format == self.format
        assert tree(store.path) == before

    def test_a_store_of_another_version_or_edited_by_hand_is_refused(self, store: Store):
        file = store.path / store.root_name
        original = file.read_text()
        for key, value, message in (("format", 2, "format 2"), ("fingerprint", "0", "by hand")):
            record = store._unwrap(json.loads(original)) | {key: value}
            file.write_text(json.dumps(store._wrap(record)))
            with pytest.raises(StoreError, match=message):
                open_store(store.path)
        for damaged in (original[:-20], "[]", "null", "{}"):
            file.write_text(damaged)
            with pytest.raises(UnitCorruptError):
                open_store(store.path)

    # ---------------------------------------------------------------- modes

    def test_a_store_that_is_opened_for_reading_is_not_written(self, store: Store):
        add(store, "s")
        store.write_tiles(tiles_unit("t"))
        before, reading = tree(store.path), open_store(store.path)
        for write in (
            lambda: reading.create_entry("other", feature_recipe()),
            lambda: reading.write_tiles(tiles_unit("u")),
            lambda: reading.write_features("tiny", "t", matrix(), [], EXECUTION),
            lambda: reading.draft("tiny", "t", EXECUTION),
            lambda: reading.clear_draft("t", "tiny"),
            reading.start_run,
        ):
            with pytest.raises(StoreError, match=r"opened for reading.*'r\+'"):
                write()
        assert tree(store.path, but=()) == before
        open_store(store.path, "r+").write_features("tiny", "t", matrix(), [], EXECUTION)
        assert reading.slide_ids("tiny") == ["s", "t"]
        with pytest.raises(StoreError, match="mode 'w'"):
            open_store(store.path, "w")

    # ---------------------------------------------------------------- recipes

    @pytest.mark.parametrize(
        ("change", "field"),
        [({"mpp": 0.25}, "mpp: 0.5 → 0.25"), ({"tissue": TissueRecipe(closing_px=3)}, "tissue.closing_px: 2 → 3")],
    )
    def test_another_tile_recipe_is_refused_by_field(self, store: Store, change: dict, field: str):
        store.write_tiles(tiles_unit("a"))
        before = tree(store.path)
        with pytest.raises(RecipeMismatchError, match=field):
            self.make(store.path, replace(RECIPE, **change))
        assert tree(store.path) == before
        assert difference(self.make(store.path).tile_recipe, RECIPE) == []

    def test_a_store_in_which_nothing_was_cut_takes_another_recipe(self, store: Store):
        other = self.make(store.path, replace(RECIPE, mpp=9.0))
        assert open_store(store.path).tile_recipe == other.tile_recipe == replace(RECIPE, mpp=9.0)

    def test_a_worker_whose_empty_store_was_taken_over_cuts_nothing_into_it(self, store: Store):
        other = self.make(store.path, replace(RECIPE, mpp=9.0))
        with pytest.raises(RecipeMismatchError, match=r"mpp: 9.0 → 0.5"):
            store.write_tiles(tiles_unit("a"))
        assert open_store(store.path).slide_ids() == []
        other.write_tiles(tiles_unit("a"))

    def test_another_feature_recipe_is_refused_by_field(self, store: Store):
        for change, field in (
            ({"weights_sha256": "1" * 64}, "weights_sha256"),
            ({"pooling": "avg"}, "pooling: model → avg"),
        ):
            with pytest.raises(RecipeMismatchError, match=field):
                store.create_entry("tiny", feature_recipe(**change))
        store.create_entry("tiny", feature_recipe())
        store.create_entry("other", feature_recipe(pooling="avg"))
        store.create_entry("tiny@view-3", feature_recipe(view="view-3"))
        assert store.entries() == ["other", "tiny", "tiny@view-3"]

    @pytest.mark.parametrize(
        "name", ["", "../x", "A", "a b", "a/b", ".hidden", "é", "a@view", "a@view-", "zarr.json\n", "zarr.json"]
    )
    def test_entry_names_are_plain(self, store: Store, name: str):
        before = tree(store.path.parent)
        with pytest.raises(StoreError, match="entry name"):
            store.create_entry(name, feature_recipe())
        assert tree(store.path.parent) == before

    # ---------------------------------------------------------------- ids

    @pytest.mark.parametrize("slide_id", HOSTILE, ids=range(len(HOSTILE)))
    def test_a_hostile_id_stays_inside_the_store(self, tmp_path: Path, slide_id: str):
        store = self.make(tmp_path / "deep" / "store")
        store.create_entry("tiny", feature_recipe())
        features = add(store, slide_id)
        names = {path.name for path in (store.path / "tiles").iterdir()} - {"zarr.json"}
        assert names == {encode_id(slide_id) + store.suffix}
        assert [path.name for path in tmp_path.iterdir()] == ["deep"]
        assert [path.name for path in (tmp_path / "deep").iterdir()] == ["store"]
        opened = open_store(store.path)
        assert opened.slide_ids() == opened.slide_ids("tiny") == [slide_id]
        assert np.array_equal(opened[slide_id].features("tiny"), features)
        assert opened[slide_id].record["slide_id"] == slide_id
        opened[slide_id].verify_features("tiny")
        assert store.unit_paths() == {slide_id: store.tiles_path(slide_id)}
        assert store.unit_paths("tiny") == {slide_id: store.feature_path(slide_id, "tiny")}
        if self.claims:
            draft = store.draft("tiny", slide_id, EXECUTION)
            assert store.is_claimed(slide_id, "tiny")
            draft.discard()

    def test_ids_that_look_alike_are_two_slides(self, store: Store):
        ids = sorted(["x" * 1000 + "a", "x" * 1000 + "b", "a/b", "a%2Fb", "case", "Case"])
        for seed, slide_id in enumerate(ids):
            add(store, slide_id, seed=seed)
        assert store.slide_ids() == ids
        for seed, slide_id in enumerate(ids):
            assert np.array_equal(store[slide_id].features("tiny"), matrix(seed=seed))

    def test_an_empty_id_is_refused(self, store: Store):
        with pytest.raises(StoreError, match="empty"):
            store.write_tiles(tiles_unit(""))

    def test_a_unit_under_the_name_of_another_slide_is_refused(self, store: Store):
        add(store, "a")
        move(store.tiles_path("a"), store.tiles_path("b"))
        with pytest.raises(UnitCorruptError, match=r"'a'.*'b'"):
            _ = store["b"].record

    # ---------------------------------------------------------------- damage and change

    def test_a_truncated_or_absent_array_is_detected_on_reading(self, store: Store):
        features = add(store, "s")
        for unit, name, read in (
            (store.feature_path("s", "tiny"), "features", lambda: store["s"].features("tiny")),
            (store.tiles_path("s"), "coords", lambda: store["s"].coords()),
        ):
            file = self.array_file(unit, name)
            content = file.read_bytes()
            file.write_bytes(content[:-2])
            with pytest.raises(UnitCorruptError, match="extract"):
                read()
            file.write_bytes(content)
        assert np.array_equal(store["s"].features("tiny"), features)

    @pytest.mark.parametrize("wrong", [matrix(4), matrix(7), matrix(5, 3), matrix(10, 3), matrix(dtype="float32")])
    def test_a_matrix_of_another_form_than_was_written_is_refused(self, store: Store, wrong: np.ndarray):
        """As when a script has put other features into a file of the store."""
        add(store, "s")
        unit = store.feature_path("s", "tiny")
        record = store._read_record(unit)
        take_away(unit)
        store._commit(unit, lambda partial: store._build_features(partial, record, wrong), 0)
        slide = open_store(store.path)["s"]
        for read in (slide.features, slide.matrix, slide.verify_features):
            with pytest.raises(UnitCorruptError, match=r"'tiny' of slide 's' as .* → expected float16 \[5, 6\] → "):
                read("tiny")
        if wrong.shape != (7, 6):
            with pytest.raises(UnitCorruptError, match=r"'tiny' of slide 's' as "):
                slide.features("tiny", rows=[0, 4])

    def test_one_flipped_byte_is_found_when_a_unit_is_verified(self, store: Store):
        features, unit = add(store, "a"), tiles_unit("a")
        store["a"].verify_features("tiny")
        store["a"].verify_tiles()
        flip_byte(self.array_file(store.feature_path("a", "tiny"), "features"), features.tobytes())
        with pytest.raises(UnitCorruptError, match=r"slide 'a'.*checksum"):
            store["a"].verify_features("tiny")
        for name, array in (("coords", unit.coords), ("tissue_fraction", unit.tissue_fraction)):
            file = self.array_file(store.tiles_path("a"), name)
            content = file.read_bytes()
            flip_byte(file, array.tobytes())
            with pytest.raises(UnitCorruptError, match=rf"{name} of slide 'a'.*checksum"):
                store["a"].verify_tiles()
            file.write_bytes(content)
        store["a"].verify_tiles()

    @pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b"null", b'{"attributes": {"tessera": {}}}'])
    def test_a_damaged_record_is_detected_and_the_unit_made_anew(self, store: Store, content: bytes):
        features = add(store, "s")
        unit = store.feature_path("s", "tiny")
        self.record_file(unit).write_bytes(content)
        with pytest.raises(UnitCorruptError):
            store["s"].features("tiny")
        assert not store.has_features("s", "tiny")
        assert store.slide_ids("tiny") == []
        assert store.unit_paths("tiny") == {"s": unit}
        store.write_features("tiny", "s", features, [], EXECUTION)
        assert np.array_equal(store["s"].features("tiny"), features)

    def test_a_damaged_unit_of_a_long_id_spoils_no_listing(self, store: Store):
        add(store, "a")
        add(store, "x" * 1000)
        unit = store.tiles_path("x" * 1000)
        self.record_file(unit).write_bytes(b"{")
        assert "a" in store.slide_ids()
        assert store.slide_ids("tiny") == ["a"]
        assert store.unit_paths() == {"a": store.tiles_path("a"), unit.name.removesuffix(store.suffix): unit}

    def test_features_of_other_tiles_are_refused_and_made_anew(self, store: Store):
        add(store, "s", 5)
        take_away(store.tiles_path("s"))
        assert store.slide_ids("tiny") == []
        store.write_tiles(tiles_unit("s", 8, seed=3))
        assert store.slide_ids("tiny") == []
        for read in (lambda: store["s"].features("tiny"), lambda: store.n_tiles("s", "tiny")):
            with pytest.raises(UnitCorruptError, match="other tiles"):
                read()
        again = matrix(8, seed=9)
        store.write_features("tiny", "s", again, [], EXECUTION)
        assert store.has_features("s", "tiny")
        assert np.array_equal(store["s"].features("tiny"), again)

    def test_features_of_tiles_of_another_scale_or_file_are_refused(self, store: Store):
        add(store, "s")
        unit = tiles_unit("s")
        take_away(store.tiles_path("s"))
        store.write_tiles(replace(unit, record={**unit.record, "tile_l0": 128.0, "slide": {"sampled_sha256": "other"}}))
        assert not store.has_features("s", "tiny")

    @pytest.mark.parametrize(
        "features",
        [matrix(4), matrix(5, 7), matrix(dtype="float32"), np.zeros((5,), np.float16)],
        ids=["rows", "dim", "dtype", "1-d"],
    )
    def test_features_that_do_not_fit_are_refused(self, store: Store, features: np.ndarray):
        store.write_tiles(tiles_unit("s"))
        before = tree(store.path)
        with pytest.raises(StoreError, match="'s'"):
            store.write_features("tiny", "s", features, [], EXECUTION)
        assert tree(store.path) == before

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_features_that_are_not_finite_are_not_stored(self, store: Store, value: float):
        store.write_tiles(tiles_unit("s"))
        features = matrix()
        features[2, 3] = value
        with pytest.raises(StoreError, match="finite"):
            store.write_features("tiny", "s", features, [], EXECUTION)
        assert store.slide_ids("tiny") == []
        assert partials(store) == []

    def test_features_of_an_uncut_slide_are_refused(self, store: Store):
        with pytest.raises(SlideNotFoundError):
            store.write_features("tiny", "s", matrix(), [], EXECUTION)

    # ---------------------------------------------------------------- two writers

    def test_the_second_commit_of_a_unit_changes_nothing(self, store: Store):
        first = add(store, "s", seed=0)
        before = tree(store.path)
        store.write_tiles(tiles_unit("s", 5, seed=1))
        store.write_features("tiny", "s", matrix(seed=1), [], EXECUTION)
        assert tree(store.path) == before
        assert np.array_equal(store["s"].features("tiny"), first)

    def test_a_unit_is_seen_by_nobody_until_it_is_whole(self, store: Store, monkeypatch: pytest.MonkeyPatch):
        place = getattr(os, self.placing.rpartition(".")[2])
        seen: list[object] = []

        def look(source: Path, target: Path) -> None:
            other = open_store(store.path)
            seen.append((other.slide_ids(), other.slide_ids("tiny"), other.unit_paths("tiny"), len(other.leftovers())))
            place(source, target)

        monkeypatch.setattr(self.placing, look)
        store.write_tiles(tiles_unit("s"))
        store.write_features("tiny", "s", matrix(), [], EXECUTION)
        assert seen == [([], [], {}, 1), (["s"], [], {}, 1)]
        assert store.leftovers() == []
        assert store.slide_ids("tiny") == ["s"]

    def test_writers_racing_on_one_unit_end_in_one_commit(self, store: Store, monkeypatch: pytest.MonkeyPatch):
        place = getattr(os, self.placing.rpartition(".")[2])
        barrier, outcomes = threading.Barrier(4), []

        def together(source: Path, target: Path) -> None:
            barrier.wait(timeout=20)
            try:
                place(source, target)
            except OSError as error:
                outcomes.append(error.errno)
                raise
            outcomes.append(0)

        monkeypatch.setattr(self.placing, together)
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _: store.write_tiles(tiles_unit("s")), range(4)))
            list(pool.map(lambda _: store.write_features("tiny", "s", matrix(), [], EXECUTION), range(4)))
        assert outcomes.count(0) == 2
        assert len(outcomes) == 8
        assert np.array_equal(store["s"].features("tiny"), matrix())
        assert partials(store) == []

    def test_writers_racing_to_replace_stale_features_both_succeed(self, store: Store, monkeypatch: pytest.MonkeyPatch):
        add(store, "s", 5)
        take_away(store.tiles_path("s"))
        store.write_tiles(tiles_unit("s", 8, seed=3))
        barrier, has_features = threading.Barrier(2), Store.has_features

        def both_see_stale(self: Store, slide_id: str, entry: str) -> bool:
            stale = has_features(self, slide_id, entry)
            barrier.wait(timeout=20)
            return stale

        with monkeypatch.context() as patch, ThreadPoolExecutor(2) as pool:
            patch.setattr(Store, "has_features", both_see_stale)
            list(pool.map(lambda _: store.write_features("tiny", "s", matrix(8), [], EXECUTION), range(2)))
        assert np.array_equal(store["s"].features("tiny"), matrix(8))

    def test_a_store_whose_making_was_killed_can_be_made_again(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        def killed(*_: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr("extract.store.core.store.replace_json", killed)
            with pytest.raises(KeyboardInterrupt):
                self.make(tmp_path / "s")
        store = self.make(tmp_path / "s")
        store.create_entry("tiny", feature_recipe())
        add(store, "s")

    def test_workers_racing_to_make_a_store_all_get_it(self, tmp_path: Path):
        def make(path: Path) -> None:
            self.make(path).create_entry("tiny", feature_recipe())

        failures = []
        for number in range(20):
            with ThreadPoolExecutor(4) as pool:
                for future in [pool.submit(make, tmp_path / str(number)) for _ in range(4)]:
                    if future.exception():
                        failures.append(future.exception())
        assert not failures

    # ---------------------------------------------------------------- drafts

    def test_a_draft_is_resumed_and_listed_by_nobody(self, store: Store):
        store.write_tiles(tiles_unit("a", 20))
        rows, flags = matrix(20), np.zeros(20, np.uint8)
        draft = store.draft("tiny", "a", EXECUTION)
        draft.save(rows[:12], [3], flags[:12])
        assert store.is_claimed("a", "tiny")
        assert store.slide_ids("tiny") == []
        assert store.unit_paths("tiny") == {}
        assert len(store.leftovers()) == 2
        with pytest.raises(SlideClaimedError):
            store.draft("tiny", "a", EXECUTION)
        draft.release()
        again = store.draft("tiny", "a", EXECUTION)
        assert np.array_equal(again.features, rows[:12])
        assert again.invalid_rows == [3]
        again.release()
        assert len(store.draft("tiny", "a", replace(EXECUTION, batch_size=9)).features) == 0

    def test_what_a_killed_run_left_beside_a_unit_is_cleared(self, store: Store):
        store.write_tiles(tiles_unit("a"))
        draft = store.draft("tiny", "a", EXECUTION)
        draft.save(matrix()[:3], [], np.zeros(3, np.uint8))
        store.write_features("tiny", "a", matrix(), [], EXECUTION)
        draft.release()
        store.clear_draft("a", "tiny")
        assert store.leftovers() == []

    # ---------------------------------------------------------------- full disks

    def test_a_full_disk_at_any_step_leaves_the_store_as_it_was(self, store: Store, monkeypatch: pytest.MonkeyPatch):
        add(store, "kept")
        before = tree(store.path)
        for step in self.steps:
            for code in (errno.ENOSPC, errno.EDQUOT):

                def full(*_: object, code: int = code, **__: object) -> None:
                    raise OSError(code, os.strerror(code))

                with monkeypatch.context() as patch:
                    patch.setattr(f"extract.store.{step}", full)
                    with pytest.raises(StoreFullError, match=r"needs about 0\.0 MB.*free some space"):
                        store.write_tiles(tiles_unit("new"))
                assert tree(store.path) == before
                assert partials(store) == []
        assert np.array_equal(open_store(store.path)["kept"].features("tiny"), matrix())
        add(store, "new")
        assert store.slide_ids("tiny") == ["kept", "new"]

    @pytest.fixture
    def small_disk(self, tmp_path: Path) -> Iterator[Path]:
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

    def test_a_really_full_disk_says_how_much_is_needed_and_spoils_nothing(self, small_disk: Path):
        store = self.make(small_disk / "s")
        store.create_entry("wide", feature_recipe(dim=4096))
        store.write_tiles(tiles_unit("a", 100))
        store.write_features("wide", "a", matrix(100, 4096), [], EXECUTION)
        store.write_tiles(tiles_unit("b", 300))
        before = tree(store.path)
        with pytest.raises(StoreFullError, match=r"MB free.*needs about 2\.5 MB"):
            store.write_features("wide", "b", matrix(300, 4096), [], EXECUTION)
        assert tree(store.path) == before
        assert partials(store) == []
        assert np.array_equal(open_store(store.path)["a"].features("wide"), matrix(100, 4096))

    def test_a_disk_that_is_full_to_the_last_page_spoils_nothing(self, small_disk: Path):
        """The library behind a format must not be caught by it while it closes a file."""
        store = self.make(small_disk / "s")
        store.create_entry("tiny", feature_recipe())
        add(store, "a")
        for pages in range(6):
            filler = small_disk / "filler"
            filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - 4096 * pages))
            with pytest.raises(StoreFullError):
                store.write_tiles(tiles_unit("b", 4000))
            filler.unlink()
        assert store.slide_ids() == ["a"]
        assert partials(store) == []

    def test_a_store_can_be_made_once_there_is_space_again(self, small_disk: Path):
        filler = small_disk / "filler"
        with pytest.raises(OSError, match="space"):
            filler.write_bytes(bytes(4 << 20))
        with pytest.raises(StoreFullError):
            self.make(small_disk / "s")
        filler.unlink()
        self.make(small_disk / "s")

    # ---------------------------------------------------------------- the run log

    def test_a_run_log_is_one_json_line_per_slide(self, store: Store):
        log = store.start_run()
        lines = [{"slide_id": 'é/\n"x"', "outcome": "failed"}, {"run": {"seconds": 1.5}}]
        for line in lines:
            log.append(line)
        assert [json.loads(line) for line in log.path.read_text(encoding="utf-8").splitlines()] == lines
        assert log.path.parent == store.path / "runs"
