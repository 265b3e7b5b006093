"""The choice of kernels and tiles: a pure function, so every answer can be looked at."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import pytest

from fastlstm.kernels.triton.config import (
    Device,
    Plan,
    Problem,
    backward_plan,
    forward_plan,
    missing,
    obstacle,
    override,
    padded,
    rnn_plan,
)
from fastlstm.spec import LayerSpec

# From a small GPU of 2018 to what is not out yet; the last is unknown to the configuration.
DEVICES = [
    Device(*pair)
    for pair in ((75, 40), (80, 108), (86, 84), (89, 128), (90, 132), (100, 148), (120, 170))
]
TYPES = [(2, "tf32"), (4, "tf32"), (4, "ieee")]
PASSES = pytest.mark.parametrize("plan_of", [forward_plan, backward_plan], ids=["fwd", "bwd"])
PLANS = pytest.mark.parametrize(
    "plan_of", [forward_plan, backward_plan, rnn_plan], ids=["fwd", "bwd", "rnn"]
)
CELLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "extended": {"peephole": True},
    "normalised": {"layer_norm": True},
}
HOPPER = Device(90, 132)

PlanOf = Callable[[Problem, Device], Plan]


def problem(
    H: int = 64,
    P: int = 0,
    *,
    I: int = 28,
    D: int = 1,
    B: int = 128,
    element: int = 2,
    precision: str = "tf32",
    **cell: Any,
) -> Problem:
    """A layer of an LSTM; P is 0 without a projection."""
    return Problem(LayerSpec("LSTM", I, H, P, D, **cell), B, element, precision)


SMALL = problem()


def problems() -> Iterator[Problem]:
    sizes = product((1, 8, 9, 64, 4096), (1, 28, 64, 65, 2048), (1, 2))
    widths = (1, 2, 16, 17, 33, 64, 100, 128, 129, 256, 1000, 4096)
    for (B, I, D), H, (element, precision) in product(sizes, widths, TYPES):
        for P in {0, max(1, H // 2), 1} - {H}:
            for cell in CELLS.values():
                yield problem(H, P, I=I, D=D, B=B, element=element, precision=precision, **cell)


def is_tile(size: int, least: int) -> bool:
    return size >= least and size & (size - 1) == 0


@PLANS
@pytest.mark.parametrize("device", DEVICES, ids=lambda device: f"sm_{device.arch}")
def test_every_layer_has_a_plan_that_fits(plan_of: PlanOf, device: Device) -> None:
    gates = 1 if plan_of is rnn_plan else 4
    for asked in problems():
        spec = asked.spec
        if plan_of is rnn_plan:
            if spec.proj_size or asked.cell != "plain":
                continue
            asked = asked._replace(spec=spec._replace(mode="RNN_TANH"))
        plan = plan_of(asked, device)
        context = f"{asked} on {device}: {plan}"
        least = {"units": 16, "batch": 8, "chunk": 16}  # of what a matrix instruction takes
        exact = plan.regime == "registers" and asked.precision == "ieee"
        if plan.regime == "registers":  # sequences may take two columns each; exact ones have none
            least["batch"] = 2 if exact else 4
        assert all(is_tile(getattr(plan, name), n) for name, n in least.items()), context
        assert plan.warps in (1, 2, 4, 8) and plan.stages in (1, 2, 3), context
        assert plan.reason and str(plan).startswith(f"{plan.regime}: {4 * plan.units} x"), context
        if plan.regime in ("registers", "sequence"):
            assert plan.units >= spec.hidden_size, context
            assert asked.precision != "ieee" or (exact and not plan.fused), context
        else:
            assert not plan.fused, context
        if plan.regime == "registers":
            assert asked.cell == "plain" and not spec.proj_size and device.arch >= 80, context
        elif plan.regime == "sequence":  # the weights, and what they are multiplied with
            assert plan.chunk >= spec.state_size, context
            operands = asked.element * plan.chunk * (gates * plan.units + plan.batch)
            assert operands <= device.shared_bytes, context


@PASSES
def test_a_plan_depends_on_its_arguments_alone(plan_of: PlanOf) -> None:
    seen = {pair: plan_of(*pair) for pair in product(problems(), DEVICES[:2])}
    for (asked, device), plan in reversed(seen.items()):
        spec, *rest = asked
        assert plan_of(Problem(LayerSpec(*spec), *rest), Device(*device)) == plan


def test_what_the_tasks_run() -> None:
    """One launch for the sizes of the tasks, on both GPUs that matter."""
    for device, H in product((Device(80, 108), HOPPER), (32, 64, 128)):
        assert forward_plan(problem(H), device).regime == "registers"
        assert backward_plan(problem(H), device).regime == "registers"
        without = device._replace(gluon=False)
        assert forward_plan(problem(H), without).regime == "sequence"
        assert backward_plan(problem(H), without).regime == "sequence"
    assert forward_plan(problem(), HOPPER).fused
    assert forward_plan(problem(256), HOPPER).regime == "cluster"
    assert forward_plan(problem(256), HOPPER._replace(clusters=False)).regime == "steps"
    assert forward_plan(problem(256), Device(80, 108)).regime == "steps"


@pytest.mark.parametrize(
    ("cell", "sizes", "text"),
    [
        ({"layer_norm": True}, {}, None),
        ({"peephole": True, "zoneout": (0.1, 0.1)}, {"H": 512}, None),
        ({"zoneout": (0.1, 0.1)}, {"P": 32}, None),
        ({"zoneout": (0.1, 0.0)}, {"H": 512, "P": 256}, None),
        ({"layer_norm": True}, {"H": 256}, "H <= 128, and there are 256"),
        ({"layer_norm": True}, {"H": 65, "element": 4}, "H <= 64 in float32, and there"),
        ({"layer_norm": True}, {"element": 4, "precision": "ieee"}, "float32 in TF32"),
        ({"zoneout": (0.0, 0.1)}, {"H": 512, "P": 256}, "zoneout of a projected h needs all"),
    ],
)
def test_what_cells_need(cell: dict[str, Any], sizes: dict[str, Any], text: str | None) -> None:
    found = obstacle(problem(**sizes, **cell), HOPPER)
    assert found is None if text is None else found is not None and text in found
    assert obstacle(problem(**sizes), HOPPER) is None


def test_layer_norm_needs_shared_memory() -> None:
    normalised = problem(128, layer_norm=True)
    assert obstacle(normalised, Device(80, 108)) is None
    found = obstacle(normalised, Device(86, 84))
    assert found is not None and "a GPU of more shared memory" in found


@PASSES
@pytest.mark.parametrize(
    "asked",
    [
        *(problem(128, I=64, element=2), problem(1, B=1), problem(64, element=4)),
        problem(100, D=2),
    ],
    ids=str,
)
def test_plain_cells_rest_in_registers(plan_of: PlanOf, asked: Problem) -> None:
    """Both passes alike: forward keeps the gates in the order in which backward reads them."""
    plan = plan_of(asked, HOPPER)
    assert plan.regime == "registers" and str(plan).endswith("weights in registers")
    assert (plan.batch, plan.warps) == (4, plan.units // 16)
    assert plan_of(asked._replace(dense=False), HOPPER).batch == 8


@PASSES
def test_few_sequences_take_two_columns_each(plan_of: PlanOf) -> None:
    """As long as each warp of theirs has a quarter of a multiprocessor."""
    for H, D, most in ((128, 1, 528), (64, 2, 264), (32, 1, 1056), (5, 1, 2112)):
        found = [plan_of(problem(H, B=B, D=D), HOPPER).batch for B in (most, most + 1)]
        assert found == [4, 8]


@PASSES
@pytest.mark.parametrize(
    ("H", "B", "D", "batch", "warps"),
    [
        (64, 128, 1, 2, 4),
        (64, 264, 1, 2, 4),
        (33, 265, 1, 4, 8),
        (32, 264, 2, 2, 2),
        (32, 265, 2, 4, 4),
        (1, 1056, 1, 2, 1),
        (1, 1057, 1, 4, 2),
    ],
)
def test_exact_numbers_rest_in_registers(
    plan_of: PlanOf, H: int, B: int, D: int, batch: int, warps: int
) -> None:
    """Few sequences in a program, as long as its warps have quarters; a thread for each cell."""
    plan = plan_of(problem(H, B=B, D=D, element=4, precision="ieee"), HOPPER)
    assert (plan.regime, plan.batch, plan.warps) == ("registers", batch, warps)
    assert 32 * plan.warps == plan.units * plan.batch and not plan.fused


@pytest.mark.parametrize(
    "asked",
    [
        *(problem(129), problem(65, element=4), problem(65, element=4, precision="ieee")),
        *(problem(64, 32), problem(peephole=True), problem(zoneout=(0.1, 0.0))),
    ],
    ids=str,
)
def test_what_does_not_rest_in_registers(asked: Problem) -> None:
    assert forward_plan(asked, HOPPER).regime != "registers"
    assert backward_plan(asked, HOPPER).regime != "registers"


@pytest.mark.parametrize(
    ("H", "B", "element", "blocks"),
    [(129, 8, 2, 8), (256, 128, 2, 8), (512, 64, 2, 16), (65, 8, 4, 4), (128, 128, 4, 4)],
)
def test_clusters_are_on_the_gpu_together(H: int, B: int, element: int, blocks: int) -> None:
    asked = problem(H, B=B, element=element)
    plan = forward_plan(asked, HOPPER)
    assert (plan.regime, plan.blocks) == ("cluster", blocks)
    assert str(plan).endswith(f"weights in registers of {blocks} blocks")
    back = backward_plan(asked, HOPPER)
    assert (back.regime, back.blocks) == ("cluster", blocks)
    for other in (
        problem(H, B=132 * 16, element=element),
        problem(2048 // element, B=8, element=element),
        problem(H, B=B, element=element, peephole=True),
        *(problem(H, H // 2, B=B, element=element), problem(H, B=B, element=4, precision="ieee")),
    ):
        assert forward_plan(other, HOPPER).regime == "steps", str(other)
        assert backward_plan(other, HOPPER).regime == "steps", str(other)


def test_a_forced_cluster() -> None:
    """Both passes alike: forward keeps the gates in the order in which backward reads them."""
    with override(regime="cluster"):
        assert forward_plan(problem(256), HOPPER).regime == "cluster"
        assert backward_plan(problem(256), HOPPER).regime == "cluster"
        for plan_of in (forward_plan, backward_plan):
            with pytest.raises(ValueError, match="the cluster regime has no room for"):
                plan_of(problem(1024, B=4096), HOPPER)


def test_what_a_triton_without_gluon_misses() -> None:
    without = HOPPER._replace(gluon=False, clusters=False)
    assert missing(problem(64), without) == "weights in registers"
    assert missing(problem(256), without) == "units spread over a cluster"
    assert missing(problem(256), HOPPER) is missing(problem(64, 32), without) is None


def test_regimes_without_an_rnn() -> None:
    with override(regime="registers"), pytest.raises(ValueError, match="no room"):
        rnn_plan(problem(64), HOPPER)


def test_padded_is_the_next_power_of_two() -> None:
    assert [padded(n) for n in (1, 16, 17, 64, 100, 128, 129)] == [16, 16, 32, 64, 128, 128, 256]


@PASSES
def test_overrides_nest_and_end(plan_of: PlanOf) -> None:
    chosen = plan_of(SMALL, HOPPER)
    with override(warps=1):
        assert plan_of(SMALL, HOPPER) == replace(chosen, warps=1)
        with override(regime="steps", batch=64):
            inner = plan_of(SMALL, HOPPER)
            assert (inner.regime, inner.batch, inner.warps) == ("steps", 64, 1)
        assert plan_of(SMALL, HOPPER) == replace(chosen, warps=1)
        with pytest.raises(KeyError), override(stages=7):
            raise KeyError
        assert plan_of(SMALL, HOPPER) == replace(chosen, warps=1)
    assert plan_of(SMALL, HOPPER) == chosen


def test_overrides_refuse_what_there_is_not() -> None:
    for changes, message in (
        ({"tile": 1, "threads": 2}, r"a plan has no threads, tile$"),
        ({"regime": "fast"}, "'fast' is not a regime"),
    ):
        with pytest.raises(ValueError, match=message), override(**changes):
            pass
    assert forward_plan(SMALL, HOPPER).regime == "registers"


@PASSES
def test_an_overridden_regime_without_room_is_an_error(plan_of: PlanOf) -> None:
    wide = problem(1024, B=4096)
    projected = problem(256, 128)
    for regime, asked, message in (
        ("registers", wide, r"the registers regime has no room for"),
        ("registers", projected, r"the registers regime has no room for"),
        ("sequence", wide, r"the sequence regime has no room for .* in 232,448 bytes"),
    ):
        with override(regime=regime), pytest.raises(ValueError, match=message):
            plan_of(asked, HOPPER)
