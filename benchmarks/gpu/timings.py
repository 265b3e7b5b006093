"""The timings of a GPU run: every group gets its share of the time, and what is done is kept.

A figure is a median over short blocks in which both take turns in one process, after the results
of both have been checked against float64. A ratio is the median over the rounds of (time of cuDNN
/ time of fastlstm): above 1 fastlstm is faster.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial

from ..speed import floor
from ..speed.job import Job
from ..speed.measure import Row, describe_job, line, measure, synchronize, work_through
from ..speed.results import Results, key
from ..speed.worker import Failed, Worker

PROVIDERS = ("fastlstm", "torch")
MACHINE = 90  # seconds for the rates of the machine, the start of CUDA included
SECONDS, ROUNDS = 0.4, 20  # of one measurement
QUICKLY = 4  # --quick: so many times less of both


def spread(jobs: Iterable[Job]) -> list[Job]:
    """Deal the groups: all of them come to the same part of their jobs at any time."""
    jobs = list(jobs)
    sizes = Counter(job.group for job in jobs)
    seen: Counter[str] = Counter()
    places = []
    for job in jobs:
        seen[job.group] += 1
        places.append((seen[job.group] - 0.5) / sizes[job.group])
    return [jobs[i] for i in sorted(range(len(jobs)), key=places.__getitem__)]


def pending(jobs: Iterable[Job], results: Results, device: str) -> list[Job]:
    """Leave out what the results have, errors included."""
    done = {key(row) for row in results.rows}
    return [job for job in jobs if key(describe_job(job, PROVIDERS[0], device)) not in done]


class Timings:
    """Measures jobs in a process of its own, and adds their rows to `results` as they come.

    `outcome` says how the tests of a job have ended, which its rows tell.
    """

    def __init__(
        self,
        results: Results,
        backend: str,
        device: str,
        outcome: Callable[[Job], str],
        quick: bool,
    ) -> None:
        self.results, self.backend, self.device = results, backend, device
        self.outcome = outcome
        self.times_less = QUICKLY if quick else 1

    def run(self, jobs: Sequence[Job], deadline: float) -> list[Job]:
        """Measure until the deadline; return what is left. Raises Failed if the GPU is lost."""
        with Worker(partial(synchronize, self.device)) as worker:
            machine = self._machine(worker)
            self.results.environment["machine"] = asdict(machine)
            print(f"\nmeasured: {machine}\n", flush=True)
            seconds, rounds = SECONDS / self.times_less, ROUNDS // self.times_less
            how = (machine, self.device, PROVIDERS, seconds, rounds)

            def perform(job: Job, timeout: float) -> list[Row]:
                timed = partial(measure, backend=self.backend)
                return worker.run(timed, job, *how, timeout=timeout)

            return self._work(spread(jobs), perform, deadline)

    def _machine(self, worker: Worker) -> floor.Machine:
        try:
            return worker.run(floor.measure, self.device, timeout=MACHINE)
        except Failed as error:
            print(f"the rates of the machine, at first: {error}", flush=True)
            return worker.run(floor.measure, self.device, timeout=MACHINE)

    def _work(
        self, jobs: Iterable[Job], perform: Callable[[Job, float], list[Row]], deadline: float
    ) -> list[Job]:
        left_out = []
        for job in jobs:  # one by one: each row has the outcome of its own tests
            left_out += work_through(
                [job], perform, partial(self._save, job), self._failed, deadline=deadline
            )
        return left_out

    def _save(self, job: Job, rows: Sequence[Row]) -> None:
        self.results.add({**row, "tests": self.outcome(job)} for row in rows)
        print("\n".join(map(line, rows)), flush=True)

    def _failed(self, job: Job) -> Row:
        return describe_job(job, "fastlstm", self.device, self.backend)
