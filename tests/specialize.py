"""Asks Triton, for a GPU that is not there, which kernels it would compile: a script for
tests/test_specialization.py, which runs it in a process that does not interpret.

Prints a line for each kernel: its name, and how many different ones T, B and rows lead to.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fastlstm.kernels.triton import TRITON
from fastlstm.kernels.triton.config import Device, override
from fastlstm.kernels.triton.launch import Launch, record
from fastlstm.kernels.triton.operators import lstm_bwd, lstm_fwd, rnn_bwd, rnn_fwd
from fastlstm.spec import LayerSpec

# Slices of what was given or of a batch's own layout: B and T move them within 16 bytes.
SLICES = {"h0", "c0", "offsets", "lengths", "reset", "dh_n", "dc_n", "h_mask", "seed"}
ZONEOUT = (0, 1, 16, -1, 2**31 - 1, -(2**31))  # hashes below which units stay
SIZES = [(1, 1), (2, 3), (7, 8), (16, 16), (1024, 64), (1 << 20, 1024)]  # below 2^31 rows


class NoDevice:
    """As much of a driver as compiling needs."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launches(H: int, D: int, dtype: torch.dtype, cell: bool, dense: bool = False) -> list[Launch]:
    """Those of one forward and backward pass of a layer; with a cell, zoneout and a mask of h."""
    new = partial(empty, dtype=dtype)
    T, B, I = 5, 20, 28
    w = [new(4 * H, I), new(4 * H, H), new(4 * H), new(4 * H)] * D
    x, y, c_all = new(T, B, I), new(T, B, D * H), empty(T, B, D * H, dtype=torch.float32)
    state, lengths = new(D, B, H), None if dense else empty(B, dtype=torch.int64)
    kind = LayerSpec("LSTM", I, H, peephole=cell)  # or extended otherwise
    gates = new(D, T, B, 4 * H) if TRITON.keeps_gates(kind) else None
    options: dict[str, Any] = {}
    if cell:
        options = {"zoneout_c": 0.5, "zoneout_h": 0.1, "seed": empty(1, dtype=torch.int64)}
        options["h_mask"] = empty(D, B, H, dtype=torch.float32)
    with record(Device(90, 132), "tf32") as recorded:
        inputs = (x, w, D, state, state, None, lengths, None)
        lstm_fwd(*inputs, y, state, state, c_all, gates, None, **options)
        gradients = [g for d in range(D) for g in w[4 * d : 4 * d + 3]]
        after = (y, state, state, None, x, state, state, gradients, None)
        lstm_bwd(*inputs, y, c_all, gates, *after, **options)
    return recorded


def rnn_launches(H: int, D: int, dtype: torch.dtype) -> list[Launch]:
    """The same of nn.RNN."""
    new = partial(empty, dtype=dtype)
    T, B, I = 5, 20, 28
    w = [new(H, I), new(H, H), new(H), new(H)]
    x, y, state = new(T, B, I), new(T, B, D * H), new(D, B, H)
    with record(Device(90, 132), "tf32") as recorded:
        inputs = (x, w * D, D, state, None, empty(B, dtype=torch.int64), None, False, y)
        rnn_fwd(*inputs, state, None)
        rnn_bwd(*inputs, y, state, x, state, w[:3] * D, None)
    return recorded


def real(name: str, value: Any, number: int) -> Any:
    """An argument as the launch of that number would see it."""
    if not isinstance(value, Tensor):
        return value
    return torch.empty(8, dtype=value.dtype)[number % 2 if name in SLICES else 0 :]


def compiled(launch: Launch) -> int:
    """How many kernels all sizes of T and B lead to."""
    found = set()
    for number, (T, B) in enumerate(SIZES):
        given = launch.arguments.items()
        arguments = {name: real(name, value, number) for name, value in given}
        for name in ("zoneout_c", "zoneout_h"):
            if arguments.get(name) is not None:
                arguments[name] = ZONEOUT[number]
        for name, value in (
            ("T", T),
            ("B", B),
            ("rows", T * B),
            ("x_t", B),
            ("dy_t", 2 * B),
            ("dc_t", B),
            ("step", T - 1),
            ("starts", B),
            ("splits", B),
        ):
            if name in arguments:
                arguments[name] = value
        kernel = launch.kernel.warmup(grid=launch.grid, **arguments, **launch.options)
        found.add(kernel.hash)
    return len(found)


driver.set_active(NoDevice())
for regime, H, dtype, cell in (
    ("registers", 32, torch.bfloat16, False),
    ("sequence", 32, torch.bfloat16, False),
    ("sequence", 32, torch.bfloat16, True),
    ("steps", 256, torch.float32, False),
    ("steps", 256, torch.bfloat16, True),
):
    with override(regime=regime):
        recorded = launches(H, 2, dtype, cell)
        for launch in (recorded[0], recorded[-1]):
            print(launch.kernel.__name__, regime, compiled(launch))
with override(regime="registers", fused=False):
    launch = launches(32, 2, torch.bfloat16, False)[0]
    print(launch.kernel.__name__, launch.plan.regime, compiled(launch))
with override(regime="registers"):
    for launch in launches(32, 2, torch.bfloat16, False, dense=True)[-2:]:
        print(launch.kernel.__name__, launch.plan.regime, compiled(launch))
for H in (32, 512):
    recorded = rnn_launches(H, 2, torch.bfloat16)
    for launch in (recorded[0], recorded[-1]):
        print(launch.kernel.__name__, launch.plan.regime, compiled(launch))
