"""The command line ``mil``."""

import sys

import typer
from rich.console import Console

from mil.cli.activity import ACTIVITY
from mil.cli.heads import benchmark, compare, config, pack, predict, score, sweep, train
from mil.cli.slides import extract, foreign, models, plan, sheet, store

app = typer.Typer(
    name="mil",
    help="Multiple-instance learning for whole-slide images: embed slides once, train heads on the cached bags.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


def main() -> None:
    """Run the command line; expected errors are printed in one line, without a traceback."""
    from extract.signals import exit_when_stopped

    exit_when_stopped()
    try:
        _run()
    finally:
        ACTIVITY.end()


def _run() -> None:
    try:
        app()
    except SystemExit as end:
        # Ctrl-C that no command took ends typer without a word
        if end.__context__ is not None and isinstance(end.__context__.__cause__, KeyboardInterrupt):
            Console(stderr=True).print("stopped.")
        raise
    except KeyboardInterrupt:
        Console(stderr=True).print("stopped.")
        sys.exit(130)
    except _own_errors() as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        # torch's own is only known where torch was imported
        if not isinstance(error, MemoryError) and type(error).__name__ != "OutOfMemoryError":
            raise
        what = "got too little memory → expected room for the largest slide's bag → set instance_budget, or device=cpu"
        Console(stderr=True).print(f"error: {what}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        Console(stderr=True).print(f"error: {what}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)


def _own_errors() -> tuple[type[Exception], ...]:
    """The bases of the errors that are raised on purpose; a package that no command has imported raises none."""
    bases = {"extract": "ExtractError", "mil": "MilError", "aggregators": "AggregatorError"}
    loaded = ((sys.modules.get(f"{package}.errors"), name) for package, name in bases.items())
    return tuple(getattr(module, name) for module, name in loaded if module is not None)


# in the order of ``mil --help``
app.command()(plan.doctor)
app.command()(plan.plan)
app.command()(extract.extract)
app.command()(sheet.sheet)
app.add_typer(config.app, name="config")
app.add_typer(models.app, name="models")
app.add_typer(store.store_app, name="store")
store.store_app.command("import")(foreign.import_features)
store.store_app.command("export")(foreign.export_features)
app.command()(train.train)
app.command()(benchmark.benchmark)
app.command()(compare.compare)
app.command()(score.score)
app.command()(sweep.sweep)
app.command()(pack.ensemble)
app.command()(pack.pack)
app.command()(predict.predict)
app.command()(predict.evaluate)
app.command("export-onnx")(pack.export_onnx)
app.command()(train.report)
app.command()(train.demo)
