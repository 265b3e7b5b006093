"""What auto takes for the plain calls of one module, asked once for each shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastlstm.automatic import AUTO, Size, first_without_doubt, trains
from fastlstm.backends import choice
from fastlstm.kernels.base import Backend
from fastlstm.record import Record, known
from fastlstm.spec import DENSE, LayerSpec

__all__ = ["Taken"]


class Taken:
    """What auto takes for the plain calls of one module where the record of a machine has a say.

    To name the class of shapes that a call belongs to takes longer than some calls may. So answers
    are kept, as long as the record stays the same.

    Args:
        specs: the layers.
        layers: how many there are; 0 for a cell.
        batch_first: whether inputs are ``[B, T, I]``.
    """

    def __init__(self, specs: Sequence[LayerSpec], layers: int, batch_first: bool = False) -> None:
        self._specs, self._layers, self._batch_first = specs, layers, batch_first
        # In one, for threads that differ in their record
        self._answers: tuple[Record | None, dict[Any, Backend | None]] = (None, {})

    def backend(
        self,
        record: Record | None,
        x: Tensor,
        weights: Sequence[Tensor],
        grad: bool,
    ) -> Backend | None:
        """Return the backend that auto takes; None for the reference.

        Args:
            record: what is known of the device of x.
            x: the input, dense.
            weights: those of all layers.
            grad: whether gradients are enabled.
        """
        of, answers = self._answers
        if of is not record:
            self._answers = _, answers = record, {}
        try:
            trained = grad and trains(x, weights)
            key = x.shape, x.dtype, trained, torch.get_num_threads(), choice.name
            return answers[key]
        except KeyError:
            return self._ask(answers, key, x, weights)
        except RuntimeError:  # a nested tensor has no shape
            return None

    def _ask(
        self, answers: dict[Any, Backend | None], key: Any, x: Tensor, weights: Sequence[Tensor]
    ) -> Backend | None:
        rows = x.shape[:-1] if self._layers else (1, x.shape[0])
        steps, batch = reversed(rows) if self._batch_first else rows
        size = Size(self._layers, steps, batch, weights)
        found = first_without_doubt(choice.name, x, self._specs, size=size)
        record = known(x)
        # A shape that "tuned" could not measure yet is asked for again.
        if choice.name == AUTO or (record and size.key(x, self._specs[0], DENSE) in record.times):
            if len(answers) > 256:
                answers.clear()
            answers[key] = found
        return found
