"""What must not go wrong silently: other devices, fake tensors, shared caches, batched grads."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import fastlstm

GRAD_MODES = [torch.no_grad, torch.enable_grad]


@pytest.fixture
def lstm() -> fastlstm.LSTM:
    return fastlstm.LSTM(3, 4)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(5, 2, 3)


@pytest.mark.parametrize("mode", GRAD_MODES)
def test_meta_tensors_are_refused(mode, lstm, x):
    with mode(), pytest.raises(RuntimeError, match="meta"):
        fastlstm.LSTM(3, 4, device="meta")(x)
    with mode(), pytest.raises(RuntimeError, match="meta"):
        lstm(x, (torch.zeros(1, 2, 4, device="meta"),) * 2)


@pytest.mark.parametrize("mode", GRAD_MODES)
def test_no_steps_are_refused(mode, lstm):
    with mode(), pytest.raises(RuntimeError, match="time step"):
        lstm(torch.randn(0, 2, 3))


def test_default_device_does_not_move_the_output(backend, lstm, x):
    expected = lstm(x)[0]
    for mode in GRAD_MODES:
        with torch.device("meta"), mode():
            y = lstm(x)[0]
        assert y.device.type == "cpu"
        assert torch.equal(y, expected)
    with torch.no_grad():
        assert torch.equal(lstm(x)[0], expected)


def test_fake_tensors_leave_nothing_behind(backend, lstm, x):
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        lstm(torch.randn(5, 2, 3))
    with torch.no_grad():
        graph = make_fx(lambda t: lstm(t)[0], tracing_mode="fake", _allow_non_fake_inputs=True)(x)
        expected = lstm.to_torch()(x)[0]
        torch.testing.assert_close(lstm(x)[0], expected)
        torch.testing.assert_close(graph(x), expected)


def test_batched_gradients(backend, lstm, x):
    x.requires_grad_()
    y = lstm(x)[0]
    grads = torch.randn(3, *y.shape)
    batched = torch.autograd.grad(y, x, grads, is_grads_batched=True, retain_graph=True)[0]
    one_by_one = [torch.autograd.grad(y, x, grad, retain_graph=True)[0] for grad in grads]
    assert not batched.requires_grad
    torch.testing.assert_close(batched, torch.stack(one_by_one))


def test_weights_of_another_size(backend, lstm, x):
    with torch.no_grad():
        lstm(x)
        lstm.weight_ih_l0 = torch.nn.Parameter(torch.randn(16, 30))
        lstm.input_size = 30
        wide = torch.randn(5, 2, 30)
        torch.testing.assert_close(lstm(wide)[0], lstm.to_torch()(wide)[0])


def test_lengths_of_any_layout(backend, lstm, x):
    lengths = torch.tensor([[3, 0], [5, 0]])[:, 0]
    assert torch.equal(lstm(x, lengths=lengths)[0], lstm(x, lengths=lengths.clone())[0])


def test_threads_with_their_own_weights(backend):
    """Backward passes of one module with different weights, at once: each uses its own."""
    lstm = fastlstm.LSTM(32, 64)
    x = torch.randn(4, 2, 32)

    def gradient(scale: float) -> torch.Tensor:
        own = x.clone().requires_grad_()
        weights = {"weight_hh_l0": lstm.weight_hh_l0 * scale}
        return torch.autograd.grad(functional_call(lstm, weights, own)[0].sum(), own)[0]

    scales = [0.5, 2.0] * 40
    expected = {scale: gradient(scale) for scale in set(scales)}
    graphs = []
    for scale in scales:
        own = x.clone().requires_grad_()
        weights = {"weight_hh_l0": lstm.weight_hh_l0 * scale}
        graphs.append((scale, own, functional_call(lstm, weights, own)[0].sum()))
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda g: (g[0], torch.autograd.grad(g[2], g[1])[0]), graphs)
        for scale, grad in found:
            assert torch.equal(grad, expected[scale])


def test_an_unknown_instruction_set_is_an_error(monkeypatch):
    if not fastlstm.backends()["cpu"].available:
        pytest.skip("no compiled kernels to choose from")
    code = "import fastlstm, torch; fastlstm.LSTM(2, 2)(torch.zeros(1, 1, 2))"
    monkeypatch.setenv("FASTLSTM_ISA", "bogus")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0
    assert "FASTLSTM_ISA=bogus" in done.stderr


class Marked(torch.Tensor):
    """A subclass that marks whatever is computed from it."""


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_quick_calls_see_every_setting_and_every_kind_of_tensor(backend, mode):
    """The shortest way of a call without gradients is kept apart: nothing may be missed there."""
    lstm, x = fastlstm.LSTM(3, 4), torch.randn(5, 2, 3)
    hx = torch.randn(1, 2, 4), torch.randn(1, 2, 4)
    with mode():
        plain = lstm(x, hx)[0]
        lstm.zoneout = 0.3, 0.2  # any setting, after a call
        lstm.eval()
        other = fastlstm.LSTM(3, 4, zoneout=(0.3, 0.2)).eval()
        other.load_state_dict(lstm.state_dict())
        assert torch.equal(lstm(x, hx)[0], other(x, hx)[0])
        assert not torch.equal(lstm(x, hx)[0], plain)
        lstm.zoneout, lstm.batch_first = (0.0, 0.0), True
        assert torch.equal(lstm(x.transpose(0, 1).contiguous(), hx)[0], plain.transpose(0, 1))
        lstm.batch_first = False
        for kind, result in (
            (Marked, lstm(x.as_subclass(Marked), hx)),
            (torch.Tensor, lstm(x, [t.clone() for t in hx])),
        ):
            y, (h_n, c_n) = result
            assert torch.equal(y, plain) and {type(t) for t in (y, h_n, c_n)} == {kind}
        y, (h_n, c_n) = lstm(x, hx)
        assert len({t.untyped_storage().data_ptr() for t in (y, h_n, c_n)}) == 3
        assert [t._base for t in (y, h_n, c_n)] == [None] * 3


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_modes_and_the_profiler_see_quick_calls(backend, lstm, x):
    """They go through the dispatcher, so whoever looks on from there sees them."""

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    names: list[str] = []
    with torch.no_grad():
        expected = lstm(x)[0]
        with Seen():
            assert torch.equal(lstm(x)[0], expected)
        with torch.profiler.profile() as profile:
            lstm(x)
    assert any("fastlstm" in name for name in names)
    assert any("fastlstm" in event.name for event in profile.events())


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_fake_tensors_have_the_shapes_of_a_step(backend):
    lstm, cell = fastlstm.LSTM(3, 4, bidirectional=True), fastlstm.LSTMCell(3, 4)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        y, (h_n, c_n) = lstm(torch.randn(1, 2, 3))
        h, c = cell(torch.randn(2, 3))
    assert all(type(t) is FakeTensor for t in (y, h_n, c_n, h, c))
    assert [tuple(t.shape) for t in (y, h_n, c_n)] == [(1, 2, 8), (2, 2, 4), (2, 2, 4)]
    assert tuple(h.shape) == tuple(c.shape) == (2, 4)


@pytest.mark.parametrize("mode", GRAD_MODES)
@pytest.mark.parametrize("kind", ["LSTM", "RNN", "LSTMCell"])
@pytest.mark.parametrize("what", ["input", "state", "weight"])
@pytest.mark.parametrize("mixed", [False, True])
def test_fake_tensors_outside_of_their_mode_give_no_numbers(backend, mode, kind, what, mixed):
    """They make a call fake, or an error where their mode does not take other tensors too."""
    module, x, h = getattr(fastlstm, kind)(3, 4), torch.randn(5, 2, 3), torch.zeros(1, 2, 4)
    if kind == "LSTMCell":
        x, h = x[0], h[0]
    fakes = FakeTensorMode(allow_non_fake_inputs=mixed)
    if what == "input":
        x = fakes.from_tensor(x)
    elif what == "state":
        h = fakes.from_tensor(h)
    else:
        name = "weight_hh" if kind == "LSTMCell" else "weight_hh_l0"
        module._parameters[name] = fakes.from_tensor(module._parameters[name])
    hx = h if kind == "RNN" else (h, h)

    def call():
        first, second = module(x, hx)
        return first, *(second if isinstance(second, tuple) else (second,))

    with mode():
        if mixed:
            assert all(type(t) is FakeTensor for t in call())
        else:
            with pytest.raises(AssertionError, match="FakeTensor"):
                call()


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("B", "H", "T"), [(1, 5, 1), (3, 17, 4), (2, 64, 1)])
def test_outputs_made_in_the_kernel_are_written_whole(backend, B, H, T, dtype):
    """PyTorch's deterministic mode does not poison these; memory that was just freed does."""
    lstm = fastlstm.LSTM(6, H, bidirectional=T > 1, dtype=dtype)
    cell = fastlstm.LSTMCell(6, H, dtype=dtype)
    x = torch.randn(T, B, 6, dtype=dtype)

    def of_layer():
        y, states = lstm(x)
        return [y, *states]

    for call in (of_layer, lambda: cell(x[0])):
        expected = call()  # with gradients: the long way
        with torch.no_grad():
            for _ in range(5):
                poison = [torch.full_like(t, torch.nan) for t in expected for _ in range(8)]
                del poison
                assert all(map(torch.equal, call(), expected))
