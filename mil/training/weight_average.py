"""An exponential moving average of a head's weights."""

import copy
from collections.abc import Mapping
from typing import Any

import torch

from aggregators import Aggregator


class WeightAverage:
    """A head whose weights follow those of another: a ← d · a + (1 - d) · w after every step.

    In step t (from 1) d is min(decay, (1 + t) / (10 + t)), so that the random start is soon forgotten and a short
    training has an average of its own length.

    Args:
        head: what to follow.
        decay: d in the long run, in (0, 1); the average is about 1 / (1 - d) steps long.

    References:
        Polyak and Juditsky, Acceleration of Stochastic Approximation by Averaging, SIAM J. Control Optim. 1992; the
        warm-up is that of TensorFlow's ExponentialMovingAverage.

    Example:
        >>> from aggregators import create_aggregator
        >>> average = WeightAverage(create_aggregator("mean", in_dim=4, n_classes=2), decay=0.99)
        >>> average.update(average.head)
        >>> average.steps
        1
    """

    def __init__(self, head: Aggregator, decay: float) -> None:
        self.head = copy.deepcopy(head).requires_grad_(False)
        self.decay, self.steps = decay, 0

    @torch.no_grad()
    def update(self, head: Aggregator) -> None:
        """Take in the weights of ``head`` after a step; buffers are copied."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(list(self.head.parameters()), list(head.parameters()), 1 - decay)
        for ours, theirs in zip(self.head.buffers(), head.buffers(), strict=True):
            ours.copy_(theirs)

    def state_dict(self) -> dict[str, Any]:
        """Weights and steps so far."""
        return {"head": self.head.state_dict(), "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from another average."""
        self.head.load_state_dict(state["head"])
        self.steps = state["steps"]
