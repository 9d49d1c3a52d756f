"""Initial weights that never saw what is tested."""

import warnings
from collections.abc import Sequence
from pathlib import Path

from mil.config.train import TrainConfig
from mil.errors import CheckpointError, RunError, listed
from mil.runs.lineage import Lineage, overlap, read_lineage


def check_initial(config: TrainConfig, slide_ids: Sequence[str], patient_ids: Sequence[str]) -> tuple[str, ...]:
    """Refuse a warm start from weights that know slides or patients of this cohort, wherever these lie.

    A replica learned from all slides but one fold's, so its weights know the labels of slides that are to be tested.
    The weights may in turn have started from others, and know what those knew: the whole line is looked at, see
    `mil.runs.lineage`. Where a part of it cannot be known any more, a warning says so.

    Returns:
        These warnings, for the run's own.

    Raises:
        CheckpointError: a slide of the same file name, or a patient of the same id.
    """
    if config.init is None:
        return ()
    try:
        lineage = read_lineage(config.init.resolve().parent.parent)
    except RunError:
        lineage = Lineage((), (str(config.init),))
    messages = tuple(_unknown(config.init, each) for each in lineage.unknown)
    for message in messages:
        warnings.warn(message, stacklevel=2)
    found, patients_found = overlap(lineage.cohorts, slide_ids, patient_ids)
    slides = [slide for slide, known in zip(slide_ids, found, strict=True) if known]
    patients = sorted({patient for patient, known in zip(patient_ids, patients_found, strict=True) if known})
    if slides or patients:
        itself = any(part.any() for part in overlap(lineage.cohorts[:1], slide_ids, patient_ids))
        raise CheckpointError(
            f"got init={config.init}, which {'was' if itself else 'grew from weights that were'} trained on "
            f"{len(slides)} slides and {len(patients)} patients of this cohort (slides {listed(slides)}, patients "
            f"{listed(patients)}) → the folds would be tested on slides that it has learned → give a checkpoint of "
            f"another cohort; where only the names are the same, make the ids of the label table unique"
        )
    return messages


def _unknown(init: Path, unknown: str) -> str:
    through = "" if unknown == str(init) else f", which grew from {unknown}"
    return (
        f"got init={init}{through} → nothing beside it says which slides it was trained on: if any of them is in this "
        f"cohort, the figures will be too good"
    )
