"""Noisy-or pooling: a bag is positive if at least one of its instances is."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from aggregators.errors import require
from aggregators.instance import InstanceHead
from aggregators.registry import register_aggregator
from aggregators.segment import Segments, segment_sum


@register_aggregator(
    "noisy_or", paper="Zhang, Platt, Viola, Multiple instance boosting for object detection, NIPS 2005"
)
class NoisyOr(InstanceHead):
    """Combines instance probabilities as if every instance could make the bag positive on its own.

        h_i = dropout(x_i), or dropout(ReLU(W_e x_i + b_e)) with embed_dim
        p_i = sigmoid(W h_i + b), for each class on its own
        P_b = 1 - Π_{i ∈ b} (1 - p_i)
        logits_b = log(P_b / (1 - P_b))

    sigmoid(logits) is P_b. The product is taken as S_b = Σ softplus(l_i) = -log(1 - P_b), and logits_b =
    log(exp(S_b) - 1), so that nothing under- or overflows. For one instance the bag's logits are the instance's.

    A bag of 10,000 instances with p = 0.5 is positive beyond doubt and teaches slowly; b therefore starts at the
    logit of `prior`. The head suits classes that few instances decide, each alone; the assumption that instances are
    independent is far from true for neighbouring tiles.

    Shapes: instances [total, in_dim]; instance_logits [total, classes]; embedding [bags, classes] are the logits.

    Args:
        in_dim: features per instance.
        n_classes: logits per bag.
        embed_dim: width of the hidden projection; None scores the instances as they are.
        dropout: probability on the embeddings h_i.
        prior: an instance's probability at the start, in (0, 1); about one over the usual bag size.
        input_norm: "none", "layer" or "standardize".

    References:
        Zhang, Platt, Viola, Multiple instance boosting for object detection, NIPS 2005.
        Maron, Lozano-Pérez, A framework for multiple-instance learning, NIPS 1998.
        Deviations: a linear score or one hidden layer trained by gradient instead of boosting; the starting bias.

    Example:
        >>> head = NoisyOr(in_dim=2, n_classes=1)
        >>> output = head(torch.randn(3, 2))
        >>> expected = 1 - (1 - output.instance_logits.sigmoid()).prod(0)
        >>> torch.allclose(output.logits.sigmoid(), expected, atol=1e-6)
        True
    """

    def __init__(
        self,
        in_dim: int = 1024,
        n_classes: int = 4,
        embed_dim: int | None = None,
        dropout: float = 0.0,
        prior: float = 0.001,
        input_norm: str = "none",
    ) -> None:
        super().__init__(in_dim, n_classes, embed_dim, dropout, input_norm)
        require(0 < prior < 1, f"got prior {prior} → expected a probability in (0, 1) → try one over the bag size")
        nn.init.constant_(self.classifier.bias, math.log(prior / (1 - prior)))

    def pool(self, instance_logits: Tensor, segments: Segments) -> Tensor:
        """Maps instance logits [total, classes] to bag logits [bags, classes]."""
        exact = instance_logits.to(torch.promote_types(instance_logits.dtype, torch.float32))
        doubt = segment_sum(functional.softplus(exact), segments)  # -log(1 - P), above 0
        # a logit below -87 has a softplus that float32 cannot hold
        doubt = doubt.clamp_min(torch.finfo(doubt.dtype).tiny)
        return (doubt + (-torch.expm1(-doubt)).log()).to(instance_logits.dtype)
