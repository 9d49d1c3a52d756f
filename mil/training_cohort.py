"""Who a model was trained on, as far as it takes to notice the same slides and patients elsewhere.

An artefact leaves the hospital that trained it, so that it holds salted hashes and no ids. They keep nobody from trying
out every id of a known form: they are a courtesy, not a secret.
"""

import csv
import json
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from mil.cohort import OTHER_SUFFIXES, SLIDE_SUFFIXES
from mil.errors import RunError

BoolArray = npt.NDArray[np.bool_]
COHORT = "training_cohort.json"
_DIGITS = 24


@dataclass(frozen=True)
class TrainingCohort:
    """Hashes of slide names and patient ids that had any part in a training, its test folds included.

    Attributes:
        salt: goes into every hash.
        slides: of file names, without folders and endings: another store may have found them elsewhere.
        patients: of patient ids.

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
        return cls(salt, slides, frozenset(_hash(salt, patient_id.strip()) for patient_id in patient_ids))

    def knows_slide(self, slide_id: str) -> bool:
        """Whether a slide of this file name was among them."""
        return _hash(self.salt, _name(slide_id)) in self.slides

    def knows_patient(self, patient_id: str) -> bool:
        """Whether a patient of this id was among them."""
        return _hash(self.salt, patient_id.strip()) in self.patients

    def to_json(self) -> bytes:
        """The content of ``training_cohort.json``."""
        plain = {"salt": self.salt, "slides": sorted(self.slides), "patients": sorted(self.patients)}
        return json.dumps(plain, indent=1).encode()

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> "TrainingCohort":
        """From the content of ``training_cohort.json``."""
        return cls(plain["salt"], frozenset(plain["slides"]), frozenset(plain["patients"]))


def read_training_cohort(run_folder: Path) -> TrainingCohort:
    """The slides and patients of a run's ``splits.csv``.

    Raises:
        RunError: it cannot be read.
    """
    path = run_folder / "splits.csv"
    try:
        with open(path, encoding="utf-8", newline="") as file:
            pairs = sorted({(row["slide_id"], row["patient_id"]) for row in csv.DictReader(file)})
    except (OSError, KeyError, ValueError) as error:
        raise RunError(
            f"got {path}, which cannot be read ({type(error).__name__} {error}) → it tells which slides and patients "
            f"were trained on → bring it back from a copy of the run"
        ) from error
    salt = sha256(repr(pairs).encode(errors="surrogateescape")).hexdigest()[:_DIGITS]
    return TrainingCohort.of((slide for slide, _ in pairs), (patient for _, patient in pairs), salt)


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
