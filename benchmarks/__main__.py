"""``python -m benchmarks``: trains short versions of the tasks with both LSTMs, side by side."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path

from . import BenchmarkError

COMMANDS = {  # a command's module, and what it does
    "mnist": ("tasks.mnist", "train MNIST by rows: models lstm, lstm128 or blstm"),
    "binary": ("tasks.binary", "train binary increment: x and x + 1 as 20 bits"),
    "hello": ("tasks.hello", 'run small recipes, and train "hihell" -> "ihello"'),
    "speed": ("speed.command", "time single calls beside every other LSTM on this machine"),
    "report": ("report.command", "write the tables and pictures of all results"),
    "cells": ("speed.cells", "time each option of a cell, and RNN beside nn.RNN"),
    "loops": ("speed.loops", "time loops over LSTMCell beside nn.LSTMCell and ONNX Runtime"),
    "quantized": ("speed.quantized", "how exact 8-bit and bfloat16 weights are, beside others"),
    "contention": ("speed.contention", "time calls beside busy processes, or on too many threads"),
    "kernels": ("gpu.kernels", "show what the GPU kernels compile to, without a GPU"),
    "gpu": ("gpu.command", "on a GPU: run the tests, record cuDNN's outputs, time the kernels"),
}
# Enough to learn the tasks in a few minutes on two cores. In samples, so the small digits do.
BINARY_EPOCHS = 8
LSTM_SAMPLES = 180_000
BLSTM_SAMPLES = 100_000
LOG_EVERY = 10
SHORTENED = f"""\
Shortened protocols, and the full ones:
  binary       {BINARY_EPOCHS} epochs (up to 100: python -m benchmarks binary)
  mnist lstm   {LSTM_SAMPLES:,} images (300,000: python -m benchmarks mnist --model lstm)
  mnist blstm  {BLSTM_SAMPLES:,} images (5,000,000: python -m benchmarks mnist --model blstm)
"""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments; `args.main` runs what they ask for."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Without a command: trains binary increment and MNIST by rows with "
        "fastlstm.LSTM beside torch.nn.LSTM, from the same weights and on the same batches, and "
        "leaves a table, a picture of the curves and a JSON file.",
        epilog=SHORTENED,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, (place, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        if [name] == argv[:1]:  # a command that is not asked for is not imported
            module = import_module(f".{place}", __package__)
            command.description = module.__doc__
            module.add_arguments(command)
            command.set_defaults(main=module.main)
    if not set(COMMANDS) & set(argv[:1]):
        from .tasks import data, train

        train.add_arguments(parser)
        data.add_arguments(parser)
        parser.add_argument(
            "--out",
            type=Path,
            default=Path("runs"),
            metavar="DIR",
            help="folder of the results (default: %(default)s)",
        )
        parser.set_defaults(main=main_job)
    return parser.parse_args(argv)


def main_job(args: argparse.Namespace) -> int:
    """Short versions of the tasks, with both providers."""
    from .tasks import binary, data, mnist, output, train

    providers = train.prepare(args)
    print(SHORTENED)
    digits = data.load(args.data).to(args.device)
    lstm = replace(mnist.PROTOCOLS["lstm"], epochs=None, samples=LSTM_SAMPLES)
    blstm = replace(mnist.PROTOCOLS["blstm"], samples=BLSTM_SAMPLES)
    tasks = [
        binary.Binary(epochs=BINARY_EPOCHS, seed=args.seed, device=args.device),
        mnist.Mnist(digits, "lstm", lstm, seed=args.seed),
        mnist.Mnist(digits, "blstm", blstm, seed=args.seed),
    ]
    found = []
    for task in tasks:
        task.log_every, task.test_every = LOG_EVERY, task.steps
        trainees = train.train(task, providers, quiet=True)
        found += [trainee.record() for trainee in trainees]
    files = {"json_file": args.out / "results.json", "plot_file": args.out / "curves.png"}
    output.finish(found, **files)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    args = parse(sys.argv[1:] if argv is None else list(argv))
    try:
        status: int = args.main(args)
    except BenchmarkError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130  # what a shell says of a process that SIGINT ended
    return status


if __name__ == "__main__":
    sys.exit(main())
