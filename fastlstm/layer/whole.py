"""A stack of layers on a backend that computes it in one call, with a derivative of its own.

Kernels whose derivative is PyTorch's may have the first one only: cuDNN refuses a second.
Where ``auto`` has chosen such a backend, the results pass through a node of the autograd graph
that costs nothing until somebody asks for a derivative that can be derived again
(``create_graph=True``). Then the gradients go to the inputs through the reference instead. Who has
named the backend gets what it has, as from ``nn.LSTM``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import has_torch_function
from torch.utils.checkpoint import checkpoint

from fastlstm import automatic
from fastlstm.automatic import TUNED, candidates, is_contested
from fastlstm.backends import choice, is_automatic
from fastlstm.kernels.base import Backend
from fastlstm.layer.options import Options
from fastlstm.layer.recorded import is_observed
from fastlstm.layer.taken import Taken
from fastlstm.record import Record, known
from fastlstm.spec import LayerSpec

__all__ = ["compute_whole", "is_whole", "plain_backend", "plain_cell"]

_is_autocast = torch._C._is_any_autocast_enabled
_is_transformed = torch._C._are_functorch_transforms_active
Results = tuple[Tensor, ...]
Again = Callable[[Tensor, Any, Sequence[Tensor]], tuple[Tensor, Results, Any]]


def is_whole(backend: Backend) -> bool:
    """Whether a backend takes this call as a whole: nobody compiles, records or transforms it."""
    compiled = torch.compiler.is_compiling()
    return not (backend.stack is None or compiled or is_observed() or _is_transformed())


def plain_backend(x: Tensor, weights: Sequence[Tensor], taken: Taken) -> Backend | None:
    """Return the backend that takes plain layers of x as they are; None for the long way.

    Nothing casts, records or transforms the call then. Not for code that is compiled.

    Args:
        x: the input of a module.
        weights: those of all layers.
        taken: what auto takes for the module.
    """
    if (
        automatic.CHECKED
        or is_observed()
        or _is_transformed()
        or _is_autocast()
        or forward_ad._current_level >= 0
    ):
        return None
    first = candidates(choice.name, x)[0]
    record, contested = choice.asks, False
    if not x.is_cpu:
        record, contested = _record(x), is_automatic() and is_contested(x)
    if record is None and not contested:
        return first
    return taken.backend(record, first, x, weights, torch.is_grad_enabled(), contested)


def _record(x: Tensor) -> Record | None:
    """What has a say in what auto takes on the device of x."""
    if not is_automatic():
        return None
    return known(x) or (Record({}) if choice.name == TUNED else None)


def compute_whole(
    backend: Backend,
    spec: LayerSpec,
    x: Tensor,
    hx: Results | None,
    weights: Sequence[Tensor],
    options: Options,
    again: Again,
) -> tuple[Tensor, Results]:
    """Compute a stack; return y and the final states.

    Args:
        backend: one with a ``stack``.
        spec: the first layer.
        x: ``[T, B, I]``, or packed ``[N, I]``.
        hx: the initial states, or None.
        weights: those of all layers.
        options: everything else; its lengths are those of the caller.
        again: computes the same of x, hx and weights, with every derivative.
    """
    sequences = options.sequences
    if options.weight_dropout:
        each = spec.weights_per_direction
        weights = list(weights)
        weights[1::each] = [
            torch.dropout(w, options.weight_dropout, True) for w in weights[1::each]
        ]
    rest = sequences, options.dropout, options.training, options.caches and options.caches[0]
    arguments = spec, options.num_layers, x, hx, weights, *rest
    if not torch.is_grad_enabled():
        y, final = backend.stack(*arguments)
        return y, final
    if options.recompute:
        y, final = checkpoint(backend.stack, *arguments, use_reentrant=False)
    else:
        y, final = backend.stack(*arguments)
    if not y.requires_grad or not is_automatic() or backend.has_second(x):
        return y, final
    if options.dropout and options.num_layers > 1:  # which elements it zeroed, nobody knows
        return y, final
    inputs = x, *(hx or ()), *weights
    y, *final = _Derivable.apply(again, len(final), len(hx or ()), y, *final, *inputs)
    return y, tuple(final)


def plain_cell(
    backend: Backend, x: Tensor, hx: Any, weights: Sequence[Tensor]
) -> tuple[Tensor, Tensor] | None:
    """Take a step of a plain cell on what :func:`plain_backend` returned, for latency.

    Returns:
        The next ``(h, c)``; None for a call that the backend refused, which then takes the long
        way, to an answer or a better message.
    """
    states = hx if type(hx) is tuple and len(hx) == 2 else ()
    if (hx is not None and not states) or has_torch_function((x, *states, *weights)):
        return None
    try:
        found: tuple[Tensor, Tensor] = backend.cell(x, hx, weights)
    except (RuntimeError, ValueError, TypeError):
        return None
    return found


class _Derivable(torch.autograd.Function):
    """Hands results on, and their gradients back: to who has computed them, or to the inputs."""

    @staticmethod
    def forward(ctx: Any, again: Again, final: int, states: int, *tensors: Tensor) -> Results:
        ctx.again, ctx.final, ctx.states, ctx.count = again, final, states, len(tensors)
        ctx.save_for_backward(*tensors[1 + final :])
        ctx.set_materialize_grads(False)
        return tuple([t.detach() for t in tensors[: 1 + final]])

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
        rest = ctx.count - len(incoming)
        if not torch.is_grad_enabled():
            return None, None, None, *incoming, *(None,) * rest
        # Views cut the graph here: x may itself depend on the weights.
        inputs = [t.view_as(t) for t in ctx.saved_tensors]
        x, states, weights = inputs[0], inputs[1 : 1 + ctx.states], inputs[1 + ctx.states :]
        y, final, _ = ctx.again(x, tuple(states) or None, weights)
        pairs = zip((y, *final), incoming, strict=True)
        results, arriving = zip(*[(t, g) for t, g in pairs if g is not None], strict=True)
        needed = ctx.needs_input_grad[4 + ctx.final :]
        wanted = [t for t, need in zip(inputs, needed, strict=True) if need]
        found = iter(
            torch.autograd.grad(results, wanted, arriving, create_graph=True, allow_unused=True)
        )
        nothing = (None,) * (4 + ctx.final)
        return *nothing, *(next(found) if need else None for need in needed)
