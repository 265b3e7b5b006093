"""Keras layers or their ``get_weights()`` -> modules, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastlstm.weights.fill import (
    PLAIN,
    Direction,
    are_arrays,
    fill,
    is_optional,
    refuse,
    shapes,
    size,
    suffixes,
    tensor,
    type_name,
)


def from_keras(source: Any, into: nn.Module | None = None, **options: Any) -> Any:
    """A module with the weights of Keras layers.

    >>> lstm = fastlstm.weights.from_keras(layer)  # LSTM, SimpleRNN, Bidirectional
    >>> lstm = fastlstm.weights.from_keras([first, second])  # a stack
    >>> lstm = fastlstm.weights.from_keras(layer.get_weights())
    >>> fastlstm.weights.from_keras(layer, into=model.encoder)

    A layer is asked what it computes, and refused if a module cannot: other activations,
    ``go_backwards``, directions that are not concatenated. Arrays cannot be asked. Dropout is no
    weight and does not come along. What Keras calls a mask is ``lengths``, ``stateful`` is hx.

    Args:
        source: one layer, or a list of layers of which each reads the one before. A layer is

            - a built ``LSTM``, ``SimpleRNN``, ``RNN`` of their cells, ``Bidirectional`` of one
              of these, or a cell by itself;
            - or its ``get_weights()``: ``kernel [I, 4H]``, ``recurrent_kernel [H, 4H]`` and, if
              it has one, ``bias [4H]``, then the same of the backward direction; ``[I, H]``,
              ``[H, H]``, ``[H]`` for ``SimpleRNN``. A bias ``[2, 4H]`` is added up. One of
              ``[8H]`` is that of Keras 2's ``CuDNNLSTM``, whose kernels are read accordingly.

            Arrays may be NumPy's, tensors, or variables of Keras.
        into: the module to fill, which keeps its dtype and device; None for a new
            ``fastlstm.LSTM``, or ``fastlstm.RNN`` for ``SimpleRNN``.
        options: of a new module: ``dropout``, ``device``, ``dtype`` (else the kernel's), ...;
            ``batch_first`` is True unless given, as in Keras.

    Returns:
        The new module, or into.

    Raises:
        TypeError: source is none of the above, or options are given with into.
        ValueError: a shape, a number of arrays, an activation, ... that does not fit, layers that
            do not fit together, or not into the module. The module is then left as it was.
    """
    single = not isinstance(source, list | tuple) or are_arrays(source)
    layers: list[list[Direction]] = []
    for item in [source] if single else source:
        layers += _layers(item, "from_keras" if single else f"from_keras, layer {len(layers)}")
    return fill("from_keras", layers, into, options)


def to_keras(module: nn.Module) -> list[list[np.ndarray[Any, Any]]]:
    """The weights of a module as Keras layers take them.

    >>> layer.set_weights(fastlstm.weights.to_keras(lstm)[0])

    Args:
        module: an LSTM, RNN or cell of this library or of ``torch.nn``.

    Returns:
        For each of the L layers what its ``set_weights`` takes: ``kernel [I, 4H]``,
        ``recurrent_kernel [H, 4H]`` and, if there are biases, their sum ``[4H]``; then the same
        of the backward direction, for a ``Bidirectional``. ``[I, H]``, ``[H, H]`` and ``[H]`` for
        an RNN; where that is one of relu the Keras layer has to be so too. Arrays are copies of
        the module's dtype, but float32 for bfloat16, which NumPy does not have.

    Raises:
        TypeError: module has no parameters with the names of an LSTM.
        ValueError: it has weights that Keras does not know: a projection, layer normalisation,
            peepholes that are not zero.
    """
    layers = suffixes("to_keras", module)
    known = {stem + suffix for layer in layers for suffix in layer for stem in PLAIN}
    for name, parameter in module.named_parameters(recurse=False):
        if name not in known and not (is_optional(name) and not parameter.any()):
            refuse("to_keras", f"a Keras layer has nothing like {name} {size(parameter)}")
    result = []
    for layer in layers:
        tensors: list[Tensor] = []
        for suffix in layer:
            w_ih, w_hh, *biases = (
                getattr(module, stem + suffix).detach()
                for stem in PLAIN
                if getattr(module, stem + suffix, None) is not None
            )
            tensors += [w_ih.t(), w_hh.t(), *([biases[0] + biases[1]] if biases else [])]
        result.append([_numpy(tensor) for tensor in tensors])
    return result


def _numpy(tensor: Tensor) -> np.ndarray[Any, Any]:
    tensor = tensor.float() if tensor.dtype is torch.bfloat16 else tensor
    return tensor.cpu().numpy().copy()


def _layers(source: Any, where: str, backwards: bool = False) -> list[list[Direction]]:
    """The layers of a Keras layer, which are several in an RNN of several cells."""
    if are_arrays(source):
        arrays = list(source)
        if len(arrays) not in (2, 3, 4, 6):
            refuse(
                where,
                "expected kernel, recurrent_kernel and perhaps bias, of one direction or of two, "
                f"got {len(arrays)} arrays {shapes(arrays)}; a list of layers has a list for each",
            )
        each = len(arrays) // (1 if len(arrays) < 4 else 2)
        starts = range(0, len(arrays), each)
        return [[_direction(arrays[k : k + each], where) for k in starts]]
    if hasattr(source, "forward_layer"):
        if source.merge_mode != "concat":
            refuse(
                where,
                f"the outputs of both directions are merged by {source.merge_mode!r}, expected "
                "'concat'; get_weights() gives the weights alone",
            )
        forward = _layers(source.forward_layer, f"{where}, forward")
        backward = _layers(source.backward_layer, f"{where}, backward", backwards=True)
        if len(forward) > 1:
            refuse(where, "each direction is a stack of its own: convert them one by one")
        return [forward[0] + backward[0]]
    cell = getattr(source, "cell", source)
    cells = getattr(cell, "cells", [cell])
    if not all(hasattr(cell, "recurrent_initializer") for cell in cells):
        raise TypeError(
            f"{where}: expected a recurrent layer of Keras, or its get_weights(), got "
            f"{type_name(source)}"
        )
    if bool(getattr(source, "go_backwards", backwards)) is not backwards:
        refuse(
            where,
            f"this {type_name(source)} has go_backwards={not backwards}; get_weights() gives the "
            "weights alone",
        )
    return [[_cell(cell, where)] for cell in cells]


def _cell(cell: Any, where: str) -> Direction:
    arrays = [getattr(cell, name, None) for name in ("kernel", "recurrent_kernel", "bias")]
    if arrays[0] is None or arrays[1] is None:
        refuse(where, f"this {type_name(cell)} has no kernels: build it, or call it once")
    direction = _direction([array for array in arrays if array is not None], where)
    activation, recurrent = (
        getattr(function, "__name__", str(function))
        for function in (cell.activation, getattr(cell, "recurrent_activation", None))
    )
    lstm = direction.gates == 4
    if activation not in (("tanh",) if lstm else ("tanh", "relu")):
        expected = "tanh" if lstm else "tanh or relu"
        refuse(where, f"expected activation {expected}, this {type_name(cell)} has {activation}")
    if lstm and recurrent != "sigmoid":
        refuse(
            where, f"expected recurrent_activation sigmoid, this {type_name(cell)} has {recurrent}"
        )
    return direction._replace(activation=activation)


def _direction(arrays: Sequence[Any], where: str) -> Direction:
    kernel, recurrent, *biases = map(tensor, arrays)
    found = shapes(arrays)
    if kernel.dim() != 2 or recurrent.dim() != 2:
        refuse(where, f"expected kernel [I, 4H] and recurrent_kernel [H, 4H], got {found}")
    H, columns = recurrent.shape
    gates = columns // max(H, 1)
    if columns == 3 * H:
        refuse(where, f"recurrent_kernel {size(recurrent)} is that of a GRU, expected an LSTM's")
    if gates not in (1, 4) or columns != gates * H or kernel.shape[1] != columns:
        refuse(
            where,
            "expected kernel [I, 4H] and recurrent_kernel [H, 4H] of an LSTM, or [I, H] and "
            f"[H, H] of a SimpleRNN, got {found}",
        )
    weights = {"weight_ih": kernel.t(), "weight_hh": recurrent.t()}
    if biases:
        bias = biases[0]
        if gates == 4 and bias.shape == (8 * H,):
            # CuDNNLSTM hands its kernels to cuDNN as they lie in memory, a gate at a time, and
            # cuDNN reads [H, I] there (convert_lstm_weights in keras/saving/hdf5_format.py).
            for name, matrix in ("weight_ih", kernel), ("weight_hh", recurrent):
                weights[name] = torch.cat([w.reshape(H, -1) for w in matrix.chunk(4, 1)])
            bias = bias.view(2, columns)
        if bias.shape == (2, columns):
            bias = bias.sum(0)
        if bias.shape != (columns,):
            refuse(where, f"expected a bias [{columns}] or [2, {columns}], got {found}")
        weights["bias_ih"] = bias
    return Direction(gates, weights)
