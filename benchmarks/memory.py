"""What a forward pass keeps for the backward pass, in values of H a step and direction."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

import fastlstm

from .cases import Case
from .contenders import rows as rows_of

Row = dict[str, Any]
MODULES: dict[str, Callable[..., nn.RNNBase]] = {"fastlstm": fastlstm.LSTM, "torch": nn.LSTM}


def measure(cases: Iterable[Case], dtype: str) -> list[Row]:
    """Bytes kept by each module, and how many values of H that is a step, layer and direction."""
    rows = []
    for case in cases:
        for name, kind in MODULES.items():
            x = case.input(getattr(torch, dtype))
            module = kind(case.I, case.H, case.L, bidirectional=case.D == 2).to(rows_of(x).dtype)
            size = kept_bytes(module, x)
            steps = int(case.lengths.sum()) * case.L * case.D
            values = size / (steps * case.H * rows_of(x).element_size())
            rows.append(
                {
                    "case": case.name,
                    "shape": case.shape,
                    "mode": "memory",
                    "dtype": dtype,
                    "provider": name,
                    "bytes": size,
                    "values_of_H": values,
                }
            )
    return rows


def kept_bytes(module: nn.RNNBase, x: Any) -> int:
    """Bytes of all storages that autograd keeps, without those of the parameters and of x."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = module(x)  # held, so that no address is used twice
    for own in (*module.parameters(), rows_of(x)):
        kept.pop(own.untyped_storage().data_ptr(), None)
    del output
    return sum(kept.values())


def table(rows: list[Row]) -> str:
    """One line per case and module."""
    width = max(len(row["case"]) for row in rows)
    return "\n".join(
        f"{row['case']:{width}}  {row['provider']:8}  {row['values_of_H']:6.2f} H a step "
        f"({row['bytes'] / 2**20:.2f} MiB)"
        for row in rows
    )
