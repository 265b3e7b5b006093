"""What auto takes for the plain calls of one module, asked once for each shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlstm.automatic import AUTO, TUNED, Size, first_without_doubt, trains
from fastlstm.backends import choice
from fastlstm.kernels.base import Backend
from fastlstm.record import Record, known, module_class
from fastlstm.spec import DENSE, LayerSpec

__all__ = ["Taken"]

_MOST = 256  # answers that are kept


class _Answers(NamedTuple):
    """What one record has answered, in one: threads may differ in their record."""

    record: Record | None
    name: str  # AUTO or TUNED
    disputed: tuple[bool, bool]  # whether it takes several backends: in inference, in all calls
    backends: dict[Any, Backend | None]


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
        self._answers = _Answers(None, AUTO, (False, False), {})

    def backend(
        self, record: Record, first: Backend, x: Tensor, weights: Sequence[Tensor], grad: bool
    ) -> Backend | None:
        """Return the backend that auto takes; None for the reference.

        Args:
            record: what is known of the device of x.
            first: what auto takes there without a record.
            x: the input, dense.
            weights: those of all layers.
            grad: whether gradients are enabled.
        """
        _, _, disputed, backends = self._of(record, first)
        if not disputed[grad]:
            return first
        try:
            training = grad and trains(x, weights)
            key = x.shape, x.dtype, training, torch.get_num_threads()
            return backends[key]
        except KeyError:
            return self._ask(backends, key, x, weights)
        except RuntimeError:  # a nested tensor has no shape
            return None

    def is_settled(self, record: Record, first: Backend) -> bool:
        """Whether auto takes the first backend for every call."""
        return not self._of(record, first).disputed[True]

    def _of(self, record: Record, first: Backend) -> _Answers:
        """The answers of a record."""
        found = self._answers
        if found.record is not record or found.name != choice.name:
            module = module_class(self._specs[0], self._layers)
            disputed = (
                choice.name == TUNED or record.disputes(first.name, module, False),
                choice.name == TUNED or record.disputes(first.name, module),
            )
            self._answers = found = _Answers(record, choice.name, disputed, {})
        return found

    def _ask(
        self, backends: dict[Any, Backend | None], key: Any, x: Tensor, weights: Sequence[Tensor]
    ) -> Backend | None:
        rows = x.shape[:-1] if self._layers else (1, x.shape[0])
        steps, batch = reversed(rows) if self._batch_first else rows
        size = Size(self._layers, steps, batch, weights)
        found = first_without_doubt(choice.name, x, self._specs, size=size)
        record = known(x)
        # A shape that "tuned" could not measure yet is asked for again.
        if choice.name == AUTO or (record and size.key(x, self._specs[0], DENSE) in record.times):
            if len(backends) >= _MOST:
                backends.clear()
            backends[key] = found
        return found
