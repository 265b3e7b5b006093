"""Quantised weights: the bits of the definition, from every instruction set, and errors."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from oracle import judge
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastlstm
from benchmarks.providers import provider
from benchmarks.speed.cases import Case
from benchmarks.speed.workload import make_workload
from fastlstm import extension
from fastlstm.quantized import reference
from fastlstm.quantized.operators import isa
from fastlstm.quantized.packing import (
    from_panels,
    from_rows,
    pack_rows,
    powers_of_rows,
    quantize_rows,
    to_panels,
)

DTYPES = ("int8", "bfloat16")
SIZES: list[tuple[dict[str, Any], int, int]] = [  # of the module; T, B
    ({"input_size": 33, "hidden_size": 20, "num_layers": 2, "bidirectional": True}, 6, 9),
    ({"input_size": 5, "hidden_size": 7, "bias": False}, 4, 3),
    ({"input_size": 130, "hidden_size": 128}, 1, 1),
    ({"input_size": 1, "hidden_size": 1}, 3, 2),
    ({"input_size": 16, "hidden_size": 70, "num_layers": 2, "proj_size": 65}, 5, 17),
    ({"input_size": 7, "hidden_size": 70, "nonlinearity": "tanh", "bidirectional": True}, 4, 5),
    ({"input_size": 7, "hidden_size": 70, "nonlinearity": "relu", "num_layers": 2}, 4, 5),
]


@pytest.fixture(autouse=True, scope="module")
def without_gradients() -> Iterator[None]:
    if extension.error() is not None and os.environ.get("FASTLSTM_REQUIRE_EXTENSION") != "1":
        pytest.skip("the compiled kernels are not here")
    with torch.no_grad():
        yield


def small(options: dict[str, Any], dtype: str = "int8", scale: float = 1.0) -> Any:
    """A quantised module, with weights that are not all alike."""
    torch.manual_seed(0)
    made: Any = (nn.RNN if "nonlinearity" in options else nn.LSTM)(**options)
    for w in made.parameters():
        w.mul_(scale * torch.rand(len(w)).view(-1, *[1] * (w.dim() - 1)))
    return fastlstm.quantize(made.eval(), dtype)


def defined(module: Any, x: Tensor, h0: Any = None, c0: Any = None) -> list[Tensor]:
    """y, h_n and c_n, if there is one, by the definition."""
    weights, specs = module._weights(), module.specs()
    each, D, states = len(weights) // len(specs), specs[0].directions, []
    for k, spec in enumerate(specs):
        first, *rest = (None if s is None else s[k * D : (k + 1) * D] for s in (h0, c0))
        x, *final = reference.layer(spec, x, weights[k * each : (k + 1) * each], first, *rest)
        states.append(final)
    return [x, *(torch.cat(s) for s in zip(*states, strict=True) if s[0] is not None)]


def flat(result: Any) -> list[Tensor]:
    y, final = result
    return [y, *(final if isinstance(final, tuple) else (final,))]


def assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a.nan_to_num(7), b.nan_to_num(7)), (a - b).abs().max()


# --- int8: the definition -------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 30.0])  # the second one saturates gates
@pytest.mark.parametrize(("options", "T", "B"), SIZES)
def test_bits_of_the_definition(options: dict[str, Any], T: int, B: int, scale: float) -> None:
    module = small(options, scale=scale)
    x = torch.randn(T, B, module.input_size)
    rows, H = module.num_layers * (1 + module.bidirectional), module.hidden_size
    h0, c0 = torch.randn(rows, B, module.proj_size or H), torch.randn(rows, B, H)
    if module.mode == "LSTM":
        assert_same(flat(module(x, (h0, c0))), defined(module, x, h0, c0))
    else:
        assert_same(flat(module(x, h0)), defined(module, x, h0))
    assert_same(flat(module(x)), defined(module, x))


def test_bits_of_strange_rows() -> None:
    """Rows of one sign, constant, empty, huge, tiny, with NaN or infinity stay by themselves."""
    module = small({"input_size": 9, "hidden_size": 33})
    x = torch.randn(3, 10, 9)
    for row, value in enumerate((0.0, -0.0, 3.0, -2.0, 1e38, 1e-44, torch.nan, torch.inf)):
        x[1, row] = value
    x[1, 8, 4] = torch.nan
    x[:, 9] = x[:, 9].abs()
    got = flat(module(x))
    assert_same(got, defined(module, x))
    assert got[0][1, 6].isnan().all()
    assert got[0][1, 8].isnan().all()
    assert got[0][:, [0, 1, 2, 3, 9]].isfinite().all()


INSTRUCTION_SETS = (
    *("portable", "avx2", "avxvnni", "avx512vnni", "avx512bf16", "avx512fp16"),
    *("dotprod", "i8mm"),
)

_EVERY = """
import hashlib, torch, test_quantized as t
digest = hashlib.sha256()
with torch.no_grad():
    for options, T, B in t.SIZES:
        module = t.small(options)
        for result in t.flat(module(torch.randn(T, B, module.input_size))):
            digest.update(result.numpy().tobytes())
