"""Double-tier feature distillation: a bag is cut into pseudo-bags, and what they yield is a bag again."""

import math
from collections.abc import Mapping
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from aggregators.base import Aggregator, BagOutput, Projection
from aggregators.draws import DrawSource, bag_generator
from aggregators.errors import require
from aggregators.gated_attention import GatedAttention, official_attention_names
from aggregators.official import official_tensors
from aggregators.registry import register_aggregator
from aggregators.segment import Segments, segment_mean, segment_softmax, segment_weighted_sum
from aggregators.target_losses import target_losses

_DISTILLATIONS = ("AFS", "MaxS", "MaxMinS")
_CLASSIFIER_NAMES = {"classifier.fc": "pseudo_classifier", "att_classifier.classifier.fc": "classifier"}
_TIER_NAMES = {"attention.": "pseudo_attention.", "att_classifier.attention.": "attention."}


class _Division(NamedTuple):
    """How a packed batch is cut into pseudo-bags.

    Attributes:
        order: int64 [total], the batch's rows pseudo-bag by pseudo-bag.
        pseudo_bags: the pseudo-bags, in this order.
        bags: the bags, counted in pseudo-bags.
    """

    order: Tensor
    pseudo_bags: Segments
    bags: Segments


class _Distilled(NamedTuple):
    """What the first tier hands to the second, packed by bag.

    Attributes:
        features: [kept, dim].
        bags: the bags, counted in features.
        rows: int64 [kept], the instance that each feature is; None for pseudo-bag embeddings.
        log_count: [kept, 1], log of how often the feature is handed over.
    """

    features: Tensor
    bags: Segments
    rows: Tensor | None
    log_count: Tensor


