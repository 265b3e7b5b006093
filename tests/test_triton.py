"""The Triton backend, its kernels interpreted on the CPU: regimes, autograd, choice and messages.

tests/test_numerics.py and tests/test_ragged.py run on it too, in the regime that each shape gets;
tests/test_kernels.py compiles it for GPUs that are not here.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from cases import Case
from interpreter import INTERPRETED, rounding
from oracle import check
from test_numerics import FEATURES, GRADIENTS
from test_ragged import PACKED, PADDED, RESET
from torch import Tensor

import fastlstm
from benchmarks.speed.precision import PRECISIONS
from fastlstm.kernels.triton import TRITON
from fastlstm.layer import keeping
from fastlstm.spec import LayerSpec

pytestmark = INTERPRETED


AGAIN = keeping._again


@pytest.fixture(autouse=True)
def triton() -> Iterator[None]:
    """The interpreted kernels compute every call of these tests."""
    with fastlstm.backend("triton"), rounding():
        yield


def override(**changes: Any) -> Any:
    """`config.override`, which cannot be imported before the backend is in use."""
    from fastlstm.kernels.triton import config

    return config.override(**changes)


SMALL = [
    case
    for case in FEATURES + GRADIENTS + PACKED + PADDED + RESET
    if case.T * case.B * case.H < 3000
]


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_steps_regime(case: Case) -> None:
    """Shapes that one program could hold, with their units spread over launches of one step."""
    torch.set_num_threads(1)
    with override(regime="steps"):
        check(case, torch.float32, "triton")


def test_hundreds_of_steps() -> None:
    torch.set_num_threads(1)
    check(Case(T=400, B=2, I=3, H=5), torch.float32, "triton")


SPREAD = [
    Case(T=4, B=3, I=5, H=150, reset=True, proj=20),
    Case(T=3, B=18, I=5, H=150, directions=2),
    Case(T=3, B=3, I=5, H=150, lengths=(3, 0, 2), directions=2, layers=2),
    Case(T=3, B=3, I=5, H=150, lengths=(1, 3, 2), packed=True, directions=2),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", SPREAD, ids=str)
def test_hidden_sizes_beyond_one_program(case: Case, dtype: torch.dtype) -> None:
    """Above H = 128 the gates are kept for backward, which smaller layers compute again."""
    torch.set_num_threads(1)
    check(case, dtype, "triton")


@pytest.mark.parametrize(
    "changes",
    [{"batch": 8}, {"batch": 32}, {"fused": False}, {"fused": True}],
    ids=str,
)
def test_tiles_do_not_matter(changes: dict[str, Any]) -> None:
    case = Case(T=5, B=20, I=11, H=33, directions=2)
    with override(regime="sequence", **changes):
        check(case, torch.float32, "triton")


@pytest.mark.parametrize(
    "changes",
    [{"units": 16}, {"batch": 32}, {"chunk": 16}, {"chunk": 64}],
    ids=str,
)
def test_tiles_of_steps_do_not_matter(changes: dict[str, Any]) -> None:
    case = Case(T=3, B=20, I=11, H=50, directions=2)
    with override(regime="steps", **changes):
        check(case, torch.float32, "triton")


@pytest.mark.parametrize("regime", ["sequence", "steps"])
def test_gradient_of_padding_never_leaks_through_a_projection(regime: str) -> None:
    lstm = fastlstm.LSTM(5, 7, proj_size=3, bidirectional=True)
    lengths = torch.tensor([1, 4, 0])
    padding = torch.arange(4)[:, None] >= lengths
    found = []
    for garbage in (0.0, float("nan")):
        with override(regime=regime):
            y, (h_n, _) = lstm(torch.ones(4, 3, 5), lengths=lengths)
            dy = torch.ones_like(y).masked_fill(padding[..., None], garbage)
            dh_n = torch.ones_like(h_n).masked_fill(lengths.eq(0)[:, None], garbage)
            found.append(torch.autograd.grad([y, h_n], list(lstm.parameters()), [dy, dh_n]))
    for clean, spoiled in zip(*found, strict=True):
        assert torch.equal(clean, spoiled)


@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("H", [20, 150])
def test_saved_for_backward(H: int, needs_grad: bool) -> None:
    """h, c and, above H = 128, gates; nothing at all without a gradient to compute.

    Without gates the weights are kept too, as they were: backward computes gates from them.
    """
    lstm = fastlstm.LSTM(10, H)
    saved: dict[int, Tensor] = {}

    def keep(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t
        return t

    x = torch.randn(6, 4, 10)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t),
        nullcontext() if needs_grad else torch.no_grad(),
    ):
        lstm(x)
    given = {t.untyped_storage().data_ptr() for t in (x, *lstm.parameters())}
    kept = sum(t.numel() for where, t in saved.items() if where not in given)
    keeps_gates = TRITON.keeps_gates(LayerSpec("LSTM", 10, H))
    if needs_grad and not keeps_gates:
        kept -= sum(p.numel() for p in lstm.parameters())
    per_step = kept / (6 * 4 * H)
    assert per_step == ((6 if keeps_gates else 2) if needs_grad else 0)


def test_another_precision_in_the_backward_pass() -> None:
    """Gates kept in TF32 may lie in another order than those that an exact backward pass reads."""
    lstm, x = fastlstm.LSTM(4, 6), torch.randn(3, 2, 4)
    with PRECISIONS["exact"].applied():
        expected = torch.autograd.grad(lstm(x)[0].sum(), list(lstm.parameters()))
    for precision in ("exact", "tf32"):
        with PRECISIONS[precision].applied():
            y, _ = lstm(x)
        with PRECISIONS["exact"].applied(), mock.patch.object(keeping, "_again") as again:
            again.side_effect = AGAIN
            found = torch.autograd.grad(y.sum(), list(lstm.parameters()))
        assert again.called is (precision == "tf32")
        assert all(map(torch.equal, found, expected))


def test_second_derivatives() -> None:
    """Through the reference: a gradient penalty has the gradients that the reference gives it."""
    lstm = fastlstm.LSTM(5, 7)
    x = torch.randn(4, 3, 5, requires_grad=True)

    def penalty() -> list[Tensor]:
        y, _ = lstm(x)
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return list(torch.autograd.grad(dx.square().sum(), [x, *lstm.parameters()]))

    found = penalty()
    with fastlstm.backend("reference"):
        expected = penalty()
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_operators_pass_opcheck(direction: str) -> None:
    T, B, I, H = 3, 2, 5, 7
    x, w_ih, w_hh = torch.randn(T, B, I), torch.randn(4 * H, I), torch.randn(4 * H, H)
    b = torch.randn(4 * H)
    y, c_all = torch.zeros(T, B, H), torch.zeros(T, B, H)
    h_n, c_n = torch.zeros(1, B, H), torch.zeros(1, B, H)
    inputs = (x, [w_ih, w_hh, b, b.clone()], 1, None, None, None, None, None)
    TRITON.lstm_fwd(*inputs, y, h_n, c_n, c_all, None, None)
    tests = ("test_schema", "test_faketensor")
    if direction == "fwd":
        arguments: tuple[Any, ...] = (*inputs, y, h_n, c_n, c_all, None, None)
        torch.library.opcheck(TRITON.lstm_fwd, arguments, test_utils=tests)
    else:
        gradients = [torch.zeros_like(t) for t in (w_ih, w_hh, b)]
        arguments = (*inputs, y, c_all, None, torch.randn(T, B, H), None, None, None,
                     torch.zeros_like(x), None, None, gradients, None)  # fmt: skip
        torch.library.opcheck(TRITON.lstm_bwd, arguments, test_utils=tests)


def test_autocast() -> None:
    lstm, x = fastlstm.LSTM(5, 7), torch.randn(4, 3, 5)
    with torch.autocast("cpu", torch.float16):
        y, (h, c) = lstm(x)
    assert y.dtype is h.dtype is c.dtype is torch.float16
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype is torch.float32 for p in lstm.parameters())


def test_backward_within_autocast_is_not_cast() -> None:
    lstm, x = fastlstm.LSTM(5, 7, bidirectional=True), torch.randn(4, 3, 5)

    def gradients(enabled: bool) -> tuple[Tensor, ...]:
        loss = lstm(x)[0].square().sum()
        with torch.autocast("cpu", torch.float16, enabled=enabled):
            return torch.autograd.grad(loss, list(lstm.parameters()))

    for plain, within in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(plain, within)


@pytest.mark.parametrize("H", [7, 150])
def test_exported(H: int) -> None:
    """An exported program calls the operators with gradients on."""
    lstm, x = fastlstm.LSTM(5, H), torch.randn(4, 3, 5)
    program = torch.export.export(lstm, (x,))
    assert torch.equal(program.module()(x)[0], lstm(x)[0])


def test_threads() -> None:
    """The interpreter serves one at a time."""
    lstm, x = fastlstm.LSTM(5, 7), torch.randn(4, 3, 5)
    expected = lstm(x)[0]

    def work() -> bool:
        with fastlstm.backend("triton"):
            return torch.equal(lstm(x)[0], expected)

    with ThreadPoolExecutor(3) as threads:
        assert all(threads.map(lambda _: work(), range(9)))


def test_cell() -> None:
    cell, x = fastlstm.LSTMCell(5, 7), torch.randn(3, 5)
    state = torch.randn(3, 7), torch.randn(3, 7)
    found = cell(x, state)
    with fastlstm.backend("reference"):
        expected = cell(x, state)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_refuses_what_it_cannot_compute(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interpreter on its own, as users have it: tests/interpreter.py can do bfloat16."""
    from fastlstm.kernels.triton import launch

    monkeypatch.setattr(launch, "rounds_as_gpu", False)
    lstm = fastlstm.LSTM(5, 7, dtype=dtype)
    with pytest.raises(RuntimeError, match=r'"triton" backend cannot .*float'):
        lstm(torch.zeros(2, 3, 5, dtype=dtype))


