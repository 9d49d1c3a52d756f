"""The patients of a cohort, as splitting sees them."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mil.arrays import BoolArray, IntArray
from mil.cohort.cohort import Cohort


@dataclass(frozen=True, eq=False)
class Patients:
    """P patients, whole; nothing depends on the order of the table.

    Attributes:
        noun: what the groups are called in messages.
        ids: [P] sorted.
        of_slide: int64 [n], index of each slide's patient.
        counts: int64 [P, C], slides of every class.
        holds: bool [P, C], counts > 0.
    """

    noun: ClassVar[str] = "patients"

    ids: tuple[str, ...]
    of_slide: IntArray
    counts: IntArray
    holds: BoolArray

    @staticmethod
    def of(cohort: Cohort) -> "Patients":
        """Those of the cohort."""
        ids = tuple(sorted(set(cohort.patient_ids)))
        position = {patient: at for at, patient in enumerate(ids)}
        of_slide = np.array([position[patient] for patient in cohort.patient_ids], dtype=np.int64)
        counts = np.zeros((len(ids), len(cohort.class_names)), dtype=np.int64)
        np.add.at(counts, (of_slide, cohort.labels), 1)
        return Patients(ids, of_slide, counts, counts > 0)

    def blocking(self, test: BoolArray) -> IntArray:
        """Classes that leave no room for a validation part once these patients [P] are tested; empty if all is well.

        There is room when one more patient can be spared with every class still held by another. If there is room
        beside a set of patients, there is room beside each subset of it.
        """
        rest = self.holds[~test]
        holders = rest.sum(axis=0)
        if (holders == 0).any():
            return np.flatnonzero(holders == 0)
        last = holders == 1
        return np.flatnonzero(last) if rest[:, last].any(axis=1).all() else np.empty(0, dtype=np.int64)
