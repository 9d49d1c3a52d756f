"""A model of the store: whatever is done to it, in whatever order, it holds what the model says, byte for byte.

The model knows of each slide which tiles it has, and of each slide and entry which embeddings, made from which tiles,
damaged how, and which rows a draft saved. What is complete follows from that alone.
"""

import os
import shutil
import tempfile
import uuid
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from extract.errors import EntryNotFoundError, SlideClaimedError, SlideNotFoundError, UnitCorruptError
from extract.store import Store, create_store, open_store
from extract.store.core.draft import Draft
from tests.test_extract.seeded import EXECUTION, RECIPE, SLIDES, TILES, flags_of, n_tiles, rows_of, tiles_of

IDS = SLIDES[:2]
ENTRIES = ("one", "two")
SHARE = st.sampled_from([0.0, 0.3, 0.7, 1.0])
SLIDE, ENTRY, VARIANT = st.sampled_from(IDS), st.sampled_from(ENTRIES), st.sampled_from([0, 1])

tiles = cache(tiles_of)
rows = cache(rows_of)


@dataclass
class Unit:
    """What the model knows of a features unit: whose rows, of which tiles, harmed ones or not, and its own harm."""

    variant: int
    tiles: int
    of_harmed_tiles: bool
    harm: str = ""


class StoreMachine(RuleBasedStateMachine):
    """One store of a backend, and the model of it."""

    backend: str

    @initialize()
    def make(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.store: Store = create_store(self.folder / "s", TILES, self.backend)
        self.entries: set[str] = set()
        self.tiles: dict[str, int] = {}
        self.harmed_tiles: set[str] = set()
        self.features: dict[tuple[str, str], Unit] = {}
        self.drafts: dict[tuple[str, str], Draft] = {}
        self.ghosts: list[Draft] = []
        self.saved: dict[tuple[str, str], tuple[int, int]] = {}
        # so that there is something to work on from the first step
        self.create_entry(ENTRIES[0])
        self.write_tiles(IDS[0], 0)

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    def is_complete(self, slide_id: str, entry: str) -> bool:
        """What the store should say of an entry of a slide."""
        unit = self.features.get((slide_id, entry))
        return unit is not None and unit.harm != "record" and self.tiles.get(slide_id) == unit.tiles

    # ------------------------------------------------------------ what writers do

    @rule(entry=ENTRY)
    def create_entry(self, entry: str) -> None:
        self.store.create_entry(entry, RECIPE)
        self.entries.add(entry)

    @rule(slide_id=SLIDE, variant=VARIANT)
    def write_tiles(self, slide_id: str, variant: int) -> None:
        self.store.write_tiles(tiles(slide_id, variant))
        self.tiles.setdefault(slide_id, variant)

    @rule(slide_id=SLIDE, entry=ENTRY, variant=VARIANT)
    def write_features(self, slide_id: str, entry: str, variant: int) -> None:
        if slide_id not in self.tiles or entry not in self.entries:
            with pytest.raises((SlideNotFoundError, EntryNotFoundError)):
                self.store.write_features(entry, slide_id, *rows(slide_id, variant), EXECUTION)
            return
        self.store.write_features(entry, slide_id, *rows(slide_id, variant), EXECUTION)
        if not self.is_complete(slide_id, entry):
            self.features[slide_id, entry] = Unit(variant, self.tiles[slide_id], slide_id in self.harmed_tiles)

    @rule(mode=st.sampled_from(["r+", "create"]))
    def reopen(self, mode: str) -> None:
        path = self.store.path
        self.store = create_store(path, TILES) if mode == "create" else open_store(path, "r+")

    # ------------------------------------------------------------ drafts

    @precondition(lambda self: self.tiles and self.entries)
    @rule(data=st.data(), share=SHARE, how=st.sampled_from(["stay", "release", "abandon"]))
    def draft(self, data: st.DataObject, share: float, how: str) -> None:
        """A worker begins, saves rows, and perhaps ends or dies; then another one comes."""
        key = data.draw(st.sampled_from([(s, e) for s in sorted(self.tiles) for e in sorted(self.entries)]))
        self.open_draft(key)
        self.save_share(key, share)
        if how != "stay":
            self.end_draft(key, how)
            self.open_draft(key)

    def open_draft(self, key: tuple[str, str]) -> None:
        """Begin, or find the rows that were saved before."""
        if key in self.drafts:
            with pytest.raises(SlideClaimedError):
                self.store.draft(key[1], key[0], EXECUTION)
            return
        draft = self.store.draft(key[1], key[0], EXECUTION)
        stop, of_tiles = self.saved.get(key, (0, self.tiles[key[0]]))
        # rows of tiles that were cut otherwise are dropped
        stop = stop if of_tiles == self.tiles[key[0]] else 0
        features, invalid = rows(key[0])
        assert draft.features.tobytes() == features[:stop].tobytes()
        assert draft.invalid_rows == [row for row in invalid if row < stop]
        assert draft.flags.tolist() == flags_of(key[0])[:stop].tolist()
        self.drafts[key] = draft
        self.saved[key] = (stop, self.tiles[key[0]])

    @precondition(lambda self: self.drafts)
    @rule(data=st.data(), share=SHARE)
    def save(self, data: st.DataObject, share: float) -> None:
        self.save_share(data.draw(st.sampled_from(sorted(self.drafts))), share)

    def save_share(self, key: tuple[str, str], share: float) -> None:
        """Save the first part of the rows; the rows that were saved before stay."""
        (features, invalid), stop = rows(key[0]), round(share * n_tiles(key[0]))
        self.drafts[key].save(features[:stop], invalid, flags_of(key[0])[:stop])
        before, of_tiles = self.saved[key]
        self.saved[key] = (max(stop, before), of_tiles)

    @precondition(lambda self: self.drafts)
    @rule(data=st.data(), how=st.sampled_from(["discard", "release", "abandon"]))
    def let_go(self, data: st.DataObject, how: str) -> None:
        """A worker ends or dies."""
        self.end_draft(data.draw(st.sampled_from(sorted(self.drafts))), how)

    def end_draft(self, key: tuple[str, str], how: str) -> None:
        """Discard, release, or be killed."""
        draft = self.drafts.pop(key)
        if how == "discard":
            draft.discard()
            del self.saved[key]
        elif how == "release":
            draft.release()
        else:
            # killed: all that ends its claim is that it no longer gives a sign of life
            os.utime(self.store.feature_path(*key).with_name(f"~{self.store.feature_path(*key).name}.draft"), (0, 0))
            self.ghosts.append(draft)

    @precondition(lambda self: self.ghosts)
    @rule(data=st.data())
    def wake(self, data: st.DataObject) -> None:
        """One that was taken for dead goes on; it harms nobody who came after it."""
        ghost = data.draw(st.sampled_from(self.ghosts))
        self.ghosts.remove(ghost)
        if ghost._is_ours():
            # nobody came: it is the worker still, and lets its rows go
            key = next(k for k in self.saved if self.store.feature_path(*k) == ghost._unit)
            del self.saved[key]
        ghost.discard()

    # ------------------------------------------------------------ what happens to it

    @rule(entry=st.sampled_from([None, *ENTRIES]))
    def leave_a_partial(self, entry: str | None) -> None:
        """A writer was killed in the middle of a unit."""
        folder = self.store.path / ("tiles" if entry is None else f"features/{entry}")
        units = [path for path in folder.glob("*") if path.name[0] != "~" and path.suffix != ".json"]
        if units:
            copy = shutil.copytree if units[0].is_dir() else shutil.copy
            copy(units[0], folder / f"~{uuid.uuid4().hex}.partial")

    @precondition(lambda self: self.features)
    @rule(data=st.data())
    def delete_features(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.features)))
        remove(self.store.feature_path(*key))
        del self.features[key]

    @precondition(lambda self: self.tiles)
    @rule(data=st.data())
    def delete_tiles(self, data: st.DataObject) -> None:
        slide_id = data.draw(st.sampled_from(sorted(self.tiles)))
        remove(self.store.tiles_path(slide_id))
        del self.tiles[slide_id]
        self.harmed_tiles.discard(slide_id)

    @precondition(lambda self: self.tiles)
    @rule(data=st.data())
    def cut_again(self, data: st.DataObject) -> None:
        """The tiles were deleted, and the slide was cut by other settings."""
        slide_id = data.draw(st.sampled_from(sorted(self.tiles)))
        remove(self.store.tiles_path(slide_id))
        self.harmed_tiles.discard(slide_id)
        self.tiles[slide_id] = 1 - self.tiles[slide_id]
        self.store.write_tiles(tiles(slide_id, self.tiles[slide_id]))

    @precondition(lambda self: any(not unit.harm for unit in self.features.values()))
    @rule(data=st.data(), harm=st.sampled_from(["flip", "cut", "record"]))
    def harm_features(self, data: st.DataObject, harm: str) -> None:
        key = data.draw(st.sampled_from(sorted(key for key, unit in self.features.items() if not unit.harm)))
        path = self.store.feature_path(*key)
        matrix = rows(key[0], self.features[key].variant)[0].tobytes()
        if harm == "record" or (harm == "cut" and path.is_file()):
            # HDF5 keeps its record in the same file: half of it is no file
            record = path if path.is_file() else path / "zarr.json"
            record.write_bytes(record.read_bytes()[: record.stat().st_size // 2])
            harm = "record"
        else:
            flip(path, matrix) if harm == "flip" else cut(path)
        self.features[key].harm = harm

    @precondition(lambda self: set(self.tiles) - self.harmed_tiles)
    @rule(data=st.data())
    def harm_tiles(self, data: st.DataObject) -> None:
        slide_id = data.draw(st.sampled_from(sorted(set(self.tiles) - self.harmed_tiles)))
        flip(self.store.tiles_path(slide_id), tiles(slide_id, self.tiles[slide_id]).coords.tobytes())
        self.harmed_tiles.add(slide_id)

    # ------------------------------------------------------------ what must hold

    @invariant()
    def is_what_the_model_says(self) -> None:
        reader = open_store(self.store.path)
        self.lists_what_is_complete(reader)
        self.hands_out_the_tiles_that_were_written(reader)
        self.hands_out_the_features_that_were_written(reader)

    def lists_what_is_complete(self, reader: Store) -> None:
        assert reader.entries() == sorted(self.entries)
        assert reader.slide_ids() == sorted(self.tiles)
        for entry in self.entries:
            complete = [slide_id for slide_id in sorted(IDS) if self.is_complete(slide_id, entry)]
            assert reader.slide_ids(entry) == complete
            assert [s for s in sorted(IDS) if reader.has_features(s, entry)] == complete
            for slide_id in IDS:
                assert reader.is_claimed(slide_id, entry) == ((slide_id, entry) in self.drafts)

    def hands_out_the_tiles_that_were_written(self, reader: Store) -> None:
        for slide_id, variant in self.tiles.items():
            slide, unit = reader[slide_id], tiles(slide_id, variant)
            if slide_id in self.harmed_tiles:
                with pytest.raises(UnitCorruptError):
                    slide.verify_tiles()
                continue
            assert slide.coords().tobytes() == unit.coords.tobytes()
            assert slide.tissue_fraction.tobytes() == unit.tissue_fraction.tobytes()
            assert slide.record["variant"] == variant

    def hands_out_the_features_that_were_written(self, reader: Store) -> None:
        for (slide_id, entry), unit in self.features.items():
            if slide_id not in self.tiles:
                continue
            slide, (features, invalid) = reader[slide_id], rows(slide_id, unit.variant)
            if unit.harm == "cut" or not self.is_complete(slide_id, entry):
                with pytest.raises(UnitCorruptError):
                    slide.features(entry)
            elif unit.harm or (unit.of_harmed_tiles != (slide_id in self.harmed_tiles) and reader.format == "h5"):
                # HDF5 repeats the coordinates beside the features, and compares the two
                with pytest.raises(UnitCorruptError):
                    slide.verify_features(entry)
            else:
                assert slide.features(entry).tobytes() == np.delete(features, invalid, axis=0).tobytes()
                assert np.flatnonzero(~slide.valid(entry)).tolist() == invalid
                assert reader.n_tiles(slide_id, entry) == len(features) - len(invalid)


def remove(unit: Path) -> None:
    """Delete a unit."""
    shutil.rmtree(unit) if unit.is_dir() else unit.unlink()


def holder(unit: Path, array: bytes) -> Path:
    """The file of a unit that holds these bytes."""
    return next(path for path in (unit, *unit.rglob("*")) if path.is_file() and array in path.read_bytes())


def flip(unit: Path, array: bytes) -> None:
    """Change one byte of an array of a unit."""
    path = holder(unit, array)
    content = bytearray(path.read_bytes())
    content[content.find(array) + len(array) // 2] ^= 1
    path.write_bytes(content)


def cut(unit: Path) -> None:
    """Take the end off the raw matrix of a unit."""
    chunk = unit / "c" / "0" / "0"
    chunk.write_bytes(chunk.read_bytes()[:-5])


class ZarrMachine(StoreMachine):
    """The model of a Zarr store."""

    backend = "zarr"


class H5Machine(StoreMachine):
    """The model of an HDF5 store."""

    backend = "h5"


TestZarrModel = ZarrMachine.TestCase
TestH5Model = H5Machine.TestCase
TestZarrModel.settings = TestH5Model.settings = settings(
    max_examples=int(os.environ.get("TESSERA_MODEL_RUNS", "25")),
    stateful_step_count=30,
    deadline=None,
    # a failing run is short enough as it is
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
