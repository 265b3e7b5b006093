"""Paired timing: contenders take turns in short blocks, so what disturbs one disturbs them all."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median, quantiles
from time import perf_counter

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

    def scaled(self, factor: float) -> Timing:
        """As if every call had taken `factor` times as long."""
        return Timing(tuple(block * factor for block in self.blocks), self.calls)

    def ratio(self, other: Timing) -> float:
        """How many times as long as `other` a call takes: the median over the rounds."""
        return median(a / b for a, b in zip(self.blocks, other.blocks, strict=True))


def take_turns(
    calls: Mapping[str, Callable[[], object]], *, seconds: float, repeat: int
) -> dict[str, Timing]:
    """Time all of `calls` in about `seconds`, in at most `repeat` rounds of one block each.

    Every round runs one block of every contender, in turn forwards and backwards.
    """
    once = {name: _warm_up(call) for name, call in calls.items()}
    rounds = min(repeat, max(FEWEST_ROUNDS, int(seconds / sum(once.values()))))
    block = seconds / rounds / len(calls)
    counts = {name: max(1, round(block / once[name])) for name in calls}
    blocks: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    collecting = gc.isenabled()
    gc.disable()  # a collection would land on whoever runs at the time
    try:
        for _ in range(rounds):
            for name in order:
                calls[name]()  # brings its code, weights and threads back
                blocks[name].append(_time(calls[name], counts[name]) / counts[name] * 1e6)
            order.reverse()
            gc.collect()
    finally:
        if collecting:
            gc.enable()
    return {name: Timing(tuple(blocks[name]), counts[name]) for name in calls}


def _time(call: Callable[[], object], times: int) -> float:
    start = perf_counter()
    for _ in range(times):
        call()
    return perf_counter() - start


def _warm_up(call: Callable[[], object]) -> float:
    """Seconds a call takes once lazy initialisation is behind it."""
    call()
    times = 1
    while (elapsed := _time(call, times)) < 0.01:
        times *= 2
    return elapsed / times
