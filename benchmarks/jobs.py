"""What is timed: shapes x precisions x modes, most important first."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from .cases import CASES, Case
from .precision import PRECISIONS, Precision

TASK_SHAPES = ("mnist-lstm", "mnist-lstm128", "mnist-blstm", "binary")
GPU_GROUPS = ("tasks", "wide", "packed", "float32", "persistent")
MODES = ("infer", "train")
WIDTHS, BATCHES = (256, 512, 1024), (1, 16, 64, 256)


@dataclass(frozen=True)
class Job:
    """One measurement: `graph` replays a CUDA graph instead of calling the module.

    `regime` is forced upon the configuration of the Triton kernels; None leaves the choice to it.
    `threads` is of the CPU; None is as many as torch has. `input_gradient` asks training for the
    gradient of x too.
    """

    group: str
    case: Case
    precision: Precision
    mode: str
    graph: bool = False
    regime: str | None = None
    threads: int | None = None
    input_gradient: bool = False

    def __str__(self) -> str:
        how = "graph" if self.graph else "eager"
        return f"{self.group} {self.case.name} {self.precision} {self.mode} {how}"


def of_cases(
    cases: Iterable[Case],
    modes: Iterable[str] | None,
    precision: Precision,
    graphs: Iterable[bool] = (False,),
    threads: Iterable[int | None] = (None,),
    input_gradient: bool = False,
) -> list[Job]:
    """The jobs of `speed`; by default cases of one step are streamed, others infer and train."""
    return [
        Job(case.group, case, precision, mode, graph, None, count, input_gradient)
        for case in cases
        for count in threads
        for mode in modes or (("step",) if case.T == 1 else MODES)
        for graph in graphs
        # A graph of a packed batch would be one of its lengths, and of no others.
        if not (graph and case.packed)
    ]


def plan_of_gpu() -> list[Job]:
    """Every measurement of `gpu`. What comes last is what a short budget leaves out.

    The persistent kernels, which only those get who ask for them, take the wide shapes again.

    Packed input is only timed eagerly: its lengths are on the CPU, so a graph would be one of
    these lengths and no others.
    """
    shapes = [CASES[name] for name in TASK_SHAPES]
    wide = [Case(f"H={H} B={B}", H, H, 1, 1, B, 256) for H in WIDTHS for B in BATCHES]
    narrow = [Case(f"H={H}", H, H, 1, 1, 64, 128) for H in (64, 128, 256, 512)]
    both, eager = (False, True), (False,)
    chosen = [
        *_jobs("tasks", shapes, ("bf16", "fp16", "tf32", "exact"), both),
        *_jobs("wide", wide, ("bf16",), both),
        *_jobs("packed", [_packed(500)], ("bf16", "tf32"), eager),
        *_jobs("float32", narrow, ("tf32", "exact"), both),
        *_jobs("packed", [_packed(4000)], ("bf16", "tf32"), eager),
    ]
    wide_again = [job for job in chosen if job.group == "wide"]
    forced = [replace(job, group="persistent", regime="persistent") for job in wide_again]
    return chosen + forced


def _packed(longest: int) -> Case:
    return Case(f"packed to {longest}", 80, 256, 1, 2, 64, longest, packed=True)


def _jobs(
    group: str, cases: list[Case], precisions: tuple[str, ...], graphs: tuple[bool, ...]
) -> Iterator[Job]:
    for name in precisions:
        for graph in graphs:
            for mode in MODES:
                for case in cases:
                    yield Job(group, case, PRECISIONS[name], mode, graph)
