"""Architectures of the presets: timm's, and the few parts that timm has not."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from extract.backbones.presets import Preset


class ConvStem(nn.Module):
    """Patch embedding of CTransPath: two strided 3x3 convolutions and a 1x1 one instead of one of 4x4.

    Images [n, 3, h, w] to patches [n, h / 4, w / 4, embed_dim].

    References:
        Wang et al., Transformer-based unsupervised contrastive learning for histopathology, MedIA 2022.
    """

    def __init__(
        self, img_size: tuple[int, int], embed_dim: int, norm_layer: Callable[[int], nn.Module], **_: Any
    ) -> None:
        super().__init__()
        self.grid_size = (img_size[0] // 4, img_size[1] // 4)
        self.patch_size = (4, 4)
        first, second = embed_dim // 8, embed_dim // 4
        self.proj = nn.Sequential(
            nn.Conv2d(3, first, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(first),
            nn.ReLU(),
            nn.Conv2d(first, second, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(second),
            nn.ReLU(),
            nn.Conv2d(second, embed_dim, 1),
        )
        self.norm = norm_layer(embed_dim)

    def forward(self, images: Tensor) -> Tensor:
        """Images [n, 3, h, w] to patches [n, h / 4, w / 4, embed_dim]."""
        patches: Tensor = self.norm(self.proj(images).permute(0, 2, 3, 1))
        return patches


class AttentionPooledTransformer(nn.Module):
    """A vision transformer whose tokens are pooled by one learnt query of eight heads, as in CoCa.

    ``LayerNorm(out(softmax(q kᵀ / √d) v))`` with q from the query and k, v from the normalised tokens.

    Args:
        trunk: the transformer; ``trunk.forward_features`` gives [n, tokens, width].
        dim: features of the pooled query.
        bias: whether the four projections have biases.

    References:
        Yu et al., CoCa: contrastive captioners are image-text foundation models, TMLR 2022.
        Lu et al., A visual-language foundation model for computational pathology, Nat Med 2024.
    """

    def __init__(self, trunk: nn.Module, dim: int, bias: bool) -> None:
        super().__init__()
        width = int(trunk.embed_dim)  # type: ignore[arg-type]
        self.trunk, self.heads = trunk, 8
        self.num_prefix_tokens = trunk.num_prefix_tokens
        self.query = nn.Parameter(torch.zeros(1, dim))
        self.norm_query, self.norm_tokens, self.norm = nn.LayerNorm(dim), nn.LayerNorm(width), nn.LayerNorm(dim)
        self.q, self.out = nn.Linear(dim, dim, bias), nn.Linear(dim, dim, bias)
        self.k, self.v = nn.Linear(width, dim, bias), nn.Linear(width, dim, bias)

    def forward_features(self, images: Tensor) -> Tensor:
        """Images [n, 3, s, s] to the trunk's tokens [n, tokens, width]."""
        tokens: Tensor = self.trunk.forward_features(images)  # type: ignore[operator]
        return tokens

    def forward(self, images: Tensor) -> Tensor:
        """Images [n, 3, s, s] to [n, dim]."""
        tokens = self.norm_tokens(self.forward_features(images))
        query = self.q(self.norm_query(self.query)).expand(len(tokens), 1, -1)
        heads = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (query, self.k(tokens), self.v(tokens)))
        pooled = functional.scaled_dot_product_attention(*heads)  # [n, heads, 1, dim / heads]
        features: Tensor = self.norm(self.out(pooled.transpose(1, 2).flatten(1)))
        return features


def create_architecture(preset: Preset) -> nn.Module:
    """The preset's architecture with random weights."""
    return KINDS[preset.kind](preset.architecture, **preset.arguments)


def _timm(
    architecture: str, norm_eps: float | None = None, mlp_layer: str | None = None, **arguments: Any
) -> nn.Module:
    import timm
    from timm.layers import SwiGLUPacked

    if mlp_layer == "swiglu":
        arguments["mlp_layer"] = SwiGLUPacked
    if norm_eps is not None:
        arguments["norm_layer"] = partial(nn.LayerNorm, eps=norm_eps)
    model: nn.Module = timm.create_model(architecture, pretrained=False, **{"num_classes": 0} | arguments)
    return model


def _conv_stem(architecture: str, **arguments: Any) -> nn.Module:
    return _timm(architecture, embed_layer=ConvStem, img_size=(224, 224), **arguments)


def _attention_pooled(architecture: str, pool_dim: int, pool_bias: bool, **arguments: Any) -> nn.Module:
    return AttentionPooledTransformer(_timm(architecture, **arguments), pool_dim, pool_bias)


def _truncated(architecture: str, without: str, **arguments: Any) -> nn.Module:
    model = _timm(architecture, **arguments)
    setattr(model, without, nn.Identity())
    return model


KINDS: dict[str, Callable[..., nn.Module]] = {
    "timm": _timm,
    "conv_stem": _conv_stem,
    "attention_pooled": _attention_pooled,
    "truncated": _truncated,
}
"""How an architecture is built."""
