"""From PTX to a Python function: `kernel(block, P)`, a generator that yields where it waits."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from . import (
    arithmetic,
    control,
    conversions,
    data_movement,
    floats,
    integers,
    matrices,
    messages,
    products,
)
from .faults import Fault
from .instruction import lines_of
from .parse import Source, parse
from .types import F32, U16, U32, U64

OPCODE_FILES = (integers, floats, conversions, control, data_movement, matrices, messages)
_ZEROS = {
    "p": "np.zeros(N, bool)",
    "rs": "np.zeros(N, U16)",
    "r": "np.zeros(N, U32)",
    "f": "np.zeros(N, U32)",
    "rd": "np.zeros(N, U64)",
}
_NAMES = {"np": np, "Fault": Fault}
_NAMES |= {"U16": U16, "U32": U32, "U64": U64, "F32": F32}
# What all threads of a warp or of a block come to together, where branches divide them.
_OF_A_WARP = r"(mma|ldmatrix|stmatrix|shfl|redux|elect|bar\.warp)\b"
_OF_A_BLOCK = r"(bar\.sync|barrier|cp\.async\.(commit|wait)_group|mbarrier\.try_wait)\b"


class Kernel:
    """A kernel, ready to run.

    `divides`: its branches may divide a block. Those of Triton's kernels never do.

    Raises:
        Unknown: it has an instruction that the emulator has not learned.
    """

    def __init__(self, ptx: str, name: str, divides: bool = False) -> None:
        self.divides = divides
        self.source: Source = parse(ptx, name)
        self.python = _python(self.source, divides)
        space: dict[str, Any] = {**vars(arithmetic), **vars(products), **_NAMES}
        exec(compile(self.python, f"<ptx {name}>", "exec"), space)
        self.run: Callable[[Any, Any], Iterator[None]] = space["kernel"]


def _python(source: Source, divides: bool) -> str:
    blocks, labels = _basic_blocks(source, divides)
    lines = [
        "def kernel(block, P):",
        " if False: yield",
        " N, memory, shared = block.threads, block.memory, block.shared",
        " ONE = np.ones(N, bool)",
        " TID = np.arange(N, dtype=U32)",
        " SMEM, SMEM64 = np.zeros(N, U32), np.zeros(N, U64)",
        " flow, ACT = block.flow, None",
    ]
    for i, axis in enumerate("xyz"):
        lines.append(f" CTAID_{axis} = np.full(N, block.index[{i}], U32)")
        lines.append(f" NCTAID_{axis} = np.full(N, block.grid[{i}], U32)")
    lines += _registers(source)
    lines += [" pc = 0", " while True:"]
    for number, block in enumerate(blocks):
        lines.append(f"  if pc == {number}:")
        if divides:
            lines += [f"   {line}" for line in _divided(number, block, labels)]
            continue
        lines += [f"   {line}" for text in block for line in lines_of(text, labels)]
        lines.append(f"   pc = {number + 1}")
    lines.append(f"  if pc >= {len(blocks)}: return")
    return "\n".join(lines)


def _divided(number: int, block: list[str], labels: dict[str, int]) -> Iterator[str]:
    """A basic block twice: for all threads, and for the threads ACT."""
    first = block[0] if block else ""
    if re.match(f"{_OF_A_WARP}|{_OF_A_BLOCK}", first):
        whole = re.match(_OF_A_BLOCK, first) is not None
        yield f"if ACT is not None: pc, ACT = flow.together({number}, ACT, {whole})"
        yield f"if pc != {number}: continue"
    yield "if ACT is None:"
    yield from (f" {line}" for text in block for line in lines_of(text, labels))
    yield f" pc = {number + 1}"
    yield "else:"
    yield from (f" {line}" for text in block for line in lines_of(text, labels, divided=True))
    yield f" pc, ACT = flow.divide(ACT, True, {number + 1}, {number + 1})"


def _basic_blocks(source: Source, divides: bool) -> tuple[list[list[str]], dict[str, int]]:
    """Instructions between labels and branches, and the block that a label stands before.

    Where branches divide, what threads come to together begins a block too.
    """
    blocks: list[list[str]] = [[]]
    labels = {}
    for kind, text in source.lines:
        if kind == "label":
            blocks.append([])
            labels[text] = len(blocks) - 1
            continue
        if divides and re.match(f"{_OF_A_WARP}|{_OF_A_BLOCK}", text):
            blocks.append([])
        blocks[-1].append(text)
        if re.match(r"(@!?%p\d+\s+)?(bra|ret)\b", text):
            blocks.append([])
    return blocks, labels


def _registers(source: Source) -> list[str]:
    """Lines that make every register; forty a line, since Python limits the depth of a line."""
    text = "\n".join(text for kind, text in source.lines if kind == "op")
    found = sorted(set(re.findall(r"%(p|rs|rd|r|f)(\d+)\b", text)))
    lines = []
    for kind, zeros in _ZEROS.items():
        names = [f"{k}{n}" for k, n in found if k == kind]
        for at in range(0, len(names), 40):
            lines.append(f" {' = '.join(names[at : at + 40])} = {zeros}")
    return lines
