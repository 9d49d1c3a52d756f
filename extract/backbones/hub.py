"""The model hub: what is in its cache, what can be downloaded, and a clear word within seconds where neither is.

Nothing here touches the network at import. ``HF_HOME``, ``HF_TOKEN``, ``HF_ENDPOINT`` and ``HF_HUB_OFFLINE`` hold.
"""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from extract.backbones.presets import Preset
from extract.errors import BackboneError

_PROBE_S = 3.0
_CONFIGS = ("config.json", "preprocessor_config.json")


def find_cached(preset: Preset) -> Path | None:
    """The preset's weights in the cache, or None. No network."""
    from huggingface_hub import try_to_load_from_cache

    for file in preset.files:
        found = try_to_load_from_cache(_cached_id(preset.hub_id), file, revision=preset.revision)
        if isinstance(found, str):
            return Path(found)
    return None


def fetch(preset: Preset) -> Path:
    """The preset's weights, from the cache or else downloaded into it.

    Raises:
        BackboneError: they are neither there nor to be had; says why and what to do.
    """
    return find_cached(preset) or download(preset)


def download(preset: Preset) -> Path:
    """Download the preset's weights and small configs into the cache; what is there already is not downloaded again.

    Raises:
        BackboneError: there is no network, the licence is not accepted, or the file is not there.
    """
    from huggingface_hub import errors, hf_hub_download

    if offline():
        raise absent(preset, "HF_HUB_OFFLINE is set")
    if not reachable():
        raise absent(preset, "the hub is out of reach")
    found = None
    try:
        for file in preset.files:
            try:
                found = Path(hf_hub_download(preset.hub_id, file, revision=preset.revision))
                break
            except errors.LocalEntryNotFoundError:
                raise
            except errors.EntryNotFoundError:
                continue
    except (errors.GatedRepoError, errors.RepositoryNotFoundError) as error:
        # without a token the hub answers for a gated repository as for one that is not there
        raise absent(preset, f"the hub refuses access ({type(error).__name__})") from error
    except (errors.HfHubHTTPError, OSError, ValueError) as error:
        raise absent(preset, f"{type(error).__name__}: {str(error).splitlines()[0][:200]}") from error
    if found is None:
        raise absent(preset, f"the hub has none of {list(preset.files)} at revision {preset.revision}")
    _download_configs(preset)
    return found


def _download_configs(preset: Preset) -> None:
    """The small files that state the model's own normalisation, where it has them."""
    from huggingface_hub import errors, hf_hub_download

    for file in _CONFIGS:
        try:
            hf_hub_download(preset.hub_id, file, revision=preset.revision)
        except (errors.HfHubHTTPError, errors.EntryNotFoundError, OSError):
            # only a check of the normalisation goes without
            continue


def absent(preset: Preset, reason: str) -> BackboneError:
    """The error for weights that cannot be had, with every way to get them."""
    others = cached_revisions(preset)
    if others:
        reason += f"; the cache has the revisions {others}, not {preset.revision}"
    steps = []
    if preset.gated:
        steps.append(f"accept the licence at {page(preset)} and log in (HF_TOKEN)")
    steps.append(
        f"run mil models pull {preset.name} where there is a network and take its cache along (HF_HOME), "
        f"or pass --weights FILE"
    )
    return BackboneError(
        f"got no weights for backbone {preset.name!r} ({reason}) → expected {' or '.join(preset.files)} of "
        f"{preset.hub_id} → {'; '.join(steps)}"
    )


def page(preset: Preset) -> str:
    """Address of the model's page, with its licence."""
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{preset.hub_id}"


def cached_revisions(preset: Preset) -> list[str]:
    """Commits of the preset's repository that the cache has."""
    folder = _cache() / _folder(_cached_id(preset.hub_id)) / "snapshots"
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def offline() -> bool:
    """Whether ``HF_HUB_OFFLINE`` was set when the hub's client was loaded."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def reachable(timeout_s: float = _PROBE_S) -> bool:
    """Whether the hub, or the proxy on the way to it, takes a connection within ``timeout_s``.

    The hub's client itself tries for 20 s and more where there is no network.
    """
    from huggingface_hub import constants

    address = urlsplit(constants.ENDPOINT)
    proxies = getproxies()
    proxy = proxies.get(address.scheme) or proxies.get("all")
    if proxy:
        address = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    host, port = address.hostname or "", address.port or (443 if address.scheme == "https" else 80)
    connected = threading.Event()

    def connect() -> None:
        try:
            socket.create_connection((host, port), timeout_s).close()
        except OSError:
            return
        connected.set()

    # a name server that does not answer blocks for longer than any timeout of the socket: hence the thread
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(timeout_s)
    return connected.is_set()


@contextmanager
def offline_if_unreachable() -> Iterator[None]:
    """Switch the hub's client to offline, so that it answers from the cache at once, while the hub is out of reach."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not reachable()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _folder(hub_id: str) -> str:
    return "models--" + hub_id.replace("/", "--")


def _cached_id(hub_id: str) -> str:
    """The id in the spelling that the cache has: the hub takes either case, and others write ``MahmoodLab/uni``."""
    folder, cache = _folder(hub_id), _cache()
    if (cache / folder).is_dir() or not cache.is_dir():
        return hub_id
    same = [path.name for path in cache.iterdir() if path.name.lower() == folder.lower()]
    return same[0].removeprefix("models--").replace("--", "/", 1) if same else hub_id
