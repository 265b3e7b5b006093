"""The backend of the Triton kernels: CUDA devices from sm_80.

This file imports neither Triton nor the kernels; :meth:`TritonBackend.error` does, when somebody
asks for the backend. README.md in the folder above says how the kernels work. C++ starts those of
plain layers (``ahead/``), be they compiled ahead or by Triton when they are first called; other
layers are left to Triton, if it is there.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache, lru_cache, partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from fastlstm.kernels import measured
from fastlstm.kernels.base import Backend, Use, constant, once, register
from fastlstm.kernels.operators import define, load_on_first_use
from fastlstm.spec import DENSE, LayerSpec, Sequences

from . import plain

__all__ = ["TRITON", "TritonBackend"]

_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
_OLDEST = 3, 6  # of Triton: the compiler of 3.5 has not been tried
_MOST_UNITS_WITHOUT_GATES = 128
_UNITS_OF_A_PROGRAM = 64  # of a plain cell, whatever its numbers are
_ON = "1", "on", "true", "yes", "y"  # as Triton reads a variable
_KINDS = {"bf16": 0, "fp16": 1, "tf32": 2, "exact": 3}  # indices of ahead.plans.KINDS
_MODES = "auto", "ahead", "jit"  # of FASTLSTM_TRITON
_OPERATORS = define("triton")
_JIT_OPERATORS = define("triton_jit", rnn=False)  # of what was not compiled ahead


class TritonBackend(Backend):
    """Computes layers on CUDA devices, or on CPU tensors in Triton's interpreter."""

    name = "triton"
    devices = frozenset({"cuda"})
    lstm_fwd, lstm_bwd, rnn_fwd, rnn_bwd = _OPERATORS
    takes_weights_of_forward = keeps_by_precision = True
    infers_on_cpu = False
    lstm_plain_fwd, lstm_plain_bwd = staticmethod(plain.forward), staticmethod(plain.backward)

    @property
    def lstm_infer(self) -> Any:
        """The operator of a stack without gradients; None unless C++ starts kernels."""
        return plain.infer if _has_ahead() else None

    def takes_plain(self, spec: LayerSpec, sequences: Sequences) -> bool:
        """Whether ``lstm_plain_fwd`` and ``lstm_plain_bwd`` compute a layer of such sequences."""
        beyond = spec.is_extended or spec.proj_size or sequences is not DENSE
        return spec.is_lstm and not beyond and _has_ahead()

    def error(self) -> str | None:
        """Say why this machine does not have it; None once it is loaded, which this does."""
        return _error()

    def detail(self) -> str:
        """Describe in a line what is there."""
        if _interpreted():
            from triton import __version__

            return f"Triton {__version__}, interpreted (TRITON_INTERPRET=1), to check the kernels"
        what = f"float32, bfloat16, float16 on CUDA devices from sm_80; {measured.CHOICE}"
        ahead = _ahead_problem()
        if ahead is None:
            from .ahead.library import manifest

            if (found := manifest()) is not None:
                kernels = f"kernels of Triton {found.triton} compiled ahead for {found.archs()}"
                jit = "others are compiled at run time" if _jit_problem() is None else ""
                return f"{kernels}; {jit or 'Triton is not needed'}: {what}"
        from triton import __version__

        aside = f" (C++ does not start them: {ahead})" if ahead else ""
        return f"Triton {__version__}{aside}: {what}"

    def obstacle(self, spec: LayerSpec, x: Tensor) -> str | None:
        """Say why it cannot compute such a layer of an input like x; None if it can."""
        found = self.error() or _input_obstacle(x)
        if found is not None or _ahead_problem() is not None:
            return found or _cell_obstacle(spec, x)
        missing = _not_ahead(spec, x)
        if missing is None:
            return None
        jit = _jit_problem()
        return _cell_obstacle(spec, x) if jit is None else f"{missing}, and {jit}"

    def describe(self, spec: LayerSpec, T: int, B: int, x: Tensor) -> str:
        """Describe in a line the regimes and tiles of both passes, and who compiled them."""
        from . import config

        problem, device = _problem(spec, B, x)
        if not spec.is_lstm:
            plan = config.rnn_plan(problem, device)
            return f"forward and backward {plan.described(gates=1)} ({plan.reason})"
        forward = config.forward_plan(problem, device)
        backward = config.backward_plan(problem, device)
        text = f"forward {forward} ({forward.reason}); backward {backward}"
        if _ahead_problem() is None:
            from .ahead import library

            ahead = library.missing(x.device.index or 0, _kind(x.dtype), spec, B)
            compiled = "compiled ahead" if library.manifest() else "compiled when first called"
            who = ahead or compiled, config.no_room(problem, device)
            return "; ".join(filter(None, (text, *who)))
        missing = config.missing(problem, device)
        return f"{text}; not with the {missing}: {_no_gluon()}" if missing else text

    def is_proven(self, spec: LayerSpec, x: Tensor, dense: bool = True) -> bool:
        """Whether such kernels have passed their tests on GPUs like that of x."""
        return x.is_cuda and measured.is_right(x.device, x.dtype, spec.hidden_size)

    def pace(self, specs: Sequence[LayerSpec], x: Tensor, use: Use) -> float | None:
        """Say how many times as long as it PyTorch's own kernels take for a call, at least."""
        regimes = self.regime(specs[0], use.steps, use.batch, x)
        way = measured.READY if self.is_ready(specs, x, use.batch) else measured.EAGER
        where = measured.capability(x.device), x.dtype
        way = measured.REPLAYED if use.captured else way
        return measured.pace(self.name, regimes, way, where, specs, use)

    def is_ready(self, specs: Sequence[LayerSpec], x: Tensor, batch: int) -> bool:
        """Whether C++ starts the kernels of such layers, for so many sequences."""
        found = _ahead_problem() is None
        return found and all([_not_ahead(spec, x, batch) is None for spec in specs])

    def regime(self, spec: LayerSpec, T: int, B: int, x: Tensor) -> str:
        """Name the regimes of both passes."""
        from . import config

        problem, device = _problem(spec, B, x)
        if not spec.is_lstm:
            return str(config.rnn_plan(problem, device).regime)
        plans = config.forward_plan(problem, device), config.backward_plan(problem, device)
        return "/".join(plan.regime for plan in plans)

    def trials(self, x: Tensor) -> Sequence[tuple[Callable[[], Any], dict[str, int]]]:
        """Return a call in each regime of `tl` and, on a GPU, what plans make of calls there."""
        from . import config

        if _ahead_problem() is None and _jit_problem() is not None:
            return [(nullcontext, {"H": H}) for H in (20, 64)[: 2 if x.element_size() == 2 else 1]]
        small = [partial(config.override, regime=regime) for regime in ("sequence", "steps")]
        sizes = {"T": 3, "B": 3} if _interpreted() else {}  # which takes seconds for a call
        found: list[tuple[Callable[[], Any], dict[str, int]]] = [(force, sizes) for force in small]
        return found + [(nullcontext, {"H": H}) for H in (20, 64, 160, 512) if x.is_cuda]

    def keeps_gates(self, spec: LayerSpec) -> bool:
        """Whether its forward pass can keep the activated gates for backward.

        With the weights in registers it does: it writes 4 numbers a cell, where computing them
        again would write and read the product of each gate in float32, and multiply. Where one
        program has the weights in shared memory it does not: four more stores lengthen each of its
        short steps. Where W_hh is large, the product that they save is not small.
        """
        wide = spec.hidden_size > _MOST_UNITS_WITHOUT_GATES
        return wide or not (spec.proj_size or spec.is_extended or _no_registers())


