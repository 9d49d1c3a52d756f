"""The model card: what a packed model is, what it was worth, and what it is not for, as Markdown."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from mil.cohort.targets import CLASSIFICATION, MULTI_LABEL
from mil.deployment import target_card
from mil.deployment.target_card import NOUNS, both
from mil.evaluation.headlines import HEADLINES, brief_metrics, metric_name
from mil.evaluation.paired import gain_name

NOT_A_DEVICE = (
    "This is research software. It is **not a medical device**: it is neither approved nor validated for diagnosis, "
    "treatment or any decision about a patient."
)
SYNTHETIC = (
    "> **SYNTHETIC DATA.** The slides were drawn by a program. This model shows that the software works and says "
    "nothing about tumours."
)
_OTHER_KINDS = (
    "It knows the classes above and nothing else; a slide of any other kind is given one of them, perhaps with great "
    "confidence."
)
_AVERAGES = {
    "probabilities": "the mean probability",
    "logits": "the geometric mean of the probabilities, scaled to sum to one,",
}
_CALIBRATION = {"brier": "Brier score (0 to 2)", "nll": "negative log-likelihood", "ece": "calibration error (ECE)"}


def write_card(record: Mapping[str, Any]) -> str:
    """The text of ``README.md``.

    Args:
        record: the content of ``model.json``, with or without hashes.
    """
    together = "members" in record
    parts = [
        _opening(record),
        _data(record),
        _members(record) if together else _recipe(record),
        _metrics(record),
        _calibration(record),
        _abstention(record),
        _limits(record),
        _use(record),
    ]
    return "\n".join(line for part in parts for line in (*part, "")).rstrip() + "\n"


def _opening(record: Mapping[str, Any]) -> Iterator[str]:
    yield f"# {_plain(record['target'])} by {_plain(record['head'])}"
    yield ""
    if record["synthetic"]:
        yield SYNTHETIC
        yield ""
    task = _task(record)
    average = f"the mean {NOUNS.get(task, 'probability')} of {len(record['replicas'])} replicas"
    if "members" in record:
        average = _AVERAGES[record["average"]] if task == CLASSIFICATION else target_card.average_in_words(record)
        average = f"{average} of {len(record['members'])} members, each the mean of its replicas"
    yield f"{_predicted(record)}, from embeddings of its tissue tiles. The prediction is {average}."
    yield ""
    yield NOT_A_DEVICE


def _task(record: Mapping[str, Any]) -> str:
    """What was packed before there were other tasks is of classes."""
    return str(record.get("task", CLASSIFICATION))


def _predicted(record: Mapping[str, Any]) -> str:
    if _task(record) != CLASSIFICATION:
        return _plain(target_card.what_it_predicts(record))
    names = ", ".join(f"`{name}`" for name in record["class_names"])
    return f"Predicts **{_plain(record['target'])}** of a whole-slide image as one of {names}"


def _data(record: Mapping[str, Any]) -> Iterator[str]:
    data = record["data"]
    yield "## Data"
    yield ""
    parts = data["parts"]
    yield (
        f"Made of {data['n_slides']} slides of {data['n_patients']} patients: {parts['train']} slides trained some "
        f"replica, {parts['validation']} validated one, {parts['test']} tested one."
    )
    yield ""
    if _task(record) == CLASSIFICATION:
        rows = [(name, each["slides"], each["patients"]) for name, each in data["classes"].items()]
        yield from _table(("class", "slides", "patients"), rows)
    else:
        yield from _table(*target_card.data_table(data, _task(record)))
    yield ""
    if "attrition" not in data:
        yield "Where the rows of the label table and the slides of the store went is in the card of each member."
        return
    yield "Where the rows of the label table and the slides of the store went:"
    yield ""
    yield from _table(("rows and slides", "count"), [(reason, count) for reason, count in data["attrition"]])


def _recipe(record: Mapping[str, Any]) -> Iterator[str]:
    features, training = record["feature_recipe"], record["training"]
    rows = [
        ("tiles", _scale(record)),
        ("backbone", f"{features['backbone']} (revision {features['revision']}), pooling {features['pooling']}"),
        ("weights SHA-256", f"`{features['weights_sha256']}`"),
        ("features", f"{features['dim']} per tile, {features['dtype']}, entry `{record['entry']}`"),
        ("feature recipe", f"`{record['feature_fingerprint']}`"),
        ("tile recipe", f"`{record['tile_fingerprint']}`"),
        ("head", f"{record['head']} {_settings(record['head_keywords'])}"),
        ("optimizer", _settings(training["optimizer"])),
        ("epochs", f"at most {training['epochs']}, stopped after {training['patience']} without a better one"),
        ("folds and seeds", f"{training['folds']} folds, seeds {', '.join(map(str, training['seeds']))}"),
        ("trained", f"{record['trained']} with {_settings(record['trained_with'])}"),
        ("packed", f"{record['packed']} with {_settings(record['packed_with'])}"),
    ]
    yield "## Recipe"
    yield ""
    yield from _table(("what", "value"), rows)
    yield ""
    yield "Features of another backbone, other weights or another scale are refused."


def _scale(record: Mapping[str, Any]) -> str:
    scale = record["intended_scale"]
    mpp = "the slide's own scale" if scale["mpp"] is None else f"{scale['mpp']:g} µm per pixel"
    return f"{scale['tile_px']} px at {mpp}"


def _members(record: Mapping[str, Any]) -> Iterator[str]:
    """The members of an ensemble, in the place of a recipe."""
    yield "## Members"
    yield ""
    task = _task(record)
    names = brief_metrics(task)
    titles = [metric_name(task, name) for name in names]
    columns = ("member", "weight", "replicas", "head", "backbone", "features", *titles, f"gain in {titles[0]}")
    yield from _table(columns, (_member_row(member, names, member[gain_name(task)]) for member in record["members"]))
    yield ""
    yield (
        f"Figures are out of fold, of each member alone; the gain is that of the ensemble over it, on the same slides. "
        f"Weights are equal: none was fitted. If the members were picked by their test folds, the figures of the "
        f"ensemble are too good. All read tiles of {_scale(record)} (recipe `{record['tile_fingerprint']}`). The whole "
        f"recipe of each is in the card of its folder, `members/NAME/README.md`."
    )
    yield ""
    yield "Features of another backbone, other weights or another scale are refused, for each member."


def _member_row(member: Mapping[str, Any], names: Sequence[str], gain: Mapping[str, Any]) -> tuple[object, ...]:
    backbone = f"{member['backbone']['name']} {member['backbone']['weights_sha256'][:12]}"
    return (
        member["name"],
        f"{member['weight']:.3f}",
        member["n_replicas"],
        f"{member['head']} {_settings(member['head_keywords'])}",
        backbone,
        f"entry {member['entry']}, recipe {member['feature_fingerprint'][:12]}",
        *(both(member[name]) for name in names),
        both({"value": gain["difference"], **gain}),
    )


def _metrics(record: Mapping[str, Any]) -> Iterator[str]:
    found, before = record["out_of_fold"], record["out_of_fold_uncalibrated"]
    yield "## Metrics"
    yield ""
    yield (
        f"What was held out: every tested slide was predicted by the replicas that had neither it nor its patient in "
        f"training or validation. {found['n_slides']} slides of {found['n_patients']} patients; "
        f"{found['confidence']:.0%} intervals over resampled patients."
    )
    yield ""
    columns = ("metric", "value", "interval") + (("before calibration",) if before else ())
    rows = []
    for key in HEADLINES[_task(record)]:
        last = (_value(before[key]["value"]),) if before else ()
        title = metric_name(_task(record), key)
        rows.append((title, _value(found[key]["value"]), _interval(found[key]), *last))
    yield from _table(columns, rows)
    yield ""
    yield from _by_target(record)
    looks = record["looks"]
    times = "once" if looks == 1 else f"{looks} times"
    yield (
        f"The test folds of this cohort had been looked at {times} in the folder of this "
        f"{'ensemble when it was made' if 'members' in record else 'run when it was trained'}. "
        f"Whoever chose this model among several by these figures must expect less from it."
    )


def _by_target(record: Mapping[str, Any]) -> Iterator[str]:
    """The figures of every class, label or number; of survival whom they rest on."""
    found = record["out_of_fold"]
    if _task(record) == CLASSIFICATION:
        classes = [
            (name, each["support"], both(each["recall"]), both(each["precision"]), both(each["auroc"]))
            for name, each in found["classes"].items()
        ]
        yield from _table(("class", "slides", "recall", "precision", "AUROC against the others"), classes)
        yield ""
    elif (table := target_card.result_table(record)) is not None:
        yield from _table(*table)
        yield ""
    elif "n_events" in found:
        yield f"{found['n_events']} patients had the event. Patients are compared within the fold that tests them."
        yield ""


def _calibration(record: Mapping[str, Any]) -> Iterator[str]:
    found = record["calibration"]
    yield "## Calibration"
    yield ""
    if found is None:
        yield target_card.no_calibration(_task(record))
        return
    yield f"Method: {found['method']}. Out of fold, lower is better:"
    yield ""
    if _task(record) == MULTI_LABEL:
        yield from _table(*target_card.calibration_table(found))
    else:
        yield from _class_calibration(found)


def _class_calibration(found: Mapping[str, Any]) -> Iterator[str]:
    after, before = found["out_of_fold"], found["uncalibrated"]
    rows = []
    for key, title in _CALIBRATION.items():
        values = [each[key] if key == "ece" else each[key]["value"] for each in (after, before) if each is not None]
        rows.append((title, *map(_value, values)))
    columns = ("measure", "this model", "before calibration") if before is not None else ("measure", "this model")
    yield from _table(columns, rows)
    expected = after["ece_if_calibrated"]
    yield ""
    yield (
        f"Of so few slides, perfectly calibrated probabilities would show a calibration error of "
        f"{expected['mean']:.3f} on average, and up to {expected['high']:.3f} in 19 of 20 cases."
    )


def _abstention(record: Mapping[str, Any]) -> Iterator[str]:
    chosen = record["abstention"]
    yield "## Abstention"
    yield ""
    if chosen is None:
        yield "None: every slide gets an answer, however unsure."
        return
    yield f"Abstains where the highest probability is below **{chosen['below']:.3f}** ({chosen['chosen_by']})."
    yield ""
    rows = []
    for part, title in (("validation", "validation (chosen there)"), ("out_of_fold", "out of fold")):
        each = chosen[part]
        if each is not None:
            rows.append((title, each["n_slides"], _value(each["coverage"]), _value(each["accuracy"])))
    yield from _table(("slides", "n", "answered", "accuracy of the answered"), rows)
    if chosen["out_of_fold"] is None:
        yield ""
        yield f"There are no figures out of fold: {chosen['out_of_fold_missing']}."
    elif (thresholds := chosen["out_of_fold"].get("below_by_fold")) is not None:
        yield ""
        yield (
            f"The threshold above was chosen on slides that other folds test. So out of fold every fold has a "
            f"threshold of its own, chosen in the same way on its validation slides, none of whose patients it tests: "
            f"{min(thresholds):.3f} to {max(thresholds):.3f}."
        )


def _limits(record: Mapping[str, Any]) -> Iterator[str]:
    yield "## Limits"
    yield ""
    yield f"- {NOT_A_DEVICE}"
    yield (
        "- All figures come from cross-validation within one cohort. Other scanners, stains, sites and populations may "
        "give others: run `mil evaluate` on labelled slides of your own first."
    )
    yield "- " + (_OTHER_KINDS if _task(record) == CLASSIFICATION else target_card.own_limit(record))
    if "members" not in record:
        yield "- Attention shows what the head looked at. It is no proof of why."
    yield (
        "- The mean of all replicas predicts new slides, and the mean of fewer gave the figures above: expect new "
        "predictions to be a little less extreme."
    )
    for warning in record["warnings"]:
        yield f"- {_plain(warning)}"


def _use(record: Mapping[str, Any]) -> Iterator[str]:
    yield "## Use"
    yield ""
    yield "    mil predict --run THIS_FOLDER SLIDES... --out predictions.csv"
    # other targets have several columns, which are those of the model where none is named
    target = " --target COLUMN" if _task(record) == CLASSIFICATION else ""
    yield f"    mil evaluate --run THIS_FOLDER --store STORE --labels LABELS{target} --out FOLDER"
    yield ""
    where = "of each member holds" if "members" in record else "holds"
    yield (
        f"Every file is compared with its hash when the model is loaded. `training_cohort.json` {where} salted hashes "
        "of slide names and patient ids, so that an evaluation notices slides that were trained on; ids of a known "
        "form can be guessed from them."
    )


def _table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Iterator[str]:
    yield _row(columns)
    yield _row(["---"] * len(columns))
    yield from map(_row, rows)


def _row(cells: Sequence[object]) -> str:
    return "| " + " | ".join(_plain(cell) for cell in cells) + " |"


def _plain(cell: object) -> str:
    """Text that stays in its cell and is no markup of HTML."""
    return " ".join(str(cell).split()).replace("|", "\\|").replace("<", "&lt;")


def _settings(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items() if value is not None)


def _value(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _interval(entry: Mapping[str, float | None]) -> str:
    low, high = entry["low"], entry["high"]
    return "–" if low is None or high is None else f"{low:.3f} to {high:.3f}"
