"""The choice of kernels and tiles: a pure function, so every answer can be looked at."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import pytest

from fastlstm.kernels.config import (
    Device,
    Plan,
    Shape,
    backward_plan,
    forward_plan,
    obstacle,
    override,
    padded,
    rnn_plan,
)
from fastlstm.reference import PLAIN, Cell

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
SHAPE = Shape(T=28, B=128, I=28, H=64, P=64, D=1, element=2, precision="tf32")
HOPPER = Device(90, 132)

PlanOf = Callable[[Shape, Device], Plan]


def shapes() -> Iterator[Shape]:
    sizes = product((1, 8, 9, 64, 4096), (1, 28, 64, 65, 2048), (1, 2))
    widths = (1, 2, 16, 17, 33, 64, 100, 128, 129, 256, 1000, 4096)
    for (B, I, D), H, (element, precision) in product(sizes, widths, TYPES):
        for P in {H, max(1, H // 2), 1}:
            for cell in ("plain", "extended", "normalised"):
                yield Shape(28, B, I, H, P, D, element, precision, cell)


def is_tile(size: int, least: int) -> bool:
    return size >= least and size & (size - 1) == 0


@PLANS
@pytest.mark.parametrize("device", DEVICES, ids=lambda device: f"sm_{device.arch}")
def test_every_shape_has_a_plan_that_fits(plan_of: PlanOf, device: Device) -> None:
    gates = 1 if plan_of is rnn_plan else 4
    for shape in shapes():
        if plan_of is rnn_plan and (shape.projected or shape.cell != "plain"):
            continue
        plan = plan_of(shape, device)
        context = f"{shape} on {device}: {plan}"
        least = {"units": 16, "batch": 8, "chunk": 16}  # of what a matrix instruction takes
        assert all(is_tile(getattr(plan, name), n) for name, n in least.items()), context
        assert plan.warps in (1, 2, 4, 8) and plan.stages in (1, 2, 3), context
        assert plan.reason and str(plan).startswith(f"{plan.regime}: {4 * plan.units} x"), context
        if plan.regime == "sequence":
            assert plan.resident and plan.units >= shape.H, context
            assert shape.precision != "ieee", context
        else:
            assert not plan.fused, context
        if plan.resident:  # the weights, and what they are multiplied with
            assert plan.chunk >= shape.P, context
            operands = shape.element * plan.chunk * (gates * plan.units + plan.batch)
            assert operands <= device.shared_bytes, context


@PASSES
def test_a_plan_depends_on_its_arguments_alone(plan_of: PlanOf) -> None:
    seen = {pair: plan_of(*pair) for pair in product(shapes(), DEVICES[:2])}
    for (shape, device), plan in reversed(seen.items()):
        assert plan_of(Shape(*shape), Device(*device)) == plan
    longer = SHAPE._replace(T=4000)
    assert plan_of(longer, HOPPER) == plan_of(SHAPE, HOPPER)


@PASSES
def test_persistent_programs_are_on_the_gpu_together(plan_of: PlanOf) -> None:
    found = 0
    for shape, device in product(shapes(), DEVICES):
        try:
            with override(regime="persistent"):
                plan = plan_of(shape, device)
        except ValueError:
            continue
        programs = -(-shape.H // plan.units) * -(-shape.B // plan.batch) * shape.D
        assert plan.regime == "persistent" and not shape.projected and shape.cell == "plain"
        assert programs <= device.processors, f"{shape} on {device}: {plan}"
        found += 1
    assert found


def test_what_the_tasks_run() -> None:
    """One launch for the sizes of the tasks, on both GPUs that matter."""
    for device, H in product((Device(80, 108), HOPPER), (32, 64, 128)):
        shape = SHAPE._replace(H=H, P=H)
        assert forward_plan(shape, device).regime == "sequence"
        assert backward_plan(shape, device).regime == "sequence"
    assert forward_plan(SHAPE, HOPPER).fused
    assert forward_plan(SHAPE._replace(H=256, P=256), HOPPER).regime == "steps"


@pytest.mark.parametrize(
    ("cell", "sizes", "text"),
    [
        (Cell(layer_norm=True), {}, None),
        (Cell(peephole=True, zoneout=(0.1, 0.1)), {"H": 512, "P": 512}, None),
        (Cell(zoneout=(0.1, 0.1)), {"P": 32}, None),
        (Cell(zoneout=(0.1, 0.0)), {"H": 512, "P": 256}, None),
        (Cell(layer_norm=True), {"H": 256, "P": 256}, "H <= 128, and there are 256"),
        (Cell(layer_norm=True), {"H": 65, "P": 65, "element": 4}, "H <= 64 in float32, and there"),
        (Cell(layer_norm=True), {"element": 4, "precision": "ieee"}, "float32 in TF32"),
        (Cell(zoneout=(0.0, 0.1)), {"H": 512, "P": 256}, "zoneout of a projected h needs all"),
    ],
)
def test_what_cells_need(cell: Cell, sizes: dict[str, Any], text: str | None) -> None:
    kind = "normalised" if cell.layer_norm else "extended"
    shape = SHAPE._replace(**sizes, cell=kind)
    found = obstacle(shape, HOPPER, cell)
    assert found is None if text is None else found is not None and text in found
    assert obstacle(shape._replace(cell="plain"), HOPPER, PLAIN) is None


def test_layer_norm_needs_shared_memory() -> None:
    shape = SHAPE._replace(H=128, P=128, cell="normalised")
    assert obstacle(shape, Device(80, 108), Cell(layer_norm=True)) is None
    found = obstacle(shape, Device(86, 84), Cell(layer_norm=True))
    assert found is not None and "a GPU of more shared memory" in found


def test_no_persistent_rnn() -> None:
    with override(regime="persistent"), pytest.raises(ValueError, match=r"no nn\.RNN"):
        rnn_plan(SHAPE._replace(H=1024, P=1024), HOPPER)


def test_padded_is_the_next_power_of_two() -> None:
    assert [padded(n) for n in (1, 16, 17, 64, 100, 128, 129)] == [16, 16, 32, 64, 128, 128, 256]


@PASSES
def test_overrides_nest_and_end(plan_of: PlanOf) -> None:
    chosen = plan_of(SHAPE, HOPPER)
    with override(warps=1):
        assert plan_of(SHAPE, HOPPER) == replace(chosen, warps=1)
        with override(regime="steps", batch=64):
            inner = plan_of(SHAPE, HOPPER)
            assert (inner.regime, inner.batch, inner.warps) == ("steps", 64, 1)
        assert plan_of(SHAPE, HOPPER) == replace(chosen, warps=1)
        with pytest.raises(KeyError), override(stages=7):
            raise KeyError
        assert plan_of(SHAPE, HOPPER) == replace(chosen, warps=1)
    assert plan_of(SHAPE, HOPPER) == chosen


def test_overrides_refuse_what_there_is_not() -> None:
    for changes, message in (
        ({"tile": 1, "threads": 2}, r"a plan has no threads, tile$"),
        ({"regime": "fast"}, "'fast' is not a regime"),
    ):
        with pytest.raises(ValueError, match=message), override(**changes):
            pass
    assert forward_plan(SHAPE, HOPPER).regime == "sequence"


@PASSES
def test_an_overridden_regime_without_room_is_an_error(plan_of: PlanOf) -> None:
    wide = SHAPE._replace(H=1024, P=1024, B=4096)
    projected = SHAPE._replace(H=256, P=128)
    for regime, shape, message in (
        ("sequence", wide, r"the sequence regime has no room for .* in 232,448 bytes"),
        ("persistent", wide, r"the persistent regime has no room for .* on 132 multiprocessors"),
        ("persistent", projected, r"the persistent regime has no room"),
    ):
        with override(regime=regime), pytest.raises(ValueError, match=message):
            plan_of(shape, HOPPER)
