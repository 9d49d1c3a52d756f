"""Models of the transformers library that are no preset, with their authors' code where that is allowed.

The name is ``transformers:owner/model`` or ``transformers:owner/model@commit``, or a folder in place of the model. Code
from the hub runs only on an explicit flag, and only at a pinned commit, so that it cannot change after it was read.
"""

import importlib
import json
import re
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from extract.backbones.hub import offline_if_unreachable
from extract.errors import BackboneError
from extract.store import TransformRecipe

PREFIX = "transformers:"

_COMMIT = re.compile(r"[0-9a-f]{40}")
_BILINEAR = 2


class TokenModel(nn.Module):
    """A transformers model as a backbone: its last hidden state are the tokens.

    Args:
        model: called with ``pixel_values``.
        registers: tokens between the class token and the patches.
    """

    def __init__(self, model: nn.Module, registers: int) -> None:
        super().__init__()
        self.model, self.num_prefix_tokens = model, 1 + registers

    def forward_features(self, images: Tensor) -> Tensor:
        """Images [n, 3, s, s] to tokens [n, tokens, width]."""
        tokens: Tensor = self.model(pixel_values=images).last_hidden_state
        return tokens

    def forward(self, images: Tensor) -> Tensor:
        """Images [n, 3, s, s] to the class token [n, width]."""
        return self.forward_features(images)[:, 0]


def load_remote(name: str, allow_remote_code: bool) -> tuple[TokenModel, str, TransformRecipe]:
    """Load a model of the transformers library.

    Args:
        name: with the prefix ``transformers:``.
        allow_remote_code: run the code that lies beside the weights; needs a commit in the name, or a folder.

    Returns:
        The model, its revision, and the transform that its processor states.

    Raises:
        BackboneError: transformers is not installed, the model cannot be had, or its code may not run.
    """
    source, _, revision = name.removeprefix(PREFIX).partition("@")
    if allow_remote_code and not _COMMIT.fullmatch(revision) and not Path(source).is_dir():
        raise BackboneError(
            f"got {name!r} with --allow-remote-code → expected a commit, since code from the hub may change → read the "
            f"code and give {PREFIX}{source}@COMMIT (40 hexadecimal digits)"
        )
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise BackboneError(f"got {name!r} → it needs the package transformers → pip install transformers") from error
    options: dict[str, Any] = {"revision": revision or "main", "trust_remote_code": allow_remote_code}
    if allow_remote_code and revision:
        # code that the config takes from a further repository must be at this commit too, so it is refused
        options["code_revision"] = revision
    try:
        with offline_if_unreachable():
            model = transformers.AutoModel.from_pretrained(source, **options)
            config = _processor_config(source, revision or "main")
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise BackboneError(
            f"got no model for {name!r} ({type(error).__name__}: {str(error).splitlines()[0][:200]}) → expected one "
            f"that the hub or the folder has → correct the name; where it needs its authors' code, read that and give "
            f"--allow-remote-code with @COMMIT"
        ) from error
    commit = getattr(model.config, "_commit_hash", None)
    tokens = TokenModel(model, int(getattr(model.config, "num_register_tokens", 0) or 0))
    return tokens, str(revision or commit or "file"), _transform(config, model.config, name)


def _processor_config(source: str, revision: str) -> dict[str, Any]:
    """What the model's image processor is set to."""
    from huggingface_hub import hf_hub_download

    file = Path(source, "preprocessor_config.json")
    if not Path(source).is_dir():
        file = Path(hf_hub_download(source, "preprocessor_config.json", revision=revision))
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return config


def _transform(config: dict[str, Any], model_config: Any, name: str) -> TransformRecipe:
    mean, std = config.get("image_mean"), config.get("image_std")
    if not mean or not std:
        raise BackboneError(
            f"got a processor of {name!r} without image_mean and image_std → expected both → state them in its "
            f"preprocessor_config.json"
        )
    interpolation = "bilinear" if config.get("resample") == _BILINEAR else "bicubic"
    return TransformRecipe(int(getattr(model_config, "image_size", 224)), interpolation, tuple(mean), tuple(std))
