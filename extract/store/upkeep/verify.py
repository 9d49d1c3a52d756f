"""Verification of a store: everything that was written is read again and compared with what was recorded."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from extract.errors import ExtractError, RecipeError, StoreError, StoreUnreachableError
from extract.store.core.files import members
from extract.store.core.fingerprint import SlideFingerprint, fingerprint
from extract.store.core.recipes import FeatureRecipe
from extract.store.core.remote_path import RemotePath, StorePath, store_path
from extract.store.core.slide_reader import SlideReader
from extract.store.core.store import Store
from extract.store.core.unit import PICTURES
from extract.store.formats.opening import BACKENDS, find_format, open_store
from extract.store.upkeep.checks import (
    ARRAYS,
    array_problems,
    commit_problems,
    fit_problems,
    matrix_problems,
    record_problems,
)
from extract.store.upkeep.node_form import features_form_problems, tiles_form_problems

_READ_BYTES = 1 << 22


@dataclass(frozen=True)
class Finding:
    """Something in a store that is not as it should be.

    Attributes:
        slide_id: the slide; None where it is about a whole entry.
        entry: the entry of features; None where it is about tiles or a slide's file.
        what: what is wrong.
        path: of the unit at fault, or of the file.
        fix: what to do.
        movable: whether it is mended by moving ``path`` aside and extracting again.
    """

    slide_id: str | None
    entry: str | None
    what: str
    path: StorePath
    fix: str
    movable: bool = True


Progress = Callable[[int, int, int], None]
"""Called with the units done, the units there are, and the bytes of the unit that was just done."""


def verify_store(
    store: Store,
    entries: Sequence[str] | None = None,
    workers: int | None = None,
    on_progress: Progress | None = None,
    quick: bool = False,
    slide_files: Mapping[str, Path] | None = None,
    fingerprint_of: Callable[[Path], SlideFingerprint] = SlideFingerprint.of,
) -> list[Finding]:
    """Read every unit of a store again and compare it with its record, its recipe and the other units of its slide.

    Features whose slide has no tiles (any more) are checked as far as that goes and are no finding: the next
    extraction cuts the slide and takes them if they still fit.

    Args:
        store: an open store.
        entries: entries to check beside the tiles; None for all.
        workers: threads; None for as many as processors, at least four and at most sixteen.
        on_progress: called from this thread, after each unit.
        quick: read neither embeddings nor pictures: records, sizes, coordinates and links only.
        slide_files: slide id → file, whose fingerprints are compared with those that were cut; None compares none.
        fingerprint_of: what a slide file is known by; by default its one file.

    Returns:
        Findings by slide and entry; none means that everything is as it was written.

    Raises:
        EntryNotFoundError: one of ``entries`` is not there.
    """
    names = store.entries() if entries is None else list(entries)
    findings = _stray_folders(store) if entries is None else []
    recipes: dict[str, FeatureRecipe] = {}
    for name in names:
        if name not in store.entries():
            # raises, and says which there are
            store.feature_recipe(name)
        recipe, found = _check_entry(store, name)
        findings += found
        if recipe is not None:
            recipes[name] = recipe
    checker = _Checker(store, quick, slide_files or {}, fingerprint_of)
    tiles = store.unit_paths()
    units = [(slide_id, name, path) for name in recipes for slide_id, path in store.unit_paths(name).items()]
    counter = _Counter(on_progress, len(tiles) + len(units))
    with ThreadPoolExecutor(workers or max(4, min(16, os.cpu_count() or 4))) as pool:
        jobs = [pool.submit(checker.check_tiles, slide_id, path) for slide_id, path in tiles.items()]
        of_tiles = list(counter.collect(jobs))
        bad = {finding.slide_id for finding in of_tiles}
        jobs = [
            pool.submit(checker.check_features, slide_id, name, path, recipes[name], slide_id in tiles, slide_id in bad)
            for slide_id, name, path in units
        ]
        findings += of_tiles + list(counter.collect(jobs))
    return sorted(set(findings), key=lambda f: (f.slide_id or "", f.entry or "", f.what))


def open_or_find(path: StorePath) -> Store | Finding:
    """Open a store to check it, or say what is wrong with the file that makes it one.

    Raises:
        StoreError: there is no store.
    """
    path = store_path(path)
    name = find_format(path)
    try:
        return open_store(path)
    except (PermissionError, StoreUnreachableError):
        raise
    except (StoreError, RecipeError, OSError, LookupError, TypeError, ValueError) as error:
        if name is None:
            raise
        file = path / BACKENDS[name].root_name
        fix = (
            f"bring {file.name} back from a copy of the store; else make an empty store with the same flags of mil "
            f"extract and move tiles/ and features/ there"
        )
        return Finding(None, None, f"{file.name}: {_shorten(error)}", file, fix, movable=False)


class _Counter:
    """Hands out findings as units are done, and reports how far it is."""

    def __init__(self, on_progress: Progress | None, total: int) -> None:
        self._on_progress, self._total, self._done = on_progress, total, 0

    def collect(self, jobs: Iterable["Future[tuple[list[Finding], int]]"]) -> Iterator[Finding]:
        waiting = list(jobs)
        try:
            for job in as_completed(waiting):
                findings, n_bytes = job.result()
                self._done += 1
                if self._on_progress is not None:
                    self._on_progress(self._done, self._total, n_bytes)
                yield from findings
        finally:
            # interrupted: what has not begun need not
            for job in waiting:
                job.cancel()


class _Checker:
    """Checks one unit at a time, from any thread; whatever a damaged unit does ends in a finding about it."""

    def __init__(
        self,
        store: Store,
        quick: bool,
        slide_files: Mapping[str, Path],
        fingerprint_of: Callable[[Path], SlideFingerprint],
    ) -> None:
        self._store, self._quick, self._slide_files, self._fingerprint_of = store, quick, slide_files, fingerprint_of
        self._fix = f"mil store repair {store.path}, then mil extract again"

    def check_tiles(self, slide_id: str, path: StorePath) -> tuple[list[Finding], int]:
        """Findings about a tiles unit, and how many bytes were read."""
        problems, n_bytes = self._guard(path, lambda: self._tiles_problems(slide_id, path))
        findings = [self._finding(slide_id, None, problem, path) for problem in problems]
        if slide_id in self._slide_files and not findings:
            findings += self._check_file(slide_id, self._slide_files[slide_id])
        return findings, n_bytes

    def check_features(
        self, slide_id: str, entry: str, path: StorePath, recipe: FeatureRecipe, cut: bool, tiles_are_bad: bool
    ) -> tuple[list[Finding], int]:
        """Findings about a features unit; ``cut`` says whether there are tiles."""
        tiles = self._tiles_record(slide_id) if cut else None
        problems, n_bytes = self._guard(path, lambda: self._features_problems(slide_id, entry, path, recipe, tiles))
        findings = [self._finding(slide_id, entry, problem, path) for problem in problems]
        if findings or tiles is None or tiles_are_bad:
            return findings, n_bytes
        problems, _ = self._guard(path, lambda: self._link_problems(slide_id, entry, path, tiles))
        # tiles are cut in a second and embeddings are dear: the tiles go, and extraction keeps the embeddings if they
        # fit the new ones
        at = self._store.tiles_path(slide_id)
        return [self._finding(slide_id, entry, problem, at) for problem in problems], n_bytes

    def _guard(self, path: StorePath, look: Callable[[], list[str]]) -> tuple[list[str | OSError], int]:
        """The problems of a unit, what stopped the search for them included, and its size."""
        n_bytes = 0
        try:
            if not self._quick:
                # at a URL everything is copied, and every byte is looked at there
                n_bytes = self._store.size_of(path) if isinstance(path, RemotePath) else _read_through(path)
            return [*look()], n_bytes
        except PermissionError as error:
            return [error], n_bytes
        except StoreUnreachableError:
            raise
        except ExtractError as error:
            problem = _shorten(error, path)
        except Exception as error:  # noqa: BLE001  a damaged file may do anything to its reader; the others are checked
            problem = f"cannot be read: {type(error).__name__}: {error}"
        # another program may have removed it meanwhile, which is no damage
        return [problem] if (isinstance(path, Path) and path.is_symlink()) or path.exists() else [], n_bytes

    def _finding(self, slide_id: str, entry: str | None, problem: str | OSError, path: StorePath) -> Finding:
        if isinstance(problem, OSError):
            at = problem.filename or path
            fix = f"let it be read: chmod -R u+rwX {path}"
            return Finding(slide_id, entry, f"{at}: {problem.strerror}", path, fix, movable=False)
        return Finding(slide_id, entry, problem, path, self._fix)

    def _tiles_record(self, slide_id: str) -> Mapping[str, Any] | None:
        try:
            record = SlideReader(self._store, slide_id).record
            return record if isinstance(record["n_tiles"], int) else None
        except (ExtractError, OSError, LookupError):
            # found where the tiles are checked
            return None

    def _tiles_problems(self, slide_id: str, path: StorePath) -> list[str]:
        store = self._store
        if store.tiles_path(slide_id) != path:
            return [_misnamed(path)]
        record = SlideReader(store, slide_id).record
        problems = record_problems(record, store.tile_recipe)
        arrays = {}
        for name in sorted({*record["sha256"]} & {*ARRAYS}):
            if self._quick and name in PICTURES:
                continue
            try:
                array = store._read_array(path, name)
            except StoreError as error:
                problems.append(f"{name}: {_shorten(error, path)}")
                continue
            found = array_problems(name, array, record)
            problems += found
            if not found:
                arrays[name] = array
        if store.format == "zarr":
            problems += tiles_form_problems(path, record, arrays)
        return problems + fit_problems(arrays, record, store.tile_recipe)

    def _features_problems(
        self, slide_id: str, entry: str, path: StorePath, recipe: FeatureRecipe, tiles: Mapping[str, Any] | None
    ) -> list[str]:
        store = self._store
        if store.feature_path(slide_id, entry) != path:
            return [_misnamed(path)]
        record = store._read_record(path)
        if record["slide_id"] != slide_id:
            return [f"it is of slide {record['slide_id']!r}: renamed or copied by hand"]
        matrix = store._read_array(path, "features")
        problems = commit_problems(record, tiles) + matrix_problems(matrix, record, recipe, self._quick)
        if store.format == "zarr":
            problems += features_form_problems(path, record, matrix)
        return problems

    def _link_problems(self, slide_id: str, entry: str, path: StorePath, tiles: Mapping[str, Any]) -> list[str]:
        if self._store._read_record(path)["tiles_sha256"] != fingerprint(tiles):
            return ["these features are of other tiles than the slide has now: one of the two was changed"]
        if not self._quick:
            self._store._verify_extras(SlideReader(self._store, slide_id), entry)
        return []

    def _check_file(self, slide_id: str, file: Path) -> list[Finding]:
        """Whether a slide's file is the one that was cut."""
        then = SlideReader(self._store, slide_id).record.get("slide")
        if then is None:
            return []
        try:
            now = self._fingerprint_of(file)
        except OSError as error:
            fix = "check the file; copy it again"
            return [Finding(slide_id, None, f"slide file: {error.strerror}", file, fix, movable=False)]
        if now.matches(then):
            return []
        what = f"slide file: {now.size_bytes} bytes, not the file that was cut ({then['size_bytes']} bytes)"
        fix = f"bring the old file back, or cut and embed the new one with mil extract --redo {slide_id}"
        return [Finding(slide_id, None, what, file, fix, movable=False)]


