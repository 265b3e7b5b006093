"""What blocks of a cluster send to each other's shared memory, and barriers that count it.

PTX ISA, "Instructions": mapa and st.async of "Data Movement and Conversion Instructions", mbarrier
of "Parallel Synchronization and Communication Instructions". An address in another block's shared
memory has the rank of this block in its upper eight bits.
"""

from .instruction import BITS, Instruction, Lines, expression, opcode


@expression("mapa")
def address_in(i: Instruction) -> str | None:
    _, address, rank = i.operands
    return f"({i.value(address, 'b32')} | {i.spread(rank, 'b32')}.astype(U32) << U32(24))"


@opcode("st")
def store_async(i: Instruction) -> Lines | None:
    if "async" not in i.parts:
        return None
    to, value, barrier = i.operands
    bits = BITS[int(i.type[1:]) // 8]
    data = f"{i.spread(value)}.astype({bits}).reshape(N, 1).view(np.uint8)"
    ends = f"{i.address(to, False)}, {data}, {i.address(barrier, False)}"
    return [f"block.cluster.store_async({ends}, {i.mask}, {i.where})"]


@opcode("mbarrier")
def mbarrier(i: Instruction) -> Lines | None:
    """init, inval, arrive (with expect_tx), and a try_wait that waits."""
    action, *modifiers = i.parts[1:]
    at = i.operands[1 if action in ("try_wait", "arrive") else 0]
    address = i.address(at, False)
    if action == "init":
        count = i.spread(i.operands[1], "b32")
        return [f"block.mbarriers.init({address}, {count}, {i.mask})"]
    if action == "inval":
        return []
    if action == "arrive":
        size = i.spread(i.operands[2], "b32") if "expect_tx" in modifiers else "np.zeros(N, int)"
        return [f"block.mbarriers.arrive({address}, {size}, {i.mask}, {i.where})"]
    if action == "try_wait" and "parity" in modifiers:
        phase = f"int({i.spread(i.operands[2], 'b32')}[0])"
        return [
            f"_a, _p = int(({address})[0]), {phase}",
            "while block.mbarriers.parity(_a) == _p: yield",
        ]
    return None
