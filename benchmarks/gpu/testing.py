"""The tests of a GPU run: started within a limit of time, their outcomes kept, then asked for.

Outcomes lie in a file, a line of JSON each, that grows as they come (`outcomes.py`). A run that
was ended at its limit is "unfinished", and the next one runs what has not passed yet. A test that
fails counts against the precision in its name, not against others.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PROCESSES = 14  # of the tests, at most: each one has a share of the GPU's memory
OK, NOTHING_LEFT = 0, 5  # exit statuses of pytest


class Tests:
    """The outcomes of the tests. `facts` says what they are of: others start anew."""

    __test__ = False  # no test itself, whatever pytest makes of its name

    def __init__(self, folder: Path, backend: str, facts: Mapping[str, Any]) -> None:
        self.backend = backend
        self.file = folder / f"gpu-{backend}-tests.jsonl"
        self.log = self.file.with_suffix(".log")
        self._facts = {name: value for name, value in facts.items() if name != "date"}
        self._facts = json.loads(json.dumps(self._facts))

    def forget(self) -> None:
        """Start anew."""
        self.file.unlink(missing_ok=True)

    def run(self, timeout: float) -> str:
        """Run what has not passed yet, for so many seconds at most; return the outcome of all."""
        done = {name: found for name, found in self.outcomes().items() if found != "failed"}
        kept: list[dict[str, Any]] = [{"facts": self._facts}]
        kept += [{"test": name, "outcome": found} for name, found in done.items()]
        self.file.write_text("".join(json.dumps(line) + "\n" for line in kept))
        but_not = self.file.with_suffix(".passed")
        but_not.write_text("\n".join(done))
        files = ["--outcomes", str(self.file.resolve()), "--but-not", str(but_not.resolve())]
        selection = ["--backend", self.backend, *gpu_tests()]
        # The tests run deterministically, which cuBLAS refuses without a workspace of its own.
        command = [*pytest_command(), *files, *selection]
        run(command, self.log, timeout, CUBLAS_WORKSPACE_CONFIG=":4096:8")
        print("\n".join(self.log.read_text(errors="replace").splitlines()[-30:]), flush=True)
        status = self.status()
        counts = Counter(self.outcomes().values())
        found = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
        for name, why in self.failures().items():
            errors = [line for line in why.splitlines() if line.startswith("E ")]
            print(name, *(errors or why.splitlines())[-8:], sep="\n")
        print(f"tests: {status} ({found or 'none ran'}), log in {self.log}\n")
        return status

    def outcomes(self) -> dict[str, str]:
        """Return the outcome of each test: "passed", "failed" or "skipped"."""
        return {line["test"]: line["outcome"] for line in self._lines() if "test" in line}

    def failures(self) -> dict[str, str]:
        """Return why each test that failed did, where that is known."""
        failed = [line for line in self._lines() if line.get("outcome") == "failed"]
        return {line["test"]: line.get("why", "") for line in failed}

    def status(self, precision: str | None = None) -> str:
        """Return "passed", "failed", "unfinished", or "skipped" where nothing has run.

        With a precision: of the tests with its name in theirs.
        """
        lines, every = self._lines(), self.outcomes()
        if not lines:
            return "skipped"
        found = list(_about(every, precision))
        if "failed" in found:
            return "failed"
        ended = [line["ended"] for line in lines if "ended" in line]
        if not ended:
            return "unfinished"
        explained = ended[-1] in (OK, NOTHING_LEFT) or "failed" in every.values()
        # No test at all, or none that was not skipped, is no success either.
        return "passed" if explained and "passed" in found else "failed"

    def _lines(self) -> list[dict[str, Any]]:
        """Read the file; nothing where it is of another machine, version or source."""
        if not self.file.exists():
            return []
        lines = []
        for text in self.file.read_text().splitlines():
            try:
                lines.append(json.loads(text))
            except ValueError:  # the last line of one that was killed while it wrote
                continue
        return lines if lines and lines[0].get("facts") == self._facts else []


def _about(outcomes: Mapping[str, str], precision: str | None) -> Iterator[str]:
    for name, outcome in outcomes.items():
        if precision is None or re.search(rf"[\[-]{precision}[\]-]", name):
            yield outcome


def gpu_tests() -> list[str]:
    """Return the files of tests for a GPU; others may need other packages."""
    return sorted(str(file.relative_to(ROOT)) for file in ROOT.glob("tests/test_gpu*.py"))


def pytest_command() -> list[str]:
    """Make the command that runs tests on a GPU, but for which."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider"]
    command += ["-p", "benchmarks.gpu.outcomes", "-rfE", "--durations=15"]
    processes = max(1, min(PROCESSES, (os.cpu_count() or 1) - 2))
    if find_spec("xdist"):  # most of the time goes into compiling kernels, one core for each
        command += ["-n", str(processes), "--dist", "worksteal"]
    if find_spec("pytest_timeout"):  # a kernel that waits for ever takes one test with it
        command += ["--timeout=100", "--timeout-method=thread"]
    return command


def run(command: Sequence[str], log: Path, timeout: float, **variables: str) -> int | None:
    """The exit status of a command in the checkout that writes to `log`; None past `timeout`."""
    python_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": python_path, **variables},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # to end its children with it
        )
        try:
            return process.wait(timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            file.write(f"\nended after {timeout:.0f} s\n")
            return None
