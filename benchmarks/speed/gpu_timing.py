"""Timing on a GPU: a stopwatch of CUDA events, and contenders captured as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .contender import Contender
from .memory import gpu_peak

WARM_UPS = 3  # on a side stream, before a capture, as PyTorch asks: lazy set-up is no graph node


def on_gpu(call: Callable[[], object], times: int) -> float:
    """Seconds between two events of the current stream, with so many calls between them."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(times):
        call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1000


def capture(work: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """`work` as a graph. Its tensors stay where the graph writes them."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def on_events(contender: Contender) -> Contender:
    """The contender on the clock and the memory of the GPU, unless it has its own."""
    timer = contender.timer or partial(on_gpu, contender.call)
    return replace(
        contender, timer=timer, peak=contender.peak or partial(gpu_peak, contender.call)
    )


def captured(contender: Contender) -> Contender:
    """The same work as one graph: a call replays it."""
    found: dict[str, Tensor] = {}
    graph = capture(lambda: found.update(contender.results()))

    def results() -> dict[str, Tensor]:
        for tensor in found.values():
            tensor.fill_(torch.nan)  # so that only what the replay writes can pass
        graph.replay()
        return found

    return Contender(_Replay(graph, contender), results)


class _Replay(NamedTuple):
    """Replays a graph, and keeps its contender: the graph reads weights that belong to that."""

    graph: torch.cuda.CUDAGraph
    contender: Contender

    def __call__(self) -> None:
        self.graph.replay()
