"""CLAM: attention pooling that also learns to tell a bag's most and least attended instances apart."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from aggregators.base import Aggregator, BagOutput, Projection
from aggregators.draws import DrawSource
from aggregators.errors import BagInputError, OfficialStateError, require
from aggregators.gated_attention import GatedAttention
from aggregators.official import official_tensors
from aggregators.registry import register_aggregator
from aggregators.segment import Segments, segment_softmax, segment_weighted_sum

_PAPER = (
    "Lu, Williamson, Chen, Chen, Barbieri, Mahmood, Data-efficient and weakly supervised computational pathology on "
    "whole-slide images, Nature Biomedical Engineering 2021"
)


class _Clam(Aggregator):
    """What both heads share: attention, instance clusters and their loss; the subclasses classify the embeddings."""

    single_branch: bool

    def __init__(
        self,
        in_dim: int = 1024,
        n_classes: int = 4,
        embed_dim: int | None = 512,
        attention_dim: int = 256,
        gated: bool = True,
        dropout: float = 0.25,
        temperature: float = 1.0,
        k_sample: int = 8,
        subtyping: bool = False,
        bag_weight: float = 0.7,
        official: bool = False,
        input_norm: str = "none",
    ) -> None:
        super().__init__(in_dim, n_classes, input_norm)
        require(k_sample >= 1, f"got k_sample {k_sample} → expected at least 1 → pass 8, or bag_weight=1 for none")
        require(
            0 < bag_weight <= 1,
            f"got bag_weight {bag_weight} → expected above 0, at most 1 → pass 1 for no instance loss",
        )
        self.k_sample = k_sample
        self.subtyping = subtyping
        self.bag_weight = bag_weight
        self.official = official
        self.branches = 1 if self.single_branch else n_classes
        self.projection = Projection(in_dim, embed_dim, dropout)
        dim = self.projection.dim
        self.attention = GatedAttention(dim, attention_dim, self.branches, temperature, gated, dropout)
        self.classifier = nn.Linear(dim, n_classes)
        # without an instance loss nothing would train it
        self.instance_classifier = nn.Linear(dim, 2 * n_classes) if bag_weight < 1 else None

    def aggregate(
        self, instances: Tensor, segments: Segments, coords: Tensor | None, generator: DrawSource
    ) -> BagOutput:
        """Weights instances [total, in_dim] into one embedding per bag and branch and classifies these."""
        embedded = self.projection(instances, generator)  # [total, dim]
        scores = self.attention(embedded, generator)  # [total, branches]
        attention = segment_softmax(scores, segments)
        by_branch = segment_weighted_sum(attention, embedded, segments)  # [bags, branches, dim]
        extras = {"attention_scores": scores}
        if self.instance_classifier is not None:
            extras["cluster_logits"] = self.instance_classifier(embedded).unflatten(1, (self.n_classes, 2))
        return BagOutput(self.classify(by_branch), by_branch.flatten(1), attention, None, extras)

    def classify(self, by_branch: Tensor) -> Tensor:
        """Maps embeddings [bags, branches, dim] to logits [bags, classes]."""
        raise NotImplementedError(f"{type(self).__name__} must define classify")

    def instance_loss(self, output: BagOutput, targets: Tensor, offsets: Tensor | None) -> Tensor:
        """Returns the clustering loss of every bag, [bags], unweighted; zero with bag_weight=1.

        Raises:
            BagInputError: targets are not class numbers int64 [bags], one per bag.
        """
        bags = output.logits.shape[0]
        if output.attention is None or "cluster_logits" not in output.extras:
            return output.logits.new_zeros(bags)
        if targets.shape != (bags,) or targets.dtype != torch.int64 or self.n_classes == 1:
            raise BagInputError(
                f"got targets of shape {tuple(targets.shape)} and type {targets.dtype} for {self.n_classes} logits → "
                f"expected class numbers, int64 [{bags}], of at least two classes → pass bag_weight=1 to train other "
                "targets without the instance loss"
            )
        segments = Segments.from_offsets(offsets, output.attention.shape[0])
        chances = output.extras["cluster_logits"].log_softmax(2)  # [total, classes, 2]
        is_target = functional.one_hot(targets, self.n_classes).bool()  # [bags, classes]
        triples = zip(segments.split(output.attention), segments.split(chances), is_target, strict=True)
        return torch.stack([self._bag_loss(*triple) for triple in triples])

    def auxiliary_loss(self, output: BagOutput, targets: Tensor, offsets: Tensor | None) -> Tensor:
        """Returns (1 - bag_weight) / bag_weight times the mean instance loss.

        Added to the task's loss this is CLAM's total, bag_weight · task + (1 - bag_weight) · instance loss, divided by
        bag_weight. Multi-label, regression and survival targets are refused unless bag_weight is 1.

        Args:
            output: what the head returned for the batch.
            targets: class numbers, int64 [bags].
            offsets: those of the batch.

        Raises:
            BagInputError: the targets are of another kind.
        """
        return (1 - self.bag_weight) / self.bag_weight * self.instance_loss(output, targets, offsets).mean()

    def _bag_loss(self, attention: Tensor, chances: Tensor, is_target: Tensor) -> Tensor:
        """Clustering loss of one bag: attention [n_b, branches], log-probabilities [n_b, classes, 2], its class."""
        ranks, size = attention.detach(), attention.shape[0]
        pairs = min(self.k_sample, size if self.official else size // 2)
        members = chances.new_zeros(self.n_classes)
        if pairs:
            highest = ranks.topk(pairs, dim=0).indices
            # taken out, as instances of equal attention could be at both ends
            rest = ranks if self.official else ranks.scatter(0, highest, torch.inf)
            lowest = rest.topk(pairs, dim=0, largest=False).indices
            top, bottom = _rows(chances, highest), _rows(chances, lowest)
            members = -(top[:, :, 1].mean(0) + bottom[:, :, 0].mean(0)) / 2  # [classes]
        if not self.subtyping:
            return torch.where(is_target, members, 0).sum()
        top = _rows(chances, ranks.topk(min(self.k_sample, size), dim=0).indices)
        others = -top[:, :, 0].mean(0)  # [classes]
        return torch.where(is_target, members, others).mean()


@register_aggregator("clam_sb", paper=_PAPER)
class ClamSB(_Clam):
    """CLAM with a single attention branch: gated attention, and a loss that clusters instances by attention.

        h_i = dropout(ReLU(W_e x_i + b_e))
        s_i = wᵀ (dropout(tanh(V h_i + b_V)) ⊙ dropout(sigmoid(U h_i + b_U))) / temperature
        a_i = exp(s_i) / Σ_{j ∈ b} exp(s_j),  z_b = Σ_{i ∈ b} a_i h_i,  logits_b = W z_b + b

    Class c also has an instance classifier C_c with two outputs: an instance is evidence for c, or not. For a bag of
    class y the k most attended instances are taken as evidence for y and the k least attended as none:

        loss_b = mean over these 2k instances of the cross-entropy of C_y h_i
        with subtyping, where classes exclude each other, the k most attended are no evidence for the other classes:
        loss_b = (1 / C) (the above + Σ_{c ≠ y} mean over the k most attended of the cross-entropy of C_c h_i)

    k is k_sample, at most half the bag for the class's own 2k, so that no instance has two answers. With
    official=True it is at most the bag: from 2k_sample - 1 instances downwards some are in both lists, as in the
    authors' code (which stops below k_sample).

    auxiliary_loss is for class numbers; for multi-label, regression and survival targets pass bag_weight=1.

    Shapes: instances [total, in_dim]; attention [total, 1]; embedding [bags, dim] with dim = embed_dim or in_dim;
    extras["attention_scores"] [total, 1] are the s_i, extras["cluster_logits"] [total, classes, 2] the C_c h_i
    (absent with bag_weight=1). Memory is linear in the instances.

    Args:
        in_dim: features per instance.
        n_classes: logits per bag.
        embed_dim: width of the projection; None for none.
        attention_dim: width of V and U.
        gated: multiplies by the sigmoid gate.
        dropout: probability on the embeddings h_i and on the attention's hidden layers.
        temperature: above 1 evens the attention out, below 1 sharpens it.
        k_sample: instances per cluster.
        subtyping: the classes exclude each other, so that the other classes' classifiers learn too.
        bag_weight: weight of the task's loss against the instance loss, in (0, 1]; 1 leaves out the instance loss.
        official: lets the two clusters of a small bag overlap, as in the authors' code.
        input_norm: "none", "layer" or "standardize".

    References:
        Lu, Williamson, Chen, Chen, Barbieri, Mahmood, Data-efficient and weakly supervised computational pathology on
        whole-slide images, Nature Biomedical Engineering 2021. The authors' code (mahmoodlab/CLAM, `CLAM_SB`) is
        reproduced by from_official.
        Deviations: cross-entropy instead of the smooth top-1 SVM loss for instances; small bags as said above; w has
        no bias, which changes nothing; temperature is an addition. In the authors' code any dropout above 0 means
        0.25 inside the attention; here it is the same everywhere.

    Example:
        >>> head = ClamSB(in_dim=16, n_classes=3, embed_dim=8, attention_dim=4)
        >>> offsets = torch.tensor([0, 2, 5])
        >>> output = head(torch.randn(5, 16), offsets)
        >>> output.attention.shape, head.auxiliary_loss(output, torch.tensor([0, 2]), offsets).shape
        (torch.Size([5, 1]), torch.Size([]))
    """

    single_branch = True

    def classify(self, by_branch: Tensor) -> Tensor:
        """Maps embeddings [bags, 1, dim] to logits [bags, classes]."""
        logits: Tensor = self.classifier(by_branch.squeeze(1))
        return logits

    @classmethod
    def from_official(cls, state: Mapping[str, Tensor], **keywords: object) -> "ClamSB":
        """Builds the head of a trained `CLAM_SB`, gated or not, with or without dropout.

        Names with DataParallel's `.module` are read too; `instance_loss_fn.*` is skipped.

        Args:
            state: the model's state dict.
            **keywords: what the state does not tell, such as subtyping, k_sample, dropout.

        Raises:
            OfficialStateError: parameters are missing or left over.

        Example:
            >>> layers = {"attention_net.0": (8, 6), "attention_net.3.attention_a.0": (4, 8),
            ...           "attention_net.3.attention_b.0": (4, 8), "attention_net.3.attention_c": (1, 4),
            ...           "classifiers": (2, 8), "instance_classifiers.0": (2, 8), "instance_classifiers.1": (2, 8)}
            >>> state = {f"{name}.weight": torch.zeros(shape) for name, shape in layers.items()}
            >>> state |= {f"{name}.bias": torch.zeros(shape[0]) for name, shape in layers.items()}
            >>> ClamSB.from_official(state, subtyping=True)(torch.ones(3, 6)).logits.shape
            torch.Size([1, 2])
        """
        head = cls(**_official_keywords(state, **keywords))  # type: ignore[arg-type]
        head.load_state_dict(_official_parameters(state, "CLAM_SB", ["classifiers"], head.n_classes))
        return head


@register_aggregator("clam_mb", paper=_PAPER)
class ClamMB(_Clam):
    """CLAM with an attention branch per class: every class looks at the bag on its own.

        h_i = dropout(ReLU(W_e x_i + b_e))
        s_ic = w_cᵀ (dropout(tanh(V h_i + b_V)) ⊙ dropout(sigmoid(U h_i + b_U))) / temperature
        a_ic = exp(s_ic) / Σ_{j ∈ b} exp(s_jc),  z_bc = Σ_{i ∈ b} a_ic h_i,  logits_bc = w'_cᵀ z_bc + b'_c

    The loss on instances is ClamSB's, but class c ranks a bag's instances by its own attention a_ic.

    Shapes: instances [total, in_dim]; attention [total, classes]; embedding [bags, classes · dim] with dim =
    embed_dim or in_dim; extras["attention_scores"] [total, classes] are the s_ic, extras["cluster_logits"]
    [total, classes, 2] the instance classifiers' (absent with bag_weight=1). Memory is linear in the instances.

    Args:
        in_dim: features per instance.
        n_classes: logits per bag.
        embed_dim: width of the projection; None for none.
        attention_dim: width of V and U.
        gated: multiplies by the sigmoid gate.
        dropout: probability on the embeddings h_i and on the attention's hidden layers.
        temperature: above 1 evens the attention out, below 1 sharpens it.
        k_sample: instances per cluster.
        subtyping: the classes exclude each other, so that the other classes' classifiers learn too.
        bag_weight: weight of the task's loss against the instance loss, in (0, 1]; 1 leaves out the instance loss.
        official: lets the two clusters of a small bag overlap, as in the authors' code.
        input_norm: "none", "layer" or "standardize".

    References:
        Lu, Williamson, Chen, Chen, Barbieri, Mahmood, Data-efficient and weakly supervised computational pathology on
        whole-slide images, Nature Biomedical Engineering 2021. The authors' code (mahmoodlab/CLAM, `CLAM_MB`) is
        reproduced by from_official.
        Deviations: those of ClamSB.

    Example:
        >>> head = ClamMB(in_dim=16, n_classes=3, embed_dim=8, attention_dim=4).eval()
        >>> output = head(torch.randn(5, 16), torch.tensor([0, 2, 5]))
        >>> output.logits.shape, output.attention.shape, output.embedding.shape
        (torch.Size([2, 3]), torch.Size([5, 3]), torch.Size([2, 24]))
    """

    single_branch = False

    def classify(self, by_branch: Tensor) -> Tensor:
        """Maps embeddings [bags, classes, dim] to logits [bags, classes], class c from row c."""
        return torch.einsum("bcd,cd->bc", by_branch, self.classifier.weight) + self.classifier.bias

    @classmethod
    def from_official(cls, state: Mapping[str, Tensor], **keywords: object) -> "ClamMB":
        """Builds the head of a trained `CLAM_MB`; see ClamSB.from_official.

        Raises:
            OfficialStateError: parameters are missing or left over.

        Example:
            >>> layers = {"attention_net.0": (8, 6), "attention_net.3.attention_a.0": (4, 8),
            ...           "attention_net.3.attention_b.0": (4, 8), "attention_net.3.attention_c": (2, 4),
            ...           "classifiers.0": (1, 8), "classifiers.1": (1, 8),
            ...           "instance_classifiers.0": (2, 8), "instance_classifiers.1": (2, 8)}
            >>> state = {f"{name}.weight": torch.zeros(shape) for name, shape in layers.items()}
            >>> state |= {f"{name}.bias": torch.zeros(shape[0]) for name, shape in layers.items()}
            >>> ClamMB.from_official(state)(torch.ones(3, 6)).attention.shape
            torch.Size([3, 2])
        """
        head = cls(**_official_keywords(state, **keywords))  # type: ignore[arg-type]
        classifiers = [f"classifiers.{c}" for c in range(head.n_classes)]
        head.load_state_dict(_official_parameters(state, "CLAM_MB", classifiers, head.n_classes))
        return head


def _rows(chances: Tensor, rows: Tensor) -> Tensor:
    """Takes rows [count, branches], one branch for all classes or each its own, of chances [n_b, classes, 2]."""
    return chances.gather(0, rows.unsqueeze(2).expand(-1, *chances.shape[1:]))


def _unwrapped(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Removes DataParallel's `module` from the attention net's names; the ungated net has a part of that name."""
    wrapped = "attention_net.module."
    return {name.replace(wrapped, "attention_net."): value for name, value in state.items()}


