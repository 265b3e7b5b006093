"""What auto takes on a GPU that was measured: an H200 that need not be here."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from importlib import import_module
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import fastlstm
from benchmarks.speed.results import FOLDER as RESULTS
from benchmarks.speed.results import load
from fastlstm import automatic, record
from fastlstm.automatic import Size, first_without_doubt
from fastlstm.backends import choice, select
from fastlstm.kernels import measured
from fastlstm.kernels.base import Backend, Use, get
from fastlstm.kernels.measured import EAGER, READY, REPLAYED
from fastlstm.kernels.pytorch import TORCH
from fastlstm.kernels.triton.plan import Device
from fastlstm.layer.taken import Taken
from fastlstm.layer.whole import plain_backend
from fastlstm.proof import tuning
from fastlstm.record import OK, Record
from fastlstm.spec import DENSE, LayerSpec, Sequences

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
T, B, I, H = 28, 128, 28, 64
H200 = (9, 0)


class Gpu:
    """What a test says of the GPU and of how it is called."""

    capability = H200
    captured = False
    ready = False  # whether Triton's kernels were compiled ahead
    missing: str | None = None  # Triton's, if they are


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    """A GPU with both backends, whose plans are those of an H200."""
    pytest.importorskip("triton")
    if (error := get("cuda").error()) is not None:
        pytest.skip(error)
    launch, cuda_plan = map(
        import_module, ("fastlstm.kernels.triton.launch", "fastlstm.kernels.cuda.plan")
    )
    found = Gpu()
    monkeypatch.setenv("FASTLSTM_CACHE", str(tmp_path))
    monkeypatch.setattr(record, "_known", {("cuda", 0): None})
    monkeypatch.setattr(automatic, "_found", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: found.captured)
    monkeypatch.setattr(measured, "capability", lambda device: found.capability)
    monkeypatch.setattr(launch, "device_of", lambda x: Device(90, 132, clusters=False))
    triton, cuda = get("triton"), get("cuda")
    monkeypatch.setattr(triton, "obstacle", lambda spec, x: found.missing)
    monkeypatch.setattr(triton, "is_ready", lambda specs, x, batch: found.ready)
    monkeypatch.setattr(cuda, "obstacle", lambda spec, x: lacks(spec))
    lacks: Callable[[LayerSpec], str | None] = import_module("fastlstm.kernels.cuda").lacks
    before = choice.name
    choice.set("auto")
    with cuda_plan.override(device=(90, 132, 227 * 1024, 16, (66, 33, 16, 8))):
        yield found
    monkeypatch.undo()
    choice.set(before)


def tensor(dtype: torch.dtype, *shape: int) -> Any:
    """As much of a CUDA tensor as a choice looks at."""
    return SimpleNamespace(
        is_cpu=False,
        is_cuda=True,
        device=torch.device("cuda"),
        dtype=dtype,
        shape=torch.Size(shape),
        requires_grad=False,
        is_floating_point=lambda: True,
        element_size=lambda: dtype.itemsize,
        dim=lambda: len(shape),
        numel=lambda: torch.Size(shape).numel(),
    )


WEIGHT = torch.zeros(1, requires_grad=True)
PLAIN = LayerSpec("LSTM", I, H)


def taken(
    dtype: torch.dtype,
    spec: LayerSpec = PLAIN,
    sequences: Sequences = DENSE,
    *,
    shape: tuple[int, int] = (T, B),
    layers: int = 1,
    training: bool = False,
    cell_states: bool = False,
) -> str:
    """The name of what auto takes, by both of its ways."""
    x, size = tensor(dtype, *shape, I), Size(layers, *shape, (WEIGHT,))
    specs = (spec, spec._replace(input_size=spec.directions * spec.state_size))[: max(layers, 1)]
    with torch.set_grad_enabled(training):
        found = first_without_doubt("auto", x, specs, sequences, cell_states, size)
        name = found.name if found else "reference"
        assert select(x, specs, sequences, cell_states, size).name == name
    return name


def wide(**sizes: Any) -> LayerSpec:
    return PLAIN._replace(**sizes)


LONG = {"shape": (1024, 16)}
PACKED = Sequences(batch_sizes=torch.tensor([2, 1]))
RESET = Sequences(reset=torch.zeros(T, B, dtype=torch.bool))
EVERY = [(training, captured) for training in (False, True) for captured in (False, True)]


@pytest.mark.parametrize(("training", "captured"), EVERY)
@pytest.mark.parametrize("ready", [False, True])
def test_bfloat16_is_ours_in_every_way(
    gpu: Gpu, training: bool, captured: bool, ready: bool
) -> None:
    gpu.captured, gpu.ready = captured, ready
    for H in (1, 32, 64, 128):
        for more in ({}, {"layers": 2}, {"shape": (20, 512)}, LONG):
            assert taken(BF16, wide(hidden_size=H), training=training, **more) == "triton"
    assert taken(BF16, wide(directions=2), shape=(T, 256), training=training) == "triton"


@pytest.mark.parametrize(("training", "captured"), EVERY)
def test_without_triton_the_others_are_asked(gpu: Gpu, training: bool, captured: bool) -> None:
    gpu.captured, gpu.missing = captured, "Triton is not installed"
    assert taken(BF16, training=training) == "cuda"
    assert taken(FP16, training=training) == "torch"
    assert taken(FP32, training=training) == "torch"


@pytest.mark.parametrize(
    ("ready", "captured", "training", "ours"),
    [
        (False, False, False, ()),  # Triton's launcher takes longer than cuDNN
        (False, False, True, ()),
        (True, False, False, (32, 64, 128)),
        (True, False, True, (32, 64, 128)),
        (True, True, False, (32, 64, 128)),
        (True, True, True, (32, 64, 128)),
        (False, True, False, ()),  # nothing may be compiled in a capture
        (False, True, True, ()),
    ],
)
def test_float16_depends_on_the_way(
    gpu: Gpu, ready: bool, captured: bool, training: bool, ours: tuple[int, ...]
) -> None:
    gpu.ready, gpu.captured = ready, captured
    for H in (32, 64, 128):
        found = taken(FP16, wide(hidden_size=H), training=training)
        assert found == ("triton" if H in ours else "torch"), H


@pytest.mark.parametrize(("training", "captured"), EVERY)
@pytest.mark.parametrize("H", [200, 256, 400, 512])
def test_wide_layers_are_tritons_where_clusters_compute_them(
    gpu: Gpu, H: int, training: bool, captured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without them they are of the cuda backend, where that was timed."""
    launch = import_module("fastlstm.kernels.triton.launch")
    gpu.ready, gpu.captured = True, captured
    shape, spec = (256, 64), wide(input_size=H, hidden_size=H)
    assert taken(BF16, spec, training=training, shape=shape) != "triton"
    clusters = Device(90, 132, clusters=True)
    monkeypatch.setattr(launch, "device_of", lambda x: clusters)
    automatic._found.clear()
    assert taken(BF16, spec, training=training, shape=shape) == "triton"
    assert taken(FP16, spec, training=training, shape=shape) == "triton"
    name = "triton" if H <= 256 else "torch"
    assert taken(FP32, spec, training=training, shape=shape) == name
    assert taken(FP32, wide(hidden_size=128), training=training, shape=(28, 128)) == "triton"
    packed = wide(input_size=80, hidden_size=H, directions=2)
    name = "torch" if captured else "triton"  # lengths would be a part of the graph
    assert taken(BF16, packed, PACKED, training=training, shape=(500, 64)) == name


