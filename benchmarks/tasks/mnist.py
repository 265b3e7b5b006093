"""MNIST by rows: an LSTM reads an image from top to bottom and says which digit it is."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .. import BenchmarkError
from . import data, distributed, output, train
from .distributed import ALONE, Processes
from .task import Score, Task, add_forget_bias, count_steps, evaluate, shuffled

CLASSES = 10
TEST_BATCH = 1000
HEADS = ("last", "final")


@dataclass(frozen=True)
class Protocol:
    """What a model is trained with by default; `None` logs and tests once an epoch."""

    hidden: int
    batch: int
    epochs: int | None = None
    samples: int | None = None
    learning_rate: float = 1e-3  # Adam
    decay: bool = False  # of the rate, linearly to 0 over the run
    bidirectional: bool = False
    keep: float = 1.0  # of the LSTM's outputs, the others are dropped
    forget_bias: float = 0.0
    log_every: int | None = None
    test_every: int | None = None


PROTOCOLS = {
    # Five epochs are short: at a constant 1e-3 they end near 96.7%.
    "lstm": Protocol(hidden=64, batch=128, epochs=5, learning_rate=1e-2, decay=True),
    "lstm128": Protocol(
        hidden=128, batch=128, samples=100_000, forget_bias=1.0, log_every=10, test_every=50
    ),
    "blstm": Protocol(
        hidden=64,
        batch=256,
        samples=5_000_000,
        bidirectional=True,
        keep=0.9,
        log_every=10,
        test_every=50,
    ),
}


class RowReader(nn.Module):
    """Images ``[B, T, I]`` to logits ``[B, 10]``.

    Head "last" classifies the output at the last row, where the backward direction has read that
    row only; head "final" classifies the state of each direction after it has read all rows.
    """

    def __init__(self, lstm: type[nn.Module], rows: int, protocol: Protocol, head: str) -> None:
        super().__init__()
        self.lstm = lstm(
            rows, protocol.hidden, batch_first=True, bidirectional=protocol.bidirectional
        )
        add_forget_bias(self.lstm, protocol.forget_bias)
        self.dropout = nn.Dropout(1 - protocol.keep)
        self.classify = nn.Linear(protocol.hidden * (1 + protocol.bidirectional), CLASSES)
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        y, (h_n, _) = self.lstm(images)
        features = y[:, -1] if self.head == "last" else h_n.transpose(0, 1).flatten(1)
        logits: Tensor = self.classify(self.dropout(features))
        return logits


class Mnist(Task):
    """One of the `PROTOCOLS` on these digits."""

    def __init__(
        self,
        digits: data.Digits,
        model: str,
        protocol: Protocol,
        head: str = "last",
        seed: int = 0,
        processes: Processes = ALONE,
    ) -> None:
        processes.check(protocol.batch)
        rows, _, self.inputs = digits.train_images.shape
        self.name = f"mnist {model}"
        if protocol.bidirectional:
            self.name += f" ({head})"
        self.digits = digits
        self.protocol = protocol
        self.head = head
        self.seed = seed
        self.processes = processes
        self.batch_size = protocol.batch
        self.device = digits.train_images.device
        self.steps = count_steps(rows, protocol.batch, protocol.epochs, protocol.samples)
        epoch = rows // protocol.batch
        self.log_every = protocol.log_every or epoch
        self.test_every = protocol.test_every or epoch
        self.settings = {
            "model": model,
            **vars(protocol),
            "head": head,
            "optimizer": f"Adam {protocol.learning_rate}",
            "seed": seed,
            "data": digits.source,
        }

    def build(self, lstm: type[nn.Module]) -> nn.Module:
        return RowReader(lstm, self.inputs, self.protocol, self.head)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adam(model.parameters(), lr=self.protocol.learning_rate, fused=True)

    def schedule(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        if not self.protocol.decay:
            return super().schedule(optimizer)
        return torch.optim.lr_scheduler.LinearLR(
            optimizer, 1.0, end_factor=0.0, total_iters=self.steps
        )

    def batches(self) -> Iterator[Tensor]:
        rows = len(self.digits.train_images)
        return shuffled(rows, self.protocol.batch, self.seed, self.device)

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return self.digits.train_images[rows], self.digits.train_labels[rows]

    def test(self, model: nn.Module, *, last: bool) -> Score:
        images = self.processes.share(self.digits.test_images).split(TEST_BATCH)
        labels = self.processes.share(self.digits.test_labels).split(TEST_BATCH)
        return evaluate(model, zip(images, labels, strict=True), self.processes)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m benchmarks mnist``."""
    parser.add_argument(
        "--model",
        choices=PROTOCOLS,
        default="lstm",
        help="lstm: H=64, batch 128, Adam 1e-2 falling to 0, 5 epochs. lstm128: H=128, "
        "forget_bias=1, batch 128, Adam 1e-3, 100,000 samples. blstm: H=64 each way, batch 256, "
        "Adam 1e-3, output dropout keep 0.9, 5,000,000 samples; logs every 10 steps and tests "
        "every 50 (default: %(default)s)",
    )
    parser.add_argument(
        "--head",
        choices=(*HEADS, "both"),
        help="blstm only: classify the output at the last row, the final states of both "
        "directions, or train one model with each (default: last)",
    )
    parser.add_argument(
        "--hidden", type=int, metavar="H", help="hidden size (default: the model's)"
    )
    parser.add_argument("--batch", type=int, metavar="B", help="batch size (default: the model's)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=int, metavar="N", help="train for N epochs")
    length.add_argument(
        "--samples", type=int, metavar="N", help="train on N images (default: the model's length)"
    )
    data.add_arguments(parser)
    train.add_arguments(parser)
    distributed.add_arguments(parser)
    output.add_arguments(parser)


def main(args: argparse.Namespace) -> int:
    """Runs ``python -m benchmarks mnist``."""
    protocol = PROTOCOLS[args.model]
    changes = {"hidden": args.hidden, "batch": args.batch}
    protocol = replace(protocol, **{k: v for k, v in changes.items() if v is not None})
    if args.epochs is not None or args.samples is not None:
        protocol = replace(protocol, epochs=args.epochs, samples=args.samples)
    if args.head is not None and not protocol.bidirectional:
        raise BenchmarkError(
            f"--head {args.head} is for --model blstm: with one direction, the last output is the "
            "final state"
        )
    with distributed.processes(args) as processes:
        providers = train.prepare(args)
        digits = processes.once(lambda: data.load(args.data)).to(args.device)
        found = []
        for head in HEADS if args.head == "both" else (args.head or "last",):
            task = Mnist(digits, args.model, protocol, head, args.seed, processes)
            trainees = train.train(task, providers, tensorboard=args.tensorboard)
            found += [trainee.record() for trainee in trainees]
        if processes.leads:
            output.finish(found, json_file=args.json, plot_file=args.plot)
    return 0
