"""One layer on the kernels of a backend, differentiable to any order.

First derivatives come from the backward kernel. When a graph of the gradients is asked for
(``create_graph=True``), or a batch of them (``is_grads_batched=True``), backward goes through the
reference: slower, and right to any order.
"""

from collections.abc import Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ops, reference

LayerOutput = tuple[Tensor, Tensor, Tensor, Tensor | None]
Rows = tuple[Tensor | None, Tensor | None, Tensor | None]  # batch_sizes, lengths, reset
Cache = dict[Any, Tensor]

_CPU = torch.device("cpu")  # named at every allocation: a default device may be another one
_is_cpu = attrgetter("is_cpu")


class _Kernels(NamedTuple):
    """What autograd has to know of a backend; the contract of the operators is in ops.py."""

    forward: Any
    backward: Any
    packs: bool  # whether it keeps weights in an order of its own
    wide: bool  # whether gates and gradients of 16-bit layers are float32


_KERNELS = {
    "cpu": _Kernels(ops.lstm_fwd_cpu, ops.lstm_bwd_cpu, packs=True, wide=True),
    "triton": _Kernels(ops.lstm_fwd_triton, ops.lstm_bwd_triton, packs=False, wide=False),
}


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
    cache: Cache | None = None,
    kernels: str = "cpu",
) -> LayerOutput:
    """Same contract as :func:`fastlstm.reference.lstm_layer`, on the kernels of that name.

    ``cache`` keeps the weights in kernel order between calls. It is checked against the weights'
    bytes at every call, so any edit of a weight is seen.
    """
    rows = (batch_sizes, lengths, reset)
    if torch.is_grad_enabled() and (
        x.requires_grad
        or any(w.requires_grad for w in weights)
        or (h0 is not None and h0.requires_grad)
        or (c0 is not None and c0.requires_grad)
    ):
        outputs = _Layer.apply(kernels, directions, rows, cell_states, cache, x, h0, c0, *weights)
        return outputs if cell_states else (*outputs, None)
    y, h_n, c_n, c_all, _ = _forward(
        kernels, directions, rows, x, weights, h0, c0, cell_states, False, cache
    )
    if c_all is not None and c_all.dtype is not x.dtype:
        c_all = c_all.to(x.dtype)
    return y, h_n, c_n, c_all


def triton_layer(*args: Any, **options: Any) -> LayerOutput:
    """Same contract as :func:`fastlstm.reference.lstm_layer`, on the Triton kernels."""
    return lstm_layer(*args, **options, kernels="triton")


