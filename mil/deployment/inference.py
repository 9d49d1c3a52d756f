"""Applying a model to slides without labels: the mean probability of its replicas."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from aggregators import BagOutput
from extract.store import Store, open_store
from extract.store.core.remote_path import StorePath
from mil.arrays import FloatArray
from mil.bags.bags import Bags
from mil.bags.devices import cpu_threads, resolve_device
from mil.bags.forward import MAX_INSTANCES, fitting_packs
from mil.bags.stored import choose_entry, needs_coords, open_bags
from mil.deployment.embed import Slides, extract_for, fitting_entries
from mil.deployment.model import Members, Model, load_model, model_records, read_members
from mil.deployment.predictions import Predictions
from mil.errors import RunError, listed
from mil.evaluation.tables import value_names
from mil.runs.ensemble import over_members
from mil.training.checkpoint import CheckpointRecord, require_recipes
from mil.training.tasks import decode

NO_TILE = "it has no valid tile in the store"
"""Why a slide with features is not predicted."""


def predict(
    run_folder: str | Path,
    store: Store | str | StorePath,
    entry: str | None = None,
    slide_ids: Sequence[str] | None = None,
    device: str = "auto",
    replicas: Sequence[str] | None = None,
    attention: bool = False,
    *,
    slides: Slides | None = None,
    extraction: Mapping[str, Any] | None = None,
) -> Predictions:
    """Apply a run, a packed model or an ensemble to slides, which need no labels.

    A packed model gives calibrated probabilities and may abstain; a run gives what its heads say. Where slides do not
    fit into memory together, fewer are applied at once, and a warning says so.

    Args:
        run_folder: written by ``mil train``, ``mil pack`` or ``mil ensemble``.
        store: holds features of the recipe that the model was trained on. With ``slides`` it takes them, and is made
            if absent.
        entry: the features entry; by default the one whose recipe fits.
        slide_ids: which slides; by default all with complete features, of which those without a valid tile are in
            ``failed`` of the result.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        replicas: names of the replicas to average, such as ``["fold0-seed0"]``; by default all.
        attention: also return the attention of every tile.
        slides: files and folders of slides to predict instead; those whose features are missing in ``store`` are
            embedded first, by the recipe of the model. Those that cannot be are in ``failed`` of the result.
        extraction: further keywords of `extract.run_extraction`, see `mil.deployment.embed.extract_for`.

    Raises:
        RunError: no run there, an unknown replica, or a head without attention was asked for it.
        CheckpointError: a damaged file, features of another recipe (the fields that differ are named), or a backbone
            that is not the one of the recipe.
        BagError: a slide without features, one of ``slide_ids`` without a valid tile, or one that memory does not hold.
        ExtractError: slides that are not found, or a store that cannot be opened.

    Example:
        >>> found = predict("models/subtype", "new.zarr", slides="slides/")     # doctest: +SKIP
        >>> found.predicted, found.abstained.tolist()                           # doctest: +SKIP
        (['luminal'], [False])
    """
    folder, failed = Path(run_folder), tuple[tuple[str, str], ...]()
    device = str(resolve_device(device))
    if slides is not None or extraction is not None:
        _refuse_choice_with_slides(entry, slide_ids)
        path = store.path if isinstance(store, Store) else store
        extracted = extract_for(model_records(folder), slides or [], path, device, extraction)
        slide_ids, failed = extracted.slide_ids, extracted.failed
        store = open_store(path)
    reader = open_store(store) if isinstance(store, str | StorePath) else store
    members = read_members(folder)
    if members is not None:
        _refuse_choice_of_ensemble(replicas, attention)
    found = load_model(folder, replicas) if members is None else members
    if slide_ids is None:
        records = [found.record] if isinstance(found, Model) else model_records(folder)
        slide_ids, failed = _with_tiles(reader, records, entry)
    if isinstance(found, Model):
        predictions = _predict_model(found, reader, entry, slide_ids, device, attention)
    else:
        predictions = _predict_ensemble(found, reader, entry, slide_ids, device)
    return replace(predictions, failed=failed)


def _with_tiles(
    store: Store, records: Sequence[CheckpointRecord], entry: str | None
) -> tuple[list[str], tuple[tuple[str, str], ...]]:
    """All slides with features for any of these models, and those among them without a valid tile, with the reason.

    Raises:
        RunError: no slide has one.
        CheckpointError, BagError: as in `fitting_entry`.
    """
    found: dict[str, bool] = {}
    for name in dict.fromkeys(fitting_entry(store, [record], entry) for record in records):
        for slide_id in store.slide_ids(name):
            found[slide_id] = found.get(slide_id, True) and store.n_tiles(slide_id, name) > 0
    failed = sorted(slide_id for slide_id, has_tiles in found.items() if not has_tiles)
    if failed and len(failed) == len(found):
        raise RunError(
            f"got {len(failed)} slides in {store.path}, none with a valid tile: {listed(failed)} → expected one at "
            f"least → see why in the store's runs/*.jsonl"
        )
    return sorted(set(found) - set(failed)), tuple((slide_id, NO_TILE) for slide_id in failed)


def _predict_model(
    model: Model, store: Store, entry: str | None, slide_ids: Sequence[str], device: str, attention: bool
) -> Predictions:
    entry = fitting_entry(store, model.records, entry)
    bags = open_bags(store, slide_ids, entry, "mmap", needs_coords(model.record.keywords))
    with cpu_threads(min(int(bags.n_instances.sum()), MAX_INSTANCES) * bags.dim):
        mean, maps = _average(model, bags, torch.device(device), attention)
    _refuse_nothing_said(bags.slide_ids, mean)
    return Predictions(
        slide_ids=bags.slide_ids,
        class_names=model.record.class_names,
        value_names=() if model.record.class_names else value_names(model.record.task),
        probabilities=mean,
        replicas=model.names,
        entry=entry,
        attention=maps,
        abstain_below=model.abstain_below,
    )


def _refuse_nothing_said(slide_ids: Sequence[str], predicted: FloatArray) -> None:
    """Refuse predictions that are no numbers: a class would be written beside them all the same."""
    broken = [slide_ids[at] for at in np.flatnonzero(~np.isfinite(predicted).all(axis=1)).tolist()]
    if broken:
        raise RunError(
            f"got predictions that are not finite for {len(broken)} of {len(slide_ids)} slides: {listed(broken)} → "
            f"expected finite numbers → the weights or the features are damaged: verify the store with mil store "
            f"verify, and copy the model again"
        )


def _predict_ensemble(
    members: Members, store: Store, entry: str | None, slide_ids: Sequence[str], device: str
) -> Predictions:
    """The ensemble's mean over its members, each on the features that it was trained on."""
    found: list[Predictions] = []

    def member(path: Path) -> tuple[tuple[str, ...], FloatArray]:
        found.append(_predict_model(load_model(path), store, entry, slide_ids, device, attention=False))
        # members may have been trained on another order of the same classes or columns
        first, last = (each.class_names or each.value_names for each in (found[0], found[-1]))
        order = [last.index(name) for name in first]
        return found[-1].slide_ids, found[-1].probabilities[:, order]

    ids, mean = over_members(members.folders, members.averaging, member)
    pairs = zip(members.folders, found, strict=True)
    return Predictions(
        slide_ids=ids,
        class_names=found[0].class_names,
        value_names=found[0].value_names,
        probabilities=mean,
        replicas=tuple(f"{path.name}/{name}" for path, each in pairs for name in each.replicas),
        entry=", ".join(dict.fromkeys(each.entry for each in found)),
        abstain_below=members.abstain_below,
    )


