"""``fastlstm.LSTM``: what ``torch.nn.LSTM`` is, and more."""

from __future__ import annotations

from functools import cached_property
from operator import itemgetter
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.nn.modules import rnn as torch_rnn  # torch.nn.LSTM may be replaced by ours
from torch.nn.utils.rnn import PackedSequence

from fastlstm import convert
from fastlstm.backends import choice
from fastlstm.functional import State, lstm
from fastlstm.kernels.base import Backend
from fastlstm.layer import fast_path
from fastlstm.layer.checks import check_input, check_noise, check_pair
from fastlstm.modules.base import Layers, by_sample, is_by_sample, tensors
from fastlstm.modules.stand_in import drawn
from fastlstm.spec import LayerSpec

__all__ = ["LSTM"]


class LSTM(Layers):
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

    torch_class = torch_rnn.LSTM
    get_expected_cell_size = torch_rnn.LSTM.get_expected_cell_size
    check_forward_args = torch_rnn.LSTM.check_forward_args  # type: ignore[assignment]
    permute_hidden = torch_rnn.LSTM.permute_hidden  # type: ignore[assignment]

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

    def _spec(self) -> LayerSpec:
        """Describe the first layer."""
        return (
            super()
            ._spec()
            ._replace(
                peephole=self.peephole,
                layer_norm=self.layer_norm,
                recurrent_dropout=self.training and self.recurrent_dropout > 0,
                zoneout=self.zoneout,
            )
        )

    @overload
    def forward(
        self,
        input: Tensor,
        hx: State | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
        return_cell_states: Literal[False] = False,
    ) -> tuple[Tensor, State]: ...

    @overload
    def forward(
        self,
        input: Tensor,
        hx: State | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
        return_cell_states: Literal[True],
    ) -> tuple[Tensor, State, Tensor]: ...

    @overload
    def forward(
        self,
        input: PackedSequence,
        hx: State | None = None,
        *,
        return_cell_states: Literal[False] = False,
    ) -> tuple[PackedSequence, State]: ...

    @overload
    def forward(
        self,
        input: PackedSequence,
        hx: State | None = None,
        *,
        return_cell_states: Literal[True],
    ) -> tuple[PackedSequence, State, PackedSequence]: ...

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
        if hx is not None or not isinstance(input, Tensor):
            keywords = {
                "lengths": lengths,
                "reset": reset,
                "return_cell_states": return_cell_states,
            }
            node = drawn(self, (input, hx), keywords)
            if node is not None:
                return node
        weights = tensors(self, self._names)
        if not more and is_by_sample(weights):
            return by_sample(self, input, hx)
        if not (more or self.recompute or self.weight_dropout) and isinstance(input, Tensor):
            plain = self._run_plain(input, hx, weights)
            if plain is not None:
                return plain
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
        """Plain layers without gradients, for latency; None for what `lstm` has to look at."""
        backend = fast_path.fast_backend(x)
        if backend is None or x.dim() != 3 or (settings := self._fast_settings) is None:
            return None
        take, layers, batch_first = settings
        try:
            weights = take(self._parameters)
        except KeyError:
            weights = tensors(self, self._names)
        record = choice.asks
        if record and self._taken.backend(record, backend, x, weights, False) is not backend:
            return None
        if batch_first:
            x = x.transpose(0, 1)
        result = fast_path.infer(backend, x, hx, weights, layers)
        if batch_first and result is not None:
            y, states = result
            return y.transpose_(0, 1), states
        return result

    def _infer_plain(
        self, backend: Backend, x: Tensor, hx: Any, weights: tuple[Tensor, ...]
    ) -> tuple[Tensor, State] | None:
        """The same on a backend that has been chosen."""
        if (settings := self._fast_settings) is None:
            return None
        _, layers, batch_first = settings
        result = fast_path.infer(
            backend, x.transpose(0, 1) if batch_first else x, hx, weights, layers
        )
        if batch_first and result is not None:
            y, states = result
            return y.transpose_(0, 1), states
        return result

    @cached_property
    def _fast_settings(self) -> tuple[Any, fast_path.Layers, bool] | None:
        """What `_infer` has to know of the settings, None if it cannot compute them."""
        between = self.dropout > 0 and self.num_layers > 1
        noisy = self.training and (self.weight_dropout > 0 or between)
        if noisy or self._spec().is_extended:
            return None
        take = itemgetter(*self._names)
        caches = self._caches[: self.num_layers]
        return take, fast_path.Layers.of(self.specs(), caches), self.batch_first

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
        return convert.convert(source, torch_rnn.LSTM, cls)

    def to_torch(self) -> nn.LSTM:
        """An ``nn.LSTM`` that shares these parameters; see :mod:`fastlstm.convert`.

        Raises:
            ValueError: an ``nn.LSTM`` cannot compute the same; dropouts that it lacks do not
                matter in evaluation.
        """
        if lacking := self.beyond_torch():
            advice = "" if lacking[0] in ("layer_norm", "peephole", "zoneout") else ": call eval()"
            raise ValueError(f"to_torch: nn.LSTM has no {', '.join(lacking)}{advice}")
        return convert.convert(self, LSTM, torch_rnn.LSTM)

    def beyond_torch(self) -> list[str]:
        """Return the options, by name, without which ``nn.LSTM`` would compute something else.

        Dropouts do not matter in evaluation.
        """
        lacking = ["layer_norm"] * self.layer_norm + ["peephole"] * self.peephole
        lacking += ["zoneout"] * any(self.zoneout)
        if self.training:
            lacking += ["recurrent_dropout"] * (self.recurrent_dropout > 0)
            lacking += ["weight_dropout"] * (self.weight_dropout > 0)
        return lacking
