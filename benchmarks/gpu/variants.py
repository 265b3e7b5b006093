"""The kernels that layers start, as they are compiled: recorded without a GPU, without doubles."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ..speed.cases import CASES, TASK_SHAPES
from .plan import BATCHES, WIDTHS

PROCESSORS = {80: 108, 86: 84, 89: 128, 90: 132}  # of A100, RTX 3090, RTX 4090 and H100
DTYPES = ("bfloat16", "float16", "float32")
CELL_PARTS = ("peephole", "layer_norm", "mask", "zoneout", "expectation")  # of zoneout
STEPS = 2  # of every layer: the kernels are the same for any number, a launch for each is not
_TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
}


@dataclass(frozen=True)
class Layer:
    """A layer and how it is called."""

    dtype: str
    precision: str | None  # of float32: "tf32" or "ieee"
    I: int
    H: int
    D: int
    B: int
    training: bool
    P: int = 0  # 0: not projected
    rows: str = "dense"  # or "lengths", "packed"
    states: bool = False  # also initial states, a gradient of every output; resets where D is 1
    regime: str | None = None  # forced upon the configuration
    cell: str = ""  # names of CELL_PARTS with a + between, or "rnn_tanh", "rnn_relu"


@dataclass(frozen=True)
class Variant:
    """What one compiled kernel depends on, and in `facts` where it was met first."""

    module: str
    kernel: str
    arch: int
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    options: tuple[tuple[str, Any], ...]
    facts: dict[str, Any] = field(compare=False)

    def __str__(self) -> str:
        return ", ".join(f"{k} {v}" for k, v in self.facts.items() if v not in (None, False))


def layers(dtypes: Iterable[str], quick: bool) -> list[Layer]:
    """Those whose kernels are compiled.

    All: what the sequence regime can take and the other two at the widths that are timed, with
    every kind of rows. float16 only where the tasks use it: it compiles as bfloat16 does. Quick:
    the cases that are timed, and one shape for each kind of call.
    """
    found: list[Layer] = []
    for dtype, precision in product(dtypes, ("tf32", "ieee")):
        if dtype == "float32":
            few = precision == "ieee" and quick
        elif precision == "ieee":
            continue  # for float32 alone
        else:
            few = dtype == "float16"
        layer = partial(Layer, dtype, precision if dtype == "float32" else None)
        found += _cases(layer, TASK_SHAPES if few else CASES)
        if few:
            continue
        found += _examples(layer) if quick else _everything(layer)
    return list(dict.fromkeys(found))


def _cases(layer: Any, names: Iterable[str]) -> Iterator[Layer]:
    for case in map(CASES.__getitem__, names):
        rows = "packed" if case.packed else "dense"
        for number, training in product(range(min(case.L, 2)), (False, True)):
            size = case.D * case.H if number else case.I
            yield layer(size, case.H, case.D, case.B, training, rows=rows)


def _examples(layer: Any) -> Iterator[Layer]:
    yield layer(28, 64, 2, 128, True, rows="lengths")
    yield layer(28, 64, 1, 128, True, states=True)
    yield layer(28, 64, 1, 128, True, P=32)
    for training in (False, True):
        yield layer(28, 64, 1, 128, training, regime="sequence")
    yield layer(28, 64, 1, 128, True, cell="layer_norm+mask")
    yield layer(28, 64, 1, 128, True, states=True, cell="peephole+zoneout")
    yield layer(256, 256, 1, 16, True, cell="peephole+mask+zoneout")
    yield layer(28, 128, 2, 128, True, rows="lengths", cell="rnn_tanh")
    yield layer(512, 512, 1, 16, True, states=True, cell="rnn_relu")


def _everything(layer: Any) -> Iterator[Layer]:
    both = (False, True)
    for H, training in product((16, 32, 64, 100, 128), both):
        yield layer(28, H, 1, 1, training)
        for I in (10, 28, 64, 256) if H <= 64 else (28,):  # wider ones do not read x itself
            yield layer(I, H, 1, 128, training)
    for H, training in product((16, 32, 64, 100, 128, 256), both):
        yield layer(28, H, 1, 128, training, states=True)
        yield layer(28, H, 2, 128, training, rows="lengths")
    for H, training in product((64, 100, 256), both):
        yield layer(28, H, 2, 128, training, rows="packed")
        yield layer(28, H, 1, 128, training, P=H // 2)
    for H, B, training in product(WIDTHS, BATCHES, both):
        yield layer(H, H, 1, B, training)
    for H, training in product((16, 64, 100, 128, 256), both):
        cells = ("peephole", "mask", "expectation", "peephole+mask+zoneout", "layer_norm+mask")
        for cell in cells[: 4 if H > 128 else 5]:
            yield layer(28, H, 1, 128, training, states=True, cell=cell)
            yield layer(28, H, 2, 128, training, rows="lengths", cell=cell)
    for H, cell, training in product((16, 64, 128, 256, 512), ("rnn_tanh", "rnn_relu"), both):
        yield layer(28, H, 1, 1, training, cell=cell)
        yield layer(28, H, 1, 128, training, states=True, cell=cell)
        yield layer(28, H, 2, 128, training, rows="packed", cell=cell)


def variants(layers: Iterable[Layer], archs: Iterable[int]) -> list[Variant]:
    """What the layers start on these GPUs; what has no room for a layer is left out."""
    return list(dict.fromkeys(v for arch in archs for l in layers for v in _of(l, arch)))


# What of the source a compiler gets to see depends on these. A sample has these combinations.
SAMPLED = (
    ("kernel", "arch", "regime", "cell"),
    ("kernel", "arch", "dtype", "precision"),
    ("kernel", "regime", "fused", "rows"),
)


def sample(found: Iterable[Variant]) -> list[Variant]:
    """Keep those that have a new cell, type of number or kind of rows for their kernel."""
    kept, seen = [], set()
    for variant in found:
        kinds = {(names, *[variant.facts[name] for name in names]) for names in SAMPLED}
        if kinds - seen:
            kept.append(variant)
            seen |= kinds
    return kept


def _of(layer: Layer, arch: int) -> Iterator[Variant]:
    from fastlstm.kernels.triton import config, launch

    device = config.Device(arch, PROCESSORS[arch], *launch.GLUON)
    with launch.record(device, layer.precision or "tf32") as launches:
        changes = {"regime": layer.regime} if layer.regime else {}
        with config.override(**changes):
            try:
                _call_rnn(layer) if layer.cell.startswith("rnn") else _call(layer)
            except ValueError:
                if not layer.regime and not layer.cell:
                    raise
    for started in launches:
        yield _variant(started, layer, arch)


def _variant(started: Any, layer: Layer, arch: int) -> Variant:
    """Triton's own view of the arguments: integers of any value, pointers to 16 aligned bytes."""
    signature, constants = [], []
    for parameter in started.kernel.params:
        value = started.arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature.append((parameter.name, "constexpr"))
            constants.append((parameter.name, value))
        else:
            signature.append((parameter.name, type_name(value)))
    plan = started.plan
    facts = {
        "kernel": started.kernel.__name__,
        "arch": arch,
        "regime": plan.regime,
        "dtype": layer.dtype,
        "precision": layer.precision,
        "training": layer.training,
        "I": layer.I,
        "H": layer.H,
        "P": layer.P or layer.H,
        "D": layer.D,
        "B": layer.B,
        "rows": layer.rows,
        "states": layer.states,
        "cell": layer.cell,
        "units": plan.units,
        "N": plan.batch,
        "chunk": plan.chunk,
        "fused": plan.fused,
        "warps": plan.warps,
        "stages": plan.stages,
    }
    return Variant(
        started.kernel.fn.__module__,
        started.kernel.__name__,
        arch,
        tuple(signature),
        tuple(constants),
        tuple(started.options.items()),
        facts,
    )


