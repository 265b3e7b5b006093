"""Plans of the CUDA kernels that they do not choose by themselves at these shapes, on a GPU.

Under `compute-sanitizer` they show races between threads of a block, and what lies outside of
memory: tests/README.md has the commands.
"""

from dataclasses import replace
from typing import Any

import gpu
import pytest
import torch
from cases import Case, evaluate, fast
from cuda_cases import CASES, IN_WIDE, REGIMES, WIDE, WIDE_CASE, named, override
from gpu import assert_same_bits, check, every_precision, numbers_of

from benchmarks.speed.precision import PRECISIONS, Precision

pytestmark = [*gpu.MARKS, pytest.mark.only("cuda")]
kernels = gpu.kernels


def skip_without_clusters(wishes: dict[str, Any]) -> None:
    from fastlstm.kernels.cuda import plan

    largest = plan.device_of(torch.empty(0, device=gpu.DEVICE)).cluster
    if wishes.get("regime") in ("cluster", "wide") and largest < wishes.get("blocks", 2):
        pytest.skip(f"the largest cluster of this GPU has {largest} blocks")


@every_precision
@pytest.mark.parametrize("wishes", REGIMES, ids=named)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_regime(case: Case, wishes: dict[str, Any], precision: Precision) -> None:
    skip_without_clusters(wishes)
    check(case, precision, override(**wishes))


@every_precision
@pytest.mark.parametrize(("H", "wishes"), WIDE, ids=lambda value: str(value)[:40])
def test_wide_layers(H: int, wishes: dict[str, Any], precision: Precision) -> None:
    skip_without_clusters(wishes)
    case = replace(WIDE_CASE, H=H)
    if precision.tf32 and wishes.get("batch") == 16:  # twice the bytes of 16-bit numbers
        with pytest.raises(RuntimeError, match="no room for so many sequences"):
            check(case, precision, override(**wishes))
    else:
        check(case, precision, override(**wishes))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize(
    "case",
    [
        *CASES,
        replace(WIDE_CASE, H=513),
        replace(WIDE_CASE, H=700),
        Case(T=40, B=17, I=20, H=768, directions=2),
    ],
    ids=str,
)
def test_the_regime_wide(case: Case, precision: str) -> None:
    wishes = IN_WIDE | {"blocks": 16 if case.H > 128 else 8}
    skip_without_clusters(wishes)
    check(case, PRECISIONS[precision], override(**wishes))


@pytest.mark.parametrize("wishes", [*REGIMES, IN_WIDE | {"blocks": 16}], ids=named)
def test_many_steps_end_with_the_same_bits(wishes: dict[str, Any]) -> None:
    """The state of a step travels 2,000 times and never arrives stale."""
    skip_without_clusters(wishes)
    precision = PRECISIONS["bf16"]
    H = {"block": 128, "cluster": 192, "grid": 512, "wide": 768}[wishes["regime"]]
    numbers = numbers_of(case := Case(T=2000, B=64, I=32, H=H, hx=False), precision.dtype)
    if wishes.get("blocks") == 2 and wishes["regime"] == "grid":
        wishes = wishes | {"blocks": 16}
    with precision.applied(), override(**wishes):
        want = evaluate(case, precision.dtype, numbers, fast)
        for _ in range(9):
            assert_same_bits(evaluate(case, precision.dtype, numbers, fast), want)
