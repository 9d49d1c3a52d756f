"""Optimizers that are made of others: Lookahead around one, and several as one."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.optim import Optimizer


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
