"""Paired timing: contenders take turns in short blocks, so what disturbs one disturbs them all."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median, quantiles
from time import perf_counter

Stopwatch = Callable[[Callable[[], object], int], float]

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

    def scaled(self, factor: float) -> Timing:
        """As if every call had taken `factor` times as long."""
        return Timing(tuple(block * factor for block in self.blocks), self.calls)

    def ratio(self, other: Timing) -> float:
        """How many times as long as `other` a call takes: the median over the rounds."""
        return median(a / b for a, b in zip(self.blocks, other.blocks, strict=True))


def on_host(call: Callable[[], object], times: int) -> float:
    """Seconds that so many calls take on the host."""
    start = perf_counter()
    for _ in range(times):
        call()
    return perf_counter() - start


def take_turns(
    calls: Mapping[str, Callable[[], object]],
    *,
    seconds: float,
    repeat: int,
    stopwatch: Stopwatch = on_host,
) -> dict[str, Timing]:
    """Time all of `calls` in about `seconds`, in at most `repeat` rounds of one block each.

    Every round runs one block of every contender, in turn forwards and backwards. `stopwatch`
    makes the calls of a block and returns their seconds.
    """
    once = {name: _warm_up(call, stopwatch) for name, call in calls.items()}
    rounds = min(repeat, max(FEWEST_ROUNDS, int(seconds / sum(once.values()))))
    block = seconds / rounds / len(calls)
    counts = {name: max(1, round(block / once[name])) for name in calls}
    blocks: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    collecting = gc.isenabled()
    gc.disable()  # a collection would land on whoever runs at the time
    gc.freeze()  # and the one after every round need not look at what was there before
    try:
        for _ in range(rounds):
            for name in order:
                calls[name]()  # brings its code, weights and threads back
                blocks[name].append(stopwatch(calls[name], counts[name]) / counts[name] * 1e6)
            order.reverse()
            gc.collect()
    finally:
        gc.unfreeze()
        if collecting:
            gc.enable()
    return {name: Timing(tuple(blocks[name]), counts[name]) for name in calls}


def _warm_up(call: Callable[[], object], stopwatch: Stopwatch) -> float:
    """Seconds a call takes once lazy initialisation is behind it."""
    call()
    times = 1
    while (elapsed := stopwatch(call, times)) < 0.01:
        times *= 2
    return elapsed / times
