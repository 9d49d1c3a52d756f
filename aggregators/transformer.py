"""A pre-norm transformer with a class token, exact on ragged bags."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from aggregators.base import Aggregator, BagOutput, Dropout, Projection
from aggregators.draws import DrawSource, along
from aggregators.errors import OfficialStateError, require
from aggregators.norm import create_bag_norm, create_norm
from aggregators.official import official_tensors
from aggregators.positions import grid_cells, require_coords, sincos_code
from aggregators.registry import register_aggregator
from aggregators.segment import Segments, segment_softmax

_BLOCK_NAMES = ("norm.weight", "norm.bias", "attention.in_proj_weight", "attention.in_proj_bias",
                "attention.out_proj.weight", "attention.out_proj.bias")  # fmt: skip
_MLP_NAMES = ("mlp.0.weight", "mlp.0.bias", "mlp.3.weight", "mlp.3.bias", "norm2.weight", "norm2.bias")
_POSITIONS = ("none", "sincos")
_STEM_NAMES = {
    "patch_embed.0.weight": "projection.linear.weight",
    "patch_embed.0.bias": "projection.linear.bias",
    "norm.weight": "norm.weight",
    "norm.bias": "norm.bias",
    "classifier.weight": "classifier.weight",
    "classifier.bias": "classifier.bias",
}


class _MLP(nn.Module):
    """Two linear layers; GELU between them, or MIL-Lab's ReLU after each."""

    def __init__(self, dim: int, hidden_dim: int, dropout: float, official: bool) -> None:
        super().__init__()
        self.hidden = nn.Linear(dim, hidden_dim)
        self.out = nn.Linear(hidden_dim, dim)
        self.dropout = Dropout(dropout)
        self.official = official

    def forward(self, tokens: Tensor, generator: DrawSource) -> Tensor:
        hidden = self.hidden(tokens)
        active = hidden.relu() if self.official else functional.gelu(hidden)
        out: Tensor = self.out(self.dropout(active, generator))
        return out.relu() if self.official else out


class _Block(nn.Module):
    """One pre-norm block: tokens + attention(norm(tokens)), then + MLP(norm(...)) if there is one.

    The last block's MLP sees class tokens only, one row per bag.
    """

    def __init__(
        self, dim: int, heads: int, hidden_dim: int, dropout: float, official: bool, norm: str, last: bool
    ) -> None:
        super().__init__()
        create_mlp_norm = create_bag_norm if last else create_norm
        self.heads = heads
        self.norm = create_norm(norm, dim)
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim)
        self.mlp_norm = create_mlp_norm(norm, dim) if hidden_dim else None
        self.mlp = _MLP(dim, hidden_dim, dropout, official) if hidden_dim else None

    def forward(self, tokens: Tensor, segments: Segments, generator: DrawSource) -> Tensor:
        """Lets the tokens [total, dim] of each bag attend to each other."""
        normed = self.norm(tokens, segments)
        query = self._by_head(self.query(normed))
        key, value = (self._by_head(part) for part in self.key_value(normed).chunk(2, dim=1))
        attended = torch.cat([_attend(*bag) for bag in zip(*map(segments.split, (query, key, value)), strict=True)])
        return self._residual(tokens, attended, segments, generator)

    def class_tokens(self, tokens: Tensor, segments: Segments, generator: DrawSource) -> tuple[Tensor, Tensor]:
        """Computes the block for the class tokens only, which is all that the last block is asked for.

        Returns the class tokens [bags, dim] and the log of their attention to every token [total, heads].
        """
        normed = self.norm(tokens, segments)
        query = self._by_head(self.query(_first_rows(normed, segments)))  # [bags, heads, head_dim]
        key, value = (self._by_head(part) for part in self.key_value(normed).chunk(2, dim=1))
        bags = zip(query, segments.split(key), segments.split(value), strict=True)
        attended, log_attention = zip(*(_attend_once(*bag) for bag in bags), strict=True)
        first, one_each = _first_rows(tokens, segments), Segments((1,) * segments.bags)
        return self._residual(first, torch.stack(attended), one_each, generator), torch.cat(log_attention)

    def _residual(self, tokens: Tensor, attended: Tensor, segments: Segments, generator: DrawSource) -> Tensor:
        tokens = tokens + self.out(attended)
        if self.mlp is None or self.mlp_norm is None:
            return tokens
        updated: Tensor = tokens + self.mlp(self.mlp_norm(tokens, segments), along(generator, segments))
        return updated

    def _by_head(self, tokens: Tensor) -> Tensor:
        return tokens.reshape(tokens.shape[0], self.heads, -1)  # [total, heads, head_dim]


