"""Trainings that were stopped: finished replicas and saved epochs, kept beside the run folder until it is written.

A file holds the SHA-256 of its content first; one that is damaged counts as absent. Everything that decides a result
is in the name of the folder, so that a training under other settings finds nothing to go on from.
"""

import io
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from aggregators import create_aggregator
from extract.store import fingerprint
from mil.bags.bags import Bags
from mil.cohort.cohort import Cohort
from mil.config.train import TrainConfig
from mil.files import tell_full_disk, write_atomically
from mil.splits.splits import Splits
from mil.splits.tables import split_rows
from mil.training.checkpoint import package_versions
from mil.training.replica import EpochRecord, Replica, TrainedReplica

SAVE_EVERY_S = 30.0
UNESSENTIAL = (
    "store",
    "labels",
    "memory",
    "slide_column",
    "patient_column",
    "distinct_patients",
    "track",
    "track_files",
)
"""Where a config may differ and its result may not."""


def training_key(config: TrainConfig, cohort: Cohort, splits: Splits, bags: Bags, device: torch.device) -> str:
    """Names a training by all that decides its result: settings, slides, labels, parts, features, device, versions."""
    settings = {name: value for name, value in config.to_dict().items() if name not in UNESSENTIAL}
    moments = bags.moments
    content = sha256(moments.counts.tobytes() + moments.means.tobytes() + moments.deviations.tobytes())
    return fingerprint(
        {
            "settings": settings,
            "cohort": cohort.digest(),
            "slide_ids": list(cohort.slide_ids),
            "splits": sha256(repr(list(split_rows(splits, cohort))).encode()).hexdigest(),
            "bags": content.hexdigest(),
            "views": bags.views_digest(),
            "coords": bags.coords_digest(),
            "device": device.type,
            "versions": package_versions(),
            "init": _content_hash(config.init),
        }
    )


class UnfinishedTraining:
    """What is done of a training; a `mil.training.replica.ReplicaKeeper`.

    Args:
        folder: holds all that is unfinished for one run folder.
        key: see `training_key`.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self._folder = folder / key[:16]

    def load(self, replica: Replica, bags: Bags, n_outputs: int) -> TrainedReplica | None:
        """A replica that was finished before, or None."""
        content = _read(self._path(replica, "replica"))
        if content is None:
            return None
        facts = content["facts"]
        head = replica.config.head
        trained = create_aggregator(head.name, in_dim=bags.dim, n_classes=n_outputs, **head.keywords)
        trained.load_state_dict(content["head"])
        history = tuple(EpochRecord(**record) for record in content["history"])
        return TrainedReplica(replica, trained.eval(), content["probabilities"].numpy(), history, **facts)

    def keep(self, trained: TrainedReplica) -> None:
        """Write a finished replica down; its saved epoch is no longer needed."""
        names = ("best_epoch", "seconds", "inference_seconds", "peak_bytes", "task")
        content = {
            "head": trained.head.state_dict(),
            "probabilities": torch.from_numpy(trained.values),
            "history": [asdict(record) for record in trained.history],
            "facts": {name: getattr(trained, name) for name in names},
        }
        _write(self._path(trained.replica, "replica"), content)
        self._path(trained.replica, "epoch").unlink(missing_ok=True)

    def stack(self, replicas: Sequence[Replica]) -> "SavedEpochFile":
        """Where replicas that are trained together keep their state."""
        return SavedEpochFile(self._folder / f"stack-{replicas[0].name}-{len(replicas)}.epoch")

    def epoch(self, replica: Replica) -> "SavedEpochFile":
        """Where a replica keeps its state between epochs."""
        return SavedEpochFile(self._path(replica, "epoch"))

    def _path(self, replica: Replica, kind: str) -> Path:
        return self._folder / f"{replica.name}.{kind}"


class SavedEpochFile:
    """The state of one replica after its latest saved epoch; saved at most every 30 seconds."""

    def __init__(self, path: Path) -> None:
        self._path, self._last = path, time.monotonic()

    def load(self) -> dict[str, Any] | None:
        """The state that was saved last, if there is any."""
        return _read(self._path)

    def due(self) -> bool:
        """Whether 30 seconds have passed."""
        return time.monotonic() - self._last >= SAVE_EVERY_S

    def save(self, state: Mapping[str, Any]) -> None:
        """Replace the saved state."""
        _write(self._path, state)
        self._last = time.monotonic()

    def discard(self) -> None:
        """It is no longer needed."""
        self._path.unlink(missing_ok=True)


def unfinished_folder(run_folder: Path) -> Path:
    """Where what is done is kept until ``run_folder`` is written: hidden, beside it."""
    return run_folder.with_name(f".{run_folder.name}.unfinished")


def discard_unfinished(folder: Path) -> None:
    """Forget everything, also what other settings have left for this run folder."""
    shutil.rmtree(folder, ignore_errors=True)


def kept_replicas(folder: Path) -> int:
    """How many finished replicas wait in a folder of unfinished trainings."""
    return sum(1 for _ in folder.glob("*/*.replica"))


def _content_hash(path: Path | None) -> str | None:
    """SHA-256 of a file; None where there is none, which is told where it is read."""
    return sha256(path.read_bytes()).hexdigest() if path is not None and path.is_file() else None


def _write(path: Path, content: Mapping[str, Any]) -> None:
    buffer = io.BytesIO()
    torch.save(dict(content), buffer)
    with tell_full_disk(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, sha256(buffer.getbuffer()).digest() + buffer.getvalue())


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, body = content[:32], content[32:]
    if sha256(body).digest() != digest:
        return None
    state: dict[str, Any] = torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
    return state
