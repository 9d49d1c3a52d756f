"""The learning rate over the steps of a training."""

import math
from collections.abc import Sequence

from mil.config.sections import SchedulerConfig


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
