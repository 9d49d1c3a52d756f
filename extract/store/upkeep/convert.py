"""From one backend to another: the same records, checksums and array bytes in another layout."""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field

import numpy as np

from extract.errors import StoreError, StoreFullError
from extract.store.core.files import clear_when_full, partial_path, remove
from extract.store.core.remote_path import RemotePath, StorePath, store_path
from extract.store.core.slide_reader import SlideReader
from extract.store.core.store import Store
from extract.store.formats.opening import create_store, open_store

Progress = Callable[[int, int, str], None]
"""Called with units done, units in all, and the slide's id."""


@dataclass
class ConversionReport:
    """What became of the units of a store.

    Attributes:
        path: the new store.
        copied: units that were written.
        skipped: units that were there already.
        failed: why a unit could not be taken over, by ``slide`` or ``slide [entry]``.
    """

    path: StorePath
    copied: int = 0
    skipped: int = 0
    failed: dict[str, str] = field(default_factory=dict)


def convert_store(
    source: str | StorePath,
    target: str | StorePath,
    format: str,
    entries: Collection[str] | None = None,
    progress: Progress | None = None,
) -> ConversionReport:
    """Copy a store into another format, or into the same one; go on where an earlier conversion stopped.

    Every unit is compared with its checksums on the way. A unit that cannot be taken over is reported, and the others
    go on.

    Args:
        source: the store that is there; it is only read.
        target: where the new one is made, or goes on.
        format: ``zarr`` or ``h5``.
        entries: which features entries; None for all.
        progress: called after every unit.

    Raises:
        StoreError: no store at ``source``, another kind of store at ``target``, or both are one.
        EntryNotFoundError: an entry that the source does not have.
        StoreFullError: no space left; what was copied is kept.
    """
    there = open_store(source)
    if store_path(source).resolve() == store_path(target).resolve():
        raise StoreError(f"got {source} as both stores → a store is not converted in place → name another target")
    chosen = there.entries() if entries is None else list(entries)
    recipes = {entry: there.feature_recipe(entry) for entry in chosen}
    new = create_store(target, there.tile_recipe, format)
    for name, recipe in recipes.items():
        new.create_entry(name, recipe)
    # damaged ones too: they are to be reported
    units = [(slide_id, entry) for entry in (None, *chosen) for slide_id in sorted(there.unit_paths(entry))]
    report = ConversionReport(new.path)
    for done, (slide_id, entry) in enumerate(units, 1):
        _take_over(there, new, slide_id, entry, report)
        if progress is not None:
            progress(done, len(units), slide_id)
    _copy_logs(there.path / "runs", new.path / "runs")
    new.write_index()
    return report


def _take_over(there: Store, new: Store, slide_id: str, entry: str | None, report: ConversionReport) -> None:
    try:
        slide = there[slide_id]
        copied = _copy_tiles(slide, new) if entry is None else _copy_features(slide, new, entry)
    except StoreFullError:
        raise
    except StoreError as error:
        report.failed[slide_id if entry is None else f"{slide_id} [{entry}]"] = str(error)
        return
    report.copied += copied
    report.skipped += not copied


def _copy_tiles(slide: SlideReader, new: Store) -> bool:
    """Copy where a slide was cut; False if that is there already."""
    if slide.slide_id in new:
        _check_same(dict(new[slide.slide_id].record) == dict(slide.record), slide.slide_id, new)
        return False
    arrays = {name: np.ascontiguousarray(slide.array(name)) for name in slide.record["sha256"]}
    new.commit_tiles(slide.record, arrays)
    return True


def _copy_features(slide: SlideReader, new: Store, entry: str) -> bool:
    """Copy a slide's embeddings; False if they are there already."""
    record = slide.feature_record(entry)
    if new.has_features(slide.slide_id, entry):
        _check_same(dict(new[slide.slide_id].feature_record(entry)) == dict(record), slide.slide_id, new)
        return False
    new.commit_features(entry, record, np.ascontiguousarray(slide.matrix(entry)))
    return True


def _check_same(same: bool, slide_id: str, new: Store) -> None:
    if not same:
        raise StoreError(
            f"got another unit of slide {slide_id!r} in {new.path} than in the source → a unit that is there is never "
            f"replaced → choose another target"
        )


def _copy_logs(source: StorePath, target: StorePath) -> None:
    """Copy the logs of the runs that made the store."""
    logs: Iterable[StorePath] = source.glob("*.jsonl")
    for log in sorted(logs, key=lambda each: each.name):
        if (target / log.name).exists():
            continue
        if isinstance(target, RemotePath):
            (target / log.name).write_bytes(log.read_bytes())
            continue
        partial = partial_path(target / log.name)
        content = log.read_bytes()
        with clear_when_full(target, len(content)):
            target.mkdir(exist_ok=True)
            try:
                partial.write_bytes(content)
                partial.rename(target / log.name)
            finally:
                remove(partial)
