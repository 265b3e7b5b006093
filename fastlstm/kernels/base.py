"""What a backend is: one way of computing a layer, and the list of all of them.

A backend is an object of a subclass of :class:`Backend`, made and registered in a file or folder
of its own in :mod:`fastlstm.kernels`. Everything else asks the object; nothing compares names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import wraps
from threading import RLock
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fastlstm.spec import LayerSpec, Sequences

__all__ = [
    "Backend",
    "Cache",
    "Use",
    "compute_dtype",
    "constant",
    "get",
    "names",
    "once",
    "register",
    "registered",
]

Function = TypeVar("Function", bound=Callable[..., Any])


class Use(NamedTuple):
    """How layers are called, as far as the time that they take depends on it."""

    steps: int  # T
    batch: int  # B
    training: bool  # whether a backward pass may follow
    captured: bool  # whether the call is recorded in a CUDA graph, and only then replayed
    packed: bool = False  # whether rows are packed; else all sequences have all steps


class Backend:
    """One way of computing a layer. The methods here describe one that can compute everything.

    A backend has either operators (their contract is in :mod:`fastlstm.kernels.operators`), whose
    derivatives are the work of :mod:`fastlstm.layer.autograd`, or ``layer``, a function made of
    PyTorch operations, which need no help.
    """

    name: str
    """What users call it by: ``fastlstm.backend(name)``."""

    devices: frozenset[str] = frozenset()
    """Types of device for whose tensors ``auto`` considers it, in the order of registration."""

    layer: Any = None
    """``layer(spec, x, weights, state, sequences, noise, cell_states) -> (y, state, c_all)``."""

    lstm_fwd: Any = None
    lstm_bwd: Any = None
    rnn_fwd: Any = None
    rnn_bwd: Any = None
    """The operators of a layer."""

    lstm_plain_fwd: Any = None
    lstm_plain_bwd: Any = None
    """The same in training, of layers that :meth:`takes_plain`: for latency, since they make
    their outputs. ``lstm_plain_fwd(x, weights, spec, h0, c0, sequences, cache)`` returns ``(y,
    h_n, c_n, c_all, gates)``; cache is that of :meth:`packed_weights`. ``lstm_plain_bwd`` takes
    the same, then y, c_all and gates, dy, dh_n and dc_n, and whether the gradients of x, h0, c0
    and the weights are wanted. It returns those in a list, of every weight one of its own."""

    lstm_infer: Any = None
    lstm_cell_infer: Any = None
    """The operators of plain calls without gradients, for latency; None where there are none."""

    infer_directly: Any = None
    """The same without an operator, or None: :func:`fastlstm.kernels.direct.infer_functions`."""

    infer_quantized: Any = None
    """The second function of those: with quantised weights."""

    infers_on_cpu: bool = True
    """Whether those operators are for CPU tensors, and for no others; or the other way round."""

    stack: Any = None
    """A whole stack of plain layers in one call, with a derivative of its own and its own way of
    autocast: ``stack(spec, layers, x, hx, weights, sequences, dropout, training, cache)`` returns
    y and the final states. What records or transforms calls gets the operators all the same."""

    cell: Any = None
    """``cell(x, hx, weights) -> (h, c)``: likewise a step of a plain cell."""

    proven: bool = False
    """Whether ``auto`` may take it on all of its devices, without a word about it in the record of
    the machine: its kernels run there in the tests, or are PyTorch's own."""

    lstm_cell_fwd: Any = None
    lstm_cell_bwd: Any = None
    lstm_cell_weight_grads: Any = None
    """The operators of a plain cell in training; None where there are none."""

    members: bool = False
    """Whether one call of the operators computes an ensemble of layers (``members=E``)."""

    wide: bool = False
    """Whether kept gates and gradients of a 16-bit layer, but for those of y and of weights, are
    float32 and not 16 bit."""

    takes_weights_of_forward: bool = False
    """Whether its backward operators find the weights of the forward pass in `cache`, to compute
    gates again. Any other backend computes the forward pass again, if the weights have changed."""

    keeps_by_precision: bool = False
    """Whether the order of what it keeps depends on how float32 is multiplied. If that changes
    before the backward pass, the forward pass is computed again."""

    def takes_plain(self, spec: LayerSpec, sequences: Sequences) -> bool:
        """Whether ``lstm_plain_fwd`` and ``lstm_plain_bwd`` compute a layer of such sequences."""
        return False

    def error(self) -> str | None:
        """Say why this machine does not have it; None once it is loaded, which this does."""
        return None

    def detail(self) -> str:
        """Describe in a line what is there, for :func:`fastlstm.backends`."""
        raise NotImplementedError

    def kernel(self) -> str:
        """Name what runs, for :func:`fastlstm.explain`."""
        return self.detail()

    def obstacle(self, spec: LayerSpec, x: Tensor) -> str | None:
        """Say why it cannot compute such a layer of an input like x; None if it can."""
        return None

    def lacks(self, x: Tensor, sequences: Sequences, cell_states: bool) -> str | None:
        """Say what of a call it does not have, whatever the layers are; None if it has all.

        Args:
            x: the input.
            sequences: as the caller passed them, before they are checked.
            cell_states: whether c of every step is asked for.
        """
        return None

    def is_proven(self, spec: LayerSpec, x: Tensor, dense: bool = True) -> bool:
        """Whether ``auto`` may take it for such a layer on a device like that of x.

        Args:
            spec: the layer.
            x: the input; its device and dtype matter.
            dense: whether all sequences have all steps, and none is reset.
        """
        return self.proven

    def pace(self, specs: Sequence[LayerSpec], x: Tensor, use: Use) -> float | None:
        """Say how many times as long as it PyTorch's own kernels take for a call, at least.

        ``auto`` takes PyTorch's on a GPU unless this is clearly more than 1.

        Args:
            specs: the layers.
            x: the input, dense or packed.
            use: how they are called.

        Returns:
            None where nobody has measured it.
        """
        return None

    def is_ready(self, specs: Sequence[LayerSpec], x: Tensor, batch: int) -> bool:
        """Whether a CUDA graph may capture the first call of such layers, whatever it compiles."""
        return True

    def regime(self, spec: LayerSpec, T: int, B: int, x: Tensor) -> str:
        """Name, in a word, which of its kernels compute such a layer: what is verified apart."""
        return "all"

    def trials(self, x: Tensor) -> Sequence[tuple[Callable[[], Any], dict[str, int]]]:
        """Return where to look at its kernels in inputs like x, so that each regime is seen.

        Each is a function that makes a context, and the sizes T, B, I or H of a call in it that
        are not the usual small ones.
        """
        return ((nullcontext, {}),)

    def has_second(self, x: Tensor) -> bool:
        """Whether the derivative of its ``stack`` for an input like x has one itself."""
        return True

    def describe(self, spec: LayerSpec, T: int, B: int, x: Tensor) -> str:
        """Describe in a line how it would compute such a layer of B sequences of T steps."""
        raise NotImplementedError

    def keeps_gates(self, spec: LayerSpec) -> bool:
        """Whether its forward pass can keep the activated gates for backward."""
        return True

    def packed_weights(
        self,
        cache: Any,
        purpose: str,
        weights: Sequence[Tensor],
        spec: LayerSpec,
        shape: tuple[int, int],
    ) -> Tensor | None:
        """Return the buffer in which it keeps these weights in an order of its own, if it does.

        Args:
            cache: a :class:`Cache` that lives as long as the module, or None.
            purpose: "forward", "backward", or "both" for a backward pass that computes the gates
                again.
            weights: D groups, see :class:`fastlstm.spec.Weights`.
            spec: the layer.
            shape: T and B of the call.
        """
        return None


