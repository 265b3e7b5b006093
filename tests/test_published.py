"""Numbers that real cuDNN computed and others printed, and the examples of ONNX's nodes.

They need no GPU: tests/published.py has them. What is recorded on a GPU comes on top
(tests/test_cudnn.py), and there tests/test_gpu_published.py asks the compiled kernels.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import EVERY_BACKEND, Case, Results, evaluate, fast
from onnx import helper
from onnx.backend.test.case import node as onnx_node
from onnx.backend.test.case.node import lstm, rnn  # noqa: F401 (they add their examples)
from published import SAMPLES, SMALL, Published
from torch import Tensor

CLOSE = 5e-5  # of the size of a result: what we hold ourselves to, where publishers allow more
NODES = [
    each
    for each in onnx_node._NodeTestCases
    if each.model.graph.node[0].op_type in ("LSTM", "RNN")
]


def within(backend: str, tolerance: float) -> float:
    """What a backend may be off: the publisher's tolerance, or less where we know better."""
    return min(tolerance, CLOSE) if backend in ("cpu", "reference") else tolerance


def hold(published: Published, tolerance: float, device: str = "cpu") -> None:
    """Assert that fastlstm computes what was printed, up to the tolerance and the last digit."""
    numbers = {name: value.to(device) for name, value in published.numbers().items()}
    with torch.set_grad_enabled(published.has_gradients):
        found = evaluate(published.case, torch.float32, numbers, fast)
    there = {name: value.cpu() for name, value in found.items()}
    for name, (got, want, off) in published.compared(there).items():
        beyond = (got - want).abs() - tolerance * want.abs() - off
        assert beyond.max() <= 0, f"{name} is {got.tolist()}, published {want.tolist()}"


@EVERY_BACKEND
@pytest.mark.parametrize(
    ("case", "published"), [pytest.param(each.case, each, id=str(each)) for each in SMALL]
)
def test_small_calls(backend: str, case: Case, published: Published) -> None:
    hold(published, within(backend, published.tolerance))


@pytest.mark.parametrize("published", SAMPLES, ids=str)
def test_samples(backend: str, published: Published) -> None:
    """H = 512, outputs and gradients: that is too much for interpreted and emulated kernels."""
    hold(published, within(backend, published.tolerance))


def test_a_wrong_number_is_refused() -> None:
    """Another weight, by a thousandth, is seen in a sum and in a step."""
    for published in (SAMPLES[0], SMALL[0]):
        wrong = replace(published, weight=published.weight * 1.001)
        with pytest.raises(AssertionError, match="published"):
            hold(wrong, CLOSE)


def attributes(example: Any) -> dict[str, Any]:
    """What the node of an example says of itself, by name."""
    node = example.model.graph.node[0]
    return {each.name: helper.get_attribute_value(each) for each in node.attribute}


def tensors(example: Any) -> tuple[Results, Results]:
    """Inputs and outputs of an example by name: X [T, B, I], Y [T, B, D, H], Y_h [D, B, H]."""
    node, (inputs, outputs) = example.model.graph.node[0], example.data_sets[0]
    given, found = (
        dict(zip([name for name in names if name], map(torch.tensor, values), strict=True))
        for names, values in ((node.input, inputs), (node.output, outputs))
    )
    batch_first = bool(attributes(example).get("layout"))
    if batch_first:  # none of them has states that come in
        given["X"], found["Y_h"] = given["X"].transpose(0, 1), found["Y_h"].transpose(0, 1)
    if "Y" in found:  # [T, D, B, H], or [B, T, D, H]
        found["Y"] = found["Y"].transpose(*((0, 1) if batch_first else (1, 2)))
    return given, found


def case_of(example: Any) -> Case:
    """The call that an example makes."""
    given, _ = tensors(example)
    is_lstm = example.model.graph.node[0].op_type == "LSTM"
    return Case(
        *given["X"].shape,
        H=given["R"].shape[-1],
        directions=given["R"].shape[0],
        kind="LSTM" if is_lstm else "RNN_TANH",
        batch_first=bool(attributes(example).get("layout")),
        peephole="P" in given,
    )


def ours(w: Tensor, order: tuple[int, ...]) -> Tensor:
    """The gates of a weight, or what else it has one after the other, in our order."""
    parts = w.chunk(len(order))
    return torch.cat([parts[k] for k in order])


def numbers_of(case: Case, given: Results) -> Results:
    """The inputs of a node as `evaluate` of cases.py takes them, without a reversed direction."""
    gates = (0, 2, 3, 1) if case.kind == "LSTM" else (0,)  # theirs are i, o, f, g
    H, D = case.H, case.directions
    bias = given.get("B", torch.zeros(D, 2 * len(gates) * H))
    zeros = torch.zeros(D, case.B, H)
    numbers = {"x": given["X"], "h0": given.get("initial_h", zeros)}
    numbers["c0"] = given.get("initial_c", zeros)
    for d, suffix in enumerate(("_l0", "_l0_reverse")[:D]):
        b_ih, b_hh = bias[d].chunk(2)
        weights = {"weight_ih": given["W"][d], "weight_hh": given["R"][d]}
        weights |= {"bias_ih": b_ih, "bias_hh": b_hh}
        numbers |= {f"w.{name}{suffix}": ours(w, gates) for name, w in weights.items()}
        if case.peephole:  # theirs are of i, o, f
            numbers[f"w.weight_ch{suffix}"] = ours(given["P"][d], (0, 2, 1))
    return {name: value.double() for name, value in numbers.items()}


@EVERY_BACKEND
@pytest.mark.parametrize(
    ("case", "example"), [pytest.param(case_of(each), each, id=each.name) for each in NODES]
)
def test_nodes_of_onnx(backend: str, case: Case, example: Any) -> None:
    """A reversed direction on its own is the other one with the time turned round."""
    given, printed = tensors(example)
    turned = attributes(example).get("direction") == b"reverse"
    numbers = numbers_of(case, given)
    if turned:
        numbers["x"] = numbers["x"].flip(0)
    with torch.no_grad():
        found = evaluate(case, torch.float32, numbers, fast)
    y = found["y"].view(case.T, case.B, case.directions, case.H)
    named = {"Y": y.flip(0) if turned else y, "Y_h": found["h_n"], "Y_c": found.get("c_n")}
    for name, want in printed.items():
        rtol = within(backend, example.rtol)
        torch.testing.assert_close(named[name], want.double(), rtol=rtol, atol=example.atol)
