"""Importing: features that another tool computed become the bags of a store, one committed slide at a time."""

import csv
import io
import os
import re
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, lru_cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import numpy as np

from extract.errors import ExtractError, ForeignFileError, RecipeMismatchError, StoreError, StoreFullError
from extract.folders import NotTaken
from extract.store import Execution, Store, TilesUnit, create_store, difference, find_format, open_store
from extract.store.core.files import partial_path
from extract.store.core.fingerprint import SlideFingerprint, canonical_json, fingerprint, sha256_of
from extract.store.core.recipes import UNKNOWN, is_unknown
from extract.store.core.remote_path import StorePath
from extract.store.foreign.detect import Found, Survey, survey
from extract.store.foreign.layouts.base import Answers, ForeignBag
from extract.store.foreign.reading import ForeignReader
from extract.store.foreign.recipes import imported_feature_recipe, imported_tile_recipe, source_hash

OnOutcome = Callable[[int, "Outcome"], None]
"""Called after each slide with the number of slides in all, and what became of it."""

_WRITERS = 8
"""Bags that are written at once: a disk makes several safe in the time of one."""
_NOT_IN_A_NAME = re.compile(r"[^a-z0-9._-]+")


@dataclass(frozen=True)
class Outcome:
    """What became of one slide.

    Attributes:
        slide_id: the slide, or the file that could not be taken.
        outcome: ``imported``, ``complete`` (it was there already) or ``failed``.
        reason: why it failed.
        n_rows: rows of features.
        has_coords: whether its tiles have places.
    """

    slide_id: str
    outcome: Literal["imported", "complete", "failed"]
    reason: str = ""
    n_rows: int = 0
    has_coords: bool = True


@dataclass(frozen=True)
class ImportReport:
    """What an import did.

    Attributes:
        entry: name of the features entry; None when nothing could be imported.
        layouts: names of the layouts that were read.
        outcomes: one per slide, and one per file that could not be taken.
        skipped: files that hold no features, with the reason.
        labels: label by slide id, where the source has any.
        not_taken: files that are nothing of the kind, counted by their reason.
    """

    entry: str | None
    layouts: tuple[str, ...]
    outcomes: tuple[Outcome, ...]
    skipped: Mapping[str, str]
    labels: Mapping[str, str]
    not_taken: NotTaken = field(default_factory=NotTaken)

    def of(self, outcome: str) -> list[Outcome]:
        """The slides of one outcome."""
        return [each for each in self.outcomes if each.outcome == outcome]


def import_bags(
    source: str | Path,
    store: str | StorePath,
    entry: str | None = None,
    answers: Answers | None = None,
    format: str | None = None,
    recipe_name: str | None = None,
    progress: OnOutcome | None = None,
) -> ImportReport:
    """Import features of another tool into a store. A file that cannot be taken is listed, and the others go on.

    Slides that are complete are left as they are, so an import that was stopped goes on when it is repeated.

    Args:
        source: a file, or a folder that is searched with all its folders.
        store: the store; made if it is not there.
        entry: name of the features entry; by default the backbone's, where the files name it, else ``imported``.
        answers: what the files do not say.
        format: ``zarr`` or ``h5``, of a new store.
        recipe_name: says that everything imported under this name was made alike.
        progress: called after each slide.

    Raises:
        ForeignFileError: there is nothing to import.
        AmbiguousError: the source holds several layouts; the message asks.
        RecipeMismatchError: store or entry hold features of another source.
        StoreFullError: no space left.

    Example:
        >>> report = import_bags("features_uni_v1", "cohort.zarr", entry="uni")      # doctest: +SKIP
        >>> len(report.of("imported")), len(report.of("failed"))                     # doctest: +SKIP
        (106, 0)
    """
    answers = answers or Answers()
    with ForeignReader() as reader:
        seen = survey(Path(source), answers, reader)
        return _Import(seen, reader, Path(str(store)), entry, answers, format, recipe_name, progress).run()


