"""torch.compile takes a layer as one node of one graph, forward and backward."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import Case, draw_reset, noise_of
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch.aot_autograd import make_boxed_func
from torch.func import functional_call, grad, hessian, vmap
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastlstm
from fastlstm.backends import select
from fastlstm.kernels.base import get

T, B, I, H = 4, 3, 5, 6
CPU = pytest.mark.parametrize("backend", ["cpu"], indirect=True)
LENGTHS = torch.tensor([2, 4, 1])


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """Nothing that was compiled by another test, and one thread: these layers are small."""
    torch.set_num_threads(1)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Model(nn.Module):
    """Linear -> a recurrent layer -> Linear."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.inward, self.layer = nn.Linear(I, I), layer
        directions = 2 if getattr(layer, "bidirectional", False) else 1
        self.outward = nn.Linear(directions * (getattr(layer, "proj_size", 0) or H), 2)

    def forward(self, x: Tensor, *args: Any, **options: Any) -> tuple[Tensor, ...]:
        y, *rest = self.layer(self.inward(x), *args, **options)
        return self.outward(y), *flat(rest)


def flat(result: Any) -> list[Tensor]:
    """The tensors of a result."""
    if isinstance(result, Tensor):
        return [result]
    return [t for part in result if part is not None for t in flat(part)]


def run(function: Callable[..., Any], parameters: Any, *args: Any, **options: Any) -> list[Tensor]:
    """Outputs and gradients of the parameters, from the same noise."""
    torch.manual_seed(1)
    outputs = flat(function(*args, **options))
    loss = sum(t.double().sin().square().sum() for t in outputs if t.requires_grad)
    found = torch.autograd.grad(loss, list(parameters))
    return [t.detach() for t in (*outputs, *found)]


def assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def x_of(T: int = T, B: int = B) -> Tensor:
    return torch.randn(T, B, I)


def test_the_backend_that_is_named(backend: str) -> None:
    """Compiled code takes the one that its thread has chosen, as every other call does."""
    specs = fastlstm.LSTM(I, H).specs()

    def ask(x: Tensor) -> tuple[Tensor, str]:
        return x + 1, select(x, specs).name

    _, taken = torch.compile(ask, backend="eager", fullgraph=True)(x_of())
    assert taken == backend


def test_one_graph(backend: str) -> None:
    """Forward and backward, and weights that an optimizer changes between calls."""
    model = Model(fastlstm.LSTM(I, H, bidirectional=True))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for _ in range(3):
        x = x_of()
        got = run(compiled, model.parameters(), x)
        assert_same(got, run(model, model.parameters(), x))
        with torch.no_grad():
            assert_same(flat(compiled(x)), flat(model(x)))
        optimizer.zero_grad()
        compiled(x)[0].square().sum().backward()
        optimizer.step()
    assert counter.frame_count == 2  # with gradients and without


@pytest.mark.slow
@CPU
@pytest.mark.parametrize("how", ["marked", "dynamic=True", "automatic"])
@pytest.mark.parametrize("form", ["dense", "lengths"])
def test_other_sizes_compile_nothing(backend: str, form: str, how: str) -> None:
    """Eager calls in between do not either."""
    model = Model(fastlstm.LSTM(I, H, 2, batch_first=form == "lengths"))
    counter = CompileCounterWithBackend("aot_eager")
    dynamic = True if how == "dynamic=True" else None
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=dynamic)
    counts = []
    for steps, batch in ((4, 3), (7, 5), (50, 2), (3, 17), (9, 9)):
        x, options = torch.randn(steps, batch, I), {}
        if form == "lengths":
            x, options = x.transpose(0, 1).contiguous(), {"lengths": torch.arange(batch) % steps}
        if how == "marked":
            torch._dynamo.mark_dynamic(x, (0, 1))
            for t in options.values():
                torch._dynamo.mark_dynamic(t, 0)
        got = run(compiled, model.parameters(), x, **options)
        assert_same(got, run(model, model.parameters(), x, **options))
        counts.append(counter.frame_count)
    # "dynamic=True" hands a first graph over, which Dynamo discards: it tries floats as tensors.
    first, second = {"marked": (1, 1), "dynamic=True": (2, 2), "automatic": (1, 2)}[how]
    assert counts == [first] + [second] * 4


