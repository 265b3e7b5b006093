"""What a call may contain: each check returns or raises.

Whatever ``nn.LSTM`` and ``nn.LSTMCell`` refuse is refused with the same type of exception.
Letters: T steps, B batch, I input size, H hidden size, P size of h, N packed rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastlstm.layer.autocast import cast_dtype
from fastlstm.layer.options import Options
from fastlstm.spec import LayerSpec

_INTEGERS = frozenset({torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8})
_layout = attrgetter("layout")
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor


def check_noise(recurrent_dropout: Any, weight_dropout: Any, zoneout: Any) -> None:
    """Check that these are the probabilities that an LSTM takes."""
    if not isinstance(zoneout, tuple | list) or len(zoneout) != 2:
        raise ValueError(f"LSTM: zoneout must be two probabilities (c, h), got {zoneout!r}")
    for name, p, limit in (
        ("recurrent_dropout", recurrent_dropout, "<="),
        ("weight_dropout", weight_dropout, "<="),
        ("zoneout", zoneout[0], "<"),
        ("zoneout", zoneout[1], "<"),
    ):
        if not isinstance(p, int | float) or not 0 <= p <= 1 or (limit == "<" and p == 1):
            raise ValueError(f"LSTM: {name} must be a probability, 0 <= p {limit} 1, got {p!r}")


def check_nonlinearity(nonlinearity: Any) -> None:
    """Check that an RNN has this activation."""
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"RNN: Unknown nonlinearity {nonlinearity!r}: choose 'tanh' or 'relu'")


def dense(
    kind: str, input: Tensor, hx: Sequence[Tensor] | None, weights: Sequence[Tensor]
) -> tuple[Tensor, Any, Sequence[Tensor]]:
    """Return all of them as tensors that kernels can read; sparse ones become dense.

    Raises:
        TypeError: weights are no list of tensors.
        RuntimeError: the input is a nested tensor.
        NotImplementedError: a tensor is one of oneDNN or quantised.
    """
    if torch.compiler.is_compiling():
        return input, hx, weights
    try:
        count, layouts = len(weights), {*map(_layout, weights)}
    except (AttributeError, TypeError):
        raise TypeError(
            f"{kind}: weights must be a list of tensors, got {_describe(weights)}"
        ) from None
    if count < 2 or weights[0].dim() != 2 or weights[1].dim() != 2:
        given = f"{count} tensors" if count < 2 else f"{size(weights[0])} and {size(weights[1])}"
        raise RuntimeError(
            f"{kind}: weights must begin with two matrices, weight_ih and weight_hh, got {given}"
        )
    if not isinstance(input, Tensor):
        raise AttributeError(f"{kind}: input must be a tensor, got {type(input).__name__}")
    if input.is_nested:
        raise RuntimeError(
            f"{kind}: nested tensors are not supported: pad them with "
            "torch.nested.to_padded_tensor and pass lengths"
        )
    layouts.add(input.layout)
    if hx is not None:
        layouts.update(map(_layout, hx))
    if len(layouts) == 1 and torch.strided in layouts and not input.is_quantized:
        return input, hx, weights
    if getattr(torch, "_mkldnn") in layouts:  # noqa: B009 (mypy does not know it)
        raise NotImplementedError(f"{kind}: convert tensors of oneDNN with .to_dense()")
    if input.is_quantized:
        raise NotImplementedError(
            f"{kind}: input is {input.dtype}: convert it with .dequantize(). PyTorch's "
            "quantization converts modules of torch.nn only: call fastlstm.restore(model), or "
            "to_torch(), before prepare"
        )
    states = None if hx is None else tuple(map(Tensor.to_dense, hx))
    return input.to_dense(), states, [w.to_dense() for w in weights]


def check_input(kind: str, input: Any) -> None:
    """Check that an input that is no tensor is a PackedSequence."""
    if not isinstance(input, PackedSequence):
        raise AttributeError(  # as nn.LSTM, which asks it for its dimensions
            f"{kind}: input must be a tensor or a PackedSequence, got {type(input).__name__}"
        )


def check_features(
    kind: str,
    input: Tensor,
    weights: Sequence[Tensor],
    error: type[Exception] | None = None,
    autocast: torch.dtype | None = None,
) -> None:
    """Check that input ``[..., I]`` has the I and, unless error is None, the dtype of weights.

    That is the dtype that they get where autocast asks for one.
    """
    dtype = cast_dtype(weights[0].dtype, autocast) if autocast else weights[0].dtype
    if error is not None and input.dtype is not dtype:
        module = f" or the module with .to({input.dtype})" if input.is_floating_point() else ""
        raise error(
            f"{kind}: input is {input.dtype} but the weights are {dtype}: convert the input with "
            f".to({dtype}){module}"
        )
    if input.shape[-1] != weights[0].shape[-1]:
        raise RuntimeError(
            f"{kind}: expected input with a last dimension of {weights[0].shape[-1]}, got "
            f"{size(input)}"
        )


def check_weights(
    weights: Sequence[Tensor], x: Tensor, options: Options, autocast: torch.dtype | None = None
) -> LayerSpec:
    """Check that every weight has the shape, dtype and device that go with ``x [..., I]``.

    Args:
        weights: those of all layers.
        x: the input of the first one.
        options: what else the call says.
        autocast: the dtype that they get before a kernel sees them; None for their own.

    Returns:
        What the first layer is.
    """
    spec = _first_layer(weights, options)
    names, shapes = _expected_weights(spec, x)
    count, directions = len(shapes), spec.directions
    dtype, device, on_cpu = x.dtype, x.device, x.is_cpu
    for k, w in enumerate(weights):
        if k == count * directions:
            shapes[0] = (shapes[0][0], directions * spec.state_size)
        found = cast_dtype(w.dtype, autocast) if autocast else w.dtype
        if found is not dtype or (not w.is_cpu if on_cpu else w.device != device):
            raise RuntimeError(
                f"the input is {dtype} on {device} but {names[k % count]} is {found} on "
                f"{w.device}: move the input or the module with .to(...)"
            )
        if w.shape != shapes[k % count]:
            raise RuntimeError(
                f"expected {names[k % count]} of layer {k // (count * directions)} to be "
                f"{list(shapes[k % count])}, got {size(w)}"
            )
    return spec


def _first_layer(weights: Sequence[Tensor], options: Options) -> LayerSpec:
    """What the first layer is, by the number of weights and the shapes of its first two."""
    layers, directions = options.num_layers, options.directions
    if not isinstance(layers, int) or layers < 1:
        raise ValueError(f"{options.kind}: num_layers must be a positive integer, got {layers!r}")
    lstm, extra = options.mode == "LSTM", options.peephole + 4 * options.layer_norm
    count, rest = divmod(len(weights), layers * directions)
    plain = count - extra
    if rest or plain not in ((2, 3, 4, 5) if lstm else (2, 4)):
        expected = f"{2 + extra} to {5 + extra}" if lstm else "2 or 4"
        raise RuntimeError(
            f"expected {expected} weights for each of {layers} layers x {directions} directions, "
            f"got {len(weights)} in all"
        )
    units, projected = weights[1].shape
    return LayerSpec(
        options.mode,
        weights[0].shape[-1],
        units // 4 if lstm else units,
        projected if plain % 2 else 0,
        directions,
        plain > 3,
        options.peephole,
        options.layer_norm,
        options.recurrent_dropout > 0,
        options.zoneout,
    )


def _expected_weights(spec: LayerSpec, x: Tensor) -> tuple[list[str], list[tuple[int, ...]]]:
    """The names and shapes of the weights of one direction of the first layer."""
    H = spec.hidden_size
    units = spec.gates * H
    names = ["weight_ih", "weight_hh"]
    shapes: list[tuple[int, ...]] = [(units, x.shape[-1]), (units, spec.state_size)]
    if spec.bias:
        names += ["bias_ih", "bias_hh"]
        shapes += [(units,), (units,)]
    if spec.proj_size:
        names += ["weight_hr"]
        shapes += [(spec.proj_size, H)]
    if spec.peephole:
        names += ["weight_ch"]
        shapes += [(3 * H,)]
    if spec.layer_norm:
        names += ["weight_ln_ih", "weight_ln_hh", "weight_ln_c", "bias_ln_c"]
        shapes += [(units,), (units,), (H,), (H,)]
    return names, shapes


def check_packed(
    kind: str, x: Tensor, batch_sizes: Tensor, hx: Sequence[Tensor] | None
) -> tuple[int, int, int]:
    """Check packed rows ``x [N, I]``; return T, B and I."""
    if x.dim() != 2:
        raise RuntimeError(f"{kind}: packed rows must be 2-D [N, I], got {size(x)}")
    if not isinstance(batch_sizes, Tensor) or batch_sizes.dtype is not torch.int64:
        raise RuntimeError(
            f"{kind}: batch_sizes must be a tensor of torch.int64, got {_describe(batch_sizes)}"
        )
    if batch_sizes.dim() != 1:
        raise RuntimeError(f"{kind}: batch_sizes must be 1-D [T], got {size(batch_sizes)}")
    if not batch_sizes.is_cpu:
        raise RuntimeError(f"{kind}: batch_sizes must be on the CPU, got {batch_sizes.device}")
    if torch.compiler.is_compiling():  # values are not known yet: the operator checks them
        batch: Any = batch_sizes[0].item() if hx is None else hx[0].shape[1]
        return batch_sizes.shape[0], batch, x.shape[1]
    sizes = batch_sizes.tolist()
    if sum(sizes) != x.shape[0] or sizes != sorted(sizes, reverse=True) or sizes[-1:] < [1]:
        raise RuntimeError(
            f"{kind}: batch_sizes must be positive, non-increasing and add up to the {x.shape[0]} "
            f"packed rows, got {sizes}"
        )
    return len(sizes), sizes[0], x.shape[1]


def is_pair(hx: Any) -> bool:
    """Whether hx is what a call of an LSTM wants: a tuple of two tensors."""
    return (
        type(hx) is tuple
        and len(hx) == 2
        and isinstance(hx[0], Tensor)
        and isinstance(hx[1], Tensor)
    )


def check_pair(hx: Any, dims: int | None) -> tuple[Tensor, Tensor]:
    """Return hx as two tensors; an LSTM wants them to have dims dimensions, None for a cell."""
    message = f"hx must be a pair of tensors (h_0, c_0), got {_describe(hx)}"
    try:  # as they do: nn.LSTM indexes hx, nn.LSTMCell walks it
        found = [state.dim() for state in (hx if dims is None else (hx[k] for k in (0, 1)))]
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise type(error)(message) from None
    if isinstance(hx, Tensor):
        raise (TypeError if dims is None or found == [dims, dims] else RuntimeError)(message)
    if len(hx) != 2:
        raise RuntimeError(message)
    return hx[0], hx[1]


def check_steps(kind: str, steps: int, input: Tensor) -> None:
    """Check that there is a step."""
    if torch.compiler.is_compiling():  # T may be a value that only a run knows
        torch._check(steps > 0)
    elif steps == 0:
        raise RuntimeError(f"{kind}: expected at least one time step, got input {size(input)}")


def check_unbatched(kind: str, hx: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return h_0 ``[L*D, P]`` and c_0 ``[L*D, H]`` as a batch of one."""
    if any(state.dim() != 2 for state in hx):
        raise RuntimeError(
            f"{kind}: expected 2-D {_names(hx)} for unbatched input, got {_sizes(hx)}"
        )
    return tuple(state.unsqueeze(1) for state in hx)


