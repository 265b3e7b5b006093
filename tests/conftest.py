"""Which tests run, and the fixtures of every test: backend, poisoned memory, seeds, threads.

Tests that take long carry a mark (LONG), and a plain `python -m pytest` runs a sample of them:
tests/README.md says how to run the others.

`backend` runs a test once on each backend of this machine; the tests of numbers (EVERY_BACKEND)
run on the Triton and CUDA kernels too, interpreted and emulated where there is no GPU. What is
interpreted rounds as a GPU does (tests/interpreter.py), with exact products in float32. A machine
without a compiled library skips its share, unless FASTLSTM_REQUIRE_EXTENSION=1 says that it has to
be there (CI does): then those tests fail with the reason. Before the first test that needs the
emulator it is compiled, if it is not there or its source has changed.
"""

import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from importlib.util import find_spec
from typing import Any

import pytest

# Before torch starts its threads. Test processes share the cores (`-n auto`): a thread that spins
# while it waits keeps the other process from working, which took some files four times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# What a developer has found out about this machine is no part of the tests.
os.environ["FASTLSTM_CACHE"] = tempfile.mkdtemp(prefix="fastlstm-tests-")

import torch

if not torch.cuda.is_available():  # before Triton reads it: the kernels run on the CPU then
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("FASTLSTM_EMULATE", "1")

import emulator
from interpreter import rounding

import fastlstm
from fastlstm import extension

BACKENDS = ("reference", "cpu")

# The marks of tests that take long. The sample of them in the short run is the first test of each
# file and mark (BY_FILE) and the first case of each function that has several (BY_CASE).
LONG = ("interpreted", "emulated", "executed", "compiles", "slow")
BY_FILE = ("interpreted", "emulated", "executed", "compiles")
BY_CASE = ("interpreted", "emulated", "slow")
# Of how many cases of a function --rest takes one; --all and -m take every one.
# Precisions, types and GPUs take turns by 4, 3 and 2: the step must share no factor with them.
THINNED = {"emulated": 23, "interpreted": 61, "executed": 121, "slow": 11}
EXECUTED = "executed in "  # and a precision: a property of reports, see test_executed.py
MARK_OF_BACKEND = {"triton": "interpreted", "cuda": "emulated"}

_KERNEL_DTYPES = {torch.float32, torch.float16, torch.bfloat16}  # of both kinds for GPUs


def pytest_addoption(parser: pytest.Parser) -> None:
    """Whose kernels the tests marked `gpu` run, and which of the tests that take long."""
    parser.addoption(
        "--backend", choices=("triton", "cuda"), default="triton", help="of tests marked gpu"
    )
    which = parser.getgroup("general").addoption
    which("--all", action="store_true", help="every test, those that take long included")
    which("--rest", action="store_true", help="only the tests that a plain run leaves out")


def pytest_report_header(config: pytest.Config) -> str | None:
    """Says that this is the short run."""
    if not _is_short(config):
        return None
    return f"short run: a sample of the tests marked {', '.join(LONG)}; --all runs every test"


def _is_short(config: pytest.Config) -> bool:
    """Whether nothing was asked for by option, mark, expression or name."""
    options = config.option
    asked = options.all or options.rest or options.markexpr or options.keyword
    return not (asked or any("::" in argument for argument in config.args))


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark the cases of a backend whose kernels are interpreted or emulated here."""
    call = getattr(item, "callspec", None)
    mark = call and MARK_OF_BACKEND.get(call.params.get("backend"))
    if mark:
        item.add_marker(mark)


@pytest.hookimpl(optionalhook=True)  # there may be no xdist
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """What `-n auto` means: a process for each core, but no more than there are long files."""
    return min(len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1, 8)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what cannot run here, and in the short run what is not of its sample.

    That is what the kernels for GPUs cannot compute on a CPU, or not within seconds; of the tests
    on a GPU those of the other backend, and those of what this one has not.
    """
    backend = config.getoption("--backend")
    items[:] = [
        item
        for item in items
        if _can_run(getattr(item, "callspec", None)) and _is_for(backend, item)
    ]
    if config.option.rest or _is_short(config):
        short, rest = _divide(items)
        chosen = set(_thinned(rest) if config.option.rest else short)
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = [item for item in (*short, *rest) if item in chosen]