class _Import:
    """One import: the store is opened when the first bag that can be read has said what its recipe is."""

    def __init__(
        self,
        seen: Survey,
        reader: ForeignReader,
        path: Path,
        entry: str | None,
        answers: Answers,
        format: str | None,
        recipe_name: str | None,
        progress: OnOutcome | None,
    ) -> None:
        self._seen, self._reader, self._path, self._entry, self._answers = seen, reader, path, entry, answers
        self._format, self._recipe_name, self._progress = format, recipe_name, progress
        self._outcomes: list[Outcome] = []
        self._first: ForeignBag | None = None

    def run(self) -> ImportReport:
        for name, reason in sorted(self._seen.failures.items()):
            self._note(Outcome(name, "failed", reason))
        store = self._import_all()
        layouts = tuple(dict.fromkeys(found.layout.name for found in self._seen.bags))
        entry = None if store is None else self._entry
        outcomes = tuple(sorted(self._outcomes, key=lambda each: each.slide_id))
        if store is not None:
            store.write_index()
        return ImportReport(entry, layouts, outcomes, self._seen.skipped, self._seen.labels, self._seen.not_taken)

    def _import_all(self) -> Store | None:
        """Import every bag; they are read one after the other and written several at a time, since writing waits."""
        store: Store | None = None
        writing: deque[tuple[str, Future[Outcome]]] = deque()
        with ThreadPoolExecutor(_WRITERS, "import") as pool:
            try:
                for found in self._in_order():
                    try:
                        if store is None:
                            store = self._open(found)
                        writing.append((found.slide_id, pool.submit(self._prepared(store, found))))
                    except RecipeMismatchError:
                        raise
                    except (ExtractError, OSError) as error:
                        self._note(Outcome(found.slide_id, "failed", str(error)))
                    while len(writing) > 2 * _WRITERS:
                        self._settle(*writing.popleft())
                while writing:
                    self._settle(*writing.popleft())
            finally:
                for _, future in writing:
                    future.cancel()
        return store

    def _settle(self, slide_id: str, future: "Future[Outcome]") -> None:
        try:
            outcome = future.result()
        except StoreFullError:
            raise
        except (ExtractError, OSError) as error:
            outcome = Outcome(slide_id, "failed", str(error))
        self._note(outcome)

    def _note(self, outcome: Outcome) -> None:
        self._outcomes.append(outcome)
        if self._progress is not None:
            self._progress(len(self._seen.bags) + len(self._seen.failures), outcome)

    def _in_order(self) -> list[Found]:
        """Slides that the store has come first: they can show that source and store are of one recipe."""
        if find_format(self._path) is None:
            return list(self._seen.bags)
        store = open_store(self._path)
        there = set(store.slide_ids())
        complete = {slide_id for entry in store.entries() for slide_id in store.slide_ids(entry)}

        def rank(found: Found) -> tuple[bool, bool]:
            return found.slide_id not in complete, found.slide_id not in there

        return sorted(self._seen.bags, key=rank)

    def _open(self, found: Found) -> Store:
        """Open or make store and entry with the recipes that the first bag gives."""
        bag = self._read(found)
        self._entry = self._entry or _entry_name(bag)
        known = open_store(self._path) if find_format(self._path) is not None else None
        tiles = _tiles_source(known, bag) or source_hash(found.layout.name, bag, "tiles", self._recipe_name)
        features = _features_source(known, self._entry, bag) or source_hash(
            found.layout.name, bag, "features", self._recipe_name
        )
        try:
            store = create_store(self._path, imported_tile_recipe(bag.cut, tiles), self._format)
            store.create_entry(self._entry, imported_feature_recipe(bag, features))
        except RecipeMismatchError as error:
            raise RecipeMismatchError(
                f"{error}. If you know that both were made alike, import both under one --recipe NAME"
            ) from error
        self._first = bag
        return store

    def _read(self, found: Found) -> ForeignBag:
        return self._reader.read(found.file, found.layout, found.slide_id, self._answers)

    def _prepared(self, store: Store, found: Found) -> Callable[[], Outcome]:
        """What is left to do for a bag once it was read and compared with what is there."""
        slide_id, entry = found.slide_id, self._entry or ""
        execution = _execution(found, self._answers)
        complete = store.has_features(slide_id, entry)
        if complete and store[slide_id].feature_record(entry)["execution_fingerprint"] == fingerprint(execution):
            return partial(self._outcome, store, slide_id, "complete")
        first, self._first = self._first, None
        bag = first if first is not None and first.slide_id == slide_id else self._read(found)
        _check_same_recipe(store, entry, bag)
        if slide_id in store:
            _check_same_tiles(store, bag)
        if complete:
            _check_same_features(store, entry, bag)
            return partial(self._outcome, store, slide_id, "complete")
        return partial(self._write, store, found, bag, execution)

    def _write(self, store: Store, found: Found, bag: ForeignBag, execution: Execution) -> Outcome:
        if found.slide_id not in store:
            store.write_tiles(_tiles_unit(found, bag))
        store.write_features(self._entry or "", found.slide_id, bag.features, [], execution)
        return self._outcome(store, found.slide_id, "imported")

    def _outcome(self, store: Store, slide_id: str, outcome: Literal["imported", "complete"]) -> Outcome:
        record = store[slide_id].record
        return Outcome(slide_id, outcome, "", int(record["n_tiles"]), "coords" in record["sha256"])


# ------------------------------------------------------------------------------------------- what is written of a bag


def _tiles_unit(found: Found, bag: ForeignBag) -> TilesUnit:
    record: dict[str, Any] = {
        "n_tiles": len(bag.features),
        "mpp": {"native": bag.mpp, "requested": None, "achieved": bag.cut.mpp, "source": "import"},
        "import": {"layout": found.layout.name, "file": found.file.path.name, "attributes": dict(bag.attributes)},
    }
    if bag.tile_l0 is not None:
        record["tile_l0"] = bag.tile_l0
    if bag.cut.tile_px:
        record["tile_px"] = bag.cut.tile_px
    return TilesUnit(bag.slide_id, bag.coords, None, None, record)


