"""Makes Triton's interpreter round as a GPU does.

On its own it adds whole products of matrices to what they are added to, takes bfloat16 for
integers when it multiplies and cuts it off when it converts, and knows neither TF32 nor inline
assembly. With :func:`rounding` around a call

- exact float32 products are chains of fused multiply-adds, term after term;
- other products are sums of so many terms as a matrix instruction takes, each sum cut off to
  float32; factors of float32 are cut off to TF32, as the instruction does;
- `cvt.rna.tf32` rounds, so a kernel that forgets it shows;
- `tanh.approx` errs, up or down, by as much as it may;
- bfloat16 rounds to the nearest, ties to even.

What it still lacks: contraction of a multiplication and an addition outside of products, and the
approximations of exp and of divisions, which err by two roundings.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

INTERPRETED = [  # marks of tests
    pytest.mark.interpreted,
    pytest.mark.skipif(
        torch.cuda.is_available(),
        reason="these tests interpret the kernels, `-m gpu` compiles them",
    ),
]
TERMS = 16  # of a matrix instruction with 16-bit factors, half of that in TF32
TANH_ERROR = 2.0**-11  # the relative error that PTX states for tanh.approx.f32
_LOW_BITS = np.uint32(0x1FFF)  # of float32, which TF32 has not
_TIE = np.uint32(0x1000)


@contextmanager
def rounding(tf32: bool = False, worst: bool = False) -> Iterator[None]:
    """Round as a GPU does in this block.

    Args:
        tf32: whether kernels that want TF32 get it. Without, their products are exact, so that
            plans made for TF32 can be held against float32.
        worst: whether every `tanh.approx` errs by all that PTX allows, and not by some of it. No
            function does; the sigmoid made of it is then 2^-12 off where a gate is closed, which
            shows beside cells as large as 90.
    """
    from triton.runtime.interpreter import InterpreterBuilder

    from fastlstm.kernels.triton import launch

    cast_impl, binary_op = InterpreterBuilder.cast_impl, InterpreterBuilder.binary_op
    changes = {
        "create_dot": lambda _, a, b, d, precision, *rest: dot(a, b, d, precision.name, tf32),
        "create_inline_asm": lambda _, text, constraints, values, *rest: assembly(
            text, values[0], tf32, worst
        ),
        "cast_impl": lambda builder, x, to: cast(x, to, partial(cast_impl, builder)),
        "binary_op": lambda builder, a, b, op: combine(a, b, op, partial(binary_op, builder)),
    }
    with (
        mock.patch.multiple(InterpreterBuilder, **changes),
        mock.patch.object(launch, "rounds_as_gpu", True),
    ):
        yield


# What the interpreter's builder calls. Its tensors have `data`, an array of NumPy's, and `dtype`,
# a type of Triton's; bfloat16 lies there as uint16.


@np.errstate(invalid="ignore")  # 0 * inf is NaN, there as here
def dot(a: Any, b: Any, start: Any, precision: str, tf32: bool) -> Any:
    """`start` [M, N] + a [M, K] b [K, N]; precision is "TF32" or "IEEE", of float32."""
    if a.dtype.primitive_bitwidth == 16:
        return like(start, blocks(to_float64(a), to_float64(b), start.data, TERMS))
    if tf32 and precision == "TF32":
        factors = (cut_to_tf32(x.data).astype(np.float64) for x in (a, b))
        return like(start, blocks(*factors, start.data, TERMS // 2))
    return like(start, chain(to_float64(a), to_float64(b), start.data))


def assembly(text: str, x: Any, tf32: bool, worst: bool) -> Any:
    """The instruction `text` of every element of x."""
    if text.startswith("tanh.approx.f32 "):
        return Results(like(x, tanh_approx(x.data, worst)))
    if text.startswith("cvt.rna.tf32.f32 "):
        rounded = round_to_tf32(x.data) if tf32 else x.data
        return Results(handle(rounded.view(np.int32), "int32"))
    raise NotImplementedError(f"tests/interpreter.py does not know the instruction {text!r}")


def cast(x: Any, to: Any, otherwise: Callable[[Any, Any], Any]) -> Any:
    """x as numbers of the type `to`."""
    source, target = x.dtype.scalar, to.scalar
    if source == target:
        return x
    if source.is_bf16():
        return cast(handle(widen(x.data), "float32"), to, otherwise)
    if target.is_bf16():
        return handle(narrow(x.data.astype(np.float32)), "bfloat16")
    return otherwise(x, to)


def combine(a: Any, b: Any, op: Any, otherwise: Callable[[Any, Any, Any], Any]) -> Any:
    """op(a, b) for every element, `op` a function of NumPy's."""
    if not a.dtype.scalar.is_bf16():
        return otherwise(a, b, op)
    result = op(widen(a.data), widen(b.data))
    if result.dtype == bool:
        return handle(result, "int1")
    return handle(narrow(result), "bfloat16")


