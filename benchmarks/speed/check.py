"""Checks that a contender computes what nn.LSTM does: what does not is not timed."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import BenchmarkError
from ..providers.pytorch import Plain
from .contender import Contender
from .workload import Workload

Results = dict[str, Tensor]


class Mismatch(BenchmarkError):
    """A contender's numbers are not those of nn.LSTM, so its time means nothing."""


class Judge:
    """Holds the results of a workload in float64, and how far nn.LSTM itself is from them.

    `eps` is the spacing, at 1, of the numbers that are multiplied; by default that of the dtype.
    """

    def __init__(self, work: Workload, eps: float | None = None) -> None:
        self.work = work
        self.eps = eps or torch.finfo(work.dtype).eps
        # float64 has no wider truth: there nn.LSTM's float32 error, scaled, is the yardstick.
        narrow = torch.float32 if work.dtype == torch.float64 else work.dtype
        self._scale = torch.finfo(work.dtype).eps / torch.finfo(narrow).eps
        self.truth = _solve(work.to(torch.float64))
        self._yardstick = _solve(work.to(narrow))

    def error(
        self, name: str, contender: Contender, *, ours: bool, eps: float | None = None
    ) -> float:
        """Return the largest error of a result, as a share of that result's largest value.

        Raises Mismatch if an error is too large. Results of ours may be twice as far from float64
        as those of nn.LSTM, plus one rounding. A peer must have half of the digits right, of those
        that numbers with the spacing `eps` have, where that is not the one of all.
        """
        worst = 0.0
        for what, got in contender.results().items():
            want = self.truth[what]
            if got.shape != want.shape:
                raise Mismatch(f"{self._where}: {what} from {name} is {list(got.shape)}")
            size, error = _largest(want), _largest(got.to(want) - want)
            bound, rule = (eps or self.eps) ** 0.5 * size, "half of the digits"
            if ours:
                bound = 2 * self._scale * _largest(self._yardstick[what] - want) + self.eps * size
                rule = "twice the error of nn.LSTM, plus one rounding"
            if not error <= bound:
                raise Mismatch(
                    f"{self._where}: {what} from {name} is off float64 by {error:.3g}; at most "
                    f"{bound:.3g} is right ({rule})"
                )
            worst = max(worst, error / size if size else 0.0)
        return worst

    @property
    def _where(self) -> str:
        return f"{self.work.case.name}, {self.work.mode}"


def _solve(work: Workload) -> Results:
    with torch.inference_mode(work.mode != "train"):
        return Plain().contender(work).results()


def _largest(values: Tensor) -> float:
    return values.abs().max().item() if values.numel() else 0.0
