"""The kernels for the gradients of weights, interpreted: of numbers whose sums are exact.

tests/test_executed.py executes them, as part of layers.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from interpreter import INTERPRETED, rounding, whole

from fastlstm.kernels.rows import layout
from fastlstm.spec import DENSE, NO_NOISE, LayerSpec, State, Weights

pytestmark = INTERPRETED


def gradients(
    sizes: tuple[int, int, int, int], D: int, dtype: torch.dtype, hx: bool, bias: bool
) -> tuple[list[Weights], list[Weights]]:
    """What the kernels write, and the same from products in float64."""
    from fastlstm.kernels.triton.call import Call
    from fastlstm.kernels.triton.weight_gradients import launch_weight_gradients, takes

    T, B, I, H = sizes
    new = lambda *shape: whole(*shape, dtype=dtype)  # noqa: E731
    x, y, dgates = new(T, B, I + 1)[..., :I], new(T * B, D * H), new(D, T * B, 4 * H)
    h0 = new(D, B, H) if hx else None
    rows = layout(x, DENSE)
    call = Call(LayerSpec("LSTM", I, H, 0, D, bias), x, [], State(h0), rows, NO_NOISE)
    found, wanted = [], []
    for d, h in enumerate(rows.states_before(y, h0, D)):
        nan = torch.full((4 * H, I + H + 1), torch.nan, dtype=dtype)
        w_ih, w_hh, b = (t.contiguous() for t in nan.split((I, H, 1), 1))
        found.append(Weights(w_ih, w_hh, b.view(-1) if bias else None))
        ones = torch.ones(T * B, 1)
        both = torch.cat([x.reshape(-1, I), h, ones], 1).double()
        by_gate = dgates[d].double().view(-1, H, 4).transpose(1, 2).flatten(1)
        w_ih, w_hh, b = (by_gate.T @ both).to(dtype).split((I, H, 1), 1)
        wanted.append(Weights(w_ih, w_hh, b.view(-1) if bias else None))
    assert takes(call)
    with rounding():
        launch_weight_gradients(call, y, dgates, found)
    return found, wanted


@pytest.mark.parametrize(
    ("sizes", "D", "hx", "bias", "dtype"),
    [
        # Rows of three turns, the last one not full.
        ((5, 27, 28, 33), 2, True, True, torch.bfloat16),
        ((9, 25, 300, 16), 1, False, False, torch.float16),
        ((70, 1, 1, 5), 2, False, True, torch.float32),
        # Every row has its state before from h0.
        ((1, 70, 3, 20), 2, True, False, torch.float32),
        ((1, 1, 1, 1), 1, True, True, torch.float16),
        ((2, 20, 130, 128), 1, True, True, torch.bfloat16),
        # Parts in more than one turn.
        ((40, 60, 10, 8), 1, False, True, torch.float32),
    ],
    ids=str,
)
def test_sums_are_exact(
    sizes: tuple[int, int, int, int], D: int, hx: bool, bias: bool, dtype: torch.dtype
) -> None:
    for found, wanted in zip(*gradients(sizes, D, dtype, hx, bias), strict=True):
        for got, want in zip(found, wanted, strict=True):
            assert (got is None) == (want is None)
            assert got is None or torch.equal(got, want)


def test_takes_dense_rows_of_no_great_size() -> None:
    from fastlstm.kernels.triton.call import Call
    from fastlstm.kernels.triton.weight_gradients import takes

    def is_taken(T: int, I: int, H: int, **changes: Any) -> bool:
        x = torch.empty(T, 512, I, dtype=torch.bfloat16, device="meta")
        rows = replace(layout(x, DENSE), **changes)
        return takes(Call(LayerSpec("LSTM", I, H), x, [], State(), rows, NO_NOISE))

    some = torch.empty(1, device="meta")
    assert is_taken(20, 300, 128) and is_taken(28, 28, 64)
    assert not is_taken(200, 300, 128) and not is_taken(1, 2000, 16)
    assert not any(is_taken(20, 28, 64, **{n: some}) for n in ("lengths", "offsets", "reset"))
