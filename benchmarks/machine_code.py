"""Compiling a Triton kernel for a GPU that need not be there, and reading machine code."""

from __future__ import annotations

import re
import subprocess
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

from .variants import Variant

_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", re.MULTILINE)
_JUMP = re.compile(r"\bBRA\b.*\b0x([0-9a-f]+)")


def compile_variant(variant: Variant, keep: Path | None) -> dict[str, Any]:
    """Figures of one kernel; its PTX and machine code go to `keep` with other endings."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(import_module(variant.module), variant.kernel)
    names = kernel.arg_names
    source = ASTSource(
        kernel,
        dict(variant.signature),
        {(names.index(name),): value for name, value in variant.constants},
        {
            (names.index(name),): [["tt.divisibility", 16]]
            for name, kind in variant.signature
            if kind.startswith("*")
            and not kernel.params[names.index(name)].do_not_specialize_on_alignment
        },
    )
    target = GPUTarget("cuda", variant.arch, 32)
    start = perf_counter()
    compiled = triton.compile(source, target, dict(variant.options))
    seconds = perf_counter() - start
    with TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(compiled.asm["cubin"])
        text = disassembled(file)
    if keep:
        keep.with_suffix(".ptx").write_text(compiled.asm["ptx"])
        keep.with_suffix(".sass").write_text(text)
    # Without an `end` a launch is one step.
    steps = variant.facts["regime"] != "steps" or "end" in names
    loop = time_loop(text) if steps else instructions(text)
    return {
        **resources(text),
        "shared_bytes": compiled.metadata.shared,
        **counts(loop),
        "compile_seconds": round(seconds, 3),
    }


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
