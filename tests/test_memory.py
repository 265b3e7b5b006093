"""A call that gets no memory raises; the process lives, and the module works afterwards."""

import json
import mmap
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastlstm

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="it limits memory as Linux does")


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
@pytest.mark.parametrize(
    ("last", "step"), [(600, 100), pytest.param(600, 30, marks=pytest.mark.slow)]
)
def test_train_with_too_little_memory(backend: str, last: int, step: int) -> None:
    sweep(backend, 2048, last, step)


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
@pytest.mark.parametrize("kind", ["cell", "packed", "projected", "RNN", "int8", "bfloat16"])
@pytest.mark.parametrize("step", [40, pytest.param(10, marks=pytest.mark.slow)])
def test_compute_other_layers_with_too_little_memory(backend: str, step: int, kind: str) -> None:
    sweep(backend, 1024, 160, step, kind)


@pytest.mark.parametrize("backend", ["cuda"], indirect=True)
@pytest.mark.parametrize(("last", "step"), [(40, 20), (60, 2)])
def test_emulate_with_too_little_memory(backend: str, last: int, step: int) -> None:
    sweep(backend, 128, last, step)


def sweep(backend: str, size: int, last: int, step: int, kind: str = "LSTM") -> None:
    """Every limit ends in a result or an exception that says what was missing."""
    script = Path(__file__).with_name("memory_limit.py")
    arguments = [sys.executable, script, backend, *map(str, (size, last, step)), kind]
    # Large blocks are mapped, and go when they are freed: the heap keeps none that look leaked.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=True)
    ended = json.loads(done.stdout.splitlines()[-1])
    bad = {
        more: how for more, how in ended.items() if how != "result" and "memory" not in how.lower()
    }
    assert not bad
    assert ended[str(last)] == "result"
    assert ended["0"] != "result"


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
@pytest.mark.parametrize("infer", [False, True])
def test_ask_for_more_memory_than_there_is(backend: str, infer: bool) -> None:
    """The error names the size."""
    x = torch.zeros(1, 1, 1).expand(1 << 45, 1, 1)
    with torch.inference_mode(infer), pytest.raises(RuntimeError, match=f"{1 << 47} bytes"):
        fastlstm.LSTM(1, 1)(x)


TRAIN = """
import resource, torch, fastlstm

def pages():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

torch.set_num_threads(1)
lstm, x, dy = fastlstm.LSTM(2, 20), torch.randn(20, 192, 2), torch.randn(20, 192, 20)
with fastlstm.backend("cpu"):
    for _ in range(20):
        before = pages()
        lstm(x)[0].backward(dy)
print(pages() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators have other rules")
def test_train_in_memory_that_stays() -> None:
    """A training step does not give its 2 MB back to the system for the next one to get anew."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    arguments = [sys.executable, "-c", TRAIN]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=True)
    kept = 20 * 192 * 6 * 20 * 4 // mmap.PAGESIZE  # pages of gates, c and y
    assert int(done.stdout) < kept // 10
