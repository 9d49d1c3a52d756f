"""The extraction stage: slides in, a store of embeddings out, and an account of every slide."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from extract.backbones.backbone import DEFAULT_BACKBONE, Backbone, load_backbone
from extract.backbones.runtimes import choose_runtime
from extract.errors import (
    RecipeError,
)
from extract.pipeline.columns import all_columns, check_contexts, check_entries
from extract.pipeline.gpu import check_device
from extract.pipeline.report import ExtractionReport, Progress, Silent
from extract.pipeline.run import ExtractionRun, Reading
from extract.reading.isolation import ReaderLimits
from extract.slides.sources import find_slides, shard
from extract.store import (
    AugmentRecipe,
    TileRecipe,
    create_store,
)
from extract.store.core.remote_path import RemotePath, store_path
from extract.store.formats.opening import check_format


def run_extraction(
    slides: str | Path | Sequence[str | Path],
    store: str | Path,
    backbone: str | Backbone | Sequence[str | Backbone] = DEFAULT_BACKBONE,
    entry: str | None = None,
    recipe: TileRecipe | None = None,
    table: str | Path | None = None,
    default_mpp: float | None = None,
    weights: str | Path | None = None,
    pooling: str = "model",
    dtype: str = "float16",
    device: str = "auto",
    batch_size: int | None = None,
    progress: Progress | None = None,
    *,
    masks: str | Path | None = None,
    images: str | None = None,
    shard_text: str | None = None,
    views: int = 0,
    augment: AugmentRecipe | None = None,
    context_mpp: Sequence[float] = (),
    runtime: str = "auto",
    precision: str = "auto",
    compile_model: bool = False,
    allow_remote_code: bool = False,
    reader: str = "auto",
    isolation: bool = True,
    limits: ReaderLimits | None = None,
    format: str | None = None,
    **tiling: Any,
) -> ExtractionReport:
    """Embed slides into a store; resumes where an earlier run stopped, inside a slide too.

    A slide that fails is reported and does not stop the others. Slides whose features are complete are not read again.
    Tiles are decoded once, whatever number of backbones and views sees them. Ctrl-C and SIGTERM finish the batches
    under way, save what is done, and raise KeyboardInterrupt; a second one ends the process at once.

    Args:
        slides: files and folders.
        store: folder of the store; made if absent.
        backbone: a name for `load_backbone`, a loaded backbone, or several.
        entry: name of the features entry; by default the backbone's name in small letters.
        recipe: the tile recipe; or give its fields as keywords (``mpp=0.5, tile_px=224, ...``).
        table: the slide table, see `extract.slides.sources.find_slides`.
        default_mpp: µm/px of level 0 for slides that name none.
        weights: local weights file of the backbone.
        pooling: see `load_backbone`.
        dtype: dtype of the stored embeddings.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        batch_size: tiles per forward; by default 4 on a CPU (each core embeds batches of its own) and 128 on a GPU.
        progress: told of every slide and batch.
        masks: where each slide's tissue mask is, see `extract.slides.sources.find_slides`.
        images: pattern of the files that are slides, such as ``img_{}.png``.
        shard_text: ``i/n`` for the i-th of n parts of the slides.
        views: augmented views per tile, each an entry ``NAME@view-k``.
        augment: what the views are; by default `AugmentRecipe` as it is.
        context_mpp: µm/px of further tiles around the same centres, each an entry ``NAME@context-MPP``.
        runtime: what computes on a CPU: ``auto`` (the fastest installed), ``torch`` or ``openvino``.
        precision: ``auto``, ``fp32``, ``bf16`` or ``fp16``.
        compile_model: compile the backbone with ``torch.compile`` (GPU only).
        allow_remote_code: permit backbones that need their authors' code.
        reader: ``auto``, ``direct`` or ``openslide``, see `extract.slides.slide.Slide`.
        isolation: read in a process of its own, so that a file that kills its decoder does not kill the run.
        limits: memory and time that the reading process may take.
        format: ``zarr`` or ``h5``; by default that of the store that is there, or ``zarr``.
        **tiling: fields of `TileRecipe`, when no ``recipe`` is given.

    Raises:
        RecipeError: a setting is out of range.
        RecipeMismatchError: the store or the entry was made by another recipe; the message names the fields.
        StoreError: the store is of another format, or its path is something else.
        StoreFullError: no space left; what was finished is kept.
        SlideTableError: there is no slide, or the table is unusable.
        BackboneError: the backbone cannot be loaded.
        KeyboardInterrupt: the run was stopped.

    Example:
        >>> report = run_extraction("slides/", "cohort.zarr", mpp=0.5)     # doctest: +SKIP
        >>> report.count("embedded"), [o.reason for o in report.failed]    # doctest: +SKIP
        (1600, [])
    """
    if default_mpp is not None and not (math.isfinite(default_mpp) and default_mpp > 0):
        raise RecipeError(f"got a default mpp of {default_mpp} → expected µm per pixel, such as 0.25 → correct it")
    check_format(store, format)
    recipe, progress = recipe or TileRecipe(**tiling), progress or Silent()
    check_contexts(recipe, context_mpp)
    choose_runtime(runtime)
    for text in check_device(device):
        progress.warn(text)
    sources = find_slides([slides] if isinstance(slides, (str, Path)) else slides, table, masks, images)
    if shard_text is not None:
        sources = shard(sources, shard_text)
    given = [backbone] if isinstance(backbone, (str, Backbone)) else list(backbone)
    check_entries(given, entry, weights)
    backbones = [
        each
        if isinstance(each, Backbone)
        else load_backbone(
            each,
            weights,
            pooling,
            recipe.tile_px,
            dtype,
            device,
            precision=precision,
            compile=compile_model,
            allow_remote_code=allow_remote_code,
        )
        for each in given
    ]
    columns = all_columns(backbones, entry, views, augment or AugmentRecipe(), context_mpp)
    path = store_path(store)
    # at a URL an empty store stays: it takes any recipe, and nobody can tell whether another run is at work in it
    is_new = not isinstance(path, RemotePath) and not path.exists()
    run = ExtractionRun(
        create_store(store, recipe, format),
        columns,
        Reading(default_mpp, reader, isolation, limits or ReaderLimits()),
        runtime,
        batch_size,
        progress,
    )
    try:
        report = run.embed(sources)
    finally:
        run.close_log()
    if is_new and len(report.failed) == len(sources) > 0:
        run.remove_empty_store()
    else:
        run.write_index()
    return report
