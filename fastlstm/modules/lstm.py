"""Modules to put in the place of those of ``torch.nn``: LSTM, LSTMCell and RNN."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fastlstm import convert
from fastlstm.autograd import Cache
from fastlstm.backends import Demand, runs_as_is
from fastlstm.checks import check_input, check_noise, check_pair, check_states
from fastlstm.functional import State, infer, lstm, lstm_cell, rnn

__all__ = ["LSTM", "RNN", "LSTMCell"]

_CELL_NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


class _Layers(nn.RNNBase):
    """What LSTM and RNN share.

    They subclass ``nn.RNNBase`` and not ``nn.LSTM`` or ``nn.RNN`` because ``torch.compile``
    refuses these. The weights are read at every call, so parametrizations, ``weight_norm``,
    ``torch.func.functional_call``, assignments and edits of ``.data`` all take effect.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._caches = [Cache() for _ in range(self.num_layers)]

    @property
    def _D(self) -> int:
        return 2 if self.bidirectional else 1

    def _inputs(self, projected: int) -> tuple[int, ...]:
        """The input size of each layer."""
        return self.input_size, *(self._D * projected,) * (self.num_layers - 1)

    def _settings(self) -> dict[str, Any]:
        """The arguments that both functions have."""
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
        """hx, whose states have these sizes, in the order of the packed sequences."""
        if any(option is not None for option in options):
            raise ValueError(
                f"{self._get_name()}: lengths and reset have no meaning for a PackedSequence: "
                "pad the input"
            )
        order = input.sorted_indices
        rows = self.num_layers * self._D
        if hx is None and order is not None and torch.compiler.is_compiling():
            # Inductor stumbles over a B that is a value, that of batch_sizes[0], and not a size.
            return tuple(input.data.new_zeros(rows, order.shape[0], n) for n in sizes)
        if hx is None or order is None:
            return None if hx is None else tuple(hx)
        shapes = [(rows, order.shape[0], n) for n in sizes]
        check_states(self._get_name(), hx, shapes, packed=True)
        return tuple(state.index_select(1, order) for state in hx)

    def flatten_parameters(self) -> None:
        """Do nothing: weights are read where they are, there is no flat copy to keep."""

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        state.pop("_caches", None)
        state.pop("_stream", None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._caches = [Cache() for _ in range(self.num_layers)]


class LSTM(_Layers):
    """``torch.nn.LSTM``: the same arguments, parameters, initial values and results, and more.

    Args:
        input_size: I, features of the input.
        hidden_size: H, features of the state.
        num_layers: L, each layer reads the outputs of the one before.
        bias: whether the gates have biases.
        batch_first: input and output are ``[B, T, ...]`` instead of ``[T, B, ...]``.
        dropout: probability of zeroing an output of any layer but the last, in training.
        bidirectional: D is 2 if True, else 1.
        proj_size: P, features of the output of each direction; 0 for no projection (P = H).
        device: of the parameters.
        dtype: of the parameters; float32, float64, bfloat16 or float16.
        forget_bias: initial bias of the forget gate, the sum of its two; None for that of
            ``nn.LSTM``.
        recurrent_dropout: probability of zeroing an element of h on its way into W_hh, in
            training; of the same elements at every step of a sequence (Gal & Ghahramani, 2016).
        weight_dropout: probability of zeroing an element of W_hh, in training; of the same ones
            in a whole call (Merity et al., 2018).
        zoneout: probabilities ``(of c, of h)``, below 1, that an element keeps its value in a
            step; in evaluation both values are mixed in this proportion (Krueger et al., 2017).
        layer_norm: normalise W_ih x and W_hh h over their 4H elements, and c over its H on its
            way into h (Ba et al., 2016); adds the gains ``weight_ln_ih``, ``weight_ln_hh``
            ``[4H]`` and ``weight_ln_c`` ``[H]`` and the bias ``bias_ln_c`` ``[H]``.
        peephole: i and f also see c of the step before, o that of its own (Gers et al., 2002);
            adds ``weight_ch`` ``[3H]``, of i, f and o.
        recompute: keep only h and c of every step for backward, which computes the gates again:
            a third of the memory.

    The names of parameters end as those of ``nn.LSTM`` do: ``weight_ch_l0_reverse``.

    Raises:
        TypeError, ValueError: as ``nn.LSTM``; ValueError for a probability out of range, and for
            a forget_bias without biases.
    """

    # What an nn.LSTM lacks when it is converted, and what an older pickle lacks.
    forget_bias: float | None = None
    recurrent_dropout: float = 0.0
    weight_dropout: float = 0.0
    zoneout: tuple[float, float] = (0.0, 0.0)
    layer_norm: bool = False
    peephole: bool = False
    recompute: bool = False

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        forget_bias: float | None = None,
        recurrent_dropout: float = 0.0,
        weight_dropout: float = 0.0,
        zoneout: tuple[float, float] = (0.0, 0.0),
        layer_norm: bool = False,
        peephole: bool = False,
        recompute: bool = False,
    ) -> None:
        super().__init__(
            "LSTM",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            device,
            dtype,
        )
        if forget_bias is not None and not bias:
            raise ValueError(f"LSTM: forget_bias={forget_bias} needs bias=True")
        check_noise(recurrent_dropout, weight_dropout, zoneout)
        self.forget_bias = forget_bias
        self.recurrent_dropout = recurrent_dropout
        self.weight_dropout = weight_dropout
        self.zoneout = (float(zoneout[0]), float(zoneout[1]))
        self.layer_norm = layer_norm
        self.peephole = peephole
        self.recompute = recompute
        if layer_norm or peephole:
            self._add_parameters(device, dtype)
        if layer_norm or peephole or forget_bias is not None:
            self._reset_cell()

    def _add_parameters(
        self, device: torch.device | str | int | None, dtype: torch.dtype | None
    ) -> None:
        H = self.hidden_size
        extra = {"weight_ch": 3 * H} if self.peephole else {}
        if self.layer_norm:
            extra |= {
                "weight_ln_ih": 4 * H,
                "weight_ln_hh": 4 * H,
                "weight_ln_c": H,
                "bias_ln_c": H,
            }
        for group in self._all_weights:
            suffix = group[0].removeprefix("weight_ih")
            for name, size in extra.items():
                parameter = nn.Parameter(torch.empty(size, device=device, dtype=dtype))
                self.register_parameter(name + suffix, parameter)
                group.append(name + suffix)
        self._flat_weights_names = [name for group in self._all_weights for name in group]
        self._init_flat_weights()

    def reset_parameters(self) -> None:
        """Draw all parameters anew, as ``nn.LSTM`` does; gains become 1, their biases 0."""
        super().reset_parameters()
        self._reset_cell()

    @torch.no_grad()
    def _reset_cell(self) -> None:
        """The parameters that are not as ``nn.LSTM`` would have them."""
        H = self.hidden_size
        for name, parameter in self.named_parameters(recurse=False):
            if name.startswith("weight_ch"):
                nn.init.uniform_(parameter, -(H**-0.5), H**-0.5)
            elif "_ln_" in name:
                nn.init.constant_(parameter, float(name.startswith("weight")))
            elif name.startswith("bias") and self.forget_bias is not None:
                parameter[H : 2 * H] = self.forget_bias if "_ih_" in name else 0.0

    def demand(self) -> Demand:
        """What the layers need of a backend."""
        masked = self.training and self.recurrent_dropout > 0
        cell = self.peephole, self.layer_norm, masked, self.zoneout
        projected = self.proj_size or self.hidden_size
        sizes = self._inputs(projected), self.hidden_size, projected, self._D
        return Demand("LSTM", *cell, *sizes, self.proj_size > 0)

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: State | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
        return_cell_states: bool = False,
    ) -> Any:
        """Run the sequence; as ``nn.LSTM``, and with the keywords that it lacks.

        Args:
            input: ``[T, B, I]``, ``[B, T, I]`` with ``batch_first``, ``[T, I]`` without a batch,
                or a ``PackedSequence``, sorted or not.
            hx: ``(h_0 [L*D, B, P], c_0 [L*D, B, H])``, without B for input without a batch;
                None for zeros.
            lengths: integers ``[B]`` in 0..T, on any device, in any order; see
                :func:`fastlstm.functional.lstm`.
            reset: bool ``[T, B]``, ``[B, T]`` with ``batch_first``; True zeroes that row's state
                before the step.
            return_cell_states: also return ``c_all [T, B, D*H]``, the last layer's c at every
                step, laid out (or packed) as the output.

        Returns:
            ``(y, (h_n, c_n))`` or ``(y, (h_n, c_n), c_all)``: y is ``[T, B, D*P]``, or
            ``[B, T, D*P]``, ``[T, D*P]`` or a ``PackedSequence``, as input; h_n and c_n are
            shaped as hx. Under autocast all of them have autocast's dtype.

        Raises:
            ValueError, RuntimeError, TypeError: see :func:`fastlstm.functional.lstm`.
        """
        more = lengths is not None or reset is not None or return_cell_states
        if not (more or torch.is_grad_enabled()) and isinstance(input, Tensor):
            result = self._infer(input, hx)
            if result is not None:
                return result
        weights = _tensors(self, self._flat_weights_names)
        settings = self._settings()
        settings.update(
            return_cell_states=return_cell_states,
            recurrent_dropout=self.recurrent_dropout,
            weight_dropout=self.weight_dropout,
            zoneout=self.zoneout,
            layer_norm=self.layer_norm,
            peephole=self.peephole,
            recompute=self.recompute,
        )
        if isinstance(input, Tensor):
            return lstm(
                input,
                hx,
                weights,
                batch_first=self.batch_first,
                lengths=lengths,
                reset=reset,
                **settings,
            )
        check_input("LSTM", input)
        if hx is not None:
            hx = check_pair(hx, 3)
        sizes = (self.proj_size or self.hidden_size, self.hidden_size)
        states = self._unpack(input, hx, sizes, (lengths, reset))
        rows, batch_sizes, order, restore = input
        y, (h_n, c_n), *c_all = lstm(rows, states, weights, batch_sizes=batch_sizes, **settings)
        if restore is not None:
            h_n, c_n = h_n.index_select(1, restore), c_n.index_select(1, restore)
        packed = (PackedSequence(t, batch_sizes, order, restore) for t in (y, *c_all))
        return next(packed), (h_n, c_n), *packed

    def _infer(self, x: Tensor, hx: Any) -> tuple[Tensor, State] | None:
        """One plain layer without gradients, for latency; None for what `lstm` has to look at."""
        if not runs_as_is(x) or x.dim() != 3 or (stream := self._stream) is None:
            return None
        take, directions, cache, batch_first = stream
        try:
            weights = take(self._parameters)
        except KeyError:
            weights = _tensors(self, self._flat_weights_names)
        if batch_first:
            x = x.transpose(0, 1)
        result = infer(x, hx, weights, cache, directions)
        if result is None:
            return None
        y, h_n, c_n = result
        return y.transpose(0, 1) if batch_first else y, (h_n, c_n)

    @cached_property
    def _stream(self) -> tuple[Any, int, Cache, bool] | None:
        """What `_infer` has to know of the settings, None if it cannot compute them."""
        noisy = self.recurrent_dropout or self.weight_dropout or self.zoneout != (0.0, 0.0)
        if self.num_layers > 1 or self.peephole or self.layer_norm or noisy:
            return None
        take = itemgetter(*self._flat_weights_names)
        return take, self._D, self._caches[0], self.batch_first

    def __setattr__(self, name: str, value: Any) -> None:
        self.__dict__.pop("_stream", None)  # every setting is looked at again
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        """The arguments of nn.LSTM, then those of this class that are not at their defaults."""
        own = (
            "forget_bias", "recurrent_dropout", "weight_dropout", "zoneout",
            "layer_norm", "peephole", "recompute",
        )  # fmt: skip
        changed = (
            f", {name}={getattr(self, name)}"
            for name in own
            if getattr(self, name) != getattr(LSTM, name)
        )
        return str(super().extra_repr()) + "".join(changed)

    @classmethod
    def from_torch(cls, source: nn.LSTM) -> LSTM:
        """A module that shares the parameters of an ``nn.LSTM``; see :mod:`fastlstm.convert`."""
        return convert.convert(source, nn.LSTM, cls)

    def to_torch(self) -> nn.LSTM:
        """An ``nn.LSTM`` that shares these parameters; see :mod:`fastlstm.convert`.

        Raises:
            ValueError: an ``nn.LSTM`` cannot compute the same; dropouts that it lacks do not
                matter in evaluation.
        """
        lacking = ["layer_norm"] * self.layer_norm + ["peephole"] * self.peephole
        lacking += ["zoneout"] * any(self.zoneout)
        if self.training:
            lacking += ["recurrent_dropout"] * (self.recurrent_dropout > 0)
            lacking += ["weight_dropout"] * (self.weight_dropout > 0)
        if lacking:
            advice = "" if lacking[0] in ("layer_norm", "peephole", "zoneout") else ": call eval()"
            raise ValueError(f"to_torch: nn.LSTM has no {', '.join(lacking)}{advice}")
        return convert.convert(self, LSTM, nn.LSTM)


