"""Operator schemas and their fake kernels. Imports neither Triton nor the compiled extension.

Every backend implements one contract for one layer, both directions at once (shapes: T time steps,
B batch, I input, H hidden, P projected or H, D directions; packed rows replace [T, B] by [N]):

- ``weights``: for each direction ``w_ih [4H, I]``, ``w_hh [4H, P]``, then ``b_ih [4H]``,
  ``b_hh [4H]`` if there are biases, then ``w_hr [P, H]`` if projected;
- ``batch_sizes``: int64 [T], for packed rows; ``lengths``: int64 [B]; ``reset``: bool [T, B];
- ``gates``: [D, T, B, 4H], the activated gates kept for backward, units in an order private to
  the backend; the Triton kernels compute them again where they are not kept;
- ``c_all``: [T, B, D*H], float32 when the layer is 16-bit; so are ``gates`` and every gradient of
  the CPU kernels, while those of the Triton kernels have the dtype of the layer;
- outputs are passed in and written completely.
"""

import torch
from torch.library import Library, register_fake

_INPUTS = (
    "Tensor x, Tensor[] weights, int directions, Tensor? h0, Tensor? c0, "
    "Tensor? batch_sizes, Tensor? lengths, Tensor? reset"
)
_FORWARD = (
    f"({_INPUTS}, Tensor(a!) y, Tensor(b!) h_n, Tensor(c!) c_n, Tensor(d!)? c_all, "
    "Tensor(e!)? gates, Tensor(f!)? cache) -> ()"
)
_BACKWARD = (
    f"({_INPUTS}, Tensor y, Tensor c_all, Tensor gates, "
    "Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? dc_all, "
    "Tensor(a!)? dx, Tensor(b!)? dh0, Tensor(c!)? dc0, Tensor(d!)[] dweights, "
    "Tensor(e!)? cache) -> ()"
)

_library = Library("fastlstm", "DEF")
_library.define(f"lstm_fwd_cpu{_FORWARD}")
_library.define(f"lstm_bwd_cpu{_BACKWARD}")
_library.define(f"lstm_fwd_triton{_FORWARD}")
_library.define(f"lstm_bwd_triton{_BACKWARD.replace('Tensor gates', 'Tensor? gates')}")
_SIZES = "int input, int hidden, int projected, int directions"
_library.define(f"cpu_cache_bytes({_SIZES}, bool double) -> int")
_library.define("cpu_isa() -> str")
_library.define(f"cpu_plan(int steps, int batch, {_SIZES}, int threads) -> str")


@register_fake("fastlstm::lstm_fwd_cpu")
@register_fake("fastlstm::lstm_bwd_cpu")
@register_fake("fastlstm::lstm_fwd_triton")
@register_fake("fastlstm::lstm_bwd_triton")
def _writes_only_its_arguments(*args: object) -> None:
    return None


lstm_fwd_cpu = torch.ops.fastlstm.lstm_fwd_cpu.default
lstm_bwd_cpu = torch.ops.fastlstm.lstm_bwd_cpu.default
lstm_fwd_triton = torch.ops.fastlstm.lstm_fwd_triton.default
lstm_bwd_triton = torch.ops.fastlstm.lstm_bwd_triton.default
cpu_cache_bytes = torch.ops.fastlstm.cpu_cache_bytes.default
cpu_isa = torch.ops.fastlstm.cpu_isa.default
cpu_plan = torch.ops.fastlstm.cpu_plan.default


def triton_keeps_gates(hidden: int) -> bool:
    """Whether the Triton forward kernels store the activated gates of a layer of H units.

    Where one program holds all units it does not: four more stores lengthen each of its short
    steps, while computing the gates again is one product of matrices for all steps. Where W_hh is
    large, that product is not small.
    """
    return hidden > 128