def available_slides(store: Store, records: Sequence[CheckpointRecord], entry: str | None) -> list[str]:
    """Slides of a store with complete features for every one of these models; recipes are checked.

    Raises:
        CheckpointError: no features of a model's recipe.
    """
    found = [set(store.slide_ids(fitting_entry(store, [record], entry))) for record in records]
    return sorted(set.intersection(*found))


def _refuse_choice_with_slides(entry: str | None, slide_ids: Sequence[str] | None) -> None:
    if entry is not None or slide_ids is not None:
        raise RunError(
            "got slides together with an entry or slide ids → expected the slides alone: they are all predicted, from "
            "the entry of the model's recipe → leave entry and slide_ids out"
        )


def _refuse_choice_of_ensemble(replicas: Sequence[str] | None, attention: bool) -> None:
    if replicas is not None or attention:
        what = "attention" if attention else "some replicas"
        raise RunError(f"got an ensemble, asked for {what} → that is a member's → predict with one of its runs")


def fitting_entry(store: Store, records: Sequence[CheckpointRecord], entry: str | None) -> str:
    """The entry asked for, else one of the checkpoint's recipe; the recipes are checked either way.

    Raises:
        CheckpointError: an entry, or a store, of another recipe.
        BagError: no entry, or an unknown one.
    """
    record = records[0]
    if entry is None:
        # where none fits, the check below says how the first differs
        own = [record.entry] if record.entry in store.entries() else []
        candidates = [*fitting_entries(record, store), *own, *store.entries()]
        entry = candidates[0] if candidates else None
    entry = choose_entry(store, entry)
    where = f"entry {entry!r} of {store.path}"
    for each in records:
        require_recipes(each, store.feature_recipe(entry), store.tile_recipe, where)
    return entry


def _average(
    model: Model, bags: Bags, device: torch.device, attention: bool
) -> tuple[FloatArray, dict[str, npt.NDArray[np.float32]] | None]:
    """Mean probability [n, C] over replicas, each at its temperature, and their mean attention by slide.

    For other targets than classes the mean [n, values] of what `decode` gives: risks are averaged as they
    are, since every replica says one of every slide.
    """
    means: list[Tensor] = []
    maps: dict[str, npt.NDArray[np.float32]] = {}
    heads = [head.to(device) for head in model.heads]
    for pack, outputs in fitting_packs(heads, bags, np.arange(len(bags)), device):
        scaled = [
            decode(record.task, output.logits.float().double() / temperature)
            for output, temperature, record in zip(outputs, model.temperatures, model.records, strict=True)
        ]
        means.append(torch.stack(scaled).mean(dim=0).cpu())
        if attention:
            weights = _mean_attention(outputs).cpu()  # [total, branches]
            pieces = weights.tensor_split(pack.offsets[1:-1])
            maps.update({bags.slide_ids[bag]: piece.numpy() for bag, piece in zip(pack.bags, pieces, strict=True)})
    return torch.cat(means).numpy(), maps if attention else None


def _mean_attention(outputs: Sequence[BagOutput]) -> Tensor:
    weights = [output.attention for output in outputs if output.attention is not None]
    if len(weights) < len(outputs):
        raise RunError(
            "got attention=True → the head of this run has none → train one that has, such as head=abmil, or leave "
            "attention out"
        )
    return torch.stack(weights).float().mean(dim=0)
