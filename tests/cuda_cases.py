"""Calls and plans of the CUDA kernels that their tests share, in the emulator and on a GPU."""

from contextlib import AbstractContextManager
from typing import Any

from cases import Case

SMALL_GPU = (80, 5, 60 << 10, 1)  # few processors: several launches, weights that lie in L2


def override(**wishes: Any) -> AbstractContextManager[None]:
    from fastlstm.kernels.cuda import plan

    if "device" in wishes:
        wishes["device"] = plan.Device(*wishes["device"])
    return plan.override(**wishes)


REGIMES: list[dict[str, Any]] = [
    {"regime": "block"},
    {"regime": "block", "batch": 16},
    {"regime": "cluster", "blocks": 2},
    {"regime": "cluster", "blocks": 4, "batch": 16},
    {"regime": "grid"},
    {"regime": "grid", "blocks": 2, "batch": 16},
]
IN_WIDE = {"regime": "wide"}  # which has 16-bit numbers only
CASES = [
    Case(T=4, B=19, I=10, H=64, directions=2, hx=False),
    Case(T=5, B=3, I=5, H=50, bias=False, layers=2, batch_first=True),
    Case(T=5, B=11, I=10, H=40, lengths=(2, 0, 1, 5, 3, 5, 4, 0, 1, 2, 5), directions=2, layers=2),
    Case(T=6, B=5, I=10, H=33, lengths=(2, 6, 1, 6, 3), packed=True, directions=2),
    Case(T=9, B=9, I=10, H=48, reset=True, cell_states=True),
    Case(T=1, B=1, I=1, H=33),
    Case(T=9, B=5, I=10, H=33, reset=True, lengths=(0, 9, 4, 1, 7)),
    Case(T=5, B=3, I=10, H=40, x_layout="reversed", grad_layout="all_alike", directions=2),
    Case(T=5, B=3, I=10, H=40, wrt=("c0",), through=("h_n",)),
    Case(T=5, B=3, I=10, H=40, wrt=("x",), through=("y",), hx=False),
]


def named(wishes: dict[str, Any]) -> str:
    return "-".join(str(value) for value in wishes.values())


# (H, what is asked of the plan): every size of a cluster, idle blocks and warps in it, weights in
# shared memory and in L2, several launches.
WIDE: list[tuple[int, dict[str, Any]]] = [
    (130, {}),
    (200, {"regime": "cluster", "blocks": 8}),
    (144, {"regime": "cluster", "blocks": 16}),
    (256, {"regime": "cluster", "blocks": 16}),
    (330, {"regime": "grid"}),
    (300, {"device": SMALL_GPU}),
    (130, {"device": SMALL_GPU, "batch": 16}),
]
WIDE_CASE = Case(T=3, B=10, I=5, H=0, directions=2, lengths=(3, 1, 0, 2, 3, 3, 1, 2, 2, 3))
