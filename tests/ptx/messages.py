"""What blocks of a cluster send to each other's shared memory, and barriers that count it.

PTX ISA, "Instructions": mapa and st.async of "Data Movement and Conversion Instructions", mbarrier
of "Parallel Synchronization and Communication Instructions". An address in another block's shared
memory has the rank of this block in its upper eight bits. Who has waited for the bytes of a warp
comes after all that this warp did before it sent them: csrc/cuda/exchange.h relies on that.
"""

from .instruction import BITS, Instruction, Lines, expression, names, opcode


@expression("mapa")
def address_in(i: Instruction) -> str | None:
    _, address, rank = i.operands
    return f"({i.value(address, 'b32')} | {i.spread(rank, 'b32')}.astype(U32) << U32(24))"


@opcode("st")
def store_async(i: Instruction) -> Lines | None:
    if "async" not in i.parts:
        return None
    to, values, barrier = i.operands
    bits = BITS[int(i.type[1:]) // 8]
    columns = ", ".join(f"{i.spread(r)}.astype({bits}).reshape(N, 1)" for r in names(values))
    data = f"np.ascontiguousarray(np.hstack([{columns}])).view(np.uint8)"
    ends = f"{i.address(to, False)}, {data}, {i.address(barrier, False)}"
    return [f"block.cluster.store_async(block.rank, {ends}, {i.mask}, {i.where})"]


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
        phase = i.spread(i.operands[2], "b32")
        done = i.operands[0]  # a name of Triton's, or a register
        lanes = f"[{i.mask}]" if i.masked else ""
        return [
            # Warps may wait for different ones; they go on together.
            f"_all = {{*zip(({address}){lanes}.tolist(), {phase}{lanes}.tolist())}}",
            "while any(block.mbarriers.parity(a) == p for a, p in _all): yield",
            "for _a, _p in _all:",
            " block.races.order(shared.accesses, block.mbarriers.senders(_a, _p))",
            *(i.assign(done, "ONE") if done.startswith("%") else []),
        ]
    return None
