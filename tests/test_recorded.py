"""What people record and count: exported programs, traces, graphs of fx, operations.

What was recorded is right when it is run later: with other weights, at other sizes, with gradients
and in another process.
"""

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from cases import EVERY_BACKEND
from torch import Tensor, nn
from torch.export import Dim
from torch.func import functional_call, grad, hessian, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils.flop_counter import FlopCounterMode

import fastlstm

pytestmark = pytest.mark.filterwarnings(
    "ignore:`isinstance:FutureWarning",
    "ignore:.*torch.jit.*:DeprecationWarning",
    "ignore::torch.jit.TracerWarning",
)

T, B, I, H = 5, 2, 3, 4
CPU = pytest.mark.parametrize("backend", ["cpu"], indirect=True)
LAYERS: dict[str, Callable[[], Any]] = {
    "lstm": lambda: fastlstm.LSTM(I, H),
    "stack": lambda: fastlstm.LSTM(I, H, 2, bidirectional=True, proj_size=2, bias=False),
    "extended": lambda: fastlstm.LSTM(I, H, peephole=True, layer_norm=True, zoneout=(0.1, 0.2)),
    "recompute": lambda: fastlstm.LSTM(I, H, recompute=True),
    "rnn": lambda: fastlstm.RNN(I, H, 2, "relu"),
}
PLAIN = {name: LAYERS[name] for name in ("lstm", "rnn")}