def _has_ahead() -> bool:
    return _error() is None and _ahead_problem() is None


@constant  # Dynamo would trace the loading, it ignores the cache
def _error() -> str | None:
    return _load()


@once
def _load() -> str | None:
    """Load the kernels; say why they cannot be loaded."""
    mode = os.environ.get("FASTLSTM_TRITON", "auto")
    if mode not in _MODES:
        raise ValueError(f"FASTLSTM_TRITON is {mode!r}, expected one of {', '.join(_MODES)}")
    ahead = _ahead_problem()
    if ahead is None or mode == "ahead":
        return ahead  # Triton is loaded where a call needs it
    jit = _load_jit_kernels()
    return ahead if jit and _built() else jit


@once
def _load_jit_kernels() -> str | None:
    """Let operators compile what was not compiled ahead; say why they cannot."""
    jit = _jit_problem()
    if jit is None:
        operators: Any = import_module("fastlstm.kernels.triton.operators")
        operators.register_kernels(ahead=_ahead_problem() is None)
    return jit


def _jit_error() -> str | None:
    """Do the same for a call that C++ has left to Triton, and tell it of an error."""
    reason = _load_jit_kernels()
    if reason is not None and _ahead_problem() is None:
        from .ahead.library import failed

        failed(f"no kernel for this call was compiled ahead, and {reason}")
    return reason


