"""Settings: what may be said, checked, composed and saved. Loads no torch.

Names are resolved on first use, so that importing one file of the room does not load the others.
"""

from extract.exports import lazy_exports

_HOME = {
    "AugmentConfig": "mil.config.sections",
    "HeadConfig": "mil.config.sections",
    "LossConfig": "mil.config.sections",
    "OptimizerConfig": "mil.config.sections",
    "SchedulerConfig": "mil.config.sections",
    "TrainConfig": "mil.config.train",
    "compose_config": "mil.config.compose",
    "parse_overrides": "mil.config.overrides",
}

__all__ = list(_HOME)
__getattr__ = lazy_exports(__name__, _HOME)