def type_name(value: Any) -> str:
    """Triton's name for the type of an argument."""
    if isinstance(value, Tensor):
        return _TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def _call_rnn(layer: Layer) -> None:
    from fastlstm.kernels.triton.operators import rnn_bwd, rnn_fwd

    H, D = layer.H, layer.D
    new, rows, batch_sizes, lengths, reset = _rows(layer)
    h0 = new(D, layer.B, H) if layer.states else None
    x, y, h_n = new(*rows, layer.I), new(*rows, D * H), new(D, layer.B, H)
    group = [new(H, layer.I), new(H, H), new(H), new(H)]
    relu = layer.cell == "rnn_relu"
    inputs = (x, group * D, D, h0, batch_sizes, lengths, reset, relu, y)
    rnn_fwd(*inputs, h_n, None)
    if layer.training:
        rnn_bwd(*inputs, y, h_n if layer.states else None, x, h0, group[:3] * D, None)


def _rows(layer: Layer) -> tuple[Any, ...]:
    """Makes tensors; the shape of rows; batch sizes, lengths and resets."""
    T, B = STEPS, layer.B
    new = partial(torch.empty, dtype=getattr(torch, layer.dtype), device="meta")
    if layer.rows == "packed":
        return new, (T * B,), torch.tensor([B] * T), None, None
    lengths = new(B, dtype=torch.int64) if layer.rows == "lengths" else None
    reset = new(T, B, dtype=torch.bool) if layer.states and layer.D == 1 else None
    return new, (T, B), None, lengths, reset


