"""``fastlstm.verify``: compare kernels with float64 and with PyTorch's own, on this machine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch

from fastlstm import record
from fastlstm.automatic import first_obstacle
from fastlstm.backends import choice
from fastlstm.kernels.base import Backend, get, registered
from fastlstm.kernels.pytorch import TORCH
from fastlstm.kernels.reference import REFERENCE
from fastlstm.proof.oracle import Results, distance, judge
from fastlstm.proof.solve import Problem, draw, run, run_stepwise
from fastlstm.record import OK, Record, verdict_key

__all__ = ["Verdict", "Verification", "judged", "problems", "verify"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_CPU = torch.device("cpu")
_TF32 = 2.0**-10  # the spacing at 1 of what TF32 multiplies


class Verdict(NamedTuple):
    """What came out of one comparison."""

    backend: str
    dtype: torch.dtype
    regime: str
    feature: str
    complaint: str  # "" where it is right
    share: float  # the largest error, as a part of what is allowed

    def __str__(self) -> str:
        told = self.complaint or f"right, {self.share:.0%} of what is allowed"
        name = str(self.dtype).removeprefix("torch.")
        return f"{self.backend:<8}{name:<10}{self.regime:<20}{self.feature:<20}{told}"


class Verification(list[Verdict]):
    """All verdicts; prints as a table."""

    note: str = ""

    @property
    def right(self) -> bool:
        """Whether nothing was wrong."""
        return not any(verdict.complaint for verdict in self)

    def __repr__(self) -> str:
        wrong = sum(bool(verdict.complaint) for verdict in self)
        told = f"{len(self) - wrong} right, {wrong} wrong" if self else "nothing to verify here"
        return "\n".join([*map(str, self), told, *filter(None, [self.note])])


def verify(
    device: torch.device | str | None = None,
    backends: Sequence[str] | str | None = None,
    *,
    keep: bool = True,
    verbose: bool = False,
) -> Verification:
    """Compare kernels with float64 and with PyTorch's own, and keep the verdict for ``auto``.

    Every backend of this library that works on the device is tried in each dtype and regime: both
    directions, packed rows, lengths, resets, cell states, projections, other cells, ``nn.RNN``;
    outputs and gradients. The error may be twice that of PyTorch's own kernels, plus one rounding.

    Args:
        device: whose kernels; the CUDA device if there is one, else the CPU, unless it is given.
        backends: names, to try only these.
        keep: whether to write the verdict to the record of the machine, which ``auto`` obeys.
        verbose: print each line as soon as it is known.

    Returns:
        A list of verdicts that prints as a table.

    Raises:
        ValueError: there is no such backend.
        RuntimeError: a backend that was named is not available here.
    """
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    found = Verification()
    chosen = _chosen(backends)
    with torch.random.fork_rng([where] if where.type == "cuda" else []):
        torch.manual_seed(0)
        for verdict in (each for backend in chosen for each in _verify(backend, where)):
            found.append(verdict)
            if verbose:
                print(verdict, flush=True)
    if keep and found:
        old = record.load(where) or Record(dict(record.machine(where)))
        kept = replace(old, verdicts=old.verdicts | _summary(found))
        found.note = record.store(where, kept) or ""
        choice.set(choice.name)
    return found


def _chosen(names: Sequence[str] | str | None) -> list[Backend]:
    """The backends to try: those that were named, or all that are here, but for PyTorch's own."""
    if names is None:
        others = (TORCH, REFERENCE)
        return [b for b in registered() if b not in others and b.error() is None]
    found = []
    for name in (names,) if isinstance(names, str) else names:
        try:
            backend = get(name)
        except KeyError:
            known = ", ".join(each.name for each in registered())
            raise ValueError(f"verify(): {name!r} is not a backend, choose from {known}") from None
        if (error := backend.error()) is not None:
            raise RuntimeError(f'the "{name}" backend is not available here: {error}')
        found.append(backend)
    return found


def _summary(found: Sequence[Verdict]) -> dict[str, str]:
    """By key: "ok", or the first complaint."""
    summary: dict[str, str] = {}
    for verdict in found:
        key = verdict_key(verdict.backend, verdict.dtype, verdict.regime, verdict.feature)
        if summary.get(key, OK) == OK:
            summary[key] = verdict.complaint or OK
    return summary


def _verify(backend: Backend, device: torch.device) -> Iterator[Verdict]:
    for dtype in _DTYPES:
        x = torch.empty(0, dtype=dtype, device=device)
        for trial, sizes in backend.trials(x):
            for problem in problems(**sizes):
                with trial():
                    yield from _try(backend, problem, dtype, device)