@register_aggregator(
    "transformer",
    paper="Dosovitskiy et al., An image is worth 16x16 words, ICLR 2021; "
    "Vaswani et al., Attention is all you need, NeurIPS 2017",
    cost="quadratic",
)
class TransformerAggregator(Aggregator):
    """Lets all instances of a bag attend to each other and reads the bag off a class token.

        t_0 = class token, t_i = dropout(ReLU(W_e x_i + b_e))
        depth times:  t ← t + W_o concat_h softmax(q_h k_hᵀ / √d_h) v_h + b_o,  q, k, v linear in LayerNorm(t)
                      t ← t + MLP(LayerNorm(t)), unless mlp_ratio is 0
        z_b = LayerNorm(t_0),  logits_b = W z_b + b

    With positions "sincos", t_i also gets the sine-cosine code of its tile's column and row in the bag's own grid (see
    aggregators.positions), so that it matters where a tile lies but not where the slide's bounds start. The order of
    instances does not matter either way. Attention runs bag by bag with torch's
    fused kernel, so that nothing crosses bags and memory stays linear in the instances while time is quadratic. In
    the last block only the class token is computed, as nothing else of it is read: same result, half the time at
    depth 2.

    The attention given out is the last block's from the class token to the instances, averaged over heads and
    rescaled so that a bag's instances sum to one (the class token's attention to itself is left out).

    Shapes: instances [total, in_dim]; embedding [bags, embed_dim]; attention [total, 1];
    extras["attention_scores"] [total, 1] is its log before rescaling (so exp of it, with
    the class token's share, sums to one).

    Args:
        in_dim: features per instance.
        n_classes: logits per bag.
        embed_dim: width of the tokens, a multiple of heads.
        depth: blocks.
        heads: attention heads per block.
        mlp_ratio: hidden width of the MLP over embed_dim; 0 for no MLP.
        dropout: probability on the embedded instances and inside the MLP; attention itself has none, as fused
            kernels on CPUs cannot drop.
        official: MIL-Lab's MLP, with ReLU instead of GELU and another ReLU after its last layer, so that it can only
            add to a token.
        norm: of all tokens of a bag: "layer", "instance", "batch" or "none" (aggregators/norm.py says when each is
            sound). Where only class tokens are normed, in the last block's MLP and at the end, "instance" and
            "batch" stand for "layer".
        positions: "none", or "sincos", which needs coords (level-0 px) in every forward.
        input_norm: "none", "layer" or "standardize".

    References:
        Dosovitskiy et al., An image is worth 16x16 words, ICLR 2021 (pre-norm blocks, class token).
        Vaswani et al., Attention is all you need, NeurIPS 2017.
        MIL-Lab's `Transformer` (mahmoodlab/MIL-Lab) is reproduced by from_official in its normal forward pass. In that
        code, asking for the attention changes the logits; here it never does.
        Deviations: positions are optional and not learned, no dropout on attention weights, ReLU after the embedding.

    Example:
        >>> head = TransformerAggregator(in_dim=16, n_classes=3, embed_dim=8, heads=2).eval()
        >>> output = head(torch.randn(5, 16), torch.tensor([0, 2, 5]))
        >>> output.logits.shape, output.attention.shape
        (torch.Size([2, 3]), torch.Size([5, 1]))
    """

    def __init__(
        self,
        in_dim: int = 1024,
        n_classes: int = 4,
        embed_dim: int = 256,
        depth: int = 2,
        heads: int = 4,
        mlp_ratio: float = 2.0,
        dropout: float = 0.1,
        official: bool = False,
        norm: str = "layer",
        positions: str = "none",
        input_norm: str = "none",
    ) -> None:
        super().__init__(in_dim, n_classes, input_norm)
        require(depth >= 1, f"got depth {depth} → expected at least 1 → pass 2 for the usual head")
        require(
            heads >= 1 and embed_dim >= 1 and embed_dim % heads == 0,
            f"got embed_dim {embed_dim} and heads {heads} → expected a positive multiple → try 256 and 4",
        )
        require(mlp_ratio >= 0, f"got mlp_ratio {mlp_ratio} → expected 0 or more → pass 0 for no MLP")
        require(positions in _POSITIONS, f"got positions {positions!r} → expected one of {_POSITIONS} → pick one")
        require(
            positions == "none" or embed_dim % 4 == 0,
            f"got embed_dim {embed_dim} with positions {positions!r} → expected a multiple of 4 → try 256",
        )
        hidden_dim = round(embed_dim * mlp_ratio)
        self.positions = positions
        self.projection = Projection(in_dim, embed_dim, dropout)
        self.class_token = nn.Parameter(torch.randn(1, embed_dim) * 0.02)
        shared = (embed_dim, heads, hidden_dim, dropout, official, norm)
        self.blocks = nn.ModuleList(_Block(*shared, last=False) for _ in range(depth - 1))
        self.last_block = _Block(*shared, last=True)
        self.norm = create_bag_norm(norm, embed_dim)
        self.classifier = nn.Linear(embed_dim, n_classes)

    def aggregate(
        self, instances: Tensor, segments: Segments, coords: Tensor | None, generator: DrawSource
    ) -> BagOutput:
        """Attends within each bag of instances [total, in_dim] and classifies the class tokens."""
        embedded = self.projection(instances, generator)
        if self.positions == "sincos":
            embedded = embedded + self._position_codes(coords, segments).to(embedded)
        tokens = torch.cat([row for bag in segments.split(embedded) for row in (self.class_token, bag)])
        token_segments = Segments(tuple(size + 1 for size in segments.sizes))
        for block in self.blocks:
            tokens = block(tokens, token_segments, generator)
        last, log_attention = self.last_block.class_tokens(tokens, token_segments, generator)
        embedding = self.norm(last, Segments((1,) * segments.bags))
        log_average = log_attention.logsumexp(1, keepdim=True) - math.log(self.last_block.heads)
        scores = _instance_rows(log_average, token_segments)  # [total, 1]
        attention = segment_softmax(scores, segments)
        return BagOutput(self.classifier(embedding), embedding, attention, None, {"attention_scores": scores})

    def _position_codes(self, coords: Tensor | None, segments: Segments) -> Tensor:
        return sincos_code(grid_cells(require_coords(coords, "transformer"), segments), self.class_token.shape[1])

    @classmethod
    def from_official(cls, state: Mapping[str, Tensor], heads: int) -> "TransformerAggregator":
        """Builds the head of a trained MIL-Lab `Transformer` with one embedding layer, with or without MLP.

        Args:
            state: the model's state dict.
            heads: its attention heads, which the state does not tell.

        Raises:
            OfficialStateError: parameters are missing or left over.
            HeadConfigError: heads does not divide the width.

        Example:
            >>> block = {"norm.weight": (4,), "norm.bias": (4,), "attention.in_proj_weight": (12, 4),
            ...          "attention.in_proj_bias": (12,), "attention.out_proj.weight": (4, 4),
            ...          "attention.out_proj.bias": (4,)}
            >>> stem = {"cls_token": (1, 1, 4), "patch_embed.0.weight": (4, 6), "patch_embed.0.bias": (4,),
            ...         "norm.weight": (4,), "norm.bias": (4,), "classifier.weight": (3, 4), "classifier.bias": (3,)}
            >>> shapes = stem | {f"blocks.0.{name}": shape for name, shape in block.items()}
            >>> state = {name: torch.zeros(shape) for name, shape in shapes.items()}
            >>> TransformerAggregator.from_official(state, heads=2)(torch.ones(5, 6)).logits.shape
            torch.Size([1, 3])
        """
        depth = sum(name.endswith("attention.in_proj_weight") for name in state)
        has_mlp = "blocks.0.mlp.0.weight" in state
        block_names = _BLOCK_NAMES + (_MLP_NAMES if has_mlp else ())
        expected = [f"blocks.{block}.{name}" for block in range(depth) for name in block_names]
        found = official_tensors(state, [*expected, *_STEM_NAMES, "cls_token"], "MIL-Lab's Transformer")
        if depth == 0:
            raise OfficialStateError("got no attention block → expected blocks.0.* → pass the model's whole state dict")
        embed_dim, in_dim = found["patch_embed.0.weight"].shape
        mlp_ratio = found["blocks.0.mlp.0.weight"].shape[0] / embed_dim if has_mlp else 0.0
        n_classes = found["classifier.weight"].shape[0]
        head = cls(in_dim, n_classes, embed_dim, depth, heads, mlp_ratio, official=True)
        renamed = {"class_token": found["cls_token"].reshape(1, -1)}
        renamed.update({ours: found[theirs] for theirs, ours in _STEM_NAMES.items()})
        for block in range(depth):
            ours = "last_block." if block == depth - 1 else f"blocks.{block}."
            renamed.update(_renamed_block(found, f"blocks.{block}.", ours, has_mlp))
        head.load_state_dict(renamed)
        return head


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Full attention within one bag: three times [tokens, heads, head_dim] → [tokens, dim]."""
    query, key, value = (part.transpose(0, 1).unsqueeze(0) for part in (query, key, value))
    attended = functional.scaled_dot_product_attention(query, key, value)  # [1, heads, tokens, head_dim]
    return attended.squeeze(0).transpose(0, 1).flatten(1)


def _attend_once(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of one query [heads, head_dim] over one bag → [dim] and log weights [tokens, heads]."""
    scores = torch.einsum("hd,thd->th", query, key) * query.shape[-1] ** -0.5
    dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
    log_weights = scores.log_softmax(0, dtype=dtype)
    attended = torch.einsum("th,thd->hd", log_weights.exp().to(value.dtype), value)
    return attended.flatten(), log_weights


def _first_rows(tokens: Tensor, segments: Segments) -> Tensor:
    return torch.stack([bag[0] for bag in segments.split(tokens)])


def _instance_rows(tokens: Tensor, segments: Segments) -> Tensor:
    return torch.cat([bag[1:] for bag in segments.split(tokens)])


def _renamed_block(found: Mapping[str, Tensor], theirs: str, ours: str, has_mlp: bool) -> dict[str, Tensor]:
    names = {"out": "attention.out_proj.", "norm": "norm."}
    if has_mlp:
        names.update({"mlp_norm": "norm2.", "mlp.hidden": "mlp.0.", "mlp.out": "mlp.3."})
    renamed = {}
    for kind in ("weight", "bias"):
        in_proj = found[f"{theirs}attention.in_proj_{kind}"]
        dim = in_proj.shape[0] // 3
        renamed[f"{ours}query.{kind}"], renamed[f"{ours}key_value.{kind}"] = in_proj[:dim], in_proj[dim:]
        renamed.update({f"{ours}{mine}.{kind}": found[f"{theirs}{name}{kind}"] for mine, name in names.items()})
    return renamed
