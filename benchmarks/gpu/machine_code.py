"""Reading machine code: what a kernel uses, and what its time loop does."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", re.MULTILINE)
_JUMP = re.compile(r"\bBRA\b.*\b0x([0-9a-f]+)")


def resources(text: str) -> dict[str, int]:
    """From the line of resource usage. A stack frame is where spilled registers are kept."""

    def resource(name: str) -> int:
        found = re.search(rf"\b{name}:(\d+)", text)
        if found is None:
            raise ValueError(f"cuobjdump does not say {name}")
        return int(found[1])

    return {"registers": resource("REG"), "spill_bytes": resource("STACK")}


def counts(loop: list[str]) -> dict[str, int]:
    """Of the instructions of a step, as they stand in the code."""
    return {
        "barriers_per_step": count(r"\bBAR\.(SYNC|RED)", loop),
        "mma_per_step": count(r"\bH(G)?MMA\b", loop),
        "spills_per_step": count(r"\b(LDL|STL)\b", loop),
        "wgmma_per_step": count(r"\bHGMMA\b", loop),
        "instructions_per_step": len(loop),
    }


def instructions(sass: str) -> list[str]:
    """All of a kernel."""
    return [text for _, text in _INSTRUCTION.findall(sass)]


def time_loop(sass: str) -> list[str]:
    """The instructions of the longest loop of a kernel, those of loops inside it included.

    What is seldom done, as the second try of a wait, is put behind the end of the kernel: a jump
    from there back into a loop is not its end.
    """
    code = [(int(address, 16), text) for address, text in _INSTRUCTION.findall(sass)]
    ends = [address for address, text in code if text == "EXIT"]
    loops = [
        (int(jump[1], 16), address)
        for address, text in code
        if (jump := _JUMP.search(text)) and int(jump[1], 16) < address
    ]
    loops = [(first, last) for first, last in loops if not any(first < end < last for end in ends)]
    if not loops:
        raise ValueError("the machine code has no loop")
    first, last = max(loops, key=lambda loop: loop[1] - loop[0])
    return [text for address, text in code if first <= address <= last]


def count(pattern: str, instructions: list[str]) -> int:
    """How many match."""
    return sum(re.search(pattern, text) is not None for text in instructions)


def disassembled(file: Path, *options: str) -> str:
    """Resource usage, then machine code, of all kernels in a file."""
    from triton import knobs

    dump = ["--dump-resource-usage", "--dump-sass"]
    command = [knobs.nvidia.cuobjdump.path, *dump, *options, str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
