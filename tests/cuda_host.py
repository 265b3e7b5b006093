"""The host's part of the CUDA kernels on the stub of the runtime: `python cuda_host.py LIBRARY`.

tests/test_cuda_host.py runs it, in a process of its own because the emulator registers the same
operators, and judges what it prints: JSON of the launches of each scenario, or of its error.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

import fastlstm
from fastlstm import extension

T, I = 3, 10
DTYPES = {
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "tf32": torch.float32,
    "exact": torch.float32,
}
# The regime and more wishes, H and B: every size of a cluster, several groups, launches in turns.
LAYERS: list[tuple[dict[str, Any], int, int]] = [
    ({"regime": "block"}, 64, 19),
    ({"regime": "block", "batch": 16}, 40, 40),
    ({"regime": "cluster", "blocks": 2}, 64, 3),
    ({"regime": "cluster", "blocks": 4, "batch": 16}, 128, 20),
    ({"regime": "cluster", "blocks": 8}, 200, 9),
    ({"regime": "cluster", "blocks": 16}, 256, 17),
    ({"regime": "wide", "blocks": 8}, 64, 17),
    ({"regime": "wide", "blocks": 16}, 528, 9),
    ({"regime": "grid"}, 300, 9),
    ({"regime": "grid", "blocks": 16}, 256, 200),
]
# Name, compute capability, parts, multiprocessors in all, bytes of shared memory of a block.
GPUS = {
    "a100": (80, 4, 108, 163 << 10),
    "h100": (90, 6, 132, 227 << 10),
    "half": (90, 8, 64, 227 << 10),  # no part of it has 16
    "small": (90, 2, 14, 60 << 10),
}


class Stub:
    """What the stub tells, and the GPU that it stands for."""

    def __init__(self, file: str) -> None:
        self.library = ctypes.CDLL(file)
        self.library.stub_launches.restype = ctypes.c_char_p

    def launches(self) -> list[dict[str, int]]:
        """The launches since the last call."""
        return [json.loads(line) for line in self.library.stub_launches().splitlines()]

    @contextmanager
    def gpu(self, name: str) -> Iterator[None]:
        """Another GPU within the block; an H100 after it."""
        self.library.stub_gpu(*GPUS[name])
        try:
            yield
        finally:
            self.library.stub_gpu(*GPUS["h100"])


def train(wishes: dict[str, Any], H: int, B: int, kind: str) -> list[dict[str, Any]]:
    """Call a layer of two directions and differentiate; return the plans of both passes."""
    from fastlstm.kernels.cuda import plan
    from fastlstm.spec import LayerSpec

    lstm = fastlstm.LSTM(I, H, bidirectional=True, dtype=DTYPES[kind])
    x = torch.randn(T, B, I, dtype=DTYPES[kind])
    with plan.override(tf32=kind == "tf32", **wishes), fastlstm.backend("cuda"):
        lstm(x)[0].sum().backward()
        spec = LayerSpec("LSTM", I, H, directions=2)
        device = plan.device_of(x)
        return [plan.plan_of(kind, back, B, spec, device)._asdict() for back in (False, True)]


def on_a_stream(stream: int, device: int, numbers: list[int] | None = None) -> None:
    """Start the forward kernel of H = 16 by its operator, as on such a device."""
    from fastlstm.kernels.cuda import library

    H, B = 16, 1
    numbers = numbers or library.cuda_plan(3, False, B, H, 1, [90, 132, 227 << 10, 1], [0, 0, 0])
    new = torch.zeros
    steps = new(T * B, H)
    library.lstm_recur_fwd(
        new(1, T * B, 4 * H), [new(4 * H, H)], [], None, None, None, None, None, T, B,
        steps, new(1, B, H), new(1, B, H), None, None, None, None, None,
        numbers, False, device, stream,
    )  # fmt: skip


def outcome(stub: Stub, call: Callable[[], Any]) -> dict[str, Any]:
    """What a call returns, the launches it made, its error."""
    stub.launches()
    found: dict[str, Any] = {"error": None, "result": None}
    try:
        found["result"] = call()
    except (RuntimeError, ValueError) as error:
        found["error"] = str(error)
    return found | {"launches": stub.launches()}


def misfits(stub: Stub) -> Iterator[tuple[str, dict[str, Any]]]:
    """Plans for another GPU than the one there is, and plans of nobody."""
    from fastlstm.kernels.cuda import library, plan

    h100 = plan.Device(90, 132, 227 << 10, 16)
    for name, gpu, wishes, H, B in (
        ("cluster too large", "half", {"regime": "cluster", "blocks": 16}, 256, 8),
        ("no clusters", "a100", {"regime": "cluster", "blocks": 2}, 64, 8),
        ("shared memory", "small", {"regime": "cluster", "blocks": 4}, 320, 8),
        ("not together", "small", {"regime": "grid"}, 300, 8),
    ):
        with stub.gpu(gpu):
            call = lambda w=wishes, h=H, b=B: train({"device": h100, **w}, h, b, "bf16")  # noqa: E731
            yield name, outcome(stub, call)
    yield "no such device", outcome(stub, lambda: on_a_stream(0, 7))
    good = library.cuda_plan(3, False, 1, 16, 1, list(h100[:4]), [0, 0, 0])
    for name, at, value in (("too many warps", 3, 40), ("too little memory", 7, 16)):
        bad = [*good[:at], value, *good[at + 1 :]]
        yield name, outcome(stub, lambda bad=bad: on_a_stream(0, 0, bad))


def main(file: str) -> None:
    """Print what every scenario comes to."""
    torch.ops.load_library(file)
    extension.cuda_error = lambda emulated: None
    stub = Stub(file)
    stub.library.stub_gpu(*GPUS["h100"])
    from fastlstm.kernels.cuda import library

    facts = {}
    for name in GPUS:
        with stub.gpu(name):
            facts[name] = library.cuda_device(0)
    layers = [
        {"wishes": wishes, "B": B, "kind": kind}
        | outcome(stub, lambda w=wishes, h=H, b=B, k=kind: train(w, h, b, k))
        for wishes, H, B in LAYERS
        for kind in DTYPES
        if wishes["regime"] != "wide" or DTYPES[kind].itemsize == 2
    ]
    stream = outcome(stub, lambda: on_a_stream(4321, 1)), outcome(stub, lambda: on_a_stream(0, 0))
    print(json.dumps({"facts": facts, "layers": layers, "stream": stream, **dict(misfits(stub))}))


if __name__ == "__main__":
    main(sys.argv[1])