@dataclass
class Results:
    """What inline assembly returns."""

    only: Any

    def get_result(self, _: int) -> Any:
        """The tensor; there is one."""
        return self.only


def handle(data: np.ndarray, dtype: str) -> Any:
    """A tensor of the interpreter's."""
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    return TensorHandle(data, getattr(tl, dtype))


def like(x: Any, data: np.ndarray) -> Any:
    """A tensor of x's dtype."""
    return type(x)(data, x.dtype.scalar)


def to_float64(x: Any) -> np.ndarray:
    """The numbers of an interpreter's tensor of floating-point numbers."""
    return (widen(x.data) if x.dtype.scalar.is_bf16() else x.data).astype(np.float64)


def chain(a: np.ndarray, b: np.ndarray, start: np.ndarray) -> np.ndarray:
    """`start` + a b in float32, term after term, each rounded once: a [M, K], b [K, N].

    The products are exact in float64. So a sum rounds to 53 bits first, which changes one float32
    of 2^29.
    """
    total = start.astype(np.float32)
    for column, row in zip(a.T, b, strict=True):
        total = (np.multiply.outer(column, row) + total).astype(np.float32)
    return total


def blocks(a: np.ndarray, b: np.ndarray, start: np.ndarray, terms: int) -> np.ndarray:
    """`start` + a b in float32, so many terms at a time, each sum cut off: a [M, K], b [K, N]."""
    total = start.astype(np.float32)
    for k in range(0, a.shape[1], terms):
        total = cut_off(a[:, k : k + terms] @ b[k : k + terms] + total)
    return total


def cut_off(x: np.ndarray) -> np.ndarray:
    """float64 to float32, towards zero; infinities and NaN stay."""
    near = x.astype(np.float32)
    too_far = (np.abs(near) > np.abs(x)) & np.isfinite(near)
    return np.where(too_far, np.nextafter(near, np.float32(0)), near)


def round_to_tf32(x: np.ndarray) -> np.ndarray:
    """float32 to the nearest of 10 bits of fraction, ties away from zero, as float32."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + _TIE) & ~_LOW_BITS
    return np.where(np.isfinite(x), rounded, bits).view(np.float32)


def cut_to_tf32(x: np.ndarray) -> np.ndarray:
    """float32 to 10 bits of fraction, the others cut off, as float32; NaN stays."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return np.where(np.isnan(x), bits, bits & ~_LOW_BITS).view(np.float32)


def tanh_approx(x: np.ndarray, worst: bool) -> np.ndarray:
    """tanh of float32, off by up to TANH_ERROR as the bits of x will have it, or by all of it."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    mixed = (bits ^ (bits >> np.uint32(15))) * np.uint32(0x735A2D97)
    mixed ^= mixed >> np.uint32(15)
    chance = mixed / 2.0**31 - 1  # in [-1, 1)
    error = (np.sign(chance) if worst else chance) * TANH_ERROR
    return np.clip(np.tanh(x.astype(np.float64)) * (1 + error), -1, 1).astype(np.float32)


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16, as the interpreter keeps it in uint16, to float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def narrow(x: np.ndarray) -> np.ndarray:
    """float32 to bfloat16 in uint16, to the nearest, ties to even; NaN stays."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    even = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = (bits + np.uint32(0x7FFF) + even) >> np.uint32(16)
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)


def whole(*shape: int, dtype: torch.dtype) -> Tensor:
    """Small integers: their products and the sums of these are exact in float32."""
    return torch.randint(-3, 4, shape).to(dtype)
