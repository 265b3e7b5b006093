"""`python -m benchmarks quantized`: how exact small weights are, on shapes and on trained tasks.

The first table has the root mean square error of y against float64, and the largest, of each
LSTM that rounds its weights, and of its memory the share of float32's. The second one trains the
short versions of the tasks in float32 and tests the same weights in int8 and bfloat16.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import torch
from torch import nn

import fastlstm

from ..providers import QUANTIZED, provider
from .cases import Case
from .environment import environment
from .figures import ratio, time
from .results import Results
from .workload import make_workload

Row = dict[str, Any]
CASES = [
    Case("vad-step", 128, 128, 1, 1, 1, 1),
    Case("vad-sequence", 128, 128, 1, 1, 1, 512),
    Case("rnnt-step", 640, 640, 2, 1, 1, 1),
    Case("both-ways", 512, 256, 2, 2, 1, 64),
    Case("speech", 80, 256, 3, 2, 16, 50),
    Case("lm", 512, 512, 2, 1, 8, 32),
]
DTYPES = ("int8", "bfloat16")
TIMED = ("fastlstm-int8", "onnxruntime-int8", "torch-int8", "fastlstm-bfloat16", "fastlstm")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `quantized`."""
    from ..tasks import data

    parser.add_argument(
        "--no-tasks", action="store_true", help="leave the trained tasks out, which take minutes"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the tasks (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to FILE")
    data.add_arguments(parser)


def main(args: argparse.Namespace) -> int:
    """Measure, print both tables and write the rows."""
    results = Results(args.json, environment())
    results.add(errors())
    print(error_table(results))
    if not args.no_tasks:
        results.add(tasks(args.data, args.seed))
        print(f"\n{task_table(results)}")
    return 0


def errors() -> list[Row]:
    """A row for each case, input and provider: rms and largest error, and share of memory.

    The input is that of the benchmarks, or its absolute value, which is what many features are
    like.
    """
    rows = []
    for case in CASES:
        for kind in ("any", "positive"):
            mode = "step" if case.T == 1 else "infer"
            work = make_workload(case, mode, torch.float32)
            if kind == "positive":
                work = replace(work, x=work.x.abs())
            truth = provider("torch").contender(work.to(torch.float64)).results()["y"]
            for name in QUANTIZED:
                who = provider(name)
                if (reason := who.missing() or who.refuses(work)) is not None:
                    print(f"{name} is left out: {reason}")
                    continue
                with torch.no_grad():
                    error = who.contender(work).results()["y"] - truth
                rows.append(
                    {
                        "case": case.name,
                        "shape": case.shape,
                        "input": kind,
                        "provider": name,
                        "rms": error.square().mean().sqrt().item(),
                        "largest": error.abs().max().item(),
                        "memory": _memory(work.lstm, name),
                    }
                )
    return rows


def _memory(lstm: nn.LSTM, name: str) -> float | None:
    """What our modules hold, as a share of the float32 weights."""
    if not name.startswith("fastlstm-"):
        return None
    small = fastlstm.quantize(deepcopy(lstm).eval(), name.removeprefix("fastlstm-"))
    return sum(b.nbytes for b in small.buffers()) / sum(w.nbytes for w in lstm.parameters())


def tasks(folder: Path | None, seed: int) -> list[Row]:
    """Train the tasks in float32; a row for each with the rows right on the test set."""
    from ..__main__ import BINARY_EPOCHS, LSTM_SAMPLES
    from ..tasks import binary, data, mnist, train
    from ..tasks.task import Task

    digits = data.load(folder)
    protocol = replace(mnist.PROTOCOLS["lstm"], epochs=None, samples=LSTM_SAMPLES)
    wanted: Sequence[Task] = (
        binary.Binary(epochs=BINARY_EPOCHS, seed=seed),
        mnist.Mnist(digits, "lstm", protocol, seed=seed),
    )
    rows = []
    for task in wanted:
        task.log_every = task.test_every = task.steps
        [trainee] = train.train(task, ["fastlstm"], quiet=True)
        model = trainee.model.eval()
        row: Row = {"task": task.name, "float32": task.test(model, last=True).exact}
        for dtype in DTYPES:
            score = task.test(fastlstm.quantize(deepcopy(model), dtype), last=True)
            row |= {dtype: score.exact, "rows": score.rows}
        rows.append(row)
    return rows


def error_table(results: Results) -> str:
    """A line for each case and input: errors of each provider, and times ONNX Runtime's."""
    rows = [row for row in results.rows if "provider" in row]
    names = [name for name in QUANTIZED if any(row["provider"] == name for row in rows)]
    lines = [
        "| case | shape | input | " + " | ".join(provider(name).label for name in names) + " |",
        "|---|---|---|" + "---:|" * len(names),
    ]
    by_place: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in rows:
        by_place.setdefault((row["case"], row["shape"], row["input"]), {})[row["provider"]] = row
    for place, found in by_place.items():
        peer = found.get("onnxruntime-int8")
        cells = [_cell(found.get(name), peer) for name in names]
        lines.append("| " + " | ".join([*place, *cells]) + " |")
    return "\n".join(lines)


def _cell(row: Row | None, peer: Row | None) -> str:
    if row is None:
        return ""
    text = f"{row['rms']:.1e}, {row['largest']:.1e}"
    return text if peer in (None, row) else f"{text} ({row['rms'] / peer['rms']:.2f}x)"


def task_table(results: Results) -> str:
    """A line for each task: how many rows of the test set are right."""
    rows = [row for row in results.rows if "task" in row]
    lines = ["| task | test rows | float32 | int8 | bfloat16 |", "|---|---:|---:|---:|---:|"]
    for row in rows:
        numbers = (row[key] for key in ("rows", "float32", *DTYPES))
        lines.append("| " + " | ".join([row["task"], *(f"{n:,}" for n in numbers)]) + " |")
    return "\n".join(lines)


def time_table(results: Results) -> str:
    """A line for each case and number of threads: ours in int8, and how many times as long others.

    From the rows of `speed`, with the providers of `TIMED`: whole calls, of one step from a state.
    """
    lines = [
        f"| case | shape | threads | {provider(TIMED[0]).label}, µs | "
        + " | ".join(_label(name) for name in TIMED[1:])
        + " |",
        "|---|---|---:|---:|" + "---:|" * (len(TIMED) - 1),
    ]
    all_ratios: dict[str, list[float]] = {name: [] for name in TIMED[1:]}
    for case in CASES:
        for threads in sorted({row["threads"] for row in results.rows}):
            found = {
                row["provider"]: row
                for row in results.rows
                if (row["shape"], row["threads"]) == (case.shape, threads)
                and row["mode"] == ("step" if case.T == 1 else "infer")
                and "p50_us" in row
            }
            if TIMED[0] not in found:
                continue
            ours = found[TIMED[0]]
            ratios = {n: r["ratio"] / ours["ratio"] for n, r in found.items() if n in all_ratios}
            for name, value in ratios.items():
                all_ratios[name].append(value)
            cells = [case.name, case.shape, str(threads), time(ours)]
            lines.append(f"| {' | '.join([*cells, *(ratio(ratios.get(n)) for n in TIMED[1:])])} |")
    means = (ratio(geometric_mean(values)) if values else "" for values in all_ratios.values())
    lines.append(f"| geometric mean | | | | {' | '.join(means)} |")
    return "\n".join(lines)


def _label(name: str) -> str:
    return "fastlstm, float32" if name == "fastlstm" else provider(name).label
