"""The PTX emulator itself: what is broken shows, in small kernels written here and in our own."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from cases import Case
from executed import Broken, Run, broken
from ptx.arithmetic import ERROR, divide, fma_down, tanh_approx
from ptx.execute import execute
from ptx.faults import Fault, Unknown
from ptx.products import mma
from ptx.translate import Kernel

from benchmarks.gpu.kernels import fresh_compiler
from benchmarks.speed.worker import Worker

ADDRESS = """
    ld.param.b64 %rd1, [k_param_0];
    mov.u32 %r1, %tid.x;
    shl.b32 %r2, %r1, 2;
    mul.wide.u32 %rd2, %r1, 4;
    add.s64 %rd3, %rd1, %rd2;
"""  # %r2 is a thread's place in shared memory, %rd3 in the tensor: four bytes each


def kernel(body: str, threads: int = 64, cluster: int = 1, divides: bool = False) -> Kernel:
    """A kernel that takes one tensor."""
    head = f".visible .entry k(.param .u64 k_param_0) .reqntid {threads}"
    head += f" .reqnctapercluster {cluster}" if cluster > 1 else ""
    return Kernel(f"{head}\n{{\n{ADDRESS}{body}\nret;\n}}", "k", divides)


def run(
    body: str, values: torch.Tensor, threads: int = 64, shared: int = 256, cluster: int = 1
) -> set[tuple[str, str]]:
    """Execute a kernel on a tensor, in one block or cluster; returns the races."""
    found = kernel(body, threads, cluster)
    return execute(found, (cluster,), [values.data_ptr()], [values], shared).races


def numbers(count: int = 64) -> torch.Tensor:
    return torch.arange(count, dtype=torch.int32)


# Each thread writes its number into shared memory, and reads that of the other warp.
EXCHANGE = """
    st.shared.b32 [%r2], %r1;
    {barrier}
    xor.b32 %r3, %r2, 128;
    ld.shared.b32 %r4, [%r3];
    st.global.b32 [%rd3], %r4;
