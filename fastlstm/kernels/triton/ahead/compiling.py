"""Compiling one kernel ahead of time; a GPU need not be there. Needs Triton."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget

from fastlstm.kernels.triton.gluon import CLUSTER_PROBLEM, source_of
from fastlstm.kernels.triton.input_products import UNIT, tile
from fastlstm.kernels.triton.plan import compiler_options
from fastlstm.kernels.triton.weight_gradients import ELEMENTS, PARTS, tiles

from .keys import Key
from .plans import element_and_precision

__all__ = ["Image", "compiled", "interface", "problem"]

_KERNELS = {
    (False, "registers"): ("forward_registers", "lstm_fwd_registers_kernel"),
    (True, "registers"): ("backward_registers", "lstm_bwd_registers_kernel"),
    (False, "cluster"): ("forward_cluster", "lstm_fwd_cluster_kernel"),
    (True, "cluster"): ("backward_cluster", "lstm_bwd_cluster_kernel"),
    (False, "inputs"): ("input_products", "lstm_input_products_kernel"),
    (True, "parts"): ("weight_gradients", "lstm_weight_parts_kernel"),
    (True, "sums"): ("weight_gradients", "lstm_weight_sums_kernel"),
}
_OF_TRITON = 2  # pointers that it adds, to memory of its own that these kernels do not use
_POINTERS = {"bf16": "*bf16", "f16": "*fp16", "tf32": "*fp32", "exact": "*fp32"}
_FLOAT32 = ("c_all", "parts", "products")
_INTEGERS = {"offsets": "*i64", "lengths": "*i64", "reset": "*u8"}
_AT_RUN_TIME = (
    *("rows", "T", "B", "I", "H", "D", "x_t", "x_b", "dy_t", "dy_b", "dc_t", "dc_b"),
    *("starts", "splits"),
)
# Arguments that a kind of rows does not have.
_ABSENT = {
    "dense": ("offsets", "lengths", "reset", "dc_all"),
    "padded": ("offsets",),
    "packed": ("reset",),
}
# What arguments divide by: always, as they are tensors of our own; and where a key is even.
_ALIGNED = {"gates": 16, "dgates": 16, "parts": 16, "products": 16}
_EVEN = {"w_ih": 16, "w_hh": 16, "w_ih_reverse": 16, "w_hh_reverse": 16}
_EVEN |= {"y": 16, "c_all": 16, "dy": 8, "H": 8, "I": 2}
_EVEN |= dict.fromkeys(("x_t", "x_b", "dy_t", "dy_b"), 2)


class Image(NamedTuple):
    """A kernel for a GPU."""

    entry: str  # the name of the function in it
    arguments: list[tuple[str, int]]  # name and bytes of what it takes, in order
    shared: int  # bytes of shared memory of a block
    cubin: bytes
    ptx: bytes


def problem() -> str | None:
    """Say why kernels cannot be compiled here; None if they can."""
    return CLUSTER_PROBLEM


def compiled(key: Key, arch: int) -> Image:
    """Compile a kernel for GPUs of that compute capability.

    The same sources, Triton and key give the same bytes: no line of a file goes into them.
    """
    kernel = _kernel(key)
    signature, constants, attributes = _described(kernel, key)
    source = source_of(kernel)(kernel, signature, constants, attributes)
    options = compiler_options(key.regime, key.warps, blocks=key.blocks)
    knobs = triton.knobs.compilation
    before, knobs.disable_line_info = knobs.disable_line_info, True
    try:
        found = triton.compile(source, GPUTarget("cuda", arch, 32), options)
    finally:
        knobs.disable_line_info = before
    entry, arguments = interface(key)
    taken = _parameters(found.asm["ptx"], entry)
    if taken != len(arguments) + _OF_TRITON:
        own = f"{len(arguments)} and {_OF_TRITON} of Triton's own"
        raise ValueError(f"{key.name} takes {taken} arguments, expected {own}")
    shared, cubin, ptx = found.metadata.shared, found.asm["cubin"], found.asm["ptx"].encode()
    return Image(entry, arguments, shared, cubin, ptx)


def _parameters(ptx: str, entry: str) -> int:
    """Return how many arguments a function takes."""
    return ptx.partition(f".entry {entry}(")[2].partition(")")[0].count(".param ")


def interface(key: Key) -> tuple[str, list[tuple[str, int]]]:
    """Return the name of a kernel's function and its arguments; compiles nothing."""
    kernel = _kernel(key)
    signature, _, _ = _described(kernel, key)
    sizes = {name: 8 if kind.startswith("*") else 4 for name, kind in signature.items()}
    given = [(name, sizes[name]) for name, kind in signature.items() if kind != "constexpr"]
    return kernel.__name__, given