class Model(nn.Module):
    """Linear -> a recurrent layer, with other things of it than its output."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.inward, self.layer = nn.Linear(I, I), layer

    def forward(self, x: Tensor, hx: Any = None) -> Tensor:
        y, final = self.layer(self.inward(x), hx)
        final = final if isinstance(final, tuple) else (final,)
        return y.sum(-1) + sum(state.sum((0, -1)) for state in final)


def gradients(module: Any, *args: Any) -> list[Tensor]:
    module.zero_grad()
    module(*args).square().sum().backward()
    return [p.grad for p in module.parameters()]


def assert_trains(recorded: Any, model: nn.Module, *args: Any) -> None:
    """It has the outputs and gradients of the model, after the weights have changed too."""
    for factor in (1.0, 1.5):
        for p in (*model.parameters(), *recorded.parameters()):
            p.data = p.data * factor
        recorded.load_state_dict(model.state_dict())
        torch.testing.assert_close(recorded(*args), model(*args))
        torch.testing.assert_close(gradients(recorded, *args), gradients(model, *args))


@EVERY_BACKEND
def test_train_an_exported_program(backend: str) -> None:
    model = Model(fastlstm.LSTM(I, H))
    x = torch.randn(T, B, I)
    assert_trains(torch.export.export(model, (x,)).module(), model, x)


@CPU
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("layer", LAYERS)
def test_train_exported_programs_of_all_kinds(backend: str, layer: str, strict: bool) -> None:
    model = Model(LAYERS[layer]()).eval()
    x = torch.randn(T, B, I)
    sizes = {"x": {0: Dim("T"), 1: Dim("B")}}
    program = torch.export.export(model, (x,), dynamic_shapes=sizes, strict=strict)
    for form in (program, program.run_decompositions()):
        assert_trains(form.module(), model, torch.randn(T + 2, B + 1, I))


@CPU
def test_an_optimizer_improves_an_exported_program(backend: str) -> None:
    x, target = torch.randn(T, B, I), torch.randn(T, B)
    program = torch.export.export(Model(fastlstm.LSTM(I, H)), (x,)).module()
    optimizer = torch.optim.Adam(program.parameters(), 0.05)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (program(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@CPU
def test_a_gradient_penalty_of_an_exported_program(backend: str) -> None:
    model = Model(fastlstm.LSTM(I, H))
    x = torch.randn(T, B, I, requires_grad=True)
    program: Any = torch.export.export(model, (x.detach(),)).module()
    penalties = []
    for module in (model, program):
        (dx,) = torch.autograd.grad(module(x).sum(), x, create_graph=True)
        module.zero_grad()
        dx.square().sum().backward()
        penalties.append([p.grad for p in module.parameters()])
    torch.testing.assert_close(*penalties)


TRANSFORMS: dict[str, Callable[[Any, Tensor, dict[str, Tensor]], Any]] = {
    "vmap": lambda f, x, w: vmap(lambda x: f(w, x))(torch.stack([x, x.flip(0)])),
    "grad": lambda f, x, w: grad(lambda w: f(w, x).sum())(w),
    "per sample": lambda f, x, w: vmap(grad(lambda w, x: f(w, x).sum()), (None, 0))(
        w, torch.stack([x, x.flip(0)])
    ),
    "jvp": lambda f, x, w: jvp(lambda x: f(w, x), (x,), (x.flip(0),)),
    "hessian": lambda f, x, w: hessian(lambda x: f(w, x).sum())(x),
}


@CPU
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("layer", PLAIN)
def test_transform_an_exported_program(backend: str, layer: str, transform: str) -> None:
    model, x = Model(LAYERS[layer]()), torch.randn(T, B, I)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    found = [
        TRANSFORMS[transform](
            lambda w, x, module=module: functional_call(module, w, (x,)).square(), x, weights
        )
        for module in (model, torch.export.export(model, (x,)).module())
    ]
    torch.testing.assert_close(*found)


@CPU
@pytest.mark.parametrize("layer", PLAIN)
@pytest.mark.parametrize("tracing", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_make_fx_and_train(backend: str, layer: str, tracing: str, pre_dispatch: bool) -> None:
    model = Model(LAYERS[layer]())
    x = torch.randn(T, B, I)
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            graph = make_fx(
                model,
                tracing_mode=tracing,
                pre_dispatch=pre_dispatch,
                _allow_non_fake_inputs=True,
            )(x)
        torch.testing.assert_close(graph(x), model(x))
        want = gradients(model, x)
        model.zero_grad()
        graph(x).square().sum().backward()
        torch.testing.assert_close([p.grad for p in model.parameters()], want)


@CPU
def test_make_fx_of_a_gradient_and_differentiate_it(backend: str) -> None:
    model = Model(fastlstm.LSTM(I, H))
    x = torch.randn(T, B, I)

    def gradient(x: Tensor) -> Tensor:
        return torch.func.grad(lambda x: model(x).square().sum())(x)

    def differentiable(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(model(x).square().sum(), x, create_graph=True)[0]

    torch.testing.assert_close(make_fx(gradient)(x)(x), gradient(x))
    found = []
    for function in (differentiable, make_fx(differentiable)(x)):
        model.zero_grad()
        function(x).square().sum().backward()
        found.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*found)


class Cut(nn.Module):
    """Lengths that are known when the program runs."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, used: Tensor) -> Tensor:
        return self.layer(x[used])[0].sum(0)


class CutPacked(Cut):
    def forward(self, x: Tensor, sizes: Tensor) -> Tensor:
        sizes = sizes[sizes > 0]
        total = sizes.sum().item()
        torch._check(total <= x.shape[0])
        return self.layer(PackedSequence(x[:total], sizes))[0].data.sum(0)


@CPU
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("layer", ["lstm", "stack", "rnn"])
def test_export_what_has_as_many_steps_as_the_data_says(
    backend: str, layer: str, strict: bool
) -> None:
    model, packed = Cut(LAYERS[layer]()), CutPacked(LAYERS[layer]())
    x, used = torch.randn(T, B, I), torch.tensor([True, False, True, True, False])
    program = torch.export.export(model, (x, used), strict=strict).module()
    for mask in (used, ~used, torch.ones(T, dtype=torch.bool)):
        torch.testing.assert_close(program(x, mask), model(x, mask))
    with pytest.raises(RuntimeError):
        program(x, torch.zeros(T, dtype=torch.bool))
    rows = torch.randn(9, I)
    program = torch.export.export(
        packed, (rows, torch.tensor([3, 2, 1, 0])), strict=strict
    ).module()
    for sizes in ([3, 2, 1, 0], [4, 4, 1, 0], [1, 1, 1, 1]):
        torch.testing.assert_close(
            program(rows, torch.tensor(sizes)), packed(rows, torch.tensor(sizes))
        )