"""


def test_an_exchange() -> None:
    values = numbers()
    assert not run(EXCHANGE.format(barrier="bar.sync 0;"), values)
    assert values.tolist() == [*range(32, 64), *range(32)]


@pytest.mark.parametrize("barrier", ["", "bar.warp.sync -1;"])
def test_a_missing_barrier_is_a_race(barrier: str) -> None:
    ((where, what),) = run(EXCHANGE.format(barrier=barrier), numbers())
    assert where.startswith("ld.shared") and "reads what another warp has just written" in what


@pytest.mark.parametrize(("barrier", "races"), [("bar.sync 0;", 0), ("", 1)])
def test_a_release_needs_a_barrier(barrier: str, races: int) -> None:
    """It publishes what the other warp has stored only if that warp is known to be done."""
    body = f"""
    st.global.b32 [%rd3], %r1;
    {barrier}
    setp.eq.s32 %p1, %r1, 0;
    @%p1 red.global.gpu.release.add.u32 [%rd3+256], 1;
    """
    values = numbers(65)
    found = run(body, values)
    assert values[64] == 65 and len(found) == races
    assert all("publishes what another warp" in what for _, what in found)


def test_two_threads_that_disagree_are_a_race() -> None:
    found = run("mov.b32 %r5, 0;\nst.shared.b32 [%r5], %r1;", numbers(), threads=32)
    assert {what for _, what in found} == {"two threads write different values"}


# Of one warp; %r2 is four times the number of a thread.
BANKS = {
    "words": ("ld.shared.b32 %r4, [%r2];", 1, 1),
    "one word": ("mov.b32 %r3, 8;\nld.shared.b32 %r4, [%r3];", 1, 1),
    "every second word": ("shl.b32 %r3, %r2, 1;\nst.shared.b32 [%r3], %r1;", 2, 1),
    "one bank": ("shl.b32 %r3, %r2, 5;\nst.shared.b32 [%r3], %r1;", 32, 1),
    "one bank, half of the threads": (
        "shl.b32 %r3, %r2, 5;\nsetp.lt.s32 %p1, %r1, 16;\n@%p1 st.shared.b32 [%r3], %r1;", 16, 1
    ),
    "halves of words": ("shr.b32 %r3, %r2, 1;\nst.shared.b16 [%r3], %r1;", 1, 1),
    "8 bytes": ("shl.b32 %r3, %r2, 1;\nld.shared.v2.b32 {%r4, %r5}, [%r3];", 2, 2),
    "16 bytes": ("shl.b32 %r3, %r2, 2;\nld.shared.v4.b32 {%r4, %r5, %r6, %r7}, [%r3];", 4, 4),
    "16 bytes of the last quarter": (
        "shl.b32 %r3, %r2, 2;\nsetp.ge.s32 %p1, %r1, 24;\n"
        "@%p1 ld.shared.v4.b32 {%r4, %r5, %r6, %r7}, [%r3];", 1, 1
    ),
    "16 bytes of every second 16": (
        "shl.b32 %r3, %r2, 3;\nld.shared.v4.b32 {%r4, %r5, %r6, %r7}, [%r3];", 8, 4
    ),
    "two matrices": (
        "shl.b32 %r3, %r2, 2;\n"
        "ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r4, %r5}, [%r3];", 2, 2
    ),
    "two matrices with rows of 128 bytes": (
        "shl.b32 %r3, %r2, 5;\n"
        "ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r4, %r5}, [%r3];", 16, 2
    ),
    "copies": ("cp.async.ca.shared.global [%r2], [%rd3], 4;", 1, 1),
}  # fmt: skip


@pytest.mark.parametrize(("body", "taken", "fewest"), BANKS.values(), ids=BANKS)
def test_wavefronts_are_counted(body: str, taken: int, fewest: int) -> None:
    values = numbers()
    found = execute(kernel(body, threads=32), (2,), [values.data_ptr()], [values], 4096).banks
    (instruction,) = found.by_instruction().items()
    assert instruction[0] in body and instruction[1] == (2 * taken, 2 * fewest)  # in two blocks


@pytest.mark.parametrize("opcode", ["popc.b32 %r3, %r1", "add.f64 %rd4, %rd1, %rd1"])
def test_an_unknown_opcode_is_named(opcode: str) -> None:
    with pytest.raises(Unknown, match=opcode.split()[0]):
        kernel(opcode + ";")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("ld.global.b32 %r3, [%rd3+4];", "ld.global.* of a storage of 256 bytes"),
        ("st.global.b32 [%rd3+-4], %r1;", "before every tensor|of a storage"),
        ("ld.global.v2.b32 {%r3, %r4}, [%rd3];", "misaligned"),
        ("st.shared.b32 [%r2+4], %r1;", "260 of 256 shared bytes"),
        ("st.shared.v4.b32 [%r2], {%r1, %r1, %r1, %r1};", "misaligned"),
        ("setp.lt.s32 %p1, %r1, 9;\n@%p1 bra $L;\n$L:", "divergent branch"),
    ],
    ids=["end", "start", "alignment", "shared", "alignment of shared", "branch"],
)
def test_a_fault_says_what_and_where(body: str, message: str) -> None:
    if "v4" in body or "v2" in body:  # the others are out of bounds before
        body = "setp.lt.s32 %p1, %r1, 9;\n@%p1 " + body
    with pytest.raises(Fault, match=message):
        run(body, numbers())


def test_a_copy_arrives_when_it_is_waited_for() -> None:
    body = """
    cp.async.ca.shared.global [%r2], [%rd3], 4;
    cp.async.commit_group;
    {wait}
    ld.shared.b32 %r4, [%r2];
    add.s32 %r4, %r4, 1;
    st.global.b32 [%rd3], %r4;
    """
    waited, early = numbers(), numbers()
    assert not run(body.format(wait="cp.async.wait_group 0;"), waited)
    assert waited.tolist() == list(range(1, 65))
    run(body.format(wait=""), early)
    assert early.tolist() == [0] * 64  # of memory that starts as all ones


# Each block of two sends a number to the other one's shared memory, whose barrier counts bytes.
SEND = """
    mov.b32 %r5, 512;
    setp.eq.s32 %p1, %r1, 0;
    @%p1 mbarrier.init.shared.b64 [%r5], 1;
    @%p1 mbarrier.arrive.expect_tx.shared.b64 _, [%r5], 128;
    barrier.cluster.arrive;
    barrier.cluster.wait;
    mov.u32 %r6, %cluster_ctarank;
    xor.b32 %r7, %r6, 1;
    mapa.shared::cluster.u32 %r8, %r2, %r7;
    mapa.shared::cluster.u32 %r9, %r5, %r7;
    shl.b32 %r10, %r6, 8;
    add.s32 %r10, %r10, %r1;
    st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%r8], %r10, [%r9];
    {wait}
    ld.shared.b32 %r4, [%r2];
    setp.eq.s32 %p2, %r6, 0;
    @%p2 st.global.b32 [%rd3], %r4;
    @!%p2 st.global.b32 [%rd3+128], %r4;
