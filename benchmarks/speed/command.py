"""`python -m benchmarks speed`: fastlstm beside every other LSTM on this machine.

A figure is a median over short blocks in which the contenders take turns on the same inputs and
weights, after the results of each have been checked against float64. A ratio is the median over
the rounds of (time of the peer / time of fastlstm) in the same round: above 1 fastlstm is faster.
With --json, what has been measured is kept: the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from time import monotonic

import torch

from .. import BenchmarkError
from ..providers import PROVIDERS, QUANTIZED, provider
from ..providers.remote import Remotes
from . import floor
from .cases import ALL, CASES, GROUPS, Case, parse
from .environment import environment
from .job import Job, jobs_of
from .measure import describe_job, line, measure, threads
from .precision import ALL_PRECISIONS, Precision
from .printed import table
from .results import Results, key
from .workload import MODES

QUICK = ("binary", "mnist-lstm", "mnist-lstm128", "mnist-blstm", "step", "one-sequence")
QUICK_PROVIDERS = ("fastlstm", "torch", "onnxruntime")
QUICK_SECONDS = 45  # after which no measurement starts
# What a job takes: so many calls by every provider, if all were at the floor, where nobody is.
CALLS = 40
BUSY = 0.5  # of the cores, by others: what is timed then has to wait for them


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `speed`."""
    add = parser.add_argument
    add(
        "--cases",
        nargs="+",
        choices=CASES,
        metavar="NAME",
        help=f"named cases: {', '.join(CASES)}",
    )
    add(
        "--case",
        action="append",
        type=_case,
        metavar="I,H,L,D,B,T",
        help="a case of any shape; can be repeated",
    )
    add(
        "--groups",
        nargs="+",
        choices=(*GROUPS, "all"),
        help="groups of cases (default: tasks users)",
    )
    add(
        "--modes",
        nargs="+",
        choices=MODES,
        help="what to time (default: step where T is 1, else infer and train)",
    )
    add(
        "--providers",
        nargs="+",
        choices=PROVIDERS,
        metavar="NAME",
        help=f"whose LSTMs to time (default: all but those that round the "
        f"weights): {', '.join(PROVIDERS)}",
    )
    add(
        "--precision",
        choices=ALL_PRECISIONS,
        help="how to compute (default: exact on a CPU, tf32 on a GPU)",
    )
    add("--device", default="cpu", help="where to compute: cpu or cuda[:N] (default: %(default)s)")
    add("--graph", action="store_true", help="on a GPU: also time the replay of a CUDA graph")
    add(
        "--threads",
        nargs="+",
        type=int,
        metavar="N",
        help="numbers of CPU threads, each in turn (default: PyTorch's choice)",
    )
    add(
        "--seconds",
        type=_positive,
        default=1.5,
        help="time for one case in one mode (default: 1.5)",
    )
    add(
        "--repeat",
        type=_several,
        default=30,
        help="most rounds, in which each provider has one block (default: 30)",
    )
    add("--budget", type=_positive, metavar="SECONDS", help="start no measurement after this time")
    add(
        "--longest",
        type=_positive,
        default=60,
        metavar="SECONDS",
        help="leave out cases that are expected to take longer (default: 60)",
    )
    add(
        "--quick", action="store_true", help="time six cases with three providers, within a minute"
    )
    add(
        "--input-gradient", action="store_true", help="in training: also compute the gradient of x"
    )
    add(
        "--json",
        type=Path,
        metavar="FILE",
        help="write the rows to FILE, and skip what it has already",
    )
    add("--fresh", action="store_true", help="ignore what FILE has, and write it anew")