class Padded(nn.Module):
    """What most models do with padded batches."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        return pad_packed_sequence(self.layer(packed)[0])[0]


def states(batch: int) -> tuple[Tensor, Tensor]:
    return torch.randn(1, batch, H), torch.randn(1, batch, H)


def lengths(*values: int) -> Tensor:
    return torch.tensor(values)


TRACED: dict[str, tuple[Callable[[], Any], list[tuple[Any, ...]]]] = {  # the first is traced
    "lstm": (LAYERS["lstm"], [(torch.randn(t, b, I),) for t, b in ((5, 2), (1, 1), (7, 3))]),
    "one step of one sequence": (
        lambda: fastlstm.LSTM(I, H, 2, bidirectional=True, batch_first=True),
        [(torch.randn(b, t, I),) for t, b in ((1, 1), (5, 2), (1, 3))],
    ),
    "with states": (
        LAYERS["lstm"],
        [(torch.randn(t, b, I), states(b)) for t, b in ((5, 2), (1, 1), (7, 3))],
    ),
    "unbatched": (LAYERS["lstm"], [(torch.randn(t, I),) for t in (5, 1, 7)]),
    "rnn": (LAYERS["rnn"], [(torch.randn(t, b, I),) for t, b in ((5, 2), (1, 1), (7, 3))]),
    "cell": (lambda: fastlstm.LSTMCell(I, H), [(torch.randn(b, I),) for b in (2, 1, 3)]),
    "packed": (
        lambda: Padded(fastlstm.LSTM(I, H)),
        [(torch.randn(5, 2, I), lengths(3, 5)), (torch.randn(7, 3, I), lengths(1, 7, 7))],
    ),
}


def outputs(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [t for r in result for t in outputs(r)]


@pytest.mark.parametrize("backend", ["cuda", "triton"], indirect=True)
def test_trace_kernels_of_gpus(backend: str) -> None:
    """What asks for their plans leaves no trace."""
    module, x = fastlstm.LSTM(I, H), torch.randn(5, 2, I)
    traced = torch.jit.trace(module, (x,))
    with torch.no_grad():
        module.weight_hh_l0.mul_(1.2)
    x = torch.randn(7, 3, I)
    torch.testing.assert_close(outputs(traced(x)), outputs(module(x)))


@CPU
@pytest.mark.parametrize("name", TRACED)
@pytest.mark.parametrize("enabled", [True, False])
def test_trace_and_go_on_with_other_weights_and_sizes(
    backend: str, name: str, enabled: bool
) -> None:
    build, inputs = TRACED[name]
    module = build()
    with torch.set_grad_enabled(enabled):
        for warm in range(2):
            traced = torch.jit.trace(module, inputs[0])
            for p in module.parameters():
                p.data.mul_(1.2 + warm)
            for args in inputs:
                torch.testing.assert_close(outputs(traced(*args)), outputs(module(*args)))
    found = []
    for form in (module, traced):
        form.zero_grad()
        outputs(form(*inputs[-1]))[0].square().sum().backward()
        found.append([p.grad.clone() for p in form.parameters()])
    torch.testing.assert_close(*found)


@CPU
@pytest.mark.slow
def test_load_a_trace_and_a_program_in_another_process(backend: str, tmp_path: Path) -> None:
    model, x = Model(fastlstm.LSTM(I, H)), torch.randn(T, B, I)
    torch.jit.trace(model, (x,)).save(str(tmp_path / "trace.pt"))
    torch.export.save(torch.export.export(model, (x,)), tmp_path / "program.pt2")
    torch.save((x, gradients(model, x)), tmp_path / "want.pt")
    code = """
