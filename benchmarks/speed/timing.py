"""Paired timing: contenders take turns in short blocks, so what disturbs one disturbs them all."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median, quantiles

Timer = Callable[[int], float]

FEWEST_ROUNDS = 5  # a median of fewer blocks means little, so a slow case takes longer than asked


@dataclass(frozen=True)
class Timing:
    """Microseconds a call of one contender: one mean per block, and the calls in a block."""

    blocks: tuple[float, ...]
    calls: int

    @property
    def percentiles(self) -> tuple[float, float, float]:
        """p20, p50 and p80 over the blocks."""
        p20, _, _, p80 = quantiles(self.blocks, n=5, method="inclusive")
        return p20, median(self.blocks), p80

    @property
    def figures(self) -> dict[str, float]:
        """What a row of results says of it."""
        p20, p50, p80 = self.percentiles
        return {
            "p20_us": p20,
            "p50_us": p50,
            "p80_us": p80,
            "blocks": len(self.blocks),
            "calls_per_block": self.calls,
        }

    def ratio(self, other: Timing) -> float:
        """How many times as long as `other` a call takes: the median over the rounds."""
        return median(a / b for a, b in zip(self.blocks, other.blocks, strict=True))


def take_turns(timers: Mapping[str, Timer], *, seconds: float, repeat: int) -> dict[str, Timing]:
    """Time everybody in about `seconds`, in at most `repeat` rounds of one block each.

    Every round runs one block of every contender, in turn forwards and backwards. A timer makes so
    many calls and returns their seconds.
    """
    once = {name: _warm_up(timer) for name, timer in timers.items()}
    rounds = min(repeat, max(FEWEST_ROUNDS, int(seconds / sum(once.values()))))
    block = seconds / rounds / len(timers)
    counts = {name: max(1, round(block / once[name])) for name in timers}
    blocks: dict[str, list[float]] = {name: [] for name in timers}
    order = list(timers)
    collecting = gc.isenabled()
    gc.disable()  # a collection would land on whoever runs at the time
    gc.freeze()  # and the one after every round need not look at what was there before
    try:
        for _ in range(rounds):
            for name in order:
                timers[name](1)  # brings its code, weights and threads back
                blocks[name].append(timers[name](counts[name]) / counts[name] * 1e6)
            order.reverse()
            gc.collect()
    finally:
        gc.unfreeze()
        if collecting:
            gc.enable()
    return {name: Timing(tuple(blocks[name]), counts[name]) for name in timers}


def _warm_up(timer: Timer) -> float:
    """Seconds a call takes once lazy initialisation is behind it."""
    timer(1)
    times = 1
    while (elapsed := timer(times)) < 0.01:
        times *= 2
    return elapsed / times
