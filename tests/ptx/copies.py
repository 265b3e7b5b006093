"""cp.async: what is copied arrives when its group is waited for, and not before.

"Asynchronous copy" of the PTX ISA. Other warps see it behind a barrier after that.
"""

import numpy as np

from .memory import Mask, Memory, scatter
from .shared import Shared

_Copy = tuple[np.ndarray, np.ndarray, np.ndarray, str]  # where to, data, warps, the instruction


class Copies:
    """The copies of a block that are on their way."""

    def __init__(self, memory: Memory, shared: Shared) -> None:
        self._memory, self._shared = memory, shared
        self._groups: list[list[_Copy]] = []
        self._pending: list[_Copy] = []

    def start(
        self,
        to: np.ndarray,
        source: np.ndarray,
        size: int,
        taken: np.ndarray,
        mask: Mask,
        where: str,
    ) -> None:
        """Copy `size` bytes a lane; zeros where `taken` is 0, whose source is not read."""
        read = taken > 0 if mask is None else (taken > 0) & mask
        data = self._memory.load(source, read, size, where)
        lanes = slice(None) if mask is None else mask
        at = self._shared.check(to[lanes], size, where)
        if at.size:
            warps = self._shared.races.of(mask)
            self._shared.races.write(self._shared.accesses, at, size, warps, where)
            self._shared.banks.ask(at, size, mask, where)
            self._pending.append((at, data[lanes], warps, where))

    def commit(self) -> None:
        """Close a group."""
        self._groups.append(self._pending)
        self._pending = []

    def wait(self, groups: int) -> None:
        """Let everything arrive but the last `groups` groups."""
        shared = self._shared
        while len(self._groups) > groups:
            for at, data, warps, where in self._groups.pop(0):
                scatter(shared.bytes, at, data)
                shared.races.write(shared.accesses, at, data.shape[1], warps, where)