def _official_keywords(state: Mapping[str, Tensor], **keywords: object) -> dict[str, object]:
    """Reads the head's shape from an official state; dropout 0 and official=True unless the keywords say otherwise."""
    state = _unwrapped(state)
    first, hidden = "attention_net.0.weight", next((name for name in state if _is_hidden(name)), None)
    if first not in state or hidden is None:
        raise OfficialStateError(
            f"got a state dict of {', '.join(sorted(state)) or 'nothing'} → expected attention_net.0 and .3 of CLAM_SB "
            "or CLAM_MB → pass the model's own state_dict, unrenamed"
        )
    embed_dim, in_dim = state[first].shape
    n_classes = sum(name.startswith("instance_classifiers.") and name.endswith(".weight") for name in state)
    shape = {"in_dim": in_dim, "n_classes": n_classes, "embed_dim": embed_dim, "attention_dim": state[hidden].shape[0]}
    return {**shape, "gated": "attention_a" in hidden, "dropout": 0.0, "official": True, **keywords}


def _is_hidden(name: str) -> bool:
    return name.endswith(("3.attention_a.0.weight", "3.module.0.weight"))


def _official_parameters(
    state: Mapping[str, Tensor], source: str, classifiers: list[str], n_classes: int
) -> dict[str, Tensor]:
    """Renames the parameters; classifiers that are separate layers there are rows of one layer here."""
    state = _unwrapped(state)
    if "attention_net.3.attention_a.0.weight" in state:
        layers = {"v": "attention_a.0", "u": "attention_b.0", "w": "attention_c"}
    else:  # a dropout layer between the two moves the second by one
        layers = {"v": "module.0", "w": "module.3" if "attention_net.3.module.3.weight" in state else "module.2"}
    parts = {"projection.linear": ["attention_net.0"], "classifier": classifiers}
    parts["instance_classifier"] = [f"instance_classifiers.{c}" for c in range(n_classes)]
    parts.update({f"attention.{ours}": [f"attention_net.3.{theirs}"] for ours, theirs in layers.items()})
    expected = [f"{theirs}.{kind}" for names in parts.values() for theirs in names for kind in ("weight", "bias")]
    found = official_tensors(state, expected, source, ("instance_loss_fn.",))
    renamed = {
        f"{ours}.{kind}": torch.cat([found[f"{theirs}.{kind}"] for theirs in names])
        for ours, names in parts.items()
        for kind in ("weight", "bias")
    }
    del renamed["attention.w.bias"]  # a constant changes no softmax
    return renamed
