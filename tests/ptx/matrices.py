"""Matrices in fragments of registers, and in shared memory.

PTX ISA, "Instructions", "Warp Level Matrix Instructions": mma.sync, ldmatrix, stmatrix; and
"Asynchronous Warpgroup Level Matrix Instructions": wgmma.mma_async. Its fence, commit_group and
wait_group do nothing: a product is there at once.
"""

import re

from .instruction import Instruction, Lines, listed, names, opcode

_KINDS = ("tf32", "bf16", "f16")


@opcode("ldmatrix")
def load(i: Instruction) -> Lines | None:
    """ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16: up to four matrices of 8 x 8."""
    if i.parts[3] != "m8n8" or i.type != "b16" or i.guard:
        return None
    count, trans = int(i.parts[4][1:]), "trans" in i.parts
    address = i.address(i.operands[1], False)
    found = f"load_matrices(shared, {address}, {count}, {trans}, {i.where})"
    return i.assign_all(i.operands[0], found)


@opcode("stmatrix")
def store(i: Instruction) -> Lines | None:
    if i.parts[3] != "m8n8" or i.type != "b16" or i.guard:
        return None
    address, trans = i.address(i.operands[0], False), "trans" in i.parts
    return [f"store_matrices(shared, {address}, {listed(i.operands[1])}, {trans}, {i.where})"]


@opcode("mma")
def product(i: Instruction) -> Lines | None:
    """mma.sync.aligned.m16n8k16.row.col.f32.KIND.KIND.f32, with k8 for TF32."""
    kind = i.parts[7]
    shape = "m16n8k8" if kind == "tf32" else "m16n8k16"
    if kind not in _KINDS or i.parts[3] != shape or i.type != "f32" or i.guard:
        return None
    a, b, c = map(listed, i.operands[1:])
    return i.assign_all(i.operands[0], f"mma('{kind}', {a}, {b}, {c})")


@opcode("wgmma")
def product_of_warpgroups(i: Instruction) -> Lines | None:
    """wgmma.mma_async.sync.aligned.m64nNkK.f32.KIND.KIND d, a, b-desc, scale-d, 1, 1, ...;

    a is a fragment or a descriptor as well; for 16-bit kinds follows what is transposed.
    """
    if i.parts[1] in ("fence", "commit_group", "wait_group"):
        return []
    kind, form = i.parts[6], re.fullmatch(r"m64n(\d+)k(\d+)", i.parts[4])
    d, a, b, scale, *immediates = i.operands
    signs, trans = immediates[:2], [int(value) for value in immediates[2:]]
    if i.parts[1] != "mma_async" or kind not in _KINDS or not form or signs != ["1", "1"]:
        return None
    in_registers = a.startswith("{")
    trans_a, trans_b = ([0] * in_registers + trans + [0, 0])[:2]
    if len(names(d)) * 2 != int(form[1]):
        return None
    sources = f"{listed(a) if in_registers else a[1:]}, {b[1:]}"
    options = f"{scale.removeprefix('%')}, {trans_a}, {trans_b}, {i.where}"
    shape = f"'{kind}', {form[1]}"
    return i.assign_all(d, f"wgmma(shared, {shape}, {listed(d)}, {sources}, {options})")
