"""From slides to the features that a model was trained on: nothing but its own recipe will do."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from extract.errors import BackboneError
from extract.store import FeatureRecipe, Store, TileRecipe, difference, find_format, fingerprint, from_dict, open_store
from extract.store.core.recipes import is_unknown
from extract.store.core.remote_path import StorePath
from mil.errors import CheckpointError, RunError
from mil.training.checkpoint import CheckpointRecord

Slides = str | Path | Sequence[str | Path]


@dataclass(frozen=True)
class Extracted:
    """What became of slides.

    Attributes:
        slide_ids: those with complete features for every model that was asked for, sorted.
        failed: the others, with the reason.
    """

    slide_ids: tuple[str, ...]
    failed: tuple[tuple[str, str], ...]


def extract_for(
    records: Sequence[CheckpointRecord],
    slides: Slides,
    store: str | StorePath,
    device: str = "auto",
    options: Mapping[str, Any] | None = None,
) -> Extracted:
    """Embed what is missing of some slides, by the recipe of each checkpoint.

    Args:
        records: of the models that will be applied.
        slides: files and folders; may be empty where ``options`` has a ``table``.
        store: where the features go; made if absent, gone on with if it was made by the same recipe.
        device: what embeds.
        options: further keywords of `extract.run_extraction`: ``table``, ``default_mpp``, ``masks``, ``images``,
            ``weights``, ``progress``, ``runtime``, ...

    Raises:
        CheckpointError: the recipe cannot be followed here: the backbone cannot be loaded or has other weights, the
            store was cut otherwise, or the model was trained on features of another tool.
        RunError: no slide could be embedded.
        ExtractError: as in `extract.run_extraction`.
    """
    from extract.pipeline.extraction import run_extraction

    given = dict(options or {})
    weights, failed, done = given.pop("weights", None), dict[str, str](), list[set[str]]()
    # members of an ensemble may share their features
    for record in {_recipes(record): record for record in records}.values():
        tiles = _tile_recipe(record, store)
        backbone = _load(record, tiles, weights, device, bool(given.get("allow_remote_code", False)))
        entry = _entry(record, store)
        report = run_extraction(slides, store, backbone, entry, tiles, device=device, **given)
        failed |= {each.slide_id: each.reason for each in report.outcomes if each.outcome in ("failed", "elsewhere")}
        done.append({each.slide_id for each in report.outcomes if each.outcome in ("embedded", "complete")})
        if report.store.exists():
            failed |= _without_tiles(open_store(store), entry, done[-1])
    ids = set.intersection(*done) - set(failed)
    if not ids:
        name, reason = next(iter(sorted(failed.items())))
        raise RunError(
            f"got {len(failed)} slides, none of which could be embedded → expected one at least → mend the first: "
            f"{name}: {reason}"
        )
    return Extracted(tuple(sorted(ids)), tuple(sorted(failed.items())))


def fitting_entries(record: CheckpointRecord, store: Store) -> list[str]:
    """The entries of a store that hold features of a checkpoint's recipe, the checkpoint's own name first."""
    fitting = [name for name in store.entries() if not difference(record.feature_recipe, store.feature_recipe(name))]
    return sorted(fitting, key=lambda name: name != record.entry)


def _recipes(record: CheckpointRecord) -> str:
    return fingerprint([dict(record.feature_recipe), dict(record.tile_recipe)])


def _tile_recipe(record: CheckpointRecord, store: str | StorePath) -> TileRecipe:
    """The recipe of the checkpoint's tiles, which that of a store that is there must equal."""
    recipe, tiles = record.feature_recipe, record.tile_recipe
    if any(is_unknown(value) for value in (*recipe.values(), *tiles.values())):
        raise CheckpointError(
            f"got slides for {record.replica}, which was trained on imported features (entry {record.entry!r}): nobody "
            f"recorded how they are made → embed the slides with the tool that made those, mil store import them, and "
            f"give that store"
        )
    if recipe["view"] != "identity" or recipe["context_mpp"] is not None:
        raise CheckpointError(
            f"got slides for {record.replica}, which was trained on a further view of the tiles (entry "
            f"{record.entry!r}) → run mil extract with the same --views or --context-mpp, and give that store"
        )
    if _is_there(store):
        differing = difference(tiles, open_store(store).tile_recipe, "tile recipe: ")
        if differing:
            raise CheckpointError(
                f"got the store {store} for {record.replica}, but it differs in {'; '.join(differing)} (checkpoint → "
                f"store) → name another store with --store; it is made by the checkpoint's recipe"
            )
    return from_dict(TileRecipe, tiles)


def _load(
    record: CheckpointRecord, tiles: TileRecipe, weights: str | Path | None, device: str, allow_remote_code: bool
) -> Any:
    """The backbone of a checkpoint's features, with the weights that made them."""
    from extract.backbones.backbone import load_backbone

    recipe = record.feature_recipe
    name = recipe["backbone"]
    try:
        backbone = load_backbone(
            name,
            weights,
            recipe["pooling"],
            tiles.tile_px,
            recipe["dtype"],
            device,
            allow_remote_code=allow_remote_code,
        )
    except BackboneError as error:
        raise CheckpointError(
            f"got slides for {record.replica}, which needs features of backbone {name!r}, and that cannot be loaded "
            f"here: {error}"
        ) from error
    _check_backbone(record, backbone.recipe)
    return backbone


def _check_backbone(record: CheckpointRecord, found: FeatureRecipe) -> None:
    expected = record.feature_recipe["weights_sha256"]
    if found.weights_sha256 != expected:
        raise CheckpointError(
            f"got backbone {found.backbone!r} with weights {found.weights_sha256[:12]}... → {record.replica} was "
            f"trained on features of weights {expected[:12]}... → give the file of those weights with --weights"
        )
    differing = difference(record.feature_recipe, found, "feature recipe: ")
    if differing:
        raise CheckpointError(
            f"got backbone {found.backbone!r}, whose features differ from those that {record.replica} was trained on "
            f"in {'; '.join(differing)} (checkpoint → here) → use the version that the model was trained with: "
            f"{dict(record.versions)}"
        )


def _entry(record: CheckpointRecord, store: str | StorePath) -> str:
    """The entry that fits; else the checkpoint's own name, or another where features of other weights have that."""
    if not _is_there(store):
        return record.entry
    reader = open_store(store)
    fitting = fitting_entries(record, reader)
    if fitting:
        return fitting[0]
    taken = record.entry in reader.entries()
    return f"{record.entry}-{fingerprint(record.feature_recipe)[:8]}" if taken else record.entry


def _is_there(store: str | StorePath) -> bool:
    return find_format(store) is not None


def _without_tiles(store: Store, entry: str, slide_ids: set[str]) -> dict[str, str]:
    """Slides of which no tile could be decoded."""
    return {each: "none of its tiles could be decoded" for each in slide_ids if not store.n_tiles(each, entry)}
