"""Choosing a backend, asking what there is, and asking what a call would run."""

import os
import subprocess
import sys
import sysconfig
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils.rnn import pack_sequence

import fastlstm
from fastlstm import extension
from fastlstm.backends import choice, select
from fastlstm.kernels.base import get, once
from fastlstm.kernels.triton import builder
from fastlstm.spec import LayerSpec

T, B, I, H = 6, 4, 3, 5
X = torch.zeros(T, B, I)
SPEC = LayerSpec("LSTM", I, H)
needs_extension = pytest.mark.skipif(
    extension.error() is not None, reason=f"the extension is missing: {extension.error()}"
)


def test_context_and_setter() -> None:
    with fastlstm.backend("auto"):
        with fastlstm.backend("reference"):
            assert select(X, (SPEC,)).name == "reference"
            with fastlstm.backend("auto"):
                fastlstm.backend("reference")  # from here on, until the block ends
                assert select(X, (SPEC,)).name == "reference"
            assert select(X, (SPEC,)).name == "reference"
        best = "cpu" if extension.error() is None else "torch"
        assert select(X, (SPEC,)).name == best


def test_context_ends_with_an_exception() -> None:
    with fastlstm.backend("auto"):
        with pytest.raises(KeyError), fastlstm.backend("reference"):
            raise KeyError
        assert fastlstm.explain(fastlstm.LSTM(I, H), X).reason.startswith("auto")


def test_triton_needs_a_compiler_and_headers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Not of its kernels, but of what starts them."""
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "install gcc or clang" in str(builder.problem())
    monkeypatch.setenv("CC", "cc")
    monkeypatch.setattr(sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
    assert f"has no {tmp_path / 'Python.h'}" in str(builder.problem())


def test_each_thread_has_its_ownchoice() -> None:
    seen = []

    def work() -> None:
        seen.append(repr(fastlstm.backends()).splitlines()[-1])

    with fastlstm.backend("reference"):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        work()
    default = os.environ.get("FASTLSTM_BACKEND", "auto")
    assert seen == [f"in use here: {default}", "in use here: reference"]


def test_unknown_and_missing_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="'gpu' is not a backend, choose one of auto, tuned"):
        fastlstm.backend("gpu")
    monkeypatch.setattr(get("cuda"), "error", lambda: "nvcc was not found")
    with pytest.raises(RuntimeError, match=r'"cuda" backend is not available.*nvcc was not found'):
        fastlstm.backend("cuda")
    assert select(X, (SPEC,)).name in ("cpu", "torch")


def test_environment_may_name_a_missing_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing works, calling does not: nothing takes its place."""
    monkeypatch.setattr(choice, "name", "cuda")
    monkeypatch.setattr(choice, "fast", None)
    monkeypatch.setattr(get("cuda"), "error", lambda: "nvcc was not found")
    with pytest.raises(RuntimeError, match=r'"cuda" backend cannot .*: nvcc was not found'):
        fastlstm.LSTM(I, H)(X)


