"""One layer on the kernels of a backend, differentiable to any order.

First derivatives come from the backward kernel. Derivatives of those go through the reference:
slower, and right to any order. What ``torch.func.vmap`` makes of a layer is in
:mod:`fastlstm.batching`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack
from torch.utils._pytree import tree_map

from . import batching, ops, reference
from .reference import PLAIN, Cell

LayerOutput = tuple[Tensor, Tensor, Tensor, Tensor | None]
Tensors = tuple[Tensor, ...]
Maybe = Sequence[Any]  # of tensors, or None where there is none

_CPU = torch.device("cpu")  # named at every allocation: a default device may be another one
_is_transformed = torch._C._are_functorch_transforms_active


class Cache(dict[Any, Tensor]):
    """Weights in the order of the kernels. Not a plain dict, which torch.func would copy."""


class _Kernels(NamedTuple):
    """What autograd has to know of a backend; the contract of the operators is in ops.py."""

    lstm_fwd: Any
    lstm_bwd: Any
    rnn_fwd: Any  # or None
    rnn_bwd: Any
    packs: bool  # whether it keeps weights in an order of its own
    wide: bool  # whether gates and gradients of 16-bit layers are float32


_KERNELS = {
    "cpu": _Kernels(
        ops.lstm_fwd_cpu,
        ops.lstm_bwd_cpu,
        ops.rnn_fwd_cpu,
        ops.rnn_bwd_cpu,
        packs=True,
        wide=True,
    ),
    "triton": _Kernels(
        ops.lstm_fwd_triton,
        ops.lstm_bwd_triton,
        ops.rnn_fwd_triton,
        ops.rnn_bwd_triton,
        packs=False,
        wide=False,
    ),
    "cuda": _Kernels(
        ops.lstm_fwd_cuda,
        ops.lstm_bwd_cuda,
        None,
        None,
        packs=False,
        wide=False,
    ),
}


class Call(NamedTuple):
    """All of a layer's call that has no derivative."""

    kernels: str  # which of _KERNELS
    kind: str  # "LSTM", "RNN_TANH" or "RNN_RELU"
    directions: int
    batch_sizes: Tensor | None
    lengths: Tensor | None
    reset: Tensor | None
    cell: Cell = PLAIN  # of an LSTM
    cell_states: bool = False  # of an LSTM: whether c of every step is a result
    recompute: bool = False  # of an LSTM: whether gates are computed again for backward
    cache: Cache | None = None
    save: bool = True  # under torch.func: what backward needs
    members: int = 0  # E: all tensors but batch_sizes have a leading dimension, one for each model


def call_tensors(call: Call) -> tuple[Tensor | None, ...]:
    """What autograd has to keep for it."""
    cell = call.cell
    rows = call.batch_sizes is not None or call.lengths is not None or call.reset is not None
    if not (rows or cell.h_mask is not None or cell.seed is not None):
        return ()
    return call.batch_sizes, call.lengths, call.reset, cell.h_mask, cell.seed


def without_tensors(call: Call) -> Call:
    return with_tensors(call, (None,) * 5) if call_tensors(call) else call


def with_tensors(call: Call, tensors: Maybe) -> Call:
    """The call with what `call_tensors` found in it."""
    if not tensors:
        return call
    batch_sizes, lengths, reset, h_mask, seed = tensors
    cell = call.cell._replace(h_mask=h_mask, seed=seed)
    return call._replace(batch_sizes=batch_sizes, lengths=lengths, reset=reset, cell=cell)


def results(call: Call) -> int:
    """How many outputs of the layer have a derivative; those that follow are for backward."""
    return 3 + call.cell_states if call.kind == "LSTM" else 2


def by_reference(call: Call, inputs: Maybe) -> Tensors:
    """The results of the layer from ``(x, h0, c0, *weights)``, in plain PyTorch."""
    if call.members:
        one = call._replace(members=0)
        dims = tree_map(_first_of_tensors, one)._replace(batch_sizes=None)
        tensors = tuple(inputs)
        return torch.vmap(by_reference, (dims, tree_map(_first_of_tensors, tensors)))(one, tensors)
    x, h0, c0, *weights = inputs
    layout: dict[str, Any] = {
        "directions": call.directions,
        "batch_sizes": call.batch_sizes,
        "lengths": call.lengths,
        "reset": call.reset,
    }
    if call.kind != "LSTM":
        return reference.rnn_layer(x, weights, h0, relu=call.kind == "RNN_RELU", **layout)
    y, h_n, c_n, c_all = reference.lstm_layer(
        x, weights, h0, c0, cell=call.cell, cell_states=call.cell_states, **layout
    )
    return (y, h_n, c_n) if c_all is None else (y, h_n, c_n, c_all)


