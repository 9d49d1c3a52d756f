"""Losses on bag logits: of classes, several labels, numbers and survival, see `mil.training.tasks`."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from mil.config.sections import LossConfig


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
        targets: int64 [bags], or soft labels [bags, C] t, of which each class counts: Σ_c w[c] · t[c] · -log p[c].
        weights: [C].
    """
    if targets.ndim == 1:
        losses = functional.cross_entropy(logits, targets, reduction="none")  # [bags]
        return (losses * weights[targets]).mean()
    return -(weights * targets * logits.log_softmax(dim=-1)).sum(dim=-1).mean()


def focal_loss(logits: Tensor, targets: Tensor, weights: Tensor, gamma: float) -> Tensor:
    """Mean over bags of w[y] · (1 - p[y])^γ · -log p[y]: bags that are predicted well count less.

    Args:
        logits: [bags, C].
        targets: int64 [bags], or soft labels [bags, C], over which it is summed.
        weights: [C], the paper's α.
        gamma: γ; 0 is the cross-entropy.

    References:
        Lin, Goyal, Girshick, He and Dollár, Focal Loss for Dense Object Detection, ICCV 2017, with a softmax instead
        of the sigmoid.
    """
    chances = logits.log_softmax(dim=-1)
    # 1 - p from its logarithm keeps its digits where p is nearly one
    missing = (-torch.expm1(chances)).clamp_min(torch.finfo(chances.dtype).tiny)
    losses = weights * soft_labels(targets, chances) * missing**gamma * -chances
    return losses.sum(dim=-1).mean()


