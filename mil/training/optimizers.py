"""Optimizers and the learning rate over the steps of a training."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from mil.config.options import LOOKAHEAD
from mil.config.sections import OptimizerConfig

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


class Lookahead(Optimizer):
    """Lets an optimizer take some fast steps, then goes a part of the way from where it started, and goes on there.

        every k steps: φ ← φ + α (θ - φ), θ ← φ

    The slow weights φ start as the weights do. A model between two such moments has the fast weights θ.

    Args:
        fast: the optimizer inside.
        steps: k.
        fraction: α.

    References:
        Zhang, Lucas, Hinton and Ba, Lookahead Optimizer: k steps forward, 1 step back, NeurIPS 2019. The moments of
        the inner optimizer are kept, which is the paper's default.
    """

    def __init__(self, fast: Optimizer, steps: int, fraction: float) -> None:
        # the groups are the same objects, so that a learning rate set here reaches the inner optimizer
        super().__init__(fast.param_groups, {})
        self._fast, self._steps, self._fraction, self._taken = fast, steps, fraction, 0
        self._slow = [parameter.detach().clone() for parameter in self._parameters()]

    def _parameters(self) -> list[torch.Tensor]:
        return [parameter for group in self._fast.param_groups for parameter in group["params"]]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One fast step; after every k of them the slow weights follow."""
        loss = self._fast.step(closure) if closure is not None else self._fast.step()
        self._taken += 1
        if self._taken % self._steps == 0:
            parameters = self._parameters()
            torch._foreach_lerp_(self._slow, parameters, self._fraction)
            torch._foreach_copy_(parameters, self._slow)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state, the slow weights, and how many steps were taken."""
        return {"fast": self._fast.state_dict(), "slow": [slow.clone() for slow in self._slow], "taken": self._taken}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from another's state."""
        self._fast.load_state_dict(state_dict["fast"])
        self.param_groups = self._fast.param_groups
        for slow, saved in zip(self._slow, state_dict["slow"], strict=True):
            slow.copy_(saved)
        self._taken = state_dict["taken"]


class Joined(Optimizer):
    """Several optimizers, each with its own parameters, as one.

    Args:
        members: the optimizers.
    """

    def __init__(self, members: Sequence[Optimizer]) -> None:
        super().__init__([group for member in members for group in member.param_groups], {})
        self._members = tuple(members)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of each."""
        loss = closure() if closure is not None else None
        for member in self._members:
            member.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The state of each."""
        return {"members": [member.state_dict() for member in self._members]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from another's state."""
        for member, saved in zip(self._members, state_dict["members"], strict=True):
            member.load_state_dict(saved)
        self.param_groups = [group for member in self._members for group in member.param_groups]
