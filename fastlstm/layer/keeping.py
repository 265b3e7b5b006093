"""What a layer keeps for its backward pass, whatever becomes of it in between.

autograd watches the tensors that it keeps, and refuses those that were edited in place. That is
right for what a layer reads. What it returns is the caller's, who may well edit it (a dropout in
place), and ``nn.LSTM`` mostly allows that: then the forward pass is computed again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlstm.kernels.base import get
from fastlstm.kernels.measured import precision
from fastlstm.layer.call import (
    Call,
    MaybeTensors,
    Tensors,
    call_tensors,
    with_tensors,
    without_tensors,
)
from fastlstm.layer.compute import apart, flat, forward

__all__ = ["keep", "recall", "save", "saved"]

_NOTHING = torch.empty(0, device="cpu")
_hooks = torch._C._autograd._top_saved_tensors_default_hooks
_is_transformed = torch._C._are_functorch_transforms_active


def save(ctx: Any, *tensors: Tensor | None) -> None:
    """Save tensors for backward. Tools that draw graphs expect no None among the saved ones."""
    ctx.present = [t is not None for t in tensors]
    ctx.save_for_backward(*[t for t in tensors if t is not None])


def saved(ctx: Any) -> MaybeTensors:
    """Return what :func:`save` was given."""
    rest = iter(ctx.saved_tensors)
    return tuple([next(rest) if present else None for present in ctx.present])


def keep(ctx: Any, call: Call, inputs: MaybeTensors, outputs: Tensors) -> None:
    """Keep in the ctx of an autograd.Function what backward needs of a call.

    Args:
        ctx: where :func:`recall` will find it.
        call: what was computed.
        inputs: ``(x, h0, c0, *weights)``.
        outputs: those of :func:`fastlstm.layer.compute.forward`, with ``save``.
    """
    own = call_tensors(call)
    y, *kept = outputs[0], *outputs[3:]  # c_all and gates; backward needs no final states
    ctx.witnesses, ctx.copied, ctx.precision = (), False, None
    if not torch.compiler.is_compiling():  # compiled code knows of all edits
        if get(call.backend).keeps_by_precision:
            ctx.precision = precision(y.dtype)
        ctx.set_materialize_grads(False)  # Dynamo cannot pass a missing gradient
        if type(y) is Tensor and not _is_transformed():
            if _hooks(False) is not None:  # then autograd does not watch
                seen = (y, kept[0]) if call.cell_states else (y,)
                ctx.witnesses = tuple(map(_witness, seen))
            if len(kept) == 1:  # c_all alone: an LSTM that computes its gates again
                kept.append(flat(inputs[3:]))
                ctx.copied = True
    save(ctx, *own, *inputs, y, *kept)
    ctx.call, ctx.own, ctx.inputs = without_tensors(call) if own else call, len(own), len(inputs)


def recall(ctx: Any) -> tuple[Call, MaybeTensors, MaybeTensors, Tensor | None]:
    """Return what :func:`keep` kept.

    Returns:
        The call, its inputs, ``(y, c_all, gates)`` as far as they are kept, and the weights of the
        forward pass, all in one tensor, or None where those of the inputs are good.
    """
    try:
        tensors = saved(ctx)
    except RuntimeError:
        tensors, edited = _without_outputs(ctx), True
    else:
        edited = any([t._version != version for t, version in ctx.witnesses])
    if ctx.precision is not None and ctx.precision != precision(tensors[ctx.own].dtype):
        edited = True
    call = with_tensors(ctx.call, tensors[: ctx.own]) if ctx.own else ctx.call
    end = ctx.own + ctx.inputs
    inputs, kept = tensors[ctx.own : end], tensors[end:]
    then = None
    if ctx.copied:
        kept, then = kept[:-1], kept[-1]
        if not get(call.backend).takes_weights_of_forward:
            # Edits of `.data` leave no trace.
            then = None if torch.equal(then, flat(inputs[3:])) else then
            edited = edited or then is not None
    return call, inputs, _again(call, inputs, then) if edited else kept, then


def _without_outputs(ctx: Any) -> MaybeTensors:
    """The saved tensors after an edit: None for y and c_all, which are computed again.

    Raises:
        RuntimeError: it is something else that was edited, or it is gone.
    """
    end = ctx.own + ctx.inputs
    raw = iter(ctx._raw_saved_tensors)
    tensors = []
    for k, present in enumerate(ctx.present):
        kept = next(raw) if present else None
        tensors.append(None if kept is None or k in (end, end + 1) else kept.unpack())
    return tuple(tensors)


def _again(call: Call, inputs: MaybeTensors, then: Tensor | None) -> Tensors:
    """Compute what is kept once more, and the gates with it if the layer can keep them."""
    weights = inputs[3:] if then is None else apart(then, inputs[3:])
    with torch.no_grad():
        again = call._replace(recompute=False)
        outputs = forward(again, (*inputs[:3], *weights), save=True)
    return outputs[0], *outputs[3:]


def _witness(t: Tensor) -> tuple[Tensor, int]:
    """A tensor that shares t's counter of versions, and none of its memory; the version now."""
    witness = t.detach()
    witness.data = _NOTHING
    return witness, witness._version
