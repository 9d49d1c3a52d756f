"""The loss of a head's own logits, those that are not the bag's prediction."""

import torch
from torch import Tensor
from torch.nn import functional

from aggregators.errors import BagInputError


def target_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Returns the loss of every row, [rows]: cross-entropy for one class per row, else binary cross-entropy.

    Integer targets [rows] and several logits mean one class per row. Targets [rows, classes] of 0 and 1 are several
    labels at once: binary cross-entropy, averaged over the classes whose target is known (NaN is unknown). Targets
    [rows] beside a single logit are binary.
    Nothing else has a meaning here: regression and survival targets are refused.

    Args:
        logits: [rows, classes].
        targets: int64 [rows], or 0, 1 and NaN of shape [rows, classes].

    Raises:
        BagInputError: the targets are neither.

    Example:
        >>> target_losses(torch.zeros(2, 4), torch.tensor([0, 3])).exp().round().tolist()
        [4.0, 4.0]
        >>> target_losses(torch.zeros(1, 3), torch.tensor([[1.0, 0.0, 1.0]])).exp().round().tolist()
        [2.0]
    """
    rows, classes = logits.shape
    if targets.shape == (rows,) and targets.dtype == torch.int64 and classes > 1:
        return functional.cross_entropy(logits, targets, reduction="none")
    binary = targets.unsqueeze(1) if targets.shape == (rows,) and classes == 1 else targets
    known = ~binary.isnan()
    if binary.shape != logits.shape or not bool((((binary >= 0) & (binary <= 1)) | ~known).all()):
        raise BagInputError(
            f"got targets of shape {tuple(targets.shape)} and type {targets.dtype} for logits {tuple(logits.shape)} → "
            "expected class numbers, int64 [bags], or 0 and 1 of shape [bags, classes] → train regression and "
            "survival with a head that has no loss of its own, such as abmil"
        )
    answers = binary.to(logits.dtype).nan_to_num(0.0)
    losses = functional.binary_cross_entropy_with_logits(logits, answers, reduction="none")
    return torch.where(known, losses, 0.0).sum(1) / known.sum(1).clamp_min(1)
