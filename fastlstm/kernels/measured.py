"""What was found out on GPUs: where our kernels are right, and where faster than PyTorch's own.

``auto`` needs no record of the machine for what stands here. A row stands for all sizes of its
region, of which a sample was timed; what lies outside is left to PyTorch's kernels. All of it is
of an H200 with driver 580, PyTorch 2.11, cuDNN 9.19, the launcher of Triton 3.6, which EAGER is,
and kernels of Triton 3.9.
"""

from __future__ import annotations

import math
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
    "may_be_wrong",
    "pace",
    "precision",
    "said_of",
]

_DEVICES = frozenset({(9, 0)})  # compute capabilities of the GPUs on which kernels have run
_GPU = "an H200"
_WRONG_UNITS = 40, 184  # of PyTorch's own float16 layers
_EXACT_UNITS = 255  # from 256 on, a few gradients of exact float32 err slightly more than allowed
_CLEAR = 1.05  # closer may be chance
_ANY = 1 << 40

CHOICE = "auto takes them on sm_90 where they were faster than cuDNN, or what that lacks"
"""What users are told of it in a line; :func:`fastlstm.explain` says the rest."""

EAGER = "eager"  # the kernels are called as they are, and Triton's own launcher starts them
READY = "ready"  # the same, but C++ starts them
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
    rows: tuple[int, int]  # B D
    steps: tuple[int, int]  # T
    packed: bool = False  # whether rows are packed; else all sequences have all steps


