"""``mil pack``, ``mil ensemble`` and ``mil export-onnx``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from mil.cli.console import counted, print_metrics, print_table, print_target_metrics, say, stacked_interval
from mil.cli.heads.predict import print_banner, print_warnings, say_abstention
from mil.cohort.targets import CLASSIFICATION, MULTI_LABEL


def pack(
    run: Annotated[Path, typer.Argument(help="What mil train or mil ensemble wrote.", show_default=False)],
    *,
    out: Annotated[Path, typer.Option(help="Folder of the model; must be new or empty.")],
    abstain_below: Annotated[
        float | None, typer.Option(help="Abstain below this confidence.", show_default=False)
    ] = None,
    coverage: Annotated[
        float | None,
        typer.Option(help="Or where this share of validation slides is still answered: 0.9.", show_default=False),
    ] = None,
    accuracy: Annotated[
        float | None,
        typer.Option(help="Or where this share of answers on validation slides is right: 0.95.", show_default=False),
    ] = None,
    no_calibration: Annotated[
        bool, typer.Option("--no-calibration", help="Keep the probabilities as the heads give them.")
    ] = False,
) -> None:
    """Pack a run or an ensemble into one folder that predicts elsewhere: weights, recipes, threshold, model card.

    An ensemble takes all its members with it. --coverage and --accuracy need members of the same folds. Thresholds are
    for classes, temperatures for classes and labels.

    Example: `mil pack runs/abmil --out models/subtype --coverage 0.9`
    """
    from mil.deployment.packing import pack as pack_run

    artefact = pack_run(
        run, out, abstain_below=abstain_below, coverage=coverage, accuracy=accuracy, calibrate=not no_calibration
    )
    console, record = Console(), artefact.record
    print_banner(console, record["synthetic"])
    title = f"{record['target']} by {record['head']}, out of fold, as this model predicts"
    _print_evaluation(console, title, artefact.task, record["out_of_fold"])
    _print_members(console, artefact.task, record.get("members", ()))
    if not no_calibration:
        _say_calibration(console, artefact)
    say_abstention(console, record["abstention"])
    print_warnings(console, record["warnings"])
    say(console, f"model {out}, {counted(len(record['replicas']), 'replica')}, card {out / 'README.md'}")


def _print_evaluation(console: Console, title: str, task: str, evaluation: dict[str, Any]) -> None:
    """The metrics of any task out of fold."""
    if task == CLASSIFICATION:
        print_metrics(console, title, evaluation)
    else:
        print_target_metrics(console, title, task, evaluation)


def _say_calibration(console: Console, artefact: Any) -> None:
    """Temperatures and what they did; numbers and risks have none."""
    if artefact.record["calibration"] is None:
        say(console, "no temperatures: numbers and risks are no probabilities")
        return
    found = [artefact.record["calibration"][key] for key in ("uncalibrated", "out_of_fold")]
    if artefact.task == MULTI_LABEL:
        errors = [sum(each["ece"] for each in labels.values()) / len(labels) for labels in found]
        what = "mean calibration error of the labels"
    else:
        errors, what = [each["ece"] for each in found], "calibration error"
    temperatures = artefact.temperatures.values()
    say(
        console,
        f"temperatures {min(temperatures):.2f} to {max(temperatures):.2f}; {what} out of fold {errors[0]:.3f} before, "
        f"{errors[1]:.3f} after",
    )


def ensemble(
    runs: Annotated[list[Path], typer.Argument(help="Folders that mil train wrote, of the same slides.")],
    *,
    out: Annotated[Path, typer.Option(help="Folder of the ensemble.")],
    average: Annotated[
        Literal["probabilities", "logits"],
        typer.Option(help="What is averaged of classes and labels; logits lets one member rule out."),
    ] = "probabilities",
) -> None:
    """Average several runs of one target, and say what that gained over each of them.

    Probabilities and numbers are averaged as they are, risks in units of their spread among validation slides.

    Example: `mil ensemble runs/abmil runs/transmil --out runs/both`
    """
    from mil.runs.ensemble import make_ensemble

    made = make_ensemble(runs, average)
    folder = made.save(out)
    console, metrics = Console(), made.metrics
    print_banner(console, metrics["synthetic"])
    whole = metrics["out_of_fold"]
    members = [each | {"name": Path(each["run"]).name} for each in metrics["members"]]
    _print_members(console, metrics["task"], members, whole)
    _print_evaluation(console, f"{metrics['target']} by the ensemble, out of fold", metrics["task"], whole)
    print_warnings(console, metrics["warnings"])
    say(console, "If the members were picked by their test folds, these figures are too good.")
    say(
        console,
        f"ensemble {folder}; mil predict --run {folder} applies it, while its members stay where they are; mil pack "
        f"makes one folder of all",
    )


def _print_members(
    console: Console, task: str, members: Sequence[dict[str, Any]], whole: dict[str, Any] | None = None
) -> None:
    """Each member's figures, and what the ensemble, whose own are the last row if given, gains over it."""
    from mil.evaluation.headlines import brief_metrics, metric_name
    from mil.evaluation.paired import gain_name

    if not members:
        return
    names = brief_metrics(task)
    rows = []
    for each in members:
        scores = [stacked_interval(each[name]) for name in names]
        gain = each[gain_name(task)] | {"value": each[gain_name(task)]["difference"]}
        # one column that may wrap, and three of figures, fit 80 letters
        rows.append([f"{each['name']} ({each['head']}, {each['entry']})", *scores, stacked_interval(gain, "+.3f")])
    if whole is not None:
        rows.append(["ensemble", *(stacked_interval(whole[name]) for name in names), "–"])
    titles = [metric_name(task, name) for name in names]
    columns = ["member", *titles, f"gain in {titles[0]}"]
    print_table(console, "members, and the ensemble minus each; 95 % intervals over patients", columns, rows)


def export_onnx(
    run: Annotated[Path, typer.Argument(help="What mil train or mil pack wrote.", show_default=False)],
    *,
    out: Annotated[Path, typer.Option(help="Folder for the files; must be new or empty.")],
    store: Annotated[Path | None, typer.Option(help="Compare on slides of this store too.", show_default=False)] = None,
) -> None:
    """Write every replica's head as an ONNX file, compared with torch on bags of several sizes.

    Example: `mil export-onnx models/subtype --out models/subtype-onnx --store cohort.zarr`
    """
    from extract.store import open_store
    from mil.deployment.onnx_export import export_onnx as export

    found = export(run, out, None if store is None else open_store(store))
    console = Console()
    rows = [[each.replica, ", ".join(each.outputs), f"{each.largest_difference:.1e}"] for each in found]
    print_table(console, "largest difference from torch", ["replica", "outputs", "difference"], rows)
    first = found[0]
    say(
        console,
        f"{counted(len(found), 'file')}, each compared on {counted(len(first.bags), 'bag')} ({first.real_bags} of them "
        f"slides); written to {out}",
    )
