"""Settings: what may be said, checked, composed and saved. Loads no torch.

Names are resolved on first use, so that importing one file of the room does not load the others.
"""

from extract.exports import lazy_exports

_HOME = {
    "TrainConfig": "mil.config.train",
    "compose_config": "mil.config.compose",
    "parse_overrides": "mil.config.overrides",
}

__all__ = list(_HOME)
__getattr__ = lazy_exports(__name__, _HOME)
