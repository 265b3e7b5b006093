"""The optimizer's step that ends every call of training, the same for every provider.

Whoever keeps copies of the weights has to make them anew after it. So a figure without it would
be one of calls that nobody makes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["RATE", "Update"]

RATE = 1e-3  # large enough to change weights of 16 bits


class Update:
    """torch.optim.SGD that goes forwards and backwards in turn: weights change and stay in place.

    Args:
        weights: leaves, whose gradients it follows.
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        self.weights = list(weights)
        self.first = [w.detach().clone() for w in self.weights]
        self.optimizer = torch.optim.SGD(self.weights, lr=RATE, foreach=True)

    def __call__(self) -> None:
        """Change all weights."""
        self.optimizer.step()
        group: dict[str, Any] = self.optimizer.param_groups[0]
        group["lr"] = -group["lr"]

    def undo(self) -> None:
        """Give the weights back the values that they had at first."""
        with torch.no_grad():
            for weight, first in zip(self.weights, self.first, strict=True):
                weight.copy_(first)