def pytest_collection_finish(session: pytest.Session) -> None:
    """Build the emulator of the CUDA kernels if a test needs it."""
    emulated = any(item.get_closest_marker("emulated") for item in session.items)
    if emulated and not session.config.option.collectonly:
        emulator.build()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what compiles or interprets Triton kernels where there is no Triton, as on macOS."""
    needs = any(item.get_closest_marker(mark) for mark in ("interpreted", "executed", "compiles"))
    if needs and find_spec("triton") is None:
        pytest.skip("Triton is not installed")


def _divide(items: list[pytest.Item]) -> tuple[list[pytest.Item], list[pytest.Item]]:
    """The tests of the short run, those of the sample first, as they take longest; the rest."""
    keys = [_keys(item) for item in items]
    cases = Counter(function for _, _, function in keys)
    seen: set[str] = set()
    sample, others, rest = [], [], []
    for item, (mark, file, function) in zip(items, keys, strict=True):
        if not mark:
            others.append(item)
            continue
        by_case = mark in BY_CASE and cases[function] > 1
        first = (function if by_case else file) not in seen
        (sample if first and (by_case or mark in BY_FILE) else rest).append(item)
        seen |= {file, function}
    return sample + others, rest


def _thinned(rest: list[pytest.Item]) -> Iterator[pytest.Item]:
    """What --rest takes: of tests that are THINNED some, always the same, else all."""
    seen: Counter[str] = Counter()
    for item in rest:
        mark, _, function = _keys(item)
        if seen[function] % THINNED.get(mark, 1) == 0:
            yield item
        seen[function] += 1


def _keys(item: pytest.Item) -> tuple[str, str, str]:
    """The mark that says why a test takes long, "" if none does; its file and its function."""
    mark = next((mark.name for mark in item.iter_markers() if mark.name in LONG), "")
    file = f"{mark} {item.path}"
    return mark, file, f"{file} {getattr(item, 'originalname', item.name)}"


def _is_for(backend: str, item: pytest.Item) -> bool:
    if item.get_closest_marker("gpu") is None:
        return True
    only = item.get_closest_marker("only")
    if only is not None and backend not in only.args:
        return False
    case = getattr(item, "callspec", None) and item.callspec.params.get("case")
    return backend == "triton" or case is None or _is_plain(case)


def _is_plain(case: Any) -> bool:
    return case.kind == "LSTM" and not (case.proj or case.extended)


def _can_run(call: Any) -> bool:
    backend = call and call.params.get("backend")
    if backend not in ("triton", "cuda"):
        return True
    dtype, case = (call.params.get(name) for name in ("dtype", "case"))
    if dtype is not None and dtype not in _KERNEL_DTYPES:
        return False
    if backend == "cuda":
        return case is None or _is_plain(case)
    if case is not None and case.T >= 1000:  # once is enough: tests/test_triton.py
        return False
    return case is None or case.T * case.B < 1000 or dtype is torch.float32


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The worst errors of the kernels that were executed, as parts of what the oracle allows."""
    worst: dict[str, float] = {}
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            for name, value in report.user_properties:
                if name.startswith(EXECUTED):
                    precision = name.removeprefix(EXECUTED)
                    worst[precision] = max(worst.get(precision, 0.0), value)
    if worst:
        errors = ", ".join(f"{precision} {worst[precision]:.2f}" for precision in sorted(worst))
        terminalreporter.write_line(f"executed PTX, worst error / error allowed: {errors}")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of the backend that serves every LSTM call of the test."""
    if request.param in ("triton", "cuda") and torch.cuda.is_available():
        pytest.skip("these are CPU tensors; on this machine `-m gpu` tests the compiled kernels")
    missing = None
    if request.param in ("cpu", "cuda"):
        missing = extension.error() or (request.param == "cuda" and extension.cuda_error(True))
    if missing:
        if os.environ.get("FASTLSTM_REQUIRE_EXTENSION") == "1":
            pytest.fail(f"FASTLSTM_REQUIRE_EXTENSION=1, but a library is missing: {missing}")
        pytest.skip(f"a library is missing: {missing}")
    roundings = rounding if request.param == "triton" else nullcontext
    with fastlstm.backend(request.param), roundings():
        yield request.param


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill what `torch.empty` and its relatives return with NaN, so unwritten memory shows.

    PyTorch does it itself in its deterministic mode, in Python and in C++ alike, so it does not
    matter by which name a kernel's caller reached the allocator.
    """
    fill_before = torch.utils.deterministic.fill_uninitialized_memory
    mode_before = torch.get_deterministic_debug_mode()
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    yield
    torch.set_deterministic_debug_mode(mode_before)
    torch.utils.deterministic.fill_uninitialized_memory = fill_before


@pytest.fixture(autouse=True)
def fixed_state() -> Iterator[None]:
    """Every test starts from seed 0 and gives back the thread count it found."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