def _call(layer: Layer) -> None:
    """Forward, and in training backward, as :mod:`fastlstm.layer.autograd` calls them."""
    from fastlstm.kernels.triton import TRITON
    from fastlstm.kernels.triton.operators import lstm_bwd, lstm_fwd
    from fastlstm.spec import LayerSpec

    B, I, H, P, D = layer.B, layer.I, layer.H, layer.P or layer.H, layer.D
    new, rows, batch_sizes, lengths, reset = _rows(layer)
    h0, c0 = (new(D, B, P), new(D, B, H)) if layer.states else (None, None)
    x, y, h_n, c_n = new(*rows, I), new(*rows, D * P), new(D, B, P), new(D, B, H)
    group = [new(4 * H, I), new(4 * H, P), new(4 * H), new(4 * H)]
    gradients = [*group[:3]]
    more = [new(P, H)] if P != H else []
    parts = layer.cell.split("+") if layer.cell else []
    assert set(parts) <= set(CELL_PARTS), layer.cell
    options: dict[str, Any] = {}
    if "peephole" in parts:
        options["peephole"] = True
        more.append(new(3 * H))
    if "layer_norm" in parts:
        options["layer_norm"] = True
        more += [new(4 * H), new(4 * H), new(H), new(H)]
    if "mask" in parts:
        options["h_mask"] = new(D, B, P, dtype=torch.float32)
    if "zoneout" in parts or "expectation" in parts:
        options |= {"zoneout_c": 0.5, "zoneout_h": 0.05}
    if "zoneout" in parts:
        options["seed"] = new(1, dtype=torch.int64)
    group += more
    gradients += more
    c_all = gates = None
    if layer.training:
        c_all = new(*rows, D * H, dtype=torch.float32)
        kind = LayerSpec("LSTM", I, H, layer.P, D, peephole=bool(parts))  # or extended otherwise
        if TRITON.keeps_gates(kind) and "layer_norm" not in parts:
            gates = new(D, *rows, 4 * H)
    inputs = (x, group * D, D, h0, c0, batch_sizes, lengths, reset, y)
    lstm_fwd(*inputs, h_n, c_n, c_all, gates, None, **options)
    if c_all is None:
        return
    dh_n, dc_n, dc_all = (h_n, c_n, new(*rows, D * H)) if layer.states else (None, None, None)
    lstm_bwd(
        *inputs, c_all, gates, y, dh_n, dc_n, dc_all, x, h0, c0, gradients * D, None, **options
    )  # fmt: skip
