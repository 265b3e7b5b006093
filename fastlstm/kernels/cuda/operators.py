"""The CUDA C++ kernels of a layer: importing this module registers them with the operators.

The compiled library (csrc/cuda) has the recurrence, one launch for all steps of both directions;
the products before and after it are PyTorch's. Which kernel computes a layer, in which pieces, is
decided by csrc/cuda/plan.cpp. Only :mod:`fastlstm.backends` imports this module.

With ``FASTLSTM_EMULATE=1`` the same kernels, compiled for the host, run on CPU tensors, to check
them: slowly, and float32 without rounding to TF32 unless :func:`override` asks for it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import impl
from torch.utils._python_dispatch import _disable_current_modes

from fastlstm import extension, ops
from fastlstm.operands import (
    cell_of,
    gates_again,
    gradient_groups,
    groups,
    input_gradient,
    project,
    weight_gradients,
)
from fastlstm.ops import contiguous, plainly, zero
from fastlstm.reference import Cell, Weights
from fastlstm.rows import Rows, layout

__all__ = ["Device", "Plan", "describe", "obstacle", "override", "plan_of"]

EMULATED = os.environ.get("FASTLSTM_EMULATE") == "1"
KINDS = ("bf16", "f16", "tf32", "exact")
REGIMES = ("block", "cluster", "grid")
RESTS = ("none", "shared", "global")  # memory: where weights lie that do not fit registers
_KIND_OF = {torch.bfloat16: "bf16", torch.float16: "f16"}


class Device(NamedTuple):
    """What a plan needs to know of a GPU."""

    arch: int  # compute capability, 10 * major + minor
    processors: int  # streaming multiprocessors
    shared_bytes: int  # that one block may use
    cluster: int  # blocks of the largest cluster; 1 where there are none


class Plan(NamedTuple):
    """How a recurrence is spread over a GPU; see csrc/cuda/plan.h."""

    regime: str
    batch: int  # sequences of a group of blocks
    blocks: int  # of a group
    tiles: int  # of 16 units, of a block
    parts: int  # warps that share the terms of one tile of units
    resident: int  # tiles of 16 terms whose weights a warp keeps in registers, at most
    rest: str  # where the others are
    shared_bytes: int  # of a block
    groups: int  # of a launch
    exchange_words: int  # of a launch: 32-bit words of work space in global memory
    rest_words: int

    @property
    def numbers(self) -> list[int]:
        """As the operators take it."""
        return [
            REGIMES.index(self.regime), *self[1:6], RESTS.index(self.rest), *self[7:],
        ]  # fmt: skip

    def __str__(self) -> str:
        where = {
            "block": "one block has all units",
            "cluster": f"clusters of {self.blocks} blocks",
            "grid": f"{self.blocks} blocks exchange through L2",
        }[self.regime]
        weights = {
            "none": "weights in registers",
            "shared": f"weights in {'registers and ' * (self.resident > 0)}shared memory",
            "global": "weights in registers and L2",
        }[self.rest]
        return (
            f"{self.regime}: {where}, {16 * self.tiles} units x {self.batch} sequences a block, "
            f"{self.tiles * self.parts} warps, {weights}, {self.shared_bytes:,} bytes shared"
        )


class _Wish(NamedTuple):
    """What :func:`override` asks for."""

    regime: str | None = None
    blocks: int = 0
    batch: int = 0
    device: Device | None = None
    tf32: bool | None = None

    @property
    def numbers(self) -> list[int]:
        regime = -1 if self.regime is None else REGIMES.index(self.regime)
        return [regime, self.blocks, self.batch]


_wish = _Wish()  # for the whole process: autograd runs backward in a thread of its own


@contextmanager
def override(**wishes: Any) -> Iterator[None]:
    """Restrict every plan that the process makes in this block, for tests and tuning.

    Args:
        regime: "block", "cluster" or "grid".
        blocks: of a group.
        batch: sequences of a group, 8 or 16.
        device: a :class:`Device` to plan for instead of the one there is.
        tf32: whether factors of float32 are rounded to TF32.

    Raises:
        ValueError: there is no such field, or no such value of it.
    """
    unknown = wishes.keys() - set(_Wish._fields)
    if unknown:
        raise ValueError(f"override(): a plan has no {', '.join(sorted(unknown))}")
    global _wish
    before = _wish
    wish = before._replace(**wishes)
    if wish.device is not None:
        wish = wish._replace(device=Device(*wish.device))
    for name, choices in (
        ("regime", (None, *REGIMES)),
        ("blocks", range(1 << 16)),
        ("batch", (0, 8, 16)),
        ("tf32", (None, False, True)),
    ):
        if getattr(wish, name) not in choices:
            raise ValueError(
                f"override(): {getattr(wish, name)!r} is not a {name}, choose one of "
                f"{', '.join(map(str, choices)) if name != 'blocks' else '0 to 65535'}"
            )
    _wish = wish
    try:
        yield
    finally:
        _wish = before


def kind_of(x: Tensor) -> str:
    """How numbers of this tensor are multiplied: float32 as cuDNN's RNNs are told to."""
    if x.dtype is not torch.float32:
        return _KIND_OF[x.dtype]
    if _wish.tf32 is not None:
        tf32 = _wish.tf32
    else:
        rnn: Any = torch.backends.cudnn.rnn
        tf32 = not EMULATED and rnn.fp32_precision == "tf32"
    return "tf32" if tf32 else "exact"


