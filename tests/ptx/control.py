"""Branches, barriers, and what lanes of a warp tell each other.

PTX ISA, "Instructions": "Control Flow Instructions"; of "Parallel Synchronization and
Communication Instructions" bar, barrier.cluster, fence and elect.sync; shfl.sync of "Data Movement
and Conversion Instructions". A fence does nothing here: stores are seen at once.
"""

from .instruction import Instruction, Lines, expression, opcode


@opcode("bra")
def branch(i: Instruction) -> Lines | None:
    """To a label, by all threads of a block or by none."""
    target = i.labels.get(i.operands[0])
    if target is None:
        return None
    if not i.guarded:
        return [f"pc = {target}", "continue"]
    return [
        f"_c = {i.mask}",
        "if _c.all():",
        f" pc = {target}",
        " continue",
        f"if _c.any(): raise Fault('divergent branch: ' + {i.where})",
    ]


@opcode("ret")
def leave(i: Instruction) -> Lines | None:
    return None if i.guarded else ["return"]


@opcode("bar", "barrier")
def barrier(i: Instruction) -> Lines | None:
    """Of a block, of a warp (lanes go in lockstep anyway), of a cluster."""
    if i.parts[1] == "cluster":
        if i.parts[2] == "arrive":
            return ["_phase = block.cluster.arrive()"]
        return ["while block.cluster.phase == _phase: yield", "block.races.barrier()"]
    if i.parts[1] == "warp":
        return []
    if i.parts[1] != "sync" or i.guarded:
        return None
    return ["block.races.barrier()"]


@opcode("fence")
def fence(i: Instruction) -> Lines | None:
    return []


@opcode("elect")
def elect(i: Instruction) -> Lines | None:
    """The first lane of each warp."""
    register, predicate = (part.strip() for part in i.operands[0].split("|"))
    first = i.assign(predicate, "TID % 32 == 0")
    return first if register == "_" else i.assign(register, "np.zeros(N, U32)") + first


@expression("shfl")
def shuffle(i: Instruction) -> str | None:
    """The value of another lane, by the distance in bits or by its number."""
    _, value, lane = i.operands[:3]
    if i.parts[2] == "bfly":
        return f"{i.value(value)}[TID ^ np.asarray({i.value(lane)})]"
    if i.parts[2] == "idx":
        return f"{i.value(value)}[(TID & U32(0xFFFFFFE0)) | np.asarray({i.value(lane)})]"
    return None
