"""Variables of TensorFlow 1 cells -> modules."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastlstm.weights.fill import (
    Direction,
    are_arrays,
    fill,
    refuse,
    shapes,
    size,
    tensor,
    type_name,
)

_VARIABLE = re.compile(r"(?:(.*?)/)??(kernel|bias|w_[ifo]_diag|projection/kernel)(?::0)?")
_DIAGONALS = ("w_i_diag", "w_f_diag", "w_o_diag")
Variables = dict[str, Tensor]


def from_tensorflow(
    source: Any,
    into: nn.Module | None = None,
    *,
    forget_bias: float = 1.0,
    scope: str = "",
    **options: Any,
) -> Any:
    """A module with the weights of TensorFlow 1 cells.

    >>> lstm = fastlstm.weights.from_tensorflow([kernel, bias])
    >>> reader = tf.train.load_checkpoint(path)
    >>> variables = {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}
    >>> lstm = fastlstm.weights.from_tensorflow(variables, scope="encoder/rnn")

    In the name of a variable ``cell_0``, ``cell_1``, ... is the layer (``MultiRNNCell``,
    ``stack_bidirectional_dynamic_rnn``) and ``fw`` or ``bw`` the direction. What an optimizer
    added (``kernel/Adam``) and what is outside of cells is passed over.

    A checkpoint does not tell ``forget_bias``, nor whether the cell had another activation, a
    ``cell_clip`` or a ``proj_clip``, none of which a module has.

    Args:
        source: ``[kernel, bias]`` of one cell, or arrays by their names: ``kernel [I+P, 4H]`` and
            ``bias [4H]``; with peepholes ``w_i_diag``, ``w_f_diag`` and ``w_o_diag [H]``; with a
            projection ``projection/kernel [H, P]``. A ``basic_rnn_cell`` has ``[I+H, H]`` and
            ``[H]``. Arrays may be NumPy's, tensors, or variables.
        into: the module to fill, which keeps its dtype and device; None for a new
            ``fastlstm.LSTM``, or ``fastlstm.RNN`` for cells named ``basic_rnn_cell``.
        forget_bias: the argument of that name of the cells; 0 for ``CudnnCompatibleLSTMCell``.
        scope: the part of the names in which to look, up to a slash.
        options: of a new module: ``dropout``, ``device``, ``dtype`` (else the kernel's), ...;
            ``batch_first`` is True unless given, as in ``dynamic_rnn``.

    Returns:
        The new module, or into.

    Raises:
        TypeError: source is none of the above, or options are given with into.
        ValueError: no cell, two for the same place, a variable that is missing or that an LSTM
            does not have, a shape that does not fit. The module is then left as it was.
    """
    if are_arrays(source):
        if len(source) != 2:
            refuse("from_tensorflow", f"expected [kernel, bias], got arrays {shapes(source)}")
        source = dict(zip(("kernel", "bias"), source, strict=True))
    if not isinstance(source, Mapping):
        raise TypeError(
            "from_tensorflow: expected [kernel, bias], or a mapping of names to arrays, got "
            f"{type_name(source)}"
        )
    layers = [
        [_direction(path, variables, into, forget_bias) for path, variables in directions]
        for directions in _cells(source, scope.strip("/"))
    ]
    return fill("from_tensorflow", layers, into, options)


def _cells(source: Mapping[str, Any], scope: str) -> list[list[tuple[str, Variables]]]:
    """For every layer, for every direction, the path of the cell and its variables."""
    where = f"from_tensorflow, scope {scope!r}" if scope else "from_tensorflow"
    prefix = f"{scope}/" if scope else ""
    cells: dict[str, Variables] = {}
    others = []
    for name, array in source.items():
        if not name.startswith(prefix):
            continue
        match = _VARIABLE.fullmatch(name)
        if match is None:
            others.append(name)
        else:
            cells.setdefault(match[1] or "", {})[match[2]] = tensor(array)
    if not cells:
        refuse(where, f"found no kernel and bias among {sorted(source)}")
    for path, variables in cells.items():
        inside = f"{path}/" if path else ""
        slots = tuple(f"{inside}{variable}/" for variable in variables)
        for name in others:
            if name.startswith(inside) and not name.startswith(slots):
                advice = "use from_keras" if "recurrent_kernel" in name else "choose with scope="
                refuse(where, f"cells of TensorFlow 1 have no {name}: {advice}")
    places: dict[tuple[int, int], str] = {}
    for path in cells:
        parts = f"{path}/".removeprefix(prefix).split("/")
        numbers = [int(part[5:]) for part in parts if re.fullmatch(r"cell_\d+", part)]
        place = (numbers[-1] if numbers else 0, int("bw" in parts))
        if place in places:
            refuse(
                where,
                f"{places[place]!r} and {path!r} are both layer {place[0]} "
                f"{'backward' if place[1] else 'forward'}: choose with scope=",
            )
        places[place] = path
    L, D = (max(numbers) + 1 for numbers in zip(*places, strict=True))
    if len(places) != L * D:
        refuse(where, f"expected {L} layers x {D} directions, got {sorted(cells)}")
    if L > 1 and D > 1 and any(re.search(r"(^|/)(fw|bw)/(.*/)?cell_\d", path) for path in cells):
        refuse(
            where,
            "each direction is a stack of its own, but the layers of an LSTM read both: convert "
            "them one by one with scope=",
        )
    return [[(places[k, d], cells[places[k, d]]) for d in range(D)] for k in range(L)]


def _direction(
    path: str, variables: Variables, into: nn.Module | None, forget_bias: float
) -> Direction:
    where = f"from_tensorflow, {path!r}" if path else "from_tensorflow"
    sizes = {name: size(array) for name, array in variables.items()}
    if "gru_cell" in path:
        refuse(where, "expected an LSTM or RNN, this is a GRU")
    if "kernel" not in variables or "bias" not in variables:
        refuse(where, f"expected a kernel and a bias, got {sizes}")
    kernel, bias = variables["kernel"], variables["bias"]
    projection = variables.get("projection/kernel")
    simple = path.endswith("basic_rnn_cell") or hasattr(into, "nonlinearity")
    gates = 1 if simple else 4
    H, rest = divmod(bias.numel(), gates)
    P = projection.shape[-1] if projection is not None else H
    if (
        rest
        or kernel.dim() != 2
        or kernel.shape[0] <= P
        or kernel.shape[1] != gates * H
        or bias.shape != (gates * H,)
        or (projection is not None and projection.shape != (H, P))
    ):
        expected = "[I+H, H] and bias [H]" if simple else "[I+P, 4H] and bias [4H]"
        refuse(where, f"expected a kernel {expected}, got {sizes}")
    x_rows, h_rows = kernel.split([kernel.shape[0] - P, P])
    if not simple:
        x_rows, h_rows, bias = map(_gates_of_torch, (x_rows, h_rows, bias))
        bias[H : 2 * H] += forget_bias
    weights = {"weight_ih": x_rows.t(), "weight_hh": h_rows.t(), "bias_ih": bias}
    if projection is not None:
        weights["weight_hr"] = projection.t()
    diagonals = [variables[name] for name in _DIAGONALS if name in variables]
    if diagonals:
        if simple or [diagonal.shape for diagonal in diagonals] != [(H,)] * 3:
            refuse(where, f"expected {', '.join(_DIAGONALS)} [{H}], got {sizes}")
        weights["weight_ch"] = torch.cat(diagonals)
    return Direction(gates, weights)


def _gates_of_torch(tensor: Tensor) -> Tensor:
    i, j, f, o = tensor.chunk(4, -1)
    return torch.cat([i, f, j, o], -1)
