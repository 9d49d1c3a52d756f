"""What the stream of tiles works on: which features of a slide are to be made, jobs of slides, how many workers.

Imports no torch: a run that finds everything there needs none.
"""

import copy
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from extract.errors import FeatureRangeError, RecipeError
from extract.geometry import ReadPlan
from extract.reading.ring import INVALID
from extract.store import FeatureRecipe, QualityRecipe
from extract.store.core.draft import Draft

if TYPE_CHECKING:
    import torch

    from extract.backbones.backbone import Backbone
    from extract.pipeline.config import EntryConfig

CPU_BATCH_SIZE = 4
GPU_BATCH_SIZE = 128

SAVE_EVERY_S = 10.0
"""How much work a killed run may lose of a slide."""


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Column:
    """One matrix per slide: what a backbone makes of its tiles, as they are or as an augmented view.

    Attributes:
        entry: name of the features entry.
        backbone: a loaded backbone; its recipe is the entry's, with the view's augmentation.
        view: 0 for the tiles as they are, k for the k-th augmented view.
    """

    entry: str
    backbone: "Backbone"
    view: int = 0


@dataclass
class SlideJob:
    """One slide on its way through the stream.

    Attributes:
        slide_id: its id.
        path: the file.
        reader: ``auto``, ``direct`` or ``openslide``.
        coords: int32 [n, 2] in level-0 px.
        plan: how its tiles are read.
        columns: what is computed of each tile.
        features: per column [n, dim] in the dtype of the store, filled as batches finish.
        quality: thresholds of the tiles' flags, or None where they are not looked for.
        seed: text that the draws of augmented views depend on; the same for the same file.
        drafts: per column, where finished rows are saved; may be empty.
        first_row: rows before it were saved by an earlier run.
        flags: uint8 [n]: `INVALID` and the bits of `extract.tiling.quality`.
        error: what ended the slide early, if anything did; the other slides go on.
        read_by: how its tiles were read, and why not directly.
        damage: what the decoder says of a tile that it cannot decode.
        started: monotonic seconds.
    """

    slide_id: str
    path: Path
    coords: np.ndarray
    plan: ReadPlan
    columns: tuple[Column, ...]
    features: tuple[np.ndarray, ...]
    reader: str = "auto"
    quality: QualityRecipe | None = None
    seed: str = ""
    drafts: tuple[Draft, ...] = ()
    first_row: int = 0
    flags: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.uint8))
    error: Exception | None = None
    read_by: str = ""
    damage: str = ""
    started: float = field(default_factory=time.monotonic)
    key: int = 0
    rows_left: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        n = len(self.coords)
        if len(self.flags) != n:
            self.flags = np.zeros(n, dtype=np.uint8)
        self.rows_left = n - self.first_row
        self._done = np.zeros(n, dtype=bool)
        self._done[: self.first_row] = True
        self._saved_at = time.monotonic()

    @property
    def invalid_rows(self) -> list[int]:
        """Rows whose tile could not be decoded."""
        return [int(row) for row in np.flatnonzero(self.flags & INVALID)]

    def fill(self, start: int, stop: int, features: Sequence[np.ndarray]) -> None:
        """Put computed rows in their places; a value that the store cannot hold ends the slide at once."""
        from extract.backbones.backbone import to_dtype

        valid = (self.flags[start:stop] & INVALID) == 0
        for target, rows in zip(self.features, features, strict=True):
            try:
                cast = to_dtype(rows[valid], target.dtype.name, self.slide_id)
            except FeatureRangeError as error:
                self.error = error
                return
            target[start:stop] = 0
            target[start:stop][valid] = cast

    def finish_rows(self, start: int, stop: int) -> tuple[bool, bool]:
        """Note finished rows; whether they were the last, and whether it is time to save."""
        with self.lock:
            # what was not read any more must not be saved as done
            if self.error is None:
                self._done[start:stop] = True
            self.rows_left -= stop - start
            now = time.monotonic()
            due = bool(self.drafts) and now - self._saved_at > SAVE_EVERY_S
            if due:
                self._saved_at = now
            return self.rows_left == 0, due

    def save(self) -> None:
        """Make the rows that are finished from the first one on safe in the drafts."""
        with self.lock:
            missing = np.flatnonzero(~self._done)
        safe = int(missing[0]) if len(missing) else len(self._done)
        for draft, features in zip(self.drafts, self.features, strict=True):
            draft.save(features[:safe], self.invalid_rows, self.flags[:safe])


