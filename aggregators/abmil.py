"""Attention-based MIL pooling, gated or not."""

from collections.abc import Mapping

from torch import Tensor, nn

from aggregators.base import Aggregator, BagOutput, Projection
from aggregators.draws import DrawSource
from aggregators.gated_attention import GatedAttention
from aggregators.official import official_tensors
from aggregators.registry import register_aggregator
from aggregators.segment import Segments, segment_softmax, segment_weighted_sum

_GATED_NAMES = {
    "attention.v": "attention_V.0",
    "attention.u": "attention_U.0",
    "attention.w": "attention_w",
    "classifier": "classifier.0",
}
_PLAIN_NAMES = {"attention.v": "attention.0", "attention.w": "attention.2", "classifier": "classifier.0"}


@register_aggregator(
    "abmil", paper="Ilse, Tomczak, Welling, Attention-based deep multiple instance learning, ICML 2018"
)
class ABMIL(Aggregator):
    """Weights the instances of a bag by a small network that scores them, then classifies the weighted sum.

        h_i = dropout(ReLU(W_e x_i + b_e)), or dropout(x_i) for embed_dim None
        s_ik = w_kᵀ tanh(V h_i + b_V) / temperature                            plain
        s_ik = w_kᵀ (tanh(V h_i + b_V) ⊙ sigmoid(U h_i + b_U)) / temperature   gated
        a_ik = exp(s_ik) / Σ_{j ∈ b} exp(s_jk)
        z_b = concat_k Σ_{i ∈ b} a_ik h_i
        logits_b = W z_b + b

    Shapes: instances [total, in_dim]; attention [total, branches]; embedding [bags, branches · dim] with dim =
    embed_dim or in_dim; extras["attention_scores"] [total, branches] are the s_ik.
    Memory is linear in the instances.

    Args:
        in_dim: features per instance.
        n_classes: logits per bag.
        embed_dim: width of the projection that is trained with the head; None, as in the paper, for none.
        attention_dim: width of V and U.
        gated: multiplies by the sigmoid gate.
        branches: attention distributions per bag, each with its own w_k; V and U are shared.
        dropout: probability on the embeddings h_i.
        temperature: above 1 evens the attention out, below 1 sharpens it.
        input_norm: "none", "layer" or "standardize".

    References:
        Ilse, Tomczak, Welling, Attention-based deep multiple instance learning, ICML 2018.
        Deviations from the paper: V, U and the projection have biases, as in the authors' code
        (AMLab-Amsterdam/AttentionDeepMIL); w has none, there or here, that matters: the softmax removes a constant.
        Projection, dropout and temperature are additions; embed_dim=None, dropout=0 is the paper's head.
        Several branches are concatenated, as in the authors' code.

    Example:
        >>> head = ABMIL(in_dim=16, n_classes=3, embed_dim=8, branches=2).eval()
        >>> output = head(torch.randn(5, 16), torch.tensor([0, 2, 5]))
        >>> output.logits.shape, output.embedding.shape
        (torch.Size([2, 3]), torch.Size([2, 16]))
        >>> output.attention[:2].sum(0).round(decimals=4).tolist()
        [1.0, 1.0]
    """

    def __init__(
        self,
        in_dim: int = 1024,
        n_classes: int = 4,
        embed_dim: int | None = 128,
        attention_dim: int = 64,
        gated: bool = True,
        branches: int = 1,
        dropout: float = 0.5,
        temperature: float = 1.0,
        input_norm: str = "none",
    ) -> None:
        super().__init__(in_dim, n_classes, input_norm)
        self.branches = branches
        self.projection = Projection(in_dim, embed_dim, dropout)
        self.attention = GatedAttention(self.projection.dim, attention_dim, branches, temperature, gated)
        self.classifier = nn.Linear(branches * self.projection.dim, n_classes)

    def aggregate(
        self, instances: Tensor, segments: Segments, coords: Tensor | None, generator: DrawSource
    ) -> BagOutput:
        """Weights instances [total, in_dim] into one embedding and one row of logits per bag."""
        embedded = self.projection(instances, generator)  # [total, dim]
        scores = self.attention(embedded)  # [total, branches]
        attention = segment_softmax(scores, segments)
        embedding = segment_weighted_sum(attention, embedded, segments).flatten(1)  # [bags, branches · dim]
        return BagOutput(self.classifier(embedding), embedding, attention, None, {"attention_scores": scores})

    @classmethod
    def from_official(cls, state: Mapping[str, Tensor]) -> "ABMIL":
        """Builds the head of a trained AttentionDeepMIL model, `Attention` or `GatedAttention`.

        in_dim is the width of the model's instance features (its convolutions, `feature_extractor_*`, are not part
        of the head and are skipped). The classifier keeps its single logit: sigmoid(logits[:, 0]) is the
        probability of the positive class. The bias of the score layer is dropped, as it changes nothing.

        Raises:
            OfficialStateError: parameters are missing or left over.

        Example:
            >>> shapes = {"attention.0.weight": (4, 6), "attention.0.bias": (4,), "attention.2.weight": (1, 4),
            ...           "attention.2.bias": (1,), "classifier.0.weight": (1, 6), "classifier.0.bias": (1,)}
            >>> head = ABMIL.from_official({name: torch.zeros(shape) for name, shape in shapes.items()})
            >>> head(torch.ones(3, 6)).logits.shape
            torch.Size([1, 1])
        """
        gated = "attention_V.0.weight" in state
        names = _GATED_NAMES if gated else _PLAIN_NAMES
        expected = {
            f"{theirs}.{kind}": f"{ours}.{kind}" for ours, theirs in names.items() for kind in ("weight", "bias")
        }
        found = official_tensors(state, expected, "AttentionDeepMIL", ("feature_extractor_",))
        renamed = {expected[name]: value for name, value in found.items()}
        del renamed["attention.w.bias"]
        attention_dim, in_dim = renamed["attention.v.weight"].shape
        branches, n_classes = renamed["attention.w.weight"].shape[0], renamed["classifier.weight"].shape[0]
        head = cls(in_dim, n_classes, None, attention_dim, gated, branches, dropout=0.0)
        head.load_state_dict(renamed)
        return head
