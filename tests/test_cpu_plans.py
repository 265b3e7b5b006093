"""Who computes what on a CPU: a pure function of sizes, threads and caches."""

import pytest

from fastlstm import extension
from fastlstm.kernels import cpu
from fastlstm.spec import LayerSpec

pytestmark = pytest.mark.skipif(
    extension.error() is not None, reason=f"the extension is missing: {extension.error()}"
)

MB = 1 << 20
SERVER = (2 * MB, 32 * MB, 0)  # L2, L3, whether some cores are slower
LAPTOP = (MB // 2, 8 * MB, 0)


def plan(
    H: int,
    B: int,
    threads: int,
    *,
    T: int = 40,
    D: int = 1,
    machine: tuple[int, int, int] = SERVER,
) -> str:
    return cpu.plan(LayerSpec("LSTM", H, H, directions=D), T, B, threads, machine)


def test_input_products_are_computed_ahead_where_reading_w_ih_would_show() -> None:
    assert "ahead" in plan(512, 8, 1)
    assert "ahead" in plan(512, 8, 2)
    # Many rows hide it, one step has nothing ahead, and w_ih in L2 is read fast enough.
    assert "fused" in plan(512, 128, 1)
    assert "fused" in plan(512, 8, 1, T=1)
    assert "fused" in plan(128, 8, 1)


def test_threads_share_a_step_where_each_would_read_all_weights() -> None:
    assert "shared by 2 threads" in plan(512, 8, 2)
    assert "shared by 16 threads" in plan(1024, 8, 16)
    # Small layers are not worth a barrier.
    assert "no barrier" in plan(32, 8, 2)
    # A direction for each thread.
    assert "no barrier" in plan(256, 16, 2, D=2)


@pytest.mark.parametrize("threads", [1, 2, 16, 64])
@pytest.mark.parametrize("B", [1, 7, 64, 1000])
def test_every_size_has_a_plan(B: int, threads: int) -> None:
    for H in (1, 64, 500, 2048):
        for machine in (SERVER, LAPTOP):
            for D in (1, 2):
                assert "a step reads" in plan(H, B, threads, D=D, machine=machine)


def test_caches_decide_where_weights_are_read() -> None:
    assert "from L2" in plan(256, 8, 1)
    assert "from L3" in plan(256, 8, 1, machine=LAPTOP)
    assert "from memory" in plan(1024, 8, 1, machine=LAPTOP)
    # Two threads share the weights, and each half fits L2.
    assert "from L3" in plan(384, 8, 1, machine=(3 * MB // 2, 32 * MB, 0))
    assert "from L2" in plan(384, 8, 2, machine=(3 * MB // 2, 32 * MB, 0))
    assert plan(384, 8, 2) == cpu.plan(LayerSpec("LSTM", 384, 384), 40, 8, 2, SERVER)
    assert "a step reads" in cpu.plan(LayerSpec("LSTM", 384, 384), 40, 8, 2)  # this machine's
