"""functional.lstm beyond nn.LSTM, what it refuses, and sequence_loss against TensorFlow."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlstm
from fastlstm.functional import lstm, sequence_loss

T, B, I, H = 6, 4, 3, 5


def module(**options: Any) -> fastlstm.LSTM:
    return fastlstm.LSTM(I, H, dtype=torch.float64, **options)


def weights_of(m: nn.RNNBase) -> list[Tensor]:
    return [p for layer in m.all_weights for p in layer]


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, I, dtype=torch.float64)


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("proj_size", [0, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_is_what_the_module_computes(
    backend: str, bias: bool, proj_size: int, directions: int
) -> None:
    m = module(num_layers=2, bias=bias, proj_size=proj_size, bidirectional=directions == 2)
    x = inputs(T, B)
    y, (h_n, c_n), c_all = lstm(
        x,
        None,
        weights_of(m),
        num_layers=2,
        bidirectional=directions == 2,
        return_cell_states=True,
    )
    expected, (h, c) = m(x)
    assert torch.equal(y, expected)
    assert torch.equal(h_n, h)
    assert torch.equal(c_n, c)
    assert c_all.shape == (T, B, directions * H)
    assert torch.equal(c_all[-1, :, :H], c_n[-directions])


def test_layouts_agree(backend: str) -> None:
    """batch_first and unbatched input are the same computation seen in another shape."""
    m = module(num_layers=2)
    x, reset = inputs(T, B), torch.rand(T, B) < 0.3
    lengths = torch.tensor([6, 0, 3, 1])
    options = {"return_cell_states": True, "num_layers": 2}
    y, state, c_all = lstm(x, None, weights_of(m), lengths=lengths, reset=reset, **options)

    other = lstm(
        x.transpose(0, 1),
        None,
        weights_of(m),
        lengths=lengths,
        reset=reset.T,
        batch_first=True,
        **options,
    )
    assert torch.equal(other[0].transpose(0, 1), y)
    assert torch.equal(other[2].transpose(0, 1), c_all)
    assert all(map(torch.equal, other[1], state))

    for b in range(B):
        hx = torch.zeros(2, H, dtype=torch.float64), torch.zeros(2, H, dtype=torch.float64)
        one = lstm(x[:, b], hx, weights_of(m), lengths=lengths[b], reset=reset[:, b], **options)
        torch.testing.assert_close(one[0], y[:, b])
        torch.testing.assert_close(one[2], c_all[:, b])
        torch.testing.assert_close(one[1], tuple(s[:, b] for s in state))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8], ids=str)
def test_lengths_of_any_integer_type(backend: str, dtype: torch.dtype) -> None:
    m, x = module(), inputs(T, B)
    lengths = torch.tensor([6, 0, 3, 1])
    y, (h_n, _) = m(x, lengths=lengths.to(dtype))
    for b, n in enumerate(lengths.tolist()):
        assert not y[n:, b].any()
        if n:
            assert torch.equal(y[n - 1, b], h_n[0, b])
        else:
            assert not h_n[0, b].any()


REFUSED: dict[str, tuple[type[Exception], str, dict[str, Any], dict[str, Any]]] = {
    # name: exception, message, options of the module, options of the call
    "lengths list": (TypeError, "tensor of integers", {}, {"lengths": [T] * B}),
    "lengths float": (TypeError, "torch.float32", {}, {"lengths": torch.full((B,), 2.0)}),
    "lengths bool": (TypeError, "torch.bool", {}, {"lengths": torch.ones(B) > 0}),
    "lengths too many": (ValueError, r"\[4\]", {}, {"lengths": torch.full((B + 1,), 1)}),
    "lengths scalar": (ValueError, r"\[4\]", {}, {"lengths": torch.tensor(2)}),
    "lengths negative": (ValueError, "0..6", {}, {"lengths": torch.tensor([1, 2, -1, 0])}),
    "lengths past T": (ValueError, "0..6", {}, {"lengths": torch.tensor([1, 2, T + 1, 0])}),
    "reset list": (TypeError, "bool tensor", {}, {"reset": [[False] * B] * T}),
    "reset int": (TypeError, "torch.int64", {}, {"reset": torch.zeros(T, B).long()}),
    "reset shape": (ValueError, r"\[6, 4\]", {}, {"reset": torch.zeros(B, T) > 0}),
    "reset batch_first": (
        ValueError,
        r"\[4, 6\]",
        {"batch_first": True},
        {"reset": torch.zeros(T, B) > 0},
    ),
    "reset 1-D": (ValueError, r"\[6, 4\]", {}, {"reset": torch.zeros(T) > 0}),
    "reset backwards": (
        ValueError,
        "bidirectional",
        {"bidirectional": True},
        {"reset": torch.zeros(T, B) > 0},
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_lengths_and_reset_are_checked(backend: str, name: str) -> None:
    kind, message, options, call = REFUSED[name]
    m = module(**options)
    x = inputs(B, T) if m.batch_first else inputs(T, B)
    with pytest.raises(kind, match=message):
        m(x, **call)


def test_lengths_and_reset_of_unbatched_input(backend: str) -> None:
    m, x = module(), inputs(T)
    for options in {"lengths": torch.tensor([3])}, {"reset": torch.zeros(T, 1) > 0}:
        with pytest.raises(ValueError, match="must be"):
            m(x, **options)
    y, _ = m(x, lengths=torch.tensor(3))
    assert y.shape == (T, H)
    assert not y[3:].any()


@pytest.mark.parametrize(
    "options", [{"lengths": torch.ones(1).long()}, {"reset": torch.zeros(T, 1) > 0}], ids=str
)
def test_packed_input_takes_neither_lengths_nor_reset(
    backend: str, options: dict[str, Any]
) -> None:
    m, rows = module(), inputs(T)
    packed = nn.utils.rnn.pack_sequence([rows])
    with pytest.raises(ValueError, match="no meaning"):
        m(packed, **options)
    with pytest.raises(ValueError, match="no meaning"):
        lstm(rows, None, weights_of(m), batch_sizes=packed.batch_sizes, **options)


@pytest.mark.parametrize("sizes", [[4, 3], [4, 1, 3], [3, 5], [4, 4, 0], []], ids=str)
def test_batch_sizes_are_checked(backend: str, sizes: list[int]) -> None:
    batch_sizes = torch.tensor(sizes, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="batch_sizes must be positive, non-increasing"):
        lstm(inputs(8), None, weights_of(module()), batch_sizes=batch_sizes)


def test_batch_sizes_elsewhere_are_refused(backend: str) -> None:
    """Kernels read them on the host."""
    batch_sizes = torch.tensor([5, 3], device="meta")
    with pytest.raises(RuntimeError, match="batch_sizes must be on the CPU, got meta"):
        lstm(inputs(8), None, weights_of(module()), batch_sizes=batch_sizes)


@pytest.mark.parametrize("count", [1, 6, 7])
def test_number_of_weights_is_checked(backend: str, count: int) -> None:
    weights = (weights_of(module()) * 2)[:count]
    with pytest.raises(RuntimeError):
        lstm(inputs(T, B), None, weights)


def test_lengths_elsewhere_are_not_waited_for() -> None:
    """No value of lengths is read when they are not on the CPU; shapes still come out right."""
    m = fastlstm.LSTM(I, H, 2, device="meta")
    x = torch.zeros(T, B, I, device="meta")
    y, (h_n, _) = m(x, lengths=torch.zeros(B, dtype=torch.int64, device="meta"))
    assert y.shape == (T, B, H)
    assert h_n.shape == (2, B, H)


# Published: the sequence_loss examples of the TensorFlow RNN lessons, targets and weights all 1.
PUBLISHED = [
    ([[0.2, 0.7], [0.6, 0.2], [0.2, 0.9]], "0.596759"),
    ([[0.3, 0.7], [0.3, 0.7], [0.3, 0.7]], "0.513015"),
    ([[0.1, 0.9], [0.1, 0.9], [0.1, 0.9]], "0.371101"),
    ([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]], "1.31326"),
    ([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]], "0.646595"),
]


@pytest.mark.parametrize(("logits", "published"), PUBLISHED, ids=[p for _, p in PUBLISHED])
def test_sequence_loss_is_that_of_tensorflow(logits: list[list[float]], published: str) -> None:
    loss = sequence_loss(torch.tensor([logits]), torch.ones(1, 3).long(), torch.ones(1, 3))
    digits = len(published.split(".")[1])
    assert abs(loss.item() - float(published)) <= 10**-digits  # printed in float32, last digit


def test_sequence_loss_weights_and_averages() -> None:
    logits = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(4, (2, 3), dtype=torch.int32)
    weights = torch.tensor([[1.0, 0.5, 0.0], [2.0, 0.0, 1.0]], dtype=torch.float64)
    log_p = logits.log_softmax(-1).gather(-1, targets.long()[..., None])[..., 0]
    each = -log_p * weights
    expected = {
        (True, True): each.sum() / weights.sum(),
        (True, False): each.sum(1) / weights.sum(1),
        (False, True): each.sum(0) / weights.sum(0),
        (False, False): each,
    }
    for (over_time, over_batch), value in expected.items():
        loss = sequence_loss(logits, targets, weights, over_time, over_batch)
        torch.testing.assert_close(loss, value)
    loss.sum().backward()
    assert not logits.grad[weights == 0].any()
    assert sequence_loss(logits, targets, torch.zeros_like(weights)) == 0


@pytest.mark.parametrize(
    "shapes", [((2, 3), (2, 3), (2, 3)), ((2, 3, 4), (3, 2), (2, 3)), ((2, 3, 4), (2, 3), (2,))]
)
def test_sequence_loss_refuses_other_shapes(shapes: tuple[tuple[int, ...], ...]) -> None:
    logits, targets, weights = map(torch.zeros, shapes)
    with pytest.raises(ValueError, match=r"logits \[B, T, C\]"):
        sequence_loss(logits, targets.long(), weights)
