"""The PTX that Triton makes of the kernels, executed on CPU tensors: the cases of the GPU tests.

Each case is executed for sm_80 or sm_90 by turns, so that both meet every precision and kernel.
The shapes are smaller, since an emulated thread takes a million times as long; the kernels are
those of a GPU. tests/README.md says what this proves.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import pytest
import test_gpu
import test_gpu_cells
import test_gpu_forced
from cases import Case
from executed import Run, Verdict, judged, wavefronts, wavefronts_unswizzled
from ptx.banks import Wavefronts

from benchmarks.gpu.kernels import fresh_compiler
from benchmarks.speed.precision import PRECISIONS
from benchmarks.speed.worker import Worker
from fastlstm.kernels.triton.plan import padded

WIDEST = 260  # units; a wider layer takes minutes
TIMEOUT = 600  # seconds for a case


def small(case: Case) -> Case:
    """Fewer steps and sequences: as many as fill one tile and begin another."""
    wide = case.H > 128
    T, B, lengths = min(case.T, 4 if wide else 9 if case.reset else 6), min(case.B, 18), ()
    if case.lengths:
        B = min(case.B, 9)
        lengths = tuple(min(length, T) for length in case.lengths[:B])
    return replace(case, T=T, B=B, lengths=lengths)


def runs(
    cases: Iterable[Case], first: str, archs: tuple[int, int], regime: str | None = None
) -> list[Run]:
    """Every case in every precision, beginning with `first` and the first of the GPUs."""
    names = list(PRECISIONS)
    names = names[names.index(first) :] + names[: names.index(first)]
    found = []
    for number, case in enumerate(dict.fromkeys(cases)):
        for place, name in enumerate(names):
            if case.layer_norm and name == "exact":  # no room for its numbers: the kernels refuse
                continue
            found.append(Run(case, name, archs[(number + place) % 2], regime))
    return found


def shrunk(cases: Iterable[Case]) -> list[Case]:
    return [small(case) for case in cases if case.H <= WIDEST]


# The most telling case comes first: it is the sample of the short run.
GPU = test_gpu.RAGGED + test_gpu.SIZES + test_gpu.FEATURES + test_gpu.MEMORY + test_gpu.GRADIENTS
CELLS = [case for case in test_gpu_cells.CASES if case not in test_gpu_cells.WIDE_NORMALISED]
# Odd and even numbers of steps, full tiles of units and others; gates kept and computed again.
REGISTERS = [
    Case(T=3, B=9, I=28, H=32, directions=2, recompute=True),
    Case(T=4, B=3, I=70, H=17, bias=False, cell_states=True),
    Case(T=6, B=5, I=10, H=20, lengths=(2, 0, 1, 6, 3), directions=2, recompute=True),
    Case(T=5, B=2, I=30, H=16, reset=True, recompute=True, hx=False),
]
# Exact float32 has more sequences in a program where the GPU is full.
EXACT = [
    Run(Case(T=3, B=6, I=10, H=H, **options), "exact", arch, "registers", (4, padded(H) // 8))
    for H, arch, options in (
        (64, 90, {"directions": 2}),
        (60, 80, {"lengths": (3, 1, 2, 3, 0, 2)}),
        (32, 90, {"values": "constant"}),
        (16, 80, {"recompute": True}),
    )
]
# Dense rows of as many sequences as there are columns.
EIGHT = [
    Run(REGISTERS[number], name, arch, "registers", (8, padded(REGISTERS[number].H) // 16))
    for number, name, arch in (
        *((0, "bf16", 90), (0, "fp16", 80), (0, "tf32", 90)),
        *((1, "bf16", 80), (1, "fp16", 90), (1, "tf32", 80)),
    )
]
# Their weight gradients: more rows than a program takes at a time, odd sizes, wide inputs.
WEIGHTS = [
    Case(T=4, B=19, I=28, H=33, directions=2),
    Case(T=5, B=14, I=300, H=16, hx=False),
    Case(T=67, B=1, I=1, H=5, directions=2, bias=False),
    Case(T=2, B=33, I=10, H=128, directions=2),
]
# One step, odd and even numbers of them; 8 and 16 blocks, in TF32 4; units that only fill a tile.
# Hundreds of thousands of weights take minutes, and all memory: the last case has their gradients.
CLUSTERS = [
    Case(T=4, B=9, I=5, H=200, directions=2, wrt=("x", "h0", "c0")),
    Case(T=1, B=3, I=5, H=150, bias=False, grad_layout="sliced", wrt=("x", "h0", "c0")),
    Case(T=3, B=3, I=5, H=256, hx=False, cell_states=True, wrt=("x",)),
    Case(T=2, B=3, I=5, H=512, wrt=("x", "h0", "c0")),
    Case(T=2, B=2, I=5, H=130, recompute=True),
]
# In TF32, whose layers are a quarter as wide.
CLUSTERS_OF_TF32 = [
    Case(T=4, B=9, I=5, H=70, directions=2),
    Case(T=1, B=3, I=5, H=65, bias=False, grad_layout="sliced"),
    Case(T=3, B=3, I=5, H=128, hx=False, cell_states=True),
    Case(T=2, B=2, I=5, H=100, recompute=True, wrt=("x", "h0", "c0")),
]
# Sequences that end at different steps, in one direction and the other; a tile of sequences, and a
# sequence, without steps; resets. What is not dense has its weight gradients from other kernels.
RAGGED_CLUSTERS = [
    Case(T=4, B=9, I=5, H=150, lengths=(2, 0, 1, 4, 3, 3, 1, 4, 0), directions=2),
    Case(T=3, B=10, I=5, H=256, lengths=(1, 3, 2, 3, 1, 1, 2, 1, 1, 2), packed=True, directions=2),
    Case(T=4, B=3, I=5, H=200, reset=True, bias=False, recompute=True),
    Case(T=5, B=3, I=5, H=256, reset=True, lengths=(0, 5, 3), cell_states=True),
    Case(T=3, B=3, I=5, H=512, lengths=(1, 3, 2), packed=True, hx=False, recompute=True),
]
RAGGED_CLUSTERS_OF_TF32 = [
    Case(T=4, B=9, I=5, H=70, lengths=(2, 0, 1, 4, 3, 3, 1, 4, 0), directions=2, recompute=True),
    Case(T=3, B=10, I=5, H=128, lengths=(1, 3, 2, 3, 1, 1, 2, 1, 1, 2), packed=True, directions=2),
    Case(T=5, B=3, I=5, H=100, reset=True, lengths=(0, 5, 3), cell_states=True),
]
BOTH_CLUSTERS = {"lstm_fwd_cluster_kernel", "lstm_bwd_cluster_kernel"}
SUMS = {"lstm_weight_parts_kernel", "lstm_weight_sums_kernel"}  # of the registers regime
INPUTS = {"lstm_input_products_kernel"}


def approximate(found: Iterable[Run]) -> list[Run]:
    """Those whose weights one program can have in shared memory: all but exact float32."""
    return [run for run in found if run.precision != "exact"]


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    """A process in which Triton compiles."""
    with fresh_compiler(), Worker(probe=int) as found:
        yield found


Record = Callable[[str, object], None]


def check(worker: Worker, run: Run, record: Record) -> Verdict:
    """Assert that a case is right, and that nothing raced."""
    verdict: Verdict = worker.run(judged, run, timeout=TIMEOUT)
    record(f"executed in {run.precision}", verdict.ratio)
    assert not verdict.complaints, "\n".join([str(run), *verdict.complaints])
    assert not verdict.races, f"{run}: {sorted(verdict.races)}"
    return verdict


@pytest.mark.executed
@pytest.mark.parametrize("run", runs(shrunk(GPU), "bf16", (90, 80)), ids=str)
def test_error_is_that_of_pytorch(worker: Worker, run: Run, record_property: Record) -> None:
    check(worker, run, record_property)


@pytest.mark.executed
@pytest.mark.parametrize(
    "run", runs(shrunk(test_gpu_cells.TOGETHER[1:2] + CELLS), "tf32", (90, 80)), ids=str
)
def test_other_cells(worker: Worker, run: Run, record_property: Record) -> None:
    check(worker, run, record_property)


@pytest.mark.executed
@pytest.mark.parametrize(
    "run", approximate(runs(REGISTERS, "bf16", (80, 90), "sequence")), ids=str
)
def test_weights_in_shared_memory(worker: Worker, run: Run, record_property: Record) -> None:
    """What layers get whose weights could rest in registers, if Triton has no Gluon."""
    kernels = check(worker, run, record_property).kernels
    assert kernels and all("_sequence_" in name for name in kernels)


@pytest.mark.executed
@pytest.mark.parametrize(
    "run", runs(REGISTERS, "bf16", (90, 80), "registers") + EXACT + EIGHT, ids=str
)
def test_weights_in_registers(worker: Worker, run: Run, record_property: Record) -> None:
    kernels = check(worker, run, record_property).kernels
    assert kernels and all("_registers_" in name for name in kernels - SUMS - INPUTS)
    assert (kernels >= SUMS) == (not (run.case.lengths or run.case.reset))


@pytest.mark.executed
@pytest.mark.parametrize(
    "run",
    [
        run
        for run in runs(WEIGHTS, "bf16", (90, 80), "registers")
        if run.precision not in ("tf32", "exact") or run.case.H <= 64
    ],
    ids=str,
)
def test_weight_gradients(worker: Worker, run: Run, record_property: Record) -> None:
    assert check(worker, run, record_property).kernels >= SUMS


# An even and an odd step, one tile of sequences; all widths that there is room for.
BANKS = [
    Run(Case(T=2, B=8, I=28, H=H), name, arch, "registers")
    for name in ("bf16", "fp16", "tf32", "exact")
    for H in (64, 16, 32, 128)
    for arch in (90, 80)
    if H <= 64 or name not in ("tf32", "exact")
]
BANKS = [
    run._replace(tile=(8, run.case.H // 16))
    if run.arch == 80 and run.precision != "exact"
    else run
    for run in BANKS
]
BANKS += [
    run._replace(case=replace(run.case, B=2), tile=(4, run.case.H // 8))
    for run in BANKS
    if run.precision == "exact"
]


@pytest.mark.executed
@pytest.mark.parametrize("run", BANKS, ids=str)
def test_weights_in_registers_leave_banks_alone(worker: Worker, run: Run) -> None:
    """What has no steps is not asked: nothing waits for it."""
    every: dict[tuple[str, str], Wavefronts] = worker.run(wavefronts, run, timeout=TIMEOUT)
    found = {place: n for place, n in every.items() if place[0] not in SUMS | INPUTS}
    assert {kernel for kernel, _ in found} == {
        "lstm_fwd_registers_kernel",
        "lstm_bwd_registers_kernel",
    }
    assert {place: n for place, n in found.items() if n.taken > n.fewest} == {}


@pytest.mark.executed
@pytest.mark.parametrize(("H", "name"), [(256, "bf16"), (512, "fp16"), (128, "tf32")])
def test_blocks_of_a_cluster_leave_banks_alone(worker: Worker, H: int, name: str) -> None:
    run = Run(Case(T=2, B=8, I=5, H=H, wrt=("x", "h0", "c0")), name, 90, "cluster")
    every: dict[tuple[str, str], Wavefronts] = worker.run(wavefronts, run, timeout=TIMEOUT)
    found = {place: n for place, n in every.items() if "_cluster_" in place[0]}
    assert {kernel for kernel, _ in found} == BOTH_CLUSTERS
    assert {place: n for place, n in found.items() if n.taken > n.fewest} == {}


@pytest.mark.executed
def test_sequences_that_begin_in_one_bank_are_seen() -> None:
    """Eight of them in each matrix, of 128 bytes a sequence; backward the weights are read too."""
    with fresh_compiler(), Worker(probe=int) as alone:
        found = alone.run(wavefronts_unswizzled, BANKS[0], timeout=TIMEOUT)
    for kernel, times in (
        ("lstm_fwd_registers_kernel", {8}),
        ("lstm_bwd_registers_kernel", {1, 8}),
    ):
        matrices = [n for (k, at), n in found.items() if k == kernel and at.startswith("ldmatrix")]
        assert {n.taken / n.fewest for n in matrices} == times


@pytest.mark.executed
@pytest.mark.parametrize(
    "run",
    runs(shrunk(test_gpu_forced.STEPS[3:] + test_gpu_forced.STEPS), "exact", (80, 90), "steps"),
    ids=str,
)
def test_one_launch_a_step(worker: Worker, run: Run, record_property: Record) -> None:
    kernels = check(worker, run, record_property).kernels
    assert kernels and all("_step_" in name for name in kernels)


@pytest.mark.executed
@pytest.mark.parametrize(
    ("case", "name"),
    [
        *((case, name) for case in CLUSTERS for name in ("bf16", "fp16")),
        *((case, ("bf16", "fp16")[k % 2]) for k, case in enumerate(RAGGED_CLUSTERS)),
        *((case, "tf32") for case in CLUSTERS_OF_TF32 + RAGGED_CLUSTERS_OF_TF32),
    ],
    ids=str,
)
def test_blocks_of_a_cluster(
    worker: Worker, case: Case, name: str, record_property: Record
) -> None:
    kernels = check(worker, Run(case, name, 90, "cluster"), record_property).kernels
    assert kernels >= BOTH_CLUSTERS
