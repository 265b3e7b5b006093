"""What the functions of :mod:`fastlstm.functional` accept: each check returns or raises.

Whatever ``nn.LSTM`` and ``nn.LSTMCell`` refuse is refused with the same type of exception.
Letters as there: T steps, B batch, I input size, H hidden size, P projected size, N packed rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_INTEGERS = frozenset({torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8})
_is_batched = torch._C._functorch.is_batchedtensor


def check_weights(
    weights: Sequence[Tensor], x: Tensor, num_layers: int = 1, directions: int = 1
) -> None:
    """That every weight has the shape, dtype and device that go with ``x [..., I]``."""
    count, rest = divmod(len(weights), num_layers * directions)
    if rest or not 2 <= count <= 5:
        raise RuntimeError(
            f"expected 2 to 5 weights for each of {num_layers} layers x {directions} directions, "
            f"got {len(weights)} in all"
        )
    gates, projected = weights[1].shape
    hidden = gates // 4
    shapes: list[tuple[int, ...]] = [(4 * hidden, x.shape[-1]), (4 * hidden, projected)]
    if count > 3:
        shapes += [(4 * hidden,), (4 * hidden,)]
    if count % 2:
        shapes += [(projected, hidden)]
    elif projected != hidden:
        shapes[1] = (4 * hidden, hidden)
    names = ["weight_ih", "weight_hh", *(["bias_ih", "bias_hh"] if count > 3 else [])]
    if count % 2:
        names.append("weight_hr")
    dtype, device, on_cpu = x.dtype, x.device, x.is_cpu
    for k, w in enumerate(weights):
        if k == count * directions:
            shapes[0] = (4 * hidden, directions * projected)
        if w.dtype is not dtype or (not w.is_cpu if on_cpu else w.device != device):
            raise RuntimeError(
                f"the input is {dtype} on {device} but {names[k % count]} is {w.dtype} on "
                f"{w.device}: move the input or the module with .to(...)"
            )
        if w.shape != shapes[k % count]:
            raise RuntimeError(
                f"expected {names[k % count]} of layer {k // (count * directions)} to be "
                f"{list(shapes[k % count])}, got {size(w)}"
            )


def check_packed(x: Tensor, batch_sizes: Tensor) -> tuple[int, int, int]:
    """T, B and I of packed rows ``x [N, I]``."""
    if x.dim() != 2:
        raise RuntimeError(f"LSTM: packed rows must be 2-D [N, I], got {size(x)}")
    sizes = batch_sizes.tolist()
    if sum(sizes) != x.shape[0] or sizes != sorted(sizes, reverse=True) or sizes[-1:] < [1]:
        raise RuntimeError(
            f"LSTM: batch_sizes must be positive, non-increasing and add up to the {x.shape[0]} "
            f"packed rows, got {sizes}"
        )
    return len(sizes), sizes[0], x.shape[1]


def check_pair(hx: Any, dims: int | None) -> tuple[Tensor, Tensor]:
    """hx as two tensors, which an LSTM expects to have dims dimensions; None for a cell."""
    message = f"hx must be a pair of tensors (h_0, c_0), got {_describe(hx)}"
    try:  # as they do: nn.LSTM indexes hx, nn.LSTMCell walks it
        found = [state.dim() for state in (hx if dims is None else (hx[0], hx[1]))]
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise type(error)(message) from None
    if isinstance(hx, Tensor):
        raise (TypeError if dims is None or found == [dims, dims] else RuntimeError)(message)
    if len(hx) != 2:
        raise RuntimeError(message)
    return hx[0], hx[1]


def check_unbatched(h0: Tensor, c0: Tensor) -> tuple[Tensor, Tensor]:
    """h_0 ``[L*D, P]`` and c_0 ``[L*D, H]`` as a batch of one."""
    if h0.dim() != 2 or c0.dim() != 2:
        raise RuntimeError(
            f"LSTM: expected 2-D h_0 and c_0 for unbatched input, got {size(h0)} and {size(c0)}"
        )
    return h0.unsqueeze(1), c0.unsqueeze(1)


def check_state(
    h0: Tensor,
    c0: Tensor,
    h_shape: tuple[int, int, int],
    c_shape: tuple[int, int, int],
    packed: bool,
) -> None:
    """That h_0 and c_0 of an LSTM have these shapes."""
    if h0.shape != h_shape or c0.shape != c_shape:
        found = f"got {size(h0)} and {size(c0)}"
        kind = IndexError if packed and (h0.dim() != 3 or c0.dim() != 3) else RuntimeError
        raise kind(f"LSTM: expected h_0 {list(h_shape)} and c_0 {list(c_shape)}, {found}")


def check_cell_state(h: Tensor, c: Tensor, shape: tuple[int, ...]) -> None:
    """That h and c of a cell have this shape."""
    if h.shape != shape or c.shape != shape:
        kind = RuntimeError if {h.dim(), c.dim()} <= {1, 2} else ValueError
        raise kind(f"LSTMCell: expected h and c {list(shape)}, got {size(h)} and {size(c)}")


def check_like(h: Tensor, c: Tensor, x: Tensor) -> None:
    """That h and c have the dtype and device of x."""
    dtype, device = x.dtype, x.device
    if h.dtype is dtype and c.dtype is dtype:
        if h.is_cpu and c.is_cpu and x.is_cpu:  # three times as fast as comparing devices
            return
        if h.device == device and c.device == device:
            return
    raise RuntimeError(
        f"hx is {h.dtype} on {h.device} and {c.dtype} on {c.device} but the input is {dtype} on "
        f"{device}: convert both with .to(input)"
    )


def check_lengths(lengths: Tensor, x: Tensor, batched: bool) -> Tensor:
    """lengths as int64 ``[B]`` on the device of x ``[T, B, I]``."""
    if not isinstance(lengths, Tensor) or lengths.dtype not in _INTEGERS:
        raise TypeError(
            f"LSTM: lengths must be a tensor of integers, got {_describe(lengths)}: convert them "
            "with torch.as_tensor(lengths)"
        )
    steps, batch, _ = x.shape
    if lengths.shape != ((batch,) if batched else ()):
        expected = f"[{batch}], one for each row" if batched else "[] for unbatched input"
        raise ValueError(f"LSTM: lengths must be {expected}, got {size(lengths)}")
    lengths = lengths.to(torch.int64)
    if not lengths.is_cpu or torch.compiler.is_compiling() or _is_batched(lengths):
        lengths = lengths.clamp(0, steps)
    elif batch and not 0 <= int(lengths.min()) <= int(lengths.max()) <= steps:
        raise ValueError(f"LSTM: lengths must be in 0..{steps}, got {lengths.tolist()}")
    return lengths.to(x.device, non_blocking=x.is_cuda).contiguous().view(batch)


def check_reset(reset: Tensor, x: Tensor, batched: bool, batch_first: bool) -> Tensor:
    """reset as bool ``[T, B]`` on the device of x ``[T, B, I]``."""
    if not isinstance(reset, Tensor) or reset.dtype is not torch.bool:
        raise TypeError(f"LSTM: reset must be a bool tensor, got {_describe(reset)}")
    steps, batch, _ = x.shape
    expected = (batch, steps) if batch_first else (steps, batch)
    if reset.shape != (expected if batched else (steps,)):
        shape = list(expected) if batched else [steps]
        raise ValueError(f"LSTM: reset must be {shape}, got {size(reset)}")
    reset = reset.to(x.device, non_blocking=x.is_cuda)
    if not batched:
        return reset.unsqueeze(1)
    return reset.transpose(0, 1) if batch_first else reset


def size(tensor: Tensor) -> list[int]:
    """The shape, as error messages print it."""
    return list(tensor.shape)


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {size(value)}"
    if isinstance(value, tuple | list):
        return f"{type(value).__name__} of {[type(item).__name__ for item in value]}"
    return type(value).__name__