def check_states(
    kind: str, hx: Sequence[Tensor], shapes: Sequence[tuple[int, ...]], packed: bool
) -> None:
    """Check that h_0 and c_0 have these shapes; the h_0 of an RNN has the first."""
    if any(state.shape != shape for state, shape in zip(hx, shapes, strict=False)):
        expected = " and ".join(
            f"{name} {list(shape)}"
            for name, shape in zip(("h_0", "c_0")[: len(hx)], shapes, strict=False)
        )
        error = IndexError if packed and any(s.dim() != 3 for s in hx) else RuntimeError
        raise error(f"{kind}: expected {expected}, got {_sizes(hx)}")


def _names(hx: Sequence[Tensor]) -> str:
    return " and ".join(("h_0", "c_0")[: len(hx)])


def _sizes(hx: Sequence[Tensor]) -> str:
    return " and ".join(str(size(state)) for state in hx)


def check_cell_state(h: Tensor, c: Tensor, shape: tuple[int, ...]) -> None:
    """Check that h and c of a cell have this shape."""
    if h.shape != shape or c.shape != shape:
        kind = RuntimeError if {h.dim(), c.dim()} <= {1, 2} else ValueError
        raise kind(f"LSTMCell: expected h and c {list(shape)}, got {size(h)} and {size(c)}")


