"""The shortest way to a kernel: plain calls without gradients, for streaming."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastlstm.backends import choice
from fastlstm.kernels.base import Backend
from fastlstm.layer.recorded import PRE_DISPATCH, dispatch_modes, has_key, tracing
from fastlstm.spec import LayerSpec

__all__ = [
    "MEMORY_IS_LOW",
    "Layers",
    "are_there",
    "fast_backend",
    "infer",
    "is_watched",
    "is_whole",
]

_is_compiling = torch.compiler.is_compiling  # looked up in every call
_is_autocast = torch._C._is_any_autocast_enabled
_is_transformed = torch._C._are_functorch_transforms_active
_is_function_mode = torch._C._is_torch_function_mode_enabled
_is_profiled = torch._C._autograd._profiler_enabled
# Where memory may lie below 4 GB (some Pythons are linked so), an address does not tell a small
# tensor from a part of a storage that has been freed, whose address is its distance from 0.
MEMORY_IS_LOW = torch.empty(1, device="cpu").data_ptr() < 1 << 32


def _is_changed() -> bool:
    """Whether a compiler, transform, mode, trace or autocast is at work."""
    return (
        _is_compiling()
        or _is_transformed()
        or _is_autocast()
        or forward_ad._current_level >= 0
        or dispatch_modes() > 0
        or has_key(PRE_DISPATCH)
        or tracing() is not None
    )


def is_watched() -> bool:
    """Whether somebody looks at operators, or changes what they do."""
    return _is_changed() or _is_profiled() or _is_function_mode()  # Dynamo stops at the first


def fast_backend(x: Tensor) -> Backend | None:
    """Return the backend that takes x as it is, without any preparation, if there is one.

    No compiler, transform, mode, trace or autocast is at work then. It leaves the dtype to the
    operators.
    """
    backend = choice.fast
    if (
        backend is None
        or x.is_cpu is not backend.infers_on_cpu
        or _is_changed()
        or backend.error() is not None
    ):
        return None
    return backend


class Layers(NamedTuple):
    """What a module keeps for :func:`infer`, as long as its settings stay."""

    specs: tuple[LayerSpec, ...]
    caches: Sequence[Any]  # of each layer, for packed weights
    packs: dict[Any, list[bool]]  # for steps and dtype, which want packed weights; [] for none
    depth: int  # how many layers; 0 for a cell
    directions: int

    @classmethod
    def of(cls, specs: tuple[LayerSpec, ...], caches: Sequence[Any], cell: bool = False) -> Layers:
        """Make it of what the layers are, or the cell is."""
        return cls(specs, caches, {}, 0 if cell else len(specs), specs[0].directions)


def infer(
    backend: Backend, x: Tensor, hx: Any, weights: tuple[Tensor, ...], layers: Layers
) -> Any:
    """Compute a stack of plain layers or a cell, without gradients.

    Args:
        backend: what :func:`fast_backend` returned for x.
        x: ``[T, B, I]`` of layers, ``[B, I]`` of a cell.
        hx: what the user passed for ``(h_0, c_0)``.
        weights: those of all layers.
        layers: what is known of them.

    Returns:
        ``(y, (h_n, c_n))``, of a cell ``(h, c)``. What the kernels check themselves is not checked
        before: None stands for a call that they refused, which then takes the long way, to an
        answer or a better message.
    """
    depth, directions = layers.depth, layers.directions
    direct = backend.infer_directly
    if direct is not None and (
        _is_profiled()  # these two look for operators
        or _is_function_mode()
        or not is_whole(x)
    ):
        direct = None  # the operator says what is wrong
    low = direct is not None and MEMORY_IS_LOW and are_there(x, hx, weights)
    if direct is not None and not layers.packs:  # no call has wanted packed weights so far
        found = direct(weights, x, hx, depth, directions, (), low)
        if found is not None:
            return found
    try:
        packed = _packed(backend, layers, weights, x.shape[0] if depth else 1)
        if direct is not None:
            found = direct(weights, x, hx, depth, directions, tuple(packed), low)
            if found is not None:
                return found
        h0 = c0 = None
        if hx is not None:
            if type(hx) is not tuple or len(hx) != 2:
                return None
            h0, c0 = hx
            if type(h0) is not Tensor or type(c0) is not Tensor:
                return None
        if not depth:
            found = backend.lstm_cell_infer(x, weights, h0, c0, packed[0] if packed else None)
        else:
            y, *states = backend.lstm_infer(x, weights, depth, directions, h0, c0, packed)
            found = y, tuple(states)
    except (RuntimeError, ValueError):
        return None
    return found if type(found[0]) is Tensor else None  # as it always is after the long way


def is_whole(x: Tensor) -> bool:
    """Whether the storage of an input reaches as far as that does, and has its numbers."""
    try:
        size: int = x.untyped_storage().nbytes()
        if size == x.nbytes and not x.storage_offset():  # most
            return True
        if x.is_neg():  # parts of complex numbers
            return False
        last = sum([(n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True)])
        return size >= (x.storage_offset() + last + 1) * x.element_size()
    except (RuntimeError, NotImplementedError):  # a tensor without a storage
        return False


def are_there(x: Tensor, hx: Any, weights: tuple[Tensor, ...]) -> bool:
    """Whether the storage of every tensor that has numbers has memory."""
    try:
        tensors = (x, *(hx or ()), *weights)
        return all([t.untyped_storage().nbytes() or not t.numel() for t in tensors])
    except (AttributeError, TypeError, RuntimeError, NotImplementedError):  # unusual, or no tensor
        return False


_NOTHING = torch.empty(0, dtype=torch.uint8, device="cpu")


def _packed(
    backend: Backend, layers: Layers, weights: Sequence[Tensor], steps: int
) -> list[Tensor]:
    """The buffers of packed weights of all layers, or none if no layer wants one."""
    key = steps, weights[0].dtype
    packs = layers.packs.get(key)
    if packs is not None:
        try:
            return [
                cache["packed"] if wanted else _NOTHING
                for cache, wanted in zip(layers.caches, packs, strict=False)
            ]
        except KeyError:  # somebody else has emptied a cache
            pass
    each = len(weights) // len(layers.specs)
    found = [
        backend.packed_weights(
            cache, "forward", weights[k * each : (k + 1) * each], spec, (steps, 0)
        )
        for k, (spec, cache) in enumerate(zip(layers.specs, layers.caches, strict=True))
    ]
    if len(layers.packs) > 256:
        layers.packs.clear()
    wanted = [buffer is not None for buffer in found]
    layers.packs[key] = wanted if any(wanted) else []
    return [_NOTHING if buffer is None else buffer for buffer in found] if any(wanted) else []
