"""Where the threads of a block are, for kernels whose branches divide it.

"Divergence of Threads in Control Constructs" of the PTX ISA. Of the threads that can go on those
go first that are at the earliest basic block, so the ways of a branch meet again where they join.
At an instruction of a whole warp or block a thread waits until the others have come.
"""

import numpy as np

from .faults import Fault
from .memory import Mask

ENDED = 1 << 30  # behind every basic block

Place = tuple[int, Mask]  # the basic block that is next, and its threads; None: all of the block


class Flow:
    """The next basic block of each thread of a block."""

    def __init__(self, threads: int) -> None:
        self._at = np.zeros(threads, np.int64)
        self._waits = np.zeros(threads, bool)

    def divide(self, active: Mask, taken: np.ndarray | bool, target: int, other: int) -> Place:
        """Send those of the active threads that take a branch to its target, the rest to `other`.

        Raises:
            Fault: no thread can go on, since all that have not ended wait for others.
        """
        on = np.ones(self._at.size, bool) if active is None else active
        self._at[on] = other
        self._at[on & taken] = target
        return self._next()

    def together(self, block: int, active: np.ndarray, whole: bool) -> Place:
        """Let active threads come to `block`, and go on once their warp, or all, are there."""
        self._at[active] = block
        here, missing = self._at == block, (self._at != block) & (self._at < ENDED)
        missing = missing.reshape(1 if whole else -1, self._at.size if whole else 32)
        ready = here & ~missing.any(axis=1).repeat(missing.shape[1])
        self._waits[here] = ~ready[here]
        if ready.any():
            return block, None if ready.all() else ready
        return self._next()

    def _next(self) -> Place:
        living = self._at < ENDED
        going = living & ~self._waits
        if not going.any():
            if living.any():
                raise Fault("a deadlock: threads wait for others of their block that never come")
            return ENDED, None
        block = int(self._at[going].min())
        active = going & (self._at == block)
        return block, None if active.all() else active
