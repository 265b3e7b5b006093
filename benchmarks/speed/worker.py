"""A process for work that may crash or hang: a fault of the GPU costs one job, not the run."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from .. import BenchmarkError

GRACE = 10  # seconds for a killed process to go


class Failed(BenchmarkError):
    """The function raised, or its process died or did not answer in time; the text says which."""


class Worker:
    """Runs functions in a process of its own, which is replaced when it is broken.

    `probe` is called in that process after a failure, and raises if the process is broken: after
    a fault of the GPU, say, every call fails.
    """

    def __init__(self, probe: Callable[[], object]) -> None:
        self._probe = probe
        self._process: BaseProcess | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, function: Callable[..., Any], *args: Any, timeout: float) -> Any:
        """``function(*args)``, both from the top of a module; raises `Failed`."""
        if self._process is None:
            self._start()
        self._connection.send((function, args))
        try:
            if not self._connection.poll(timeout):
                self.close()
                raise Failed(f"no answer within {timeout:.0f} s")
            outcome, value = self._connection.recv()
        except (EOFError, ConnectionResetError) as error:
            status = self.close()
            raise Failed(f"the process died with exit status {status}") from error
        if outcome == "broken":
            self.close()
        if outcome != "done":
            raise Failed(value)
        return value

    def close(self) -> int | None:
        """Ends the process; returns its exit status."""
        if self._process is None:
            return None
        process, self._process = self._process, None
        self._connection.close()
        process.join(1)  # one that died has a status of its own
        process.kill()
        process.join(GRACE)
        return process.exitcode

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")  # a fork cannot use CUDA
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._probe), daemon=True)
        self._process.start()
        theirs.close()  # so that its end is the end of the connection


def _serve(connection: Connection, probe: Callable[[], object]) -> None:
    while True:
        try:
            function, args = connection.recv()
        except EOFError:
            return
        try:
            reply = "done", function(*args)
        except Exception as error:  # whatever it is goes to the other side, which decides
            reply = "failed", describe(error)
            try:
                probe()
            except Exception:
                connection.send(("broken", reply[1]))
                return
        connection.send(reply)


def describe(error: BaseException) -> str:
    """The type and the first lines of an exception; a compiler's can go on for pages."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: " + "\n".join(lines[:5])
