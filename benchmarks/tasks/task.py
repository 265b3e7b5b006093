"""What a training task is, and the small parts that all tasks share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import BenchmarkError
from .distributed import ALONE, Processes


@dataclass(frozen=True)
class Score:
    """Over a set of rows: mean cross-entropy, share of right answers, rows without a mistake."""

    loss: float
    accuracy: float
    exact: int
    rows: int


class Task(ABC):
    """A training task: its model, its data and its protocol."""

    name: str
    settings: dict[str, Any]  # what it takes to run the task again, for the record
    device: torch.device
    seed: int
    batch_size: int  # rows, over all processes
    steps: int
    log_every: int  # steps between two points of the curve
    test_every: int  # steps between two tests, a multiple of log_every
    stop_when_exact: bool = False
    processes: Processes = ALONE  # which share every batch, and the test set

    @abstractmethod
    def build(self, lstm: type[nn.Module]) -> nn.Module:
        """A new model around that LSTM class."""

    @abstractmethod
    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """A new optimizer for the model."""

    def schedule(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        """The learning rate from step to step; constant unless a task says otherwise."""
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)

    @abstractmethod
    def batches(self) -> Iterator[Tensor]:
        """The rows of the training set in each batch, without end, every time the same."""

    @abstractmethod
    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs ``[B, ...]`` and targets ``[B]`` or ``[B, outputs]`` of these training rows."""

    @abstractmethod
    def test(self, model: nn.Module, *, last: bool) -> Score:
        """Scores the model on the test set; a part of it may do unless this is the `last` test."""


@torch.inference_mode()
def evaluate(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], processes: Processes = ALONE
) -> Score:
    """Scores the model, in evaluation mode, over batches of inputs and targets.

    If there are several processes, each has a part of the batches, and the score is that of all.
    """
    model.eval()
    loss = 0.0
    answers = correct = exact = rows = 0
    for inputs, targets in batches:
        logits = model(inputs)
        hits = right(logits, targets).view(len(targets), -1)
        loss += cross_entropy(logits, targets).item() * hits.numel()
        answers += hits.numel()
        correct += int(hits.sum())
        exact += int(hits.all(1).sum())
        rows += len(hits)
    loss, *counts = processes.sum((loss, answers, correct, exact, rows))
    answers, correct, exact, rows = map(int, counts)
    return Score(loss / answers, correct / answers, exact, rows)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of logits ``[..., classes]`` against int64 targets ``[...]``."""
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


def right(logits: Tensor, targets: Tensor) -> Tensor:
    """bool ``[...]``: where the largest of the logits ``[..., classes]`` is that of the target."""
    return logits.argmax(-1) == targets


def add_forget_bias(lstm: nn.Module, value: float) -> None:
    """Adds `value` to the forget gate's bias (the sum of its two biases) in every layer."""
    with torch.no_grad():
        for name, bias in lstm.named_parameters():
            if name.startswith("bias_ih"):
                bias.chunk(4)[1].add_(value)  # gates i, f, g, o


def count_steps(rows: int, batch: int, epochs: int | None, samples: int | None) -> int:
    """Training steps in full batches over so many samples, or else so many epochs.

    Raises `BenchmarkError` when there is not one full batch.
    """
    if not 1 <= batch <= rows:
        raise BenchmarkError(
            f"the batch must have 1 to {rows:,} rows (the training set), not {batch}"
        )
    if samples is None:
        samples = (epochs or 0) * (rows - rows % batch)
    if samples < batch:
        raise BenchmarkError(f"--epochs or --samples must cover one batch of {batch} at least")
    return samples // batch


def shuffled(rows: int, batch: int, seed: int, device: torch.device) -> Iterator[Tensor]:
    """Full batches of row numbers, a new permutation for every epoch, without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(rows, generator=generator).to(device)
        yield from order[: rows - rows % batch].split(batch)
