"""`python -m benchmarks loops`: loops over LSTMCell beside nn.LSTMCell and ONNX Runtime.

Every step is a call, and its state goes into the next one, as in decoders. Mode "infer" is a loop
without gradients; "train" goes back through it to all weights and makes a step of SGD. ONNX
Runtime makes one call for a step too. Results are checked against float64 first. A ratio is the
median over the rounds of (time of the peer / time of fastlstm) in the same round.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import torch
from torch import Tensor, nn

import fastlstm

from .. import BenchmarkError
from ..providers import provider
from ..providers.pytorch import copy, from_module
from . import memory
from .cases import Case, parse
from .check import Judge
from .contender import Contender
from .environment import environment
from .measure import threads
from .results import Results
from .timing import take_turns
from .workload import Workload, make_workload

Row = dict[str, Any]
NAMED = {
    case.name: case
    for case in (
        Case("decoder-cells", 768, 1024, 1, 1, 4, 8, who="a decoder that attends: 8 steps"),
        Case("seq2seq-cells", 128, 256, 1, 1, 16, 20, who="a translator: 20 steps"),
    )
}
GRID = {
    case.name: case
    for case in (
        Case(f"cells H={H} B={B}", H, H, 1, 1, B, 16)
        for H in (37, 64, 128, 256, 512, 1024)
        for B in (1, 4, 16, 64)
    )
}
WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
CELLS: dict[str, Callable[..., nn.Module]] = {
    "fastlstm": fastlstm.LSTMCell,
    "torch": nn.LSTMCell,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `loops`."""
    add = parser.add_argument
    add(
        "--cases",
        nargs="+",
        choices=NAMED,
        metavar="NAME",
        help=f"named cases (default: all): {', '.join(NAMED)}",
    )
    add("--case", action="append", type=parse, metavar="I,H,1,1,B,T", help="any other; repeatable")
    add("--grid", action="store_true", help="loops of 16 steps over H 37 to 1024 and B 1 to 64")
    add("--modes", nargs="+", choices=("infer", "train"), default=("infer", "train"))
    add("--threads", type=int, help="number of CPU threads (default: PyTorch's choice)")
    add("--seconds", type=float, default=1.5, help="time for a case in a mode (default: 1.5)")
    add("--repeat", type=int, default=30, help="most rounds (default: 30)")
    add("--json", type=Path, metavar="FILE", help="write the rows to FILE")


def main(args: argparse.Namespace) -> int:
    """Measure, print the table and write the rows."""
    facts = environment()
    print(", ".join(f"{k} {v}" for k, v in facts.items() if isinstance(v, str | int)))
    chosen = [NAMED[name] for name in args.cases or ()] + (args.case or [])
    chosen += GRID.values() if args.grid else ()
    for case in chosen:
        if (case.L, case.D) != (1, 1):
            raise BenchmarkError(f"{case.shape}: a cell is one layer of one direction")
    rows: list[Row] = []
    for case in chosen or NAMED.values():
        for mode in args.modes:
            found = measure(case, mode, args.threads, args.seconds, args.repeat)
            rows += found
            for row in found:
                print(
                    f"{row['case']:18} {mode:6} {row['provider']:12} {row['p50_us']:11,.1f} µs "
                    f"{row['ratio']:6.2f}x  at rest {row['rest_bytes'] or 0:,} bytes"
                )
            sys.stdout.flush()
    for mode in args.modes:
        ratios = [r["ratio"] for r in rows if r["mode"] == mode and r["provider"] == "torch"]
        print(
            f"{mode}, nn.LSTMCell: {geometric_mean(ratios):.2f}x in the geometric mean, "
            f"{min(ratios):.2f}x at least"
        )
    if args.json:
        Results(args.json, facts).add(rows)
    return 0


def measure(case: Case, mode: str, count: int | None, seconds: float, repeat: int) -> list[Row]:
    """Return a row for each provider; raises Mismatch where its numbers are wrong."""
    with threads(count), torch.inference_mode(mode != "train"):
        work = make_workload(case, mode, torch.float32)
        judge = Judge(work)
        contenders = {name: loop(kind, work) for name, kind in CELLS.items()}
        for name, contender in contenders.items():
            judge.error(name, contender, ours=name == "fastlstm")
        if mode == "infer" and not provider("onnxruntime").missing():
            contenders["onnxruntime"] = steps(work)
        timers = {name: contender.seconds for name, contender in contenders.items()}
        timings = take_turns(timers, seconds=seconds, repeat=repeat)
        described = {"case": case.name, "shape": case.shape, "mode": mode}
        return [
            described
            | {"provider": name, "threads": torch.get_num_threads()}
            | {"ratio": timing.ratio(timings["fastlstm"]), **timing.figures}
            | {"rest_bytes": rest() if (rest := contenders[name].rest) else None}
            for name, timing in timings.items()
        ]


def loop(kind: Callable[..., nn.Module], work: Workload) -> Contender:
    """The work of an LSTM of one layer, done by a cell in a loop."""
    case, module = work.case, copy(work.lstm)
    cell = kind(case.I, case.H)
    for name in WEIGHTS:
        setattr(cell, name, getattr(module, f"{name}_l0"))

    def forward(x: Tensor, state: Any = None) -> Any:
        h, c = x.new_zeros(case.B, case.H), x.new_zeros(case.B, case.H)
        outputs = []
        for frame in x.unbind():
            h, c = cell(frame, (h, c))
            outputs.append(h)
        return torch.stack(outputs), (h[None], c[None])

    contender = from_module(module, work, forward)
    return replace(contender, rest=lambda: memory.rest_bytes(cell))


def steps(work: Workload) -> Contender:
    """The same loop by calls of ONNX Runtime, one for a step."""
    one = make_workload(replace(work.case, T=1), "step", torch.float32)
    step = provider("onnxruntime").contender(one)

    def call() -> None:
        for _ in range(work.case.T):
            step.call()

    return Contender(call, step.results)
