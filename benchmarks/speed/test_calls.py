"""``python -m pytest benchmarks``: the named cases under pytest-benchmark, for before and after.

python -m pytest benchmarks -k fastlstm --benchmark-autosave       # before a change
python -m pytest benchmarks -k fastlstm --benchmark-compare        # after it
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ..providers import provider
from .cases import CASES
from .check import Judge
from .workload import MODES, make_workload


@pytest.mark.parametrize("name", ["fastlstm", "torch", "onnxruntime"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES.values(), ids=lambda case: case.name)
def test_call(benchmark: Any, case: Any, mode: str, name: str) -> None:
    """One call, after its results have been checked."""
    if (mode == "step") != (case.T == 1):
        pytest.skip("a step at a time is for cases of one step, and they are for nothing else")
    work = make_workload(case, mode, torch.float32)
    if reason := provider(name).missing() or provider(name).refuses(work):
        pytest.skip(reason)
    benchmark.group = f"{case.name}, {mode}"
    with torch.inference_mode(mode != "train"):
        contender = provider(name).contender(work)
        Judge(work).error(name, contender, ours=name == "fastlstm")
        benchmark(contender.call)