"""
WAIT = "mbarrier.try_wait.parity.shared.b64 complete, [%r5], 0;"


def test_blocks_of_a_cluster_write_to_each_other() -> None:
    values = numbers()
    run(SEND.format(wait=WAIT), values, threads=32, shared=520, cluster=2)
    assert values.tolist() == [*range(256, 288), *range(32)]


def test_a_missing_wait_of_a_cluster_shows() -> None:
    values = numbers()
    run(SEND.format(wait=""), values, threads=32, shared=520, cluster=2)
    assert values.tolist() != [*range(256, 288), *range(32)]


def test_a_barrier_that_misses_bytes_is_a_deadlock() -> None:
    with pytest.raises(Fault, match="deadlock"):
        run(SEND.format(wait=WAIT).replace("128;", "132;", 1), numbers(), 32, 520, 2)


def fragments(a: np.ndarray, b: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Registers of a [16, 16] and b [16, 8] in float16, lane by lane as the PTX ISA has them."""
    halves = [np.zeros((32, 8), np.float16), np.zeros((32, 4), np.float16)]
    for lane in range(32):
        group, place = lane >> 2, lane % 4
        for i in range(8):
            row = group if i < 2 or 4 <= i < 6 else group + 8
            halves[0][lane, i] = a[row, place * 2 + (i & 1) + (8 if i >= 4 else 0)]
        for i in range(4):
            halves[1][lane, i] = b[place * 2 + (i & 1) + (8 if i >= 2 else 0), group]
    return tuple([*np.ascontiguousarray(h.view(np.uint32).T)] for h in halves)


