"""A classifier written for torch.nn.LSTM with pack_padded_sequence, moved over in one line.

The model below knows nothing of fastlstm. It is trained a little, and then
``fastlstm.accelerate(model)`` replaces its LSTM in place. The parameters are the same objects, so
the optimizer that was made before goes on, with all that it remembers, and so do checkpoints.

Prints what was replaced, how far the outputs before and after are from each other (rounding, at
most), the milliseconds of a training step before and after, and the accuracy at the end.

    python -m benchmarks.examples.packed_classifier --steps 150
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from time import perf_counter

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import fastlstm

SYMBOLS = 6
LONGEST = 30


class Classifier(nn.Module):
    """Symbols [B, T] and lengths [B] to logits of the classes, [B, 6]: a model as many have it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(SYMBOLS, 16)
        self.lstm = nn.LSTM(16, 64, batch_first=True, bidirectional=True)
        self.head = nn.Linear(128, SYMBOLS)

    def forward(self, symbols: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(
            self.embedding(symbols), lengths, batch_first=True, enforce_sorted=False
        )
        _, (h_n, _) = self.lstm(packed)
        return self.head(h_n.transpose(0, 1).flatten(1))


def draw(sequences: int) -> tuple[Tensor, Tensor, Tensor]:
    """Symbols [B, T], lengths [B] and classes [B]; a class is the most frequent symbol."""
    lengths = torch.randint(5, LONGEST + 1, (sequences,))
    favourites = torch.randint(SYMBOLS, (sequences, 1))
    symbols = torch.randint(SYMBOLS, (sequences, LONGEST))
    symbols = torch.where(torch.rand(symbols.shape) < 0.3, favourites, symbols)
    real = torch.arange(LONGEST) < lengths[:, None]
    counts = (nn.functional.one_hot(symbols, SYMBOLS) * real[..., None]).sum(1)
    return symbols, lengths, counts.argmax(1)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, size: int) -> float:
    """Trains for so many steps; returns the median milliseconds of a step."""
    model.train()
    seconds = []
    for _ in range(steps):
        symbols, lengths, classes = draw(size)
        start = perf_counter()
        loss = nn.functional.cross_entropy(model(symbols, lengths), classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seconds.append(perf_counter() - start)
    return 1000 * torch.tensor(seconds).median().item()


@torch.no_grad()
def test(model: nn.Module, data: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, float]:
    """The logits, and the share of right classes."""
    model.eval()
    symbols, lengths, classes = data
    logits = model(symbols, lengths)
    return logits, (logits.argmax(1) == classes).float().mean().item()


def main(argv: Sequence[str] | None = None) -> tuple[float, float, float]:
    """Trains before and after; returns the difference, and the accuracy before and at the end."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150, help="before, and after (default: 150)")
    parser.add_argument("--batch", type=int, default=64, help="sequences (default: 64)")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    unseen = draw(2000)
    model = Classifier()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    milliseconds = train(model, optimizer, args.steps, args.batch)
    before, accuracy = test(model, unseen)
    print(f"nn.LSTM:  {milliseconds:6.2f} ms a step, accuracy {accuracy:.1%}")

    fastlstm.accelerate(model, verbose=True)  # the line that moves it over

    after, _ = test(model, unseen)
    difference = (after - before).abs().max().item()
    print(f"the outputs before and after differ by {difference:.1e} at most")
    milliseconds = train(model, optimizer, args.steps, args.batch)
    _, final = test(model, unseen)
    print(f"fastlstm: {milliseconds:6.2f} ms a step, accuracy {final:.1%}")
    print(f"chance: {1 / SYMBOLS:.1%}")
    return difference, accuracy, final


if __name__ == "__main__":
    main()
