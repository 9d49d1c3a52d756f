"""Reads published state dicts: checks that every parameter is there, and that none is left over."""

from collections.abc import Iterable, Mapping

from torch import Tensor

from aggregators.errors import OfficialStateError


def official_tensors(
    state: Mapping[str, Tensor], expected: Iterable[str], source: str, ignored_prefixes: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    """Returns the parameters of a published state dict under their official names.

    Args:
        state: the published state dict.
        expected: the names that the head needs, all of them.
        source: the published code's name, for the error message.
        ignored_prefixes: names that start like this belong to a part that is not a head.

    Raises:
        OfficialStateError: a name is missing or left over.

    Example:
        >>> import torch
        >>> sorted(official_tensors({"w": torch.zeros(1), "cnn.0": torch.zeros(1)}, ["w"], "Paper", ("cnn.",)))
        ['w']
    """
    found = {name: value for name, value in state.items() if not name.startswith(ignored_prefixes)}
    names = set(expected)
    missing, surplus = sorted(names - found.keys()), sorted(found.keys() - names)
    if missing or surplus:
        raise OfficialStateError(
            f"got a state dict with {missing or 'nothing'} missing and {surplus or 'nothing'} left over → expected "
            f"the parameters of {source}: {', '.join(sorted(names))} → pass the model's own state_dict, unrenamed"
        )
    return found
