"""Accesses of two warps to one byte, of which one writes, with no barrier between them.

The warps of a block run in lockstep here and in any order on a GPU: only a barrier makes one wait
for another.
"""

import numpy as np

SEVERAL = -1  # instead of the number of a warp
_UNIT = 2  # bytes


class Accesses:
    """When each half word of a memory was last read and written, and by which warp.

    Single bytes are not told apart: nothing that is exchanged is that small, and it halves the
    time of the emulator.
    """

    def __init__(self, size: int) -> None:
        size = size // _UNIT + 1
        self.wrote_at, self.read_at = (np.zeros(size, np.int32) for _ in range(2))
        self.wrote_by, self.read_by = (np.zeros(size, np.int16) for _ in range(2))


class Races:
    """Of one block: its barriers so far, and what was found."""

    def __init__(self, threads: int) -> None:
        self.warps = np.arange(threads) // 32
        self.epoch = 1  # of accesses between two barriers
        self.found: set[tuple[str, str]] = set()

    def barrier(self) -> None:
        self.epoch += 1

    def of(self, mask: np.ndarray | None) -> np.ndarray:
        """The warps of the threads that a mask leaves."""
        return self.warps if mask is None else self.warps[mask]

    def report(self, where: str, what: str) -> None:
        self.found.add((where, what))

    def read(
        self, log: Accesses, at: np.ndarray, size: int, warps: np.ndarray, where: str
    ) -> None:
        """Warps read `size` bytes each."""
        b, w = _units(at, size, warps)
        if ((log.wrote_at[b] == self.epoch) & (log.wrote_by[b] != w)).any():
            self.report(where, "reads what another warp has just written")
        again = (log.read_at[b] == self.epoch) & (log.read_by[b] != w)
        log.read_by[b] = np.where(again, SEVERAL, w)
        log.read_at[b] = self.epoch
        if (log.read_by[b] != w).any():  # several warps in this instruction
            order = np.argsort(b, kind="stable")
            b, w = b[order], w[order]
            log.read_by[b[1:][(b[1:] == b[:-1]) & (w[1:] != w[:-1])]] = SEVERAL

    def write(
        self, log: Accesses, at: np.ndarray, size: int, warps: np.ndarray, where: str
    ) -> None:
        """Warps write `size` bytes each."""
        b, w = _units(at, size, warps)
        if ((log.wrote_at[b] == self.epoch) & (log.wrote_by[b] != w)).any():
            self.report(where, "writes what another warp has just written")
        if ((log.read_at[b] == self.epoch) & (log.read_by[b] != w)).any():
            self.report(where, "writes what another warp has just read")
        log.wrote_at[b], log.wrote_by[b] = self.epoch, w

    def order(self, log: Accesses, warps: set[int]) -> None:
        """What these warps have done so far lies before what any warp does from now on."""
        for at, by in ((log.wrote_at, log.wrote_by), (log.read_at, log.read_by)):
            at[np.isin(by, [*warps])] = 0

    def release(self, log: Accesses, warps: np.ndarray, where: str) -> None:
        """A thread publishes what its warp wrote, and the others before the last barrier."""
        if ((log.wrote_at == self.epoch) & (log.wrote_by != warps[0])).any():
            self.report(where, "publishes what another warp has just written")

    def read_by_all(self, log: Accesses, at: np.ndarray, size: int, where: str) -> None:
        """The tensor core reads: what any warp wrote has to lie behind a barrier."""
        b, _ = _units(at, size, at)
        if (log.wrote_at[b] == self.epoch).any():
            self.report(where, "the tensor core reads what has just been written")
        log.read_at[b], log.read_by[b] = self.epoch, SEVERAL


def _units(at: np.ndarray, size: int, warps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The half words of accesses, and the warp of each."""
    count = max(size // _UNIT, 1)
    return (at[:, None] // _UNIT + np.arange(count)).ravel(), np.repeat(warps, count)
