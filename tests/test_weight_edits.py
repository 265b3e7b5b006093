"""Outputs follow the weights, whoever edits them and however, and threads may share a module.

The kernels pack the weights once for inference and use that again while they stay the same; some
of these edits leave no trace in a version counter.
"""

import copy
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

import fastlstm

pytestmark = pytest.mark.parametrize("backend", ["cpu"], indirect=True)


def swap_rows(weight: Tensor) -> None:
    weight[[0, 3]] = weight[[3, 0]]


def one_ulp(weight: Tensor) -> None:
    weight.view(-1)[-1] = torch.nextafter(weight.view(-1)[-1], torch.tensor(9.0).to(weight))


EDITS: dict[str, Callable[[nn.Parameter], object]] = {
    "neg": lambda p: p.data.neg_(),
    "double": lambda p: p.data.mul_(2),
    "add": lambda p: p.add_(0.25),
    "swap rows": lambda p: swap_rows(p.data),
    "one ulp": lambda p: one_ulp(p.data),
    "copy": lambda p: p.copy_(torch.rand_like(p)),
    "set data": lambda p: setattr(p, "data", torch.rand_like(p)),
    "numpy": lambda p: p.detach().numpy().__imul__(-1),
}
PARAMETERS = ("weight_ih_l0", "weight_hh_l1_reverse", "bias_ih_l0", "bias_hh_l1", "weight_hr_l0")


@pytest.mark.parametrize("name", PARAMETERS)
@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS.keys())
@pytest.mark.parametrize("T", [1, 4])
def test_outputs_follow_an_edit(
    backend: str, edit: Callable[[nn.Parameter], object], name: str, T: int
) -> None:
    lstm = fastlstm.LSTM(10, 17, 2, bidirectional=True, proj_size=5)
    x, hx = torch.randn(T, 2, 10), (torch.randn(4, 2, 5), torch.randn(4, 2, 17))
    with torch.no_grad():
        before = [lstm(x, hx)[0] for _ in range(4)][-1]
        edit(getattr(lstm, name))
        fresh = fastlstm.LSTM(10, 17, 2, bidirectional=True, proj_size=5)
        fresh.load_state_dict(lstm.state_dict())
        after = lstm(x, hx)[0]
        assert torch.equal(after, fresh(x, hx)[0])
    with torch.enable_grad():
        assert torch.equal(lstm(x, hx)[0], after)
    if edit is not EDITS["one ulp"]:  # which need not reach the outputs
        assert not torch.equal(after, before)


def test_one_ulp_reaches_the_output(backend: str) -> None:
    """The smallest edit there is, at each weight of a gate in turn, where it cannot round away."""
    lstm = fastlstm.LSTM(3, 5, bias=False, dtype=torch.float64)
    with torch.no_grad():
        for p in lstm.parameters():
            p.uniform_(0.5, 0.9)
        x = torch.full((2, 1, 3), 0.01, dtype=torch.float64)
        for p in lstm.parameters():
            for i in range(p.numel()):
                before, _ = lstm(x)
                p.data.view(-1)[i] = torch.nextafter(p.view(-1)[i], torch.tensor(9.0).to(p))
                fresh = copy.deepcopy(lstm)
                assert torch.equal(lstm(x)[0], fresh(x)[0])
                p.data.view(-1)[i] += 0.125
                assert not torch.equal(lstm(x)[0], before)


def test_outputs_follow_replaced_weights(backend: str) -> None:
    """load_state_dict, assignment of a Parameter, and training between two inference calls."""
    lstm, other = (fastlstm.LSTM(10, 17, 2) for _ in range(2))
    x = torch.randn(3, 2, 10)

    def infer(module: nn.Module) -> Tensor:
        with torch.inference_mode():
            for _ in range(3):
                y, _ = module(x)
        return y

    assert not torch.equal(infer(lstm), infer(other))
    lstm.load_state_dict(other.state_dict())
    assert torch.equal(infer(lstm), infer(other))
    lstm.weight_hh_l1 = nn.Parameter(torch.rand(68, 17))
    other.weight_hh_l1 = nn.Parameter(lstm.weight_hh_l1.detach().clone())
    assert torch.equal(infer(lstm), infer(other))
    optimizer = torch.optim.SGD(lstm.parameters(), lr=1.0)
    for _ in range(3):
        before = infer(lstm)
        optimizer.zero_grad()
        lstm(x)[0].square().sum().backward()
        optimizer.step()
        assert not torch.equal(infer(lstm), before)
        assert torch.equal(infer(lstm), infer(copy.deepcopy(lstm)))


def test_memory_of_old_weights_is_not_mistaken_for_new_ones(backend: str) -> None:
    """New weights often land where freed ones lay: the address alone must not say "unchanged"."""
    lstm = fastlstm.LSTM(10, 17)
    x = torch.randn(3, 2, 10)
    with torch.no_grad():
        for _ in range(50):
            lstm.weight_hh_l0 = nn.Parameter(torch.rand(68, 17))
            got, _ = lstm(x)
            fresh = fastlstm.LSTM(10, 17)
            fresh.load_state_dict(lstm.state_dict())
            assert torch.equal(got, fresh(x)[0])


def test_modules_that_share_weights(backend: str) -> None:
    """Tied weights: an edit through one module shows in both, in their different shapes too."""
    lstm = fastlstm.LSTM(10, 17)
    twin, wide = fastlstm.LSTM(10, 17), fastlstm.LSTM(10, 17, 2)
    for name, p in lstm.named_parameters():
        setattr(twin, name, p)
        setattr(wide, name, p)
    x = torch.randn(3, 2, 10)
    with torch.no_grad():
        for _ in range(3):
            first = wide(x)[0]
            assert torch.equal(lstm(x)[0], twin(x)[0])
            lstm.weight_ih_l0.data.neg_()
            assert torch.equal(lstm(x)[0], twin(x)[0])
            assert torch.equal(wide(x)[0], copy.deepcopy(wide)(x)[0])
            assert not torch.equal(wide(x)[0], first)


