"""The kernel for input products, interpreted: of numbers whose sums are exact.

tests/test_executed.py executes it, as part of layers.
"""

import pytest
import torch
from interpreter import INTERPRETED, rounding, whole
from torch import Tensor

from fastlstm.kernels.rows import layout
from fastlstm.spec import DENSE, NO_NOISE, LayerSpec, Sequences, State, Weights

pytestmark = INTERPRETED


def products(x: Tensor, sequences: Sequences, H: int, D: int) -> tuple[Tensor, Tensor, bool]:
    """What the kernel makes, the same in float64, and whether the kernel takes the layer."""
    from fastlstm.kernels.triton.call import Call
    from fastlstm.kernels.triton.input_products import products_by_unit, takes

    I = x.shape[-1]
    w = [whole(4 * H, I, dtype=x.dtype) for _ in range(D)]
    weights = [Weights(each, each) for each in w]
    rows = layout(x, sequences)
    call = Call(LayerSpec("LSTM", I, H, 0, D, False), x, weights, State(), rows, NO_NOISE)
    with rounding():
        found = products_by_unit(call)
    flat = x.reshape(-1, I).double()
    by_gate = torch.stack([flat @ each.double().T for each in w])
    wanted = by_gate.view(D, -1, 4, H).transpose(2, 3).flatten(2)
    return found, wanted, takes(call)


@pytest.mark.parametrize(
    ("sizes", "H", "D", "form", "dtype"),
    [
        # More than a tile of rows, of gates and of terms.
        ((5, 27, 140), 33, 2, "dense", torch.bfloat16),
        ((3, 5, 28), 64, 1, "dense", torch.float32),
        ((3, 5, 7), 5, 2, "dense", torch.float32),
        # Batches first; a slice of wider rows; packed rows.
        ((7, 6, 8), 20, 1, "batch first", torch.float16),
        ((7, 6, 68), 20, 2, "batch first", torch.float32),
        ((2, 70, 12), 40, 1, "sliced", torch.float16),
        ((1, 90, 36), 16, 2, "packed", torch.float32),
        ((1, 1, 1), 1, 1, "dense", torch.float32),
    ],
    ids=str,
)
def test_sums_are_exact(
    sizes: tuple[int, int, int], H: int, D: int, form: str, dtype: torch.dtype
) -> None:
    T, B, I = sizes
    sequences = DENSE
    if form == "batch first":
        x = whole(B, T, I, dtype=dtype).transpose(0, 1)
    elif form == "sliced":
        x = whole(T, B, I + 4, dtype=dtype)[..., :I]
    elif form == "packed":
        x, sequences = whole(B, I, dtype=dtype), Sequences(torch.tensor([B // 2, B // 2]))
    else:
        x = whole(T, B, I, dtype=dtype)
    found, wanted, taken = products(x, sequences, H, D)
    assert taken and found.dtype is torch.float32
    assert torch.equal(found.double(), wanted)


def test_what_pytorch_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 16-bit numbers that do not begin at every eighth byte, and large products.

    Of float32 large ones only if PyTorch multiplies in the precision of the layer.
    """
    x = whole(3, 4, 70, dtype=torch.bfloat16)
    found, wanted, taken = products(x, DENSE, 24, 2)
    assert not taken and torch.equal(found.double(), wanted)

    from fastlstm.kernels.triton import input_products
    from fastlstm.kernels.triton.call import Call

    def is_taken(T: int, n: int, dtype: torch.dtype) -> bool:
        x = torch.empty(T, 64, n, dtype=dtype, device="meta")
        spec, rows = LayerSpec("LSTM", n, n), layout(x, DENSE)
        return input_products.takes(Call(spec, x, [], State(), rows, NO_NOISE))

    assert is_taken(32, 256, torch.bfloat16) and not is_taken(512, 512, torch.bfloat16)
    for name, in_tf32, large in (
        ("tf32", False, True),
        ("tf32", True, False),
        ("ieee", False, False),
        ("ieee", True, True),
    ):
        monkeypatch.setattr(input_products, "precision_of", lambda x, name=name: name)
        monkeypatch.setattr(input_products, "multiplies_in_tf32", lambda found=in_tf32: found)
        assert is_taken(32, 64, torch.float32)
        assert is_taken(512, 512, torch.float32) is large
