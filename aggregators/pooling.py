"""Mean and max pooling of instance embeddings: the baselines any attention has to beat."""

from collections.abc import Mapping

from torch import Tensor, nn

from aggregators.base import Aggregator, BagOutput, Projection
from aggregators.draws import DrawSource
from aggregators.official import official_tensors
from aggregators.registry import register_aggregator
from aggregators.segment import Segments, segment_max, segment_mean

_PAPER = "Wang et al., Revisiting multiple instance neural networks, Pattern Recognition 2018"


class _Pool(Aggregator):
    """Constructor of both heads; the subclasses say how they pool."""

    def __init__(
        self,
        in_dim: int = 1024,
        n_classes: int = 4,
        embed_dim: int | None = None,
        dropout: float = 0.0,
        input_norm: str = "none",
    ) -> None:
        super().__init__(in_dim, n_classes, input_norm)
        self.projection = Projection(in_dim, embed_dim, dropout)
        self.classifier = nn.Linear(self.projection.dim, n_classes)


@register_aggregator("mean", paper=_PAPER)
class MeanPool(_Pool):
    """Averages the instance embeddings of a bag, then classifies the average.

        h_i = dropout(x_i), or dropout(ReLU(W_e x_i + b_e)) with embed_dim
        z_b = (1 / n_b) Σ_{i ∈ b} h_i
        logits_b = W z_b + b

    What is pooled are embeddings. As the classifier is linear, the same logits come from averaging instance logits
    W h_i + b, which are therefore given as `instance_logits`: their mean over a bag is exactly what the bag's logit
    is made of. There is no attention.

    Shapes: instances [total, in_dim]; embedding [bags, embed_dim or in_dim]; instance_logits [total, classes].

    Args:
        in_dim: features per instance.
        n_classes: logits per bag.
        embed_dim: width of the hidden projection; None pools the instances as they are.
        dropout: probability on the embeddings h_i, before pooling.
        input_norm: "none", "layer" or "standardize".

    References:
        Wang, Yan, Tang, Bai, Liu, Revisiting multiple instance neural networks, Pattern Recognition 2018 (MI-Net).
        ACMIL's `MeanMIL` (dazhangyu123/ACMIL), which averages instance logits, is the same head; from_official reads
        its parameters.
        Deviations: one hidden layer or none instead of three; a logit per class instead of one sigmoid.

    Example:
        >>> head = MeanPool(in_dim=2, n_classes=2)
        >>> head(torch.tensor([[1.0, 3.0], [3.0, 5.0], [7.0, 7.0]]), torch.tensor([0, 2, 3])).embedding.tolist()
        [[2.0, 4.0], [7.0, 7.0]]
    """

    def aggregate(
        self, instances: Tensor, segments: Segments, coords: Tensor | None, generator: DrawSource
    ) -> BagOutput:
        """Pools instances [total, in_dim] into one embedding and one row of logits per bag."""
        embedded = self.projection(instances, generator)
        embedding = segment_mean(embedded, segments)
        return BagOutput(self.classifier(embedding), embedding, None, self.classifier(embedded), {})

    @classmethod
    def from_official(cls, state: Mapping[str, Tensor]) -> "MeanPool":
        """Builds the head of a trained ACMIL `MeanMIL`.

        Raises:
            OfficialStateError: parameters are missing or left over.

        Example:
            >>> shapes = {"head.0.weight": (4, 6), "head.0.bias": (4,), "head.3.weight": (2, 4), "head.3.bias": (2,)}
            >>> head = MeanPool.from_official({name: torch.zeros(shape) for name, shape in shapes.items()})
            >>> head(torch.ones(3, 6)).logits.shape
            torch.Size([1, 2])
        """
        layers = {"head.0": "projection.linear", "head.3": "classifier"}
        names = {f"{theirs}.{kind}": f"{ours}.{kind}" for theirs, ours in layers.items() for kind in ("weight", "bias")}
        renamed = {names[name]: value for name, value in official_tensors(state, names, "ACMIL's MeanMIL").items()}
        embed_dim, in_dim = renamed["projection.linear.weight"].shape
        head = cls(in_dim, renamed["classifier.weight"].shape[0], embed_dim)
        head.load_state_dict(renamed)
        return head


@register_aggregator("max", paper=_PAPER)
class MaxPool(_Pool):
    """Takes the largest value of every embedding feature over a bag, then classifies these maxima.

        h_i = dropout(x_i), or dropout(ReLU(W_e x_i + b_e)) with embed_dim
        z_b = max_{i ∈ b} h_i, for each feature on its own
        logits_b = W z_b + b

    What is pooled are embeddings, not logits: the maximum of instance logits is another head. Tied instances share the
    gradient. There is no attention, and there are no instance logits, as the maxima of different features come from
    different instances.

    Shapes: instances [total, in_dim]; embedding [bags, embed_dim or in_dim].

    Args:
        in_dim: features per instance.
        n_classes: logits per bag.
        embed_dim: width of the hidden projection; None pools the instances as they are.
        dropout: probability on the embeddings h_i, before pooling.
        input_norm: "none", "layer" or "standardize".

    References:
        Wang, Yan, Tang, Bai, Liu, Revisiting multiple instance neural networks, Pattern Recognition 2018 (MI-Net).
        Deviations: one hidden layer or none instead of three; a logit per class instead of one sigmoid.

    Example:
        >>> head = MaxPool(in_dim=2, n_classes=2)
        >>> head(torch.tensor([[1.0, 5.0], [3.0, 3.0], [7.0, 7.0]]), torch.tensor([0, 2, 3])).embedding.tolist()
        [[3.0, 5.0], [7.0, 7.0]]
    """

    def aggregate(
        self, instances: Tensor, segments: Segments, coords: Tensor | None, generator: DrawSource
    ) -> BagOutput:
        """Pools instances [total, in_dim] into one embedding and one row of logits per bag."""
        embedded = self.projection(instances, generator)
        embedding = segment_max(embedded, segments)
        return BagOutput(self.classifier(embedding), embedding, None, None, {})
