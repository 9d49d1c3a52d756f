"""From a run to an artefact: calibrated on validation parts, with a threshold chosen there, scored out of fold once."""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from extract.store import fingerprint
from mil import statistics
from mil.abstention import choose_confidence
from mil.artefact import CARD, Artefact, check_new_folder, write_artefact
from mil.calibration import evaluate_calibration
from mil.checkpoint import CheckpointRecord, package_versions
from mil.ensemble import is_ensemble
from mil.errors import RunError
from mil.model import load_model
from mil.model_card import write_card
from mil.run import ReplicaPredictions
from mil.saved_run import read_predictions
from mil.splits import PARTS
from mil.temperature import scale_temperatures
from mil.training_cohort import COHORT, read_training_cohort

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


def pack(
    run_folder: str | Path,
    out: str | Path,
    *,
    abstain_below: float | None = None,
    coverage: float | None = None,
    accuracy: float | None = None,
    calibrate: bool = True,
) -> Artefact:
    """Pack a run into one folder that predicts elsewhere; see `mil.artefact` for what is in it.

    Temperatures are fitted on each replica's validation part, and a threshold is chosen on the mean of the replicas
    that validated a slide. Out-of-fold predictions are scored with temperatures, and with thresholds that each fold
    chooses in this way by its own validation parts; nothing is chosen by them. At most one of
    ``abstain_below``, ``coverage`` and ``accuracy`` is given; without any, the model never abstains.

    Args:
        run_folder: written by ``mil train``.
        out: folder to write; must be new or empty.
        abstain_below: the confidence below which the model abstains.
        coverage: or the share of validation slides that it must answer.
        accuracy: or the share of its answers on validation slides that must be right.
        calibrate: scale by temperatures.

    Raises:
        RunError: no run there, ``out`` is taken, an impossible threshold, or more than one of them.
        CheckpointError: a damaged checkpoint.
        EvaluationError: a replica without validation slides, which leaves nothing to calibrate by.

    Example:
        >>> artefact = pack("runs/abmil", "models/subtype", coverage=0.9)      # doctest: +SKIP
        >>> artefact.abstain_below                                             # doctest: +SKIP
        0.61
    """
    folder, out = Path(run_folder), Path(out)
    check_new_folder(out)
    _check_choice(abstain_below, coverage, accuracy)
    if is_ensemble(folder):
        raise RunError(
            f"got the ensemble {folder} to pack → expected a run → pack its members one by one, or predict with "
            f"mil predict --run {folder}"
        )
    model = load_model(folder)
    metrics = _read_metrics(folder)
    said = read_predictions(folder)
    scaled = scale_temperatures(said) if calibrate else None
    used = said if scaled is None else scaled.predictions
    by_name = dict.fromkeys(model.names, 1.0)
    if scaled is not None:
        by_name |= {each.name: value for each, value in zip(said.replicas, scaled.temperatures, strict=True)}
    record = _record(model.record, metrics, said) | {
        "replicas": [
            {"name": each.replica, "fold": each.fold, "seed": each.seed, "temperature": by_name[each.replica]}
            for each in model.records
        ],
        "calibration": _calibration(said, used, calibrate),
        "abstention": _abstention(used, abstain_below, coverage, accuracy),
        "out_of_fold": statistics.evaluate(*_tested(used)),
        "out_of_fold_uncalibrated": metrics["out_of_fold"] if calibrate else None,
    }
    record["warnings"] = list(
        dict.fromkeys(map(_without_ids, [*metrics["warnings"], *(scaled.warnings if scaled else ())]))
    )
    files = _checkpoint_files(folder, model.names)
    files |= {COHORT: read_training_cohort(folder).to_json(), CARD: write_card(record).encode()}
    return write_artefact(out, record, files)


def abstention_of(
    labels: IntArray, probabilities: FloatArray, below: float | FloatArray | None
) -> dict[str, Any] | None:
    """What abstaining below a confidence does to slides: shares answered and right; None without a threshold.

    Args:
        labels: [n].
        probabilities: [n, C].
        below: the threshold, or one for each slide [n].

    Returns:
        `below` (None where slides differ in it), `n_slides`, `n_answered`, `coverage`, `accuracy` of the answered (None
        if there are none) and `accuracy_of_all`.
    """
    if below is None:
        return None
    right = probabilities.argmax(axis=1) == labels
    answered = probabilities.max(axis=1) >= below
    return {
        "below": None if isinstance(below, np.ndarray) else below,
        "n_slides": len(labels),
        "n_answered": int(answered.sum()),
        "coverage": float(answered.mean()),
        "accuracy": float(right[answered].mean()) if answered.any() else None,
        "accuracy_of_all": float(right.mean()),
    }


