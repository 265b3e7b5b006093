"""The words that all parts of the library share: what a layer is, what a call takes and gives.

Letters, here and everywhere: T time steps, B batch, I input size, H hidden size, P size of the
state h (the projected size, H without a projection), D directions, N rows of a packed sequence.
Gates are i, f, g, o, in this order.

How the rows of three sequences of 4, 2 and 1 steps lie in memory (a letter is a sequence, a digit
its step, a dot is padding):

- padded, ``[T, B, ...]`` with ``lengths = [4, 2, 1]``::

      step 0   a0 b0 c0
      step 1   a1 b1 .
      step 2   a2 .  .
      step 3   a3 .  .

- packed, ``[N, ...]`` with ``batch_sizes = [3, 2, 1, 1]``: the same rows without the dots, step
  after step: ``a0 b0 c0  a1 b1  a2  a3``. The longest sequence comes first, so the sequences that
  have a step are always the first ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

__all__ = [
    "DENSE",
    "NO_NOISE",
    "Gradients",
    "Incoming",
    "LayerSpec",
    "Noise",
    "Outputs",
    "Saved",
    "Sequences",
    "State",
    "Weights",
]


class LayerSpec(NamedTuple):
    """One layer in all its directions: everything but its numbers and its batch."""

    mode: str  # "LSTM", "RNN_TANH" or "RNN_RELU", as ``nn.RNNBase.mode``
    input_size: int  # I
    hidden_size: int  # H
    proj_size: int = 0  # P of a layer with a projection, 0 without one
    directions: int = 1  # D
    bias: bool = True
    # The options of an LSTM cell beyond the plain one, that of nn.LSTM:
    peephole: bool = False  # the gates see c (Gers et al., 2002)
    layer_norm: bool = False  # products and c are normalised (Ba et al., 2016)
    recurrent_dropout: bool = False  # h is masked on its way into w_hh (Gal & Ghahramani, 2016)
    zoneout: tuple[float, float] = (0.0, 0.0)  # probability that c, h stay (Krueger et al., 2017)

    @property
    def is_lstm(self) -> bool:
        """Whether it is a layer of an LSTM, and not of an ``nn.RNN``."""
        return self.mode == "LSTM"

    @property
    def gates(self) -> int:
        """How many rows of the weights a unit has: 4 in an LSTM, 1 in an RNN."""
        return 4 if self.mode == "LSTM" else 1

    @property
    def state_size(self) -> int:
        """P, the size of h."""
        return self.proj_size or self.hidden_size

    @property
    def is_extended(self) -> bool:
        """Whether the cell has an option that ``nn.LSTM`` lacks."""
        options = self.peephole or self.layer_norm or self.recurrent_dropout
        return options or self.zoneout != (0.0, 0.0)

    @property
    def weights_per_direction(self) -> int:
        """How many weights each direction has; :class:`Weights` has their order."""
        plain = 2 + 2 * self.bias + (self.proj_size > 0)
        return plain + self.peephole + 4 * self.layer_norm

    @classmethod
    def of(
        cls, mode: str, weights: Sequence[Tensor], directions: int, **options: Any
    ) -> LayerSpec:
        """Read the sizes from the flat list of a layer's weights.

        Args:
            mode: "LSTM", "RNN_TANH" or "RNN_RELU".
            weights: D groups in the order of :class:`Weights`.
            directions: D.
            options: peephole, layer_norm, recurrent_dropout and zoneout.
        """
        extra = options.get("peephole", False) + 4 * options.get("layer_norm", False)
        plain = len(weights) // directions - extra
        rows, P = weights[1].shape[-2:]
        H = rows // 4 if mode == "LSTM" else rows
        projection = P if plain % 2 else 0
        I = weights[0].shape[-1]
        return cls(mode, I, H, projection, directions, plain > 3, **options)


class Weights(NamedTuple):
    """The weights of one direction, in the order in which operators take them.

    Shapes are those of an LSTM; an ``nn.RNN`` has ``[H, ...]`` instead of ``[4H, ...]``. Gradients
    of weights come in the same shape; one gradient stands for both biases then, as ``b_ih``.
    """

    w_ih: Tensor  # [4H, I]
    w_hh: Tensor  # [4H, P]
    b_ih: Tensor | None = None  # [4H]
    b_hh: Tensor | None = None  # [4H]
    w_hr: Tensor | None = None  # [P, H], the projection
    w_ch: Tensor | None = None  # [3H], the peepholes of i, f and o
    ln_ih: Tensor | None = None  # [4H], gains of the normalised products
    ln_hh: Tensor | None = None  # [4H]
    ln_c: Tensor | None = None  # [H], gain of the normalised c
    b_ln_c: Tensor | None = None  # [H], and its bias

    @classmethod
    def of(cls, flat: Sequence[Any], spec: LayerSpec) -> Weights:
        """Take one direction's share of the flat list of weights apart."""
        rest = iter(flat)
        optional = (
            spec.bias,
            spec.bias,
            spec.proj_size > 0,
            spec.peephole,
            *(spec.layer_norm,) * 4,
        )
        return cls(next(rest), next(rest), *(next(rest) if has else None for has in optional))

    @classmethod
    def split(cls, flat: Sequence[Any], spec: LayerSpec) -> list[Weights]:
        """Take the flat list of a layer's weights apart, one entry for each direction."""
        each = len(flat) // spec.directions
        return [cls.of(flat[at : at + each], spec) for at in range(0, len(flat), each)]


