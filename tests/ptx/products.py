"""Matrix instructions: where elements lie in registers and in shared memory.

"Matrix Fragments" and "Matrix Descriptor Format" of the PTX ISA. Lane l of a warp is g = l / 4,
t = l % 4. A product is summed in float64 and rounded once; how an MMA rounds between its terms is
not said anywhere.
"""

from typing import NamedTuple

import numpy as np

from .arithmetic import pairs, widen
from .faults import Fault
from .shared import Shared
from .types import F32, U16, U32

Registers = list[np.ndarray]

_LANE = np.arange(32)
_G, _T = _LANE // 4, _LANE % 4


def load_matrices(
    shared: Shared, address: np.ndarray, count: int, trans: bool, where: str
) -> Registers:
    """ldmatrix: `count` matrices of 8 x 8, whose rows lanes 0 to 8 * count - 1 point at."""
    rows, warps = _rows(address, count)
    found = shared.load_rows(rows, warps, where).view(U16).reshape(-1, count, 8, 8)
    if trans:
        found = found.swapaxes(2, 3)
    low, high = found[:, :, _G, 2 * _T], found[:, :, _G, 2 * _T + 1]
    both = low.astype(U32) | high.astype(U32) << U32(16)
    return [np.ascontiguousarray(both[:, j]).reshape(-1) for j in range(count)]


def store_matrices(
    shared: Shared, address: np.ndarray, registers: Registers, trans: bool, where: str
) -> None:
    """stmatrix: the other way."""
    rows, warps = _rows(address, len(registers))
    matrices = np.zeros((address.size // 32, len(registers), 8, 8), U16)
    view = matrices.swapaxes(2, 3) if trans else matrices
    for j, register in enumerate(registers):
        lanes = register.reshape(-1, 32)
        view[:, j, _G, 2 * _T] = (lanes & U32(0xFFFF)).astype(U16)
        view[:, j, _G, 2 * _T + 1] = (lanes >> U32(16)).astype(U16)
    shared.store_rows(rows, warps, matrices.reshape(-1, 8).view(np.uint8), where)


def _rows(address: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Addresses of rows, and the warp of each."""
    rows = address.reshape(-1, 32)[:, : 8 * count]
    return rows.reshape(-1), np.repeat(np.arange(len(rows)), 8 * count)


def mma(kind: str, a: Registers, b: Registers, c: Registers) -> Registers:
    """d = a b + c, of [16, K], [K, 8] and [16, 8], in every warp."""
    result = fragment_a(kind, a) @ fragment_b(kind, b)
    places = [(_G + 8 * (i // 2), 2 * _T + i % 2) for i in range(4)]
    for (row, column), register in zip(places, c, strict=True):
        result[:, row, column] += register.view(F32).reshape(-1, 32)
    rounded = result.astype(F32)
    return [np.ascontiguousarray(rounded[:, r, k]).reshape(-1).view(U32) for r, k in places]


def fragment_a(kind: str, registers: Registers) -> np.ndarray:
    """[warps, 16, K] in float64; K is 8 for TF32, else 16."""
    warps = registers[0].size // 32
    found = np.zeros((warps, 16, 8 if kind == "tf32" else 16))
    for i, register in enumerate(registers):
        row = _G + 8 * (i % 2)
        if kind == "tf32":
            found[:, row, _T + 4 * (i // 2)] = widen(register, kind).reshape(warps, 32)
            continue
        for half, value in enumerate(pairs(register, kind)):
            found[:, row, 2 * _T + half + 8 * (i // 2)] = value.reshape(warps, 32)
    return found


def fragment_b(kind: str, registers: Registers) -> np.ndarray:
    """[warps, K, 8] in float64."""
    warps = registers[0].size // 32
    found = np.zeros((warps, 8 if kind == "tf32" else 16, 8))
    for i, register in enumerate(registers):
        if kind == "tf32":
            found[:, _T + 4 * i, _G] = widen(register, kind).reshape(warps, 32)
            continue
        for half, value in enumerate(pairs(register, kind)):
            found[:, 2 * _T + half + 8 * i, _G] = value.reshape(warps, 32)
    return found


def wgmma(
    shared: Shared,
    kind: str,
    columns: int,
    d: Registers,
    a: Registers | np.ndarray,
    b: np.ndarray,
    scale: np.ndarray | int,
    trans_a: int,
    trans_b: int,
    where: str,
) -> Registers:
    """d = a b + scale d, of [64, K] and [K, columns], in every group of four warps.

    a is a fragment or a descriptor, b a descriptor; `scale` is 0 or 1, of each thread or of all.
    """
    out = [np.empty(shared.threads, U32) for _ in d]
    row = 16 * np.arange(4)[:, None] + _G
    for group in range(shared.threads // 128):
        own = slice(128 * group, 128 * group + 128)
        if isinstance(a, list):
            left = fragment_a(kind, [register[own] for register in a])
            left = left.reshape(64, -1)
        else:
            left = described(shared, a[own], 64, kind, trans_a, where)
        product = left @ described(shared, b[own], columns, kind, trans_b, where).T
        keep = scale[own].reshape(4, 32) if isinstance(scale, np.ndarray) else bool(scale)
        for i, register in enumerate(d):
            column = 8 * (i // 4) + 2 * _T + i % 2
            value = product[row + 8 * (i % 4 // 2), column]
            before = register[own].view(F32).reshape(4, 32).astype(np.float64)
            sums = np.where(keep, value + before, value).astype(F32)
            out[i][own] = sums.reshape(-1).view(U32)
    return out


_SWIZZLE = (16, 128, 64, 32)  # widths in bytes, by the two bits that choose


class Descriptor(NamedTuple):
    """The fields of a matrix descriptor; offsets in bytes."""

    start: int
    leading: int
    stride: int
    base: int  # 128-byte rows between the start of a swizzle's pattern and its alignment
    swizzle: int  # width in bytes; 16: none

    @classmethod
    def of(cls, bits: int) -> "Descriptor":
        start, leading, stride = ((bits >> at & 0x3FFF) << 4 for at in (0, 16, 32))
        return cls(start, leading, stride, bits >> 49 & 7, _SWIZZLE[bits >> 62])


def described(
    shared: Shared, descriptors: np.ndarray, rows: int, kind: str, trans: int, where: str
) -> np.ndarray:
    """[rows, K] in float64 of the descriptor that all threads of a warpgroup have.

    Rows are contiguous in K, or, transposed, columns in the rows.
    """
    if (descriptors != descriptors[0]).any():
        raise Fault(f"{where}: the descriptor differs within a warpgroup")
    found = Descriptor.of(int(descriptors[0]))
    size = 4 if kind == "tf32" else 2
    r, k = np.arange(rows)[:, None], np.arange(32 // size)[None]
    width, chunk = found.swizzle, 16 // size
    if trans and width > 16:
        per = width // size
        at = r // per * found.leading + k // 8 * found.stride + k % 8 * width + r % per * size
    elif trans:
        at = r // chunk * found.stride + k // 8 * found.leading + k % 8 * 16 + r % chunk * size
    elif width > 16:
        at = r // 8 * found.stride + r % 8 * width + k * size
    else:
        at = r // 8 * found.stride + r % 8 * 16 + k // chunk * found.leading + k % chunk * size
    at = found.start + at
    if width > 16:
        at = at ^ ((at >> 7) - found.base & width // 16 - 1) << 4
    raw = shared.load_matrix(at.reshape(-1), size, where)
    return widen(raw.reshape(-1).view(U32 if size == 4 else U16), kind).reshape(at.shape)