print(t.isa(), digest.hexdigest())
"""


def run_with(name: str, *command: str) -> subprocess.CompletedProcess[str]:
    """Run Python with the kernels of an instruction set; skip the test where they cannot run."""
    paths = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "FASTLSTM_QUANTIZED_ISA": name, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    if "is not available on this machine" in done.stdout + done.stderr:
        pytest.skip(f"this machine has no {name}")
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.mark.slow
@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_same_bits_from_every_instruction_set(name: str) -> None:
    done = run_with(name, "-c", _EVERY)
    digest = hashlib.sha256()
    for options, T, B in SIZES:
        module = small(options)
        for result in flat(module(torch.randn(T, B, module.input_size))):
            digest.update(result.numpy().tobytes())
    assert done.stdout.split() == [name, digest.hexdigest()]
    assert isa() in INSTRUCTION_SETS


# --- the same bits for every batch, layout and number of threads ----------------------------


@pytest.fixture
def threads() -> Iterator[Any]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# With one thread its bfloat16 weights are widened once a call, with three, or fewer rows, they are
# not.
WIDENED = {"input_size": 150, "hidden_size": 70, "proj_size": 33, "bidirectional": True}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("options", "T", "B"),
    [*SIZES, ({"input_size": 512, "hidden_size": 512}, 5, 13), (WIDENED, 100, 13)],
)
def test_rows_do_not_depend_on_their_batch(
    options: dict[str, Any], T: int, B: int, dtype: str, threads: Any
) -> None:
    module = small(options, dtype)
    x = torch.randn(T, B, module.input_size)
    threads(1)
    want = flat(module(x))
    threads(3)
    assert_same(flat(module(x)), want)
    for n in range(2, min(B, 9)):
        assert_same(flat(module(x[:, :n])), [t[:, :n] for t in want])
    for b in range(B):
        assert_same(flat(module(x[:, b : b + 1])), [t[:, b : b + 1] for t in want])
        alone = flat(module(x[:, b]))
        assert_same(alone, [t[:, b] for t in want])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("directions", [1, 2])
def test_lengths_packed_rows_and_layouts(dtype: str, directions: int) -> None:
    sizes = {"input_size": 10, "hidden_size": 33, "num_layers": 2}
    module = small({**sizes, "bidirectional": directions == 2}, dtype)
    x, lengths = torch.randn(6, 5, 10), torch.tensor([2, 6, 1, 6, 3])
    y, h, c = flat(module(x, lengths=lengths))
    for b, n in enumerate(lengths.tolist()):
        alone = flat(module(x[:n, b : b + 1]))
        assert_same([y[:n, b : b + 1], h[:, b : b + 1], c[:, b : b + 1]], alone)
        assert (y[n:, b] == 0).all()
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    rows, final = module(packed)
    assert_same([pad_packed_sequence(rows)[0], *final], [y, h, c])
    hx = torch.randn(2, 2 * directions, 5, 33).unbind()
    rows, final = module(packed, hx)
    assert_same([pad_packed_sequence(rows)[0], *final], flat(module(x, hx, lengths=lengths)))
    empty = flat(module(x, hx, lengths=torch.zeros(5, dtype=torch.int64)))
    assert_same(empty, [torch.zeros_like(y), *hx])
    module.batch_first = True
    other = flat(module(x.transpose(0, 1), lengths=lengths))
    assert_same(other, [y.transpose(0, 1), h, c])


@pytest.mark.parametrize("dtype", DTYPES)
def test_resets(dtype: str) -> None:
    module = small({"input_size": 10, "hidden_size": 33}, dtype)
    x, reset = torch.randn(5, 3, 10), torch.zeros(5, 3, dtype=torch.bool)
    reset[2, 1] = True
    y, h, c = flat(module(x, reset=reset))
    want, h_n, c_n = flat(module(x[2:, 1:2]))
    assert_same([y[2:, 1:2], h[:, 1:2], c[:, 1:2]], [want, h_n, c_n])
    assert_same([y[:, :1]], [module(x[:, :1])[0]])


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_16_bit_input(dtype: str, kind: torch.dtype) -> None:
    """It is read and written as such; all between is float32, so one layer is rounded once."""
    module = small({"input_size": 10, "hidden_size": 33, "bidirectional": True}, dtype)
    x = torch.randn(5, 3, 10).to(kind)
    got = flat(module.to(kind)(x))
    assert_same(got, [t.to(kind) for t in flat(module(x.float()))])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_a_cell_is_a_layer_of_one_step(dtype: str, bias: bool) -> None:
    torch.manual_seed(0)
    cell = nn.LSTMCell(10, 33, bias).eval()
    layer = nn.LSTM(10, 33, bias=bias).eval()
    layer.load_state_dict({f"{name}_l0": w for name, w in cell.state_dict().items()})
    cell, layer = fastlstm.quantize(cell, dtype), fastlstm.quantize(layer, dtype)
    x, h, c = torch.randn(4, 10), torch.randn(4, 33), torch.randn(4, 33)
    want = layer(x[None], (h[None], c[None]))[1]
    assert_same(list(cell(x, (h, c))), [t[0] for t in want])
    assert_same(list(cell(x[1], (h[1], c[1]))), [t[0, 1] for t in want])
    assert_same(list(cell(x)), [t[0] for t in layer(x[None])[1]])


# --- bfloat16 --------------------------------------------------------------------------------

# Those whose products take rounded activations. The others widen the weights.
ROUNDING = ("avx512bf16", "avx512fp16", "i8mm")


def rounded(x: Tensor) -> Tensor:
    """Rows of activations as products take them."""
    if isa() != "avx512fp16":
        return x.bfloat16().float()
    power = powers_of_rows(x.view(-1, x.shape[-1])).view(*x.shape[:-1], 1)
    return (x / power).half() * power


def assert_near(
    dtype: torch.dtype, module: Any, options: dict[str, Any], x: Tensor, *hx: Tensor
) -> None:
    """Assert that the results are as close to float64 as those of PyTorch in a dtype."""
    weights = module.dequantize().state_dict()
    kind = nn.LSTM if module.mode == "LSTM" else nn.RNN
    numbers = {"x": x, **{str(k): state for k, state in enumerate(hx)}}

    def call(any: Any, x: Tensor, *hx: Tensor) -> dict[Any, Tensor]:
        return dict(enumerate(flat(any(x, (hx if len(hx) > 1 else hx[0]) if hx else None))))

    def solve(dtype: torch.dtype, values: dict[str, Tensor]) -> dict[str, Tensor]:
        theirs = kind(**options).to(dtype)
        theirs.load_state_dict({name: values[name].to(dtype) for name in weights})
        return call(theirs, *(values[name].to(dtype) for name in numbers))

    truth, allowed = judge(solve, dtype, {**numbers, **weights})
    for name, got in call(module, x, *hx).items():
        assert (got - truth[name]).abs().max() <= allowed[name]


@pytest.mark.parametrize(("options", "T", "B"), SIZES)
def test_error_of_bfloat16(options: dict[str, Any], T: int, B: int) -> None:
    """That of PyTorch in float32; in bfloat16 where activations are rounded."""
    module = small(options, "bfloat16")
    dtype = torch.bfloat16 if isa() in ROUNDING else torch.float32
    assert_near(dtype, module, options, torch.randn(T, B, module.input_size))


@pytest.mark.parametrize("options", [SIZES[1][0], SIZES[2][0], SIZES[6][0]])
def test_activations_beside_bfloat16_are_rounded_once(options: dict[str, Any]) -> None:
    """To nearest even, before the products. Only float16 also rounds the sums."""
    if isa() not in ROUNDING:
        pytest.skip(f"{isa()} does not round activations")
    options = {**options, "bidirectional": False, "num_layers": 1}
    module = small(options, "bfloat16")
    x, h = torch.randn(1, 7, module.input_size), torch.randn(1, 7, module.hidden_size)
    x.view(-1)[:3] = torch.tensor([1.00390625, 1.01171875, -(2**-130)])  # two ties; a denormal
    c = [torch.randn_like(h)] if module.mode == "LSTM" else []
    less = rounded(x), rounded(h), *c
    dtype = torch.bfloat16 if isa() == "avx512fp16" else torch.float32
    assert_near(dtype, module, options, *less)
    assert_same(*(flat(module(x, (h, *c) if c else h)) for x, h, *c in ((x, h, *c), less)))


@pytest.mark.parametrize("exponent", [-90, -30, 20, 110])
def test_bfloat16_weights_of_any_size(exponent: int) -> None:
    """Each row of weights, and each of activations, has a range of its own."""
    options = {"input_size": 70, "hidden_size": 66, "nonlinearity": "relu", "bias": False}
    theirs = nn.RNN(**options).eval()
    for w in theirs.parameters():
        w.copy_(torch.randn_like(w) * 2.0 ** torch.linspace(-2, 2, len(w)).round()[:, None])
    theirs.weight_ih_l0.mul_(2.0**exponent)
    module = fastlstm.quantize(theirs, "bfloat16")
    for scale in (1.0, 2.0**-exponent):
        assert_near(torch.bfloat16, module, options, torch.randn(3, 9, 70) * scale)


@pytest.mark.parametrize("options", [SIZES[0][0], SIZES[3][0], SIZES[6][0]])
def test_strange_rows_in_bfloat16(options: dict[str, Any]) -> None:
    """A row with NaN is NaN from there on; no row changes another one."""
    module = small({**options, "bidirectional": False}, "bfloat16")
    x = torch.randn(3, 9, module.input_size)
    for row, value in enumerate((0.0, 1e38, -1e38, 1e-44, torch.nan, torch.inf)):
        x[1, row] = value
    x[1, 6, -1] = -torch.nan
    y, *final = flat(module(x))
    for b in range(9):
        assert_same(flat(module(x[:, b : b + 1])), [t[:, b : b + 1] for t in (y, *final)])
    assert y[:, [0, 3, 7, 8]].isfinite().all()
    assert y[1:, [4, 6]].isnan().all()
    assert y[0].isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(INSTRUCTION_SETS, key=ROUNDING.__contains__, reverse=True))
def test_bfloat16_with_every_instruction_set(name: str) -> None:
    """All tests of these weights pass."""
    mine = "bfloat16 and not every_instruction_set"
    run_with(name, "-m", "pytest", "-qx", "-p", "no:cacheprovider", "-k", mine, __file__)


ERROR_CASES = [(128, 128, 1, 1, 1, 64), (40, 64, 2, 2, 4, 20), (256, 256, 2, 1, 8, 16)]


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("case", ERROR_CASES)
def test_error_is_that_of_onnx_runtime(case: tuple[int, ...], positive: bool) -> None:
    """The bar: at most 1.1 times the error of its 8-bit LSTM, with a scale for each row."""
    work = make_workload(Case("", *case), "infer", torch.float32)
    work = replace(work, x=work.x.abs() if positive else work.x)
    truth, ours, theirs = (
        provider(name).contender(on).results()["y"]
        for name, on in (
            ("torch", work.to(torch.float64)),
            ("fastlstm-int8", work),
            ("onnxruntime-int8", work),
        )
    )
    got, bar = ((y - truth).square().mean().sqrt() for y in (ours, theirs))
    assert got <= 1.1 * bar


# --- packing ---------------------------------------------------------------------------------


@pytest.mark.parametrize("gates", [1, 4])
def test_panels_come_back(gates: int) -> None:
    w = torch.randint(-127, 128, (gates * 21, 13), dtype=torch.int8)
    panels = to_panels(w, gates)
    assert panels.shape == (2 if gates == 4 else 1, 4, 64, 4)
    assert torch.equal(from_panels(panels, gates, 21, 13), w)
    numbers = [torch.randn(gates * 21), torch.randn(gates * 21)]
    assert_same(from_rows(pack_rows(numbers, gates), gates, 21), numbers)


def test_rows_are_quantised_symmetrically() -> None:
    w = torch.tensor([[1.01, -2.0, 0.5], [0.0, 0.0, 0.0], [1e-44, 0.0, 0.0], [3.0, 3.0, -3.0]])
    q, scale = quantize_rows(w)
    assert q.tolist() == [[64, -127, 32], [0, 0, 0], [0, 0, 0], [127, 127, -127]]
    assert scale[1] == scale[2] == 0


def test_powers_of_rows() -> None:
    w = torch.tensor([[0.7, -3.9], [1.0, 0.0], [0.0, -0.0], [2.0**-126, 0.0], [3e38, 1.0]])
    assert powers_of_rows(w).log2().tolist() == [1, 0, -100, -100, 127]
    assert powers_of_rows(w[:, :0]).log2().tolist() == [-100] * 5
