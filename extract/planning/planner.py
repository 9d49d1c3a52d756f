"""Slides opened and cut, to count what an extraction would embed."""

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count as count_up
from queue import SimpleQueue
from typing import Any

import numpy as np

from extract.errors import ExtractError, SlideUnreadableError
from extract.geometry import ReadPlan
from extract.pipeline.config import ExtractionConfig
from extract.pipeline.jobs import available_cores
from extract.planning.planned import PlannedEntry, PlannedSlide, PlanProgress, Sample
from extract.reading.answers import rebuild_error
from extract.reading.isolation import ReaderProcess
from extract.reading.reader import PREPARING_THREADS, cut_request, open_request
from extract.reading.readers import LocalReaders, Readers
from extract.reading.ring import Ring, RingShape
from extract.slides.finding.source import SlideSource
from extract.store import Store
from extract.tiling.sameness import check_same
from extract.tiling.tiles import context_tiles, recorded_plan

_MOST_CUTTERS = 8
_SAMPLED_SLIDES = 8
_SAMPLED_TILES = 4096


class _Cutters:
    """Reading processes, as many as the cores allow; ``n`` threads at once may ask them for a slide."""

    def __init__(self, config: ExtractionConfig, n_slides: int) -> None:
        reading = config.reading
        count = min(_MOST_CUTTERS, max(available_cores() // PREPARING_THREADS, 1), -(-n_slides // PREPARING_THREADS))
        # one slot and one reading thread for each slide that is looked at
        shape = RingShape(PREPARING_THREADS, 1, config.recipe.tile_px, 2 * PREPARING_THREADS)
        self._rings = [Ring(shape) for _ in range(count if reading.isolation else 1)]
        self._readers: list[Readers] = [
            ReaderProcess(ring, reading.limits) if reading.isolation else LocalReaders(ring) for ring in self._rings
        ]
        # a slide waits here and not in a process, whose limit of time begins when it takes the slide up
        self._seats: SimpleQueue[tuple[Readers, int]] = SimpleQueue()
        for slot in range(PREPARING_THREADS):
            for readers in self._readers:
                self._seats.put((readers, slot))
        self._keys = count_up(1)
        self.n = PREPARING_THREADS * len(self._readers)

    @contextmanager
    def seat(self) -> Iterator[tuple[Readers, int]]:
        """A process that has time for a slide, and the slot for its tile."""
        seat = self._seats.get()
        try:
            yield seat
        finally:
            self._seats.put(seat)

    def cut(self, request: Mapping[str, Any]) -> tuple[dict[str, Any], list[np.ndarray], float]:
        """The answer to a request, its arrays, and how long it took."""
        with self.seat() as (readers, _):
            started = time.monotonic()
            answer, arrays = readers.request(request).result()
            return answer, arrays, time.monotonic() - started

    def try_tile(
        self, source: SlideSource, reader: str, plan: ReadPlan, coords: np.ndarray
    ) -> tuple[dict[str, str], dict[str, str]]:
        """Read one tile, as every extraction will.

        Returns:
            How the slide is read (``reader`` and ``note``), and the error that ends it; both as the reader describes
            them, the second one usually empty.
        """
        key = next(self._keys)
        with self.seat() as (readers, slot):
            readers.tell(open_request(key, source.path, source.slide_id, reader, plan, None), [coords])
            try:
                answer, _ = readers.request({"do": "read", "slot": slot, "at": 0, "runs": [[key, 0, 1]]}).result()
            finally:
                readers.tell({"do": "close", "key": key})
        error = answer.get("error") or answer["errors"].get(str(key), {})
        return answer.get("opened", {}).get(str(key), {}), error

    def close(self) -> None:
        """End the processes."""
        for readers in self._readers:
            readers.close()
        for ring in self._rings:
            ring.close()


class Planner:
    """Cuts every slide and keeps the account."""

    def __init__(self, config: ExtractionConfig, entries: Sequence[PlannedEntry], store: Store | None) -> None:
        self._config, self._entries, self._store = config, entries, store
        there = set() if store is None else set(store.entries())
        self._done = {
            entry.name: set(store.slide_ids(entry.name)) if store is not None and entry.name in there else set()
            for entry in entries
        }
        self._cut_s = 0.0
        self._lock = threading.Lock()

    @property
    def cut_seconds(self) -> float:
        """How long an extraction will take to cut the slides that the store has not."""
        return self._cut_s / PREPARING_THREADS

    def plan(
        self, sources: Sequence[SlideSource], progress: PlanProgress
    ) -> tuple[tuple[PlannedSlide, ...], list[Sample]]:
        """Plan every slide; and some tiles of the first ones."""
        progress.start(len(sources))
        slides: list[PlannedSlide] = []
        samples: list[Sample] = []
        cutters = _Cutters(self._config, len(sources))
        pool = ThreadPoolExecutor(cutters.n, "plan")
        try:
            for slide, sample in pool.map(lambda source: self._plan_guarded(source, cutters), sources):
                slides.append(slide)
                if sample is not None and len(samples) < _SAMPLED_SLIDES:
                    samples.append(sample)
                progress.slide_done(slide)
        finally:
            # after Ctrl-C: what waits is dropped, and closing the readers ends what is being cut
            pool.shutdown(wait=False, cancel_futures=True)
            cutters.close()
        return tuple(slides), samples

    def _plan_guarded(self, source: SlideSource, cutters: _Cutters) -> tuple[PlannedSlide, Sample | None]:
        try:
            return self._plan_slide(source, cutters)
        except (ExtractError, OSError) as error:
            reason = str(error)
        except Exception as error:  # noqa: BLE001  one slide's surprise must not cost the others
            reason = f"unexpected {type(error).__name__}: {error}"
        return PlannedSlide(source.slide_id, str(source.path), "fail", reason), None

    def _plan_slide(self, source: SlideSource, cutters: _Cutters) -> tuple[PlannedSlide, Sample | None]:
        if not source.path.exists():
            raise SlideUnreadableError(f"got {source.path} → there is no such file → check the path")
        anew = source.slide_id in self._config.reading.redo
        if self._store is not None and source.slide_id in self._store and not anew:
            there = self._store[source.slide_id]
            record, coords = there.record, there.coords()
            check_same(source, record, self._config.reading.default_mpp)
        else:
            record, coords = self._cut(source, cutters)
        for mpp in self._config.entries.context_mpp:
            context_tiles(record, coords, mpp)
        missing = [entry for entry in self._entries if anew or source.slide_id not in self._done[entry.name]]
        facts = _facts(record) | {"n_tiles": len(coords)}
        if not missing:
            return PlannedSlide(source.slide_id, str(source.path), "complete", **facts), None
        sample = Sample(source, record, _middle(coords))
        opened, error = cutters.try_tile(source, self._config.reading.reader, recorded_plan(record), sample.coords[:1])
        if error:
            raise rebuild_error(error, source.slide_id)
        facts["n_bytes"] = len(coords) * sum(entry.tile_bytes for entry in missing)
        facts |= {"reader": opened.get("reader", ""), "reader_note": opened.get("note", "")}
        return PlannedSlide(source.slide_id, str(source.path), "embed", **facts), sample

    def _cut(self, source: SlideSource, cutters: _Cutters) -> tuple[dict[str, Any], np.ndarray]:
        """Have a reading process cut a slide, by the request that an extraction makes; its record and coordinates."""
        request = cut_request(
            source, self._config.reading.reader, self._config.recipe, self._config.reading.default_mpp
        )
        answer, arrays, seconds = cutters.cut(request)
        if "error" in answer:
            raise rebuild_error(answer["error"], source.slide_id)
        with self._lock:
            self._cut_s += seconds
        return dict(answer["record"]) | {"slide_id": source.slide_id}, arrays[0]


def _facts(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the record of a tiles unit says of scale and tissue."""
    plan = recorded_plan(record)
    return {
        "native_mpp": plan.native_mpp,
        "mpp_source": record["mpp"]["source"],
        "achieved_mpp": plan.achieved_mpp,
        "level": plan.level,
        "downsample": plan.downsample,
        "resampled": plan.resampled,
        "tissue_mm2": record["tissue"]["area_mm2"],
        "tissue_part": None if record["tissue"]["method"] == "none" else record["tissue"]["fraction"],
    }


def _middle(coords: np.ndarray) -> np.ndarray:
    """At most `_SAMPLED_TILES` consecutive tiles from the middle of a slide."""
    first = max(len(coords) - _SAMPLED_TILES, 0) // 2
    return np.array(coords[first : first + _SAMPLED_TILES])
