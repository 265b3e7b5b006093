"""What auto takes on a GPU that was measured: an H100 or H200, of which nothing else is known."""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import gpu
import pytest
import torch
from cases import Results
from gpu import DEVICE, assert_same_bits
from test_gpu_calls import compilations, leaves_and_work

import fastlstm
from benchmarks.speed.gpu_timing import capture
from fastlstm import record
from fastlstm.kernels.base import get

pytestmark = [
    *gpu.MARKS,
    pytest.mark.only("triton"),
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0),
        reason="auto knows nothing of this GPU without a record",
    ),
]


@pytest.fixture(autouse=True)
def no_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The choice is auto's, and nothing is known of this machine."""
    monkeypatch.setenv("FASTLSTM_CACHE", str(tmp_path))
    monkeypatch.setattr(record, "_known", {})
    with fastlstm.backend("auto"):
        yield


@pytest.mark.parametrize("train", [False, True], ids=["infer", "train"])
@pytest.mark.parametrize(
    ("dtype", "H", "name"),
    [
        (torch.float32, 512, "torch"),
        (torch.bfloat16, 64, "triton"),
        (torch.bfloat16, 128, "triton"),
        (torch.float64, 64, "torch"),
    ],
    ids=str,
)
def test_auto_takes_what_is_faster(dtype: torch.dtype, H: int, name: str, train: bool) -> None:
    """And computes what it says, eagerly and in a capture after one call."""
    lstm = fastlstm.LSTM(28, H, device=DEVICE, dtype=dtype)
    x = torch.randn(28, 128, 28, device=DEVICE, dtype=dtype)
    incoming = torch.randn(28, 128, H, device=DEVICE, dtype=dtype) if train else None
    _, work = leaves_and_work(lstm, x.requires_grad_(train), incoming)
    found: Results = {}
    said = []

    def call() -> None:
        found.update(work())
        said.append(fastlstm.explain(lstm, x).backend)

    with torch.set_grad_enabled(train):
        with fastlstm.backend(name):
            want = work()
        call()
        assert_same_bits(found, want)
        graph = capture(call)
        graph.replay()
        assert_same_bits(found, want)
    assert set(said) == {name}


def test_auto_compiles_nothing_in_a_capture() -> None:
    """float16 is faster in graphs, but the calls before a capture were cuDNN's."""
    lstm = fastlstm.LSTM(28, 33, device=DEVICE, dtype=torch.float16)
    x = torch.randn(28, 129, 28, device=DEVICE, dtype=torch.float16)
    found: Results = {}
    with torch.no_grad():
        ready = get("triton").is_ready(lstm.specs(), x, x.shape[1])
        with compilations() if not ready else nullcontext([]) as compiled:
            graph = capture(lambda: found.update(y=lstm(x)[0]))
        graph.replay()
        assert not compiled
        with fastlstm.backend("triton" if ready else "torch"):
            assert torch.equal(found["y"], lstm(x)[0])


@pytest.mark.parametrize("options", [{"reset": True}, {"lengths": True}], ids=str)
def test_auto_computes_what_cudnn_lacks(options: dict[str, bool]) -> None:
    lstm = fastlstm.LSTM(28, 64, device=DEVICE)
    x = torch.randn(20, 16, 28, device=DEVICE)
    given: dict[str, Any] = {
        "reset": torch.rand(20, 16, device=DEVICE) < 0.2,
        "lengths": torch.randint(0, 21, (16,), device=DEVICE),
    }
    given = {name: given[name] for name in options}
    assert fastlstm.explain(lstm, x, **given).backend == "triton"
    with fastlstm.backend("triton"):
        want = lstm(x, **given)[0]
    assert torch.equal(lstm(x, **given)[0], want)
