"""FlashRNN: its LSTM of one head, whose recurrent matrix is then that of nn.LSTM."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..speed.contender import Contender
from ..speed.workload import Workload
from . import Provider
from .pytorch import copy, from_module, refuses_all_but_plain


class FlashRNN(Provider):
    """Its kernels, compiled for the case at the first call, after a linear layer for the input."""

    name, label = "flashrnn", "FlashRNN"
    packages = ("flashrnn",)
    backend = "cuda_fused"  # "vanilla" is plain PyTorch, to check the layouts on a CPU

    def refuses(self, work: Workload) -> str | None:
        if self.backend != "vanilla":
            if work.on_cpu:
                return "for GPUs"
            if work.dtype not in (torch.float32, torch.bfloat16, torch.float16):
                return "no float64"
            if work.dtype == torch.float32 and not torch.backends.cudnn.allow_tf32:
                return "float32 as TF32 only"
            if work.case.H % 16:
                return "H in steps of 16"
        return refuses_all_but_plain(work)

    def contender(self, work: Workload) -> Contender:
        from flashrnn import FlashRNNConfig, flashrnn

        H = work.case.H
        module = copy(work.lstm)
        config = FlashRNNConfig(
            backend=self.backend,
            function="lstm",
            head_dim=H,
            num_heads=1,
            batch_size=work.case.B,
            dtype=str(work.dtype).removeprefix("torch."),
            input_shape="TBGHD",  # time, batch, gates i, f, g, o, heads, units
            output_shape="STBHD",  # states h, c, then the same
        )

        def forward(y: Tensor, state: Any = None) -> tuple[Tensor, tuple[Any, Any]]:
            lasts = []
            for k, (w_ih, w_hh, b_ih, b_hh) in enumerate(module.all_weights):
                states, last = flashrnn(
                    linear(y, w_ih, b_ih).unflatten(-1, (4, 1, H)),
                    w_hh.view(4, 1, H, H),
                    b_hh.view(4, 1, H),
                    states=None if state is None else state[0][k],
                    config=config,
                )
                y = states[0].flatten(-2)
                lasts.append(last)
            return y, (lasts, None)

        native: Any = work
        if work.state is not None:  # [2, 1, B, 1, H] of each layer, as they come back
            starts: Any = torch.stack(work.state, 1)[:, :, None, :, None]
            native = replace(work, state=(list(starts), None))
        made = from_module(module, native, forward)

        def results() -> dict[str, Tensor]:
            found: dict[str, Any] = made.results()
            if work.mode != "train":
                found["h"], found["c"] = torch.stack(found["h"], 1).view(2, -1, work.case.B, H)
            return found

        return replace(made, results=results)