def test_cell_is_compiled_once(backend: str) -> None:
    cell = fastlstm.LSTMCell(I, H)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(cell, fullgraph=True, backend=counter)
    with torch.no_grad():
        state = None
        for x in x_of(6):
            state = compiled(x, state) if state else cell(x)
    assert counter.frame_count == 1


@CPU
def test_graphs_do_not_grow_with_steps(backend: str) -> None:
    """Neither forward nor backward: time to compile is that of one step."""
    sizes: list[int] = []

    def count(graph: torch.fx.GraphModule, example: Any) -> Any:
        sizes.append(len(graph.graph.nodes))
        return make_boxed_func(graph.forward)

    model = Model(fastlstm.LSTM(I, H, 2, bidirectional=True))
    for steps in (5, 50):
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend=aot_autograd(fw_compiler=count))
        run(compiled, model.parameters(), x_of(steps))
    forward, backward = sizes[:2]
    assert sizes == [forward, backward] * 2


PACKED = pack_padded_sequence(torch.randn(T, B, I), LENGTHS, enforce_sorted=False)
STATE = torch.randn(2, B, H), torch.randn(2, B, H)
RESET = torch.tensor([[True, False, False, True], [False] * 4, [False, True, True, False]]).T

# The arguments of a layer, and those of its call.
CALLS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "hx": (lambda: fastlstm.LSTM(I, H, bidirectional=True), {"hx": STATE}),
    "lengths": (lambda: fastlstm.LSTM(I, H, bidirectional=True), {"lengths": LENGTHS}),
    "reset": (lambda: fastlstm.LSTM(I, H, 2), {"hx": STATE, "reset": RESET}),
    "cell states": (lambda: fastlstm.LSTM(I, H), {"return_cell_states": True}),
    "projected": (lambda: fastlstm.LSTM(I, H, 2, bidirectional=True, proj_size=2), {}),
    "dropout": (lambda: fastlstm.LSTM(I, H, 2, dropout=0.5, batch_first=True), {}),
    "recurrent dropout": (lambda: fastlstm.LSTM(I, H, recurrent_dropout=0.5), {}),
    "weight dropout": (lambda: fastlstm.LSTM(I, H, weight_dropout=0.5), {}),
    "zoneout": (lambda: fastlstm.LSTM(I, H, zoneout=(0.5, 0.25)), {"lengths": LENGTHS}),
    "layer norm": (lambda: fastlstm.LSTM(I, H, layer_norm=True), {}),
    "peephole": (lambda: fastlstm.LSTM(I, H, peephole=True, bidirectional=True), {}),
    "recompute": (lambda: fastlstm.LSTM(I, H, recompute=True), {"lengths": LENGTHS}),
    "everything": (
        lambda: fastlstm.LSTM(
            I, H, 2, layer_norm=True, peephole=True, zoneout=(0.2, 0.2), recurrent_dropout=0.2
        ),
        {"hx": STATE, "reset": RESET, "lengths": LENGTHS, "return_cell_states": True},
    ),
    "RNN": (lambda: fastlstm.RNN(I, H, 2, bidirectional=True), {"lengths": LENGTHS}),
    "relu": (lambda: fastlstm.RNN(I, H, 2, nonlinearity="relu"), {"hx": STATE[0]}),
}


@pytest.mark.slow
@CPU
@pytest.mark.parametrize("name", CALLS)
def test_calls(backend: str, name: str) -> None:
    """Whatever a layer can do, with the noise of the eager call."""
    build, options = CALLS[name]
    model = Model(build())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = x_of()
    got = run(compiled, model.parameters(), x, **options)
    assert_same(got, run(model, model.parameters(), x, **options))


@pytest.mark.slow
@CPU
@pytest.mark.parametrize("compiler", ["aot_eager", "aot_eager_decomp_partition"])
@pytest.mark.parametrize("build", [CALLS["hx"][0], CALLS["everything"][0], CALLS["RNN"][0]])
def test_packed_input(backend: str, build: Callable[[], nn.Module], compiler: str) -> None:
    """It goes in and comes out whole, and a gradient goes back into its rows."""
    layer = build().eval()

    def outputs(packed: PackedSequence) -> Any:
        return layer(packed._replace(data=packed.data * 2))

    compiled = torch.compile(outputs, fullgraph=True, backend=compiler)
    packed = PACKED._replace(data=PACKED.data.clone().requires_grad_())
    leaves = [packed.data, *layer.parameters()]
    got, want = compiled(packed), outputs(packed)
    assert type(got[0]) is PackedSequence
    assert_same(flat(got), flat(want))
    assert_same(run(compiled, leaves, packed), run(outputs, leaves, packed))


