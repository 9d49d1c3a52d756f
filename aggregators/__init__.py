"""MIL heads: exact on ragged bags, pure torch, no I/O.

A batch of bags is packed: instances [total, in_dim] and offsets int64 [bags + 1]. Build a head by name, call it:

    >>> import torch
    >>> from aggregators import create_aggregator
    >>> head = create_aggregator("abmil", in_dim=1024, n_classes=4).eval()
    >>> output = head(torch.randn(7, 1024), torch.tensor([0, 3, 7]))
    >>> output.logits.shape, output.attention.shape
    (torch.Size([2, 4]), torch.Size([7, 1]))
"""

from aggregators.abmil import ABMIL
from aggregators.base import Aggregator, BagOutput
from aggregators.errors import (
    AggregatorError,
    BagInputError,
    DuplicateAggregatorError,
    HeadConfigError,
    OfficialStateError,
    OffsetsError,
    RegistryError,
    UnknownAggregatorError,
    UnknownKeywordError,
)
from aggregators.pooling import MaxPool, MeanPool
from aggregators.registry import (
    AggregatorRecord,
    aggregator_record,
    create_aggregator,
    keyword_names,
    list_aggregators,
    register_aggregator,
)
from aggregators.transformer import TransformerAggregator

__all__ = [
    "ABMIL",
    "Aggregator",
    "AggregatorError",
    "AggregatorRecord",
    "BagInputError",
    "BagOutput",
    "DuplicateAggregatorError",
    "HeadConfigError",
    "MaxPool",
    "MeanPool",
    "OfficialStateError",
    "OffsetsError",
    "RegistryError",
    "TransformerAggregator",
    "UnknownAggregatorError",
    "UnknownKeywordError",
    "aggregator_record",
    "create_aggregator",
    "keyword_names",
    "list_aggregators",
    "register_aggregator",
]
