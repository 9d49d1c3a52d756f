"""The command line: ``mil extract``, ``mil train``, ``mil predict``, ``mil report``, ``mil demo``."""

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

app = typer.Typer(
    name="mil",
    help="Multiple-instance learning for whole-slide images: embed slides once, train heads on the cached bags.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

StoreOption = Annotated[Path, typer.Option("--store", help="The embedding store, such as cohort.zarr.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]


def main() -> None:
    """Run the command line; expected errors are printed in one line, without a traceback."""
    from aggregators.errors import AggregatorError
    from extract.errors import ExtractError
    from mil.errors import MilError

    try:
        app()
    except (ExtractError, MilError, AggregatorError) as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        again = shlex.join(["mil", *sys.argv[1:]])
        Console(stderr=True).print(
            f"\nstopped. What was finished is kept. To go on: {again}", markup=False, soft_wrap=True
        )
        sys.exit(130)


@app.command()
def extract(
    slides: Annotated[
        list[str] | None, typer.Argument(help="Slide files and folders of slides.", show_default=False)
    ] = None,
    *,
    store: StoreOption,
    backbone: Annotated[
        str, typer.Option(help="A registered name, any timm model, or hf-hub:owner/model.")
    ] = "efficientnet_lite0",
    entry: Annotated[
        str | None,
        typer.Option("--as", help="Name of the features entry.  [default: the backbone's]", show_default=False),
    ] = None,
    mpp: Annotated[
        float | None, typer.Option(help="Scale of the tiles in µm per pixel.  [default: 0.5]", show_default=False)
    ] = None,
    magnification: Annotated[
        float | None, typer.Option(help="The same as a magnification: 20 is 0.5 µm/px.", show_default=False)
    ] = None,
    native: Annotated[bool, typer.Option("--native", help="Tile every slide at its own resolution.")] = False,
    tile_px: Annotated[int, typer.Option(help="Side of a tile in pixels.", min=16)] = 224,
    overlap_px: Annotated[int, typer.Option("--overlap-px", help="Pixels that neighbouring tiles share.", min=0)] = 0,
    edge: Annotated[
        Literal["shift", "drop"], typer.Option(help="The last row and column move inwards, or are left out.")
    ] = "shift",
    tissue: Annotated[
        Literal["default", "none"], typer.Option(help="How tissue is found; none tiles everything.")
    ] = "default",
    min_tissue: Annotated[float, typer.Option(help="Smallest part of a tile that is tissue.", min=0.0, max=1.0)] = 0.25,
    table: Annotated[
        Path | None,
        typer.Option("--slides", help="Slide table: path[, slide_id, patient_id, mpp].", show_default=False),
    ] = None,
    default_mpp: Annotated[
        float | None, typer.Option(help="µm per pixel of slides that name none.", show_default=False)
    ] = None,
    allow_upsampling: Annotated[
        bool, typer.Option("--allow-upsampling", help="Permit a scale finer than the slide's.")
    ] = False,
    weights: Annotated[
        Path | None, typer.Option(help="Local weights of the backbone (safetensors or .pth).", show_default=False)
    ] = None,
    pooling: Annotated[
        Literal["model", "avg", "cls", "cls+avg"], typer.Option(help="model is the backbone's own.")
    ] = "model",
    dtype: Annotated[Literal["float16", "float32"], typer.Option(help="How embeddings are stored.")] = "float16",
    device: DeviceOption = "auto",
    batch_size: Annotated[
        int | None,
        typer.Option(help="Tiles per forward.  [default: 4 a core, 128 on a GPU]", min=1, show_default=False),
    ] = None,
) -> None:
    """Cut slides into tissue tiles and store their embeddings.

    Resumes where an earlier run stopped. Slides that fail are listed with the reason, and the exit code is 1.

    Example: `mil extract slides/ --store cohort.zarr --mpp 0.5`
    """
    from extract.geometry import magnification_to_mpp
    from extract.pipeline import run_extraction
    from extract.store import TileRecipe, TissueRecipe
    from mil.console import ExtractionProgress

    if sum((mpp is not None, magnification is not None, native)) > 1:
        raise typer.BadParameter(
            "got more than one of --mpp, --magnification and --native → they say the same thing → give one"
        )
    if not slides and table is None:
        raise typer.BadParameter("got no slides → name files or folders, or a --slides table", param_hint="SLIDES")
    scale = (
        None if native else magnification_to_mpp(magnification) if magnification else mpp if mpp is not None else 0.5
    )
    recipe = TileRecipe(
        scale, tile_px, overlap_px, edge, min_tissue, allow_upsampling, tissue=TissueRecipe(method=tissue)
    )
    console = Console()
    progress = ExtractionProgress(console)
    try:
        report = run_extraction(
            slides or [],
            store,
            backbone,
            entry,
            recipe,
            table,
            default_mpp,
            weights,
            pooling,
            dtype,
            device,
            batch_size,
            progress,
        )
    finally:
        progress.end()
    _print_extraction(console, report)
    if report.failed:
        raise typer.Exit(1)


def _print_extraction(console: Console, report: Any) -> None:
    from mil.console import print_table

    tiles = sum(o.n_tiles for o in report.outcomes)
    invalid = [o for o in report.outcomes if o.n_invalid]
    rate = (
        f", {report.stats.tiles / report.seconds:.1f} tiles/s, waiting for {report.stats.bottleneck}"
        if report.stats.tiles
        else ""
    )
    console.print(
        f"{len(report.outcomes)} slides: {report.count('embedded')} embedded, {report.count('complete')} complete before, "
        f"{len(report.failed)} failed; {tiles} tiles in {report.seconds:.1f} s{rate}",
        soft_wrap=True,
        highlight=False,
    )
    if invalid:
        rows = [[o.slide_id, str(o.n_invalid), str(o.n_tiles)] for o in invalid]
        print_table(console, "tiles that cannot be decoded (left out)", ["slide", "invalid", "tiles"], rows)
    if report.failed:
        print_table(console, "slides that failed", ["slide", "reason"], [[o.slide_id, o.reason] for o in report.failed])
    console.print(
        f"store {report.store}, entry {report.entry}, log {report.log}", markup=False, soft_wrap=True, highlight=False
    )