class Cache(dict[str, Tensor]):
    """The packed weights of a layer, for :meth:`Backend.packed_weights`: at most one copy.

    Not a plain dict, which torch.func would copy.
    """


_backends: dict[str, Backend] = {}


def register(backend: Backend) -> Backend:
    """Add a backend to those that users can choose; ``auto`` asks them in this order."""
    _backends[backend.name] = backend
    return backend


def get(name: str) -> Backend:
    """Return the backend of that name."""
    return _backends[name]


def names() -> tuple[str, ...]:
    """Return the names of all backends."""
    return tuple(_backends)


def registered() -> tuple[Backend, ...]:
    """Return all backends."""
    return tuple(_backends.values())


def constant(function: Function) -> Function:
    """Mark a function whose result never changes: compiled code asks it once and keeps the answer.

    What ``torch.compiler.assume_constant_result`` does, without the second that importing all of
    Dynamo would add to ``import fastlstm``.
    """
    function.__dict__["_dynamo_marked_constant"] = True
    return function


_loading = RLock()  # one for all: what is loaded may load more


def once(load: Function) -> Function:
    """Return a function that calls another one at its first call, and keeps what it returns.

    ``functools.cache`` would call it a second time for a thread that comes meanwhile, and a kernel
    of an operator may be registered only once.
    """
    found: list[Any] = []

    @wraps(load)
    def loaded() -> Any:
        if not found:
            with _loading:
                if not found:
                    found.append(load())
        return found[0]

    return loaded  # type: ignore[return-value]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the arithmetic: float32 for 16-bit tensors."""
    return torch.float64 if dtype is torch.float64 else torch.float32
