"""What the groups of the configuration offer, as data: optimizers, schedules, losses, augmentations, recipes.

Of every option it says which keys it takes and what they are when they are not given. The range of a key is written
where its field is, in `mil.config.train`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_type_hints

from mil.config.head_keywords import head_keywords

_ADAM_BETAS = (0.9, 0.999)

LOOKAHEAD = "lookahead_"
"""Before the name of an optimizer: the same with Lookahead around it."""


@dataclass(frozen=True)
class OptionRecord:
    """The facts about one option of a group.

    Attributes:
        keys: the keys it takes, with their defaults.
        paper: authors, title, venue and year; what differs from it.
    """

    keys: Mapping[str, Any]
    paper: str


@dataclass(frozen=True)
class RecipeRecord:
    """A named set of values, which stand beneath those of the user.

    Attributes:
        values: in the shape of a config file.
        source: where they come from.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    source: str = "ours"


_SIMPLE_OPTIMIZERS = {
    "adamw": OptionRecord(
        {"lr": 5e-4, "weight_decay": 1e-2, "betas": _ADAM_BETAS},
        "Loshchilov and Hutter, Decoupled Weight Decay Regularization, ICLR 2019.",
    ),
    "adam": OptionRecord(
        {"lr": 5e-4, "weight_decay": 1e-5, "betas": _ADAM_BETAS},
        "Kingma and Ba, Adam, ICLR 2015. The decay is added to the gradient.",
    ),
    "sgd": OptionRecord(
        {"lr": 1e-2, "weight_decay": 1e-4, "momentum": 0.9},
        "Sutskever, Martens, Dahl and Hinton, On the importance of initialization and momentum in deep learning, ICML "
        "2013 (Nesterov's momentum). The decay is added to the gradient.",
    ),
    "lion": OptionRecord(
        # against AdamW the authors divide the learning rate by 3 to 10, and multiply the decay by as much
        {"lr": 1e-4, "weight_decay": 5e-2, "betas": (0.9, 0.99)},
        "Chen, Liang, Huang et al., Symbolic Discovery of Optimization Algorithms, NeurIPS 2023.",
    ),
    "nadam": OptionRecord(
        {"lr": 5e-4, "weight_decay": 1e-2, "betas": _ADAM_BETAS},
        "Dozat, Incorporating Nesterov Momentum into Adam, ICLR workshop 2016. The decay is decoupled, as in AdamW.",
    ),
    "radam": OptionRecord(
        {"lr": 5e-4, "weight_decay": 1e-2, "betas": _ADAM_BETAS},
        "Liu, Jiang, He et al., On the Variance of the Adaptive Learning Rate and Beyond, ICLR 2020. The decay is "
        "decoupled, as in the authors' code.",
    ),
}
_LOOKAHEAD_KEYS = {"lookahead_steps": 5, "lookahead_fraction": 0.5}
_LOOKAHEAD_PAPER = "Zhang, Lucas, Hinton and Ba, Lookahead Optimizer: k steps forward, 1 step back, NeurIPS 2019."
OPTIMIZERS: dict[str, OptionRecord] = {
    **_SIMPLE_OPTIMIZERS,
    "muon": OptionRecord(
        {"lr": 5e-4, "weight_decay": 1e-2, "momentum": 0.95},
        "Jordan et al., Muon: An optimizer for hidden layers in neural networks, 2024; its step is scaled to the size "
        "of AdamW's as in Liu, Su, Yao et al., Muon is Scalable for LLM Training, 2025. What is no matrix gets AdamW.",
    ),
    "ranger": OptionRecord(
        {"lr": 1e-3, "weight_decay": 1e-2, "betas": (0.95, 0.999), "lookahead_steps": 6, "lookahead_fraction": 0.5},
        "Wright, Ranger, 2019: RAdam with Lookahead, without the gradient centralisation that was added later.",
    ),
    **{
        LOOKAHEAD + name: OptionRecord({**record.keys, **_LOOKAHEAD_KEYS}, f"{_LOOKAHEAD_PAPER} {record.paper}")
        for name, record in _SIMPLE_OPTIMIZERS.items()
    },
}
SCHEDULERS = {
    "cosine": OptionRecord(
        {"warmup_fraction": 0.1}, "Loshchilov and Hutter, SGDR, ICLR 2017 (one cosine, without restarts)."
    ),
    "onecycle": OptionRecord(
        {"warmup_fraction": 0.3, "start_divisor": 25.0, "end_divisor": 1e4},
        "Smith and Topin, Super-Convergence, 2018; both ways along a cosine, and the momentum stays as it is.",
    ),
    "step": OptionRecord({"warmup_fraction": 0.0, "period_fraction": 1 / 3, "factor": 0.1}, "Common practice."),
    "plateau": OptionRecord(
        {"warmup_fraction": 0.0, "factor": 0.5, "patience": 3, "threshold": 1e-4},
        "Common practice; the rule is that of torch's ReduceLROnPlateau with a relative threshold.",
    ),
    "constant": OptionRecord({"warmup_fraction": 0.0}, "Common practice."),
}
LOSSES = {
    "auto": OptionRecord({"label_smoothing": 0.0}, "The first loss of the task."),
    "cross_entropy": OptionRecord(
        {"label_smoothing": 0.0},
        "Szegedy, Vanhoucke, Ioffe et al., Rethinking the Inception Architecture, CVPR 2016 (label smoothing).",
    ),
    "focal": OptionRecord(
        {"gamma": 2.0, "label_smoothing": 0.0},
        "Lin, Goyal, Girshick et al., Focal Loss for Dense Object Detection, ICCV 2017.",
    ),
    "ordinal": OptionRecord(
        {},
        "Cao, Mirjalili and Raschka, Rank Consistent Ordinal Regression for Neural Networks, Pattern Recognition "
        "Letters 2020; the chances of being above each class come from the softmax.",
    ),
    "bce": OptionRecord({}, "Binary cross-entropy per label; labels that are not known do not count."),
    "mse": OptionRecord({}, "Squared error of numbers standardised over the training part."),
    "huber": OptionRecord(
        {"delta": 1.0},
        "Huber, Robust Estimation of a Location Parameter, Annals of Mathematical Statistics 1964; of numbers "
        "standardised over the training part.",
    ),
    "discrete_survival": OptionRecord(
        {"intervals": 4},
        "Zadeh and Schmid, Bias in Cross-Entropy-Based Training of Deep Survival Networks, IEEE TPAMI 2021.",
    ),
    "cox": OptionRecord({}, "Cox, Regression Models and Life-Tables, JRSS B 1972, over the bags of a step (Breslow)."),
}

