"""One batch of tiles on its way through the stream, and the tasks that it is read in."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from extract.backbones.views import augment, tile_key
from extract.pipeline.jobs import Column, SlideJob

RUN_TILES = 16
"""Tiles that one reading thread decodes in one go."""

Run = tuple[SlideJob, int, int]
"""Consecutive rows of a slide: (job, start, stop)."""


@dataclass
class Batch:
    """One full slot on its way: what is in it, and how many tasks still fill it."""

    slot: int
    runs: list[Run]
    columns: tuple[Column, ...]
    tasks_left: int = 0

    @property
    def n_tiles(self) -> int:
        """Tiles in the slot; the others are empty."""
        return sum(stop - start for _, start, stop in self.runs)

    def augmented(self, column: Column, tiles: Tensor) -> Tensor:
        """The batch's tiles as one augmented view, each by its own draw."""
        recipe = column.backbone.recipe.augment
        keys = [tile_key(job.seed, row) for job, start, stop in self.runs for row in range(start, stop)]
        keys += [0] * (len(tiles) - len(keys))
        return tiles if recipe is None else augment(tiles, keys, recipe, column.view)


def split_runs(runs: Sequence[Run]) -> list[tuple[int, list[Run]]]:
    """Cut a batch into tasks of at most `RUN_TILES` tiles, each with the place of its first tile in the slot."""
    tasks: list[tuple[int, list[Run]]] = []
    position, room = 0, 0
    for job, start, stop in runs:
        while start < stop:
            if room == 0:
                tasks.append((position, []))
                room = RUN_TILES
            end = min(start + room, stop)
            tasks[-1][1].append((job, start, end))
            position, room, start = position + end - start, room - (end - start), end
    return tasks