def _first_of_tensors(leaf: Any) -> int | None:
    """The dimension for torch.vmap."""
    return 0 if isinstance(leaf, Tensor) else None


def lstm_layer(
    x: Tensor,
    weights: Sequence[Tensor],
    h0: Tensor | None,
    c0: Tensor | None,
    *,
    directions: int = 1,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    cell_states: bool = False,
    cell: Cell = PLAIN,
    recompute: bool = False,
    cache: Cache | None = None,
    kernels: str = "cpu",
) -> LayerOutput:
    """Same contract as :func:`fastlstm.reference.lstm_layer`, on the kernels of that name.

    ``cache`` keeps the weights in kernel order between calls. It is checked against the weights'
    bytes at every call, so any edit of a weight is seen.
    """
    call = Call(
        kernels, "LSTM", directions, batch_sizes, lengths, reset,
        cell, cell_states, recompute, cache,
    )  # fmt: skip
    y, h_n, c_n, *more = _run(call, (x, h0, c0, *weights))
    if not cell_states:
        return y, h_n, c_n, None
    c_all = more[0]
    return y, h_n, c_n, _as(c_all, x.dtype)


def rnn_layer(
    x: Tensor,
    weights: Sequence[Tensor],
    h0: Tensor | None,
    *,
    relu: bool = False,
    directions: int = 1,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    cache: Cache | None = None,
    kernels: str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Same contract as :func:`fastlstm.reference.rnn_layer`, on the kernels of that name."""
    kind = "RNN_RELU" if relu else "RNN_TANH"
    call = Call(kernels, kind, directions, batch_sizes, lengths, reset, cache=cache)
    y, h_n, *_ = _run(call, (x, h0, None, *weights))
    return y, h_n


def _run(call: Call, inputs: Maybe) -> Tensors:
    """The outputs of the layer; what follows its results has no meaning to the caller."""
    if _is_transformed():
        kinds = [level.key() for level in get_interpreter_stack() or ()]
        save = torch.is_grad_enabled() or TransformType.Grad in kinds
        return run_transformed(call if save else call._replace(save=False), inputs)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        return _Layer.apply(call, *inputs)
    return _forward(call, inputs, save=False)


def run_transformed(call: Call, inputs: Maybe) -> Tensors:
    """All outputs, under whatever transform of torch.func is left."""
    return _TransformedLayer.apply(call, *inputs)


def _forward(call: Call, inputs: Maybe, save: bool) -> Tensors:
    """The results, then, with ``save``, what backward needs besides them."""
    x, h0, c0, *weights = inputs
    kernels, D, cell = _KERNELS[call.kernels], call.directions, call.cell
    gate_units, P = weights[1].shape[-2:]
    dtype, device = x.dtype, x.device
    shape = x.shape[:-1]
    lead = shape[:1] if call.members else ()
    B = shape[-1] if call.batch_sizes is None else _batch(call, h0)
    rows = _rows(call)
    packed = pack_buffer(call.cache, "forward", weights, D, cell) if kernels.packs else None
    # Sizes as plain arguments: the parser takes a tuple half a microsecond longer.
    y = torch.empty(*shape, D * P, dtype=dtype, device=device)
    h_n = torch.empty(*lead, D, B, P, dtype=dtype, device=device)
    if call.kind != "LSTM":
        kernels.rnn_fwd(
            _dense(x), _contiguous(weights, call), D, _dense(h0), *rows,
            call.kind == "RNN_RELU", y, h_n, packed, **_options(call),
        )  # fmt: skip
        return y, h_n
    H = gate_units // 4
    c_n = torch.empty(*lead, D, B, H, dtype=dtype, device=device)
    outputs = [y, h_n, c_n]
    c_all = gates = None
    if save or call.cell_states:
        c_all = torch.empty(*shape, D * H, dtype=_compute_dtype(dtype), device=device)
        outputs.append(c_all)
    keeps = call.kernels != "triton" or ops.triton_keeps_gates(H)
    if save and keeps and not call.recompute and not cell.layer_norm:
        kept = _compute_dtype(dtype) if kernels.wide else dtype
        size = *lead, D, *shape[len(lead) :], gate_units
        gates = torch.empty(size, dtype=kept, device=device)
        outputs.append(gates)
    kernels.lstm_fwd(
        _dense(x), _contiguous(weights, call), D, _dense(h0), _dense(c0), *rows,
        y, h_n, c_n, c_all, gates, packed, **_options(call),
    )  # fmt: skip
    return tuple(outputs)


def _options(call: Call) -> dict[str, Any]:
    """The keywords of an operator; none for the plain cell, they take time."""
    cell, options = call.cell, {}
    if not (cell is PLAIN or cell.is_plain):
        h_mask = cell.h_mask
        options = {
            "peephole": cell.peephole,
            "layer_norm": cell.layer_norm,
            "h_mask": None if h_mask is None else h_mask.contiguous(),
            "zoneout_c": cell.zoneout[0],
            "zoneout_h": cell.zoneout[1],
            "seed": cell.seed,
        }
    if call.members:
        options["members"] = call.members
    return options


def _rows(call: Call) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """What an operator has to know of them."""
    sizes = call.batch_sizes
    if sizes is not None and call.members:
        sizes = sizes.expand(call.members, -1)
    return sizes, call.lengths, call.reset


def _batch(call: Call, h0: Tensor | None) -> int:
    """B of packed rows."""
    assert call.batch_sizes is not None
    return int(call.batch_sizes[0]) if h0 is None else h0.shape[-2]


def _dense(t: Tensor | None) -> Tensor | None:
    """The tensor itself when its last dimension is dense, all that kernels need; else a copy."""
    if t is None or t.is_contiguous() or t.stride(-1) == 1 or t.shape[-1] <= 1:
        return t
    return t.contiguous()


def _contiguous(tensors: Sequence[Tensor], call: Call) -> Sequence[Tensor]:
    """Of a call with members it is enough that each one's share is."""
    if all(map(Tensor.is_contiguous, tensors)):
        return tensors
    if call.members:
        return [t if t[0].is_contiguous() else t.contiguous() for t in tensors]
    return [t.contiguous() for t in tensors]


def _as(t: Tensor, dtype: torch.dtype) -> Tensor:
    """t.to(dtype), which takes its time to find that there is nothing to do."""
    return t if t.dtype is dtype else t.to(dtype)


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def pack_buffer(
    cache: Cache | None, kind: str, weights: Sequence[Tensor], D: int, cell: Cell = PLAIN
) -> Tensor | None:
    """The buffer in which the kernels keep these weights in their own order.

    kind: "forward", "backward", or "both", for a backward pass that computes the gates again.
    """
    if cache is None or torch.compiler.is_compiling():
        return None
    key = (kind, weights[0].dtype)
    buffer = cache.get(key)
    if buffer is None:
        I, (units, P) = weights[0].shape[1], weights[1].shape
        H = units if units == P else units // 4  # an RNN has one gate, and room to spare
        projected = P if _plain_count(weights, D, cell) % 2 else 0
        size = ops.cpu_cache_bytes(I, H, projected, D, weights[0].dtype is torch.float64)
        buffer = torch.zeros((1 + (kind == "both")) * size, dtype=torch.uint8, device=_CPU)
        if type(buffer) is not Tensor:  # a fake tensor must not outlive the mode that made it
            return None
        cache[key] = buffer
    return buffer


def _plain_count(weights: Sequence[Tensor], D: int, cell: Cell) -> int:
    """How many weights each direction has that nn.LSTM has too."""
    return len(weights) // D - cell.peephole - 4 * cell.layer_norm


def _keep(ctx: Any, call: Call, inputs: Maybe, outputs: Tensors) -> None:
    own = call_tensors(call)
    # y, and of an LSTM c_all and gates: backward has no use for the final states
    ctx.save_for_backward(*own, *inputs, outputs[0], *outputs[3:])
    ctx.call, ctx.own, ctx.inputs = without_tensors(call), len(own), len(inputs)
    if not torch.compiler.is_compiling():  # Dynamo cannot pass a missing gradient
        ctx.set_materialize_grads(False)


def _backward(ctx: Any, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
    own, inputs, kept = _split((ctx.own, ctx.inputs), ctx.saved_tensors)
    call = with_tensors(ctx.call, own)
    needed = ctx.needs_input_grad[1:]
    incoming = incoming[: results(call)]
    arguments = (call, needed, inputs, kept, incoming)
    if any(map(_is_legacy_batch, incoming)):
        found = pull_back(*arguments)
    elif _is_transformed() or torch.is_grad_enabled():
        found = gradient(*arguments)
    else:
        found = _gradient(*arguments)
    rest = iter(found)
    return None, *(next(rest) if need else None for need in needed)


def _is_legacy_batch(grad: Tensor | None) -> bool:
    """Whether it stands for many gradients, of `is_grads_batched=True`; that is no torch.func."""
    if torch.compiler.is_compiling():  # Dynamo cannot ask, and does not trace those
        return False
    return grad is not None and torch._C._functorch.is_legacy_batchedtensor(grad)


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Call, *inputs: Tensor | None) -> Tensors:
        outputs = _forward(call, inputs, save=True)
        _keep(ctx, call, inputs, outputs)
        return outputs[: results(call)]

    backward = staticmethod(_backward)


class _TransformedLayer(torch.autograd.Function):
    """The same for torch.func, which needs another form that costs 20 µs more."""

    @staticmethod
    def forward(call: Call, *inputs: Tensor | None) -> Tensors:
        return _forward(call, inputs, save=call.save)

    @staticmethod
    def setup_context(ctx: Any, arguments: Any, outputs: Tensors) -> None:
        call, *inputs = arguments
        ctx.mark_non_differentiable(*outputs[results(call) :])
        _keep(ctx, call, inputs, outputs)

    backward = staticmethod(_backward)

    @staticmethod
    def vmap(info: Any, in_dims: Any, call: Call, *inputs: Tensor | None) -> Any:
        return batching.layer(info, in_dims, call, inputs)


def _gradient(
    call: Call,
    needed: Sequence[bool],
    inputs: Maybe,
    kept: Maybe,
    incoming: Maybe,
) -> Tensors:
    """The gradients of those inputs that need one, from those of the results."""
    x, h0, c0, *weights = inputs
    kernels, D, cell = _KERNELS[call.kernels], call.directions, call.cell
    dtype = _compute_dtype(x.dtype) if kernels.wide else x.dtype

    def arriving(grad: Tensor | None) -> Tensor | None:
        return None if grad is None else _dense(_as(grad, dtype))

    def empty(like: Tensor) -> Tensor:
        return torch.empty_like(like, dtype=dtype, memory_format=torch.contiguous_format)

    dx, dh0, dc0 = (
        empty(t) if wanted and t is not None else None
        for t, wanted in zip((x, h0, c0), needed[:3], strict=True)
    )
    each = len(weights) // D
    bias = _plain_count(weights, D, cell) > 3
    dweights: list[Tensor] = []
    if any(needed[3:]):
        for start in range(0, len(weights), each):
            group = weights[start : start + each]
            del group[2 : 3 if bias else 2]  # one gradient serves both biases
            dweights += map(empty, group)
    packed = None
    if kernels.packs:
        again = call.kind == "LSTM" and len(kept) < 3
        packed = pack_buffer(call.cache, "both" if again else "backward", weights, D, cell)
    rows = _rows(call)
    if call.kind == "LSTM":
        y, c_all, *gates = kept
        gates = list(_contiguous(gates, call))
        kernels.lstm_bwd(
            _dense(x), _contiguous(weights, call), D, _dense(h0), _dense(c0), *rows,
            y, c_all, gates[0] if gates else None,
            *map(arriving, incoming), *(() if call.cell_states else (None,)),
            dx, dh0, dc0, dweights, packed, **_options(call),
        )  # fmt: skip
    else:
        kernels.rnn_bwd(
            _dense(x), _contiguous(weights, call), D, _dense(h0), *rows,
            call.kind == "RNN_RELU", kept[0], *map(arriving, incoming), dx, dh0, dweights,
            packed, **_options(call),
        )  # fmt: skip

    grads: list[Any] = [dx, dh0, dc0]
    for start in range(0, len(dweights), each - bias):
        group = dweights[start : start + each - bias]
        if bias:
            group.insert(3, group[2].clone())
        grads += group
    return tuple(
        _as(grad, x.dtype)
        for grad, wanted in zip(grads, needed, strict=False)
        if wanted and grad is not None
    )


def gradient(
    call: Call,
    needed: Sequence[bool],
    inputs: Maybe,
    kept: Maybe,
    incoming: Maybe,
) -> Tensors:
    """As `_gradient`, with derivatives of its own and under transforms."""
    sizes = len(inputs), len(kept)
    return _Gradient.apply(call, tuple(needed), sizes, *inputs, *kept, *incoming)


class _Gradient(torch.autograd.Function):
    @staticmethod
    def forward(
        call: Call, needed: Sequence[bool], sizes: tuple[int, int], *tensors: Tensor | None
    ) -> Tensors:
        return _gradient(call, needed, *_split(sizes, tensors))

    @staticmethod
    def setup_context(ctx: Any, arguments: Any, found: Tensors) -> None:
        call, needed, sizes, *tensors = arguments
        inputs, _, incoming = _split(sizes, tensors)
        own = call_tensors(call)
        ctx.save_for_backward(*own, *inputs, *incoming)
        ctx.call, ctx.own = without_tensors(call), len(own)
        ctx.needed, ctx.sizes = needed, sizes

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Second derivatives: of inputs and of the incoming gradients."""
        create_graph = torch.is_grad_enabled()
        count, kept = ctx.sizes
        tensors, inputs, incoming = _split((ctx.own, count), ctx.saved_tensors)
        call = with_tensors(ctx.call, tensors)
        with torch.enable_grad():
            # Views cut the graph at this layer: x may itself depend on the weights.
            own: list[Any] = [None if t is None else t.view_as(t) for t in (*inputs, *incoming)]
            found = pull_back(call, ctx.needed, own[:count], (), own[count:])
            wanted = [
                *ctx.needs_input_grad[3 : 3 + count],
                *ctx.needs_input_grad[3 + count + kept :],
            ]
            # The gradient of a gain may be a constant: c_n of one step has nothing to do with it.
            varying = [(g, gg) for g, gg in zip(found, grads, strict=True) if g.requires_grad]
            second = iter(
                torch.autograd.grad(
                    [g for g, _ in varying],
                    [t for t, need in zip(own, wanted, strict=True) if need],
                    [gg for _, gg in varying],
                    create_graph=create_graph,
                    allow_unused=True,
                )
            )
        result = [next(second) if need else None for need in wanted]
        return None, None, None, *result[:count], *(None,) * kept, *result[count:]

    @staticmethod
    def vmap(info: Any, in_dims: Any, call: Call, needed: Any, sizes: Any, *tensors: Any) -> Any:
        return batching.gradient(
            info, (in_dims[0], *_split(sizes, in_dims[3:])), call, needed, *_split(sizes, tensors)
        )


def _split(sizes: tuple[int, int], tensors: Sequence[Any]) -> tuple[Any, Any, Any]:
    first, second = sizes[0], sum(sizes)
    return tensors[:first], tensors[first:second], tensors[second:]


def pull_back(
    call: Call,
    needed: Sequence[bool],
    inputs: Maybe,
    kept: Maybe,
    incoming: Maybe,
) -> Tensors:
    """As `_gradient`, through the reference."""

    def run(*wanted: Tensor) -> Tensors:
        rest = iter(wanted)
        own = [next(rest) if need else t for t, need in zip(inputs, needed, strict=True)]
        found = by_reference(call, own)
        return tuple(t for t, g in zip(found, incoming, strict=True) if g is not None)

    wanted = [t for t, need in zip(inputs, needed, strict=True) if need]
    pull = torch.func.vjp(run, *wanted)[1]
    return pull(tuple(g for g in incoming if g is not None))
