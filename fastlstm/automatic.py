"""What ``auto`` takes: the order in which it asks the backends, and what makes it doubt one.

On the CPU ours come first, then PyTorch's own. On a GPU PyTorch's own do, and after them ours, for
what those lack; but ours are first in calls in which they were measured to be faster on such a
GPU (:mod:`fastlstm.kernels.measured`). Kernels that are not proven on a device are taken only
where the record of the machine has found them right. What was measured to be fastest there goes
before all. Without a record nothing depends on the machine but for its kind of GPU.
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
from fastlstm.kernels import measured
from fastlstm.kernels.base import Backend, Use, constant, get, registered
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
    "is_captured",
    "is_contested",
    "is_dense",
    "may_torch_be_wrong",
    "pace",
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

    def key(self, x: Tensor, spec: LayerSpec, sequences: Sequences, captured: bool = False) -> str:
        """Return the class of shapes that the call belongs to; lengths count as packed rows."""
        packed = not (sequences.batch_sizes is None and sequences.lengths is None)
        size, threads = (self.steps, self.batch), torch.get_num_threads() if x.is_cpu else 0
        how = packed, trains(x, self.weights), threads, captured
        return records.shape_class(spec, self.layers, size, x.dtype, *how)


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
    for candidate in in_order(name, x, specs, sequences, size):
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
    name: str,
    x: Tensor,
    specs: Sequence[LayerSpec],
    sequences: Sequences,
    size: Size | None,
) -> tuple[Backend, ...]:
    """Return the backends that auto asks, the ones first that were measured to be faster."""
    asked = candidates(AUTO, x)
    if may_torch_be_wrong(x, specs[0], sequences):
        asked = (*(backend for backend in asked if backend is not TORCH), TORCH)
    if size is None or torch.compiler.is_compiling() or not size.is_known:
        return asked
    captured = x.is_cuda and is_captured()
    first = _first(name, x, specs, sequences, size, captured)
    if captured and not all(backend.is_ready(specs, x, size.batch) for backend in first):
        # A graph may refuse that something is compiled, but what the calls before it took, was.
        warm = _first(name, x, specs, sequences, size, False)
        ready = (b for b in first if b in warm[:1] or b.is_ready(specs, x, size.batch))
        first = tuple(ready)
    return (*first, *(backend for backend in asked if backend not in first)) if first else asked


def may_torch_be_wrong(x: Tensor, spec: LayerSpec, sequences: Sequences) -> bool:
    """Whether PyTorch's own kernels may compute something else; of which batch is not asked."""
    if x.dtype is not torch.float16 or not x.is_cuda or sequences.batch_sizes is not None:
        return False
    plain = spec.is_lstm and not (spec.is_extended or spec.proj_size)
    return plain and measured.may_be_wrong(x.device, x.dtype, spec.hidden_size)


def _first(
    name: str,
    x: Tensor,
    specs: Sequence[LayerSpec],
    sequences: Sequences,
    size: Size,
    captured: bool,
) -> tuple[Backend, ...]:
    """Return what was measured to be faster than others: on this machine, or on a GPU like it."""
    record = records.known(x)
    if name != AUTO or record is not None:
        key = size.key(x, specs[0], sequences, captured)
        winner = record.winner(key) if record else None
        if winner is None and name == TUNED and measure is not None:
            measure(x, specs[0], sequences, size)
            record = records.known(x)
            winner = record.winner(key) if record else None
        if winner == TORCH.name and may_torch_be_wrong(x, specs[0], sequences):
            winner = None  # be it as fast as it may
        if winner is not None:
            return tuple(backend for backend in candidates(AUTO, x) if backend.name == winner)
    contested = is_contested(x) and _is_timed(sequences)
    return _faster(x, specs, sequences, size, captured) if contested else ()


_MOST = 4096  # calls of which it is kept
_found: dict[Any, tuple[Backend, ...]] = {}


def _faster(
    x: Tensor, specs: Sequence[LayerSpec], sequences: Sequences, size: Size, captured: bool
) -> tuple[Backend, ...]:
    """Return ours that were measured to be faster than PyTorch's own on a GPU like that of x."""
    use = _use(x, sequences, size, captured)
    key = x.device, measured.precision(x.dtype), specs[0], size.layers, use
    try:
        return _found[key]
    except KeyError:
        if len(_found) >= _MOST:
            _found.clear()
        ours = [b for b in candidates(AUTO, x) if first_obstacle(b, x, specs) is None]
        paces = [pace(b, x, specs, sequences, size, captured) for b in ours]
        found = tuple(b for b, each in zip(ours, paces, strict=True) if measured.is_faster(each))
        _found[key] = found
        return found


def pace(
    backend: Backend,
    x: Tensor,
    specs: Sequence[LayerSpec],
    sequences: Sequences,
    size: Size,
    captured: bool | None = None,
) -> float | None:
    """Return what :meth:`Backend.pace` says of a call; None of what was not measured at all.

    Args:
        backend: one that can compute it.
        x: the input, on a CUDA device.
        specs: the layers.
        sequences: which steps there are.
        size: how large the call is.
        captured: whether it is recorded in a CUDA graph; None for whether it is now.
    """
    if not size.layers or not size.is_known or not _is_timed(sequences):
        return None
    captured = is_captured() if captured is None else captured
    return backend.pace(specs, x, _use(x, sequences, size, captured))


def _use(x: Tensor, sequences: Sequences, size: Size, captured: bool) -> Use:
    trained, packed = trains(x, size.weights), sequences.batch_sizes is not None
    return Use(size.steps, size.batch, trained, captured, packed)


def _is_timed(sequences: Sequences) -> bool:
    """Whether calls of such rows were timed on GPUs: dense or packed ones."""
    return sequences.lengths is None and sequences.reset is None


def is_dense(sequences: Sequences) -> bool:
    """Whether all sequences have all steps, and none is reset."""
    return sequences is DENSE or all(each is None for each in sequences)


def is_contested(x: Tensor) -> bool:
    """Whether some calls of x, its device and dtype, are faster without PyTorch's own kernels.

    Who records or transforms a call gets PyTorch's: nothing like that was measured.
    """
    return (
        x.is_cuda
        and measured.is_contested(x.dtype, x.device)
        and not (_is_transformed() or _dispatch_modes() or _tracing() is not None)
        and not _has_key(_PRE_DISPATCH)
    )


_is_transformed = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack
_tracing = torch._C._get_tracing_state
_has_key = torch._C._dispatch_tls_is_dispatch_key_included
_PRE_DISPATCH = torch._C.DispatchKey.PreDispatch


def is_captured() -> bool:
    """Whether calls are recorded in a CUDA graph now."""
    return torch.cuda.is_current_stream_capturing()


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
    proven = backend.proven or all(
        [backend.is_proven(spec, x, is_dense(sequences)) for spec in specs]
    )
    if torch.compiler.is_compiling() or (size is not None and not size.is_known):
        return _doubt_of_any(backend.name, proven, x.dtype, x.device)
    record = records.known(x)
    if record is None:
        return None if proven else _unverified(backend.name)
    if proven and backend.name not in record.doubted:
        return None
    steps, batch = (size.steps, size.batch) if size else (1, 1)
    for spec in specs:
        regime = backend.regime(spec, steps, batch, x)
        for feature in features(spec, sequences, cell_states):
            verdict = record.verdict(backend.name, x.dtype, regime, feature)
            if verdict is None and not proven:
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
