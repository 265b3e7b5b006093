"""The contract of a layer's operators: schemas, fake kernels, and what their kernels share.

Imports neither Triton nor the compiled libraries. A backend that has kernels calls :func:`define`
and registers its kernels for the operators that this makes.

One operator computes one layer, both directions at once. Shapes: T time steps, B batch, I input
size, H hidden size, P size of h (projected or H), D directions; packed rows have [N] in the place
of [T, B]. :mod:`fastlstm.reference` defines what a step computes.

- ``x``: [T, B, I], with a dense last dimension;
- ``weights``: for each direction ``w_ih [4H, I]``, ``w_hh [4H, P]``, then ``b_ih [4H]`` and
  ``b_hh [4H]`` if there are biases, then ``w_hr [P, H]`` if there is a projection, then
  ``w_ch [3H]`` with ``peephole``, then ``ln_ih [4H]``, ``ln_hh [4H]``, ``ln_c [H]`` and
  ``b_ln_c [H]`` with ``layer_norm``. ``dweights`` alike, with one gradient for both biases;
- ``h0`` [D, B, P], ``c0`` [D, B, H]: None for zeros;
- ``batch_sizes``: int64 [T], of packed rows; ``lengths``: int64 [B]; ``reset``: bool [T, B];
- ``h_mask``: [D, B, P], factors of the h that goes into w_hh, float32 when the layer is 16-bit;
  ``seed``: int64 [1], of zoneout in training, None for its expectation;
- ``y`` [T, B, D*P], ``h_n`` [D, B, P], ``c_n`` [D, B, H]: the results;
- ``gates``: [D, T, B, 4H], the activated gates, kept for backward, units in an order private to
  the backend. Without them backward computes them again, those of all steps at once. A layer with
  layer normalisation never keeps them;
- ``c_all``: [T, B, D*H], c of every step, float32 when the layer is 16-bit. So are ``gates`` and
  every gradient but ``dy`` and ``dweights`` of a backend with ``wide``; all others have the dtype
  of the layer;
- ``cache``: a buffer of bytes in which the backend may keep the weights in an order of its own.
  Of a backend with ``takes_weights_of_forward`` it is None or, in backward without gates, the
  weights of the forward pass in one tensor: gates are those of these weights, whatever has become
  of ``weights`` since.

Outputs are passed in and written completely. An operator of a backend with ``members`` computes an
ensemble of E layers in one call: with ``members=E`` every tensor has a leading dimension E, which
may be expanded (stride 0). ``cache`` has none, and is not used then.

The operators of ``nn.RNN`` have one gate, ``w_ih [H, I]`` and ``w_hh [H, H]``, and keep nothing
but y for backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from threading import local
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import _CloneArgBeforeMutateMode
from torch.library import Library, register_fake, register_torch_dispatch

from fastlstm.kernels import flops
from fastlstm.spec import LayerSpec, Noise

_SEQUENCES = "Tensor? batch_sizes, Tensor? lengths, Tensor? reset"
_INPUTS = f"Tensor x, Tensor[] weights, int directions, Tensor? h0, Tensor? c0, {_SEQUENCES}"
_CELL = (
    "*, bool peephole=False, bool layer_norm=False, Tensor? h_mask=None, "
    "float zoneout_c=0.0, float zoneout_h=0.0, Tensor? seed=None"
)
_RNN_INPUTS = f"Tensor x, Tensor[] weights, int directions, Tensor? h0, {_SEQUENCES}, bool relu"
_LSTM_SCHEMAS = {
    "lstm_fwd": (
        f"{_INPUTS}, Tensor(a!) y, Tensor(b!) h_n, Tensor(c!) c_n, Tensor(d!)? c_all, "
        f"Tensor(e!)? gates, Tensor(f!)? cache, {_CELL}"
    ),
    "lstm_bwd": (
        f"{_INPUTS}, Tensor y, Tensor c_all, Tensor? gates, "
        "Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? dc_all, "
        "Tensor(a!)? dx, Tensor(b!)? dh0, Tensor(c!)? dc0, Tensor(d!)[] dweights, "
        f"Tensor(e!)? cache, {_CELL}"
    ),
}
_RNN_SCHEMAS = {
    "rnn_fwd": f"{_RNN_INPUTS}, Tensor(a!) y, Tensor(b!) h_n, Tensor(c!)? cache",
    "rnn_bwd": (
        f"{_RNN_INPUTS}, Tensor y, Tensor? dy, Tensor? dh_n, "
        "Tensor(a!)? dx, Tensor(b!)? dh0, Tensor(c!)[] dweights, Tensor(d!)? cache"
    ),
}


def _library() -> Library:
    """Own the namespace of the operators; take it over from an import before this one.

    Notebooks and test plugins forget modules and import them again, in the same process.
    """
    namespace = vars(torch.ops.fastlstm)
    if "_library" in namespace:
        namespace["_library"]._destroy()
    namespace["_library"] = Library("fastlstm", "DEF")
    return namespace["_library"]


library = _library()


class Operators(NamedTuple):
    """The operators of a backend; None for a kind of layer that it does not have."""

    lstm_fwd: Any
    lstm_bwd: Any
    rnn_fwd: Any = None
    rnn_bwd: Any = None


def define(backend: str, *, rnn: bool = True, members: bool = False) -> Operators:
    """Define the operators of a backend, ``fastlstm::lstm_fwd_NAME`` and so on.

    Args:
        backend: its name.
        rnn: whether it has layers of ``nn.RNN``.
        members: whether its operators compute ensembles.
    """
    schemas = _LSTM_SCHEMAS | (_RNN_SCHEMAS if rnn else {})
    found = []
    for name, schema in schemas.items():
        full = f"({schema}{', int members=0' * members}) -> ()"
        operator = define_operator(f"{name}_{backend}", full)
        add_fake(operator.name(), _writes_only_its_arguments)
        flops.add(operator, flops.backward if name.endswith("bwd") else flops.forward)
        found.append(operator)
    return Operators(*found)


def define_operator(name: str, schema: str) -> Any:
    """Define one operator ``fastlstm::NAME`` and return it.

    Args:
        name: its name.
        schema: its arguments and results, ``"(Tensor x) -> ()"``.
    """
    library.define(name + schema)
    # allow_mutation_on_saved_tensors looks at what an operator writes, and stumbles over None.
    # Nothing of it has been saved for anyone.
    mode = _CloneArgBeforeMutateMode
    register_torch_dispatch(f"fastlstm::{name}", mode, _without_mode, lib=library)
    return getattr(torch.ops.fastlstm, name).default


def define_plain(backend: str, last: str) -> tuple[Any, Any]:
    """Define what ``Backend.lstm_plain_fwd`` and ``lstm_plain_bwd`` of a backend call.

    They have no fake kernel: compiled code has the operators of :func:`define`.

    Args:
        backend: its name.
        last: arguments of its own, as in a schema.
    """
    inputs = "Tensor x, Tensor[] weights, int directions, Tensor? h0, Tensor? c0"
    kept = "Tensor y, Tensor c_all, Tensor gates"
    incoming = "Tensor? dy, Tensor? dh_n, Tensor? dc_n"
    wanted = "bool dx, bool dh0, bool dc0, bool dweights"
    forward = define_operator(
        f"lstm_plain_fwd_{backend}",
        f"({inputs}, {last}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    )
    backward = define_operator(
        f"lstm_plain_bwd_{backend}",
        f"({inputs}, {kept}, {incoming}, {wanted}, {last}) -> Tensor[]",
    )
    return forward, backward


def add_kernel(name: str, kernel: Callable[..., Any], key: str) -> None:
    """Let a function compute an operator.

    Args:
        name: of the operator, "fastlstm::lstm_fwd_cpu".
        kernel: takes its arguments.
        key: where: "CPU", "CUDA"; "CompositeExplicitAutograd" for every device; "Autograd" for
            its derivative, see :mod:`fastlstm.layer.recorded`.
    """
    library.impl(name, kernel, key)


def add_fake(name: str, kernel: Callable[..., Any]) -> None:
    """Let a function allocate what an operator returns, so that graphs may contain it."""
    register_fake(name, kernel, lib=library)


def _without_mode(mode: Any, operator: Any, types: Any, args: Any, kwargs: Any) -> Any:
    return operator(*args, **(kwargs or {}))


def _writes_only_its_arguments(*args: object, **options: object) -> None:
    return None


def load_on_first_use(
    operators: Sequence[Any], error: Callable[[], str | None], name: str
) -> None:
    """Let the operators load their backend when they are called and have no kernel yet.

    A program of ``torch.export`` calls them without anyone having asked for a backend before.

    Args:
        operators: those without a kernel until then.
        error: loads the backend, and returns why it cannot, or None.
        name: of the backend, for the message.
    """
    inside = local()  # other threads may be on their way here while one loads the backend

    def bind(operator: Any) -> Callable[..., None]:
        def kernel(*args: Any, **options: Any) -> Any:
            if getattr(inside, "again", False):
                raise RuntimeError(f"{operator.name()} has no kernel for tensors on this device")
            reason = error()
            if reason is not None:
                raise RuntimeError(f"the {name} kernels are not available here: {reason}")
            inside.again = True
            try:
                return operator(*args, **options)
            finally:
                inside.again = False

        return kernel

    for operator in filter(None, operators):
        add_kernel(operator.name(), bind(operator), "CompositeExplicitAutograd")


def cell_options(spec: LayerSpec, noise: Noise) -> dict[str, Any]:
    """Return the keywords of an LSTM's operator; none for the plain cell, they take time."""
    if not spec.is_extended:
        return {}
    h_mask = noise.h_mask
    return {
        "peephole": spec.peephole,
        "layer_norm": spec.layer_norm,
        "h_mask": None if h_mask is None else h_mask.contiguous(),
        "zoneout_c": spec.zoneout[0],
        "zoneout_h": spec.zoneout[1],
        "seed": noise.seed,
    }


