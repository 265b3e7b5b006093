"""TorchRL: its LSTMModule, which starts again where `is_init` says so."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..speed.contender import Contender
from ..speed.workload import Workload
from . import Provider
from .pytorch import from_module, refuses_step


class TorchRL(Provider):
    """On a GPU with its Triton backend; on the CPU, where that does not run, with "pad".

    That is its default: nn.LSTM over the episodes, cut apart and padded. The third one, "scan", is
    slower on CPUs. A single step is a call of nn.LSTM with all of them.
    """

    name, label = "torchrl", "TorchRL, Triton (CPU: pad)"
    packages = ("torchrl", "tensordict")

    def refuses(self, work: Workload) -> str | None:
        if work.lengths is not None:
            return "no ragged batches"
        if not work.on_cpu and work.case.D == 2:
            return "one direction only"
        if not work.on_cpu and work.dtype != torch.float32:
            return "float32 only here"
        return refuses_step(work)

    def contender(self, work: Workload) -> Contender:
        from tensordict import TensorDict
        from torchrl.modules import LSTMModule

        step = work.mode == "step"

        def swap(rows: Tensor) -> Tensor:
            """[T, B, ...], or a state's [L*D, B, H], with the batch first; the reverse too."""
            return rows.transpose(0, 1).contiguous()

        lstm = nn.LSTM(
            work.case.I,
            work.case.H,
            work.case.L,
            bidirectional=work.case.D == 2,
            batch_first=True,
            device=work.x.device,
            dtype=work.dtype,
        )
        lstm.load_state_dict(work.lstm.state_dict())
        module = LSTMModule(
            lstm=lstm,
            in_keys=["x", "h", "c"],
            out_keys=["y", ("next", "h"), ("next", "c")],
            recurrent_backend="pad" if work.on_cpu else "triton",
            # TF32 where nn.LSTM may use it
            recurrent_matmul_precision="fast" if torch.backends.cudnn.allow_tf32 else "ieee",
            default_recurrent_mode=not step,
        )
        x, starts = swap(work.x), work.reset
        if starts is None:
            starts = torch.zeros(work.x.shape[:2], dtype=torch.bool, device=x.device)
        starts = swap(starts[..., None])
        rows = TensorDict({"is_init": starts[:, 0] if step else starts}, x.shape[: 2 - step])

        def forward(x: Tensor, state: Any = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            rows["x"] = x
            if state is not None:
                rows["h"], rows["c"] = state
            module(rows)
            return rows["y"], (rows["next", "h"], rows["next", "c"])

        native = replace(
            work,
            x=x[:, 0] if step else x,
            state=None if work.state is None else tuple(map(swap, work.state)),
            dy=None if work.dy is None else swap(work.dy),
        )
        made = from_module(lstm, native, forward)

        def results() -> dict[str, Tensor]:
            found = made.results()
            if step:
                return {"y": found["y"][None]} | {name: swap(found[name]) for name in "hc"}
            for name in {"y", "gradient of x"} & found.keys():
                found[name] = swap(found[name])
            if work.mode != "train":  # states of all steps, zeros where an episode goes on
                found |= {name: swap(found[name][:, -1]) for name in "hc"}
            return found

        return replace(made, results=results)
