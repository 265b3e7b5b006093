"""From a job to rows: the time, memory and error of each provider, or why it has none."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from time import monotonic
from typing import Any

import torch

import fastlstm

from ..providers import provider
from ..providers.remote import Remotes
from . import gpu_timing
from .check import Judge
from .contender import Contender, around
from .floor import Machine, floor
from .job import Job
from .timing import take_turns
from .worker import Failed, describe
from .workload import Workload, make_workload

Row = dict[str, Any]
LONGEST = 60  # seconds for one measurement, compilation included; what takes longer hangs


def measure(
    job: Job,
    machine: Machine,
    device: str,
    providers: Iterable[str],
    seconds: float,
    repeat: int,
    *,
    backend: str | None = None,
    remotes: Remotes | None = None,
) -> list[Row]:
    """Return a row for each provider: its figures, why it is "skipped", or its "error".

    Their calls take turns for about `seconds`, in `repeat` rounds at most. `backend` is that of
    provider "fastlstm"; by default its own choice. `remotes` are processes that are kept for the
    next job.
    """
    with threads(job.threads), job.precision.applied(), ExitStack() as stack:
        stack.enter_context(torch.inference_mode(job.mode != "train"))
        remotes = remotes or stack.enter_context(Remotes())
        work = make_workload(job.case, job.mode, job.precision.dtype, device, job.input_gradient)
        rows: dict[str, Row] = {}
        for name in providers:
            rows[name] = describe_job(job, name, device, backend)
            if reason := _refusal(name, job, work):
                rows[name]["skipped"] = reason
        taking_part = {name: row for name, row in rows.items() if "skipped" not in row}
        if not taking_part:
            return list(rows.values())
        judge = Judge(work, job.precision.eps)
        contenders: dict[str, Contender] = {}
        for name, row in taking_part.items():
            try:
                contenders[name] = _contender(name, job, work, backend, remotes)
                row |= _first_figures(contenders[name], judge, name, job)
            except Exception as error:  # of a kernel, its compiler or the check: into the row
                synchronize(device)  # raises after a fault of the GPU, which ends this process
                contenders.pop(name, None)
                row["error"] = describe(error)
        timers = {name: contender.seconds for name, contender in contenders.items()}
        timings = take_turns(timers, seconds=seconds, repeat=repeat) if timers else {}
        least = floor(job.case, job.precision, job.mode, machine)
    ours = timings.get("fastlstm")
    for name, timing in timings.items():
        median = timing.percentiles[1]
        rows[name] |= {
            **timing.figures,
            "ratio": timing.ratio(ours) if ours else None,
            "us_per_step": median / job.case.T,
            "floor_us": least,
            "times_floor": median / least,
        }
    del contenders, timers
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
    return list(rows.values())


def _first_figures(contender: Contender, judge: Judge, name: str, job: Job) -> Row:
    """Return what is known before the turns; raises Mismatch for wrong results."""
    row: Row = {"first_call_s": contender.seconds(1)}
    who = provider(name)
    row["max_error"] = judge.error(name, contender, ours=who.own_kernels, eps=who.eps)
    row["peak_bytes"] = contender.peak_bytes()
    if contender.rest:
        row["rest_bytes"] = contender.rest()
    if contender.kept:
        row["kept_bytes"] = contender.kept()
        row["kept_values_of_H"] = row["kept_bytes"] / _values(job)
    return row


def _values(job: Job) -> int:
    """Return the bytes of one value for each unit, direction, layer and real step."""
    case = job.case
    return int(case.lengths.sum()) * case.L * case.D * case.H * job.precision.dtype.itemsize


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Set torch's number of threads for the block; None changes nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _refusal(name: str, job: Job, work: Workload) -> str | None:
    who = provider(name)
    if job.graph and who.remote:
        return "in a process of its own, whose work is not captured"
    return who.missing() or who.refuses(work)


def _contender(
    name: str, job: Job, work: Workload, backend: str | None, remotes: Remotes
) -> Contender:
    if provider(name).remote:
        return remotes.contender(name, work)
    contender = provider(name).contender(work)
    if backend and name == "fastlstm":
        contender = around(contender, partial(fastlstm.backend, backend))
    if work.on_cpu:
        return contender
    return gpu_timing.on_events(gpu_timing.captured(contender) if job.graph else contender)


def describe_job(job: Job, name: str, device: str, backend: str | None = None) -> Row:
    """Return the part of a row that says what was measured, and of which provider."""
    return {
        "group": job.group,
        "case": job.case.name,
        "shape": job.case.shape,
        "packed": job.case.packed,
        "reset": job.case.reset,
        "real_steps": int(job.case.lengths.sum()),
        "mode": job.mode,
        "input_gradient": job.input_gradient,
        "dtype": str(job.precision.dtype).removeprefix("torch."),
        "precision": job.precision.name,
        "graph": job.graph,
        "threads": job.threads or torch.get_num_threads(),
        "device": torch.device(device).type,
        "provider": name,
        "version": provider(name).version(),
        "backend": backend if name == "fastlstm" else None,
    }


def synchronize(device: str) -> None:
    """Raise if the GPU has reported a fault, after which this process is of no more use."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def work_through(
    jobs: Iterable[Job],
    perform: Callable[[Job, float], list[Row]],
    save: Callable[[list[Row]], None],
    failed: Callable[[Job], Row],
    *,
    deadline: float,
    clock: Callable[[], float] = monotonic,
) -> list[Job]:
    """Perform and save one job after the other until the deadline; return those left out.

    `perform` gets a job and the seconds that it may take. If it raises Failed, the row that
    `failed` makes is saved with the error.
    """
    left_out = []
    for job in jobs:
        if deadline - clock() <= 0:
            left_out.append(job)
            continue
        try:
            rows = perform(job, LONGEST)
        except Failed as error:
            rows = [{**failed(job), "error": str(error)}]
        save(rows)
    return left_out


def line(row: Row) -> str:
    """Return a row as a line of text."""
    how = f"{row['precision']:5} {row['mode']:5} {'graph' if row['graph'] else 'eager'}"
    head = f"{row['case']:18} {row['shape']:20} {how} {row['provider']:14}"
    if "skipped" in row:
        return f"{head} {row['skipped']}"
    if "error" in row:
        return f"{head} {row['error'].splitlines()[0]}"
    ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}x"
    return (
        f"{head} {row['p50_us']:10,.1f} µs ({row['p20_us']:,.1f}-{row['p80_us']:,.1f}) "
        f"{row['us_per_step']:8.3f} a step  {row['times_floor']:6.1f} x floor  {ratio}"
    ).rstrip()
