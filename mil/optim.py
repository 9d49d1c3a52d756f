"""Optimizers and the learning rate over the steps of a training."""

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.optim import Optimizer

from mil.config import OptimizerConfig, SchedulerConfig

SGD_MOMENTUM = 0.9


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Two groups: weight matrices, which decay, and biases and norms, which are vectors and do not."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in parameters if parameter.ndim > 1]
    others = [parameter for parameter in parameters if parameter.ndim <= 1]
    groups: list[dict[str, object]] = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def create_optimizer(model: nn.Module, config: OptimizerConfig) -> Optimizer:
    """AdamW, or SGD with Nesterov momentum, over `parameter_groups`.

    References:
        Loshchilov and Hutter, Decoupled Weight Decay Regularization, ICLR 2019.
    """
    groups = parameter_groups(model, config.weight_decay)
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=SGD_MOMENTUM, nesterov=True)
    # one kernel over all parameters: a fifth of the time of a small head's step goes into the unfused update
    return torch.optim.AdamW(groups, lr=config.lr, fused=True)


def learning_rate(base: float, config: SchedulerConfig, step: int, n_steps: int) -> float:
    """The learning rate of step ``step`` of ``n_steps``: linear warm-up to ``base``, then the schedule.

    It depends on nothing but its arguments, so replicas that skip a step stay on one schedule.

    Args:
        base: the peak.
        config: the schedule; its warm-up takes ``warmup_fraction`` of the steps.
        step: 0 to n_steps - 1.
        n_steps: steps of all epochs.

    References:
        Loshchilov and Hutter, SGDR, ICLR 2017 (one cosine, without restarts).
    """
    warmup = round(config.warmup_fraction * n_steps)
    if step < warmup:
        return base * (step + 1) / warmup
    if config.name == "constant":
        return base
    return base * (1 + math.cos(math.pi * (step - warmup) / (n_steps - warmup))) / 2


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """Give every parameter group this learning rate."""
    groups: Sequence[dict[str, object]] = optimizer.param_groups
    for group in groups:
        group["lr"] = rate
