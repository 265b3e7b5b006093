"""What was found out on GPUs: where our kernels are right, and where faster than PyTorch's own.

``auto`` needs no record of the machine for what stands here. A row stands for the sizes between
those that were timed, too; what lies outside of them is left to PyTorch's kernels. All of it is of
an H200 with driver 580, PyTorch 2.11, cuDNN 9.19 and Triton 3.6.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch

from fastlstm.kernels.base import Use, constant
from fastlstm.spec import LayerSpec

__all__ = [
    "CHOICE",
    "CONTESTED",
    "EAGER",
    "READY",
    "REPLAYED",
    "capability",
    "is_contested",
    "is_faster",
    "is_right",
    "pace",
    "precision",
    "said_of",
]

_DEVICES = frozenset({(9, 0)})  # compute capabilities of the GPUs on which kernels have run
_GPU = "an H200"
_EXACT_UNITS = 255  # from 256 on, a few gradients of exact float32 err slightly more than allowed
_CLEAR = 1.05  # closer may be chance
_ANY = 1 << 40

CHOICE = "auto takes them on sm_90 where they were faster than cuDNN, or what that lacks"
"""What users are told of it in a line; :func:`fastlstm.explain` says the rest."""

EAGER = "eager"  # the kernels are called as they are, and compiled when they are first called
READY = "ready"  # the same, but they were compiled before
REPLAYED = "replayed"  # the call is captured in a CUDA graph


class Row(NamedTuple):
    """Calls of plain LSTM layers in which kernels of ours were timed beside PyTorch's."""

    backend: str
    precision: str  # "bf16", "fp16", "tf32" or "exact"
    way: str  # EAGER, READY or REPLAYED
    regimes: str  # of both passes, as Backend.regime names them; "" for all
    units: tuple[int, int]  # H, from and to
    inference: float | None  # PyTorch's time as a multiple of ours, the lowest that was seen
    training: float | None
    rows: tuple[int, int] = (1, 512)  # B D
    steps: tuple[int, int] = (20, _ANY)  # T
    inputs: int = _ANY  # I of any layer, at most
    directions: int = 2  # at most
    packed: bool = False  # whether rows are packed; else all sequences have all steps


