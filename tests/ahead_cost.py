"""`python tests/ahead_cost.py`: what starting kernels that were compiled ahead costs the host.

On the stand-in for the driver, whose launches do nothing: the table shows the time from Python to
the driver, and that of a whole call. No GPU is needed, and none is measured.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

os.environ |= {"TRITON_INTERPRET": "0", "FASTLSTM_TRITON": "ahead"}
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from ahead_host import DRIVER, library
from ahead_scenarios import operands
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import fastlstm
from fastlstm import extension
from fastlstm.kernels import triton as backend
from fastlstm.kernels.triton.ahead import library as ahead

CALLS = 2000
# A call without gradients; of it the way to the driver; of the operator the same; a call of packed
# rows; a forward call that keeps what backward needs; its backward pass, with all of autograd.
COLUMNS = "inference", "to driver", "operator", "packed", "training", "backward"
SHAPES = {  # of the tasks: I, H, directions, B, T
    "binary": (10, 32, 1, 512, 20),
    "mnist-lstm": (28, 64, 1, 128, 28),
    "mnist-lstm128": (28, 128, 1, 128, 28),
    "mnist-blstm": (28, 64, 2, 256, 28),
    "hello": (5, 5, 1, 1, 6),
}


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    with TemporaryDirectory() as name:
        folder = Path(name)
        built = library(folder, "-O2")
        _names_of_kernels(folder / "kernels")
        stub = ctypes.CDLL(str(folder / DRIVER))
        stub.stub_launched.restype = ctypes.c_int64
        torch.ops.load_library(built)
        extension.triton_error = lambda: None
        ahead.FOLDER = folder / "kernels"
        backend._input_obstacle = lambda x: None
        backend.TritonBackend.infers_on_cpu = True
        print(f"first call: {_first() / 1e6:.1f} ms")
        print(f"{'us, median':20}", *(f"{name:>12}" for name in COLUMNS))
        with fastlstm.backend("triton"):
            for shape in SHAPES:
                print(f"{shape:20}", *_row(*SHAPES[shape], stub.stub_launched))


def _names_of_kernels(folder: Path) -> None:
    from ptx.ahead import folder_of_names

    folder_of_names(folder, 80)


def _first() -> int:
    layer, x = _layer(28, 64, 1, 128, 28)
    begin = time.perf_counter_ns()
    there = mock.patch.object(torch.cuda, "is_available", lambda: True)
    with there, torch.no_grad(), fastlstm.backend("triton"):
        layer(x)
    return time.perf_counter_ns() - begin


def _layer(I: int, H: int, D: int, B: int, T: int) -> tuple[fastlstm.LSTM, Tensor]:
    layer = fastlstm.LSTM(I, H, bidirectional=D == 2, dtype=torch.bfloat16)
    return layer, torch.zeros(T, B, I, dtype=torch.bfloat16)


def _row(I: int, H: int, D: int, B: int, T: int, launched: Callable[[], int]) -> list[str]:
    layer, x = _layer(I, H, D, B, T)
    arguments, packed = operands(layer, x), pack_padded_sequence(x, torch.full((B,), T))
    operator = torch.ops.fastlstm.lstm_fwd_triton.default
    with torch.no_grad():
        whole = _timed(lambda: layer(x))
        driver = _timed(lambda: layer(x), launched)
        alone = _timed(lambda: operator(*arguments), launched)
        rows = _timed(lambda: layer(packed))
    training, backward = _step(layer, x)
    found = whole, driver, alone, rows, training, backward
    return [f"{value:12.1f}" for value in found]


def _step(layer: fastlstm.LSTM, x: Tensor) -> tuple[float, float]:
    """Return the median times of both passes of a training step in us."""
    there, back = [], []
    dy = torch.zeros_like(layer(x)[0])
    for _ in range(CALLS):
        layer.zero_grad()
        begin = time.perf_counter_ns()
        y, _ = layer(x)
        middle = time.perf_counter_ns()
        y.backward(dy)
        there.append(middle - begin)
        back.append(time.perf_counter_ns() - middle)
    return median(there) / 1e3, median(back) / 1e3


def _timed(call: Callable[[], Any], end: Callable[[], int] | None = None) -> float:
    """Return the median time of a call in us, or of its way to the last launch."""
    found = []
    for _ in range(CALLS):
        begin = time.perf_counter_ns()
        call()
        found.append((end() if end else time.perf_counter_ns()) - begin)
    return median(found) / 1e3


if __name__ == "__main__":
    main()