class RNN(_Layers):
    """``torch.nn.RNN``: the same arguments, parameters, initial values and results, and more.

    Args:
        input_size: I, features of the input.
        hidden_size: H, features of the state.
        num_layers: L, each layer reads the outputs of the one before.
        nonlinearity: "tanh" or "relu".
        bias: whether there are biases.
        batch_first: input and output are ``[B, T, ...]`` instead of ``[T, B, ...]``.
        dropout: probability of zeroing an output of any layer but the last, in training.
        bidirectional: D is 2 if True, else 1.
        device: of the parameters.
        dtype: of the parameters; float32, float64, bfloat16 or float16.

    Raises:
        TypeError, ValueError: as ``nn.RNN``.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        modes = {"tanh": "RNN_TANH", "relu": "RNN_RELU"}
        if nonlinearity not in modes:
            raise ValueError(f"RNN: nonlinearity must be 'tanh' or 'relu', got {nonlinearity!r}")
        super().__init__(
            modes[nonlinearity],
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            0,
            device,
            dtype,
        )
        self.nonlinearity = nonlinearity

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.nonlinearity = self.mode.removeprefix("RNN_").lower()  # nn.RNN once kept only mode

    def demand(self) -> Demand:
        """What the layers need of a backend."""
        H = self.hidden_size
        sizes = self._inputs(H), H, H, self._D
        return Demand("RNN", False, False, False, (0.0, 0.0), *sizes, projects=False)

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """Run the sequence; as ``nn.RNN``, and with the keywords that it lacks.

        Args:
            input: ``[T, B, I]``, ``[B, T, I]`` with ``batch_first``, ``[T, I]`` without a batch,
                or a ``PackedSequence``, sorted or not.
            hx: ``h_0 [L*D, B, H]``, without B for input without a batch; None for zeros.
            lengths: as of :class:`LSTM`.
            reset: as of :class:`LSTM`.

        Returns:
            ``(y, h_n)``: y is ``[T, B, D*H]``, or ``[B, T, D*H]``, ``[T, D*H]`` or a
            ``PackedSequence``, as input; h_n is shaped as hx.

        Raises:
            ValueError, RuntimeError, TypeError: see :func:`fastlstm.functional.rnn`.
        """
        settings = self._settings()
        settings["nonlinearity"] = self.nonlinearity
        weights = _tensors(self, self._flat_weights_names)
        if isinstance(input, Tensor):
            return rnn(
                input,
                hx,
                weights,
                batch_first=self.batch_first,
                lengths=lengths,
                reset=reset,
                **settings,
            )
        check_input("RNN", input)
        states = self._unpack(
            input, None if hx is None else (hx,), (self.hidden_size,), (lengths, reset)
        )
        rows, batch_sizes, order, restore = input
        h0 = None if states is None else states[0]
        y, h_n = rnn(rows, h0, weights, batch_sizes=batch_sizes, **settings)
        if restore is not None:
            h_n = h_n.index_select(1, restore)
        return PackedSequence(y, batch_sizes, order, restore), h_n

    @classmethod
    def from_torch(cls, source: nn.RNN) -> RNN:
        """A module that shares the parameters of an ``nn.RNN``; see :mod:`fastlstm.convert`."""
        return convert.convert(source, nn.RNN, cls)

    def to_torch(self) -> nn.RNN:
        """An ``nn.RNN`` that shares these parameters; see :mod:`fastlstm.convert`."""
        return convert.convert(self, RNN, nn.RNN)


class LSTMCell(nn.RNNCellBase):
    """``torch.nn.LSTMCell``: one step, with the same arguments, parameters and results.

    Args:
        input_size: I, features of the input.
        hidden_size: H, features of the state.
        bias: whether the gates have biases.
        device: of the parameters.
        dtype: of the parameters; float32, float64, bfloat16 or float16.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, 4, device, dtype)
        self._cache = Cache()

    def demand(self) -> Demand:
        """What a step needs of a backend."""
        H = self.hidden_size
        sizes = (self.input_size,), H, H, 1
        return Demand("LSTM", False, False, False, (0.0, 0.0), *sizes, projects=False)

    def forward(self, input: Tensor, hx: State | None = None) -> State:
        """Take one step.

        Args:
            input: ``[B, I]``, or ``[I]`` without a batch.
            hx: ``(h [B, H], c [B, H])``, without B for input without a batch; None for zeros.

        Returns:
            The next ``(h, c)``, shaped as hx.

        Raises:
            ValueError, RuntimeError: see :func:`fastlstm.functional.lstm_cell`.
        """
        weights = _tensors(self, _CELL_NAMES if self.bias else _CELL_NAMES[:2])
        if not torch.is_grad_enabled() and input.dim() == 2 and runs_as_is(input):
            result = infer(input, hx, weights, self._cache)
            if result is not None:
                return result
        cache = None if torch.compiler.is_compiling() else self._cache  # as in _settings
        return lstm_cell(input, hx, weights, cache=cache)

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        state.pop("_cache", None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._cache = Cache()

    @classmethod
    def from_torch(cls, source: nn.LSTMCell) -> LSTMCell:
        """A cell that shares the parameters of an ``nn.LSTMCell``; see :mod:`fastlstm.convert`."""
        return convert.convert(source, nn.LSTMCell, cls)

    def to_torch(self) -> nn.LSTMCell:
        """An ``nn.LSTMCell`` that shares these parameters; see :mod:`fastlstm.convert`."""
        return convert.convert(self, LSTMCell, nn.LSTMCell)


def _tensors(module: nn.Module, names: Sequence[str]) -> list[Tensor]:
    parameters: dict[str, Any] = module._parameters
    try:  # an attribute takes ten times as long, but knows parametrizations and weight_norm
        return list(map(parameters.__getitem__, names))
    except KeyError:
        return [getattr(module, name) for name in names]
