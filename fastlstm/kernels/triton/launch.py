"""Starting a kernel, or recording what would be started; and what a device allows."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from . import gluon
from .plan import Device, Plan, compiler_options

# The interpreter runs the kernels on CPU tensors, program after program, to check them.
INTERPRETED: bool = triton.knobs.runtime.interpret
# Whether what runs the kernels rounds as a GPU does. The interpreter does not: it multiplies
# bfloat16 wrongly, has no TF32 and no inline assembly. Tests that mend it say so here.
rounds_as_gpu: bool = not INTERPRETED
_interpreter = threading.Lock()  # it patches Triton's own functions while it runs
GLUON = gluon.PROBLEM is None, gluon.CLUSTER_PROBLEM is None  # of a Device, what Triton has
_ANY_DEVICE = Device(
    arch=90, processors=132, gluon=False, clusters=False
)  # what the interpreter plans for


@dataclass(frozen=True)
class Launch:
    """A kernel, its arguments by name, and how it is compiled."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]
    plan: Plan


@dataclass
class Recording:
    """Launches that were asked for while recording, for a GPU that need not be there."""

    device: Device
    precision: str
    launches: list[Launch]


_recording: Recording | None = None


@contextmanager
def record(device: Device, precision: str) -> Iterator[list[Launch]]:
    """Collect launches for `device` instead of starting them; float32 products in `precision`.

    For tensors on the meta device; not for several threads at once.
    """
    global _recording
    _recording = Recording(device, precision, [])
    try:
        yield _recording.launches
    finally:
        _recording = None


def launch(kernel: Any, grid: tuple[int, ...], plan: Plan, **arguments: Any) -> None:
    """Start `kernel` on the current device with the warps and stages of the plan."""
    options = compiler_options(plan.regime, plan.warps, plan.stages, plan.blocks)
    if _recording is not None:
        _recording.launches.append(Launch(kernel, grid, arguments, options, plan))
    elif INTERPRETED:
        with _interpreter:
            kernel[grid](**arguments, **options)
    else:
        kernel[grid](**arguments, **options)


def device_of(x: Tensor) -> Device:
    """Return the GPU that x is on; for the interpreter, some GPU."""
    if _recording is not None:
        return _recording.device
    return _device(x.device) if x.is_cuda else _ANY_DEVICE


@cache
def _device(device: torch.device) -> Device:
    properties = torch.cuda.get_device_properties(device)
    arch = 10 * properties.major + properties.minor
    return Device(arch, properties.multi_processor_count, *GLUON)


def is_fast(x: Tensor) -> bool:
    """Return whether activations may be approximate.

    bfloat16 rounds four times as coarsely as they err; float16 does not.
    """
    return x.dtype is torch.bfloat16 and rounds_as_gpu


def precision_of(x: Tensor) -> str:
    """Return how float32 is multiplied, "tf32" or "ieee": as cuDNN's RNNs are told to."""
    if x.element_size() == 2:
        return "tf32"  # no matter: the factors are narrower
    if _recording is not None:
        return _recording.precision
    rnn: Any = torch.backends.cudnn.rnn
    return "tf32" if rnn.fp32_precision == "tf32" else "ieee"


def dot_precision(x: Tensor) -> str:
    """Return how kernels multiply; the interpreter on its own does it exactly in any case."""
    return precision_of(x) if rounds_as_gpu else "ieee"
