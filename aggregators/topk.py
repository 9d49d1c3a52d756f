"""Top-k pooling: the bag's logits are those of its few highest instances."""

import torch
from torch import Tensor

from aggregators.errors import require
from aggregators.instance import InstanceHead
from aggregators.registry import register_aggregator
from aggregators.segment import Segments


@register_aggregator(
    "topk", paper="Li, Vasconcelos, Multiple instance learning for soft bags via top instances, CVPR 2015"
)
class TopK(InstanceHead):
    """Averages the k largest instance logits of a bag, for each class on its own.

        h_i = dropout(x_i), or dropout(ReLU(W_e x_i + b_e)) with embed_dim
        l_i = W h_i + b
        T_bc = the min(k, n_b) instances of b with the largest l_ic
        logits_bc = Σ_{i ∈ T_bc} w_i l_ic,  w_i = 1 / |T_bc|, or softmax of the l_ic over T_bc

    k = 1 is the instance-level maximum, k at least the bag's size the mean. The gradient reaches the chosen instances
    only. There is no attention, as every class chooses its own instances.

    Shapes: instances [total, in_dim]; instance_logits [total, classes]; embedding [bags, classes] are the logits.

    Args:
        in_dim: features per instance.
        n_classes: logits per bag.
        embed_dim: width of the hidden projection; None scores the instances as they are.
        dropout: probability on the embeddings h_i.
        k: instances per bag and class; smaller bags give all they have.
        weighting: "mean", or "softmax" over the chosen logits.
        input_norm: "none", "layer" or "standardize".

    References:
        Li, Vasconcelos, Multiple instance learning for soft bags via top instances, CVPR 2015.
        Campanella et al., Clinical-grade computational pathology using weakly supervised deep learning on whole slide
        images, Nature Medicine 2019 (k = 1).
        Deviations: a fixed number of instances instead of a learned choice; softmax weights are an addition.

    Example:
        >>> head = TopK(in_dim=2, n_classes=3, k=2)
        >>> head(torch.randn(5, 2), torch.tensor([0, 1, 5])).logits.shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        in_dim: int = 1024,
        n_classes: int = 4,
        embed_dim: int | None = None,
        dropout: float = 0.0,
        k: int = 8,
        weighting: str = "mean",
        input_norm: str = "none",
    ) -> None:
        super().__init__(in_dim, n_classes, embed_dim, dropout, input_norm)
        require(k >= 1, f"got k {k} → expected at least 1 → pass 1 for the maximum")
        require(
            weighting in ("mean", "softmax"),
            f"got weighting {weighting!r} → expected mean or softmax → pass 'mean' for equal weights",
        )
        self.k = k
        self.weighting = weighting

    def pool(self, instance_logits: Tensor, segments: Segments) -> Tensor:
        """Maps instance logits [total, classes] to bag logits [bags, classes]."""
        return torch.stack([self._pool_bag(bag) for bag in segments.split(instance_logits)])

    def _pool_bag(self, instance_logits: Tensor) -> Tensor:
        highest = instance_logits.topk(min(self.k, instance_logits.shape[0]), dim=0).values  # [≤ k, classes]
        return highest.mean(0) if self.weighting == "mean" else (highest.softmax(0) * highest).sum(0)
