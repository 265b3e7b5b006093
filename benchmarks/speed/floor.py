"""The least time that a machine could take for a case, from its measured rates."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch

from .cases import Case
from .contender import on_host
from .gpu_timing import capture, on_gpu
from .precision import PRECISIONS, Precision
from .timing import take_turns

MATRIX = {"cuda": 8192, "cpu": 1024}  # rows and columns of the products, large enough for the rate
# Bytes of the copies: on a GPU many times any cache; a CPU has a rate for each of its caches.
COPIES = {"cuda": (2**31,), "cpu": (2**16, 2**20, 2**24, 2**28)}
NODES = 100  # kernels of the graph that measures what one of them costs


@dataclass(frozen=True)
class Machine:
    """Measured: `flops` a second of a large product in each precision, `bandwidth` in bytes read
    plus written a second of a copy of so many bytes, and `launch`, seconds for the smallest kernel
    of a graph; on a CPU, for the smallest operation.
    """

    flops: dict[str, float]
    bandwidth: dict[int, float]
    launch: float

    def rate(self, size: int) -> float:
        """The bandwidth for `size` bytes: of the smallest copy that is no smaller."""
        fitting = [copied for copied in self.bandwidth if copied >= size]
        return self.bandwidth[min(fitting) if fitting else max(self.bandwidth)]


def measure(
    device: str = "cuda", precisions: Iterable[Precision] | None = None, seconds: float = 0.2
) -> Machine:
    """Measures this machine, on as many threads as torch has."""
    kind = torch.device(device).type
    cuda = kind == "cuda"
    stopwatch = on_gpu if cuda else on_host

    def once(call: Callable[[], object]) -> float:
        timer = {"": partial(stopwatch, call)}
        return take_turns(timer, seconds=seconds, repeat=20)[""].percentiles[1] / 1e6

    flops = {}
    for precision in precisions or PRECISIONS.values():
        # Many a CPU computes 16-bit numbers at a hundredth of the rate.
        n = MATRIX[kind] // (4 if kind == "cpu" and precision.dtype.itemsize == 2 else 1)
        a, b = (torch.randn(n, n, device=device).to(precision.dtype) for _ in range(2))
        out = torch.empty_like(a)
        with precision.applied():
            rate = 2 * n**3 / once(lambda a=a, b=b, out=out: torch.mm(a, b, out=out))
        flops[precision.name] = rate
    bandwidth = {}
    for size in COPIES[kind]:
        source = torch.ones(size, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        bandwidth[size] = 2 * size / once(lambda s=source, t=target: t.copy_(s))
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
    size = values * precision.dtype.itemsize
    return 1e6 * max(arithmetic, size / machine.rate(size), machine.launch)
