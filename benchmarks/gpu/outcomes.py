"""A pytest plugin: the outcome of every test, written as it comes, and what need not run again.

`python -m pytest -p benchmarks.gpu.outcomes --outcomes FILE --but-not FILE`: the first file gets a
line of JSON for each test, and a last one when the run has ended by itself; the second one has a
name a line of tests to leave out. With pytest-xdist the process that leads writes.

A fault of the GPU spoils everything that its process does afterwards. So a test process that finds
one after a test ends at once: pytest-xdist starts another, and the fault counts against that test
alone.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

MOST_TEXT = 3000  # characters of why a test failed: the last ones
SPOILED = 3  # exit status of a test process after a fault of the GPU


def pytest_addoption(parser: pytest.Parser) -> None:
    """The two files."""
    add = parser.getgroup("outcomes").addoption
    add("--outcomes", help="file that gets a line of JSON for each test")
    add("--but-not", help="file with the names of tests to leave out, one a line")


def pytest_configure(config: pytest.Config) -> None:
    """Take part: write where this process leads, watch the GPU where it is led."""
    if hasattr(config, "workerinput"):
        config.pluginmanager.register(Watch())
    elif config.option.outcomes:
        config.pluginmanager.register(Writer(Path(config.option.outcomes)))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is not to run."""
    if config.option.but_not is None:
        return
    names = set(Path(config.option.but_not).read_text().splitlines())
    left_out = [item for item in items if item.nodeid in names]
    items[:] = [item for item in items if item.nodeid not in names]
    config.hook.pytest_deselected(items=left_out)


class Writer:
    """Appends to the file of outcomes; what is killed leaves all lines that it wrote."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Write the outcome of a call, and what goes wrong before or after it."""
        if report.when == "call" or report.outcome != "passed":
            why = {"why": report.longreprtext[-MOST_TEXT:]} if report.failed else {}
            line = {"test": report.nodeid, "outcome": report.outcome, "seconds": report.duration}
            self._write(**line, **why)

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        """Write that there is no more to come."""
        self._write(ended=int(exitstatus))

    def _write(self, **line: Any) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps(line) + "\n")


class Watch:
    """Ends a process whose GPU has reported a fault, while the test that caused it still runs."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_teardown(self) -> None:
        """Ask the GPU; a test that failed in its call has been reported by now."""
        torch = sys.modules.get("torch")
        if torch is None or not torch.cuda.is_initialized():
            return
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(SPOILED)
