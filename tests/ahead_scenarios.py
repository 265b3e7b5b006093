"""What csrc/triton does around its kernels, on the stand-in for the driver: run in a process.

tests/test_executed_ahead.py starts :func:`scenarios` and judges what it returns.
"""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Callable
from itertools import product
from pathlib import Path
from threading import Thread
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fastlstm
from benchmarks.speed.precision import PRECISIONS
from fastlstm import extension
from fastlstm.kernels import triton as backend
from fastlstm.kernels.triton import config, plain
from fastlstm.kernels.triton.ahead import library as ahead
from fastlstm.kernels.triton.ahead.manifest import NAME
from fastlstm.spec import DENSE, LayerSpec

SHARED = 227 << 10
NEW, OLD = 12080, 11040  # versions of the driver
GPUS = {  # compute capability, shared memory of a block, version of the driver
    "older": (75, SHARED, NEW),
    "old driver": (80, SHARED, OLD),
    "small": (80, 16, NEW),
}
KINDS_AND_UNITS = {
    torch.bfloat16: (5, 16, 20, 50, 64, 100, 128),
    torch.float16: (7, 32, 104),
    torch.float32: (5, 16, 50, 64),
}


def said(call: Callable[[], Any]) -> str:
    """The error of a call, or what it returns."""
    try:
        return f"returned {call()}"
    except (RuntimeError, ValueError, TypeError) as error:
        return f"{type(error).__name__}: {error}"


def operands(layer: fastlstm.LSTM, x: Tensor) -> list[Any]:
    """The arguments of the forward operator, for inference."""
    (T, B), H, D = x.shape[:2], layer.hidden_size, 1 + layer.bidirectional
    new = lambda *size: torch.zeros(size, dtype=x.dtype)  # noqa: E731
    weights = [weight.detach() for weight in layer.parameters()]
    inputs = [x, weights, D, None, None, None, None, None]
    return [*inputs, new(T, B, D * H), new(D, B, H), new(D, B, H), None, None, None]


