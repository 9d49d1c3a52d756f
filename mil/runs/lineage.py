"""Who a model was trained on, as far as it takes to notice the same slides and patients elsewhere.

Weights may have started from those of an earlier training (``init=``), and these from others: what any of them learned
from, the last one knows. So the whole line is followed.

An artefact leaves the hospital that trained it, so that it holds salted hashes and no ids. They keep nobody from trying
out every id of a known form: they are a courtesy, not a secret.
"""

import json
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

import numpy as np

from mil.arrays import BoolArray
from mil.cohort.identities import possible_names, recorded_names
from mil.cohort.joining import OTHER_SUFFIXES, SLIDE_SUFFIXES
from mil.errors import RunError
from mil.files import read_csv_dicts, read_json

COHORT = "training_cohort.json"
_DIGITS = 24


@dataclass(frozen=True)
class TrainingCohort:
    """Hashes of slide names and patient ids that had any part in a training, its test folds included.

    Attributes:
        salt: goes into every hash.
        slides: of file names, without folders and endings: another store may have found them elsewhere.
        patients: of patient ids, and of what other spellings of them have in common.

    Example:
        >>> cohort = TrainingCohort.of(["a/x.svs"], ["p1"], salt="s")
        >>> cohort.knows_slide("x"), cohort.knows_patient("p2")
        (True, False)
    """

    salt: str
    slides: frozenset[str]
    patients: frozenset[str]

    @classmethod
    def of(cls, slide_ids: Iterable[str], patient_ids: Iterable[str], salt: str) -> "TrainingCohort":
        """Hash these."""
        slides = frozenset(_hash(salt, _name(slide_id)) for slide_id in slide_ids)
        names = frozenset(name for patient_id in set(patient_ids) for name in recorded_names(patient_id))
        return cls(salt, slides, frozenset(_hash(salt, name) for name in names))

    def knows_slide(self, slide_id: str) -> bool:
        """Whether a slide of this file name was among them."""
        return _hash(self.salt, _name(slide_id)) in self.slides

    def knows_patient(self, patient_id: str) -> bool:
        """Whether a patient of this id, or of another spelling of it, was among them."""
        return any(_hash(self.salt, name) in self.patients for name in possible_names(patient_id))

    def to_plain(self) -> dict[str, Any]:
        """As values for JSON."""
        return {"salt": self.salt, "slides": sorted(self.slides), "patients": sorted(self.patients)}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> "TrainingCohort":
        """From the values of `to_plain`."""
        return cls(plain["salt"], frozenset(plain["slides"]), frozenset(plain["patients"]))


@dataclass(frozen=True)
class Lineage:
    """Whom the weights of a model may know: its own training cohort, and those of the trainings that it grew from.

    Attributes:
        cohorts: its own, then that of the checkpoint that it started from, and so on.
        unknown: checkpoints of this line about whose training nothing can be known any more.
    """

    cohorts: tuple[TrainingCohort, ...]
    unknown: tuple[str, ...] = ()

    def to_json(self) -> bytes:
        """The content of ``training_cohort.json``; checkpoints by their file name alone."""
        own, *earlier = (cohort.to_plain() for cohort in self.cohorts)
        names = [PurePath(each).name for each in self.unknown]
        return json.dumps(own | {"earlier": earlier, "unknown": names}, indent=1).encode()


def read_training_cohort(run_folder: Path) -> TrainingCohort:
    """The slides and patients of a run's ``splits.csv``.

    Raises:
        RunError: it cannot be read.
    """
    path = run_folder / "splits.csv"
    try:
        with open(path, encoding="utf-8", newline="") as file:
            pairs = sorted({(row["slide_id"], row["patient_id"]) for row in read_csv_dicts(file)})
    except (OSError, KeyError, ValueError) as error:
        raise RunError(
            f"got {path}, which cannot be read ({type(error).__name__} {error}) → it tells which slides and patients "
            f"were trained on → bring it back from a copy of the run"
        ) from error
    salt = sha256(repr(pairs).encode(errors="surrogateescape")).hexdigest()[:_DIGITS]
    return TrainingCohort.of((slide for slide, _ in pairs), (patient for _, patient in pairs), salt)


