"""Checkpoints of people's own training: the encoder in them is found by an architecture's names and shapes."""

import importlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from extract.backbones.weights import State, adapt_state, load_state, read_content, read_weights
from extract.errors import BackboneError

_INNER = re.compile(r"(^|\.)(?:(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)+")
_CHUNK = re.compile(r"(^|\.)blocks\.\d+\.(\d+)\.")
_TRAINING = re.compile(
    r"(head|heads|fc|classifier|linear|\w+_head|decoder\w*|mask_token|proj_head|projection_head|projector|predictor|"
    r"momentum\w*|queue\w*|center|optimizer|args)(\.|$)"
)
_PREFERRED = re.compile(r"(^|[._])(teacher|ema)(_|\.)")
_FOLLOWERS = re.compile(r"(^|\.)(student|momentum\w*|encoder_k)\.")


class Encoder(NamedTuple):
    """The encoder of a checkpoint.

    Attributes:
        state: tensors under the architecture's names, of its shapes.
        prefix: what their names began with in the file.
        left_out: parts of the file that are not the encoder's.
        others: prefixes of other encoders that fit as well.
    """

    state: State
    prefix: str
    left_out: tuple[str, ...]
    others: tuple[str, ...]

    def describe(self, source: str) -> str:
        """One line on what was taken; empty where the file is the encoder and nothing else."""
        parts = [f"the encoder is under {self.prefix!r}"] if self.prefix else []
        parts += [f"rather than {', '.join(map(repr, self.others))}, which would fit too"] if self.others else []
        parts += [f"left out: {', '.join(self.left_out)}"] if self.left_out else []
        return f"weights {source}: {'; '.join(parts)}" if parts else ""


def read_checkpoint(file: Path) -> State:
    """Every tensor of a file by its name; names of dictionaries around it come first, joined by dots.

    Raises:
        BackboneError: no such file, damaged, or it holds what is neither tensors nor plain settings.
    """
    return _flatten(read_content(file))


def load_own(model: nn.Module, file: Path, layout: str = "timm", ignored: tuple[str, ...] = ()) -> str:
    """Load the encoder of a person's own checkpoint; says in one line which part of the file it was.

    Args:
        model: gets the weights.
        file: safetensors or PyTorch.
        layout: the other names that the file may use, a key of `extract.backbones.weights.LAYOUTS`.
        ignored: prefixes of tensors that may be left out besides heads and decoders.

    Raises:
        BackboneError: the file cannot be read, or nothing in it is all of the model.
    """
    tensors, source = read_checkpoint(file), str(file)
    try:
        encoder = find_encoder(tensors, model, source, ignored)
    except BackboneError as unfit:
        try:
            if layout == "timm":
                raise unfit
            load_state(model, adapt_state(read_weights(file), model, layout, ignored), source, ignored)
        except BackboneError:
            raise unfit from None
        return ""
    model.load_state_dict(encoder.state, strict=False)
    return encoder.describe(source)


def find_encoder(
    tensors: Mapping[str, Tensor], model: nn.Module, source: str, ignored: tuple[str, ...] = ()
) -> Encoder:
    """The tensors of a checkpoint that are all of an architecture's, whatever stands before their names.

    Args:
        tensors: as `read_checkpoint` gives them.
        model: the architecture.
        source: where they come from, for messages.
        ignored: prefixes of names that may be left out besides heads, decoders and what else training needs.

    Raises:
        BackboneError: no part of the file has all tensors of the architecture in their shapes, or several parts fit
            that differ and none is a teacher's.
    """
    expected = {key: value for key, value in model.state_dict().items() if "num_batches_tracked" not in key}
    named = {_INNER.sub(r"\1", key): value for key, value in tensors.items()}
    if not any(_CHUNK.search(key) for key in expected):
        whole = {_CHUNK.sub(r"\1blocks.\2.", key): value for key, value in named.items()}
        named = whole if len(whole) == len(named) else named
    counts = _count_prefixes(named, expected)
    fitting = {}
    for prefix in [prefix for prefix, n in counts.most_common(8) if 2 * n > len(expected)]:
        state = _fit(_below(named, prefix), model, expected, ignored)
        if state is not None:
            fitting[prefix] = state
    if not fitting:
        raise BackboneError(_explain(named, counts, model, expected, source))
    prefix = _choose(fitting, source)
    left_out = {
        _part(key, prefix)
        for key in named
        if not key.startswith(prefix)
        or (key.removeprefix(prefix) not in expected and _TRAINING.match(key.removeprefix(prefix)))
    }
    others = tuple(other for other in fitting if other != prefix)
    return Encoder(fitting[prefix], prefix, tuple(sorted(left_out)), others)


def _flatten(content: Mapping[Any, Any], before: str = "") -> State:
    found: State = {}
    for key, value in content.items():
        if isinstance(value, Tensor):
            found[f"{before}{key}"] = value
        elif isinstance(value, Mapping):
            found |= _flatten(value, f"{before}{key}.")
    return found


