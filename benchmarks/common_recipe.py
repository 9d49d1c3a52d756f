"""The recipe that most published heads are trained with, written anew.

Gated attention with a projection to 512, one slide per step, Adam with a constant 2e-4 and weight decay 1e-5, and every
slide read from its own HDF5 file each time it is its turn. The files are laid out as the usual tools write them: a
resizable dataset in chunks of one row.

Lu et al., Data-efficient and weakly supervised computational pathology on whole-slide images, Nature BME 2021, whose
small network has these widths. It trains up to 200 epochs with a patience of 20; here the epochs are bounded.
"""

from collections.abc import Sequence
from pathlib import Path

import h5py
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from benchmarks.quality_curve import Task

LR = 2e-4
WEIGHT_DECAY = 1e-5
EMBED_DIM, ATTENTION_DIM, DROPOUT = 512, 256, 0.25


class GatedABMIL(nn.Module):
    """One bag [n, dim] → logits [1, C]."""

    def __init__(self, dim: int, n_classes: int) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(dim, EMBED_DIM), nn.ReLU(), nn.Dropout(DROPOUT))
        self.tanh = nn.Sequential(nn.Linear(EMBED_DIM, ATTENTION_DIM), nn.Tanh(), nn.Dropout(DROPOUT))
        self.gate = nn.Sequential(nn.Linear(EMBED_DIM, ATTENTION_DIM), nn.Sigmoid(), nn.Dropout(DROPOUT))
        self.score = nn.Linear(ATTENTION_DIM, 1)
        self.classifier = nn.Linear(EMBED_DIM, n_classes)

    def forward(self, instances: Tensor) -> Tensor:
        """Logits [classes] of a bag [n, dim]."""
        embedded = self.embed(instances)  # [n, 512]
        attention = self.score(self.tanh(embedded) * self.gate(embedded)).softmax(dim=0)  # [n, 1]
        logits: Tensor = self.classifier(attention.mT @ embedded)
        return logits


class _SlideFiles(Dataset[tuple[Tensor, int]]):
    """One HDF5 file per slide, opened and read anew for every item."""

    def __init__(self, paths: Sequence[Path], labels: Sequence[int]) -> None:
        self.paths, self.labels = paths, labels

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        with h5py.File(self.paths[index]) as file:
            return torch.from_numpy(file["features"][:]).float(), self.labels[index]


def write_slides(task: Task, folder: Path) -> list[Path]:
    """Write every bag to its own file, in chunks of one row; returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{index}.h5" for index in range(len(task.bags))]
    for path, bag in zip(paths, task.bags, strict=True):
        with h5py.File(path, "w") as file:
            file.create_dataset("features", data=bag, chunks=(1, bag.shape[1]), maxshape=(None, bag.shape[1]))
    return paths


class CommonRecipe:
    """A `Contestant`; reads slides from the files that `write_slides` made.

    Args:
        paths: one per slide of the task.
        fused: one kernel for a step of Adam, which gives the same figures and is not what the recipe comes with: for
            comparisons of quality alone.
    """

    def __init__(self, paths: Sequence[Path], fused: bool = False) -> None:
        self.paths, self.fused = paths, fused

    def start(self, task: Task, lr: float, seed: int) -> None:
        """Build the head and the loader."""
        torch.manual_seed(seed)
        self.task = task
        self.model = GatedABMIL(task.dim, task.n_classes).to(task.device)
        parameters = self.model.parameters()
        self.optimizer = torch.optim.Adam(parameters, lr=lr, weight_decay=WEIGHT_DECAY, fused=self.fused)
        slides = task.training.tolist()
        files = _SlideFiles([self.paths[slide] for slide in slides], task.labels[slides].tolist())
        # no worker processes: they would take the cores that train
        self.loader = DataLoader(files, batch_size=1, shuffle=True, collate_fn=lambda items: items[0])

    def train_epoch(self) -> None:
        """One step per slide."""
        self.model.train()
        for instances, label in self.loader:
            logits = self.model(instances.to(self.task.device))
            loss = functional.cross_entropy(logits, torch.tensor([label], device=self.task.device))
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()

    @torch.inference_mode()
    def logits(self) -> Tensor:
        """[validation, C]; read from memory, as it is not timed."""
        self.model.eval()
        bags = (torch.from_numpy(self.task.bags[slide]).float() for slide in self.task.validation.tolist())
        return torch.cat([self.model(bag.to(self.task.device)).cpu() for bag in bags])
