"""The LSTM as a function, and the loss that goes with it.

Letters: T time steps, B batch, I input size, H hidden size, P projected size (H without
projection), L layers, D directions, N rows of a packed sequence, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fastlstm import autograd, onnx, ops, reference
from fastlstm.autograd import Cache, pack_buffer
from fastlstm.backends import Demand, select
from fastlstm.checks import (
    check_cell_state,
    check_lengths,
    check_like,
    check_noise,
    check_packed,
    check_pair,
    check_reset,
    check_states,
    check_unbatched,
    check_weights,
    size,
)
from fastlstm.reference import PLAIN, Cell

__all__ = ["lstm", "rnn", "sequence_loss"]

_AUTOCAST_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
State = tuple[Tensor, Tensor]
_plain_lstm = partial(Demand, "LSTM", False, False, False, (0.0, 0.0))


def lstm(
    input: Tensor,
    hx: State | None,
    weights: Sequence[Tensor],
    *,
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    return_cell_states: bool = False,
    recurrent_dropout: float = 0.0,
    weight_dropout: float = 0.0,
    zoneout: tuple[float, float] = (0.0, 0.0),
    layer_norm: bool = False,
    peephole: bool = False,
    recompute: bool = False,
    caches: Sequence[Cache] | None = None,
) -> tuple[Tensor, State] | tuple[Tensor, State, Tensor]:
    """Run L layers of D directions over a sequence, as ``torch.nn.LSTM`` does.

    Args:
        input: ``[T, B, I]``; ``[B, T, I]`` with ``batch_first``; ``[T, I]`` without a batch; or
            the ``[N, I]`` rows of a ``PackedSequence`` when ``batch_sizes`` is given.
        hx: ``(h_0 [L*D, B, P], c_0 [L*D, B, H])``, without B for input without a batch; None
            for zeros. For packed rows it is in their order, longest sequence first.
        weights: in the order of ``nn.LSTM``: for every layer, for every direction,
            ``w_ih [4H, I or D*P]``, ``w_hh [4H, P]``, then ``b_ih [4H]`` and ``b_hh [4H]`` if
            there are biases, then ``w_hr [P, H]`` if there is a projection, then ``w_ch [3H]``
            (of i, f, o) with ``peephole``, then the gains ``ln_ih [4H]``, ``ln_hh [4H]``,
            ``ln_c [H]`` and the bias ``b_ln_c [H]`` with ``layer_norm``. Gates are i, f, g, o.
        num_layers: L.
        bidirectional: D is 2 if True, else 1.
        batch_first: the layout of input, output and reset; never of hx.
        dropout: probability of zeroing an output of any layer but the last, in training.
        training: whether to apply the dropouts, and zoneout at random.
        batch_sizes: ``PackedSequence.batch_sizes``, int64 ``[T]`` on the CPU.
        lengths: integers ``[B]`` (a scalar without a batch) in 0..T, in any order. Output is 0
            from there on and the final states are those at each row's length. The range is
            checked when lengths is on the CPU; elsewhere that would make the device wait, and
            values are clamped to 0..T instead.
        reset: bool ``[T, B]``, ``[B, T]`` with ``batch_first``, ``[T]`` without a batch; True
            zeroes that row's h and c before the step.
        return_cell_states: also return the last layer's c at every step.
        recurrent_dropout: probability of zeroing an element of h on its way into w_hh, in
            training; of the same elements at every step of a sequence (Gal & Ghahramani, 2016).
        weight_dropout: probability of zeroing an element of w_hh, in training; of the same ones
            in the whole call (Merity et al., 2018).
        zoneout: probabilities that an element of c, and of h, keeps its value in a step; without
            training both values are mixed in this proportion (Krueger et al., 2017).
        layer_norm: normalise ``w_ih x`` and ``w_hh h`` over their 4H elements, and c over its H
            on its way into h (Ba et al., 2016).
        peephole: i and f also see c of the step before, o that of its own (Gers et al., 2002).
        recompute: keep only h and c for backward, which then computes the gates again.
        caches: a ``Cache`` for each layer in which a backend may keep prepared weights.

    Returns:
        ``(y, (h_n, c_n))``, or ``(y, (h_n, c_n), c_all)`` with ``return_cell_states``. y is
        ``[T, B, D*P]``, h_n and c_n are shaped as hx, c_all is ``[T, B, D*H]``; y and c_all are
        laid out as input.

    Raises:
        ValueError: a wrong number of dimensions of input, lengths or reset, a wrong range of
            lengths, a dtype of input that is not that of the weights, or lengths and reset where
            they have no meaning.
        RuntimeError: a wrong size, device or other dtype, T = 0, or a backend that was asked for
            and cannot compute the call.
        TypeError: lengths are not integers or reset is not bool.
    """
    if hx is not None and (type(hx) is not tuple or len(hx) != 2):
        hx = check_pair(hx, input.dim() if batch_sizes is None else 3)
    if recurrent_dropout or weight_dropout or zoneout != (0.0, 0.0):
        check_noise(recurrent_dropout, weight_dropout, zoneout)
    cell = Cell(peephole, layer_norm, zoneout=(zoneout[0], zoneout[1]))
    if cell.is_plain:
        cell = PLAIN
    noisy = training and (recurrent_dropout > 0 or weight_dropout > 0 or not cell.is_plain)

    def compute(call: _Layer, weights: Sequence[Tensor], states: Sequence[Any], cache: Any) -> Any:
        own = cell
        if noisy:
            own, weights = _draw(cell, call, weights, recurrent_dropout, weight_dropout)
        run = _implementation("lstm_layer", call.backend)
        y, h_n, c_n, c_all = run(
            call.x,
            weights,
            *states,
            **call.layout,
            cell_states=return_cell_states and call.is_last,
            cell=own,
            recompute=recompute,
            cache=cache,
        )
        return y, (h_n, c_n), c_all

    masked = training and recurrent_dropout > 0
    special = None
    if masked or not cell.is_plain:
        special = partial(Demand, "LSTM", peephole, layer_norm, masked, zoneout)
    y, (h_n, c_n), c_all = _recur(
        "LSTM", compute, input, hx, weights, cell, special, num_layers, bidirectional,
        batch_first, dropout if training else 0.0, batch_sizes, lengths, reset, caches,
    )  # fmt: skip
    return (y, (h_n, c_n)) if c_all is None else (y, (h_n, c_n), c_all)


def rnn(
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    *,
    nonlinearity: str = "tanh",
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    caches: Sequence[Cache] | None = None,
) -> tuple[Tensor, Tensor]:
    """Run L layers of D directions over a sequence, as ``torch.nn.RNN`` does.

    Args:
        input: as of :func:`lstm`.
        hx: ``h_0 [L*D, B, H]``, without B for input without a batch; None for zeros.
        weights: for every layer, for every direction, ``w_ih [H, I or D*H]``, ``w_hh [H, H]``,
            then ``b_ih [H]`` and ``b_hh [H]`` if there are biases.
        nonlinearity: "tanh" or "relu".

    All others are those of :func:`lstm`.

    Returns:
        ``(y, h_n)``: y is ``[T, B, D*H]``, laid out as input, and h_n is shaped as hx.

    Raises:
        ValueError, RuntimeError, TypeError: as :func:`lstm`; also for another nonlinearity.
    """
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"RNN: nonlinearity must be 'tanh' or 'relu', got {nonlinearity!r}")
    relu = nonlinearity == "relu"

    def compute(call: _Layer, weights: Sequence[Tensor], states: Sequence[Any], cache: Any) -> Any:
        run = _implementation("rnn_layer", call.backend)
        y, h_n = run(call.x, weights, *states, relu=relu, **call.layout, cache=cache)
        return y, (h_n,), None

    if hx is not None and not isinstance(hx, Tensor):
        raise TypeError(f"RNN: hx must be a tensor, got {type(hx).__name__}")
    special = partial(Demand, "RNN", False, False, False, (0.0, 0.0))
    y, (h_n,), _ = _recur(
        "RNN", compute, input, None if hx is None else (hx,), weights, PLAIN, special, num_layers,
        bidirectional, batch_first, dropout if training else 0.0, batch_sizes, lengths, reset,
        caches,
    )  # fmt: skip
    return y, h_n


def _implementation(name: str, backend: str) -> Any:
    """The function lstm_layer or rnn_layer of a backend."""
    if backend in ("reference", "onnx"):
        return getattr(reference if backend == "reference" else onnx, name)
    return partial(getattr(autograd, name), kernels=backend)


class _Layer(NamedTuple):
    """One layer of a call, without its weights and states."""

    backend: str
    x: Tensor  # [T, B, I] or [N, I]
    batch: int
    is_last: bool
    layout: dict[str, Any]  # directions and which rows there are


def _recur(
    kind: str,
    compute: Callable[..., Any],
    input: Tensor,
    hx: tuple[Tensor, ...] | None,
    weights: Sequence[Tensor],
    cell: Cell,
    special: Callable[..., Demand] | None,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
    dropout: float,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    caches: Sequence[Cache] | None,
) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]:
    """Check a call and walk through its layers, each computed by `compute`.

    ``special`` makes the demand on the backend from the sizes, unless this is a plain LSTM.
    """
    packed = batch_sizes is not None
    dims, swap = input.dim(), False
    autocast = torch._C._is_any_autocast_enabled() and _autocast_dtype(input)
    if autocast:
        input, hx, weights = _cast(autocast, input, hx, weights)
    x = input
    if batch_sizes is not None:
        steps, batch, features = check_packed(kind, x, batch_sizes, hx)
    elif dims == 3:
        steps, batch, features = x.shape
        if batch_first:
            steps, batch = batch, steps
            # One step of one sequence lies the same either way, but not in an exported program,
            # which may see others.
            swap = torch.compiler.is_compiling() or steps != 1 or batch != 1
            x = x.transpose(0, 1) if swap else x
    elif dims == 2:
        (steps, features), batch = x.shape, 1
        x = x.unsqueeze(1)
    else:
        raise ValueError(f"{kind}: expected input to be 2-D or 3-D, got {size(input)}")
    if x.dtype is not weights[0].dtype:
        module = f" or the module with .to({x.dtype})" if x.is_floating_point() else ""
        raise (RuntimeError if packed or autocast else ValueError)(
            f"{kind}: input is {x.dtype} but the weights are {weights[0].dtype}: convert the "
            f"input with .to({weights[0].dtype}){module}"
        )
    if features != weights[0].shape[-1]:
        raise RuntimeError(
            f"{kind}: expected input with a last dimension of {weights[0].shape[-1]}, got "
            f"{size(input)}"
        )
    directions = 2 if bidirectional else 1
    check_weights(weights, x, num_layers, directions, kind, cell)
    units, projected = weights[1].shape
    hidden = units if kind == "RNN" else units // 4
    if onnx.is_exporting():
        backend = "onnx"
    else:
        backend = "" if special else select(x)
        if backend in ("", "cuda"):  # the cuda kernels do not have every plain layer either
            inputs = (features, *(directions * projected,) * (num_layers - 1))
            own = len(weights) // (num_layers * directions) - cell.peephole - 4 * cell.layer_norm
            sizes = inputs, hidden, projected, directions
            demand = (special or _plain_lstm)(*sizes, own % 2 == 1)
            backend = select(x, demand)
    if steps == 0:
        raise RuntimeError(f"{kind}: expected at least one time step, got input {size(input)}")

    if hx is not None:
        if dims == 2 and not packed:
            hx = check_unbatched(kind, hx)
        rows = num_layers * directions
        shapes = (rows, batch, projected), (rows, batch, hidden)
        check_states(kind, hx, shapes, packed)
        check_like(hx, x)
    if lengths is not None or reset is not None:
        if packed:
            raise ValueError(f"{kind}: lengths and reset have no meaning for packed input")
        if lengths is not None:
            lengths = check_lengths(kind, lengths, x, dims == 3)
        if reset is not None:
            if bidirectional:
                raise ValueError(f"{kind}: reset has no meaning for a bidirectional {kind}")
            reset = check_reset(kind, reset, x, dims == 3, batch_first)

    if autocast:
        compute = _without_autocast(compute, x.device.type)
    layout = {
        "directions": directions, "batch_sizes": batch_sizes, "lengths": lengths, "reset": reset
    }  # fmt: skip
    if num_layers == 1:
        states: Sequence[Any] = hx or ((None,) * (2 if kind == "LSTM" else 1))
        cache = caches[0] if caches else None
        x, final, c_all = compute(_Layer(backend, x, batch, True, layout), weights, states, cache)
    else:
        each = len(weights) // num_layers
        split = None if hx is None else [state.split(directions) for state in hx]
        finals = []
        for k in range(num_layers):
            if k and dropout:
                x = torch.dropout(x, dropout, True)
            states = [t[k] for t in split] if split else (None,) * (2 if kind == "LSTM" else 1)
            x, final, c_all = compute(
                _Layer(backend, x, batch, k == num_layers - 1, layout),
                weights[k * each : (k + 1) * each],
                states,
                caches[k] if caches else None,
            )
            finals.append(final)
        final = tuple(map(torch.cat, zip(*finals, strict=True)))
    if dims == 2 and not packed:
        x, final = x.squeeze(1), tuple(state.squeeze(1) for state in final)
        c_all = None if c_all is None else c_all.squeeze(1)
    elif swap:
        x = x.transpose(0, 1)
        c_all = None if c_all is None else c_all.transpose(0, 1)
    return x, final, c_all


def _draw(
    cell: Cell,
    call: _Layer,
    weights: Sequence[Tensor],
    recurrent_dropout: float,
    weight_dropout: float,
) -> tuple[Cell, Sequence[Tensor]]:
    """The cell and the weights of one layer in training, with what is random in them."""
    x, D = call.x, call.layout["directions"]
    each = len(weights) // D
    if any(cell.zoneout):
        cell = cell._replace(seed=torch.randint(2**63 - 1, (1,), device=x.device))
    if recurrent_dropout:
        wide = torch.float64 if x.dtype is torch.float64 else torch.float32
        ones = x.new_ones(D, call.batch, weights[1].shape[1], dtype=wide)
        cell = cell._replace(h_mask=torch.dropout(ones, recurrent_dropout, True))
    if weight_dropout:
        weights = list(weights)
        weights[1::each] = [torch.dropout(w, weight_dropout, True) for w in weights[1::each]]
    return cell, weights


def lstm_cell(
    input: Tensor,
    hx: State | None,
    weights: Sequence[Tensor],
    *,
    cache: Cache | None = None,
) -> State:
    """One step, as ``torch.nn.LSTMCell`` takes it.

    Args:
        input: ``[B, I]``, or ``[I]`` without a batch.
        hx: ``(h [B, H], c [B, H])``, without B for input without a batch; None for zeros.
        weights: ``w_ih [4H, I]``, ``w_hh [4H, H]``, then ``b_ih [4H]`` and ``b_hh [4H]`` if there
            are biases. Gates are i, f, g, o.
        cache: a dict in which a backend may keep prepared weights.

    Returns:
        The next ``(h, c)``, shaped as hx. Under autocast the state keeps its dtype (input's, if
        hx is None), in which the step is then computed: h and c are not rounded at every step.

    Raises:
        ValueError: a wrong number of dimensions of input or hx.
        RuntimeError: a wrong size, dtype or device, or a backend that was asked for and cannot
            compute the call.
    """
    dims = input.dim()
    if dims not in (1, 2):
        raise ValueError(f"LSTMCell: expected input to be 1-D or 2-D, got {size(input)}")
    if hx is not None and (type(hx) is not tuple or len(hx) != 2):
        hx = check_pair(hx, None)
    autocast = torch._C._is_any_autocast_enabled() and _autocast_dtype(input)
    if autocast:
        dtype = input.dtype if hx is None else torch.promote_types(hx[0].dtype, hx[1].dtype)
        input, hx, weights = _cast(dtype, input, hx, weights)
    if input.shape[-1] != weights[0].shape[-1]:
        raise RuntimeError(
            f"LSTMCell: expected input with a last dimension of {weights[0].shape[-1]}, got "
            f"{size(input)}"
        )
    backend = "onnx" if onnx.is_exporting() else select(input)
    check_weights(weights, input)
    hidden = weights[1].shape[1]
    if backend == "cuda":
        backend = select(input, _plain_lstm((input.shape[-1],), hidden, hidden, 1, False))
    shape = (*input.shape[:-1], hidden)
    batch = shape[0] if dims == 2 else 1
    h0 = c0 = None
    if hx is not None:
        h0, c0 = hx
        check_cell_state(h0, c0, shape)
        check_like((h0, c0), input)
        h0, c0 = h0.view(1, batch, hidden), c0.view(1, batch, hidden)

    layer = _implementation("lstm_layer", backend)
    if autocast:
        layer = _without_autocast(layer, input.device.type)
    x = input.view(1, batch, input.shape[-1])
    _, h, c, _ = layer(x, weights, h0, c0, cache=cache)
    return h.reshape(shape), c.reshape(shape)


def infer(x: Tensor, hx: Any, weights: Sequence[Tensor], cache: Cache, directions: int = 0) -> Any:
    """The shortest way to the kernel, for streaming without gradients; x as in `runs_as_is`.

    Returns:
        ``(y, h_n, c_n)`` of a layer, x ``[T, B, I]``; without directions ``(h, c)`` of a cell, x
        ``[B, I]``. What the operator checks itself is not checked before: None stands for a call
        that it refused, which then takes the long way, to an answer or a better message.
    """
    h0 = c0 = None
    if hx is not None:
        if type(hx) is not tuple or len(hx) != 2:
            return None
        h0, c0 = hx
        if type(h0) is not Tensor or type(c0) is not Tensor:
            return None
    try:
        buffer = cache.get(("forward", weights[0].dtype))
        if buffer is None:
            buffer = pack_buffer(cache, "forward", weights, directions or 1)
        if directions:
            found = ops.lstm_infer_cpu(x, weights, directions, h0, c0, buffer)
        else:
            found = ops.lstm_cell_infer_cpu(x, weights, h0, c0, buffer)
    except (RuntimeError, ValueError):
        return None
    return found if type(found[0]) is Tensor else None  # as it always is after the long way


def sequence_loss(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor,
    average_across_timesteps: bool = True,
    average_across_batch: bool = True,
) -> Tensor:
    """Weighted cross-entropy of a sequence of classes: TensorFlow's ``seq2seq.sequence_loss``.

    Args:
        logits: ``[B, T, C]``, floating.
        targets: ``[B, T]``, the true class of each step, integers in 0..C-1.
        weights: ``[B, T]``, what each step counts; 0 for padding.
        average_across_timesteps: divide the sum over T by the sum of its weights.
        average_across_batch: divide the sum over B by the sum of its weights.

    Returns:
        A scalar; ``[B]`` if averaged across time steps only, ``[T]`` if across the batch only,
        ``[B, T]`` if neither.

    Raises:
        ValueError: a shape is not as above.
    """
    if logits.dim() != 3 or targets.shape != logits.shape[:2] or weights.shape != logits.shape[:2]:
        raise ValueError(
            "sequence_loss: expected logits [B, T, C], targets [B, T] and weights [B, T], got "
            f"{size(logits)}, {size(targets)} and {size(weights)}"
        )
    losses = weights * cross_entropy(logits.transpose(1, 2), targets.long(), reduction="none")
    dims = [0] * average_across_batch + [1] * average_across_timesteps
    if not dims:
        return losses
    # TensorFlow adds 1e-12 to the total weight, so that no weight at all gives 0 and not NaN.
    return losses.sum(dims) / (weights.sum(dims) + 1e-12)


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast asks for on the device of x, None where it is off."""
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


def _cast(
    dtype: torch.dtype, x: Tensor, hx: Any, weights: Sequence[Tensor]
) -> tuple[Tensor, Any, Sequence[Tensor]]:
    """Everything in dtype; as in autocast, float64 and integers neither change nor spread."""

    def cast(t: Tensor) -> Tensor:
        eligible = t.is_floating_point() and t.dtype is not torch.float64
        return t.to(dtype) if eligible and dtype in _AUTOCAST_DTYPES else t

    return cast(x), None if hx is None else tuple(map(cast, hx)), [cast(w) for w in weights]


def _without_autocast(layer: Callable[..., Any], kind: str) -> Callable[..., Any]:
    """The layer with autocast off: its arguments have been cast already."""

    def run(*args: Any, **options: Any) -> Any:
        with torch.autocast(kind, enabled=False):
            return layer(*args, **options)

    return run