def _below(named: Mapping[str, Tensor], prefix: str) -> State:
    return {key.removeprefix(prefix): value for key, value in named.items() if key.startswith(prefix)}


def _count_prefixes(named: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Counter[str]:
    """How many of the expected names stand behind each prefix."""
    counts: Counter[str] = Counter()
    for key in named:
        parts = key.split(".")
        for i in range(len(parts)):
            if ".".join(parts[i:]) in expected:
                counts["".join(f"{part}." for part in parts[:i])] += 1
    return counts


def _fit(state: State, model: nn.Module, expected: Mapping[str, Tensor], ignored: tuple[str, ...]) -> State | None:
    """The tensors in the architecture's names and shapes; None where they are not all there or others are, too."""
    if not _matches(state, expected):
        patch = "patch_embed.proj.weight"
        if patch in state and patch in expected and state[patch].shape != expected[patch].shape:
            return None  # timm's filter would resample patches of another size: another architecture
        adapt = getattr(importlib.import_module(type(model).__module__), "checkpoint_filter_fn", None)
        if adapt is None:
            return None
        if "register_tokens" in state:
            state.setdefault("mask_token", torch.zeros(1))  # by which the filter knows the names of DINOv2
        try:
            state = dict(adapt(state, model))
        except (LookupError, RuntimeError, ValueError, AttributeError, TypeError):
            return None
        if not _matches(state, expected):
            return None
    classifier = getattr(model, "pretrained_cfg", {}).get("classifier") or "head"
    names = [classifier] if isinstance(classifier, str) else classifier
    allowed = tuple(f"{name}." for name in names) + ignored
    extra = set(state) - set(model.state_dict())
    if any(not key.startswith(allowed) and not _TRAINING.match(key) for key in extra):
        return None
    return {key: state[key] for key in expected}


def _matches(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    return all(key in state and state[key].shape == value.shape for key, value in expected.items())


def _choose(fitting: Mapping[str, State], source: str) -> str:
    """A teacher's or moving average's encoder before others, and a student's or momentum encoder last."""

    def rank(prefix: str) -> int:
        return 0 if _PREFERRED.search(prefix) else 2 if _FOLLOWERS.search(prefix) else 1

    best = [prefix for prefix in fitting if rank(prefix) == min(map(rank, fitting))]
    first = fitting[best[0]]
    for other in best[1:]:
        if any(not torch.equal(first[key], value) for key, value in fitting[other].items()):
            raise BackboneError(
                f"got weights from {source} with several encoders that fit, under {best} → expected one, or one of a "
                f"teacher → save the state dict of the one that is meant alone"
            )
    return best[0]


def _part(key: str, prefix: str) -> str:
    """A name for the part of a file that a tensor is of: the first word after what it shares with the encoder's."""
    shared = ""
    for part in prefix.split(".")[:-1]:
        if not key.startswith(f"{shared}{part}."):
            break
        shared += f"{part}."
    return shared + key.removeprefix(shared).split(".")[0]


def _explain(
    named: Mapping[str, Tensor],
    counts: Counter[str],
    model: nn.Module,
    expected: Mapping[str, Tensor],
    source: str,
) -> str:
    """Why nothing in a file fits: its first names, the likely prefix, what is missing, what its shapes look like."""
    prefix = counts.most_common(1)[0][0] if counts else ""
    state = _below(named, prefix)
    missing = sorted(set(expected) - set(state))
    wrong = [key for key in expected if key in state and state[key].shape != expected[key].shape]
    extra = sorted(key for key in set(state) - set(model.state_dict()) if not _TRAINING.match(key))
    shapes = [f"{key} {tuple(state[key].shape)} (expected {tuple(expected[key].shape)})" for key in wrong[:3]]
    likely = f" (likely prefix {prefix!r})" if prefix else ""
    return (
        f"got weights from {source} that do not fit {type(model).__name__}: the file begins with {list(named)[:3]}"
        f"{likely}; {len(missing)} tensors missing {missing[:3]}, {len(wrong)} of another shape {shapes}, {len(extra)} "
        f"tensors that it has not, such as {extra[:3]}{_looks_like(list(state), state)} → expected "
        f"{len(expected)} tensors → give the --backbone they belong to"
    )


def _looks_like(names: Sequence[str], state: Mapping[str, Tensor]) -> str:
    """Width, depth and patch size of a vision transformer; empty for others."""
    patch = state.get("patch_embed.proj.weight")
    if patch is None or patch.ndim != 4:
        return ""
    blocks = {found[1] for name in names if (found := re.match(r"blocks\.(\d+)\.", name))}
    return f"; its shapes are of a ViT with embed dim {patch.shape[0]}, depth {len(blocks)}, patch {patch.shape[-1]}"
