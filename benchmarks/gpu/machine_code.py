"""Reading machine code: what a kernel uses, and what its time loop does."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# An address, an instruction, and in a line of its own the upper half of its 128 bits.
_INSTRUCTION = re.compile(
    r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;\s+/\* 0x[0-9a-f]+ \*/"
    r"(?:\n\s+/\* 0x([0-9a-f]+) \*/)?",
    re.MULTILINE,
)
_CONTROL_BIT = 41  # of an instruction's upper half: from here on, on sm_70 to sm_90
_JUMP = re.compile(r"\bBRA\b.*\b0x([0-9a-f]+)")
_GUARD = re.compile(r"^@\S+\s+")
_SCOREBOARDS = 6  # of a warp


class Instruction(NamedTuple):
    """An instruction of a kernel."""

    address: int
    text: str
    control: int  # what the compiler tells the scheduler

    @property
    def stall(self) -> int:
        """Cycles that the warp waits before the next one, at least."""
        return self.control & 15

    @property
    def counted_by(self) -> int:
        """The scoreboard that counts it until its result is there; 7: none."""
        return self.control >> 5 & 7

    @property
    def waits_for(self) -> list[int]:
        """The scoreboards that must have nothing to count when it starts."""
        return [number for number in range(_SCOREBOARDS) if self.control >> 11 + number & 1]

    @property
    def is_load(self) -> bool:
        """Whether it loads from global memory into registers."""
        return _GUARD.sub("", self.text).startswith("LDG.")

    @property
    def registers(self) -> list[set[int]]:
        """The registers of each operand; the first is the result, of a load."""
        opcode, _, operands = _GUARD.sub("", self.text).partition(" ")
        return [
            {int(first) + i for first in re.findall(r"\bR(\d+)", operand) for i in range(width)}
            for operand, width in _widths(opcode, operands.split(","))
        ]


def _widths(opcode: str, operands: list[str]) -> Iterator[tuple[str, int]]:
    """Each operand, and how many registers it takes, of which an instruction names the first."""
    wide = re.search(r"\.(128|64|WIDE|[24])\b", opcode)
    usual = {"128": 4, "4": 4}.get(wide[1], 2) if wide else 1
    for place, operand in enumerate(operands):
        if "[" in operand:  # an address
            yield operand, 2 if ".64" in operand else 1
        else:
            yield operand, 2 + 2 * (place != 2) if opcode.startswith("HMMA") else usual


def resources(text: str) -> dict[str, int]:
    """From the line of resource usage. A stack frame is where spilled registers are kept."""

    def resource(name: str) -> int:
        found = re.search(rf"\b{name}:(\d+)", text)
        if found is None:
            raise ValueError(f"cuobjdump does not say {name}")
        return int(found[1])

    return {"registers": resource("REG"), "spill_bytes": resource("STACK")}


def counts(loop: list[Instruction], steps: int = 1) -> dict[str, float]:
    """Of the instructions of a step, as they stand in the code; the loop takes so many `steps`.

    ``stall_per_step`` is what they take one after the other in one warp, without what they wait
    for: a lower bound, of a loop without branches. A product of matrices in shared memory (wgmma)
    takes much longer than its stall says.
    """
    found = {
        "stall_per_step": sum(max(each.stall, 1) for each in loop),
        "false_waits_per_step": false_waits(loop),
        "barriers_per_step": count(r"\bBAR\.(SYNC|RED)", loop),
        "mma_per_step": count(r"\bH(G)?MMA\b", loop),
        "spills_per_step": count(r"\b(LDL|STL)\b", loop),
        "wgmma_per_step": count(r"\bHGMMA\b", loop),
        "mufu_per_step": count(r"\bMUFU\b", loop),
        "shuffles_per_step": count(r"\bSHFL\b", loop),
        "sends_per_step": count(r"\bSTAS\b", loop),
        "instructions_per_step": len(loop),
    }
    return {name: whole(number / steps) for name, number in found.items()}


def false_waits(loop: list[Instruction]) -> int:
    """How many instructions wait for a global load of the loop and do not use what it loads.

    A warp has few scoreboards, so one may count a load and also something short that an
    instruction uses: it then waits for both. What a turn of the loop has loaded may still be on
    its way in the next, so the second of two turns is counted.
    """
    loads: dict[int, list[Instruction]] = {}  # on their way, by scoreboard
    found = 0
    for number, each in enumerate([*loop, *loop]):
        used = set[int]().union(*each.registers)
        waited = [loads.pop(board) for board in each.waits_for if board in loads]
        if number >= len(loop):
            found += any(not any(load.registers[0] & used for load in some) for some in waited)
        if each.is_load:
            loads.setdefault(each.counted_by, []).append(each)
    return found


def whole(number: float) -> float:
    """Return an integer where it is one."""
    return int(number) if number == int(number) else number


def instructions(sass: str) -> list[Instruction]:
    """All of a kernel."""
    return [
        Instruction(int(address, 16), text, int(upper or "0", 16) >> _CONTROL_BIT)
        for address, text, upper in _INSTRUCTION.findall(sass)
    ]


def time_loop(sass: str) -> list[Instruction]:
    """The instructions of the longest loop of a kernel, those of loops inside it included.

    What is seldom done, as the second try of a wait, is put behind the end of the kernel: a jump
    from there back into a loop is not its end.
    """
    code = instructions(sass)
    ends = [each.address for each in code if each.text == "EXIT"]
    loops = [
        (int(jump[1], 16), each.address)
        for each in code
        if (jump := _JUMP.search(each.text)) and int(jump[1], 16) < each.address
    ]
    loops = [(first, last) for first, last in loops if not any(first < end < last for end in ends)]
    if not loops:
        raise ValueError("the machine code has no loop")
    first, last = max(loops, key=lambda loop: loop[1] - loop[0])
    return [each for each in code if first <= each.address <= last]


def count(pattern: str, instructions: list[Instruction]) -> int:
    """How many match."""
    return sum(re.search(pattern, each.text) is not None for each in instructions)


def disassembled(file: Path, *options: str) -> str:
    """Resource usage, then machine code, of all kernels in a file."""
    from triton import knobs

    dump = ["--dump-resource-usage", "--dump-sass"]
    command = [knobs.nvidia.cuobjdump.path, *dump, *options, str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
