"""What loops over a cell leave behind in training: nothing; and threads that share one."""

import copy
import gc
import pickle
import threading
import weakref
from typing import Any

import pytest
import torch
from test_cell_loops import B, H, I, assert_alike, draw, grads, loss, outputs, pair
from torch import Tensor

import fastlstm
from fastlstm.layer import steps


def test_a_failed_pass_leaves_nothing() -> None:
    class Failure(Exception):
        pass

    def fail(grad: Tensor) -> None:
        raise Failure

    theirs, ours = pair()
    x = draw(4, B, I)
    found = outputs(ours, x.unbind())
    handle = found[1].register_hook(fail)
    shared = ours._steps._last.shared()
    for _ in range(2):
        with pytest.raises(Failure):
            found[-1].sum().backward(retain_graph=True)
        gc.collect()
        assert not shared.left
    handle.remove()
    found[-1].sum().backward()
    assert not shared.left
    outputs(theirs, x.unbind())[-1].sum().backward()
    assert_alike(grads(ours), grads(theirs))


def test_what_is_left_survives_a_sum() -> None:
    """A dense gradient of the token and what steps have left come together."""
    theirs, ours = pair()
    x = draw(2, B, I)
    h, c = ours(x[0])
    h2, _ = ours(x[1], (h, c))
    shared = ours._steps._last.shared()
    extra = torch.randn(shared.token.shape, dtype=torch.float64)
    torch.autograd.backward([h2.sum(), shared.token], [None, extra])
    outputs(theirs, x.unbind())[1].sum().backward()
    got = torch.cat([g.reshape(-1) for g in grads(ours)])
    assert_alike([got], [torch.cat([g.reshape(-1) for g in grads(theirs)]) + extra])


def test_memory_goes_with_the_graph() -> None:
    cell = fastlstm.LSTMCell(I, H)
    hx = cell(torch.randn(B, I))
    token = weakref.ref(cell._steps._last.shared())
    weight = weakref.ref(cell.weight_hh)
    assert copy.deepcopy(cell) is not None and pickle.loads(pickle.dumps(cell)) is not None
    assert torch.equal(copy.deepcopy(cell).weight_hh, cell.weight_hh)
    del hx
    assert token() is None
    hx = cell(torch.randn(B, I))
    assert cell.double().weight_hh.dtype is torch.float64
    del hx, cell
    gc.collect()
    assert weight() is None


def test_gradients_are_delivered_without_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    cell, given = fastlstm.LSTMCell(I, H), []
    original = steps._Left.gradients

    def gradients(self: Any) -> list[Tensor]:
        found = original(self)
        given.extend(t.data_ptr() for t in found)
        return found

    monkeypatch.setattr(steps._Left, "gradients", gradients)
    outputs(cell, torch.randn(3, B, I).unbind())[-1].sum().backward()
    assert [g.data_ptr() for g in grads(cell)] == given


def test_threads() -> None:
    """Threads that go forward and back through one cell at the same time."""
    cell, x = fastlstm.LSTMCell(I, H, dtype=torch.float64), draw(8, 5, B, I).detach()
    parameters = list(cell.parameters())
    want = [torch.autograd.grad(loss(cell, one.unbind()), parameters) for one in x]
    found: list[Any] = [None] * len(x)

    def work(k: int) -> None:
        for _ in range(5):
            found[k] = torch.autograd.grad(loss(cell, x[k].unbind()), parameters)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(len(x))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got, expected in zip(found, want, strict=True):
        assert all(map(torch.equal, got, expected))


def test_threads_that_share_a_graph() -> None:
    cell, x = fastlstm.LSTMCell(I, H, dtype=torch.float64), draw(5, B, I).detach()
    found = outputs(cell, x.unbind())
    parameters = list(cell.parameters())

    def of(k: int) -> Any:
        return torch.autograd.grad(found[k].sum(), parameters, retain_graph=True)

    want, got = [of(k) for k in range(5)], [None] * 5
    threads = [threading.Thread(target=lambda k=k: got.__setitem__(k, of(k))) for k in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for a, b in zip(got, want, strict=True):
        assert all(map(torch.equal, a, b))