TASK_LOSSES = {
    "classification": ("cross_entropy", "focal", "ordinal"),
    "multilabel": ("bce",),
    "regression": ("mse", "huber"),
    "survival": ("discrete_survival", "cox"),
}
"""The losses of every task, the default first."""

_AUGMENT_KEYS = {
    "noise": 0.0,
    "bag_mixup": 0.0,
    "embedding_mixup": 0.0,
    "pseudo_bags": 1,
    "policy": "all",
    "schedule": "constant",
    "ramp": 0.5,
}
_AUGMENT_PAPER = (
    "Zhang et al., mixup, ICLR 2018; Yang et al., ReMix, MICCAI 2022; Zhang et al., DTFD-MIL, CVPR 2022; Mueller and "
    "Hutter, TrivialAugment, ICCV 2021; see `mil.config.sections.AugmentConfig`."
)
AUGMENTATIONS = {
    "none": OptionRecord(_AUGMENT_KEYS, "Nothing is augmented until a key says so."),
    "gentle": OptionRecord(_AUGMENT_KEYS | {"noise": 0.1, "schedule": "linear"}, _AUGMENT_PAPER),
    "strong": OptionRecord(
        _AUGMENT_KEYS
        | {"noise": 0.3, "bag_mixup": 0.5, "pseudo_bags": 3, "policy": "random", "schedule": "cosine", "ramp": 0.7},
        _AUGMENT_PAPER,
    ),
}
RECIPES = {
    "default": RecipeRecord(),
    "fast": RecipeRecord({"instance_budget": 512, "scheduler": "onecycle", "epochs": 15, "patience": 5}),
    "strong": RecipeRecord(
        {
            "optimizer": "lookahead_adamw",
            "loss": {"name": "cross_entropy", "label_smoothing": 0.1},
            "augment": "gentle",
            "instance_dropout": 0.2,
            "ema": 0.99,
        }
    ),
    "clam_official": RecipeRecord(
        {
            "head": {"name": "clam_sb", "official": True},
            "optimizer": {"name": "adam", "lr": 2e-4, "weight_decay": 1e-5},
            "scheduler": "constant",
            "loss": "cross_entropy",
            "sampler": "class_balanced",
            "class_weights": "none",
            "standardize": "none",
            "batch_bags": 1,
            "instance_budget": None,
            "grad_clip": None,
            "epochs": 200,
            "min_epochs": 52,
            "patience": 20,
        },
        "Lu, Williamson, Chen et al., Data-efficient and weakly supervised computational pathology on whole-slide "
        "images, Nature Biomedical Engineering 2021; figures from main.py, utils/core_utils.py and the commands in the "
        "README of mahmoodlab/CLAM: Adam, 2e-4 (the script's own default is 1e-4), decay 1e-5, one slide a step drawn "
        "against its class's frequency, 52 to 200 epochs, stopping after 20 without a better validation loss. Here "
        "biases are not decayed, and instances learn by cross-entropy instead of the smooth SVM loss.",
    ),
}


def keys_of(group: Mapping[str, OptionRecord]) -> dict[str, dict[str, Any]]:
    """The keys of every option of a group, with their defaults."""
    return {name: dict(record.keys) for name, record in group.items()}


GROUPS = ("head", "optimizer", "scheduler", "loss", "augment")


_RECORDS = {"optimizer": OPTIMIZERS, "scheduler": SCHEDULERS, "loss": LOSSES, "augment": AUGMENTATIONS}


def group_options(group: str) -> dict[str, dict[str, object]]:
    """The options of a group with their keys and defaults, such as those of ``optimizer``."""
    if group in _RECORDS:
        return keys_of(_RECORDS[group])
    from aggregators import list_aggregators
    from aggregators.registry import keyword_names

    return {name: dict(keyword_names(name)) for name in list_aggregators()}


def option_keys(group: str) -> dict[str, tuple[str, ...]]:
    """The options of a group with their keys; it does not load torch, as the defaults of heads in `group_options`."""
    if group == "head":
        return head_keywords()
    return {name: tuple(keys) for name, keys in group_options(group).items()}


def keyword_types(head: str) -> dict[str, Any]:
    """The annotated types of a head's keywords."""
    from aggregators.registry import aggregator_record

    return get_type_hints(aggregator_record(head).builder.__init__)
