"""The backend of the compiled CPU kernels (csrc/cpu)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from fastlstm import extension
from fastlstm.kernels import operators
from fastlstm.kernels.base import Backend, constant, register
from fastlstm.kernels.direct import infer_functions
from fastlstm.spec import LayerSpec, Sequences

__all__ = ["CPU", "plan"]

_SHORT = 4  # steps: csrc/cpu/plan.h has other kernels for calls of no more
_DTYPES = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})
_DEVICE = torch.device("cpu")  # named at every allocation: a default device may be another one
_OPERATORS = operators.define("cpu", members=True)
# Calls for latency. They make their outputs, (y, h_n, c_n) or (h, c), and have no fake kernel:
# what is not a plain tensor is refused, and such a call takes the long way.
_STATES = "Tensor? h0, Tensor? c0"
_LSTM_INFER = operators.define_operator(
    "lstm_infer_cpu",
    f"(Tensor x, Tensor[] weights, int layers, int directions, {_STATES}, Tensor(a!)[] caches) "
    "-> (Tensor, Tensor, Tensor)",
)
_LSTM_CELL_INFER = operators.define_operator(
    "lstm_cell_infer_cpu",
    f"(Tensor x, Tensor[] weights, {_STATES}, Tensor(a!)? cache) -> (Tensor, Tensor)",
)
_DIRECT = operators.define_operator("cpu_direct", "(int[] addresses) -> int[]")
_PLAIN_FWD, _PLAIN_BWD = operators.define_plain(
    "cpu", "Tensor? batch_sizes, Tensor? lengths, Tensor? reset, Tensor(a!)? cache"
)
# A step of a cell in training. The forward operator also returns what the other one needs: the
# gates and c, in one tensor [B, 5H] of the compute type. So is what the backward operator returns:
# the gradients of x, h0 and c0, empty where they are not wanted, and those of the gate sums
# [B, 4H]. The last operator makes the weight gradients of many steps from these, x and h0.
_CELL_FWD = operators.define_operator(
    "lstm_cell_fwd_cpu",
    "(Tensor x, Tensor[] weights, Tensor h0, Tensor c0, Tensor(a!)? cache) "
    "-> (Tensor, Tensor, Tensor)",
)
_CELL_BWD = operators.define_operator(
    "lstm_cell_bwd_cpu",
    "(Tensor x, Tensor[] weights, Tensor h0, Tensor c0, Tensor kept, Tensor? dh, Tensor? dc, "
    "bool dx, bool dh0, bool dc0, Tensor(a!)? cache) -> (Tensor, Tensor, Tensor, Tensor)",
)
_CELL_WEIGHT_GRADS = operators.define_operator(
    "lstm_cell_weight_grads_cpu",
    "(Tensor[] x, Tensor[] h, Tensor[] dsums, Tensor(a!)[] dweights, bool add) -> ()",
)
_SIZES = "int input, int hidden, int projected, int directions"
_CACHE_BYTES = operators.define_operator(
    "cpu_cache_bytes",
    f"(str purpose, int steps, int batch, {_SIZES}, int gates, bool double) -> int",
)
_ISA = operators.define_operator("cpu_isa", "() -> str")
_PLAN = operators.define_operator(
    "cpu_plan", f"(int steps, int batch, {_SIZES}, int threads, int[] machine) -> str"
)


class CpuBackend(Backend):
    """Computes every layer on CPU tensors."""

    name = "cpu"
    devices = frozenset({"cpu"})
    lstm_fwd, lstm_bwd, rnn_fwd, rnn_bwd = _OPERATORS
    lstm_infer = _LSTM_INFER
    lstm_cell_infer = _LSTM_CELL_INFER
    proven = True
    lstm_cell_fwd, lstm_cell_bwd = _CELL_FWD, _CELL_BWD
    lstm_cell_weight_grads = _CELL_WEIGHT_GRADS
    members = True
    wide = True

    def error(self) -> str | None:
        """Say why this machine does not have it; None once it is loaded."""
        return _error()

    @cached_property
    def infer_directly(self) -> Callable[..., Any] | None:
        """What computes plain calls without an operator."""
        return self._direct[0]

    @cached_property
    def infer_quantized(self) -> Callable[..., Any] | None:
        """The same with quantised weights."""
        return self._direct[1]

    @cached_property
    def _direct(self) -> list[Callable[..., Any] | None]:
        return infer_functions(_DIRECT) if self.error() is None else [None, None]

    def detail(self) -> str:
        """Describe in a line what is there."""
        return f"compiled kernels, {extension.isa()}: float32/64, bfloat16, float16"

    def kernel(self) -> str:
        """Name the instruction set."""
        return extension.isa()

    def obstacle(self, spec: LayerSpec, x: Tensor) -> str | None:
        """Say why it cannot compute a layer of an input like x; None if it can."""
        if not x.is_cpu:
            return f"the input is on {x.device}, the cpu kernels need it on the CPU"
        if x.dtype not in _DTYPES:
            return f"the cpu kernels have no {x.dtype}"
        return self.error()

    def takes_plain(self, spec: LayerSpec, sequences: Sequences) -> bool:
        """Whether the two methods that follow compute a layer."""
        return spec.is_lstm and not spec.is_extended and self.error() is None

    def lstm_plain_fwd(
        self,
        x: Tensor,
        weights: Sequence[Tensor],
        spec: LayerSpec,
        h0: Tensor | None,
        c0: Tensor | None,
        sequences: Sequences,
        cache: Any,
    ) -> Any:
        """Compute a layer in training."""
        shape = _steps_and_batch(x, h0, sequences.batch_sizes)
        packed = self.packed_weights(cache, "forward", weights, spec, shape)
        return _PLAIN_FWD(x, weights, spec.directions, h0, c0, *sequences, packed)

    def lstm_plain_bwd(
        self,
        x: Tensor,
        weights: Sequence[Tensor],
        spec: LayerSpec,
        h0: Tensor | None,
        c0: Tensor | None,
        sequences: Sequences,
        cache: Any,
        *rest: Any,
    ) -> Any:
        """Compute the gradients of a layer."""
        shape = _steps_and_batch(x, h0, sequences.batch_sizes)
        packed = self.packed_weights(cache, "backward", weights, spec, shape)
        if x.element_size() > 2:
            return _PLAIN_BWD(x, weights, spec.directions, h0, c0, *rest, *sequences, packed)
        *kept, dy, dh_n, dc_n, dx, dh0, dc0, dweights = rest
        states = [None if t is None else t.float() for t in (dh_n, dc_n)]
        arguments = *kept, dy, *states, dx, dh0, dc0, dweights
        found = _PLAIN_BWD(x, weights, spec.directions, h0, c0, *arguments, *sequences, packed)
        return [t.to(x.dtype) for t in found]

    def describe(self, spec: LayerSpec, T: int, B: int, x: Tensor) -> str:
        """Describe how the threads of this process would share a layer."""
        return plan(spec, T, B, torch.get_num_threads())

    def regime(self, spec: LayerSpec, T: int, B: int, x: Tensor) -> str:
        """Tell calls of a few steps, which read the weights as they are, from longer ones."""
        return "short" if T <= _SHORT else "long"

    def trials(self, x: Tensor) -> Sequence[tuple[Callable[[], Any], dict[str, int]]]:
        """Return a short call and a long one; many sequences, and units that no vector divides."""
        return ((nullcontext, {"T": 3}), (nullcontext, {}), (nullcontext, {"B": 37, "H": 33}))

    def packed_weights(
        self,
        cache: Any,
        purpose: str,
        weights: Sequence[Tensor],
        spec: LayerSpec,
        shape: tuple[int, int],
    ) -> Tensor | None:
        """Return the buffer in which the kernels keep these weights in their own order.

        A kernel compares what is there with the bytes of the weights at every call, so it sees
        any edit. None without a cache, in compiled code, and for kernels that read the weights as
        they are.
        """
        if cache is None or torch.compiler.is_compiling():
            return None
        dtype = weights[0].dtype
        size = _cache_bytes(purpose, *shape, spec, dtype is torch.float64)
        if not size:
            return None
        buffer = cache.get("packed")
        if buffer is None or buffer.shape[0] < size:
            cache.clear()  # two at a time would be too many
            buffer = torch.zeros(size, dtype=torch.uint8, device=_DEVICE)
            if type(buffer) is not Tensor:  # a fake tensor must not outlive the mode that made it
                return None
            cache["packed"] = buffer
        return buffer


def _steps_and_batch(x: Tensor, h0: Tensor | None, batch_sizes: Tensor | None) -> tuple[int, int]:
    """Return T and B of dense rows, or of packed ones."""
    if batch_sizes is None:
        return x.shape[0], x.shape[1]
    return batch_sizes.shape[0], int(batch_sizes[0]) if h0 is None else h0.shape[1]


@lru_cache(maxsize=4096)  # looked up in every call
def _cache_bytes(purpose: str, steps: int, batch: int, spec: LayerSpec, double: bool) -> int:
    """Return the size of the buffer that a pass over so many rows needs; 0 for none."""
    sizes = spec.input_size, spec.hidden_size, spec.proj_size, spec.directions
    return _CACHE_BYTES(purpose, steps, batch, *sizes, spec.gates, double)


@constant  # Dynamo would trace the loading: it ignores the cache
def _error() -> str | None:
    return extension.error()


def plan(spec: LayerSpec, T: int, B: int, threads: int, machine: Sequence[int] = ()) -> str:
    """Describe in a line how the kernels spread one layer over at most `threads` threads.

    Args:
        machine: bytes of L2 of a core and of L3, and 1 if some cores are slower than others, else
            0. Where it is empty: this machine, whose free cores bound the threads too.
    """
    extension.load()
    # Units with one gate are as much work as a quarter of so many with four.
    units = -(-spec.hidden_size * spec.gates // 4)
    sizes = spec.input_size, units, spec.proj_size, spec.directions
    return _PLAN(T, B, *sizes, threads, list(machine))


CPU = register(CpuBackend())
operators.load_on_first_use(_OPERATORS, extension.error, CPU.name)
