"""What the quantised modules share: their buffers, and the ways from and to float."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from fastlstm.convert import class_name
from fastlstm.quantized import packing
from fastlstm.spec import LayerSpec

__all__ = ["DTYPES", "Quantized"]

DTYPES = {"int8": torch.int8, "bfloat16": torch.bfloat16}


class Quantized(nn.Module):
    """A stack of layers whose weights are small; it computes on CPUs, in inference.

    All that it holds are buffers, in the order in which the kernels read them
    (:mod:`fastlstm.quantized.packing`), for each layer and direction:

    - ``weight_ih`` and ``weight_hh``: panels of the weights;
    - ``rows``: numbers of each row of the weights. With int8 weights these are the scale and the
      sum of its integers in ``weight_ih``, both in ``weight_hh``, and the bias, which is the sum
      of both biases. With bfloat16 weights they are the power of two of the largest number in
      ``weight_ih``, that in ``weight_hh``, and the bias;
    - ``weight_hr`` and ``rows_hr`` of a projection: scale and sum, or the power of two.

    Attributes:
        dtype: "int8" or "bfloat16".
    """

    def __init__(self, dtype: str, mode: str, bias: bool, specs: tuple[LayerSpec, ...]) -> None:
        super().__init__()
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be 'int8' or 'bfloat16', got {dtype!r}")
        self.dtype, self.mode, self.bias = dtype, mode, bias
        self._names: list[str] = []
        for suffix, spec in self._places(specs):
            H, P, G = spec.hidden_size, spec.state_size, spec.gates
            self._add("weight_ih" + suffix, self._panels(G, H, spec.input_size))
            self._add("weight_hh" + suffix, self._panels(G, H, P))
            empty = torch.zeros(G * H)
            numbers = [empty] * (5 if dtype == "int8" else 3)
            self._add("rows" + suffix, packing.pack_rows(numbers, G))
            if spec.proj_size:
                self._add("weight_hr" + suffix, self._panels(1, P, H))
                numbers = [torch.zeros(P)] * (2 if dtype == "int8" else 1)
                self._add("rows_hr" + suffix, packing.pack_rows(numbers, 1))
        first = specs[0]
        self._config = (
            first.gates,
            mode == "RNN_RELU",
            first.input_size,
            first.hidden_size,
            first.proj_size,
            len(specs),
            first.directions,
        )

    _buffers: dict[str, Any]

    def specs(self) -> tuple[LayerSpec, ...]:
        """Return what each layer is."""
        raise NotImplementedError

    def _add(self, name: str, buffer: Tensor) -> None:
        self.register_buffer(name, buffer)
        self._names.append(name)

    def _panels(self, gates: int, H: int, K: int) -> Tensor:
        return packing.to_panels(torch.zeros(gates * H, K, dtype=DTYPES[self.dtype]), gates)

    def _places(self, specs: tuple[LayerSpec, ...]) -> Iterator[tuple[str, LayerSpec]]:
        """The suffix of each layer and direction in the names of buffers, and what it is."""
        for k, spec in enumerate(specs):
            for direction in ("", "_reverse")[: spec.directions]:
                yield f"_l{k}{direction}", spec

    def _weights(self) -> tuple[Any, ...]:
        return tuple(map(self._buffers.__getitem__, self._names))

    @cached_property
    def _take(self) -> Callable[[Mapping[str, Any]], tuple[Any, ...]]:
        """What takes the weights out of the buffers faster, by half a microsecond of a step."""
        return itemgetter(*self._names)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a file holds: what it takes to load it does not depend on calls before."""
        return {name: value for name, value in self.__dict__.items() if name != "_take"}

    # ---- from and to float ----------------------------------------------------------------

    def _read(self, source: nn.Module) -> None:
        """Quantise the weights of a float module whose layers are as those of this one."""
        for suffix, spec in self._places(self.specs()):
            w = {
                name: self._weight(source, name + suffix)
                for name in (
                    *("weight_ih", "weight_hh"),
                    *(("bias_ih", "bias_hh") if spec.bias else ()),
                    *(("weight_hr",) if spec.proj_size else ()),
                )
            }
            none = torch.zeros(spec.gates * spec.hidden_size)
            bias = w["bias_ih"] + w["bias_hh"] if spec.bias else none
            ih = self._set("weight_ih" + suffix, w["weight_ih"], spec.gates)
            hh = self._set("weight_hh" + suffix, w["weight_hh"], spec.gates)
            rows = packing.pack_rows([*ih, *hh, bias], spec.gates)
            self._buffers["rows" + suffix] = rows
            if spec.proj_size:
                numbers = self._set("weight_hr" + suffix, w["weight_hr"], 1)
                self._buffers["rows_hr" + suffix] = packing.pack_rows(numbers, 1)

    def _weight(self, source: nn.Module, name: str) -> Tensor:
        w = getattr(source, name.removesuffix("_l0") if self._is_cell else name).detach()
        stored = torch.bfloat16 if self.dtype == "bfloat16" and w.dim() > 1 else torch.float32
        what = ""
        if w.is_meta:
            what = "is on the meta device"
        elif not w.isfinite().all():
            what = "has infinite numbers or NaN"
        elif not w.to(stored).isfinite().all():
            what = f"has numbers that are too large for {stored}"
        if what:
            raise ValueError(f"quantize: {name} of this {class_name(type(source))} {what}")
        return w.float().cpu()

    _is_cell = False

    def _set(self, name: str, w: Tensor, gates: int) -> list[Tensor]:
        """Store a matrix; return the numbers of its rows that go with it."""
        if self.dtype == "bfloat16":
            small = w.to(torch.bfloat16)
            self._buffers[name] = packing.to_panels(small, gates)
            return [packing.powers_of_rows(small)]
        q, scale = packing.quantize_rows(w)
        self._buffers[name] = packing.to_panels(q, gates)
        return [scale, q.sum(1, dtype=torch.int64).float()]

    @torch.no_grad()
    def _write(self, target: nn.Module) -> None:
        """Give a float module the weights of this one."""
        for suffix, spec in self._places(self.specs()):
            for name, w in self._floats(suffix, spec).items():
                getattr(target, name + ("" if self._is_cell else suffix)).copy_(w)

    def _floats(self, suffix: str, spec: LayerSpec) -> dict[str, Tensor]:
        """Return the weights of a layer and direction as float32; all bias is in bias_ih."""
        H, P, I, G = spec.hidden_size, spec.state_size, spec.input_size, spec.gates
        numbers = packing.from_rows(self._buffers["rows" + suffix], G, H)
        found = {
            "weight_ih": self._matrix("weight_ih" + suffix, G, H, I, numbers),
            "weight_hh": self._matrix("weight_hh" + suffix, G, H, P, numbers[2:]),
        }
        if spec.bias:
            found |= {"bias_ih": numbers[-1], "bias_hh": torch.zeros_like(numbers[-1])}
        if spec.proj_size:
            rows, scales = self._buffers["rows_hr" + suffix], []
            if self.dtype == "int8":
                scales = packing.from_rows(rows, 1, P)
            found["weight_hr"] = self._matrix("weight_hr" + suffix, 1, P, H, scales)
        return found

    def _matrix(self, name: str, gates: int, H: int, K: int, numbers: Sequence[Tensor]) -> Tensor:
        """Return a matrix as float32; the first of `numbers` is its scale, if it has one."""
        w = packing.from_panels(self._buffers[name], gates, H, K).float()
        return w * numbers[0][:, None] if self.dtype == "int8" else w

    # ---- what nn.Module does ----------------------------------------------------------------

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move the buffers; ``half()`` and the like leave their dtypes as they are."""
        for name, buffer in self._buffers.items():
            moved = fn(buffer)
            moved = moved if moved.dtype is buffer.dtype else buffer.to(moved.device)
            self._buffers[name] = moved.contiguous()  # memory formats are for images
        return self

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any
    ) -> None:
        for name in self._names:
            given = state_dict.get(prefix + name)
            expected = self._buffers[name]
            if isinstance(given, Tensor) and given.dtype is not expected.dtype:
                raise RuntimeError(
                    f"{prefix}{name} of this state dict is {given.dtype}, that of a "
                    f"{type(self).__name__} of {self.dtype} is {expected.dtype}: load a float "
                    "state dict into a float module, then call fastlstm.quantize"
                )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def flatten_parameters(self) -> None:
        """Do nothing: there is no flat copy to keep."""

    def _check(self, x: Tensor, states: Sequence[Any] | None) -> None:
        """Refuse a call whose gradients would be lost, or that is not on the CPU as a whole."""
        given = {"the input": x, **{f"hx[{k}]": s for k, s in enumerate(states or ())}}
        given = {name: t for name, t in given.items() if isinstance(t, Tensor)}
        kind = type(self).__name__
        wanted = torch.is_grad_enabled() and any(t.requires_grad for t in given.values())
        if wanted or any(map(_has_tangent, given.values())):
            raise RuntimeError(
                f"{kind} does not train, and the input requires gradients: call it under "
                "torch.no_grad(), or train the float module that dequantize() returns"
            )
        for name, t in (given | self._buffers).items():
            if not t.is_cpu:
                raise RuntimeError(
                    f"{kind} computes on the CPU, and {name} is on {t.device}: move it to the CPU"
                )


def _has_tangent(t: Tensor) -> bool:
    """Whether a tensor takes part in forward-mode differentiation."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return False
    return forward_ad.unpack_dual(t).tangent is not None
