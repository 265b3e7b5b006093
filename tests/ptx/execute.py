"""All blocks of a launch, by turns: each runs until it waits for another."""

from itertools import product

import numpy as np
from torch import Tensor

from .cluster import Cluster, MBarriers
from .copies import Copies
from .faults import Fault
from .memory import Memory, Storages
from .races import Races
from .shared import Shared
from .translate import Kernel

_MOST_ROUNDS = 100_000


class Block:
    """What a block has of its own; the function that a kernel becomes takes one."""

    def __init__(
        self,
        kernel: Kernel,
        grid: tuple[int, ...],
        index: tuple[int, ...],
        storages: Storages,
        shared_bytes: int,
        cluster: Cluster,
    ) -> None:
        self.grid, self.index, self.cluster = grid, index, cluster
        self.threads = kernel.source.threads
        self.rank = len(cluster.shared)
        self.races = Races(self.threads)
        self.memory = Memory(storages, self.races)
        self.shared = Shared(shared_bytes, self.threads, self.races)
        self.copies = Copies(self.memory, self.shared)
        self.mbarriers = MBarriers()
        cluster.shared.append(self.shared)
        cluster.mbarriers.append(self.mbarriers)


def execute(
    kernel: Kernel,
    grid: tuple[int, ...],
    arguments: list[int],
    tensors: list[Tensor],
    shared_bytes: int,
) -> set[tuple[str, str]]:
    """Launch a kernel.

    Args:
        kernel: what to run.
        grid: blocks along x, y and z.
        arguments: the bits of the parameters, in order; those left out are 0.
        tensors: every tensor whose address is among them, on the CPU.
        shared_bytes: shared memory of a block.

    Returns:
        Races: an instruction, and what it does.

    Raises:
        Fault: something that the hardware would not forgive, or a deadlock.
    """
    grid = (*grid, 1, 1)[:3]
    size = kernel.source.cluster
    arguments = arguments + [0] * (kernel.source.parameters - len(arguments))
    storages, cluster, blocks = Storages(tensors), Cluster(size), []
    for z, y, x in product(*map(range, reversed(grid))):
        if len(cluster.shared) == size:
            cluster = Cluster(size)
        blocks.append(Block(kernel, grid, (x, y, z), storages, shared_bytes, cluster))
    with np.errstate(all="ignore"):
        _run([kernel.run(block, arguments) for block in blocks])
    return set[tuple[str, str]]().union(*(block.races.found for block in blocks))


def _run(running: list) -> None:
    """In turns, forward and backward: the order of blocks is nobody's to rely on."""
    ended = object()
    for turn in range(_MOST_ROUNDS):
        order = running[::-1] if turn % 2 else running
        running = [one for one in order if next(one, ended) is not ended]
        if not running:
            return
    raise Fault(f"a deadlock: {len(running)} blocks wait for ever")
