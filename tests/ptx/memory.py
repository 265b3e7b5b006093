"""Global memory: the storages of the tensors that a launch is given, and nothing else.

"State Spaces" of the PTX ISA; that an address is a multiple of an access's size, "Addresses as
Operands".
"""

import ctypes
from collections.abc import Iterator

import numpy as np
from torch import Tensor

from .faults import Fault
from .parse import PARAMETERS, Parameter
from .races import Accesses, Races

Mask = np.ndarray | None
Lanes = np.ndarray | slice


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


class Parameters:
    """What a launch gives to a kernel: numbers, and structures as bytes. Those left out are 0."""

    def __init__(self, places: list[Parameter], values: list[int | bytes]) -> None:
        self._bytes = np.zeros(places[-1].offset + places[-1].size if places else 0, np.uint8)
        for (offset, size), value in zip(places, values, strict=False):
            raw = (
                value if isinstance(value, bytes) else (value % 256**size).to_bytes(size, "little")
            )
            if len(raw) != size:
                raise Fault(f"a parameter of {size} bytes, not {len(raw)}")
            self._bytes[offset : offset + size] = np.frombuffer(raw, np.uint8)

    def load(self, address: np.ndarray, mask: Mask, size: int, where: str) -> np.ndarray:
        """uint8 [lanes, size], 0 where the mask is not set."""
        lanes = slice(None) if mask is None else mask
        at = address[lanes].astype(np.int64) - PARAMETERS
        if at.size and (int(at.min()) < 0 or int(at.max()) + size > self._bytes.size):
            raise Fault(f"{where}: outside of {self._bytes.size} bytes of parameters")
        out = np.zeros((address.size, size), np.uint8)
        out[lanes] = self._bytes[at[:, None] + np.arange(size)]
        return out


class Storages:
    """Every byte that a kernel may touch in global memory.

    `several`: lanes of one instruction may reach different tensors. Where they never do, one that
    leaves its tensor for another is seen.
    """

    def __init__(self, tensors: list[Tensor], several: bool = False) -> None:
        self._several = several
        storages = [tensor.untyped_storage() for tensor in tensors]
        sizes = {s.data_ptr(): s.nbytes() for s in storages if s.nbytes()}
        self._starts = np.array(sorted(sizes), dtype=np.uint64)
        self._bytes = [
            np.frombuffer((ctypes.c_uint8 * sizes[start]).from_address(start), np.uint8)
            for start in map(int, self._starts)
        ]

    def find(
        self, address: np.ndarray, size: int, where: str
    ) -> Iterator[tuple[int, Lanes, np.ndarray]]:
        """Each storage by its number, the lanes that access it, and their offsets.

        Raises:
            Fault: it is outside of a storage, or not a multiple of the size of the access.
        """
        first = self._number(address.min(), where)
        if not self._several or self._number(address.max(), where) == first:
            yield first, slice(None), self._offsets(first, address, size, where)
        else:
            numbers = np.searchsorted(self._starts, address, side="right") - 1
            for number in map(int, np.unique(numbers)):
                lanes = np.flatnonzero(numbers == number)
                yield number, lanes, self._offsets(number, address[lanes], size, where)

    def _number(self, address: np.uint64, where: str) -> int:
        number = int(np.searchsorted(self._starts, address, side="right")) - 1
        if number < 0:
            raise Fault(f"{where}: address {int(address):#x} is before every tensor")
        return number

    def _offsets(self, number: int, address: np.ndarray, size: int, where: str) -> np.ndarray:
        offset = address - self._starts[number]
        end, limit = int(offset.max()) + size, self._bytes[number].size
        if end > limit:
            raise Fault(f"{where}: up to byte {end} of a storage of {limit} bytes")
        odd = address[address % np.uint64(size) != 0]
        if odd.size:
            raise Fault(f"{where}: misaligned, {size} bytes at {int(odd[0]):#x}")
        return offset.astype(np.int64)

    def bytes_of(self, number: int) -> np.ndarray:
        """The bytes of a storage."""
        return self._bytes[number]


class Memory:
    """Global memory as one block sees it: with its own races."""

    def __init__(self, storages: Storages, races: Races) -> None:
        self._storages, self._races = storages, races
        self._log: dict[int, Accesses] = {}

    def load(
        self, address: np.ndarray, mask: Mask, size: int, where: str, acquires: bool = False
    ) -> np.ndarray:
        """uint8 [lanes, size], 0 where the mask is not set. What acquires does not race."""
        out = np.zeros((address.size, size), np.uint8)
        lanes = slice(None) if mask is None else mask
        wanted, warps = address[lanes], self._races.of(mask)
        found = np.zeros((wanted.size, size), np.uint8)
        for number, some, at in self._storages.find(wanted, size, where) if wanted.size else ():
            if not acquires:
                self._races.read(self._accesses(number), at, size, warps[some], where)
            found[some] = gather(self._storages.bytes_of(number), at, size)
        out[lanes] = found
        return out

    def store(self, address: np.ndarray, mask: Mask, data: np.ndarray, where: str) -> None:
        """Write uint8 [lanes, size] where the mask is set."""
        lanes, size = slice(None) if mask is None else mask, data.shape[1]
        wanted, warps, data = address[lanes], self._races.of(mask), data[lanes]
        for number, some, at in self._storages.find(wanted, size, where) if wanted.size else ():
            self._races.write(self._accesses(number), at, size, warps[some], where)
            scatter(self._storages.bytes_of(number), at, data[some])

    def release(self, mask: Mask, where: str) -> None:
        """Publish to other blocks what was written so far."""
        warps = self._races.of(mask)
        for log in self._log.values() if warps.size else ():
            self._races.release(log, warps, where)

    def _accesses(self, number: int) -> Accesses:
        if number not in self._log:
            self._log[number] = Accesses(self._storages.bytes_of(number).size)
        return self._log[number]
