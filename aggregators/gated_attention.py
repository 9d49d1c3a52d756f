"""The small network that scores instances, as several published heads use it."""

from torch import Tensor, nn

from aggregators.base import Dropout
from aggregators.draws import DrawSource
from aggregators.errors import require


class GatedAttention(nn.Module):
    """Scores every instance by a small network, with the sigmoid gate or plain.

        s_ik = w_kᵀ (dropout(tanh(V h_i + b_V)) ⊙ dropout(sigmoid(U h_i + b_U))) / temperature   gated
        s_ik = w_kᵀ dropout(tanh(V h_i + b_V)) / temperature                                      plain

    w has no bias, because the softmax that follows removes a constant.

    Shapes: [total, dim] → [total, branches].

    Args:
        dim: width of the instances.
        attention_dim: width of V and U.
        branches: scores per instance, each with its own w_k; V and U are shared.
        temperature: above 1 evens the attention out, below 1 sharpens it.
        gated: multiplies by the sigmoid gate.
        dropout: probability on both hidden layers.

    Raises:
        HeadConfigError: a value is out of range.

    References:
        Ilse, Tomczak, Welling, Attention-based deep multiple instance learning, ICML 2018.

    Example:
        >>> GatedAttention(8, attention_dim=4, branches=2)(torch.zeros(5, 8)).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        dim: int,
        attention_dim: int,
        branches: int = 1,
        temperature: float = 1.0,
        gated: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        require(attention_dim >= 1, f"got attention_dim {attention_dim} → expected at least 1 → try 128")
        require(branches >= 1, f"got branches {branches} → expected at least 1 → pass 1 for a single distribution")
        require(temperature > 0, f"got temperature {temperature} → expected above 0 → pass 1 for a plain softmax")
        self.temperature = temperature
        self.v = nn.Linear(dim, attention_dim)
        self.u = nn.Linear(dim, attention_dim) if gated else None
        self.w = nn.Linear(attention_dim, branches, bias=False)
        self.dropout = Dropout(dropout)

    def forward(self, instances: Tensor, generator: DrawSource = None) -> Tensor:
        """Maps [total, dim] to scores [total, branches], before any softmax."""
        hidden = self.dropout(self.v(instances).tanh(), generator)  # [total, attention_dim]
        if self.u is not None:
            hidden = hidden * self.dropout(self.u(instances).sigmoid(), generator)
        scores: Tensor = self.w(hidden)
        return scores / self.temperature


def official_attention_names(theirs: str, ours: str) -> dict[str, str]:
    """Returns official parameter name → ours, for the module called `theirs` there and `ours` here.

    The bias of the last layer is not in it: it changes no attention.

    Example:
        >>> official_attention_names("attention.", "scorer.")["attention.attention_V.0.bias"]
        'scorer.v.bias'
    """
    layers = {"attention_V.0": "v", "attention_U.0": "u"}
    names = {f"{theirs}{a}.{kind}": f"{ours}{b}.{kind}" for a, b in layers.items() for kind in ("weight", "bias")}
    return {**names, f"{theirs}attention_weights.weight": f"{ours}w.weight"}
