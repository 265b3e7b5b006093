"""Compiling the CUDA C++ kernels for GPUs that need not be there, and reading what came out."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

from fastlstm import extension
from fastlstm.kernels.cuda.library import cuda_plan

from .. import BenchmarkError
from ..speed.worker import Failed
from .machine_code import count, counts, disassembled, resources, time_loop
from .variants import PROCESSORS

Row = dict[str, Any]
FOLDER = Path(__file__).parents[2] / "csrc/cuda"
SOURCES = {
    "block": 80,
    "grid": 80,
    "cluster": 90,
    "wide": 90,
}  # a regime each, and the first GPUs that have it
# As the planner numbers them, csrc/cuda/plan.h.
REGIMES = ("block", "cluster", "grid", "wide")
KINDS = {
    "bf16": ("bfloat16", None),
    "f16": ("float16", None),
    "tf32": ("float32", "tf32"),
    "exact": ("float32", "ieee"),
}
SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10}  # that a block may use
WIDEST = 4096  # H
_NAME = re.compile(r"lstm_(fwd|bwd)_([a-z]+)_([a-z0-9]+)_n(\d+)_r(\d+)(?:_dense)?")


def nvcc() -> list[str]:
    """The compiler, wherever setup.py would find it."""
    homes = [home for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    path = [os.environ.get("PATH", os.defpath), *(f"{home}/bin" for home in homes)]
    found = os.environ.get("CUDACXX") or shutil.which("nvcc", path=os.pathsep.join(path))
    if not found:
        raise BenchmarkError(
            "there is no nvcc: install the CUDA toolkit, or name its nvcc in the environment "
            "variable CUDACXX"
        )
    return shlex.split(found)


def compilations(archs: list[int]) -> list[tuple[str, int]]:
    """Each source and GPU that there is a compilation for."""
    nvcc()
    check_plans()
    return [(source, arch) for arch in archs for source, least in SOURCES.items() if arch >= least]


def check_plans() -> None:
    """Raises BenchmarkError where there is nobody to ask for plans."""
    if extension.error() is not None:
        raise BenchmarkError(f"plans are in the compiled extension: {extension.error()}")


def read_library(arch: int, keep: Path | None) -> list[Row]:
    """A row for each kernel for that GPU in the library that is installed. Raises Failed."""
    library = extension.cuda_library()
    if library is None:
        raise Failed("no library has been built: leave out --library, to compile")
    text = disassembled(library, f"--gpu-architecture=sm_{arch}")
    rows = _rows(dict(_kernels(text)), arch, None, keep)
    if not rows:
        raise Failed("the library that is installed has no code for it")
    return rows


def compile_source(source: str, arch: int, keep: Path | None) -> list[Row]:
    """A row for each kernel; its machine code goes to the folder `keep`. Raises Failed.

    The compiler's time is shared out evenly among the kernels of a source.
    """
    with TemporaryDirectory() as folder:
        cubin = Path(folder, "kernels.cubin")
        command = [*nvcc(), "-std=c++17", "-O3", "-cubin", f"-arch=sm_{arch}", "-o", str(cubin)]
        start = perf_counter()
        done = subprocess.run([*command, f"{FOLDER / source}.cu"], capture_output=True, text=True)
        seconds = perf_counter() - start
        if done.returncode != 0:
            errors = (line for line in done.stderr.splitlines() if "error" in line)
            raise Failed(next(errors, f"nvcc: exit status {done.returncode}"))
        kernels = dict(_kernels(disassembled(cubin)))
    return _rows(kernels, arch, round(seconds / len(kernels), 3), keep)


def _rows(
    kernels: dict[str, str], arch: int, seconds: float | None, keep: Path | None
) -> list[Row]:
    rows = []
    for name, text in kernels.items():
        rows.append(_row(name, arch, text) | {"compile_seconds": seconds})
        if keep:
            rows[-1]["asm"] = f"{name}.sm_{arch}"
            (keep / f"{name}.sm_{arch}.sass").write_text(text)
    return rows


def _kernels(text: str) -> Iterator[tuple[str, str]]:
    """The name of each kernel, and its resources and machine code, as the source has them."""
    usage = dict(re.findall(r"^ Function (\w+):\n(.*)\n", text, re.MULTILINE))
    _, *parts = re.split(r"^\s*Function : (\w+)\n", text, flags=re.MULTILINE)
    for name, code in reversed([*zip(parts[::2], parts[1::2], strict=True)]):
        yield name, f"{usage[name]}\n{code}"


def _row(name: str, arch: int, text: str) -> Row:
    named = _NAME.fullmatch(name)
    if named is None:
        raise Failed(f"{name} is not the name of a kernel")
    way, regime, kind, tiles, resident = named.groups()
    dtype, precision = KINDS[kind]
    N = 8 * int(tiles)
    block = largest(arch).get((regime, kind, way, N, int(resident)))
    shared_bytes, warps, H = block or (None, None, None)
    loop = time_loop(text)
    return {
        "kernel": name,
        "arch": arch,
        "regime": regime,
        "dtype": dtype,
        "precision": precision,
        "H": H,
        "N": N,
        "resident": int(resident),
        "warps": warps,
        **resources(text),
        "shared_bytes": shared_bytes,
        **counts(loop),
        "ffma_per_step": count(r"\bFFMA\b", loop),
        "copies_per_step": count(r"\bLDGSTS\b", loop),
        "waits_per_step": count(r"\bSYNCS\.\S*TRYWAIT\b", loop),
    }


@cache
def largest(arch: int) -> dict[tuple[str, str, str, int, int], tuple[int, int, int]]:
    """Shared memory and warps of the largest block that any plan gives to a kernel, and H.

    By regime, kind, pass, sequences and tiles of weights in registers; of all H, whether a regime
    is the planner's own choice or forced upon it.
    """
    extension.load()
    clusters = 16 if arch >= SOURCES["cluster"] else 1
    device = [arch, PROCESSORS[arch], SHARED_BYTES[arch], clusters]
    wishes = product(range(-1, len(REGIMES)), (8, 16))
    found: dict[tuple[str, str, str, int, int], tuple[int, int, int]] = {}
    calls = product(enumerate(KINDS), (False, True), range(16, WIDEST + 1, 16), wishes)
    for (number, kind), backward, H, (regime, N) in calls:
        plan = cuda_plan(number, backward, 1, H, 1, device, [regime, 0, N])
        if not plan:
            continue  # no room
        way = "bwd" if backward else "fwd"
        used, batch, _, tiles, parts, resident, _, shared_bytes, *_ = plan
        key = REGIMES[used], kind, way, batch, resident
        before = found.get(key, (0, 0, 0))
        now = shared_bytes, tiles * parts, H
        found[key] = max(before[0], now[0]), max(before[1], now[1]), max(before[2], now[2])
    return found
