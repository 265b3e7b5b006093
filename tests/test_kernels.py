"""What the GPU kernels compile to, seen by `python -m benchmarks kernels`: no GPU is needed.

Compiled for real, in processes of that command, though tests elsewhere interpret the kernels.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from benchmarks import __main__ as command
from benchmarks.gpu import kernels
from benchmarks.gpu.machine_code import counts, false_waits, instructions, time_loop
from benchmarks.gpu.triton_kernels import compile_variant
from benchmarks.gpu.variants import DTYPES, SAMPLED, Layer, Variant, layers, sample, variants
from benchmarks.speed.worker import Failed, Worker
from fastlstm.kernels.triton.config import Device

Row = dict[str, Any]
KEYS = [
    *("kernel", "arch", "dtype", "H", "N", "warps", "registers", "spill_bytes", "shared_bytes"),
    *("barriers_per_step", "mma_per_step", "compile_seconds"),
]


class Compiled(NamedTuple):
    rows: list[Row]
    assembly: Path

    def where(self, condition: Callable[[Row], bool]) -> list[Row]:
        """What to look at; never nothing, of which anything is true."""
        found = [row for row in self.rows if condition(row)]
        assert found
        return found


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Compiled:
    """Every row of the quick set, of a sample with --rest; and the folder of PTX and SASS."""
    folder = tmp_path_factory.mktemp("kernels")
    run = [sys.executable, "-m", "benchmarks", "kernels", "--quick", "--json", "--asm", folder]
    if request.config.option.rest:
        run.append("--sample")
    root = Path(__file__).parent.parent
    done = subprocess.run(run, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Compiled(json.loads(done.stdout), folder)


def brief(rows: list[Row]) -> list[Row]:
    """What a failed assertion should show of rows."""
    names = [
        *KEYS,
        "regime",
        "precision",
        "training",
        "I",
        "P",
        "D",
        "rows",
        "states",
        "cell",
        "asm",
    ]
    return [{name: row[name] for name in names} for row in rows]


@pytest.mark.compiles
def test_the_passes_of_one_layer() -> None:
    """A layer that is asked for twice is compiled once, a forced regime without room never."""
    layer = Layer("bfloat16", None, 28, 64, 1, 128, training=True)
    crowded = Layer("bfloat16", None, 1024, 1024, 1, 4096, training=False, regime="sequence")
    with kernels.fresh_compiler(), Worker(probe=int) as worker:
        found = worker.run(variants, [layer, layer, crowded], [90], timeout=60)
        rows = [worker.run(compile_variant, each, None, timeout=300) for each in found]
    assert [each.kernel for each in found] == [
        "lstm_fwd_registers_kernel",
        "lstm_bwd_registers_kernel",
        "lstm_weight_parts_kernel",
        "lstm_weight_sums_kernel",
    ]
    for variant, row in zip(found, rows, strict=True):
        assert variant.facts["H"] == 64 and "H 64" in str(variant)
        assert row["spill_bytes"] == row["spills_per_step"] == 0
    for row in rows[:2]:
        assert row["mma_per_step"] > row["wgmma_per_step"] == row["shuffles_per_step"] == 0
    assert rows[0]["barriers_per_step"] == 1


def is_forward(row: Row) -> bool:
    return row["kernel"] == "lstm_fwd_sequence_kernel"


@pytest.mark.compiles
def test_every_kernel_regime_and_type_is_there(compiled: Compiled) -> None:
    assert all(row.keys() >= set(KEYS) for row in compiled.rows)
    wanted = (
        {(f"lstm_{way}_cluster_kernel", "cluster", 90) for way in ("fwd", "bwd")}
        | {
            (f"lstm_weight_{name}_kernel", "weights", arch)
            for name in ("parts", "sums")
            for arch in (80, 90)
        }
        | {("lstm_input_products_kernel", "inputs", arch) for arch in (80, 90)}
        | {
            (f"lstm_{way}_{kind}_kernel", regime, arch)
            for way in ("fwd", "bwd")
            for kind, regime in (
                *(("registers", "registers"), ("sequence", "sequence")),
                ("step", "steps"),
            )
            for arch in (80, 90)
        }
        | {
            (f"rnn_{way}_{kind}_kernel", regime, arch)
            for way in ("fwd", "bwd")
            for kind, regime in (("sequence", "sequence"), ("step", "steps"))
            for arch in (80, 90)
        }
    )
    assert {(r["kernel"], r["regime"], r["arch"]) for r in compiled.rows} == wanted
    assert {(r["dtype"], r["precision"]) for r in compiled.rows} == {
        ("bfloat16", None),
        ("float16", None),
        ("float32", "tf32"),
        ("float32", "ieee"),
    }


@pytest.mark.compiles
def test_little_spills(compiled: Compiled) -> None:
    """Only where the weights take half of the registers.

    In TF32 a step of 64 units is short all the same (benchmarks/results/tuning.md).
    """
    most = {("registers", "float32", 64): 24}
    most |= {("steps", "float32", 16): 16}  # exact, on sm_80
    for row in compiled.rows:
        limit = most.get((row["regime"], row["dtype"], row["units"]), 0)
        limit = max(limit, 8 if row["regime"] == "registers" else 0)
        if row["kernel"] == "lstm_weight_parts_kernel" and row["precision"] == "ieee":
            limit = {80: 176, 90: 16}[row["arch"]]  # few calls have it: no user's default
        assert row["spill_bytes"] <= limit, brief([row])


@pytest.mark.compiles
def test_shared_memory_is_there(compiled: Compiled) -> None:
    limits = {arch: Device(arch, 1).shared_bytes for arch in (80, 90)}
    assert limits == {80: 163 * 1024, 90: 227 * 1024}
    assert brief([r for r in compiled.rows if r["shared_bytes"] > limits[r["arch"]]]) == []


@pytest.mark.compiles
def test_products_are_matrix_instructions(compiled: Compiled) -> None:
    """But for exact float32, which has none, and what adds up or follows products of others."""

    def has_product(row: Row) -> bool:
        elsewhere = row["kernel"] == "lstm_bwd_step_kernel" and row["P"] != row["H"]
        elsewhere = elsewhere or row["kernel"] == "lstm_weight_sums_kernel"
        return row["precision"] != "ieee" and not elsewhere

    assert brief([r for r in compiled.where(has_product) if r["mma_per_step"] == 0]) == []


@pytest.mark.compiles
def test_hopper_uses_its_own_matrix_instructions(compiled: Compiled) -> None:
    """In both passes of the sequence regime from H = 64 and 16 sequences on.

    Not where a projection comes between: its transposed factor is in registers.
    """

    def hopper(row: Row) -> bool:
        wide = row["arch"] == 90 and row["N"] >= 16 and row["dtype"] != "float32"
        whole = row["H"] >= 64 and row["P"] == row["H"]
        return wide and row["regime"] == "sequence" and whole

    rows = compiled.where(hopper)
    assert {row["kernel"] for row in rows} >= {
        "lstm_fwd_sequence_kernel",
        "lstm_bwd_sequence_kernel",
    }
    assert brief([row for row in rows if row["wgmma_per_step"] != row["mma_per_step"]]) == []


@pytest.mark.compiles
def test_barriers_of_the_forward_sequence(compiled: Compiled) -> None:
    """Two round h for the next product and two lay out y; in training two more lay out c.

    Normalised cells take four sums over units, each of two barriers; the others none.

    A projection is one more product. Offsets of packed rows, where x is not read by the kernel
    itself, are copied ahead like what they point to, behind a barrier of their own.
    """

    def allowed(row: Row) -> int:
        projected = 2 * (row["P"] != row["H"])
        copied = row["rows"] == "packed" and not row["fused"]
        sums = 8 * ("layer_norm" in row["cell"])
        return 4 + 2 * row["training"] + projected + copied + sums

    rows = compiled.where(is_forward)
    assert brief([row for row in rows if row["barriers_per_step"] > allowed(row)]) == []
    rows = [row for row in rows if "layer_norm" not in row["cell"]]
    plain = [r for r in rows if r["P"] == r["H"] and (r["rows"] != "packed" or r["fused"])]
    for training, most in ((False, 4), (True, 6)):  # of one of them a sample may have none
        found = [r["barriers_per_step"] for r in plain if r["training"] == training]
        assert max(found, default=most) == most
    assert plain


# Stall cycles of a step on sm_90 in bfloat16, dense rows.
BARS = {
    ("lstm_fwd_registers_kernel", False): {32: 235, 64: 285, 128: 415},
    ("lstm_fwd_registers_kernel", True): {64: 330, 128: 425},
    ("lstm_bwd_registers_kernel", True): {32: 285, 64: 345, 128: 445},
    ("lstm_fwd_cluster_kernel", False): {256: 340, 512: 450},
    ("lstm_bwd_cluster_kernel", True): {256: 300, 512: 420},
}


@pytest.mark.compiles
def test_steps_of_the_registers_regime(compiled: Compiled) -> None:
    """One barrier forward and at most two back, no shuffle, and as short as they are known to be.

    So it is with a backward pass over a cluster. Threads share sums in exact float32 alone: those
    of the gates of 2 or 4 sequences, and backward of four times as many terms.
    What keeps the gates for backward has two more stores.
    """
    rows = compiled.where(lambda row: row["regime"] in ("registers", "cluster"))
    for row in compiled.where(lambda row: row["regime"] == "registers"):
        assert row["barriers_per_step"] <= (1 if "fwd" in row["kernel"] else 2), brief([row])
        shuffles = 0
        if row["precision"] == "ieee":
            shuffles = 4 * row["N"] - 4 if "fwd" in row["kernel"] else 4 * row["N"] - 1
        assert row["shuffles_per_step"] == shuffles, brief([row])
        assert row["wgmma_per_step"] == 0, brief([row])
    names = ("arch", "dtype", "rows", "states", "I")
    for row in rows:
        I = 28 if row["regime"] == "registers" else row["I"]  # the others do not read x
        if tuple(row[name] for name in names) == (90, "bfloat16", "dense", False, I):
            bar = BARS.get((row["kernel"], row["training"]), {}).get(row["H"])
            assert bar is None or row["stall_per_step"] <= bar, brief([row])


def test_a_loop_is_found_with_the_loops_in_it() -> None:
    code = ["MOV R1", "ADD R2", "BRA 0x20", "@P0 BRA 0x10", "EXIT", "BRA 0x50"]
    sass = "\n".join(f"        /*{16 * i:04x}*/   {c} ;  /* 0x0 */" for i, c in enumerate(code))
    assert [each.text for each in time_loop(sass)] == ["ADD R2", "BRA 0x20", "@P0 BRA 0x10"]
    with pytest.raises(ValueError, match="no loop"):
        time_loop("        /*0000*/   EXIT ;  /* 0x0 */")


def test_stalls_are_read() -> None:
    """From bits 41 to 44 of the upper half of an instruction."""
    sass = "        /*0000*/   MOV R1, R2 ;  /* 0x1 */\n        /* 0x000fca0000000f00 */\n"
    assert [each.stall for each in instructions(sass)] == [5]
    assert counts(instructions(sass + sass), steps=2)["stall_per_step"] == 5


def compiled_to(*code: tuple[str, int, set[int]]) -> str:
    """Machine code: instructions, the scoreboard that counts each, and those it waits for."""
    lines = []
    for number, (text, counted_by, waits) in enumerate(code):
        control = 1 | counted_by << 5 | 7 << 8 | sum(1 << 11 + board for board in waits)
        lines.append(f"        /*{16 * number:04x}*/   {text} ;  /* 0x1 */")
        lines.append(f"        /* 0x{control << 41:016x} */")
    return "\n".join(lines) + "\n"


LOAD = ("@P5 LDG.E.64 R12, desc[UR18][R138.64]", 5, set[int]())
TANH = ("MUFU.TANH R104, R166", 5, set[int]())


@pytest.mark.parametrize(
    ("text", "board", "false"),
    [
        ("FMUL R105, R104, R104", 5, 1),
        ("FMUL R105, R104, R104", 4, 0),
        ("@!P0 FMUL R105, R104, R13", 5, 0),
        ("HMMA.16816.F32.BF16 R152, R36, R10.reuse, R152", 5, 1),
        ("HMMA.16816.F32.BF16 R152, R36, R12.reuse, R152", 5, 0),
        ("HMMA.16816.F32.BF16 R152, R10, R36, R152", 5, 0),
        ("STG.E.64 desc[UR18][R2.64], R10", 5, 1),
        ("STG.E.128 desc[UR18][R2.64], R10", 5, 0),
        ("LDG.E.U16 R14, desc[UR18][R12.64]", 5, 0),
    ],
)
def test_waits_for_loads_that_are_not_used_are_counted(text: str, board: int, false: int) -> None:
    """In the turn of the load, in the next one, and of two steps a turn half as many."""
    user = text, 7, {board}
    for code in ((LOAD, TANH, user), (user, LOAD, TANH)):
        found = counts(instructions(compiled_to(*code)), steps=2)
        assert found["false_waits_per_step"] == false / 2


def test_who_has_waited_once_waits_no_more() -> None:
    """And nobody waits for a load that comes later and is used before the next turn."""
    first, second = ("FMUL R105, R104, R104", 7, {5}), ("FADD R3, R13, R104", 7, {5})
    assert false_waits(instructions(compiled_to(LOAD, TANH, first, second))) == 1
    assert false_waits(instructions(compiled_to(TANH, first, LOAD, second))) == 0


def test_a_sample_has_every_kernel_with_every_cell() -> None:
    """What .ci/run compiles under the oldest Triton."""
    with kernels.fresh_compiler(), Worker(probe=int) as worker:
        found = worker.run(variants, layers(DTYPES, quick=True), [80, 90], timeout=60)
    chosen = sample(found)
    assert chosen == sample(found) and 60 < len(chosen) < len(found) / 2
    for names in SAMPLED:
        kinds = {tuple(each.facts[name] for name in names) for each in found}
        assert kinds == {tuple(each.facts[name] for name in names) for each in chosen}


class FakeWorker:
    """Finds two variants and compiles nothing: the second takes it down."""

    def __init__(self, probe: object) -> None: ...

    def __enter__(self) -> "FakeWorker":
        return self

    def __exit__(self, *_: object) -> None: ...

    def run(self, function: Callable[..., Any], *args: Any, timeout: float) -> Any:
        if function is variants:
            return [
                Variant("module", name, 80, (), (), (), {"kernel": name, "arch": 80})
                for name in ("good_kernel", "bad_kernel")
            ]
        if args[0].kernel == "bad_kernel":
            raise Failed("the process died with exit status -6")
        return dict.fromkeys(kernels.COLUMNS, 1) | args[0].facts


def test_a_kernel_that_takes_the_compiler_down_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kernels, "Worker", FakeWorker)
    assert command.main(["kernels"]) == 1
    out, error = capsys.readouterr()
    assert "1 kernels" in out and "good" in out
    reason = "the process died with exit status -6"
    assert error == f"error: 1 did not compile:\nkernel bad_kernel, arch 80: {reason}\n"


def test_missing_tools_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "find_spec", lambda name: None)
        assert command.main(["kernels"]) == 1
    assert "the package triton is missing" in capsys.readouterr().err

    def none(self: object) -> None:
        raise RuntimeError("Cannot find cuobjdump")

    monkeypatch.setattr("triton.knobs.env_nvidia_tool.get", none)
    assert command.main(["kernels"]) == 1
    assert "Cannot find cuobjdump" in capsys.readouterr().err
