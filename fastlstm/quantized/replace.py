"""``fastlstm.quantize``: swap the recurrent modules of a whole model for small ones."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn
from torch.nn.modules import rnn as torch_rnn  # torch.nn.LSTM may be replaced by ours

from fastlstm.accelerate import Patterns, Swap, swap
from fastlstm.convert import class_name, obstacle, original_class
from fastlstm.modules import LSTM, RNN, LSTMCell
from fastlstm.quantized.base import DTYPES, Quantized
from fastlstm.quantized.cell import QuantizedLSTMCell
from fastlstm.quantized.layers import QuantizedLSTM, QuantizedRNN

__all__ = ["quantize"]

M = TypeVar("M", bound=nn.Module)
_SMALL: dict[type[nn.Module], Any] = {
    torch_rnn.LSTM: QuantizedLSTM,
    torch_rnn.LSTMCell: QuantizedLSTMCell,
    torch_rnn.RNN: QuantizedRNN,
    LSTM: QuantizedLSTM,
    LSTMCell: QuantizedLSTMCell,
    RNN: QuantizedRNN,
}
_OTHERS = (torch_rnn.GRU, torch_rnn.RNNCell, torch_rnn.GRUCell)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def quantize(
    model: M,
    dtype: str = "int8",
    verbose: bool = False,
    *,
    include: Patterns = None,
    exclude: Patterns = None,
    dry_run: bool = False,
) -> M:
    """Replace every LSTM, LSTMCell and RNN in a model by one with small weights, in place.

    Both ``torch.nn``'s modules and this library's are replaced. The new ones compute on CPUs and
    do not train; each has a method ``dequantize()`` that returns a float module. Forward hooks
    come along. A module that quantised ones cannot stand for is left: one with layer
    normalisation, peepholes or zoneout, and a subclass, whose own behaviour would be lost.

    What was replaced, what was left and why is logged to ``logging.getLogger("fastlstm")`` at
    level INFO, one line for each module.

    Args:
        model: any module, in evaluation mode.
        dtype: "int8": a quarter of the memory; "bfloat16": half of it, and closer to float32.
        verbose: also print those lines.
        include: replace only modules whose path matches one of these patterns ("encoder.*").
        exclude: leave modules whose path matches one of these.
        dry_run: print what would be replaced, and replace nothing.

    Returns:
        model itself, or its replacement if model is one of those itself.

    Raises:
        ValueError: another dtype; a module that is to be replaced is in training mode, or has
            weights that are not finite; a pattern matches no recurrent module.
    """
    if dtype not in DTYPES:
        raise ValueError(f"quantize: dtype must be 'int8' or 'bfloat16', got {dtype!r}")

    def plan(module: nn.Module) -> Swap:
        return _plan(module, dtype)

    def build(module: nn.Module, kind: Any) -> nn.Module:
        if module.training:
            raise ValueError(
                f"quantize: this {class_name(original_class(module))} is in training mode, and "
                "quantised modules do not train: call model.eval() first"
            )
        made: nn.Module = kind.from_float(module, dtype)
        for hooks in _HOOKS:  # handed over, not copied: the handles refer to them
            setattr(made, hooks, getattr(module, hooks))
        return made

    return swap(model, plan, "quantize", verbose, (include, exclude), dry_run, build)


def _plan(module: nn.Module, dtype: str) -> Swap:
    """What becomes of a module."""
    actual: Any = original_class(module)
    if isinstance(module, Quantized) or actual in _OTHERS:
        is_small = isinstance(module, Quantized)
        return Swap(None, "" if is_small else f"left, fastlstm has no {actual.__name__}")
    target = _SMALL.get(actual)
    if target is None:
        derived = next((kind for kind in _SMALL if issubclass(actual, kind)), None)
        what = f"left, it is a {class_name(actual)}, a subclass, whose own behaviour would be lost"
        return Swap(None, what if derived else "")
    if isinstance(module, LSTM) and (lacking := _beyond(module)):
        return Swap(None, f"left, {target.__name__} has no {', '.join(lacking)}")
    if problem := obstacle(module, actual):
        return Swap(None, f"left, {problem}")
    line = f"{class_name(actual)}({module.extra_repr()}) -> fastlstm.{target.__name__}({dtype})"
    return Swap(target, line)


def _beyond(module: LSTM) -> list[str]:
    """The options that matter in evaluation and that quantised modules lack."""
    found = ["layer_norm"] * module.layer_norm + ["peephole"] * module.peephole
    return found + ["zoneout"] * any(module.zoneout)