def choose_coverage(probabilities: FloatArray, coverage: float) -> float:
    """The highest confidence that at least this share of slides [n, C] reaches.

    >>> choose_coverage(np.array([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7], [0.5, 0.5]]), 0.75)
    0.6
    """
    ranked = np.sort(probabilities.max(axis=1))[::-1]
    # 0.9 of 10 is 9, whatever floats make of it
    needed = math.ceil(round(coverage * len(ranked), 9))
    return float(ranked[max(needed, 1) - 1])


def _check_choice(abstain_below: float | None, coverage: float | None, accuracy: float | None) -> None:
    given = {"abstain_below": abstain_below, "coverage": coverage, "accuracy": accuracy}
    chosen = {name: value for name, value in given.items() if value is not None}
    if len(chosen) > 1:
        raise RunError(f"got {' and '.join(chosen)} → they say the same thing → give one")
    for name, value in chosen.items():
        if not 0 < value <= 1:
            raise RunError(f"got {name}={value} → expected a share above 0 and at most 1 → give 0.9, for example")


def _abstention(
    used: ReplicaPredictions, abstain_below: float | None, coverage: float | None, accuracy: float | None
) -> dict[str, Any] | None:
    """The threshold, how it was chosen, and what it does on validation and out of fold."""
    if abstain_below is None and coverage is None and accuracy is None:
        return None
    rows, values = _mean_over(used, "validation")
    labels = used.cohort.labels[rows]
    below, by, missing = abstain_below, "given", None
    if abstain_below is not None:
        tested, scores, *_ = _tested(used)
        out_of_fold = abstention_of(tested, scores, below)
    else:
        below = _choose(labels, values, coverage, accuracy)
        by = (
            f"coverage {coverage:g} of validation slides" if coverage else f"accuracy {accuracy:g} on validation slides"
        )
        out_of_fold, missing = _abstention_by_fold(used, coverage, accuracy)
    if below is None:
        raise RunError(
            f"got accuracy={accuracy:g} → no confidence reaches it on the {len(labels)} validation slides → ask for "
            f"less"
        )
    return {
        "below": below,
        "chosen_by": by,
        "validation": abstention_of(labels, values, below),
        "out_of_fold": out_of_fold,
        "out_of_fold_missing": missing,
    }


def _choose(
    labels: IntArray, probabilities: FloatArray, coverage: float | None, accuracy: float | None
) -> float | None:
    """The threshold that slides ask for; None where no confidence reaches the accuracy."""
    if coverage is not None:
        return choose_coverage(probabilities, coverage)
    return None if accuracy is None else choose_confidence(labels, probabilities, accuracy)


def _abstention_by_fold(
    used: ReplicaPredictions, coverage: float | None, accuracy: float | None
) -> tuple[dict[str, Any] | None, str | None]:
    """What thresholds chosen in the same way do out of fold, each by the validation parts of one fold alone.

    All folds together validate on the slides that they test, so that the one threshold of the model cannot be judged
    on them. A fold's own validation parts hold no patient that it tests. A slide that several folds test meets the
    mean of their thresholds, as it meets the mean of their probabilities.

    Returns:
        The figures, or None where a fold can choose no threshold, and why.
    """
    folds = np.array([replica.fold for replica in used.replicas])
    tests, chosen = [], []
    for fold in np.unique(folds):
        own = _replicas_of(used, folds == fold)
        rows, values = _mean_over(own, "validation")
        below = _choose(used.cohort.labels[rows], values, coverage, accuracy)
        if below is None:
            return (
                None,
                f"no confidence reaches accuracy {accuracy:g} on the {len(rows)} validation slides of fold {fold}",
            )
        tests.append((own.parts == "test").any(axis=0))
        chosen.append(below)
    held = np.array(tests, dtype=np.float64)  # [folds, n]
    tested = held.any(axis=0)
    labels, scores, *_ = _tested(used)
    cuts = np.array(chosen) @ held[:, tested] / held[:, tested].sum(axis=0)
    return (abstention_of(labels, scores, cuts) or {}) | {"below_by_fold": chosen}, None


def _replicas_of(said: ReplicaPredictions, chosen: npt.NDArray[np.bool_]) -> ReplicaPredictions:
    """Some of the replicas, chosen by bool [R]."""
    replicas = tuple(said.replicas[at] for at in np.flatnonzero(chosen))
    return ReplicaPredictions(said.cohort, replicas, said.parts[chosen], said.probabilities[chosen])


