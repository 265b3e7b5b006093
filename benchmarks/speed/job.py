"""A job: one measurement of a case, in a precision and a mode."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .cases import Case
from .precision import Precision

MODES = ("infer", "train")


@dataclass(frozen=True)
class Job:
    """One measurement. `graph` replays a CUDA graph instead of calling the module.

    `threads` is the number of CPU threads; None is as many as torch has.
    `input_gradient` asks training for the gradient of x too.
    """

    group: str
    case: Case
    precision: Precision
    mode: str
    graph: bool = False
    threads: int | None = None
    input_gradient: bool = False

    def __str__(self) -> str:
        how = "graph" if self.graph else "eager"
        return f"{self.group} {self.case.name} {self.precision} {self.mode} {how}"


def jobs_of(
    cases: Iterable[Case],
    modes: Iterable[str] | None,
    precision: Precision,
    graphs: Iterable[bool] = (False,),
    threads: Iterable[int | None] = (None,),
    input_gradient: bool = False,
) -> list[Job]:
    """Make the jobs of `speed`. By default cases of one step are streamed, others not."""
    return [
        Job(case.group, case, precision, mode, graph, count, input_gradient)
        for case in cases
        for count in threads
        for mode in modes or (("step",) if case.T == 1 else MODES)
        for graph in graphs
        # A graph of a packed batch would be one of its lengths, and of no others.
        if not (graph and case.packed)
    ]
