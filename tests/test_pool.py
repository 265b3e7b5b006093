"""Threads of our own: no race, no hang, no item twice; forks, exits, limits of a container.

pool.cpp runs the pool alone, under the thread sanitizer; the rest runs the library.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import BACKENDS
from test_races import COMPILER, RACE, sanitizer_is_missing

from fastlstm import extension

ROOT = Path(__file__).parent.parent
SOURCES = ("tests/pool.cpp", "csrc/cpu/pool.cpp", "csrc/cpu/usefulness.cpp", "csrc/cpu/cores.cpp")
needs_library = pytest.mark.skipif(
    "cpu" not in BACKENDS or extension.error() is not None, reason="no compiled kernels"
)


def build(folder: Path, *flags: str) -> Path:
    program = folder / "pool"
    sources = [str(ROOT / source) for source in SOURCES]
    command = [*COMPILER, "-std=c++17", "-O1", "-g", "-pthread", *flags, f"-I{ROOT / 'csrc'}"]
    subprocess.run([*command, *sources, "-o", str(program)], check=True)
    return program


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program, with the sanitizer where there is one."""
    if sys.platform == "win32":
        pytest.skip("the program forks")
    folder = tmp_path_factory.mktemp("pool")
    reason = sanitizer_is_missing(folder)
    if reason and os.environ.get("FASTLSTM_REQUIRE_EXTENSION") == "1":
        pytest.fail(f"FASTLSTM_REQUIRE_EXTENSION=1, but there is no thread sanitizer: {reason}")
    return build(folder, *([] if reason else ["-fsanitize=thread"]))


@pytest.mark.parametrize("what", ["callers", "late", "failing", "forks", "threads"])
@pytest.mark.parametrize("cores", [1, 2, 4])
def test_every_item_once(pool: Path, what: str, cores: int) -> None:
    environment = {
        **os.environ,
        "FASTLSTM_CORES": str(cores),
        "TSAN_OPTIONS": f"halt_on_error=1 die_after_fork=0 exitcode={RACE}",
    }
    done = subprocess.run(
        [pool, what], capture_output=True, text=True, env=environment, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, "right\n"), done.stdout + done.stderr