def test_cell_in_a_loop(backend: str) -> None:
    cell = fastlstm.LSTMCell(I, H)

    def walk(x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        for step in x:
            h, c = cell(step, (h, c))
        return h, c

    compiled = torch.compile(walk, fullgraph=True, backend="aot_eager_decomp_partition")
    arguments = (x_of(), STATE[0][0], STATE[1][0])
    assert_same(
        run(compiled, cell.parameters(), *arguments), run(walk, cell.parameters(), *arguments)
    )


def test_autocast(backend: str) -> None:
    model = Model(fastlstm.LSTM(I, H))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = x_of()
    with torch.autocast("cpu", torch.bfloat16):
        got = run(compiled, model.parameters(), x)
        assert_same(got, run(model, model.parameters(), x))
        assert got[0].dtype is torch.bfloat16


def test_accelerated_model(backend: str) -> None:
    """nn.LSTM itself breaks the graph."""
    model = fastlstm.accelerate(Model(nn.LSTM(I, H)))
    x = x_of()
    want = run(model, model.parameters(), x)
    model.compile(fullgraph=True, backend="aot_eager")
    assert_same(run(model, model.parameters(), x), want)


@pytest.mark.slow
@CPU
def test_inductor(backend: str) -> None:
    """Code is generated once, for every size: padded and packed, options, a cell."""
    padded, packed = (
        fastlstm.LSTM(I, H, bidirectional=True),
        fastlstm.LSTM(2 * H, H, peephole=True),
    )
    cell, rnn = fastlstm.LSTMCell(H, H), fastlstm.RNN(H, H)
    layers = nn.ModuleList([padded, packed, cell, rnn])

    def outputs(x: Tensor, lengths: Tensor, rows: PackedSequence) -> list[Tensor]:
        y, (h, _) = padded(x.tanh(), lengths=lengths)
        z, (h_n, c_n) = packed(rows._replace(data=rows.data.tanh()))
        state = cell(h[0].relu(), (h_n[0], c_n[0]))
        return [y.relu(), *rnn(z.data.view(-1, 1, H)), *state]

    with torch._inductor.utils.fresh_cache():
        counter = CompileCounterWithBackend("inductor")
        compiled = torch.compile(outputs, fullgraph=True, backend=counter)
        for steps in (4, 6):
            lengths = torch.tensor([2, steps, 1])
            rows = pack_padded_sequence(
                torch.randn(steps, B, 2 * H), lengths, enforce_sorted=False
            )
            arguments = (x_of(steps), lengths, rows)
            for t in (arguments[0], rows.data, rows.batch_sizes):
                torch._dynamo.mark_dynamic(t, 0)
            got = run(compiled, layers.parameters(), *arguments)
            assert_same(got, run(outputs, layers.parameters(), *arguments))
        assert counter.frame_count == 1


@pytest.mark.slow
@CPU
def test_inductor_in_every_mode(backend: str) -> None:
    """All that PyTorch documents: "lite" takes no operator that writes into its arguments."""
    model, x = Model(fastlstm.LSTM(I, H, 2, bidirectional=True)), x_of()
    want = run(model, model.parameters(), x)
    for mode in ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"):
        torch._dynamo.reset()
        with torch._inductor.utils.fresh_cache():
            compiled = torch.compile(model, fullgraph=True, mode=mode)
            assert_same(run(compiled, model.parameters(), x), want)


@pytest.mark.parametrize("transform", ["vmap", "grad", "per sample", "hessian"])
def test_torch_func_within(backend: str, transform: str) -> None:
    """Transforms inside of compiled code."""
    lstm = fastlstm.LSTM(I, H)
    weights = {k: p.detach() for k, p in lstm.named_parameters()}

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(lstm, weights, (x,))[0].square().sum()

    transforms: dict[str, Callable[..., Any]] = {
        "vmap": lambda w, x: vmap(loss, (None, 1))(w, x),
        "grad": lambda w, x: list(grad(loss)(w, x).values()),
        "per sample": lambda w, x: list(vmap(grad(loss), (None, 1))(w, x).values()),
        "hessian": lambda w, x: hessian(lambda x: loss(w, x))(x),
    }
    function = transforms[transform]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 2, I)
    assert_same(flat(compiled(weights, x)), flat(function(weights, x)))