def _execution(found: Found, answers: Answers) -> Execution:
    """Where features came from stands in the place of how they were computed."""
    status = found.file.path.stat()
    said = {
        "unit": answers.unit,
        "origin": answers.origin,
        "mpp": answers.mpp_of(found.slide_id),
        "tile_l0": answers.tile_l0,
        "dataset": answers.dataset,
        "without_coords": answers.without_coords,
    }
    versions = {
        "tessera-mil": _our_version(),
        "layout": found.layout.name,
        "source_sha256": _sampled_hash(found.file.path, status.st_size, status.st_mtime_ns),
        "answers": canonical_json(said),
    }
    return Execution("unknown", "import", "unknown", 0, versions)


@cache
def _our_version() -> str:
    try:
        return version("tessera-mil")
    except PackageNotFoundError:
        return "source"


@lru_cache(maxsize=4)
def _sampled_hash(path: Path, size: int, changed_ns: int) -> str:
    """A sampled hash of a file, as of a slide; of a folder, of all its files."""
    if path.is_file():
        return SlideFingerprint.of(path).sampled_sha256
    inside = sorted(Path(folder, name) for folder, _, names in os.walk(path) for name in names)
    return fingerprint({str(each.relative_to(path)): SlideFingerprint.of(each).sampled_sha256 for each in inside})


def _entry_name(bag: ForeignBag) -> str:
    name = _NOT_IN_A_NAME.sub("-", (bag.backbone or "").lower()).strip("-._")
    return name or "imported"


# ------------------------------------------------------------------------------- whether a bag belongs to what is there


def _tiles_source(store: Store | None, bag: ForeignBag) -> str | None:
    """The source hash of the store's tile recipe, if this bag's tiles are in it already."""
    if store is None or not is_unknown(store.tile_recipe.edge) or bag.slide_id not in store:
        return None
    _check_same_tiles(store, bag)
    return store.tile_recipe.edge.removeprefix(UNKNOWN)


def _features_source(store: Store | None, entry: str, bag: ForeignBag) -> str | None:
    """The source hash of an entry's recipe, if this bag is in it already."""
    if store is None or entry not in store.entries() or not store.has_features(bag.slide_id, entry):
        return None
    _check_same_features(store, entry, bag)
    recipe = store.feature_recipe(entry)
    return recipe.weights_sha256.removeprefix(UNKNOWN) if is_unknown(recipe.weights_sha256) else None


def _check_same_recipe(store: Store, entry: str, bag: ForeignBag) -> None:
    """Refuse a bag that was cut or computed otherwise than the first of its source."""
    there = store.feature_recipe(entry)
    features = imported_feature_recipe(bag, there.weights_sha256.removeprefix(UNKNOWN))
    tiles = imported_tile_recipe(bag.cut, store.tile_recipe.edge.removeprefix(UNKNOWN))
    changes = [*difference(there, features), *difference(store.tile_recipe, tiles)]
    if changes:
        raise ForeignFileError(
            f"got slide {bag.slide_id!r} made otherwise than the first of entry {entry!r} (there → here): "
            f"{'; '.join(changes)} → one entry holds one recipe → import it into another --store"
            f"{' or --as another entry' if not difference(store.tile_recipe, tiles) else ''}"
        )


def _check_same_tiles(store: Store, bag: ForeignBag) -> None:
    """Refuse a bag whose rows are not those of the tiles that the store has for its slide."""
    there = store[bag.slide_id]
    coords = there.coords() if "coords" in there.record["sha256"] else None
    same = there.n_tiles == len(bag.features) and (coords is None) == (bag.coords is None)
    if same and coords is not None and bag.coords is not None:
        same = bool(np.array_equal(coords, bag.coords))
    if not same:
        raise ForeignFileError(
            f"got slide {bag.slide_id!r} with other tiles ({_told(bag.coords, len(bag.features))}) than the store has "
            f"({_told(coords, there.n_tiles)}) → the entries of a store share its tiles → import it into another "
            f"--store"
        )


def _told(coords: np.ndarray | None, n: int) -> str:
    return f"{n} without coordinates" if coords is None else f"{n} from {coords[0].tolist() if n else []}"


def _check_same_features(store: Store, entry: str, bag: ForeignBag) -> None:
    if sha256_of(bag.features) != store[bag.slide_id].feature_record(entry)["sha256"]:
        raise ForeignFileError(
            f"got slide {bag.slide_id!r} with other features than entry {entry!r} has → the file was changed or is "
            f"another one → import it --as another entry, or into another --store"
        )


def write_labels(path: Path, labels: Mapping[str, str]) -> None:
    """Write a label table with the columns slide_id, patient_id and label; every bag is its own patient.

    Raises:
        StoreError: there is another table at ``path``.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("slide_id", "patient_id", "label"))
    writer.writerows((slide_id, slide_id, label) for slide_id, label in sorted(labels.items()))
    data = text.getvalue().encode()
    if path.exists():
        if path.read_bytes() != data:
            raise StoreError(f"got {path} → another table is there → expected none, or the same → move it away")
        return
    beside = partial_path(path)
    try:
        beside.write_bytes(data)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