@pytest.mark.parametrize("B", [1, 7])
def test_concurrent_inference(backend: str, B: int) -> None:
    """Python threads that share a module, in different shapes, each get their own answer."""
    lstm = fastlstm.LSTM(28, 64, 2, bidirectional=True)
    inputs = [torch.randn(T, B, 28) for T in (1, 2, 5, 9)] * 8
    with torch.inference_mode():
        wanted = [lstm(x)[0] for x in inputs]

    def infer(x: Tensor) -> Tensor:
        with fastlstm.backend(backend), torch.inference_mode():
            for _ in range(20):
                y, _ = lstm(x)
        return y

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # seconds: make the interpreter change threads inside calls
    try:
        with ThreadPoolExecutor(4) as pool:
            for _ in range(3):
                for name, p in lstm.named_parameters():  # a cold cache, met by all at once
                    setattr(lstm, name, nn.Parameter(p.detach().clone()))
                for got, want in zip(pool.map(infer, inputs), wanted, strict=True):
                    assert torch.equal(got, want)
    finally:
        sys.setswitchinterval(interval)


def test_concurrent_training(backend: str) -> None:
    """The same for outputs and gradients: threads share weights, and nothing else."""
    lstm = fastlstm.LSTM(10, 33, 2)
    inputs = [torch.randn(T, 3, 10) for T in (1, 2, 5, 9)] * 4

    def gradients(x: Tensor) -> tuple[Tensor, ...]:
        with fastlstm.backend(backend):
            y, _ = lstm(x)
            return torch.autograd.grad(y.square().sum(), tuple(lstm.parameters()))

    wanted = [gradients(x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for got, want in zip(pool.map(gradients, inputs), wanted, strict=True):
            for one, other in zip(got, want, strict=True):
                assert torch.equal(one, other)


def test_an_edit_that_comes_and_goes(backend: str) -> None:
    """Weights that another thread writes and writes back leave nothing of the middle behind."""
    lstm = fastlstm.LSTM(3, 16).requires_grad_(False)
    x = torch.randn(8, 1, 3)
    want, _ = lstm(x)
    shared = lstm.weight_ih_l0.numpy()
    stop = threading.Event()

    def flicker() -> None:
        value = shared[0, 0].item()
        while not stop.is_set():
            shared[0, 0] = value + 1
            shared[0, 0] = value

    for _ in range(6):
        stop.clear()
        thread = threading.Thread(target=flicker)
        thread.start()
        for _ in range(500):
            lstm(x)
        stop.set()
        thread.join()
        got, _ = lstm(x)
        assert torch.equal(got, want)


def _header(lstm: fastlstm.LSTM) -> tuple[int, int]:
    """The hash of the packed weights, and how many calls are reading them."""
    hash_, use = lstm._caches[0]["packed"][:16].view(torch.int64).tolist()
    return hash_, use & 0xFFFFFFFF


def test_passes_of_training_take_turns(backend: str) -> None:
    """They pack without a hash; a forward pass that finds its own order looks for edits again."""
    lstm, x = fastlstm.LSTM(3, 16), torch.randn(40, 4, 3)
    y, _ = lstm(x)
    assert _header(lstm)[0] != 0
    y.sum().backward()
    assert _header(lstm)[0] == 0
    for hashed in (False, True, True):
        lstm.weight_hh_l0.data.mul_(0.5)
        fresh = fastlstm.LSTM(3, 16)
        fresh.load_state_dict(lstm.state_dict())
        got, _ = lstm(x)
        assert torch.equal(got, fresh(x)[0])
        assert (_header(lstm)[0] != 0) == hashed
    gradients = [
        torch.autograd.grad(out.sum(), list(m.parameters()))
        for out, m in ((got, lstm), (fresh(x)[0], fresh))
    ]
    assert all(map(torch.equal, *gradients))
    assert _header(lstm)[0] == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_fork_in_the_middle_of_a_call(backend: str) -> None:
    """What another thread was reading when the process forked does not bind the child."""
    lstm = fastlstm.LSTM(3, 16).requires_grad_(False)
    x = torch.randn(8, 1, 3)
    lstm(x)
    lstm._caches[0]["packed"][8] += 1  # one reader more, as a thread within a call
    before, readers = _header(lstm)
    assert readers == 1
    child = os.fork()
    if not child:
        lstm.weight_ih_l0.add_(1)
        lstm(x)
        after, readers = _header(lstm)
        os._exit(after == before or readers != 0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_at_most_one_copy_of_the_weights(backend: str) -> None:
    """Packed weights are kept once, where a call needs them, and no longer than the weights."""
    lstm = fastlstm.LSTM(512, 512)
    with torch.no_grad():
        lstm(torch.randn(1, 2, 512))
    lstm(torch.randn(1, 2, 512))[0].sum().backward()
    assert not lstm._caches[0]  # short calls of wide layers read the weights as they are stored
    lstm(torch.randn(50, 2, 512))[0].sum().backward()
    assert len(lstm._caches[0]) == 1
    lstm.double()
    assert not lstm._caches[0]
    small = fastlstm.LSTM(3, 16, recompute=True)
    for _ in range(2):
        small(torch.randn(50, 2, 3))[0].sum().backward()
    assert len(small._caches[0]) == 1