def infer(
    x: Tensor,
    weights: Sequence[Tensor],
    h0: Tensor | None,
    c0: Tensor | None,
    sizes: tuple[int, int, int],
    cache: Cache,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """The shortest way to the kernel, for streaming without gradients.

    x is ``[T, B, I]``, or ``[B, I]`` for one step of one direction with states ``[B, n]``.

    What the operator checks itself is not checked before; None stands for a call that it refused,
    which the caller then takes the long way, to an answer or a better message.
    """
    D, H, P = sizes
    if not all(map(_is_cpu, weights)):  # a meta tensor would bypass the kernel
        return None
    if h0 is not None and c0 is not None and not (h0.is_cpu and c0.is_cpu):
        return None
    try:
        if x.dim() == 3:
            T, B, _ = x.shape
            if T == 0:
                return None
            y = torch.empty(T, B, D * P, dtype=x.dtype, device=_CPU)
            h_n = torch.empty(D, B, P, dtype=x.dtype, device=_CPU)
            c_n = torch.empty(D, B, H, dtype=x.dtype, device=_CPU)
        else:
            B, _ = x.shape
            y = torch.empty(B, P, dtype=x.dtype, device=_CPU)
            h_n = torch.empty(B, P, dtype=x.dtype, device=_CPU)
            c_n = torch.empty(B, H, dtype=x.dtype, device=_CPU)
        buffer = _packed(cache, "forward", weights, D)
        ops.lstm_fwd_cpu(
            x, weights, D, h0, c0, None, None, None, y, h_n, c_n, None, None, buffer
        )  # fmt: skip
    except (RuntimeError, ValueError):
        return None
    return y, h_n, c_n


def _is_batched(grad: Tensor | None) -> bool:
    """Whether a vmap stands for many gradients; `is_grads_batched=True` uses the legacy one."""
    if torch.compiler.is_compiling():  # Dynamo cannot ask, and does not trace those
        return False
    functorch = torch._C._functorch
    return grad is not None and (
        functorch.is_legacy_batchedtensor(grad) or functorch.is_batchedtensor(grad)
    )


def _dense(t: Tensor | None) -> Tensor | None:
    """The tensor itself when its last dimension is dense, all that kernels need; else a copy."""
    if t is None or t.is_contiguous() or t.stride(-1) == 1 or t.shape[-1] <= 1:
        return t
    return t.contiguous()


def _contiguous(weights: Sequence[Tensor]) -> Sequence[Tensor]:
    if all(map(Tensor.is_contiguous, weights)):
        return weights
    return [w.contiguous() for w in weights]


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def _packed(cache: Cache | None, kind: str, weights: Sequence[Tensor], D: int) -> Tensor | None:
    """The buffer in which the kernels keep these weights in their own order."""
    if cache is None or torch.compiler.is_compiling():
        return None
    key = (kind, weights[0].dtype)
    buffer = cache.get(key)
    if buffer is None:
        w_ih, w_hh = weights[:2]
        projected = w_hh.shape[1] if len(weights) // D % 2 else 0
        double = w_ih.dtype is torch.float64
        size = ops.cpu_cache_bytes(w_ih.shape[1], w_ih.shape[0] // 4, projected, D, double)
        buffer = torch.zeros(size, dtype=torch.uint8, device=_CPU)
        if type(buffer) is not Tensor:  # a fake tensor must not outlive the mode that made it
            return None
        cache[key] = buffer
    return buffer


def _forward(
    name: str,
    D: int,
    rows: Rows,
    x: Tensor,
    weights: Sequence[Tensor],
    h0: Tensor | None,
    c0: Tensor | None,
    cell_states: bool,
    save: bool,
    cache: Cache | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    kernels = _KERNELS[name]
    batch_sizes, lengths, reset = rows
    gate_units, P = weights[1].shape
    H = gate_units // 4
    dtype, device = x.dtype, x.device
    shape = x.shape[:-1]
    B = shape[1] if batch_sizes is None else int(batch_sizes[0])
    # Sizes as plain arguments: the parser takes a tuple half a microsecond longer.
    y = torch.empty(*shape, D * P, dtype=dtype, device=device)
    h_n = torch.empty(D, B, P, dtype=dtype, device=device)
    c_n = torch.empty(D, B, H, dtype=dtype, device=device)
    c_all = gates = None
    if save or cell_states:
        c_all = torch.empty(*shape, D * H, dtype=_compute_dtype(dtype), device=device)
    if save and (name == "cpu" or ops.triton_keeps_gates(H)):
        kept = _compute_dtype(dtype) if kernels.wide else dtype
        gates = torch.empty(D, *shape, gate_units, dtype=kept, device=device)
    packed = _packed(cache, "forward", weights, D) if kernels.packs else None
    kernels.forward(
        _dense(x), _contiguous(weights), D, _dense(h0), _dense(c0), batch_sizes, lengths, reset,
        y, h_n, c_n, c_all, gates, packed,
    )  # fmt: skip
    return y, h_n, c_n, c_all, gates


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        kernels: str,
        D: int,
        rows: Rows,
        cell_states: bool,
        cache: Cache | None,
        x: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        y, h_n, c_n, c_all, gates = _forward(
            kernels, D, rows, x, weights, h0, c0, cell_states, True, cache
        )
        ctx.save_for_backward(*rows, y, c_all, gates, x, h0, c0, *weights)
        if not torch.compiler.is_compiling():  # Dynamo cannot pass a missing gradient
            ctx.set_materialize_grads(False)
        ctx.kernels, ctx.directions, ctx.cell_states, ctx.cache = kernels, D, cell_states, cache
        if not cell_states or c_all is None:
            return y, h_n, c_n  # no None among the outputs: Dynamo would ask for its gradient
        return y, h_n, c_n, c_all.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *outgoing: Tensor | None) -> tuple[Tensor | None, ...]:
        batch_sizes, lengths, reset, y, c_all, gates, x, h0, c0, *weights = ctx.saved_tensors
        rows, D = (batch_sizes, lengths, reset), ctx.directions
        needed = ctx.needs_input_grad[5:]
        create_graph = torch.is_grad_enabled()
        if create_graph or any(map(_is_batched, outgoing)):
            inputs = (x, h0, c0, *weights)
            return (None,) * 5 + _reference_grads(
                ctx, rows, inputs, needed, outgoing, create_graph
            )

        kernels = _KERNELS[ctx.kernels]
        dtype = _compute_dtype(x.dtype) if kernels.wide else x.dtype

        def incoming(grad: Tensor | None) -> Tensor | None:
            return None if grad is None else _dense(grad.to(dtype))

        def empty(like: Tensor | None, wanted: bool) -> Tensor | None:
            return (
                torch.empty_like(like, dtype=dtype, memory_format=torch.contiguous_format)
                if wanted and like is not None
                else None
            )

        dx, dh0, dc0 = empty(x, needed[0]), empty(h0, needed[1]), empty(c0, needed[2])
        each = len(weights) // D
        bias = each >= 4
        dweights = []
        if any(needed[3:]):
            for d in range(0, len(weights), each):
                group = weights[d : d + each]
                del group[2 : 3 if bias else 2]  # one gradient serves both biases
                dweights += [
                    torch.empty_like(w, dtype=dtype, memory_format=torch.contiguous_format)
                    for w in group
                ]
        packed = _packed(ctx.cache, "backward", weights, D) if kernels.packs else None
        kernels.backward(
            _dense(x), _contiguous(weights), D, _dense(h0), _dense(c0), *rows, y, c_all, gates,
            *map(incoming, outgoing), *(() if ctx.cell_states else (None,)),
            dx, dh0, dc0, dweights, packed,
        )  # fmt: skip

        grads: list[Tensor | None] = [dx, dh0, dc0]
        for d in range(0, len(dweights), each - bias):
            group = dweights[d : d + each - bias]
            if bias:
                group.insert(3, group[2].clone())
            grads += group
        grads += [None] * (len(needed) - len(grads))
        return (None,) * 5 + tuple(
            grad.to(x.dtype) if grad is not None and wanted else None
            for grad, wanted in zip(grads, needed, strict=True)
        )


@torch.enable_grad()
def _reference_grads(
    ctx: Any,
    rows: Rows,
    inputs: Sequence[Tensor | None],
    needed: Sequence[bool],
    grads: Sequence[Tensor | None],
    create_graph: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients as a function of the inputs and the incoming gradients, through the reference."""
    # Views cut the graph at this layer: x may itself depend on the weights.
    own: list[Any] = [None if t is None else t.view_as(t) for t in inputs]
    x, h0, c0, *weights = own
    batch_sizes, lengths, reset = rows
    outputs = reference.lstm_layer(
        x, weights, h0, c0, directions=ctx.directions,
        batch_sizes=batch_sizes, lengths=lengths, reset=reset, cell_states=ctx.cell_states,
    )  # fmt: skip
    used = [
        (out, grad)
        for out, grad in zip(outputs, grads, strict=False)  # no gradient of c_all without one
        if out is not None and grad is not None
    ]
    found = iter(
        torch.autograd.grad(
            [out for out, _ in used],
            [t for t, need in zip(own, needed, strict=True) if need],
            [grad for _, grad in used],
            create_graph=create_graph,
            allow_unused=True,
        )
    )
    return tuple(next(found) if need else None for need in needed)
