"""Where our kernels are faster than PyTorch's own: a sample of the calls that they compute.

What ``auto`` takes on a GPU stands in :mod:`fastlstm.kernels.measured`: the lowest ratios that
this has found in each region. It times the layer alone, in training with its backward pass but
without an optimizer, quickly: a ratio of one call may be off by a tenth. What kernels compute is
compared with PyTorch's results, not with float64 as in the tests and in the other timings.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from statistics import median
from time import monotonic
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import fastlstm
from fastlstm.kernels.base import get
from fastlstm.spec import LayerSpec

from ..speed.cases import CASES, Case
from ..speed.gpu_timing import capture, on_gpu
from ..speed.precision import PRECISIONS

COLUMNS = (
    *("case", "precision", "shape", "packed", "training", "graph", "regime"),
    *("us", "torch_us", "ratio", "difference"),
)
ROUNDS = 3  # in which both take turns
MORE_ROUNDS = 15  # where they are as fast, nearly
NEAR = 0.9, 1.2  # ratios
TURN = 0.003  # seconds, about
MOST_CALLS = 30  # of a turn
WAYS = tuple(product((False, True), (False, True)))  # training, graph
USERS = (
    *("step", "one-sequence", "rl-step", "rl-rollout", "forecaster", "mnist-blstm-packed"),
    *("speech", "speech-ragged", "wide-tagger", "lm"),
)  # who have a name in the cases of `speed`

Units = Sequence[tuple[int, ...]]
_NARROW: Units = ((5, 16, 20, 32), (40, 50, 64), (80, 96, 100, 128))
_UP_TO_256: Units = ((150, 160, 200, 256),)
_UP_TO_512: Units = ((300, 384, 400, 512),)
_WIDE: Units = ((600, 640, 768), (800, 1000, 1024))
_ROWS = ((1,), (2, 4, 8, 16), (32, 50, 64), (100, 128, 256), (400, 512))
_STEPS = ((1,), (2, 5, 10), (20, 28, 50), (80, 100, 200))
_INPUTS = (1, 8, 10, 28, 64, 100, 300, 512)
_UNITS = {
    ("triton", "bf16"): (*_NARROW, *_UP_TO_256, *_UP_TO_512),
    ("triton", "fp16"): (*_NARROW, *_UP_TO_256, *_UP_TO_512),
    ("triton", "tf32"): (*_NARROW, *_UP_TO_256),
    ("triton", "exact"): _NARROW[:2],
    ("cuda", "bf16"): (*_UP_TO_256, *_UP_TO_512, *_WIDE),
    ("cuda", "fp16"): (*_UP_TO_256, *_UP_TO_512, *_WIDE),
    ("cuda", "tf32"): (*_UP_TO_256, *_UP_TO_512),
}


class Point(NamedTuple):
    """A call that is timed."""

    case: Case
    precision: str  # of PRECISIONS
    training: bool
    graph: bool  # whether the call is replayed in a CUDA graph


def points(backend: str) -> list[Point]:
    """Return the calls, the same at every time: those of users, and a sample of all others.

    They are in an order in which any part is a sample.
    """
    found = list(_points(backend, random.Random(2)))
    random.Random(3).shuffle(found)
    return [*_of_users(backend), *found]


def _of_users(backend: str) -> Iterator[Point]:
    precisions = [precision for whose, precision in _UNITS if whose == backend]
    for name, precision in product(USERS, precisions):
        case = CASES[name]
        most = max(max(units) for units in _UNITS[backend, precision])
        ways = WAYS if not case.packed else ((False, False), (True, False))
        if most >= case.H:
            yield from (Point(case, precision, *way) for way in ways)


def _points(backend: str, chance: random.Random) -> Iterator[Point]:
    for (whose, precision), classes in _UNITS.items():
        if whose != backend:
            continue
        for units, D, rows, steps in product(classes, (1, 2), _ROWS, _STEPS):
            B, T, H = (chance.choice(each) for each in (rows, steps, units))
            I, L = chance.choice((*_INPUTS, H, H)), chance.choice((1, 1, 2))
            for way in WAYS:
                yield Point(Case("", I, H, L, D, B, T), precision, *way)
            if B > 1 and T > 1:
                for training in (False, True):
                    packed = Case("", I, H, L, D, B, T, packed=True)
                    yield Point(packed, precision, training, False)


def measure(point: Point, backend: str, device: str) -> dict[str, Any]:
    """Time both; return a row of COLUMNS, with None for the times of what is not timed."""
    case, precision = point.case, PRECISIONS[point.precision]
    row = dict.fromkeys(COLUMNS) | {
        "case": case.name,
        "precision": point.precision,
        "shape": case.shape,
        "packed": case.packed,
        "training": point.training,
        "graph": point.graph,
    }
    inference = torch.inference_mode(not point.training)
    with precision.applied(), inference, fastlstm.backend(backend):
        torch.manual_seed(0)
        sizes: Any = {"bidirectional": case.D == 2, "device": device, "dtype": precision.dtype}
        theirs = nn.LSTM(case.I, case.H, case.L, **sizes)
        ours = fastlstm.LSTM(case.I, case.H, case.L, **sizes)
        ours.load_state_dict(theirs.state_dict())
        x = torch.randn(case.T, case.B, case.I, device=device, dtype=precision.dtype)
        row["regime"] = _regime(case, backend, x)
        if row["regime"] is None:
            return row
        rows: Any = x
        if case.packed:
            rows = pack_padded_sequence(x, case.lengths, enforce_sorted=False)
        calls = [_call(lstm, rows, point.training) for lstm in (ours, theirs)]
        row["difference"] = _difference(*(call()[0] for call in calls))
        timed = calls  # graphs read weights of `calls`
        if point.graph:
            timed = [capture(call).replay for call in calls]
        found = _turns(timed, ROUNDS)
        if NEAR[0] < found[-1] < NEAR[1]:
            found = _turns(timed, MORE_ROUNDS)
    return row | dict(zip(("us", "torch_us", "ratio"), found, strict=True))


def _regime(case: Case, backend: str, x: Tensor) -> str | None:
    """Name the regimes of the first layer; None where there are no kernels for a whole call."""
    chosen = get(backend)
    specs = [LayerSpec("LSTM", I, case.H, 0, case.D) for I in (case.I, case.D * case.H)]
    if not chosen.is_ready(specs[: case.L], x, case.B):
        return None
    regime = chosen.regime(specs[0], case.T, case.B, x)
    return None if "steps" in regime else regime


def _call(lstm: nn.Module, x: Any, training: bool) -> Callable[[], Any]:
    if not training:
        return lambda: lstm(x)
    weights = list(lstm.parameters())

    def both_passes() -> tuple[Any, ...]:
        y = _numbers(lstm(x)[0])
        return y, *torch.autograd.grad(y, weights, y.detach())

    return both_passes


def _numbers(y: Any) -> Tensor:
    return y if isinstance(y, Tensor) else y.data


def _difference(ours: Any, theirs: Any) -> float:
    a, b = (_numbers(y).detach().float() for y in (ours, theirs))
    return float((a - b).abs().max())


def _turns(calls: list[Callable[[], Any]], rounds: int) -> tuple[float, float, float]:
    """Return the medians of both times, in microseconds, and of their ratio."""
    counts = []
    for call in calls:
        on_gpu(call, 2)
        counts.append(max(1, min(MOST_CALLS, int(TURN / (on_gpu(call, 2) / 2)))))
    times: list[list[float]] = [[], []]
    for _ in range(rounds):
        for each, call, count in zip(times, calls, counts, strict=True):
            each.append(1e6 * on_gpu(call, count) / count)
    own, other = times
    ratio = median(b / a for a, b in zip(own, other, strict=True))
    return median(own), median(other), ratio


def work(backend: str, device: str, deadline: float) -> tuple[list[dict[str, Any]], int]:
    """Time until the deadline; return the rows, and how many calls were left out."""
    todo, rows = points(backend), []
    for point in todo:
        if monotonic() > deadline:
            break
        rows.append(measure(point, backend, device))
    return rows, len(todo) - len(rows)
