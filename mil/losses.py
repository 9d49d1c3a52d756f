"""Losses on bag logits."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional


def balanced_class_weights(labels: npt.NDArray[np.int64], n_classes: int) -> Tensor:
    """Weight of every class [C], float32: n / (C · count), as scikit-learn's ``balanced``.

    Over the labels given, the mean weight of a slide is one. A class that does not occur gets weight zero.

    Args:
        labels: [n], those of the training part and of no other.
        n_classes: C.
    """
    counts = np.bincount(labels, minlength=n_classes)
    weights = np.zeros(n_classes, dtype=np.float32)
    np.divide(len(labels), n_classes * counts, out=weights, where=counts > 0, casting="unsafe")
    return torch.from_numpy(weights)


def weighted_cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Mean over bags of w[y] · -log p[y], a scalar.

    torch's own weighted mean divides by the weights of the batch, by which the weights of a batch of one class, or of
    one bag, cancel. Dividing by the number of bags leaves every step an unbiased estimate of the loss over the
    training part, where both definitions agree because balanced weights have mean one.

    Args:
        logits: [bags, C].
        targets: int64 [bags].
        weights: [C].
    """
    losses = functional.cross_entropy(logits, targets, reduction="none")  # [bags]
    return (losses * weights[targets]).mean()


def log_loss(logits: Tensor, targets: Tensor, weights: Tensor) -> float:
    """`weighted_cross_entropy` in float64, for comparing epochs."""
    return float(weighted_cross_entropy(logits.double(), targets, weights.double()))


def probabilities(logits: Tensor) -> Tensor:
    """Softmax over classes in float64, so that [bags, C] sums to one to the last digit that is written."""
    return logits.double().softmax(dim=-1)