def main(args: argparse.Namespace) -> int:
    """Measure what is not in the file yet, print the table; 1 if a result of ours is wrong."""
    if args.quick:
        args.seconds, args.repeat = min(args.seconds, 0.3), min(args.repeat, 8)
        args.budget = args.budget or QUICK_SECONDS
    if any(count < 1 for count in args.threads or ()):
        raise BenchmarkError(f"--threads must be 1 or more, not {args.threads}")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise BenchmarkError(f"--device {args.device} cannot be used: {error}") from error
    cuda = torch.device(args.device).type == "cuda"
    precision = ALL_PRECISIONS[args.precision or ("tf32" if cuda else "exact")]
    results = Results(args.json, environment(args.device))
    if not args.fresh:
        results.resume()
    results.add([])  # a file that cannot be written is no surprise at the end
    facts = results.environment.items()
    print(", ".join(f"{k} {v}" for k, v in facts if isinstance(v, str | int)))
    if hasattr(os, "getloadavg") and (load := os.getloadavg()[0]) > BUSY * (os.cpu_count() or 1):
        print(f"the machine is busy (load {load:.1f}): these figures mean little")
    usual = tuple(name for name in PROVIDERS if name not in QUANTIZED)
    names = args.providers or (QUICK_PROVIDERS if args.quick else usual)
    graphs = (False, True) if args.graph and cuda else (False,)
    counts = args.threads or (None,)
    wanted = (_cases(args), args.modes, precision, graphs, counts, args.input_gradient)
    jobs = jobs_of(*wanted)
    missing = {name: reason for name in names if (reason := provider(name).missing())}
    results.environment.setdefault("missing", {}).update(missing)
    names = [name for name in names if name not in missing]
    left_out, too_long = work_off(args, jobs, names, precision, results)
    results.add([])
    keys = {key(describe_job(job, name, args.device)) for job in jobs for name in names[:1]}
    rows = [row for row in results.rows if key(row) in keys and row["provider"] in names]
    print(table(rows))
    for name, reason in missing.items():
        print(f"without {name}: {reason}")
    for what, where in (("for want of time", left_out), ("longer than --longest", too_long)):
        if where:
            print(f"left out, {what}: {', '.join(f'{j.case.name} {j.mode}' for j in where)}")
    return int(any("error" in row and row["provider"].startswith("fastlstm") for row in rows))


def work_off(
    args: argparse.Namespace,
    jobs: Sequence[Job],
    names: Sequence[str],
    precision: Precision,
    results: Results,
) -> tuple[list[Job], list[Job]]:
    """Adds what is missing to the results; returns the jobs for which there was no time."""
    deadline = monotonic() + (args.budget or float("inf"))
    done = {
        (key(row), row.get("provider"))
        for row in results.rows
        if row.keys() & {"p50_us", "skipped", "error"}
    }
    machines: dict[int, floor.Machine] = {}
    left_out, too_long = [], []
    with Remotes() as remotes:
        for job in _progress(jobs):
            described = [describe_job(job, name, args.device) for name in names]
            if all((key(row), row["provider"]) in done for row in described):
                continue
            if monotonic() > deadline:
                left_out.append(job)
                continue
            count = described[0]["threads"]
            if count not in machines:
                with threads(count):
                    machines[count] = floor.measure(args.device, [precision])
                of_threads = results.environment.setdefault("machine", {})
                of_threads[str(count)] = asdict(machines[count])
            least = floor.floor(job.case, precision, job.mode, machines[count]) / 1e6
            if least * len(names) * CALLS > args.longest:
                too_long.append(job)
                continue
            # Who was there before takes turns with the new ones: rows of two runs are no pair.
            same = [row for row in results.rows if key(row) == key(described[0])]
            earlier = [row["provider"] for row in same if row.get("provider") in PROVIDERS]
            everybody = list(dict.fromkeys([*names, *earlier]))
            how = (machines[count], args.device, everybody, args.seconds, args.repeat)
            found = measure(job, *how, remotes=remotes)
            results.rows = [row for row in results.rows if row not in same]
            results.add(found)
            for row in found:
                if "error" in row:
                    print(line(row))
    return left_out, too_long


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text}: expected a number above 0")
    return value


def _several(text: str) -> int:
    value = int(text)
    if value < 2:
        raise argparse.ArgumentTypeError(f"{text}: expected 2 or more")
    return value


def _case(text: str) -> Case:
    try:
        return parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _cases(args: argparse.Namespace) -> list[Case]:
    named = [CASES[name] for name in args.cases or ()] + (args.case or [])
    groups = args.groups or ([] if named else ["tasks", "users"])
    if args.quick and not named and not args.groups:
        return [CASES[name] for name in QUICK]
    return named + [case for case in ALL if case.group in groups or "all" in groups]


def _progress(jobs: Sequence[Job]) -> Iterable[Job]:
    if find_spec("tqdm") is None:
        return jobs
    from tqdm import tqdm

    return tqdm(jobs, desc="speed", unit="case", disable=None, leave=False)
