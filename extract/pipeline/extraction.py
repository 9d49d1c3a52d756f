"""The extraction stage: slides in, a store of embeddings out, and an account of every slide."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Unpack

from extract.backbones.gpu import check_device
from extract.backbones.presets import DEFAULT_BACKBONE
from extract.backbones.runtimes import choose_runtime
from extract.errors import SlideTableError
from extract.folders import NotTaken
from extract.pipeline.config import Backbones, ExtractionConfig, ExtractionSettings, Slides
from extract.pipeline.jobs import all_columns
from extract.pipeline.report import ExtractionReport, Progress, Silent, tell
from extract.pipeline.run import ExtractionRun
from extract.pipeline.shortcut import find_complete, remember
from extract.slides.finding.source import SlideSource
from extract.store import Store, TileRecipe, create_store
from extract.store.core.remote_path import RemotePath, StorePath, store_path
from extract.store.formats.opening import check_format
from extract.store.upkeep.repair import set_aside


def run_extraction(
    slides: Slides,
    store: str | StorePath,
    backbone: Backbones = DEFAULT_BACKBONE,
    entry: str | None = None,
    recipe: TileRecipe | None = None,
    *,
    progress: Progress | None = None,
    **settings: Unpack[ExtractionSettings],
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
        progress: told of every slide and batch.
        **settings: ``table``, ``masks``, ``images`` and ``shard_text`` of
            `extract.pipeline.config.SlideSelection`; ``weights``, ``pooling``, ``dtype`` and ``allow_remote_code`` of
            `extract.pipeline.config.BackboneConfig`; ``device``, ``batch_size``, ``runtime``, ``precision`` and
            ``compile_model`` of `extract.pipeline.config.ComputeConfig`; ``views``, ``augment`` and ``context_mpp`` of
            `extract.pipeline.config.EntryConfig`; ``default_mpp``, ``reader``, ``isolation``, ``limits``,
            ``max_invalid`` and ``redo`` of `extract.pipeline.config.ReadingConfig`; ``format`` of
            `extract.pipeline.config.ExtractionConfig`; and the fields of `TileRecipe`, when no ``recipe`` is given.

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
    config = ExtractionConfig.of(slides, backbone, entry, recipe, **settings)
    return extract_slides(config, store, progress or Silent())


def redo(store: Store, config: ExtractionConfig, sources: Sequence[SlideSource]) -> None:
    """Move the slides that are to be done again out of the store.

    Raises:
        SlideTableError: one of them is none of the slides that were given.
        SlideClaimedError: another process is at work on one of them.
        StoreError: the store lies at a URL.
    """
    given = {source.slide_id for source in sources}
    strange = [slide_id for slide_id in config.reading.redo if slide_id not in given]
    if strange and config.slides.shard_text is None:
        raise SlideTableError(
            f"got --redo {strange[0]} → none of the {len(given)} slides that were given has this id → ids are paths "
            f"below the given folder without the extension, such as {min(given)!r}"
        )
    mine = [slide_id for slide_id in config.reading.redo if slide_id in given and slide_id in store]
    if mine:
        set_aside(store, mine)


def extract_slides(config: ExtractionConfig, store: str | StorePath, progress: Progress) -> ExtractionReport:
    """Embed the slides of a configuration into a store; see `run_extraction`."""
    check_format(store, config.format)
    if (done := find_complete(store, config, progress)) is not None:
        return done
    choose_runtime(config.compute.runtime)
    for text in check_device(config.compute.device):
        progress.warn(text)
    not_taken = NotTaken()
    sources = config.slides.find(not_taken)
    tell(progress, "loading the backbone")
    backbones = [config.load(each) for each in config.backbone.backbones]
    for text in (note for backbone in backbones for note in backbone.notes):
        progress.warn(text)
    columns = all_columns(backbones, config.entries)
    path = store_path(store)
    # at a URL an empty store stays: it takes any recipe, and nobody can tell whether another run is at work in it
    is_new = not isinstance(path, RemotePath) and not path.exists()
    made = create_store(store, config.recipe, config.format)
    redo(made, config, sources)
    run = ExtractionRun(made, columns, config, progress)
    remember(made, config, [column.entry for column in columns])
    try:
        report = run.embed(sources)
    finally:
        run.close_log()
    if is_new and len(report.failed) == len(sources) > 0:
        run.remove_empty_store()
    else:
        run.write_index()
    return replace(report, not_taken=not_taken)
