"""What `python -m benchmarks gpu` measures, most important first."""

from __future__ import annotations

from collections.abc import Iterator

from ..speed.cases import CASES, TASK_SHAPES, Case
from ..speed.job import MODES, Job
from ..speed.precision import PRECISIONS

GROUPS = ("tasks", "steps", "flashrnn", "wide", "packed", "float32")
WIDTHS, BATCHES = (256, 512, 1024), (1, 16, 64, 256)


def plan_of_gpu() -> list[Job]:
    """Make every job of `gpu`. A short budget leaves out the last ones.

    Packed input is only timed eagerly: its lengths are on the CPU, so a graph would be one of
    these lengths and no others.
    """
    shapes = [CASES[name] for name in TASK_SHAPES]
    wide = [Case(f"H={H} B={B}", H, H, 1, 1, B, 256) for H in WIDTHS for B in BATCHES]
    many_steps = [Case(f"step H={H}", H, H, 1, 1, 16, 1024) for H in (64, 128, 512)]
    flashrnn = Case("FlashRNN's", 768, 768, 1, 1, 16, 1024)  # a shape whose times it publishes
    narrow = [Case(f"H={H}", H, H, 1, 1, 64, 128) for H in (64, 128, 256, 512)]
    both, eager = (False, True), (False,)
    return [
        *_jobs("tasks", shapes, ("bf16", "fp16", "tf32", "exact"), both),
        *_jobs("steps", many_steps, ("bf16",), (True,), ("infer",)),
        *_jobs("flashrnn", [flashrnn], ("bf16",), both),
        *_jobs("wide", wide, ("bf16",), both),
        *_jobs("packed", [_packed(500)], ("bf16", "tf32"), eager),
        *_jobs("float32", narrow, ("tf32", "exact"), both),
        *_jobs("packed", [_packed(4000)], ("bf16", "tf32"), eager),
    ]


def _packed(longest: int) -> Case:
    return Case(f"packed to {longest}", 80, 256, 1, 2, 64, longest, packed=True)


def _jobs(
    group: str,
    cases: list[Case],
    precisions: tuple[str, ...],
    graphs: tuple[bool, ...],
    modes: tuple[str, ...] = MODES,
) -> Iterator[Job]:
    for name in precisions:
        for graph in graphs:
            for mode in modes:
                for case in cases:
                    yield Job(group, case, PRECISIONS[name], mode, graph)