# Samples of all calls, `python -m benchmarks gpu --map`: benchmarks/results/gpu-BACKEND-map.json.
# A number is the lowest of its region there. An eager call takes the host as long for 1 step as
# for 20, and cuDNN's launches more than ours. In a CUDA graph short calls of wide layers are
# mostly products, and in TF32 cuDNN has persistent kernels for narrow layers.
_ALL: dict[str, Any] = {"rows": (1, 1024), "steps": (1, _ANY)}
_MANY: dict[str, Any] = {"rows": (1, 1024), "steps": (20, _ANY)}
_PACKED: dict[str, Any] = {"rows": (2, 1024), "steps": (20, _ANY), "packed": True}
_SHORTER: dict[str, Any] = {"rows": (2, 1024), "steps": (10, _ANY), "packed": True}
_R, _C, _S = "registers/registers", "cluster/cluster", "steps/steps"
_B, _G, _W = "block/block", "grid/grid", "wide/wide"
_TABLE = (  # the first row that fits a call counts
    Row("triton", "bf16", READY, _R, (1, 128), 5.14, 1.70, **_ALL),
    Row("triton", "bf16", READY, _C, (129, 512), 4.35, 1.83, **_ALL),
    Row("triton", "bf16", READY, _R, (1, 128), 2.08, 1.44, **_SHORTER),
    Row("triton", "bf16", READY, _C, (129, 512), 2.15, 1.35, **_SHORTER),
    Row("triton", "bf16", REPLAYED, _R, (1, 64), 1.41, 1.12, **_ALL),
    Row("triton", "bf16", REPLAYED, _R, (65, 128), 1.22, 1.44, (1, 1024), (2, _ANY)),
    Row("triton", "bf16", REPLAYED, _C, (129, 256), 2.12, 1.64, (1, 128), (5, _ANY)),
    Row("triton", "bf16", REPLAYED, _C, (129, 256), 1.26, 1.37, (129, 512), (10, _ANY)),
    Row("triton", "bf16", REPLAYED, _C, (257, 512), 1.93, 1.34, (1, 16), (5, _ANY)),
    Row("triton", "bf16", REPLAYED, _C, (257, 512), 1.35, 1.43, (17, 128), (10, _ANY)),
    Row("triton", "bf16", REPLAYED, _C, (257, 512), 1.15, 1.16, (129, 256), (20, _ANY)),
    Row("triton", "bf16", REPLAYED, "", (1, 512), 0.44, 0.39, **_ALL),
    Row("triton", "fp16", READY, _R, (1, 128), 1.08, 1.20, **_ALL),
    Row("triton", "fp16", READY, _C, (129, 512), 1.12, 1.21, **_ALL),
    Row("triton", "fp16", READY, _R, (1, 128), 1.20, 1.20, **_SHORTER),
    Row("triton", "fp16", READY, _C, (129, 512), 1.75, 1.49, **_PACKED),
    Row("triton", "fp16", REPLAYED, _R, (1, 64), 1.09, 1.12, **_ALL),
    Row("triton", "fp16", REPLAYED, _R, (65, 128), 1.19, 1.25, (1, 1024), (2, _ANY)),
    Row("triton", "fp16", REPLAYED, _C, (129, 256), 1.26, 1.84, (1, 256), (10, _ANY)),
    Row("triton", "fp16", REPLAYED, _C, (129, 256), 1.64, 1.54, (257, 512), (50, _ANY)),
    Row("triton", "fp16", REPLAYED, _C, (257, 512), 1.77, 1.82, (1, 128), (20, _ANY)),
    Row("triton", "fp16", REPLAYED, "", (1, 512), 0.35, 0.42, **_ALL),
    Row("triton", "tf32", READY, _R, (1, 64), 1.16, 1.20, **_ALL),
    Row("triton", "tf32", READY, _C, (65, 128), 1.05, 1.24, **_ALL),
    Row("triton", "tf32", READY, _C, (129, 256), 1.24, 1.31, **_ALL),
    Row("triton", "tf32", READY, _R, (1, 64), 1.37, 1.19, **_SHORTER),
    Row("triton", "tf32", READY, _C, (65, 256), 1.64, 1.24, **_PACKED),
    Row("triton", "tf32", REPLAYED, _R, (1, 64), 1.10, 1.28, (2, 1024), (20, _ANY)),
    Row("triton", "tf32", REPLAYED, _C, (65, 100), 1.08, 1.08, (1, 127), (5, _ANY)),
    Row("triton", "tf32", REPLAYED, _C, (101, 128), 2.88, 2.44, (1, 1024), (5, _ANY)),
    Row("triton", "tf32", REPLAYED, _C, (129, 256), 1.39, 2.14, (1, 128), (5, _ANY)),
    Row("triton", "tf32", REPLAYED, _C, (129, 256), 1.55, 1.61, (129, 512), (20, _ANY)),
    Row("triton", "tf32", REPLAYED, "", (1, 256), 0.39, 0.46, **_ALL),
    Row("triton", "exact", READY, _R, (1, 64), 1.06, 1.17, **_ALL),
    Row("triton", "exact", READY, _R, (1, 64), 1.28, 1.17, **_SHORTER),
    Row("triton", "exact", REPLAYED, _R, (1, 32), 1.06, 1.21, **_ALL),
    Row("triton", "exact", REPLAYED, _R, (33, 64), 1.17, 1.32, (1, 256), (10, _ANY)),
    Row("triton", "exact", REPLAYED, "", (1, 64), 0.45, 0.91, **_ALL),
    Row("triton", "bf16", EAGER, _R, (1, 128), 3.40, 1.32, (1, 512), (20, _ANY)),
    # What Triton compiles for its own launcher, a launch a step.
    Row("triton", "bf16", EAGER, _S, (129, 1024), 0.39, 0.44, (1, 512), (20, _ANY)),
    Row("triton", "fp16", EAGER, _R, (1, 128), 0.29, 0.54, (1, 512), (20, _ANY)),
    Row("triton", "tf32", EAGER, "", (1, 128), 0.07, 0.22, (1, 512), (20, _ANY)),
    Row("triton", "exact", EAGER, "", (1, 128), 0.05, 0.19, (1, 512), (20, _ANY)),
    Row("triton", "exact", REPLAYED, "", (65, 128), 0.07, 0.08, (1, 512), (20, _ANY)),
    Row("cuda", "bf16", READY, _B, (1, 128), 2.35, 1.41, (1, 512), (20, _ANY)),
    Row("cuda", "bf16", REPLAYED, _B, (1, 128), 1.64, 1.21, (1, 512), (20, _ANY)),
    Row("cuda", "bf16", READY, _C, (129, 512), 1.18, 1.10, **_MANY),
    Row("cuda", "bf16", READY, _W, (513, 768), 2.28, 1.56, (1, 256), (20, _ANY)),
    Row("cuda", "bf16", READY, _G, (769, 1024), 2.69, 1.66, (1, 16), (10, _ANY)),
    Row("cuda", "bf16", READY, _G, (769, 1024), 0.22, 0.27, **_MANY),
    Row("cuda", "bf16", READY, "", (129, 768), 1.57, 1.10, (2, 128), (20, _ANY), packed=True),
    Row("cuda", "bf16", REPLAYED, _C, (129, 512), 1.08, 1.10, (1, 64), (20, _ANY)),
    Row("cuda", "bf16", REPLAYED, _W, (513, 768), 2.53, 1.80, (1, 64), (20, _ANY)),
    Row("cuda", "bf16", REPLAYED, _G, (769, 1024), 1.54, 1.54, (1, 16), (50, _ANY)),
    Row("cuda", "bf16", REPLAYED, "", (129, 1024), 0.07, 0.14, **_ALL),
    Row("cuda", "fp16", READY, _W, (513, 768), 2.36, 1.75, (1, 128), (20, _ANY)),
    Row("cuda", "fp16", REPLAYED, _W, (513, 768), 1.45, 1.40, (1, 64), (20, _ANY)),
    Row("cuda", "fp16", REPLAYED, _G, (769, 1024), 1.20, 1.18, (1, 16), (20, _ANY)),
    Row("cuda", "fp16", READY, _B, (1, 128), 0.25, 0.60, (1, 512), (20, _ANY)),
    Row("cuda", "fp16", REPLAYED, _B, (1, 128), 0.35, 0.56, (1, 512), (20, _ANY)),
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


def multiplies_in_tf32() -> bool:
    """Return whether PyTorch's own products of float32 on a GPU round their factors to TF32."""
    return _how_float32_is_multiplied("cuda", "matmul") == "tf32"


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
        None where nobody has measured it; infinity where those are wrong.
    """
    capability, dtype = where
    first = specs[0]
    if capability not in _DEVICES or not first.is_lstm or first.is_extended or first.proj_size:
        return None
    if use.batch % 8 == 0 and not use.packed and _is_wrong(capability, dtype, first.hidden_size):
        return math.inf
    call = backend, precision(dtype), way
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
        ):
            return found
    return None


@constant
def may_be_wrong(device: torch.device, dtype: torch.dtype, units: int) -> bool:
    """Whether PyTorch's own layers of so many units compute something else on a CUDA device.

    Outputs of cuDNN 9.19 in float16 were off by 0.1 to 0.4 on an H200 and gradients of weights by
    as much as their size, for dense batches that divide by 8, from 8 to 512, and any T, I and
    number of layers; not those of packed rows, of other batches, or of units that divide by 32.
    """
    return _is_wrong(capability(device), dtype, units)


def _is_wrong(capability: tuple[int, int], dtype: torch.dtype, units: int) -> bool:
    if dtype is not torch.float16 or capability not in _DEVICES:
        return False
    return _within(units, _WRONG_UNITS) and units % 8 == 0 and units % 32 != 0


def said_of(backend: str, pace: float | None) -> str:
    """Say what a pace means: which kernels are faster, or that nobody knows."""
    if pace is None:
        return (
            f"nobody has measured that the {backend} kernels are faster than PyTorch's own in "
            "such a call, which `python -m fastlstm tune` would do"
        )
    if pace == math.inf:
        return f"on {_GPU} PyTorch's own float16 kernels (cuDNN 9.19) are wrong for such sizes"
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
