"""The least time that a machine could take: its measured rates, and what a shape asks of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .cases import Case
from .cuda import capture, on_gpu
from .precision import PRECISIONS, Precision
from .timing import on_host, take_turns

MATRIX = 8192  # rows and columns of the products: large enough to fill any GPU of today
COPY = 2**31  # bytes, many times any cache
NODES = 100  # kernels of the graph that measures what one of them costs


@dataclass(frozen=True)
class Machine:
    """Measured: `flops` a second of a large product in each precision, `bandwidth` of a large copy
    in bytes read plus written a second, and `launch`, seconds for the smallest kernel of a graph.
    """

    flops: dict[str, float]
    bandwidth: float
    launch: float


def measure(
    device: str = "cuda", matrix: int = MATRIX, copy: int = COPY, seconds: float = 0.2
) -> Machine:
    """Measures this machine; on a CPU, `launch` is that of the smallest operation."""
    cuda = torch.device(device).type == "cuda"

    def once(call: Callable[[], object]) -> float:
        stopwatch = on_gpu if cuda else on_host
        timing = take_turns({"": call}, seconds=seconds, repeat=20, stopwatch=stopwatch)[""]
        return timing.percentiles[1] / 1e6

    flops = {}
    for name, precision in PRECISIONS.items():
        a, b = (torch.randn(matrix, matrix, device=device).to(precision.dtype) for _ in range(2))
        out = torch.empty_like(a)
        with precision.applied():
            flops[name] = 2 * matrix**3 / once(lambda a=a, b=b, out=out: torch.mm(a, b, out=out))
    source = torch.ones(copy, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * copy / once(lambda: target.copy_(source))
    small = torch.zeros(1, device=device)
    if not cuda:
        return Machine(flops, bandwidth, once(lambda: small.add_(1)))
    graph = capture(lambda: [small.add_(1) for _ in range(NODES)])
    return Machine(flops, bandwidth, once(graph.replay) / NODES)


def floor(case: Case, precision: Precision, mode: str, machine: Machine) -> float:
    """Microseconds that no implementation can go below on this machine.

    The largest of: the multiplications at the rate of a large product; the bytes, each input read
    and each output written once and nothing kept for backward, at the bandwidth; one launch. That
    a step waits for the one before is not in it.
    """
    steps = int(case.lengths.sum())
    products = parameters = 0
    features = case.I
    for layer in range(case.L):
        weights = case.D * 4 * case.H * (features + case.H)
        parameters += weights + case.D * 8 * case.H
        # Backward: the gradients of the weights, of h and, above the first layer, of the input.
        backward = 2 * weights if layer else weights + case.D * 4 * case.H * case.H
        products += weights + (backward if mode == "train" else 0)
        features = case.D * case.H
    x, y, states = steps * case.I, steps * features, 2 * case.L * case.D * case.B * case.H
    values = x + y + states + parameters
    if mode == "train":
        values += y + parameters  # the incoming gradient, and those of the parameters
    arithmetic = 2 * steps * products / machine.flops[precision.name]
    memory = values * precision.dtype.itemsize / machine.bandwidth
    return 1e6 * max(arithmetic, memory, machine.launch)
