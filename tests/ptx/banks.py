"""Bank conflicts: how often an access of shared memory has to come back for words of one bank.

Of shared memory 32 banks of 4 bytes each serve one word at a time, to all threads that want that
word: a wavefront. What a warp asks for is served in parts of 128 bytes: 8 bytes a thread to half a
warp, 16 to a quarter, and one matrix of ldmatrix or stmatrix after the other.
"""

from collections import Counter
from typing import NamedTuple

import numpy as np

from .memory import Mask

_BANKS, _WORD = 32, 4

_Access = tuple[str, int, bytes, bytes | None]  # the instruction, its size, addresses, the mask


class Wavefronts(NamedTuple):
    """How many an instruction takes, and how many if no two words lay in the same bank."""

    taken: int
    fewest: int


class Banks:
    """What is asked of shared memory, and how often.

    The steps of a loop ask for the same, so an access is only noted here, and looked at later.
    """

    def __init__(self) -> None:
        self._asked: Counter[_Access] = Counter()

    def ask(self, at: np.ndarray, size: int, mask: Mask, where: str) -> None:
        """Note an access: the threads that a mask leaves want `size` bytes each."""
        self._asked[where, size, at.tobytes(), None if mask is None else mask.tobytes()] += 1

    def add(self, other: "Banks") -> None:
        """Note what was noted elsewhere."""
        self._asked.update(other._asked)

    def by_instruction(self) -> dict[str, Wavefronts]:
        """The wavefronts of each instruction, in all warps and as often as they executed it."""
        found: dict[str, Wavefronts] = {}
        for (where, size, at, mask), times in self._asked.items():
            addresses = np.frombuffer(at, np.int64)
            threads = np.arange(addresses.size)
            if mask is not None:
                threads = np.flatnonzero(np.frombuffer(mask, bool))
            once, before = wavefronts(addresses, size, threads), found.get(where, (0, 0))
            found[where] = Wavefronts(
                before[0] + times * once.taken, before[1] + times * once.fewest
            )
        return found


def wavefronts(at: np.ndarray, size: int, threads: np.ndarray) -> Wavefronts:
    """Those of one access, in which these threads want `size` bytes each."""
    words = max(size // _WORD, 1)
    parts = np.repeat(threads * words // _BANKS, words)
    wanted = (at[:, None] // _WORD + np.arange(words)).ravel()
    distinct = np.unique(parts << 32 | wanted)
    places = (distinct >> 32) * _BANKS + distinct % _BANKS
    in_banks = np.bincount(places, minlength=int(parts.max() + 1) * _BANKS)
    longest = in_banks.reshape(-1, _BANKS).max(axis=1)
    return Wavefronts(int(longest.sum()), int((longest > 0).sum()))