@pytest.mark.parametrize(("training", "captured"), EVERY)
@pytest.mark.parametrize("ready", [False, True])
def test_float32_is_mostly_pytorchs(
    gpu: Gpu, training: bool, captured: bool, ready: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for TF32 by kernels that were compiled ahead."""
    gpu.captured, gpu.ready = captured, ready
    for H in (16, 64, 128, 512):
        name = "triton" if ready and H <= 64 else "torch"
        assert taken(FP32, wide(hidden_size=H), training=training) == name
    assert taken(FP32, shape=(128, 64), training=training) == ("triton" if ready else "torch")
    assert taken(FP32, shape=(128, 1025), training=training) == "torch"
    # float64 is not looked up.
    monkeypatch.setattr(automatic, "_faster", lambda *_: pytest.fail("it was looked up"))
    assert taken(torch.float64) == "torch"


@pytest.mark.parametrize(
    ("spec", "call"),
    [
        (PLAIN, {"shape": (T, 1025)}),
        (PLAIN, {"layers": 0, "shape": (1, B)}),  # a cell
        (PLAIN, {"sequences": RESET._replace(reset=None, lengths=torch.ones(B))}),
        (wide(directions=2), {"shape": (T, 513)}),
        (wide(hidden_size=256, directions=2), {"shape": (256, 513)}),
        (wide(hidden_size=2048), {}),
        (wide(hidden_size=2048), LONG),
        (wide(proj_size=16), {}),
        (wide(mode="RNN_TANH"), {}),
    ],
)
@pytest.mark.parametrize(("training", "captured"), EVERY)
def test_what_nobody_has_measured_is_pytorchs(
    gpu: Gpu, spec: LayerSpec, call: dict[str, Any], training: bool, captured: bool
) -> None:
    gpu.captured = captured
    assert taken(BF16, spec, training=training, **call) == "torch"


@pytest.mark.parametrize(("training", "captured"), EVERY)
@pytest.mark.parametrize("ready", [False, True])
def test_float16_is_never_pytorchs_where_that_is_wrong(
    gpu: Gpu, training: bool, captured: bool, ready: bool
) -> None:
    """cuDNN 9.19 on an H200, whatever takes longer."""
    gpu.ready = True  # so that calls in a graph find their kernels
    gpu.captured = captured
    for H, batch in product((40, 48, 80, 120, 184), (8, 64, 512)):
        spec, shape = wide(hidden_size=H), (3, batch)
        assert taken(FP16, spec, shape=shape, training=training) == "triton"
    gpu.ready, gpu.captured = ready, False
    automatic._found.clear()
    assert taken(FP16, wide(hidden_size=40), shape=(3, 4096), training=training) == "triton"
    told = fastlstm.explain(fastlstm.LSTM(I, 40), tensor(FP16, 3, 4096, I))
    assert "PyTorch's own float16 kernels (cuDNN 9.19) are wrong for such sizes" in told.reason
    for spec in (wide(hidden_size=96), PLAIN, wide(hidden_size=40, proj_size=8)):
        assert taken(FP16, spec, shape=(3, 4096), training=training) == "torch"


def test_no_record_makes_wrong_kernels_right(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """They may well be the fastest that `tune` has timed."""
    gpu.ready = True
    monkeypatch.setattr(automatic.records, "known", lambda x: Record({}))
    monkeypatch.setattr(Record, "winner", lambda self, shape: "torch")
    assert taken(FP16, wide(hidden_size=40), shape=(3, 8)) == "triton"
    assert taken(FP16, wide(hidden_size=64), shape=(3, 8)) == "torch"
    x = tensor(FP16, 3, 8, I)
    for H, found in ((40, {"triton", "cuda"}), (64, {"torch", "triton", "cuda"})):
        candidates = tuning._candidates(x, [wide(hidden_size=H)], DENSE, Size(1, 3, 8, (WEIGHT,)))
        assert {each.name for each in candidates} == found


def test_float16_of_unknown_batches(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled by torch.compile is ours where a batch may come that PyTorch gets wrong."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    doubt = lambda name, proven, *rest: None if proven else "it is not proven"  # noqa: E731
    monkeypatch.setattr(automatic, "_doubt_of_any", doubt)  # which makes a tensor on the GPU
    assert taken(FP16, wide(hidden_size=40)) == "triton"
    assert taken(FP16, wide(hidden_size=40), PACKED) == "torch"
    assert taken(FP16, wide(hidden_size=64)) == taken(BF16, wide(hidden_size=40)) == "torch"
    gpu.missing = "Triton is not installed"
    assert taken(FP16, wide(hidden_size=40)) == "cuda"
    gpu.capability = (8, 0)
    assert taken(FP16, wide(hidden_size=40)) == "torch"


def test_a_wide_layer_is_ours_where_it_was_measured(gpu: Gpu) -> None:
    spec = wide(input_size=768, hidden_size=768)
    for training, captured in EVERY:
        gpu.captured = captured
        assert taken(BF16, spec, training=training, **LONG) == "cuda"


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0), (0, 0)])
def test_other_gpus_need_a_record(gpu: Gpu, capability: tuple[int, int]) -> None:
    gpu.capability, gpu.ready = capability, True
    assert taken(BF16) == "torch"
    assert taken(BF16, sequences=RESET) == "reference"
    verdicts = {f"triton bfloat16 registers/registers {name}": OK for name in ("plain", "reset")}
    record._known["cuda", 0] = Record({}, verdicts)
    assert taken(BF16) == "torch"
    assert taken(BF16, sequences=RESET) == "triton"


def test_what_torch_lacks_is_ours_where_it_is_proven(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    for dtype in (BF16, FP16, FP32):
        assert taken(dtype, sequences=RESET) == "triton"
        assert taken(dtype, cell_states=True) == "triton"
        assert taken(dtype, wide(peephole=True)) == "triton"
        assert taken(dtype, wide(hidden_size=512), RESET) == "triton"
    gpu.missing = "Triton is not installed"
    assert taken(FP32, sequences=RESET) == "cuda"
    monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", "ieee")
    assert taken(FP32, sequences=RESET) == "cuda"
    assert taken(FP32, wide(hidden_size=256), RESET) == "reference"
    assert taken(BF16, wide(hidden_size=256), RESET) == "cuda"


def test_exact_float32_is_cudnns_but_where_somebody_measured_it(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which needs kernels that C++ starts."""
    monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", "ieee")
    for ready, units, (training, captured) in product((False, True), (5, 64, 65), EVERY):
        gpu.ready, gpu.captured = ready, captured
        automatic._found.clear()
        name = "triton" if ready and units <= 64 else "torch"
        assert taken(FP32, wide(hidden_size=units), training=training) == name


# ---- the record goes before --------------------------------------------------------------------


def key(dtype: torch.dtype, captured: bool = False) -> str:
    return record.shape_class(PLAIN, 1, (T, B), dtype, False, False, 0, captured)


def test_the_record_goes_before_what_others_measured(gpu: Gpu) -> None:
    gpu.ready = True
    times = {key(dtype): {"torch": 1.0, "triton": 2.0} for dtype in (BF16, FP32)}
    record._known["cuda", 0] = Record({}, {}, times)
    assert taken(BF16) == taken(FP32) == "torch"
    assert taken(BF16, wide(hidden_size=32)) == "triton"  # of which it says nothing
    gpu.captured = True
    assert taken(BF16) == taken(FP32) == "triton"
    gpu.ready = gpu.captured = False
    assert taken(FP32, training=True) == "torch"
    slower = {"triton": 1.0, "torch": 2.0}
    record._known["cuda", 0] = Record({}, {}, {key(FP32): slower})
    assert taken(FP32) == "triton"
    gpu.ready = True
    wrong = {"triton bfloat16 registers/registers plain": "y is 3"}
    record._known["cuda", 0] = Record({}, wrong)
    assert taken(BF16) == "cuda"


def test_the_record_of_a_capture(gpu: Gpu) -> None:
    """It counts in captures, but for kernels that would have to be compiled there."""
    times = {key(FP16, captured=True): {"triton": 1.0, "torch": 2.0}}
    record._known["cuda", 0] = Record({}, {}, times)
    gpu.captured = True
    assert taken(FP16) == "torch"
    times[key(FP16)] = {"triton": 1.0, "torch": 2.0}  # so that the calls before compile them
    record._known["cuda", 0] = Record({}, {}, dict(times))
    assert taken(FP16) == "triton"


# ---- who asks -----------------------------------------------------------------------------------


def test_who_records_or_transforms_gets_pytorchs(gpu: Gpu) -> None:
    x, size = tensor(BF16, T, B, I), Size(1, T, B, ())

    def now(*_: Tensor) -> str:
        return select(x, (PLAIN,), size=size).name

    seen = [now()]
    with FlopCounterMode(display=False):
        seen.append(now())

    def note(y: Tensor) -> Tensor:
        seen.append(now())
        return y

    torch.func.vmap(note)(torch.zeros(2))
    seen.append(select(x, (PLAIN,)).name)  # of whose size nothing is known
    assert seen == ["triton", "torch", "torch", "torch"]


def test_plain_calls_of_modules_are_asked_once(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """And again where something else is true: whether it is captured, or trains."""
    own = Taken((PLAIN,), 1)
    asked: list[Any] = []
    first = automatic._first

    def note(*arguments: Any) -> Any:
        asked.append(arguments)
        return first(*arguments)

    monkeypatch.setattr(automatic, "_first", note)

    def plain(dtype: torch.dtype, grad: bool = False) -> Backend | None:
        with torch.set_grad_enabled(grad):
            return plain_backend(tensor(dtype, T, B, I), (WEIGHT,), own)

    assert [plain(BF16) for _ in range(3)] == [get("triton")] * 3
    assert len(asked) == 1
    assert plain(BF16, grad=True) is get("triton")
    assert plain(torch.float64) is TORCH
    assert len(asked) == 2
    assert [plain(FP16) for _ in range(3)] == [TORCH] * 3
    gpu.captured = gpu.ready = True
    automatic._found.clear()
    assert plain(FP16) is get("triton")
    with torch.autocast("cpu"):
        assert plain(FP16) is None
    with fastlstm.backend("torch"):
        assert plain(BF16) is TORCH


def test_inference_by_the_operator_of_another_backend() -> None:
    """As long as that takes the call, and dropout is not at work."""
    cpu = get("cpu")
    if cpu.error() is not None:
        pytest.skip(str(cpu.error()))
    lstm = fastlstm.LSTM(3, 5, 2, batch_first=True, dropout=0.5)
    x, weights = torch.randn(4, 6, 3), list(lstm.parameters())
    with torch.no_grad():
        assert lstm._infer_plain(cpu, x, None, weights) is None
        lstm.eval()
        y, (h, c) = lstm._infer_plain(cpu, x, None, weights)  # type: ignore[misc]
        want = lstm(x)
    assert torch.equal(y, want[0]) and torch.equal(h, want[1][0]) and torch.equal(c, want[1][1])
    assert lstm._infer_plain(cpu, x, "nonsense", weights) is None


@pytest.mark.parametrize(
    ("dtype", "H", "backend", "reason"),
    [
        (BF16, 64, "triton", r"took at least \d\.\d times as long as the triton kernels"),
        (FP16, 64, "torch", r"no slower: on an H200 they took as little as 0\.\d\d of the time"),
        (BF16, 2048, "torch", "nobody has measured that the cuda kernels are faster"),
    ],
)
def test_explain_says_who_is_faster(
    gpu: Gpu, dtype: torch.dtype, H: int, backend: str, reason: str
) -> None:
    lstm = fastlstm.LSTM(I, H).requires_grad_(False)
    told = fastlstm.explain(lstm, tensor(dtype, T, B, I))
    assert told.backend == backend
    assert re.search(reason, told.reason)


# ---- the table ----------------------------------------------------------------------------------


DTYPES = {"bf16": BF16, "fp16": FP16, "tf32": FP32, "exact": FP32}
MEASURED = {  # by `python -m benchmarks gpu --map`
    backend: RESULTS / f"gpu-{backend}-map.json" for backend in ("triton", "cuda")
}


def test_rows_are_of_known_ways() -> None:
    for row in measured._TABLE:
        assert row.way in (EAGER, READY, REPLAYED) and row.backend in MEASURED
        assert row.precision in DTYPES


@pytest.mark.parametrize("backend", MEASURED)
def test_the_table_says_no_more_than_was_measured(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No call of the sample has a lower ratio than its row, and none that auto takes is slower."""
    seen = ours = 0
    for row in load(MEASURED[backend]).rows:
        if row["us"] is None:
            continue
        exact = "ieee" if row["precision"] == "exact" else "tf32"
        monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", exact)
        I, H, layers, D, B, T = map(int, row["shape"].split(","))
        specs = [LayerSpec("LSTM", size, H, 0, D) for size in (I, D * H)][:layers]
        use = Use(T, B, row["training"], row["graph"], row["packed"])
        where, way = (H200, DTYPES[row["precision"]]), REPLAYED if row["graph"] else READY
        found = measured.pace(backend, row["regime"], way, where, specs, use)
        seen += 1
        if found != math.inf and measured.is_faster(found):
            ours += 1
            assert row["ratio"] >= found - 0.01 and row["ratio"] > 1, (found, row)
    assert ours > seen / (2 if backend == "triton" else 10)


def test_who_is_wrong_is_known() -> None:
    """Where PyTorch's float16 layers and ours parted in the sample, theirs were wrong."""
    for row in load(MEASURED["triton"]).rows:
        if row["precision"] != "fp16" or row["us"] is None:
            continue
        _, H, _, D, B, T = map(int, row["shape"].split(","))
        use = Use(T, B, row["training"], row["graph"], row["packed"])
        where, spec = (H200, FP16), (LayerSpec("LSTM", 1, H, 0, D),)
        pace = measured.pace("triton", row["regime"], READY, where, spec, use)
        assert (row["difference"] > 0.05) == (pace == math.inf), row


def test_the_table_is_of_one_kind_of_gpu() -> None:
    use, spec = Use(T, B, False, False), (PLAIN,)
    call = "triton", "registers/registers", READY
    assert measured.is_faster(measured.pace(*call, (H200, BF16), spec, use))
    for other in ((8, 0), (8, 9), (10, 0), (12, 0)):
        assert measured.pace(*call, (other, BF16), spec, use) is None
