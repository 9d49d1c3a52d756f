"""TransMIL: Nyström attention and convolutions over a bag laid out as a square, exact on ragged bags.

The file is longer than 400 lines because a head is one file, and this one has an attention and a layout of its own.
"""

import math
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from aggregators.base import Aggregator, BagOutput, Dropout, Projection
from aggregators.draws import DrawSource, along, one_each
from aggregators.errors import require
from aggregators.norm import create_bag_norm, create_norm
from aggregators.official import official_tensors
from aggregators.registry import register_aggregator
from aggregators.segment import Segments, segment_softmax

_VERSIONS = ("0.0.14", "0.0.9")
_REACH = 16  # the convolution of the values sees this many tokens on either side
_GRID_KERNELS = (7, 5, 3)
_INVERSE_STEPS = 6
_JOINT_NAMES = {"block": "layer1.attn.to_qkv.weight", "last_block": "layer2.attn.to_qkv.weight"}
_OFFICIAL_NAMES = {
    "_fc1.0.weight": "projection.linear.weight",
    "_fc1.0.bias": "projection.linear.bias",
    "cls_token": "class_token",
    **{
        f"layer{layer}.{theirs}": f"{block}.{ours}"
        for layer, block in ((1, "block"), (2, "last_block"))
        for theirs, ours in (
            ("norm.weight", "norm.weight"),
            ("norm.bias", "norm.bias"),
            ("attn.to_out.0.weight", "out.weight"),
            ("attn.to_out.0.bias", "out.bias"),
            ("attn.res_conv.weight", "neighbours.weight"),
        )
    },
    **{
        f"pos_layer.{theirs}.{kind}": f"positions.{ours}.{kind}"
        for theirs, ours in (("proj", "wide"), ("proj1", "middle"), ("proj2", "narrow"))
        for kind in ("weight", "bias")
    },
    "norm.weight": "norm.weight",
    "norm.bias": "norm.bias",
    "_fc2.weight": "classifier.weight",
    "_fc2.bias": "classifier.bias",
}


