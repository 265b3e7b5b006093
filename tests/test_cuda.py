"""The CUDA kernels' own code, compiled for the host and run on emulated threads: no GPU is needed.

test_numerics.py and test_ragged.py run on this backend too, with the plans that it chooses; here
are those that are chosen only by wide layers, large batches or other GPUs.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case, Results, draw, evaluate, fast, plain, stepwise
from cuda_cases import CASES, IN_WIDE, REGIMES, SMALL_GPU, WIDE, WIDE_CASE, named, override
from oracle import check, expectation, hold, judge
from torch import nn

import fastlstm
from benchmarks.speed.precision import PRECISIONS
from fastlstm.kernels.cuda import CUDA, library
from fastlstm.spec import LayerSpec

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif(
        torch.cuda.is_available(),
        reason="on a machine with a GPU `-m gpu` tests the kernels there",
    ),
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def emulated(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every call of this file is the emulator's."""
    status = fastlstm.backends()["cuda"]
    if not status.available:
        if os.environ.get("FASTLSTM_REQUIRE_EXTENSION") == "1":
            pytest.fail(f"FASTLSTM_REQUIRE_EXTENSION=1, but: {status.detail}")
        pytest.skip(status.detail)
    with fastlstm.backend("cuda"):
        yield


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wishes", REGIMES, ids=named)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_is_that_of_pytorch(case: Case, wishes: dict[str, Any], dtype: torch.dtype) -> None:
    with override(**wishes):
        check(case, dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_of_the_regime_wide(case: Case, dtype: torch.dtype) -> None:
    with override(**IN_WIDE):
        check(case, dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("H", "wishes"), WIDE, ids=lambda value: str(value)[:40])
def test_wide_layers(H: int, wishes: dict[str, Any], dtype: torch.dtype) -> None:
    with override(**wishes):
        check(replace(WIDE_CASE, H=H), dtype, "cuda")


@pytest.mark.parametrize("wishes", [*REGIMES, {"device": SMALL_GPU}], ids=named)
@pytest.mark.parametrize("case", CASES[:5], ids=str)
def test_tf32(case: Case, wishes: dict[str, Any]) -> None:
    """Factors rounded to TF32: numbers that go in are known to its spacing only."""
    numbers = draw(case, torch.float32)
    solver = stepwise if case.ragged else plain
    truth, allowed = judge(
        lambda d, n: evaluate(case, d, n, solver),
        torch.float32,
        numbers,
        arithmetic=PRECISIONS["tf32"].eps,
    )
    with override(tf32=True, **wishes):
        hold(case, torch.float32, numbers, truth, allowed)
        coarse = evaluate(case, torch.float32, numbers, fast)
    with override(tf32=False, **wishes):
        exact = evaluate(case, torch.float32, numbers, fast)
    assert not torch.equal(coarse["y"], exact["y"])


def bits(case: Case, dtype: torch.dtype, numbers: Results, **wishes: Any) -> Results:
    with override(**wishes):
        return evaluate(case, dtype, numbers, fast)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("H", [40, 64, 130])
def test_a_row_does_not_see_its_batch(H: int, dtype: torch.dtype) -> None:
    """Nor how many sequences share a group: states and gradients of a row, to the bit."""
    case = Case(T=4, B=17, I=10, H=H, directions=2, wrt=("x", "h0", "c0"))
    numbers = draw(case, dtype)
    want = bits(case, dtype, numbers, batch=8)
    got = bits(case, dtype, numbers, batch=16)
    one = replace(case, B=1)
    alone = bits(one, dtype, {k: v if k[:2] == "w." else v[:, 13:14] for k, v in numbers.items()})
    for name, value in want.items():
        assert torch.equal(got[name], value), name
        # What is outside of the kernels is PyTorch's, whose products may depend on the rows.
        if name in ("d h0", "d c0") or not name.startswith("d "):
            assert H == 130 or torch.allclose(alone[name], value[:, 13:14], rtol=1e-3), name


@pytest.mark.parametrize("regime", ["block", "cluster", "grid", "wide"])
def test_nan_stays_in_its_row(regime: str) -> None:
    """Neither the other sequences of a tile nor units that there are not carry it on."""
    case = Case(T=5, B=10, I=10, H=41, wrt=("x", "h0", "c0"))
    numbers = draw(case, torch.float16)
    clean = bits(case, torch.float16, numbers, regime=regime)
    numbers["x"][1, 3, 2] = torch.nan
    got = bits(case, torch.float16, numbers, regime=regime)
    others = [b for b in range(10) if b != 3]
    for name, value in clean.items():
        assert torch.equal(got[name][:, others], value[:, others]), name
    assert got["y"][1:, 3].isnan().all() and torch.equal(got["y"][0], clean["y"][0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_recompute(dtype: torch.dtype) -> None:
    case = Case(T=6, B=5, I=10, H=33, directions=2, lengths=(2, 0, 1, 6, 3), recompute=True)
    check(case, dtype, "cuda")
    check(replace(case, lengths=(2, 6, 1, 6, 3), packed=True), dtype, "cuda")


def test_saves_what_it_says() -> None:
    """c of every step and the gates, in training; with recompute, c alone."""
    found = []
    for recompute in (False, True):
        lstm, kept = fastlstm.LSTM(10, 16, recompute=recompute), []
        hooks = torch.autograd.graph.saved_tensors_hooks(kept.append, lambda t: t)
        with hooks:
            lstm(torch.randn(7, 3, 10))
        found.append(sum(t.numel() for t in kept if t.shape[-1] in (16, 64) and t.dim() > 2))
    rows = 7 * 3 * 16
    assert found == [6 * rows, 2 * rows]


def test_second_derivatives_go_through_the_reference() -> None:
    lstm, x = fastlstm.LSTM(3, 5, dtype=torch.float32), torch.randn(4, 2, 3, requires_grad=True)
    found = []
    for name in ("cuda", "reference"):
        with fastlstm.backend(name):
            (dx,) = torch.autograd.grad(lstm(x)[0].square().sum(), x, create_graph=True)
            found.append(torch.autograd.grad(dx.square().sum(), x)[0])
    torch.testing.assert_close(*found)


def test_compiles_to_one_graph_and_vmaps() -> None:
    lstm, x = fastlstm.LSTM(3, 5), torch.randn(4, 2, 3)
    with torch.no_grad():
        want = lstm(x)[0]
        step = torch.compile(lambda x: lstm(x)[0], fullgraph=True, backend="aot_eager")
        assert torch.equal(step(x), want)
        many = torch.stack([x, 2 * x])
        torch.testing.assert_close(torch.vmap(lambda x: lstm(x)[0])(many)[0], want)


@pytest.mark.parametrize(
    ("module", "x", "reason"),
    [
        (fastlstm.RNN(3, 5), torch.zeros(2, 1, 3), r"no nn\.RNN"),
        (fastlstm.LSTM(3, 5, proj_size=2), torch.zeros(2, 1, 3), "no projection"),
        (fastlstm.LSTM(3, 5, peephole=True), torch.zeros(2, 1, 3), "the plain cell only"),
        (fastlstm.LSTM(3, 5).double(), torch.zeros(2, 1, 3).double(), r"no torch\.float64"),
    ],
)
def test_what_it_has_not_is_refused_with_a_reason(module: Any, x: Any, reason: str) -> None:
    for call in (lambda: module(x), lambda: fastlstm.explain(module, x)):
        with pytest.raises(RuntimeError, match=f'the "cuda" backend cannot .*{reason}'):
            call()
    with fastlstm.backend("auto"):
        module(x)


def test_a_square_projection_is_one() -> None:
    """nn.LSTM has none, but lstm() takes it."""
    weights = [torch.randn(32, 3), torch.randn(32, 8), torch.randn(8, 8)]
    with pytest.raises(RuntimeError, match="no projection"):
        fastlstm.functional.lstm(torch.randn(5, 2, 3), None, weights)


def test_compiled_for_any_size() -> None:
    lstm = fastlstm.LSTM(3, 6, bidirectional=True)
    cell = fastlstm.LSTMCell(3, 6)
    options = {"fullgraph": True, "dynamic": True, "backend": "aot_eager"}
    call = torch.compile(lambda x: lstm(x)[0], **options)
    for T, B in ((5, 4), (3, 2)):
        x = torch.randn(T, B, 3, requires_grad=True)
        torch.testing.assert_close(call(x), lstm(x)[0])
    step = torch.compile(cell, **options)
    torch.testing.assert_close(step(x[0]), cell(x[0]))


def test_exported_programs_have_no_plan_in_them(tmp_path: Path) -> None:
    T, B = torch.export.Dim("T"), torch.export.Dim("B")
    lstm, x = fastlstm.LSTM(3, 7), torch.randn(5, 4, 3)
    program = torch.export.export(lstm, (x,), dynamic_shapes=[{0: T, 1: B}])
    torch.export.save(program, tmp_path / "lstm.pt2")
    loaded = torch.export.load(tmp_path / "lstm.pt2").module()
    torch.testing.assert_close(loaded(x[:3, :2])[0], lstm(x[:3, :2])[0])


@pytest.mark.parametrize("sizes", [[4, 4], [2, 4], [4, 10**9], [4, 1], [4, 4, -2]], ids=str)
def test_wrong_batch_sizes_never_reach_a_kernel(sizes: list[int]) -> None:
    """Compiled code cannot check them before."""
    x, y, state = torch.randn(6, 5), torch.empty(6, 20), torch.empty(1, 4, 20)
    weights = [torch.randn(80, 5), torch.randn(80, 20)]
    batch_sizes = torch.tensor(sizes)
    with pytest.raises(ValueError, match="batch_sizes"):
        CUDA.lstm_fwd(
            x, weights, 1, None, None, batch_sizes, None, None,
            y, state, state.clone(), None, None, None,
        )  # fmt: skip


def test_the_cell() -> None:
    cell, x = fastlstm.LSTMCell(3, 20), torch.randn(5, 3)
    with torch.no_grad():
        found = cell(x)
        with fastlstm.backend("reference"):
            torch.testing.assert_close(found, cell(x))


def test_explain_names_the_pieces() -> None:
    x = torch.zeros(4, 9, 10, dtype=torch.bfloat16)
    text = str(fastlstm.explain(fastlstm.LSTM(10, 512, 2, dtype=torch.bfloat16), x))
    assert "backend  cuda" in text and "emulated" in text
    assert "cluster: clusters of 16 blocks, 32 units x 8 sequences a block, 8 warps" in text
    with override(device=(80, 108, 163 << 10, 1)):
        text = str(fastlstm.explain(fastlstm.LSTM(10, 512, dtype=torch.bfloat16), x))
    assert "grid: 32 blocks exchange through L2" in text


def test_overrides_refuse_what_there_is_not() -> None:
    for wishes, message in (
        ({"tile": 1, "warps": 2}, r"a plan has no tile, warps$"),
        ({"regime": "fast"}, "'fast' is not a regime"),
        ({"batch": 24}, "24 is not a batch, choose one of 0, 8, 16"),
        ({"blocks": -1}, "-1 is not a blocks, choose one of 0 to 65535"),
        ({"tf32": "no"}, "'no' is not a tf32"),
    ):
        with pytest.raises(ValueError, match=message), override(**wishes):
            pass
    lstm = fastlstm.LSTM(3, 5)
    with override(regime="cluster", blocks=4), pytest.raises(RuntimeError, match="no room"):
        lstm(torch.zeros(2, 1, 3))


def test_bad_plans_never_reach_a_kernel() -> None:
    """The operator checks what it is given: kernels would write past the end of a work space."""
    from fastlstm.kernels.cuda.plan import Device, plan_of

    H, B, T = 20, 3, 2
    device = Device(80, 108, 163 << 10, 1)
    with override(regime="grid"):
        plan = plan_of("exact", False, B, LayerSpec("LSTM", 5, H), device)
    y, states = torch.empty(T * B, H), torch.empty(1, B, H)
    w, products = torch.zeros(4 * H, H), torch.zeros(1, T * B, 4 * H)

    def run(numbers: list[int], exchange: Any, arrived: Any) -> None:
        library.lstm_recur_fwd(
            products, [w], [], None, None, None, None, None, T, B, y, states, states.clone(),
            None, None, exchange, arrived, None, numbers, False, 0, 0,
        )  # fmt: skip

    small, counter = torch.zeros(3, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=r"expected exchange of \d+ int32"):
        run(plan.numbers, small, counter)
    with pytest.raises(RuntimeError, match="not a plan of this layer"):
        run(plan._replace(tiles=1, blocks=1).numbers, small, counter)
    with pytest.raises(RuntimeError, match="no place for all weights"):
        run(plan._replace(rest="none").numbers, small, counter)
    with pytest.raises(RuntimeError, match="of 11 numbers"):
        run(plan.numbers[:-1], small, counter)
    with pytest.raises(RuntimeError, match="bytes of shared memory, got"):
        run(plan._replace(shared_bytes=16).numbers, small, counter)
    with pytest.raises(RuntimeError, match="too little space for the exchange"):
        run(plan._replace(exchange_words=1).numbers, small, counter)


def test_the_oracle_is_that_of_other_backends() -> None:
    """A kernel that is wrong by one rounding in a gate would not pass: the bounds are tight."""
    case = CASES[0]
    numbers, truth, allowed = expectation(case, torch.float16)
    spoiled = {k: v * 1.01 if k == "w.weight_hh_l0" else v for k, v in numbers.items()}
    with pytest.raises(AssertionError, match="out of bounds"):
        hold(case, torch.float16, spoiled, truth, allowed)


def test_without_the_emulator_a_cpu_tensor_is_refused() -> None:
    """FASTLSTM_EMULATE is asked for, never assumed."""
    environment = {k: v for k, v in os.environ.items() if k != "FASTLSTM_EMULATE"}
    code = "import fastlstm; print(fastlstm.backends()['cuda'])"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert "available=False" in done.stdout


def test_trains_like_nn_lstm() -> None:
    """A few steps of an optimizer end where those of nn.LSTM end."""
    torch.manual_seed(0)
    theirs = nn.LSTM(4, 20, bidirectional=True)
    ours = fastlstm.LSTM.from_torch(nn.LSTM(4, 20, bidirectional=True))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(6, 9, 4)
    for lstm in (theirs, ours):
        optimizer = torch.optim.SGD(lstm.parameters(), 0.5)
        for _ in range(5):
            optimizer.zero_grad()
            lstm(x)[0].square().mean().backward()
            optimizer.step()
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, msg=name)
