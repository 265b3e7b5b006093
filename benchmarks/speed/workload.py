"""What is timed: a workload, which every contender does in its own way on the same numbers."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from .cases import Case

MODES = ("infer", "train", "step")


@dataclass(frozen=True)
class Workload:
    """The inputs and weights of one measurement.

    Mode "infer" runs `lstm` over x, "train" runs it, goes back and changes all weights
    (:mod:`.update`), and "step" takes one step from `state`.

    `x` [T, B, I] is zero past the `lengths` [B], int64 on the CPU, of a ragged case. `reset`
    [T, B], bool, is True where a row starts again. `state` is h and c [L*D, B, H] in mode "step",
    whose x is one step. `dy` [T, B, D*H] is what comes back into y in mode "train".
    """

    case: Case
    mode: str
    lstm: nn.LSTM
    x: Tensor
    lengths: Tensor | None
    reset: Tensor | None
    state: tuple[Tensor, Tensor] | None
    dy: Tensor | None
    input_gradient: bool

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of all floating point numbers."""
        return self.x.dtype

    @property
    def on_cpu(self) -> bool:
        """Whether the numbers are in the memory of the CPU."""
        return self.x.device.type == "cpu"

    def to(self, dtype: torch.dtype) -> Workload:
        """Return the workload in another dtype."""
        return replace(
            self,
            lstm=deepcopy(self.lstm).to(dtype),
            x=self.x.to(dtype),
            state=self.state and (self.state[0].to(dtype), self.state[1].to(dtype)),
            dy=None if self.dy is None else self.dy.to(dtype),
        )

    def rows(self, padded: Tensor) -> Tensor | PackedSequence:
        """Return a tensor [T, B, features] as nn.LSTM takes it: packed if the case is ragged."""
        if self.lengths is None:
            return padded
        return pack_padded_sequence(padded, self.lengths, enforce_sorted=False)

    def padded(self, rows: Tensor | PackedSequence) -> Tensor:
        """Return rows as a tensor [T, B, features], zero past the lengths."""
        if isinstance(rows, Tensor):
            return rows
        return pad_packed_sequence(rows, total_length=len(self.x))[0]


def make_workload(
    case: Case,
    mode: str,
    dtype: torch.dtype,
    device: str = "cpu",
    input_gradient: bool = False,
) -> Workload:
    """Make the workload of a case, with the same numbers every time."""
    torch.manual_seed(0)
    size = (case.I, case.H, case.L)
    lstm = nn.LSTM(*size, bidirectional=case.D == 2, dtype=dtype, device=device)
    x = case.x().to(device, dtype)
    state = dy = None
    if mode == "step":
        x = x[:1]
        half = torch.full((case.L * case.D, case.B, case.H), 0.5, dtype=dtype, device=device)
        state = half, half
    elif mode == "train":
        generator = torch.Generator().manual_seed(2)
        dy = torch.randn(case.T, case.B, case.D * case.H, generator=generator)
        dy = dy.to(device, dtype)
    return Workload(
        case,
        mode,
        lstm,
        x,
        case.lengths if case.packed else None,
        case.starts()[: len(x)].to(device) if case.reset else None,
        state,
        dy,
        input_gradient,
    )
