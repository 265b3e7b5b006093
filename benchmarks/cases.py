"""The shapes that are timed: the tasks' own, those of typical users, and any ``I,H,L,D,B,T``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence


@dataclass(frozen=True)
class Case:
    """One shape: input size, hidden size, layers, directions, batch, time steps."""

    name: str
    I: int
    H: int
    L: int
    D: int
    B: int
    T: int
    packed: bool = False

    @property
    def shape(self) -> str:
        """As ``--case`` takes it."""
        return ",".join(str(n) for n in (self.I, self.H, self.L, self.D, self.B, self.T))

    @property
    def lengths(self) -> Tensor:
        """int64 [B]: every sequence's steps; a packed batch mixes all lengths from 1 to T."""
        if not self.packed:
            return torch.full((self.B,), self.T)
        mixed = torch.linspace(1, self.T, self.B).round().long()
        return mixed[torch.randperm(self.B, generator=torch.Generator().manual_seed(0))]

    def input(self, dtype: torch.dtype) -> Tensor | PackedSequence:
        """x [T, B, I], the same numbers at every call; packed if the case is."""
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(self.T, self.B, self.I, generator=generator).to(dtype)
        if not self.packed:
            return x
        return pack_padded_sequence(x, self.lengths, enforce_sorted=False)


CASES = {
    case.name: case
    for case in (
        Case("mnist-lstm", 28, 64, 1, 1, 128, 28),
        Case("mnist-lstm128", 28, 128, 1, 1, 128, 28),
        Case("mnist-blstm", 28, 64, 1, 2, 256, 28),
        Case("mnist-blstm-packed", 28, 64, 1, 2, 256, 28, packed=True),
        Case("binary", 10, 32, 2, 1, 512, 20),
        Case("one-sequence", 64, 64, 1, 1, 1, 28),
        Case("step", 64, 64, 1, 1, 1, 1),
        Case("speech", 80, 256, 3, 2, 16, 200),
        Case("lm", 512, 512, 2, 1, 32, 64),
        Case("large", 1024, 1024, 1, 1, 64, 32),
        Case("forecaster", 8, 40, 1, 1, 256, 60),
        Case("rl-rollout", 64, 128, 1, 1, 16, 128),
    )
}


def parse(text: str) -> Case:
    """The case ``I,H,L,D,B,T``; raises ValueError for anything else."""
    numbers = text.split(",")
    if len(numbers) != 6 or not all(n.strip().isdecimal() and int(n) > 0 for n in numbers):
        raise ValueError(f"{text!r}: expected six positive integers I,H,L,D,B,T")
    I, H, L, D, B, T = map(int, numbers)
    if D not in (1, 2):
        raise ValueError(f"{text!r}: D, the number of directions, is {D}; expected 1 or 2")
    return Case(text, I, H, L, D, B, T)
