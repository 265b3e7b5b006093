"""Reading machine code: what a kernel uses, and what its time loop does."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

# An address, an instruction, and in a line of its own the upper half of its 128 bits.
_INSTRUCTION = re.compile(
    r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;\s+/\* 0x[0-9a-f]+ \*/"
    r"(?:\n\s+/\* 0x([0-9a-f]+) \*/)?",
    re.MULTILINE,
)
_STALL_BIT = 41  # of an instruction's upper half: from here 4 bits, on sm_70 to sm_90
_JUMP = re.compile(r"\bBRA\b.*\b0x([0-9a-f]+)")


class Instruction(NamedTuple):
    """An instruction of a kernel."""

    address: int
    text: str
    stall: int  # cycles that the compiler lets the warp wait before the next one, at least


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


def whole(number: float) -> float:
    """Return an integer where it is one."""
    return int(number) if number == int(number) else number


def instructions(sass: str) -> list[Instruction]:
    """All of a kernel."""
    return [
        Instruction(int(address, 16), text, int(upper or "0", 16) >> _STALL_BIT & 15)
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