def plan_of(kind: str, backward: bool, B: int, H: int, D: int, device: Device) -> Plan:
    """The plan of one pass of a layer: a pure function of its arguments.

    Raises:
        ValueError: these kernels cannot compute it.
    """
    return _plan_of(KINDS.index(kind), backward, B, H, D, device, _wish)


@lru_cache(maxsize=1024)
def _plan_of(
    kind: int, backward: bool, B: int, H: int, D: int, device: Device, wish: _Wish
) -> Plan:
    arguments = kind, backward, B, H, D, list(device), wish.numbers
    with _disable_current_modes():  # a plan is no part of a program that is traced
        found = ops.cuda_plan(*arguments)
        problem = "" if found else ops.cuda_obstacle(*arguments)
    if problem:
        raise ValueError(f"{problem} (H = {H} in {KINDS[kind]})")
    regime, batch, blocks, tiles, parts, resident, rest, *sizes = found
    return Plan(REGIMES[regime], batch, blocks, tiles, parts, resident, RESTS[rest], *sizes)


def device_of(x: Tensor) -> Device:
    """The GPU that x is on; of the emulator, an H100."""
    if _wish.device is not None:
        return _wish.device
    return _device(x.device.index if x.is_cuda else 0)


@cache
def _device(index: int) -> Device:
    with _disable_current_modes():
        return Device(*ops.cuda_device(index))


def describe(x: Tensor, B: int, H: int, D: int) -> str:
    """How a layer of these sizes would run on the device of x."""
    arguments = B, H, D, device_of(x)
    forward, backward = (plan_of(kind_of(x), back, *arguments) for back in (False, True))
    return f"forward {forward}; backward {backward}"


def obstacle(H: int, D: int, x: Tensor) -> str | None:
    """Why these kernels have no room for a layer on the device of x; None if they have."""
    try:
        for backward in (False, True):
            plan_of(kind_of(x), backward, 1, H, D, device_of(x))
    except (ValueError, RuntimeError) as error:  # no room; a GPU that the library cannot use
        return str(error).partition("\n")[0]
    return None


def _refuse(x: Tensor, found: Sequence[Weights], cell: Cell) -> None:
    projects = found[0].w_hr is not None
    error = ops.cuda_lacks("LSTM", cell.is_plain, projects) or obstacle(
        found[0].w_hh.shape[1], len(found), x
    )
    if error:
        raise ValueError(f"the cuda kernels cannot compute this layer: {error}")


