"""Bags that lie in a store: which entry, opened once, read as matrices."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Protocol, overload

import numpy.typing as npt

from extract.store import Store
from extract.store.core.remote_path import StorePath
from mil.bags.bags import Bags, Memory
from mil.errors import BagError, did_you_mean, listed

# A map keeps a file open; macOS allows a process 256 unless told otherwise, Linux 1,024.
MAPS_KEPT = 64

VIEW = "@view-"
"""In an entry's name: an augmented view of the entry named before it, made by ``mil extract --views``."""


class SlideFeatures(Protocol):
    """One slide of a store, as bags need it."""

    def features(self, entry: str) -> npt.NDArray[Any]:
        """[n_valid, dim], float16 or float32."""
        ...

    def coords(self, entry: str) -> npt.NDArray[Any]:
        """int32 [n_valid, 2], level-0 px."""
        ...

    def verify_features(self, entry: str) -> None:
        """Raise if they are not the bytes that were written."""
        ...


class FeatureStore(Protocol):
    """A store, as bags need it; `extract.store.Store` is one."""

    path: StorePath

    def entries(self) -> list[str]:
        """Names of the features entries."""
        ...

    def slide_ids(self, entry: str | None = None) -> list[str]:
        """Slides with complete features in ``entry``."""
        ...

    def __getitem__(self, slide_id: str) -> SlideFeatures:
        """One slide."""
        ...


def open_bags(
    store: FeatureStore,
    slide_ids: Sequence[str],
    entry: str,
    memory: Memory = "auto",
    coords: bool = False,
    views: bool = False,
) -> Bags:
    """The bags of some slides of a store, in this order.

    Args:
        store: holds them.
        slide_ids: which.
        entry: their features.
        memory: see `Bags`.
        coords: also read where the tiles lie, for heads that use positions.
        views: also open the entry's augmented views.

    Raises:
        BagError: a slide without complete features in ``entry`` or its views, a slide without a valid tile, or no view.
        ExtractError: ``coords`` of a slide that was imported without any.
        UnitCorruptError: features that do not match their checksum; every bag is read once to see.
    """
    others = view_entries(store, entry) if views else []
    if views and not others:
        raise BagError(
            f"got views=sample for entry {entry!r} of {store.path} → it has no augmented views → run mil extract with "
            f"--views 4, or set views=none"
        )
    for name in (entry, *others):
        missing = sorted(set(slide_ids) - set(store.slide_ids(name)))
        if missing:
            raise BagError(
                f"got {len(missing)} slides without features in entry {name!r} of {store.path}: {listed(missing)} → "
                f"expected complete features → run mil extract on them, or leave them out"
            )
    places = [store[slide_id].coords(entry) for slide_id in slide_ids] if coords else None
    seen = [_StoredMatrices(store, slide_ids, name) for name in others]
    return Bags(slide_ids, _StoredMatrices(store, slide_ids, entry), memory, places, seen)


def view_entries(store: FeatureStore, entry: str) -> list[str]:
    """The augmented views of an entry, in the order of their numbers."""
    found = [name for name in store.entries() if name.startswith(f"{entry}{VIEW}")]
    return sorted(found, key=lambda name: (len(name), name))


def needs_coords(keywords: Mapping[str, Any]) -> bool:
    """Whether a head that is built with these keywords reads positions."""
    return bool(keywords.get("positions", "none") != "none")


class _StoredMatrices(Sequence[npt.NDArray[Any]]):
    """Bags where they lie in a store. The latest are kept open: a process may have some hundred files open, no more.

    Every bag is compared with its checksum when it is read first.
    """

    def __init__(self, store: FeatureStore, slide_ids: Sequence[str], entry: str) -> None:
        self._store, self._slide_ids, self._entry = store, tuple(slide_ids), entry
        self._checked: set[str] = set()
        self._open = lru_cache(maxsize=MAPS_KEPT)(self._read)

    def __len__(self) -> int:
        return len(self._slide_ids)

    @overload
    def __getitem__(self, index: int) -> npt.NDArray[Any]: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[npt.NDArray[Any]]: ...

    def __getitem__(self, index: int | slice) -> npt.NDArray[Any] | Sequence[npt.NDArray[Any]]:
        if isinstance(index, slice):
            return [self._open(slide_id) for slide_id in self._slide_ids[index]]
        return self._open(self._slide_ids[index])

    def _read(self, slide_id: str) -> npt.NDArray[Any]:
        # both steps at once: a store at a URL sends the same matrix only once in a row
        slide = self._store[slide_id]
        if slide_id not in self._checked:
            slide.verify_features(self._entry)
            self._checked.add(slide_id)
        return slide.features(self._entry)


def choose_entry(store: FeatureStore, entry: str | None = None) -> str:
    """The features entry to use: ``entry``, or the only one there is.

    Raises:
        BagError: no entries, several without a choice, or an unknown one; the message lists those there are.
    """
    everything = store.entries()
    # a view is trained on with its entry, and alone only when it is asked for
    entries = [name for name in everything if VIEW not in name or name == entry] or everything
    if not entries:
        raise BagError(f"got the store {store.path} without features → expected an entry → run mil extract first")
    if entry is None and len(entries) > 1:
        raise BagError(
            f"got {len(entries)} features entries in {store.path} → expected a choice among {listed(entries)} → "
            f"add backbone={entries[0]}"
        )
    if entry is not None and entry not in entries:
        raise BagError(
            f"got backbone={entry} → {store.path} holds {listed(entries)} → {did_you_mean(entry, entries)}"
            f"choose one of these, or run mil extract with it"
        )
    return entries[0] if entry is None else entry


def is_synthetic(store: Store, slide_ids: Sequence[str]) -> bool:
    """Whether any slide was drawn by `extract.synthetic.cohort`; what is made of it must say so."""
    return any(store[slide_id].record.get("synthetic", False) for slide_id in slide_ids)
