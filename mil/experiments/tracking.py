"""Telling other tools about a run: Weights & Biases, MLflow, TensorBoard. The plain files of the run come first.

A tracker is given the settings at the start, every epoch of every replica while it trains, and the metrics at the end.
Tables and report hold the ids of slides and patients, and settings the paths of a hospital's disks: these stay where
they are unless the configuration says ``track.files=all``. What the tools would gather by themselves (host name,
command line, what is printed, repository) they are told to leave.

None of it can change a result, and a tracker that fails is told once and then left alone: hours of training are not
lost to a server. Where it sends things is up to the tool's own settings (`WANDB_MODE=offline`, `MLFLOW_TRACKING_URI`).
"""

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from mil.config.train import TrainConfig
from mil.errors import ConfigError, MissingExtraError, did_you_mean, listed
from mil.evaluation.headlines import HEADLINES
from mil.training.replica import EpochRecord

TRACKERS = ("wandb", "mlflow", "tensorboard")


class Tracker(Protocol):
    """What a tool is told."""

    def log_epoch(self, replica: str, record: EpochRecord) -> None:
        """An epoch of a replica is over."""
        ...

    def log_metrics(self, metrics: Mapping[str, float]) -> None:
        """The run is over, and these are its figures."""
        ...

    def log_files(self, folder: Path) -> None:
        """The run folder is written, its report included; only called where files may leave."""
        ...

    def close(self, failed: bool = False) -> None:
        """Nothing more will come; ``failed`` where the training did not end well."""
        ...


class WandbTracker:
    """A run of Weights & Biases; curves are named ``<replica>/<quantity>`` over ``epoch``."""

    @staticmethod
    def place(name: str, folder: Path) -> str | None:
        """Where its latest run lies, and how one that was not sent is."""
        latest = (folder / "wandb" / "latest-run").resolve()
        if not latest.is_dir():
            return None
        offline = latest.name.startswith("offline-")
        return f"offline run in {latest}; wandb sync {latest} sends it" if offline else f"sent; its files in {latest}"

    def __init__(self, name: str, config: Mapping[str, Any], folder: Path) -> None:
        wandb = _import("wandb")
        # whatever it would find out about the machine, the command line and what is printed stays here
        settings = wandb.Settings(
            console="off",
            disable_code=True,
            disable_git=True,
            x_disable_meta=True,
            x_disable_machine_info=True,
            host="",
        )
        self._run = wandb.init(
            project="tessera", name=name, config=dict(config), dir=str(folder), reinit="create_new", settings=settings
        )
        self._run.define_metric("*", step_metric="epoch")
        self._artifact = wandb.Artifact

    def log_epoch(self, replica: str, record: EpochRecord) -> None:
        """One point of every curve."""
        self._run.log({"epoch": record.epoch} | {f"{replica}/{key}": value for key, value in _curves(record).items()})

    def log_metrics(self, metrics: Mapping[str, float]) -> None:
        """They stand in the summary."""
        self._run.summary.update(dict(metrics))

    def log_files(self, folder: Path) -> None:
        """Plain files and report as one artifact; the checkpoints stay where they are."""
        artifact = self._artifact(f"run-{self._run.id}", type="run")
        for file in _files(folder):
            artifact.add_file(str(file))
        self._run.log_artifact(artifact)

    def close(self, failed: bool = False) -> None:
        """Finish the run, as failed or as finished."""
        self._run.finish(exit_code=1 if failed else 0)


