"""The LSTM, the RNN and the cell as functions, and the loss of TensorFlow's tutorials.

Letters: T time steps, B batch, I input size, H hidden size, P size of h (the projected size, H
without a projection), L layers, D directions, N rows of a packed sequence, C classes.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn.functional import cross_entropy

from fastlstm.layer.checks import check_noise, check_nonlinearity, check_pair, is_pair, size
from fastlstm.layer.options import Options
from fastlstm.layer.overrides import overridable
from fastlstm.layer.stack import run_cell, run_stack
from fastlstm.spec import DENSE, Sequences

__all__ = ["lstm", "lstm_cell", "rnn", "sequence_loss"]

State = tuple[Tensor, Tensor]
Cache = MutableMapping[Any, Tensor]


@overridable
def lstm(
    input: Tensor,
    hx: State | None,
    weights: Sequence[Tensor],
    *,
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    return_cell_states: bool = False,
    recurrent_dropout: float = 0.0,
    weight_dropout: float = 0.0,
    zoneout: tuple[float, float] = (0.0, 0.0),
    layer_norm: bool = False,
    peephole: bool = False,
    recompute: bool = False,
    caches: Sequence[Cache] | None = None,
) -> tuple[Tensor, State] | tuple[Tensor, State, Tensor]:
    """Run L layers of D directions over a sequence, as ``torch.nn.LSTM`` does.

    Args:
        input: ``[T, B, I]``; ``[B, T, I]`` with ``batch_first``; ``[T, I]`` without a batch; or
            the ``[N, I]`` rows of a ``PackedSequence`` when ``batch_sizes`` is given.
        hx: ``(h_0 [L*D, B, P], c_0 [L*D, B, H])``, without B for input without a batch; None
            for zeros. For packed rows it is in their order, longest sequence first.
        weights: in the order of ``nn.LSTM``: for every layer, for every direction,
            ``w_ih [4H, I or D*P]``, ``w_hh [4H, P]``, then ``b_ih [4H]`` and ``b_hh [4H]`` if
            there are biases, then ``w_hr [P, H]`` if there is a projection, then ``w_ch [3H]``
            (of i, f, o) with ``peephole``, then the gains ``ln_ih [4H]``, ``ln_hh [4H]``,
            ``ln_c [H]`` and the bias ``b_ln_c [H]`` with ``layer_norm``. Gates are i, f, g, o.
        num_layers: L.
        bidirectional: D is 2 if True, else 1.
        batch_first: the layout of input, output and reset; never of hx.
        dropout: probability of zeroing an output of any layer but the last, in training.
        training: whether to apply the dropouts, and zoneout at random.
        batch_sizes: ``PackedSequence.batch_sizes``, int64 ``[T]`` on the CPU.
        lengths: integers ``[B]`` (a scalar without a batch) in 0..T, in any order. Output is 0
            from there on and the final states are those at each row's length. The range is
            checked when lengths is on the CPU; elsewhere that would make the device wait, and
            values are clamped to 0..T instead.
        reset: bool ``[T, B]``, ``[B, T]`` with ``batch_first``, ``[T]`` without a batch; True
            zeroes that row's h and c before the step.
        return_cell_states: also return the last layer's c at every step.
        recurrent_dropout: probability of zeroing an element of h on its way into w_hh, in
            training; of the same elements at every step of a sequence (Gal & Ghahramani, 2016).
        weight_dropout: probability of zeroing an element of w_hh, in training; of the same ones
            in the whole call (Merity et al., 2018).
        zoneout: probabilities that an element of c, and of h, keeps its value in a step; without
            training both values are mixed in this proportion (Krueger et al., 2017).
        layer_norm: normalise ``w_ih x`` and ``w_hh h`` over their 4H elements, and c over its H
            on its way into h (Ba et al., 2016).
        peephole: i and f also see c of the step before, o that of its own (Gers et al., 2002).
        recompute: keep only h and c for backward, which then computes the gates again.
        caches: a dict for each layer, in which a backend may keep packed weights.

    Returns:
        ``(y, (h_n, c_n))``, or ``(y, (h_n, c_n), c_all)`` with ``return_cell_states``. y is
        ``[T, B, D*P]``, h_n and c_n are shaped as hx, c_all is ``[T, B, D*H]``; y and c_all are
        laid out as input.

    Raises:
        ValueError: a wrong number of dimensions of input, lengths or reset, a wrong range of
            lengths, a dtype of input that is not that of the weights, or lengths and reset where
            they have no meaning.
        RuntimeError: a wrong size, device or other dtype, T = 0, or a backend that was asked for
            and cannot compute the call.
        TypeError: lengths are not integers or reset is not bool.
    """
    if hx is not None and not is_pair(hx):
        hx = check_pair(hx, input.dim() if batch_sizes is None else 3)
    if recurrent_dropout or weight_dropout or zoneout != (0.0, 0.0):
        check_noise(recurrent_dropout, weight_dropout, zoneout)
        zoneout = (zoneout[0], zoneout[1])
    options = Options(
        "LSTM",
        num_layers,
        bidirectional,
        batch_first,
        dropout if training else 0.0,
        _sequences(batch_sizes, lengths, reset),
        caches,
        return_cell_states,
        recompute,
        peephole,
        layer_norm,
        zoneout,
        random_zoneout=training and zoneout != (0.0, 0.0),
        recurrent_dropout=recurrent_dropout if training else 0.0,
        weight_dropout=weight_dropout if training else 0.0,
        training=training,
    )
    y, (h_n, c_n), c_all = run_stack(input, hx, weights, options)
    return (y, (h_n, c_n)) if c_all is None else (y, (h_n, c_n), c_all)


@overridable
def rnn(
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    *,
    nonlinearity: str = "tanh",
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    caches: Sequence[Cache] | None = None,
) -> tuple[Tensor, Tensor]:
    """Run L layers of D directions over a sequence, as ``torch.nn.RNN`` does.

    Args:
        input: ``[T, B, I]``; ``[B, T, I]`` with ``batch_first``; ``[T, I]`` without a batch; or
            the ``[N, I]`` rows of a ``PackedSequence`` when ``batch_sizes`` is given.
        hx: ``h_0 [L*D, B, H]``, without B for input without a batch; None for zeros.
        weights: for every layer, for every direction, ``w_ih [H, I or D*H]``, ``w_hh [H, H]``,
            then ``b_ih [H]`` and ``b_hh [H]`` if there are biases.
        nonlinearity: "tanh" or "relu".
        num_layers: L.
        bidirectional: D is 2 if True, else 1.
        batch_first: the layout of input, output and reset; never of hx.
        dropout: probability of zeroing an output of any layer but the last, in training.
        training: whether to apply the dropout.
        batch_sizes: ``PackedSequence.batch_sizes``, int64 ``[T]`` on the CPU.
        lengths: integers ``[B]`` in 0..T, see :func:`lstm`.
        reset: bool ``[T, B]``, see :func:`lstm`; True zeroes that row's h before the step.
        caches: a dict for each layer, in which a backend may keep packed weights.

    Returns:
        ``(y, h_n)``: y is ``[T, B, D*H]``, laid out as input, and h_n is shaped as hx.

    Raises:
        ValueError: a nonlinearity or number of dimensions that is not one of the above, a wrong
            range of lengths, an input whose dtype is not that of the weights, or lengths and reset
            where they have no meaning.
        RuntimeError: a wrong size, device or other dtype, T = 0, or a backend that was asked for
            and cannot compute the call.
        AttributeError: hx is no tensor, as with ``nn.RNN``.
        TypeError: lengths are not integers or reset is not bool.
    """
    check_nonlinearity(nonlinearity)
    if hx is not None and not isinstance(hx, Tensor):
        raise AttributeError(f"RNN: hx must be a tensor, got {type(hx).__name__}")
    options = Options(
        f"RNN_{nonlinearity.upper()}",
        num_layers,
        bidirectional,
        batch_first,
        dropout if training else 0.0,
        _sequences(batch_sizes, lengths, reset),
        caches,
        training=training,
    )
    y, (h_n,), _ = run_stack(input, None if hx is None else (hx,), weights, options)
    return y, h_n


@overridable
def lstm_cell(
    input: Tensor,
    hx: State | None,
    weights: Sequence[Tensor],
    *,
    cache: Cache | None = None,
) -> State:
    """One step, as ``torch.nn.LSTMCell`` takes it.

    Args:
        input: ``[B, I]``, or ``[I]`` without a batch.
        hx: ``(h [B, H], c [B, H])``, without B for input without a batch; None for zeros.
        weights: ``w_ih [4H, I]``, ``w_hh [4H, H]``, then ``b_ih [4H]`` and ``b_hh [4H]`` if there
            are biases. Gates are i, f, g, o.
        cache: a dict in which a backend may keep packed weights.

    Returns:
        The next ``(h, c)``, shaped as hx. Under autocast the state keeps its dtype (input's, if
        hx is None), in which the step is then computed: h and c are not rounded at every step.

    Raises:
        ValueError: a wrong number of dimensions of input or hx.
        RuntimeError: a wrong size, dtype or device, or a backend that was asked for and cannot
            compute the call.
    """
    return run_cell(input, hx, weights, cache)


def _sequences(
    batch_sizes: Tensor | None, lengths: Tensor | None, reset: Tensor | None
) -> Sequences:
    if batch_sizes is None and lengths is None and reset is None:
        return DENSE
    return Sequences(batch_sizes, lengths, reset)


def sequence_loss(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor,
    average_across_timesteps: bool = True,
    average_across_batch: bool = True,
) -> Tensor:
    """Weighted cross-entropy of a sequence of classes: TensorFlow's ``seq2seq.sequence_loss``.

    Args:
        logits: ``[B, T, C]``, floating.
        targets: ``[B, T]``, the true class of each step, integers in 0..C-1.
        weights: ``[B, T]``, what each step counts; 0 for padding.
        average_across_timesteps: divide the sum over T by the sum of its weights.
        average_across_batch: divide the sum over B by the sum of its weights.

    Returns:
        A scalar; ``[B]`` if averaged across time steps only, ``[T]`` if across the batch only,
        ``[B, T]`` if neither.

    Raises:
        ValueError: a shape is not as above.
    """
    if logits.dim() != 3 or targets.shape != logits.shape[:2] or weights.shape != logits.shape[:2]:
        raise ValueError(
            "sequence_loss: expected logits [B, T, C], targets [B, T] and weights [B, T], got "
            f"{size(logits)}, {size(targets)} and {size(weights)}"
        )
    losses = weights * cross_entropy(logits.transpose(1, 2), targets.long(), reduction="none")
    dims = [0] * average_across_batch + [1] * average_across_timesteps
    if not dims:
        return losses
    # TensorFlow adds 1e-12 to the total weight, so that no weight at all gives 0 and not NaN.
    return losses.sum(dims) / (weights.sum(dims) + 1e-12)
