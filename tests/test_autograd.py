"""Derivatives of both orders, what a forward keeps for them, and misuse that must raise."""

import gc
from collections.abc import Callable

import pytest
import torch
from cases import Case, Results, draw, fast, plain
from oracle import compare, judge
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastlstm
from fastlstm.kernels.base import get

CASES = [
    Case(T=3, B=2, I=3, H=2),
    Case(T=3, B=2, I=2, H=3, directions=2, bias=False),
    Case(T=2, B=1, I=1, H=2, layers=2, directions=2),
    Case(T=3, B=2, I=1, H=3, proj=2, directions=2),
    Case(T=3, B=3, I=1, H=2, lengths=(2, 3, 1), packed=True, directions=2),
    Case(T=3, B=3, I=1, H=2, lengths=(2, 0, 3), directions=2),
    Case(T=3, B=2, I=1, H=1, lengths=(1, 3), layers=2, directions=2),
    Case(T=4, B=2, I=1, H=2, reset=True),
    Case(T=3, B=2, I=2, H=2, cell_states=True),
    Case(T=3, B=2, I=2, H=2, hx=False, batch_first=True),
]


def as_function(case: Case) -> tuple[Callable[..., tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """The case as a function of x, h0, c0 and every parameter, and its float64 arguments."""
    numbers = draw(case, torch.float64)
    lstm = case.module(fastlstm, torch.float64)
    names = [name for name, _ in lstm.named_parameters()]

    class Call(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = lstm

        def forward(self, x: Tensor, *hx: Tensor) -> tuple[Tensor, ...]:
            return tuple(fast(case, self.lstm, x, hx or None).values())

    inputs = ("x", "h0", "c0") if case.hx else ("x",)
    call = Call()

    def function(*arguments: Tensor) -> tuple[Tensor, ...]:
        weights = dict(zip([f"lstm.{n}" for n in names], arguments[len(inputs) :], strict=True))
        return torch.func.functional_call(call, weights, arguments[: len(inputs)])

    leaves = [numbers[n] for n in inputs] + [numbers[f"w.{n}"] for n in names]
    return function, tuple(leaf.requires_grad_() for leaf in leaves)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradcheck(backend: str, case: Case) -> None:
    assert gradcheck(*as_function(case))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradgradcheck(backend: str, case: Case) -> None:
    assert gradgradcheck(*as_function(case))


def penalty(
    case: Case, dtype: torch.dtype, numbers: Results, solver: Callable[..., Results]
) -> Results:
    """Gradients of |d loss / d x|^2 in every leaf, as float64: a gradient penalty."""
    lstm = case.module(fastlstm if solver is fast else torch.nn, dtype)
    lstm.load_state_dict({k[2:]: v for k, v in numbers.items() if k.startswith("w.")})
    leaves = {k: numbers[k].to(dtype).requires_grad_() for k in ("x", "h0", "c0")}
    outputs = solver(case, lstm, leaves["x"], (leaves["h0"], leaves["c0"]))
    loss = sum(t.square().sum() for t in outputs.values())
    (dx,) = torch.autograd.grad(loss, leaves["x"], create_graph=True)
    leaves |= dict(lstm.named_parameters())
    second = torch.autograd.grad(dx.square().sum(), tuple(leaves.values()))
    return {f"dd {n}": g.double() for n, g in zip(leaves, second, strict=True)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case(T=5, B=3, I=10, H=17),
        Case(T=4, B=7, I=3, H=33, layers=2, directions=2),
        Case(T=5, B=3, I=10, H=17, proj=5),
        Case(T=6, B=3, I=3, H=5, lengths=(2, 6, 3), packed=True, directions=2),
    ],
    ids=str,
)
def test_gradient_penalty(backend: str, case: Case, dtype: torch.dtype) -> None:
    """The second order by the same oracle as the first."""
    numbers = draw(case, dtype)
    truth, allowed = judge(lambda d, n: penalty(case, d, n, plain), dtype, numbers)
    compare(f"{case} in {dtype}", penalty(case, dtype, numbers, fast), truth, allowed)


def storage(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


def kept(lstm: torch.nn.Module, x: Tensor | PackedSequence, **options: Tensor) -> int:
    """How many values a forward call keeps for its backward.

    Counted: what autograd saved, and new tensors that are still reachable from Python, which
    finds those tucked away elsewhere. Not counted: the arguments, and the outputs unless saved.
    """
    saved: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        saved[storage(t)] = t.detach()
        return t

    rows = (x.data, x.batch_sizes) if isinstance(x, PackedSequence) else (x,)
    arguments = {storage(t) for t in (*rows, *options.values(), *lstm.parameters())}
    gc.freeze()  # what is there before does not count, and is not looked through
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y, (h_n, c_n) = lstm(x, **options)
    gc.collect()
    new = {storage(o): o for o in gc.get_objects() if issubclass(type(o), Tensor)}
    gc.unfreeze()
    y = y.data if isinstance(y, PackedSequence) else y
    returned = arguments | {storage(t) for t in (y, h_n, c_n)}
    held = {at: t for at, t in new.items() if at not in returned}
    held |= {at: t for at, t in saved.items() if at not in arguments}
    return sum(t.untyped_storage().nbytes() // t.element_size() for t in held.values())


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("proj", [0, 3])
@pytest.mark.parametrize("form", ["dense", "batch_first", "lengths", "packed"])
def test_kept_for_backward(
    backend: str, form: str, proj: int, directions: int, dtype: torch.dtype
) -> None:
    """At most 6H values a step per direction: the difference of two lengths, so no constants.

    The input is wider than that, so a copy of it would show; the packed batch is mostly padding,
    so padding it would show too.
    """
    H, I, B = 5, 100, 4
    lstm = fastlstm.LSTM(
        I,
        H,
        bidirectional=directions == 2,
        proj_size=proj,
        batch_first=form == "batch_first",
        dtype=dtype,
    )

    def values(T: int) -> int:
        x = torch.randn(T, B, I, dtype=dtype, requires_grad=True)
        lengths = torch.tensor([T, 1, 1, 1])
        if form == "packed":
            return kept(lstm, pack_padded_sequence(x, lengths))
        if form == "batch_first":
            return kept(lstm, x.transpose(0, 1))
        return kept(lstm, x, **({"lengths": lengths} if form == "lengths" else {}))

    values(40)  # packs the weights, which are kept for good
    rows = 20 * (1 if form == "packed" else B)
    assert 0 < values(40) - values(20) <= 6 * H * directions * rows


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_retain_graph(backend: str, training: bool) -> None:
    """A graph is used as often as it is retained, in eval mode too, and then refuses."""
    lstm = fastlstm.LSTM(10, 17, 2, bidirectional=True, dropout=0.5).train(training)
    x = torch.randn(5, 3, 10, requires_grad=True)
    y, _ = lstm(x)
    leaves = (x, *lstm.parameters())
    first = torch.autograd.grad(y.square().sum(), leaves, retain_graph=True)
    second = torch.autograd.grad(y.square().sum(), leaves)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(y.square().sum(), leaves)


def test_backward_in_eval_mode(backend: str) -> None:
    """eval() changes no gradient where there is no dropout (cuDNN refuses the backward)."""
    lstm = fastlstm.LSTM(10, 17, 2)
    x = torch.randn(5, 3, 10)
    lstm(x)[0].square().sum().backward()
    trained = [p.grad for p in lstm.parameters()]
    lstm.zero_grad()
    lstm.eval()(x)[0].square().sum().backward()
    for p, want in zip(lstm.parameters(), trained, strict=True):
        assert torch.equal(p.grad, want)


@pytest.mark.parametrize("edited", ["x", "h0", "c0", "weight_ih_l0", "weight_hh_l0"])
def test_edit_of_an_input_before_backward_raises(backend: str, edited: str) -> None:
    lstm = fastlstm.LSTM(10, 17)
    leaves = dict(lstm.named_parameters())
    leaves["x"] = torch.randn(5, 3, 10, requires_grad=True)
    leaves |= {k: torch.randn(1, 3, 17, requires_grad=True) for k in ("h0", "c0")}
    y, _ = lstm(leaves["x"], (leaves["h0"], leaves["c0"]))
    with torch.no_grad():
        leaves[edited].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y.sum(), tuple(leaves.values()))


@pytest.mark.parametrize("which", [0, 1, 2], ids=["y", "h_n", "c_n"])
@pytest.mark.parametrize("directions", [1, 2])
def test_edit_of_an_output_before_backward_is_never_silently_wrong(
    backend: str, directions: int, which: int
) -> None:
    """It has no effect on the gradients of what was computed before it."""
    lstm = fastlstm.LSTM(10, 17, bidirectional=directions == 2)
    x = torch.randn(5, 3, 10, requires_grad=True)
    leaves = (x, *lstm.parameters())

    def gradients(edit: bool) -> tuple[Tensor, ...]:
        y, (h_n, c_n) = lstm(x)
        outputs = y, h_n, c_n
        total = sum((t.sum() for t in outputs), torch.zeros(()))
        if edit:
            with torch.no_grad():
                outputs[which].mul_(2)
        return torch.autograd.grad(total, leaves)

    torch.testing.assert_close(gradients(True), gradients(False))


@pytest.mark.parametrize("backend", ["cpu", "triton"], indirect=True)
@pytest.mark.parametrize("lengths", [None, torch.tensor([4, 0, 2])], ids=["dense", "lengths"])
def test_trains_compiled_in_one_graph(backend: str, lengths: Tensor | None) -> None:
    """Linear -> LSTM -> Linear, forward and backward, at two sizes."""
    torch.manual_seed(0)
    inward, lstm, outward = torch.nn.Linear(6, 5), fastlstm.LSTM(5, 7, 2), torch.nn.Linear(7, 2)

    def model(x: Tensor) -> Tensor:
        return outward(lstm(inward(x), lengths=lengths)[0])

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    parameters = [*inward.parameters(), *lstm.parameters(), *outward.parameters()]
    for T in (4, 6):
        x = torch.randn(T, 3, 6)
        got = torch.autograd.grad(compiled(x).square().sum(), parameters)
        want = torch.autograd.grad(model(x).square().sum(), parameters)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


def test_second_derivatives_of_a_constant_gradient(backend: str) -> None:
    """c_n of one step does not depend on the normalisation of c, nor do its derivatives."""
    lstm = fastlstm.LSTM(5, 8, layer_norm=True)
    _, (_, c_n) = lstm(torch.randn(1, 3, 5))
    weights = list(lstm.parameters())
    found = torch.autograd.grad(c_n.sum(), weights, create_graph=True, materialize_grads=True)
    sum(g.square().sum() for g in found).backward()
    assert lstm.weight_hh_l0.grad is not None and lstm.weight_ih_l0.grad.any()


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_a_gradient_penalty_goes_back_through_a_layer_once(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second pass has formulas; it does not run the first one again with no gradients."""
    passes = []
    kernel = get(backend).lstm_plain_bwd
    monkeypatch.setattr(
        get(backend), "lstm_plain_bwd", lambda *a: (passes.append(1), kernel(*a))[1]
    )
    x = torch.randn(4, 2, 5, requires_grad=True)
    lstm = fastlstm.LSTM(5, 8)
    (dx,) = torch.autograd.grad(lstm(x)[0].sum(), x, create_graph=True)
    dx.square().sum().backward()
    assert x.grad is not None and x.grad.any()
    assert len(passes) == 1


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("of", ["all", "x", "weights", "states"])
def test_second_derivatives_of_every_input(
    backend: str, of: str, bias: bool, directions: int
) -> None:
    """Through gradients of some inputs, to all of them and to what was incoming."""
    wide = {"dtype": torch.float64}
    theirs = torch.nn.LSTM(3, 4, 2, bias, bidirectional=directions == 2, **wide)
    x = torch.randn(5, 2, 3, **wide)
    states = [torch.randn(2 * directions, 2, 4, **wide) for _ in "hc"]

    def second(lstm: torch.nn.Module) -> tuple[Tensor, ...]:
        rows, h0, c0 = (t.clone().requires_grad_() for t in (x, *states))
        weights = list(lstm.parameters())
        y, (h, c) = lstm(rows, (h0, c0))
        dy = torch.full_like(y, 0.3).requires_grad_()
        leaves = {"all": [rows, h0, c0, *weights], "x": [rows], "weights": weights}
        loss = (y * dy).sum() + h.square().sum() + c.sin().sum()
        first = torch.autograd.grad(loss, leaves.get(of, [h0, c0]), create_graph=True)
        total = sum((g.square().sum() for g in first), torch.zeros((), **wide))
        return torch.autograd.grad(total, [rows, h0, c0, dy, *weights])

    torch.testing.assert_close(second(fastlstm.LSTM.from_torch(theirs)), second(theirs))
