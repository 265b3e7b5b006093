"""The choice of CUDA kernels and their pieces: a pure function, every answer can be looked at."""

from collections.abc import Iterator
from itertools import product

import pytest

from fastlstm import extension
from fastlstm.kernels.cuda import library

pytestmark = pytest.mark.skipif(
    extension.error() is not None, reason=f"the extension is missing: {extension.error()}"
)
if extension.error() is None:
    extension.load()

# arch, multiprocessors, shared memory of a block, blocks of a cluster: A100, RTX 3090, RTX 4090,
# H100, H100 where clusters of 16 find no place, B200, RTX 5090, and a seventh of an A100.
DEVICES = {
    "sm_80": (80, 108, 163 << 10, 1),
    "sm_86": (86, 82, 99 << 10, 1),
    "sm_89": (89, 128, 99 << 10, 1),
    "sm_90": (90, 132, 227 << 10, 16),
    "sm_90-8": (90, 132, 227 << 10, 8),
    "sm_100": (100, 148, 227 << 10, 16),
    "sm_120": (120, 170, 99 << 10, 8),
    "sm_80-mig": (80, 14, 163 << 10, 1),
}
KINDS = ("bf16", "f16", "tf32", "exact")
BLOCK, CLUSTER, GRID, WIDE = range(4)
NONE, SHARED, GLOBAL = range(3)
# What there are kernels for, see csrc/cuda/kernels.h: kind, sequences, tiles in registers.
KERNELS = {
    *product(("bf16", "f16"), (8,), (4, 8, 28)),
    *product(("bf16", "f16"), (16,), (4, 5, 6)),
    *(("tf32", 8, 4), ("tf32", 8, 3), ("tf32", 16, 2), ("exact", 8, 0), ("exact", 16, 0)),
}
each_device = pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
WIDTHS = (1, 5, 16, 17, 33, 64, 65, 100, 128, 129, 200, 256, 300, 512, 640, 1000, 1024, 2048, 4096)


class Plan:
    def __init__(self, numbers: list[int]) -> None:
        (
            self.regime, self.batch, self.blocks, self.tiles, self.parts,
            self.resident, self.rest, self.shared, self.groups, self.exchange, self.rest_words,
        ) = numbers  # fmt: skip

    @property
    def order_of_sums(self) -> tuple[int, ...]:
        return self.regime, self.blocks, self.tiles, self.parts


def plan_of(
    kind: str, backward: bool, B: int, H: int, D: int, device: tuple[int, ...], *wish: int
) -> Plan | None:
    wishes = list(wish) or [-1, 0, 0]
    found = library.cuda_plan(KINDS.index(kind), backward, B, H, D, list(device), wishes)
    return Plan(found) if found else None


def cases() -> Iterator[tuple[str, bool, int, int, int]]:
    yield from product(KINDS, (False, True), (1, 8, 9, 64, 4096), WIDTHS, (1, 2))