@cache
def _kernel(key: Key) -> Any:
    module, name = _KERNELS[key.back, key.regime]
    return getattr(import_module(f"fastlstm.kernels.triton.{module}"), name)


def _described(kernel: Any, key: Key) -> tuple[dict[str, str], dict[Any, Any], dict[Any, Any]]:
    """Return Triton's signature, constants and attributes of the arguments."""
    signature, constants, attributes = {}, {}, {}
    known = _constants(key)
    aligned = _ALIGNED | (_even(key) if key.even else {})
    if key.inputs and key.even:
        aligned["x"] = 4
    elif not key.inputs and key.regime != "inputs":
        aligned["x"] = 16
    for number, name in enumerate(kernel.arg_names):
        if name in known:
            signature[name], constants[(number,)] = "constexpr", known[name]
            continue
        signature[name] = _type(name, key)
        if name in aligned:
            attributes[(number,)] = [["tt.divisibility", aligned[name]]]
    return signature, constants, attributes


def _even(key: Key) -> dict[str, int]:
    """Return what arguments divide by, where sizes are even."""
    if key.regime != "inputs":
        return _EVEN
    element, _ = element_and_precision(key.kind)
    read = dict.fromkeys(("x", "w_ih", "w_ih_reverse"), UNIT * element)
    return read | dict.fromkeys(("I", "x_t", "x_b"), UNIT)


def _constants(key: Key) -> dict[str, Any]:
    """Return the arguments that are known when a kernel is compiled."""
    if key.regime == "inputs":
        element, precision = element_and_precision(key.kind)
        made = tile(element, precision)
        sizes: dict[str, Any] = {"ROWS": made.rows, "GATES": made.gates, "TERMS": made.terms}
        return sizes | {"STAGES": made.plan.stages, "PRECISION": precision, "X_UNIT": 1}
    if key.regime == "sums":
        return {"N": ELEMENTS, "SPLITS": PARTS}
    if key.regime == "parts":
        element, precision = element_and_precision(key.kind)
        cut = tiles(key.inputs, key.units, element)
        of_parts: dict[str, Any] = {
            "BIAS": True,
            "GATES": cut.gates,
            "X_TILE": cut.x,
            "H_TILE": cut.h,
        }
        return of_parts | {"ROWS": key.batch, "STAGES": cut.plan.stages, "PRECISION": precision}
    found: dict[str, Any] = dict.fromkeys(_ABSENT[key.rows])
    found |= {"N": key.batch, "FAST": key.kind == "bf16"}
    if key.regime == "cluster":
        found |= {"UNITS": key.units, "C": key.blocks}
    else:
        found |= {"U": key.units, "EXACT": key.kind == "exact"}
    if key.back:
        found |= {"KEPT": key.keeps, "DY_UNIT": 1}
        if key.keeps:
            found |= dict.fromkeys(("b_ih", "b_hh", "b_ih_reverse", "b_hh_reverse"))
        return found
    if not key.keeps:
        found |= dict.fromkeys(("c_all", "gates"))
    if key.regime == "cluster":
        return found
    # Biases as weights of two inputs more need room in the tile, and I is not known.
    found |= {"I_TILE": key.inputs or 16, "FUSED": key.inputs > 0, "ONES": False, "X_UNIT": 1}
    if not key.inputs:
        found |= dict.fromkeys(("w_ih", "w_ih_reverse"))
    return found


def _type(name: str, key: Key) -> str:
    """Return Triton's name for the type of an argument."""
    if name in _AT_RUN_TIME:
        return "i32"
    products = key.regime != "inputs" and not (key.back or key.inputs) and name == "x"
    before = key.back and not key.keeps and name == "gates"
    if products or before or name in _FLOAT32:
        return "*fp32"
    return _INTEGERS.get(name) or _POINTERS[key.kind]
