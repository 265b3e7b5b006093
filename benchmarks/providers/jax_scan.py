"""JAX: an LSTM over jax.lax.scan, compiled by XLA; and what all providers on JAX share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import BenchmarkError
from ..speed.contender import Contender
from ..speed.update import RATE
from ..speed.workload import Workload
from . import Provider
from .pytorch import refuses_step

# kernel [I, 4H], recurrent kernel [H, 4H] and bias [4H] of one layer and direction
Weights = tuple[Any, Any, Any]
# (weights, x, state, lengths, reset) -> (y, h, c), of JAX's arrays, named as in `Workload`
Forward = Callable[[Any, Any, Any, Any, Any], tuple[Any, Any, Any]]


class JaxScan(Provider):
    """Written by hand, the carry masked inside of the scan, as PureJaxRL does."""

    name, label = "jax", "JAX, lax.scan"
    packages = ("jax",)
    remote = True

    def refuses(self, work: Workload) -> str | None:
        return refuses_step(work)

    def contender(self, work: Workload) -> Contender:
        prepare(work)
        weights = [tuple(map(array, one)) for one in single_bias(work.lstm)]
        return from_function(work, partial(lstm, work.case.D), weights, lambda found: found)


def lstm(
    directions: int, weights: list[Weights], x: Any, state: Any, lengths: Any, reset: Any
) -> tuple[Any, Any, Any]:
    """A `Forward` after its first argument."""
    import jax
    import jax.numpy as jnp

    T, B, _ = x.shape
    live = None if lengths is None else (jnp.arange(T)[:, None] < lengths)[:, :, None]
    again = None if reset is None else reset[:, :, None]
    outputs, states = [], []
    for k, (kernel, recurrent, bias) in enumerate(weights):
        zeros = jnp.zeros((B, len(recurrent)), x.dtype)
        start = (zeros, zeros) if state is None else (state[0][k], state[1][k])
        # split up before the loop: XLA on the CPU takes twice the time to do it in each step
        steps = (jnp.split(x @ kernel + bias, 4, -1), again, live)
        reverse = k % directions == 1
        last, y = jax.lax.scan(partial(cell, recurrent), start, steps, reverse=reverse)
        outputs.append(y)
        states.append(last)
        if len(outputs) == directions:
            x, outputs = jnp.concatenate(outputs, -1), []
    h, c = zip(*states, strict=True)
    return x, jnp.stack(h), jnp.stack(c)


def cell(recurrent: Any, carry: tuple[Any, Any], step: tuple[Any, Any, Any]) -> Any:
    """One step of `lstm`: past its length a row stands still and gives zeros."""
    from jax.nn import sigmoid
    from jax.numpy import add, split, tanh, where

    projected, again, live = step
    h, c = carry
    if again is not None:
        h, c = where(again, 0, h), where(again, 0, c)
    i, f, g, o = map(add, projected, split(h @ recurrent, 4, -1))
    c_next = sigmoid(f) * c + sigmoid(i) * tanh(g)
    h_next = sigmoid(o) * tanh(c_next)
    if live is None:
        return (h_next, c_next), h_next
    return (where(live, h_next, h), where(live, c_next, c)), where(live, h_next, 0)


def prepare(work: Workload) -> None:
    """Has JAX compute where the numbers of the work are, with their precision."""
    import jax

    try:
        device = jax.devices("cpu" if work.on_cpu else "gpu")[0]
    except RuntimeError as error:
        raise BenchmarkError("this jax has no GPU support") from error
    jax.config.update("jax_default_device", device)
    if work.dtype == torch.float64:
        jax.config.update("jax_enable_x64", True)
    if not work.on_cpu:  # as cuDNN may: its own default is TF32
        precision = "tensorfloat32" if torch.backends.cudnn.allow_tf32 else "highest"
        jax.config.update("jax_default_matmul_precision", precision)


def from_function(
    work: Workload,
    forward: Forward,
    weights: Any,
    by_direction: Callable[[Any], Iterable[Weights]],
    batch_first: bool = False,
) -> Contender:
    """The contender that compiles `forward` or, in training, it, its gradients and an update.

    `by_direction` finds in something like `weights` those of each layer and direction.
    `batch_first` says that x and y are [B, T, features] to it.
    """
    import jax

    def to_native(rows: Tensor) -> Any:
        return array(rows.transpose(0, 1) if batch_first else rows)

    def from_native(rows: Any) -> Tensor:
        return tensor(rows).transpose(0, 1) if batch_first else tensor(rows)

    def forward_backward(weights: Any, x: Any, dy: Any, *marks: Any) -> tuple[Any, Any]:
        leaves = (weights, x) if work.input_gradient else (weights,)
        y, backward = jax.vjp(lambda weights, x=x: forward(weights, x, None, *marks)[0], *leaves)
        return y, backward(dy)

    def train(weights: Any, rate: float, *rest: Any) -> tuple[Any, Any]:
        y, found = forward_backward(weights, *rest)
        changed = jax.tree.map(lambda w, dw: w - (rate * dw).astype(w.dtype), weights, found[0])
        return changed, (y, found)

    x = to_native(work.x)
    state = None if work.state is None else tuple(map(array, work.state))
    lengths = None if work.lengths is None else array(work.lengths.int().to(work.x.device))
    marks = lengths, None if work.reset is None else array(work.reset)
    training = work.dy is not None
    given = (weights, x, state if work.dy is None else to_native(work.dy), *marks)
    compiled = jax.jit(forward_backward if training else forward)
    training_step = jax.jit(train)
    carried: Any = state
    current, rate = weights, RATE

    def call() -> Any:
        return jax.block_until_ready(compiled(*given))

    def train_once() -> None:
        nonlocal current, rate
        current, _ = jax.block_until_ready(training_step(current, rate, *given[1:]))
        rate = -rate  # as `Update`

    def step() -> None:
        nonlocal carried
        _, *carried = jax.block_until_ready(compiled(weights, x, tuple(carried), *marks))

    def results() -> dict[str, Tensor]:
        y, *rest = call()
        found = {"y": from_native(y)}
        if not training:
            return found | {"h": tensor(rest[0]), "c": tensor(rest[1])}
        of_weights, *of_x = rest[0]
        if of_x:
            found["gradient of x"] = from_native(of_x[0])
        tensors: Any = [tuple(map(tensor, one)) for one in by_direction(of_weights)]
        return found | gradients(work.lstm, tensors)

    calls = {"step": step, "train": train_once}
    return Contender(calls.get(work.mode, call), results)


def ends(lstm: nn.LSTM) -> list[str]:
    """How the names of parameters end, for each layer and direction: "l0", "l0_reverse", ..."""
    directions = ("", "_reverse")[: 1 + lstm.bidirectional]
    return [f"l{k}{direction}" for k in range(lstm.num_layers) for direction in directions]


def single_bias(lstm: nn.LSTM) -> list[Weights]:
    """The weights of each layer and direction, as tensors."""
    found = []
    for end in ends(lstm):
        w_ih, w_hh, b_ih, b_hh = (
            getattr(lstm, f"{name}_{end}").detach()
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        found.append((w_ih.t(), w_hh.t(), b_ih + b_hh))
    return found


def gradients(lstm: nn.LSTM, found: Iterable[Weights]) -> dict[str, Tensor]:
    """The gradients of `single_bias` as those of nn.LSTM, where both biases have the same."""
    named = {}
    for end, (kernel, recurrent, bias) in zip(ends(lstm), found, strict=True):
        named[f"gradient of weight_ih_{end}"] = kernel.t()
        named[f"gradient of weight_hh_{end}"] = recurrent.t()
        named |= dict.fromkeys((f"gradient of bias_ih_{end}", f"gradient of bias_hh_{end}"), bias)
    return named


def array(value: Tensor) -> Any:
    """A tensor as an array of JAX, which does not share its memory."""
    import jax.numpy as jnp

    return jnp.array(jnp.from_dlpack(value.contiguous()))


def tensor(value: Any) -> Tensor:
    """The reverse."""
    return torch.utils.dlpack.from_dlpack(value)
