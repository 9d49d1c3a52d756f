"""Checkpoints: a head's weights as safetensors, and beside them, as JSON, all that is needed to use them rightly."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from aggregators import Aggregator, create_aggregator
from aggregators.errors import AggregatorError
from extract.store import difference, fingerprint
from mil.cohort.targets import CLASSIFICATION
from mil.config.train import TrainConfig
from mil.errors import CheckpointError
from mil.files import parse_json, write_atomically

FORMAT = 1
_MOST_NUMBERS = 1_000_000
_KIND_NAMES = {str: "a text", int: "a whole number in its range", list: "a list of names", dict: "values by name"}
_PACKAGES = ("tessera-mil", "torch", "numpy", "timm")


@dataclass(frozen=True)
class CheckpointRecord:
    """What a checkpoint says about itself.

    Attributes:
        head: the head's name.
        keywords: its constructor keywords.
        in_dim: features per instance.
        class_names: the classes, in the order of the logits; of other targets none.
        target: the label column.
        entry: the features entry it was trained on.
        feature_recipe: recipe of that entry, as plain values.
        tile_recipe: recipe of the store's tiles, as plain values.
        replica: name of the replica.
        fold: the fold that it was not trained on.
        seed: the seed of its training.
        best_epoch: the epoch whose weights these are.
        config: the whole training configuration.
        versions: of the packages it was trained with.
        outputs: logits per bag where there are no classes, else 0.
        task: what the logits mean, see `mil.training.tasks.Task.record`.
        format: layout of this record.
    """

    head: str
    keywords: Mapping[str, Any]
    in_dim: int
    class_names: tuple[str, ...]
    target: str
    entry: str
    feature_recipe: Mapping[str, Any]
    tile_recipe: Mapping[str, Any]
    replica: str
    fold: int
    seed: int
    best_epoch: int
    config: Mapping[str, Any]
    versions: Mapping[str, str]
    outputs: int = 0
    task: Mapping[str, Any] = field(default_factory=lambda: {"task": CLASSIFICATION})
    format: int = FORMAT

    @property
    def n_outputs(self) -> int:
        """Logits per bag."""
        return self.outputs or len(self.class_names)


def package_versions() -> dict[str, str]:
    """Versions of what decides a result."""
    return dict(_installed())


@cache
def _installed() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            # a source checkout that was not installed
            continue
    return found


def save_checkpoint(path: Path, head: Aggregator, record: CheckpointRecord) -> None:
    """Write ``path`` (.safetensors) and the record beside it (.json).

    The record is written last and holds the weights' hash: a killed write leaves no record, and so no checkpoint.
    """
    from safetensors.torch import save

    weights = save({name: value.detach().cpu().contiguous() for name, value in head.state_dict().items()})
    plain = asdict(record) | {
        "weights_sha256": sha256(weights).hexdigest(),
        "feature_fingerprint": fingerprint(record.feature_recipe),
        "tile_fingerprint": fingerprint(record.tile_recipe),
    }
    write_atomically(path, weights)
    write_atomically(path.with_suffix(".json"), json.dumps(plain, indent=2, ensure_ascii=False).encode())


def load_checkpoint(path: Path) -> tuple[Aggregator, CheckpointRecord]:
    """The head in evaluation mode, on the CPU, and its record.

    Raises:
        CheckpointError: the record or the weights are missing, damaged, of another format, or do not fit each other.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    record, expected_hash = _read_record(path.with_suffix(".json"))
    weights = _read(path)
    if sha256(weights).hexdigest() != expected_hash:
        raise CheckpointError(
            f"got weights in {path} that are not those of its record → expected SHA-256 {expected_hash[:12]}... → copy "
            f"both files again, or train again"
        )
    try:
        head = create_aggregator(record.head, in_dim=record.in_dim, n_classes=record.n_outputs, **record.keywords)
        head.load_state_dict(load(weights))
    except (AggregatorError, RuntimeError, TypeError, SafetensorError) as error:
        raise CheckpointError(
            f"got the checkpoint {path} → its weights do not fit head {record.head!r} of this version ({error}) → use "
            f"the version that wrote it: {dict(record.versions)}"
        ) from error
    return head.eval(), record


