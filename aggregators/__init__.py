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
from aggregators.acmil import ACMIL
from aggregators.additive import AdditiveMIL
from aggregators.base import Aggregator, BagOutput
from aggregators.chowder import Chowder
from aggregators.clam import ClamMB, ClamSB
from aggregators.draws import BagDraws, DrawSource, bag_generator
from aggregators.dsmil import DSMIL
from aggregators.dtfd import DTFD
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
from aggregators.ilra import ILRA
from aggregators.instance_max import InstanceMax
from aggregators.lse import LogSumExp
from aggregators.noisy_or import NoisyOr
from aggregators.pooling import MaxPool, MeanPool
from aggregators.registry import (
    AggregatorRecord,
    aggregator_record,
    create_aggregator,
    keyword_names,
    list_aggregators,
    register_aggregator,
)
from aggregators.topk import TopK
from aggregators.transformer import TransformerAggregator
from aggregators.transmil import TransMIL

__all__ = [
    "ABMIL",
    "ACMIL",
    "DSMIL",
    "DTFD",
    "ILRA",
    "AdditiveMIL",
    "Aggregator",
    "AggregatorError",
    "AggregatorRecord",
    "BagDraws",
    "BagInputError",
    "BagOutput",
    "Chowder",
    "ClamMB",
    "ClamSB",
    "DrawSource",
    "DuplicateAggregatorError",
    "HeadConfigError",
    "InstanceMax",
    "LogSumExp",
    "MaxPool",
    "MeanPool",
    "NoisyOr",
    "OfficialStateError",
    "OffsetsError",
    "RegistryError",
    "TopK",
    "TransMIL",
    "TransformerAggregator",
    "UnknownAggregatorError",
    "UnknownKeywordError",
    "aggregator_record",
    "bag_generator",
    "create_aggregator",
    "keyword_names",
    "list_aggregators",
    "register_aggregator",
]
