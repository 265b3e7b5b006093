"""torch.export and torch.onnx.export: what they make runs at other sizes than the example's."""

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import fastlstm

# of PyTorch's own code, and of an axis B that several inputs have
pytestmark = pytest.mark.filterwarnings(
    "ignore:`isinstance:FutureWarning", "ignore:# The axis name:UserWarning"
)

I, H = 3, 5
T, B = 4, 2  # of the example
SIZES = [(4, 2), (9, 7), (4, 1), (1, 3), (1, 1)]
STATES = ("h_0", "c_0")
CASES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {  # of the module; inputs beside x
    "plain": ({}, ()),
    "layers": ({"num_layers": 2}, STATES),
    "directions": ({"bidirectional": True, "bias": False}, ("lengths",)),
    "all": (
        {"num_layers": 2, "bidirectional": True, "batch_first": True},
        (*STATES, "lengths"),
    ),
}


class Model(nn.Module):
    """A recurrent module that takes and returns nothing but tensors."""

    def __init__(self, rnn: Any) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(
        self,
        x: Tensor,
        h_0: Tensor | None = None,
        c_0: Tensor | None = None,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        hx = h_0 if c_0 is None else (h_0, c_0)
        y, final = self.rnn(x, hx, lengths=lengths, reset=reset)
        return y, *(final if isinstance(final, tuple) else (final,))


def arguments(rnn: Any, names: tuple[str, ...], T: int, B: int) -> dict[str, Tensor]:
    rows, P = rnn.num_layers * (2 if rnn.bidirectional else 1), rnn.proj_size or H
    found = {"x": torch.randn(B, T, I) if rnn.batch_first else torch.randn(T, B, I)}
    shapes = {"h_0": (rows, B, P), "c_0": (rows, B, H)}
    found |= {name: torch.randn(shape) for name, shape in shapes.items() if name in names}
    if "lengths" in names:
        found["lengths"] = torch.arange(B) % (T + 1)  # the first has no step
    return found


def dynamic(rnn: Any, arguments: dict[str, Tensor], T: Any, B: Any) -> dict[str, Any]:
    """The dynamic_shapes of these arguments."""
    shapes = {"x": {0: B, 1: T} if rnn.batch_first else {0: T, 1: B}}
    shapes |= {"h_0": {1: B}, "c_0": {1: B}, "lengths": {0: B}}
    return {name: shapes[name] for name in arguments}


@pytest.mark.parametrize("case", CASES)
def test_export(backend: str, case: str) -> None:
    options, names = CASES[case]
    model = Model(fastlstm.LSTM(I, H, **options)).eval()
    given = arguments(model.rnn, names, T, B)
    # The reference takes its steps in Python: a program of it has those of the example.
    fixed = backend == "reference"
    for grad, steps, batch in (True, Dim("T"), Dim("B")), (False, Dim.AUTO, Dim.AUTO):
        shapes = dynamic(model.rnn, given, Dim.STATIC if fixed else steps, batch)
        with torch.set_grad_enabled(grad):
            program = torch.export.export(model, (), given, dynamic_shapes=shapes)
        for t, b in SIZES:
            if fixed and t != T:
                continue
            other = arguments(model.rnn, names, t, b)
            assert all(map(torch.equal, program.module()(**other), model(**other)))


CELLS: dict[str, Any] = {
    "LSTM": lambda: fastlstm.LSTM(I, H, 2, peephole=True, layer_norm=True, zoneout=(0.1, 0.2)),
    "RNN": lambda: fastlstm.RNN(I, H, 2, "relu", bidirectional=True),
}


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS)
def test_export_of_other_cells(backend: str, cell: str) -> None:
    model = Model(CELLS[cell]()).eval()
    given = arguments(model.rnn, ("h_0", "lengths") if cell == "RNN" else ("lengths",), T, B)
    steps = Dim.STATIC if backend == "reference" else Dim("T")
    shapes = dynamic(model.rnn, given, steps, Dim("B"))
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            program = torch.export.export(model, (), given, dynamic_shapes=shapes)
        for t, b in SIZES:
            if backend != "reference" or t == T:
                other = arguments(model.rnn, tuple(given), t, b)
                assert all(map(torch.equal, program.module()(**other), model(**other)))