def _built() -> bool:
    """Whether somebody compiled kernels ahead, be they good or not."""
    from .ahead.manifest import FOLDER

    return FOLDER.exists()


@constant
def _ahead_problem() -> str | None:
    return _load_ahead()


@once
def _load_ahead() -> str | None:
    """Load the kernels that C++ starts, compiled ahead or by Triton; say why there are none."""
    if os.environ.get("FASTLSTM_TRITON") == "jit":
        return "FASTLSTM_TRITON=jit"
    if _interpreted():
        return "TRITON_INTERPRET=1 asks for the interpreter"
    if torch.version.hip is not None or not torch.cuda.is_available():
        return "there is no CUDA device"
    from .ahead import library

    return library.load(_triton_problem)


@constant
def _jit_problem() -> str | None:
    return _load_jit()


@once
def _load_jit() -> str | None:
    """Load what compiles at run time, and what starts that; say why it cannot be loaded."""
    if (reason := _triton_problem()) is not None:
        return reason
    from triton import knobs

    if not knobs.runtime.interpret:
        from .builder import problem

        if (missing := problem()) is not None:
            return missing
    try:
        import_module("fastlstm.kernels.triton.operators")
    except (ImportError, AttributeError) as error:  # of a broken Triton, or one of long ago
        return f"Triton cannot be loaded: {error}"
    return None


@cache
def _triton_problem() -> str | None:
    """Say why Triton cannot compile at run time; None if it can."""
    if os.environ.get("FASTLSTM_TRITON") == "ahead":
        return "FASTLSTM_TRITON=ahead forbids to compile at run time"
    if find_spec("triton") is None:
        return 'Triton is not installed; to install it, run: pip install "fastlstm[triton]"'
    if torch.version.hip is not None:
        return "the kernels are for CUDA, and this torch is built for ROCm"
    try:
        from triton import __version__, knobs

        if _release(__version__) < _OLDEST:
            return "Triton {} is too old: the kernels need {}.{}".format(__version__, *_OLDEST)
        if not (knobs.runtime.interpret or torch.cuda.is_available()):
            return "there is no CUDA device, and TRITON_INTERPRET=1 is not set"
    except (ImportError, AttributeError) as error:
        return f"Triton cannot be loaded: {error}"
    return None


def _release(version: str) -> tuple[int, int]:
    """Return the first two numbers of a version, such as (3, 6) of "3.6.0+git1234"."""
    major, minor, *_ = version.split(".")
    return int(major), int(minor)


