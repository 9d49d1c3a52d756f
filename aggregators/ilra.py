"""ILRA: instances of a bag talk to each other through a few latent vectors, then one query reads the bag."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from aggregators.base import Aggregator, BagOutput, Dropout
from aggregators.draws import DrawSource
from aggregators.errors import OfficialStateError, require
from aggregators.norm import create_bag_norm, create_norm
from aggregators.official import official_tensors
from aggregators.registry import register_aggregator
from aggregators.segment import Segments, segment_softmax, segment_weighted_sum

_LINEAR = ("weight", "bias")


class _Update(nn.Module):
    """What follows attention: o = norm(q + attended), o = norm(o + ReLU(W o + b)), gated by the asking row or not.

    The norms follow the asking rows: instances have statistics of their bag, latents are too few for any.
    """

    def __init__(self, ask_dim: int, dim: int, norm: str, gated: bool, latent: bool) -> None:
        super().__init__()
        create = create_bag_norm if latent else create_norm
        self.attention_norm = create(norm, dim)
        self.hidden = nn.Linear(dim, dim)
        self.hidden_norm = create(norm, dim)
        self.gate = nn.Linear(ask_dim, dim) if gated else None

    def forward(self, asking: Tensor, query: Tensor, attended: Tensor, segments: Segments) -> Tensor:
        """Maps asking rows [rows, ask_dim], their queries and what they attend to [rows, dim] to [rows, dim]."""
        updated = self.attention_norm(query + attended, segments)
        updated = self.hidden_norm(updated + self.hidden(updated).relu(), segments)
        gated: Tensor = updated if self.gate is None else updated * functional.silu(self.gate(asking))
        return gated


class _Gather(nn.Module):
    """Learned latents read each bag.

    The maps of keys and values are applied to the few latents and sums, not to the many instances: q·(W x) = (Wᵀ q)·x
    and Σ a (W x + b) = W (Σ a x) + b. A bias of the keys would change nothing.
    """

    def __init__(self, read_dim: int, dim: int, heads: int, latents: int, norm: str, gated: bool) -> None:
        super().__init__()
        self.heads = heads
        self.latents = nn.Parameter(torch.empty(latents, dim).uniform_(-(dim**-0.5), dim**-0.5))
        self.query = nn.Linear(dim, dim)
        self.head_query = nn.Linear(dim, dim)
        self.key = nn.Linear(read_dim, dim, bias=False)
        self.value = nn.Linear(read_dim, dim)
        self.out = nn.Linear(dim, dim)
        self.update = _Update(dim, dim, norm, gated, latent=True)

    def forward(self, read: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
        """Reads instances [total, read_dim].

        Returns rows [bags · latents, dim] and their scores [total, latents · heads].
        """
        query = self.query(self.latents)  # [latents, dim]
        by_head = self.head_query(query).reshape(len(query), self.heads, -1) * (query.shape[1] // self.heads) ** -0.5
        asked = torch.einsum("lhd,hdi->lhi", by_head, _by_head(self.key.weight, self.heads))
        scores = read @ asked.flatten(0, 1).T
        sums = segment_weighted_sum(segment_softmax(scores, segments), read, segments)
        sums = sums.reshape(-1, self.heads, read.shape[1])  # [bags · latents, heads, read_dim]
        values = torch.einsum("lhi,hdi->lhd", sums, _by_head(self.value.weight, self.heads)).flatten(1)
        attended = self.out(values + self.value.bias)
        repeated = (part.repeat(segments.bags, 1) for part in (self.latents, query))
        return self.update(*repeated, attended, Segments((len(self.latents),) * segments.bags)), scores


class _Spread(nn.Module):
    """The instances of each bag read its latents; the maps of queries and results are applied to the latents too."""

    def __init__(self, ask_dim: int, dim: int, heads: int, norm: str) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(ask_dim, dim)
        self.head_query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)
        self.update = _Update(ask_dim, dim, norm, gated=True, latent=False)

    def forward(self, asking: Tensor, segments: Segments, latents: Tensor) -> Tensor:
        """Maps asking instances [total, ask_dim] to [total, dim], each reading its bag's of latents [bags, l, dim]."""
        shape = (*latents.shape[:2], self.heads, -1)
        query = self.query(asking)
        key = self.key(latents).reshape(*shape) * (query.shape[1] // self.heads) ** -0.5
        value = self.value(latents).reshape(*shape)  # [bags, l, heads, head_dim]
        asked = torch.einsum("blhd,hdi->bhli", key, _by_head(self.head_query.weight, self.heads))
        shift = torch.einsum("blhd,hd->bhl", key, self.head_query.bias.reshape(self.heads, -1))
        answer = torch.einsum("blhd,ohd->bhlo", value, self.out.weight.reshape(query.shape[1], self.heads, -1))
        bags = zip(segments.split(query), asked, shift, answer, strict=True)
        attended = torch.cat([_attended(*bag) for bag in bags]) + self.out.bias
        updated: Tensor = self.update(asking, query, attended, segments)
        return updated


class _GatedBlock(nn.Module):
    """GAB: `rank` latents read the instances, then the instances read the latents."""

    def __init__(self, in_dim: int, dim: int, heads: int, rank: int, norm: str) -> None:
        super().__init__()
        self.gather = _Gather(in_dim, dim, heads, rank, norm, gated=True)
        self.spread = _Spread(in_dim, dim, heads, norm)

    def forward(self, instances: Tensor, segments: Segments) -> Tensor:
        """Maps instances [total, in_dim] to [total, dim]."""
        gathered, _ = self.gather(instances, segments)
        spread: Tensor = self.spread(instances, segments, gathered.reshape(segments.bags, -1, gathered.shape[1]))
        return spread


@register_aggregator(
    "ilra",
    paper="Xiang, Zhang, Exploring low-rank property in multiple instance learning for whole slide image "
    "classification, ICLR 2023",
)
class ILRA(Aggregator):
    """Passes the instances of a bag through a few latents and back, then reads the bag with one learned query.

        depth times:  l = A(latents, x),  x ← A(x, l)              GAB, A gated; x starts as the instances
        z_b = A(s, x),  not gated, s one learned query             non-local pooling
        logits_b = W z_b + b

        A(u, v):  q = W_q u + b_q
                  o = norm(q + W_o concat_h softmax(q'_h k_hᵀ / √d_h) v_h + b_o),  q' linear in q, k and v linear in v
                  o ← norm(o + ReLU(W_r o + b_r))
                  o ⊙ SiLU(W_g u + b_g) where gated, else o

    As every instance sees the others through `rank` latents only, what the bag adds to an instance has low rank, and
    time and memory are linear in the instances: each keeps rank · heads weights per block and direction. The maps of
    keys, values and results are applied to the latents instead of the instances, which gives the same and takes a
    fraction of the work while rank · heads is below embed_dim. There are no positions: the order of instances does
    not matter.

    The attention given out is the pooling's, averaged over heads.

    Shapes: instances [total, in_dim]; embedding [bags, embed_dim]; attention [total, 1]; extras["attention_scores"]
    [total, 1] is its log.

    Args:
        in_dim: features per instance.
        n_classes: logits per bag.
        embed_dim: width after the first block, a multiple of heads; 256 in the published code.
        depth: gated attention blocks.
        heads: attention heads.
        rank: latents per block.
        dropout: probability on the instances between blocks and before the pooling.
        norm: "layer", "instance", "batch" or "none", see aggregators.norm. Latents and pooled rows are few per bag
            and get a LayerNorm unless there is none. With "instance" all bags of one instance come out alike.
            Without norms ("none", the published default) outputs grow with the inputs' size without bound.
        input_norm: "none", "layer" or "standardize".

    References:
        Xiang, Zhang, Exploring low-rank property in multiple instance learning for whole slide image classification,
        ICLR 2023. The contrastive training of the backbone in that paper is not part of the head.
        Deviations from the authors' code (jinxixiang/low_rank_wsi): where it maps keys and values linearly twice in
        a row, one map does the same. Weights and latents start uniform within ±1 / √width. Defaults embed_dim
        128 and norm "layer" (theirs: 256 and none, or LayerNorm for Camelyon16). Dropout is an addition.

    Example:
        >>> head = ILRA(in_dim=16, n_classes=3, embed_dim=8, heads=2).eval()
        >>> output = head(torch.randn(5, 16), torch.tensor([0, 2, 5]))
        >>> output.logits.shape, output.attention.shape
        (torch.Size([2, 3]), torch.Size([5, 1]))
    """

    def __init__(
        self,
        in_dim: int = 1024,
        n_classes: int = 4,
        embed_dim: int = 128,
        depth: int = 2,
        heads: int = 8,
        rank: int = 2,
        dropout: float = 0.0,
        norm: str = "layer",
        input_norm: str = "none",
    ) -> None:
        super().__init__(in_dim, n_classes, input_norm)
        require(depth >= 1, f"got depth {depth} → expected at least 1 → pass 2 for the published head")
        require(rank >= 1, f"got rank {rank} → expected at least 1 → pass 2 for the published head")
        require(
            heads >= 1 and embed_dim >= 1 and embed_dim % heads == 0,
            f"got embed_dim {embed_dim} and heads {heads} → expected a positive multiple → try 128 and 8",
        )
        widths = [in_dim] + [embed_dim] * (depth - 1)
        self.blocks = nn.ModuleList(_GatedBlock(width, embed_dim, heads, rank, norm) for width in widths)
        self.dropout = Dropout(dropout)
        self.pooling = _Gather(embed_dim, embed_dim, heads, 1, norm, gated=False)
        self.classifier = nn.Linear(embed_dim, n_classes)

    def aggregate(
        self, instances: Tensor, segments: Segments, coords: Tensor | None, generator: DrawSource
    ) -> BagOutput:
        """Mixes the instances [total, in_dim] of each bag and pools them into one row of logits per bag."""
        mixed = instances
        for block in self.blocks:
            mixed = self.dropout(block(mixed, segments), generator)
        embedding, scores = self.pooling(mixed, segments)
        dtype = torch.promote_types(scores.dtype, torch.float32)
        log_attention = torch.cat([bag.log_softmax(0) for bag in segments.split(scores.to(dtype))])
        scores = log_attention.logsumexp(1, keepdim=True) - math.log(scores.shape[1])  # [total, 1]
        attention = segment_softmax(scores, segments)
        return BagOutput(self.classifier(embedding), embedding, attention, None, {"attention_scores": scores})

    @classmethod
    def from_official(cls, state: Mapping[str, Tensor], heads: int) -> "ILRA":
        """Builds the head of a trained ILRA of the authors' code, with or without LayerNorm.

        Args:
            state: the model's state dict.
            heads: its attention heads, which the state does not tell; 8 in the published code.

        Raises:
            OfficialStateError: parameters are missing or left over.
            HeadConfigError: heads does not divide the width.

        Example:
            >>> unit = {"multihead_attn.in_proj": (12, 4), "multihead_attn.out_proj.": (4, 4), "fc_q.": (4, 4),
            ...         "fc_k.": (4, 4), "fc_v.": (4, 4), "fc_o.": (4, 4), "gate.0.": (4, 4)}
            >>> state = {"pooling.S": torch.zeros(1, 1, 4), "gab_blocks.0.latent": torch.zeros(1, 2, 4)}
            >>> for part in ("gab_blocks.0.project_forward.", "gab_blocks.0.project_backward.", "pooling.mha."):
            ...     for name, shape in unit.items():
            ...         if part != "pooling.mha." or name != "gate.0.":
            ...             joint = "_" if name.endswith("in_proj") else ""
            ...             state[f"{part}{name}{joint}weight"] = torch.zeros(shape)
            ...             state[f"{part}{name}{joint}bias"] = torch.zeros(shape[0])
            >>> state |= {"classifier.weight": torch.zeros(3, 4), "classifier.bias": torch.zeros(3)}
            >>> ILRA.from_official(state, heads=2)(torch.ones(5, 4)).logits.shape
            torch.Size([1, 3])
        """
        depth = sum(name.endswith(".latent") for name in state)
        if depth == 0:
            raise OfficialStateError("got no latents → expected gab_blocks.0.latent → pass the model's own state dict")
        has_norm = "pooling.mha.ln0.weight" in state
        units = _official_units(depth)
        names = [name for theirs in units for name in _unit_names(theirs, has_norm)]
        latents = [f"gab_blocks.{block}.latent" for block in range(depth)]
        expected = [*names, *latents, "pooling.S", *(f"classifier.{kind}" for kind in _LINEAR)]
        found = official_tensors(state, expected, "ILRA")
        embed_dim, in_dim = found["gab_blocks.0.project_forward.fc_k.weight"].shape
        n_classes, rank = found["classifier.weight"].shape[0], found[latents[0]].shape[1]
        head = cls(in_dim, n_classes, embed_dim, depth, heads, rank, norm="layer" if has_norm else "none")
        renamed = {f"classifier.{kind}": found[f"classifier.{kind}"] for kind in _LINEAR}
        renamed["pooling.latents"] = found["pooling.S"][0]
        renamed.update({f"blocks.{block}.gather.latents": found[name][0] for block, name in enumerate(latents)})
        for theirs, ours in units.items():
            renamed.update(_renamed_unit(found, theirs, ours, has_norm))
        head.load_state_dict(renamed)
        return head


def _by_head(weight: Tensor, heads: int) -> Tensor:
    return weight.reshape(heads, -1, weight.shape[1])  # [heads, head_dim, in_dim]


def _attended(query: Tensor, asked: Tensor, shift: Tensor, answer: Tensor) -> Tensor:
    """One bag's instances read its latents: [n, dim], twice [heads, l, dim] and shift [heads, l] → [n, dim]."""
    scores = torch.addmm(shift.flatten(), query, asked.flatten(0, 1).T)
    weights = scores.reshape(-1, *shift.shape).softmax(2)  # [n, heads, l]
    attended: Tensor = weights.flatten(1) @ answer.flatten(0, 1)
    return attended


def _official_units(depth: int) -> dict[str, str]:
    """Published prefix → ours, of every attention unit."""
    units = {"pooling.mha.": "pooling."}
    for block in range(depth):
        units[f"gab_blocks.{block}.project_forward."] = f"blocks.{block}.gather."
        units[f"gab_blocks.{block}.project_backward."] = f"blocks.{block}.spread."
    return units


def _unit_names(theirs: str, has_norm: bool) -> list[str]:
    layers = ["multihead_attn.in_proj_", "multihead_attn.out_proj.", "fc_q.", "fc_k.", "fc_v.", "fc_o."]
    layers += ["ln0.", "ln1."] if has_norm else []
    layers += [] if theirs == "pooling.mha." else ["gate.0."]
    return [f"{theirs}{layer}{kind}" for layer in layers for kind in _LINEAR]


def _renamed_unit(found: Mapping[str, Tensor], theirs: str, ours: str, has_norm: bool) -> dict[str, Tensor]:
    """Renames one unit's parameters and merges the two maps in a row of its keys and of its values."""
    same = {"query": "fc_q", "out": "multihead_attn.out_proj", "update.hidden": "fc_o"}
    same |= {"update.attention_norm": "ln0", "update.hidden_norm": "ln1"} if has_norm else {}
    same |= {} if theirs == "pooling.mha." else {"update.gate": "gate.0"}
    renamed = {
        f"{ours}{mine}.{kind}": found[f"{theirs}{name}.{kind}"] for mine, name in same.items() for kind in _LINEAR
    }
    weights = found[f"{theirs}multihead_attn.in_proj_weight"].double().chunk(3)
    biases = found[f"{theirs}multihead_attn.in_proj_bias"].double().chunk(3)
    renamed |= {f"{ours}head_query.weight": weights[0], f"{ours}head_query.bias": biases[0]}
    for index, (mine, name) in enumerate((("key", "fc_k"), ("value", "fc_v")), start=1):
        inner = [found[f"{theirs}{name}.{kind}"].double() for kind in _LINEAR]
        renamed[f"{ours}{mine}.weight"] = weights[index] @ inner[0]
        renamed[f"{ours}{mine}.bias"] = weights[index] @ inner[1] + biases[index]
    if "spread" not in ours:
        del renamed[f"{ours}key.bias"]  # a latent's scores all shift alike
    return renamed
