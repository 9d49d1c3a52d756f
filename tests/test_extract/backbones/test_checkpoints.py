"""Checkpoints of people's own training: every usual wrapping loads, and nothing loads in part."""

import argparse
import json
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from extract.backbones import load_backbone
from extract.backbones.checkpoints import find_encoder, load_own, read_checkpoint
from extract.errors import BackboneError, RecipeMismatchError
from extract.pipeline.extraction import run_extraction
from tests.test_extract.small import TILES, write_slide

State = dict[str, Any]


def vit(seed: int = 0, **settings: Any) -> nn.Module:
    torch.manual_seed(seed)
    tiny = {"img_size": 32, "patch_size": 8, "embed_dim": 8, "depth": 3, "num_heads": 2, "num_classes": 0}
    return timm.models.VisionTransformer(**{**tiny, **settings})


@cache
def encoder() -> nn.Module:
    return vit()


def under(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


def chunked(state: State) -> State:
    def name(key: str) -> str:
        return f"blocks.{int(key.split('.')[1]) // 2}.{key.split('.', 1)[1]}" if key.startswith("blocks.") else key

    return {name(key): value for key, value in state.items()}


HEAD = torch.zeros(2, 2)
LAYOUTS: dict[str, Callable[[State, State], State]] = {
    "plain": lambda s, o: s,
    "DDP": lambda s, o: under("module.", s),
    "compiled": lambda s, o: under("_orig_mod.", s),
    "DINOv2": lambda s, o: {"teacher": under("backbone.", s) | {"dino_head.mlp.0.weight": HEAD}},
    "FSDP": lambda s, o: {"teacher": under("backbone.", chunked(s))},
    "DINO": lambda s, o: {
        "student": under("module.backbone.", o),
        "teacher": under("module.backbone.", s) | {"module.head.last_layer.weight": HEAD},
    },
    "Lightning": lambda s, o: {"state_dict": under("model.", s), "epoch": 3},
    "moving average": lambda s, o: {"state_dict": o, "state_dict_ema": s},
    "MoCo v3": lambda s, o: {
        "state_dict": under("module.base_encoder.", s)
        | under("module.momentum_encoder.", o)
        | {"module.predictor.0.weight": HEAD}
    },
    "MoCo v2": lambda s, o: {"state_dict": under("module.encoder_q.", s) | under("module.encoder_k.", o)},
    "MAE": lambda s, o: {"model": s | {"mask_token": torch.zeros(1, 1, 8), "decoder_embed.weight": HEAD}},
    "arguments": lambda s, o: {"model": s, "args": argparse.Namespace(lr=0.1), "loss": np.float64(0.5)},
}


def assert_same(got: nn.Module, wanted: nn.Module) -> None:
    for key, value in wanted.state_dict().items():
        assert torch.equal(got.state_dict()[key], value), key


@pytest.mark.parametrize("layout", LAYOUTS)
def test_usual_layouts_load_the_encoder_that_is_meant(tmp_path: Path, layout: str):
    other = vit(1).state_dict()
    torch.save(LAYOUTS[layout](encoder().state_dict(), other), tmp_path / "w.pth")
    model = vit(2)
    load_own(model, tmp_path / "w.pth")
    assert_same(model, encoder())


@given(st.lists(st.sampled_from(["module.", "_orig_mod.", "model.", "backbone.", "encoder.", "@teacher", "@model"])))
@settings(max_examples=40, deadline=None)
def test_wrappers_and_prefixes_load_in_any_order(layers: list[str]):
    from extract.backbones.checkpoints import _flatten

    state: State = dict(encoder().state_dict())
    for layer in layers:
        state = {layer[1:]: state} if layer.startswith("@") else under(layer, state)
    found = find_encoder(_flatten(state), vit(2), "w.pth")
    assert all(torch.equal(found.state[key], value) for key, value in encoder().state_dict().items())


def test_what_is_left_out_is_named(tmp_path: Path):
    torch.save(LAYOUTS["DINO"](encoder().state_dict(), vit(1).state_dict()), tmp_path / "w.pth")
    line = load_own(vit(2), tmp_path / "w.pth")
    assert "under 'teacher.module.backbone.' rather than" in line.replace(";", "").replace("  ", " ")
    assert "'student.module.backbone.'" in line
    assert "teacher.module.head" in line


def test_position_embeddings_of_another_size_are_resampled_as_timm_does():
    large = vit(img_size=64).state_dict()
    model = vit(2)
    wanted = timm.models.vision_transformer.checkpoint_filter_fn(dict(large), model)["pos_embed"]
    found = find_encoder(under("module.", large), model, "w.pth")
    torch.testing.assert_close(found.state["pos_embed"], wanted)


WRONG: dict[str, Callable[[], State]] = {
    "deeper": lambda: dict(vit(depth=4).state_dict()),
    "shallower": lambda: dict(vit(depth=2).state_dict()),
    "wider": lambda: dict(vit(embed_dim=16).state_dict()),
    "other patches": lambda: dict(vit(patch_size=4).state_dict()),
    "one tensor short": lambda: {k: v for k, v in encoder().state_dict().items() if k != "norm.bias"},
    "one tensor more": lambda: {**encoder().state_dict(), "blocks.0.attn.gate": torch.zeros(1)},
    "chunks that count anew": lambda: (
        {
            f"blocks.{i}.{k.removeprefix('blocks.')}": v
            for i in range(2)
            for k, v in encoder().state_dict().items()
            if k.startswith("blocks.")
        }
        | {k: v for k, v in encoder().state_dict().items() if not k.startswith("blocks.")}
    ),
}


@pytest.mark.parametrize("prefix", ["", "teacher.backbone."])
@pytest.mark.parametrize("name", WRONG)
def test_what_fits_in_part_only_is_refused(name: str, prefix: str):
    with pytest.raises(BackboneError, match=r"the file begins with .*depth \d+, patch \d+ → .* → "):
        find_encoder(under(prefix, WRONG[name]()), vit(2), "w.pth")


def test_a_refusal_shows_the_likely_prefix_and_the_shapes():
    with pytest.raises(BackboneError, match=r"likely prefix 'net\.x\.'.*embed dim 8, depth 2, patch 8"):
        find_encoder(under("net.x.", WRONG["shallower"]()), vit(2), "w.pth")


def test_encoders_that_differ_and_of_which_none_is_a_teachers_are_refused():
    two = under("left.", encoder().state_dict()) | under("right.", vit(1).state_dict())
    with pytest.raises(BackboneError, match=r"several encoders that fit, under \['left\.', 'right\.'\]"):
        find_encoder(two, vit(2), "w.pth")


class Trap:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.file}",))


