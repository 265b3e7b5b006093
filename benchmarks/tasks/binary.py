"""Binary increment: an LSTM reads x bit by bit, least significant first, and then says x + 1."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from . import output, train
from .task import Score, Task, add_forget_bias, count_steps, evaluate, shuffled

BITS = 20
NUMBERS = 2**BITS - 1  # every x whose x + 1 has 20 bits too
TRAINING_ROWS = 2**18  # the other 786,431 numbers are the test set
EMBEDDING = 10
LAYERS = 2
LEARNING_RATE = 0.1  # Adagrad
TEST_BATCH = 4096
PROBE = 4 * TEST_BATCH  # test rows to look at first: with an error in them, the others can wait
PUBLISHED = 786_372  # test rows that the published run of this protocol got right


class Incrementer(nn.Module):
    """Bits of x, int64 ``[B, 20]``, to logits of the bits of x + 1, ``[B, 20, 2]``.

    Many to one: all that the head sees of x is the output after the last bit.
    """

    def __init__(self, lstm: type[nn.Module], hidden: int, forget_bias: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(2, EMBEDDING)
        self.lstm = lstm(EMBEDDING, hidden, LAYERS, batch_first=True)
        add_forget_bias(self.lstm, forget_bias)
        self.head = nn.Linear(hidden, 2 * BITS)

    def forward(self, bits: Tensor) -> Tensor:
        y, _ = self.lstm(self.embedding(bits))
        logits: Tensor = self.head(y[:, -1])
        return logits.view(-1, BITS, 2)


class Binary(Task):
    """The protocol: 2^18 numbers drawn at random to train on, all others to test."""

    name = "binary"
    stop_when_exact = True

    def __init__(
        self,
        *,
        hidden: int = 32,
        batch: int = 512,
        epochs: int | None = 100,
        samples: int | None = None,
        forget_bias: float = 0.0,
        accumulator: float = 0.0,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.device = torch.device(device)
        self.hidden = hidden
        self.batch_size = batch
        self.forget_bias = forget_bias
        self.accumulator = accumulator
        self.seed = seed
        self.training_numbers, self.test_numbers = (
            numbers.to(self.device) for numbers in split(seed)
        )
        self.steps = count_steps(TRAINING_ROWS, batch, epochs, samples)
        self.log_every = self.test_every = TRAINING_ROWS // batch
        self.settings = {
            "hidden": hidden,
            "batch": batch,
            "epochs": epochs,
            "samples": samples,
            "forget_bias": forget_bias,
            "optimizer": f"Adagrad {LEARNING_RATE}, accumulators from {accumulator}",
            "seed": seed,
        }

    def build(self, lstm: type[nn.Module]) -> nn.Module:
        return Incrementer(lstm, self.hidden, self.forget_bias)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adagrad(
            model.parameters(),
            lr=LEARNING_RATE,
            initial_accumulator_value=self.accumulator,
            fused=self.device.type == "cpu",  # PyTorch has no fused Adagrad for CUDA
        )

    def batches(self) -> Iterator[Tensor]:
        return shuffled(TRAINING_ROWS, self.batch_size, self.seed, self.device)

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        numbers = self.training_numbers[rows]
        return to_bits(numbers), to_bits(numbers + 1)

    def test(self, model: nn.Module, *, last: bool) -> Score:
        """A probe of 16,384 test rows; all rows if these are exact, and in the last test."""
        if not last:
            probe = self._score(model, self.test_numbers[:PROBE])
            if probe.exact < probe.rows:
                return probe
        return self._score(model, self.test_numbers)

    def _score(self, model: nn.Module, numbers: Tensor) -> Score:
        return evaluate(model, ((to_bits(x), to_bits(x + 1)) for x in numbers.split(TEST_BATCH)))


def split(seed: int) -> tuple[Tensor, Tensor]:
    """The numbers 0 .. 2^20 - 2 in random order: 2^18 for training, the other 786,431 for test."""
    order = torch.randperm(NUMBERS, generator=torch.Generator().manual_seed(seed))
    return order[:TRAINING_ROWS], order[TRAINING_ROWS:]


def to_bits(numbers: Tensor) -> Tensor:
    """The 20 bits of int64 numbers ``[B]``, least significant first: int64 ``[B, 20]``."""
    return (numbers[:, None] >> torch.arange(BITS, device=numbers.device)) & 1


@torch.inference_mode()
def failures(model: nn.Module, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """The numbers that the model gets wrong ``[n]`` and the bits it says instead ``[n, 20]``."""
    model.eval()
    wrong, said = [], []
    for x in numbers.split(TEST_BATCH):
        answers = model(to_bits(x)).argmax(-1)
        rows = (answers != to_bits(x + 1)).any(1)
        wrong.append(x[rows])
        said.append(answers[rows])
    return torch.cat(wrong), torch.cat(said)


def print_failures(trainee: train.Trainee, numbers: Tensor, limit: int) -> None:
    """How many rows of `numbers` are exact, and the first `limit` that are not."""
    wrong, said = failures(trainee.model, numbers)
    right = len(numbers) - len(wrong)
    print(
        f"\n{trainee.provider}: {right:,} of {len(numbers):,} test rows exact after "
        f"{trainee.steps:,} steps (published run of the full protocol: {PUBLISHED:,})"
    )
    for x, bits in list(zip(wrong.tolist(), said, strict=True))[:limit]:
        expected = _text(to_bits(torch.tensor([x + 1]))[0])
        print(f"  {x:7,} + 1: expected {expected}, predicted {_text(bits)}")
    if len(wrong) > limit:
        print(f"  and {len(wrong) - limit:,} more (--failures {limit})")


def _text(bits: Tensor) -> str:
    return "".join(map(str, bits.tolist()))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m benchmarks binary``."""
    parser.add_argument(
        "--hidden", type=int, default=32, metavar="H", help="hidden size (default: %(default)s)"
    )
    parser.add_argument(
        "--batch", type=int, default=512, metavar="B", help="batch size (default: %(default)s)"
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--epochs", type=int, metavar="N", help="at most N epochs of 2^18 numbers (default: 100)"
    )
    length.add_argument("--samples", type=int, metavar="N", help="at most N numbers instead")
    parser.add_argument(
        "--forget-bias",
        type=float,
        default=0.0,
        metavar="X",
        help="added to the forget gate's initial bias (default: %(default)s)",
    )
    parser.add_argument(
        "--accumulator",
        type=float,
        default=0.0,
        metavar="X",
        help="Adagrad's accumulators start from X; from TensorFlow's 0.1 the task needs far more "
        "steps (default: %(default)s)",
    )
    parser.add_argument(
        "--failures",
        type=int,
        default=100,
        metavar="N",
        help="print N wrong test rows at most (default: %(default)s)",
    )
    train.add_arguments(parser)
    output.add_arguments(parser)


def main(args: argparse.Namespace) -> int:
    """Runs ``python -m benchmarks binary``."""
    providers = train.prepare(args)
    task = Binary(
        hidden=args.hidden,
        batch=args.batch,
        epochs=100 if args.epochs is None and args.samples is None else args.epochs,
        samples=args.samples,
        forget_bias=args.forget_bias,
        accumulator=args.accumulator,
        seed=args.seed,
        device=args.device,
    )
    trainees = train.train(task, providers, tensorboard=args.tensorboard)
    for trainee in trainees:
        print_failures(trainee, task.test_numbers, args.failures)
    output.finish(
        [trainee.record() for trainee in trainees], json_file=args.json, plot_file=args.plot
    )
    return 0
