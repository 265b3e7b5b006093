"""Global memory: the storages of the tensors that a launch is given, and nothing else.

"State Spaces" of the PTX ISA; that an address is a multiple of an access's size, "Addresses as
Operands".
"""

import ctypes

import numpy as np
from torch import Tensor

from .faults import Fault
from .races import Accesses, Races

Mask = np.ndarray | None


def gather(memory: np.ndarray, at: np.ndarray, size: int) -> np.ndarray:
    """uint8 [lanes, size] from the bytes at `at`, which are multiples of size."""
    words, index = _words(memory, at, size)
    if words is None:  # the odd bytes at the end of a storage
        return memory[index]
    return np.ascontiguousarray(words[index]).view(np.uint8)


def scatter(memory: np.ndarray, at: np.ndarray, data: np.ndarray) -> None:
    """Write uint8 [lanes, size]."""
    words, index = _words(memory, at, data.shape[1])
    if words is None:
        memory[index] = data
    else:
        words[index] = np.ascontiguousarray(data).view(words.dtype)


def _words(memory: np.ndarray, at: np.ndarray, size: int) -> tuple[np.ndarray | None, np.ndarray]:
    """The memory in words as wide as an access allows, and the index of each lane's words."""
    word = np.dtype({1: np.uint8, 2: np.uint16}.get(size, np.uint32))
    words = memory[: memory.size // word.itemsize * word.itemsize].view(word)
    count, first = size // word.itemsize, at // word.itemsize
    if int(first.max()) + count > words.size:
        return None, at[:, None] + np.arange(size)
    return words, first[:, None] + np.arange(count)


class Storages:
    """Every byte that a kernel may touch in global memory."""

    def __init__(self, tensors: list[Tensor]) -> None:
        storages = [tensor.untyped_storage() for tensor in tensors]
        sizes = {s.data_ptr(): s.nbytes() for s in storages if s.nbytes()}
        self._starts = np.array(sorted(sizes), dtype=np.uint64)
        self._bytes = [
            np.frombuffer((ctypes.c_uint8 * sizes[start]).from_address(start), np.uint8)
            for start in map(int, self._starts)
        ]

    def find(self, address: np.ndarray, size: int, where: str) -> tuple[int, np.ndarray]:
        """The number of the storage that all lanes access, and the offset of each.

        Raises:
            Fault: it is outside of a storage, or not a multiple of the size of the access.
        """
        number = int(np.searchsorted(self._starts, address.min(), side="right")) - 1
        if number < 0:
            raise Fault(f"{where}: address {int(address.min()):#x} is before every tensor")
        offset = address - self._starts[number]
        end, limit = int(offset.max()) + size, self._bytes[number].size
        if end > limit:
            raise Fault(f"{where}: up to byte {end} of a storage of {limit} bytes")
        odd = address[address % np.uint64(size) != 0]
        if odd.size:
            raise Fault(f"{where}: misaligned, {size} bytes at {int(odd[0]):#x}")
        return number, offset.astype(np.int64)

    def bytes_of(self, number: int) -> np.ndarray:
        """The bytes of a storage."""
        return self._bytes[number]


class Memory:
    """Global memory as one block sees it: with its own races."""

    def __init__(self, storages: Storages, races: Races) -> None:
        self._storages, self._races = storages, races
        self._log: dict[int, Accesses] = {}

    def load(self, address: np.ndarray, mask: Mask, size: int, where: str) -> np.ndarray:
        """uint8 [lanes, size], 0 where the mask is not set."""
        out = np.zeros((address.size, size), np.uint8)
        lanes = slice(None) if mask is None else mask
        if address[lanes].size:
            number, at = self._storages.find(address[lanes], size, where)
            self._races.read(self._accesses(number), at, size, self._races.of(mask), where)
            out[lanes] = gather(self._storages.bytes_of(number), at, size)
        return out

    def store(self, address: np.ndarray, mask: Mask, data: np.ndarray, where: str) -> None:
        """Write uint8 [lanes, size] where the mask is set."""
        lanes, size = slice(None) if mask is None else mask, data.shape[1]
        if address[lanes].size:
            number, at = self._storages.find(address[lanes], size, where)
            self._races.write(self._accesses(number), at, size, self._races.of(mask), where)
            scatter(self._storages.bytes_of(number), at, data[lanes])

    def release(self, mask: Mask, where: str) -> None:
        """Publish to other blocks what was written so far."""
        warps = self._races.of(mask)
        for log in self._log.values() if warps.size else ():
            self._races.release(log, warps, where)

    def _accesses(self, number: int) -> Accesses:
        if number not in self._log:
            self._log[number] = Accesses(self._storages.bytes_of(number).size)
        return self._log[number]
