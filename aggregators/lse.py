"""Log-sum-exp pooling of instance logits: between their mean and their maximum."""

import torch
from torch import Tensor

from aggregators.errors import require
from aggregators.instance import InstanceHead
from aggregators.registry import register_aggregator
from aggregators.segment import Segments


@register_aggregator(
    "lse",
    paper="Pinheiro, Collobert, From image-level to pixel-level labeling with convolutional networks, CVPR 2015",
)
class LogSumExp(InstanceHead):
    """Pools instance logits by a smooth maximum.

        h_i = dropout(x_i), or dropout(ReLU(W_e x_i + b_e)) with embed_dim
        l_i = W h_i + b
        logits_b = T log((1 / n_b) Σ_{i ∈ b} exp(l_i / T)), for each class on its own

    A temperature T near 0 gives the maximum of the instance logits, a large one their mean. There is no attention.

    Shapes: instances [total, in_dim]; instance_logits [total, classes]; embedding [bags, classes] are the logits.

    Args:
        in_dim: features per instance.
        n_classes: logits per bag.
        embed_dim: width of the hidden projection; None scores the instances as they are.
        dropout: probability on the embeddings h_i.
        temperature: T, one over the sharpness r of the paper.
        normalised: divides by the number of instances. Without it a bag's logits grow with the log of its size.
        input_norm: "none", "layer" or "standardize".

    References:
        Pinheiro, Collobert, From image-level to pixel-level labeling with convolutional networks, CVPR 2015.
        Ramon, De Raedt, Multi instance neural networks, ICML workshop on attribute-value and relational learning 2000.
        Deviations: a linear score or one hidden layer instead of a convolutional network.

    Example:
        >>> head = LogSumExp(in_dim=2, n_classes=3)
        >>> head(torch.randn(5, 2), torch.tensor([0, 2, 5])).logits.shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        in_dim: int = 1024,
        n_classes: int = 4,
        embed_dim: int | None = None,
        dropout: float = 0.0,
        temperature: float = 1.0,
        normalised: bool = True,
        input_norm: str = "none",
    ) -> None:
        super().__init__(in_dim, n_classes, embed_dim, dropout, input_norm)
        require(temperature > 0, f"got temperature {temperature} → expected above 0 → pass 1 for the plain mean of exp")
        self.temperature = temperature
        self.normalised = normalised

    def pool(self, instance_logits: Tensor, segments: Segments) -> Tensor:
        """Maps instance logits [total, classes] to bag logits [bags, classes]."""
        exact = instance_logits.to(torch.promote_types(instance_logits.dtype, torch.float32)) / self.temperature
        pooled = torch.stack([bag.logsumexp(0) for bag in segments.split(exact)])
        if self.normalised:
            pooled = pooled - segments.lengths(pooled.device).to(pooled.dtype).log().unsqueeze(1)
        return (pooled * self.temperature).to(instance_logits.dtype)
