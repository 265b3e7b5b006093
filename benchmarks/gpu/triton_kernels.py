"""Compiling a Triton kernel for a GPU that need not be there, and reading what came out."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

from .machine_code import counts, disassembled, instructions, resources, time_loop
from .variants import Variant

WITHOUT_LOOP = "steps", "inputs"  # over time steps: all of the code is counted
STEPS_A_TURN = {"registers": 2, "cluster": 2}  # of the time loop; in other regimes one


def compile_variant(variant: Variant, keep: Path | None) -> dict[str, Any]:
    """Figures of one kernel; its PTX and machine code go to `keep` with other endings."""
    import triton
    from triton.backends.compiler import GPUTarget

    from fastlstm.kernels.triton.gluon import source_of

    kernel = getattr(import_module(variant.module), variant.kernel)
    names = kernel.arg_names
    source = source_of(kernel)(
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
    loop = instructions(text) if variant.facts["regime"] in WITHOUT_LOOP else time_loop(text)
    return {
        **resources(text),
        "shared_bytes": compiled.metadata.shared,
        **counts(loop, STEPS_A_TURN.get(variant.facts["regime"], 1)),
        "compile_seconds": round(seconds, 3),
    }
