"""What a call would run, and why, without running it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fastlstm import record
from fastlstm.automatic import Size, doubt, first_obstacle, in_order, is_captured, pace
from fastlstm.backends import choice, higher_derivative, is_automatic, select
from fastlstm.kernels import measured
from fastlstm.kernels.base import Backend
from fastlstm.kernels.pytorch import TORCH
from fastlstm.kernels.reference import REFERENCE
from fastlstm.modules import LSTM, RNN, LSTMCell
from fastlstm.spec import LayerSpec, Sequences

__all__ = ["Explanation", "explain"]


@dataclass(frozen=True)
class Explanation:
    """What one call would run: the backend, its kernel, its plan for each layer, and why."""

    backend: str
    kernel: str
    plan: tuple[str, ...]
    reason: str

    def __str__(self) -> str:
        lines = [f"backend  {self.backend}", f"kernel   {self.kernel}"]
        lines += [f"layer {k}  {plan}" for k, plan in enumerate(self.plan)]
        return "\n".join([*lines, f"reason   {self.reason}"])


def explain(
    module: nn.Module, x: Tensor | PackedSequence, hx: Any = None, **options: Any
) -> Explanation:
    """Say what ``module(x, hx, **options)`` would run, without running it.

    Args:
        module: a ``fastlstm.LSTM``, ``LSTMCell`` or ``RNN``.
        x: the input of the call.
        hx: accepted so that a call can be pasted in; it does not change the choice.
        options: the other arguments of the call, such as ``lengths``.

    Returns:
        An object with ``backend``, ``kernel``, ``plan`` (a line for each layer) and ``reason``;
        it prints as a few lines.

    Raises:
        TypeError: module is not one of this library's.
        RuntimeError: x has another number of features than the module takes, or the backend in
            use cannot compute this call.
    """
    if not isinstance(module, LSTM | LSTMCell | RNN):
        raise TypeError(
            f"explain() takes a fastlstm.LSTM, LSTMCell or RNN, got {type(module).__qualname__}; "
            "convert it with from_torch() or fastlstm.accelerate()"
        )
    data, sizes = (x.data, x.batch_sizes) if isinstance(x, PackedSequence) else (x, None)
    specs = module.specs()
    if data.shape[-1] != specs[0].input_size:
        raise RuntimeError(
            f"explain(): expected an input of {specs[0].input_size} features, as the module "
            f"takes, got {tuple(data.shape)}"
        )
    T, B = _steps_and_batch(module, x)
    sequences = Sequences(sizes, options.get("lengths"), options.get("reset"))
    layers = 0 if isinstance(module, LSTMCell) else module.num_layers
    size = Size(layers, T, B, tuple(module.parameters()))
    call = data, specs, sequences, bool(options.get("return_cell_states")), size
    backend = select(*call)
    plan = tuple(backend.describe(spec, T, B, data) for spec in call[1])
    return Explanation(backend.name, backend.kernel(), plan, _reason(backend, *call))


def _reason(
    backend: Backend,
    x: Tensor,
    specs: Sequence[LayerSpec],
    sequences: Sequences,
    cell_states: bool,
    size: Size,
) -> str:
    """Why that backend computes the layers, and in the case of auto what would change that."""
    derivative = higher_derivative()
    if backend is REFERENCE and derivative is not None:
        return f"{derivative}, which is the reference's on every backend"
    if not is_automatic():
        return f'backend("{choice.name}") asks for it'
    call = specs, sequences, cell_states
    parts = []
    times = _measured(x, specs[0], sequences, size)
    if backend is not REFERENCE:
        where = "a CUDA device" if x.is_cuda else "the CPU" if x.is_cpu else x.device.type
        parts = [f"{x.dtype} on {where}", *times]
    compared = x.is_cuda and not times and first_obstacle(TORCH, x, *call) is None
    for other in in_order(choice.name, x, specs, sequences, size):
        obstacle = first_obstacle(other, x, *call) or doubt(other, x, *call, size)
        if obstacle is not None:
            parts.append(obstacle)
        elif compared and other is not TORCH and backend in (other, TORCH):
            parts.append(measured.said_of(other.name, pace(other, x, specs, sequences, size)))
    return f"{choice.name}: {'; '.join(parts)}"


def _measured(x: Tensor, spec: LayerSpec, sequences: Sequences, size: Size) -> list[str]:
    """What the record of this machine says of such a call, if anything."""
    found = record.known(x)
    captured = x.is_cuda and is_captured()
    times = found.times.get(size.key(x, spec, sequences, captured)) if found else None
    if not times:
        return []
    best = min(times.values())
    told = ", ".join(
        f"{name} {value:.4g} µs ({value / best:.2f}x)" for name, value in times.items()
    )
    return [f"the record of this machine says {told}"]


def _steps_and_batch(module: nn.Module, x: Tensor | PackedSequence) -> tuple[int, int]:
    """T and B of a call."""
    if isinstance(x, PackedSequence):
        return len(x.batch_sizes), int(x.batch_sizes[0])
    if isinstance(module, LSTMCell):
        return 1, x.shape[0] if x.dim() == 2 else 1
    if x.dim() == 2:
        return x.shape[0], 1
    return (x.shape[1], x.shape[0]) if module.batch_first else (x.shape[0], x.shape[1])
