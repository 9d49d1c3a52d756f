"""How published code trains and scores heads on the classic MIL sets, written down so that it can be run beside ours.

Two habits, both without a validation part:

* *last epoch*: train a fixed number of epochs on nine folds, then score the tenth at a cut of 0.5. So does the code of
  MI-Net (yanyongluan/MINNs) on these sets, and that of ABMIL (AMLab-Amsterdam/AttentionDeepMIL) on MNIST-bags.
* *best test epoch*: score the tenth fold after every epoch, at the cut that suits that fold best, and report the best
  epoch of each fold. So does the code of DSMIL (binli123/dsmil-wsi, train_mil.py).

The second looks at the test labels twice, and its figure is no estimate of anything. One training serves both.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional
from torch.optim import Optimizer

from aggregators import Aggregator, create_aggregator
from aggregators.base import Standardize
from mil.bags.bags import Bags, Pack
from mil.bags.forward import bag_logits

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Recipe:
    """Settings of a published training.

    Attributes:
        optimizer: ``sgd`` with Nesterov momentum 0.9, weights decay and biases do not; ``adam`` with betas 0.5 and 0.9.
        lr: of a step that sees one bag.
        weight_decay: factor of the weights in the gradient.
        epochs: always all of them.
        cosine: the rate falls to zero as a cosine of the epoch; otherwise it is constant.
        balanced: positive bags weigh n_negative / n_positive.
        loss_scale: factor of the loss, the head's own included.
    """

    optimizer: Literal["sgd", "adam"]
    lr: float
    weight_decay: float
    epochs: int
    cosine: bool = False
    balanced: bool = False
    loss_scale: float = 1.0

    def create_optimizer(self, head: Aggregator) -> Optimizer:
        """The optimizer, its rate still to be set."""
        if self.optimizer == "sgd":
            weights = [parameter for parameter in head.parameters() if parameter.ndim > 1]
            biases = [parameter for parameter in head.parameters() if parameter.ndim <= 1]
            groups = [{"params": weights, "weight_decay": self.weight_decay}, {"params": biases}]
            return torch.optim.SGD(groups, lr=self.lr, momentum=0.9, nesterov=True)
        betas = (0.5, 0.9)
        return torch.optim.Adam(head.parameters(), self.lr, betas, weight_decay=self.weight_decay, fused=True)

    def rate(self, epoch: int, bags_per_step: int) -> float:
        """Rate in an epoch, from 0; scaled for steps of several bags, by their number or, for Adam, its square root."""
        scale = float(bags_per_step) if self.optimizer == "sgd" else math.sqrt(bags_per_step)
        return self.lr * scale * ((1 + math.cos(math.pi * epoch / self.epochs)) / 2 if self.cosine else 1)


# Keras' l2(0.005) adds 0.005 w² to the loss, so 0.01 w to the gradient
MI_NET = Recipe("sgd", lr=5e-4, weight_decay=0.01, epochs=50)
DSMIL = Recipe("adam", lr=2e-4, weight_decay=5e-3, epochs=40, cosine=True, balanced=True, loss_scale=0.5)


def train_as_published(
    bags: Bags,
    labels: IntArray,
    test: npt.NDArray[np.bool_],
    head: tuple[str, Mapping[str, Any]],
    recipe: Recipe,
    seed: int,
    bags_per_step: int = 1,
) -> FloatArray:
    """Probability of the positive class for every test bag after every epoch, [epochs, n_test].

    As in the code of both papers, features are standardised over all instances, those of the test bags too.

    Args:
        bags: n bags.
        labels: [n], 0 or 1.
        test: [n], the fold that is left out.
        head: its name and constructor keywords; it gets a single logit.
        recipe: how to train it.
        seed: of weights, order and dropout.
        bags_per_step: the published code takes one; several are faster, and the rate grows with them.
    """
    train, held_out = np.flatnonzero(~test), np.flatnonzero(test)
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _create_head(head, bags)
    optimizer = recipe.create_optimizer(model)
    n_positive = int(labels[train].sum())
    weight = torch.tensor((len(train) - n_positive) / n_positive if recipe.balanced else 1.0)
    found = []
    for epoch in range(recipe.epochs):
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(epoch, bags_per_step)
        order = rng.permutation(train)
        for start in range(0, len(order), bags_per_step):
            pack = bags.pack(order[start : start + bags_per_step])
            loss = _loss(model, pack, torch.from_numpy(labels[pack.bags]), weight, generator)
            optimizer.zero_grad(set_to_none=True)
            (recipe.loss_scale * loss).backward()
            optimizer.step()
        found.append(bag_logits([model], bags, held_out, CPU)[0, :, 0].double().sigmoid().numpy())
    return np.stack(found)


def _create_head(head: tuple[str, Mapping[str, Any]], bags: Bags) -> Aggregator:
    name, keywords = head
    model = create_aggregator(name, in_dim=bags.dim, n_classes=1, input_norm="standardize", **keywords)
    if isinstance(model.input_norm, Standardize):
        model.input_norm.fit(*bags.moments.mean_std(np.arange(len(bags))))
    return model


def _loss(head: Aggregator, pack: Pack, targets: Tensor, positive_weight: Tensor, generator: torch.Generator) -> Tensor:
    output = head(pack.instances, pack.offsets, generator=generator)
    loss = functional.binary_cross_entropy_with_logits(output.logits[:, 0], targets.float(), pos_weight=positive_weight)
    return loss + head.auxiliary_loss(output, targets, pack.offsets)


def best_cut(labels: IntArray, probabilities: FloatArray) -> float:
    """The cut with the best balanced accuracy on these bags; of equally good ones that nearest to one half.

    Candidates lie halfway between neighbouring probabilities, besides one half itself.

    Args:
        labels: [n], 0 or 1, both present.
        probabilities: [n], of class 1.
    """
    ranked = np.unique(probabilities)
    cuts = np.r_[0.5, (ranked[1:] + ranked[:-1]) / 2]
    called = probabilities >= cuts[:, None]  # [cuts, n]
    score = called[:, labels == 1].mean(axis=1) + (~called[:, labels == 0]).mean(axis=1)
    best = cuts[score >= score.max() - 1e-9]
    return float(best[np.abs(best - 0.5).argmin()])


def best_test_epoch(labels: IntArray, probabilities: FloatArray) -> npt.NDArray[np.bool_]:
    """Whether each test bag is called right, [n], in the epoch and at the cut that suit these very bags best.

    Args:
        labels: [n], of the test bags.
        probabilities: [epochs, n].
    """
    right = np.stack([(row >= best_cut(labels, row)) == labels for row in probabilities])
    best: npt.NDArray[np.bool_] = right[right.mean(axis=1).argmax()]
    return best