# Timed were I, H, L, D, B, T = (10, 32, 2, 1, 512, 20), (28, 64, 1, 2, 256, 28),
# (28, 64, 1, 1, 128, 28) and (28, 128, 1, 1, 128, 28); in TF32 and exact float32
# (64, 64, 1, 1, 64, 128); in bf16 graphs (64, 64, 1, 1, 16, 1024) and (128, 128, 1, 1, 16, 1024);
# wide layers of 128 and 256 steps, I = H; and packed rows of up to 500 steps,
# (80, 256, 1, 2, 64, 500). In bf16 cuDNN has no persistent kernels: each step costs it launches,
# however small it is. In fp16 and TF32 it has: what holds there of many rows and few steps is not
# taken to hold of others. Packed rows take it longer than dense ones, and our kernels no longer.
_FEW_STEPS: dict[str, Any] = {"rows": (128, 512), "steps": (20, 128)}
_FEW_OF_TF32: dict[str, Any] = {"rows": (64, 512), "steps": (20, 128), "inputs": 64}
_LONG = (128, _ANY)
_WIDE: dict[str, Any] = {"steps": _LONG, "directions": 1}
_SOME_STEPS: dict[str, Any] = {"rows": (64, 128), "steps": (20, 128), "directions": 1}
_PACKED: dict[str, Any] = {"rows": (1, 128), "steps": _LONG, "packed": True}
_R, _C, _S = "registers/registers", "cluster/cluster", "steps/steps"
_B, _G, _W = "block/block", "grid/grid", "wide/wide"
# To measure: python -m benchmarks gpu. fastlstm/README.md, "On GPUs", says in words what follows.
_TABLE = (  # the first row that fits a call counts
    Row("triton", "bf16", EAGER, _R, (1, 128), 3.40, 1.32),  # to 6.5 and 1.9
    Row("triton", "bf16", READY, _R, (1, 128), 23.5, 3.84),  # to 44 and 5.7
    Row("triton", "bf16", REPLAYED, _R, (1, 64), 13.3, 5.81),  # to 21 and 9.5
    Row("triton", "bf16", REPLAYED, _R, (65, 128), 7.92, 5.54),  # to 11
    Row("triton", "bf16", READY, _C, (129, 256), 16.7, 12.8, (1, 64), **_WIDE),  # to 23 and 15
    Row("triton", "bf16", READY, _C, (129, 256), 5.69, 5.91, (65, 256), **_WIDE),
    Row("triton", "bf16", READY, _C, (257, 512), 13.1, 9.74, (1, 16), **_WIDE),  # to 20 and 11
    Row("triton", "bf16", READY, _C, (257, 512), 6.17, 7.32, (17, 64), **_WIDE),
    Row("triton", "bf16", READY, _C, (257, 512), 3.07, 2.90, (65, 256), **_WIDE),
    Row("triton", "bf16", READY, _C, (129, 256), 27.2, 19.6, inputs=256, **_PACKED),
    Row("triton", "bf16", REPLAYED, _C, (129, 256), 6.95, 6.31, (1, 64), **_WIDE),  # to 9.1, 8.4
    Row("triton", "bf16", REPLAYED, _C, (129, 256), 2.60, 2.68, (65, 256), **_WIDE),
    Row("triton", "bf16", REPLAYED, _C, (257, 512), 5.27, 5.22, (1, 16), **_WIDE),  # to 5.6, 5.5
    Row("triton", "bf16", REPLAYED, _C, (257, 512), 2.96, 2.97, (17, 64), **_WIDE),
    Row("triton", "bf16", REPLAYED, _C, (257, 512), 1.38, 1.71, (65, 256), **_WIDE),
    Row("triton", "bf16", EAGER, _S, (129, 1024), 0.39, 0.44),  # H = 768
    Row("triton", "fp16", EAGER, _R, (1, 128), 0.29, 0.54),  # to 0.5 and 0.7
    Row("triton", "fp16", READY, _R, (1, 64), 2.70, 1.37, inputs=64, **_FEW_STEPS),  # to 3.2, 2.5
    Row("triton", "fp16", READY, _R, (65, 128), 2.73, 2.04, inputs=32, **_FEW_STEPS),
    # To 6.7 and 5.0.
    Row("triton", "fp16", REPLAYED, _R, (1, 64), 3.02, 2.64, inputs=64, **_FEW_STEPS),
    Row("triton", "fp16", REPLAYED, _R, (65, 128), 2.90, 2.59, inputs=32, **_FEW_STEPS),
    Row("triton", "tf32", READY, _R, (1, 64), 1.24, 1.36, **_FEW_OF_TF32),  # to 1.7 and 1.7
    Row("triton", "tf32", REPLAYED, _R, (1, 64), 1.27, 1.33, **_FEW_OF_TF32),  # to 2.6 and 2.0
    Row("triton", "tf32", READY, _C, (65, 128), 1.95, 1.29, inputs=128, **_SOME_STEPS),  # to 2.9
    Row("triton", "tf32", REPLAYED, _C, (65, 128), 2.85, 2.00, inputs=128, **_SOME_STEPS),
    Row("triton", "tf32", READY, _C, (129, 256), 9.23, 5.42, (64, 64), **_WIDE),
    Row("triton", "tf32", REPLAYED, _C, (129, 256), 6.42, 4.33, (64, 64), **_WIDE),
    Row("triton", "tf32", READY, _C, (129, 256), 18.3, 16.8, inputs=256, **_PACKED),
    Row("triton", "tf32", EAGER, "", (1, 128), 0.07, 0.22),  # to 0.3 and 0.7
    Row("triton", "tf32", READY, "", (65, 128), 0.05, 0.24),
    Row("triton", "tf32", REPLAYED, "", (65, 128), 0.80, 0.56),
    Row("triton", "exact", READY, _R, (64, 64), 1.59, 1.82, (64, 64), (128, 128), inputs=64),
    Row("triton", "exact", REPLAYED, _R, (64, 64), 1.26, 1.47, (64, 64), (128, 128), inputs=64),
    Row("triton", "exact", EAGER, "", (1, 128), 0.05, 0.19),  # to 0.1 and 0.3
    Row("triton", "exact", REPLAYED, "", (1, 128), 0.07, 0.08),  # to 0.3
    Row("cuda", "bf16", READY, _B, (1, 128), 2.35, 1.41),  # to 4.2 and 2.0
    Row("cuda", "bf16", REPLAYED, _B, (1, 128), 1.64, 1.21),  # to 2.8 and 1.7
    Row("cuda", "bf16", READY, "", (129, 256), 4.60, 4.62, (1, 64), **_WIDE),  # to 6.3 and 5.3
    Row("cuda", "bf16", READY, "", (129, 256), 1.94, 2.16, (65, 256), **_WIDE),
    Row("cuda", "bf16", READY, "", (257, 512), 4.18, 3.81, (1, 16), **_WIDE),  # to 4.3 and 5.2
    Row("cuda", "bf16", READY, "", (257, 512), 2.40, 2.18, (17, 64), **_WIDE),
    Row("cuda", "bf16", READY, "", (512, 512), 0.79, 0.81, (256, 256), **_WIDE),
    Row("cuda", "bf16", READY, _W, (513, 768), 6.37, 8.07, (1, 16), **_WIDE),
    Row("cuda", "bf16", READY, _G, (513, 1024), 2.69, 2.67, (1, 16), **_WIDE),  # to 3.2 and 4.5
    Row("cuda", "bf16", READY, "", (1024, 1024), 0.68, 0.89, (64, 64), **_WIDE),  # 0.2 with 256
    Row("cuda", "bf16", REPLAYED, "", (129, 256), 1.81, None, (1, 64), **_WIDE),  # to 2.1
    Row("cuda", "bf16", REPLAYED, "", (256, 256), 0.97, None, (256, 256), **_WIDE),
    Row("cuda", "bf16", REPLAYED, "", (257, 512), 1.70, None, (1, 16), **_WIDE),  # to 2.0
    Row("cuda", "bf16", REPLAYED, "", (257, 512), 1.19, None, (17, 64), **_WIDE),
    Row("cuda", "bf16", REPLAYED, "", (512, 512), 0.48, None, (256, 256), **_WIDE),
    Row("cuda", "bf16", REPLAYED, _W, (513, 768), 3.18, 3.22, (1, 16), **_WIDE),
    Row("cuda", "bf16", REPLAYED, _G, (513, 1024), 1.54, 1.68, (1, 16), **_WIDE),  # to 1.6, 1.8
    Row("cuda", "bf16", REPLAYED, "", (1024, 1024), 0.45, 0.57, (64, 64), **_WIDE),
    Row("cuda", "fp16", READY, _B, (1, 128), 0.25, 0.60),  # to 0.4 and 0.8
    Row("cuda", "fp16", REPLAYED, _B, (1, 128), 0.35, 0.56),  # to 0.8
)
_PRECISIONS = {
    torch.bfloat16: ("bf16",),
    torch.float16: ("fp16",),
    torch.float32: ("tf32", "exact"),
    torch.float64: ("exact",),
}
_how_float32_is_multiplied = torch._C._get_fp32_precision_getter


