"""One layer on the operators of a backend, differentiable to any order.

First derivatives come from the backward operator. Derivatives of those go through the reference,
slower, and right to any order; of a plain LSTM the second ones have formulas of their own. What
``torch.func.vmap`` makes of a layer is in :mod:`fastlstm.layer.vmap`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack, unwrap_if_dead

from fastlstm.backends import higher_derivative
from fastlstm.layer import compute, vmap
from fastlstm.layer.by_reference import by_reference, pull_back, second, third
from fastlstm.layer.call import (
    Call,
    MaybeTensors,
    Tensors,
    call_tensors,
    count_results,
    with_tensors,
    without_tensors,
)
from fastlstm.layer.keeping import keep, recall, save, saved
from fastlstm.layer.recorded import derive, forward, gradients, is_observed, is_recorded
from fastlstm.layer.second import covers, second_derivatives

__all__ = ["is_legacy_batch", "part", "pull", "run"]

_is_batched = torch._C._functorch.is_legacy_batchedtensor
_is_transformed = torch._C._are_functorch_transforms_active


def run(call: Call, inputs: MaybeTensors) -> Tensors:
    """Return the outputs of a layer; those that follow its results have no meaning to the caller.

    Args:
        call: what to compute, and on which backend.
        inputs: ``(x, h0, c0, *weights)``; None for states of zeros.
    """
    if _is_transformed():
        kinds = [level.key() for level in get_interpreter_stack() or ()]
        save = torch.is_grad_enabled() or TransformType.Grad in kinds
        return _run_transformed(call if save else call._replace(save=False), inputs)
    if is_recorded():  # whether it needs a derivative shows when it is run
        return forward(call, inputs, save=False)
    if torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in inputs]):
        if torch.compiler.is_compiling():
            return _Layer.apply(call, *inputs)
        return _apply(call, *[None if t is None else unwrap_if_dead(t) for t in inputs])
    return compute.forward(call, inputs, save=False)


def _run_transformed(call: Call, inputs: MaybeTensors) -> Tensors:
    """All outputs, under whatever transform of torch.func is left."""
    return _TransformedLayer.apply(call, *inputs)


def _differentiate(
    call: Call,
    needed: Sequence[bool],
    inputs: MaybeTensors,
    kept: MaybeTensors,
    incoming: MaybeTensors,
) -> Tensors:
    """As `gradients`, with derivatives of its own and under transforms."""
    sizes = len(inputs), len(kept)
    return _Gradient.apply(call, tuple(needed), sizes, *inputs, *kept, *incoming)


def pull(
    call: Call,
    needed: Sequence[bool],
    inputs: MaybeTensors,
    kept: MaybeTensors,
    incoming: MaybeTensors,
    then: Tensor | None = None,
) -> Tensors:
    """Return the gradients of a layer's inputs in a backward pass, whatever the pass asks for.

    The arguments are those of :func:`fastlstm.layer.compute.gradients`.
    """
    arguments = call, needed, inputs, kept, incoming
    compiled = torch.compiler.is_compiling()
    if not compiled and any([grad is not None and _is_batched(grad) for grad in incoming]):
        return pull_back(*arguments)
    if _is_transformed() or torch.is_grad_enabled():
        return _differentiate(*arguments)
    return (gradients if compiled or is_observed() else compute.gradients)(*arguments, then)


def _backward(ctx: Any, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[1:]
    # A derivative of the gradients leads here too, by the outputs that they were computed from.
    if not torch.compiler.is_compiling() and all([grad is None for grad in incoming]):
        return None, *[None for _ in needed]
    call, inputs, kept, weights = recall(ctx)
    incoming = incoming[: count_results(call)]
    rest = iter(pull(call, needed, inputs, kept, incoming, weights))
    found = [next(rest) if need else None for need in needed]
    if call.spec.proj_size and incoming[0] is None and incoming[1] is None:
        _leave_out_projection(call, inputs[0], found)
    return None, *found


def _leave_out_projection(call: Call, x: Tensor, found: list[Tensor | None]) -> None:
    """Take the gradient of w_hr back, of a loss on c alone, where no step follows that reads h.

    As with ``nn.LSTM``, an optimizer leaves a weight alone that the loss does not depend on.
    """
    sizes = call.sequences.batch_sizes
    if (x if sizes is None else sizes).shape[0] == 1 and not torch.compiler.is_compiling():
        each = call.spec.weights_per_direction
        for k in range(call.spec.directions):
            found[3 + k * each + 2 + 2 * call.spec.bias] = None


def is_legacy_batch(grad: Tensor | None) -> bool:
    """Whether it stands for many gradients, of `is_grads_batched=True`; that is no torch.func."""
    # Dynamo cannot ask, and does not trace those.
    return not torch.compiler.is_compiling() and grad is not None and _is_batched(grad)


def _split(sizes: tuple[int, int], tensors: Sequence[Any]) -> tuple[Any, Any, Any]:
    first, second = sizes[0], sum(sizes)
    return tensors[:first], tensors[first:second], tensors[second:]


class _Layer(torch.autograd.Function):
    """A layer outside torch.func, which nobody records."""

    @staticmethod
    def forward(ctx: Any, call: Call, *inputs: Tensor | None) -> Tensors:
        outputs = compute.forward(call, inputs, save=True)
        keep(ctx, call, inputs, outputs)
        return outputs[: count_results(call)]

    backward = staticmethod(_backward)


# What is left of Function.apply without what it does for torch.func, which takes 2 µs.
_apply: Any = super(torch.autograd.Function, _Layer).apply


_OF_LAYER: Any = _Layer._backward_cls


def part(y: Tensor, states: Tensors) -> None:
    """Give final states nodes of their own in the graph, where they share that of a layer with y.

    autograd calls a hook of a tensor whenever the node that made the tensor has its turn, and with
    None if the loss does not depend on the tensor. The states of ``nn.LSTM`` have nodes of their
    own: their hooks are not called then. (A view would have one too, but cannot be detached in
    place.)
    """
    if not torch.compiler.is_compiling() and type(y.grad_fn) is _OF_LAYER:
        for state in states:
            state.transpose_(0, 0)


class _RecordedLayer(_Layer):
    """The same within an operator that is recorded."""

    @staticmethod
    def forward(ctx: Any, call: Call, *inputs: Tensor | None) -> Tensors:
        outputs = forward(call, inputs, save=True)
        keep(ctx, call, inputs, outputs)
        return outputs[: count_results(call)]


class _TransformedLayer(torch.autograd.Function):
    """A layer under torch.func, which needs another form that costs 20 µs more."""

    @staticmethod
    def forward(call: Call, *inputs: Tensor | None) -> Tensors:
        return forward(call, inputs, save=call.save)

    @staticmethod
    def setup_context(ctx: Any, arguments: Any, outputs: Tensors) -> None:
        call, *inputs = arguments
        ctx.mark_non_differentiable(*outputs[count_results(call) :])
        keep(ctx, call, inputs, outputs)

    backward = staticmethod(_backward)

    @staticmethod
    def vmap(info: Any, in_dims: Any, call: Call, *inputs: Tensor | None) -> Any:
        return vmap.layer_rule(_run_transformed, info, in_dims, call, inputs)


class _Gradient(torch.autograd.Function):
    """The gradients of a layer; their own derivatives have formulas, or are the reference's."""

    @staticmethod
    def forward(
        call: Call, needed: Sequence[bool], sizes: tuple[int, int], *tensors: Tensor | None
    ) -> Tensors:
        return gradients(call, needed, *_split(sizes, tensors))

    @staticmethod
    def setup_context(ctx: Any, arguments: Any, found: Tensors) -> None:
        call, needed, sizes, *tensors = arguments
        inputs, _, incoming = _split(sizes, tensors)
        own = call_tensors(call)
        save(ctx, *own, *inputs, *incoming)
        ctx.call, ctx.own = without_tensors(call), len(own)
        ctx.needed, ctx.sizes = needed, sizes

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Second derivatives: of inputs and of the incoming gradients."""
        count, kept = ctx.sizes
        tensors, inputs, incoming = _split((ctx.own, count), saved(ctx))
        call = with_tensors(ctx.call, tensors)
        given = iter(grads)
        along = [next(given) if need else None for need in ctx.needed]
        again = torch.is_grad_enabled()
        wanted = [*ctx.needs_input_grad[3:][:count], *ctx.needs_input_grad[3 + count + kept :]]
        found: Any
        batched = _is_transformed() or any(map(is_legacy_batch, grads))
        if batched or not covers(call, (*inputs, *incoming, *grads)):
            found = second(call, ctx.needed, inputs, incoming, along, wanted, again)
        elif not again:
            found = second_derivatives(call, inputs, incoming, along)
        else:
            sizes = count, len(incoming)
            found = _Second.apply(call, ctx.needed, sizes, *inputs, *incoming, *along)
        result = [g if need else None for g, need in zip(found, wanted, strict=True)]
        return None, None, None, *result[:count], *(None,) * kept, *result[count:]

    @staticmethod
    def vmap(info: Any, in_dims: Any, call: Call, needed: Any, sizes: Any, *tensors: Any) -> Any:
        dims = (in_dims[0], *_split(sizes, in_dims[3:]))
        groups = _split(sizes, tensors)
        return vmap.gradient_rule(_differentiate, info, dims, call, needed, groups)


class _Second(torch.autograd.Function):
    """What goes back through the gradients of a layer, which is linear in what has come there.

    Whoever asks only for the derivative by that (``torch.autograd.functional.hvp``) gets the
    transposed map, which has the same formulas. All others go through the reference.
    """

    @staticmethod
    def forward(
        call: Call, needed: Sequence[bool], sizes: tuple[int, int], *tensors: Tensor | None
    ) -> Tensors:
        return tuple(second_derivatives(call, *_split(sizes, tensors)))

    @staticmethod
    def setup_context(ctx: Any, arguments: Any, found: Tensors) -> None:
        ctx.call, ctx.needed, ctx.sizes, *tensors = arguments
        ctx.set_materialize_grads(False)
        save(ctx, *tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        call, needed, count = ctx.call, ctx.needed, ctx.sizes[0]
        inputs, incoming, along = _split(ctx.sizes, saved(ctx))
        there = [t for t in (*inputs, *incoming) if t is not None]  # only tensors have an edge
        batched = any(map(is_legacy_batch, grads))
        edges = ctx.next_functions[: len(there)]
        if torch.is_grad_enabled() or batched or any(map(_may_run, edges)):
            wanted = ctx.needs_input_grad[3:]
            return None, None, None, *third(call, needed, (inputs, incoming, along), wanted, grads)
        found: list[Any] = [None] * count
        if any(g is not None for g in grads[:count]):
            found = second_derivatives(call, inputs, incoming, grads[:count])[:count]
        if any(g is not None for g in grads[count:]):
            outputs = forward(call, inputs, save=True)
            kept = outputs[0], *outputs[3:]
            more = iter(gradients(call, needed, inputs, kept, grads[count:]))
            pairs = zip(found, needed, strict=True)
            found = [_sum(g, next(more)) if need else g for g, need in pairs]
        result = [None if v is None else g for g, v in zip(found, along, strict=True)]
        return None, None, None, *(None,) * sum(ctx.sizes), *result


def _sum(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else a + b


def _may_run(edge: tuple[Any, int]) -> bool:
    """Whether the pass of the engine that is under way wants a gradient there."""
    try:
        return edge[0] is not None and bool(torch._C._will_engine_execute_node(edge[0]))
    except RuntimeError:  # it is a leaf whose gradient was asked for, or no engine runs
        return True


def _run_operator(call: Call, inputs: MaybeTensors) -> Tensors:
    """What the operator of a recorded layer returns, with its derivative."""
    if higher_derivative() is not None and not call.save:
        return by_reference(call, inputs)
    if call.save or _is_transformed():
        outputs = _run_transformed(call._replace(save=True), inputs)
        return outputs if call.save else outputs[: count_results(call)]
    return _RecordedLayer.apply(call, *inputs)


derive(_run_operator, _differentiate)
