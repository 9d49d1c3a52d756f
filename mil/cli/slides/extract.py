"""``mil extract``: its flags, what it prints, and how it stops."""

import shlex
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from mil.cli.console import say_start
from mil.files import require_writable

_TILING = "Scale and tiles"
_TISSUE = "Tissue"
_BACKBONE = "Backbone"
_VIEWS = "Further views of each tile"
_RUNNING = "Running"


@contextmanager
def resumable() -> Iterator[None]:
    """Within it Ctrl-C ends the command with one line that says how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        raise stopped() from None


def stopped() -> typer.Exit:
    """Say that nothing is lost and how to go on; exit as a shell expects after Ctrl-C."""
    again = shlex.join(["mil", *sys.argv[1:]])
    Console(stderr=True).print(f"stopped. What was finished is kept. To go on: {again}", markup=False, soft_wrap=True)
    return typer.Exit(130)


@resumable()
def extract(
    slides: Annotated[
        list[str] | None, typer.Argument(help="Slide files and folders of slides.", show_default=False)
    ] = None,
    *,
    store: Annotated[Path, typer.Option("--store", help="The embedding store, such as cohort.zarr.")],
    table: Annotated[
        Path | None,
        typer.Option(
            "--slides",
            help="Slide table: path[, slide_id, patient_id, mpp, mask], or slide_id, ...",
            show_default=False,
        ),
    ] = None,
    images: Annotated[
        str | None, typer.Option(help="Pattern of the files that are slides: img_{}.png", show_default=False)
    ] = None,
    mpp: Annotated[
        float | None,
        typer.Option(
            help="Scale of the tiles in µm per pixel.  [default: 0.5]", show_default=False, rich_help_panel=_TILING
        ),
    ] = None,
    magnification: Annotated[
        float | None,
        typer.Option(help="The same as a magnification: 20 is 0.5 µm/px.", show_default=False, rich_help_panel=_TILING),
    ] = None,
    native: Annotated[
        bool, typer.Option("--native", help="Tile every slide at its own resolution.", rich_help_panel=_TILING)
    ] = False,
    default_mpp: Annotated[
        float | None,
        typer.Option(help="µm per pixel of slides that name none.", show_default=False, rich_help_panel=_TILING),
    ] = None,
    allow_upsampling: Annotated[
        bool,
        typer.Option("--allow-upsampling", help="Permit a scale finer than the slide's.", rich_help_panel=_TILING),
    ] = False,
    tile_px: Annotated[int, typer.Option(help="Side of a tile in pixels.", min=16, rich_help_panel=_TILING)] = 224,
    overlap_px: Annotated[
        int, typer.Option(help="Pixels that neighbouring tiles share.", min=0, rich_help_panel=_TILING)
    ] = 0,
    gap_px: Annotated[
        int, typer.Option(help="Pixels left out between neighbouring tiles.", min=0, rich_help_panel=_TILING)
    ] = 0,
    jitter_px: Annotated[
        int,
        typer.Option(help="Move each slide's grid by up to so many pixels at random.", min=0, rich_help_panel=_TILING),
    ] = 0,
    jitter_seed: Annotated[int, typer.Option(help="Seed of that draw.", min=0, rich_help_panel=_TILING)] = 0,
    edge: Annotated[
        Literal["shift", "drop"],
        typer.Option(
            help="What sticks out at the right and bottom: shift moves it inwards, drop leaves it out.",
            rich_help_panel=_TILING,
        ),
    ] = "shift",
    tissue: Annotated[
        Literal["default", "saturation", "mask", "none"],
        typer.Option(
            help="How tissue is found: default or saturation (by colour), mask (every slide comes with one), none "
            "(everything is tiled).",
            metavar="METHOD",
            rich_help_panel=_TISSUE,
        ),
    ] = "default",
    masks: Annotated[
        str | None,
        typer.Option(
            help="Folder of masks, or their pattern: mask_{}.png (PNG or QuPath GeoJSON).",
            show_default=False,
            rich_help_panel=_TISSUE,
        ),
    ] = None,
    min_tissue: Annotated[
        float,
        typer.Option(help="Smallest part of a tile that is tissue.", min=0.0, max=1.0, rich_help_panel=_TISSUE),
    ] = 0.25,
    keep_pen: Annotated[
        bool, typer.Option("--keep-pen", help="Do not exclude pen marks and black borders.", rich_help_panel=_TISSUE)
    ] = False,
    backbone: Annotated[
        list[str] | None,
        typer.Option(
            help="A preset (mil models list), any timm model, or hf-hub:owner/model; may be given several times.  "
            "[default: efficientnet_lite0]",
            show_default=False,
            rich_help_panel=_BACKBONE,
        ),
    ] = None,
    entry: Annotated[
        str | None,
        typer.Option(
            "--as",
            help="Name of the features entry.  [default: the backbone's]",
            show_default=False,
            rich_help_panel=_BACKBONE,
        ),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(
            help="Local weights of the backbone (safetensors or .pth).", show_default=False, rich_help_panel=_BACKBONE
        ),
    ] = None,
    pooling: Annotated[
        Literal["model", "avg", "cls", "cls+avg"],
        typer.Option(
            help="model: the backbone's own; avg: mean of the patches; cls: class token.", rich_help_panel=_BACKBONE
        ),
    ] = "model",
    dtype: Annotated[
        Literal["float16", "float32"], typer.Option(help="How embeddings are stored.", rich_help_panel=_BACKBONE)
    ] = "float16",
    format: Annotated[
        Literal["zarr", "h5"] | None,
        typer.Option(
            help="zarr, or h5: one file per slide that TRIDENT and CLAM scripts read.  [default: the store's, or zarr]",
            show_default=False,
            rich_help_panel=_BACKBONE,
        ),
    ] = None,
    allow_remote_code: Annotated[
        bool,
        typer.Option(
            "--allow-remote-code",
            help="Permit a backbone that runs its authors' code from the hub.",
            rich_help_panel=_BACKBONE,
        ),
    ] = False,
    views: Annotated[
        int, typer.Option(help="Augmented embeddings per tile, in entries NAME@view-k.", min=0, rich_help_panel=_VIEWS)
    ] = 0,
    augment: Annotated[
        str,
        typer.Option(
            help="flip, colour, hed, blur, randaugment, trivialaugment, or pathology (the first four).",
            rich_help_panel=_VIEWS,
        ),
    ] = "pathology",
    strength: Annotated[
        float, typer.Option(help="Strength of the policy.", min=0.0, max=1.0, rich_help_panel=_VIEWS)
    ] = 0.5,
    augment_seed: Annotated[int, typer.Option(help="Seed of the views.", min=0, rich_help_panel=_VIEWS)] = 0,
    context_mpp: Annotated[
        list[float] | None,
        typer.Option(
            help="Also embed the surroundings at this coarser scale, in an entry NAME@context-MPP; may be given "
            "several times.",
            show_default=False,
            rich_help_panel=_VIEWS,
        ),
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            help="auto, cpu, cuda, cuda:N; all, or cuda:0,cuda:1: one process per GPU.", rich_help_panel=_RUNNING
        ),
    ] = "auto",
    batch_size: Annotated[
        int | None,
        typer.Option(
            help="Tiles per forward.  [default: 4 on a CPU, 128 on a GPU]",
            min=1,
            show_default=False,
            rich_help_panel=_RUNNING,
        ),
    ] = None,
    runtime: Annotated[
        Literal["auto", "torch", "openvino"],
        typer.Option(help="What computes on a CPU; auto takes the fastest installed.", rich_help_panel=_RUNNING),
    ] = "auto",
    precision: Annotated[
        Literal["auto", "fp32", "bf16", "fp16"],
        typer.Option(help="auto: fp32 on a CPU; on a GPU what the backbone was made for.", rich_help_panel=_RUNNING),
    ] = "auto",
    compile_model: Annotated[
        bool, typer.Option("--compile", help="Compile the backbone (GPU only).", rich_help_panel=_RUNNING)
    ] = False,
    reader: Annotated[
        Literal["auto", "direct", "openslide"],
        typer.Option(
            help="auto decodes tiles directly where that is identical to OpenSlide.", rich_help_panel=_RUNNING
        ),
    ] = "auto",
    no_isolation: Annotated[
        bool,
        typer.Option("--no-isolation", help="Read in this process, not in one of its own.", rich_help_panel=_RUNNING),
    ] = False,
    reader_memory: Annotated[
        float,
        typer.Option(help="GB of memory that the reading process may take.", min=0.5, rich_help_panel=_RUNNING),
    ] = 8.0,
    reader_timeout: Annotated[
        float,
        typer.Option(
            help="Seconds after which a run of tiles that is not decoded is given up.", min=1, rich_help_panel=_RUNNING
        ),
    ] = 180.0,
    shard: Annotated[
        str | None,
        typer.Option(
            help="Only the i-th of n parts of the slides, such as 3/16.", show_default=False, rich_help_panel=_RUNNING
        ),
    ] = None,
) -> None:
    """Cut slides into tissue tiles and store their embeddings.

    Resumes where an earlier run stopped, inside a slide too. Slides that fail are listed with the reason, and the exit
    code is 1; it is 3 where none failed but another process is still at work on some.

    Example: `mil extract slides/ --store cohort.zarr --mpp 0.5`
    """
    _check_flags(mpp, magnification, native, bool(slides) or table is not None)
    say_start("loading torch and the backbone")
    _check_store(store)
    from extract.geometry import magnification_to_mpp
    from extract.pipeline.fleet import check_claims, devices_of, run_fleet
    from extract.reading.isolation import ReaderLimits
    from extract.store import AugmentRecipe, TileRecipe, TissueRecipe
    from extract.store.core.remote_path import store_path

    devices = devices_of(device)
    if len(devices) > 1:
        check_claims(store_path(store))
        raise typer.Exit(run_fleet(devices, (sys.executable, "-P", "-m", "mil"), sys.argv[1:]))
    scale = 0.5 if mpp is None else mpp
    scale = scale if magnification is None else magnification_to_mpp(magnification)
    tiling: dict[str, Any] = {"tile_px": tile_px, "overlap_px": overlap_px, "edge": edge, "gap_px": gap_px}
    tiling |= {"min_tissue_fraction": min_tissue, "allow_upsampling": allow_upsampling}
    tiling |= {"jitter_px": jitter_px, "jitter_seed": jitter_seed}
    method = TissueRecipe(method=tissue, exclude_pen=not keep_pen)
    recipe = TileRecipe(None if native else scale, tissue=method, **tiling)
    options: dict[str, Any] = {"table": table, "images": images, "masks": masks, "shard_text": shard}
    options |= {"default_mpp": default_mpp, "format": format, "reader": reader, "isolation": not no_isolation}
    options |= {"entry": entry, "weights": weights, "pooling": pooling, "dtype": dtype, "device": devices[0]}
    options |= {"batch_size": batch_size, "runtime": runtime, "precision": precision, "compile_model": compile_model}
    options |= {"allow_remote_code": allow_remote_code, "views": views, "context_mpp": context_mpp or ()}
    options |= {"augment": AugmentRecipe(augment, strength, augment_seed)}
    options |= {"limits": ReaderLimits(int(reader_memory * 1e9), read_s=reader_timeout)}
    _run(slides or [], store, backbone or ["efficientnet_lite0"], recipe, options)


def _check_flags(mpp: float | None, magnification: float | None, native: bool, any_slides: bool) -> None:
    if sum((mpp is not None, magnification is not None, native)) > 1:
        raise typer.BadParameter(
            "got more than one of --mpp, --magnification and --native → they say the same thing → give one"
        )
    if not any_slides:
        raise typer.BadParameter("got no slides → name files or folders, or a --slides table", param_hint="SLIDES")


def _check_store(store: Path) -> None:
    """Refuse a new store where none can be made; one that is there says itself what is wrong with it."""
    from extract.store.core.remote_path import RemotePath, store_path

    path = store_path(store)
    if not isinstance(path, RemotePath) and not path.exists():
        require_writable(path, f"store {path}", "--store")


def _run(slides: list[str], store: Path, backbones: list[str], recipe: Any, options: dict[str, Any]) -> None:
    """Extract, with progress, and print what became of it.

    Raises:
        typer.Exit: slides failed, or were left to others.
    """
    from extract.pipeline.extraction import run_extraction
    from extract.pipeline.fleet import LEFT_TO_OTHERS
    from mil.cli.console import ExtractionProgress

    console = Console()
    progress = ExtractionProgress(console)
    try:
        report = run_extraction(slides, store, backbones, recipe=recipe, progress=progress, **options)
    finally:
        progress.end()
    print_extraction(console, report)
    if report.failed:
        raise typer.Exit(1)
    if report.count("elsewhere"):
        raise typer.Exit(LEFT_TO_OTHERS)


def print_extraction(console: Console, report: Any) -> None:
    """Print what became of a run: counts and rates, invalid tiles, slides that failed and why."""
    from mil.cli.console import plain_reason, print_table

    stats = report.stats
    tiles = sum(o.n_tiles for o in report.outcomes)
    rate = (
        f", {stats.tiles / report.seconds:.1f} tiles/s, device busy {stats.device_busy:.0%}, waiting for "
        f"{stats.bottleneck}"
        if stats.tiles
        else ""
    )
    resumed = sum(o.n_resumed for o in report.outcomes)
    saved = f" ({resumed} of them saved before)" if resumed else ""
    elsewhere = f"{report.count('elsewhere')} left to other processes, " if report.count("elsewhere") else ""
    slides = "1 slide" if len(report.outcomes) == 1 else f"{len(report.outcomes)} slides"
    console.print(
        f"{slides}: {report.count('embedded')} embedded, {report.count('complete')} complete before, {elsewhere}"
        f"{len(report.failed)} failed; {tiles} tiles{saved} in {report.seconds:.1f} s{rate}",
        soft_wrap=True,
        highlight=False,
    )
    readers = Counter(o.reader for o in report.outcomes if o.reader)
    if set(readers) - {"direct", "image"}:
        print_table(console, "how slides were read", ["reader", "slides"], [[r, str(n)] for r, n in readers.items()])
    flagged = {name: sum(o.flagged.get(name, 0) for o in report.outcomes) for name in ("blurred", "empty", "pen")}
    if any(flagged.values()):
        counts = ", ".join(f"{n} {name}" for name, n in flagged.items() if n)
        console.print(f"tiles flagged, and kept: {counts}", soft_wrap=True, highlight=False)
    invalid = [[o.slide_id, str(o.n_invalid), str(o.n_tiles)] for o in report.outcomes if o.n_invalid]
    if invalid:
        print_table(console, "tiles that cannot be decoded (left out)", ["slide", "invalid", "tiles"], invalid)
    for what, title in (("failed", "slides that failed"), ("elsewhere", "slides left to other processes")):
        rows = [[o.slide_id, plain_reason(o.slide_id, o.reason)] for o in report.outcomes if o.outcome == what]
        if rows:
            print_table(console, title, ["slide", "reason"], rows)
    left = report.count("elsewhere")
    if left:
        who = "1 slide is" if left == 1 else f"{left} slides are"
        line = f"{who} being extracted by another process; run this command again when that has ended, to be sure"
        console.print(line, style="yellow", markup=False, soft_wrap=True, highlight=False)
    where = (
        f"store {report.store}, {'entry' if len(report.entries) == 1 else 'entries'} {', '.join(report.entries)}, log "
        f"{report.log}"
        if report.store.exists()
        else "no slide could be cut, so no store was made"
    )
    console.print(where, markup=False, soft_wrap=True, highlight=False)