def _input_obstacle(x: Tensor) -> str | None:
    """Say why the kernels cannot read x."""
    if x.dtype not in _DTYPES:
        return f"the triton kernels have no {x.dtype}"
    if _interpreted():
        if not x.is_cpu:
            return f"the input is on {x.device}, the interpreter needs it on the CPU"
        if x.dtype is torch.bfloat16 and not _rounds_as_gpu():
            return "Triton's interpreter multiplies bfloat16 wrongly"
    elif not x.is_cuda:
        return f"the input is on {x.device}, the triton kernels need it on a CUDA device"
    elif measured.capability(x.device) < (8, 0):
        return f"{x.device} is older than sm_80"
    return None


def _problem(spec: LayerSpec, B: int, x: Tensor) -> tuple[Any, Any]:
    """Return what a plan depends on: of the call, and of the GPU."""
    from .plan import Problem

    if _ahead_problem() is None:
        from .ahead import library

        index = x.device.index or 0
        if library.problem_of(index) is None or _jit_problem() is not None:
            precision = "ieee" if measured.precision(x.dtype) == "exact" else "tf32"
            return Problem(spec, B, x.element_size(), precision), library.gpu(index)
    from .launch import device_of, precision_of

    return Problem(spec, B, x.element_size(), precision_of(x)), device_of(x)


@constant
def _kind(dtype: torch.dtype) -> int | None:
    """Return which kind of number compiled kernels have, as in ahead/plans.py, or None."""
    return _KINDS[measured.precision(dtype)] if dtype in _DTYPES else None


_ANY = 1 << 30  # sequences: clusters of so many have no room


def _not_ahead(spec: LayerSpec, x: Tensor, B: int = _ANY) -> str | None:
    """Say why C++ does not start kernels for all calls of a layer; None if it does."""
    return _layer_not_ahead(tuple(spec), x.device.index or 0, _kind(x.dtype), B)


@constant
def _layer_not_ahead(spec: tuple[Any, ...], gpu: int, kind: int | None, B: int) -> str | None:
    return _find_not_ahead(spec, gpu, kind, B)


@lru_cache(maxsize=1024)  # asked at every call
def _find_not_ahead(spec: tuple[Any, ...], gpu: int, kind: int | None, B: int) -> str | None:
    from .ahead import library

    return _ahead_problem() or library.missing(gpu, kind, LayerSpec(*spec), B)


def _cell_obstacle(spec: LayerSpec, x: Tensor) -> str | None:
    """Say why the kernels have no such cell."""
    if not spec.is_lstm or not spec.is_extended:
        return None
    return _room_for(tuple(spec), x.dtype, x.device)


@constant
def _room_for(spec: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> str | None:
    """Say why there is no room for an extended cell; the fields of a LayerSpec describe it."""
    from .config import Problem, obstacle
    from .launch import device_of, precision_of

    x = torch.empty(0, dtype=dtype, device=device)
    problem = Problem(LayerSpec(*spec), 1, x.element_size(), precision_of(x))
    return obstacle(problem, device_of(x))


@constant
def _no_gluon() -> str | None:
    """Say why not everything that is written in Gluon can run."""
    from . import gluon

    return gluon.PROBLEM or gluon.CLUSTER_PROBLEM


@constant
def _no_registers() -> bool:
    """Whether there is no registers regime."""
    if _ahead_problem() is None:
        return False
    from . import gluon

    return gluon.PROBLEM is not None


@constant
def _interpreted() -> bool:
    if "triton" not in sys.modules:  # which takes long to load
        return os.environ.get("TRITON_INTERPRET", "0").lower() in _ON
    from triton import knobs

    return bool(knobs.runtime.interpret)


@constant
def _rounds_as_gpu() -> bool:
    from .launch import rounds_as_gpu

    return rounds_as_gpu


TRITON = register(TritonBackend())
load_on_first_use(_OPERATORS[:2], _load, "triton")
load_on_first_use((*_OPERATORS[2:], *_JIT_OPERATORS), _jit_error, "triton")
