"""Flax: its RNN layers over its LSTM cell, compiled by XLA."""

from __future__ import annotations

from typing import Any

from ..speed.contender import Contender
from ..speed.workload import Workload
from . import Provider
from .jax_scan import Weights, array, from_function, prepare, single_bias
from .pytorch import refuses_step

GATES = "ifgo"


class FlaxRNN(Provider):
    """flax.linen.RNN of OptimizedLSTMCell, a layer over the other."""

    name, label = "flax", "Flax RNN"
    packages = ("flax", "jax")
    remote = True

    def refuses(self, work: Workload) -> str | None:
        if work.reset is not None:
            return "no resets"
        return refuses_step(work)

    def contender(self, work: Workload) -> Contender:
        prepare(work)
        import jax.numpy as jnp
        from flax import linen

        case = work.case
        dtype = getattr(jnp, str(work.dtype).removeprefix("torch."))

        def rnn() -> Any:
            cell = linen.OptimizedLSTMCell(case.H, dtype=dtype, param_dtype=dtype)
            return linen.RNN(cell, time_major=True)

        layer = rnn()
        if case.D == 2:
            layer = linen.Bidirectional(layer, rnn(), time_major=True)

        def forward(
            weights: Any, x: Any, state: Any, lengths: Any, reset: None
        ) -> tuple[Any, Any, Any]:
            carries: list[Any] = []
            for k, params in enumerate(weights):
                start = None if state is None else (state[1][k], state[0][k])
                carry, x = layer.apply(
                    {"params": params},
                    x,
                    initial_carry=start,
                    seq_lengths=lengths,
                    return_carry=True,
                )
                carries += carry if case.D == 2 else [carry]
            if lengths is not None:  # its outputs go on past them
                x = jnp.where((jnp.arange(len(x))[:, None] < lengths)[:, :, None], x, 0)
            c, h = zip(*carries, strict=True)
            return x, jnp.stack(h), jnp.stack(c)

        cells = [{"cell": to_cell(*map(array, one))} for one in single_bias(work.lstm)]
        weights = cells
        if case.D == 2:
            pairs = zip(cells[::2], cells[1::2], strict=True)
            weights = [{"forward_rnn": one, "backward_rnn": other} for one, other in pairs]
        return from_function(work, forward, weights, from_layers)


def to_cell(kernel: Any, recurrent: Any, bias: Any) -> dict[str, dict[str, Any]]:
    """The parameters of a cell: of every gate its own, the bias with the recurrent kernel."""
    from jax.numpy import split

    gates = zip(GATES, *(split(one, 4, -1) for one in (kernel, recurrent, bias)), strict=True)
    params: dict[str, dict[str, Any]] = {}
    for gate, w_i, w_h, b in gates:
        params |= {f"i{gate}": {"kernel": w_i}, f"h{gate}": {"kernel": w_h, "bias": b}}
    return params


def from_layers(layers: list[dict[str, Any]]) -> list[Weights]:
    """The weights of each layer and direction from the parameters of the layers."""
    from jax.numpy import concatenate

    def join(cell: dict[str, Any], part: str, kind: str) -> Any:
        return concatenate([cell[part + gate][kind] for gate in GATES], -1)

    cells = []
    for layer in layers:
        sides = [layer] if "cell" in layer else [layer["forward_rnn"], layer["backward_rnn"]]
        cells += [side["cell"] for side in sides]
    return [
        (join(cell, "i", "kernel"), join(cell, "h", "kernel"), join(cell, "h", "bias"))
        for cell in cells
    ]
