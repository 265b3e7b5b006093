"""float32, and pairs of 16-bit numbers.

PTX ISA, "Instructions": "Floating Point Instructions" (add, sub, mul, fma, min, max, neg, abs, and
the approximations tanh, ex2, rcp, div, sqrt), "Half Precision Floating Point Instructions"
(add.f16, add.f16x2), "Comparison and Selection Instructions" and "Half Precision Comparison
Instructions".
`.ftz` is ignored: denormals are kept.
"""

import re

from .instruction import Instruction, Lines, expression, opcode

_ORDERED = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_UNORDERED = {f"{name}u": sign for name, sign in _ORDERED.items()}  # true of a NaN


def _is_approximate(i: Instruction) -> bool:
    return i.type == "f32" and i.parts[1] in ("approx", "full")


@expression("add", "sub", "mul")
def binary(i: Instruction) -> str | None:
    _, a, b = i.operands
    if i.type == "f32":
        sign = {"add": "+", "sub": "-", "mul": "*"}[i.opcode]
        return f"({i.single(a)} {sign} {i.single(b)}).view(U32)"
    if i.opcode == "add" and i.type in ("bf16x2", "f16x2"):
        return f"add_pairs({i.value(a)}, {i.value(b)}, '{i.type[:-2]}')"
    if i.opcode == "add" and i.type in ("bf16", "f16"):
        x, y = (f"widen({i.spread(operand)}, '{i.type}')" for operand in (a, b))
        return f"add_halves({x}, {y}, '{i.type}')"
    return None


@expression("fma")
def fused(i: Instruction) -> str | None:
    """Rounded once: the sum of an exact product is a float64 before. .rm rounds down."""
    if i.type != "f32" or i.parts[1] not in ("rn", "rm"):
        return None
    function = "fma" if i.parts[1] == "rn" else "fma_down"
    return f"{function}({', '.join(i.spread(operand) for operand in i.operands[1:])})"


@expression("neg", "abs")
def sign(i: Instruction) -> str | None:
    if i.type != "f32":
        return None
    value = i.value(i.operands[1])
    return f"({value} ^ U32(0x80000000))" if i.opcode == "neg" else f"({value} & U32(0x7FFFFFFF))"


@expression("min", "max")
def extreme(i: Instruction) -> str | None:
    """A NaN loses, with .NaN it wins."""
    if i.type != "f32":
        return None
    kind = "imum" if "NaN" in i.parts else ""
    function = f"np.{i.opcode}{kind}" if kind else f"np.f{i.opcode}"
    return f"{function}({i.single(i.operands[1])}, {i.single(i.operands[2])}).view(U32)"


@expression("tanh", "ex2")
def function(i: Instruction) -> str | None:
    if not _is_approximate(i):
        return None
    return f"{i.opcode}_approx({i.spread(i.operands[1])})"


@expression("div", "rcp")
def quotient(i: Instruction) -> str | None:
    """.rn as IEEE 754 has it."""
    above = "np.full(N, 0x3F800000, U32)" if i.opcode == "rcp" else i.spread(i.operands[1])
    below = i.spread(i.operands[-1])
    if i.type == "f32" and i.parts[1] == "rn":
        return f"({above}.view(F32) / {below}.view(F32)).view(U32)"
    return f"div_full({above}, {below})" if _is_approximate(i) else None


@expression("sqrt")
def root(i: Instruction) -> str | None:
    exact = i.type == "f32" and i.parts[1] in ("approx", "rn")
    return f"np.sqrt({i.single(i.operands[1])}).view(U32)" if exact else None


@expression("setp")
def compare(i: Instruction) -> str | None:
    """A comparison with a NaN is false, that with a u at its end true."""
    if i.type not in ("f32", "bf16", "f16") or len(i.operands) != 3:
        return None
    a, b = i.operands[1:]
    name = i.parts[1]
    if i.type == "f32":
        x, y = i.single(a), i.single(b)
    else:
        x, y = (f"widen(np.asarray({i.value(operand)}), '{i.type}')" for operand in (a, b))
    return _comparison(name, x, y)


def _comparison(name: str, x: str, y: str) -> str | None:
    nan = f"(np.isnan({x}) | np.isnan({y}))"
    if name in ("nan", "num"):
        return nan if name == "nan" else f"~{nan}"
    if name in _UNORDERED:
        return f"(({x} {_UNORDERED[name]} {y}) | {nan})"
    if name in _ORDERED:
        return f"(({x} {_ORDERED[name]} {y}) & ~{nan})"
    return None


@opcode("setp")
def compare_pairs(i: Instruction) -> Lines | None:
    """Two predicates: of the lower numbers and of the upper ones."""
    kind = i.type.removesuffix("x2")
    both = re.fullmatch(r"%(p\d+)\|%(p\d+)", i.operands[0])
    if kind not in ("bf16", "f16") or kind == i.type or not both:
        return None
    low, high = (_comparison(i.parts[1], f"_a[{n}]", f"_b[{n}]") for n in (0, 1))
    if low is None:
        return None
    a, b = (f"pairs({i.spread(operand, 'b32')}, '{kind}')" for operand in i.operands[1:])
    results = i.assign(f"%{both[1]}", low) + i.assign(f"%{both[2]}", high)
    return [f"_a, _b = {a}, {b}", *results]
