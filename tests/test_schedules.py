"""How plans of the CPU kernels do on machines with many cores, or unequal ones: by simulation."""

import itertools
import re
from pathlib import Path

import pytest
from schedule import SLICE, Core, Step, call, region

from fastlstm import extension
from fastlstm.spec import LayerSpec

pytestmark = pytest.mark.skipif(
    extension.error() is not None, reason=f"the extension is missing: {extension.error()}"
)

MB = 1 << 20
SERVER = (2 * MB, 64 * MB, 0)  # L2, L3, whether some cores are slower
APPLE = (4 * MB, 16 * MB, 1)
HYBRID = (2 * MB, 24 * MB, 1)
T = 40
SIZES = [(256, 1), (256, 8), (512, 1), (512, 8), (512, 64), (1024, 8), (1024, 32), (128, 256)]


def plan(H: int, B: int, threads: int, machine: tuple[int, ...], D: int = 1) -> Step:
    return Step.of(LayerSpec("LSTM", H, H, directions=D), T, B, threads, machine)


def time(H: int, B: int, cores: list[Core], machine: tuple[int, ...], D: int = 1) -> float:
    return call(plan(H, B, len(cores), machine, D), cores, T)


def test_a_region_ends_when_its_items_are_done() -> None:
    even = [Core()] * 4
    assert region(even[:1], 4, 1e6) == pytest.approx(4e6, rel=0.01)
    assert region(even, 4, 1e6) == pytest.approx(1e6, rel=0.01)
    # Nobody waits for threads that do not come.
    assert region([Core(), *[Core(comes=False)] * 3], 4, 1e6) == pytest.approx(4e6, rel=0.01)
    # Five items on four cores: one has two. A slow core in the middle of one is waited for.
    assert region(even, 5, 1e6) == pytest.approx(2e6, rel=0.01)
    assert region([Core(), Core(0.25)], 2, 1e6) == pytest.approx(4e6, rel=0.01)
    assert region([Core(), Core(0.25)], 8, 1e6) == pytest.approx(8e6, rel=0.02)


@pytest.mark.parametrize(("H", "B"), SIZES)
def test_more_cores_are_never_slower(H: int, B: int) -> None:
    """Up to 128 threads; a plan takes fewer where the meeting costs more than they save."""
    times = [time(H, B, [Core()] * n, SERVER) for n in (1, 2, 4, 8, 16, 32, 64, 128)]
    for fewer, more in itertools.pairwise(times):
        assert more < 1.1 * fewer
    if H >= 512:
        assert times[1] < 0.6 * times[0]
        assert times[4] < times[0] / 10


@pytest.mark.skipif(
    extension.error() is not None or not extension.isa().startswith("avx512"),
    reason="the table is of AVX-512",
)
def test_the_page_says_what_scales() -> None:
    """csrc/README.md: how many times as fast 2 to 64 cores are."""
    page = (Path(__file__).parents[1] / "csrc" / "README.md").read_text()
    rows = re.findall(r"^\| (\d+(?:, \d+){4}) \|((?: [\d.]+ \|){6})$", page, re.MULTILINE)
    assert len(rows) > 9
    for sizes, speeds in rows:
        I, H, B, D, steps = map(int, sizes.split(", "))
        spec = LayerSpec("LSTM", I, H, directions=D)
        alone, *times = [
            call(Step.of(spec, steps, B, n, SERVER), [Core()] * n, steps)
            for n in (1, 2, 4, 8, 16, 32, 64)
        ]
        found = [float(speed) for speed in speeds.split("|")[:-1]]
        assert found == pytest.approx([alone / t for t in times], rel=0.05, abs=0.1), sizes


@pytest.mark.parametrize(("H", "B"), SIZES)
@pytest.mark.parametrize(
    ("machine", "cores"),
    [(APPLE, [Core()] * 4 + [Core(0.35)] * 4), (HYBRID, [Core()] * 8 + [Core(0.55)] * 16)],
    ids=["apple", "hybrid"],
)
def test_slow_cores_hold_nobody_up(
    H: int, B: int, machine: tuple[int, ...], cores: list[Core]
) -> None:
    """Whoever has slow cores too is about as fast as with the fast ones alone, or faster."""
    fast = [core for core in cores if core.speed == 1]
    both = time(H, B, cores, machine)
    assert both < 1.25 * time(H, B, fast, machine)
    # Also where the system has put the caller on a slow one.
    assert time(H, B, cores[::-1], machine) < 1.6 * both
    if H >= 1024:
        assert both < 0.9 * time(H, B, fast, machine)


@pytest.mark.parametrize("n", [2, 4, 16])
@pytest.mark.parametrize(("H", "B"), SIZES)
def test_a_neighbour_costs_a_slice_at_most(H: int, B: int, n: int) -> None:
    """Threads that do not come cost nothing; one that is sent away within an item costs the slice.

    That loss is seen, and the next calls take fewer threads (csrc/cpu/usefulness.h).
    """
    step = plan(H, B, n, SERVER)
    alone = call(step, [Core()] * n, T)
    absent = call(step, [Core(), *[Core(comes=False)] * (n - 1)], T)
    one = time(H, B, [Core()], SERVER)
    assert absent < 1.35 * one + T * 10_000
    for place in range(n):
        for away in (0.0, 0.3, 0.9):
            cores = [Core()] * n
            cores[place] = Core(away=int(away * alone))
            slices = 1 + alone // SLICE
            assert call(step, cores, T) <= alone * 1.05 + 2 * slices * SLICE