import sys, torch, fastlstm
x, want = torch.load(sys.argv[1] + "/want.pt")
for load in (
    lambda: torch.jit.load(sys.argv[1] + "/trace.pt"),
    lambda: torch.export.load(sys.argv[1] + "/program.pt2").module(),
):
    module = load()
    module(x).square().sum().backward()
    torch.testing.assert_close([p.grad for p in module.parameters()], want)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


class Several(nn.Module):
    """All three modules of torch.nn."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.cell, self.rnn = nn.LSTM(I, H), nn.LSTMCell(H, H), nn.RNN(H, H)

    def forward(self, x: Tensor) -> Tensor:
        y, (h, c) = self.lstm(x)
        h, c = self.cell(y[0], (h[0], c[0]))
        return self.rnn(y, h.unsqueeze(0))[0]


@CPU
def test_script_a_model(backend: str) -> None:
    model, x = fastlstm.accelerate(Several()), torch.randn(T, B, I)
    want = model(x)
    torch.testing.assert_close(torch.jit.script(model)(x), want)
    torch.testing.assert_close(fastlstm.accelerate(model)(x), want)  # it has nn.LSTM by now
    with pytest.raises(ValueError, match=r"nn\.LSTM has no peephole"):
        torch.jit.script(fastlstm.LSTM(I, H, peephole=True))


@CPU
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:Exporting a model:UserWarning")
def test_export_to_onnx_by_the_old_exporter(backend: str) -> None:
    x = torch.randn(T, 1, I)
    for model, node in ((fastlstm.LSTM(I, H), "LSTM"), (Model(fastlstm.RNN(I, H)), "RNN")):
        file = io.BytesIO()
        torch.onnx.export(model, (x,), file, dynamo=False)
        graph = onnx.load_from_string(file.getvalue()).graph
        assert [n.op_type for n in graph.node].count(node) == 1
    with pytest.raises(RuntimeError, match="use dynamo=True"):
        torch.onnx.export(model.layer, (x, {"lengths": lengths(3)}), file, dynamo=False)


@CPU
def test_draw_a_model_with_fx(backend: str) -> None:
    theirs = Several()
    code = torch.fx.symbolic_trace(theirs).code
    model, x = fastlstm.accelerate(theirs), torch.randn(T, B, I)
    drawn = torch.fx.symbolic_trace(model)
    assert drawn.code == code
    assert torch.equal(drawn(x), model(x))
    assert torch.equal(fastlstm.restore(drawn)(x), fastlstm.restore(model)(x))


@CPU
@pytest.mark.parametrize("kind", ["LSTM", "RNN", "LSTMCell"])
def test_count_operations(backend: str, kind: str) -> None:
    """As many as PyTorch counts in float64, where it computes by products."""
    theirs = getattr(nn, kind)(I, H, dtype=torch.float64)
    ours = getattr(fastlstm, kind).from_torch(theirs)
    x = torch.randn(*(B, I) if kind == "LSTMCell" else (T, B, I), dtype=torch.float64)
    for needs_grad in (False, True):
        x.requires_grad_(needs_grad)
        counts = []
        for module in (theirs, ours):
            forward, backward = FlopCounterMode(display=False), FlopCounterMode(display=False)
            with forward:
                loss = module(x)[0].sum()
            with backward:
                loss.backward()
            with FlopCounterMode(display=False) as inference, torch.no_grad():
                module(x)
            assert inference.get_total_flops() == forward.get_total_flops()
            counts.append((forward.get_total_flops(), backward.get_total_flops()))
        assert counts[0] == counts[1]
        assert min(counts[1]) > 0


@CPU
def test_tools_that_draw_gradients_find_tensors(backend: str) -> None:
    for module in (fastlstm.LSTM(I, H), fastlstm.RNN(I, H)):
        node = module(torch.randn(T, B, I))[0].grad_fn
        assert all(isinstance(t, Tensor) for t in node.saved_tensors)