@dataclass
class StreamStats:
    """Where the time went, in seconds; ``tiles`` counts finished rows of this run.

    ``read_cpu_s`` and ``device_busy_s`` are summed over threads, and so is the wait for tiles; the waits say who waits
    for whom.
    """

    tiles: int = 0
    read_cpu_s: float = 0.0
    device_busy_s: float = 0.0
    waited_for_slides_s: float = 0.0
    waited_for_tiles_s: float = 0.0
    waited_for_backbone_s: float = 0.0
    waited_for_writer_s: float = 0.0
    workers: int = 1
    started: float = field(default_factory=time.monotonic)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def bottleneck(self) -> str:
        """The stage that the others wait for: ``opening slides``, ``reading``, ``backbone`` or ``writing``."""
        starved = self.waited_for_tiles_s / self.workers
        if self.waited_for_writer_s / self.workers > max(starved, self.waited_for_backbone_s):
            return "writing"
        if starved <= self.waited_for_backbone_s:
            return "backbone"
        return "opening slides" if self.waited_for_slides_s > starved / 2 else "reading"

    @property
    def device_busy(self) -> float:
        """Part of the time in which the device computed, over all workers."""
        return min(self.device_busy_s / max(time.monotonic() - self.started, 1e-9) / self.workers, 1.0)


def workers(device: "torch.device") -> int:
    """Threads that embed: one a core on a CPU, one on a GPU."""
    return available_cores() if device.type == "cpu" else 1


def ring_slots(device: "torch.device") -> int:
    """Slots that keep readers and backbones from waiting for each other."""
    return 2 * workers(device) + available_cores() + 2 if device.type == "cpu" else 8


def all_columns(backbones: Sequence["Backbone"], entries: "EntryConfig") -> list[Column]:
    """The columns of every backbone.

    Raises:
        RecipeError: two of them would be one entry.
    """
    columns = [column for each in backbones for column in make_columns(each, entries)]
    names = [column.entry for column in columns]
    if len(set(names)) < len(names):
        raise RecipeError(f"got the entries {names} → expected each once → name each backbone and --context-mpp once")
    return columns


def entry_name(backbone: str) -> str:
    """The default entry of a backbone: its name with everything outside ``[a-z0-9._-]`` replaced by ``-``."""
    kept = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in backbone.lower())
    return kept.strip("._-") or "features"


def make_columns(backbone: "Backbone", entries: "EntryConfig") -> list[Column]:
    """What is computed with one backbone: its tiles as they are, their augmented views, and their surroundings."""
    name = entries.entry or entry_name(backbone.recipe.backbone)
    # a copy, since the run may let it compute by another runtime
    columns = [Column(name, _with_recipe(backbone, backbone.recipe))]
    for view in range(1, entries.views + 1):
        recipe = replace(backbone.recipe, view=f"view-{view}", augment=entries.augment)
        columns.append(Column(f"{name}@view-{view}", _with_recipe(backbone, recipe), view))
    for mpp in entries.context_mpp:
        recipe = replace(backbone.recipe, context_mpp=mpp)
        columns.append(Column(f"{name}@context-{mpp:g}", _with_recipe(backbone, recipe)))
    return columns


def _with_recipe(backbone: "Backbone", recipe: FeatureRecipe) -> "Backbone":
    """The same loaded weights under another recipe."""
    other = copy.copy(backbone)
    other.recipe = recipe
    return other
