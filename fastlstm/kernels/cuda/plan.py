"""Which CUDA kernel computes a layer, in which pieces: csrc/cuda/plan.cpp decides, this asks it.

Importing this file loads the compiled libraries. A plan is a pure function of the layer, the
batch, the GPU and what :func:`override` asks for.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from fastlstm import extension
from fastlstm.spec import LayerSpec

from . import library

__all__ = [
    "EMULATED",
    "Device",
    "Plan",
    "describe",
    "device_of",
    "kind_of",
    "obstacle",
    "override",
    "plan_of",
]

EMULATED = os.environ.get("FASTLSTM_EMULATE") == "1"
KINDS = ("bf16", "f16", "tf32", "exact")
REGIMES = ("block", "cluster", "grid", "wide")
RESTS = ("none", "shared", "global")  # memory: where weights lie that do not fit registers
_KIND_OF = {torch.bfloat16: "bf16", torch.float16: "f16"}

extension.load()  # it has the plans
extension.load_cuda(EMULATED)


class Device(NamedTuple):
    """What a plan needs to know of a GPU."""

    arch: int  # compute capability, 10 * major + minor
    processors: int  # streaming multiprocessors
    shared_bytes: int  # that one block may use
    cluster: int  # blocks of the largest cluster; 1 where there are none
    resident: tuple[int, ...] = ()  # clusters of 2, 4, 8 and 16 blocks together, if they are known

    @property
    def numbers(self) -> list[int]:
        """The GPU as the operators take it."""
        return [*self[:4], *self.resident]


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
        """The plan as the operators take it."""
        return [
            REGIMES.index(self.regime), *self[1:6], RESTS.index(self.rest), *self[7:],
        ]  # fmt: skip

    def __str__(self) -> str:
        where = {
            "block": "one block has all units",
            "cluster": f"clusters of {self.blocks} blocks",
            "grid": f"{self.blocks} blocks exchange through L2",
            "wide": f"clusters of {self.blocks} blocks",
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
        """The wish as the operators take it."""
        regime = -1 if self.regime is None else REGIMES.index(self.regime)
        return [regime, self.blocks, self.batch]


_wish = _Wish()  # for the whole process: autograd runs backward in a thread of its own


@contextmanager
def override(**wishes: Any) -> Iterator[None]:
    """Restrict every plan that the process makes in this block, for tests and tuning.

    Args:
        regime: one of REGIMES.
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
    _check(wish)
    _wish = wish
    try:
        yield
    finally:
        _wish = before


def _check(wish: _Wish) -> None:
    """Raise ValueError for what no plan can be."""
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


def kind_of(x: Tensor) -> str:
    """Return how numbers of this tensor are multiplied, one of KINDS.

    float32 is multiplied as cuDNN's RNNs are told to.
    """
    if x.dtype is not torch.float32:
        return _KIND_OF[x.dtype]
    if _wish.tf32 is not None:
        tf32 = _wish.tf32
    else:
        rnn: Any = torch.backends.cudnn.rnn
        tf32 = not EMULATED and rnn.fp32_precision == "tf32"
    return "tf32" if tf32 else "exact"


def plan_of(kind: str, backward: bool, B: int, spec: LayerSpec, device: Device) -> Plan:
    """Return the plan of one pass of a layer: a pure function of its arguments.

    Args:
        kind: how numbers are multiplied, one of KINDS.
        backward: of which pass.
        B: sequences.
        spec: the layer.
        device: the GPU.

    Raises:
        ValueError: these kernels cannot compute it.
    """
    sizes = B, spec.hidden_size, spec.directions
    return _plan_of(KINDS.index(kind), backward, *sizes, device, _wish)


@lru_cache(maxsize=1024)
def _plan_of(
    kind: int, backward: bool, B: int, H: int, D: int, device: Device, wish: _Wish
) -> Plan:
    arguments = kind, backward, B, H, D, device.numbers, wish.numbers
    # A plan is no part of a program that is traced.
    with extension.untraced(), _disable_current_modes():
        found = library.cuda_plan(*arguments)
        problem = "" if found else library.cuda_obstacle(*arguments)
    if problem:
        raise ValueError(f"{problem} (H = {H} in {KINDS[kind]})")
    regime, batch, blocks, tiles, parts, resident, rest, *sizes = found
    return Plan(REGIMES[regime], batch, blocks, tiles, parts, resident, RESTS[rest], *sizes)


def device_of(x: Tensor) -> Device:
    """Return the GPU that x is on; for the emulator, an H100."""
    if _wish.device is not None:
        return _wish.device
    return _device(x.device.index if x.is_cuda else 0)


@cache
def _device(index: int) -> Device:
    with extension.untraced(), _disable_current_modes():
        arch, processors, shared_bytes, cluster, *resident = library.cuda_device(index)
    return Device(arch, processors, shared_bytes, cluster, tuple(resident))


def describe(spec: LayerSpec, B: int, x: Tensor) -> str:
    """Describe in a line how a layer would run on the device of x, with B sequences."""
    forward, backward = (
        plan_of(kind_of(x), back, B, spec, device_of(x)) for back in (False, True)
    )
    return f"forward {forward}; backward {backward}"


def obstacle(spec: LayerSpec, x: Tensor) -> str | None:
    """Say why these kernels have no room for a layer on the device of x; None if they have."""
    try:
        for backward in (False, True):
            plan_of(kind_of(x), backward, 1, spec, device_of(x))
    except (ValueError, RuntimeError) as error:  # no room; a GPU that the library cannot use
        return str(error).partition("\n")[0]
    return None
