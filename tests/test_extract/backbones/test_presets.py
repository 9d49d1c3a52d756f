"""Presets: every row builds at its full size, and loads offline from a hub folder written as its authors publish it."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from extract.backbones import presets
from extract.backbones.architectures import AttentionPooledTransformer, create_architecture
from extract.backbones.backbone import PooledModel, load_backbone
from extract.backbones.hub import find_cached
from extract.backbones.presets import PRESETS, Preset, find_preset, require_preset
from extract.backbones.transformers_models import load_remote
from extract.backbones.verification import verify_backbone
from extract.backbones.weights import adapt_state, load_state
from extract.errors import BackboneError
from tests.conftest import REPOSITORY

State = dict[str, Tensor]

COMMIT = "0123456789abcdef0123456789abcdef01234567"
HUB_PRESETS = [name for name, preset in PRESETS.items() if preset.hub_id]


# ---------------------------------------------------------------- what a row says


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_a_row_is_complete(preset: Preset):
    assert preset.name == preset.name.lower()
    assert preset.pooling in preset.dims
    assert preset.licence
    assert preset.paper
    assert preset.note
    assert preset.precision in ("fp32", "bf16", "fp16")
    assert preset.interpolation in ("bilinear", "bicubic")
    assert all(0 < value < 1 for value in (*preset.mean, *preset.std))
    assert preset.revision == "main" or not preset.hub_id or re.fullmatch("[0-9a-f]{40}", preset.revision)
    assert bool(preset.files) == bool(preset.hub_id)


def test_no_revision_stands_for_two_models():
    pinned = {preset.hub_id: preset.revision for preset in PRESETS.values() if preset.pinned}
    assert len(set(pinned.values())) == len(pinned)
    assert len({preset.name for preset in PRESETS.values()}) == len(PRESETS)


PUBLISHED = {
    "uni": 1024,
    "uni2-h": 1536,
    "conch": 512,
    "conch-v1.5": 768,
    "virchow": 2560,
    "virchow2": 2560,
    "prov-gigapath": 1536,
    "h-optimus-0": 1536,
    "h-optimus-1": 1536,
    "h0-mini": 768,
    "phikon": 768,
    "phikon-v2": 1024,
    "hibou-b": 768,
    "hibou-l": 1024,
    "midnight-12k": 3072,
    "gpfm": 1024,
    "ctranspath": 768,
    "plip": 512,
    "resnet50": 2048,
    "resnet50_layer3": 1024,
    "efficientnet_lite0": 1280,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_dims_are_the_published_ones(name: str):
    assert PRESETS[name].dim == PUBLISHED[name]


@pytest.mark.parametrize(("name", "pooling", "dim"), [("virchow2", "cls", 1280), ("midnight-12k", "cls", 1536)])
def test_the_other_pooling_of_a_name_is_declared(name: str, pooling: str, dim: int):
    assert PRESETS[name].dims[pooling] == dim


def test_a_name_is_found_whatever_its_case():
    assert find_preset("UNI2_h") is PRESETS["uni2-h"]
    assert find_preset("Virchow2") is PRESETS["virchow2"]
    assert find_preset("resnet50-layer3") is PRESETS["resnet50_layer3"]
    assert find_preset("vit_tiny_patch16_224") is None
    with pytest.raises(BackboneError, match=r"virchow3.*did you mean \['virchow"):
        require_preset("virchow3")


# ---------------------------------------------------------------- the architecture at full size

PARAMETERS = {  # millions, as published
    "uni2-h": 681,
    "virchow": 631,
    "prov-gigapath": 1135,
    "h-optimus-0": 1135,
    "h0-mini": 86,
    "hibou-b": 86,
    "hibou-l": 304,
    "midnight-12k": 1135,
    "gpfm": 303,
    "ctranspath": 28,
    "dinov3-vit7b16": 6716,
}
LARGE = [p for p in PRESETS.values() if re.search("large|huge|giant|7b", p.architecture) or p.name in PARAMETERS]


@pytest.mark.parametrize("preset", LARGE, ids=lambda preset: preset.name)
def test_the_full_architecture_gives_the_declared_dims(preset: Preset):
    """On the meta device, which computes shapes only: the largest models do not fit a test. The next section's do."""
    with torch.device("meta"), torch.inference_mode():
        model = create_architecture(preset).eval()
        size = preset.input_px or 224
        features = PooledModel(model, preset.pooling)(torch.zeros(1, 3, size, size))
    assert features.shape == (1, preset.dim)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert round(millions) == PARAMETERS.get(preset.name, round(millions))


