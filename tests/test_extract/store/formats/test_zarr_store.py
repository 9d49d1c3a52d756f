"""The Zarr store: what every backend does, what zarr-python reads, and the bytes of format 1."""

import json
import shutil
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from extract.errors import StoreError, UnitCorruptError
from extract.store import Store, ZarrStore, create_store, open_store
from extract.store.core.unit import decode_id, encode_id
from tests.test_extract.small import feature_recipe, tiles_unit, tree
from tests.test_extract.store_conformance import RECIPE, StoreConformance, add


class TestZarrStore(StoreConformance):
    """Zarr v3."""

    format = "zarr"
    placing = "extract.store.core.files.os.rename"
    steps = (
        "formats.zarr_store.write_array",
        "formats.zarr_store.write_json",
        "formats.zarr_store.write_picture",
        "core.files.sync",
        "core.files.os.rename",
    )

    def array_file(self, unit: Path, name: str) -> Path:
        """The single chunk."""
        chunks = {"features": "c/0/0", "coords": "coords/c/0/0", "tissue_fraction": "tissue_fraction/c/0"}
        return unit / chunks[name]

    def record_file(self, unit: Path) -> Path:
        """The node's metadata."""
        return unit / "zarr.json"

    def test_tiles_that_have_lost_their_record_are_cut_again(self, store: Store):
        features = add(store, "s")
        (store.tiles_path("s") / "zarr.json").unlink()
        assert "s" not in store
        with pytest.raises(UnitCorruptError, match="mil store verify"):
            _ = store["s"]
        store.write_tiles(tiles_unit("s"))
        assert np.array_equal(store["s"].features("tiny"), features)

    def test_zarr_python_reads_the_same_bytes(self, store: Store):
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

    def test_the_chunk_file_is_the_matrix(self, store: Store):
        features = add(store, "s")
        assert (store.path / "features" / "tiny" / "s" / "c" / "0" / "0").read_bytes() == features.tobytes()

    def test_an_array_that_zarr_python_rewrote_is_still_read(self, store: Store):
        features = add(store, "s", 9)
        node = store.path / "features" / "tiny" / "s"
        attributes = json.loads((node / "zarr.json").read_text())["attributes"]
        shutil.rmtree(node)
        array = zarr.create_array(node, shape=(9, 6), dtype="float16", chunks=(4, 6), attributes=attributes)
        array[:] = features
        assert np.array_equal(store["s"].features("tiny"), features)

    def test_a_chunk_of_another_length_or_none_is_damage(self, store: Store):
        add(store, "s")
        for name in ("features/tiny/s/c/0/0", "tiles/s/coords/c/0/0", "tiles/s/thumbnail/zarr.json"):
            (store.path / name).unlink()
        for read in (lambda s: s.features("tiny"), lambda s: s.coords(), lambda s: s.thumbnail):
            with pytest.raises(UnitCorruptError, match="extract"):
                read(store["s"])

    def test_rows_of_an_array_that_zarr_python_rewrote(self, store: Store):
        features = add(store, "s", 9)
        node = store.feature_path("s", "tiny")
        attributes = json.loads((node / "zarr.json").read_text())["attributes"]
        shutil.rmtree(node)
        array = zarr.create_array(node, shape=(9, 6), dtype="float16", chunks=(4, 6), attributes=attributes)
        array[:] = features
        for rows in (slice(2, 8, 3), slice(None, None, -2), [8, 0, 8], []):
            index = rows if isinstance(rows, slice) else np.array(rows, dtype=int)
            assert np.array_equal(store["s"].features("tiny", rows=rows), features[index])

    def test_an_empty_array_is_read_by_zarr_python(self, store: Store):
        add(store, "none", 0)
        assert zarr.open_array(store.feature_path("none", "tiny"), mode="r")[:].shape == (0, 6)

    def test_a_zarr_group_of_another_is_refused_untouched(self, tmp_path: Path):
        zarr.create_group(tmp_path / "precious", attributes={"mine": 1})
        before = tree(tmp_path)
        with pytest.raises(StoreError):
            self.make(tmp_path / "precious")
        assert tree(tmp_path) == before

    def test_format_1_is_what_it_was(self, tmp_path: Path):
        """What a reader of another language relies on; a change here is a new format."""
        store = ZarrStore.create(tmp_path / "s.zarr", RECIPE)
        store.create_entry("tiny", feature_recipe())
        add(store, "site A/slide 1", 7, invalid=[2])
        files = {name: content for name, content in tree(store.path).items() if "/thumbnail/" not in name}
        digest = sha256()
        for name in sorted(files):
            digest.update(name.encode() + b"\0" + files[name])
        assert len(files) == 11
        assert digest.hexdigest() == "c17c69f9b212279d710579a7750a2661caef9a8259dbd49f1c3d159feb6b4b26"


# ---------------------------------------------------------------- file names of ids


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


def test_what_is_no_store_is_told_by_what_it_is(tmp_path: Path):
    (tmp_path / "slide.tif").touch()
    for name, told in (("slide.tif", "it is a file"), ("absent", "there is nothing"), (".", "mil store import")):
        with pytest.raises(StoreError, match=told):
            open_store(tmp_path / name)


def test_a_store_that_is_the_working_folder_keeps_its_units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    store = create_store(".", RECIPE)
    store.write_tiles(tiles_unit("a"))
    there = store.tiles_path("a").stat().st_mtime_ns
    store.write_tiles(tiles_unit("a"))
    assert store.tiles_path("a").stat().st_mtime_ns == there
    store.write_index()
    assert list(json.loads(Path("index.json").read_text())["tessera"]["units"]) == ["tiles/a"]