def _try(
    backend: Backend, problem: Problem, dtype: torch.dtype, device: torch.device
) -> Iterator[Verdict]:
    """Judge one problem, if the backend can compute it."""
    x = torch.empty(0, dtype=dtype, device=device)
    spec = problem.module().specs()[0]
    try:
        if first_obstacle(backend, x, (spec,)) is not None:
            return
        regime = backend.regime(spec, problem.T, problem.B, x)
    except ValueError:  # the regime that is asked for has no room
        return
    try:
        complaint, share = judged(backend, problem, dtype, device)
    except Exception as error:
        complaint, share = f"{type(error).__name__}: {error}".partition("\n")[0], float("inf")
    yield Verdict(backend.name, dtype, regime, problem.feature, complaint, share)


def judged(
    backend: Backend, problem: Problem, dtype: torch.dtype, device: torch.device
) -> tuple[str, float]:
    """Return what is wrong with a backend's results, "" if nothing, and their share of error."""
    numbers, before = draw(problem, dtype), draw(problem, dtype, seed=1)
    found = run(problem, backend.name, dtype, device, numbers, before)
    stepper = REFERENCE if problem.extended else TORCH
    whole = partial(run, problem, TORCH.name)
    steps = partial(run_stepwise, problem, stepper.name)
    yardsticks = [steps if problem.ragged else whole]
    # Sums in another order err differently, and the first yardstick may be exact by luck.
    others = [partial(run, problem, REFERENCE.name), *([] if problem.packed else [steps])]
    worst, complaint = float("inf"), ""
    limits: dict[str, float] = {}
    for yardstick in (*yardsticks, *others):
        truth, allowed = _expected(yardstick, problem, dtype, device, numbers)
        limits = {name: max(bound, limits.get(name, 0.0)) for name, bound in allowed.items()}
        complaint, worst = _compare(found, truth, limits)
        if not complaint:
            break
    return complaint, worst


def _expected(
    yardstick: Any, problem: Problem, dtype: torch.dtype, device: torch.device, numbers: Results
) -> tuple[Results, dict[str, float]]:
    """The truth, and the errors that are allowed where `yardstick` is what PyTorch makes of it."""

    def solve(wanted: torch.dtype, given: Results) -> Results:
        if wanted is torch.float64:
            return run(problem, REFERENCE.name, wanted, _CPU, given)
        found: Results = yardstick(wanted, device, given)
        return found

    rnn: Any = torch.backends.cudnn.rnn
    coarse = device.type == "cuda" and dtype is torch.float32 and rnn.fp32_precision == "tf32"
    return judge(solve, dtype, numbers, arithmetic=_TF32 if coarse else None)


def _compare(found: Results, truth: Results, allowed: dict[str, float]) -> tuple[str, float]:
    """The worst complaint, and the largest error as a part of what is allowed."""
    worst, complaint = 0.0, ""
    for name, want in truth.items():
        error = distance(found[name], want)
        share = float(error.max()) / allowed[name] if error.numel() else 0.0
        if share > max(worst, 1.0):
            at = int(error.argmax())
            got, right = float(found[name].flatten()[at]), float(want.flatten()[at])
            complaint = f"{name} is {got:.9g}, float64 says {right:.9g}"
            complaint += f", {allowed[name]:.2g} is allowed"
        worst = max(worst, share)
    return complaint, worst


def problems(T: int = 6, B: int = 5, I: int = 7, H: int = 20) -> list[Problem]:
    """Return a problem for every feature, the plain layer first."""
    size = (T, B, I, H)
    lengths = tuple(max(T - 2 * ((2 * b + 1) % B), 0) for b in range(B))  # unsorted, from 0 to T
    ordered = tuple(sorted((max(n, 1) for n in lengths), reverse=True))
    other = (
        {"peephole": True},
        {"layer_norm": True},
        {"zoneout": (0.25, 0.5)},
        {"recurrent_dropout": 1.0},  # the mask is 0 everywhere, whoever draws it
    )
    return [
        Problem("plain", *size, directions=2),
        Problem("packed", *size, directions=2, lengths=ordered, packed=True, hx=False),
        Problem("lengths", *size, directions=2, lengths=lengths),
        Problem("reset", *size, reset=True),
        Problem("cell states", *size, cell_states=True, hx=False),
        Problem("projection", *size, directions=2, options={"proj_size": max(H // 4, 1)}),
        *(Problem(next(iter(options)), *size, options=options) for options in other),
        Problem("rnn_tanh", *size, directions=2, mode="RNN_TANH"),
        Problem("rnn_relu", *size, directions=2, mode="RNN_RELU"),
    ]