# ---------------------------------------------------------------- offline, from a hub folder


def shallow(preset: Preset) -> Preset:
    """The same width and parts with one block; ResNets as they are, and the 7B model an eighth as wide."""
    if preset.kind == "truncated" or "resnet" in preset.architecture:
        return preset
    less: dict[str, Any] = {"depths": (1, 1, 1, 1)} if preset.kind == "conv_stem" else {"depth": 1}
    if preset.name == "dinov3-vit7b16":
        less |= {"embed_dim": 512, "num_heads": 4}
        preset = dataclasses.replace(preset, dims={pooling: dim // 8 for pooling, dim in preset.dims.items()})
    return dataclasses.replace(preset, arguments={**preset.arguments, **less})


def random_model(preset: Preset) -> nn.Module:
    torch.manual_seed(0)
    model = create_architecture(preset).eval()
    with torch.no_grad():
        for key, value in model.state_dict().items():
            # CLIP's projection has no bias, so its file has none either
            if value.is_floating_point() and key != "head.bias":
                value.add_(0.02 * torch.rand(value.shape))
    return model


def split_attention(state: State) -> State:
    """timm's ``qkv`` as query, key and value."""
    split = {}
    for key, value in state.items():
        if ".qkv." in key:
            parts = value.chunk(3)
            split |= {key.replace(".qkv.", f".{p}."): v for p, v in zip(("query", "key", "value"), parts, strict=True)}
        else:
            split[key] = value
    return split


def replace(state: State, pairs: list[tuple[str, str]]) -> State:
    renamed = {}
    for key, value in state.items():
        for old, new in pairs:
            key = re.sub(old, new, key)
        renamed[key] = value.contiguous()
    return renamed


def publish_transformers(state: State, preset: Preset) -> State:
    """Names of the transformers library, version 4, in which the files were published."""
    if preset.name == "phikon":
        block = [("mlp.fc1", "intermediate.dense"), ("mlp.fc2", "output.dense"), ("norm1", "layernorm_before")]
        block += [("norm2", "layernorm_after"), ("attn.proj", "attention.output.dense")]
    else:
        fused = "mlp_layer" in preset.arguments or "giant" in preset.architecture
        block = [("mlp.fc1", "mlp.weights_in"), ("mlp.fc2", "mlp.weights_out")] if fused else []
        block += [(r"ls(\d).gamma", r"layer_scale\1.lambda1"), ("attn.proj", "attention.output.dense")]
    state = split_attention(state)
    if "reg_token" in state:
        state["embeddings.register_tokens"] = state.pop("reg_token")
        apart = torch.randn_like(state["cls_token"])
        state["pos_embed"] = torch.cat([apart, state["pos_embed"]], dim=1)
        state["cls_token"] = state["cls_token"] - apart
    state = replace(
        state,
        [
            *block,
            (r"attn\.(query|key|value)", r"attention.attention.\1"),
            (r"^blocks\.", "encoder.layer."),
            (r"^norm\.", "layernorm."),
            (r"^cls_token", "embeddings.cls_token"),
            (r"^pos_embed", "embeddings.position_embeddings"),
            (r"^patch_embed.proj", "embeddings.patch_embeddings.projection"),
        ],
    )
    extra = {"pooler.dense.weight": torch.zeros(2, 2)} if preset.name == "phikon" else {}
    return state | (extra or {"embeddings.mask_token": torch.zeros(1, 4)})


def publish_clip(state: State, preset: Preset) -> State:
    state = split_attention({key: value for key, value in state.items() if key != "head.bias"})
    state["cls_token"], state["pos_embed"] = state["cls_token"][0, 0], state["pos_embed"][0]
    towers = {"text_model.final_layer_norm.weight": torch.ones(4), "logit_scale": torch.tensor(1.0)}
    names = [
        (r"attn\.query", "self_attn.q_proj"),
        (r"attn\.key", "self_attn.k_proj"),
        (r"attn\.value", "self_attn.v_proj"),
        (r"attn\.proj", "self_attn.out_proj"),
        (r"^norm_pre", "vision_model.pre_layrnorm"),
        (r"^norm\.", "vision_model.post_layernorm."),
        (r"\.norm(\d)", r".layer_norm\1"),
        (r"^blocks", "vision_model.encoder.layers"),
        (r"^cls_token", "vision_model.embeddings.class_embedding"),
        (r"^pos_embed", "vision_model.embeddings.position_embedding.weight"),
        (r"^patch_embed.proj", "vision_model.embeddings.patch_embedding"),
        (r"^head", "visual_projection"),
    ]
    return replace(state, names) | towers


def publish_conch(state: State, preset: Preset) -> State:
    pool = "attn_pool_contrast."
    names = [(r"^norm\.", "ln_contrast."), (r"^norm_query\.", f"{pool}ln_q."), (r"^norm_tokens\.", f"{pool}ln_k.")]
    names += [(r"^query$", f"{pool}query")]
    if preset.name == "conch-v1.5":
        state[f"{pool}to_kv.weight"] = torch.cat([state.pop("k.weight"), state.pop("v.weight")])
        return replace(state, [*names, (r"^(q|out)\.", rf"{pool}to_\1.")])
    state[f"{pool}attn.in_proj_bias"] = torch.cat([state.pop(f"{part}.bias") for part in "qkv"])
    names += [(r"^([qkv])\.weight", rf"{pool}attn.\1_proj_weight"), (r"^out\.", f"{pool}attn.out_proj.")]
    state = replace(state, names)
    return {f"visual.{key}": value for key, value in state.items()} | {
        "visual.proj_contrast": torch.zeros(4, 4),
        "visual.attn_pool_caption.query": torch.zeros(2, 4),
        "text.cls_emb": torch.zeros(4),
    }


def publish_timm(state: State, preset: Preset) -> State:
    if preset.name == "ctranspath":
        # older timm counts a stage's downsampling with the stage before
        moved = {
            re.sub(r"layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", k): k for k in state
        }
        return {new: state[old] for new, old in moved.items()} | {"layers.0.blocks.1.attn_mask": torch.zeros(4)}
    if preset.name == "resnet50_layer3":
        return state | {"layer4.0.conv1.weight": torch.zeros(2), "fc.weight": torch.zeros(1000, 2048)}
    return state


PUBLISHERS: dict[str, Callable[[State, Preset], State]] = {
    "timm": publish_timm,
    "transformers": publish_transformers,
    "transformers_clip": publish_clip,
    "conch": publish_conch,
}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def put(cache: Path, preset: Preset, state: State, hub_id: str | None = None) -> Path:
    """Weights in the cache as the hub's client lays them."""
    repository = cache / f"models--{(hub_id or preset.hub_id).replace('/', '--')}"
    commit = preset.revision if preset.pinned else COMMIT
    folder = repository / "snapshots" / commit
    folder.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    file = folder / preset.files[0]
    if file.suffix == ".safetensors":
        save_file(state, file)
    else:
        torch.save(state, file)
    return file


def tiles(n: int, size: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


@pytest.mark.parametrize("name", HUB_PRESETS)
def test_a_row_loads_offline_from_the_files_that_its_authors_publish(
    name: str, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    preset = shallow(PRESETS[name])
    monkeypatch.setitem(presets.PRESETS, name, preset)
    model = random_model(preset)
    # a copy, since publishing takes the names apart
    put(cache, preset, PUBLISHERS[preset.layout]({k: v.clone() for k, v in model.state_dict().items()}, preset))
    backbone = load_backbone(name, tile_px=64)
    recipe = backbone.recipe
    assert (recipe.backbone, recipe.pooling, recipe.dim) == (name, preset.pooling, preset.dim)
    assert recipe.revision == (preset.revision if preset.pinned else COMMIT)
    assert (recipe.transform.mean, recipe.transform.std) == (preset.mean, preset.std)
    pixels = tiles(1, 64)
    images = backbone.prepare(pixels)
    assert images.shape[-1] == (preset.input_px or 64)
    with torch.inference_mode():
        expected = PooledModel(model, preset.pooling)(images)
    found = backbone.forward(images)
    assert found.shape == (1, preset.dim)
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    assert float(expected.std()) > 0


def test_position_embeddings_of_another_grid_are_resampled(cache: Path, monkeypatch: pytest.MonkeyPatch):
    """A smooth field of positions is the same field on the coarser grid."""
    for name, side in (("dinov2-vits14", 37), ("midnight-12k", 37), ("conch-v1.5", 14)):
        preset = shallow(PRESETS[name])
        model = random_model(preset)
        state = {key: value.clone() for key, value in model.state_dict().items()}
        key = "trunk.pos_embed" if name == "conch-v1.5" else "pos_embed"
        ramp = ((torch.arange(side) + 0.5) / side).expand(side, side).reshape(1, -1, 1)
        width = state[key].shape[-1]
        state[key] = torch.cat([state[key][:, :1], ramp.expand(1, side * side, width)], dim=1)
        adapted = adapt_state(PUBLISHERS[preset.layout](state, preset), model, preset.layout, preset.ignored)
        load_state(model, adapted, name, preset.ignored)
        grid = round((adapted[key].shape[1] - 1) ** 0.5)
        found = adapted[key][0, 1:, 0].reshape(grid, grid)
        expected = ((torch.arange(grid) + 0.5) / grid).expand(grid, grid)
        assert torch.allclose(found[:, 2:-2], expected[:, 2:-2], atol=0.01)


def test_another_spelling_of_the_hub_id_in_the_cache_is_found(cache: Path):
    preset = PRESETS["uni"]
    file = put(cache, preset, {"a": torch.zeros(1)}, hub_id="mahmoodlab/uni")
    assert find_cached(preset) == file


def test_the_pooling_of_the_other_tools_gives_their_dims(cache: Path, monkeypatch: pytest.MonkeyPatch):
    preset = shallow(PRESETS["virchow2"])
    monkeypatch.setitem(presets.PRESETS, "virchow2", preset)
    put(cache, preset, random_model(preset).state_dict())
    both, token = load_backbone("virchow2"), load_backbone("Virchow2", pooling="cls")
    assert (both.recipe.dim, token.recipe.dim) == (2560, 1280)
    pixels = tiles(1, 224)
    assert np.allclose(both.embed(pixels)[:, :1280], token.embed(pixels), atol=1e-5)
    with torch.inference_mode():
        tokens = both._model.forward_features(both.prepare(pixels))  # type: ignore[operator]
    assert np.allclose(both.embed(pixels)[:, 1280:], tokens[:, 5:].mean(1).numpy(), atol=1e-4)


def test_a_weights_file_takes_the_published_names_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    preset = shallow(PRESETS["phikon"])
    monkeypatch.setitem(presets.PRESETS, "phikon", preset)
    state = random_model(preset).state_dict()
    save_file(state, tmp_path / "timm.safetensors")
    torch.save({"state_dict": publish_transformers(dict(state), preset)}, tmp_path / "published.pth")
    one, other = (load_backbone("phikon", tmp_path / name) for name in ("timm.safetensors", "published.pth"))
    assert one.recipe == other.recipe
    assert one.recipe.revision == "file"


@pytest.mark.parametrize("name", ["phikon", "conch", "plip", "ctranspath"])
def test_weights_of_another_model_are_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(presets.PRESETS, name, shallow(PRESETS[name]))
    save_file({"blocks.0.attn.query.weight": torch.zeros(3, 3)}, tmp_path / "other.safetensors")
    with pytest.raises(BackboneError, match="--backbone"):
        load_backbone(name, tmp_path / "other.safetensors")


# ---------------------------------------------------------------- against other implementations


def test_attention_pooling_is_torchs_multihead_attention():
    torch.manual_seed(0)
    trunk = SimpleNamespace(embed_dim=24, num_prefix_tokens=1, forward_features=lambda tokens: tokens)
    ours = AttentionPooledTransformer(trunk, 16, True)  # type: ignore[arg-type]
    theirs = nn.MultiheadAttention(16, 8, kdim=24, vdim=24, batch_first=True)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.copy_(torch.randn(parameter.shape))
        for name in "qkv":
            getattr(theirs, f"{name}_proj_weight").copy_(getattr(ours, name).weight)
        theirs.in_proj_bias.copy_(torch.cat([getattr(ours, name).bias for name in "qkv"]))
        theirs.out_proj.load_state_dict(ours.out.state_dict())
        tokens = torch.randn(3, 10, 24)
        memory = ours.norm_tokens(tokens)
        query = ours.norm_query(ours.query).expand(3, 1, 16)
        expected = ours.norm(theirs(query, memory, memory)[0][:, 0])
        assert torch.allclose(ours(tokens), expected, atol=1e-5)


@pytest.mark.parametrize("name", ["phikon", "phikon-v2", "midnight-12k", "hibou-b", "plip"])
def test_features_are_those_of_the_transformers_library(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    transformers = pytest.importorskip("transformers")
    kinds = {"phikon": "ViT", "plip": "CLIPVision", "hibou-b": "Dinov2WithRegisters"}
    options: dict[str, Any] = {
        "phikon-v2": {"hidden_size": 1024, "num_attention_heads": 16, "patch_size": 16},
        "midnight-12k": {"hidden_size": 1536, "num_attention_heads": 24, "use_swiglu_ffn": True, "image_size": 518},
        "hibou-b": {"use_swiglu_ffn": True, "patch_size": 14},
        "plip": {"projection_dim": 512},
    }.get(name, {})
    kind = kinds.get(name, "Dinov2")
    config = getattr(transformers, f"{kind}Config")(**{"num_hidden_layers": 1, "image_size": 224} | options)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}Model{'WithProjection' if name == 'plip' else ''}")(config).eval()
    model.save_pretrained(tmp_path)
    monkeypatch.setitem(presets.PRESETS, name, shallow(PRESETS[name]))
    backbone = load_backbone(name, tmp_path / "model.safetensors")
    pixels = tiles(2, 224)
    with torch.inference_mode():
        output = model(pixel_values=backbone.prepare(pixels))
    if name == "plip":
        expected = output.image_embeds
    else:
        tokens = output.last_hidden_state
        expected = tokens[:, 0]
        if PRESETS[name].pooling == "cls+avg":
            expected = torch.cat([expected, tokens[:, 1:].mean(1)], dim=1)
    assert np.allclose(backbone.embed(pixels), expected.numpy(), atol=1e-4)


# ---------------------------------------------------------------- where there is no network, no licence, no file


def run_python(code: str, home: Path, **environment: str) -> tuple[list[str], float]:
    """Lines that the code prints in a new process with an empty cache, and the seconds that it took inside."""
    prelude = """
import sys, time
import mil.cli.slides.models, extract.backbones.verification
from extract.backbones.backbone import load_backbone
from extract.errors import BackboneError
assert "huggingface_hub" not in sys.modules, "the hub's client is loaded at import"
import huggingface_hub.constants, timm
started = time.monotonic()
"""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_") and "proxy" not in key.lower()}
    done = subprocess.run(
        [sys.executable, "-c", f"{prelude}\n{code}\nprint(time.monotonic() - started)"],
        cwd=REPOSITORY,
        env={**kept, "HF_HOME": str(home), "TORCH_HOME": str(home), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    *lines, seconds = done.stdout.splitlines()
    return lines, float(seconds)


REPORT = """
for name in {names}:
    try:
        load_backbone(name)
    except BackboneError as error:
        print(error)
"""


@pytest.mark.parametrize("offline", ["", "1"])
def test_absent_weights_are_reported_within_seconds(offline: str, tmp_path: Path):
    """The hub's name does not resolve here, and nothing is in the cache."""
    names = ("UNI2-h", "phikon", "resnet10t", "hf-hub:nobody/nothing")
    lines, seconds = run_python(
        REPORT.format(names=names), tmp_path, HF_HUB_OFFLINE=offline, HF_ENDPOINT="https://hub.invalid"
    )
    assert len(lines) == len(names)
    assert "https://hub.invalid/MahmoodLab/UNI2-h" in lines[0]
    assert "HF_TOKEN" in lines[0]
    assert "HF_TOKEN" not in lines[1]
    for line, pull in zip(lines, ("mil models pull uni2-h", "mil models pull phikon", "", ""), strict=True):
        assert pull in line
        assert "--weights FILE" in line
        assert "HF_HOME" in line
    assert ("HF_HUB_OFFLINE is set" if offline else "out of reach") in lines[0]
    assert seconds < 10


class Hub(BaseHTTPRequestHandler):
    """A hub with one gated model, and one open one whose file says hello."""

    def do_HEAD(self) -> None:
        self.answer(False)

    def do_GET(self) -> None:
        self.answer(True)

    def answer(self, with_body: bool) -> None:
        body, status, headers = b"", 404, {"X-Error-Code": "EntryNotFound"}
        if "MahmoodLab" in self.path:
            status, headers = 403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."}
        elif self.path.endswith("pytorch_model.bin"):
            body, status, headers = b"hello", 200, {"ETag": '"abc"', "X-Repo-Commit": COMMIT}
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub() -> Iterator[str]:
    """Address of a local hub."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


PULL = """
from extract.backbones.hub import download, fetch, find_cached
from extract.backbones.presets import PRESETS
print(find_cached(PRESETS["plip"]))
print(download(PRESETS["plip"]).read_text())
print(find_cached(PRESETS["plip"]).parent.name)
huggingface_hub.constants.HF_HUB_OFFLINE = True
print(fetch(PRESETS["plip"]).read_text())
"""


def test_a_hub_is_asked_for_weights_and_its_refusals_are_explained(hub: str, tmp_path: Path):
    """A model without the file, a gated one, and one that has the second of its file names and is then in the cache."""
    lines, seconds = run_python(REPORT.format(names=("gpfm", "uni")) + PULL, tmp_path, HF_ENDPOINT=hub)
    assert "the hub has none of ['GPFM.pth']" in lines[0]
    assert "GatedRepoError" in lines[1]
    assert f"accept the licence at {hub}/MahmoodLab/UNI" in lines[1]
    assert lines[2:] == ["None", "hello", COMMIT, "hello"]
    assert seconds < 10


def test_a_revision_that_is_not_the_pinned_one_is_named(cache: Path):
    preset = dataclasses.replace(PRESETS["uni"], revision=COMMIT)
    put(cache, preset, {"a": torch.zeros(1)})
    with pytest.raises(BackboneError, match=rf"{COMMIT}.*not {PRESETS['uni'].revision}"):
        load_backbone("uni")


# ---------------------------------------------------------------- verification


@pytest.mark.parametrize(
    ("file", "config", "found", "passed"),
    [
        (
            "config.json",
            {"pretrained_cfg": {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}},
            "agrees",
            True,
        ),
        (
            "preprocessor_config.json",
            {"image_mean": [0.5] * 3, "image_std": [0.5] * 3},
            "differs: the preset's mean",
            False,
        ),
        ("config.json", {"hidden_size": 768}, "no config beside the weights", True),
    ],
)
def test_the_normalisation_is_compared_with_the_config_beside_the_weights(
    file: str, config: dict, found: str, passed: bool, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    preset = shallow(PRESETS["dinov2-vits14"])
    monkeypatch.setitem(presets.PRESETS, preset.name, preset)
    weights = put(cache, preset, random_model(preset).state_dict())
    (weights.parent / file).write_text(json.dumps(config))
    result = verify_backbone(preset.name, device="cpu")
    assert result.normalisation.startswith(found)
    assert (result.passed, result.dim, result.finite, result.distinct) == (passed, 384, True, True)


def test_weights_that_give_nan_or_one_vector_are_not_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    preset = shallow(PRESETS["dinov2-vits14"])
    monkeypatch.setitem(presets.PRESETS, preset.name, preset)
    state = random_model(preset).state_dict()
    for value, attribute in ((float("nan"), "finite"), (0.0, "distinct")):
        save_file(state | {"norm.weight": torch.full((384,), value)}, tmp_path / "w.safetensors")
        result = verify_backbone(preset.name, tmp_path / "w.safetensors", device="cpu")
        assert not getattr(result, attribute)
        assert not result.passed


# ---------------------------------------------------------------- remote code


@pytest.mark.parametrize("name", ["transformers:owner/model", "transformers:owner/model@main"])
def test_remote_code_runs_at_a_pinned_commit_only(name: str):
    with pytest.raises(BackboneError, match="COMMIT"):
        load_remote(name, allow_remote_code=True)


MODEL_CODE = """
from pathlib import Path
from transformers import PretrainedConfig, PreTrainedModel
import torch
Path(r"{mark}").touch()
class Config(PretrainedConfig):
    model_type = "tessera_test"
class Model(PreTrainedModel):
    config_class = Config
    def __init__(self, config):
        super().__init__(config)
        self.scale = torch.nn.Parameter(torch.ones(8))
        self.post_init()
    def forward(self, pixel_values):
        tokens = pixel_values.mean((1, 2, 3))[:, None, None] * self.scale
        return type("Output", (), {{"last_hidden_state": tokens.expand(-1, 5, -1)}})
"""


def test_a_model_with_its_own_code_needs_the_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "modeling_own.py").write_text(MODEL_CODE.format(mark=tmp_path / "ran"))
    config = {
        "model_type": "tessera_test",
        "auto_map": {"AutoConfig": "modeling_own.Config", "AutoModel": "modeling_own.Model"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.2] * 3}))
    save_file({"scale": torch.arange(8.0)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BackboneError, match="--allow-remote-code"):
        load_backbone(f"transformers:{folder}")
    assert not (tmp_path / "ran").exists()
    backbone = load_backbone(f"transformers:{folder}", allow_remote_code=True, pooling="cls+avg")
    assert (tmp_path / "ran").exists()
    assert (backbone.recipe.dim, backbone.recipe.revision, backbone.recipe.transform.std) == (
        16,
        "file",
        (0.2, 0.2, 0.2),
    )
    assert load_backbone(f"transformers:{folder}", allow_remote_code=True).recipe.dim == 8


def test_a_missing_transformers_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(BackboneError, match="pip install transformers"):
        load_remote("transformers:owner/model", allow_remote_code=False)