class _NystromBlock(nn.Module):
    """One pre-norm block: tokens + dropout(W_o attention(norm(tokens)) + b_o), with Nyström attention."""

    def __init__(self, dim: int, heads: int, landmarks: int, dropout: float, version: str | None, norm: str) -> None:
        super().__init__()
        self.heads, self.landmarks, self.version = heads, landmarks, version
        self.norm = create_norm(norm, dim)
        self.query = nn.Linear(dim, dim, bias=False)
        self.key_value = nn.Linear(dim, 2 * dim, bias=False)
        self.neighbours = nn.Conv2d(heads, heads, (2 * _REACH + 1, 1), padding=(_REACH, 0), groups=heads, bias=False)
        self.out = nn.Linear(dim, dim)
        self.dropout = Dropout(dropout)

    def forward(self, tokens: Tensor, segments: Segments, generator: DrawSource) -> Tensor:
        """Lets the tokens [total, dim] of each bag attend to each other."""
        attended = torch.cat([self._attended(*bag, len(bag[0])) for bag in self._bags(tokens, segments)])
        updated: Tensor = tokens + self.dropout(self.out(attended), along(generator, segments))
        return updated

    def class_tokens(self, tokens: Tensor, segments: Segments, generator: DrawSource) -> tuple[Tensor, Tensor]:
        """Computes the block for the class tokens only, which is all that the last block is asked for.

        Returns the class tokens [bags, dim] and the log of their attention to every token [total, heads].
        """
        bags = self._bags(tokens, segments)
        attended = torch.cat([self._attended(*bag, rows=1) for bag in bags])
        first = torch.stack([bag[0] for bag in segments.split(tokens)])
        updated = first + self.dropout(self.out(attended), one_each(generator, segments.bags))
        return updated, torch.cat([self._log_attention(normed, key) for normed, key, _ in bags])

    def one_bag(self, tokens: Tensor, last: bool) -> tuple[Tensor, Tensor]:
        """Computes the block for one bag [tokens, dim], in operations that are the same for every size of it.

        A bag of no more tokens than landmarks has a mean for each of them, and what is solved for is their values.

        Returns the updated tokens, of which there is the first alone if `last`, and the attention of the first token
        to all [tokens].
        """
        normed = self.norm(tokens, Segments((tokens.shape[0],)))
        key, value = (self._by_head(part) for part in self.key_value(normed).chunk(2, dim=1))
        runs = _one_hot_runs(tokens, self.landmarks)  # [landmarks, tokens]
        filled = runs.sum(1)
        means = runs / filled.clamp(min=1).unsqueeze(1)
        mean_query, mean_key = self._by_head(self.query(means @ normed)), means @ key
        asked = self._by_head(self.query(normed[:1] if last else normed))
        scale = key.shape[2] ** -0.5
        between = (mean_query @ mean_key.mT * scale).softmax(2)
        gathered = (mean_query @ key.mT * scale).softmax(2) @ value  # [heads, landmarks, head_dim]
        exact = (filled <= 1).all()
        solved = torch.where(exact, means @ value, torch.bmm(_pseudo_inverse(between), gathered))
        scores = torch.where(filled > 0, asked @ mean_key.mT * scale, torch.finfo(key.dtype).min)
        nearby = self.neighbours(value.unsqueeze(0))[0]
        attended = scores.softmax(2) @ solved + (nearby[:, :1] if last else nearby)
        updated = (tokens[:1] if last else tokens) + self.out(attended.transpose(0, 1).flatten(1))
        return updated, (key @ asked[:, :1].mT * scale).softmax(1).mean(0).squeeze(1)

    def _bags(self, tokens: Tensor, segments: Segments) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Returns per bag its normed tokens, keys and values, each [tokens, dim]."""
        normed = self.norm(tokens, segments)
        parts = (normed, *self.key_value(normed).chunk(2, dim=1))
        return list(zip(*map(segments.split, parts), strict=True))

    def _attended(self, normed: Tensor, key: Tensor, value: Tensor, rows: int) -> Tensor:
        """Attends within one bag for its first `rows` tokens → [rows, dim]."""
        padding, first = self._padding(len(normed))
        normed, key, value = (_padded(part, padding) for part in (normed, key, value))
        key, value = self._by_head(key), self._by_head(value)
        end = first + rows
        asked = self._by_head(self.query(normed[first:end]))
        if self.version is None and len(normed) <= self.landmarks:  # landmarks would save nothing
            attended = _softmax_attention(asked, key, value)
        else:
            mean_query = self._by_head(self.query(_run_means(normed, self.landmarks)))
            attended = nystrom_attention(asked, mean_query, key, value)
        nearby = self.neighbours(value[:, : end + _REACH].unsqueeze(0))[0, :, first:end]
        by_row: Tensor = (attended + nearby).transpose(0, 1)
        return by_row.flatten(1)

    def _log_attention(self, normed: Tensor, key: Tensor) -> Tensor:
        """Log of the softmax that Nyström approximates, for one bag's class token → [tokens, heads]."""
        padding, first = self._padding(len(normed))
        row = _padded(normed[:1], padding)[first]
        query = self.query(row).reshape(self.heads, -1, 1)
        keys = self._by_head(_padded(key, padding))
        scores = (keys @ query).squeeze(2) * query.shape[1] ** -0.5
        log_weights: Tensor = scores.log_softmax(1, dtype=torch.promote_types(scores.dtype, torch.float32))
        return log_weights[:, padding:].T

    def _by_head(self, tokens: Tensor) -> Tensor:
        return tokens.reshape(tokens.shape[0], self.heads, -1).transpose(0, 1)  # [heads, tokens, head_dim]

    def _padding(self, count: int) -> tuple[int, int]:
        """Returns the published code's rows of zeros in front, and the row whose result the first token gets."""
        padding = 0 if self.version is None else -count % self.landmarks
        return padding, 0 if self.version == "0.0.9" else padding


