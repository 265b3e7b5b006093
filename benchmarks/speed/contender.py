"""A contender: one provider's way to do a workload, ready to be timed and checked."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from torch import Tensor

from . import memory


@dataclass(frozen=True)
class Contender:
    """`call` does the work once; `results` does it from the start and names what came out.

    The names are y [T, B, D*H] (zero past the lengths), h and c [L*D, B, H]; in training y and
    "gradient of NAME" for x [T, B, I] and every parameter of nn.LSTM. `timer` and `peak` are for
    those whose calls are not timed, and whose memory is not found, in this process and on the CPU.
    `kept` tells the bytes that a forward pass keeps for backward, `rest` those of weights and of
    copies of them that stay between calls, where that can be known.
    """

    call: Callable[[], object]
    results: Callable[[], dict[str, Tensor]]
    timer: Callable[[int], float] | None = None
    peak: Callable[[], int | None] | None = None
    kept: Callable[[], int] | None = None
    rest: Callable[[], int] | None = None

    def seconds(self, times: int) -> float:
        """Return the seconds that so many calls take."""
        return self.timer(times) if self.timer else on_host(self.call, times)

    def peak_bytes(self) -> int | None:
        """Return the bytes that a call needs at its peak beyond those before; None if unknown."""
        return self.peak() if self.peak else memory.peak(self.call)


def around(contender: Contender, context: Callable[[], AbstractContextManager[Any]]) -> Contender:
    """Return the contender with everything that it does inside such a context."""

    def within(call: Callable[[], Any]) -> Callable[[], Any]:
        def inside() -> Any:
            with context():
                return call()

        return inside

    kept = contender.kept and within(contender.kept)
    call, results = within(contender.call), within(contender.results)
    return Contender(call, results, kept=kept, rest=contender.rest)


def on_host(call: Callable[[], object], times: int) -> float:
    """Return the seconds that so many calls take by the clock of the host."""
    start = perf_counter()
    for _ in range(times):
        call()
    return perf_counter() - start
