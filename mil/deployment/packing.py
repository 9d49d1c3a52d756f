"""From a run to an artefact: calibrated on validation parts, with a threshold chosen there, scored out of fold once.

An ensemble is packed member by member, each calibrated by itself; what is chosen and scored is their average.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from extract.store import difference, fingerprint
from mil.cohort.targets import CLASSIFICATION, MULTI_LABEL
from mil.deployment.artefact import ENSEMBLE, MEMBERS, Artefact, seal, write_artefact
from mil.deployment.cohort_counts import count_classes, describe_targets
from mil.deployment.model import load_model
from mil.deployment.model_card import write_card
from mil.errors import RunError
from mil.evaluation.abstention_rule import Wish, choose_abstention
from mil.evaluation.alignment import join_runs
from mil.evaluation.headlines import brief_metrics
from mil.evaluation.paired import gain_over
from mil.evaluation.replica_predictions import ReplicaPredictions
from mil.evaluation.temperature import scale_temperatures
from mil.files import check_new_folder, read_json
from mil.runs.ensemble import read_ensemble
from mil.runs.folders import CARD, is_ensemble, refuse_artefact
from mil.runs.lineage import COHORT, read_lineage
from mil.runs.run_folder import RunFolder, read_predictions, read_values
from mil.splits.splits import PARTS
from mil.statistics.calibration import evaluate_calibration, evaluate_label_calibration
from mil.training.checkpoint import CheckpointRecord, package_versions

CALIBRATED = (CLASSIFICATION, MULTI_LABEL)
"""Tasks that give probabilities, which temperatures can make more honest."""


def pack(
    run_folder: str | Path,
    out: str | Path,
    *,
    abstain_below: float | None = None,
    coverage: float | None = None,
    accuracy: float | None = None,
    calibrate: bool = True,
) -> Artefact:
    """Pack a run or an ensemble into one folder that predicts elsewhere; see `mil.deployment.artefact` for what is in
    it.

    Temperatures are fitted on each replica's validation part, and a threshold is chosen on the mean of the replicas
    that validated a slide. Out-of-fold predictions are scored with temperatures, and with thresholds that each fold
    chooses in this way by its own validation parts; nothing is chosen by them. At most one of
    ``abstain_below``, ``coverage`` and ``accuracy`` is given; without any, the model never abstains.

    Of an ensemble, every member is packed so, and figures and threshold are those of the members' average. The last
    two wishes need members of the same folds: what validates in one is else tested in another.

    The labels of a replica share its temperature. Numbers and risks have none, and no target but classes is abstained
    from.

    Args:
        run_folder: written by ``mil train`` or ``mil ensemble``.
        out: folder to write; must be new or empty.
        abstain_below: the confidence below which the model abstains.
        coverage: or the share of validation slides that it must answer.
        accuracy: or the share of its answers on validation slides that must be right.
        calibrate: scale by temperatures.

    Raises:
        RunError: no run there, ``out`` is taken, an impossible threshold, more than one of them, or one where there are
            no classes; an ensemble whose members have changed since it was made, can read no common store, or had
            other folds where a threshold is to be chosen.
        CheckpointError: a damaged checkpoint.
        EvaluationError: a replica without validation slides, which leaves nothing to calibrate by.

    Example:
        >>> artefact = pack("runs/abmil", "models/subtype", coverage=0.9)      # doctest: +SKIP
        >>> artefact.abstain_below                                             # doctest: +SKIP
        0.61
    """
    folder, out = Path(run_folder), Path(out)
    wish = Wish(abstain_below, coverage, accuracy)
    check_new_folder(out)
    wish.check()
    refuse_artefact(folder)
    if wish != Wish():
        wish.check_task(RunFolder.open(folder).task)
    record, files = (_pack_ensemble if is_ensemble(folder) else _pack_single)(folder, wish, calibrate)
    return write_artefact(out, record, files | {CARD: write_card(record).encode()})


class _PackedRun(NamedTuple):
    """A run on its way into a model.

    Attributes:
        record: what ``model.json`` says of it, but for abstention.
        files: weights, their records and the training cohort, by path.
        predictions: of its replicas.
        calibrated: the same at their temperatures, if any.
    """

    record: dict[str, Any]
    files: dict[str, bytes]
    predictions: ReplicaPredictions
    calibrated: ReplicaPredictions


def _pack_single(folder: Path, wish: Wish, calibrate: bool) -> tuple[dict[str, Any], dict[str, bytes]]:
    packed = _pack_run(folder, calibrate)
    return packed.record | {"abstention": choose_abstention(packed.calibrated, wish)}, packed.files


def _pack_run(folder: Path, calibrate: bool) -> _PackedRun:
    model = load_model(folder)
    metrics = _read_metrics(folder)
    predictions = read_predictions(folder)
    calibrate = calibrate and predictions.cohort.task in CALIBRATED
    scaled = scale_temperatures(predictions) if calibrate else None
    calibrated = predictions if scaled is None else scaled.predictions
    by_name = dict.fromkeys(model.names, 1.0)
    if scaled is not None:
        by_name |= {each.name: value for each, value in zip(predictions.replicas, scaled.temperatures, strict=True)}
    lineage = read_lineage(folder)
    record = _record(model.record, metrics, predictions) | {
        "replicas": [
            {"name": each.replica, "fold": each.fold, "seed": each.seed, "temperature": by_name[each.replica]}
            | ({"task": dict(each.task)} if each.outputs else {})
            for each in model.records
        ],
        **_scores(predictions, calibrated, metrics, calibrate),
        "warnings": _anonymous([*metrics["warnings"], *(scaled.warnings if scaled else ())])
        + _unknown_starts(lineage.unknown),
    }
    files = _checkpoint_files(folder, model.names) | {COHORT: lineage.to_json()}
    return _PackedRun(record, files, predictions, calibrated)


def _pack_ensemble(folder: Path, wish: Wish, calibrate: bool) -> tuple[dict[str, Any], dict[str, bytes]]:
    paths, averaging = read_ensemble(folder)
    metrics = _read_metrics(folder)
    packed = [_pack_run(path, calibrate) for path in paths]
    _require_one_tiling([each.record for each in packed])
    predictions = join_runs([each.predictions for each in packed], averaging.average)
    calibrated = join_runs([each.calibrated for each in packed], averaging.average)
    _require_unchanged(folder, predictions)
    names = [f"{at}-{each.record['head']}" for at, each in enumerate(packed, start=1)]
    files = dict[str, bytes]()
    for name, each in zip(names, packed, strict=True):
        alone = each.record | {"abstention": None}
        content = seal(alone, each.files | {CARD: write_card(alone).encode()})
        files |= {f"{MEMBERS}/{name}/{path}": value for path, value in content.items()}
    record = _ensemble_record(names, packed, calibrated, metrics) | {
        **_scores(predictions, calibrated, metrics, calibrate and calibrated.cohort.task in CALIBRATED),
        "abstention": choose_abstention(calibrated, wish),
    }
    return record, files


def _ensemble_record(
    names: Sequence[str], packed: Sequence[_PackedRun], calibrated: ReplicaPredictions, metrics: Mapping[str, Any]
) -> dict[str, Any]:
    """What the ensemble itself says, scores aside."""
    first = packed[0].record
    replicas = [
        each | {"name": f"{name}/{each['name']}"}
        for name, part in zip(names, packed, strict=True)
        for each in part.record["replicas"]
    ]
    warnings = [*metrics["warnings"], *(text for part in packed for text in part.record["warnings"])]
    return {
        "kind": ENSEMBLE,
        "average": calibrated.average,
        **{key: first[key] for key in ("target", "task", "columns", "class_names")},
        "head": "an ensemble of " + ", ".join(part.record["head"] for part in packed),
        "members": _members(names, packed, calibrated),
        "replicas": replicas,
        "tile_recipe": first["tile_recipe"],
        "tile_fingerprint": first["tile_fingerprint"],
        "intended_scale": first["intended_scale"],
        "data": _data(calibrated),
        "synthetic": any(part.record["synthetic"] for part in packed),
        "looks": int(metrics["looks"]),
        "trained": metrics["created"],
        "packed": _now(),
        "packed_with": package_versions(),
        "warnings": _anonymous(warnings),
    }


def _members(
    names: Sequence[str], packed: Sequence[_PackedRun], calibrated: ReplicaPredictions
) -> list[dict[str, Any]]:
    """What the ensemble says of each member: recipe, weight, figures, and what the average gains over it."""
    together = calibrated.outcomes()
    found = []
    for name, part, member in zip(names, packed, calibrated.split(), strict=True):
        gain = gain_over(together, member.outcomes())
        copied = ("head", "head_keywords", "entry", "backbone", "feature_fingerprint", "tile_fingerprint", "trained")
        found.append(
            {"name": name, "weight": 1 / len(packed), "n_replicas": len(part.record["replicas"])}
            | {key: part.record[key] for key in copied}
            | {key: part.record["out_of_fold"][key] for key in brief_metrics(calibrated.cohort.task)}
            | gain
            | ({} if calibrated.cohort.kind.has_scale else {"scale": asdict(part.calibrated.scale())})
        )
    return found


def _require_one_tiling(records: Sequence[Mapping[str, Any]]) -> None:
    first = records[0]
    for record in records[1:]:
        differing = difference(first["tile_recipe"], record["tile_recipe"])
        if differing:
            raise RunError(
                f"got members of different tiles, which differ in {'; '.join(differing)} → expected one tile recipe, "
                f"as a store has one and every member must read it → pack the members one by one, or train them on "
                f"one store"
            )


def _require_unchanged(folder: Path, predictions: ReplicaPredictions) -> None:
    """Refuse members that were trained again after the ensemble was made."""
    cohort, values = predictions.tested()
    ids, then = read_values(folder / "oof.csv", cohort.prediction_names)
    now = dict(zip(cohort.slide_ids, values, strict=True))
    if set(now) != set(ids) or not np.allclose([now[slide_id] for slide_id in ids], then, rtol=1e-6, atol=1e-6):
        raise RunError(
            f"got the ensemble {folder}, whose members predict otherwise than when it was made → expected the same "
            f"runs → make it again with mil ensemble"
        )


def _scores(
    predictions: ReplicaPredictions, calibrated: ReplicaPredictions, metrics: Mapping[str, Any], calibrate: bool
) -> dict[str, Any]:
    """Calibration and out-of-fold metrics."""
    return {
        "calibration": _calibration(predictions, calibrated, calibrate),
        "out_of_fold": calibrated.outcomes().evaluate(),
        "out_of_fold_uncalibrated": metrics["out_of_fold"] if calibrate else None,
    }


def _calibration(
    predictions: ReplicaPredictions, calibrated: ReplicaPredictions, calibrate: bool
) -> dict[str, Any] | None:
    """How honest the out-of-fold probabilities are, before and after; of labels by label. None where there are none."""
    if calibrated.cohort.task not in CALIBRATED:
        return None

    def short(found: Mapping[str, Any]) -> dict[str, Any]:
        return {name: found[name] for name in ("brier", "nll", "ece", "ece_if_calibrated")}

    def measure(each: ReplicaPredictions) -> dict[str, Any]:
        cohort, values = each.tested()
        if cohort.has_classes:
            return short(evaluate_calibration(cohort.labels, values, cohort.patient_ids, cohort.class_names))
        labels = evaluate_label_calibration(
            np.asarray(cohort.values, dtype=np.float64), values, cohort.patient_ids, cohort.columns
        )
        return {column: short(found) for column, found in labels.items()}

    method = "temperature scaling, one per replica, fitted on its validation part" if calibrate else "none"
    return {
        "method": method,
        "out_of_fold": measure(calibrated),
        "uncalibrated": measure(predictions) if calibrate else None,
    }


def _record(record: CheckpointRecord, metrics: Mapping[str, Any], predictions: ReplicaPredictions) -> dict[str, Any]:
    """What the run itself says."""
    features, tiles = dict(record.feature_recipe), dict(record.tile_recipe)
    attrition = [[reason, count] for reason, count, _ in metrics["cohort"]["attrition"]]
    return {
        "kind": "run",
        "target": record.target,
        "task": predictions.cohort.task,
        "columns": list(predictions.cohort.columns),
        "class_names": list(record.class_names),
        "head": record.head,
        "head_keywords": dict(record.keywords),
        "in_dim": record.in_dim,
        "entry": record.entry,
        "feature_recipe": features,
        "feature_fingerprint": fingerprint(features),
        "tile_recipe": tiles,
        "tile_fingerprint": fingerprint(tiles),
        "intended_scale": {"mpp": tiles["mpp"], "tile_px": tiles["tile_px"]},
        "backbone": {"name": features["backbone"], "weights_sha256": features["weights_sha256"]},
        "data": _data(predictions) | {"attrition": attrition},
        "training": _without_paths(record.config),
        "synthetic": bool(metrics["synthetic"]),
        "looks": int(metrics["looks"]),
        "trained": metrics["created"],
        "packed": _now(),
        "trained_with": dict(record.versions),
        "packed_with": package_versions(),
    }


def _data(predictions: ReplicaPredictions) -> dict[str, Any]:
    """Counts of slides and patients."""
    cohort = predictions.cohort
    counts = {"classes": count_classes(cohort)} if cohort.has_classes else {"targets": describe_targets(cohort)}
    return {
        "n_slides": len(cohort),
        "n_patients": len(set(cohort.patient_ids)),
        **counts,
        "parts": {part: predictions.held(part) for part in PARTS},
    }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _read_metrics(folder: Path) -> dict[str, Any]:
    needed = ("out_of_fold", "warnings", "synthetic", "looks", "created")
    # an ensemble leaves the counts of its cohort to its members
    return RunFolder.open(folder, *needed, *(() if is_ensemble(folder) else ("cohort",))).metrics


def _checkpoint_files(folder: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    """Weights and records; paths of the machine that trained are left out of the records."""
    files = {}
    for name in names:
        path = folder / "checkpoints" / f"{name}.safetensors"
        plain = read_json(path.with_suffix(".json"))
        plain["config"] = _without_paths(plain["config"])
        files[f"checkpoints/{path.name}"] = path.read_bytes()
        files[f"checkpoints/{name}.json"] = json.dumps(plain, indent=2, ensure_ascii=False).encode()
    return files


def _anonymous(warnings: Sequence[str]) -> list[str]:
    """Warnings, each once, without the slides that one of a split names in brackets, and those that name paths."""
    kept = (text for text in warnings if not text.startswith("got init="))
    return list(dict.fromkeys(re.sub(r" \(['\"].*\)", "", text) for text in kept))


def _unknown_starts(unknown: Sequence[str]) -> list[str]:
    names = ", ".join(Path(each).name for each in unknown)
    return [
        f"The weights grew from {names}, of which nobody can tell any more whom it was trained on: figures on slides "
        f"that it has seen are too good"
    ] * bool(unknown)


def _without_paths(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without the paths of the machine that trained."""
    names = {key: Path(config[key]).name if config.get(key) else None for key in ("init", "split_file")}
    return {**config, "store": None, "labels": None, **names}
