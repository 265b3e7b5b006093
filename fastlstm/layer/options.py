"""What a call of a stack says besides its tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from fastlstm.spec import DENSE, Sequences

__all__ = ["Options"]


class Options(NamedTuple):
    """How a stack computes; the sizes are those of its weights.

    Dropout rates are 0 in evaluation. :func:`fastlstm.functional.lstm` describes the fields.
    """

    mode: str  # "LSTM", "RNN_TANH" or "RNN_RELU"
    num_layers: int = 1
    bidirectional: bool = False
    batch_first: bool = False
    dropout: float = 0.0
    sequences: Sequences = DENSE
    caches: Sequence[Any] | None = None
    return_cell_states: bool = False
    recompute: bool = False
    peephole: bool = False
    layer_norm: bool = False
    zoneout: tuple[float, float] = (0.0, 0.0)
    random_zoneout: bool = False  # draw which elements stay; else mix both states
    recurrent_dropout: float = 0.0
    weight_dropout: float = 0.0
    training: bool = False

    @property
    def kind(self) -> str:
        """The name that messages begin with."""
        return "LSTM" if self.mode == "LSTM" else "RNN"

    @property
    def directions(self) -> int:
        """D."""
        return 2 if self.bidirectional else 1
