"""Keras 3: a model of its LSTM layers, on PyTorch and on JAX."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastlstm.weights import to_keras

from .. import BenchmarkError
from ..speed.contender import Contender
from ..speed.workload import Workload
from . import Provider
from .jax_scan import Weights, from_function, gradients, prepare
from .pytorch import from_module, refuses_step


class _Keras(Provider):
    """keras.layers.LSTM, in Bidirectional for two directions; a mask for ragged batches."""

    remote = True

    def refuses(self, work: Workload) -> str | None:
        if work.reset is not None:
            return "no resets"
        if work.dtype == torch.float64:
            return "no float64: some of it is rounded to float32"
        return refuses_step(work)


class KerasTorch(_Keras):
    """A call of the model, eager, as Keras does by itself on PyTorch."""

    name, label = "keras-torch", "Keras, PyTorch"
    packages = ("keras",)

    def contender(self, work: Workload) -> Contender:
        os.environ["KERAS_TORCH_DEVICE"] = str(work.x.device)
        model = build("torch", work)
        variables: Any = nn.ParameterList([v.value for v in model.trainable_variables])
        native = replace(
            work,
            x=work.x.transpose(0, 1).contiguous(),
            dy=None if work.dy is None else work.dy.transpose(0, 1).contiguous(),
            lengths=None,
        )
        mask = None
        if work.lengths is not None:
            lengths = work.lengths.to(work.x.device)
            mask = torch.arange(len(work.x), device=work.x.device) < lengths[:, None]

        def forward(x: Tensor, state: Any = None) -> tuple[Tensor, tuple[Any, Any]]:
            y, *states = model(inputs(x, mask, state))
            return y, (states[::2], states[1::2])

        call = forward if work.mode == "train" else torch.no_grad()(forward)
        made = from_module(variables, native, call)

        def results() -> dict[str, Tensor]:
            found: dict[str, Any] = made.results()
            named = {"y": found["y"].transpose(0, 1)}
            if work.mode != "train":
                return named | {name: torch.stack(found[name]) for name in "hc"}
            if work.input_gradient:
                named["gradient of x"] = found["gradient of x"].transpose(0, 1)
            of_variables = [found[f"gradient of {k}"] for k in range(len(variables))]
            return named | gradients(work.lstm, by_direction(of_variables))

        return replace(made, results=results)


class KerasJax(_Keras):
    """The model's stateless call under jax.jit, which is how Keras runs on JAX."""

    name, label = "keras-jax", "Keras, JAX"
    packages = ("keras", "jax")

    def contender(self, work: Workload) -> Contender:
        prepare(work)
        import jax.numpy as jnp

        model = build("jax", work)
        fixed = [variable.value for variable in model.non_trainable_variables]

        def forward(
            weights: Any, x: Any, state: Any, lengths: Any, reset: None
        ) -> tuple[Any, Any, Any]:
            mask = None if lengths is None else jnp.arange(x.shape[1]) < lengths[:, None]
            (y, *states), _ = model.stateless_call(weights, fixed, inputs(x, mask, state))
            return y, jnp.stack(states[::2]), jnp.stack(states[1::2])

        weights = [variable.value for variable in model.trainable_variables]
        return from_function(work, forward, weights, by_direction, batch_first=True)


def build(backend: str, work: Workload) -> Any:
    """A keras.Model with the work's weights: it takes `inputs` and gives y, h, c, h, c, ..."""
    os.environ["KERAS_BACKEND"] = backend
    import keras

    if keras.backend.backend() != backend:
        raise BenchmarkError(f"this process has Keras on {keras.backend.backend()} already")
    case, T = work.case, len(work.x)
    keras.config.set_floatx(str(work.dtype).removeprefix("torch."))
    x = keras.Input((T, case.I))
    mask = None if work.lengths is None else keras.Input((T,), dtype="bool")
    start = [
        [keras.Input((case.H,)) for _ in "hc"] for _ in range(0 if work.state is None else case.L)
    ]
    y, states, layers = x, [], []
    for k in range(case.L):
        layer = keras.layers.LSTM(
            case.H,
            return_sequences=True,
            return_state=True,
            zero_output_for_mask=True,
            recurrent_initializer="zeros",  # its own needs a QR, which not every dtype has
        )
        if case.D == 2:
            layer = keras.layers.Bidirectional(layer)
        y, *last = layer(y, initial_state=start[k] if start else None, mask=mask)
        states += last
        layers.append(layer)
    model = keras.Model(inputs(x, mask, zip(*start, strict=True)), [y, *states])
    for layer, weights in zip(layers, to_keras(work.lstm), strict=True):
        layer.set_weights(weights)
    return model


def inputs(x: Any, mask: Any, state: Any) -> list[Any]:
    """What the model is given; `state` is h and c of all layers."""
    states = [] if state is None else [one for pair in zip(*state, strict=True) for one in pair]
    return [x, *([] if mask is None else [mask]), *states]


def by_direction(variables: list[Any]) -> list[Weights]:
    """The weights of each layer and direction, of a model's variables."""
    return list(zip(variables[::3], variables[1::3], variables[2::3], strict=True))
