"""Long sequences, and more elements than 32 bits can count."""

import os

import pytest
import torch
from torch import Tensor, nn

import fastlstm

EVERY_KERNEL = pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
needs_memory = pytest.mark.skipif(
    os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 12 * 2**30,
    reason="12 GiB of free memory are needed",
)


@pytest.fixture(autouse=True)
def cpu_kernels() -> None:
    """The reference takes a step at a time, for minutes."""
    if not fastlstm.backends()["cpu"].available:
        pytest.skip("the extension is missing")


@pytest.mark.slow
@EVERY_KERNEL
def test_a_hundred_thousand_steps(recompute: bool) -> None:
    """In one call as in a thousand with the state handed on, with gradients of the last."""
    T = 100_000
    lstm = fastlstm.LSTM(2, 5, bidirectional=False, recompute=recompute)
    x = torch.randn(T, 1, 2, requires_grad=True)
    y, (h_n, _) = lstm(x)
    with torch.no_grad():
        state = None
        parts = []
        for part in x.split(T // 1000):
            out, state = lstm(part, state)
            parts.append(out)
    assert torch.equal(y, torch.cat(parts)) and torch.equal(h_n, state[0])
    (dx,) = torch.autograd.grad(y[-1].sum(), x)
    tail = x.detach()[-500:].requires_grad_()
    start = tuple(s.detach() for s in lstm(x.detach()[:-500])[1])
    (expected,) = torch.autograd.grad(lstm(tail, start)[0][-1].sum(), tail)
    assert torch.equal(dx[-500:], expected)
    assert dx.isfinite().all()


@pytest.mark.slow
def test_weight_gradients_of_many_rows() -> None:
    """In blocks of rows, groups of blocks, and chunks of which several have no row.

    In float64, of which rounding leaves more right than any sum that is lost.
    """
    T, B, padding = 8_200, 4, 4_500
    plain = nn.LSTM(1, 4, bidirectional=True).double()
    lstm = fastlstm.LSTM.from_torch(plain)
    x, grad = torch.randn(T, B, 1).double(), torch.randn(T, B, 8).double()
    plain(x)[0].backward(grad)
    y, _ = lstm(nn.functional.pad(x, (0, 0, 0, 0, 0, padding)), lengths=torch.full((B,), T))
    y[:T].backward(grad)
    for p, q in zip(lstm.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad.float(), q.grad.float())


def alike(y: Tensor, expected: Tensor) -> bool:
    """Whether some columns of y [T, B, n], first and last among them, are expected [T, 1, n]."""
    B = y.shape[1]
    return all(torch.equal(y[:, b], expected[:, 0]) for b in (0, 1, B // 3, B // 2, B - 2, B - 1))


@pytest.mark.slow
@pytest.mark.parametrize("padded", [False, True], ids=["dense", "padded"])
def test_more_gates_than_32_bits_count(padded: bool) -> None:
    """T*B*4H > 2^31, in inference; all sequences are alike."""
    T, B, I, H = 64, 2**19 + 64, 1, 16
    assert T * B * 4 * H > 2**31
    lstm = fastlstm.LSTM(I, H, dtype=torch.bfloat16)
    one = torch.randn(T, 1, I, dtype=torch.bfloat16)
    lengths = torch.full((B,), T) if padded else None
    with torch.inference_mode():
        torch.use_deterministic_algorithms(False)  # it would fill a gigabyte with NaN
        y, (h_n, _) = lstm(one.expand(T, B, I), lengths=lengths)
        expected, (h_one, _) = lstm(one)
    assert alike(y, expected)
    assert alike(h_n, h_one)


@pytest.mark.slow
@needs_memory
def test_more_gradients_than_32_bits_count() -> None:
    """The same in training, where kept gates alone would take 8 GiB."""
    T, B, I, H = 64, 2**19 + 64, 1, 16
    lstm = fastlstm.LSTM(I, H, dtype=torch.bfloat16, recompute=True)
    one = torch.randn(T, 1, I, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(H).bfloat16()
    torch.use_deterministic_algorithms(False)
    x = one.detach().expand(T, B, I).requires_grad_()
    y, _ = lstm(x)
    (dx,) = torch.autograd.grad(y[-1] @ weight, x, torch.ones(B, dtype=torch.bfloat16))
    y, _ = lstm(one)
    (expected,) = torch.autograd.grad(y[-1] @ weight, one, torch.ones(1, dtype=torch.bfloat16))
    assert alike(dx, expected)