def test_a_hostile_pickle_is_refused_by_the_name_of_what_it_calls(tmp_path: Path):
    torch.save({"model": encoder().state_dict(), "args": Trap(tmp_path / "ran")}, tmp_path / "w.pth")
    with pytest.raises(BackboneError, match=r"it holds \w+\.system\) → save the state dict alone"):
        read_checkpoint(tmp_path / "w.pth")
    assert not (tmp_path / "ran").exists()


def test_own_weights_say_how_tiles_are_normalised(tmp_path: Path):
    state: dict[str, Tensor] = timm.create_model("resnet10t", num_classes=0).state_dict()
    torch.save(under("module.", state), tmp_path / "w.pth")
    notes = load_backbone("resnet10t", weights=tmp_path / "w.pth").notes
    assert "the encoder is under 'module.'" in notes[0]
    assert "mean (0.485, 0.456, 0.406), std (0.229, 0.224, 0.225)" in notes[1]


def test_mean_and_std_of_own_weights_reach_the_pixels(tmp_path: Path):
    torch.save(timm.create_model("resnet10t", num_classes=0).state_dict(), tmp_path / "w.pth")
    mean, std = (0.7, 0.5, 0.6), (0.2, 0.25, 0.3)
    backbone = load_backbone("resnet10t", weights=tmp_path / "w.pth", mean=mean, std=std)
    tiles = np.random.default_rng(0).integers(0, 256, (1, 224, 224, 3), dtype=np.uint8)
    by_hand = (tiles / 255.0 - np.array(mean)) / np.array(std)
    np.testing.assert_allclose(backbone.prepare(tiles).permute(0, 2, 3, 1).numpy(), by_hand, atol=1e-5)
    usual = load_backbone("resnet10t", weights=tmp_path / "w.pth")
    assert not np.allclose(usual.embed(tiles), backbone.embed(tiles), rtol=1e-2)
    assert (backbone.recipe.transform.mean, backbone.recipe.transform.std) == (mean, std)
    assert backbone.recipe != usual.recipe
    assert "as given" in backbone.notes[-1]


