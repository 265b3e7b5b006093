"""From a job to rows: what `gpu` measures and what it makes of a failure."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from importlib import import_module
from time import monotonic
from typing import Any

import torch
from torch import Tensor

import fastlstm

from . import cuda
from .contenders import Contender, build
from .floor import Machine, floor
from .grid import Job
from .timing import on_host, take_turns
from .worker import Failed, describe

Row = dict[str, Any]
PROVIDERS = ("fastlstm", "torch")
LONGEST = 60  # seconds for one measurement, compilation included; what takes longer hangs


def work_through(
    jobs: Iterable[Job],
    perform: Callable[[Job, float], list[Row]],
    save: Callable[[list[Row]], None],
    *,
    deadline: float,
    backend: str = "triton",
    clock: Callable[[], float] = monotonic,
) -> list[Job]:
    """Performs and saves one job after the other until the deadline; returns those left out.

    `perform` is told how many seconds it may take. What it cannot do becomes a row with the error.
    """
    left_out = []
    for job in jobs:
        left = deadline - clock()
        if left <= 0:
            left_out.append(job)
            continue
        try:
            rows = perform(job, LONGEST)
        except Failed as error:
            rows = [{**describe_job(job, "fastlstm", backend), "error": str(error)}]
        save(rows)
    return left_out


def measure(
    job: Job, machine: Machine, device: str, backend: str, seconds: float, repeat: int
) -> list[Row]:
    """A row for each provider, with its error in place of its times where it has none."""
    case, on_cuda = job.case, torch.device(device).type == "cuda"

    def finish(contender: Contender) -> Contender:
        if job.regime is not None:
            contender = forced(contender, job.regime)
        return cuda.captured(contender) if job.graph else contender

    contenders, errors = {}, {}
    with fastlstm.backend(backend), job.precision.applied():
        for name in PROVIDERS:
            try:
                contenders |= build(
                    [name],
                    case,
                    job.mode,
                    job.precision.dtype,
                    device=device,
                    eps=job.precision.eps,
                    finish=finish,
                )
            except Exception as error:  # of the kernel, its compiler or the check: into the row
                synchronize(device)  # raises after a fault of the GPU, which ends this process
                errors[name] = describe(error)
        with torch.inference_mode(job.mode != "train"):
            calls = {name: contender.call for name, contender in contenders.items()}
            stopwatch = cuda.on_gpu if on_cuda else on_host
            timings = take_turns(calls, seconds=seconds, repeat=repeat, stopwatch=stopwatch)
    least = floor(case, job.precision, job.mode, machine)
    rows: list[Row] = []
    for name in PROVIDERS:
        row = describe_job(job, name, backend)
        if name in errors:
            rows.append({**row, "error": errors[name]})
            continue
        median = timings[name].percentiles[1]
        rows.append(
            {
                **row,
                **timings[name].figures,
                "ratio": timings[name].ratio(timings["fastlstm"]) if not errors else None,
                "us_per_step": median / case.T,
                "floor_us": least,
                "times_floor": median / least,
            }
        )
    del contenders, calls
    gc.collect()
    if on_cuda:
        torch.cuda.empty_cache()
    return rows


def forced(contender: Contender, regime: str) -> Contender:
    """The contender with every plan of the Triton kernels restricted to a regime."""
    config = import_module("fastlstm.kernels.config")

    def call() -> object:
        with config.override(regime=regime):
            return contender.call()

    def results() -> dict[str, Tensor]:
        with config.override(regime=regime):
            return contender.results()

    return Contender(call, results)


def describe_job(job: Job, provider: str, backend: str) -> Row:
    """The part of a row that says what was measured."""
    return {
        "group": job.group,
        "case": job.case.name,
        "shape": job.case.shape,
        "real_steps": int(job.case.lengths.sum()),
        "mode": job.mode,
        "dtype": str(job.precision.dtype).removeprefix("torch."),
        "precision": job.precision.name,
        "graph": job.graph,
        "regime": job.regime,
        "provider": provider,
        "backend": backend if provider == "fastlstm" else "cudnn",
    }


def line(row: Row) -> str:
    """A row as a line of text."""
    how = f"{row['precision']:5} {row['mode']:5} {'graph' if row['graph'] else 'eager'}"
    how += f" {row['regime']}" if row["regime"] else ""
    head = f"{row['case']:16} {row['shape']:20} {how} {row['provider']:8}"
    if "error" in row:
        return f"{head} {row['error'].splitlines()[0]}"
    ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}x"
    return (
        f"{head} {row['p50_us']:10,.1f} µs ({row['p20_us']:,.1f}-{row['p80_us']:,.1f}) "
        f"{row['us_per_step']:8.3f} a step  {row['times_floor']:6.1f} x floor  {ratio}"
    ).rstrip()


def synchronize(device: str) -> None:
    """Raises if the GPU has reported a fault, after which this process is past use."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
