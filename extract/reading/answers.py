"""Answers of a reading process: believed no further than their shape, and its errors as it describes them."""

from collections.abc import Mapping
from typing import Any

import extract.errors
from extract.errors import ExtractError, ReaderError, RecipeError, SlideError, SlideUnreadableError, TileDecodeError


def check_answer(values: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    """An answer in the shape that was asked for; nothing in it is believed further than that.

    Raises:
        ValueError: it has another shape.
    """
    if asked["do"] != "read":
        if "error" in values:
            return {"error": _description(values["error"])}
        return {"record": dict(values["record"])} if asked["do"] == "cut" else {"readable": int(values["readable"])}
    keys = {str(key) for key, _, _ in asked["runs"]}
    errors = dict.fromkeys(keys, values["error"]) if "error" in values else values["errors"]
    opened = values.get("opened", {})
    if not (set(errors) <= keys and set(opened) <= keys):
        raise ValueError("got an answer about other slides than those asked for")
    return {
        "errors": {key: _description(error) for key, error in errors.items()},
        "opened": {key: {name: str(told[name]) for name in ("reader", "note")} for key, told in opened.items()},
        "damage": {str(key): str(text)[:1000] for key, text in values.get("damage", {}).items() if key in keys},
        "cpu_s": float(values.get("cpu_s", 0.0)),
    }


def _description(error: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(error[name]) for name in ("kind", "message", "trace")}


def killed(slide_id: str, cause: str) -> dict[str, str]:
    """The error, as a reader would describe it, of a slide that ended its reader."""
    message = (
        f"got slide {slide_id!r} whose reading process {cause} → a damaged or hostile file, or a defect of the decoder "
        f"→ copy the file again, convert it, or try --reader openslide"
    )
    return {"kind": "SlideUnreadableError", "message": message, "trace": ""}


def rebuild_error(description: Mapping[str, str], slide_id: str) -> ExtractError:
    """The error that the reader described."""
    kind, message, trace = description["kind"], description["message"], description["trace"]
    known = getattr(extract.errors, kind, None)
    if isinstance(known, type) and issubclass(known, (SlideError, TileDecodeError, RecipeError)):
        return known(message)
    if kind == "MemoryError":
        return SlideUnreadableError(
            f"got slide {slide_id!r} that needs more memory than the reader may take → a damaged or hostile file, or "
            f"too small a limit → check the file, or raise --reader-memory"
        )
    if not trace:
        return SlideUnreadableError(f"got slide {slide_id!r} → {kind}: {message} → check the file and its folder")
    return ReaderError(f"unexpected {kind}: {message}", trace)
