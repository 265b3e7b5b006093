"""One training in several processes: torchrun starts them, DistributedDataParallel joins them.

This is strong scaling. The batch stays that of the protocol: every process takes its rows of it,
and gradients are means over the processes. So N processes learn what one does, but for the order
of sums, and each has an N-th of the work.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor, distributed, nn

from .. import BenchmarkError

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
TIMEOUT = timedelta(minutes=5)  # to wait for a process that may be dead, or download the data
Result = TypeVar("Result")


@dataclass(frozen=True)
class Processes:
    """The processes that train together, as one of them sees them."""

    rank: int = 0
    count: int = 1
    device: str = "cpu"  # of this process

    @property
    def leads(self) -> bool:
        """Whether this is the process that draws, prints and writes files."""
        return self.rank == 0

    def check(self, batch: int) -> None:
        """Raises `BenchmarkError` unless each process gets as many rows of a batch as any other.

        The mean of their gradients is that of the batch only then.
        """
        if batch % self.count:
            raise BenchmarkError(
                f"{self.count} processes cannot share a batch of {batch} rows evenly: choose "
                "--batch, or torchrun's --nproc-per-node, so that they can"
            )

    def share(self, rows: Tensor) -> Tensor:
        """This process's part of the rows: as many as any other has, give or take one."""
        return rows.tensor_split(self.count)[self.rank]

    def replicate(self, model: nn.Module) -> nn.Module:
        """The model, with weights from rank 0 and gradients that are means over the processes."""
        return model if self.count == 1 else nn.parallel.DistributedDataParallel(model)

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each of the values, summed over the processes in float64."""
        if self.count == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64, device=self.device)
        distributed.all_reduce(sums)
        return sums.tolist()

    def mean(self, values: Sequence[float]) -> list[float]:
        """Each of the values, averaged over the processes."""
        return [value / self.count for value in self.sum(values)]

    def wait(self) -> None:
        """Returns when all processes are here."""
        if self.count > 1:
            distributed.barrier()

    def once(self, function: Callable[[], Result]) -> Result:
        """What the function returns in the leading process, the only one that calls it.

        A `BenchmarkError` is raised in all of them.
        """
        if self.count == 1:
            return function()
        outcome: list[Result | BenchmarkError | None] = [None]
        if self.leads:
            try:
                outcome = [function()]
            except BenchmarkError as error:
                outcome = [error]
        distributed.broadcast_object_list(outcome)
        if isinstance(outcome[0], BenchmarkError):
            raise outcome[0]
        return outcome[0]  # type: ignore[return-value]


ALONE = Processes()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The option that spreads a training command over processes."""
    parser.add_argument(
        "--distributed",
        action="store_true",
        help="train in the processes that torchrun has started, with DistributedDataParallel: "
        "torchrun --nproc-per-node N -m benchmarks ... --distributed. Strong scaling: each has "
        "its rows of every batch, which stays as large, so that the result stays the same. The "
        "efficiency is T(1) / (N T(N)), in median ms/step, where T(1) is of a copy that rank 0 "
        "trains alone from time to time while the others wait. On CPUs each process has as many "
        "threads as there are cores for it, unless --threads or OMP_NUM_THREADS says otherwise "
        "(torchrun sets that to 1 itself, so 1 says nothing); with --device cuda each has a GPU",
    )


@contextmanager
def processes(args: argparse.Namespace) -> Iterator[Processes]:
    """The processes of torchrun, in a process group; `ALONE` without ``--distributed``.

    Sets the device and the threads of this process in `args`. In the block only the leading
    process prints to stdout.
    """
    if not args.distributed:
        yield ALONE
        return
    if missing := [name for name in VARIABLES if name not in os.environ]:
        raise BenchmarkError(
            f"--distributed is for processes that torchrun starts ({', '.join(missing)} not set): "
            "torchrun --nproc-per-node 2 -m benchmarks mnist --distributed"
        )
    if not distributed.is_available():
        raise BenchmarkError("--distributed: this build of PyTorch has no torch.distributed")
    rank, count, local, neighbours = (int(os.environ[name]) for name in VARIABLES[:4])
    if args.device.startswith("cuda"):
        args.device = _gpu(args.device, local)
        torch.cuda.set_device(args.device)
        distributed.init_process_group(
            "nccl", timeout=TIMEOUT, device_id=torch.device(args.device)
        )
    else:
        if args.threads is None:
            args.threads = _threads(neighbours)
        distributed.init_process_group("gloo", timeout=TIMEOUT)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere if rank else sys.stdout):
        yield Processes(rank, count, args.device)
    # Not after an error: NCCL would wait here for processes that wait elsewhere.
    distributed.destroy_process_group()


def _gpu(device: str, local: int) -> str:
    """The GPU of the process with this number on its machine."""
    if device != "cuda":
        raise BenchmarkError(
            f"--distributed gives every process a GPU of its own: --device cuda, not {device}"
        )
    if local >= (count := torch.cuda.device_count()):
        raise BenchmarkError(
            f"--distributed needs a GPU for every process: process {local} of this machine sees "
            f"{count}"
        )
    return f"cuda:{local}"


def _threads(neighbours: int) -> int | None:
    """The threads of one of so many processes on this machine; None leaves it to PyTorch."""
    if os.environ.get("OMP_NUM_THREADS", "1") != "1":
        return None
    affine = hasattr(os, "sched_getaffinity")  # macOS has no such thing
    cores = len(os.sched_getaffinity(0)) if affine else os.cpu_count() or 1
    return max(1, cores // neighbours)
