"""``mil pack``, ``mil predict``, ``mil evaluate``, ``mil ensemble``, ``mil export-onnx``: trained models at work."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from mil.cli.console import (
    counted,
    print_metrics,
    print_table,
    print_target_metrics,
    say,
    shortened,
)
from mil.cohort.targets import CLASSIFICATION

_SLIDES = "Straight from slides"
_SUBMISSION = "Challenge submission"
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
EntryOption = Annotated[
    str | None, typer.Option("--as", help="Features entry.  [default: the one that fits]", show_default=False)
]
ModelOption = Annotated[
    Path, typer.Option("--run", help="What mil train, mil pack or mil ensemble wrote with --out.", show_default=False)
]


def predict(
    slides: Annotated[
        list[str] | None,
        typer.Argument(help="Slide files and folders; without them all of --store.", show_default=False),
    ] = None,
    *,
    run: ModelOption,
    store: Annotated[
        Path | None,
        typer.Option(
            help="The embedding store. With slides it takes their features.  [default with slides: beside --out]",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path,
        typer.Option(
            help="CSV to write: slide_id, predicted, the probability of each class, ...; or the numbers, or the risk."
        ),
    ],
    entry: EntryOption = None,
    device: DeviceOption = "auto",
    attention: Annotated[
        Path | None,
        typer.Option(help="Folder for the attention of every tile: one npz per slide.", show_default=False),
    ] = None,
    format: Annotated[
        Literal["table", "submission"],
        typer.Option(
            help="submission: one label per slide (or one number, of a regression), in two columns; also for slides "
            "from which the model abstains, which are named on the terminal. The table marks them.",
            rich_help_panel=_SUBMISSION,
        ),
    ] = "table",
    columns: Annotated[
        str, typer.Option(help="Names of these columns.", rich_help_panel=_SUBMISSION)
    ] = "sample_index,label",
    label_map: Annotated[
        list[str] | None,
        typer.Option(
            help="What to write for a class, such as benign=0; once for each class.",
            show_default=False,
            rich_help_panel=_SUBMISSION,
        ),
    ] = None,
    table: Annotated[
        Path | None,
        typer.Option("--slides", help="Slide table, as in mil extract.", show_default=False, rich_help_panel=_SLIDES),
    ] = None,
    default_mpp: Annotated[
        float | None,
        typer.Option(help="µm per pixel of slides that name none.", show_default=False, rich_help_panel=_SLIDES),
    ] = None,
    images: Annotated[
        str | None,
        typer.Option(
            help="Pattern of the files that are slides: img_{}.png", show_default=False, rich_help_panel=_SLIDES
        ),
    ] = None,
    masks: Annotated[
        str | None,
        typer.Option(help="Folder of masks, or their pattern.", show_default=False, rich_help_panel=_SLIDES),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(help="Local weights of the backbone.", show_default=False, rich_help_panel=_SLIDES),
    ] = None,
) -> None:
    """Predict slides without labels by the mean of what a model's replicas say.

    Given slides, it embeds what the store lacks first, by the recipe of the model. Slides that fail, or have no valid
    tile, are listed, and the exit code is 1.

    Example: `mil predict --run models/subtype slides/ --out predictions.csv`
    """
    from extract.store import open_store
    from mil.cli.slides.extract import resumable
    from mil.deployment.inference import predict as predict_slides
    from mil.deployment.model import model_records
    from mil.deployment.predictions import check_submission
    from mil.evaluation.tables import value_names

    _check_file(out)
    if attention is not None and attention.exists() and not attention.is_dir():
        raise typer.BadParameter(f"got {attention}, a file → expected a folder → correct it", param_hint="--attention")
    from_slides = bool(slides) or table is not None
    extraction = {"table": table, "default_mpp": default_mpp, "images": images, "masks": masks, "weights": weights}
    given = {name: value for name, value in extraction.items() if value is not None}
    if not from_slides and (store is None or given):
        what = f"--{next(iter(given)).replace('_', '-')} without slides" if given else "neither --store nor slides"
        raise typer.BadParameter(f"got {what} → expected something to predict → name slides, or a store", param_hint="")
    names, labels = _split_columns(columns), _label_map(label_map)
    if format == "submission":
        record = model_records(run)[0]
        check_submission(record.class_names, value_names(record.task) if record.outputs else (), names, labels)
    path = out.with_suffix(".zarr") if store is None else store
    console = Console()
    arguments = (run, path, entry, None, device, None, attention is not None)
    with resumable():
        more = {"slides": slides or [], "extraction": given} if from_slides else {}
        predictions = _predict(console, predict_slides, arguments, more)
    reader = open_store(path)
    if format == "submission":
        predictions.write_submission(out, names, labels)
    else:
        predictions.write_csv(out)
    if attention is not None:
        predictions.write_attention(attention, reader)
    _say_predictions(console, predictions, reader, out)
    _say_abstained(console, predictions, format == "submission")
    if predictions.failed:
        raise typer.Exit(1)


def _predict(console: Console, call: Any, arguments: Sequence[Any], from_slides: dict[str, Any]) -> Any:
    """Call it, with progress where slides are embedded."""
    from mil.cli.console import ExtractionProgress

    if not from_slides:
        return call(*arguments)
    progress = ExtractionProgress(console)
    extraction = from_slides["extraction"] | {"progress": progress}
    try:
        return call(*arguments, slides=from_slides["slides"], extraction=extraction)
    finally:
        progress.end()


def _say_predictions(console: Console, predictions: Any, reader: Any, out: Path) -> None:
    from mil.bags.stored import is_synthetic
    from mil.cli.console import plain_reason

    print_banner(console, is_synthetic(reader, predictions.slide_ids))
    if not predictions.value_names:
        counts = ", ".join(f"{name} {predictions.predicted.count(name)}" for name in predictions.class_names)
    else:
        ends = zip(predictions.probabilities.min(axis=0), predictions.probabilities.max(axis=0), strict=True)
        ranges = zip(predictions.value_names, ends, strict=True)
        counts = ", ".join(f"{name} from {low:.4g} to {high:.4g}" for name, (low, high) in ranges)
    say(
        console,
        f"{counted(len(predictions.slide_ids), 'slide')} by the mean of "
        f"{counted(len(predictions.replicas), 'replica')}: {counts}; written to {out}",
    )
    if predictions.failed:
        rows = [[slide_id, plain_reason(slide_id, reason)] for slide_id, reason in predictions.failed]
        print_table(console, "slides that failed, and have no row", ["slide", "reason"], rows)


def _say_abstained(console: Console, predictions: Any, submission: bool) -> None:
    """Which slides a model abstains from, and what becomes of them in a file that has no place for that."""
    if predictions.abstain_below is None:
        return
    ids = predictions.abstained_ids
    which = f": {shortened(ids, 8)}" if ids else ""
    say(
        console,
        f"abstained from {counted(len(ids), 'slide')}, of confidence below {predictions.abstain_below:.3f}{which}",
    )
    if submission and ids:
        say(console, "A submission has a label for every slide, theirs too; --format table marks them.")


def evaluate(
    *,
    run: ModelOption,
    store: Annotated[Path, typer.Option("--store", help="The store of the external cohort.")],
    labels: Annotated[Path, typer.Option(help="Its label table (CSV).")],
    target: Annotated[
        str | None,
        typer.Option(
            help="Column of the truth, spelled as the model's classes; or those of its labels, numbers or survival, "
            "separated by commas.  [default: the model's own]",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the results; must be new or empty.")],
    entry: EntryOption = None,
    slide_column: Annotated[str | None, typer.Option(help="Column of slide ids.", show_default=False)] = None,
    patient_column: Annotated[str | None, typer.Option(help="Column of patient ids.", show_default=False)] = None,
    classes: Annotated[
        list[str] | None,
        typer.Option("--class", help="Keep slides of this class; may be repeated.  [default: all]", show_default=False),
    ] = None,
    overlap: Annotated[
        Literal["refuse", "drop", "mark"],
        typer.Option(help="Slides that were trained on, or whose patient was: drop leaves them out, mark keeps them."),
    ] = "refuse",
    distinct_patients: Annotated[
        bool, typer.Option("--distinct-patients", help="Ids that look like two spellings of a patient are two people.")
    ] = False,
    device: DeviceOption = "auto",
) -> None:
    """Score a model on an external labelled cohort, with intervals over patients.

    Example: `mil evaluate --run models/subtype --store b.zarr --labels b.csv --target subtype --out b_results`
    """
    from mil.deployment.external import evaluate_external
    from mil.files import check_new_folder

    check_new_folder(out)
    found = evaluate_external(
        run,
        store,
        labels,
        target,
        entry,
        device,
        slide_column=slide_column,
        patient_column=patient_column,
        classes=classes or None,
        overlap=overlap,
        distinct_patients=distinct_patients,
    ).save(out)
    console, metrics = Console(), found.metrics
    print_banner(console, metrics["synthetic"])
    if metrics["trained_on"]:
        say(console, "NOT AN EXTERNAL COHORT: " + metrics["warnings"][0], style="bold red")
    rows = [[reason, str(count), shortened(ids)] for reason, count, ids in metrics["attrition"] if count]
    print_table(console, "where the rows and slides went", ["rows and slides", "count", "which"], rows)
    title = f"{metrics['target']} by {metrics['model']}"
    if metrics["task"] == CLASSIFICATION:
        print_metrics(console, title, metrics["external"])
    else:
        print_target_metrics(console, title, metrics["task"], metrics["external"], "with all others")
    say_abstention(console, None if metrics["abstention"] is None else {"here": metrics["abstention"]})
    print_warnings(console, metrics["warnings"])
    looks = counted(metrics["looks"], "time")
    say(console, f"This cohort has been looked at {looks} in this folder of results; written to {out}")


def _check_file(out: Path) -> None:
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise typer.BadParameter(
            f"got {out} → expected a file in a folder that exists → correct it", param_hint="--out"
        )


def _split_columns(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _label_map(pairs: Sequence[str] | None) -> dict[str, str] | None:
    """Class → label from such as ``benign=0``; the last ``=`` divides, as names may hold one."""
    if not pairs:
        return None
    split = [pair.rpartition("=") for pair in pairs]
    wrong = [pair for pair, (name, _, label) in zip(pairs, split, strict=True) if not name or not label]
    names = [name for name, _, _ in split]
    if wrong or len(set(names)) < len(names):
        raise typer.BadParameter(
            f"got {', '.join(wrong or names)} → expected CLASS=LABEL, once for each class → write such as benign=0",
            param_hint="--label-map",
        )
    return {name: label for name, _, label in split}


def print_banner(console: Console, synthetic: bool) -> None:
    """Say of synthetic slides that they are."""
    if synthetic:
        console.print("SYNTHETIC DATA: these slides were drawn by a program.", style="bold", highlight=False)


def print_warnings(console: Console, warnings: Sequence[str]) -> None:
    """A yellow line each."""
    for warning in warnings:
        say(console, f"warning: {warning}", style="yellow")


def say_abstention(console: Console, parts: dict[str, Any] | None) -> None:
    """One line for every part of slides that a threshold was applied to."""
    for part in ("validation", "out_of_fold", "here"):
        each = (parts or {}).get(part)
        if each is None:
            continue
        thresholds = each.get("below_by_fold") or [each["below"]]
        below = " to ".join(f"{value:.3f}" for value in dict.fromkeys((min(thresholds), max(thresholds))))
        right = "–" if each["accuracy"] is None else f"{each['accuracy']:.3f}"
        say(
            console,
            f"abstaining below {below} ({part.replace('_', ' ')}): {each['n_answered']} of "
            f"{each['n_slides']} answered, {right} of these right (of all: {each['accuracy_of_all']:.3f})",
        )
    if parts is not None and parts.get("out_of_fold_missing"):
        say(console, f"no figures of abstention out of fold: {parts['out_of_fold_missing']}")
