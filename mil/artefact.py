"""The artefact: one folder with everything that applies a trained model to new slides, each file known by its hash.

MODEL/
  model.json               what it predicts, recipes, temperatures, thresholds, metrics, hash of every other file
  README.md                the model card
  training_cohort.json     salted hashes of the slides and patients that were trained on
  checkpoints/             weights and record of every replica
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any
from uuid import uuid4

from extract.store import fingerprint
from mil.errors import CheckpointError, RunError
from mil.files import write_atomically
from mil.training_cohort import COHORT, TrainingCohort

FORMAT = 1
MODEL = "model.json"
CARD = "README.md"
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
        """Names of the replicas, in the order of their fold and seed."""
        return tuple(each["name"] for each in self.record["replicas"])

    @property
    def temperatures(self) -> dict[str, float]:
        """By replica; 1 is what the head itself says."""
        return {each["name"]: float(each["temperature"]) for each in self.record["replicas"]}

    @property
    def abstain_below(self) -> float | None:
        """The confidence below which the model abstains, or None."""
        chosen = self.record["abstention"]
        return None if chosen is None else float(chosen["below"])

    def training_cohort(self) -> TrainingCohort:
        """Hashes of the slides and patients that were trained on."""
        return TrainingCohort.from_json(json.loads((self.folder / COHORT).read_text(encoding="utf-8")))


def is_artefact(folder: Path) -> bool:
    """Whether a folder holds a packed model."""
    return (folder / MODEL).is_file()


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
    for name, expected in record["files"].items():
        _check_file(folder / name, expected)
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
    check_new_folder(folder)
    hashes = {name: sha256(content).hexdigest() for name, content in files.items()}
    full = dict(record) | {"format": FORMAT, "files": hashes}
    full["sha256"] = fingerprint(full)
    partial = folder.with_name(f".{folder.name}.{uuid4().hex}.partial")
    try:
        for name, content in files.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            write_atomically(partial / name, content)
        text = json.dumps(full, indent=2, ensure_ascii=False, allow_nan=False)
        write_atomically(partial / MODEL, text.encode())
        if folder.is_dir():
            folder.rmdir()
        partial.rename(folder)
    except OSError as error:
        raise RunError(f"got {error} while writing {folder} → free some space or choose another --out") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Artefact(folder, full)


def check_new_folder(folder: Path) -> None:
    """Refuse a folder that holds anything, or is a file.

    Raises:
        RunError: it does.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        what = "it exists and is not empty" if folder.is_dir() else "it is a file"
        raise RunError(f"got {folder} as folder to write → {what} → give a new folder with --out")


def _read_record(folder: Path) -> dict[str, Any]:
    path = folder / MODEL
    try:
        record = json.loads(path.read_bytes())
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


def _check_file(path: Path, expected: str) -> None:
    try:
        found = sha256(path.read_bytes()).hexdigest()
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