class _GridPositions(nn.Module):
    """PPEG: adds depthwise 7x7, 5x5 and 3x3 convolutions of the bag's square to it; class tokens pass by."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.wide, self.middle, self.narrow = (
            nn.Conv2d(dim, dim, size, padding=size // 2, groups=dim) for size in _GRID_KERNELS
        )

    def forward(self, tokens: Tensor, segments: Segments) -> Tensor:
        """Maps tokens [total, dim], one class token and side² others per bag, to [total, dim]."""
        weight, bias = self._fused()
        bags = segments.split(tokens)
        return torch.cat(
            [rows for bag in bags for rows in (bag[:1], _convolved(bag[1:], math.isqrt(len(bag) - 1), weight, bias))]
        )

    def one_bag(self, tokens: Tensor, side: int) -> Tensor:
        """The same for one bag [1 + side², dim], whose side may be a symbol."""
        return torch.cat([tokens[:1], _convolved(tokens[1:], side, *self._fused())])

    def _fused(self) -> tuple[Tensor, Tensor]:
        """Sums the three kernels and the identity into one kernel of the largest size."""
        reach = _GRID_KERNELS[0] // 2
        layers = [self.wide, self.middle, self.narrow]
        weights = [functional.pad(layer.weight, [reach - layer.weight.shape[3] // 2] * 4) for layer in layers]
        weight, biases = torch.stack(weights).sum(0), torch.stack([_bias(layer) for layer in layers])
        # A product, as the three gradients of a plain sum are equal: a head that torch 2.15 compiled hands all of them
        # the same memory, into which a second bag would be added three times.
        bias = (biases.new_ones(1, len(layers)) @ biases)[0]
        identity = functional.pad(weight.new_ones(1, 1, 1, 1), [reach] * 4)
        return weight + identity, bias


@register_aggregator(
    "transmil",
    paper="Shao et al., TransMIL: transformer based correlated multiple instance learning, NeurIPS 2021",
    permutation_invariant=False,
)
class TransMIL(Aggregator):
    """Lets the instances of a bag attend to each other at linear cost, and convolves over the bag laid out as a square.

        h_i = ReLU(W_e x_i + b_e),  side = ⌈√n⌉
        t = class token, h_1 … h_n, h_1 … h_{side² - n}        the first instances fill up the square
        t ← t + dropout(W_o N(LayerNorm(t)) + b_o)             first block
        t_grid ← t_grid + conv7(t_grid) + conv5(t_grid) + conv3(t_grid)     PPEG, depthwise; not the class token
        t ← t + dropout(W_o N(LayerNorm(t)) + b_o)             second block, of which the class token is read
        z_b = LayerNorm(t_0),  logits_b = W z_b + b

        N = concat_h σ(Q K̃ᵀ/√d_h) σ(Q̃ K̃ᵀ/√d_h)⁺ σ(Q̃ Kᵀ/√d_h) V + conv33(V),  Q, K, V linear without bias, σ = softmax

    Q̃ and K̃ are means of consecutive tokens, `landmarks` of them; ⁺ is six steps of Newton's iteration towards the
    pseudo-inverse, started per bag. A bag with no more tokens than landmarks gets N = σ(Q Kᵀ/√d_h) V + conv33(V),
    which the product approximates. All is done bag by bag, memory and time are linear in the instances. The order of
    instances matters: it decides which are neighbours, so pass them in reading order of the slide. In the second block
    only the class token is computed, as nothing else of it is read.

    The attention given out is σ(q Kᵀ/√d_h) of the class token in the second block, which N approximates, averaged
    over heads, added up over an instance's copies and rescaled so that a bag's instances sum to one. The weights that
    N itself gives can be negative.

    Shapes: instances [total, in_dim]; embedding [bags, embed_dim]; attention [total, 1]; extras["attention_scores"]
    [total, 1] is its log before rescaling.

    Args:
        in_dim: features per instance.
        n_classes: logits per bag.
        embed_dim: width of the tokens, a multiple of heads; 512 in the paper.
        heads: attention heads per block.
        landmarks: means that stand for all tokens; embed_dim / 2 in the published code.
        dropout: probability on what attention adds to the tokens.
        official: computes what the published code does with a version of its attention package: "0.0.14" (also True)
            or "0.0.9". See References.
        norm: of the tokens in the blocks, "layer", "instance", "batch" or "none", see aggregators.norm. The class
            token is one row per bag: its last norm stays a LayerNorm unless there is none.
        input_norm: "none", "layer" or "standardize".

    References:
        Shao et al., TransMIL: transformer based correlated multiple instance learning for whole slide image
        classification, NeurIPS 2021. Xiong et al., Nyströmformer, AAAI 2021.
        The published code (szc19990412/TransMIL with the package nystrom-attention) puts rows of zeros in front of the
        tokens, up to a multiple of the landmarks, and lets them take part in means, softmaxes and pseudo-inverse. A
        bag of 20 instances with 256 landmarks has 26 tokens and 230 such rows. Here no padding takes part: the tokens
        are cut into `landmarks` runs whose lengths differ by one at most, which is the same where the number divides.
        On random tokens and 64 landmarks, padding made the product miss softmax attention by 42 % instead of nothing
        (26 tokens) and by 13 % instead of 5 % (257 tokens) where attention is broad; from 1,000 tokens on, and where
        attention is sharp, both miss it alike (7 % and 25 %).
        official="0.0.14" pads as that code does with this and other recent versions of the package.
        official="0.0.9" is the version that the code pins: it then takes the first rows of the padded result, so
        that every token gets the result of another row and the class token that of a row of zeros. Its attention here
        is that row's, which is even. A checkpoint trained with one of the two fits that one only.
        Deviations else: defaults for small cohorts (embed_dim 128, 64 landmarks), norm.

    Example:
        >>> head = TransMIL(in_dim=16, n_classes=3, embed_dim=8, heads=2, landmarks=4).eval()
        >>> output = head(torch.randn(5, 16), torch.tensor([0, 2, 5]))
        >>> output.logits.shape, output.attention.shape
        (torch.Size([2, 3]), torch.Size([5, 1]))
    """

    def __init__(
        self,
        in_dim: int = 1024,
        n_classes: int = 4,
        embed_dim: int = 128,
        heads: int = 8,
        landmarks: int = 64,
        dropout: float = 0.1,
        official: bool | str = False,
        norm: str = "layer",
        input_norm: str = "none",
    ) -> None:
        super().__init__(in_dim, n_classes, input_norm)
        require(
            heads >= 1 and embed_dim >= 1 and embed_dim % heads == 0,
            f"got embed_dim {embed_dim} and heads {heads} → expected a positive multiple → try 128 and 8",
        )
        require(landmarks >= 1, f"got landmarks {landmarks} → expected at least 1 → try {max(1, embed_dim // 2)}")
        require(
            isinstance(official, bool) or official in _VERSIONS,
            f"got official {official!r} → expected True, False or one of {', '.join(_VERSIONS)} → pass the version of "
            "nystrom-attention that the model was trained with",
        )
        version = _VERSIONS[0] if official is True else official or None
        self.projection = Projection(in_dim, embed_dim, dropout=0.0)
        self.class_token = nn.Parameter(torch.randn(1, embed_dim))
        self.block = _NystromBlock(embed_dim, heads, landmarks, dropout, version, norm)
        self.positions = _GridPositions(embed_dim)
        self.last_block = _NystromBlock(embed_dim, heads, landmarks, dropout, version, norm)
        self.norm = create_bag_norm(norm, embed_dim)
        self.classifier = nn.Linear(embed_dim, n_classes)

    def aggregate(
        self, instances: Tensor, segments: Segments, coords: Tensor | None, generator: DrawSource
    ) -> BagOutput:
        """Attends and convolves within each bag of instances [total, in_dim] and classifies the class tokens."""
        bags = segments.split(self.projection(instances, generator))
        tokens = torch.cat([row for bag in bags for row in (self.class_token, bag, bag[: _missing(len(bag))])])
        token_segments = Segments(tuple(1 + size + _missing(size) for size in segments.sizes))
        tokens = self.block(tokens, token_segments, generator)
        tokens = self.positions(tokens, token_segments)
        last, log_attention = self.last_block.class_tokens(tokens, token_segments, generator)
        embedding = self.norm(last, Segments((1,) * segments.bags))
        log_average = log_attention.logsumexp(1, keepdim=True) - math.log(self.last_block.heads)
        pairs = zip(token_segments.split(log_average), segments.sizes, strict=True)
        scores = torch.cat([_folded(tokens[1:], size) for tokens, size in pairs])  # [total, 1]
        attention = segment_softmax(scores, segments)
        return BagOutput(self.classifier(embedding), embedding, attention, None, {"attention_scores": scores})

    def one_bag(self, instances: Tensor) -> tuple[Tensor, Tensor]:
        """Predicts one bag in evaluation as forward does, in operations that are the same for every size of it.

        Nothing here asks Python for the size of the bag, so that torch.export can follow it: runs are rows of a mask,
        and one formula serves bags below and above the number of landmarks.

        Args:
            instances: [n, in_dim], of the parameters' dtype.

        Returns:
            Logits [1, classes] and attention [n, 1].

        Raises:
            HeadConfigError: a head with `official`, whose rows of zeros this does not know.

        Example:
            >>> head, bag = TransMIL(in_dim=16, n_classes=3, embed_dim=8, heads=2).eval(), torch.randn(9, 16)
            >>> bool(torch.allclose(head.one_bag(bag)[0], head(bag).logits, atol=1e-5))
            True
        """
        require(
            self.block.version is None,
            f"got official {self.block.version!r} for one bag of any size → expected official=False, as rows of zeros "
            "that depend on the size are not followed → call the head itself",
        )
        embedded = self.projection(self.input_norm(instances))
        count = instances.shape[0]
        side = _square_side(count)
        cells = torch.arange(side * side, device=instances.device)
        cells = torch.where(cells < count, cells, cells - count)  # the instance in each cell of the square
        tokens = torch.cat([self.class_token, embedded[cells]])
        tokens = self.positions.one_bag(self.block.one_bag(tokens, last=False)[0], side)
        last, weights = self.last_block.one_bag(tokens, last=True)
        attention = torch.zeros_like(embedded[:, 0]).scatter_add(0, cells, weights[1:])
        logits: Tensor = self.classifier(self.norm(last, Segments((1,))))
        return logits, (attention / attention.sum()).unsqueeze(1)

    @classmethod
    def from_official(cls, state: Mapping[str, Tensor], version: str) -> "TransMIL":
        """Builds the head of a trained TransMIL.

        Args:
            state: the model's state dict.
            version: of nystrom-attention that the model was trained with, which the state does not tell: "0.0.9"
                (what the published code pins) or "0.0.14" (what an installation without the pin has).

        Raises:
            OfficialStateError: parameters are missing or left over.
            HeadConfigError: another version.

        Example:
            >>> ours = TransMIL(6, 3, embed_dim=4, heads=2).state_dict()
            >>> state = {theirs: ours[name] for theirs, name in _OFFICIAL_NAMES.items()}
            >>> state |= {name: torch.zeros(12, 4) for name in _JOINT_NAMES.values()}
            >>> TransMIL.from_official(state, "0.0.14")(torch.ones(5, 6)).logits.shape
            torch.Size([1, 3])
        """
        found = official_tensors(state, [*_OFFICIAL_NAMES, *_JOINT_NAMES.values()], "TransMIL")
        embed_dim, in_dim = found["_fc1.0.weight"].shape
        heads, n_classes = found["layer1.attn.res_conv.weight"].shape[0], found["_fc2.weight"].shape[0]
        head = cls(in_dim, n_classes, embed_dim, heads, landmarks=embed_dim // 2, official=version)
        renamed = {ours: found[theirs] for theirs, ours in _OFFICIAL_NAMES.items()}
        for block, name in _JOINT_NAMES.items():
            joint = found[name]
            renamed[f"{block}.query.weight"] = joint[:embed_dim]
            renamed[f"{block}.key_value.weight"] = joint[embed_dim:]
        renamed["class_token"] = renamed["class_token"].reshape(1, -1)
        head.load_state_dict(renamed)
        return head


def nystrom_attention(query: Tensor, mean_query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Approximates softmax(query keyᵀ / √head_dim) value of one bag through as many means of keys as of queries.

    Shapes: query [heads, rows, head_dim], mean_query [heads, landmarks, head_dim], key [heads, tokens, head_dim],
    value [heads, tokens, any] → [heads, rows, any]. No matrix of rows or tokens times landmarks is kept where torch
    has a fused kernel.

    References:
        Xiong et al., Nyströmformer: a Nyström-based algorithm for approximating self-attention, AAAI 2021.

    Example:
        >>> tokens = torch.randn(2, 9, 4)
        >>> nystrom_attention(tokens[:, :1], tokens[:, ::3], tokens, tokens).shape
        torch.Size([2, 1, 4])
    """
    mean_key = _run_means(key, mean_query.shape[1])
    dtype = torch.promote_types(query.dtype, torch.float32)  # the iteration loses too much in 16 bits
    between = (mean_query @ mean_key.mT * query.shape[2] ** -0.5).softmax(2, dtype=dtype)
    gathered = _softmax_attention(mean_query, key, value)  # [heads, landmarks, any]
    solved = torch.bmm(_pseudo_inverse(between), gathered.to(dtype)).to(value.dtype)
    return _softmax_attention(query, mean_key, solved)