class MlflowTracker:
    """A run of MLflow in the experiment ``tessera``."""

    @staticmethod
    def place(name: str, folder: Path) -> str | None:
        """The server, or the files, that `MLFLOW_TRACKING_URI` names."""
        return f"run {name} of experiment tessera in {_import('mlflow').get_tracking_uri()}"

    def __init__(self, name: str, config: Mapping[str, Any], folder: Path) -> None:
        mlflow = _import("mlflow")
        self._client = mlflow.MlflowClient()
        experiment = self._client.get_experiment_by_name("tessera")
        number = experiment.experiment_id if experiment else self._client.create_experiment("tessera")
        self._id = self._client.create_run(number, run_name=name).info.run_id
        for key, value in _flat(config).items():
            # MLflow takes no longer ones
            self._client.log_param(self._id, key, str(value)[:500])

    def log_epoch(self, replica: str, record: EpochRecord) -> None:
        """One point of every curve."""
        for key, value in _curves(record).items():
            self._client.log_metric(self._id, f"{replica}/{key}", value, step=record.epoch)

    def log_metrics(self, metrics: Mapping[str, float]) -> None:
        """The final figures."""
        for key, value in metrics.items():
            self._client.log_metric(self._id, key, value)

    def log_files(self, folder: Path) -> None:
        """Plain files and report as artifacts."""
        for file in _files(folder):
            self._client.log_artifact(self._id, str(file))

    def close(self, failed: bool = False) -> None:
        """Mark the run as failed or as finished."""
        self._client.set_terminated(self._id, status="FAILED" if failed else "FINISHED")


