"""Chowder: the highest and the lowest instance scores of a bag, classified by a small network."""

from itertools import pairwise

import torch
from torch import Tensor, nn

from aggregators.base import Aggregator, BagOutput, Dropout, Projection
from aggregators.draws import DrawSource, one_each
from aggregators.errors import require
from aggregators.registry import register_aggregator
from aggregators.segment import Segments


@register_aggregator(
    "chowder",
    paper="Courtiol, Tramel, Sanselme, Wainrib, Classification and disease localization in histopathology using only "
    "global labels: a weakly-supervised approach, arXiv:1802.02212, 2018",
)
class Chowder(Aggregator):
    """Scores every instance by a number, keeps a bag's highest and lowest scores, and classifies these.

        h_i = dropout(x_i), or dropout(ReLU(W_e x_i + b_e)) with embed_dim
        s_i = w h_i + b, `branches` scores per instance, each treated on its own
        z_b = (the `top` highest s_i in descending order, the `bottom` lowest in ascending order)
        logits_b = W_3 drop(σ(W_2 drop(σ(W_1 z_b + b_1)) + b_2)) + b_3,  σ the sigmoid

    The highest scores are evidence for a class, the lowest evidence against it; the rest of the bag is not read. In a
    bag of fewer than `top` instances the lowest of them is repeated (of fewer than `bottom`, the highest), so that z_b
    always has the same width. Gradients reach the chosen instances only. There is no attention.

    Shapes: instances [total, in_dim]; embedding z [bags, branches · (top + bottom)]; extras["instance_scores"]
    [total, branches] are the s_i.

    Args:
        in_dim: features per instance.
        n_classes: logits per bag.
        embed_dim: width of a hidden projection before the scores; None, as in the paper, for none.
        top: highest scores kept per bag and branch.
        bottom: lowest scores kept per bag and branch; top and bottom cannot both be 0.
        branches: scores per instance.
        hidden_dims: widths of the classifying network's layers, W_1 and W_2; any number of layers.
        dropout: probability on h_i and after every hidden layer of the classifying network.
        input_norm: "none", "layer" or "standardize".

    References:
        Courtiol, Tramel, Sanselme, Wainrib, Classification and disease localization in histopathology using only
        global labels: a weakly-supervised approach, arXiv:1802.02212, 2018 (top = bottom = 5, layers of 200 and 100).
        Deviations: one head, not an average of ten; bags smaller than top or bottom; several scores per instance and
        the hidden projection are additions; no penalty on w but the optimizer's weight decay.

    Example:
        >>> head = Chowder(in_dim=16, n_classes=3, top=2, bottom=1).eval()
        >>> output = head(torch.randn(5, 16), torch.tensor([0, 1, 5]))
        >>> output.logits.shape, output.embedding.shape
        (torch.Size([2, 3]), torch.Size([2, 3]))
        >>> bool((output.embedding[0] == output.extras["instance_scores"][0]).all())
        True
    """

    def __init__(
        self,
        in_dim: int = 1024,
        n_classes: int = 4,
        embed_dim: int | None = None,
        top: int = 5,
        bottom: int = 5,
        branches: int = 1,
        hidden_dims: tuple[int, ...] = (200, 100),
        dropout: float = 0.0,
        input_norm: str = "none",
    ) -> None:
        super().__init__(in_dim, n_classes, input_norm)
        require(
            top >= 0 and bottom >= 0 and top + bottom >= 1,
            f"got top {top} and bottom {bottom} → expected 0 or more, not both 0 → pass 5 and 5 for the paper's head",
        )
        require(branches >= 1, f"got branches {branches} → expected at least 1 → pass 1 for the paper's head")
        require(min(hidden_dims, default=1) >= 1, f"got hidden_dims {hidden_dims} → expected widths → try (200, 100)")
        self.top = top
        self.bottom = bottom
        self.projection = Projection(in_dim, embed_dim, dropout)
        self.scorer = nn.Linear(self.projection.dim, branches)
        widths = [branches * (top + bottom), *hidden_dims]
        self.hidden = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(widths))
        self.dropout = Dropout(dropout)
        self.classifier = nn.Linear(widths[-1], n_classes)

    def aggregate(
        self, instances: Tensor, segments: Segments, coords: Tensor | None, generator: DrawSource
    ) -> BagOutput:
        """Scores instances [total, in_dim] and classifies the extremes of each bag."""
        scores = self.scorer(self.projection(instances, generator))  # [total, branches]
        embedding = torch.stack([self._extremes(bag).flatten() for bag in segments.split(scores)])
        hidden, per_bag = embedding, one_each(generator, segments.bags)
        for layer in self.hidden:
            hidden = self.dropout(layer(hidden).sigmoid(), per_bag)
        return BagOutput(self.classifier(hidden), embedding, None, None, {"instance_scores": scores})

    def _extremes(self, scores: Tensor) -> Tensor:
        """Keeps the highest and lowest scores of one bag: [n_b, branches] → [top + bottom, branches]."""
        highest, lowest = _largest(scores, self.top), -_largest(-scores, self.bottom)
        return torch.cat([highest, lowest])


def _largest(scores: Tensor, count: int) -> Tensor:
    """The `count` largest rows of each column, descending; the last is repeated where there are fewer."""
    found = scores.topk(min(count, scores.shape[0]), dim=0).values
    return torch.cat([found, found[-1:].expand(count - found.shape[0], -1)])
