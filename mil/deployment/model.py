"""A trained model as prediction needs it, in a run folder or in an artefact, alone or in an ensemble."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from aggregators import Aggregator
from extract.store import difference
from mil.deployment.artefact import read_artefact
from mil.errors import CheckpointError, RunError, did_you_mean, listed
from mil.evaluation.averaging import Averaging
from mil.runs.ensemble import read_ensemble
from mil.runs.folders import is_artefact, is_ensemble
from mil.runs.run_folder import METRICS, RunFolder
from mil.training.checkpoint import CheckpointRecord, load_checkpoint


@dataclass(frozen=True, eq=False)
class Model:
    """The replicas of a run.

    Attributes:
        heads: R heads in evaluation mode, on the CPU.
        records: [R], of targets and recipes that all share.
        temperatures: [R]; logits are divided by them. 1 in a run, and of numbers and risks.
        abstain_below: the confidence below which the model abstains, or None.
    """

    heads: tuple[Aggregator, ...]
    records: tuple[CheckpointRecord, ...]
    temperatures: tuple[float, ...]
    abstain_below: float | None = None

    @property
    def record(self) -> CheckpointRecord:
        """That of the first replica: classes, target and recipes are those of all."""
        return self.records[0]

    @property
    def names(self) -> tuple[str, ...]:
        """Of the replicas."""
        return tuple(record.replica for record in self.records)


class Members(NamedTuple):
    """What an ensemble averages.

    Attributes:
        folders: of the members, each a run or an artefact.
        averaging: how.
        abstain_below: the confidence of the average below which the ensemble abstains, or None.
    """

    folders: tuple[Path, ...]
    averaging: Averaging
    abstain_below: float | None = None


def read_members(folder: Path) -> Members | None:
    """The members of an ensemble, saved or packed; None where a folder is a single model.

    Raises:
        RunError, CheckpointError: as in `mil.runs.ensemble.read_ensemble` and `mil.deployment.artefact.read_artefact`.
    """
    if is_ensemble(folder):
        return Members(*read_ensemble(folder))
    if not is_artefact(folder):
        return None
    artefact = read_artefact(folder)
    if not artefact.members:
        return None
    return Members(artefact.members, artefact.averaging, artefact.abstain_below)


def model_folders(folder: Path) -> tuple[Path, ...]:
    """The folders of all single models that a folder stands for: those of its members, or itself."""
    members = read_members(folder)
    return (folder,) if members is None else members.folders


def model_records(folder: Path) -> list[CheckpointRecord]:
    """A record of every model that a folder stands for: one, or those of an ensemble's members, named after them.

    Raises:
        RunError, CheckpointError: as in `load_model`.
    """
    members = read_members(folder)
    if members is None:
        return [load_model(folder).record]
    records = [load_model(member).record for member in members.folders]
    names = [f"{member.name}/{record.replica}" for member, record in zip(members.folders, records, strict=True)]
    return [replace(record, replica=name) for record, name in zip(records, names, strict=True)]


def load_model(folder: Path, replicas: Sequence[str] | None = None) -> Model:
    """Heads and records of a run or an artefact, in the order of their fold and seed; every file is verified.

    Args:
        folder: written by `mil train` or `mil pack`.
        replicas: names of those to load, by default all.

    Raises:
        RunError: no run or model there, an ensemble, a checkpoint is missing or foreign, or an unknown replica.
        CheckpointError: a damaged file, or checkpoints that do not belong together.
    """
    artefact = read_artefact(folder) if is_artefact(folder) else None
    if is_ensemble(folder) or (artefact is not None and artefact.members):
        members = listed(map(str, model_folders(folder)))
        raise RunError(f"got the ensemble {folder} → expected one run or model → give one of its members: {members}")
    found = artefact.replicas if artefact is not None else _replicas_of_run(folder)
    for name in replicas or ():
        if name not in found:
            raise RunError(
                f"got replica {name!r} → expected some of {listed(found)} → {did_you_mean(name, found)}"
                f"leave it out to average all"
            )
    if replicas is not None and not replicas:
        raise RunError("got an empty list of replicas → expected one or more → leave it out to average all")
    loaded = [load_checkpoint(folder / "checkpoints" / f"{name}.safetensors") for name in (replicas or found)]
    loaded.sort(key=lambda pair: (pair[1].fold, pair[1].seed))
    heads, records = (tuple(each) for each in zip(*loaded, strict=True))
    _check_alike(records, folder)
    if artefact is None:
        return Model(heads, records, (1.0,) * len(heads))
    temperatures = tuple(artefact.temperatures[record.replica] for record in records)
    return Model(heads, records, temperatures, artefact.abstain_below)


def _replicas_of_run(folder: Path) -> tuple[str, ...]:
    """The names of the checkpoints, which must be those that the run trained, and no others."""
    names = tuple(path.stem for path in sorted((folder / "checkpoints").glob("*.safetensors")))
    if not (folder / METRICS).is_file() or not names:
        raise RunError(
            f"got {folder} as run folder → there are no metrics.json and checkpoints in it → give the --out folder of "
            f"a finished mil train, or a model of mil pack"
        )
    expected = RunFolder.open(folder).replica_names
    odd = sorted(set(names) ^ set(expected))
    if odd:
        raise RunError(
            f"got {len(names)} checkpoints in {folder} → the run trained {len(expected)}; missing or foreign: "
            f"{listed(odd)} → bring the missing back from a copy of the run, or train again"
        )
    return names


def _check_alike(records: Sequence[CheckpointRecord], folder: Path) -> None:
    first = records[0]
    for record in records:
        targets = [(each.class_names, each.task["task"], each.task.get("columns")) for each in (record, first)]
        if targets[0] != targets[1] or difference(record.feature_recipe, first.feature_recipe):
            raise CheckpointError(
                f"got replicas {first.replica} and {record.replica} of different targets or features in {folder} → "
                f"expected those of one run → do not copy checkpoints between runs"
            )