class TensorboardTracker:
    """Event files in ``<run>.tensorboard`` beside the run folder."""

    @staticmethod
    def place(name: str, folder: Path) -> str | None:
        """The folder of the event files."""
        events = _events(name, folder)
        return f"event files in {events}; tensorboard --logdir {events} shows them" if events.is_dir() else None

    def __init__(self, name: str, config: Mapping[str, Any], folder: Path) -> None:
        _import("tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(_events(name, folder)))
        lines = "\n".join(f"    {key}: {value}" for key, value in _flat(config).items())
        self._writer.add_text("config", lines)

    def log_epoch(self, replica: str, record: EpochRecord) -> None:
        """One point of every curve."""
        for key, value in _curves(record).items():
            self._writer.add_scalar(f"{replica}/{key}", value, record.epoch)

    def log_metrics(self, metrics: Mapping[str, float]) -> None:
        """The final figures, as curves of one point."""
        for key, value in metrics.items():
            self._writer.add_scalar(key, value)

    def log_files(self, folder: Path) -> None:
        """It names the folder; event files hold no others."""
        self._writer.add_text("run", folder.name)

    def close(self, failed: bool = False) -> None:
        """Write what is left; event files know no end of a run, so that a failure is one more text."""
        if failed:
            self._writer.add_text("status", "failed")
        self._writer.close()


class Tracking:
    """All trackers of a run behind one face, so that training knows of none.

    Args:
        names: some of `TRACKERS`.
        name: of the run.
        config: the resolved configuration as plain values; with its paths only where ``files`` is ``all``.
        folder: where tools keep local files.
        files: ``none``, or ``all``: tables, report and paths are given too.

    Raises:
        ConfigError: an unknown tracker, or one that cannot start: nobody is logged in, or its server is away.
        MissingExtraError: its package is not installed.

    Example:
        >>> tracking = Tracking([], "abmil", {}, Path("runs"))
        >>> tracking.close()
    """

    def __init__(
        self,
        names: Sequence[str],
        name: str,
        config: Mapping[str, Any],
        folder: Path,
        files: Literal["none", "all"] = "none",
    ) -> None:
        unknown = [each for each in names if each not in _KINDS]
        if unknown:
            raise ConfigError(
                f"got track={list(names)} → expected some of {listed(TRACKERS)} → "
                f"{did_you_mean(unknown[0], TRACKERS)}write track=[wandb]"
            )
        if names:
            folder.mkdir(parents=True, exist_ok=True)
        self._sends_files = files == "all"
        settings = config if self._sends_files else without_paths(config)
        self._trackers: list[Tracker] = []
        for each in dict.fromkeys(names):
            try:
                self._trackers.append(_start(each, name, settings, folder))
            except BaseException:
                self.close(failed=True)
                raise

    def log_epoch(self, replica: str, record: EpochRecord) -> None:
        """An epoch of a replica is over."""
        self._tell("log_epoch", replica, record)

    def log_metrics(self, metrics: Mapping[str, Any]) -> None:
        """The content of ``metrics.json``: its out-of-fold summary is told."""
        found = metrics["out_of_fold"]
        values = {key: found[key]["value"] for key in HEADLINES[metrics["task"]]}
        self._tell("log_metrics", {f"out_of_fold/{key}": value for key, value in values.items() if value is not None})

    def log_files(self, folder: Path) -> None:
        """The run folder is written; its files leave only where that was asked for."""
        if self._sends_files:
            self._tell("log_files", folder)

    def close(self, failed: bool = False) -> None:
        """Nothing more will come; safe to call twice.

        Args:
            failed: whether the training ended with an error, which the tools then show.
        """
        self._tell("close", failed)
        self._trackers.clear()

    def _tell(self, what: str, *values: Any) -> None:
        for tracker in list(self._trackers):
            try:
                getattr(tracker, what)(*values)
            # whatever a foreign package raises must not end a training
            except Exception as error:  # noqa: BLE001
                self._trackers.remove(tracker)
                warnings.warn(f"{type(tracker).__name__} failed and is told no more: {error}", stacklevel=2)
                with suppress(Exception):
                    tracker.close()


_KINDS: dict[str, Any] = {"wandb": WandbTracker, "mlflow": MlflowTracker, "tensorboard": TensorboardTracker}


def without_paths(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as plain values, without those that name files.

    >>> without_paths({"store": "/mnt/hospital/c.zarr", "init": None, "epochs": 3})
    {'epochs': 3}
    """
    return {key: value for key, value in config.items() if key not in _PATHS}


def what_leaves(names: Sequence[str], files: Literal["none", "all"]) -> str:
    """A line that says what trackers will be given, to be read before they are."""
    where = ", ".join(_DESTINATIONS[each]() for each in dict.fromkeys(names))
    what = "curves, metrics and settings without paths; tables and report stay here (track.files=all gives them too)"
    if files == "all":
        what = "curves, metrics, settings with paths, tables and report, which hold slide ids, patient ids and labels"
    return f"told of this training: {where}; they are given {what}"


def tracker_places(names: Sequence[str], run_folder: Path) -> list[str]:
    """A line for each tracker of a run that says where it wrote; none for one that wrote nothing there."""
    found = {each: _KINDS[each].place(run_folder.name, run_folder.parent) for each in dict.fromkeys(names)}
    return [f"{each}: {place}" for each, place in found.items() if place is not None]


_PATHS = frozenset(item.name for item in fields(TrainConfig) if Path in (item.type, *get_args(item.type)))
_DESTINATIONS: dict[str, Callable[[], str]] = {
    "wandb": lambda: f"wandb ({os.environ.get('WANDB_MODE') or 'online'})",
    "mlflow": lambda: f"mlflow ({_import('mlflow').get_tracking_uri()})",
    "tensorboard": lambda: "tensorboard (files beside the run)",
}
_REMEDIES = {
    "wandb": "run wandb login, set WANDB_MODE=offline to send the run later, or leave wandb out of track",
    "mlflow": "check MLFLOW_TRACKING_URI and its server, unset it to write beside the work, or leave mlflow out of "
    "track",
    "tensorboard": "check that the folder can be written, or leave tensorboard out of track",
}


def _start(kind: str, name: str, config: Mapping[str, Any], folder: Path) -> Tracker:
    try:
        tracker: Tracker = _KINDS[kind](name, config, folder)
    except (ConfigError, MissingExtraError):
        raise
    # whatever a foreign package raises: it has not started, and the training has not either
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        raise ConfigError(
            f"got track={kind}, which cannot start ({type(error).__name__}: {lines[0]}) → expected it to take a run → "
            f"{_REMEDIES[kind]}"
        ) from error
    return tracker


def _events(name: str, folder: Path) -> Path:
    return folder / f"{name}.tensorboard"


def _import(package: str) -> Any:
    from importlib import import_module

    try:
        return import_module(package)
    except ImportError as error:
        raise MissingExtraError(
            f"got track={package} without the package → expected it to be installed → run pip install "
            f'"tessera-mil[{package}]"'
        ) from error


def _curves(record: EpochRecord) -> dict[str, float]:
    names = ("lr", "train_loss", "validation_loss", "validation_score")
    return {name: float(getattr(record, name)) for name in names}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _files(folder: Path) -> list[Path]:
    """The tables and the report; no weights, no slides."""
    return sorted(path for path in folder.iterdir() if path.suffix in (".csv", ".json", ".yaml", ".html"))
