"""Registers, constants, parameters and memory.

PTX ISA, "Instructions", "Data Movement and Conversion Instructions": mov, ld, st, cp.async; of
"Parallel Synchronization and Communication Instructions" atom, red. State spaces: .global is the
storages of tensors, .shared starts at 0, .param is what the launch gives, in its own window.
"""

from .instruction import BITS, Instruction, Lines, names, opcode, width_of


@opcode("mov")
def move(i: Instruction) -> Lines | None:
    to, source = i.operands
    if to.startswith("{"):
        return _unpack(i, names(to), source)
    if source.startswith("{"):
        return i.assign(to, _packed(i, names(source)))
    if i.type == "pred":
        constant = not source.startswith("%")
        return i.assign(to, f"np.full(N, {int(source, 0) != 0})" if constant else source[1:])
    width = width_of(to)
    value = i.value(source, f"b{width}")
    if source.startswith("%") or source == "global_smem":
        return i.assign(to, value)
    return i.assign(to, f"np.full(N, {value}, U{width})")


def _unpack(i: Instruction, registers: list[str], source: str) -> Lines | None:
    """Two halves of a register; `_` takes none."""
    if len(registers) != 2 or i.type not in ("b32", "b64"):
        return None
    half = int(i.type[1:]) // 2
    lines = [f"_s = {i.value(source)}"]
    for at, register in zip((0, half), registers, strict=True):
        if register != "_":
            moved = f"(_s >> U{2 * half}({at})).astype(U{half})"
            lines += i.assign(register, moved)
    return lines


def _packed(i: Instruction, registers: list[str]) -> str:
    if len(registers) != 2 or i.type not in ("b32", "b64"):
        raise i.unknown()
    width = int(i.type[1:])
    low, high = (f"{i.value(r, f'b{width // 2}')}.astype(U{width})" for r in registers)
    return f"({low} | {high} << U{width}({width // 2}))"


@opcode("ld")
def load(i: Instruction) -> Lines | None:
    """Of as many registers as a vector has; an acquiring one lets the other blocks go on first."""
    group, at = i.operands
    width = int(i.type[1:]) // 8
    size = i.vector * width
    space = next((p for p in i.parts if p in ("param", "global", "shared", "shared::cluster")), "")
    address = i.address(at, wide=space in ("global", "param"))
    found = {
        "param": f"P.load({address}, {i.mask}, {size}, {i.where})",
        "global": f"memory.load({address}, {i.mask}, {size}, {i.where}, {'acquire' in i.parts})",
        "shared": f"shared.load({address}, {i.mask}, {size}, {i.where})",
        "shared::cluster": f"block.cluster.load({address}, {i.mask}, {size}, {i.where})",
    }.get(space)
    if found is None:
        return None
    lines = ["yield"] if "acquire" in i.parts else []
    lines.append(f"_d = {found}")
    for number, register in enumerate(names(group)):
        columns = f"_d[:, {number * width}:{(number + 1) * width}]"
        bits = f"np.ascontiguousarray({columns}).view({BITS[width]}).reshape(-1)"
        wanted = width_of(register)
        if i.type[0] == "s" and wanted > 8 * width:
            bits += f".view(np.int{8 * width}).astype(np.int{wanted}).view(U{wanted})"
        elif wanted != 8 * width:
            bits += f".astype(U{wanted})"
        lines += i.assign(register, bits)
    return lines


@opcode("cvta")
def convert_address(i: Instruction) -> Lines | None:
    """Generic addresses of global memory are those of global memory."""
    return i.assign(*map(str, (i.operands[0], i.operands[1][1:]))) if "global" in i.parts else None


@opcode("st")
def store(i: Instruction) -> Lines | None:
    if "async" in i.parts:
        return None
    at, group = i.operands
    space = next((part for part in i.parts if part in ("global", "shared")), None)
    if space is None:
        return None
    bits = BITS[int(i.type[1:]) // 8]
    columns = ", ".join(f"{i.spread(r)}.astype({bits}).reshape(N, 1)" for r in names(group))
    memory = {"global": "memory", "shared": "shared"}[space]
    return [
        *_released(i),
        f"_d = np.ascontiguousarray(np.hstack([{columns}])).view(np.uint8)",
        f"{memory}.store({i.address(at, space == 'global')}, {i.mask}, _d, {i.where})",
    ]


@opcode("atom", "red")
def atomic(i: Instruction) -> Lines | None:
    """An addition of 32 bits by one thread, seen by all; red does not return what was there."""
    if "add" not in i.parts or i.type not in ("u32", "s32", "b32") or "shared" in i.parts:
        return None
    *register, at, value = i.operands
    address = i.address(at, wide=True)
    return [
        *(["yield"] if "acquire" in i.parts else []),
        *_released(i),
        f"_m = {i.mask if i.masked else 'ONE'}",
        f"if _m.sum() != 1: raise Fault('several threads: ' + {i.where})",
        f"_o = memory.load({address}, _m, 4, {i.where}).view(U32).reshape(-1)",
        f"_d = (_o + {i.value(value)}).astype(U32).reshape(N, 1).view(np.uint8)",
        f"memory.store({address}, _m, _d, {i.where})",
        *(i.assign(register[0], "_o") if register else []),
    ]


def _released(i: Instruction) -> Lines:
    """What comes before a store that publishes."""
    return [f"memory.release({i.mask}, {i.where})"] if "release" in i.parts else []


@opcode("cp")
def copy(i: Instruction) -> Lines | None:
    """cp.async: from global to shared memory; zeros if its source size is 0."""
    if i.parts[1] != "async":
        return None
    if i.parts[2] == "commit_group":
        return ["block.copies.commit()"]
    if i.parts[2] == "wait_group":
        return [f"block.copies.wait({int(i.operands[0], 0)})"]
    if i.parts[2] not in ("ca", "cg"):
        return None
    to, source, size, *taken = i.operands
    take = i.spread(taken[0], "b32") if taken else f"np.full(N, {int(size, 0)}, U32)"
    ends = f"{i.address(to, False)}, {i.address(source, True)}"
    return [f"block.copies.start({ends}, {int(size, 0)}, {take}, {i.mask}, {i.where})"]
