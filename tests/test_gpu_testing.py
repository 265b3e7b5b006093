"""How `python -m benchmarks gpu` runs the tests of a GPU: kept outcomes, whatever ends a run."""

import json
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu import testing
from benchmarks.gpu.testing import Tests

FACTS = {"gpu": "one", "date": "today"}
SOME_TESTS = "tests/test_gpu_some.py"
SOURCE = """
import os, signal, pytest

@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "tf32", "exact"])
def test_numbers(precision):
    assert precision != "tf32" or os.path.exists("mended")

@pytest.mark.gpu
def test_skipped():
    pytest.skip("no second GPU")

@pytest.mark.gpu
def test_the_last():
    if not os.path.exists("mended"):
        os.killpg(0, signal.SIGKILL)  # all that is left of the run, as a limit of time does
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with some tests and without a GPU."""
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    (tmp_path / "conftest.py").write_text(
        "def pytest_addoption(parser): parser.addoption('--backend')"
    )
    (tmp_path / "tests").mkdir()
    (tmp_path / SOME_TESTS).write_text(SOURCE)
    monkeypatch.setenv("PYTHONPATH", str(testing.ROOT))
    monkeypatch.setattr(testing, "ROOT", tmp_path)
    monkeypatch.setattr(testing, "find_spec", lambda name: None)  # one process: in this order
    return tmp_path


def some_tests(project: Path, **other: str) -> Tests:
    return Tests(project, "triton", FACTS | other)


def test_a_run_goes_on_where_it_was_ended(project: Path) -> None:
    tests = some_tests(project)
    assert tests.status() == "skipped"
    assert tests.run(60) == "failed"  # and ended in its last test
    assert list(tests.outcomes().values()) == ["passed", "failed", "passed", "skipped"]
    assert tests.status("tf32") == "failed"
    (why,) = tests.failures().values()
    assert 'precision != "tf32"' in why
    assert tests.status("bf16") == tests.status("exact") == "unfinished"
    (project / "mended").touch()
    assert tests.run(60) == tests.status("tf32") == tests.status("bf16") == "passed"
    assert "2 passed, 3 deselected" in tests.log.read_text()
    assert some_tests(project, date="tomorrow").status() == "passed"
    assert some_tests(project, gpu="another").status() == "skipped"
    tests.forget()
    assert tests.status() == "skipped"


FAULTY = """
import sys, types, pytest

class Cuda:
    broken = False
    def is_initialized(self): return True
    def synchronize(self):
        if self.broken: raise RuntimeError("an illegal memory access was encountered")

sys.modules["torch"] = types.SimpleNamespace(cuda=Cuda())

@pytest.mark.gpu
@pytest.mark.parametrize("number", range(6))
def test_kernel(number):
    if number == 2:
        sys.modules["torch"].cuda.broken = True
    sys.modules["torch"].cuda.synchronize()
"""


@pytest.mark.slow
def test_a_fault_of_the_gpu_counts_against_one_test(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes after it runs in a new process."""
    pytest.importorskip("xdist")
    monkeypatch.setattr(testing, "find_spec", lambda name: name == "xdist")
    (project / SOME_TESTS).write_text(FAULTY)
    tests = some_tests(project)
    assert tests.run(100) == "failed"
    ends = {name[-2]: outcome for name, outcome in tests.outcomes().items()}
    assert ends == {str(n): "failed" if n == 2 else "passed" for n in range(6)}


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        ([], "unfinished"),
        ([{"ended": 5}], "failed"),
        ([{"test": "a[bf16]", "outcome": "skipped"}, {"ended": 0}], "failed"),
        ([{"test": "a[bf16]", "outcome": "passed"}], "unfinished"),
        ([{"test": "a[bf16]", "outcome": "passed"}, {"ended": 0}], "passed"),
        ([{"test": "a[bf16]", "outcome": "passed"}, {"ended": 2}], "failed"),
        ([{"test": "a[bf16]", "outcome": "passed"}, {"ended": 1}], "failed"),
        ([{"test": f"a[T1-{p}]", "outcome": o} for p, o in
          (("bf16", "passed"), ("tf32", "failed"))] + [{"ended": 1}], "passed"),
    ],
)  # fmt: skip
def test_tests_have_passed_only_if_some_did(
    lines: list[dict[str, object]], status: str, tmp_path: Path
) -> None:
    tests = some_tests(tmp_path)
    facts = {"facts": {"gpu": "one"}}
    tests.file.write_text("\n".join(map(json.dumps, [facts, *lines])) + '\n{"te')
    assert tests.status("bf16") == status


def test_a_command_past_its_time_is_ended_with_its_children(tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = "import subprocess, sys; print('started', flush=True); subprocess.run(['sleep', '60'])"
    start = time.monotonic()
    assert testing.run([sys.executable, "-c", code], log, timeout=1.0) is None
    assert time.monotonic() - start < 20
    assert log.read_text() == "started\n\nended after 1 s\n"


def test_the_command_is_the_one_in_the_documents() -> None:
    pytest.importorskip("xdist")
    words = " ".join(testing.pytest_command())
    assert "-m pytest -m gpu" in words and "--dist worksteal" in words