def test_refuses_cells_beyond_one_program() -> None:
    lstm, x = fastlstm.LSTM(5, 150, layer_norm=True), torch.zeros(2, 3, 5)
    with pytest.raises(RuntimeError, match="layer_norm needs all units in one program, H <= 64"):
        lstm(x)
    assert fastlstm.explain(fastlstm.LSTM(5, 150, peephole=True), x).backend == "triton"


def test_auto_does_not_interpret() -> None:
    """The interpreter is there to check the kernels: nobody gets it without asking."""
    with fastlstm.backend("auto"):
        backend = fastlstm.explain(fastlstm.LSTM(5, 7), torch.zeros(2, 3, 5)).backend
    assert backend in ("cpu", "reference")


def test_explains_its_plan() -> None:
    explanation = fastlstm.explain(fastlstm.LSTM(28, 64, 2), torch.zeros(28, 128, 28))
    assert explanation.backend == "triton"
    assert len(explanation.plan) == 2
    assert "forward sequence: 256 x 16 tiles" in explanation.plan[0]
    assert "W_hh fits one multiprocessor" in explanation.plan[0]
    assert "interpreted" in explanation.kernel
    wide = fastlstm.explain(fastlstm.LSTM(28, 512), torch.zeros(28, 128, 28))
    assert "steps: " in wide.plan[0]
    reason = "not with the weights in registers: Triton's interpreter does not run Gluon"
    bfloat16 = fastlstm.LSTM(28, 64, dtype=torch.bfloat16), torch.zeros(2, 3, 28).bfloat16()
    assert reason in fastlstm.explain(*bfloat16).plan[0]
