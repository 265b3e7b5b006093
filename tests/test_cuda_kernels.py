"""What the CUDA kernels compile to, seen by `python -m benchmarks kernels --backend cuda`.

Compiled for real, wherever nvcc is: no GPU is needed.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from test_kernels import KEYS

from benchmarks import BenchmarkError
from benchmarks import __main__ as command
from benchmarks.gpu import cuda_kernels
from benchmarks.gpu.machine_code import counts, disassembled, resources, time_loop
from fastlstm import extension

Row = dict[str, Any]
ARCHS = (80, 90)


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    """Of every kernel: of the library that is installed, else compiled."""
    run = [sys.executable, "-m", "benchmarks", "kernels", "--backend", "cuda", "--json"]
    if extension.cuda_library() is not None:
        run += ["--library"]
    else:
        try:
            cuda_kernels.compilations([*ARCHS])
        except BenchmarkError as error:
            pytest.skip(str(error))
    root = Path(__file__).parent.parent
    archs = map(str, ARCHS)
    done = subprocess.run([*run, "--arch", *archs], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.compiles
def test_one_kernel_of_the_library() -> None:
    """What the tests below hold true for all of them."""
    library = extension.cuda_library()
    if library is None:
        pytest.skip("no library has been built: the tests below compile")
    code = disassembled(library, "--gpu-architecture=sm_90", "-fun", "lstm_fwd_cluster_bf16_n1_r8")
    row = resources(code) | counts(time_loop(code))
    assert row["spill_bytes"] == row["spills_per_step"] == 0
    assert row["mma_per_step"] > 0
    assert row["barriers_per_step"] == 1


def names(rows: list[Row], unless: Callable[[Row], bool]) -> list[str]:
    """What a failed assertion should show: the kernels for which it does not hold."""
    return [f"{row['kernel']} sm_{row['arch']}" for row in rows if not unless(row)]


@pytest.mark.compiles
def test_every_regime_and_type_is_there(rows: list[Row]) -> None:
    """In both passes, for few and for many sequences; clusters where GPUs have them.

    The regime wide has 16-bit numbers and 8 sequences only.
    """
    regimes = [("block", 80), ("block", 90), ("cluster", 90), ("grid", 80), ("grid", 90)]
    wanted = product(regimes, cuda_kernels.KINDS.values(), (8, 16), ("fwd", "bwd"))
    found = {
        ((r["regime"], r["arch"]), (r["dtype"], r["precision"]), r["N"], r["kernel"].split("_")[1])
        for r in rows
    }
    kinds = [cuda_kernels.KINDS[kind] for kind in ("bf16", "f16")]
    assert found == {*wanted, *product([("wide", 90)], kinds, (8,), ("fwd", "bwd"))}
    assert all(row.keys() >= set(KEYS) for row in rows)


@pytest.mark.compiles
def test_nothing_spills(rows: list[Row]) -> None:
    assert names(rows, lambda row: row["spill_bytes"] == 0) == []
    assert names(rows, lambda row: row["spills_per_step"] == 0) == []


@pytest.mark.compiles
def test_the_largest_block_of_each_kernel_fits_a_multiprocessor(rows: list[Row]) -> None:
    """There are 2^16 registers; a warp takes 8 a lane at a time. No kernel is without a plan."""

    def fits(row: Row) -> bool:
        registers = -(-row["registers"] // 8) * 8 * 32 * row["warps"]
        return row["registers"] <= 255 and registers <= 1 << 16

    assert names(rows, lambda row: row["shared_bytes"] is not None) == []
    assert names(rows, fits) == []
    limits = {80: 163 * 1024, 90: 227 * 1024}
    assert names(rows, lambda row: row["shared_bytes"] <= limits[row["arch"]]) == []


@pytest.mark.compiles
def test_products_are_matrix_instructions(rows: list[Row]) -> None:
    """But for exact float32, which has none."""

    def right(row: Row) -> bool:
        exact = row["precision"] == "ieee"
        return row["ffma_per_step"] > 0 and (row["mma_per_step"] == 0) == exact

    assert names(rows, right) == []


@pytest.mark.compiles
def test_a_step_is_one_loop(rows: list[Row]) -> None:
    """With the copies of the inputs of a later step in it: other loops are not taken for it.

    The regime wide has loads instead, and waits.
    """
    found = "copies_per_step", "waits_per_step"
    assert names(rows, lambda row: row[found[row["regime"] == "wide"]] > 0) == []


@pytest.mark.compiles
def test_barriers_of_a_step(rows: list[Row]) -> None:
    """In a block the exchange is one, and no terms are shared among warps (plan.parts is 1).

    Elsewhere the sums of such warps take one, behind a branch. Clusters exchange without: every
    thread waits for the bytes that are stored to its block. A grid's blocks have one before they
    tell the others that all threads have stored. In the regime wide forward gathers what a block
    sends, and backward what it multiplies.
    """
    expected = {"block": (1, 0), "cluster": (1, 1), "grid": (2, 0)}

    def right(row: Row) -> bool:
        wide = 2 if "_fwd_" in row["kernel"] else 1, 1
        found = row["barriers_per_step"], row["waits_per_step"]
        return found == expected.get(row["regime"], wide)

    assert names(rows, right) == []
    clusters = [row for row in rows if row["regime"] in ("cluster", "wide")]
    assert names(clusters, lambda row: row["sends_per_step"] > 0) == []


def test_a_jump_from_behind_the_end_is_no_loop() -> None:
    code = ["MOV", "WAIT", "@P0 BRA 0x50", "@P1 BRA 0x0", "EXIT", "WAIT", "NOP", "BRA 0x10"]
    sass = "\n".join(f"        /*{16 * i:04x}*/   {c} ;  /* 0x0 */" for i, c in enumerate(code))
    assert [instruction.text for instruction in time_loop(sass)] == code[:4]


@pytest.mark.skipif(extension.error() is not None, reason="the extension, which plans, is missing")
def test_what_does_not_compile_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDACXX", "false")
    assert command.main(["kernels", "--backend", "cuda", "--arch", "90"]) == 1
    out, error = capsys.readouterr()
    assert "no kernels" in out
    failed = [f"{source}.cu, arch 90: nvcc: exit status 1" for source in cuda_kernels.SOURCES]
    assert error.splitlines() == ["error: 4 did not compile:", *failed]


def test_missing_tools_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("CUDACXX", raising=False)
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    assert command.main(["kernels", "--backend", "cuda"]) == 1
    assert "there is no nvcc" in capsys.readouterr().err
    monkeypatch.setenv("CUDACXX", "nvcc")
    monkeypatch.setattr("fastlstm.extension.error", lambda: "no compiler")
    assert command.main(["kernels", "--backend", "cuda"]) == 1
    assert "plans are in the compiled extension: no compiler" in capsys.readouterr().err