@pytest.mark.parametrize(
    ("membership", "files", "cores"),
    [
        ("0::/", {"cpu.max": "max 100000"}, 0),
        ("0::/", {"cpu.max": "150000 100000"}, 2),
        ("0::/a/b", {"cpu.max": "max 100000", "a/cpu.max": "50000 100000"}, 1),
        ("0::/a/b", {"a/cpu.max": "800000 100000", "a/b/cpu.max": "300000 100000"}, 3),
        ("0::/outside", {"cpu.max": "400000 100000"}, 4),
        ("4:cpu,cpuacct:/a", {"cpu/a/cpu.cfs_quota_us": "-1"}, 0),
        (
            "9:memory:/a\n4:cpuacct,cpu:/a",
            {"cpu/a/cpu.cfs_quota_us": "200000", "cpu/a/cpu.cfs_period_us": "100000"},
            2,
        ),
        ("", {}, 0),
        ("no colons", {"cpu.max": "100000 100000"}, 0),
    ],
)
def test_quota(
    pool: Path, tmp_path: Path, membership: str, files: dict[str, str], cores: int
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    (tmp_path / "membership").write_text(membership + "\n")
    command = [str(pool), "quota", str(tmp_path / "membership"), str(tmp_path)]
    assert subprocess.check_output(command, text=True) == f"{cores}\n"


@pytest.mark.parametrize(
    ("files", "uneven"),
    [
        ({}, 0),
        ({"cpu_core/cpus": "0-7", "cpu_atom/cpus": "8-15"}, 1),
        ({"cpu/cpus": "0-7"}, 0),
        ({f"system/cpu/cpu{k}/cpu_capacity": "1024" for k in range(4)}, 0),
        ({f"system/cpu/cpu{k}/cpu_capacity": "1024" if k else "446" for k in range(4)}, 1),
    ],
)
def test_uneven_cores(pool: Path, tmp_path: Path, files: dict[str, str], uneven: int) -> None:
    assert said_of(files, tmp_path, pool, "uneven") == uneven


@pytest.mark.parametrize(
    ("level", "size", "third"),
    [("3", "32768K", 32 << 20), ("4", "32768K", 0), ("3", "", 0), ("", "", 0)],
)
def test_the_third_level(pool: Path, tmp_path: Path, level: str, size: str, third: int) -> None:
    cache = "system/cpu/cpu0/cache/index3"
    files = {f"{cache}/level": level, f"{cache}/size": size}
    assert said_of({k: v for k, v in files.items() if v}, tmp_path, pool, "third") == third


def said_of(files: dict[str, str], devices: Path, *command: object) -> int:
    """What a command of the program says of a folder of devices with these files."""
    for name, text in files.items():
        (devices / name).parent.mkdir(parents=True, exist_ok=True)
        (devices / name).write_text(text + "\n")
    return int(subprocess.check_output([*map(str, command), str(devices)], text=True))


def run(code: str, **environment: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": shlex.join([str(ROOT)]), **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


PREPARE = """
import os, threading, torch, fastlstm
torch.set_num_threads(4)
lstm, x = fastlstm.LSTM(512, 512), torch.randn(3, 4, 512)
def call():
    y = lstm(x)[0]
    return torch.autograd.grad(y.sum(), list(lstm.parameters()))[0], y
want = call()
def workers():
    # others may end while they are counted
    count = 0
    for thread in os.listdir("/proc/self/task"):
        try:
            count += open(f"/proc/self/task/{thread}/comm").read().startswith("fastlstm")
        except OSError:
            pass
    return count
def check():
    assert all(torch.equal(a, b) for a, b in zip(call(), want))
"""


@pytest.mark.slow
@needs_library
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_children_of_fork() -> None:
    """Not of torch's own operators: OpenMP's threads do not survive a fork."""
    code = """
for n in range(100):
    check()
    child = os.fork()
    if not child:
        with torch.inference_mode():
            good = torch.equal(lstm(x)[0], want[1])
        os._exit(0 if good else 1)
    assert os.waitpid(child, 0)[1] == 0
print("right")
"""
    assert run(PREPARE + code, FASTLSTM_CORES="4") == "right\n"


@pytest.mark.slow
@needs_library
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="no /proc")
def test_threads_that_come_and_go_leave_no_thread() -> None:
    code = """
def several():
    with torch.inference_mode():
        for n in range(3):
            assert torch.equal(lstm(x)[0], want[1])
def generation():
    callers = [threading.Thread(target=several) for _ in range(4)]
    [caller.start() for caller in callers]
    [caller.join() for caller in callers]
    return workers()
print(max(generation() for _ in range(250)) <= 3)
"""
    assert run(PREPARE + code, FASTLSTM_CORES="4") == "True\n"


@pytest.mark.slow
@needs_library
def test_import_compute_and_exit() -> None:
    """Also while another thread is in the middle of a call."""
    code = """
threading.Thread(target=lambda: [call() for _ in range(1000000)], daemon=True).start()
check()
print("right", flush=True)
os._exit(0)
"""
    for _ in range(3):
        assert run(PREPARE + "check()", FASTLSTM_CORES="4") == ""
        assert run(PREPARE + code, FASTLSTM_CORES="4") == "right\n"


@needs_library
def test_more_threads_than_cores_have_the_same_bits() -> None:
    code = """
for n in (1, 2, 3, 5, 8, 16):
    torch.set_num_threads(n)
    check()
print("right")
"""
    assert run(PREPARE + code) == "right\n"
    assert run(PREPARE + code, FASTLSTM_CORES="16") == "right\n"


@needs_library
def test_a_mask_of_one_core_starts_no_thread() -> None:
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("no affinity masks")
    code = (
        """
import os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
"""
        + PREPARE
        + """
print(workers())
"""
    )
    assert run(code) == "0\n"