def test_triton_without_a_gpu_is_reported() -> None:
    """Another process: the interpreter, which the tests use, is chosen when Triton is loaded."""
    pytest.importorskip("triton")
    code = "import fastlstm; print(fastlstm.backends()); fastlstm.backend('triton')"
    environment = {**os.environ, "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    reason = "there is no CUDA device, and TRITON_INTERPRET=1 is not set"
    assert f"triton    no   {reason}" in run.stdout
    assert f'the "triton" backend is not available here: {reason}' in run.stderr


@pytest.mark.parametrize("version", ["3.5.1", "2.3.1", "3.5.0+git00112233"])
def test_an_old_triton_is_named(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr("triton.__version__", version)
    reason = f"Triton {version} is too old: the kernels need 3.6"
    assert import_module("fastlstm.kernels.triton")._triton_problem.__wrapped__() == reason


def test_a_missing_triton_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one line, which says what to do; the same as a user without a GPU sees."""
    module = import_module("fastlstm.kernels.triton")
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    reason = module._triton_problem.__wrapped__()
    assert reason == 'Triton is not installed; to install it, run: pip install "fastlstm[triton]"'


def test_threads_load_a_backend_once() -> None:
    """An operator takes no second kernel."""
    calls: list[int] = []

    def load() -> str:
        calls.append(threading.get_ident())
        time.sleep(0.05)
        return "loaded"

    loaded = once(load)
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(lambda _: loaded(), range(8))) == ["loaded"] * 8
    assert len(calls) == 1


def test_a_missing_extension_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "error", lambda: "no compiler was found")
    assert fastlstm.backends()["cpu"] == (False, "no compiler was found")
    assert "cpu       no   no compiler was found" in str(fastlstm.backends())
    with fastlstm.backend("auto"):
        assert select(X, (SPEC,)).name == "torch"
        assert select(X, (SPEC._replace(peephole=True),)).name == "reference"
        assert "no compiler" in fastlstm.explain(fastlstm.LSTM(I, H), X).reason
    with pytest.raises(RuntimeError, match=r'"cpu" backend is not available.*no compiler'):
        fastlstm.backend("cpu")


def test_backends_reports_all() -> None:
    report = fastlstm.backends()
    assert list(report) == ["reference", "cpu", "torch", "triton", "cuda"]
    assert report["reference"].available
    assert report["cpu"].available == (extension.error() is None)
    assert len(str(report).splitlines()) == len(report) + 1


@pytest.mark.parametrize(
    ("name", "code", "output"),
    [("reference", 0, "in use here: reference"), ("gpu", 1, "FASTLSTM_BACKEND: 'gpu' is not")],
)
def test_environment(name: str, code: int, output: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import fastlstm; print(fastlstm.backends())"],
        env={**os.environ, "FASTLSTM_BACKEND": name},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert output in done.stdout + done.stderr


@needs_extension
def test_auto_takes_the_reference_where_kernels_cannot() -> None:
    with fastlstm.backend("auto"):
        assert select(X, (SPEC,)).name == "cpu"
        assert select(X.to("meta"), (SPEC,)).name == "torch"
        assert select(X.to("meta"), (SPEC._replace(peephole=True),)).name == "reference"
        assert select(X.to(torch.complex64), (SPEC,)).name == "reference"


@needs_extension
@pytest.mark.parametrize("name", ["auto", "cpu"])
def test_higher_derivatives_are_the_references(name: str) -> None:
    """Kernels have the first derivative, in reverse mode, of any number of vmapped calls."""
    seen: list[str] = []

    def note(x: Tensor) -> Tensor:
        seen.append(select(x, (SPEC,)).name)
        return x.square().sum()

    with fastlstm.backend(name):
        torch.func.vmap(note)(X)
        torch.func.vmap(torch.func.grad(note))(X)
        torch.func.jacrev(torch.func.vmap(note))(X)
        assert seen == ["cpu"] * 3
        del seen[:]
        torch.func.jvp(note, (X,), (X,))
        torch.func.hessian(note)(X[0, 0])
        torch.func.jacrev(torch.func.grad(note))(X[0, 0])
        with forward_ad.dual_level():
            note(X)
            told = fastlstm.explain(fastlstm.LSTM(I, H), X)
        assert seen == ["reference"] * 4
    assert told.backend == "reference"
    assert told.reason.startswith("forward-mode AD is active")


@needs_extension
def test_explicit_cpu_never_falls_back() -> None:
    lstm = fastlstm.LSTM(I, H)
    with fastlstm.backend("cpu"):
        with pytest.raises(RuntimeError, match="on meta"):
            lstm.to("meta")(X.to("meta"))
        with pytest.raises(RuntimeError, match="complex64"):
            fastlstm.LSTM(I, H, dtype=torch.complex64)(X.to(torch.complex64))


def test_explain(backend: str) -> None:
    lstm = fastlstm.LSTM(I, H, 2, bidirectional=True, batch_first=True)
    cell = fastlstm.LSTMCell(I, H)
    packed = pack_sequence([torch.zeros(3, I), torch.zeros(2, I)])
    for module, x in (lstm, X), (lstm, X[0]), (lstm, packed), (cell, X[0]), (cell, X[0, 0]):
        told = fastlstm.explain(module, x)
        assert told.backend == backend
        assert len(told.plan) == getattr(module, "num_layers", 1)
        assert all(told.plan)
        assert told.reason == f'backend("{backend}") asks for it'
        assert str(told).startswith(f"backend  {backend}\n")
    if backend == "cpu":
        assert told.kernel == extension.isa()


def test_explain_says_why() -> None:
    lstm = fastlstm.LSTM(I, H, device="meta")
    with fastlstm.backend("auto"):
        told = fastlstm.explain(lstm, X.to("meta"))
        other = fastlstm.explain(lstm, X.to("meta"), return_cell_states=True)
    assert told.backend == "torch"
    assert told.reason == "auto: torch.float32 on meta"
    assert other.backend == "reference"
    assert other.reason == "auto: torch.nn does not return the cell states"
    with pytest.raises(TypeError, match=r"got LSTM; convert it with from_torch"):
        fastlstm.explain(nn.LSTM(I, H), X)
    with pytest.raises(
        RuntimeError, match=rf"input of {I} features, as the module takes, got \(.*{I + 1}\)"
    ):
        fastlstm.explain(lstm, torch.zeros(T, B, I + 1))


def test_inference_compiles_in_one_graph(backend: str) -> None:
    torch.compiler.reset()
    lstm = fastlstm.LSTM(I, H, 2, bidirectional=True, dtype=torch.float64)
    x, lengths = torch.randn(T, B, I, dtype=torch.float64), torch.tensor([6, 0, 3, 1])
    compiled = torch.compile(lstm, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), lstm(x))
        torch.testing.assert_close(compiled(x, lengths=lengths), lstm(x, lengths=lengths))
