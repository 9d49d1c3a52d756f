"""Which backends there are, and opening a store whatever its backend."""

from extract.errors import StoreError
from extract.store.core.readable_store import Mode
from extract.store.core.recipes import TileRecipe
from extract.store.core.remote_path import RemotePath, StorePath, store_path
from extract.store.core.store import Store
from extract.store.formats.h5_store import H5Store
from extract.store.formats.remote_store import RemoteStore
from extract.store.formats.zarr_store import ZarrStore

BACKENDS: dict[str, type[Store]] = {"zarr": ZarrStore, "h5": H5Store}


def find_format(path: str | StorePath) -> str | None:
    """The backend of the store at ``path``, from what is in it; None when there is no store."""
    there = store_path(path)
    return next((name for name, backend in BACKENDS.items() if (there / backend.root_name).is_file()), None)


def find_backend(path: StorePath, format: str) -> type[Store]:
    """The class of a store at a path.

    Raises:
        StoreError: no store of this format lies at a URL.
    """
    if not isinstance(path, RemotePath):
        return BACKENDS[format]
    if format != "zarr":
        raise StoreError(
            f"got format {format!r} for {path} → only Zarr stores are read and written at a URL → leave --format out, "
            f"or choose a folder as --store"
        )
    return RemoteStore


def open_store(path: str | StorePath, mode: Mode = "r") -> Store:
    """Open a store, of whatever backend.

    Args:
        path: the folder that ``mil extract --store`` wrote, or a URL such as ``s3://bucket/cohort.zarr``.
        mode: ``r`` to read; ``r+`` to write too.

    Raises:
        StoreError: there is no store at ``path``.
        StoreUnreachableError: the service behind a URL does not answer.

    Example:
        >>> store = open_store("cohort.zarr")                      # doctest: +SKIP
        >>> store["site A/slide 1"].features("efficientnet_lite0").shape  # doctest: +SKIP
        (1205, 1280)
    """
    path = store_path(path)
    name = find_format(path)
    if name is None:
        raise _no_store(path)
    return find_backend(path, name)(path, mode)


def _no_store(path: StorePath) -> StoreError:
    """What there is instead of a store, and what to do about it."""
    if path.is_file():
        return StoreError(f"got {path} as store → it is a file → name the folder that mil extract --store wrote")
    roots = " or ".join(backend.root_name for backend in BACKENDS.values())
    if path.is_dir():
        return StoreError(
            f"got {path} as store → there is no {roots} in it → name the folder that mil extract --store wrote; "
            f"features of other tools are taken in with mil store import"
        )
    return StoreError(
        f"got {path} as store → there is nothing, no {roots} → check the path, or make a store with mil extract ... "
        f"--store {path}"
    )


def create_store(path: str | StorePath, recipe: TileRecipe, format: str | None = None) -> Store:
    """Open the store at ``path`` for writing, or make it.

    Args:
        path: the store's folder, or a URL.
        recipe: how its slides are cut.
        format: ``zarr`` or ``h5``; None for that of the store that is there, or ``zarr``.

    Raises:
        RecipeMismatchError: the store was cut by another recipe; the message names the fields.
        StoreError: the store is of another format, or the path is something else.
    """
    path = store_path(path)
    return find_backend(path, check_format(path, format)).create(path, recipe)


def check_format(path: str | StorePath, format: str | None) -> str:
    """The format that a store at ``path`` has or will have.

    Raises:
        StoreError: an unknown format, or another one than that of the store that is there.
    """
    if format is not None and format not in BACKENDS:
        raise StoreError(f"got format {format!r} → expected one of {sorted(BACKENDS)} → choose one of these")
    there = find_format(path)
    if there is not None and format not in (None, there):
        raise StoreError(
            f"got format {format!r} for store {path} → its format is {there!r} → leave --format out, choose another "
            f"--store, or convert it with mil store convert"
        )
    return there or format or "zarr"