def read_lineage(folder: Path) -> Lineage:
    """Whom a run, or a packed model, and every training that its weights grew from learned of.

    A packed model says so itself. Of a run, the records of its checkpoints name the checkpoint that it started from,
    beside which lies the next record, until one is gone or was replaced.

    Raises:
        RunError: the first record cannot be read.
    """
    return _follow(folder.resolve(), ())


def _follow(folder: Path, later: tuple[Path, ...]) -> Lineage:
    """The lineage of a folder that ``later`` ones grew from."""
    if (folder / COHORT).is_file():
        return _packed_lineage(folder)
    own = read_training_cohort(folder)
    start = _start_of(folder)
    if start is None:
        return Lineage((own,))
    before = start.resolve().parent.parent
    if before in (folder, *later) or _is_newer(before, folder):
        return Lineage((own,), (str(start),))
    try:
        earlier = _follow(before, (folder, *later))
    except RunError:
        return Lineage((own,), (str(start),))
    return Lineage((own, *earlier.cohorts), earlier.unknown)


def _packed_lineage(folder: Path) -> Lineage:
    path = folder / COHORT
    try:
        plain = read_json(path)
        cohorts = [TrainingCohort.from_plain(each) for each in (plain, *plain.get("earlier", ()))]
        unknown = tuple(plain.get("unknown", ()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(
            f"got {path}, which cannot be read ({type(error).__name__} {error}) → it tells which slides and patients "
            f"were trained on → copy the model again"
        ) from error
    # before this was recorded, the name of the checkpoint was all that a model kept of it
    start = None if "earlier" in plain else _start_of(folder)
    return Lineage(tuple(cohorts), unknown if start is None else (str(start),))


def _start_of(folder: Path) -> Path | None:
    """The checkpoint that the weights of a run started from; the same for all of its replicas."""
    records = sorted((folder / "checkpoints").glob("*.json"))
    if not records:
        return None
    try:
        start = read_json(records[0])["config"].get("init")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(
            f"got {records[0]}, which cannot be read ({type(error).__name__} {error}) → it tells which weights were "
            f"started from → bring it back from a copy of the run"
        ) from error
    return None if start is None else Path(start)


def _is_newer(folder: Path, other: Path) -> bool:
    """Whether one run was made after the other, so that the other cannot have grown from it."""
    mine, theirs = _made(folder), _made(other)
    return mine is not None and theirs is not None and mine > theirs


def _made(folder: Path) -> datetime | None:
    for name, key in (("metrics.json", "created"), ("model.json", "trained")):
        try:
            return datetime.fromisoformat(read_json(folder / name)[key])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def overlap(
    known: Sequence[TrainingCohort], slide_ids: Sequence[str], patient_ids: Sequence[str]
) -> tuple[BoolArray, BoolArray]:
    """Whether each slide [n], and each slide's patient [n], was in any of these trainings."""
    slides = [any(each.knows_slide(slide_id) for each in known) for slide_id in slide_ids]
    patients = [any(each.knows_patient(patient_id) for each in known) for patient_id in patient_ids]
    return np.array(slides, dtype=bool), np.array(patients, dtype=bool)


def _hash(salt: str, text: str) -> str:
    return sha256(f"{salt}\0{text}".encode(errors="surrogateescape")).hexdigest()[:_DIGITS]


def _name(slide_id: str) -> str:
    """The file name that an id stands for, composed (NFC), in small letters, without a slide's ending."""
    path = PurePosixPath(unicodedata.normalize("NFC", slide_id).replace("\\", "/"))
    return (path.stem if path.suffix.lower() in (*SLIDE_SUFFIXES, *OTHER_SUFFIXES) else path.name).lower()