def operands(case: Case) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The first arguments of an operator of a case's layer, and its keywords."""
    layer = case.module(fastlstm, torch.float32)
    weights = [w.detach() for w in layer.parameters()]
    states = [torch.randn(case.directions, case.B, n) for n in (case.proj or case.H, case.H)]
    x, lengths, sizes = torch.randn(case.T, case.B, case.I), None, None
    if case.packed:
        packed = pack_padded_sequence(x, torch.tensor(case.lengths), enforce_sorted=False)
        x, sizes = packed.data, packed.batch_sizes
    elif case.lengths:
        lengths = torch.tensor(case.lengths)
    reset = draw_reset(case) if case.reset else None
    rows = (*states[: len(case.states)], sizes, lengths, reset)
    if case.kind != "LSTM":
        return (x, weights, case.directions, *rows, case.kind == "RNN_RELU"), {}
    cell: dict[str, Any] = {
        "peephole": case.peephole,
        "layer_norm": case.layer_norm,
        "zoneout_c": case.zoneout[0],
        "zoneout_h": case.zoneout[1],
    }
    if case.noise:
        cell["h_mask"], cell["seed"] = noise_of(case, 0, torch.float32)
    return (x, weights, case.directions, *rows), cell


OPERANDS = [
    Case(T=3, B=2, I=5, H=7),
    Case(T=3, B=2, I=5, H=7, directions=2, lengths=(1, 3), bias=False),
    Case(T=3, B=2, I=5, H=7, proj=3, lengths=(3, 2), packed=True),
    Case(T=3, B=2, I=5, H=7, peephole=True, layer_norm=True, zoneout=(0.2, 0.1), noise=True),
    Case(T=3, B=2, I=5, H=7, reset=True, recompute=True),
    Case(T=3, B=2, I=5, H=7, kind="RNN_TANH", directions=2, lengths=(1, 3)),
    Case(T=3, B=2, I=5, H=7, kind="RNN_RELU", reset=True),
]


@pytest.mark.slow
@CPU
@pytest.mark.parametrize("case", OPERANDS, ids=str)
def test_operators_pass_opcheck(backend: str, case: Case) -> None:
    """All of torch's own checks, with whatever an operator can be given."""
    inputs, cell = operands(case)
    x, weights, D, h0 = inputs[:4]
    P = case.proj or case.H
    y, h_n = torch.zeros(*x.shape[:-1], D * P), torch.zeros(D, case.B, P)
    slopes = [torch.randn_like(y), torch.randn_like(h_n)]
    found = [torch.zeros_like(x), torch.zeros_like(h0)]
    each = len(weights) // D
    dweights = [torch.zeros_like(w) for w in weights]
    if case.bias:  # one gradient serves both biases
        del dweights[3::each]
    if case.kind != "LSTM":
        torch.library.opcheck(get("cpu").rnn_fwd, (*inputs, y, h_n, None))
        torch.library.opcheck(get("cpu").rnn_bwd, (*inputs, y, *slopes, *found, dweights, None))
        return
    c_n = torch.zeros(D, case.B, case.H)
    c_all = torch.zeros(*x.shape[:-1], D * case.H)
    kept = not (case.recompute or case.layer_norm)
    gates = torch.zeros(D, *x.shape[:-1], 4 * case.H) if kept else None
    torch.library.opcheck(get("cpu").lstm_fwd, (*inputs, y, h_n, c_n, c_all, gates, None), cell)
    get("cpu").lstm_fwd(*inputs, y, h_n, c_n, c_all, gates, None, **cell)
    slopes += [torch.randn_like(c_n), torch.randn_like(c_all)]
    found.append(torch.zeros_like(c_n))
    arguments = (*inputs, y, c_all, gates, *slopes, *found, dweights, None)
    torch.library.opcheck(get("cpu").lstm_bwd, arguments, cell)
