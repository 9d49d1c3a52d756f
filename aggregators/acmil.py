"""Attention-challenging MIL: several attention branches that must differ, and random masking of the largest scores."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from aggregators.base import Aggregator, BagOutput, Projection
from aggregators.draws import DrawSource, bag_generator
from aggregators.errors import require
from aggregators.gated_attention import GatedAttention, official_attention_names
from aggregators.official import official_tensors
from aggregators.registry import register_aggregator
from aggregators.segment import Segments, segment_softmax, segment_weighted_sum
from aggregators.target_losses import target_losses

_LINEAR = ("weight", "bias")


@register_aggregator(
    "acmil",
    paper="Zhang, Li, Sun, Zheng, Zhu, Yang, Attention-challenging multiple instance learning for whole slide image "
    "classification, ECCV 2024",
)
class ACMIL(Aggregator):
    """Weights instances by several attention branches, each with a classifier, and classifies their mean embedding.

        h_i = dropout(ReLU(W_e x_i + b_e)), or dropout(x_i) for embed_dim None
        s_ik = w_kᵀ (tanh(V h_i + b_V) ⊙ sigmoid(U h_i + b_U)) / temperature
        in training: among the mask_top highest s_ik of each bag and branch, ⌊mask_rate · min(mask_top, n_b)⌋ drawn
                     at random become -∞ (stochastic top-k instance masking)
        a_ik = exp(s_ik) / Σ_{j ∈ b} exp(s_jk)
        z_bk = Σ_{i ∈ b} a_ik h_i,  branch logits_bk = W_k z_bk + b_k              multiple branch attention
        z_b = (1 / K) Σ_k z_bk,  logits_b = W z_b + b

    The head's own loss is, averaged over bags,

        (1 / K) Σ_k loss(branch logits_bk, y_b) + 2 / (K (K - 1)) Σ_{k < l} cos(a_·k, a_·l)

    The second term, the mean cosine of two branches' attention over the bag, pushes them to look at different
    instances. Class numbers mean cross-entropy, multi-label targets binary cross-entropy; regression and survival
    targets are refused. Masking, and so every draw, is per bag and branch; evaluation masks nothing.

    Shapes: instances [total, in_dim]; attention [total, branches]; embedding [bags, dim] with dim = embed_dim or
    in_dim; extras["attention_scores"] [total, branches] are the s_ik, -∞ where masked; extras["branch_logits"]
    [bags, branches, classes]. Memory is linear in the instances.

    Args:
        in_dim: features per instance.
        n_classes: logits per bag.
        embed_dim: width of the projection that is trained with the head; None for none.
        attention_dim: width of V and U.
        branches: attention branches K.
        mask_top: instances per bag and branch, the highest-scoring, that may be masked in training.
        mask_rate: the part of them that is masked, below 1; 0 for no masking.
        dropout: probability on the embeddings h_i.
        temperature: above 1 evens the attention out, below 1 sharpens it.
        official: with one branch its loss is left out, as in the authors' code; its classifier then learns nothing.
        input_norm: "none", "layer" or "standardize".

    References:
        Zhang, Li, Sun, Zheng, Zhu, Yang, Attention-challenging multiple instance learning for whole slide image
        classification, ECCV 2024. The authors' code (dazhangyu123/ACMIL, `ACMIL_GA`) is reproduced by from_official.
        Deviations: the projection has a bias; dropout and temperature are additions, dropout=0 is the authors' head;
        several bags at once, where theirs uses the first of a batch only.

    Example:
        >>> head = ACMIL(in_dim=16, n_classes=3, embed_dim=8, branches=2).eval()
        >>> output = head(torch.randn(5, 16), torch.tensor([0, 2, 5]))
        >>> output.logits.shape, output.attention.shape, output.extras["branch_logits"].shape
        (torch.Size([2, 3]), torch.Size([5, 2]), torch.Size([2, 2, 3]))
    """

    def __init__(
        self,
        in_dim: int = 1024,
        n_classes: int = 4,
        embed_dim: int | None = 128,
        attention_dim: int = 128,
        branches: int = 5,
        mask_top: int = 10,
        mask_rate: float = 0.6,
        dropout: float = 0.25,
        temperature: float = 1.0,
        official: bool = False,
        input_norm: str = "none",
    ) -> None:
        super().__init__(in_dim, n_classes, input_norm)
        require(mask_top >= 0, f"got mask_top {mask_top} → expected 0 or more → pass 0 for no masking")
        require(
            0 <= mask_rate < 1,
            f"got mask_rate {mask_rate} → expected at least 0 and below 1, so that an instance is left → try 0.6",
        )
        self.mask_top = mask_top
        self.mask_rate = mask_rate
        self.branches = branches
        self.official = official
        self.projection = Projection(in_dim, embed_dim, dropout)
        dim = self.projection.dim
        self.attention = GatedAttention(dim, attention_dim, branches, temperature)
        self.branch_classifiers = nn.ModuleList(nn.Linear(dim, n_classes) for _ in range(branches))
        self.classifier = nn.Linear(dim, n_classes)

    def aggregate(
        self, instances: Tensor, segments: Segments, coords: Tensor | None, generator: DrawSource
    ) -> BagOutput:
        """Weights instances [total, in_dim] by every branch and classifies each branch and their mean."""
        embedded = self.projection(instances, generator)  # [total, dim]
        scores = self.attention(embedded)  # [total, branches]
        if self.training:
            masked = draw_top_mask(scores, segments, self.mask_top, self.mask_rate, generator)
            scores = scores.masked_fill(masked, -torch.inf)
        attention = segment_softmax(scores, segments)
        by_branch = segment_weighted_sum(attention, embedded, segments)  # [bags, branches, dim]
        pairs = zip(self.branch_classifiers, by_branch.unbind(1), strict=True)
        branch_logits = torch.stack([classifier(branch) for classifier, branch in pairs], dim=1)
        embedding = by_branch.mean(1)  # [bags, dim]
        extras = {"attention_scores": scores, "branch_logits": branch_logits}
        return BagOutput(self.classifier(embedding), embedding, attention, None, extras)

    def auxiliary_loss(self, output: BagOutput, targets: Tensor, offsets: Tensor | None) -> Tensor:
        """Returns the branches' mean loss plus the mean cosine of their attention, averaged over bags.

        Args:
            output: what the head returned for the batch.
            targets: class numbers, int64 [bags], or 0 and 1 of shape [bags, classes].
            offsets: those of the batch.

        Raises:
            BagInputError: the targets are of another kind.
        """
        branch_logits = output.extras["branch_logits"]
        if self.branches == 1 and self.official:
            return branch_logits.new_zeros(())
        repeated = targets.repeat_interleave(self.branches, dim=0)
        loss = target_losses(branch_logits.flatten(0, 1), repeated).mean()
        if self.branches == 1 or output.attention is None:
            return loss
        segments = Segments.from_offsets(offsets, output.attention.shape[0])
        return loss + attention_likeness(output.attention, segments).mean()

    @classmethod
    def from_official(cls, state: Mapping[str, Tensor]) -> "ACMIL":
        """Builds the head of a trained `ACMIL_GA`, with its authors' masking (10 instances, rate 0.6) and no dropout.

        The projection's bias is zero, as theirs has none; the bias of the score layer is dropped, as it changes
        nothing.

        Raises:
            OfficialStateError: parameters are missing or left over.

        Example:
            >>> layers = {"attention.attention_V.0": (4, 6), "attention.attention_U.0": (4, 6),
            ...           "attention.attention_weights": (1, 4), "classifier.0.fc": (2, 6),
            ...           "Slide_classifier.fc": (2, 6)}
            >>> state = {f"{name}.weight": torch.zeros(shape) for name, shape in layers.items()}
            >>> state |= {f"{name}.bias": torch.zeros(shape[0]) for name, shape in layers.items()}
            >>> state["dimreduction.fc1.weight"] = torch.zeros(6, 9)
            >>> ACMIL.from_official(state)(torch.ones(3, 9)).logits.shape
            torch.Size([1, 2])
        """
        branches = sum(name.startswith("classifier.") and name.endswith(".fc.weight") for name in state)
        names = official_attention_names("attention.", "attention.")
        names["dimreduction.fc1.weight"] = "projection.linear.weight"
        for kind in _LINEAR:
            names[f"Slide_classifier.fc.{kind}"] = f"classifier.{kind}"
            names.update({f"classifier.{k}.fc.{kind}": f"branch_classifiers.{k}.{kind}" for k in range(branches)})
        unused = "attention.attention_weights.bias"
        found = official_tensors(state, [*names, unused], "ACMIL_GA")
        renamed = {ours: found[theirs] for theirs, ours in names.items()}
        embed_dim, in_dim = renamed["projection.linear.weight"].shape
        renamed["projection.linear.bias"] = renamed["projection.linear.weight"].new_zeros(embed_dim)
        n_classes, attention_dim = renamed["classifier.weight"].shape[0], renamed["attention.v.weight"].shape[0]
        head = cls(in_dim, n_classes, embed_dim, attention_dim, branches, dropout=0.0, official=True)
        head.load_state_dict(renamed)
        return head


def draw_top_mask(scores: Tensor, segments: Segments, top: int, rate: float, generator: DrawSource = None) -> Tensor:
    """Marks ⌊rate · min(top, n_b)⌋ of the `top` highest scores of each bag and branch, drawn at random.

    Shapes: scores [total, branches] → bool [total, branches].

    Example:
        >>> scores = torch.tensor([[1.0], [5.0], [4.0], [3.0], [0.0]])
        >>> mask = draw_top_mask(scores, Segments((4, 1)), top=2, rate=0.5)
        >>> int(mask.sum()), bool(mask[1] ^ mask[2])
        (1, True)
    """
    masks = []
    for at, bag in enumerate(segments.split(scores.detach())):
        candidates = min(top, bag.shape[0])
        mask = torch.zeros_like(bag, dtype=torch.bool)
        if drawn := int(candidates * rate):
            highest = bag.topk(candidates, dim=0).indices  # [candidates, branches]
            drawn_from = bag_generator(generator, at, bag.device)
            keys = torch.rand(highest.shape, generator=drawn_from, device=bag.device)
            mask.scatter_(0, highest.gather(0, keys.argsort(0)[:drawn]), True)
        masks.append(mask)
    return torch.cat(masks)


def attention_likeness(attention: Tensor, segments: Segments) -> Tensor:
    """Averages, for each bag, the cosine between the attention of every two branches: 1 where all look alike.

    Shapes: attention [total, branches] → [bags]; at least two branches.

    Example:
        >>> attention_likeness(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), Segments((2, 1))).tolist()
        [0.0, 1.0]
    """
    branches = attention.shape[1]
    units = [functional.normalize(bag, dim=0) for bag in segments.split(attention)]
    likeness = torch.stack([bag.mT @ bag for bag in units])  # [bags, branches, branches]
    return likeness.triu(1).sum((1, 2)) * 2 / (branches * (branches - 1))
