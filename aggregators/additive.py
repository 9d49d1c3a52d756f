"""Additive MIL: bag logits that are exactly a sum over instances."""

from torch import Tensor, nn

from aggregators.base import Aggregator, BagOutput, Dropout, Projection
from aggregators.draws import DrawSource
from aggregators.errors import require
from aggregators.gated_attention import GatedAttention
from aggregators.registry import register_aggregator
from aggregators.segment import Segments, segment_softmax, segment_weighted_sum


@register_aggregator(
    "additive",
    paper="Javed, Juyal, Padigela, Taylor-Weiner, Yu, Prakash, Additive MIL: intrinsically interpretable multiple "
    "instance learning for pathology, NeurIPS 2022",
)
class AdditiveMIL(Aggregator):
    """Classifies every instance after attention has weighted it, and adds the results up.

        h_i = dropout(ReLU(W_e x_i + b_e)), or dropout(x_i) for embed_dim None
        a_i = softmax over b of s_i,  s_i = wᵀ (tanh(V h_i + b_V) ⊙ sigmoid(U h_i + b_U)) / temperature
        ψ(v) = W_2 dropout(ReLU(W_1 v))
        logits_b = Σ_{i ∈ b} (ψ(a_i h_i) + a_i b_2)

    Each term is what instance i contributes to each class, with its sign: an explanation that needs no gradient.
    ψ has no bias inside, so ψ(a h) = a ψ(h) for a ≥ 0: bag logits are the attention's average of the instance logits
    ψ(h_i) + b_2 and do not grow with the bag's size.

    Shapes: instances [total, in_dim]; attention [total, 1]; embedding [bags, dim] = Σ a_i h_i with dim = embed_dim or
    in_dim; instance_logits [total, classes] are ψ(h_i) + b_2; extras["contributions"] [total, classes] are the terms
    of the sum; extras["attention_scores"] [total, 1] are the s_i.

    Args:
        in_dim: features per instance.
        n_classes: logits per bag.
        embed_dim: width of the projection; None for none.
        attention_dim: width of V and U.
        hidden_dim: width of W_1; None leaves W_1 and its ReLU out, which makes the head ABMIL's equal.
        dropout: probability on the embeddings h_i and inside ψ.
        temperature: above 1 evens the attention out, below 1 sharpens it.
        input_norm: "none", "layer" or "standardize".

    References:
        Javed, Juyal, Padigela, Taylor-Weiner, Yu, Prakash, Additive MIL: intrinsically interpretable multiple instance
        learning for pathology, NeurIPS 2022.
        Deviations: no bias in ψ's hidden layer, and the output bias shared out by attention (the paper leaves both
        open; biases added once per instance would make logits grow with the bag). The embedding is not what the
        classifier reads; it is given for displays.

    Example:
        >>> head = AdditiveMIL(in_dim=16, n_classes=3, embed_dim=8).eval()
        >>> output = head(torch.randn(5, 16))
        >>> torch.allclose(output.extras["contributions"].sum(0), output.logits[0], atol=1e-6)
        True
    """

    def __init__(
        self,
        in_dim: int = 1024,
        n_classes: int = 4,
        embed_dim: int | None = 128,
        attention_dim: int = 64,
        hidden_dim: int | None = 64,
        dropout: float = 0.25,
        temperature: float = 1.0,
        input_norm: str = "none",
    ) -> None:
        super().__init__(in_dim, n_classes, input_norm)
        require(
            hidden_dim is None or hidden_dim >= 1,
            f"got hidden_dim {hidden_dim} → expected at least 1 → pass None for a linear ψ",
        )
        self.projection = Projection(in_dim, embed_dim, dropout)
        dim = self.projection.dim
        self.attention = GatedAttention(dim, attention_dim, temperature=temperature)
        self.hidden = None if hidden_dim is None else nn.Linear(dim, hidden_dim, bias=False)
        self.dropout = Dropout(dropout)
        self.classifier = nn.Linear(dim if hidden_dim is None else hidden_dim, n_classes)

    def aggregate(
        self, instances: Tensor, segments: Segments, coords: Tensor | None, generator: DrawSource
    ) -> BagOutput:
        """Weights instances [total, in_dim], classifies each, and adds their logits up per bag."""
        embedded = self.projection(instances, generator)  # [total, dim]
        scores = self.attention(embedded)  # [total, 1]
        attention = segment_softmax(scores, segments)
        hidden = embedded
        if self.hidden is not None:
            hidden = self.dropout(self.hidden(embedded).relu(), generator)
        instance_logits = self.classifier(hidden)  # [total, classes]
        logits = segment_weighted_sum(attention, instance_logits, segments).squeeze(1)
        embedding = segment_weighted_sum(attention, embedded, segments).squeeze(1)
        extras = {"attention_scores": scores, "contributions": attention * instance_logits}
        return BagOutput(logits, embedding, attention, instance_logits, extras)
