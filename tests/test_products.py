"""The products that the kernels of GPUs leave to PyTorch: what they ask for, without a GPU."""

import pytest
import torch
from torch import Tensor

from fastlstm.kernels import products

SIXTEEN = (torch.bfloat16, torch.float16)


class OnGpu(Tensor):
    """A CPU tensor that says it is on a GPU."""

    is_cuda = True


@pytest.mark.parametrize("dtype", [*SIXTEEN, torch.float32], ids=str)
@pytest.mark.parametrize("wanted", [*SIXTEEN, torch.float32], ids=str)
def test_sums_are_in_float32(
    wanted: torch.dtype, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A result in 16 bits would let cuBLAS add up the parts of a sum in 16 bits."""
    asked = []

    def mm(
        a: Tensor, b: Tensor, out_dtype: torch.dtype | None = None, out: Tensor | None = None
    ) -> Tensor:
        asked.append(out_dtype or a.dtype)
        assert out is None or out.dtype is asked[-1]
        result = a.float() @ b.float()
        return result if out is None else out.copy_(result)

    a, b = torch.randn(7, 300).to(dtype), torch.randn(300, 3).to(dtype)
    out = torch.empty(7, 3, dtype=wanted)
    monkeypatch.setattr(torch, "mm", mm)
    assert products.product(a.as_subclass(OnGpu), b).dtype is torch.float32
    products.product_into(out, a.as_subclass(OnGpu), b)
    assert asked == [torch.float32, torch.float32]
    assert torch.equal(out, (a.float() @ b.float()).to(wanted))


@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
def test_a_result_is_rounded_once(dtype: torch.dtype) -> None:
    a, b = torch.randn(7, 300).to(dtype), torch.randn(300, 3).to(dtype)
    out = torch.empty(7, 3, dtype=dtype)
    products.product_into(out, a, b)
    assert torch.equal(out, (a.float() @ b.float()).to(dtype))
