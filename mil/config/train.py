"""The training configuration: typed, checked, composed by Hydra, and saved so that it runs again.

Hydra is used for one thing: turning ``group=option`` and ``a.b=value`` into a tree. Nothing is instantiated from a
config, and a ``_target_`` in a file is refused, so a config file can never name code to run.
"""

import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from extract.store.core.remote_path import StorePath
from mil.config.checks import Checked, number_field
from mil.config.options import TASK_LOSSES
from mil.config.sections import (
    COX_BAGS,
    AugmentConfig,
    HeadConfig,
    LossConfig,
    OptimizerConfig,
    SchedulerConfig,
    to_plain,
)
from mil.errors import ConfigError


@dataclass(frozen=True)
class TrainConfig(Checked):
    """Everything that decides the result of a training run.

    Early stopping watches the first loss of the task on the validation part (for classes the class-weighted
    cross-entropy; survival its own), and nothing else.

    Attributes:
        store: the embedding store; kept absolute, so that the saved config runs from anywhere.
        labels: the label table (None when the cohort came from Python).
        target: its column to predict; several, separated by commas, for labels (``er,pr,her2``), numbers, and survival
            (time and event: ``months,died``).
        task: what the target is: ``classification``, ``multilabel``, ``regression`` or ``survival``.
        backbone: the store's features entry; None if the store has one only.
        slide_column: column of the slide ids, when it is not called ``slide_id``.
        patient_column: column of the patient ids, when it is not called ``patient_id``.
        distinct_patients: patients whose ids look like two spellings of one, such as ``100`` and ``100.0``, are
            different people; else they are refused.
        split: how slides are split, always by patient: ``kfold``, ``site_preserved`` (every site in one fold only),
            ``leave_one_site_out`` (a fold per site) or ``fixed`` (as `split_column` or `split_file` say).
        folds: number of folds, of ``kfold`` and ``site_preserved``.
        repeats: how often every slide is tested, with other folds each time; of the same two.
        sites: the label column that names each slide's site, or ``tcga`` for the code in TCGA's barcodes.
        split_column: the label column with the words train, val and test.
        split_file: a splits.csv, a run folder, or CLAM's splits_k.csv (one, or a folder of them).
        seeds: seeds to train each fold with; an integer n stands for 0 to n-1.
        split_seed: seed of the folds.
        validation_fraction: part of the non-test patients that early stopping may see.
        epochs: most epochs.
        min_epochs: epochs before which it does not stop.
        patience: epochs without a better validation loss before stopping.
        batch_bags: bags read per step. Packs are drawn over the whole cohort, the order belonging to the seed, and a
            replica learns from those of its own training part; so a step sees about 64 % of them with 5 folds.
        accumulate: packs whose gradients are added up to that of one pack before a step (not for ``loss=cox``).
        sampler: ``natural`` sees every training bag once an epoch; ``class_balanced`` and ``patient_balanced`` draw as
            many training bags with replacement, every class or patient equally likely.
        instance_budget: most instances drawn per bag and training step, afresh each epoch; None takes all.
        instance_dropout: probability with which an instance is left out, afresh each epoch; one always stays.
        views: ``sample`` trains on the entry's augmented views too (``mil extract --views``), one drawn for every bag
            and epoch; validation and test see the slides as they are.
        class_weights: ``balanced`` weighs a class by the inverse of its frequency in the training part. In training it
            does so only where the sampler has not balanced the classes already. Labels weigh their positive slides by
            the negative ones; numbers and survival are not weighed.
        standardize: ``train`` fits mean and standard deviation of the features on the training instances.
        grad_clip: largest gradient norm; None does not clip.
        grad_clip_value: largest gradient of a single weight, applied before the norm; None does not clip.
        l1: penalty on the absolute values of weight matrices.
        ema: decay of an exponential average of the weights, which then is what is validated and kept; None takes the
            weights themselves.
        init: a checkpoint (.safetensors) whose parameters are taken over where name and shape are the same. One that
            was trained on slides of this cohort has seen test slides of some fold.
        freeze_epochs: epochs at the start in which what came from ``init`` stays as it is.
        freeze_lr_factor: what the learning rate of those parameters is multiplied with afterwards.
        device: ``cpu``, ``cuda``, ``cuda:N``, or ``auto``, which takes CUDA when there is one.
        memory: ``ram`` copies the bags into memory, ``mmap`` reads them from the store at each step, ``auto`` decides.
        head: the head.
        optimizer: the optimizer.
        scheduler: the learning rate schedule.
        loss: what is minimised.
        augment: what is done to training bags.
        track: tools that are told of the run, see `mil.experiments.tracking`: some of ``wandb``, ``mlflow``,
            ``tensorboard``.
        track_files: what they are given beside curves, metrics and settings: ``none``, or ``all``, which sends tables,
            report and paths, and with them ids and labels. Also written ``track.files``.
    """

    store: StorePath | None = None
    labels: Path | None = None
    target: str | None = None
    task: Literal["classification", "multilabel", "regression", "survival"] = "classification"
    backbone: str | None = None
    slide_column: str | None = None
    patient_column: str | None = None
    distinct_patients: bool = False
    split: Literal["kfold", "site_preserved", "leave_one_site_out", "fixed"] = "kfold"
    folds: int = number_field(5, 2)
    repeats: int = number_field(1, 1)
    sites: str | None = None
    split_column: str | None = None
    split_file: Path | None = None
    seeds: tuple[int, ...] = (0, 1, 2)
    split_seed: int = number_field(0, 0)
    validation_fraction: float = number_field(0.2, 0.0, 1.0, above=True, below=True)
    epochs: int = number_field(40, 1)
    min_epochs: int = number_field(1, 1)
    patience: int = number_field(10, 1)
    batch_bags: int = number_field(8, 1)
    accumulate: int = number_field(1, 1)
    sampler: Literal["natural", "class_balanced", "patient_balanced"] = "natural"
    instance_budget: int | None = number_field(4096, 1)
    instance_dropout: float = number_field(0.0, 0.0, 1.0, below=True)
    views: Literal["none", "sample"] = "none"
    class_weights: Literal["balanced", "none"] = "balanced"
    standardize: Literal["train", "none"] = "train"
    grad_clip: float | None = number_field(1.0, 0.0, above=True)
    grad_clip_value: float | None = number_field(None, 0.0, above=True)
    l1: float = number_field(0.0, 0.0)
    ema: float | None = number_field(None, 0.0, 1.0, above=True, below=True)
    init: Path | None = None
    freeze_epochs: int = number_field(0, 0)
    freeze_lr_factor: float = number_field(0.1, 0.0, 1.0, above=True)
    device: str = "auto"
    memory: Literal["auto", "mmap", "ram"] = "auto"
    head: HeadConfig = field(default_factory=HeadConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    loss: LossConfig = field(default_factory=lambda: LossConfig("auto"))
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    track: tuple[Literal["wandb", "mlflow", "tensorboard"], ...] = ()
    track_files: Literal["none", "all"] = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise ConfigError(f"got device={self.device} → expected auto, cpu, cuda or cuda:N → use device=auto")
        object.__setattr__(self, "head", _with_input_norm(self.head, self.standardize))
        object.__setattr__(self, "loss", _loss_of_task(self.loss, self.task))
        _check_together(self)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain values, in the shape that the config file has."""
        plain = {item.name: to_plain(getattr(self, item.name)) for item in fields(self)}
        keywords = dict(self.head.keywords)
        if self.standardize == "train":
            # implied; written out, it would contradict a later standardize=none
            keywords.pop("input_norm")
        plain["head"] = {"name": self.head.name, **keywords}
        return plain

    def to_yaml(self) -> str:
        """The text of ``config.yaml``; ``compose_config([], file)`` gives an equal configuration."""
        from omegaconf import OmegaConf

        return OmegaConf.to_yaml(OmegaConf.create(self.to_dict()))


def _with_input_norm(head: HeadConfig, standardize: str) -> HeadConfig:
    """Make ``standardize`` and the head's keyword ``input_norm`` say the same; they may not disagree."""
    given = head.keywords["input_norm"]
    if standardize == "train" and given in ("none", "standardize"):
        return HeadConfig(head.name, {**head.keywords, "input_norm": "standardize"})
    if standardize == "train":
        raise ConfigError(
            f"got head.input_norm={given} with standardize=train → expected one input normalisation → "
            f"add standardize=none"
        )
    if given == "standardize":
        raise ConfigError(
            "got head.input_norm=standardize with standardize=none → nothing would fit its mean and deviation → "
            "set standardize=train, or head.input_norm=none"
        )
    return head


def _loss_of_task(loss: LossConfig, task: str) -> LossConfig:
    """``auto`` as the task's first loss; another must be one of the task's."""
    own = TASK_LOSSES[task]
    if loss.name == "auto" and (own[0] == "cross_entropy" or not loss.label_smoothing):
        return LossConfig(own[0], label_smoothing=loss.label_smoothing if own[0] == "cross_entropy" else None)
    if loss.name == "auto":
        raise ConfigError(
            f"got loss.label_smoothing={loss.label_smoothing} with task={task} → smoothing is for classes → remove it"
        )
    if loss.name not in own:
        others = [name for name, losses in TASK_LOSSES.items() if loss.name in losses]
        raise ConfigError(
            f"got loss={loss.name} with task={task} → expected one of {', '.join(own)} → set loss=auto, or "
            f"task={others[0]}"
        )
    return loss


def _check_task(config: TrainConfig) -> None:
    """Refuse what only classes can be trained with."""
    from aggregators import Aggregator
    from aggregators.registry import aggregator_record

    if config.task == "classification":
        return
    if config.sampler == "class_balanced":
        raise ConfigError(
            f"got sampler=class_balanced with task={config.task} → there are no classes to balance → set "
            f"sampler=natural or sampler=patient_balanced"
        )
    own_loss = aggregator_record(config.head.name).builder.auxiliary_loss is not Aggregator.auxiliary_loss
    # CLAM's own loss is for classes alone and can be switched off; those of other heads take several labels too
    of_classes = config.head.keywords["bag_weight"] < 1 if "bag_weight" in config.head.keywords else own_loss
    if of_classes and (config.task != "multilabel" or "bag_weight" in config.head.keywords):
        raise ConfigError(
            f"got head={config.head.name} with task={config.task} → this head learns from classes by a loss of its "
            f"own → choose another, such as head=abmil"
            f"{', or set head.bag_weight=1' if 'bag_weight' in config.head.keywords else ''}"
        )
    mixed = [name for name in ("bag_mixup", "embedding_mixup") if getattr(config.augment, name)]
    if config.task == "survival" and mixed:
        raise ConfigError(
            f"got augment.{mixed[0]} with task=survival → two patients' times cannot be mixed → set "
            f"augment.{mixed[0]}=0"
        )
    if config.loss.name == "cox" and (config.batch_bags < COX_BAGS or config.accumulate > 1):
        raise ConfigError(
            f"got loss=cox with batch_bags={config.batch_bags}, accumulate={config.accumulate} → it compares the bags "
            f"of a pack with each other, of which those in the training part are left → set batch_bags={COX_BAGS} or "
            f"more and accumulate=1"
        )


def _check_together(config: TrainConfig) -> None:
    """Refuse values that are right each for itself and not together."""
    _check_task(config)
    if config.freeze_epochs and config.init is None:
        raise ConfigError(
            f"got freeze_epochs={config.freeze_epochs} without init → nothing would be held still → add "
            f"init=RUN/checkpoints/fold0-seed0.safetensors, or set freeze_epochs=0"
        )
    if config.freeze_epochs >= config.epochs:
        raise ConfigError(
            f"got freeze_epochs={config.freeze_epochs} of epochs={config.epochs} → expected some epochs in which all "
            f"is trained → lower freeze_epochs, or raise epochs"
        )
    still = AugmentConfig("none").keywords()
    moved = [name for name in ("bag_mixup", "pseudo_bags") if getattr(config.augment, name) != still[name]]
    if config.head.keywords.get("positions", "none") != "none" and moved:
        raise ConfigError(
            f"got augment.{moved[0]} with head.positions={config.head.keywords['positions']} → instances would move "
            f"between bags without their positions → set augment.{moved[0]}={still[moved[0]]}, or "
            f"head.positions=none"
        )
    if config.scheduler.patience is not None and config.scheduler.patience >= config.patience:
        raise ConfigError(
            f"got scheduler.patience={config.scheduler.patience} with patience={config.patience} → the training would "
            f"stop before the learning rate ever falls → lower scheduler.patience, or raise patience"
        )
