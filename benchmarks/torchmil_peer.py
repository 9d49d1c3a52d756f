"""torchmil 1.0.2 as a contestant: its ABMIL and its transformer, with its own collate function and padding.

    pip install torchmil==1.0.2

Its heads have one output, for two classes. The last layer is replaced by one of C outputs, trained with cross-entropy;
all else is as it comes: keyword defaults, except that the transformer's width may be lowered (``transf_att_dim``), and
said so where it is. Its own training loop looks at the loss and at a metric after every step and validates in training
mode; the loop here does neither, and looks at the head in evaluation mode, one whole bag at a time. The bags are in RAM
as float32 before the clock starts. All of this is in its favour.

Castro-Macías et al., torchmil (Apache-2.0), https://github.com/Franblueee/torchmil.
"""

from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from benchmarks.quality_curve import Task

Head = Literal["abmil", "transformer"]
MISSING = "torchmil is not installed, its rows are left out → pip install torchmil==1.0.2"


def is_installed() -> bool:
    """Whether torchmil can be imported."""
    return find_spec("torchmil") is not None


def create_head(head: Head, dim: int, n_classes: int, width: int | None = None) -> nn.Module:
    """Its head with C outputs.

    Args:
        head: which.
        dim: features per instance.
        n_classes: C.
        width: of the transformer; None is its default of 512.
    """
    from torchmil.models import ABMIL, TransformerABMIL

    if head == "abmil":
        model: Any = ABMIL(in_shape=(dim,))
        model.classifier = nn.Linear(dim, n_classes)
        return model
    model = TransformerABMIL(in_shape=(dim,), **({} if width is None else {"transf_att_dim": width}))
    model.last_layer = nn.Linear(dim, n_classes)
    return model


class TorchmilPeer:
    """A `Contestant`.

    Args:
        head: which of its heads.
        batch: slides per step, padded to the longest of them.
        width: of the transformer; None is its default.
    """

    def __init__(self, head: Head, batch: int, width: int | None = None) -> None:
        self.head, self.batch, self.width = head, batch, width

    def prepare(self, task: Task) -> None:
        """Bring all bags into memory as it takes them; off the clock."""
        self.items = [
            {"X": torch.from_numpy(bag).float(), "Y": torch.tensor(label)}
            for bag, label in zip(task.bags, task.labels.tolist(), strict=True)
        ]

    def start(self, task: Task, lr: float, seed: int) -> None:
        """Build the head and the loader."""
        from torchmil.data import collate_fn

        torch.manual_seed(seed)
        self.task = task
        self.model = create_head(self.head, task.dim, task.n_classes, self.width).to(task.device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=lr)
        training = [self.items[slide] for slide in task.training.tolist()]
        self.loader = DataLoader(training, batch_size=self.batch, shuffle=True, collate_fn=collate_fn)

    def train_epoch(self) -> None:
        """One pass over the training slides."""
        self.model.train()
        for batch in self.loader:
            batch = batch.to(self.task.device)
            loss = functional.cross_entropy(self.model(batch["X"], batch["mask"]), batch["Y"])
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()

    @torch.inference_mode()
    def logits(self) -> Tensor:
        """[validation, C]."""
        self.model.eval()
        bags = (self.items[slide]["X"][None] for slide in self.task.validation.tolist())
        return torch.cat([self.model(bag.to(self.task.device)).cpu() for bag in bags])
