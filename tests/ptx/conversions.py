"""cvt: PTX ISA, "Instructions", "Data Movement and Conversion Instructions"."""

import re

from .instruction import Instruction, expression, width_of

_FROM_SINGLE = {"bf16": "to_bf16({})", "f16": "to_f16({})", "tf32": "to_tf32({})"}
_TO_SINGLE = {
    "bf16": "({}.astype(U32) << U32(16))",
    "f16": "{}.view(np.float16).astype(F32).view(U32)",
}


@expression("cvt")
def convert(i: Instruction) -> str | None:
    to, source = i.parts[-2:]
    if source == "f32" and to in ("bf16x2", "f16x2") and i.parts[1] == "rn":
        upper, lower = (f"to_{to[:-2]}({i.spread(o, 'b32')})" for o in i.operands[1:])
        return f"({lower}.astype(U32) | {upper}.astype(U32) << U32(16))"
    operand = i.operands[1]
    if i.parts == ["cvt", "sat", "f32", "f32"]:  # to [0, 1]; a NaN becomes 0
        return f"np.fmin(np.fmax({i.single(operand)}, F32(0)), F32(1)).view(U32)"
    if source == "f32" and to in _FROM_SINGLE and i.parts[1] == ("rna" if to == "tf32" else "rn"):
        return _FROM_SINGLE[to].format(i.spread(operand, "b32"))
    if to == "f32" and source in _TO_SINGLE and len(i.parts) == 3:
        return _TO_SINGLE[source].format(i.spread(operand, "b16"))
    integers = all(re.fullmatch(r"[su](8|16|32|64)", kind) for kind in (to, source))
    return _between_integers(i, to, source) if integers and len(i.parts) == 3 else None


def _between_integers(i: Instruction, to: str, source: str) -> str:
    """By way of the exact types; a register may be wider than what it holds."""
    register, operand = i.operands
    bits, wanted = int(source[1:]), int(to[1:])
    value = f"{i.spread(operand, f'b{width_of(operand)}')}.astype(np.uint{bits})"
    if source[0] == "s":
        value += f".view(np.int{bits}).astype(np.int{wanted}).view(np.uint{wanted})"
    else:
        value += f".astype(np.uint{wanted})"
    width = width_of(register)
    return value if width == wanted else f"{value}.astype(np.uint{width})"
