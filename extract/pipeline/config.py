"""What an extraction is told: which slides, by which backbones, into which entries, read and computed how.

Whatever does not suit is refused here, before a slide is opened.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeAlias, TypedDict, Unpack

from extract.backbones.presets import DEFAULT_BACKBONE
from extract.errors import RecipeError
from extract.folders import NotTaken
from extract.reading.isolation import ReaderLimits
from extract.slides.finding.source import SlideSource
from extract.slides.finding.sources import find_slides, shard
from extract.store import AugmentRecipe, QualityRecipe, TileRecipe, TissueRecipe

if TYPE_CHECKING:
    from extract.backbones.backbone import Backbone

Slides = str | Path | Sequence[str | Path]
Backbones: TypeAlias = "str | Backbone | Sequence[str | Backbone]"


class ExtractionSettings(TypedDict, total=False):
    """Keywords of an extraction: the fields of the parts of `ExtractionConfig`, and those of `TileRecipe`.

    None stands for the default of each but ``mpp``.
    """

    table: str | Path | None
    masks: str | Path | None
    images: str | None
    shard_text: str | None
    weights: str | Path | None
    pooling: str
    dtype: str
    allow_remote_code: bool
    mean: Sequence[float] | None
    std: Sequence[float] | None
    device: str
    batch_size: int | None
    runtime: str
    precision: str
    compile_model: bool
    views: int
    augment: AugmentRecipe | None
    context_mpp: Sequence[float]
    default_mpp: float | None
    reader: str
    isolation: bool
    limits: ReaderLimits | None
    max_invalid: float
    redo: Sequence[str]
    format: str | None
    mpp: float | None
    tile_px: int
    overlap_px: int
    edge: str
    min_tissue_fraction: float
    allow_upsampling: bool
    resampling: str
    tissue: TissueRecipe
    gap_px: int
    jitter_px: int
    jitter_seed: int
    quality: QualityRecipe


@dataclass(frozen=True, kw_only=True)
class SlideSelection:
    """Which slides are extracted.

    Attributes:
        slides: files and folders.
        table: the slide table, see `extract.slides.finding.sources.find_slides`.
        masks: where each slide's tissue mask is, see `extract.slides.finding.sources.find_slides`.
        images: pattern of the files that are slides, such as ``img_{}.png``.
        shard_text: ``i/n`` for the i-th of n parts of the slides.
    """

    slides: tuple[str | Path, ...]
    table: str | Path | None = None
    masks: str | Path | None = None
    images: str | None = None
    shard_text: str | None = None

    def find(self, not_taken: NotTaken | None = None) -> list[SlideSource]:
        """The slides that are there.

        Args:
            not_taken: counts the files of folders that are no slides.

        Raises:
            SlideTableError: there is no slide, or the table, a pattern or the shard is unusable.
        """
        sources = find_slides(self.slides, self.table, self.masks, self.images, not_taken)
        return sources if self.shard_text is None else shard(sources, self.shard_text)


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """What embeds the tiles.

    Attributes:
        backbones: names for `load_backbone`, and loaded backbones.
        weights: local weights file of the backbone.
        pooling: see `load_backbone`.
        dtype: dtype of the stored embeddings.
        allow_remote_code: permit backbones that need their authors' code.
        mean: of red, green and blue, for own weights.
        std: the same.
    """

    backbones: "tuple[str | Backbone, ...]" = (DEFAULT_BACKBONE,)
    weights: str | Path | None = None
    pooling: str = "model"
    dtype: str = "float16"
    allow_remote_code: bool = False
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """What computes.

    Attributes:
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        batch_size: tiles per forward; by default 4 on a CPU (each core embeds batches of its own) and 128 on a GPU.
        runtime: what computes on a CPU: ``auto`` (the fastest installed), ``torch`` or ``openvino``.
        precision: ``auto``, ``fp32``, ``bf16`` or ``fp16``.
        compile_model: compile the backbone with ``torch.compile`` (GPU only).
    """

    device: str = "auto"
    batch_size: int | None = None
    runtime: str = "auto"
    precision: str = "auto"
    compile_model: bool = False


@dataclass(frozen=True, kw_only=True)
class EntryConfig:
    """Which features entries each backbone fills.

    Attributes:
        entry: name of the features entry; by default the backbone's name in small letters.
        views: augmented views per tile, each an entry ``NAME@view-k``.
        augment: what the views are.
        context_mpp: µm/px of further tiles around the same centres, each an entry ``NAME@context-MPP``.
    """

    entry: str | None = None
    views: int = 0
    augment: AugmentRecipe = field(default_factory=AugmentRecipe)
    context_mpp: Sequence[float] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "context_mpp", tuple(self.context_mpp))


@dataclass(frozen=True, kw_only=True)
class ReadingConfig:
    """How slides are read: but for ``default_mpp``, none of it changes what is read.

    Attributes:
        default_mpp: µm/px of level 0 for slides that name none.
        reader: ``auto``, ``direct`` or ``openslide``, see `extract.slides.slide.Slide`.
        isolation: read in a process of its own, so that a file that kills its decoder does not kill the run.
        limits: memory and time that the reading process may take.
        max_invalid: a slide of which a larger part of the tiles cannot be decoded counts as failed.
        redo: ids of slides that are cut and embedded anew; what the store holds of them goes into its quarantine.
    """

    default_mpp: float | None = None
    reader: str = "auto"
    isolation: bool = True
    limits: ReaderLimits = field(default_factory=ReaderLimits)
    max_invalid: float = 0.05
    redo: Sequence[str] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "redo", (self.redo,) if isinstance(self.redo, str) else tuple(self.redo))
        if not 0 <= self.max_invalid <= 1:
            raise RecipeError(f"got max_invalid={self.max_invalid} → expected a part from 0 to 1 → such as 0.05")
        mpp = self.default_mpp
        if mpp is not None and not (math.isfinite(mpp) and mpp > 0):
            raise RecipeError(f"got a default mpp of {mpp} → expected µm per pixel, such as 0.25 → correct it")


@dataclass(frozen=True, kw_only=True)
class ExtractionConfig:
    """Everything that an extraction is told.

    Attributes:
        slides: which slides.
        format: ``zarr`` or ``h5``; by default that of the store that is there, or ``zarr``.
        recipe: how they are cut.
        backbone: what embeds the tiles.
        compute: what computes.
        entries: where the embeddings go.
        reading: how slides are read.

    Raises:
        RecipeError: parts that do not go together: several backbones with one name or weights, a context that is not
            coarser than the tiles.
    """

    slides: SlideSelection
    format: str | None = None
    recipe: TileRecipe = field(default_factory=TileRecipe)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    entries: EntryConfig = field(default_factory=EntryConfig)
    reading: ReadingConfig = field(default_factory=ReadingConfig)

    def __post_init__(self) -> None:
        self._check_backbones()
        self._check_contexts()

    @classmethod
    def of(
        cls,
        slides: Slides,
        backbone: Backbones,
        entry: str | None,
        recipe: TileRecipe | None,
        **settings: Unpack[ExtractionSettings],
    ) -> Self:
        """The configuration that keywords say.

        Args:
            slides: files and folders, or one.
            backbone: a name, a loaded backbone, or several.
            entry: name of the features entry.
            recipe: how slides are cut; by default what the settings say of a `TileRecipe`.
            **settings: whatever else is not as usual.

        Raises:
            RecipeError: a setting is out of range.
        """
        left: dict[str, Any] = dict(settings)
        paths = (slides,) if isinstance(slides, (str, Path)) else tuple(slides)
        backbones = tuple(backbone) if isinstance(backbone, Sequence) and not isinstance(backbone, str) else (backbone,)
        parts: dict[str, Any] = {
            "slides": SlideSelection(slides=paths, **_take(SlideSelection, left)),
            "backbone": BackboneConfig(backbones=backbones, **_take(BackboneConfig, left)),
            "compute": ComputeConfig(**_take(ComputeConfig, left)),
            "entries": EntryConfig(entry=entry, **_take(EntryConfig, left)),
            "reading": ReadingConfig(**_take(ReadingConfig, left)),
        }
        format = left.pop("format", None)
        return cls(format=format, recipe=recipe or TileRecipe(**left), **parts)

    def load(self, backbone: "str | Backbone") -> "Backbone":
        """One of the backbones, loaded.

        Raises:
            BackboneError: it cannot be.
        """
        if not isinstance(backbone, str):
            return backbone
        from extract.backbones.backbone import load_backbone

        return load_backbone(
            backbone,
            weights=self.backbone.weights,
            pooling=self.backbone.pooling,
            tile_px=self.recipe.tile_px,
            dtype=self.backbone.dtype,
            device=self.compute.device,
            precision=self.compute.precision,
            compile=self.compute.compile_model,
            allow_remote_code=self.backbone.allow_remote_code,
            mean=self.backbone.mean,
            std=self.backbone.std,
        )

    def _check_backbones(self) -> None:
        backbones = self.backbone.backbones
        if not backbones:
            raise RecipeError("got no backbone → expected at least one → name one")
        own = (self.entries.entry, self.backbone.weights, self.backbone.mean, self.backbone.std)
        if len(backbones) > 1 and any(each is not None for each in own):
            raise RecipeError(
                f"got {len(backbones)} backbones with one --as, --weights, --mean or --std → these belong to one "
                f"backbone → run them one after the other, or leave these out"
            )

    def _check_contexts(self) -> None:
        """Contexts are coarser than the tiles, whatever the slide; with ``--native`` each slide tells."""
        tiles = self.recipe.mpp
        for mpp in self.entries.context_mpp:
            if not (math.isfinite(mpp) and mpp > (tiles or 0.0)):
                finest = "" if tiles is None else f", coarser than the tiles' {tiles:g}"
                raise RecipeError(
                    f"got a context of {mpp:g} µm/px → expected µm per pixel{finest} → use such as --context-mpp "
                    f"{4 * (tiles or 0.5):g}"
                )


def _take(part: type[Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Take the fields of a part out of the settings; None stands for the default."""
    taken = {each.name: settings.pop(each.name) for each in fields(part) if each.name in settings}
    return {name: value for name, value in taken.items() if value is not None}
