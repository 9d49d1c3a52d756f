"""``mil sheet``: the contact sheet of a cohort, and its tissue and tiles for QuPath."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from mil.visualization.slide_card import Progress


def sheet(
    store: Annotated[Path, typer.Argument(help="The embedding store, such as cohort.zarr.")],
    *,
    out: Annotated[Path, typer.Option(help="The HTML file to write.")] = Path("contact_sheet.html"),
    geojson: Annotated[
        Path | None,
        typer.Option(help="Also write each slide's tissue and tiles for QuPath into this folder.", show_default=False),
    ] = None,
    entry: Annotated[
        str | None,
        typer.Option("--as", help="Features entry whose flags are shown.  [default: the first]", show_default=False),
    ] = None,
) -> None:
    """Show a cohort on one page: every slide's tissue, tiles, scale and flags, and what deserves a look.

    Reads the store only; no slide is opened.

    Example: `mil sheet cohort.zarr --out contact_sheet.html --geojson qupath/`
    """
    from extract.store import open_store
    from mil.visualization.contact_sheet import write_contact_sheet
    from mil.visualization.geojson import write_geojson

    if out.is_dir() or not out.absolute().parent.is_dir():
        raise typer.BadParameter(
            f"got {out} → expected a file in a folder that exists → correct it", param_hint="--out"
        )
    console, reader = Console(), open_store(store)
    with _count(console, "slides drawn") as progress:
        write_contact_sheet(reader, out, entry, progress)
    size_mb = out.stat().st_size / 1e6
    console.print(f"contact sheet {out} ({size_mb:.1f} MB)", markup=False, soft_wrap=True, highlight=False)
    if geojson is None:
        return
    with _count(console, "slides outlined") as progress:
        files = write_geojson(reader, geojson, entry, progress)
    lacking = 2 * len(reader) - len(files)
    why = f"; {lacking} are lacking, as their slides were imported or cut by an earlier version" if lacking else ""
    console.print(f"{len(files)} GeoJSON files in {geojson}{why}", markup=False, soft_wrap=True, highlight=False)


@contextmanager
def _count(console: Console, what: str) -> Iterator["Progress"]:
    """A live count of slides."""
    from mil.cli.console import LiveCount

    count = LiveCount(console, what)

    def progress(done: int, total: int) -> None:
        if done == 1:
            count.begin(total)
        count.add(done=1)

    try:
        yield progress
    finally:
        count.end()
