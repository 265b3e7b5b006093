"""Contenders in a process of their own, which take their turns from there.

JAX and Keras bring thread pools, allocators and global choices of their own. In their own process
they disturb nobody, and what they do is timed there: what passes between the processes is not.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..speed.contender import Contender
from ..speed.worker import Worker
from ..speed.workload import Workload
from . import provider

LONGEST = 120  # seconds for one answer, compilation included

_contender: Contender  # of the process that serves


class Remote:
    """A process for the contenders of one provider, closed at the end of a `with` block.

    It counts the threads that torch has here when it makes its first contender, and no other.
    """

    def __init__(self, name: str, timeout: float = LONGEST) -> None:
        self._name, self._timeout = name, timeout
        self._worker = Worker(_nothing)

    def __enter__(self) -> Remote:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process."""
        self._worker.close()

    def contender(self, work: Workload) -> Contender:
        """The contender of that work; the one before it is gone."""
        # As bytes: tensors sent otherwise would move into memory that both processes share.
        tf32 = torch.backends.cudnn.allow_tf32
        self._ask(_build, self._name, pickle.dumps(work), torch.get_num_threads(), tf32)
        return Contender(
            lambda: self._ask(_seconds, 1),
            lambda: pickle.loads(self._ask(_results)),
            lambda times: self._ask(_seconds, times),
            lambda: None,  # an allocator of its own keeps what it has: a later call shows nothing
        )

    def _ask(self, function: Callable[..., Any], *args: Any) -> Any:
        return self._worker.run(function, *args, timeout=self._timeout)


def _nothing() -> None:
    """A process that answers is fit for use."""


class Remotes:
    """The processes of a run, started when they are first asked for."""

    def __init__(self) -> None:
        self._processes: dict[tuple[str, int], Remote] = {}

    def __enter__(self) -> Remotes:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes.values():
            process.close()

    def contender(self, name: str, work: Workload) -> Contender:
        """That of a provider; the one it had before is gone."""
        key = name, torch.get_num_threads()
        if key not in self._processes:
            self._processes[key] = Remote(name)
        return self._processes[key].contender(work)


def _build(name: str, work: bytes, threads: int, tf32: bool) -> None:
    global _contender
    torch.backends.cudnn.allow_tf32 = tf32
    if hasattr(os, "sched_setaffinity"):  # before a runtime counts the cores
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    torch.set_num_threads(threads)
    _contender = provider(name).contender(pickle.loads(work))


def _results() -> bytes:
    found: dict[str, Tensor] = _contender.results()
    return pickle.dumps({name: value.detach().cpu() for name, value in found.items()})


def _seconds(times: int) -> float:
    return _contender.seconds(times)
