"""Starting from the weights of an earlier training."""

import torch

from aggregators import Aggregator
from mil.config.train import TrainConfig
from mil.errors import CheckpointError
from mil.training.checkpoint import load_checkpoint


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
