"""Branches, barriers, and what lanes of a warp tell each other.

PTX ISA, "Instructions": "Control Flow Instructions"; of "Parallel Synchronization and
Communication Instructions" bar, barrier.cluster, fence, elect.sync and redux.sync; shfl.sync of
"Data Movement and Conversion Instructions". A fence does nothing here: stores are seen at once.
"""

from .flow import ENDED
from .instruction import Instruction, Lines, expression, opcode


@opcode("bra")
def branch(i: Instruction) -> Lines | None:
    """To a label."""
    target = i.labels.get(i.operands[0])
    return None if target is None else _go(i, target)


@opcode("ret")
def leave(i: Instruction) -> Lines | None:
    return _go(i, ENDED)


def _go(i: Instruction, target: int) -> Lines:
    """`flow` is None in a kernel whose branches must not divide a block."""
    if i.divided:
        return [f"pc, ACT = flow.divide(ACT, {i.guard or 'True'}, {target}, pc + 1)", "continue"]
    if not i.guard:
        return [f"pc = {target}", "continue"]
    return [
        f"_c = {i.guard}",
        "if _c.all():",
        f" pc = {target}",
        " continue",
        "if _c.any():",
        f" if flow is None: raise Fault('divergent branch: ' + {i.where})",
        f" pc, ACT = flow.divide(None, _c, {target}, pc + 1)",
        " continue",
    ]


@opcode("bar", "barrier")
def barrier(i: Instruction) -> Lines | None:
    """Of a block, of a warp (lanes go in lockstep anyway), of a cluster."""
    if i.parts[1] == "cluster":
        if i.parts[2] == "arrive":
            return ["_phase = block.cluster.arrive()"]
        return ["while block.cluster.phase == _phase: yield", "block.races.barrier()"]
    if i.parts[1] == "warp":
        return []
    if i.parts[1] != "sync" or i.guard:
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


@expression("redux")
def reduce(i: Instruction) -> str | None:
    """The largest signed number of a warp, all of whose lanes take part."""
    if i.parts[2] != "max" or i.type != "s32":
        return None
    lanes = f"{i.spread(i.operands[1])}.astype(U32).view(np.int32).reshape(-1, 32)"
    return f"np.repeat({lanes}.max(1), 32).view(U32)"
