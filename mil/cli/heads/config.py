"""``mil config show``: what a training would run with, and what could be chosen."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mil.cli.console import say

app = typer.Typer(help="Settings of trainings.", no_args_is_help=True)


@app.callback()
def config() -> None:
    """Settings of trainings."""


@app.command()
def show(
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings, as in mil train.", show_default=False)
    ] = None,
    *,
    file: Annotated[Path | None, typer.Option("--config", help="config.yaml of a run.", show_default=False)] = None,
    options: Annotated[bool, typer.Option("--options", help="List what each group offers instead.")] = False,
) -> None:
    """Print the whole configuration that these settings give, as YAML that `mil train --config` takes.

    Example: `mil config show recipe=strong head=clam_sb > config.yaml`
    """
    from mil.config.compose import compose_config
    from mil.config.options import GROUPS, RECIPES, group_options

    console = Console()
    if not options:
        print_yaml(console, compose_config(overrides or [], file).to_yaml())
        return
    say(console, f"recipe= {', '.join(RECIPES)}")
    for group in GROUPS:
        say(console, f"\n{group}=")
        for name, keys in group_options(group).items():
            say(console, f"  {name}: {', '.join(f'{key}={value}' for key, value in keys.items())}".rstrip(": "))


def print_yaml(console: Console, text: str) -> None:
    """The text as it is: nothing is wrapped or coloured, so that it can be piped into a file."""
    console.out(text.rstrip(), highlight=False)