@pytest.mark.slow
def test_saved_program_runs_in_a_new_process(backend: str, tmp_path: Path) -> None:
    lstm = fastlstm.LSTM(I, H, 2)
    x = torch.randn(T, B, I)
    program = torch.export.export(lstm, (x,), dynamic_shapes={"input": {1: Dim.AUTO}})
    torch.export.save(program, tmp_path / "program.pt2")
    x = torch.randn(T, 7, I)
    torch.save((x, lstm(x)[0].detach()), tmp_path / "want.pt")
    code = """
import sys, torch, fastlstm
program = torch.export.load(sys.argv[1] + "/program.pt2")
x, want = torch.load(sys.argv[1] + "/want.pt")
torch.testing.assert_close(program.module()(x)[0].detach(), want)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_compile_ahead_of_time(backend: str, tmp_path: Path) -> None:
    """By AOTInductor; the package runs at other sizes, too."""
    model = Model(fastlstm.LSTM(I, H, 2, bidirectional=True)).requires_grad_(False)
    given = arguments(model.rnn, ("lengths",), T, B)
    shapes = dynamic(model.rnn, given, Dim.AUTO, Dim.AUTO)
    program = torch.export.export(model, (), given, dynamic_shapes=shapes)
    package = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "model.pt2")
    )
    run = torch._inductor.aoti_load_package(package)
    for t, b in SIZES:
        other = arguments(model.rnn, ("lengths",), t, b)
        for found, want in zip(run(**other), model(**other), strict=True):
            torch.testing.assert_close(found, want)


def test_export_cell(backend: str) -> None:
    cell = fastlstm.LSTMCell(I, H)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            program = torch.export.export(
                cell,
                (torch.randn(B, I), (torch.randn(B, H), torch.randn(B, H))),
                dynamic_shapes=({0: Dim("B")}, ({0: Dim("B")}, {0: Dim("B")})),
            )
        x, hx = torch.randn(9, I), (torch.randn(9, H), torch.randn(9, H))
        assert all(map(torch.equal, program.module()(x, hx), cell(x, hx)))


def to_onnx(
    model: Model, given: dict[str, Tensor], steps: Any = "T"
) -> tuple[onnx.ModelProto, onnxruntime.InferenceSession]:
    shapes = dynamic(model.rnn, given, steps, "B")
    program = torch.onnx.export(
        model, kwargs=given, dynamic_shapes=shapes, dynamo=True, verbose=False
    )
    onnx.checker.check_model(program.model_proto)
    session = onnxruntime.InferenceSession(
        program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return program.model_proto, session


def assert_same(
    session: onnxruntime.InferenceSession, model: Model, given: dict[str, Tensor]
) -> None:
    found = session.run(None, {name: value.numpy() for name, value in given.items()})
    with torch.no_grad():
        for got, want in zip(found, model(**given), strict=True):
            torch.testing.assert_close(torch.from_numpy(got), want)


def nodes(model: onnx.ModelProto, kind: str) -> int:
    return sum(node.op_type == kind for node in model.graph.node)


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)  # the exporter warns that torchvision is not installed


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_onnx(case: str) -> None:
    options, names = CASES[case]
    model = Model(fastlstm.LSTM(I, H, **options)).eval()
    proto, session = to_onnx(model, arguments(model.rnn, names, T, B))
    assert nodes(proto, "LSTM") == model.rnn.num_layers
    for t, b in SIZES:
        given = arguments(model.rnn, names, t, b)
        assert_same(session, model, given)
    if "lengths" in names:
        x = given["x"].transpose(0, 1) if model.rnn.batch_first else given["x"]
        x[0, 0] = torch.nan
        assert_same(session, model, given)


@pytest.mark.slow
def test_onnx_without_gradients() -> None:
    model = Model(fastlstm.LSTM(I, H)).eval()
    with torch.no_grad():
        proto, session = to_onnx(model, arguments(model.rnn, (), T, B))
    assert nodes(proto, "LSTM") == 1
    assert_same(session, model, arguments(model.rnn, (), 9, 7))


@pytest.mark.slow
def test_onnx_of_an_example_of_one_step_of_one_sequence() -> None:
    model = Model(fastlstm.LSTM(I, H, batch_first=True)).eval()
    _, session = to_onnx(model, arguments(model.rnn, (), 1, 1))
    for t, b in SIZES:
        assert_same(session, model, arguments(model.rnn, (), t, b))


@pytest.mark.slow
def test_onnx_peepholes() -> None:
    model = Model(fastlstm.LSTM(I, H, bidirectional=True, peephole=True)).eval()
    proto, session = to_onnx(model, arguments(model.rnn, (), T, B))
    assert nodes(proto, "LSTM") == 1
    assert_same(session, model, arguments(model.rnn, (), 9, 7))


@pytest.mark.slow
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_onnx_rnn(nonlinearity: str) -> None:
    rnn = fastlstm.RNN(I, H, 2, nonlinearity, bidirectional=True, batch_first=True)
    model, names = Model(rnn).eval(), ("h_0", "lengths")
    proto, session = to_onnx(model, arguments(model.rnn, names, T, B))
    assert nodes(proto, "RNN") == 2
    for t, b in SIZES:
        assert_same(session, model, arguments(model.rnn, names, t, b))


UNROLLED: dict[str, dict[str, Any]] = {
    "projection": {"proj_size": 2},
    "layer_norm": {"layer_norm": True},
    "zoneout": {"zoneout": (0.1, 0.2)},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", UNROLLED)
def test_onnx_of_what_its_nodes_lack(kind: str) -> None:
    model = Model(fastlstm.LSTM(I, H, **UNROLLED[kind])).eval()
    proto, session = to_onnx(model, arguments(model.rnn, (), T, B), Dim.STATIC)
    assert nodes(proto, "LSTM") == 0
    assert_same(session, model, arguments(model.rnn, (), T, 7))


@pytest.mark.slow
def test_onnx_reset() -> None:
    model = Model(fastlstm.LSTM(I, H)).eval()
    given = {"x": torch.randn(T, B, I), "reset": torch.rand(T, B) < 0.5}
    program = torch.onnx.export(model, kwargs=given, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    assert_same(session, model, given)


@pytest.mark.slow
def test_onnx_cell() -> None:
    cell = fastlstm.LSTMCell(I, H).eval()
    x, h, c = torch.randn(B, I), torch.randn(B, H), torch.randn(B, H)
    rows = {0: Dim.DYNAMIC}
    program = torch.onnx.export(
        cell, (x, (h, c)), dynamic_shapes=(rows, (rows, rows)), dynamo=True, verbose=False
    )
    assert nodes(program.model_proto, "LSTM") == 1
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    given = torch.randn(9, I), torch.randn(9, H), torch.randn(9, H)
    names = [value.name for value in session.get_inputs()]
    found = session.run(None, {n: v.numpy() for n, v in zip(names, given, strict=True)})
    with torch.no_grad():
        for got, want in zip(found, cell(given[0], given[1:]), strict=True):
            torch.testing.assert_close(torch.from_numpy(got), want)
