"""The shared memory of a block. It starts as NaN, so what is read before it is written shows."""

import numpy as np

from .banks import Banks
from .faults import Fault
from .memory import Mask, gather, scatter
from .races import Accesses, Races

_ROOM = 1024  # beyond the end, for rounding up


class Shared:
    """`size` bytes of shared memory."""

    def __init__(self, size: int, threads: int, races: Races, banks: Banks) -> None:
        self.size, self.threads, self.races, self.banks = size, threads, races, banks
        self.bytes = np.full((size + _ROOM) // 16 * 16, 0xFF, np.uint8)
        self.accesses = Accesses(self.bytes.size)

    def check(self, address: np.ndarray, size: int, where: str) -> np.ndarray:
        """The addresses as int64.

        Raises:
            Fault: one is outside, or not a multiple of the size of the access.
        """
        at = address.astype(np.int64)
        if at.size and int(at.max()) + size > self.size:
            raise Fault(f"{where}: up to byte {int(at.max()) + size} of {self.size} shared bytes")
        if (at % size).any():
            raise Fault(f"{where}: misaligned in shared memory")
        return at

    def load(self, address: np.ndarray, mask: Mask, size: int, where: str) -> np.ndarray:
        """uint8 [lanes, size], 0 where the mask is not set."""
        out = np.zeros((address.size, size), np.uint8)
        lanes = slice(None) if mask is None else mask
        at = self.check(address[lanes], size, where)
        if at.size:
            self.races.read(self.accesses, at, size, self.races.of(mask), where)
            self.banks.ask(at, size, mask, where)
            out[lanes] = gather(self.bytes, at, size)
        return out

    def store(self, address: np.ndarray, mask: Mask, data: np.ndarray, where: str) -> None:
        """Write uint8 [lanes, size] where the mask is set."""
        lanes, size = slice(None) if mask is None else mask, data.shape[1]
        at = self.check(address[lanes], size, where)
        if at.size:
            self.races.write(self.accesses, at, size, self.races.of(mask), where)
            self.banks.ask(at, size, mask, where)
            scatter(self.bytes, at, data[lanes])
            if (gather(self.bytes, at, size) != data[lanes]).any():
                self.races.report(where, "two threads write different values")

    def load_rows(self, address: np.ndarray, warps: np.ndarray, where: str) -> np.ndarray:
        """Rows of 16 bytes, uint8 [rows, 16], each for one warp."""
        at = self.check(address, 16, where)
        self.races.read(self.accesses, at, 16, warps, where)
        self.banks.ask(at, 16, None, where)
        return gather(self.bytes, at, 16)

    def store_rows(
        self, address: np.ndarray, warps: np.ndarray, data: np.ndarray, where: str
    ) -> None:
        """Write rows of 16 bytes."""
        at = self.check(address, 16, where)
        self.races.write(self.accesses, at, 16, warps, where)
        self.banks.ask(at, 16, None, where)
        scatter(self.bytes, at, data)

    def load_matrix(self, at: np.ndarray, size: int, where: str) -> np.ndarray:
        """Elements as the tensor core reads them, uint8 [elements, size]."""
        if int(at.max()) + size > self.size:
            raise Fault(f"{where}: up to byte {int(at.max()) + size} of {self.size} shared bytes")
        self.races.read_by_all(self.accesses, at, size, where)
        return gather(self.bytes, at, size)
