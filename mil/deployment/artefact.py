"""The artefact: one folder with everything that applies a trained model to new slides, each file known by its hash.

MODEL/
  model.json               what it predicts, recipes, temperatures, thresholds, metrics, hash of every other file
  README.md                the model card
  training_cohort.json     salted hashes of the slides and patients that were trained on
  checkpoints/             weights and record of every replica

Of an ensemble, every member is such a folder of its own, and predicts alone too:

MODEL/
  model.json               what is averaged, threshold, metrics, hash of every other file
  README.md                the model card
  members/1-abmil/         a model as above
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from extract.store import fingerprint
from mil.cohort.targets import CLASSIFICATION
from mil.errors import CheckpointError, RunError
from mil.evaluation.averaging import Averaging, Scale
from mil.files import new_folder, parse_json, read_regular_file, write_atomically
from mil.runs.folders import MODEL

FORMAT = 1
MEMBERS = "members"

ENSEMBLE = "ensemble"
"""What ``kind`` says in the record of an ensemble; other models are of one run."""

_NAME = re.compile(r"[^\\/:\0]+")
_REQUIRED = ("format", "target", "class_names", "replicas", "abstention", "files", "sha256")


@dataclass(frozen=True, eq=False)
class Artefact:
    """A packed model whose files are those that were written.

    Attributes:
        folder: where it lies.
        record: the content of ``model.json``.

    Example:
        >>> artefact = read_artefact("models/subtype")          # doctest: +SKIP
        >>> artefact.temperatures["fold0-seed0"]                # doctest: +SKIP
        1.31
    """

    folder: Path
    record: Mapping[str, Any]

    @property
    def replicas(self) -> tuple[str, ...]:
        """Names of the replicas, in the order of their fold and seed; in an ensemble after their member's name."""
        return tuple(each["name"] for each in self.record["replicas"])

    @property
    def temperatures(self) -> dict[str, float]:
        """By replica; 1 is what the head itself says, as of numbers and risks."""
        return {each["name"]: float(each["temperature"]) for each in self.record["replicas"]}

    @property
    def abstain_below(self) -> float | None:
        """The confidence below which the model abstains, or None."""
        chosen = self.record["abstention"]
        return None if chosen is None else float(chosen["below"])

    @property
    def members(self) -> tuple[Path, ...]:
        """The models that an ensemble averages; none where this is a single one."""
        return tuple(self.folder / MEMBERS / each["name"] for each in self.record.get("members", ()))

    @property
    def task(self) -> str:
        """What it predicts, one of `TASKS`; what was packed before there were others is of classes."""
        return str(self.record.get("task", CLASSIFICATION))

    @property
    def averaging(self) -> Averaging:
        """How an ensemble averages its members."""
        scales = tuple(Scale(**each["scale"]) for each in self.record["members"] if "scale" in each)
        return Averaging(self.record["average"], self.task, scales)


def read_artefact(folder: str | Path) -> Artefact:
    """Open a packed model and compare every file with its hash.

    Raises:
        RunError: there is none.
        CheckpointError: a file is missing, damaged or edited, or the artefact is of another format.
    """
    folder = Path(folder)
    record = _read_record(folder)
    content = {name: value for name, value in record.items() if name != "sha256"}
    if fingerprint(content) != record["sha256"]:
        raise CheckpointError(
            f"got {folder / MODEL}, which is not as it was packed → expected the content of its hash "
            f"{record['sha256'][:12]}... → copy the model again, or pack the run again with other settings"
        )
    _check_names(folder, record)
    for name, expected in record["files"].items():
        _check_file(folder, name, expected)
    _check_numbers(folder, record)
    return Artefact(folder, record)