def is_faster(pace: float | None) -> bool:
    """Whether kernels of that pace are clearly faster than PyTorch's own."""
    return pace is not None and pace >= _CLEAR


def _wins(row: Row) -> bool:
    return is_faster(row.inference) or is_faster(row.training)


_WINNING = {row.precision for row in _TABLE if _wins(row)}
CONTESTED = frozenset(
    dtype
    for dtype, names in _PRECISIONS.items()
    if not _WINNING.isdisjoint(names) and dtype is not torch.float64  # which no kernel has
)
"""The dtypes in which some calls are faster with our kernels."""


@constant
def capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of a CUDA device; (0, 0) of one of ROCm."""
    return _capability(device)


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return (0, 0) if torch.version.hip else torch.cuda.get_device_capability(device)


def is_contested(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether some calls in a dtype are faster with our kernels on a CUDA device."""
    return dtype in CONTESTED and capability(device) in _DEVICES


@constant
def is_right(device: torch.device, dtype: torch.dtype, units: int) -> bool:
    """Whether all tests of kernels of so many units passed on GPUs like a CUDA device."""
    if capability(device) not in _DEVICES or dtype not in _PRECISIONS:
        return False
    return units <= _EXACT_UNITS or precision(dtype) != "exact"


def precision(dtype: torch.dtype) -> str:
    """Return how numbers of a dtype are multiplied: "bf16", "fp16", "tf32" or "exact"."""
    if dtype is not torch.float32:
        return _PRECISIONS[dtype][0]
    # torch.backends.cudnn.rnn.fp32_precision, which takes twenty times as long.
    return "tf32" if _how_float32_is_multiplied("cuda", "rnn") == "tf32" else "exact"


def pace(
    backend: str,
    regimes: str,
    way: str,
    where: tuple[tuple[int, int], torch.dtype],
    specs: Sequence[LayerSpec],
    use: Use,
) -> float | None:
    """Return how many times as long as ours PyTorch's own kernels take for a call, at least.

    Args:
        backend: the name of ours.
        regimes: of both passes of the first layer.
        way: EAGER, READY or REPLAYED.
        where: the compute capability of the GPU, and the dtype of x.
        specs: the layers.
        use: how they are called.

    Returns:
        None where nobody has measured it.
    """
    capability, dtype = where
    first = specs[0]
    if capability not in _DEVICES or not first.is_lstm or first.is_extended or first.proj_size:
        return None
    call = backend, precision(dtype), way
    inputs = max(spec.input_size for spec in specs)
    for row in _TABLE:
        found = row.training if use.training else row.inference
        if (
            found is not None
            and row[:3] == call
            and row.packed is use.packed
            and row.regimes in ("", regimes)
            and _within(first.hidden_size, row.units)
            and _within(use.batch * first.directions, row.rows)
            and _within(use.steps, row.steps)
            and inputs <= row.inputs
            and first.directions <= row.directions
        ):
            return found
    return None


def said_of(backend: str, pace: float | None) -> str:
    """Say what a pace means: which kernels are faster, or that nobody knows."""
    if pace is None:
        return (
            f"nobody has measured that the {backend} kernels are faster than PyTorch's own in "
            "such a call, which `python -m fastlstm tune` would do"
        )
    if is_faster(pace):
        return (
            f"on {_GPU} PyTorch's own kernels took at least {pace:.1f} times as long as the "
            f"{backend} kernels"
        )
    return (
        f"PyTorch's own kernels are no slower: on {_GPU} they took as little as {pace:.2f} of the "
        f"time of the {backend} kernels"
    )


def _within(number: int, limits: tuple[int, int]) -> bool:
    return limits[0] <= number <= limits[1]
