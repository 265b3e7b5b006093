"""A layer as one operator, for whatever records calls: exports, traces, dispatch modes.

A graph that somebody records must be right when it is run later: with other weights, with
gradients, in another process. So it does not hold what a backend does for one layer in one call
(outputs that are allocated and then written, copies of weights), but ``fastlstm::layer``, which
has a derivative, a fake kernel and a count of operations of its own, whichever backend computes.

``layer`` returns the results of a :class:`Call`, then, with ``save``, what its derivative needs.
``layer_gradients`` returns the gradients of its inputs. Calls that nobody records go straight to
:mod:`fastlstm.layer.compute`; so does code under ``torch.compile``, which sees the operators of
the backend itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastlstm.kernels import flops, operators
from fastlstm.layer import compute
from fastlstm.layer.call import Call, MaybeTensors, Tensors, count_results
from fastlstm.spec import LayerSpec, Noise, Sequences

__all__ = [
    "PRE_DISPATCH",
    "derive",
    "dispatch_modes",
    "forward",
    "gradients",
    "has_key",
    "is_observed",
    "is_recorded",
    "tracing",
]

_INPUTS = (
    "Tensor x, Tensor? h0, Tensor? c0, Tensor[] weights, "
    "Tensor? batch_sizes, Tensor? lengths, Tensor? reset, Tensor? h_mask, Tensor? seed"
)
_CALL = (
    "*, str backend, str mode, int directions, bool peephole, bool layer_norm, "
    "float zoneout_c, float zoneout_h, bool cell_states, bool recompute, bool save, int members"
)
_LAYER = operators.define_operator("layer", f"({_INPUTS}, {_CALL}) -> Tensor[]")
_LAYER_GRADIENTS = operators.define_operator(
    "layer_gradients",
    f"({_INPUTS}, Tensor[] kept, Tensor?[] incoming, bool[] needed, {_CALL}) -> Tensor[]",
)
# What looks at every operator: dispatch modes, make_fx(pre_dispatch=True), torch.jit.trace
dispatch_modes = torch._C._len_torch_dispatch_stack
has_key = torch._C._dispatch_tls_is_dispatch_key_included
PRE_DISPATCH = torch._C.DispatchKey.PreDispatch
tracing = torch._C._get_tracing_state


def is_recorded() -> bool:
    """Whether somebody records this call, or looks at every operator in it."""
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting() or not torch.compiler.is_dynamo_compiling()
    return is_observed()


def is_observed() -> bool:
    """The same where no compiler is at work."""
    return dispatch_modes() > 0 or has_key(PRE_DISPATCH) or tracing() is not None


def forward(call: Call, inputs: MaybeTensors, save: bool) -> Tensors:
    """Compute a layer, as :func:`fastlstm.layer.compute.forward`; by its operator if recorded."""
    if not is_recorded():
        return compute.forward(call, inputs, save)
    flops.tell_counters()
    return tuple(_LAYER(*_tensors(call, inputs), **_options(call, save)))


def gradients(
    call: Call,
    needed: Sequence[bool],
    inputs: MaybeTensors,
    kept: MaybeTensors,
    incoming: MaybeTensors,
    then: Tensor | None = None,
) -> Tensors:
    """Compute gradients, as :func:`fastlstm.layer.compute.gradients`; likewise."""
    if not is_recorded():
        return compute.gradients(call, needed, inputs, kept, incoming, then)
    if then is not None:
        inputs = *inputs[:3], *compute.apart(then, inputs[3:])
    flops.tell_counters()
    rest = list(kept), list(incoming), list(needed)
    return tuple(_LAYER_GRADIENTS(*_tensors(call, inputs), *rest, **_options(call, True)))


def derive(
    run: Callable[[Call, MaybeTensors], Tensors],
    differentiate: Callable[..., Tensors],
) -> None:
    """Give both operators their derivatives, under the transforms of torch.func too.

    Args:
        run: makes a layer a node of the autograd graph; takes what :func:`forward` takes.
        differentiate: makes the gradients of a layer such a node; takes what :func:`gradients`
            takes.
    """

    def of_layer(*tensors: Any, **options: Any) -> list[Tensor]:
        call, inputs = _read(tensors, options)
        return list(run(call, inputs))

    def of_gradients(*arguments: Any, **options: Any) -> list[Tensor]:
        *tensors, kept, incoming, needed = arguments
        call, inputs = _read(tensors, options)
        return list(differentiate(call, needed, inputs, kept, incoming))

    for operator, derived, where in (
        (_LAYER, of_layer, lambda arguments: arguments[:4]),
        (_LAYER_GRADIENTS, of_gradients, lambda arguments: (*arguments[:4], arguments[-2])),
    ):
        operators.add_kernel(operator.name(), derived, "FuncTorchDynamicLayerFrontMode")
        operators.add_kernel(operator.name(), _where_wanted(operator, derived, where), "Autograd")


def _where_wanted(
    operator: Any, derived: Callable[..., list[Tensor]], where: Callable[[Any], Any]
) -> Callable[..., list[Tensor]]:
    """Return a kernel that is `derived` where a derivative is wanted, and plain elsewhere.

    Args:
        operator: the operator.
        derived: it with a derivative.
        where: returns those of its arguments that may have one.
    """

    def kernel(*arguments: Any, **options: Any) -> list[Tensor]:
        if forward_ad._current_level >= 0 or _wants_gradient(where(arguments)):
            return derived(*arguments, **options)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*arguments, **options)

    return kernel


def _wants_gradient(tensors: Any) -> bool:
    """Whether autograd has to know of a tensor, or of one in a list of them."""
    if not torch.is_grad_enabled():
        return False
    flat = (t for part in tensors for t in (part if isinstance(part, list | tuple) else (part,)))
    return any(t is not None and t.requires_grad for t in flat)


def _tensors(call: Call, inputs: MaybeTensors) -> tuple[Any, ...]:
    """The tensors of a call, in the order of the operators."""
    x, h0, c0, *weights = inputs
    return x, h0, c0, weights, *call.sequences, *call.noise


def _options(call: Call, save: bool) -> dict[str, Any]:
    """Everything else about a call, as the operators take it."""
    spec = call.spec
    return {
        "backend": call.backend,
        "mode": spec.mode,
        "directions": spec.directions,
        "peephole": spec.peephole,
        "layer_norm": spec.layer_norm,
        "zoneout_c": float(spec.zoneout[0]),
        "zoneout_h": float(spec.zoneout[1]),
        "cell_states": call.cell_states,
        "recompute": call.recompute,
        "save": save,
        "members": call.members,
    }


def _read(tensors: Sequence[Any], options: dict[str, Any]) -> tuple[Call, list[Any]]:
    """Return the call and its inputs from the arguments of an operator."""
    x, h0, c0, weights, *others = tensors
    cell = {
        "peephole": options["peephole"],
        "layer_norm": options["layer_norm"],
        "recurrent_dropout": others[3] is not None,
        "zoneout": (options["zoneout_c"], options["zoneout_h"]),
    }
    call = Call(
        options["backend"],
        LayerSpec.of(options["mode"], weights, options["directions"], **cell),
        Sequences(*others[:3]),
        Noise(*others[3:]),
        cell_states=options["cell_states"],
        recompute=options["recompute"],
        save=options["save"],
        members=options["members"],
    )
    return call, [x, h0, c0, *weights]


def _compute_layer(*tensors: Any, **options: Any) -> list[Tensor]:
    call, inputs = _read(tensors, options)
    return list(compute.forward(call, inputs, call.save))


def _allocate_layer(*tensors: Any, **options: Any) -> list[Tensor]:
    call, inputs = _read(tensors, options)
    found = compute.outputs(call, inputs, call.save)
    return [t for t in found if t is not None]


def _compute_gradients(*arguments: Any, **options: Any) -> list[Tensor]:
    *tensors, kept, incoming, needed = arguments
    call, inputs = _read(tensors, options)
    return list(compute.gradients(call, needed, inputs, kept, incoming[: count_results(call)]))


def _allocate_gradients(*arguments: Any, **options: Any) -> list[Tensor]:
    *tensors, _, _, needed = arguments
    _, inputs = _read(tensors, options)
    return [
        torch.empty_like(t, dtype=inputs[0].dtype, memory_format=torch.contiguous_format)
        for t, wanted in zip(inputs, needed, strict=True)
        if wanted and t is not None
    ]


for _operator, _kernel, _fake, _flops in (
    (_LAYER, _compute_layer, _allocate_layer, flops.forward),
    (_LAYER_GRADIENTS, _compute_gradients, _allocate_gradients, flops.gradients),
):
    operators.add_kernel(_operator.name(), _kernel, "CompositeExplicitAutograd")
    operators.add_fake(_operator.name(), _fake)
    flops.add(_operator, _flops)
