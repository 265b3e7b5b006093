"""Blocks of a cluster, and barriers in shared memory that count arrivals and bytes.

"Distributed shared memory" and "mbarrier" of the PTX ISA.
"""

from __future__ import annotations

import numpy as np

from .faults import Fault
from .memory import Mask, gather, scatter
from .shared import Shared

_RANK, _ADDRESS = np.uint32(24), np.uint32(0xFFFFFF)  # of an address: bits of the rank, the rest


class MBarriers:
    """Those of a block, by their address."""

    def __init__(self) -> None:
        self._barriers: dict[int, MBarrier] = {}

    def init(self, address: np.ndarray, count: np.ndarray, mask: Mask) -> None:
        """Make barriers that expect so many arrivals."""
        lanes = slice(None) if mask is None else mask
        for a, n in zip(address[lanes], count[lanes], strict=True):
            self._barriers[int(a)] = MBarrier(int(n))

    def arrive(self, address: np.ndarray, size: np.ndarray, mask: Mask, where: str) -> None:
        """Arrive, and expect so many bytes more."""
        lanes = slice(None) if mask is None else mask
        for a, n in zip(address[lanes], size[lanes], strict=True):
            self.at(int(a), where).arrive(int(n), where)

    def senders(self, address: int, parity: int) -> set[int]:
        """The warps of this block whose bytes a phase of that parity has counted."""
        return self.at(address, "try_wait").senders[parity]

    def parity(self, address: int) -> int:
        """The parity of the phase that has not ended."""
        return self.at(address, "try_wait").phase % 2

    def at(self, address: int, where: str) -> MBarrier:
        """The barrier of an address."""
        if address not in self._barriers:
            raise Fault(f"{where}: there is no barrier at {address:#x}")
        return self._barriers[address]


class MBarrier:
    """What its phase waits for still."""

    def __init__(self, count: int) -> None:
        self._count = self._pending = count
        self._bytes = self.phase = 0
        self.senders: list[set[int]] = [set(), set()]  # by the parity of the phase

    def arrive(self, size: int, where: str) -> None:
        if self._pending == 0:
            raise Fault(f"{where}: more arrivals than counted")
        self._bytes += size
        self._pending -= 1
        self._complete()

    def receive(self, size: int, warps: set[int]) -> None:
        """Count bytes that these warps of the barrier's own block have sent."""
        self.senders[self.phase % 2] |= warps
        self._bytes -= size
        self._complete()

    def _complete(self) -> None:
        if self._pending == 0 and self._bytes == 0:
            self._pending, self.phase = self._count, self.phase + 1
            self.senders[self.phase % 2] = set()


class Cluster:
    """Blocks that reach each other's shared memory."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.shared: list[Shared] = []  # by rank
        self.mbarriers: list[MBarriers] = []
        self.phase = self._arrived = 0

    def arrive(self) -> int:
        """Arrive at the barrier of the cluster; the phase to wait out."""
        phase = self.phase
        self._arrived += 1
        if self._arrived == self.size:
            self._arrived, self.phase = 0, phase + 1
        return phase

    def load(self, address: np.ndarray, mask: Mask, size: int, where: str) -> np.ndarray:
        """ld.shared::cluster: uint8 [lanes, size]."""
        out = np.zeros((address.size, size), np.uint8)
        for rank, lanes in self._lanes(address, mask):
            at = self.shared[rank].check(address[lanes] & _ADDRESS, size, where)
            out[lanes] = gather(self.shared[rank].bytes, at, size)
        return out

    def store_async(
        self,
        sender: int,
        address: np.ndarray,
        data: np.ndarray,
        barrier: np.ndarray,
        mask: Mask,
        where: str,
    ) -> None:
        """st.async of block `sender`: the barrier beside the data counts the bytes."""
        size = data.shape[1]
        for rank, lanes in self._lanes(address, mask):
            at = self.shared[rank].check(address[lanes] & _ADDRESS, size, where)
            scatter(self.shared[rank].bytes, at, data[lanes])
            for lane, b in zip(np.flatnonzero(lanes), map(int, barrier[lanes]), strict=True):
                if b >> int(_RANK) != rank:
                    raise Fault(f"{where}: data and barrier in different blocks")
                warps = {int(lane) // 32} if rank == sender else set()
                self.mbarriers[rank].at(b & int(_ADDRESS), where).receive(size, warps)

    def _lanes(self, address: np.ndarray, mask: Mask) -> list[tuple[int, np.ndarray]]:
        """The ranks that are addressed, and the lanes that do it."""
        ranks = address >> _RANK
        on = np.ones(address.size, bool) if mask is None else mask
        if (ranks[on] >= self.size).any():
            raise Fault(f"an address in block {ranks[on].max()} of a cluster of {self.size}")
        return [(int(rank), on & (ranks == rank)) for rank in np.unique(ranks[on])]
