"""Haste: CUDA kernels of 2020 for an nn.LSTM with zoneout and DropConnect."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..speed.contender import Contender
from ..speed.workload import Workload
from . import Provider
from .jax_scan import ends, gradients
from .pytorch import from_module, refuses_all_but_plain


class Haste(Provider):
    """haste_pytorch.LSTM without them, a layer over the other."""

    name, label = "haste", "Haste"
    packages = ("haste_pytorch",)

    def refuses(self, work: Workload) -> str | None:
        if work.on_cpu:
            return "for GPUs"
        if work.dtype not in (torch.float32, torch.float64):
            return "no 16-bit dtypes"
        return refuses_all_but_plain(work)

    def contender(self, work: Workload) -> Contender:
        from haste_pytorch import LSTM

        case = work.case
        layers: Any = nn.ModuleList()
        for k, end in enumerate(ends(work.lstm)):
            layer = LSTM(case.H if k else case.I, case.H)
            layer.from_native_weights(
                *(
                    getattr(work.lstm, f"{name}_{end}").detach()
                    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
                )
            )
            layers.append(layer)

        def forward(y: Tensor, state: Any = None) -> tuple[Tensor, tuple[Any, Any]]:
            states = []
            for k, layer in enumerate(layers):
                y, last = layer(y, None if state is None else (state[0][k], state[1][k]))
                states.append(last)
            h, c = zip(*states, strict=True)
            return y, (h, c)

        native: Any = work
        if work.state is not None:  # [1, B, H] of each layer
            native = replace(work, state=tuple(one.split(1) for one in work.state))
        made = from_module(layers, native, forward)

        def results() -> dict[str, Tensor]:
            found: dict[str, Any] = made.results()
            if work.mode != "train":
                return {"y": found["y"]} | {name: torch.cat(found[name]) for name in "hc"}
            named: dict[str, Tensor] = {
                name: found[name] for name in ("y", "gradient of x") if name in found
            }
            kinds = ("kernel", "recurrent_kernel", "bias")
            weights: Any = [
                [reorder(found[f"gradient of {k}.{kind}"]) for kind in kinds]
                for k in range(case.L)
            ]
            return named | gradients(work.lstm, weights)

        return replace(made, results=results)


def reorder(weight: Tensor) -> Tensor:
    """Gates i, g, f, o of its columns -> i, f, g, o of nn.LSTM."""
    i, g, f, o = weight.chunk(4, -1)
    return torch.cat([i, f, g, o], -1)
