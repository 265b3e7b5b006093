"""`python -m benchmarks speed`: fastlstm beside nn.LSTM and ONNX Runtime, in one process.

A figure is a median over short blocks in which the contenders take turns on the same inputs and
weights, after their results have been checked. A ratio is the median over the rounds of (time of
the peer / time of fastlstm) in the same round: above 1 fastlstm is faster.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import torch

from . import memory
from .cases import CASES, Case, parse
from .contenders import MODES, PROVIDERS, build, unsuited
from .environment import environment
from .timing import take_turns

Row = dict[str, Any]
DTYPES = ("float32", "float64", "bfloat16", "float16")
DENSE = "fastlstm, dense"  # on the dense batch of a packed case, for as many real steps


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `speed`."""
    add = parser.add_argument
    add("--cases", nargs="+", choices=CASES, metavar="NAME", help=f"of: {', '.join(CASES)}")
    add("--case", action="append", type=_case, metavar="I,H,L,D,B,T", help="any shape; repeatable")
    add("--modes", nargs="+", choices=MODES, help="default: step where T is 1, else infer, train")
    add("--providers", nargs="+", choices=PROVIDERS, default=PROVIDERS)
    add("--dtype", choices=DTYPES, default="float32")
    add("--threads", type=int, help="default: torch's own choice")
    add("--seconds", type=float, default=2.0, help="for one case in one mode (default: 2)")
    add("--repeat", type=int, default=40, help="most rounds of one block each (default: 40)")
    add("--quick", action="store_true", help="a tenth of the time, a quarter of the rounds")
    add("--input-gradient", action="store_true", help="train: also the gradient of x")
    add("--memory", action="store_true", help="what is kept for backward instead of the time")
    add("--json", type=Path, metavar="FILE", help="write the rows to FILE")


def main(args: argparse.Namespace) -> int:
    """Measure, print the table and write the rows; raises Mismatch if a result is wrong."""
    if args.threads:
        torch.set_num_threads(args.threads)
    facts = environment()
    rows = memory.measure(_cases(args), args.dtype) if args.memory else _measure(args)
    print(", ".join(f"{name} {value}" for name, value in facts.items() if value is not None))
    print(memory.table(rows) if args.memory else table(rows))
    if args.json:
        args.json.write_text(json.dumps([row | facts for row in rows], indent=1) + "\n")
    return 0


def _case(text: str) -> Case:
    try:
        return parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _cases(args: argparse.Namespace) -> list[Case]:
    named = [CASES[name] for name in args.cases or ()] + (args.case or [])
    return named or list(CASES.values())


def _measure(args: argparse.Namespace) -> list[Row]:
    dtype = getattr(torch, args.dtype)
    seconds, repeat = args.seconds, args.repeat
    if args.quick:
        seconds, repeat = seconds / 10, max(2, repeat // 4)
    plan = [
        (case, mode)
        for case in _cases(args)
        for mode in args.modes or (("step",) if case.T == 1 else ("infer", "train"))
    ]
    rows: list[Row] = []
    skipped: dict[tuple[str, str], list[str]] = defaultdict(list)
    for case, mode in _progress(plan):
        providers = []
        for provider in args.providers:
            reason = unsuited(provider, case, mode, dtype)
            if reason is None:
                providers.append(provider)
            else:
                skipped[provider, reason].append(f"{case.name} {mode}")
        if not providers:
            continue
        contenders = build(providers, case, mode, dtype, args.input_gradient)
        if case.packed and "fastlstm" in providers:
            whole = replace(case, packed=False)
            dense = build(["fastlstm"], whole, mode, dtype, args.input_gradient)
            contenders[DENSE] = dense["fastlstm"]
        with torch.inference_mode(mode != "train"):
            calls = {name: contender.call for name, contender in contenders.items()}
            timings = take_turns(calls, seconds=seconds, repeat=repeat)
        real_steps = int(case.lengths.sum())
        if DENSE in timings:
            timings[DENSE] = timings[DENSE].scaled(real_steps / (case.B * case.T))
        for name, timing in timings.items():
            rows.append(
                {
                    "case": case.name,
                    "shape": case.shape,
                    "real_steps": real_steps,
                    "mode": mode,
                    "dtype": args.dtype,
                    "provider": name,
                    **timing.figures,
                    "ratio": timing.ratio(timings["fastlstm"]) if "fastlstm" in timings else None,
                }
            )
    for (provider, reason), where in skipped.items():
        print(f"without {provider} ({reason}): {', '.join(where)}")
    return rows


def _progress(plan: list[tuple[Case, str]]) -> Iterable[tuple[Case, str]]:
    if find_spec("tqdm") is None:
        return plan
    from tqdm import tqdm

    return tqdm(plan, desc="speed", unit="measurement", disable=None, leave=False)


def table(rows: list[Row]) -> str:
    """One line per case and mode, a column per provider, and what it comes to."""
    groups: dict[tuple[str, str, str], dict[str, Row]] = defaultdict(dict)
    for row in rows:
        groups[row["case"], row["mode"], row["shape"]][row["provider"]] = row
    providers = [name for name in PROVIDERS if any(name in group for group in groups.values())]
    lines = [["case", "mode", "I,H,L,D,B,T"]]
    for name in providers:
        lines[0] += [f"{name} µs (p20-p80)"] + ["ratio "] * (name != "fastlstm")
    for key, group in groups.items():
        lines.append([*key])
        for name in providers:
            found = group.get(name)
            lines[-1].append(_time(found) if found else "-")
            if name != "fastlstm":
                lines[-1].append(_ratio(found["ratio"]) if found and found["ratio"] else "- ")
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(
            cell.ljust(width) if i < 3 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    return "\n".join(line.rstrip() for line in [*text, "", *_summary(rows)])


def _time(row: Row) -> str:
    p20, p50, p80 = (
        f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
        for value in (row["p20_us"], row["p50_us"], row["p80_us"])
    )
    return f"{p50} ({p20}-{p80})"


def _behind(ratio: float) -> bool:
    return round(ratio, 2) < 1


def _ratio(ratio: float) -> str:
    return f"{ratio:.2f}x" + ("*" if _behind(ratio) else " ")


def _summary(rows: list[Row]) -> Iterator[str]:
    ratios: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in rows:
        if row["provider"] == DENSE:
            gain = _ratio(row["ratio"]).strip()
            what = f"{row['case']} {row['mode']}"
            yield f"{what}: a real step is {gain} as fast as one of the dense batch"
        elif row["provider"] != "fastlstm" and row["ratio"]:
            ratios[row["mode"], row["provider"]].append(row["ratio"])
    for (mode, peer), values in ratios.items():
        yield f"{mode}: {geometric_mean(values):.2f}x {peer} (geometric mean, n={len(values)})"
    if any(_behind(row["ratio"]) for row in rows if row["ratio"]):
        yield "* the other one is faster"
