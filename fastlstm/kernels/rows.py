"""Where the rows of a batch lie: ``[T, B, ...]``, with lengths or without, and packed.

Of three sequences of 4, 2 and 1 steps (a letter is a sequence, a digit its step, a dot padding)::

    padded, lengths [4, 2, 1]     packed, batch_sizes [3, 2, 1, 1]

    step 0   a0 b0 c0             a0 b0 c0  a1 b1  a2  a3
    step 1   a1 b1 .              |         |      |   |
    step 2   a2 .  .              0         3      5   6     offsets, the first row of each step
    step 3   a3 .  .

Packed, step t of sequence b is row ``offsets[t] + b``; padded, row ``t * B + b``. The GPU kernels
address both with one formula.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from fastlstm.spec import Sequences

__all__ = ["Rows", "layout"]


@dataclass(frozen=True)
class Rows:
    """Step t of sequence b is row ``offsets[t] + b``, or ``t * B + b`` without offsets.

    It exists where ``t < lengths[b]``, everywhere without lengths.
    """

    T: int
    B: int
    count: int  # of rows, those of padding included
    device: torch.device
    sizes: list[int] | None  # of packed rows: the sequences of each step
    offsets: Tensor | None  # int64 [T], of packed rows
    lengths: Tensor | None  # int64 [B]
    reset: Tensor | None  # uint8 [T, B]

    @property
    def dense(self) -> bool:
        """Whether all sequences have all steps, and none is reset."""
        return self.lengths is None and self.offsets is None and self.reset is None

    @property
    def padded(self) -> bool:
        """Whether there are rows past the ends of sequences."""
        return self.lengths is not None and self.offsets is None

    def real(self) -> Tensor:
        """Return which padded rows lie before the end of their sequence: bool [rows, 1]."""
        assert self.lengths is not None
        steps = torch.arange(self.T, device=self.device)
        return (steps[:, None] < self.lengths).view(-1, 1)

    def empty(self) -> Tensor:
        """Return which sequences have no steps: bool [B, 1]."""
        assert self.lengths is not None
        return self.lengths.eq(0)[:, None]

    def steps(self) -> list[slice]:
        """Return the rows of every step."""
        sizes = self.sizes or [self.B] * self.T
        return [slice(end - size, end) for size, end in zip(sizes, accumulate(sizes), strict=True)]

    def first(self, direction: int) -> Tensor:
        """Return the row where each sequence begins in this direction: int64 [B].

        For a sequence without steps it is the row of its padding at step 0.
        """
        b = torch.arange(self.B, device=self.device)
        if direction == 0:
            return b
        if self.lengths is None:
            return b + (self.T - 1) * self.B
        t = (self.lengths - 1).clamp(min=0)
        return b + (t * self.B if self.offsets is None else self.offsets[t])

    def states_before(self, y: Tensor, h0: Tensor | None, directions: int) -> list[Tensor]:
        """Return h before every row, [rows, P] of each direction.

        y is [rows, D*P]; h0 [D, B, P], or None for zeros.
        """
        return [
            self.before(states, None if h0 is None else h0[d].to(y.dtype), d)
            for d, states in enumerate(y.chunk(directions, 1))
        ]

    def before(self, values: Tensor, start: Tensor | None, direction: int) -> Tensor:
        """Return the values [rows, n] of the step before in this direction.

        Where a sequence begins it is start [B, n], or 0; where it is reset, 0; in padding anything
        finite.
        """
        first = values.new_zeros(self.B, values.shape[1]) if start is None else start
        if self.offsets is not None:
            shifted = values.index_select(0, self._neighbours(direction))
            shifted.index_copy_(0, self.first(direction), first)
        elif direction == 0:
            shifted = torch.cat([first, values[: -self.B]])
        else:
            shifted = torch.cat([values[self.B :], first])
            if start is not None and self.lengths is not None:
                shifted.index_copy_(0, self.first(direction), start)
        if self.reset is not None:
            shifted.masked_fill_(self.reset.bool().view(-1, 1), 0)
        return shifted

    def of_sequences(self, values: Tensor) -> Tensor:
        """Return the values [B, n] of sequences at each of their rows: [rows, n]."""
        if self.offsets is None:
            return values.expand(self.T, *values.shape).flatten(0, 1)
        sizes = torch.tensor(self.sizes).to(self.device, non_blocking=True)
        row = torch.arange(self.count, device=self.device)
        row -= torch.repeat_interleave(self.offsets, sizes, output_size=self.count)
        return values.index_select(0, row)

    def _neighbours(self, direction: int) -> Tensor:
        """Return the row of the step before of each packed row, int64 [rows].

        Where there is no such step it is any row.
        """
        sizes = torch.tensor(self.sizes)
        # From a row to the same sequence one step earlier it is the size of that step, to one step
        # later the size of its own.
        moves = -sizes.roll(1) if direction == 0 else sizes
        moves, repeats = torch.stack([moves, sizes]).to(self.device, non_blocking=True)
        row = torch.arange(self.count, device=self.device)
        row += torch.repeat_interleave(moves, repeats, output_size=self.count)
        return row.clamp_(0, self.count - 1)


def layout(x: Tensor, sequences: Sequences) -> Rows:
    """Find the rows of x.

    Args:
        x: ``[T, B, I]``, or the packed rows ``[N, I]``.
        sequences: which steps there are.

    Raises:
        ValueError: batch sizes are not those of a packed sequence of so many rows.
    """
    if sequences.batch_sizes is not None:
        return _packed(x, sequences.batch_sizes)
    T, B = x.shape[:2]
    reset = sequences.reset
    flags = None if reset is None else reset.contiguous().view(torch.uint8)
    return Rows(T, B, T * B, x.device, None, None, sequences.lengths, flags)


def _packed(x: Tensor, batch_sizes: Tensor) -> Rows:
    sizes = batch_sizes.tolist()
    if not sizes or sizes[-1] <= 0 or sizes != sorted(sizes, reverse=True):
        raise ValueError(f"batch_sizes must be positive and never increase, got {sizes}")
    if sum(sizes) != x.shape[0]:
        raise ValueError(f"batch_sizes add up to {sum(sizes)} rows, the input has {x.shape[0]}")
    T, B = len(sizes), sizes[0]
    starts = batch_sizes.cumsum(0) - batch_sizes
    # Sizes never grow, so a sequence is as long as there are steps of more sequences than precede
    # it; one transfer brings both to the device.
    ends = T - torch.searchsorted(batch_sizes.flip(0), torch.arange(B), right=True)
    both = torch.cat([starts, ends]).to(x.device, non_blocking=True)
    return Rows(T, B, x.shape[0], x.device, sizes, both[:T], both[T:], None)
