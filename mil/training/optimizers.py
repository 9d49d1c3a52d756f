"""Optimizers and the learning rate over the steps of a training."""

import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from mil.config.options import LOOKAHEAD
from mil.config.train import OptimizerConfig, SchedulerConfig
from mil.training.compound import Joined, Lookahead

Groups = list[dict[str, Any]]


def parameter_groups(
    model: nn.Module, weight_decay: float, inherited: Collection[str] = (), factor: float = 1.0
) -> Groups:
    """Groups of weight matrices, which decay, and of biases and norms, which are vectors and do not.

    Args:
        model: what to train.
        weight_decay: of the matrices.
        inherited: names of parameters with a learning rate of their own; they get groups of their own.
        factor: what theirs is multiplied with, ``lr_factor`` in their groups.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups: Groups = []
    for is_inherited, lr_factor in ((False, 1.0), (True, factor)):
        parameters = [parameter for name, parameter in named if (name in inherited) == is_inherited]
        decayed = [parameter for parameter in parameters if parameter.ndim > 1]
        others = [parameter for parameter in parameters if parameter.ndim <= 1]
        groups.append({"params": decayed, "weight_decay": weight_decay, "lr_factor": lr_factor})
        groups.append({"params": others, "weight_decay": 0.0, "lr_factor": lr_factor})
    return [group for group in groups if group["params"]]


def create_optimizer(
    model: nn.Module, config: OptimizerConfig, inherited: Collection[str] = (), factor: float = 1.0
) -> Optimizer:
    """The optimizer that a configuration names, over `parameter_groups`.

    References:
        `mil.config.options.OPTIMIZERS` names the paper of each.
    """
    groups = parameter_groups(model, config.weight_decay, inherited, factor)
    name = "radam" if config.name == "ranger" else config.name.removeprefix(LOOKAHEAD)
    keywords = config.keywords("lr", "weight_decay", "lookahead_steps", "lookahead_fraction")
    optimizer = _simple_optimizer(name, groups, config.lr, keywords)
    if config.lookahead_steps is None or config.lookahead_fraction is None:
        return optimizer
    return Lookahead(optimizer, config.lookahead_steps, config.lookahead_fraction)


def _simple_optimizer(name: str, groups: Groups, lr: float, keywords: dict[str, Any]) -> Optimizer:
    """An optimizer without anything around it."""
    if name == "adam":
        return torch.optim.Adam(groups, lr=lr, fused=True, **keywords)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, nesterov=keywords["momentum"] > 0, **keywords)
    if name == "nadam":
        return torch.optim.NAdam(groups, lr=lr, decoupled_weight_decay=True, **keywords)
    if name == "radam":
        return torch.optim.RAdam(groups, lr=lr, decoupled_weight_decay=True, **keywords)
    if name == "lion":
        # three seconds of import that no other optimizer needs
        from timm.optim.lion import Lion

        lion: Optimizer = Lion(groups, lr=lr, **keywords)
        return lion
    if name == "muon":
        return _muon(groups, lr, keywords)
    # one kernel over all parameters: a fifth of the time of a small head's step goes into the unfused update
    return torch.optim.AdamW(groups, lr=lr, fused=True, **keywords)


def _muon(groups: Groups, lr: float, keywords: dict[str, Any]) -> Optimizer:
    """Muon for matrices of several rows and columns, AdamW for everything else."""

    def chosen(matrices: bool) -> Groups:
        parts = [
            group | {"params": [weight for weight in group["params"] if _is_matrix(weight) == matrices]}
            for group in groups
        ]
        return [part for part in parts if part["params"]]

    members: list[Optimizer] = []
    if hidden := chosen(matrices=True):
        # steps as large as AdamW's: one learning rate and decay serve both
        members.append(torch.optim.Muon(hidden, lr=lr, adjust_lr_fn="match_rms_adamw", **keywords))
    if others := chosen(matrices=False):
        members.append(torch.optim.AdamW(others, lr=lr, fused=True))
    return Joined(members)


def _is_matrix(weight: torch.Tensor) -> bool:
    return weight.ndim == 2 and min(weight.shape) > 1


def learning_rate(
    base: float, config: SchedulerConfig, step: int, n_steps: int, validation_losses: Sequence[float] = ()
) -> float:
    """The learning rate of step ``step`` of ``n_steps``: warm-up to ``base``, then the schedule.

    It depends on nothing but its arguments, so replicas that skip a step stay on one schedule, and a training that was
    stopped goes on with the same rates.

    Args:
        base: the peak.
        config: the schedule; its warm-up takes ``warmup_fraction`` of the steps. It is linear, from zero, but for
            ``onecycle``, where it follows a cosine.
        step: 0 to n_steps - 1.
        n_steps: steps of all epochs.
        validation_losses: of the epochs that are over; only ``plateau`` looks at them.

    References:
        `mil.config.options.SCHEDULERS` names the paper of each.
    """
    if config.name == "onecycle":
        return _onecycle(base, config, step, n_steps)
    warmup = round(config.warmup_fraction * n_steps)
    if step < warmup:
        return base * (step + 1) / warmup
    if config.name == "cosine":
        return base * (1 + math.cos(math.pi * (step - warmup) / (n_steps - warmup))) / 2
    if config.name == "step" and config.factor is not None and config.period_fraction is not None:
        # a step that lies on the border up to rounding belongs to the next period
        return base * config.factor ** math.floor(step / (config.period_fraction * n_steps) + 1e-9)
    if config.name == "plateau" and config.factor is not None:
        return base * config.factor ** _plateaus(config, validation_losses)
    return base


def _onecycle(base: float, config: SchedulerConfig, step: int, n_steps: int) -> float:
    """From base / start_divisor along a cosine to the peak, and along another to a start_divisor · end_divisor-th."""
    start = base / (config.start_divisor or 1.0)
    end = start / (config.end_divisor or 1.0)
    peak = config.warmup_fraction * n_steps - 1
    if step <= peak:
        return _along_cosine(start, base, step / peak if peak > 0 else 1.0)
    peak = max(peak, 0.0)
    return _along_cosine(base, end, (step - peak) / (n_steps - 1 - peak) if n_steps - 1 > peak else 0.0)


def _along_cosine(first: float, last: float, part: float) -> float:
    return last + (first - last) * (1 + math.cos(math.pi * part)) / 2


def _plateaus(config: SchedulerConfig, losses: Sequence[float]) -> int:
    """How often more than ``patience`` epochs in a row were no better than the best before them."""
    best, waited, found = math.inf, 0, 0
    for loss in losses:
        if loss < best * (1 - (config.threshold or 0.0)):
            best, waited = loss, 0
        else:
            waited += 1
        if waited > (config.patience or 0):
            found, waited = found + 1, 0
    return found


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """Give every parameter group this learning rate, times its own factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_factor"]


@torch.no_grad()
def add_l1_gradient(optimizer: Optimizer, penalty: float) -> None:
    """Add the gradient of ``penalty`` · Σ |w| over the weight matrices to those that are there."""
    for group in optimizer.param_groups:
        for weight in group["params"]:
            if weight.ndim > 1 and weight.grad is not None:
                weight.grad.add_(weight.sign(), alpha=penalty)
