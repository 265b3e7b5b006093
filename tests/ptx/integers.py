"""Integers and bits.

PTX ISA, "Instructions": "Integer Arithmetic Instructions", "Logic and Shift Instructions",
"Comparison and Selection Instructions", and of "Data Movement and Conversion Instructions" prmt.
Arithmetic is modulo 2^width, which unsigned numpy arrays give.
"""

from .instruction import Instruction, expression

_COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_BINARY = {"add": "+", "sub": "-", "and": "&", "or": "|", "xor": "^"}
_WIDER = {"s32": "np.int64", "u32": "U64", "s16": "np.int32", "u16": "U32"}


def _is_integer(i: Instruction) -> bool:
    return i.type in ("s16", "s32", "s64", "u16", "u32", "u64", "b16", "b32", "b64")


@expression("add", "sub", "and", "or", "xor")
def binary(i: Instruction) -> str | None:
    _, a, b = i.operands
    if i.type == "pred" or _is_integer(i):
        return f"({i.value(a)} {_BINARY[i.opcode]} {i.value(b)})"
    return None


@expression("not", "neg")
def unary(i: Instruction) -> str | None:
    _, a = i.operands
    if i.opcode == "not" and (i.type == "pred" or _is_integer(i)):
        return f"(~{i.value(a)})"
    if i.opcode == "neg" and _is_integer(i):
        return f"({i.word}(0) - {i.value(a)})"
    return None


@expression("mul", "mad")
def product(i: Instruction) -> str | None:
    """.lo: as wide as its factors; .wide: twice as wide."""
    _, a, b, *c = i.operands
    if not _is_integer(i) or i.parts[1] not in ("lo", "wide"):
        return None
    if i.parts[1] == "lo":
        found = f"{i.value(a)} * {i.value(b)}"
        return f"({found} + {i.value(c[0])})" if c else f"({found})"
    if i.type not in _WIDER:
        return None
    if i.type[0] == "s":
        x, y = i.signed(a), i.signed(b)
    else:
        x, y = f"np.asarray({i.value(a)})", f"np.asarray({i.value(b)})"
    to = _WIDER[i.type]
    found = f"({x}.astype({to}) * {y}.astype({to})).view({'U64' if '32' in i.type else 'U32'})"
    return f"({found} + {i.value(c[0], 'b64' if '32' in i.type else 'b32')})" if c else found


@expression("div", "rem")
def quotient(i: Instruction) -> str | None:
    _, a, b = i.operands
    if not _is_integer(i) or len(i.parts) != 2:
        return None
    place = 0 if i.opcode == "div" else 1
    if i.type[0] == "s":
        return f"divide({i.signed(a)}, {i.signed(b)})[{place}].view({i.word})"
    return f"divide(np.asarray({i.value(a)}), np.asarray({i.value(b)}))[{place}]"


@expression("bfi")
def insert(i: Instruction) -> str | None:
    _, a, b, at, length = i.operands
    if i.type != "b32" or not (at.isdecimal() and length.isdecimal()):
        return None
    return f"bits_inserted(np.asarray({i.value(a)}), np.asarray({i.value(b)}), {at}, {length})"


@expression("shl", "shr")
def shift(i: Instruction) -> str | None:
    """Shifts as far as the width, and further, leave nothing but the sign."""
    _, a, by = i.operands
    if not _is_integer(i):
        return None
    n, bits = i.value(by, "b32"), i.word[1:]
    if i.opcode == "shr" and i.type[0] == "s":
        most = f"U32({int(bits) - 1})"
        by = f"np.minimum({n}, {most}).astype({i.signed_type})"
        return f"({i.signed(a)} >> {by}).view({i.word})"
    moved = f"{i.value(a)} {'<<' if i.opcode == 'shl' else '>>'} np.asarray({n}).astype({i.word})"
    return f"np.where(np.asarray({n}) < U32({bits}), {moved}, {i.word}(0)).astype({i.word})"


@expression("bfe")
def bit_field(i: Instruction) -> str | None:
    x, at, length = (f"np.asarray({i.value(operand, 'b32')})" for operand in i.operands[1:])
    if i.type == "u32":
        return f"(({x} >> {at}) & ((U32(1) << {length}) - U32(1)))"
    if i.type == "s32":
        top = f"({x} << (U32(32) - {at} - {length})).view(np.int32)"
        return f"({top} >> (U32(32) - {length}).astype(np.int32)).view(U32)"
    return None


@expression("min", "max")
def extreme(i: Instruction) -> str | None:
    """.relu of signed numbers: at least 0."""
    _, a, b = i.operands
    if not _is_integer(i):
        return None
    function = {"min": "np.minimum", "max": "np.maximum"}[i.opcode]
    if i.type[0] != "s":
        return f"{function}({i.value(a)}, {i.value(b)})"
    found = f"{function}({i.signed(a)}, {i.signed(b)})"
    if "relu" in i.parts:
        found = f"np.maximum({found}, {i.signed_type}(0))"
    return f"{found}.view({i.word})"


@expression("setp")
def compare(i: Instruction) -> str | None:
    _, a, b = i.operands
    if not _is_integer(i) or i.parts[1] not in _COMPARE or len(i.parts) != 3:
        return None
    read = i.signed if i.type[0] == "s" else i.value
    return f"({read(a)} {_COMPARE[i.parts[1]]} {read(b)})"


@expression("selp")
def select(i: Instruction) -> str | None:
    _, a, b, condition = i.operands
    return f"np.where({i.value(condition)}, {i.value(a)}, {i.value(b)})"


@expression("prmt")
def permute(i: Instruction) -> str | None:
    """Any four of eight bytes, or their signs."""
    if i.parts != ["prmt", "b32"]:
        return None
    _, a, b, selector = i.operands
    return f"permute({i.value(a)}, {i.value(b)}, {i.value(selector)}, N)"