class State(NamedTuple):
    """The state of a layer between two steps; None stands for zeros."""

    h: Tensor | None = None  # [D, B, P]
    c: Tensor | None = None  # [D, B, H]; an nn.RNN has none


class Sequences(NamedTuple):
    """Which steps the sequences of a batch have. All None: T steps each, ``[T, B, ...]``."""

    batch_sizes: Tensor | None = None  # int64 [T] on the CPU: rows are packed
    lengths: Tensor | None = None  # int64 [B] in 0..T: rows are padded
    reset: Tensor | None = None  # bool [T, B]: True zeroes a row's h and c before the step


class Noise(NamedTuple):
    """What is random in a call of an extended cell; None where nothing is."""

    h_mask: Tensor | None = None  # [D, B, P], factors of h on its way into w_hh, float32 or 64
    seed: Tensor | None = None  # int64 [1], of zoneout; None mixes both states instead


class Outputs(NamedTuple):
    """What a forward kernel writes; packed rows have ``[N]`` in the place of ``[T, B]``."""

    y: Tensor  # [T, B, D*P]
    h_n: Tensor  # [D, B, P]
    c_n: Tensor | None = None  # [D, B, H]
    c_all: Tensor | None = None  # [T, B, D*H]
    gates: Tensor | None = None  # [D, T, B, 4H], activated, units in the order of the backend


class Saved(NamedTuple):
    """What a backward kernel gets back of the forward pass's outputs."""

    y: Tensor  # [T, B, D*P]
    c_all: Tensor | None = None  # [T, B, D*H]; an nn.RNN has none
    gates: Tensor | None = None  # [D, T, B, 4H]; None: the backward pass computes them again


class Incoming(NamedTuple):
    """The gradients of a layer's results; None stands for zeros."""

    dy: Tensor | None = None  # [T, B, D*P]
    dh_n: Tensor | None = None  # [D, B, P]
    dc_n: Tensor | None = None  # [D, B, H]
    dc_all: Tensor | None = None  # [T, B, D*H]


class Gradients(NamedTuple):
    """The gradients of a layer's inputs, to be written; None where nobody wants one."""

    dx: Tensor | None = None  # [T, B, I]
    dh0: Tensor | None = None  # [D, B, P]
    dc0: Tensor | None = None  # [D, B, H]
    weights: list[Weights] | None = None  # one entry for each direction


DENSE = Sequences()
NO_NOISE = Noise()
