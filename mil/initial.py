"""Starting from the weights of an earlier training."""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from aggregators import Aggregator
from mil.checkpoint import load_checkpoint
from mil.config import TrainConfig
from mil.errors import CheckpointError, RunError, listed
from mil.training_cohort import COHORT, TrainingCohort, read_training_cohort


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


def check_initial(config: TrainConfig, slide_ids: Sequence[str], patient_ids: Sequence[str]) -> None:
    """Refuse a warm start from weights that know slides or patients of this cohort, wherever these lie.

    A replica learned from all slides but one fold's, so its weights know the labels of slides that are to be tested.
    Whom it learned from stands beside its checkpoints: ``splits.csv`` of a run, ``training_cohort.json`` of a packed
    model. Where neither is there, a warning says that nobody can tell.

    Raises:
        CheckpointError: a slide of the same file name, or a patient of the same id.
    """
    if config.init is None:
        return
    folder = config.init.resolve().parent.parent
    try:
        known = _training_cohort(folder)
    except (OSError, ValueError, KeyError, TypeError, RunError):
        warnings.warn(
            f"got init={config.init} → nothing beside it says which slides it was trained on: if any of them is in "
            f"this cohort, the figures will be too good",
            stacklevel=2,
        )
        return
    slides = [slide for slide in slide_ids if known.knows_slide(slide)]
    patients = sorted({patient for patient in patient_ids if known.knows_patient(patient)})
    if slides or patients:
        raise CheckpointError(
            f"got init={config.init}, which was trained on {len(slides)} slides and {len(patients)} patients of this "
            f"cohort (slides {listed(slides)}, patients {listed(patients)}) → the folds would be tested on slides "
            f"that it has learned → give a checkpoint of another cohort; where only the names are the same, make the "
            f"ids of the label table unique"
        )


def _training_cohort(folder: Path) -> TrainingCohort:
    packed = folder / COHORT
    if packed.is_file():
        return TrainingCohort.from_json(json.loads(packed.read_text(encoding="utf-8")))
    return read_training_cohort(folder)
