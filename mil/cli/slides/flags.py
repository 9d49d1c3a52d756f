"""The flags that ``mil extract`` and ``mil plan`` share, and what they say to `extract`."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

_TILING = "Scale and tiles"
_TISSUE = "Tissue"
_BACKBONE = "Backbone"
_VIEWS = "Further views of each tile"
_RUNNING = "Running"


@dataclass(frozen=True, kw_only=True)
class ExtractionFlags:
    """What was typed after ``mil extract`` or ``mil plan``; a field is a flag, in the order of ``--help``."""

    slides: Annotated[
        list[str] | None, typer.Argument(help="Slide files and folders of slides.", show_default=False)
    ] = None
    store: Path | None = None
    """Each command says itself what it is to it."""
    table: Annotated[
        Path | None,
        typer.Option(
            "--slides",
            help="Slide table: path[, slide_id, patient_id, mpp, mask], or slide_id, ...",
            show_default=False,
        ),
    ] = None
    images: Annotated[
        str | None, typer.Option(help="Pattern of the files that are slides: img_{}.png", show_default=False)
    ] = None
    mpp: Annotated[
        float | None,
        typer.Option(
            help="Scale of the tiles in µm per pixel.  [default: 0.5]", show_default=False, rich_help_panel=_TILING
        ),
    ] = None
    magnification: Annotated[
        float | None,
        typer.Option(help="The same as a magnification: 20 is 0.5 µm/px.", show_default=False, rich_help_panel=_TILING),
    ] = None
    native: Annotated[
        bool, typer.Option("--native", help="Tile every slide at its own resolution.", rich_help_panel=_TILING)
    ] = False
    default_mpp: Annotated[
        float | None,
        typer.Option(help="µm per pixel of slides that name none.", show_default=False, rich_help_panel=_TILING),
    ] = None
    allow_upsampling: Annotated[
        bool,
        typer.Option("--allow-upsampling", help="Permit a scale finer than the slide's.", rich_help_panel=_TILING),
    ] = False
    tile_px: Annotated[int, typer.Option(help="Side of a tile in pixels.", min=16, rich_help_panel=_TILING)] = 224
    overlap_px: Annotated[
        int, typer.Option(help="Pixels that neighbouring tiles share.", min=0, rich_help_panel=_TILING)
    ] = 0
    gap_px: Annotated[
        int, typer.Option(help="Pixels left out between neighbouring tiles.", min=0, rich_help_panel=_TILING)
    ] = 0
    jitter_px: Annotated[
        int,
        typer.Option(help="Move each slide's grid by up to so many pixels at random.", min=0, rich_help_panel=_TILING),
    ] = 0
    jitter_seed: Annotated[int, typer.Option(help="Seed of that draw.", min=0, rich_help_panel=_TILING)] = 0
    edge: Annotated[
        Literal["shift", "drop"],
        typer.Option(
            help="What sticks out at the right and bottom: shift moves it inwards, drop leaves it out.",
            rich_help_panel=_TILING,
        ),
    ] = "shift"
    tissue: Annotated[
        Literal["default", "saturation", "mask", "none"],
        typer.Option(
            help="How tissue is found: default or saturation (by colour), mask (every slide comes with one), none "
            "(everything is tiled).",
            metavar="METHOD",
            rich_help_panel=_TISSUE,
        ),
    ] = "default"
    tissue_threshold: Annotated[
        int | None,
        typer.Option(
            help="Colour (channel range, or saturation times 255) above which a pixel is tissue, 1 to 254.  [default: "
            "found for each slide]",
            min=1,
            max=254,
            show_default=False,
            rich_help_panel=_TISSUE,
        ),
    ] = None
    masks: Annotated[
        str | None,
        typer.Option(
            help="Folder of masks, or their pattern: mask_{}.png (PNG or QuPath GeoJSON).",
            show_default=False,
            rich_help_panel=_TISSUE,
        ),
    ] = None
    min_tissue: Annotated[
        float,
        typer.Option(help="Smallest part of a tile that is tissue.", min=0.0, max=1.0, rich_help_panel=_TISSUE),
    ] = 0.25
    keep_pen: Annotated[
        bool, typer.Option("--keep-pen", help="Do not exclude pen marks and black borders.", rich_help_panel=_TISSUE)
    ] = False
    backbone: Annotated[
        list[str] | None,
        typer.Option(
            help="A preset (mil models list), any timm model, or hf-hub:owner/model; may be given several times.  "
            "[default: efficientnet_lite0]",
            show_default=False,
            rich_help_panel=_BACKBONE,
        ),
    ] = None
    entry: Annotated[
        str | None,
        typer.Option(
            "--as",
            help="Name of the features entry.  [default: the backbone's]",
            show_default=False,
            rich_help_panel=_BACKBONE,
        ),
    ] = None
    weights: Annotated[
        Path | None,
        typer.Option(
            help="Local weights of the backbone (safetensors or .pth).", show_default=False, rich_help_panel=_BACKBONE
        ),
    ] = None
    mean: Annotated[
        str | None,
        typer.Option(
            help="Mean that own weights were trained with, R,G,B.", show_default=False, rich_help_panel=_BACKBONE
        ),
    ] = None
    std: Annotated[
        str | None,
        typer.Option(
            help="Std that own weights were trained with, R,G,B.", show_default=False, rich_help_panel=_BACKBONE
        ),
    ] = None
    pooling: Annotated[
        Literal["model", "avg", "cls", "cls+avg"],
        typer.Option(
            help="model: the backbone's own; avg: mean of the patches; cls: class token.", rich_help_panel=_BACKBONE
        ),
    ] = "model"
    dtype: Annotated[
        Literal["float16", "float32"], typer.Option(help="How embeddings are stored.", rich_help_panel=_BACKBONE)
    ] = "float16"
    format: Annotated[
        Literal["zarr", "h5"] | None,
        typer.Option(
            help="zarr, or h5: one file per slide that TRIDENT and CLAM scripts read.  [default: the store's, or zarr]",
            show_default=False,
            rich_help_panel=_BACKBONE,
        ),
    ] = None
    allow_remote_code: Annotated[
        bool,
        typer.Option(
            "--allow-remote-code",
            help="Permit a backbone that runs its authors' code from the hub.",
            rich_help_panel=_BACKBONE,
        ),
    ] = False
    views: Annotated[
        int, typer.Option(help="Augmented embeddings per tile, in entries NAME@view-k.", min=0, rich_help_panel=_VIEWS)
    ] = 0
    augment: Annotated[
        str,
        typer.Option(
            help="flip, colour, hed, blur, randaugment, trivialaugment, or pathology (the first four).",
            rich_help_panel=_VIEWS,
        ),
    ] = "pathology"
    strength: Annotated[
        float, typer.Option(help="Strength of the policy.", min=0.0, max=1.0, rich_help_panel=_VIEWS)
    ] = 0.5
    augment_seed: Annotated[int, typer.Option(help="Seed of the views.", min=0, rich_help_panel=_VIEWS)] = 0
    context_mpp: Annotated[
        list[float] | None,
        typer.Option(
            help="Also embed the surroundings at this coarser scale, in an entry NAME@context-MPP; may be given "
            "several times.",
            show_default=False,
            rich_help_panel=_VIEWS,
        ),
    ] = None
    device: Annotated[
        str,
        typer.Option(
            help="auto, cpu, cuda, cuda:N; all, or cuda:0,cuda:1: one process per GPU.", rich_help_panel=_RUNNING
        ),
    ] = "auto"
    batch_size: Annotated[
        int | None,
        typer.Option(
            help="Tiles per forward.  [default: 4 on a CPU, 128 on a GPU]",
            min=1,
            show_default=False,
            rich_help_panel=_RUNNING,
        ),
    ] = None
    runtime: Annotated[
        Literal["auto", "torch", "openvino"],
        typer.Option(help="What computes on a CPU; auto takes the fastest installed.", rich_help_panel=_RUNNING),
    ] = "auto"
    precision: Annotated[
        Literal["auto", "fp32", "bf16", "fp16"],
        typer.Option(help="auto: fp32 on a CPU; on a GPU what the backbone was made for.", rich_help_panel=_RUNNING),
    ] = "auto"
    compile_model: Annotated[
        bool, typer.Option("--compile", help="Compile the backbone (GPU only).", rich_help_panel=_RUNNING)
    ] = False
    reader: Annotated[
        Literal["auto", "direct", "openslide"],
        typer.Option(
            help="auto decodes tiles directly where that is identical to OpenSlide.", rich_help_panel=_RUNNING
        ),
    ] = "auto"
    no_isolation: Annotated[
        bool,
        typer.Option("--no-isolation", help="Read in this process, not in one of its own.", rich_help_panel=_RUNNING),
    ] = False
    reader_memory: Annotated[
        float,
        typer.Option(help="GB of memory that the reading process may take.", min=0.5, rich_help_panel=_RUNNING),
    ] = 8.0
    reader_timeout: Annotated[
        float,
        typer.Option(
            help="Seconds after which a run of tiles that is not decoded is given up.", min=1, rich_help_panel=_RUNNING
        ),
    ] = 180.0
    max_invalid: Annotated[
        float,
        typer.Option(
            help="Largest part of a slide's tiles that may be impossible to decode; with more it counts as failed.",
            min=0.0,
            max=1.0,
            rich_help_panel=_RUNNING,
        ),
    ] = 0.05
    redo: Annotated[
        list[str] | None,
        typer.Option(
            help="Id of a slide to cut and embed anew, as after it was scanned or copied again; may be given several "
            "times. What the store holds of it goes into its quarantine.",
            show_default=False,
            rich_help_panel=_RUNNING,
        ),
    ] = None
    shard: Annotated[
        str | None,
        typer.Option(
            help="Only the i-th of n parts of the slides, such as 3/16.", show_default=False, rich_help_panel=_RUNNING
        ),
    ] = None

    def check(self) -> None:
        """Refuse what contradicts itself, before anything is loaded.

        Raises:
            typer.BadParameter: the scale is said twice, or there is no slide.
        """
        if sum((self.mpp is not None, self.magnification is not None, self.native)) > 1:
            raise typer.BadParameter(
                "got more than one of --mpp, --magnification and --native → they say the same thing → give one"
            )
        if self.tissue_threshold is not None and self.tissue not in ("default", "saturation"):
            raise typer.BadParameter(
                f"got --tissue-threshold with --tissue {self.tissue} → no colour is looked at there → leave one out"
            )
        if not self.slides and self.table is None:
            raise typer.BadParameter("got no slides → name files or folders, or a --slides table", param_hint="SLIDES")

    @property
    def tile_recipe(self) -> Any:
        """The `extract.TileRecipe` that the flags say."""
        from extract.geometry import magnification_to_mpp
        from extract.store import TileRecipe

        scale = 0.5 if self.mpp is None else self.mpp
        scale = scale if self.magnification is None else magnification_to_mpp(self.magnification)
        return TileRecipe(
            None if self.native else scale,
            self.tile_px,
            self.overlap_px,
            self.edge,
            self.min_tissue,
            self.allow_upsampling,
            tissue=self._tissue_recipe(),
            gap_px=self.gap_px,
            jitter_px=self.jitter_px,
            jitter_seed=self.jitter_seed,
        )

    def _tissue_recipe(self) -> Any:
        """How tissue is found; a threshold that is given is both limits of Otsu's."""
        from extract.store import TissueRecipe

        usual = TissueRecipe()
        low, high = (usual.threshold_low, usual.threshold_high) if (t := self.tissue_threshold) is None else (t, t)
        return TissueRecipe(method=self.tissue, exclude_pen=not self.keep_pen, threshold_low=low, threshold_high=high)

    def keywords(self, device: str) -> dict[str, Any]:
        """The flags as keywords of `extract.run_extraction`, but for the store; on one device."""
        from extract.reading.isolation import ReaderLimits
        from extract.store import AugmentRecipe

        same = {name: getattr(self, name) for name in _SAME}
        return same | {
            "slides": self.slides or [],
            "backbone": self.backbone or ["efficientnet_lite0"],
            "recipe": self.tile_recipe,
            "device": device,
            "shard_text": self.shard,
            "mean": _numbers(self.mean, "--mean"),
            "std": _numbers(self.std, "--std"),
            "augment": AugmentRecipe(self.augment, self.strength, self.augment_seed),
            "context_mpp": self.context_mpp or (),
            "redo": self.redo or (),
            "isolation": not self.no_isolation,
            "limits": ReaderLimits(int(self.reader_memory * 1e9), read_s=self.reader_timeout),
        }


def _numbers(text: str | None, flag: str) -> tuple[float, ...] | None:
    try:
        return None if text is None else tuple(float(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"got {flag} {text} → expected R,G,B → such as 0.485,0.456,0.406") from None


_SAME = (
    "table",
    "images",
    "masks",
    "default_mpp",
    "entry",
    "weights",
    "pooling",
    "dtype",
    "allow_remote_code",
    "views",
    "batch_size",
    "runtime",
    "precision",
    "compile_model",
    "reader",
    "max_invalid",
    "format",
)
"""Flags that `extract.run_extraction` takes under the same name."""


def with_extraction_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command every field of `ExtractionFlags` beside its own parameters, so that all understand one line."""
    flags = inspect.signature(ExtractionFlags).parameters
    own = inspect.signature(command).parameters
    everything = {name: each for name, each in (flags | own).items() if each.kind is not inspect.Parameter.VAR_KEYWORD}
    command.__signature__ = inspect.Signature([*everything.values()])  # type: ignore[attr-defined]
    return command
