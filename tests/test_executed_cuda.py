"""The PTX that nvcc makes of the CUDA C++ kernels, executed on CPU tensors: every regime.

The host's part is that of csrc/cuda, on a stub of the CUDA runtime. It needs nvcc, and no GPU.
tests/README.md says what this proves.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case
from cuda_cases import CASES, IN_WIDE, REGIMES, SMALL_GPU, WIDE_CASE
from cuda_stub import host_library
from executed import Broken, CudaRun, Verdict, broken, judged

from benchmarks import BenchmarkError
from benchmarks.gpu.cuda_kernels import nvcc
from benchmarks.speed.precision import PRECISIONS
from benchmarks.speed.worker import Worker

pytestmark = [
    pytest.mark.executed,
    pytest.mark.skipif(
        torch.cuda.is_available(),
        reason="on a machine with a GPU `-m gpu` tests the kernels there",
    ),
]
TIMEOUT = 600  # seconds for a case, which takes a few where the machine is not busy
Record = Callable[[str, object], None]


def runs() -> Iterator[CudaRun]:
    """Each case in each regime. Precisions take turns, and GPUs where both have the regime."""
    names = list(PRECISIONS)
    for number, case in enumerate(CASES):
        for place, wishes in enumerate(REGIMES):
            arch = 80 if wishes["regime"] != "cluster" and number % 2 == 0 else 90
            yield CudaRun(case, names[(number + place) % len(names)], arch, wishes)
        yield CudaRun(case, ("bf16", "fp16")[number % 2], 90, IN_WIDE)


# The largest clusters; weights that lie in L2, and several launches.
WIDE = [
    CudaRun(Case(T=3, B=3, I=5, H=700), "bf16", 90, {}),
    CudaRun(replace(WIDE_CASE, H=144), "fp16", 90, {"regime": "cluster", "blocks": 16}),
    CudaRun(replace(WIDE_CASE, H=130), "bf16", 80, {"device": SMALL_GPU, "batch": 16}),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The host's part of the kernels."""
    try:
        nvcc()
    except BenchmarkError as error:
        pytest.skip(str(error))
    return host_library(tmp_path_factory.mktemp("host"))


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    """A process that has no emulator of csrc/cuda, whose operators are those of the library."""
    assert os.environ["FASTLSTM_EMULATE"] == "1"  # by conftest.py: the operators take CPU tensors
    with Worker(probe=int) as found:
        yield found


@pytest.mark.parametrize("run", [*runs(), *WIDE], ids=str)
def test_error_is_that_of_pytorch(
    worker: Worker, library: Path, run: CudaRun, record_property: Record
) -> None:
    verdict: Verdict = worker.run(judged, run._replace(library=library), timeout=TIMEOUT)
    record_property(f"executed in {run.precision}", verdict.ratio)
    assert not verdict.complaints, "\n".join([str(run), *verdict.complaints])
    assert not verdict.races, f"{run}: {sorted(verdict.races)}"
    ways = {name.split("_")[1] for name in verdict.kernels}
    regimes = {name.split("_")[2] for name in verdict.kernels}
    assert ways == {"fwd", "bwd"}
    assert regimes == {run.wishes.get("regime", "grid" if run.wishes else "wide")}


WAIT = r"mbarrier\.try_wait[^;]*;\s*selp\.u32 (\S+), 1, 0, p;"  # of device.h
BROKEN = {
    "block without a barrier": ({"regime": "block"}, r"bar\.sync\s+0;", ""),
    "cluster that does not wait": ({"regime": "cluster", "blocks": 2}, WAIT, r"mov.u32 \1, 1;"),
    "wide without a barrier": (IN_WIDE, r"bar\.sync\s+0;", ""),
    "wide that does not wait": (IN_WIDE, WAIT, r"mov.u32 \1, 1;"),
}


@pytest.mark.parametrize(("wishes", "pattern", "instead"), BROKEN.values(), ids=BROKEN)
def test_what_is_broken_is_seen(
    worker: Worker, library: Path, wishes: dict[str, Any], pattern: str, instead: str
) -> None:
    """In the forward kernel, the first of its pair and the only one that runs."""
    run = CudaRun(CASES[4], "bf16", 90, wishes, library)
    found: list[Broken] = worker.run(broken, run, pattern, instead, timeout=TIMEOUT)
    assert found[0].seen
