"""Slide ids and the file names that stand for them."""

from hashlib import sha256
from urllib.parse import quote, unquote

from extract.errors import StoreError

_SAFE_NAME_BYTES = 200


def encode_id(slide_id: str) -> str:
    """The file name of a slide id: percent-encoded, never empty, hidden, reserved, or longer than file systems allow.

    An id whose encoding is longer than 200 bytes keeps its beginning and gets a digest; its record holds the whole id.
    """
    name = quote(slide_id, safe="", errors="surrogateescape").replace("~", "%7E")
    if name.startswith((".", "_")) or name == "zarr.json":
        name = f"%{ord(name[0]):02X}{name[1:]}"
    if not name:
        raise StoreError("got an empty slide id → a slide needs a name → give one in the slide table")
    if len(name) > _SAFE_NAME_BYTES:
        name = f"{name[: _SAFE_NAME_BYTES - 40]}~{sha256(slide_id.encode(errors='surrogateescape')).hexdigest()[:32]}"
    return name


def decode_id(name: str) -> str | None:
    """The slide id of a file name, or None when only the unit's record has it."""
    return None if "~" in name else unquote(name, errors="surrogateescape")