def write_artefact(folder: Path, record: Mapping[str, Any], files: Mapping[str, bytes]) -> Artefact:
    """Write a model folder: beside its place first, then renamed, so that a folder that exists is whole.

    Args:
        folder: must be new or empty.
        record: the content of ``model.json``, but for the hashes, which are added.
        files: content of every other file by its path in the folder.

    Raises:
        RunError: ``folder`` exists and is not empty, or cannot be written.
    """
    folder = folder.absolute()
    content = seal(record, files)
    with new_folder(folder) as partial:
        for name, each in content.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            write_atomically(partial / name, each)
    return Artefact(folder, json.loads(content[MODEL]))


def seal(record: Mapping[str, Any], files: Mapping[str, bytes]) -> dict[str, bytes]:
    """The files of a model, ``model.json`` with the hashes of all others included; arguments as in `write_artefact`."""
    hashes = {name: sha256(content).hexdigest() for name, content in files.items()}
    full = dict(record) | {"format": FORMAT, "files": hashes}
    full["sha256"] = fingerprint(full)
    text = json.dumps(full, indent=2, ensure_ascii=False, allow_nan=False)
    return dict(files) | {MODEL: text.encode("utf-8", "backslashreplace")}


def _read_record(folder: Path) -> dict[str, Any]:
    path = folder / MODEL
    try:
        record = parse_json(read_regular_file(folder, MODEL))
    except OSError as error:
        raise RunError(
            f"got {folder} as model → its {MODEL} cannot be read ({error.strerror}) → give a folder that mil pack wrote"
        ) from error
    except ValueError as error:
        raise CheckpointError(
            f"got {path}, which is not JSON ({error}) → expected what mil pack wrote → copy the model again"
        ) from error
    known = record.get("format") if isinstance(record, dict) else None
    if known != FORMAT or not set(_REQUIRED) <= set(record):
        raise CheckpointError(
            f"got {path} of format {known} → expected a model of format {FORMAT} → use the version of tessera-mil that "
            f"packed it"
        )
    return dict(record)


def _check_names(folder: Path, record: Mapping[str, Any]) -> None:
    """Refuse names that lead out of the folder, of whatever the record names."""
    files, replicas, members = record["files"], record["replicas"], record.get("members", ())
    try:
        names = [*files, *(each["name"] for each in replicas), *(each["name"] for each in members)]
        plain = [each["name"] for each in members]
    except (KeyError, TypeError) as error:
        raise _foreign(folder, f"it names no files, replicas or members ({type(error).__name__} {error})") from error
    for name in names:
        parts = name.split("/") if isinstance(name, str) else [".."]
        if not all(_NAME.fullmatch(part) and part.strip(".") for part in parts) or (name in plain and len(parts) > 1):
            raise _foreign(folder, f"it names {name!r}, which is no file of this folder")


def _check_numbers(folder: Path, record: Mapping[str, Any]) -> None:
    """Refuse temperatures and thresholds that make no prediction."""
    for each in record["replicas"]:
        temperature = each.get("temperature")
        if not isinstance(temperature, int | float) or not 0 < temperature < math.inf:
            raise _foreign(folder, f"replica {each['name']} has the temperature {temperature!r}")
    chosen = record["abstention"]
    below = None if chosen is None else chosen.get("below") if isinstance(chosen, Mapping) else chosen
    if chosen is not None and (not isinstance(below, int | float) or not math.isfinite(below)):
        raise _foreign(folder, f"it abstains below {below!r}")


def _foreign(folder: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"got the model {folder}, whose {MODEL} is not what mil pack writes: {what} → expected names of its own files, "
        f"temperatures above 0 and finite thresholds → take the model from whoever packed it"
    )


def _check_file(folder: Path, name: str, expected: str) -> None:
    path = folder / name
    try:
        found = sha256(read_regular_file(folder, name)).hexdigest()
    except OSError as error:
        raise CheckpointError(
            f"got a model whose {path} cannot be read ({error.strerror}) → expected every file that was packed → copy "
            f"the model again"
        ) from error
    if found != expected:
        raise CheckpointError(
            f"got {path}, which was damaged or edited (SHA-256 {found[:12]}...) → expected {expected[:12]}... → copy "
            f"the model again"
        )
