"""Kernels that were compiled ahead, started by C++ on a stand-in for the driver and executed.

From Python to the last instruction this is what a GPU gets; tests/ptx/ahead.py says how. The cases
are those of the GPU tests that such kernels compute.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ahead_host import library as build_library
from ahead_scenarios import of_clusters, of_general, on_demand, packaged, scenarios
from cases import Case
from executed import AheadRun, Broken, Verdict, broken, judged
from test_executed import (
    CLUSTERS,
    CLUSTERS_OF_TF32,
    GPU,
    RAGGED_CLUSTERS,
    RAGGED_CLUSTERS_OF_TF32,
    REGISTERS,
    WEIGHTS,
    shrunk,
)

from benchmarks.gpu.kernels import fresh_compiler
from benchmarks.speed.worker import Worker

pytestmark = [
    pytest.mark.executed,
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="the stand-in takes the place of a GPU's driver"
    ),
]
TIMEOUT = 600  # seconds for a case, which takes a few where the machine is not busy
INPUTS = {"lstm_fwd_inputs"}  # of input products that a loop does not make
WIDEST = {"bf16": 128, "fp16": 128, "tf32": 32}  # H of what is compiled ahead
ARCHS = 80, 90
Record = Callable[[str, object], None]
Workers = Callable[..., Worker]

# More units than one multiprocessor holds; states given and absent; odd sizes; all kinds of rows.
CLUSTERED = [
    AheadRun(case, ("bf16", "fp16")[k % 2], 90)
    for k, case in enumerate(
        [
            *CLUSTERS,
            Case(T=2, B=11, I=4, H=256, directions=2, hx=False, wrt=("x",)),
            *RAGGED_CLUSTERS,
            Case(T=3, B=3, I=5, H=130, lengths=(1, 3, 2), packed=True, directions=2),
            Case(T=3, B=3, I=5, H=512, lengths=(1, 0, 3), reset=True),
        ]
    )
]
CLUSTERED += [
    AheadRun(case, "tf32", 90)
    for case in (
        *CLUSTERS_OF_TF32,
        Case(T=3, B=9, I=4, H=128),
        Case(T=2, B=2, I=4, H=120),
        *RAGGED_CLUSTERS_OF_TF32,
    )
]

# Sizes that divide by 8 and 2, whose kernels read their weights in wide words. The first is the
# sample of the short run.
EVEN = [
    Case(T=3, B=3, I=10, H=16, bias=False, hx=False),
    Case(T=4, B=9, I=28, H=64, directions=2),
    Case(T=3, B=3, I=70, H=32),
    Case(T=6, B=5, I=10, H=16, lengths=(2, 0, 1, 6, 3), directions=2, recompute=True),
    Case(T=6, B=5, I=10, H=16, lengths=(2, 6, 1, 6, 3), packed=True, cell_states=True),
    Case(T=5, B=2, I=28, H=128, reset=True),
    Case(T=5, B=27, I=28, H=32, directions=2, bias=False),
]
# In exact float32 a program has 2 sequences, or on a small GPU 4, as it has where they end early.
EXACT = [
    AheadRun(case, "exact", arch, processors=processors)
    for case, arch, processors in (
        (Case(T=3, B=3, I=10, H=16, bias=False, hx=False), 90, 132),
        (Case(T=4, B=5, I=28, H=64, directions=2), 80, 132),
        (Case(T=3, B=2, I=5, H=33), 90, 132),
        (Case(T=3, B=6, I=5, H=64), 90, 1),
        (Case(T=4, B=7, I=70, H=20, directions=2, recompute=True), 80, 1),
        (Case(T=2, B=9, I=10, H=5, hx=False, grad_layout="sliced"), 90, 1),
        (Case(T=3, B=4, I=5, H=60, lengths=(2, 0, 1, 3), directions=2, recompute=True), 80, 132),
        (Case(T=4, B=5, I=5, H=32, lengths=(2, 4, 1, 4, 3), packed=True), 90, 132),
        (Case(T=3, B=3, I=5, H=64, lengths=(1, 3, 2), packed=True, recompute=True), 80, 132),
        (Case(T=5, B=3, I=5, H=16, lengths=(0, 5, 3), reset=True, cell_states=True), 90, 132),
    )
]


def runs() -> Iterator[AheadRun]:
    """Each case in one precision; these and the GPUs take turns."""
    cases = dict.fromkeys([*EVEN, *WEIGHTS, *REGISTERS, *shrunk(GPU)])
    number = 0
    for case in cases:
        able = [name for name, most in WIDEST.items() if most >= case.H and not case.proj]
        if able:
            yield AheadRun(case, able[number % len(able)], ARCHS[number % 2])
            number += 1


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """csrc/triton on the stand-in."""
    return build_library(tmp_path_factory.mktemp("ahead"))


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    """A process for each GPU, in which Triton compiles."""
    found: dict[tuple[int, int], Worker] = {}

    def worker(arch: int, processors: int = 132) -> Worker:
        gpu = arch, processors
        if gpu not in found:
            found[gpu] = Worker(probe=int)
            found[gpu].__enter__()
        return found[gpu]

    with fresh_compiler():
        yield worker
        for each in found.values():
            each.__exit__(None, None, None)


@pytest.mark.parametrize("run", [*runs(), *EXACT], ids=str)
def test_error_is_that_of_pytorch(
    workers: Workers, library: Path, run: AheadRun, record_property: Record
) -> None:
    worker = workers(run.arch, run.processors)
    verdict: Verdict = worker.run(judged, run._replace(library=library), timeout=TIMEOUT)
    record_property(f"executed in {run.precision}", verdict.ratio)
    assert not verdict.complaints, "\n".join([str(run), *verdict.complaints])
    assert not verdict.races, f"{run}: {sorted(verdict.races)}"
    passes = {"lstm_fwd_registers", "lstm_bwd_registers"}
    case = run.case
    dense = not (case.lengths or case.reset)
    if dense and (not case.wrt or any(name.startswith(("weight", "bias")) for name in case.wrt)):
        passes |= {"lstm_bwd_parts", "lstm_bwd_sums"}
    assert {name.partition("-")[0] for name in verdict.kernels} - INPUTS == passes
    if run.precision == "exact":
        batch = 2 if dense and run.processors > 1 else 4
        assert all("-exact-" in name for name in verdict.kernels)
        assert all(f"n{batch}-" in name for name in verdict.kernels if "_registers-" in name)


@pytest.mark.parametrize("run", CLUSTERED, ids=str)
def test_blocks_of_a_cluster(
    workers: Workers, library: Path, run: AheadRun, record_property: Record
) -> None:
    verdict: Verdict = workers(90).run(judged, run._replace(library=library), timeout=TIMEOUT)
    record_property(f"executed in {run.precision}", verdict.ratio)
    assert not verdict.complaints, "\n".join([str(run), *verdict.complaints])
    assert not verdict.races, f"{run}: {sorted(verdict.races)}"
    begins = {name.split("-")[0] for name in verdict.kernels}
    summed = not (run.case.wrt or run.case.lengths or run.case.reset)
    sums = {"lstm_bwd_parts", "lstm_bwd_sums"} if summed else set()
    assert begins - INPUTS == {"lstm_fwd_cluster", "lstm_bwd_cluster"} | sums


def test_what_is_broken_is_seen(workers: Workers, library: Path) -> None:
    """A barrier in shared memory that is missing, one after the other."""
    run = AheadRun(EVEN[1], "bf16", 80, library)
    found: list[Broken] = workers(80).run(broken, run, r"bar\.sync\s+0;", "", timeout=TIMEOUT)
    assert found and any(each.seen for each in found)


@pytest.fixture(scope="module")
def seen(library: Path) -> dict[str, Any]:
    """What the scenarios of tests/ahead_scenarios.py come to."""
    folder = library.parent / "kernels_of_scenarios"
    with fresh_compiler(), Worker(probe=int) as worker:
        found: dict[str, Any] = worker.run(scenarios, library, folder, timeout=TIMEOUT)
    return found


def test_launches_ask_for_what_plans_say(seen: dict[str, Any]) -> None:
    wanted = {"x": 5, "y": 2, "z": 1, "threads": 128, "shared": 1024, "cluster": 1}
    wanted |= {"stream": 0, "device": 0}
    assert len(seen["inference"]) == len(seen["compiled"]) == 1
    forward, backward, parts, sums = seen["training"]
    assert (parts["z"], sums["y"]) == (2, 2)  # directions
    for launch in [*seen["inference"], *seen["compiled"], forward, backward]:
        assert {name: launch[name] for name in wanted} == wanted
    inputs, *rest = [(launch["x"], launch["y"], launch["threads"]) for launch in seen["exact"]]
    assert inputs == (1, 2, 128) and rest[:2] == [(10, 1, 128), (10, 1, 128)] and len(rest) == 4
    assert "registers: 256 x 2 tiles" in seen["exact explained"]
    assert "compiled ahead" in seen["exact explained"]
    assert seen["many"] == [66, 34]  # of 132 multiprocessors, for two directions
    assert seen["captured"] == (1, False)  # a kernel was loaded meanwhile, and nothing is left
    assert "compiled ahead" in seen["explained"]
    assert "Triton is not needed" in seen["backends"]


def test_a_packaged_program_starts_the_same_kernels(library: Path) -> None:
    """What AOTInductor has compiled calls the operators in C++."""
    folder = library.parent / "kernels_of_a_package"
    with fresh_compiler(), Worker(probe=int) as worker:
        found: dict[str, Any] = worker.run(packaged, library, folder, timeout=TIMEOUT)
    (launch,) = map(json.loads, found["launches"])
    wanted = {"x": 5, "y": 2, "z": 1, "threads": 128}
    assert {name: launch[name] for name in wanted} == wanted
    assert found["y"] == (3, 19, 128)


def test_clusters_go_where_they_have_room(library: Path) -> None:
    """19 sequences are three clusters; 7 groups of multiprocessors have one of 16 blocks each."""
    folder = library.parent / "kernels_of_clusters"
    with fresh_compiler(), Worker(probe=int) as worker:
        found: dict[str, Any] = worker.run(of_clusters, library, folder, timeout=TIMEOUT)
    wanted = {"x": 48, "y": 1, "z": 1, "threads": 256, "cluster": 16}
    assert {name: found["launch"][name] for name in wanted} == wanted
    assert "no kernel for this call was compiled ahead" in found["many"]  # 43 are more than 6 * 7
    assert "cluster: 2048 x 8 tiles" in found["described"]
    assert "; compiled ahead" in found["described"]
    assert found["room"] == (0, 0, 28, 14, 7)
    assert found["no room"] == (0, 0, 0, 0, 0)
    assert found["wrong"] == (0, 0, 0, 14, 0)  # the driver refuses a size that is not the kernel's


def test_what_every_gpu_gets_is_enough(library: Path) -> None:
    """Calls that have no kernel of their own there take another one, in every pass."""
    folder = library.parent / "general_kernels"
    with fresh_compiler(), Worker(probe=int) as worker:
        found = worker.run(of_general, library, folder, timeout=TIMEOUT)
    assert {call: started for call, started in found.items() if started != (1, 4, 2)} == {}


@pytest.mark.parametrize("arch", ARCHS)
def test_kernels_are_compiled_when_they_are_first_called(library: Path, arch: int) -> None:
    folder = library.parent / "no_kernels"
    with fresh_compiler(), Worker(probe=int) as worker:
        found: dict[str, Any] = worker.run(on_demand, library, folder, arch, timeout=TIMEOUT)
    assert not found["asked at first"] and found["problem"] is found["compiled"] is None
    assert found["tried"] == ["lstm_fwd_registers-bf16-u16n4i16-dense-even"]
    assert found["inference"] == ["lstm_fwd_registers-bf16-u64n4i32-dense-even"]
    assert [launch["shared"] for launch in found["launches"]] == [1024, 1024]
    begins = [name.partition("-")[0] for name in found["training"]]
    passes = ["lstm_fwd_registers", "lstm_bwd_registers"]
    assert begins == [*passes, "lstm_bwd_parts", "lstm_bwd_sums"]
    assert found["interrupted"] == "by Ctrl-C"  # and the next one tries again
    assert found["threads"] == 4
    assert set(found["of threads"]) == {"lstm_fwd_registers-f16-u16n4i32-dense-keeps"}
    assert "lstm_fwd_registers-bf16-u128" in found["error"]
    assert "could not be had: ValueError: a sentence" in found["error"]
    assert "takes 232449 bytes of shared memory, and the GPU has 232448" in found["shared"]
    if arch < 90 or found["no clusters"]:
        assert not found["wide"] and found["left to Triton"] == 2  # tried again for its error
    else:
        inputs = "lstm_fwd_inputs-bf16-u16n64-dense-even"
        assert found["wide"] == [inputs, "lstm_fwd_cluster-bf16-u512n8c16-dense-keeps"]
        assert not found["left to Triton"]
    assert found["clusters"] is bool(found["wide"])
    assert "weights in registers" in found["explained"]
    assert "compiled when first called" in found["explained"]
    assert "Triton 3" in found["backends"] and "does not start" not in found["backends"]


def test_what_is_not_compiled_ahead_is_left_to_triton(seen: dict[str, Any]) -> None:
    assert (
        "no kernel for such a layer was compiled ahead, and FASTLSTM_TRITON" in seen["projected"]
    )
    assert "no kernel for this call was compiled ahead, and FASTLSTM_TRITON" in seen["operator"]
    assert seen["overridden"] == "RuntimeError: a sentence"
    assert seen["given"] == (2, 2, True)
    assert seen["launches of others"] == 0


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("another dtype", "expected y to be torch.bfloat16 with this input, got torch.float32"),
        ("no memory", "OutOfMemoryError: CUDA out of memory. fastlstm: could not allocate"),
        ("another shape", "expected a state of 2432 numbers"),
        ("older", "compiled for PTX of sm_80, and GPU 1 is sm_75"),
        ("old driver", "CUDA_ERROR_UNSUPPORTED_PTX_VERSION"),
        ("small", "bytes of shared memory, and the GPU has 16"),
        ("none", "GPU 9 failed: CUDA_ERROR_INVALID_DEVICE"),
    ],
)
def test_errors_say_what_is_wrong(seen: dict[str, Any], name: str, sentence: str) -> None:
    assert sentence in seen[name]
