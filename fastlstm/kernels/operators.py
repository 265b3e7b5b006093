"""Operator schemas and their fake kernels. Imports neither Triton nor the compiled extension.

Every backend implements one contract for one layer, both directions at once (shapes: T time steps,
B batch, I input, H hidden, P projected or H, D directions; packed rows replace [T, B] by [N]).
:mod:`fastlstm.reference` defines what a step computes.

- ``weights``: for each direction ``w_ih [4H, I]``, ``w_hh [4H, P]``, then ``b_ih [4H]``,
  ``b_hh [4H]`` if there are biases, then ``w_hr [P, H]`` if projected, then ``w_ch [3H]`` with
  ``peephole``, then ``ln_ih [4H]``, ``ln_hh [4H]``, ``ln_c [H]``, ``b_ln_c [H]`` with
  ``layer_norm``; ``dweights`` alike, with one gradient for both biases;
- ``batch_sizes``: int64 [T], for packed rows; ``lengths``: int64 [B]; ``reset``: bool [T, B];
- ``h_mask``: [D, B, P], factors of the state that goes into w_hh, float32 when the layer is
  16-bit; ``seed``: int64 [1], of zoneout in training, None for its expectation;
- ``gates``: [D, T, B, 4H], the activated gates kept for backward, units in an order private to
  the backend; without them backward computes them again, all steps at once. Layer normalisation
  never keeps them;
- ``c_all``: [T, B, D*H], float32 when the layer is 16-bit; so are ``gates`` and every gradient of
  the CPU kernels, while those of the GPU kernels have the dtype of the layer;
- outputs are passed in and written completely.

The CPU operators run an ensemble of E layers in one call with ``members=E``: every tensor then has
a leading dimension E, which may be expanded (stride 0), but for ``cache``, which is not used.

The operators of ``nn.RNN`` have one gate, ``w_ih [H, I]`` and ``w_hh [H, H]``, and keep nothing
but y for backward.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.library import Library, impl, register_fake

_INPUTS = (
    "Tensor x, Tensor[] weights, int directions, Tensor? h0, Tensor? c0, "
    "Tensor? batch_sizes, Tensor? lengths, Tensor? reset"
)
_CELL = (
    "*, bool peephole=False, bool layer_norm=False, Tensor? h_mask=None, "
    "float zoneout_c=0.0, float zoneout_h=0.0, Tensor? seed=None"
)
_FORWARD = (
    f"({_INPUTS}, Tensor(a!) y, Tensor(b!) h_n, Tensor(c!) c_n, Tensor(d!)? c_all, "
    f"Tensor(e!)? gates, Tensor(f!)? cache, {_CELL}) -> ()"
)
_BACKWARD = (
    f"({_INPUTS}, Tensor y, Tensor c_all, Tensor? gates, "
    "Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? dc_all, "
    "Tensor(a!)? dx, Tensor(b!)? dh0, Tensor(c!)? dc0, Tensor(d!)[] dweights, "
    f"Tensor(e!)? cache, {_CELL}) -> ()"
)
_RNN_INPUTS = (
    "Tensor x, Tensor[] weights, int directions, Tensor? h0, "
    "Tensor? batch_sizes, Tensor? lengths, Tensor? reset, bool relu"
)
_RNN_FORWARD = f"({_RNN_INPUTS}, Tensor(a!) y, Tensor(b!) h_n, Tensor(c!)? cache) -> ()"
_RNN_BACKWARD = (
    f"({_RNN_INPUTS}, Tensor y, Tensor? dy, Tensor? dh_n, "
    "Tensor(a!)? dx, Tensor(b!)? dh0, Tensor(c!)[] dweights, Tensor(d!)? cache) -> ()"
)

_SCHEMAS = {
    "lstm_fwd": _FORWARD,
    "lstm_bwd": _BACKWARD,
    "rnn_fwd": _RNN_FORWARD,
    "rnn_bwd": _RNN_BACKWARD,
}

_library = Library("fastlstm", "DEF")
for _operator, _schema in _SCHEMAS.items():
    _library.define(f"{_operator}_triton{_schema}")
    _with_members = _schema.replace(") -> ()", ", int members=0) -> ()")
    _library.define(f"{_operator}_cpu{_with_members}")
# The CUDA kernels, and of them the recurrence alone: see cuda.py.
for _operator in ("lstm_fwd", "lstm_bwd"):
    _library.define(f"{_operator}_cuda{_SCHEMAS[_operator]}")
_ROWS = "Tensor? offsets, Tensor? lengths, Tensor? reset, int T, int B"
_LAUNCH = (
    "Tensor(x!)? exchange, Tensor(y!)? arrived, Tensor(z!)? rest, "
    "int[] plan, bool tf32, int device, int stream"
)
_library.define(
    f"lstm_recur_fwd(Tensor projected, Tensor[] w_hh, Tensor[] biases, Tensor? h0, Tensor? c0, "
    f"{_ROWS}, Tensor(a!) y, Tensor(b!) h_n, Tensor(c!) c_n, Tensor(d!)? c_all, "
    f"Tensor(e!)? gates, {_LAUNCH}) -> ()"
)
_library.define(
    f"lstm_recur_bwd(Tensor y, Tensor[] w_hh, {_ROWS}, Tensor gates, Tensor c_all, Tensor? c0, "
    "Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? dc_all, "
    f"Tensor(a!) dgates, Tensor(b!)? dh0, Tensor(c!)? dc0, {_LAUNCH}) -> ()"
)
_library.define("cuda_device(int device) -> int[]")
_library.define(
    "cuda_plan(int kind, bool backward, int B, int H, int D, int[] device, int[] wish) -> int[]"
)
_library.define(
    "cuda_obstacle(int kind, bool backward, int B, int H, int D, int[] device, int[] wish) -> str"
)
# A plain call without gradients, for latency: they make their outputs, (y, h_n, c_n) or (h, c).
# There is no fake kernel: what is not a plain tensor is refused, and its call takes the long way.
_STATES = "Tensor? h0, Tensor? c0, Tensor(a!)? cache"
_library.define(
    f"lstm_infer_cpu(Tensor x, Tensor[] weights, int directions, {_STATES}) "
    "-> (Tensor, Tensor, Tensor)"
)
_library.define(f"lstm_cell_infer_cpu(Tensor x, Tensor[] weights, {_STATES}) -> (Tensor, Tensor)")
_SIZES = "int input, int hidden, int projected, int directions"
_library.define(f"cpu_cache_bytes({_SIZES}, bool double) -> int")
_library.define("cpu_isa() -> str")
_library.define(f"cpu_plan(int steps, int batch, {_SIZES}, int threads) -> str")


def _writes_only_its_arguments(*args: object, **options: object) -> None:
    return None


for _operator in _SCHEMAS:
    register_fake(f"fastlstm::{_operator}_cpu")(_writes_only_its_arguments)
    register_fake(f"fastlstm::{_operator}_triton")(_writes_only_its_arguments)

for _operator in ("lstm_fwd_cuda", "lstm_bwd_cuda"):
    register_fake(f"fastlstm::{_operator}")(_writes_only_its_arguments)

lstm_infer_cpu = torch.ops.fastlstm.lstm_infer_cpu.default
lstm_cell_infer_cpu = torch.ops.fastlstm.lstm_cell_infer_cpu.default
lstm_fwd_cpu = torch.ops.fastlstm.lstm_fwd_cpu.default
lstm_bwd_cpu = torch.ops.fastlstm.lstm_bwd_cpu.default
lstm_fwd_triton = torch.ops.fastlstm.lstm_fwd_triton.default
lstm_bwd_triton = torch.ops.fastlstm.lstm_bwd_triton.default
rnn_fwd_cpu = torch.ops.fastlstm.rnn_fwd_cpu.default
rnn_bwd_cpu = torch.ops.fastlstm.rnn_bwd_cpu.default
rnn_fwd_triton = torch.ops.fastlstm.rnn_fwd_triton.default
rnn_bwd_triton = torch.ops.fastlstm.rnn_bwd_triton.default
lstm_fwd_cuda = torch.ops.fastlstm.lstm_fwd_cuda.default
lstm_bwd_cuda = torch.ops.fastlstm.lstm_bwd_cuda.default
lstm_recur_fwd = torch.ops.fastlstm.lstm_recur_fwd.default
lstm_recur_bwd = torch.ops.fastlstm.lstm_recur_bwd.default
cuda_device = torch.ops.fastlstm.cuda_device.default
cuda_plan = torch.ops.fastlstm.cuda_plan.default
cuda_obstacle = torch.ops.fastlstm.cuda_obstacle.default
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


def plainly(operator: Callable[..., None]) -> Callable[..., None]:
    """An operator written in Python, on the device of x, without autograd and autocast.

    An exported program calls operators with gradients on, and backward may run within autocast.
    """

    @wraps(operator)
    def run(x: Tensor, *arguments: Any, **options: Any) -> None:
        with torch.no_grad(), torch.cuda.device_of(x):
            if not torch._C._is_any_autocast_enabled():
                return operator(x, *arguments, **options)
            with torch.autocast(x.device.type, enabled=False):
                return operator(x, *arguments, **options)

    return run


def zero(*gradients: Tensor | None) -> None:
    """Set to zero what there is."""
    for gradient in gradients:
        if gradient is not None:
            gradient.zero_()


def contiguous(t: Tensor | None) -> Tensor | None:
    """The same numbers, contiguous."""
    return None if t is None else t.contiguous()


def cuda_lacks(kind: str, plain: bool, projects: bool) -> str | None:
    """Why the CUDA kernels have no such layers, of any size; None if they have."""
    if kind != "LSTM":
        return "the cuda kernels have no nn.RNN"
    if not plain:
        return "the cuda kernels have the plain cell only"
    return "the cuda kernels have no projection" if projects else None


def load_on_first_use(operators: tuple[Any, ...], load: Callable[[], None]) -> None:
    """Let the operators call `load`, which registers their kernels, where they have none yet.

    A program of torch.export calls them without anyone having asked for a backend before.
    """
    loaded = False

    def bind(operator: Any) -> Callable[..., None]:
        def kernel(*args: Any, **options: Any) -> None:
            nonlocal loaded
            if loaded:
                raise RuntimeError(f"{operator.name()} has no kernel for tensors on this device")
            load()
            loaded = True
            operator(*args, **options)

        return kernel

    for operator in operators:
        impl(operator.name(), "CompositeExplicitAutograd", bind(operator))
