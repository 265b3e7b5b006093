"""All blocks of a launch; each runs until it waits for another."""

from collections.abc import Iterator
from itertools import product
from random import Random
from typing import NamedTuple

import numpy as np
from torch import Tensor

from .banks import Banks
from .cluster import Cluster, MBarriers
from .copies import Copies
from .faults import Fault
from .flow import Flow
from .memory import Memory, Parameters, Storages
from .races import Races
from .shared import Shared
from .translate import Kernel

_MOST_TURNS = 100_000


class Found(NamedTuple):
    """What a launch has shown."""

    races: set[tuple[str, str]]  # an instruction, and what it does
    banks: Banks  # what all blocks asked of them


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
        banks: Banks,
        threads: int,
    ) -> None:
        self.grid, self.index, self.cluster = grid, index, cluster
        self.threads = threads
        self.flow = Flow(threads) if kernel.divides else None
        self.rank = len(cluster.shared)
        self.races = Races(self.threads)
        self.memory = Memory(storages, self.races)
        self.shared = Shared(shared_bytes, self.threads, self.races, banks)
        self.copies = Copies(self.memory, self.shared)
        self.mbarriers = MBarriers()
        cluster.shared.append(self.shared)
        cluster.mbarriers.append(self.mbarriers)


def execute(
    kernel: Kernel,
    grid: tuple[int, ...],
    arguments: list[int | bytes],
    tensors: list[Tensor],
    shared_bytes: int,
    threads: int | None = None,
    cluster: int | None = None,
) -> Found:
    """Launch a kernel.

    Args:
        kernel: what to run.
        grid: blocks along x, y and z.
        arguments: the bits of the parameters, in order, or bytes; those left out are 0.
        tensors: every tensor whose address is among them, on the CPU.
        shared_bytes: shared memory of a block.
        threads: of a block, where the kernel does not say it.
        cluster: blocks of a cluster, where the kernel does not say it.

    Raises:
        Fault: something that the hardware would not forgive, or a deadlock.
    """
    grid = (*grid, 1, 1)[:3]
    size, threads = cluster or kernel.source.cluster, threads or kernel.source.threads
    assert threads, "a kernel without .reqntid needs to be told the number of threads"
    parameters = Parameters(kernel.source.parameters, arguments)
    storages, banks = Storages(tensors, several=kernel.divides), Banks()
    together, blocks = Cluster(size), []
    for z, y, x in product(*map(range, reversed(grid))):
        if len(together.shared) == size:
            together = Cluster(size)
        at, room = (x, y, z), shared_bytes
        blocks.append(Block(kernel, grid, at, storages, room, together, banks, threads))
    with np.errstate(all="ignore"):
        _run([kernel.run(block, parameters) for block in blocks])
    return Found(set().union(*(block.races.found for block in blocks)), banks)


def _run(running: list[Iterator[None]]) -> None:
    """Let blocks go on until they wait, now these and now those, always by the same chance.

    A block that gets ahead of the others finds out what does not wait for them.
    """
    chance, ended = Random(0), object()
    for _ in range(_MOST_TURNS):
        going = [one for one in running if chance.random() < 0.5]
        chance.shuffle(going)
        gone = {id(one) for one in going if next(one, ended) is ended}
        running = [one for one in running if id(one) not in gone]
        if not running:
            return
    raise Fault(f"a deadlock: {len(running)} blocks wait for ever")