def require_recipes(record: CheckpointRecord, feature_recipe: Any, tile_recipe: Any, where: str) -> None:
    """Refuse features that are not of the recipes a checkpoint was trained on.

    Args:
        record: of the checkpoint.
        feature_recipe: recipe of the features at hand, a dataclass or plain values.
        tile_recipe: recipe of their tiles.
        where: names the features, for the message.

    Raises:
        CheckpointError: a recipe differs; every field that differs is named.
    """
    differing = [
        *difference(record.feature_recipe, feature_recipe, "feature recipe: "),
        *difference(record.tile_recipe, tile_recipe, "tile recipe: "),
    ]
    if differing:
        raise CheckpointError(
            f"got {where} → expected the recipe that replica {record.replica} was trained on, but it differs in "
            f"{'; '.join(differing)} (checkpoint → store) → extract these slides with the checkpoint's recipe"
        )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"got {path}, which cannot be read ({error.strerror}) → expected a .safetensors file with its .json "
            f"beside it → check the run folder"
        ) from error


def _read_record(path: Path) -> tuple[CheckpointRecord, str]:
    """The record and the hash of its weights."""
    content = _read(path)
    try:
        plain = parse_json(content)
    except ValueError as error:
        raise CheckpointError(f"got {path}, which is not JSON ({error}) → expected a record → copy it again") from error
    plain = plain if isinstance(plain, dict) else {}
    known = plain.get("format")
    # of what came later, a record of before holds the default
    names = {item.name for item in fields(CheckpointRecord)} - ({"outputs", "task"} - set(plain))
    if known != FORMAT or not (names | {"weights_sha256"}) <= set(plain):
        raise CheckpointError(
            f"got {path} of format {known} → expected a checkpoint record of format {FORMAT} → use the version of "
            f"tessera-mil that wrote it"
        )
    _check_types(plain, names, path)
    values = {name: plain[name] for name in names}
    return CheckpointRecord(**values | {"class_names": tuple(plain["class_names"])}), plain["weights_sha256"]


def _check_types(plain: Mapping[str, Any], names: Iterable[str], path: Path) -> None:
    """Refuse a record whose values are of other kinds than are written."""
    texts, numbers = ("head", "target", "entry", "replica"), ("in_dim", "fold", "seed", "best_epoch", "outputs")
    kinds: dict[str, type] = dict.fromkeys(texts, str) | dict.fromkeys(numbers, int) | {"class_names": list}
    for name in sorted(names):
        kind = kinds.get(name, int if name == "format" else dict)
        value = plain[name]
        right = isinstance(value, kind) and not isinstance(value, bool)
        if name == "class_names":
            right = right and all(isinstance(each, str) for each in value)
        if name in ("in_dim", "outputs"):
            right = right and (1 if name == "in_dim" else 0) <= value <= _MOST_NUMBERS
        if not right:
            raise CheckpointError(
                f"got {name}={str(value)[:60]!r} in {path} → expected {_KIND_NAMES[kind]} as a checkpoint holds it → "
                f"the record was changed or damaged; copy it again, or train again"
            )
    if not isinstance(plain["weights_sha256"], str):
        raise CheckpointError(f"got no hash of the weights in {path} → the record is damaged; copy it again")


@torch.no_grad()
def inherit_weights(head: Aggregator, config: TrainConfig) -> frozenset[str]:
    """Take over the parameters of ``config.init`` that have the same name and shape in ``head``; returns their names.

    Buffers, such as the mean and deviation of the features, stay those of the head: they are fitted on its own
    training part.

    Raises:
        CheckpointError: the checkpoint cannot be read, nothing in it fits, all of it fits while ``freeze_epochs`` would
            leave nothing to train.
    """
    if config.init is None:
        return frozenset()
    saved, record = load_checkpoint(config.init)
    ours, theirs = dict(head.named_parameters()), dict(saved.named_parameters())
    fitting = [name for name, weight in ours.items() if name in theirs and theirs[name].shape == weight.shape]
    if not any(ours[name].ndim > 1 for name in fitting):
        raise CheckpointError(
            f"got init={config.init}, a {record.head} for {record.in_dim} features → none of its weight matrices has "
            f"name and shape of one in this {config.head.name} for {head.in_dim} → give a checkpoint of the same head"
        )
    if config.freeze_epochs and len(fitting) == len(ours):
        raise CheckpointError(
            f"got freeze_epochs={config.freeze_epochs}, but all of the head comes from init={config.init} → nothing "
            f"would be trained in them → set freeze_epochs=0"
        )
    for name in fitting:
        ours[name].copy_(theirs[name])
    return frozenset(fitting)
