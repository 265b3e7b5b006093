"""What the modules share: reading their parameters, packed sequences, and what they keep."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fastlstm.kernels.base import Backend, Cache
from fastlstm.layer.checks import check_states
from fastlstm.layer.options import Options
from fastlstm.layer.plain import Plain, run_plain
from fastlstm.layer.taken import Taken
from fastlstm.layer.whole import plain_backend
from fastlstm.modules.stand_in import StandIn
from fastlstm.spec import LayerSpec

__all__ = ["Layers", "by_sample", "is_by_sample", "tensors"]

_OF_SETTINGS = "_fast_settings", "_plain", "_taken"
_CHOOSE_WEIGHTS = frozenset({"num_layers", "bidirectional", "bias", "_flat_weights_names"})


class Layers(StandIn, nn.RNNBase):
    """A stack of L layers of D directions: what LSTM and RNN share.

    They subclass ``nn.RNNBase`` and not ``nn.LSTM`` or ``nn.RNN`` because ``torch.compile``
    refuses these; ``isinstance`` takes them for one all the same. The weights are read at every
    call, so parametrizations, ``weight_norm``, ``torch.func.functional_call``, assignments and
    edits of ``.data`` all take effect.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._caches = [Cache() for _ in range(self.num_layers)]
        self._read_settings()

    @property
    def _D(self) -> int:
        return 2 if self.bidirectional else 1

    def specs(self) -> tuple[LayerSpec, ...]:
        """Return what each layer is, in training or in evaluation as the module is."""
        first = self._spec()
        deeper = first._replace(input_size=first.directions * first.state_size)
        return first, *(deeper,) * (self.num_layers - 1)

    def _spec(self) -> LayerSpec:
        """Describe the first layer."""
        sizes = self.input_size, self.hidden_size, self.proj_size, self._D
        return LayerSpec(self.mode, *sizes, self.bias)

    def _settings(self) -> dict[str, Any]:
        """Return the arguments that the functions of both kinds have."""
        return {
            "num_layers": self.num_layers,
            "bidirectional": self.bidirectional,
            "dropout": self.dropout,
            "training": self.training,
            # Compiled code would depend on what is in them, and makes no use of it.
            "caches": None if torch.compiler.is_compiling() else self._caches,
        }

    def _unpack(
        self,
        input: PackedSequence,
        hx: Sequence[Tensor] | None,
        sizes: Sequence[int],
        options: Any,
    ) -> tuple[Any, ...] | None:
        """Return hx in the order of the packed sequences.

        Args:
            input: the packed sequences.
            hx: the states as the caller passed them, or None.
            sizes: the last dimension of each state.
            options: lengths and reset, which have no meaning here.
        """
        kind = "LSTM" if self.mode == "LSTM" else "RNN"
        if any(option is not None for option in options):
            raise ValueError(
                f"{kind}: lengths and reset have no meaning for a PackedSequence: pad the input"
            )
        order = input.sorted_indices
        rows = self.num_layers * self._D
        if hx is None and order is not None and torch.compiler.is_compiling():
            # Inductor stumbles over a B that is a value, that of batch_sizes[0], and not a size.
            return tuple(input.data.new_zeros(rows, order.shape[0], n) for n in sizes)
        if hx is None or order is None:
            return None if hx is None else tuple(hx)
        shapes = [(rows, order.shape[0], n) for n in sizes]
        check_states(kind, hx, shapes, packed=True)
        return tuple(state.index_select(1, order) for state in hx)

    def _run_plain(
        self, x: Tensor, hx: Any, weights: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        """Compute a plain call where a backend takes it as it is; None where not.

        Args:
            x: the input.
            hx: a tuple of the states, or None.
            weights: those of all layers.
        """
        if torch.compiler.is_compiling() or (plain := self._plain) is None or x.dim() != 3:
            return None
        backend = plain_backend(x, weights, self._taken)
        if backend is None:
            return None
        if (
            not torch.is_grad_enabled()
            and not (x.is_cpu or backend.infers_on_cpu)
            and backend.lstm_infer
        ):
            return self._infer_plain(backend, x, hx, weights)
        return run_plain(backend, x, hx, weights, plain)

    def _infer_plain(
        self, backend: Backend, x: Tensor, hx: Any, weights: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        """Compute a plain call without gradients by a backend's operator for that; None if not.

        Args:
            backend: it.
            x: ``[T, B, I]``, or ``[B, T, I]`` with batch_first.
            hx: a tuple of the states, or None.
            weights: those of all layers.
        """
        return None

    @cached_property
    def _plain(self) -> Plain | None:
        """What `_run_plain` has to know of the settings, None if it cannot compute them."""
        specs = self.specs()
        if specs[0].is_extended:
            return None
        options = Options(
            self.mode,
            self.num_layers,
            self.bidirectional,
            self.batch_first,
            self.dropout if self.training else 0.0,
            caches=self._caches,
            training=self.training,
        )
        return Plain(specs, options)

    @cached_property
    def _taken(self) -> Taken:
        return Taken(self.specs(), self.num_layers, self.batch_first)

    def flatten_parameters(self) -> None:
        """Do nothing: who wants the weights in one chunk (cuDNN) puts them there at a call."""

    def _read_settings(self) -> None:
        """Note the names of the weights that a call reads.

        As with nn.LSTM, an edit of ``num_layers``, ``bidirectional`` or ``bias`` leaves some out.
        """
        groups = self._all_weights[: self.num_layers * self._D]
        unread = () if self.bias else ("bias_ih", "bias_hh")
        self._names = [n for group in groups for n in group if not n.startswith(unread)]

    def __setattr__(self, name: str, value: Any) -> None:
        for known in _OF_SETTINGS:  # one may have changed
            self.__dict__.pop(known, None)
        super().__setattr__(name, value)
        if name in _CHOOSE_WEIGHTS and "_names" in self.__dict__:
            self._read_settings()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Convert or move the parameters; packed weights of the old ones go."""
        for cache in self._caches:
            cache.clear()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        for own in ("_caches", "_names", *_OF_SETTINGS):
            state.pop(own, None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "_flat_weights" not in state:  # of an old pickle, whose list of weights had other names
            groups = state.get("_all_weights") or state["all_weights"]
            names = [name for group in groups for name in group]
            state = {**state, "_all_weights": groups, "_flat_weights_names": names}
            state["_flat_weights"] = [state["_parameters"].get(name) for name in names]
        super().__setstate__(state)
        self._caches = [Cache() for _ in range(self.num_layers)]
        self._read_settings()


def tensors(module: nn.Module, names: Sequence[str]) -> tuple[Tensor, ...]:
    """Return the parameters of these names, or what a parametrization makes of them."""
    parameters: dict[str, Any] = module._parameters
    try:  # an attribute takes ten times as long, but knows parametrizations and weight_norm
        return tuple(map(parameters.__getitem__, names))
    except KeyError:
        return tuple([getattr(module, name) for name in names])


def is_by_sample(weights: Sequence[Tensor]) -> bool:
    """Whether PyTorch wants the gradient of each sample by ``call_for_per_sample_grads``.

    Its weights refuse every function but those of PyTorch that it knows.
    """
    module = sys.modules.get("torch.nn.utils._expanded_weights.expanded_weights_impl")
    return module is not None and any(isinstance(w, module.ExpandedWeight) for w in weights)


def by_sample(module: Any, input: Any, hx: Any) -> Any:
    """Compute a call whose weights are such, as the module of ``torch.nn`` does without oneDNN."""
    c: Any = torch._C
    enabled = c._get_mkldnn_enabled()
    c._set_mkldnn_enabled(False)
    try:
        return module.to_torch()(input, hx)
    finally:
        c._set_mkldnn_enabled(enabled)