def _softmax_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    query, key, value = (part.unsqueeze(0) for part in (query, key, value))
    return functional.scaled_dot_product_attention(query, key, value).squeeze(0)


def _padded(rows: Tensor, padding: int) -> Tensor:
    """Puts rows of zeros in front; no copy where there are none to put."""
    return functional.pad(rows, (0, 0, padding, 0)) if padding else rows


def _run_means(tokens: Tensor, runs: int) -> Tensor:
    """Means of `runs` consecutive runs of tokens [..., tokens, dim]; the first runs are longer by one, if any."""
    count = tokens.shape[-2]
    runs = min(runs, count)
    size, longer = divmod(count, runs)
    end = longer * (size + 1)
    parts = [(tokens[..., end:, :], runs - longer)]
    if longer:
        parts.insert(0, (tokens[..., :end, :], longer))
    shape, dim = tokens.shape[:-2], tokens.shape[-1]
    return torch.cat([part.reshape(*shape, number, -1, dim).mean(-2) for part, number in parts], dim=-2)


def _one_hot_runs(tokens: Tensor, runs: int) -> Tensor:
    """1 where a token is in a run, cut as `_run_means` cuts them: tokens [count, dim] → [runs, count].

    Of fewer tokens than runs, each is one, and the last runs are empty.
    """
    at = torch.arange(tokens.shape[0], device=tokens.device)
    count = torch.ones_like(at).sum()
    size = (count // runs).clamp(min=1)
    longer = (count - size * runs).clamp(min=0)
    end = longer * (size + 1)
    run = torch.where(at < end, at // (size + 1), longer + (at - end) // size)
    return (run == torch.arange(runs, device=tokens.device).unsqueeze(1)).to(tokens.dtype)


def _pseudo_inverse(matrices: Tensor) -> Tensor:
    """Newton's iteration of third order towards the pseudo-inverse of matrices [heads, m, m] of one bag."""
    fifteen = 15 * torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    inverse = matrices.mT / (matrices.sum(2).max() * matrices.sum(1).max())
    for _ in range(_INVERSE_STEPS):  # Z ← Z (13 I - P (15 I - P (7 I - P))) / 4 with P = A Z
        product = torch.bmm(matrices, inverse)
        inner = torch.baddbmm(torch.sub(fifteen, product, alpha=7), product, product)
        inverse = torch.baddbmm(inverse, inverse, torch.bmm(product, inner), beta=3.25, alpha=-0.25)
    return inverse


def _convolved(tokens: Tensor, side: int, weight: Tensor, bias: Tensor) -> Tensor:
    """Convolves one bag's tokens [side², dim] as a square, depthwise → [side², dim]."""
    dim = tokens.shape[1]
    grid = tokens.reshape(1, side, side, dim).permute(0, 3, 1, 2)
    convolved = functional.conv2d(grid, weight, bias, padding=weight.shape[3] // 2, groups=dim)
    return convolved.permute(0, 2, 3, 1).reshape(side * side, dim)


def _bias(layer: nn.Conv2d) -> Tensor:
    return layer.weight.new_zeros(layer.out_channels) if layer.bias is None else layer.bias


def _missing(size: int) -> int:
    """How many rows a bag lacks to the next square."""
    return (math.isqrt(size - 1) + 1) ** 2 - size


def _square_side(count: int) -> int:
    """⌈√count⌉; a symbol where count is one, as in torch.export, which math.isqrt would turn into a number."""
    side = torch.full((), count, dtype=torch.float64).sqrt().ceil().to(torch.int64).item()
    torch._check(side >= 1)
    return cast("int", side)


def _folded(log_weights: Tensor, size: int) -> Tensor:
    """Adds the weights of the copies at the end to those of their originals, as logs: [side², 1] → [size, 1]."""
    copies = log_weights.shape[0] - size
    both = torch.logaddexp(log_weights[:copies], log_weights[size:])
    return torch.cat([both, log_weights[copies:size]])