@pytest.mark.parametrize(
    ("mean", "std"),
    [((0.5,) * 3, None), ((0.5,) * 2, (0.5,) * 3), ((128.0,) * 3, (60.0,) * 3), ((0.5,) * 3, (0.0,) * 3)],
)
def test_statistics_that_are_not_three_numbers_from_0_to_1_are_refused(tmp_path: Path, mean: Any, std: Any):
    torch.save(timm.create_model("resnet10t", num_classes=0).state_dict(), tmp_path / "w.pth")
    with pytest.raises(BackboneError, match="got mean"):
        load_backbone("resnet10t", weights=tmp_path / "w.pth", mean=mean, std=std)


def test_statistics_of_a_preset_are_its_authors():
    with pytest.raises(BackboneError, match=r"as its authors trained it"):
        load_backbone("efficientnet_lite0", mean=(0.5,) * 3, std=(0.5,) * 3)


def test_a_downloaded_hub_folder_loads_with_its_own_statistics(tmp_path: Path):
    model = timm.create_model("resnet10t", num_classes=0)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    statistics = {"mean": [0.7, 0.5, 0.6], "std": [0.2, 0.25, 0.3]}
    config = {"architecture": "resnet10t", "num_classes": 0, "pretrained_cfg": {**statistics, "num_classes": 0}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    backbone = load_backbone(f"local-dir:{tmp_path}")
    assert_same(backbone.module.model, model)
    assert backbone.recipe.transform.mean == (0.7, 0.5, 0.6)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        (
            "config.json",
            {"architecture": "resnet10t", "pretrained_cfg": {"mean": [0.7, 0.5, 0.6], "std": [0.2, 0.25, 0.3]}},
        ),
        ("preprocessor_config.json", {"image_mean": [0.7, 0.5, 0.6], "image_std": [0.2, 0.25, 0.3]}),
    ],
)
def test_statistics_beside_the_weights_are_taken_and_said(tmp_path: Path, file: str, content: dict[str, Any]):
    torch.save(timm.create_model("resnet10t", num_classes=0).state_dict(), tmp_path / "w.pth")
    (tmp_path / file).write_text(json.dumps(content))
    backbone = load_backbone("resnet10t", weights=tmp_path / "w.pth")
    assert backbone.recipe.transform.mean == (0.7, 0.5, 0.6)
    assert f"of {file} beside them" in backbone.notes[-1]
    given = load_backbone("resnet10t", weights=tmp_path / "w.pth", mean=(0.5,) * 3, std=(0.5,) * 3)
    assert given.recipe.transform.mean == (0.5, 0.5, 0.5)
    assert "as given" in given.notes[-1]


@pytest.mark.parametrize("content", ["[]", "{", '{"pretrained_cfg": 3}', '{"model_type": "vit"}'])
def test_another_file_beside_the_weights_is_no_source(tmp_path: Path, content: str):
    torch.save(timm.create_model("resnet10t", num_classes=0).state_dict(), tmp_path / "w.pth")
    (tmp_path / "config.json").write_text(content)
    assert "of timm's name" in load_backbone("resnet10t", weights=tmp_path / "w.pth").notes[-1]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pth", "teacher_reg4_pretrain.pth"])
def test_a_checkpoint_may_have_any_usual_name(tmp_path: Path, name: str) -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    torch.save(model.state_dict(), tmp_path / name)
    loaded = load_backbone("vit_tiny_patch16_224", weights=tmp_path / name, mean=(0.7, 0.5, 0.6), std=(0.2, 0.2, 0.2))
    assert loaded.recipe.transform.mean == (0.7, 0.5, 0.6)
    tiles = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3)).astype(np.uint8)
    seen = (torch.from_numpy(tiles).permute(0, 3, 1, 2) / 255 - torch.tensor([0.7, 0.5, 0.6])[:, None, None]) / 0.2
    with torch.no_grad():
        expected = model.eval()(seen).numpy()
    np.testing.assert_allclose(loaded.embed(tiles).astype(np.float32), expected, atol=0.02)


def test_statistics_of_another_training_are_another_recipe(tmp_path: Path) -> None:
    torch.save(timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict(), tmp_path / "w.pth")
    slide = write_slide(tmp_path / "slides" / "a.tif")
    settings = {"weights": tmp_path / "w.pth", "recipe": TILES, "runtime": "torch", "isolation": False}
    first = {"mean": (0.7, 0.5, 0.6), "std": (0.2, 0.2, 0.2)}
    run_extraction(slide, tmp_path / "s.zarr", "vit_tiny_patch16_224", **settings, **first)
    with pytest.raises(RecipeMismatchError, match="mean"):
        run_extraction(slide, tmp_path / "s.zarr", "vit_tiny_patch16_224", **settings)
