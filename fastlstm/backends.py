"""Which implementation computes a layer: how to choose it, what there is, and why.

``auto`` takes the compiled CPU kernels on the CPU, on CUDA devices the Triton kernels or else the
CUDA kernels, wherever they can compute the call, and the reference everywhere else. A backend that
is named explicitly computes every call or raises: it is never replaced silently. Derivatives that
no kernel has (of second order, in forward mode) are the reference's on every backend.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils.rnn import PackedSequence

from fastlstm import extension, ops
from fastlstm.reference import PLAIN, Cell

__all__ = ["backend", "backends", "explain", "select"]

NAMES = ("auto", "reference", "cpu", "triton", "cuda")
_CPU_DTYPES = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})
_GPU_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
_is_autocast = torch._C._is_any_autocast_enabled
_is_transformed = torch._C._are_functorch_transforms_active
_TransformType = torch._C._functorch.TransformType


class Status(NamedTuple):
    """Whether a backend can be used here, and what it is or why it cannot."""

    available: bool
    detail: str


class Report(dict[str, Status]):
    """Backend name to :class:`Status`; prints as a table."""

    def __repr__(self) -> str:
        lines = [
            f"{name:<10}{'yes' if status.available else 'no':<5}{status.detail}"
            for name, status in self.items()
        ]
        return "\n".join([*lines, f"in use here: {_choice.name}"])


@dataclass(frozen=True)
class Explanation:
    """What one call would run: the backend, its kernel, its plan for each layer, and why."""

    backend: str
    kernel: str
    plan: tuple[str, ...]
    reason: str

    def __str__(self) -> str:
        lines = [f"backend  {self.backend}", f"kernel   {self.kernel}"]
        lines += [f"layer {k}  {plan}" for k, plan in enumerate(self.plan)]
        return "\n".join([*lines, f"reason   {self.reason}"])


def backends() -> Report:
    """What this machine has, and why something is missing.

    Returns:
        A dict of backend name to ``(available, detail)`` that prints as a table.
    """
    error = extension.error()
    if error is None:
        cpu = Status(True, f"compiled kernels, {extension.isa()}: float32/64, bfloat16, float16")
    else:
        cpu = Status(False, error)
    error = _triton_error()
    triton = Status(False, error) if error else Status(True, _triton_detail())
    error = _cuda_error()
    cuda = Status(False, error) if error else Status(True, _cuda_detail())
    return Report(
        reference=Status(True, "plain PyTorch: any device, any floating dtype, torch.func"),
        cpu=cpu,
        triton=triton,
        cuda=cuda,
    )


def _checked(name: str, source: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{source}: {name!r} is not a backend, choose one of {', '.join(NAMES)}")
    return name


class _Choice(threading.local):
    name = _checked(os.environ.get("FASTLSTM_BACKEND") or "auto", "FASTLSTM_BACKEND")


_choice = _Choice()


class backend:
    """Choose the backend: ``backend("cpu")`` from here on, ``with backend("cpu"):`` for a block.

    Like ``torch.set_grad_enabled``, it holds for the thread that calls it; every thread starts
    with ``FASTLSTM_BACKEND``, or "auto" without it.

    Args:
        name: "auto", "reference", "cpu", "triton" or "cuda".

    Raises:
        ValueError: there is no such backend.
        RuntimeError: this machine does not have it; the message says why.
    """

    def __init__(self, name: str) -> None:
        _checked(name, "backend()")
        if name != "auto" and not backends()[name].available:
            raise _missing(name)
        self.name = name
        self._before = _choice.name
        _choice.name = name

    def __enter__(self) -> backend:
        _choice.name = self.name
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _choice.name = self._before

    def __repr__(self) -> str:
        return f"fastlstm.backend({self.name!r})"


def _missing(name: str) -> RuntimeError:
    return RuntimeError(
        f'the "{name}" backend is not available here: {backends()[name].detail}. '
        'Use fastlstm.backend("auto"), or see fastlstm.backends()'
    )


def _obstacle(name: str, x: Tensor) -> str | None:
    """Why the kernels of that name cannot compute a layer of x; None if they can."""
    if name == "cpu":
        if not x.is_cpu:
            return f"the input is on {x.device}, the cpu kernels need it on the CPU"
        if x.dtype not in _CPU_DTYPES:
            return f"the cpu kernels have no {x.dtype}"
        return _extension_error()
    if name == "cuda":
        return _cuda_error() or _cuda_obstacle(x)
    return _triton_error() or _triton_obstacle(x)


def _higher_derivative() -> str | None:
    """What asks for more than vmap and one derivative in reverse mode, if anything does.

    That is for the reference, on every backend: kernels compute the first derivative only.
    """
    if forward_ad._current_level >= 0:
        return "forward-mode AD is active"
    if not _is_transformed():
        return None
    if torch.compiler.is_compiling():  # Dynamo cannot say which transforms
        return "compiled code uses torch.func"
    kinds = [layer.key() for layer in torch._C._functorch.get_interpreter_stack() or ()]
    if kinds.count(_TransformType.Grad) > 1:
        return "torch.func takes a derivative of a derivative"
    if _TransformType.Jvp in kinds:
        return "forward-mode AD is active"
    if _TransformType.Functionalize in kinds:
        return "torch.func.functionalize is active"
    return None


@torch.compiler.assume_constant_result  # Dynamo would trace the loading, it ignores the cache
def _extension_error() -> str | None:
    return extension.error()


@torch.compiler.assume_constant_result
def _triton_error() -> str | None:
    """Why there are no Triton kernels here; None once they are loaded."""
    return _load_triton()


@cache
def _load_triton() -> str | None:
    if find_spec("triton") is None:
        return "Triton is not installed"
    if torch.version.hip is not None:
        return "the kernels are for CUDA, and this torch is built for ROCm"
    try:
        from triton import knobs

        if not knobs.runtime.interpret and not torch.cuda.is_available():
            return "there is no CUDA device, and TRITON_INTERPRET=1 is not set"
        import_module("fastlstm.kernels")
    except (ImportError, AttributeError) as error:  # of a broken Triton, or one of long ago
        return f"Triton cannot be loaded: {error}"
    return None


def _require_triton() -> None:
    error = _load_triton()
    if error is not None:
        raise RuntimeError(f"the triton kernels are not available here: {error}")


ops.load_on_first_use(
    (ops.lstm_fwd_triton, ops.lstm_bwd_triton, ops.rnn_fwd_triton, ops.rnn_bwd_triton),
    _require_triton,
)


@torch.compiler.assume_constant_result
def _cuda_error() -> str | None:
    """Why there are no CUDA kernels here; None once they are loaded."""
    return _load_cuda()


@cache
def _load_cuda() -> str | None:
    emulated = os.environ.get("FASTLSTM_EMULATE") == "1"
    if not emulated and torch.version.hip is not None:
        return "the kernels are for CUDA, and this torch is built for ROCm"
    error = extension.error() or extension.cuda_error(emulated)
    if error is not None:
        return error
    if not emulated and not torch.cuda.is_available():
        return "there is no CUDA device"
    import_module("fastlstm.cuda")
    return None


def _require_cuda() -> None:
    error = _load_cuda()
    if error is not None:
        raise RuntimeError(f"the cuda kernels are not available here: {error}")


ops.load_on_first_use((ops.lstm_fwd_cuda, ops.lstm_bwd_cuda), _require_cuda)


def _cuda_detail() -> str:
    from fastlstm import cuda

    if cuda.EMULATED:
        return "emulated on the CPU (FASTLSTM_EMULATE=1), to check the kernels"
    return "compiled kernels: float32, bfloat16, float16 on CUDA devices from sm_80"


def _cuda_obstacle(x: Tensor) -> str | None:
    if x.dtype not in _GPU_DTYPES:
        return f"the cuda kernels have no {x.dtype}"
    if _cuda_emulated():
        return (
            None if x.is_cpu else f"the input is on {x.device}, the emulator needs it on the CPU"
        )
    if not x.is_cuda:
        return f"the input is on {x.device}, the cuda kernels need it on a CUDA device"
    return f"{x.device} is older than sm_80" if _capability(x.device) < (8, 0) else None


@torch.compiler.assume_constant_result
def _cuda_emulated() -> bool:
    from fastlstm import cuda

    return cuda.EMULATED


def _triton_detail() -> str:
    from triton import __version__, knobs

    if knobs.runtime.interpret:
        return f"Triton {__version__}, interpreted (TRITON_INTERPRET=1), to check the kernels"
    return f"Triton {__version__}: float32, bfloat16, float16 on CUDA devices from sm_80"


def _triton_obstacle(x: Tensor) -> str | None:
    if x.dtype not in _GPU_DTYPES:
        return f"the triton kernels have no {x.dtype}"
    if _interpreted():
        if not x.is_cpu:
            return f"the input is on {x.device}, the interpreter needs it on the CPU"
        if x.dtype is torch.bfloat16:
            return "Triton's interpreter multiplies bfloat16 wrongly"
    elif not x.is_cuda:
        return f"the input is on {x.device}, the triton kernels need it on a CUDA device"
    elif _capability(x.device) < (8, 0):
        return f"{x.device} is older than sm_80"
    return None


@torch.compiler.assume_constant_result
def _interpreted() -> bool:
    from triton import knobs

    return bool(knobs.runtime.interpret)


@torch.compiler.assume_constant_result
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


class Demand(NamedTuple):
    """Layers that are not those of a plain LSTM."""

    kind: str  # "LSTM" or "RNN"
    peephole: bool
    layer_norm: bool
    masked: bool  # whether the cell has an h_mask
    zoneout: tuple[float, float]
    inputs: tuple[int, ...]  # input size of each layer
    hidden: int
    projected: int
    directions: int
    projects: bool  # whether there is a projection, which may be to as many


def select(x: Tensor, demand: Demand | None = None) -> str:
    """The name of the backend that computes layers of input x, of a plain LSTM or as demanded.

    Raises:
        RuntimeError: a backend was named explicitly and cannot compute this call.
    """
    name = _choice.name
    if name == "reference":
        return name
    derived = _is_transformed() or forward_ad._current_level >= 0
    if derived and _higher_derivative() is not None:
        return "reference"
    for kernels in _candidates(name, x):
        obstacle = _obstacle(kernels, x) or _demand_obstacle(kernels, x, demand)
        if obstacle is None:
            return kernels
    if name == "auto":
        return "reference"
    raise RuntimeError(
        f'the "{name}" backend cannot compute this call: {obstacle}. '
        'Use fastlstm.backend("auto") or "reference"'
    )


def runs_as_is(x: Tensor) -> bool:
    """Whether the cpu kernels get x as it is: no compiler, transform or autocast is at work.

    For calls without gradients and no time to lose; it leaves the dtype to the kernels.
    """
    return (
        x.is_cpu
        and not (torch.compiler.is_compiling() or _is_transformed() or _is_autocast())
        and forward_ad._current_level < 0
        and _choice.name in ("auto", "cpu")
        and extension.error() is None
    )


def _candidates(name: str, x: Tensor) -> tuple[str, ...]:
    """The kernels that a choice stands for, the best first."""
    if name != "auto":
        return (name,)
    return ("triton", "cuda") if x.is_cuda else ("cpu",)


def _demand_obstacle(name: str, x: Tensor, demand: Demand | None) -> str | None:
    """Why the kernels of that name have no such layers."""
    if name == "cpu" or demand is None:
        return None
    if name == "cuda":
        plain = not (demand.peephole or demand.layer_norm or demand.masked or any(demand.zoneout))
        lacks = ops.cuda_lacks(demand.kind, plain, demand.projects)
        if lacks or torch.compiler.is_compiling():  # sizes may be symbols: the operator sees them
            return lacks
        return _cuda_room(x, demand)
    if demand.kind == "RNN":
        return None
    return _triton_cell_obstacle(x.dtype, x.device, *demand[1:-1])


def _cuda_room(x: Tensor, demand: Demand) -> str | None:
    from fastlstm import cuda

    return cuda.obstacle(demand.hidden, demand.directions, x)


@torch.compiler.assume_constant_result
def _triton_cell_obstacle(
    dtype: torch.dtype,
    device: torch.device,
    peephole: bool,
    layer_norm: bool,
    masked: bool,
    zoneout: tuple[float, float],
    inputs: tuple[int, ...],
    H: int,
    P: int,
    D: int,
) -> str | None:
    from fastlstm import kernels

    x = torch.empty(0, dtype=dtype, device=device)
    cell = Cell(peephole, layer_norm, x if masked else None, zoneout)
    found = (kernels.obstacle(1, 1, I, H, P, D, x, cell) for I in inputs)
    return next(filter(None, found), None)


def _cell(demand: Demand | None, x: Tensor) -> Cell:
    """A cell like the demanded one; its h_mask is any tensor."""
    if demand is None:
        return PLAIN
    h_mask = x if demand.masked else None
    return Cell(demand.peephole, demand.layer_norm, h_mask, demand.zoneout)


def explain(
    module: nn.Module, x: Tensor | PackedSequence, hx: Any = None, **options: Any
) -> Explanation:
    """Say what ``module(x, hx, **options)`` would run, without running it.

    Args:
        module: a ``fastlstm.LSTM``, ``LSTMCell`` or ``RNN``.
        x: the input of the call; hx and options are accepted so that a call can be pasted in,
            they do not change the choice.

    Returns:
        An object with ``backend``, ``kernel``, ``plan`` (a line for each layer) and ``reason``;
        it prints as a few lines.

    Raises:
        TypeError: module is not one of this library's.
        RuntimeError: the backend in use cannot compute this call.
    """
    from fastlstm.modules import LSTM, RNN, LSTMCell  # they import this file

    if not isinstance(module, LSTM | LSTMCell | RNN):
        raise TypeError(
            f"explain() takes a fastlstm.LSTM, LSTMCell or RNN, got {type(module).__qualname__}; "
            "convert it with from_torch() or fastlstm.accelerate()"
        )
    data = x.data if isinstance(x, PackedSequence) else x
    layers = list(_layers(module, x))
    demand = module.demand()
    backend = select(data, demand)
    auto = _choice.name == "auto"
    chosen = f'backend("{_choice.name}") asks for it'
    if backend == "reference":
        derivative = _higher_derivative()
        if derivative is not None:
            chosen = f"{derivative}, which is the reference's on every backend"
        elif auto:
            obstacles = (
                _obstacle(kernels, data) or _demand_obstacle(kernels, data, demand)
                for kernels in _candidates("auto", data)
            )
            chosen = f"auto: {'; '.join(filter(None, obstacles))}"
        plan = "one product for the input of all steps, then a step at a time"
        return Explanation("reference", "PyTorch operations", (plan,) * len(layers), chosen)
    if auto:
        chosen = f"auto: {data.dtype} on {'a CUDA device' if data.is_cuda else 'the CPU'}"
    if backend == "cpu":
        threads = torch.get_num_threads()
        gates = 1 if isinstance(module, RNN) else 4
        plans = tuple(extension.plan(*layer, threads, gates) for layer in layers)
        return Explanation("cpu", extension.isa(), plans, chosen)
    if backend == "cuda":
        from fastlstm import cuda

        plans = tuple(cuda.describe(data, B, H, D) for _, B, _, H, _, D in layers)
        return Explanation("cuda", _cuda_detail(), plans, chosen)
    from fastlstm import kernels as triton_kernels

    cell = None if demand is not None and demand.kind == "RNN" else _cell(demand, data)
    plans = tuple(triton_kernels.describe(data, *layer, cell) for layer in layers)
    return Explanation("triton", _triton_detail(), plans, chosen)


def _layers(
    module: Any, x: Tensor | PackedSequence
) -> Iterator[tuple[int, int, int, int, int, int]]:
    """T, B, I, H, P and D of each layer of a module."""
    hidden, layers = module.hidden_size, getattr(module, "num_layers", 1)
    projected = getattr(module, "proj_size", 0) or hidden
    directions = 2 if getattr(module, "bidirectional", False) else 1
    if isinstance(x, PackedSequence):
        steps, batch = len(x.batch_sizes), int(x.batch_sizes[0])
    elif isinstance(module, nn.RNNCellBase):
        steps, batch = 1, x.shape[0] if x.dim() == 2 else 1
    elif x.dim() == 2:
        steps, batch = x.shape[0], 1
    else:
        steps, batch = (x.shape[1], x.shape[0]) if module.batch_first else x.shape[:2]
    for features in [module.input_size] + [directions * projected] * (layers - 1):
        yield steps, batch, features, hidden, projected, directions
