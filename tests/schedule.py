"""A model of how a call's threads take its work: what a plan costs on machines that are not here.

It repeats the rules of csrc/cpu/pool.cpp in time that is counted, not spent. A region has items,
of which each thread has a share; it takes those first, and then what is left of the others'. The
caller waits for threads in the middle of an item, never for one that has not come.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from fastlstm.kernels import cpu
from fastlstm.spec import LayerSpec

# Cycles of a core of speed 1.
WAKE = 4_000  # until a thread that lingers has seen that there is work
TAKE = 100  # to take an item
SLICE = 9_000_000  # for which the system gives a core to somebody else: 3 ms


@dataclass(frozen=True)
class Core:
    """A core, as fast as `speed`. A neighbour has every second time slice, from `away` on."""

    speed: float = 1.0
    away: int | None = None
    comes: bool = True  # whether its thread takes part at all

    def end(self, begin: float, cycles: float) -> float:
        """When work of so many cycles ends that begins at `begin`."""
        left = cycles / self.speed
        if self.away is None:
            return begin + left
        now = begin
        while True:
            phase = (now - self.away) % (2 * SLICE)
            if phase < SLICE:  # the neighbour has it
                now += SLICE - phase
                continue
            room = 2 * SLICE - phase
            if left <= room:
                return now + left
            left -= room
            now += room


@dataclass(frozen=True)
class Step:
    """What `fastlstm.explain` says of a plan."""

    threads: int
    shared: bool
    items: int  # of a step that is shared, else lanes
    cycles: float  # of a step

    @classmethod
    def of(cls, spec: LayerSpec, T: int, B: int, threads: int, machine: tuple[int, ...]) -> Step:
        """Read the plan of a call."""
        text = cpu.plan(spec, T, B, threads, machine)
        cycles = float(number(r"about ([\d.]+) thousand cycles", text)) * 1e3
        lanes = re.search(r"(\d+) lane\(s\)", text)
        if lanes:
            return cls(threads, False, int(lanes[1]), cycles)
        users = int(number(r"shared by (\d+) threads", text))
        return cls(users, True, int(number(r"in (\d+) pieces", text)), cycles)


def number(pattern: str, text: str) -> str:
    """Return the first group of a pattern that is there."""
    found = re.search(pattern, text)
    assert found, text
    return found[1]


def region(cores: list[Core], items: int, cycles: float, begin: float = 0.0) -> float:
    """Return when a region ends whose items take so many cycles each; cores[0] is the caller's."""
    cores = cores[: max(1, min(len(cores), items))]
    n = len(cores)
    shares = [[k * items // n, (k + 1) * items // n] for k in range(n)]
    free = [begin] + [begin + WAKE if core.comes else float("inf") for core in cores[1:]]
    last = begin
    while True:
        k = min(range(n), key=lambda k: free[k])
        mine = next((s for d in range(n) if (s := shares[(k + d) % n])[0] < s[1]), None)
        if mine is None:
            return max(last, free[0])
        mine[0] += 1
        free[k] = cores[k].end(free[k], cycles + TAKE)
        last = max(last, free[k])


def call(step: Step, cores: list[Core], T: int) -> float:
    """Return the cycles that T steps of a plan take on these cores."""
    used = cores[: step.threads]
    if not step.shared:
        turns = -(-step.items // step.threads)
        return region(used, step.items, step.cycles * T / turns)
    end = 0.0
    work = max(0.0, step.cycles - meeting(step.threads)) * step.threads / step.items
    for _ in range(T):
        end = region(used, step.items, work, end) + meeting(step.threads) - WAKE
    return end


def meeting(threads: int) -> float:
    """Return what csrc/cpu/plan.h takes for the meeting of that many threads."""
    return 8_500 + 750 * threads
