"""What ``auto`` takes: the order in which it asks the backends, and what makes it doubt one.

Ours that are proven on such a device come first, then PyTorch's own, then ours that are not: those
are taken only where the record of the machine has found them right. What was measured to be
fastest there goes before all. Without a record nothing depends on the machine.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlstm import kernels  # noqa: F401 (registers the backends)
from fastlstm import record as records
from fastlstm.kernels.base import Backend, constant, get, registered
from fastlstm.kernels.pytorch import TORCH
from fastlstm.spec import DENSE, LayerSpec, Sequences

__all__ = [
    "AUTO",
    "AUTOMATIC",
    "CHECKED",
    "TUNED",
    "Size",
    "candidates",
    "doubt",
    "features",
    "first_obstacle",
    "first_without_doubt",
    "in_order",
    "trains",
]

CHECKED = os.environ.get("FASTLSTM_CHECK") == "1"  # see fastlstm.proof.checking
AUTO = "auto"
TUNED = "tuned"
AUTOMATIC = (AUTO, TUNED)


def candidates(name: str, x: Tensor) -> tuple[Backend, ...]:
    """Return the backends that a choice stands for, the best first.

    Args:
        name: of a backend, or "auto".
        x: the input; only its device matters.
    """
    if name not in AUTOMATIC:
        return (get(name),)
    # Asking a tensor whether it is on the CPU takes a third of the time of asking for its device.
    return _ON_CPU if x.is_cpu else _automatic(x.device.type)


@cache
def _automatic(device: str) -> tuple[Backend, ...]:
    """Ours that are proven on such devices, then PyTorch's own, then ours that are not."""
    ours = [backend for backend in registered() if device in backend.devices]
    proven = [backend for backend in ours if backend.proven]
    return (*proven, TORCH, *(backend for backend in ours if not backend.proven))


_ON_CPU = _automatic("cpu")


class Size(NamedTuple):
    """How large a call is."""

    layers: int  # 0 of a cell
    steps: int
    batch: int
    weights: Sequence[Tensor]

    @property
    def is_known(self) -> bool:
        """Whether T and B are numbers: what records a call may have made values of them."""
        return type(self.steps) is int and type(self.batch) is int

    def key(self, x: Tensor, spec: LayerSpec, sequences: Sequences) -> str:
        """Return the class of shapes that the call belongs to; lengths count as packed rows."""
        dense = sequences.batch_sizes is None and sequences.lengths is None
        training = trains(x, self.weights)
        size, threads = (self.steps, self.batch), torch.get_num_threads() if x.is_cpu else 0
        return records.shape_class(spec, self.layers, size, x.dtype, not dense, training, threads)


def trains(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether a backward pass may follow a call of x."""
    return torch.is_grad_enabled() and (x.requires_grad or any([w.requires_grad for w in weights]))


def first_without_doubt(
    name: str,
    x: Tensor,
    specs: Sequence[LayerSpec],
    sequences: Sequences = DENSE,
    cell_states: bool = False,
    size: Size | None = None,
) -> Backend | None:
    """Return the backend that auto takes; None where the reference is left.

    Args:
        name: AUTO or TUNED.
        x: the input of the first layer.
        specs: the layers.
        sequences: which steps there are, as the caller passed them.
        cell_states: whether c of every step is asked for.
        size: how large the call is, if that is known.
    """
    for candidate in in_order(name, x, specs[0], sequences, size):
        if (
            first_obstacle(candidate, x, specs, sequences, cell_states) is None
            and doubt(candidate, x, specs, sequences, cell_states, size) is None
        ):
            return candidate
    return None


measure: Any = None
"""``measure(x, spec, sequences, size)``: what :mod:`fastlstm.proof` puts here times the backends
for such a call and stores what it finds."""


def in_order(
    name: str, x: Tensor, spec: LayerSpec, sequences: Sequences, size: Size | None
) -> tuple[Backend, ...]:
    """Return the backends that auto asks, the one first that was measured to be fastest."""
    asked = candidates(AUTO, x)
    if size is None or torch.compiler.is_compiling() or not size.is_known:
        return asked
    record = records.known(x)
    if name == AUTO and record is None:
        return asked
    key = size.key(x, spec, sequences)
    winner = record.winner(key) if record else None
    if winner is None and name == TUNED and measure is not None:
        measure(x, spec, sequences, size)
        record = records.known(x)
        winner = record.winner(key) if record else None
    if winner is None or winner == asked[0].name:
        return asked
    first = tuple(backend for backend in asked if backend.name == winner)
    return (*first, *(backend for backend in asked if backend not in first))


def first_obstacle(
    backend: Backend,
    x: Tensor,
    specs: Sequence[LayerSpec],
    sequences: Sequences = DENSE,
    cell_states: bool = False,
) -> str | None:
    """Return why a backend cannot compute these layers in such a call, None if it can."""
    for spec in specs:
        obstacle = backend.obstacle(spec, x)
        if obstacle is not None:
            return obstacle
    if sequences is DENSE and not cell_states:
        return None
    return backend.lacks(x, sequences, cell_states)


def doubt(
    backend: Backend,
    x: Tensor,
    specs: Sequence[LayerSpec],
    sequences: Sequences = DENSE,
    cell_states: bool = False,
    size: Size | None = None,
) -> str | None:
    """Return why ``auto`` does not take a backend that can compute a call, None if it does."""
    if torch.compiler.is_compiling() or (size is not None and not size.is_known):
        return _doubt_of_any(backend.name, backend.proven, x.dtype, x.device)
    record = records.known(x)
    if record is None:
        return None if backend.proven else _unverified(backend.name)
    if backend.proven and backend.name not in record.doubted:
        return None
    steps, batch = (size.steps, size.batch) if size else (1, 1)
    for spec in specs:
        regime = backend.regime(spec, steps, batch, x)
        for feature in features(spec, sequences, cell_states):
            verdict = record.verdict(backend.name, x.dtype, regime, feature)
            if verdict is None and not backend.proven:
                return f"{_unverified(backend.name)} ({feature}, {regime})"
            if verdict not in (None, records.OK):
                return f"verify has found the {backend.name} kernels wrong here: {verdict}"
    return None


def _unverified(name: str) -> str:
    return (
        f"the {name} kernels have not been verified on this machine, which "
        "`python -m fastlstm verify` would do"
    )


@constant
def _doubt_of_any(name: str, proven: bool, dtype: torch.dtype, device: torch.device) -> str | None:
    """The same where code is recorded for any size: whatever was looked at has to be right."""
    record = records.known(torch.empty(0, device=device))
    verdicts = record.about(name, dtype) if record else []
    wrong = [verdict for verdict in verdicts if verdict != records.OK]
    if wrong:
        return f"verify has found the {name} kernels wrong here: {wrong[0]}"
    return None if proven or verdicts else _unverified(name)


def features(spec: LayerSpec, sequences: Sequences, cell_states: bool) -> list[str]:
    """Return what of a call is verified apart, by the names of fastlstm.proof."""
    asked = {
        "packed": sequences.batch_sizes is not None,
        "lengths": sequences.lengths is not None,
        "reset": sequences.reset is not None,
        "cell states": cell_states,
        "projection": spec.proj_size > 0,
        "peephole": spec.peephole,
        "layer_norm": spec.layer_norm,
        "zoneout": any(spec.zoneout),
        "recurrent_dropout": spec.recurrent_dropout,
    }
    first = "plain" if spec.is_lstm else spec.mode.lower()
    return [first, *(name for name, wanted in asked.items() if wanted)]
