"""Rounding, sums of pairs, and approximations that err as much as the hardware may.

Numbers are the bits of registers, arrays of uint16 or uint32. The errors are those that the PTX
ISA states for tanh.approx.f32 (2^-11, relative), ex2.approx.f32 and div.full.f32 (2 units in the
last place); a number always gets the same one.
"""

import numpy as np

from .types import F32, U16, U32, U64

ERROR = {"tanh": 2.0**-11, "ex2": 2.0**-22.5, "div": 2.0**-22.5}


def noise(bits: np.ndarray, amplitude: float) -> np.ndarray:
    """A number in [-1, 1] of each value, always the same one, times amplitude."""
    hashed = bits.astype(U32) * U32(2654435761)
    hashed = (hashed ^ (hashed >> U32(15))) * U32(2246822519)
    hashed = hashed ^ (hashed >> U32(13))
    return (hashed.astype(np.float64) / 2**31 - 1) * amplitude


def wide(bits: np.ndarray) -> np.ndarray:
    """float32 as float64."""
    return bits.view(F32).astype(np.float64)


def single(value: np.ndarray) -> np.ndarray:
    """float64 rounded to float32."""
    return np.asarray(value, np.float64).astype(F32).view(U32)


def tanh_approx(x: np.ndarray) -> np.ndarray:
    return single(np.tanh(wide(x)) * (1 + noise(x, ERROR["tanh"])))


def ex2_approx(x: np.ndarray) -> np.ndarray:
    return single(np.exp2(wide(x)) * (1 + noise(x, ERROR["ex2"])))


def div_full(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return single(wide(a) / wide(b) * (1 + noise(a ^ b, ERROR["div"])))


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    return single(wide(a) * wide(b) + wide(c))


def fma_down(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a b + c, rounded towards minus infinity: a product is exact in float64, so is the error."""
    product, other = wide(a) * wide(b), wide(c)
    total = product + other
    part = total - product
    error = (product - (total - part)) + (other - part)
    rounded = total.astype(F32)
    above = (rounded > total) | ((rounded == total) & (error < 0))
    return np.where(above, np.nextafter(rounded, F32(-np.inf)), rounded).view(U32)


def divide(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quotient, towards zero, and remainder of integers; what is divided by 0 is not defined."""
    some = np.where(b == 0, np.ones_like(b), b)
    rest = np.fmod(a, some)
    return (a - rest) // some, rest


def bits_inserted(a: np.ndarray, b: np.ndarray, at: int, length: int) -> np.ndarray:
    """bfi: the lowest `length` bits of a instead of those of b from bit `at` on."""
    mask = U32((1 << length) - 1 << at & 0xFFFFFFFF)
    return (b & ~mask) | ((a << U32(at)) & mask)


def to_bf16(x: np.ndarray) -> np.ndarray:
    """Rounded to nearest, ties to even; a NaN stays one."""
    tie = (x >> U32(16)) & U32(1)
    rounded = (x.astype(U64) + U64(0x7FFF) + tie.astype(U64)) >> U64(16)
    return np.where(np.isnan(x.view(F32)), U16(0x7FFF), rounded.astype(U16))


def to_f16(x: np.ndarray) -> np.ndarray:
    return x.view(F32).astype(np.float16).view(U16)


def to_tf32(x: np.ndarray) -> np.ndarray:
    """Rounded to nearest, ties away from zero."""
    rounded = (x.astype(U64) + U64(0x1000)).astype(U32) & U32(0xFFFFE000)
    return np.where(np.isfinite(x.view(F32)), rounded, x)


def widen(bits: np.ndarray, kind: str) -> np.ndarray:
    """Factors as float64. Matrix instructions do not look at the lower 13 bits of TF32."""
    if kind == "tf32":
        return wide(bits & U32(0xFFFFE000))
    if kind == "bf16":
        return wide(bits.astype(U32) << U32(16))
    return bits.view(np.float16).astype(np.float64)


def pairs(bits: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """The lower and the upper 16-bit numbers of registers, as float64."""
    lower, upper = (bits & U32(0xFFFF)).astype(U16), (bits >> U32(16)).astype(U16)
    return widen(lower, kind), widen(upper, kind)


def add_halves(x: np.ndarray, y: np.ndarray, kind: str) -> np.ndarray:
    """add.bf16, add.f16: the bits of a sum of numbers that are given as float64."""
    return (to_bf16 if kind == "bf16" else to_f16)(single(x + y))


def add_pairs(a: np.ndarray, b: np.ndarray, kind: str) -> np.ndarray:
    """add.bf16x2, add.f16x2."""
    lower, upper = (
        add_halves(x, y, kind).astype(U32)
        for x, y in zip(pairs(a, kind), pairs(b, kind), strict=True)
    )
    return lower | upper << U32(16)


def permute(a: np.ndarray, b: np.ndarray, selector: np.ndarray, threads: int) -> np.ndarray:
    """prmt: four bytes of eight, or of what their signs make."""
    a, b, selector = (np.broadcast_to(np.asarray(x, U32), (threads,)) for x in (a, b, selector))
    both = a.astype(U64) | b.astype(U64) << U64(32)
    out = np.zeros(threads, U32)
    for place in range(4):
        choice = (selector >> U32(4 * place)) & U32(15)
        byte = (both >> ((choice & U32(7)).astype(U64) * U64(8))) & U64(255)
        signs = np.where(byte & U64(128), U64(255), U64(0))
        byte = np.where(choice & U32(8), signs, byte)
        out |= byte.astype(U32) << U32(8 * place)
    return out
