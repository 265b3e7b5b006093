"""`python -m benchmarks contention`: calls a second where others want the cores too.

nn.LSTM and fastlstm.LSTM run each case for some seconds beside busy processes, beside a second
worker of the same kind, and with more threads than there are cores. Every contender has a process
of its own, so that the threads of one do not disturb another. A rate of fastlstm is the worst of
the runs, one of nn.LSTM their median.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import fastlstm

from .environment import environment
from .results import Results

Row = dict[str, Any]


class Shape(NamedTuple):
    """A case. Packed lengths fall from T to a third of it."""

    I: int
    H: int
    L: int
    B: int
    T: int
    trains: bool = False
    packed: bool = False


CASES = {
    "packed training": Shape(2, 64, 2, 5, 100, trains=True, packed=True),
    "step 256 -> 512": Shape(256, 512, 1, 4, 1),
    "training 128 -> 256": Shape(128, 256, 1, 2, 5, trains=True),
    "training 2 x 128": Shape(128, 128, 2, 16, 50, trains=True),
    "streaming 128": Shape(128, 128, 1, 1, 1),
    "streaming 512": Shape(512, 512, 1, 1, 1),
}


class Place(NamedTuple):
    """Who else wants the cores, and how many threads a contender asks for (0: two)."""

    busy: int = 0
    workers: int = 1
    threads: int = 0


PLACES = {
    "alone": Place(),
    "1 busy": Place(busy=1),
    "2 busy": Place(busy=2),
    "4 busy": Place(busy=4),
    "2 workers": Place(workers=2),
    "8 threads": Place(threads=8),
    "16 threads": Place(threads=16),
}
MODULES: dict[str, Callable[..., nn.Module]] = {"nn.LSTM": nn.LSTM, "fastlstm": fastlstm.LSTM}
CONTENDERS = (("nn.LSTM", 2), ("fastlstm", 1), ("fastlstm", 2))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `contention`."""
    add = parser.add_argument
    add("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="NAME", help="cases")
    add("--places", nargs="+", choices=PLACES, default=list(PLACES), metavar="NAME", help="places")
    add("--modules", nargs="+", choices=MODULES, default=list(MODULES), help="whose")
    add("--seconds", type=float, default=4.0, help="time of one run (default: %(default)s)")
    add("--repeat", type=int, default=3, help="runs of each case (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="keep the rows; others may follow")


def main(args: argparse.Namespace) -> int:
    """Measure, print the table and write the rows."""
    facts = environment()
    results = Results(args.json, facts)
    results.resume()
    print(f"{facts['cpu']}, {os.cpu_count()} cores; calls a second")
    for place in args.places:
        rows = measure(place, args.cases, args.modules, args.seconds, args.repeat)
        for row in rows:
            print("{place:10}  {case:20} {module:9} {threads:2} threads".format(**row), end="")
            print(f"   worst {row['worst']:10,.1f}   median {row['median']:10,.1f}")
        sys.stdout.flush()
        anew = {_about(row) for row in rows}
        results.rows = [row for row in results.rows if _about(row) not in anew]
        results.add(rows)
    return 0


def _about(row: Row) -> tuple[str, str, str, int]:
    """What a row is about, but for the machine."""
    return row["place"], row["case"], row["module"], row["asked"]


def table(results: Results) -> str:
    """A line for each case, a column for each place.

    A cell: calls a second of fastlstm on its threads, as a share of those on one thread in the
    same place, and as a multiple of nn.LSTM's.
    """
    found = {_about(row): row for row in results.rows}
    lines = ["| case | " + " | ".join(PLACES) + " |", "|---|" + "---:|" * len(PLACES)]
    for case in CASES:
        rows = [[found.get((place, case, *one)) for one in CONTENDERS] for place in PLACES]
        lines.append(f"| {case} | " + " | ".join(_cell(*row) for row in rows) + " |")
    return "\n".join(lines)


def _cell(peer: Row | None, one: Row | None, two: Row | None) -> str:
    if not (peer and one and two):
        return ""
    share, times = two["worst"] / one["worst"], two["worst"] / peer["median"]
    return f"{two['worst']:,.0f} ({share:.2f}, {times:,.{1 if times < 10 else 0}f}x)"


def measure(
    place: str, cases: list[str], modules: list[str], seconds: float, repeat: int
) -> list[Row]:
    """A row for each case and contender in one place."""
    contenders = [one for one in CONTENDERS if one[0] in modules]
    where = PLACES[place]
    rates: dict[tuple[str, str, int], list[float]] = {}
    processes = fresh_processes()
    with ExitStack() as stack:
        for _ in range(where.busy):
            stack.enter_context(neighbour(processes))
        for name, asked in contenders * repeat:
            threads = where.threads or 2 if asked > 1 else 1
            with processes.Pool(where.workers) as workers:
                task = (name, threads, cases, seconds)
                for found in workers.starmap(run, [task] * where.workers, chunksize=1):
                    for case, rate in found.items():
                        rates.setdefault((case, name, asked), []).append(rate)
    return [
        {
            "case": case,
            "shape": list(CASES[case]),
            "place": place,
            "module": name,
            "asked": asked,
            "threads": where.threads or 2 if asked > 1 else 1,
            "rates": found,
            "worst": min(found),
            "median": statistics.median(found),
        }
        for (case, name, asked), found in rates.items()
    ]


def fresh_processes() -> Any:
    """Where processes come from: copies of one that has imported all and computed nothing."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload([__name__])
    return found


@contextmanager
def neighbour(processes: Any) -> Iterator[None]:
    """A process that is never idle."""
    process = processes.Process(target=spin, daemon=True)
    process.start()
    try:
        yield
    finally:
        process.terminate()
        process.join()


def spin() -> None:
    """Runs for ever."""
    while True:
        pass


def run(name: str, threads: int, cases: list[str], seconds: float) -> dict[str, float]:
    """Calls a second of each case, in this process."""
    torch.set_num_threads(threads)
    found = {}
    for case in cases:
        call = make_call(MODULES[name], CASES[case])
        call()
        count, begin = 0, time.perf_counter()
        while (passed := time.perf_counter() - begin) < seconds:
            call()
            count += 1
        found[case] = count / passed
    return found


def make_call(kind: Callable[..., nn.Module], shape: Shape) -> Callable[[], object]:
    """One call, with its backward pass where the case trains."""
    torch.manual_seed(0)
    module = kind(shape.I, shape.H, shape.L)
    x: Any = torch.randn(shape.T, shape.B, shape.I)
    if shape.packed:
        lengths = torch.linspace(shape.T, shape.T // 3, shape.B).long()
        x = pack_padded_sequence(x, lengths)
    weights = list(module.parameters())
    incoming: list[Tensor] = []

    def infer() -> object:
        with torch.inference_mode():
            return module(x)

    def train() -> object:
        y = module(x)[0]
        y = y if isinstance(y, Tensor) else y.data
        if not incoming:  # made once: a loss would be an operator of torch's on threads of its own
            incoming.append(torch.ones_like(y))
        return torch.autograd.grad(y, weights, incoming)

    return train if shape.trains else infer