def _check_entry(store: Store, name: str) -> tuple[FeatureRecipe | None, list[Finding]]:
    """The recipe of an entry, and whether it is the one that was written."""
    folder = store.path / "features" / name
    file = folder / store.entry_name
    fix = (
        f"bring {file.name} back from a copy of the store; else mil store repair {store.path} moves the entry aside, "
        f"and mil extract makes it again"
    )
    try:
        recipe = store.feature_recipe(name)
        if store._read_group(file)["fingerprint"] == fingerprint(recipe):
            return recipe, []
        what = "the recipe of the entry does not match its fingerprint: what its features are is unknown"
    except PermissionError as error:
        fix = f"let it be read: chmod -R u+rwX {folder}"
        return None, [Finding(None, name, f"{error.filename}: {error.strerror}", folder, fix, movable=False)]
    except StoreUnreachableError:
        raise
    except (ExtractError, OSError, LookupError, TypeError, ValueError) as error:
        what = f"the recipe of the entry cannot be read: {_shorten(error)}"
    return None, [Finding(None, name, what, folder, fix)]


def _stray_folders(store: Store) -> list[Finding]:
    """Folders of features without a recipe: nobody knows what they are."""
    folder = store.path / "features"
    stray = [name for name in members(folder) if name not in store.entries() and store._unit_names(folder / name)]
    fix = f"bring its {store.entry_name} back from a copy; else mil store repair {store.path} moves it aside"
    return [
        Finding(None, name, f"features without a recipe ({store.entry_name})", folder / name, fix) for name in stray
    ]


def _misnamed(path: StorePath) -> str:
    return f"no slide's unit is called {path.name!r}: it was renamed or copied by hand"


def _read_through(path: Path) -> int:
    """Read every byte of a unit once.

    Raises:
        OSError: a part cannot be read. Through a map, a bad sector would end this process instead.
    """
    if not path.is_dir():
        return _read_file(path)
    return sum(_read_file(Path(folder, name)) for folder, _, names in os.walk(path) for name in names)


def _read_file(path: Path) -> int:
    n_bytes = 0
    with open(path, "rb", buffering=0) as file:
        while n := len(file.read(_READ_BYTES)):
            n_bytes += n
    return n_bytes


def _shorten(error: Exception, path: StorePath | None = None) -> str:
    """What an error says is wrong: without its advice, which is about one file, and the path of the unit."""
    parts = str(error).removeprefix("got ").split(" → ")
    text = ": ".join(parts[:-1] if len(parts) > 2 else parts)
    return text if path is None else text.replace(f"{path}/", "").replace(f"{path}: ", "")
