"""What instance-level heads share: every instance gets logits of its own, and a bag's are pooled from them."""

from torch import Tensor, nn

from aggregators.base import Aggregator, BagOutput, Projection
from aggregators.draws import DrawSource
from aggregators.segment import Segments


class InstanceHead(Aggregator):
    """Scores every instance with the same classifier; a subclass says in `pool` how a bag's logits come from these.

        h_i = dropout(x_i), or dropout(ReLU(W_e x_i + b_e)) with embed_dim
        l_i = W h_i + b
        logits_b = pool({l_i : i ∈ b})

    Nothing represents the bag but its logits, so they are its embedding too.

    Shapes: instances [total, in_dim]; instance_logits [total, classes]; embedding [bags, classes].

    Example:
        >>> class First(InstanceHead):
        ...     def pool(self, instance_logits, segments):
        ...         return torch.stack([bag[0] for bag in segments.split(instance_logits)])
        >>> First(4, 2, None, 0.0, "none")(torch.zeros(5, 4), torch.tensor([0, 2, 5])).logits.shape
        torch.Size([2, 2])
    """

    def __init__(self, in_dim: int, n_classes: int, embed_dim: int | None, dropout: float, input_norm: str) -> None:
        super().__init__(in_dim, n_classes, input_norm)
        self.projection = Projection(in_dim, embed_dim, dropout)
        self.classifier = nn.Linear(self.projection.dim, n_classes)

    def aggregate(
        self, instances: Tensor, segments: Segments, coords: Tensor | None, generator: DrawSource
    ) -> BagOutput:
        """Scores instances [total, in_dim] and pools their logits."""
        instance_logits = self.classifier(self.projection(instances, generator))  # [total, classes]
        logits = self.pool(instance_logits, segments)
        return BagOutput(logits, logits, None, instance_logits, {})

    def pool(self, instance_logits: Tensor, segments: Segments) -> Tensor:
        """Maps instance logits [total, classes] to bag logits [bags, classes]."""
        raise NotImplementedError(f"{type(self).__name__} must define pool")