def _mean_over(said: ReplicaPredictions, part: str) -> tuple[IntArray, FloatArray]:
    """The slides that some replica had in a part, as rows of the cohort, and their mean probabilities."""
    held = (said.parts == part).astype(np.float64)  # [R, n]
    rows = np.flatnonzero(held.sum(axis=0))
    if not len(rows):
        raise RunError(
            f"got a run without {part} slides → expected some to choose a threshold by → give --abstain-below instead"
        )
    weights = held[:, rows] / held[:, rows].sum(axis=0)
    return rows, np.einsum("rn,rnc->nc", weights, said.probabilities[:, rows])


def _tested(said: ReplicaPredictions) -> tuple[IntArray, FloatArray, list[str], tuple[str, ...]]:
    """Labels, out-of-fold probabilities, patients and class names, as scoring wants them."""
    rows, values = _mean_over(said, "test")
    return said.cohort.labels[rows], values, [said.cohort.patient_ids[row] for row in rows], said.cohort.class_names


def _calibration(said: ReplicaPredictions, used: ReplicaPredictions, calibrate: bool) -> dict[str, Any]:
    """How honest the out-of-fold probabilities are, before and after."""

    def measure(each: ReplicaPredictions) -> dict[str, Any]:
        found = evaluate_calibration(*_tested(each))
        return {name: found[name] for name in ("brier", "nll", "ece", "ece_if_calibrated")}

    method = "temperature scaling, one per replica, fitted on its validation part" if calibrate else "none"
    return {"method": method, "out_of_fold": measure(used), "uncalibrated": measure(said) if calibrate else None}


def _record(record: CheckpointRecord, metrics: Mapping[str, Any], said: ReplicaPredictions) -> dict[str, Any]:
    """What the run itself says."""
    cohort, features, tiles = said.cohort, dict(record.feature_recipe), dict(record.tile_recipe)
    return {
        "target": record.target,
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
        "data": {
            "n_slides": len(cohort),
            "n_patients": len(set(cohort.patient_ids)),
            "classes": _class_counts(said),
            "parts": {part: int((said.parts == part).any(axis=0).sum()) for part in PARTS},
            "attrition": [[reason, count] for reason, count, _ in metrics["cohort"]["attrition"]],
        },
        "training": _without_paths(record.config),
        "synthetic": bool(metrics["synthetic"]),
        "looks": int(metrics["looks"]),
        "trained": metrics["created"],
        "packed": datetime.now(UTC).isoformat(timespec="seconds"),
        "trained_with": dict(record.versions),
        "packed_with": package_versions(),
    }


def _class_counts(said: ReplicaPredictions) -> dict[str, dict[str, int]]:
    """Slides and patients of every class."""
    cohort = said.cohort
    slides = Counter(cohort.labels.tolist())
    patients = Counter(label for _, label in set(zip(cohort.patient_ids, cohort.labels.tolist(), strict=True)))
    return {name: {"slides": slides[at], "patients": patients[at]} for at, name in enumerate(cohort.class_names)}


def _read_metrics(folder: Path) -> dict[str, Any]:
    try:
        metrics: dict[str, Any] = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        missing = [
            name
            for name in ("out_of_fold", "warnings", "cohort", "synthetic", "looks", "created")
            if name not in metrics
        ]
    except (OSError, ValueError) as error:
        raise RunError(f"got {folder / 'metrics.json'}, which cannot be read ({error}) → bring it back") from error
    if missing:
        raise RunError(
            f"got {folder / 'metrics.json'} without {', '.join(missing)} → expected what mil train writes → train again"
        )
    return metrics


def _checkpoint_files(folder: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    """Weights and records; paths of the machine that trained are left out of the records."""
    files = {}
    for name in names:
        path = folder / "checkpoints" / f"{name}.safetensors"
        plain = json.loads(path.with_suffix(".json").read_bytes())
        plain["config"] = _without_paths(plain["config"])
        files[f"checkpoints/{path.name}"] = path.read_bytes()
        files[f"checkpoints/{name}.json"] = json.dumps(plain, indent=2, ensure_ascii=False).encode()
    return files


def _without_ids(warning: str) -> str:
    """A warning of a split without the slides that it names in brackets."""
    return re.sub(r" \(['\"].*\)", "", warning)


def _without_paths(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without the paths of the machine that trained."""
    names = {key: Path(config[key]).name if config.get(key) else None for key in ("init", "split_file")}
    return {**config, "store": None, "labels": None, **names}
