"""Normalisations inside a head, by name: over the features of an instance, over a bag, over a pack, or none.

Each is called as norm(values [total, dim], segments) → [total, dim]. They differ in what they compare a value with:

* layer: the other features of its instance. Nothing crosses instances, so it is always sound; the default.
* instance: the same feature of the other instances of its bag. It removes what all tiles of a slide share, such as
  the stain or the scanner, and with it any signal of that kind. A bag of one instance has nothing to compare: all
  such bags come out alike. A bag cut down to an instance budget has statistics of its own, rougher than the whole's.
* batch: the same feature of all packed instances; running averages in eval. A bag is a batch of one slide: packs of
  one or few bags have the statistics of these slides, not of the cohort, and training and eval disagree. Sound for
  packs of many bags only, and the one choice with which a bag's training output depends on its pack.
* none: nothing.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from aggregators.errors import require
from aggregators.segment import Segments


class Norm(nn.Module):
    """Base of the normalisations: parameters weight and bias [dim], a learned scale and shift per feature.

    Example:
        >>> norm = create_norm("layer", 8)
        >>> norm(torch.zeros(5, 8), Segments((2, 3))).shape
        torch.Size([5, 8])
    """

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, values: Tensor, segments: Segments) -> Tensor:
        """Maps [total, dim] to [total, dim]."""
        raise NotImplementedError(f"{type(self).__name__} must define forward")

    def extra_repr(self) -> str:
        """Shows the width where the module is printed."""
        return f"{self.weight.shape[0]}"


class LayerNorm(Norm):
    """Normalises each instance over its features: (v_i - mean(v_i)) / √(var(v_i) + ε) · weight + bias.

    Example:
        >>> LayerNorm(2)(torch.tensor([[1.0, 3.0]]), Segments((1,))).round().tolist()
        [[-1.0, 1.0]]
    """

    def forward(self, values: Tensor, segments: Segments) -> Tensor:
        """Maps [total, dim] to [total, dim]."""
        return functional.layer_norm(values, self.weight.shape, self.weight, self.bias, self.eps)


class InstanceNorm(Norm):
    """Normalises each feature over the instances of its bag: (v - mean_b) / √(var_b + ε) · weight + bias.

    Variance divides by n_b. Eval computes the same as training, from the bag at hand.

    Example:
        >>> InstanceNorm(1)(torch.tensor([[1.0], [3.0], [9.0]]), Segments((2, 1))).round().flatten().tolist()
        [-1.0, 1.0, 0.0]
    """

    def forward(self, values: Tensor, segments: Segments) -> Tensor:
        """Maps [total, dim] to [total, dim]."""
        exact = values.to(torch.promote_types(values.dtype, torch.float32))
        normed = torch.cat([self._centred(bag) for bag in segments.split(exact)])
        return normed.to(values.dtype) * self.weight + self.bias

    def _centred(self, bag: Tensor) -> Tensor:
        variance, mean = torch.var_mean(bag, 0, correction=0)
        return (bag - mean) * (variance + self.eps).rsqrt()


class BatchNorm(Norm):
    """Normalises each feature over all packed instances in training, by running averages in eval.

    The buffers running_mean and running_var [dim] move by `momentum` towards each pack's statistics. A pack of one
    instance has no variance: it is normalised by the running averages in training too.

    Example:
        >>> norm = BatchNorm(1)
        >>> norm(torch.tensor([[1.0], [3.0]]), Segments((1, 1))).round().flatten().tolist()
        [-1.0, 1.0]
        >>> norm.running_mean.tolist()
        [0.20000000298023224]
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, dim: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__(dim, eps)
        self.momentum = momentum
        self.register_buffer("running_mean", torch.zeros(dim))
        self.register_buffer("running_var", torch.ones(dim))

    def forward(self, values: Tensor, segments: Segments) -> Tensor:
        """Maps [total, dim] to [total, dim]."""
        learns = self.training and values.shape[0] > 1
        averages = self.running_mean, self.running_var
        return functional.batch_norm(values, *averages, self.weight, self.bias, learns, self.momentum, self.eps)


class NoNorm(nn.Module):
    """Returns the values as they are.

    Example:
        >>> NoNorm()(torch.ones(1, 2), Segments((1,))).tolist()
        [[1.0, 1.0]]
    """

    def forward(self, values: Tensor, segments: Segments) -> Tensor:
        """Maps [total, dim] to itself."""
        return values


_NORMS: dict[str, type[Norm]] = {"layer": LayerNorm, "instance": InstanceNorm, "batch": BatchNorm}


def create_norm(name: str, dim: int) -> nn.Module:
    """Builds a normalisation of packed instances, called as norm(values [total, dim], segments).

    Args:
        name: "layer", "instance", "batch" or "none"; the module's docstring says when each is sound.
        dim: features per instance.

    Raises:
        HeadConfigError: another name.

    Example:
        >>> create_norm("instance", 8)
        InstanceNorm(8)
    """
    names = [*_NORMS, "none"]
    require(name in names, f"got norm {name!r} → expected one of {', '.join(names)} → pick one of these")
    return NoNorm() if name == "none" else _NORMS[name](dim)


def create_bag_norm(name: str, dim: int) -> nn.Module:
    """Builds the normalisation of what has one row per bag [bags, dim], such as class tokens.

    One row has no statistics over instances, and those over a pack's few bags are not the cohort's: "instance" and
    "batch" give a LayerNorm here, as "layer" does. "none" stays none.

    Raises:
        HeadConfigError: another name.

    Example:
        >>> create_bag_norm("instance", 8)
        LayerNorm(8)
    """
    chosen = create_norm(name, dim)
    return chosen if isinstance(chosen, NoNorm) else LayerNorm(dim)