def read_cell_options(
    weights: Sequence[Tensor],
    directions: int,
    *,
    peephole: bool = False,
    layer_norm: bool = False,
    h_mask: Tensor | None = None,
    zoneout_c: float = 0.0,
    zoneout_h: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[LayerSpec, Noise]:
    """Return the layer and the noise that the arguments of an LSTM's operator describe.

    Raises:
        RuntimeError: a weight that has to be a matrix is none; somebody has emptied it.
    """
    names = "weight_ih [4 * H, I]", "weight_hh [4 * H, P]"
    for name, weight in zip(names, weights, strict=False):
        if weight.dim() != 2:
            raise RuntimeError(f"fastlstm: expected {name}, got {list(weight.shape)}")
    spec = LayerSpec.of(
        "LSTM",
        weights,
        directions,
        peephole=peephole,
        layer_norm=layer_norm,
        recurrent_dropout=h_mask is not None,
        zoneout=(zoneout_c, zoneout_h),
    )
    return spec, Noise(None if h_mask is None else h_mask.contiguous(), seed)


def plainly(operator: Callable[..., None]) -> Callable[..., None]:
    """Run an operator that is written in Python on the device of x, without autograd and autocast.

    An exported program calls operators with gradients on, and backward may run within autocast.
    """

    @wraps(operator)
    def run(x: Tensor, *arguments: Any, **options: Any) -> None:
        with torch.no_grad(), torch.cuda.device_of(x):
            if not torch._C._is_any_autocast_enabled():
                return operator(x, *arguments, **options)
            with torch.autocast(x.device.type, enabled=False):
                return operator(x, *arguments, **options)

    return run


def zero(*gradients: Tensor | None) -> None:
    """Set those that are there to zero."""
    for gradient in gradients:
        if gradient is not None:
            gradient.zero_()


def contiguous(t: Tensor | None) -> Tensor | None:
    """Return the same numbers, contiguous."""
    return None if t is None else t.contiguous()