def ordinal_loss(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Mean over bags of w[y] · the mean binary cross-entropy of "the class is above k", for k = 0 to C - 2.

    The chance of being above k is the softmax's mass there. So it never rises with k, a prediction far from the truth
    costs more than one beside it, and any head can learn from it; two classes give the cross-entropy.

    Args:
        logits: [bags, C], of ordered classes.
        targets: int64 [bags], or soft labels [bags, C].
        weights: [C].

    References:
        Cao, Mirjalili and Raschka, Rank Consistent Ordinal Regression for Neural Networks with Application to Age
        Estimation, Pattern Recognition Letters 2020. Theirs has C - 1 logits that differ by their bias alone.
    """
    chances = logits.log_softmax(dim=-1)
    above = chances.flip(-1).logcumsumexp(dim=-1).flip(-1)[:, 1:]  # [bags, C - 1], log P(class > k)
    up_to = chances.logcumsumexp(dim=-1)[:, :-1]
    soft = soft_labels(targets, chances)
    is_above = soft.flip(-1).cumsum(dim=-1).flip(-1)[:, 1:]
    losses = -(is_above * above + (1 - is_above) * up_to).mean(dim=-1)  # [bags]
    return ((soft @ weights) * losses).mean()


def bag_loss(config: LossConfig, logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """The loss that a configuration names, a mean over bags.

    Args:
        config: the loss.
        logits: [bags, C].
        targets: int64 [bags], or soft labels [bags, C].
        weights: [C].
    """
    if config.label_smoothing:
        targets = smoothed(soft_labels(targets, logits), config.label_smoothing)
    if config.name == "focal":
        return focal_loss(logits, targets, weights, config.gamma or 0.0)
    if config.name == "ordinal":
        return ordinal_loss(logits, targets, weights)
    return weighted_cross_entropy(logits, targets, weights)


def soft_labels(targets: Tensor, like: Tensor) -> Tensor:
    """Targets as soft labels [bags, C] in the dtype and width of ``like``; soft ones are returned as they are."""
    return targets if targets.ndim == 2 else functional.one_hot(targets, like.shape[-1]).to(like.dtype)


def smoothed(targets: Tensor, smoothing: float) -> Tensor:
    """Soft labels [bags, C] of which a part is spread evenly over all classes.

    References:
        Szegedy, Vanhoucke, Ioffe, Shlens and Wojna, Rethinking the Inception Architecture, CVPR 2016.
    """
    return (1 - smoothing) * targets + smoothing / targets.shape[-1]


def class_numbers(targets: Tensor) -> Tensor:
    """Targets as int64 [bags]; soft labels give their largest class."""
    return targets if targets.ndim == 1 else targets.argmax(dim=-1)


def log_loss(logits: Tensor, targets: Tensor, weights: Tensor) -> float:
    """`weighted_cross_entropy` in float64, for comparing epochs."""
    return float(weighted_cross_entropy(logits.double(), targets, weights.double()))


def probabilities(logits: Tensor) -> Tensor:
    """Softmax over classes in float64, so that [bags, C] sums to one to the last digit that is written."""
    return logits.double().softmax(dim=-1)


def multi_label_loss(logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean over bags of the mean binary cross-entropy over the labels whose answer is known for the bag.

    Args:
        logits: [bags, labels].
        targets: [bags, labels] of 0 and 1, NaN where unknown.
        weights: [labels], multiplied with the loss where the label is 1; None is ones.
    """
    known = ~targets.isnan()
    losses = functional.binary_cross_entropy_with_logits(
        logits, targets.nan_to_num(0.0), reduction="none", pos_weight=weights
    )
    return (torch.where(known, losses, 0.0).sum(dim=-1) / known.sum(dim=-1).clamp_min(1)).mean()


def squared_error(predictions: Tensor, targets: Tensor) -> Tensor:
    """Mean squared difference of [bags, targets]."""
    return (predictions - targets).square().mean()


def huber_loss(predictions: Tensor, targets: Tensor, delta: float = 1.0) -> Tensor:
    """Mean over [bags, targets] of d²/2 up to a difference of δ, and of δ (|d| - δ/2) beyond.

    References:
        Huber, Robust Estimation of a Location Parameter, Annals of Mathematical Statistics 1964.
    """
    return functional.huber_loss(predictions, targets, delta=delta)


def discrete_survival_loss(logits: Tensor, intervals: Tensor, events: Tensor) -> Tensor:
    """Mean negative log-likelihood of survival in discrete time.

    Interval j has the hazard h_j = sigmoid(logit_j). A death in interval k has the likelihood h_k · Π_{j<k} (1 - h_j);
    who is lost in interval k is known to have survived it: Π_{j≤k} (1 - h_j).

    Args:
        logits: [bags, intervals].
        intervals: int64 [bags], in which the time lies.
        events: bool [bags], death (True) or end of observation.

    References:
        Zadeh and Schmid, Bias in Cross-Entropy-Based Training of Deep Survival Networks, IEEE TPAMI 2021, as used by
        Chen, Lu, Shaban et al., Whole Slide Images are 2D Point Clouds (Patch-GCN), MICCAI 2021, with α = 0.
    """
    survived = functional.logsigmoid(-logits).cumsum(dim=-1)  # [bags, intervals], log Π_{j≤k} (1 - h_j)
    until = survived.gather(1, intervals[:, None]).squeeze(1)
    hazard = logits.gather(1, intervals[:, None]).squeeze(1)
    # log h_k - log (1 - h_k) is the logit itself
    return -torch.where(events, until + hazard, until).mean()


def cox_loss(risks: Tensor, times: Tensor, events: Tensor) -> Tensor:
    """Mean negative log partial likelihood over deaths, with Breslow's way with ties; zero without a death.

    The pack is the risk set: it compares the bags of one pack with each other, so packs must hold many, and slides of
    one patient count each.

    Args:
        risks: [bags], log of the relative hazard.
        times: [bags], of death or end of observation.
        events: bool [bags], death (True) or end of observation.

    References:
        Cox, Regression Models and Life-Tables, JRSS B 1972; Breslow, discussion of it.
    """
    at_risk = times[None, :] >= times[:, None]  # [bags, bags], row i: who is alive when i's time comes
    total = risks[None, :].masked_fill(~at_risk, -torch.inf).logsumexp(dim=-1)
    losses = torch.where(events, total - risks, 0.0)
    return losses.sum() / events.sum().clamp_min(1)
