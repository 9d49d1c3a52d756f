"""What can go wrong in the heads: one base, and one leaf per kind of mistake.

AggregatorError
├── RegistryError
│   ├── UnknownAggregatorError   (LookupError)
│   ├── UnknownKeywordError      (TypeError)
│   └── DuplicateAggregatorError (ValueError)
├── HeadConfigError              (ValueError)
├── BagInputError                (ValueError)
│   └── OffsetsError
└── OfficialStateError           (ValueError)
"""


class AggregatorError(Exception):
    """Base of every error that the heads raise on purpose."""


class RegistryError(AggregatorError):
    """A head was asked for, or registered, in a way the registry cannot serve."""


class UnknownAggregatorError(RegistryError, LookupError):
    """No head is registered under this name."""


class UnknownKeywordError(RegistryError, TypeError):
    """The head has no such constructor keyword."""


class DuplicateAggregatorError(RegistryError, ValueError):
    """Two heads claim one name."""


class HeadConfigError(AggregatorError, ValueError):
    """A constructor keyword has a value outside its range."""


class BagInputError(AggregatorError, ValueError):
    """Instances, coordinates or scores do not have the shape or type of a packed batch."""


class OffsetsError(BagInputError):
    """Offsets do not cut the instances into bags of at least one instance."""


class OfficialStateError(AggregatorError, ValueError):
    """A published state dict lacks parameters that the head needs, or holds others."""


def require(condition: bool, message: str) -> None:
    """Raises HeadConfigError with `message` (got → expected → do this) unless the condition holds."""
    if not condition:
        raise HeadConfigError(message)
