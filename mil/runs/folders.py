"""Folders for results: refused before the hours of work where they are taken or cannot be written. Loads no torch."""

from pathlib import Path

from mil.config.compose import read_config_file
from mil.errors import ConfigError, RunError
from mil.files import require_writable

_FINISHED, _CONFIG = "metrics.json", "config.yaml"


def check_run_folder(folder: Path, overwrite: bool = False) -> None:
    """Refuse a folder for a run that is taken or cannot be written.

    Raises:
        RunError: ``folder`` is a file, holds anything while ``overwrite`` is False, or its parent takes no files.
    """
    _refuse_file(folder, "run folder")
    if _names(folder) and not overwrite:
        raise RunError(
            f"got {folder} as run folder → it exists and is not empty → give another folder with --out, or add "
            f"--overwrite to replace it"
        )
    # the folder itself is written beside it, and renamed
    require_writable(folder.parent, f"run folder {folder}")


def check_board_folder(folder: Path) -> None:
    """Refuse a folder for a board that holds anything but one, which is gone on with.

    Raises:
        RunError: ``folder`` is a file, holds something else, or cannot be written.
    """
    _refuse_file(folder, "folder of a board")
    names = _names(folder)
    if names and _CONFIG not in names:
        raise RunError(
            f"got {folder} as folder of a board → it holds something else → give a new folder with --out, or that of a "
            f"board, which is gone on with"
        )
    if _FINISHED in names:
        raise RunError(f"got {folder} as folder of a board → it holds a run of mil train → give another with --out")
    require_writable(folder, f"folder of a board {folder}")


def check_sweep_folder(folder: Path) -> None:
    """Refuse a folder for a sweep that holds anything but an unfinished one, which is gone on with.

    Raises:
        RunError: ``folder`` is a file, holds a finished sweep or something else, or cannot be written.
    """
    _refuse_file(folder, "folder of a sweep")
    names = _names(folder)
    if _FINISHED in names:
        raise RunError(
            f"got {folder} as folder of a sweep → it holds finished results → give a new folder with --out: another "
            f"search on these slides is another look at their test folds"
        )
    if names and not _is_sweep(folder / _CONFIG):
        raise RunError(
            f"got {folder} as folder of a sweep → it holds something else → give a new folder with --out, or that of "
            f"a sweep that was stopped, which is gone on with"
        )
    require_writable(folder, f"folder of a sweep {folder}")


def _refuse_file(folder: Path, what: str) -> None:
    if folder.exists() and not folder.is_dir():
        raise RunError(f"got {folder} as {what} → it is a file → give another folder with --out")


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def _is_sweep(path: Path) -> bool:
    try:
        return "sweep" in read_config_file(path)
    except ConfigError:
        return False


MODEL = "model.json"
CARD = "README.md"


def is_artefact(folder: Path) -> bool:
    """Whether a folder holds a packed model."""
    return (folder / MODEL).is_file()


def refuse_artefact(folder: Path, wanted: str = "the --out folder of a finished mil train") -> None:
    """Refuse a packed model where a run is needed: it has lost the predictions of its slides.

    Args:
        folder: what was given.
        wanted: what is needed instead.

    Raises:
        RunError: it is a packed model.
    """
    if is_artefact(folder):
        raise RunError(
            f"got {folder}, a model that mil pack wrote, without the predictions of its run → expected {wanted} → give "
            f"the run that it was packed from; its own figures are in {folder / CARD}"
        )


ENSEMBLE = "ensemble.json"


def is_ensemble(folder: Path) -> bool:
    """Whether a folder was written by `Ensemble.save`."""
    return (folder / ENSEMBLE).is_file()
