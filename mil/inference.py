"""Applying a run to slides without labels: the mean probability of its replicas."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from aggregators import Aggregator, BagOutput
from extract.store import Store, difference
from mil.bags import Bags, choose_entry, open_bags
from mil.checkpoint import CheckpointRecord, load_checkpoint, require_recipes
from mil.errors import CheckpointError, RunError, did_you_mean, listed
from mil.evaluation import MAX_INSTANCES, cpu_threads, evaluate_packs, resolve_device
from mil.files import Row, probability_text, write_csv
from mil.losses import probabilities

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a run says about n slides.

    Attributes:
        slide_ids: [n].
        class_names: [C].
        probabilities: float64 [n, C], mean over the replicas.
        replicas: names of the replicas that were averaged.
        attention: by slide, float32 [n_tiles, branches], mean over the replicas, in the order of
            ``store[slide_id].coords(entry)``; None unless asked for.
        entry: the features entry that was read.
    """

    slide_ids: tuple[str, ...]
    class_names: tuple[str, ...]
    probabilities: FloatArray
    replicas: tuple[str, ...]
    entry: str
    attention: dict[str, npt.NDArray[np.float32]] | None = None

    @property
    def predicted(self) -> list[str]:
        """The class of highest probability for every slide."""
        return [self.class_names[index] for index in self.probabilities.argmax(axis=1)]

    def write_csv(self, path: str | Path) -> None:
        """Write slide_id, predicted, p_<class>... with one row per slide, atomically."""
        write_csv(Path(path), self._rows())

    def _rows(self) -> Iterator[Row]:
        yield ("slide_id", "predicted", *(f"p_{name}" for name in self.class_names))
        for slide_id, predicted, values in zip(self.slide_ids, self.predicted, self.probabilities, strict=True):
            yield (slide_id, predicted, *map(probability_text, values))


def predict(
    run_folder: str | Path,
    store: Store,
    entry: str | None = None,
    slide_ids: Sequence[str] | None = None,
    device: str = "auto",
    replicas: Sequence[str] | None = None,
    attention: bool = False,
) -> Predictions:
    """Apply a run to slides of a store, which need no labels.

    Args:
        run_folder: written by ``mil train``.
        store: holds features of the recipe that the run was trained on.
        entry: the features entry; by default the one whose recipe fits.
        slide_ids: which slides; by default all with complete features.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        replicas: names of the replicas to average, such as ``["fold0-seed0"]``; by default all.
        attention: also return the attention of every tile.

    Raises:
        RunError: no run there, an unknown replica, or a head without attention was asked for it.
        CheckpointError: a damaged checkpoint, or features of another recipe (the fields that differ are named).
        BagError: a slide without features.
    """
    heads, records = _load_run(Path(run_folder), replicas)
    entry = _fitting_entry(store, records, entry)
    place = resolve_device(device)
    bags = open_bags(store, store.slide_ids(entry) if slide_ids is None else slide_ids, entry, "mmap")
    with cpu_threads(min(int(bags.n_instances.sum()), MAX_INSTANCES) * bags.dim):
        mean, maps = _average([head.to(place) for head in heads], bags, place, attention)
    return Predictions(
        slide_ids=bags.slide_ids,
        class_names=records[0].class_names,
        probabilities=mean,
        replicas=tuple(record.replica for record in records),
        entry=entry,
        attention=maps,
    )


def _load_run(folder: Path, replicas: Sequence[str] | None) -> tuple[list[Aggregator], list[CheckpointRecord]]:
    """Heads and records of a run, in the order of their fold and seed."""
    paths = {path.stem: path for path in sorted((folder / "checkpoints").glob("*.safetensors"))}
    if not (folder / "metrics.json").is_file() or not paths:
        raise RunError(
            f"got {folder} as run folder → there are no metrics.json and checkpoints in it → give the --out folder of "
            f"a finished mil train"
        )
    _check_complete(folder, list(paths))
    for name in replicas or ():
        if name not in paths:
            raise RunError(
                f"got replica {name!r} → expected some of {listed(paths)} → {did_you_mean(name, list(paths))}"
                f"leave it out to average all"
            )
    if replicas is not None and not replicas:
        raise RunError("got an empty list of replicas → expected one or more → leave it out to average all")
    loaded = [load_checkpoint(paths[name]) for name in (replicas or paths)]
    loaded.sort(key=lambda pair: (pair[1].fold, pair[1].seed))
    first = loaded[0][1]
    for _, record in loaded:
        if record.class_names != first.class_names or difference(record.feature_recipe, first.feature_recipe):
            raise CheckpointError(
                f"got replicas {first.replica} and {record.replica} of different classes or features in {folder} → "
                f"expected those of one run → do not copy checkpoints between runs"
            )
    return [head for head, _ in loaded], [record for _, record in loaded]


def _check_complete(folder: Path, names: Sequence[str]) -> None:
    """All the replicas that the run trained must be there, and no others."""
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    expected = [each["replica"] for each in metrics["per_replica"]]
    odd = sorted(set(names) ^ set(expected))
    if odd:
        raise RunError(
            f"got {len(names)} checkpoints in {folder} → the run trained {len(expected)}; missing or "
            f"foreign: {listed(odd)} "
            f"→ bring the missing back from a copy of the run, or train again"
        )


def _fitting_entry(store: Store, records: Sequence[CheckpointRecord], entry: str | None) -> str:
    """The entry asked for, else one of the checkpoint's recipe; the recipes are checked either way."""
    record = records[0]
    if entry is None:
        fitting = [
            name for name in store.entries() if not difference(record.feature_recipe, store.feature_recipe(name))
        ]
        # where none fits, the check below says how the first differs
        candidates = [name for name in (record.entry, *store.entries()) if name in (fitting or store.entries())]
        entry = candidates[0] if candidates else None
    entry = choose_entry(store, entry)
    where = f"entry {entry!r} of {store.path}"
    for each in records:
        require_recipes(each, store.feature_recipe(entry), store.tile_recipe, where)
    return entry


def _average(
    heads: Sequence[Aggregator], bags: Bags, device: torch.device, attention: bool
) -> tuple[FloatArray, dict[str, npt.NDArray[np.float32]] | None]:
    """Mean probability [n, C] over heads, and their mean attention by slide."""
    means: list[Tensor] = []
    maps: dict[str, npt.NDArray[np.float32]] = {}
    for pack, outputs in evaluate_packs(heads, bags, np.arange(len(bags)), device):
        means.append(torch.stack([probabilities(output.logits.float()) for output in outputs]).mean(dim=0).cpu())
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
