"""Self-contained HTML pages: one template environment, in which everything is escaped and nothing may be undefined."""

import base64
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mil.errors import MissingExtraError
from mil.visualization.plotting import printable

TEMPLATES = Path(__file__).parent / "templates"


def load_template(name: str, purpose: str, **filters: Callable[..., Any]) -> Any:
    """A page's template.

    Args:
        name: file below ``templates/``; what pages share is in ``_page.html`` and ``_parts.html``.
        purpose: what the page is, for the message when jinja2 is absent.
        **filters: of the page's own; ``printable`` and ``csp_hash`` are always there.

    Raises:
        MissingExtraError: jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        raise MissingExtraError(
            f'got no jinja2 → expected it for {purpose} → run pip install "tessera-mil[report]"'
        ) from error
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(printable=printable, csp_hash=csp_hash, **filters)
    return environment.get_template(name)


def csp_hash(script: str) -> str:
    """The hash by which a page's content security policy knows its one script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(str(script).encode()).digest()).decode()
