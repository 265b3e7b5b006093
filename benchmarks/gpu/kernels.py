"""`python -m benchmarks kernels`: compiles the GPU kernels ahead of time and shows what came out.

No GPU is needed. Every variant of the kernels that the configuration can choose is compiled for
each GPU and disassembled. The table shows the registers of a thread; spilled bytes, which are the
stack frame of a thread; the shared memory of a program; and of the time loop the cycles that its
instructions take one after the other (stall), the barriers, special functions (mufu), matrix
instructions (mma, on Hopper wgmma), shuffles and stores into other blocks (sends) of a step. False
waits are instructions that wait for a load from global memory without using it: the compiler lets
it share a scoreboard, of which a warp has six, with something shorter that they do use.
Instructions are counted as they stand in the code: where the weights do not stay on chip, the time
loop contains a loop over chunks of them, whose instructions run once for each chunk.
"""

from __future__ import annotations

import argparse
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue
from tempfile import TemporaryDirectory
from typing import Any

from .. import BenchmarkError
from ..speed.environment import environment
from ..speed.worker import Failed, Worker
from . import cuda_kernels
from .triton_kernels import compile_variant
from .variants import DTYPES, PROCESSORS, Variant, layers, sample, variants

Row = dict[str, Any]
STDOUT = Path("-")
PROCESSES = 2
TIMEOUT = 300  # seconds for one kernel; the slowest takes a few
COLUMNS = {
    "kernel": "kernel",
    "arch": "sm",
    "regime": "regime",
    "dtype": "dtype",
    "precision": "",
    "training": "mode",
    "I": "I",
    "H": "H",
    "P": "P",
    "D": "D",
    "rows": "rows",
    "states": "states",
    "cell": "cell",
    "units": "units",
    "N": "N",
    "fused": "fused",
    "resident": "resident",
    "warps": "warps",
    "registers": "registers",
    "spill_bytes": "spilled",
    "shared_bytes": "shared",
    "stall_per_step": "stall",
    "false_waits_per_step": "false waits",
    "barriers_per_step": "barriers",
    "mufu_per_step": "mufu",
    "mma_per_step": "mma",
    "wgmma_per_step": "wgmma",
    "shuffles_per_step": "shuffles",
    "sends_per_step": "sends",
    "waits_per_step": "waits",
    "compile_seconds": "compiled, s",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `kernels`."""
    add = parser.add_argument
    add(
        "--backend", choices=["triton", "cuda"], default="triton",
        help="the backend whose kernels to compile (default: triton)",
    )  # fmt: skip
    add(
        "--arch", nargs="+", type=int, choices=PROCESSORS, default=[80, 90],
        help="compute capabilities, 10 * major + minor (default: 80 90)",
    )  # fmt: skip
    add(
        "--dtype",
        nargs="+",
        choices=DTYPES,
        default=DTYPES,
        help="types of numbers (default: all)",
    )
    add(
        "--quick", action="store_true",
        help="triton: compile only for the shapes that are timed, and one of each kind of call",
    )  # fmt: skip
    add(
        "--sample", action="store_true",
        help="triton: of these, only the first of a kernel with a cell, type or kind of rows",
    )  # fmt: skip
    add(
        "--json", nargs="?", type=Path, const=STDOUT, metavar="FILE",
        help="write the rows to FILE; without one, to the standard output instead of the table",
    )  # fmt: skip
    add(
        "--library", action="store_true",
        help="cuda: read the installed library instead of compiling",
    )  # fmt: skip
    add(
        "--asm",
        type=Path,
        metavar="DIR",
        help="write the machine code of each kernel to DIR (triton: PTX too)",
    )


def main(args: argparse.Namespace) -> int:
    """Compile, print the table and write the rows; raises if a kernel does not compile."""
    _check()
    if args.asm:
        args.asm.mkdir(parents=True, exist_ok=True)
    facts = environment()
    compiled = _cuda(args) if args.backend == "cuda" else _triton(args)
    rows: list[Row] = []
    failures: list[str] = []
    for what, outcome in compiled:
        if isinstance(outcome, Failed):
            failures.append(f"{what}: {outcome}")
        else:
            rows += outcome
    if args.json != STDOUT:
        print(", ".join(f"{name} {value}" for name, value in facts.items() if value is not None))
        print(table(rows))
    text = json.dumps([row | facts for row in rows], indent=1)
    if args.json == STDOUT:
        print(text)
    elif args.json:
        args.json.write_text(text + "\n")
    if failures:
        raise BenchmarkError("\n".join([f"{len(failures)} did not compile:", *failures]))
    return 0


def _triton(args: argparse.Namespace) -> Iterator[tuple[Variant, list[Row] | Failed]]:
    wanted = layers(args.dtype, args.quick)
    with fresh_compiler(), ExitStack() as stack:
        workers = [stack.enter_context(Worker(probe=int)) for _ in range(PROCESSES)]
        found = workers[0].run(variants, wanted, args.arch, timeout=TIMEOUT)
        found = sample(found) if args.sample else found
        for variant, outcome in _progress(_compile(found, workers, args.asm), len(found)):
            failed = isinstance(outcome, Failed)
            yield variant, outcome if failed else [variant.facts | outcome]


def _cuda(args: argparse.Namespace) -> Iterator[tuple[str, list[Row] | Failed]]:
    if args.library:
        cuda_kernels.check_plans()
        wanted = [("", arch) for arch in args.arch]
    else:
        wanted = cuda_kernels.compilations(args.arch)

    def run(source: str, arch: int) -> tuple[str, list[Row] | Failed]:
        what = f"{source}.cu, arch {arch}" if source else f"arch {arch}"
        try:
            if source:
                rows = cuda_kernels.compile_source(source, arch, args.asm)
            else:
                rows = cuda_kernels.read_library(arch, args.asm)
        except Failed as error:
            return what, error
        return what, [row for row in rows if row["dtype"] in args.dtype]

    with ThreadPoolExecutor(PROCESSES) as threads:
        yield from _progress(threads.map(run, *zip(*wanted, strict=True)), len(wanted), "file")


def _check() -> None:
    if find_spec("triton") is None:
        raise BenchmarkError("the package triton is missing (pip install triton, on Linux)")
    from triton import knobs

    try:
        _ = knobs.nvidia.cuobjdump.path
    except RuntimeError as error:
        raise BenchmarkError(
            f"{error}: it comes with Triton's wheel, or set TRITON_CUOBJDUMP_PATH"
        ) from error


@contextmanager
def fresh_compiler() -> Iterator[None]:
    """Processes started in this block compile, and from nothing, whatever this one has set."""
    before = dict(os.environ)
    with TemporaryDirectory() as cache:
        os.environ |= {"TRITON_CACHE_DIR": cache, "TRITON_INTERPRET": "0"}
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)


def _compile(
    wanted: list[Variant], workers: list[Worker], folder: Path | None
) -> Iterator[tuple[Variant, Row | Failed]]:
    """In order. One that brings its process down, as an assertion of LLVM does, is one failure."""
    idle: SimpleQueue[Worker] = SimpleQueue()
    for worker in workers:
        idle.put(worker)

    def run(number: int) -> Row | Failed:
        worker = idle.get()
        keep = folder / f"{number:04}" if folder else None
        try:
            figures: Row = worker.run(_quietly, wanted[number], keep, timeout=TIMEOUT)
        except Failed as error:
            return error
        finally:
            idle.put(worker)
        return figures | ({"asm": keep.name} if keep else {})

    with ThreadPoolExecutor(len(workers)) as threads:
        yield from zip(wanted, threads.map(run, range(len(wanted))), strict=True)


def _quietly(variant: Variant, keep: Path | None) -> Row:
    warnings.simplefilter("ignore")  # of the compiler about its own future
    return compile_variant(variant, keep)


def _progress(results: Iterable[Any], total: int, unit: str = "kernel") -> Iterable[Any]:
    if find_spec("tqdm") is None:
        return results
    from tqdm import tqdm

    return tqdm(results, "kernels", total, unit=unit, disable=None, leave=False)


def table(rows: list[Row]) -> str:
    """One line for each kernel, and what it comes to."""
    if not rows:
        return "no kernels"
    columns = [name for name in COLUMNS if name in rows[0]]
    lines = [[COLUMNS[name] for name in columns]]
    lines += [[_cell(name, row[name]) for name in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    justify: list[Callable[[str, int], str]] = [
        str.rjust if isinstance(rows[0][name], int) else str.ljust for name in columns
    ]
    text = [
        "  ".join(f(cell, width) for f, cell, width in zip(justify, line, widths, strict=True))
        for line in lines
    ]
    spilled = sum(row["spill_bytes"] > 0 for row in rows)
    end = f"{len(rows)} kernels, {spilled} that spill"
    if all(row["compile_seconds"] is not None for row in rows):
        seconds = sum(row["compile_seconds"] for row in rows)
        end += f"; compiled in {seconds:,.0f} s of a processor"
    return "\n".join(line.rstrip() for line in [*text, "", end])


def _cell(name: str, value: Any) -> str:
    if name == "training":
        return "train" if value else "infer"
    if isinstance(value, bool):
        return name if value else ""
    if value is None:
        return ""
    if name == "kernel":
        return str(value).removesuffix("_kernel")
    return f"{value:,}" if isinstance(value, int | float) else str(value)
