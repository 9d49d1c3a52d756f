"""Instance-level maximum: the bag's logits are those of its highest instance."""

from collections.abc import Mapping

import torch
from torch import Tensor

from aggregators.base import BagOutput
from aggregators.draws import DrawSource
from aggregators.errors import OfficialStateError, require
from aggregators.instance import InstanceHead
from aggregators.official import official_tensors
from aggregators.registry import register_aggregator
from aggregators.segment import Segments, segment_max

# projection and classifier of each published code
_LAYOUTS = {
    "CLAM's MIL_fc": ("fc.0", "classifier"),
    "CLAM's MIL_fc_mc": ("fc.0", "classifiers"),
    "ACMIL's MaxMIL": ("head.0", "head.3"),
}


@register_aggregator(
    "instance_max",
    paper="Campanella et al., Clinical-grade computational pathology using weakly supervised deep learning on whole "
    "slide images, Nature Medicine 2019",
)
class InstanceMax(InstanceHead):
    """Takes the largest logit of every class over the instances of a bag.

        h_i = dropout(x_i), or dropout(ReLU(W_e x_i + b_e)) with embed_dim
        l_i = W h_i + b
        logits_b = max_{i ∈ b} l_i, for each class on its own

    With official=True, as in CLAM's max-pooling baseline, one instance speaks for the bag with all its logits: the
    one with the largest softmax probability of class 1 if there are two classes, of any class if there are more.

    Tied instances share the gradient (official: the first takes it). There is no attention.

    Shapes: instances [total, in_dim]; instance_logits [total, classes]; embedding [bags, classes] are the logits,
    with official=True [bags, embed_dim or in_dim] is the chosen instance's h_i.

    Args:
        in_dim: features per instance.
        n_classes: logits per bag; at least two with official=True.
        embed_dim: width of the hidden projection; None scores the instances as they are.
        dropout: probability on the embeddings h_i.
        official: one instance per bag gives all its logits, as in CLAM.
        input_norm: "none", "layer" or "standardize".

    References:
        Campanella et al., Clinical-grade computational pathology using weakly supervised deep learning on whole slide
        images, Nature Medicine 2019.
        The codes of CLAM (mahmoodlab/CLAM: MIL_fc, MIL_fc_mc) and ACMIL (dazhangyu123/ACMIL: MaxMIL) are reproduced
        by from_official.
        Deviations: embeddings are given, where the paper trains the network that makes them.

    Example:
        >>> head = InstanceMax(in_dim=2, n_classes=3)
        >>> output = head(torch.randn(5, 2))
        >>> torch.equal(output.logits[0], output.instance_logits.amax(0))
        True
    """

    def __init__(
        self,
        in_dim: int = 1024,
        n_classes: int = 4,
        embed_dim: int | None = None,
        dropout: float = 0.0,
        official: bool = False,
        input_norm: str = "none",
    ) -> None:
        super().__init__(in_dim, n_classes, embed_dim, dropout, input_norm)
        require(
            n_classes >= 2 or not official,
            f"got n_classes {n_classes} with official=True → expected at least 2, as it ranks instances by a softmax "
            "over classes → pass official=False for one logit",
        )
        self.official = official

    def aggregate(
        self, instances: Tensor, segments: Segments, coords: Tensor | None, generator: DrawSource
    ) -> BagOutput:
        """Scores instances [total, in_dim] and takes the highest."""
        if not self.official:
            return super().aggregate(instances, segments, coords, generator)
        embedded = self.projection(instances, generator)
        instance_logits = self.classifier(embedded)  # [total, classes]
        probabilities = instance_logits.softmax(1)
        ranks = probabilities[:, 1] if self.n_classes == 2 else probabilities.amax(1)
        chosen = [bag.argmax() for bag in segments.split(ranks)]

        def pick(values: Tensor) -> Tensor:
            return torch.stack([bag[row] for bag, row in zip(segments.split(values), chosen, strict=True)])

        return BagOutput(pick(instance_logits), pick(embedded), None, instance_logits, {})

    def pool(self, instance_logits: Tensor, segments: Segments) -> Tensor:
        """Maps instance logits [total, classes] to bag logits [bags, classes]."""
        return segment_max(instance_logits, segments)

    @classmethod
    def from_official(cls, state: Mapping[str, Tensor]) -> "InstanceMax":
        """Builds the head of a trained CLAM `MIL_fc` or `MIL_fc_mc`, or of an ACMIL `MaxMIL`.

        The state's names tell which it is; the two of CLAM come with official=True.

        Raises:
            OfficialStateError: parameters are missing or left over.

        Example:
            >>> shapes = {"fc.0.weight": (4, 6), "fc.0.bias": (4,)}
            >>> shapes |= {"classifier.weight": (2, 4), "classifier.bias": (2,)}
            >>> head = InstanceMax.from_official({name: torch.zeros(shape) for name, shape in shapes.items()})
            >>> head(torch.ones(3, 6)).logits.shape, head.official
            (torch.Size([1, 2]), True)
        """
        source = next((name for name, parts in _LAYOUTS.items() if f"{parts[1]}.weight" in state), None)
        if source is None:
            raise OfficialStateError(
                f"got a state dict of {', '.join(sorted(state)) or 'nothing'} → expected that of "
                f"{' or '.join(_LAYOUTS)} → pass the model's own state_dict, unrenamed"
            )
        theirs = dict(zip(_LAYOUTS[source], ("projection.linear", "classifier"), strict=True))
        names = {f"{layer}.{kind}": f"{ours}.{kind}" for layer, ours in theirs.items() for kind in ("weight", "bias")}
        renamed = {names[name]: value for name, value in official_tensors(state, names, source).items()}
        embed_dim, in_dim = renamed["projection.linear.weight"].shape
        n_classes = renamed["classifier.weight"].shape[0]
        head = cls(in_dim, n_classes, embed_dim, official=source.startswith("CLAM"))
        head.load_state_dict(renamed)
        return head