@register_aggregator(
    "dtfd",
    paper="Zhang, Meng, Zhao, Qiao, Yang, Coupland, Zheng, DTFD-MIL: double-tier feature distillation multiple "
    "instance learning for histopathology whole slide image classification, CVPR 2022",
    permutation_invariant=False,
)
class DTFD(Aggregator):
    """Classifies pseudo-bags by attention, distils each into a few features, and classifies these by attention.

        h_i = dropout(ReLU(W_e x_i + b_e)), or dropout(x_i) for embed_dim None
        tier 1, for every pseudo-bag g of bag b, with gated attention s¹:
            a_i = softmax of s¹ within g,  z_g = Σ_{i ∈ g} a_i h_i,  logits_g = W¹ z_g + b¹
            p_i = softmax over classes of W¹ (a_i h_i)                              the class activation of instance i
        distillation of g:
            AFS      z_g
            MaxS     h_i of the `selected` instances of highest p_ic
            MaxMinS  h_i of the `selected` instances of highest and of lowest p_ic, each instance once
        tier 2, with gated attention s² over all that bag b's pseudo-bags yield:
            z_b = Σ_j softmax_j(s²_j) f_j,  logits_b = W² z_b + b²

    A bag of n instances has min(pseudo_bags, n) pseudo-bags. Instance i belongs to pseudo-bag i mod their number, so
    that each is spread over the whole slide; in training the instances are shuffled first, bag by bag. The class c of
    p_ic is the last one of two, as in the paper, and of more the class that tier 1 gives the pseudo-bag; with a single
    logit the instances are ranked by W¹ (a_i h_i) itself.

    The head's own loss is that of logits_g against the bag's target, averaged over pseudo-bags and then over bags:
    cross-entropy for class numbers, binary cross-entropy for multi-label targets; regression and survival targets are
    refused.

    The attention given out is a distribution over the bag's instances: with AFS that of tier 1 times that of tier 2,
    with MaxS and MaxMinS that of tier 2, which is zero for instances that were not selected.

    Shapes: instances [total, in_dim]; attention [total, 1]; instance_logits [total, classes] are the W¹ (a_i h_i),
    whose sum over a pseudo-bag, plus b¹, is logits_g; embedding [bags, dim] with dim = embed_dim or in_dim.
    extras["attention_scores"] [total, 1], whose softmax over the bag is the attention (-∞ where not selected);
    extras["pseudo_attention"] [total, 1] are the a_i; extras["pseudo_logits"] [Σ_b pseudo-bags of b, classes] are the
    logits_g, bag after bag; extras["selected_index"] int64 [kept], for MaxS and MaxMinS, the selected rows.
    Memory is linear in the instances.

    Args:
        in_dim: features per instance.
        n_classes: logits per bag.
        embed_dim: width of the projection that is trained with the head; None for none.
        attention_dim: width of both gated attentions.
        distillation: "AFS", "MaxS" or "MaxMinS".
        pseudo_bags: pseudo-bags per bag.
        selected: instances that MaxS keeps of each pseudo-bag, and MaxMinS at either end.
        shuffle: draws new pseudo-bags at each training step; False cuts by index in training too.
        end_to_end: lets the loss of logits_b train tier 1 too, through the distilled features. False, as in the
            paper, trains each tier by its own loss.
        dropout: probability on the embeddings h_i.
        temperature: of both attentions; above 1 evens them out, below 1 sharpens them.
        official: the authors' code in three details. A bag smaller than pseudo_bags has empty pseudo-bags, whose tier-1
            logits are b¹ and which AFS hands on as zeros; MaxMinS hands an instance on twice that is both among the
            highest and the lowest; and the class c is always the last one.
        input_norm: "none", "layer" or "standardize".

    References:
        Zhang, Meng, Zhao, Qiao, Yang, Coupland, Zheng, DTFD-MIL: double-tier feature distillation multiple instance
        learning for histopathology whole slide image classification, CVPR 2022. The authors' code
        (hrzhang1123/DTFD-MIL) is reproduced by from_official.
        Deviations: `end_to_end` by default; the projection has a bias; more than two classes; evaluation uses one
        division by index where theirs draws one or averages several; `selected` of 0, which in their code hands on
        nothing (MaxS) or everything (MaxMinS), is refused; no residual blocks after the projection.

    Example:
        >>> head = DTFD(in_dim=16, n_classes=3, embed_dim=8, distillation="MaxMinS").eval()
        >>> output = head(torch.randn(12, 16), torch.tensor([0, 2, 12]))
        >>> output.logits.shape, output.attention.shape, output.extras["pseudo_logits"].shape
        (torch.Size([2, 3]), torch.Size([12, 1]), torch.Size([6, 3]))
    """

    def __init__(
        self,
        in_dim: int = 1024,
        n_classes: int = 4,
        embed_dim: int | None = 128,
        attention_dim: int = 128,
        distillation: str = "AFS",
        pseudo_bags: int = 4,
        selected: int = 1,
        shuffle: bool = True,
        end_to_end: bool = True,
        dropout: float = 0.25,
        temperature: float = 1.0,
        official: bool = False,
        input_norm: str = "none",
    ) -> None:
        super().__init__(in_dim, n_classes, input_norm)
        require(
            distillation in _DISTILLATIONS,
            f"got distillation {distillation!r} → expected one of {', '.join(_DISTILLATIONS)} → pick one of these",
        )
        require(pseudo_bags >= 1, f"got pseudo_bags {pseudo_bags} → expected at least 1 → try 4")
        require(selected >= 1, f"got selected {selected} → expected at least 1 → pass 1 to keep one per pseudo-bag")
        self.distillation = distillation
        self.pseudo_bags = pseudo_bags
        self.selected = selected
        self.shuffle = shuffle
        self.end_to_end = end_to_end
        self.official = official
        self.projection = Projection(in_dim, embed_dim, dropout)
        dim = self.projection.dim
        self.pseudo_attention = GatedAttention(dim, attention_dim, temperature=temperature)
        self.pseudo_classifier = nn.Linear(dim, n_classes)
        self.attention = GatedAttention(dim, attention_dim, temperature=temperature)
        self.classifier = nn.Linear(dim, n_classes)

    def aggregate(
        self, instances: Tensor, segments: Segments, coords: Tensor | None, generator: DrawSource
    ) -> BagOutput:
        """Runs both tiers on instances [total, in_dim], reordered by pseudo-bag meanwhile."""
        division = self._divide(segments, instances.device, generator)
        embedded = self.projection(instances[division.order], generator)  # [total, dim]
        pseudo_scores = self.pseudo_attention(embedded)  # [total, 1]
        pseudo_attention = segment_softmax(pseudo_scores, division.pseudo_bags)
        pooled = segment_weighted_sum(pseudo_attention, embedded, division.pseudo_bags).squeeze(1)
        pseudo_logits = self.pseudo_classifier(pooled)  # [pseudo-bags, classes]
        class_scores = functional.linear(embedded, self.pseudo_classifier.weight)
        activation = pseudo_attention.to(class_scores.dtype) * class_scores  # [total, classes]
        distilled = self._distil(embedded, pooled, activation, pseudo_logits, division)
        scores = self.attention(distilled.features) + distilled.log_count  # [kept, 1]
        weights = segment_softmax(scores, distilled.bags)
        embedding = segment_weighted_sum(weights, distilled.features, distilled.bags).squeeze(1)  # [bags, dim]
        back = division.order.argsort()
        scores = _instance_scores(scores, pseudo_scores, distilled, division)[back]
        extras = {
            "attention_scores": scores,
            "pseudo_attention": pseudo_attention[back],
            "pseudo_logits": pseudo_logits,
        }
        if distilled.rows is not None:
            extras["selected_index"] = division.order[distilled.rows]
        attention = segment_softmax(scores, segments)
        return BagOutput(self.classifier(embedding), embedding, attention, activation[back], extras)

    def auxiliary_loss(self, output: BagOutput, targets: Tensor, offsets: Tensor | None) -> Tensor:
        """Returns the loss of tier 1: that of the pseudo-bags against their bag's target, averaged over bags.

        Args:
            output: what the head returned for the batch.
            targets: class numbers, int64 [bags], or 0 and 1 of shape [bags, classes].
            offsets: those of the batch.

        Raises:
            BagInputError: the targets are of another kind.
        """
        total = output.extras["attention_scores"].shape[0]
        bags = Segments(tuple(map(self._count, Segments.from_offsets(offsets, total).sizes)))
        losses = target_losses(output.extras["pseudo_logits"], targets[bags.bag_index(targets.device)])
        return segment_mean(losses, bags).mean()

    def _count(self, size: int) -> int:
        """Pseudo-bags of a bag of this many instances."""
        return self.pseudo_bags if self.official else min(self.pseudo_bags, size)

    def _divide(self, segments: Segments, device: torch.device, generator: DrawSource) -> _Division:
        counts = [self._count(size) for size in segments.sizes]
        order, start = [], 0
        for bag, (size, count) in enumerate(zip(segments.sizes, counts, strict=True)):
            rows = torch.arange(size, device=device)
            if self.training and self.shuffle:
                rows = torch.randperm(size, generator=bag_generator(generator, bag, device), device=device)
            order += [start + rows[first::count] for first in range(count)]
            start += size
        return _Division(torch.cat(order), Segments(tuple(map(len, order))), Segments(tuple(counts)))

    def _distil(
        self, embedded: Tensor, pooled: Tensor, activation: Tensor, pseudo_logits: Tensor, division: _Division
    ) -> _Distilled:
        if self.distillation == "AFS":
            features = pooled if self.end_to_end else pooled.detach()
            return _Distilled(features, division.bags, None, features.new_zeros(features.shape[0], 1))
        owners = division.pseudo_bags.bag_index(activation.device)
        ranks = self._ranks(activation.detach(), pseudo_logits.detach(), owners)
        kept, doubled, start = [], [], 0
        for part in division.pseudo_bags.split(ranks):
            chosen, twice = self._select(part)
            kept.append(start + chosen)
            doubled.append(twice)
            start += part.shape[0]
        rows, log_count = torch.cat(kept), torch.cat(doubled).to(embedded.dtype) * math.log(2)
        features = embedded[rows] if self.end_to_end else embedded[rows].detach()
        lengths = map(len, kept)
        sizes = tuple(sum(islice(lengths, count)) for count in division.bags.sizes)
        return _Distilled(features, Segments(sizes), rows, log_count.unsqueeze(1))

    def _ranks(self, activation: Tensor, pseudo_logits: Tensor, owners: Tensor) -> Tensor:
        """Log probability of the class that instances are selected by, [total]; owners are their pseudo-bags."""
        if self.n_classes == 1:
            return activation[:, 0]
        log_probability = activation.log_softmax(1)
        if self.official or self.n_classes == 2:
            return log_probability[:, -1]
        chosen = pseudo_logits.argmax(1)[owners]
        return log_probability.gather(1, chosen.unsqueeze(1)).squeeze(1)

    def _select(self, ranks: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of one pseudo-bag that are kept, and which of them the authors' MaxMinS hands on twice."""
        ranked, count = ranks.argsort(descending=True, stable=True), ranks.shape[0]
        top = min(self.selected, count)
        if self.distillation == "MaxS":
            kept = ranked[:top]
        else:
            kept = ranked if count <= 2 * top else torch.cat([ranked[:top], ranked[-top:]])
        doubled = torch.zeros(kept.shape, dtype=torch.bool, device=kept.device)
        if self.official and self.distillation == "MaxMinS":
            doubled[count - top : top] = True  # empty where the two ends do not meet
        return kept, doubled

    def one_bag(self, instances: Tensor) -> tuple[Tensor, Tensor]:
        """Predicts one bag in evaluation as forward does, in operations that are the same for every size of it.

        Nothing here asks Python for the size of the bag, so that torch.export can follow it: pseudo-bags are columns
        of a mask, at the cost of pseudo_bags numbers per instance.

        Args:
            instances: [n, in_dim], of the parameters' dtype.

        Returns:
            Logits [1, classes] and attention [n, 1].

        Example:
            >>> head, bag = DTFD(in_dim=16, n_classes=3, embed_dim=8).eval(), torch.randn(9, 16)
            >>> bool(torch.allclose(head.one_bag(bag)[0], head(bag).logits, atol=1e-5))
            True
        """
        embedded = self.projection(self.input_norm(instances))  # [n, dim]
        owners = torch.arange(instances.shape[0], device=instances.device) % self.pseudo_bags
        members = owners.unsqueeze(1) == torch.arange(self.pseudo_bags, device=instances.device)  # [n, pseudo-bags]
        shares = _masked_softmax(self.pseudo_attention(embedded), members)
        pooled = shares.mT @ embedded  # [pseudo-bags, dim]; zeros for one without instances
        if self.distillation == "AFS":
            # the authors' code hands on zeros for a pseudo-bag without instances
            handed_on = members.any(0).unsqueeze(1) if not self.official else torch.ones_like(pooled[:, :1]).bool()
            weights = _masked_softmax(self.attention(pooled), handed_on)
            embedding, attention = weights.mT @ pooled, shares @ weights
            return self.classifier(embedding), attention / attention.sum(0)
        activation = shares.sum(1, keepdim=True) * functional.linear(embedded, self.pseudo_classifier.weight)
        ranks = self._ranks(activation, self.pseudo_classifier(pooled), owners)
        top, bottom = _ends(ranks, members, self.selected)
        kept, scores = top if self.distillation == "MaxS" else top | bottom, self.attention(embedded)
        if self.official and self.distillation == "MaxMinS":
            scores = scores + math.log(2) * (top & bottom).to(scores.dtype)
        attention = _masked_softmax(scores, kept)
        return self.classifier(attention.mT @ embedded), attention

    @classmethod
    def from_official(
        cls, state: Mapping[str, Tensor], distillation: str = "AFS", pseudo_bags: int = 4, selected: int = 1
    ) -> "DTFD":
        """Builds the head of a trained DTFD-MIL model: its four parts' parameters, each under its part's name.

        The parts are the keys of the authors' checkpoint (`dim_reduction`, `attention`, `classifier`,
        `att_classifier`), to be joined to their parameters by a dot. The projection's bias is zero, as theirs has
        none; the biases of the score layers are dropped, as they change nothing.

        Args:
            state: the parameters.
            distillation: "AFS", "MaxS" or "MaxMinS"; the state does not tell.
            pseudo_bags: theirs are `numGroup` and `numGroup_test`.
            selected: theirs is `total_instance` over the number of groups.

        Raises:
            OfficialStateError: parameters are missing or left over.
            HeadConfigError: a value is out of range.

        Example:
            >>> layers = {"classifier.fc": (2, 6), "att_classifier.classifier.fc": (2, 6)}
            >>> for part in ("attention", "att_classifier.attention"):
            ...     layers |= {f"{part}.attention_V.0": (4, 6), f"{part}.attention_U.0": (4, 6)}
            ...     layers[f"{part}.attention_weights"] = (1, 4)
            >>> state = {f"{name}.weight": torch.zeros(shape) for name, shape in layers.items()}
            >>> state |= {f"{name}.bias": torch.zeros(shape[0]) for name, shape in layers.items()}
            >>> state["dim_reduction.fc1.weight"] = torch.zeros(6, 9)
            >>> DTFD.from_official(state)(torch.ones(5, 9)).logits.shape
            torch.Size([1, 2])
        """
        names = {"dim_reduction.fc1.weight": "projection.linear.weight"}
        for theirs, ours in _TIER_NAMES.items():
            names.update(official_attention_names(theirs, ours))
        for theirs, ours in _CLASSIFIER_NAMES.items():
            names.update({f"{theirs}.{kind}": f"{ours}.{kind}" for kind in ("weight", "bias")})
        unused = [f"{theirs}attention_weights.bias" for theirs in _TIER_NAMES]
        found = official_tensors(state, [*names, *unused], "DTFD-MIL")
        renamed = {ours: found[theirs] for theirs, ours in names.items()}
        embed_dim, in_dim = renamed["projection.linear.weight"].shape
        renamed["projection.linear.bias"] = renamed["projection.linear.weight"].new_zeros(embed_dim)
        n_classes, attention_dim = renamed["classifier.weight"].shape[0], renamed["attention.v.weight"].shape[0]
        head = cls(in_dim, n_classes, embed_dim, attention_dim, distillation, pseudo_bags, selected,
                   end_to_end=False, dropout=0.0, official=True)  # fmt: skip
        head.load_state_dict(renamed)
        return head


def _instance_scores(scores: Tensor, pseudo_scores: Tensor, distilled: _Distilled, division: _Division) -> Tensor:
    """Spreads the scores of tier 2 over the instances, [total, 1]: their softmax over a bag is its attention."""
    if distilled.rows is not None:
        return torch.full_like(pseudo_scores, -torch.inf).index_copy(0, distilled.rows, scores.to(pseudo_scores.dtype))
    dtype = torch.promote_types(pseudo_scores.dtype, torch.float32)  # 16 bits cannot hold the weights of a large bag
    inside = torch.cat([part.log_softmax(0, dtype=dtype) for part in division.pseudo_bags.split(pseudo_scores)])
    return inside + scores[division.pseudo_bags.bag_index(scores.device)]


def _masked_softmax(scores: Tensor, members: Tensor) -> Tensor:
    """Softmax over the rows of scores [n, 1] that are members [n, columns], column by column; 0 elsewhere."""
    # the lowest finite number instead of -∞: a column without members comes out as zeros, not as NaN
    masked = torch.where(members, scores, torch.finfo(scores.dtype).min)
    return masked.softmax(0) * members.to(scores.dtype)


def _ends(ranks: Tensor, members: Tensor, selected: int) -> tuple[Tensor, Tensor]:
    """Whether each instance is among the `selected` highest, and lowest, ranks [n] of its column; both [n, 1]."""
    # ONNX knows no stable sort by that name, but its sort takes equal ranks in their order
    order = ranks.sort(descending=True).indices
    ranked = members[order].to(torch.int64)  # [n, columns]
    counted = (ranked.cumsum(0) * ranked).sum(1)  # from 1 within each column
    place = torch.zeros_like(order).scatter(0, order, counted).unsqueeze(1)
    size = (members * members.sum(0)).sum(1, keepdim=True)
    return place <= selected, place > size - selected
