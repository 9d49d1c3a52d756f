"""What a training can be refused for before torch is loaded: a person who mistyped a path waits for one second."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from extract.store import open_store
from extract.store.core.remote_path import RemotePath, store_path
from mil.cohort.cohort import Cohort
from mil.cohort.reading import read_cohort
from mil.cohort.table import read_table
from mil.cohort.targets import CLASSIFICATION, TASKS
from mil.config.checks import check_option
from mil.config.compose import check_given, read_config_file
from mil.config.overrides import take_overrides
from mil.config.train import TrainConfig
from mil.errors import ConfigError

_INPUTS = ("store", "stores", "labels", "target", "task", "slide_column", "patient_column", "distinct_patients")
_OF_A_BOARD = ("heads", "backbones", "stores")


def missing_inputs(values: Mapping[str, Any], what: str) -> ConfigError:
    """The error that names which of store, labels and target are not given for ``what``."""
    missing = [name for name in ("store", "labels", "target") if not values.get(name)]
    return ConfigError(
        f"got no {' and no '.join(missing)} → {what} needs store, labels and target → give "
        f"{' '.join(f'--{name}' for name in missing)}, or name them in the config file"
    )


def check_inputs(what: str, overrides: Sequence[str], file: Path | None, given: Mapping[str, Any]) -> None:
    """Open what will be opened again later: the label table and the stores, as far as they are named.

    Stores behind a URL are left to later, as asking takes longer there.

    Args:
        what: what they are for, such as ``a training``.
        overrides: as in `mil.config.compose.compose_config`.
        file: likewise.
        given: values of flags by name; they go before the others.

    Raises:
        ConfigError: ``file`` or an override cannot be read, or store, labels or target is not given.
        CohortError: the table is missing, or not one of labels.
        StoreError: there is no store.
    """
    named, _ = take_overrides(overrides, _INPUTS)
    values = {**(read_config_file(file) if file is not None else {}), **named, **given}
    stores = values.get("stores") or values.get("store")
    values["store"] = stores
    if not (stores and values.get("labels") and values.get("target")):
        raise missing_inputs(values, what)
    _check_labels(Path(str(values["labels"])).expanduser(), values)
    for each in stores if isinstance(stores, list) else [stores]:
        path = store_path(str(each))
        if not isinstance(path, RemotePath):
            open_store(path.expanduser())


def read_labels(config: TrainConfig) -> Cohort:
    """The cohort of the label table and the columns that a configuration names.

    Raises:
        ConfigError: it names no table or no target.
        CohortError: as in `mil.cohort.reading.read_cohort`.
    """
    if config.labels is None or config.target is None:
        raise missing_inputs(config.to_dict(), "reading labels")
    return read_cohort(
        config.labels,
        config.target,
        config.slide_column,
        config.patient_column,
        task=config.task,
        distinct_patients=config.distinct_patients,
    )


def check_board_names(overrides: Sequence[str], file: Path | None) -> None:
    """Refuse settings and heads of a benchmark that do not exist.

    Raises:
        ConfigError: near matches are named.
    """
    named, others = take_overrides(overrides, _OF_A_BOARD)
    written = read_config_file(file) if file is not None else {}
    check_given({key: value for key, value in written.items() if key not in _OF_A_BOARD}, others)
    heads = named.get("heads", written.get("heads"))
    for each in heads if isinstance(heads, list) else []:
        head = dict(each) if isinstance(each, Mapping) else {"name": each}
        if "name" in head:
            check_option("head", str(head.pop("name")), head)


def _check_labels(path: Path, values: Mapping[str, Any]) -> None:
    target, slides, patients = (values.get(name) for name in ("target", "slide_column", "patient_column"))
    plain = isinstance(target, str) and all(each is None or isinstance(each, str) for each in (slides, patients))
    task = str(values.get("task", CLASSIFICATION))
    if plain and task in TASKS:
        distinct = values.get("distinct_patients") is True
        read_cohort(path, str(target), slides, patients, task=task, distinct_patients=distinct)
    else:
        # what these columns mean is told where the whole configuration is known
        read_table(path)
