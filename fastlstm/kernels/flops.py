"""How many floating-point operations an operator takes, for ``torch.utils.flop_counter``.

As in PyTorch only matrix products count: 2 operations for each row and each element of a matrix.
A formula gets the arguments of its operator by name.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

__all__ = ["add", "backward", "forward", "gradients", "tell_counters"]

Formula = Callable[[dict[str, Any]], int]
_formulas: dict[Any, Callable[..., int]] = {}


def add(operator: Any, formula: Formula) -> None:
    """Give an operator a formula."""
    names = [argument.name for argument in operator._schema.arguments]

    def count(*args: Any, out_val: Any = None, **options: Any) -> int:
        return formula(dict(zip(names, args, strict=False)) | options)

    _formulas[operator.overloadpacket] = count


def tell_counters() -> None:
    """Let PyTorch's counter know all formulas, if there is one.

    Called when somebody looks at every operator of a call: importing the counter, which imports
    Triton, would take longer than importing all of this library.
    """
    if torch.compiler.is_dynamo_compiling():  # nothing is computed then
        return
    module = sys.modules.get("torch.utils.flop_counter")
    if module is None:
        return
    registries = [module.flop_registry]
    for mode in _get_current_dispatch_mode_stack():
        if isinstance(mode, module._FlopCounterMode):  # its copy was made before
            registries.append(mode.counter.flop_registry)
    for registry in registries:
        for packet, count in _formulas.items():
            registry.setdefault(packet, count)


def forward(named: dict[str, Any]) -> int:
    """Count a forward operator."""
    x, weights, members = named["x"], named["weights"], named.get("members", 0)
    return 2 * _rows(x) * sum(_size(w) for w in weights if _is_matrix(w, members))


def backward(named: dict[str, Any]) -> int:
    """Count a backward operator, which has tensors for the gradients that are wanted."""
    lstm = "c0" in named
    wanted = named["dx"], named["dh0"], named["dweights"]
    needed = [t is not None and t != [] for t in wanted]
    return _of_gradients(named, needed, lstm and named["gates"] is None)


def gradients(named: dict[str, Any]) -> int:
    """Count ``layer_gradients``."""
    dx, dh0, _, *dweights = named["needed"]
    needed = dx, dh0 and named["h0"] is not None, any(dweights)
    return _of_gradients(named, needed, named["mode"] == "LSTM" and len(named["kept"]) < 3)


def _of_gradients(named: dict[str, Any], needed: Sequence[bool], again: bool) -> int:
    """Count the products of a backward pass; with `again` it computes the gates again."""
    x, weights, members = named["x"], named["weights"], named.get("members", 0)
    each, rows, total = len(weights) // named["directions"], _rows(x), 0
    all_of_states = needed[1] or named["batch_sizes"] is not None
    first = 0 if all_of_states else rows // x.shape[-3]
    for start in range(0, len(weights), each):
        w_ih, w_hh, *others = weights[start : start + each]
        states = _size(w_hh) * (rows - first)  # nobody wants what is before the first step
        hidden = rows * sum(_size(w) for w in others if _is_matrix(w, members))
        total += rows * _size(w_ih) * needed[0] + states + hidden
        total += (rows * (_size(w_ih) + _size(w_hh)) + hidden) * needed[2]
        total += rows * (_size(w_ih) + _size(w_hh)) * again
    return 2 * total


def _rows(x: Tensor) -> int:
    return prod(x.shape[:-1])


def _size(w: Tensor) -> int:
    return prod(w.shape[-2:])


def _is_matrix(w: Tensor, members: int) -> bool:
    return w.dim() - (members > 0) == 2
