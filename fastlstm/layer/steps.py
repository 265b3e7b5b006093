"""Steps of an LSTM cell in training: one node of the autograd graph each, and one for the weights.

A loop over a cell whose every step hands autograd a gradient of the weights spends most of its
time in adding these up. So the weights enter the graph once: a node takes them and returns a
*token*, on which every step depends. A backward pass of a step leaves the gradients of its gate
sums with what went into its products; when all steps that a pass reaches have run, autograd runs
the node of the weights, which makes one product of everything that was left. What was left belongs
to one pass of the engine (its graph task), so several passes over a graph, at once or one inside
the other, do not meet.

The token saves no tensors, and a cell holds it weakly: it lives as long as the graph of some step.
Whatever needs more of a step than first derivatives takes the way of a layer,
:mod:`fastlstm.layer.autograd`; its gradient of the weights then goes through the token as a
tensor.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import unwrap_if_dead

from fastlstm.kernels.base import Backend, compute_dtype
from fastlstm.layer.autograd import is_legacy_batch, pull
from fastlstm.layer.call import Call, MaybeTensors
from fastlstm.layer.compute import apart, forward
from fastlstm.spec import DENSE, NO_NOISE, LayerSpec

__all__ = ["SharedWeights", "Steps"]

_MOST_ROWS = 512  # that wait for their product: it then takes far longer than its sums are read
_FIRST = 2**62  # a number of nodes that no graph has
_task = torch._C._current_graph_task_id
_will_run = torch._C._will_engine_execute_node
_is_transformed = torch._C._are_functorch_transforms_active
_has_mode = torch._C._is_torch_function_mode_enabled


def _nothing() -> None:
    return None


class _Last(threading.local):
    """A weak reference to what the last step of this thread used.

    If threads shared it, one could replace what the loop of another one uses, whose gradients of
    the weights would then be summed in another order.
    """

    shared: Callable[[], SharedWeights | None] = staticmethod(_nothing)


class Steps:
    """What a cell keeps between the steps of a loop.

    Args:
        spec: the cell as a layer.
        cache: for packed weights.
    """

    def __init__(self, spec: LayerSpec, cache: Any) -> None:
        self._spec, self._cache = spec, cache
        self._last = _Last()

    def run(
        self, backend: Backend, x: Tensor, hx: Any, weights: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor] | None:
        """Take one step that may need gradients.

        Args:
            backend: what :func:`fastlstm.layer.fast_path.fast_backend` returned for x.
            x: ``[B, I]``.
            hx: what the user passed for ``(h, c)``; None for zeros.
            weights: of the cell.

        Returns:
            The next ``(h, c)``; None for a call that the operator refused, which then takes the
            long way, to an answer or a better message.
        """
        if backend.lstm_cell_fwd is None or _has_mode():  # a mode sees the call as a whole
            return None
        if hx is None:
            h0 = c0 = x.new_zeros(x.shape[0], self._spec.hidden_size)
        elif type(hx) is tuple and len(hx) == 2:
            h0, c0 = hx
            if type(h0) is not Tensor or type(c0) is not Tensor:
                return None
        else:
            return None
        shared = self._last.shared()
        try:
            if shared is None or not shared.covers(weights):
                if any([hasattr(w, "fake_mode") for w in weights]):
                    return None  # nothing to compute with
                shared = SharedWeights(backend, self._spec, self._cache, weights)
                self._last.shared = weakref.ref(shared)
            return _apply(*map(unwrap_if_dead, (x, h0, c0)), shared.token, shared)
        except (RuntimeError, ValueError, AttributeError):  # the last: a weight is no tensor
            return None


def _marks(weights: Sequence[Tensor]) -> list[Any]:
    return [mark for w in weights for mark in (w._version, w.requires_grad)]


class SharedWeights:
    """The weights of a cell in a graph, and what backward passes have left for them.

    Args:
        backend: computes the steps.
        spec: the cell as a layer.
        cache: for packed weights.
        weights: as :class:`fastlstm.spec.Weights`.
    """

    def __init__(
        self, backend: Backend, spec: LayerSpec, cache: Any, weights: Sequence[Tensor]
    ) -> None:
        self.backend, self.spec, self.cache = backend, spec, cache
        self.weights, self.marks = tuple(weights), _marks(weights)
        self.left: dict[int, _Left] = {}  # of each pass of the engine
        self.token = _Enter.apply(self.left, *weights)
        self.node: Any = self.token.grad_fn
        # Its turn in a backward pass is as soon as it can be, as that of the gradients behind it:
        # FSDP expects these when the inputs of a step have theirs, however old the node is.
        self.is_first = self.node is None or hasattr(self.node, "_set_sequence_nr")
        if self.node is not None and self.is_first:
            self.node._set_sequence_nr(_FIRST)

    def covers(self, weights: Sequence[Tensor]) -> bool:
        """Whether these are the same weights, and nothing has happened to their place in a graph.

        An edit gives them another one, if it is an operation that has a derivative.
        """
        if not self.is_first or self.marks != _marks(weights):
            return False
        return all([w is own for w, own in zip(weights, self.weights, strict=True)])

    def check(self) -> None:
        """Check that nobody has edited the weights since the steps, which computes them again.

        Raises:
            RuntimeError: somebody has.
        """
        if self.marks[::2] != _marks(self.weights)[::2]:
            raise RuntimeError(
                "LSTMCell: a weight has been modified by an inplace operation since a step, which "
                "these derivatives compute again"
            )

    def packed(self, purpose: str, batch: int) -> Tensor | None:
        """The buffer for packed weights; see :meth:`Backend.packed_weights`."""
        arguments = self.cache, purpose, self.weights, self.spec, (1, batch)
        return self.backend.packed_weights(*arguments)

    def leave(self, x: Tensor, h: Tensor, dsums: Tensor) -> Tensor | None:
        """Take what a step leaves for the gradients of the weights; return that of the token.

        Args:
            x: ``[B, I]``.
            h: ``[B, H]``, before the step.
            dsums: ``[B, 4H]``, the gradients of the gate sums.
        """
        task = _task()
        left = self.left.get(task)
        if left is not None:
            left.add(x, h, dsums)
            return None
        if not _will_run(self.node):  # only other gradients are wanted
            return None
        left = self.left[task] = _Left(self)
        left.add(x, h, dsums)
        # The engine keeps this tensor until the node of the weights has run, or until the pass
        # has failed. Then nobody else forgets what is left.
        grad = torch.zeros(1, dtype=self.token.dtype).expand(self.token.shape)
        weakref.finalize(grad, _forget, self.left, task).atexit = False
        return grad


def _forget(left: dict[int, _Left], task: int) -> None:
    """Forget what a pass has left, unless the pass goes on, and has only added to its tensor."""
    if _task() != task:
        left.pop(task, None)


class _Left:
    """What the steps of one backward pass have left for the gradients of the weights."""

    def __init__(self, shared: SharedWeights) -> None:
        self._multiply, self._weights = shared.backend.lstm_cell_weight_grads, shared.weights
        self._rows = 0
        self._steps: tuple[list[Tensor], list[Tensor], list[Tensor]] = [], [], []
        self._sums: list[Tensor] = []  # of w_ih, w_hh and both biases

    def add(self, *step: Tensor) -> None:
        """Add what one step leaves."""
        for tensors, t in zip(self._steps, step, strict=True):
            tensors.append(t)
        self._rows += step[0].shape[0]
        if self._rows >= _MOST_ROWS:
            self._take_in()

    def _take_in(self) -> None:
        """Multiply what is there."""
        there = bool(self._sums)
        if not there:
            dtype = compute_dtype(self._weights[0].dtype)
            self._sums = [torch.empty_like(w, dtype=dtype) for w in self._weights[:3]]
        self._multiply(*self._steps, self._sums, there)
        self._steps, self._rows = ([], [], []), 0

    def gradients(self) -> list[Tensor]:
        """Return the gradients of the weights."""
        if self._steps[0]:
            self._take_in()
        found = [t.to(self._weights[0].dtype) for t in self._sums]
        return [*found, found[2].clone()] if len(found) > 2 else found


class _Enter(torch.autograd.Function):
    """The weights enter a graph. The token looks like all of them in one, but has no numbers."""

    @staticmethod
    def forward(ctx: Any, left: dict[int, _Left], *weights: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.left, ctx.weights = left, weights
        size = sum(w.numel() for w in weights)
        return torch.zeros(1, dtype=weights[0].dtype).expand(size)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        left = None if torch.compiler.is_compiling() else ctx.left.pop(_task(), None)
        found = None if left is None else left.gradients()
        if grad is not None and (left is None or grad.stride(0) != 0):
            parts = apart(grad, ctx.weights)
            found = parts if found is None else [a + b for a, b in zip(found, parts, strict=True)]
        if found is None:
            return None, *(None for _ in ctx.weights)
        wanted = ctx.needs_input_grad[1:]
        return None, *(g if need else None for g, need in zip(found, wanted, strict=True))


class _Step(torch.autograd.Function):
    """A step."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, h0: Tensor, c0: Tensor, token: Tensor, shared: SharedWeights
    ) -> tuple[Tensor, Tensor]:
        packed = shared.packed("forward", x.shape[0])
        h, c, kept = shared.backend.lstm_cell_fwd(x, shared.weights, h0, c0, packed)
        ctx.set_materialize_grads(False)
        # As nn.LSTMCell: weights that no gradient depends on may be edited before backward.
        reads = any(ctx.needs_input_grad[:2])
        ctx.save_for_backward(x, h0, c0, kept, *(shared.weights if reads else ()))
        ctx.shared = shared
        return h, c

    @staticmethod
    def backward(ctx: Any, dh: Tensor | None, dc: Tensor | None) -> tuple[Tensor | None, ...]:
        x, h0, c0, kept, *weights = ctx.saved_tensors
        needed, shared = ctx.needs_input_grad[:4], ctx.shared
        weights = weights or shared.weights
        inputs = x, h0, c0, *weights
        if (
            torch.compiler.is_compiling()  # compiled autograd: no engine runs
            or torch.is_grad_enabled()
            or _is_transformed()
            or is_legacy_batch(dh)
            or is_legacy_batch(dc)
        ):
            shared.check()
            return *_by_layer(shared, needed, inputs, (dh, dc)), None
        dh, dc = (None if g is None else _dense(g, kept.dtype) for g in (dh, dc))
        packed = shared.packed("backward", x.shape[0])
        *grads, dsums = shared.backend.lstm_cell_bwd(
            x, weights, h0, c0, kept, dh, dc, *needed[:3], packed
        )
        dx, dh0, dc0 = (
            g.to(x.dtype) if need else None for g, need in zip(grads, needed, strict=False)
        )
        return dx, dh0, dc0, shared.leave(x, h0, dsums) if needed[3] else None, None


# Without what Function.apply does for torch.func, as for layers.
_apply: Any = super(torch.autograd.Function, _Step).apply


def _dense(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """A gradient as the operator takes it."""
    grad = grad if grad.dtype is dtype else grad.to(dtype)
    return grad if grad.stride(-1) == 1 else grad.contiguous()


def _by_layer(
    shared: SharedWeights, needed: Sequence[bool], inputs: MaybeTensors, incoming: MaybeTensors
) -> tuple[Tensor | None, ...]:
    """The gradients of x, h, c and the token, as those of a layer of one step."""
    call = Call(shared.backend.name, shared.spec, DENSE, NO_NOISE)
    x, h0, c0, *weights = inputs
    layer = x[None], h0[None], c0[None], *weights
    with torch.no_grad():
        outputs = forward(call, layer, save=True)
    kept = outputs[0], *outputs[3:]
    grads = None, *(None if g is None else g[None] for g in incoming)
    wanted = *needed[:3], *[needed[3]] * len(weights)
    rest = iter(pull(call, wanted, layer, kept, grads))
    of_states = [next(rest)[0] if need else None for need in needed[:3]]
    token = torch.cat([g.reshape(-1) for g in rest]) if needed[3] else None
    return *of_states, token
