"""What an extraction will do, before it costs a GPU hour: tiles, disk space, time, and the slides that will fail."""

import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Unpack

from extract.backbones.presets import DEFAULT_BACKBONE
from extract.errors import RecipeMismatchError, StoreError
from extract.folders import NotTaken
from extract.pipeline.config import Backbones, ExtractionConfig, ExtractionSettings, Slides
from extract.pipeline.jobs import make_columns
from extract.planning.machine import nearest_folder
from extract.planning.measure import PlanModel, find_model, measure_rates
from extract.planning.planned import ExtractionPlan, PlanProgress, SilentPlan
from extract.planning.planner import Planner
from extract.slides.finding.source import SlideSource
from extract.store import Store, TileRecipe, difference, find_format, open_store
from extract.store.core.remote_path import RemotePath, StorePath, store_path
from extract.store.formats.opening import check_format

_MEASURE_S = 5.0


def plan_extraction(
    slides: Slides,
    store: str | StorePath | None = None,
    backbone: Backbones = DEFAULT_BACKBONE,
    entry: str | None = None,
    recipe: TileRecipe | None = None,
    *,
    progress: PlanProgress | None = None,
    measure: bool = True,
    measure_s: float = _MEASURE_S,
    **settings: Unpack[ExtractionSettings],
) -> ExtractionPlan:
    """Find out what `extract.pipeline.extraction.run_extraction` will do with the same arguments; writes nothing.

    Slides are opened and cut as an extraction does it, in reading processes of their own.

    Args:
        slides: files and folders.
        store: folder of the store; slides that are complete in it are not planned again.
        measure: whether tiles of the first slides are embedded to measure the rate.
        measure_s: seconds to measure for, after a warm-up.
        **settings: as those of `extract.pipeline.extraction.run_extraction`, and so are all other arguments.

    Raises:
        RecipeError: a setting is out of range.
        RecipeMismatchError: the store or the entry was made by another recipe; the message names the fields.
        StoreError: the store is of another format, or its path is something else.
        SlideTableError: there is no slide, or the table is unusable.
        BackboneError: there is no such backbone. Weights that are not to be had are one of the plan's ``problems``.

    Example:
        >>> plan = plan_extraction("slides/", mpp=0.5)                       # doctest: +SKIP
        >>> plan.n_tiles, plan.cache_bytes, [s.reason for s in plan.failed]  # doctest: +SKIP
        (1200345, 3072883200, [])
    """
    config = ExtractionConfig.of(slides, backbone, entry, recipe, **settings)
    if store is not None:
        check_format(store, config.format)
    not_taken = NotTaken()
    sources, began = config.slides.find(not_taken), time.monotonic()
    models = [find_model(each, config, measure) for each in config.backbone.backbones]
    loaded_s = time.monotonic() - began
    plan = _plan(sources, config, models, None if store is None else store_path(store), measure, measure_s, progress)
    return replace(plan, start_seconds=plan.start_seconds + loaded_s, not_taken=not_taken)


def _plan(
    sources: Sequence[SlideSource],
    config: ExtractionConfig,
    models: Sequence[PlanModel],
    store: StorePath | None,
    measure: bool,
    measure_s: float,
    progress: PlanProgress | None,
) -> ExtractionPlan:
    """Plan every slide, then measure."""
    progress = progress or SilentPlan()
    entries = [entry for model in models for entry in model.entries(config.entries)]
    there = None if store is None else _open_existing(store, config.recipe)
    if there is not None:
        _check_entries(there, config, models)
    planner = Planner(config, entries, there)
    slides, samples = planner.plan(sources, progress)
    problems = [model.problem for model in models if model.problem]
    rate, start_s = None, 0.0
    if measure and samples and not problems:
        rate, start_s, problem = measure_rates(config, models, samples, measure_s, progress)
        problems += [problem] if problem else []
    free = None if store is None or isinstance(store, RemotePath) else shutil.disk_usage(nearest_folder(store)).free
    plan = ExtractionPlan(slides, tuple(entries), store, free, rate, planner.cut_seconds, tuple(problems), start_s)
    if free is not None and free < plan.cache_bytes:
        full = (
            f"got {free / 1e9:.1f} GB of free space for {store} → the embeddings need {plan.cache_bytes / 1e9:.1f} GB "
            f"→ free some space, or move the --store"
        )
        return replace(plan, problems=(*plan.problems, full))
    return plan


def _open_existing(path: StorePath, recipe: TileRecipe) -> Store | None:
    """The store if it is there; an extraction would refuse it for the same reasons."""
    if find_format(path) is None:
        if path.exists() and (not path.is_dir() or any(not each.name.startswith("~") for each in path.iterdir())):
            raise StoreError(f"got {path} as store → it exists and is not a store → choose another --store")
        return None
    store = open_store(path)
    changes = difference(store.tile_recipe, recipe)
    if changes and len(store):
        raise RecipeMismatchError(
            f"got a tile recipe unlike that of store {path} (there → now): {'; '.join(changes)} → one store holds one "
            f"recipe → repeat the settings of the store, or choose another --store"
        )
    return store


def _check_entries(store: Store, config: ExtractionConfig, models: Sequence[PlanModel]) -> None:
    """Entries that are there must have been made by the same recipe."""
    backbones = [model.backbone for model in models if model.backbone is not None]
    for column in chain.from_iterable(make_columns(backbone, config.entries) for backbone in backbones):
        if column.entry not in store.entries():
            continue
        if changes := difference(store.feature_recipe(column.entry), column.backbone.recipe):
            raise RecipeMismatchError(
                f"got a feature recipe unlike that of entry {column.entry!r} in {store.path} (there → now): "
                f"{'; '.join(changes)} → one entry holds one recipe → name another entry with --as, or repeat the "
                f"settings"
            )
