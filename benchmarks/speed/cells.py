"""`python -m benchmarks cells`: what each option of a cell costs, and RNN beside nn.RNN.

Options of fastlstm.LSTM take turns with the plain one on the same inputs, in evaluation and in
training (forward, backward to all weights, a step of SGD). A ratio is the median over the rounds
of (time with the option / time without) in the same round; of nn.RNN, of (its time / time of
fastlstm.RNN).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastlstm

from .cases import CASES, Case, parse
from .contender import on_host
from .environment import environment
from .results import Results
from .timing import take_turns
from .update import Update
from .workload import make_workload

Row = dict[str, Any]
OPTIONS: dict[str, dict[str, Any]] = {
    "recurrent_dropout": {"recurrent_dropout": 0.3},
    "weight_dropout": {"weight_dropout": 0.3},
    "zoneout": {"zoneout": (0.3, 0.1)},
    "layer_norm": {"layer_norm": True},
    "peephole": {"peephole": True},
    "recompute": {"recompute": True},
}
DEFAULT = ("mnist-lstm", "mnist-blstm", "binary", "rl-rollout")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `cells`."""
    add = parser.add_argument
    names = f"named cases: {', '.join(CASES)} (default: {', '.join(DEFAULT)})"
    add("--cases", nargs="+", choices=CASES, default=DEFAULT, metavar="NAME", help=names)
    add(
        "--case",
        action="append",
        type=parse,
        metavar="I,H,L,D,B,T",
        help="a case of any shape; can be repeated",
    )
    add("--threads", type=int, help="number of CPU threads (default: PyTorch's choice)")
    add(
        "--seconds",
        type=float,
        default=4.0,
        help="time for one case in one of the two modes (default: 4)",
    )
    add(
        "--repeat",
        type=int,
        default=40,
        help="most rounds, in which each module has one block (default: 40)",
    )
    add("--json", type=Path, metavar="FILE", help="write the rows to FILE")


def main(args: argparse.Namespace) -> int:
    """Measure, print the table and write the rows."""
    if args.threads:
        torch.set_num_threads(args.threads)
    facts = environment()
    print(", ".join(f"{name} {value}" for name, value in facts.items() if value is not None))
    sys.stdout.flush()
    rows: list[Row] = []
    for case in [*(CASES[name] for name in args.cases), *(args.case or ())]:
        for mode in ("infer", "train"):
            found = measure(case, mode, args.seconds, args.repeat)
            rows += found
            for row in found:
                print(
                    f"{row['case']:14} {mode:6} {row['module']:18} {row['p50_us']:10,.1f} µs  "
                    f"{row['ratio']:5.2f}x {row['peer']}"
                )
    if args.json:
        Results(args.json, facts).add(rows)
    return 0


def measure(case: Case, mode: str, seconds: float, repeat: int) -> list[Row]:
    """One row for each option, and one for RNN."""
    work = make_workload(case, mode, torch.float32)
    x = work.rows(work.x)
    modules: dict[str, nn.Module] = {"plain": _module(fastlstm.LSTM, case)}
    modules |= {name: _module(fastlstm.LSTM, case, **o) for name, o in OPTIONS.items()}
    modules |= {"RNN": _module(fastlstm.RNN, case), "nn.RNN": _module(nn.RNN, case)}
    calls = {name: _call(module, x, mode) for name, module in modules.items()}
    timers = {name: partial(on_host, call) for name, call in calls.items()}
    timings = take_turns(timers, seconds=seconds, repeat=repeat)
    rows = []
    for name in (*OPTIONS, "RNN"):
        peer = "nn.RNN" if name == "RNN" else "plain"
        pair = (timings[name], timings[peer])
        ratio = pair[1].ratio(pair[0]) if name == "RNN" else pair[0].ratio(pair[1])
        row = {"case": case.name, "shape": case.shape, "mode": mode, "module": name}
        rows.append(row | pair[0].figures | {"peer": peer, "ratio": ratio})
    return rows


def _module(kind: Callable[..., nn.Module], case: Case, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return kind(case.I, case.H, case.L, bidirectional=case.D == 2, **options)


def _call(module: nn.Module, x: Any, mode: str) -> Callable[[], object]:
    module.train(mode == "train")

    def infer() -> object:
        with torch.no_grad():
            return module(x)

    weights = list(module.parameters())
    update = Update(weights)
    incoming: list[Tensor] = []

    def train() -> object:
        y = module(x)[0]
        y = y if isinstance(y, Tensor) else y.data
        if not incoming:
            incoming.append(torch.ones_like(y))
        torch.autograd.backward(y, incoming, inputs=weights)
        update()
        module.zero_grad()
        return y

    return infer if mode == "infer" else train
