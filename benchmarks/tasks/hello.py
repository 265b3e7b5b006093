"""A short tutorial: first steps with an LSTM, and one that learns to say "ihello"."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastlstm

from .. import BenchmarkError
from . import train

ALPHABET = "hielo"
INPUT, TARGET = "hihell", "ihello"
HIDDEN = 5
STEPS = 50
LEARNING_RATE = 0.1  # Adam


def one_hot(text: str) -> Tensor:
    """One sequence of letters as float32 ``[1, T, 5]``."""
    return F.one_hot(indices(text), len(ALPHABET)).float()


def indices(text: str) -> Tensor:
    """One sequence of letters as int64 ``[1, T]``."""
    return torch.tensor([[ALPHABET.index(letter) for letter in text]])


class Speaker(nn.Module):
    """Letters ``[B, T, 5]`` to logits of the letter that follows each, ``[B, T, 5]``."""

    def __init__(self, lstm: type[nn.Module]) -> None:
        super().__init__()
        self.lstm = lstm(len(ALPHABET), HIDDEN, batch_first=True)
        self.project = nn.Linear(HIDDEN, len(ALPHABET))

    def forward(self, letters: Tensor) -> Tensor:
        y, _ = self.lstm(letters)
        logits: Tensor = self.project(y)
        return logits


def learn(provider: str, *, steps: int = STEPS, seed: int = 0, device: str = "cpu") -> list[str]:
    """Trains a `Speaker` to answer "hihell" with "ihello"; returns what it said at each step."""
    torch.manual_seed(seed)
    model = Speaker(train.PROVIDERS[provider]).to(device)
    letters, targets = one_hot(INPUT).to(device), indices(TARGET).to(device)
    weights = torch.ones_like(letters[..., 0])
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    said = []
    for step in range(1, steps + 1):
        logits = model(letters)
        loss = fastlstm.functional.sequence_loss(logits, targets, weights)
        said.append("".join(ALPHABET[i] for i in logits.argmax(-1)[0]))
        if step == 1 or step % 10 == 0:
            print(f"  step {step:2}  loss {loss:.5f}  {INPUT} -> {said[-1]}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return said


def one_cell() -> None:
    """One cell of an RNN, one letter: h_n = tanh(W_ih x + b_ih + W_hh h + b_hh)"""
    x = one_hot("h")
    _, h_n = fastlstm.RNN(5, 2, batch_first=True)(x)
    _show(x=x, h_n=h_n)


def one_lstm_cell() -> None:
    """One cell of an LSTM, one letter: (h, c) = cell(x)"""
    x = one_hot("h")[0]
    h, c = fastlstm.LSTMCell(5, 2)(x)
    _show(x=x, h=h, c=c)


def five_steps() -> None:
    """Five steps: y holds h after every letter of "hello", h_n after the last"""
    x = one_hot("hello")
    y, h_n = fastlstm.RNN(5, 2, batch_first=True)(x)
    _show(x=x, y=y, h_n=h_n)


def batches() -> None:
    """A batch: three words at once, each as if it were alone"""
    y, _ = fastlstm.RNN(5, 2, batch_first=True)(_words())
    _show(x=_words(), y=y)


def rectified() -> None:
    """The same with relu in the place of tanh"""
    y, _ = fastlstm.RNN(5, 2, nonlinearity="relu", batch_first=True)(_words())
    _show(y=y)


def lengths() -> None:
    """Lengths [5, 4, 3]: y is 0 past each end, h_n is the state at each end"""
    lstm = fastlstm.LSTM(5, 2, batch_first=True)
    y, (h_n, _) = lstm(_words(), lengths=torch.tensor([5, 4, 3]))
    _show(y=y, h_n=h_n)


def initial_state() -> None:
    """An initial state (h_0, c_0) of ones instead of zeros"""
    state = torch.ones(1, 3, 2)
    y, _ = fastlstm.LSTM(5, 2, batch_first=True)(_words(), (state, state))
    _show(h_0=state, y=y)


def three_layers() -> None:
    """Three layers: y is that of the last layer, h_n has one state for each"""
    y, (h_n, _) = fastlstm.LSTM(5, 2, num_layers=3, batch_first=True)(_words())
    _show(y=y, h_n=h_n)


def two_directions() -> None:
    """Two directions, lengths [2, 3, 1]: the backward one starts at each true end"""
    lstm = fastlstm.LSTM(5, 2, bidirectional=True, batch_first=True)
    y, (h_n, _) = lstm(_words()[:, :3], lengths=torch.tensor([2, 3, 1]))
    _show(y=y, h_n=h_n)


def softmax_projection() -> None:
    """Softmax projection: one linear layer for all steps, probabilities of five letters"""
    y, _ = fastlstm.LSTM(5, 2, batch_first=True)(_words())
    probabilities = nn.Linear(2, 5)(y).softmax(-1)
    _show(y=y, probabilities=probabilities)


def sequence_losses() -> None:
    """sequence_loss: mean cross-entropy of three steps whose right answer is 1"""
    for logits in LOSS_EXAMPLES:
        loss = fastlstm.functional.sequence_loss(
            torch.tensor([logits]), torch.ones(1, 3, dtype=torch.int64), torch.ones(1, 3)
        )
        print(f"  logits {logits}: {loss:.6g}")


LOSS_EXAMPLES = (
    [[0.2, 0.7], [0.6, 0.2], [0.2, 0.9]],
    [[0.3, 0.7], [0.3, 0.7], [0.3, 0.7]],
    [[0.1, 0.9], [0.1, 0.9], [0.1, 0.9]],
    [[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]],
    [[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]],
)
RECIPES: tuple[Callable[[], None], ...] = (
    one_cell,
    one_lstm_cell,
    five_steps,
    batches,
    rectified,
    lengths,
    initial_state,
    three_layers,
    two_directions,
    softmax_projection,
    sequence_losses,
)


def _words() -> Tensor:
    return torch.cat([one_hot(word) for word in ("hello", "eolll", "lleel")])


def _show(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        print(f"  {name} {list(tensor.shape)}\n{_indent(str(tensor.detach()))}")


def _indent(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines() if line.strip())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m benchmarks hello``."""
    parser.add_argument(
        "--steps", type=int, default=STEPS, help="training steps (default: %(default)s)"
    )
    train.add_arguments(parser)


def main(args: argparse.Namespace) -> int:
    """Runs ``python -m benchmarks hello``; fails if "ihello" was not learnt."""
    providers = train.prepare(args)
    for recipe in RECIPES:
        print(f"\n{recipe.__doc__}")
        torch.manual_seed(args.seed)
        with torch.no_grad():
            recipe()
    for provider in providers:
        print(f'\n"{INPUT}" -> "{TARGET}" with {provider}')
        said = learn(provider, steps=args.steps, seed=args.seed, device=args.device)[-1]
        if said != TARGET:
            raise BenchmarkError(f'{provider} says "{said}" after {args.steps} steps')
    return 0
