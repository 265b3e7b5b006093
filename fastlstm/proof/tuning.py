"""``fastlstm.tune``: time the backends for a shape, and keep the fastest for ``auto``."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastlstm import automatic, record
from fastlstm.automatic import AUTO, Size, candidates, doubt, first_obstacle, may_torch_be_wrong
from fastlstm.backends import backend, choice
from fastlstm.kernels.base import Backend
from fastlstm.kernels.pytorch import TORCH
from fastlstm.layer.whole import is_whole
from fastlstm.modules import LSTM, RNN, LSTMCell
from fastlstm.record import Record
from fastlstm.spec import DENSE, LayerSpec, Sequences

__all__ = ["Timing", "Tuning", "tune"]

_TURNS = 2
_ROUNDS = 5  # of a turn
_TRIES = 4  # so many times as many turns where it is not clear
_CLEAR = 0.9  # of its time is less than what auto takes anyway needs: that is the best
_PATIENCE = 5.0  # seconds after which nobody tries again
_SECONDS = 0.02  # of one measurement
_CELL_STEPS = 8  # of a loop over a cell, which is how cells are used
_MARGIN = 0.97  # of its time counts for what auto takes anyway: closer may be chance


class Timing(NamedTuple):
    """Microseconds of the candidates for one class of shapes, first the one that auto takes."""

    shape: str
    times: dict[str, float]

    def __str__(self) -> str:
        best = min(self.times.values())
        told = (
            f"{name} {value:.4g} µs ({value / best:.2f}x)" for name, value in self.times.items()
        )
        return f"{self.shape}: {', '.join(told)}"


class Tuning(list[Timing]):
    """What was measured; prints as a line for each class of shapes."""

    note: str = ""

    def __repr__(self) -> str:
        return "\n".join([*map(str, self), *filter(None, [self.note])])


def tune(
    module: LSTM | LSTMCell | RNN,
    x: Tensor | PackedSequence,
    hx: Any = None,
    *,
    lengths: Tensor | None = None,
    training: bool | None = None,
    keep: bool = True,
) -> Tuning:
    """Time the backends for a call, and keep the times for ``auto``, which then obeys them.

    Candidates are PyTorch's own kernels and those of this library that are proven on the device,
    by the tests or by :func:`fastlstm.verify`. They take turns, and what counts is the lower
    quartile: other processes slow some calls down. What auto takes anyway keeps its place unless
    another one is faster by more than 3%. T and B stand for all that need as many powers of two.
    On CUDA devices inference is also captured in a graph, where that is possible: calls that users
    capture have times of their own.

    Args:
        module: what is called. Its parameters keep their values and gradients.
        x: an input of the shape that matters.
        hx: the states, or None.
        lengths: as of the call.
        training: whether a backward pass follows; None for both.
        keep: whether to store the times in the record of the machine.

    Returns:
        A list of timings that prints as a table; empty if there is only one candidate.

    Raises:
        TypeError: module is not one of this library's.
    """
    if not isinstance(module, LSTM | LSTMCell | RNN):
        raise TypeError(
            f"tune() takes a fastlstm.LSTM, LSTMCell or RNN, got {type(module).__qualname__}; "
            "convert it with from_torch() or fastlstm.accelerate()"
        )
    data = x.data if isinstance(x, PackedSequence) else x
    sizes = x.batch_sizes if isinstance(x, PackedSequence) else None
    sequences = DENSE if sizes is None and lengths is None else Sequences(sizes, lengths)
    layers = 0 if isinstance(module, LSTMCell) else module.num_layers
    size = Size(layers, *_steps_and_batch(module, x), tuple(module.parameters()))
    specs = module.specs()
    names = [b.name for b in _candidates(data, specs, sequences, size)]
    found = Tuning()
    for trains in (False, True) if training is None else (training,):
        if len(names) < 2:
            continue
        call = _call(module, x, hx, lengths, trains)
        like = data.detach().requires_grad_(trains)
        with torch.set_grad_enabled(trains), _own_chance(data):
            for captured, runs in (
                (False, _eager(names, call)),
                (True, _captured(names, call, data.device)),
            ):
                if runs:
                    key = size.key(like, specs[0], sequences, captured)
                    found.append(Timing(key, _race(runs, data.device)))
    if keep and found:
        found.note = _store(data.device, found)
    return found


def _store(device: torch.device, found: Sequence[Timing]) -> str:
    """Put times into the record; return why they could not be written, "" if they were."""
    old = record.load(device) or record.known(torch.empty(0, device=device))
    old = old or Record(dict(record.machine(device)))
    kept = replace(old, times=old.times | dict(found))
    note = record.store(device, kept) or ""
    choice.set(choice.name)
    return note


def _candidates(
    x: Tensor, specs: Sequence[LayerSpec], sequences: Sequences, size: Size
) -> list[Backend]:
    wrong = TORCH if may_torch_be_wrong(x, specs[0], sequences) else None
    return [
        each
        for each in candidates(AUTO, x)
        if each is not wrong
        and first_obstacle(each, x, specs, sequences) is None
        and doubt(each, x, specs, sequences, size=size) is None
    ]


def _call(module: Any, x: Any, hx: Any, lengths: Tensor | None, trains: bool) -> Callable[[], Any]:
    """Return what is timed: a call or, of a cell, a loop of calls, and its backward pass."""
    options = {} if lengths is None else {"lengths": lengths}
    weights = [w for w in module.parameters() if w.requires_grad]

    def forward() -> Any:
        if not isinstance(module, LSTMCell):
            y = module(x, hx, **options)[0]
            return y.data if isinstance(y, PackedSequence) else y
        state = hx
        for _ in range(_CELL_STEPS):
            state = module(x, state)
        return state[0]

    def both() -> None:
        y = forward()
        torch.autograd.grad(y, weights, torch.ones_like(y))

    return both if trains and weights else forward


def _eager(names: Sequence[str], call: Callable[[], Any]) -> dict[str, Callable[[], Any]]:
    """The call by each backend, after its first one."""
    for name in names:
        with backend(name):
            call()
    return dict.fromkeys(names, call)


def _race(runs: dict[str, Callable[[], Any]], device: torch.device) -> dict[str, float]:
    """The time of each backend in microseconds, first the one that auto shall take."""
    names = list(runs)
    once = max(_time(run, name, 1, device) for name, run in runs.items())
    count = max(1, int(_SECONDS / max(once, 1e-6)))
    seen: dict[str, list[float]] = {name: [] for name in names}
    times: dict[str, float] = {}
    end = time.perf_counter() + _PATIENCE
    for _ in range(_TRIES):
        for _ in range(_TURNS):
            for name, run in runs.items():
                # The first is beside threads of the other backend, which still look for work.
                each = [_time(run, name, count, device) for _ in range(1 + _ROUNDS)]
                seen[name] += each[1:]
        times = {name: float(np.quantile(each, 0.25)) * 1e6 for name, each in seen.items()}
        best = sorted(names, key=lambda name: times[name] * (_MARGIN if name == names[0] else 1))
        times = {name: times[name] for name in best}
        clear = best[0] == names[0] and times[best[0]] < _CLEAR * times[best[1]]
        if clear or time.perf_counter() > end:
            break
    return times


def _captured(
    names: Sequence[str], call: Callable[[], Any], device: torch.device
) -> dict[str, Callable[[], Any]]:
    """CUDA graphs of a call without gradients; {} where not every backend can be captured."""
    if device.type != "cuda" or torch.is_grad_enabled():
        return {}
    graphs = {name: torch.cuda.CUDAGraph() for name in names}
    try:
        for name, graph in graphs.items():
            with backend(name), torch.cuda.graph(graph):
                call()
    except RuntimeError:
        return {}
    return {name: graph.replay for name, graph in graphs.items()}


def _time(run: Callable[[], Any], name: str, count: int, device: torch.device) -> float:
    """Seconds of one run."""
    wait = getattr(getattr(torch, device.type, None), "synchronize", nullcontext)
    with backend(name):
        wait()
        start = time.perf_counter()
        for _ in range(count):
            run()
        wait()
    return (time.perf_counter() - start) / count


def _steps_and_batch(module: Any, x: Any) -> tuple[int, int]:
    """T and B of a call."""
    if isinstance(x, PackedSequence):
        return len(x.batch_sizes), int(x.batch_sizes[0])
    if isinstance(module, LSTMCell):
        return 1, x.shape[0] if x.dim() == 2 else 1
    if x.dim() == 2:
        return x.shape[0], 1
    return (x.shape[1], x.shape[0]) if module.batch_first else (x.shape[0], x.shape[1])


def _measure(x: Tensor, spec: LayerSpec, sequences: Sequences, size: Size) -> None:
    """Tune for a call that nobody has measured, of random numbers: what ``tuned`` does."""
    known = sequences.reset is None and sequences.lengths is None and not spec.is_extended
    if not known or not is_whole(TORCH) or _is_capturing(x):
        return
    with _own_chance(x):
        _measure_anew(x, spec, sequences, size)


def _measure_anew(x: Tensor, spec: LayerSpec, sequences: Sequences, size: Size) -> None:
    """Tune a new module for inputs like x."""
    options: dict[str, Any] = {"device": x.device, "dtype": x.dtype}
    plain = spec.input_size, spec.hidden_size
    module: Any
    if not size.layers:
        module = LSTMCell(*plain, spec.bias, **options)
    else:
        shape: dict[str, Any] = {"num_layers": size.layers, "bias": spec.bias, **options}
        shape["bidirectional"] = spec.directions == 2
        if spec.is_lstm:
            module = LSTM(*plain, proj_size=spec.proj_size, **shape)
        else:
            name = spec.mode.removeprefix("RNN_").lower()
            module = RNN(*plain, nonlinearity=name, **shape)
    rows: Any = torch.randn_like(x.detach())
    if not size.layers:
        rows = rows.view(size.batch, -1)
    if sequences.batch_sizes is not None:
        rows = PackedSequence(rows, sequences.batch_sizes)
    grad = torch.is_grad_enabled()
    trains = grad and (x.requires_grad or any(w.requires_grad for w in size.weights))
    tune(module, rows, training=trains)


def _own_chance(x: Tensor) -> Any:
    """Return a block that leaves the user's random numbers alone."""
    return torch.random.fork_rng([x.device] if x.is_cuda else [])


def _is_capturing(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


automatic.measure = _measure