def test_a_matrix_product_and_a_wrong_layout_of_it() -> None:
    random = np.random.default_rng(0)
    a, b = (random.standard_normal(size).astype(np.float16) for size in ((16, 16), (16, 8)))
    want = (a.astype(np.float64) @ b.astype(np.float64)).astype(np.float32)
    left, right = fragments(a, b)
    zeros = [np.zeros(32, np.uint32)] * 4

    def product(left: list[np.ndarray]) -> np.ndarray:
        d = [register.view(np.float32) for register in mma("f16", left, right, zeros)]
        lanes = np.arange(32)
        found = np.empty((16, 8), np.float32)
        for i in range(4):
            found[lanes // 4 + (8 if i >= 2 else 0), lanes % 4 * 2 + (i & 1)] = d[i]
        return found

    assert np.array_equal(product(left), want)
    assert not np.array_equal(product([left[1], left[0], *left[2:]]), want)


def test_approximations_err_within_their_bounds() -> None:
    x = np.linspace(-4, 4, 9999, dtype=np.float32)
    exact = np.tanh(x.astype(np.float64))
    error = np.abs(tanh_approx(x.view(np.uint32)).view(np.float32) - exact) / np.abs(exact + 1e-99)
    assert ERROR["tanh"] / 2 < error[x != 0].max() < ERROR["tanh"] * (1 + 2**-10)


# Each thread counts down from its number modulo 3; even ones take another way through the loop.
DIVIDED = """
    rem.u32 %r3, %r1, 3;
    mov.b32 %r4, 0;
    and.b32 %r5, %r1, 1;
    setp.eq.s32 %p1, %r5, 0;
$LOOP:
    setp.eq.s32 %p2, %r3, 0;
    @%p2 bra $DONE;
    @%p1 bra $EVEN;
    add.s32 %r4, %r4, 10;
    bra.uni $NEXT;
$EVEN:
    add.s32 %r4, %r4, 1;
$NEXT:
    sub.s32 %r3, %r3, 1;
    bra.uni $LOOP;
$DONE:
    st.shared.b32 [%r2], %r4;
    bar.sync 0;
    xor.b32 %r6, %r2, 128;
    ld.shared.b32 %r7, [%r6];
    st.global.b32 [%rd3], %r7;
"""


def test_threads_that_a_branch_divides_meet_again() -> None:
    values = numbers()
    divided = kernel(DIVIDED, divides=True)
    assert not execute(divided, (1,), [values.data_ptr()], [values], 256).races
    counted = [n % 3 * (1 if n % 2 == 0 else 10) for n in range(64)]
    assert values.tolist() == counted[32:] + counted[:32]


def test_halves_of_a_block_at_two_barriers_are_a_deadlock() -> None:
    """PTX would count both as one; C++ does not allow it."""
    body = """
    setp.lt.s32 %p1, %r1, 32;
    @%p1 bra $OTHER;
    bar.sync 0;
    ret;
$OTHER:
    bar.sync 0;
"""
    values = numbers()
    with pytest.raises(Fault, match="a deadlock: threads wait for others"):
        execute(kernel(body, divides=True), (1,), [values.data_ptr()], [values], 256)


def test_integers_divide_towards_zero() -> None:
    a, b = (np.array(x, np.int32) for x in ([7, -7, 7, -7, 0], [2, 2, -2, -2, 5]))
    quotient, rest = divide(a, b)
    assert quotient.tolist() == [3, -3, -3, 3, 0] and rest.tolist() == [1, -1, 1, -1, 0]


def test_rounding_down() -> None:
    """By a sum that float64 has exactly, and by one that it has not."""
    a, b, c = (
        np.array(x, np.float32).view(np.uint32) for x in ([1.5, -1.0], [1, 2**-40], [2**24, 2**24])
    )
    assert fma_down(a, b, c).view(np.float32).tolist() == [2**24, 2**24 - 1]


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with fresh_compiler(), Worker(probe=int) as found:
        yield found


CASE = Case(T=4, B=16, I=32, H=32)
BARRIER = r"bar\.sync\s+0;"


def changed(worker: Worker, run: Run, pattern: str, instead: str = "") -> list[Broken]:
    found: list[Broken] = worker.run(broken, run, pattern, instead, timeout=300)
    assert found, "nothing to break"
    return found


def unseen(changes: list[Broken]) -> list[str]:
    return [change.place for change in changes if not change.seen]


@pytest.mark.executed
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(("regime", "least", "most"), [("sequence", 10, 2), ("registers", 3, 1)])
def test_removed_barriers_are_seen(
    worker: Worker, regime: str, least: int, most: int, arch: int
) -> None:
    """Nearly all: of two barriers with nothing between, one is not missed."""
    found = changed(worker, Run(CASE, "bf16", arch, regime), BARRIER)
    assert len(found) >= least and len(unseen(found)) <= most
    assert sum("race" in change.seen for change in found) >= len(found) - most


@pytest.mark.executed
def test_removed_waits_are_seen(worker: Worker) -> None:
    """All but the one after the loop, behind which nothing is read."""
    found = changed(worker, Run(CASE, "bf16", 80, "sequence"), r"cp\.async\.wait_group\s+\d+;")
    assert len(unseen(found)) <= 1 < len(found)


@pytest.mark.executed
@pytest.mark.parametrize(
    ("pattern", "instead"),
    [
        (r"(mma\.sync[^{]*\{[^}]*\},\s*\{) (%r\d+), (%r\d+)", r"\1 \3, \2"),
        (r"(ldmatrix\.sync\.aligned\.m8n8\.x4)\.shared", r"\1.trans.shared"),
    ],
    ids=["mma", "ldmatrix"],
)
def test_wrong_fragments_are_seen(worker: Worker, pattern: str, instead: str) -> None:
    found = changed(worker, Run(CASE, "bf16", 80, "sequence"), pattern, instead)
    assert len(unseen(found)) <= len(found) // 8