def scenarios(library: Path, folder: Path) -> dict[str, Any]:
    """Return what every scenario comes to; the names of kernels go to `folder`."""
    from ptx.ahead import folder_of_names  # it needs Triton, tests are collected without

    folder_of_names(folder, 80)
    stub = _served(library, folder, 80)

    def launches() -> list[dict[str, int]]:
        return [json.loads(line) for line in stub.stub_launches().splitlines()]

    found: dict[str, Any] = {}
    layer = fastlstm.LSTM(28, 64, bidirectional=True, dtype=torch.bfloat16)
    x = torch.zeros(3, 19, 28, dtype=torch.bfloat16)
    operator = torch.ops.fastlstm.lstm_fwd_triton.default
    with fastlstm.backend("triton"):
        with torch.no_grad():
            layer(x)
            found["inference"] = launches()
            threads = [Thread(target=layer, args=(x,)) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            launches()
            stub.stub_capture(True)
            fastlstm.LSTM(5, 5, dtype=torch.bfloat16)(x[..., :5])
            found["captured"] = len(launches()), bool(stub.stub_relaxed())
            stub.stub_capture(False)
            torch.compile(layer, backend="eager", fullgraph=True)(x)
            found["compiled"] = launches()
            layer(x[:1].repeat(1, 14, 1)[:, :264])
            layer(x[:1].repeat(1, 14, 1)[:, :265])
            found["many"] = [launch["x"] for launch in launches()]
        layer(x)[0].sum().backward()
        found["training"] = launches()
        projected = fastlstm.LSTM(28, 64, proj_size=8, dtype=torch.bfloat16)
        found["projected"] = said(lambda: projected(x))
        found["explained"] = str(fastlstm.explain(layer, x))
        with PRECISIONS["exact"].applied():
            exact = fastlstm.LSTM(28, 64)
            launches()
            exact(x.float())[0].sum().backward()
            found["exact"] = launches()
            found["exact explained"] = str(fastlstm.explain(exact, x.float()))
    found["backends"] = str(fastlstm.backends())
    weights = [weight.detach() for weight in layer.parameters()]
    many = x[:1, :1].expand(1 << 20, 1 << 24, 28)
    spec = LayerSpec("LSTM", 28, 64, directions=2)
    found["no memory"] = said(lambda: plain.forward(many, weights, spec, None, None, DENSE, None))
    found["operator"] = said(lambda: operator(*operands(layer, x.double())))
    spoiled = operands(layer, x)
    spoiled[8] = spoiled[8].float()
    found["another dtype"] = said(lambda: operator(*spoiled))
    spoiled = operands(layer, x)
    spoiled[9] = spoiled[9][:, 1:]
    found["another shape"] = said(lambda: operator(*spoiled))
    given: list[Any] = []
    torch.library.impl("fastlstm::lstm_fwd_triton_jit", "CPU")(_keeping(given))
    with config.override(regime="registers"):
        found["overridden"] = said(lambda: operator(*operands(layer, x)))
    operator(*operands(layer, x.float()[:0]), peephole=True)
    found["given"] = len(given), given[-1][0][2], given[-1][1]["peephole"]
    found["launches of others"] = len(launches())
    for device, (name, gpu) in enumerate(GPUS.items(), 1):
        stub.stub_gpu(*gpu)
        found[name] = ahead.problem_of(device)
    found["none"] = ahead.problem_of(9)
    return found


def of_general(library: Path, folder: Path) -> dict[tuple[Any, ...], Any]:
    """Return how many kernels calls start where there are those alone that every GPU gets."""
    from ptx.ahead import folder_of_names

    from fastlstm.kernels.triton.ahead.keys import general, keys
    from fastlstm.kernels.triton.ahead.plans import table

    folder_of_names(folder, 80, general(keys(table(80))))
    stub = _served(library, folder, 80)
    found: dict[tuple[Any, ...], Any] = {}

    def launches(call: Callable[[], Any]) -> int | str:
        stub.stub_launches()
        try:
            call()
        except (RuntimeError, ValueError) as error:
            return str(error)
        return len(stub.stub_launches().splitlines())

    for dtype, units in KINDS_AND_UNITS.items():
        for H, I, B in product(units, (3, 10, 28, 64, 130), (1, 19, 600)):
            layer, x = fastlstm.LSTM(I, H, dtype=dtype), torch.zeros(3, B, I, dtype=dtype)
            lengths = torch.full((B,), 2)
            with fastlstm.backend("triton"), PRECISIONS["tf32"].applied():
                with torch.no_grad():
                    inference = launches(lambda layer=layer, x=x: layer(x))
                training = [
                    launches(
                        lambda layer=layer, x=x, rows=rows: layer(x, **rows)[0].sum().backward()
                    )
                    for rows in ({}, {"lengths": lengths})
                ]
            found[dtype, H, I, B] = inference, *training
    return found


class Outputs(torch.nn.Module):
    """The outputs of a layer, without its states."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = fastlstm.LSTM(28, 64, bidirectional=True, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        """Return y."""
        return self.layer(x)[0]


def packaged(library: Path, folder: Path) -> dict[str, Any]:
    """Return what a program comes to that AOTInductor has compiled into a package."""
    from ptx.ahead import folder_of_names

    folder_of_names(folder, 80)
    stub = _served(library, folder, 80)
    x = torch.zeros(3, 19, 28, dtype=torch.bfloat16)
    with fastlstm.backend("triton"), torch.no_grad():
        program = torch.export.export(Outputs().eval(), (x,))
        package = torch._inductor.aoti_compile_and_package(
            program, package_path=str(folder / "program.pt2")
        )
        run = torch._inductor.aoti_load_package(package)
        stub.stub_launches()
        y = run(x)
    return {"y": tuple(y.shape), "launches": stub.stub_launches().splitlines()}


def of_clusters(library: Path, folder: Path) -> dict[str, Any]:
    """Return what layers come to that are spread over a cluster, or have no room for one."""
    from ptx.ahead import folder_of_names

    folder_of_names(folder, 90)
    stub = _served(library, folder, 90)
    layer = fastlstm.LSTM(28, 300, dtype=torch.bfloat16)
    x = torch.zeros(3, 19, 28, dtype=torch.bfloat16)
    operator = torch.ops.fastlstm.lstm_fwd_triton.default
    found: dict[str, Any] = {}
    with fastlstm.backend("triton"), torch.no_grad():
        operator(*operands(layer, x))
        _, found["launch"] = map(json.loads, stub.stub_launches().splitlines())  # after products
        found["many"] = said(lambda: operator(*operands(layer, x.repeat(1, 18, 1))))
    found["described"] = backend.TRITON.describe(LayerSpec("LSTM", 28, 300), 3, 19, x)
    found["room"] = ahead.gpu(0).together
    stub.stub_groups(0)
    found["no room"] = ahead.gpu(1).together
    manifest = folder / NAME
    manifest.write_text(manifest.read_text().replace('"blocks":16', '"blocks":4'))
    stub.stub_groups(7)
    ahead.load(lambda: None)  # reads it again
    found["wrong"] = ahead.gpu(2).together
    return found


def on_demand(library: Path, folder: Path, arch: int) -> dict[str, Any]:
    """Return what layers come to whose kernels Triton compiles when they are first called."""
    from ptx.ahead import named

    from fastlstm.kernels.triton.ahead import on_demand as triton
    from fastlstm.kernels.triton.gluon import CLUSTER_PROBLEM

    stub = _served(library, folder, arch, "auto")
    asked: list[str] = []
    shared = [1024]

    def image(arch: int, number: int) -> tuple[bytes, int]:
        key = triton._keys(arch)[number]
        asked.append(key.name)
        if key.units == 128:
            raise ValueError("a sentence")
        return f"{named(key, arch)}\0".encode(), shared[0]

    compiled, triton.image = triton.image, image
    layer = fastlstm.LSTM(28, 64, bidirectional=True, dtype=torch.bfloat16)
    x = torch.zeros(3, 19, 28, dtype=torch.bfloat16)
    found: dict[str, Any] = {"asked at first": list(asked), "no clusters": CLUSTER_PROBLEM}
    with config.override(batch=16), FakeTensorMode():  # plans of others are not this block's
        found["problem"] = ahead.problem_of(0)
    found["tried"] = list(asked)
    asked.clear()
    with fastlstm.backend("triton"):
        with torch.no_grad():
            layer(x)
            layer(x)
        found["inference"] = list(asked)
        found["launches"] = [json.loads(line) for line in stub.stub_launches().splitlines()]
        layer(x)[0].sum().backward()
        found["training"] = asked[1:]
        before = len(asked)
        stub.stub_launches()

        def first_call() -> None:
            with fastlstm.backend("triton"), torch.no_grad():
                fastlstm.LSTM(5, 5, dtype=torch.float16)(x[..., :5].half())

        threads = [Thread(target=first_call) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        found["threads"] = len(stub.stub_launches().splitlines())
        found["of threads"] = asked[before:]
        found["error"] = said(lambda: fastlstm.LSTM(28, 128, dtype=torch.bfloat16)(x))
        shared[0] = SHARED + 1
        found["shared"] = said(lambda: fastlstm.LSTM(28, 16, dtype=torch.bfloat16)(x))
        given: list[Any] = []
        torch.library.impl("fastlstm::lstm_fwd_triton_jit", "CPU")(_keeping(given))
        asked.clear()
        shared[0] = 1024
        fastlstm.LSTM(28, 300, dtype=torch.bfloat16)(x)
        found["wide"], found["left to Triton"] = list(asked), len(given)
        found["explained"] = str(fastlstm.explain(layer, x))
    found["backends"] = str(fastlstm.backends())
    found["clusters"] = ahead.gpu(0).clusters
    triton.image = mock.Mock(side_effect=KeyboardInterrupt)
    try:
        found["interrupted"] = ahead.problem_of(1)
    except KeyboardInterrupt:
        found["interrupted"] = "by Ctrl-C"
    triton.image = compiled
    found["compiled"] = ahead.problem_of(1)  # of a kernel that Triton has compiled in earnest
    return found


def _served(library: Path, folder: Path, arch: int, mode: str = "ahead") -> ctypes.CDLL:
    """Let the kernels of a folder compute, on a GPU of that architecture; return its driver."""
    os.environ["FASTLSTM_TRITON"] = mode
    stub = ctypes.CDLL(str(library.parent / "libcuda_stub.so"))
    stub.stub_launches.restype = ctypes.c_char_p
    stub.stub_gpu(arch, SHARED, NEW)
    torch.ops.load_library(library)
    backend._input_obstacle = lambda x: None
    extension.triton_error = lambda: None
    ahead.FOLDER = folder
    backend.TritonBackend.infers_on_cpu = True
    with mock.patch.object(torch.cuda, "is_available", lambda: True):
        assert backend.TRITON.error() is None  # once and for all
    stub.stub_launches()
    return stub


def _keeping(given: list[Any]) -> Callable[..., None]:
    """An operator in Python that keeps its arguments, and refuses the first call."""

    def keep(*arguments: Any, **options: Any) -> None:
        given.append((arguments, options))
        if len(given) == 1:
            ahead.failed("a sentence")
            raise ValueError("a sentence")

    return keep
