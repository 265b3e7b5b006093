"""Weights in the terms of PyTorch -> the parameters of a module, found by their names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from fastlstm import modules

PLAIN = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


class Direction(NamedTuple):
    """One direction of a layer, in the terms of PyTorch."""

    gates: int  # 4; 1 for nn.RNN
    weights: dict[str, Tensor]  # by the names that nn.LSTMCell would give them
    activation: str | None = None  # None for arrays, which do not tell


def suffixes(where: str, module: nn.Module) -> list[list[str]]:
    """How the names of each direction of each layer end."""
    if hasattr(module, "weight_ih") and not isinstance(module, nn.GRUCell):
        return [[""]]
    ends = ("", "_reverse")[: 1 + hasattr(module, "weight_ih_l0_reverse")]
    layers: list[list[str]] = []
    while hasattr(module, f"weight_ih_l{len(layers)}"):
        layers.append([f"_l{len(layers)}{end}" for end in ends])
    if not layers or isinstance(module, nn.GRU):
        raise TypeError(
            f"{where}: expected a module with the parameters of an LSTM or RNN, got "
            f"{type_name(module)}"
        )
    return layers


def is_optional(name: str) -> bool:
    """Whether a parameter of this name is without effect where it is zero."""
    return name.startswith(("bias_", "weight_ch"))


def fill(
    where: str, layers: list[list[Direction]], into: nn.Module | None, options: dict[str, Any]
) -> nn.Module:
    """into, or a new module made with options, with the weights of these layers."""
    _check_alike(where, layers)
    first = layers[0][0]
    if into is None:
        into = _new(layers, options)
    elif options:
        raise TypeError(f"{where}: {', '.join(options)} is for new modules, got into={into}")
    nonlinearity = getattr(into, "nonlinearity", first.activation)
    if first.activation not in (None, nonlinearity):
        refuse(where, f"activation {first.activation} does not fit into {into}")
    ends = suffixes(where, into)
    if [len(layer) for layer in ends] != [len(layer) for layer in layers]:
        refuse(
            where,
            f"{len(layers)} layers x {len(layers[0])} directions do not fit into {len(ends)} "
            f"layers x {len(ends[0])} directions of {into}",
        )
    values = {
        stem + suffix: value
        for layer, of_layer in zip(layers, ends, strict=True)
        for direction, suffix in zip(layer, of_layer, strict=True)
        for stem, value in direction.weights.items()
    }
    _check_fit(where, values, into)
    with torch.no_grad():
        for name, parameter in into.named_parameters(recurse=False):
            parameter.copy_(values[name]) if name in values else parameter.zero_()
    return into


def _check_alike(where: str, layers: list[list[Direction]]) -> None:
    """That the layers can be those of one module."""
    kinds = {
        (len(layer), d.gates, _hidden(d), d.activation, "weight_hr" in d.weights)
        for layer in layers
        for d in layer
    }
    if len(kinds) != 1:
        found = "; ".join(
            " and ".join(f"{_hidden(d)} units ({', '.join(d.weights)})" for d in layer)
            for layer in layers
        )
        refuse(
            where,
            "one module has layers and directions of one size and activation, got "
            f"{found or 'no layer'}: convert them one by one",
        )


def _check_fit(where: str, values: dict[str, Tensor], into: nn.Module) -> None:
    """That every value has its parameter in the module, and every parameter its value."""
    targets = dict(into.named_parameters(recurse=False))
    for name, value in values.items():
        if name not in targets and (value.any() or not is_optional(name)):
            advice = ": remove its parametrization first" if hasattr(into, name) else ""
            refuse(where, f"{into} has no parameter {name}, got {size(value)} for it{advice}")
        if name in targets and value.shape != targets[name].shape:
            refuse(where, f"{name} of {into} is {size(targets[name])}, got {size(value)} for it")
    for name, parameter in targets.items():
        if name not in values and not is_optional(name):
            refuse(where, f"{into} has a {name} {size(parameter)}, got nothing for it")


def _new(layers: list[list[Direction]], options: dict[str, Any]) -> nn.Module:
    first = layers[0][0]
    weights = first.weights
    names = {name for layer in layers for direction in layer for name in direction.weights}
    described: dict[str, Any] = {
        "num_layers": len(layers),
        "bias": "bias_ih" in names,
        "batch_first": True,
        "bidirectional": len(layers[0]) == 2,
        "dtype": weights["weight_ih"].dtype,
    }
    if "weight_hr" in names:
        described["proj_size"] = weights["weight_hr"].shape[0]
    if "weight_ch" in names:
        described["peephole"] = True
    if first.activation and first.gates == 1:
        described["nonlinearity"] = first.activation
    kind: Any = modules.RNN if first.gates == 1 else modules.LSTM
    return kind(weights["weight_ih"].shape[1], _hidden(first), **described | options)


def _hidden(direction: Direction) -> int:
    return direction.weights["weight_ih"].shape[0] // direction.gates


def are_arrays(source: Any) -> bool:
    """Whether source is a list of arrays, and not one of layers."""
    return isinstance(source, list | tuple) and all(hasattr(item, "shape") for item in source)


def tensor(value: Any) -> Tensor:
    """A copy of an array, a tensor, or a variable of Keras or TensorFlow."""
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    array = np.asarray(value.numpy() if hasattr(value, "numpy") else value)
    if array.dtype.kind != "f":  # bfloat16 comes from a package that PyTorch does not know
        array = array.astype(np.float32)
    return torch.tensor(array)


def size(value: Any) -> list[int]:
    return list(value.shape)


def shapes(arrays: Sequence[Any]) -> str:
    return ", ".join(str(size(array)) for array in arrays)


def type_name(value: Any) -> str:
    return type(value).__name__


def refuse(where: str, why: str) -> NoReturn:
    raise ValueError(f"{where}: {why}")