@each_device
def test_every_layer_has_a_plan_that_fits(device: tuple[int, ...]) -> None:
    _, processors, shared, cluster = device
    for case in cases():
        kind, _, B, H, D = case
        plan = plan_of(*case, device)
        if plan is None:  # a small part of a GPU does not hold the widest layers
            assert 8 * 16 * processors < H, case
            continue
        assert (kind, plan.batch, plan.resident) in KERNELS, case
        warps = 12 if plan.regime == WIDE else 8
        assert plan.shared <= shared and 1 <= plan.tiles * plan.parts <= warps, case
        assert plan.blocks * plan.tiles * 16 >= H, case
        groups = D * -(-B // plan.batch)
        if plan.regime == GRID:  # all blocks of a launch are on the GPU together
            assert plan.blocks * plan.groups <= processors and plan.groups >= 1, case
        else:
            assert plan.groups == groups, case
            assert plan.blocks <= (cluster if plan.regime in (CLUSTER, WIDE) else 1), case
        # Weights beyond the registers have a place, and only those. In the regime wide a warp's
        # are counted by 16 x 16, those of units that there are not with them.
        tiles = -(-H // 16)
        terms = -(-tiles // plan.parts)
        of_a_warp = plan.blocks * plan.tiles if plan.regime == WIDE else terms
        assert (plan.rest != NONE) == (of_a_warp > plan.resident), case
        assert plan.rest != GLOBAL or plan.regime == GRID, case
        assert (plan.exchange > 0) == (plan.regime == GRID), case
        assert (plan.rest_words > 0) == (plan.rest == GLOBAL), case


@each_device
def test_the_order_of_sums_does_not_depend_on_the_batch(device: tuple[int, ...]) -> None:
    for kind, backward, H in product(KINDS, (False, True), WIDTHS):
        plans = [
            plan_of(kind, backward, B, H, D, device)
            for B, D in product((1, 8, 9, 64, 4096), (1, 2))
        ]
        assert len({plan and plan.order_of_sums for plan in plans}) == 1, (kind, backward, H)


@pytest.mark.parametrize(
    ("kind", "H", "regime"),
    [
        *(("bf16", H, BLOCK) for H in (16, 64, 128)),
        *(("tf32", H, BLOCK) for H in (16, 64)),
        *(("exact", H, BLOCK) for H in (16, 64)),
        *(("bf16", H, CLUSTER) for H in (256, 384, 512)),
        *(("tf32", H, CLUSTER) for H in (128, 256)),
        ("exact", 128, CLUSTER),
        *((kind, H, WIDE) for kind, H in (("bf16", 513), ("f16", 768))),
        *(("bf16", H, GRID) for H in (1024, 2048)),
        ("tf32", 1024, GRID),
    ],
)
def test_what_an_h100_runs(kind: str, H: int, regime: int) -> None:
    for backward in (False, True):
        plan = plan_of(kind, backward, 16, H, 1, DEVICES["sm_90"])
        assert plan is not None and plan.regime == regime
        # 16-bit weights never leave the multiprocessors up to H = 2048, in registers up to 1024.
        if kind == "bf16":
            assert plan.rest != GLOBAL or H > 1024
        wider = plan_of(kind, backward, 16, H, 1, DEVICES["sm_80"])
        assert wider is not None and wider.regime != CLUSTER


# The last H of each regime on an H100, forward and backward, and the last whose weights stay on
# the multiprocessors.
LIMITS = {
    "bf16": ((128, 128), (512, 512), (768, 768), 2112),
    "tf32": ((96, 96), (512, 384), (0, 0), 1024),
    "exact": ((64, 64), (320, 256), (0, 0), 640),
}


@pytest.mark.parametrize("kind", LIMITS)
def test_where_regimes_end(kind: str) -> None:
    block, cluster, wide, on_chip = LIMITS[kind]
    for backward in (False, True):
        found = {
            H: plan_of(kind, backward, 16, H, 1, DEVICES["sm_90"]) for H in range(16, 17000, 16)
        }
        assert max(H for H, plan in found.items() if plan) == 8 * 16 * 132
        for regime, limits in ((BLOCK, block), (CLUSTER, cluster), (WIDE, wide)):
            those = (H for H, plan in found.items() if plan and plan.regime == regime)
            assert max(those, default=0) == limits[backward]
        assert max(H for H, plan in found.items() if plan and plan.rest != GLOBAL) == on_chip


def test_more_sequences_share_a_block_when_the_gpu_is_full() -> None:
    few = plan_of("bf16", False, 8 * 132, 64, 1, DEVICES["sm_90"])
    many = plan_of("bf16", False, 8 * 132 + 1, 64, 1, DEVICES["sm_90"])
    assert few is not None and many is not None
    assert (few.batch, many.batch) == (8, 16)


def test_more_sequences_share_a_cluster_when_no_other_finds_a_place() -> None:
    """They lie in one part of a GPU: fewer run together than its multiprocessors suggest."""
    h100 = DEVICES["sm_90"]
    plan = plan_of("bf16", False, 8, 512, 1, h100)
    assert plan is not None and plan.regime == CLUSTER
    blocks = plan.blocks
    most = h100[1] // blocks
    for together in (most, most - 1, 1):
        resident = [0, 0, 0, 0]
        resident[blocks.bit_length() - 2] = together
        for groups, batch in ((together, 8), (together + 1, 16)):
            found = plan_of("bf16", False, 8 * groups, 512, 1, (*h100, *resident))
            assert found is not None and found.batch == batch
            assert found.order_of_sums == plan.order_of_sums
    with pytest.raises(RuntimeError, match="not the arguments of a plan"):
        plan_of("bf16", False, 8, 512, 1, (*h100, 1, 2))


def test_old_gpus_and_too_many_units_have_a_reason() -> None:
    turing = [75, 40, 64 << 10, 1]
    assert library.cuda_plan(0, False, 1, 64, 1, turing, [-1, 0, 0]) == []
    assert "from sm_80 on" in library.cuda_obstacle(0, False, 1, 64, 1, turing, [-1, 0, 0])
    huge = [0, False, 1, 10**6, 1, list(DEVICES["sm_90"])]
    assert "so many units" in library.cuda_obstacle(*huge, [-1, 0, 0])
    assert "that was asked for" in library.cuda_obstacle(*huge, [BLOCK, 0, 0])
    assert library.cuda_obstacle(0, False, 1, 64, 1, list(DEVICES["sm_90"]), [-1, 0, 0]) == ""


@each_device
def test_wishes_are_granted_or_refused(device: tuple[int, ...]) -> None:
    granted = set()
    sizes = product((BLOCK, CLUSTER, GRID, WIDE), (0, 2, 4, 8, 16), (0, 8, 16), (64, 130, 512))
    for regime, blocks, batch, H in sizes:
        plan = plan_of("f16", True, 20, H, 2, device, regime, blocks, batch)
        if plan is None:
            continue
        assert plan.regime == regime and blocks in (0, plan.blocks) and batch in (0, plan.batch)
        granted.add(regime)
    assert granted == {BLOCK, GRID, *([CLUSTER, WIDE] if device[3] > 1 else [])}