def _launch(x: Tensor, rows: Rows, H: int, D: int, backward: bool) -> tuple[Any, ...]:
    """What the recurrence takes besides the layer's numbers: work space, its plan and place."""
    kind = kind_of(x)
    plan = plan_of(kind, backward, rows.B, H, D, device_of(x))
    words = torch.empty(0, dtype=torch.int32, device=x.device)
    exchange = arrived = rest = None
    if plan.exchange_words:
        exchange = words.new_empty(plan.exchange_words)
        arrived = words.new_zeros(D * -(-rows.B // plan.batch))
    if plan.rest_words:
        rest = words.new_empty(plan.rest_words)
    index = x.device.index if x.is_cuda else 0
    stream = torch._C._cuda_getCurrentRawStream(index) if x.is_cuda else 0
    return exchange, arrived, rest, plan.numbers, kind == "tf32", index, stream


def _biases(found: Sequence[Weights]) -> list[Tensor]:
    return [b for group in found for b in (group.b_ih, group.b_hh) if b is not None]


@plainly
def lstm_fwd(
    x: Tensor,
    weights: Sequence[Tensor],
    directions: int,
    h0: Tensor | None,
    c0: Tensor | None,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    y: Tensor,
    h_n: Tensor,
    c_n: Tensor,
    c_all: Tensor | None,
    gates: Tensor | None,
    cache: Tensor | None,
    **options: Any,
) -> None:
    """Write the outputs of one layer; shapes as in :mod:`fastlstm.ops`."""
    rows, D, H = layout(x, batch_sizes, lengths, reset), directions, c_n.shape[-1]
    cell = cell_of(**options)
    if rows.count == 0:
        return
    found = groups(weights, D, cell)
    _refuse(x, found, cell)
    if rows.padded:
        zero(y, c_all)
    ops.lstm_recur_fwd(
        project(x.reshape(-1, x.shape[-1]), found),
        [group.w_hh for group in found],
        _biases(found),
        contiguous(h0),
        contiguous(c0),
        rows.offsets,
        contiguous(rows.lengths),
        rows.reset,
        rows.T,
        rows.B,
        y.view(rows.count, D * H),
        h_n,
        c_n,
        None if c_all is None else c_all.view(rows.count, D * H),
        None if gates is None else gates.view(D, rows.count, 4 * H),
        *_launch(x, rows, H, D, backward=False),
    )


@plainly
def lstm_bwd(
    x: Tensor,
    weights: Sequence[Tensor],
    directions: int,
    h0: Tensor | None,
    c0: Tensor | None,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    y: Tensor,
    c_all: Tensor,
    gates: Tensor | None,
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    dc_all: Tensor | None,
    dx: Tensor | None,
    dh0: Tensor | None,
    dc0: Tensor | None,
    dweights: Sequence[Tensor],
    cache: Tensor | None,
    **options: Any,
) -> None:
    """Write the gradients of one layer; shapes as in :mod:`fastlstm.ops`."""
    rows, D, cell = layout(x, batch_sizes, lengths, reset), directions, cell_of(**options)
    if rows.count == 0:
        zero(dx, dh0, dc0, *dweights)
        return
    found = groups(weights, D, cell)
    _refuse(x, found, cell)
    H = found[0].w_hh.shape[1]
    x_rows, y_rows = x.reshape(-1, x.shape[-1]), y.view(rows.count, D * H)
    targets = gradient_groups(dweights, found)
    if rows.padded and (targets or gates is None):
        # Whatever x holds there must not meet the zeros of dgates.
        x_rows = torch.where(rows.real(), x_rows, 0)
    h_before = rows.states_before(y_rows, h0, D) if targets or gates is None else []
    if gates is None:
        gates = _gates(x_rows, found, h_before)
    # Padding adds nothing to sums over rows.
    empty = torch.zeros if rows.padded else torch.empty
    dgates = empty(D, rows.count, 4 * H, dtype=x.dtype, device=x.device)
    ops.lstm_recur_bwd(
        y_rows,
        [group.w_hh for group in found],
        rows.offsets,
        contiguous(rows.lengths),
        rows.reset,
        rows.T,
        rows.B,
        gates.view(D, rows.count, 4 * H),
        c_all.view(rows.count, D * H),
        None if c0 is None else c0.float().contiguous(),
        dy,
        contiguous(dh_n),
        contiguous(dc_n),
        dc_all,
        dgates,
        dh0,
        dc0,
        *_launch(x, rows, H, D, backward=True),
    )
    if dx is not None:
        input_gradient(dx.view(x_rows.shape), dgates, found)
    for target, d, h in zip(targets or (), dgates, h_before, strict=False):
        weight_gradients(target, d, x_rows, h)


def _gates(x: Tensor, found: Sequence[Weights], h_before: Sequence[Tensor]) -> Tensor:
    """[D, rows, H, 4] after activation, as the forward kernel would have kept them."""
    gates = gates_again(x, found, h_before)
    for target, group in zip(gates, found, strict=True):
        if group.b_ih is not None and group.b_hh is not None:
            target += group.b_ih.float() + group.b_hh.float()
    i, f, g, o = gates.chunk(4, -1)
    return torch.stack([i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()], -1).to(x.dtype)


extension.load()  # the plans
extension.load_cuda(EMULATED)
for _function in (lstm_fwd, lstm_bwd):
    impl(f"fastlstm::{_function.__name__}_cuda", "CPU" if EMULATED else "CUDA", _function)
