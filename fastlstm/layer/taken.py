"""What auto takes for the plain calls of one module, asked once for each shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlstm.automatic import AUTO, Size, first_without_doubt, is_captured, trains
from fastlstm.backends import choice
from fastlstm.kernels.base import Backend
from fastlstm.kernels.measured import precision
from fastlstm.record import Record, known, module_class
from fastlstm.spec import DENSE, LayerSpec

__all__ = ["Taken"]

_MOST = 256  # answers that are kept


class _Answers(NamedTuple):
    """What one record has answered, in one: threads may differ in their record."""

    record: Record | None
    name: str  # AUTO or TUNED
    least: tuple[float, float]  # numbers of x from which on others are taken: in inference, or not
    backends: dict[Any, Backend | None]


class Taken:
    """What auto takes for the plain calls of one module where that depends on the call.

    It does where the record of a machine has a say, and on some GPUs. To name the class of shapes
    that a call belongs to takes longer than some calls may. So answers are kept, as long as the
    record stays the same.

    Args:
        specs: the layers.
        layers: how many there are; 0 for a cell.
        batch_first: whether inputs are ``[B, T, I]``.
    """

    def __init__(self, specs: Sequence[LayerSpec], layers: int, batch_first: bool = False) -> None:
        self._specs, self._layers, self._batch_first = specs, layers, batch_first
        self._answers = _Answers(None, AUTO, (0, 0), {})

    def backend(
        self,
        record: Record | None,
        first: Backend,
        x: Tensor,
        weights: Sequence[Tensor],
        grad: bool,
        contested: bool = False,
    ) -> Backend | None:
        """Return the backend that auto takes; None for the reference.

        Args:
            record: what is known of the device of x, if anything.
            first: what auto takes there without a record, unless it is contested.
            x: the input, dense.
            weights: those of all layers.
            grad: whether gradients are enabled.
            contested: whether it is, see :func:`fastlstm.automatic.is_contested`.
        """
        answers = self._answers
        if answers.record is not record or answers.name != choice.name:
            answers = self._renew(record, first)
        if not contested and x.numel() < answers.least[grad]:
            return first
        backends = answers.backends
        try:
            training = grad and trains(x, weights)
            where = torch.get_num_threads() if x.is_cpu else _where(x)
            key = x.shape, x.dtype, training, where
            return backends[key]
        except KeyError:
            return self._ask(backends, key, x, weights)
        except RuntimeError:  # a nested tensor has no shape
            return None

    def _renew(self, record: Record | None, first: Backend) -> _Answers:
        """Start anew, with another record."""
        least = 0.0, 0.0
        if choice.name == AUTO and record is not None:
            spec = self._specs[0]
            what = first.name, module_class(spec, self._layers)
            inference, any_call = (record.rows_for_others(*what, grad) for grad in (False, True))
            least = inference * spec.input_size, any_call * spec.input_size
        self._answers = found = _Answers(record, choice.name, least, {})
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


def _where(x: Tensor) -> Any:
    """What the choice depends on, on a GPU or another device, besides shape and dtype."""
    return (x.device, is_captured(), precision(x.dtype)) if x.is_cuda else x.device