def check_like(hx: Sequence[Tensor], x: Tensor) -> None:
    """Check that every state has the dtype and device of x."""
    dtype, device, on_cpu = x.dtype, x.device, x.is_cpu
    for state in hx:  # is_cpu takes a third of the time of comparing devices
        if state.dtype is not dtype or not ((on_cpu and state.is_cpu) or state.device == device):
            found = " and ".join(f"{state.dtype} on {state.device}" for state in hx)
            raise RuntimeError(
                f"hx is {found} but the input is {dtype} on {device}: convert it with .to(input)"
            )


def check_lengths(kind: str, lengths: Tensor, x: Tensor, batched: bool) -> Tensor:
    """Return lengths as int64 ``[B]`` on the device of x ``[T, B, I]``."""
    if not isinstance(lengths, Tensor) or lengths.dtype not in _INTEGERS:
        raise TypeError(
            f"{kind}: lengths must be a tensor of integers, got {_describe(lengths)}: convert "
            "them with torch.as_tensor(lengths)"
        )
    steps, batch, _ = x.shape
    if lengths.shape != ((batch,) if batched else ()):
        expected = f"[{batch}], one for each row" if batched else "[] for unbatched input"
        raise ValueError(f"{kind}: lengths must be {expected}, got {size(lengths)}")
    lengths = lengths.to(torch.int64)
    if not lengths.is_cpu or torch.compiler.is_compiling() or _is_wrapped(lengths):
        lengths = lengths.clamp(0, steps)
    elif batch and not 0 <= int(lengths.min()) <= int(lengths.max()) <= steps:
        raise ValueError(f"{kind}: lengths must be in 0..{steps}, got {lengths.tolist()}")
    return lengths.to(x.device, non_blocking=x.is_cuda).contiguous().view(batch)


def check_reset(kind: str, reset: Tensor, x: Tensor, batched: bool, batch_first: bool) -> Tensor:
    """Return reset as bool ``[T, B]`` on the device of x ``[T, B, I]``."""
    if not isinstance(reset, Tensor) or reset.dtype is not torch.bool:
        raise TypeError(f"{kind}: reset must be a bool tensor, got {_describe(reset)}")
    steps, batch, _ = x.shape
    expected = (batch, steps) if batch_first else (steps, batch)
    if reset.shape != (expected if batched else (steps,)):
        shape = list(expected) if batched else [steps]
        raise ValueError(f"{kind}: reset must be {shape}, got {size(reset)}")
    reset = reset.to(x.device, non_blocking=x.is_cuda)
    if not batched:
        return reset.unsqueeze(1)
    return reset.transpose(0, 1) if batch_first else reset


def size(tensor: Tensor) -> list[int]:
    """Return the shape, as error messages print it."""
    return list(tensor.shape)


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {size(value)}"
    if isinstance(value, tuple | list):
        return f"{type(value).__name__} of {[type(item).__name__ for item in value]}"
    return type(value).__name__
