"""Cases through executed PTX, of Triton's kernels and of the CUDA C++ ones.

For tests/test_executed.py and its relatives, in a process that does not interpret and has not
loaded the emulator of csrc/cuda.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock

import torch
from cases import Case, Results, draw, evaluate, fast, plain, stepwise
from oracle import complaints, judge, measure, outcomes, with_products
from ptx.banks import Wavefronts
from ptx.faults import Fault

from benchmarks.speed.precision import PRECISIONS
from fastlstm.kernels.triton.config import override

if TYPE_CHECKING:
    from ptx.backend import Log


class Run(NamedTuple):
    """A case, and how Triton's kernels are executed."""

    case: Case
    precision: str
    arch: int
    regime: str | None = None
    tile: tuple[int, int] | None = None  # sequences and warps of a program

    def __str__(self) -> str:
        regime = f"-{self.regime}" if self.regime else ""
        tile = f"-{self.tile[0]}x{self.tile[1]}" if self.tile else ""
        return f"sm_{self.arch}-{self.precision}{regime}{tile}-{self.case}"

    @contextmanager
    def executed(self, edit: Callable[[str], str]) -> Iterator[Log]:
        """Serve the calls of this block."""
        from ptx.backend import executed  # it needs Triton, tests are collected without

        wishes: dict[str, Any] = {"regime": self.regime} if self.regime else {}
        if self.tile:
            wishes["batch"], wishes["warps"] = self.tile
        with override(**wishes), executed(self.arch, edit) as log:
            yield log


class CudaRun(NamedTuple):
    """A case, and how the CUDA C++ kernels are executed."""

    case: Case
    precision: str
    arch: int
    wishes: dict[str, Any]  # as plan.override() takes them
    library: Path | None = None  # the host's part: see cuda_stub.py

    def __str__(self) -> str:
        wishes = "-".join(str(value) for value in self.wishes.values())
        return f"sm_{self.arch}-{self.precision}-{wishes}-{self.case}"

    def executed(self, edit: Callable[[str], str]) -> AbstractContextManager[Log]:
        """Serve the calls of this block."""
        from ptx.cuda import executed

        assert self.library is not None
        tf32 = PRECISIONS[self.precision].tf32
        return executed(self.library, self.arch, edit, tf32=tf32, **self.wishes)


class AheadRun(NamedTuple):
    """A case, and how kernels that were compiled ahead are executed."""

    case: Case
    precision: str
    arch: int
    library: Path | None = None  # csrc/triton on a stand-in for the driver: see ahead_host.py
    processors: int = 132

    def __str__(self) -> str:
        size = f"-{self.processors}" if self.processors != 132 else ""
        return f"sm_{self.arch}{size}-{self.precision}-{self.case}"

    def executed(self, edit: Callable[[str], str]) -> AbstractContextManager[Log]:
        """Serve the calls of this block."""
        from ptx.ahead import executed

        assert self.library is not None
        folder = self.library.parent / f"kernels_{self.arch}"
        return executed(self.library, folder, self.arch, edit, self.processors)


AnyRun = Run | CudaRun | AheadRun


class Verdict(NamedTuple):
    """What came out."""

    ratio: float  # the largest error of all tensors, as a part of what is allowed
    complaints: list[str]
    kernels: set[str]
    races: set[tuple[str, str, str]]


@contextmanager
def executing(run: AnyRun, edit: Callable[[str], str] = str) -> Iterator[Log]:
    """Execute in the precision and regime of a run, on memory that begins as NaN."""
    torch.set_num_threads(1)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    with PRECISIONS[run.precision].applied(), run.executed(edit) as log:
        yield log


def judged(run: AnyRun) -> Verdict:
    """Execute a case and hold it against the oracle, training and inferring."""
    case, precision = run.case, PRECISIONS[run.precision]
    numbers = draw(case, precision.dtype)
    solver = stepwise if case.ragged else plain
    truth, allowed = judge(
        lambda d, n: evaluate(case, d, n, solver),
        precision.dtype,
        numbers,
        arithmetic=precision.eps if precision.tf32 else None,
    )
    with executing(run) as log:
        found = outcomes(case, precision.dtype, numbers)
    exceeded = any(complaints(got, truth, allowed) for got in found.values())
    if exceeded and not precision.tf32:  # as oracle.settle does: some products are PyTorch's
        allowed = with_products(case, precision.dtype, numbers, truth, allowed, "triton")
    ratio = 0.0
    for got in found.values():
        for name, error in measure(got, {name: truth[name] for name in got}).items():
            ratio = max(ratio, error / allowed[name] if error else 0.0)
    said = [line for got in found.values() for line in complaints(got, truth, allowed)]
    return Verdict(ratio, said, log.kernels, log.races)


def wavefronts(run: AnyRun) -> dict[tuple[str, str], Wavefronts]:
    """Those of the shared memory accesses of a case, training and inferring.

    By kernel and instruction.
    """
    dtype = PRECISIONS[run.precision].dtype
    with executing(run) as log:
        outcomes(run.case, dtype, draw(run.case, dtype))
    return {
        (kernel, where): each
        for kernel, banks in log.banks.items()
        for where, each in banks.by_instruction().items()
    }


def wavefronts_unswizzled(run: Run) -> dict[tuple[str, str], Wavefronts]:
    """The same, where columns of the state simply follow each other in shared memory.

    For a process that has compiled nothing yet: a compiler does not look at this again.
    """
    from fastlstm.kernels.triton import register_products
    from fastlstm.kernels.triton.gluon import gl, gluon

    @gluon.constexpr_function
    def plain(U: int, pair: int) -> object:
        return gl.SwizzledSharedLayout(4 * pair, 1, 1, [0, 1])

    with mock.patch.object(register_products, "state_layout", plain):
        return wavefronts(run)


class Broken(NamedTuple):
    """A place in the PTX of a kernel that was changed, and what gave that away."""

    place: str
    seen: str  # "" if nothing did


def broken(run: AnyRun, pattern: str, instead: str) -> list[Broken]:
    """Change the PTX of one pass at each match of a pattern in turn, and look what shows it."""
    sources: list[str] = []
    right, _ = _results(run, lambda ptx: sources.append(ptx) or ptx)
    found = []
    for source in dict.fromkeys(sources):
        for match in re.finditer(pattern, source):
            text = source[: match.start()] + match.expand(instead) + source[match.end() :]
            found.append(Broken(match[0], _seen(run, right, source, text)))
    return found


def _seen(run: AnyRun, right: Results, source: str, text: str) -> str:
    """What gives it away that `text` was executed instead of `source`."""
    try:
        got, log = _results(run, lambda ptx: text if ptx == source else ptx)
    except Fault as fault:
        return f"fault: {fault}"
    if log.races:
        return f"race: {min(log.races)}"
    same = all(torch.equal(got[name], value) for name, value in right.items())
    return "" if same else "other numbers"


def _results(run: AnyRun, edit: Callable[[str], str]) -> tuple[Results, Log]:
    """The outputs of a case whose PTX is edited, without gradients."""
    dtype = PRECISIONS[run.precision].dtype
    numbers = draw(run.case, dtype)
    with torch.inference_mode(), executing(run, edit) as log:
        return evaluate(run.case, dtype, numbers, fast), log
