"""The operators of the compiled libraries: csrc/cuda registers their kernels.

- ``lstm_recur_fwd``, ``lstm_recur_bwd``: the recurrence of a layer, all steps of both directions;
- ``cuda_device``: what a plan needs to know of a GPU, the fields of :class:`.plan.Device`;
- ``cuda_plan``: the fields of :class:`.plan.Plan`, or nothing where there is none;
- ``cuda_obstacle``: why there is none, or an empty text.

None of them has a fake kernel: compiled code sees ``lstm_fwd_cuda`` and ``lstm_bwd_cuda`` only.
Shapes are those of :mod:`fastlstm.kernels.operators`, with ``[rows, ...]`` for ``[T, B, ...]``;
``input_products``: float32 [D, rows, 4H]; ``dgates``: [D, rows, 4H]; ``offsets``: int64 [T], the
first row of each step of packed rows. ``exchange``, ``arrived`` and ``rest`` are work space.
"""

from __future__ import annotations

from fastlstm.kernels.operators import define_operator

__all__ = ["cuda_device", "cuda_obstacle", "cuda_plan", "lstm_recur_bwd", "lstm_recur_fwd"]

_ROWS = "Tensor? offsets, Tensor? lengths, Tensor? reset, int T, int B"
_LAUNCH = (
    "Tensor(x!)? exchange, Tensor(y!)? arrived, Tensor(z!)? rest, "
    "int[] plan, bool tf32, int device, int stream"
)
_PLAN = "(int kind, bool backward, int B, int H, int D, int[] device, int[] wish)"

lstm_recur_fwd = define_operator(
    "lstm_recur_fwd",
    "(Tensor input_products, Tensor[] w_hh, Tensor[] biases, Tensor? h0, Tensor? c0, "
    f"{_ROWS}, Tensor(a!) y, Tensor(b!) h_n, Tensor(c!) c_n, Tensor(d!)? c_all, "
    f"Tensor(e!)? gates, {_LAUNCH}) -> ()",
)
lstm_recur_bwd = define_operator(
    "lstm_recur_bwd",
    f"(Tensor y, Tensor[] w_hh, {_ROWS}, Tensor gates, Tensor c_all, Tensor? c0, "
    "Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? dc_all, "
    f"Tensor(a!) dgates, Tensor(b!)? dh0, Tensor(c!)? dc0, {_LAUNCH}) -> ()",
)
cuda_device = define_operator("cuda_device", "(int device) -> int[]")
cuda_plan = define_operator("cuda_plan", f"{_PLAN} -> int[]")
cuda_obstacle = define_operator("cuda_obstacle", f"{_PLAN} -> str")
