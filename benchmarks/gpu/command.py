"""`python -m benchmarks gpu`: the kernels of a backend beside cuDNN, tested, recorded and timed.

First the tests that need a GPU, then the cuDNN results that machines without one are tested
against, then the timings, most important first, until the budget is spent. Kernels that
the library takes only on request, such as the persistent ones, come last, with tests of their own,
because they could hang. A figure is a median over short blocks in which both take turns in one
process, after the results of both have been checked against float64. A ratio is the median over
the rounds of (time of cuDNN / time of fastlstm): above 1 fastlstm is faster.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from time import monotonic

import torch

from .. import BenchmarkError
from ..speed import floor
from ..speed.environment import environment
from ..speed.job import Job
from ..speed.measure import Row, describe_job, line, measure, synchronize, work_through
from ..speed.results import Results
from ..speed.worker import Worker
from . import targets
from .plan import GROUPS, plan_of_gpu

ROOT = Path(__file__).parents[2]
DEVICE = "cuda"
BACKENDS = ("triton", "cuda", "reference")
PROVIDERS = ("fastlstm", "torch")

PROCESSES = 12  # of the tests, at most: each one has a share of the GPU's memory
TESTS_SHARE = 0.5  # of the budget, at most: what the tests leave is for the timings
RECORDING = 90  # seconds for the cuDNN results
MACHINE = 90  # seconds for the rates of the machine, the start of CUDA included
FORCED_TESTS = "tests/test_gpu_forced.py"
FORCED_SECONDS = 100  # for these, at most
SECONDS, ROUNDS = 0.4, 20  # of one measurement
QUICKLY = 4  # --quick: so many times less of both


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `gpu`."""
    add = parser.add_argument
    add(
        "--backend",
        choices=BACKENDS,
        default="triton",
        help="the backend to test and time (default: triton)",
    )
    add(
        "--out",
        type=Path,
        default=Path("benchmarks/results"),
        metavar="DIR",
        help="folder of gpu-BACKEND-speed.json and the logs (default: %(default)s)",
    )
    add(
        "--fixtures",
        type=Path,
        default=Path("tests/data"),
        metavar="DIR",
        help="folder of the recorded cuDNN results (default: %(default)s)",
    )
    add(
        "--budget",
        type=float,
        default=480,
        metavar="SECONDS",
        help="start no measurement after this time; tests get half (default: %(default)s)",
    )
    add("--quick", action="store_true", help="take a quarter of the time for every measurement")
    add("--skip-tests", action="store_true", help='do not run the tests; the rows say "skipped"')
    add(
        "--groups",
        nargs="+",
        choices=GROUPS,
        default=GROUPS,
        help="groups of timings (default: all)",
    )
    add("--commit", help="the commit of this copy, if it is no git checkout")


def main(args: argparse.Namespace) -> int:
    """Test, record, time; 0 if nothing failed. Raises BenchmarkError without a CUDA GPU."""
    require(DEVICE)
    deadline = monotonic() + args.budget
    args.out.mkdir(parents=True, exist_ok=True)
    facts = environment(DEVICE)
    facts["commit"] = args.commit or facts["commit"]
    print("\n".join(f"{name:16} {value}" for name, value in facts.items()), flush=True)

    tests = "skipped"
    if not args.skip_tests:
        timeout = args.budget * TESTS_SHARE
        log = args.out / f"gpu-{args.backend}-tests.log"
        tests = run_tests(log, timeout, "--backend", args.backend, f"--ignore={FORCED_TESTS}")
    recorded = run_recorder(args.fixtures, args.out / "gpu-recording.log")

    jobs = [job for job in plan_of_gpu() if job.group in args.groups]
    chosen = [job for job in jobs if job.regime is None]
    # The CUDA kernels have no regime that they have to be told to take.
    imposed = [job for job in jobs if job.regime is not None and args.backend == "triton"]
    results = Results(args.out / f"gpu-{args.backend}-speed.json", facts)

    def save(tests: str, new: Sequence[Row]) -> None:
        results.add({**row, "tests": tests} for row in new)
        print("\n".join(map(line, new)), flush=True)

    def failed(job: Job) -> Row:
        return describe_job(job, "fastlstm", DEVICE, args.backend)

    quickly = QUICKLY if args.quick else 1
    with Worker(partial(synchronize, DEVICE)) as worker:
        machine = worker.run(floor.measure, DEVICE, timeout=MACHINE)
        results.environment["machine"] = asdict(machine)
        print(f"\nmeasured: {machine}\n", flush=True)

        def perform(job: Job, timeout: float) -> list[Row]:
            how = (machine, DEVICE, PROVIDERS, SECONDS / quickly, ROUNDS // quickly)
            timed = partial(measure, backend=args.backend)
            return worker.run(timed, job, *how, timeout=timeout)

        limits = {"failed": failed, "deadline": deadline}
        left_out = work_through(chosen, perform, partial(save, tests), **limits)
        proven = "skipped"
        if imposed and not args.skip_tests and (left := deadline - monotonic()) > 0:
            log = args.out / "gpu-forced-tests.log"
            proven = run_tests(log, min(FORCED_SECONDS, left), FORCED_TESTS)
        left_out += work_through(imposed, perform, partial(save, proven), **limits)

    print(f"\nrows: {results.file}; tests: {tests}; of forced regimes: {proven}")
    print("\n".join(targets.verdicts(chosen, results.rows, targets.targets_of(args.backend))))
    if left_out:
        print(f"left out, for want of time: {len(left_out)} of {len(jobs)} measurements:")
        print("\n".join(f"  {job}" for job in left_out))
    if tests != "passed":
        print(f"Not to be published: tests {tests}.")
    failures = sum("error" in row and row["regime"] is None for row in results.rows)
    if failures:
        print(f"{failures} rows are errors.")
    return int(tests == "failed" or not recorded or failures > 0)


def require(device: str) -> None:
    """Raises BenchmarkError where the device cannot be used."""
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise BenchmarkError(
            "this command needs a CUDA GPU, and here torch.cuda.is_available() is False "
            f"(torch {torch.__version__})"
        )


def run_tests(log: Path, timeout: float, *selection: str) -> str:
    """`pytest -m gpu` with such arguments: "passed" or "failed"."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider"]
    command += ["-rfE", "--durations=15", *selection]
    processes = max(1, min(PROCESSES, (os.cpu_count() or 1) - 2))
    if find_spec("xdist"):  # most of the time goes into compiling kernels, one core for each
        command += ["-n", str(processes), "--dist", "worksteal"]
    if find_spec("pytest_timeout"):  # a kernel that waits for ever takes one test with it
        command += ["--timeout=100", "--timeout-method=thread"]
    # The tests run deterministically, which cuBLAS refuses without a workspace of its own.
    status = run(command, log, timeout, CUBLAS_WORKSPACE_CONFIG=":4096:8")
    tail = log.read_text(errors="replace").splitlines()[-30:]
    print("\n".join(tail), flush=True)
    # No test at all, or none that was not skipped, is no success either.
    passed = status == 0 and bool(tail) and bool(re.search(r"\b[1-9]\d* passed", tail[-1]))
    print(f"tests: {'passed' if passed else 'failed'}, log in {log}", flush=True)
    return "passed" if passed else "failed"


def run_recorder(folder: Path, log: Path) -> bool:
    """Writes what `tests/test_cudnn.py` compares with; True if it worked."""
    command = [sys.executable, str(ROOT / "tests/recorder.py"), str(folder.resolve())]
    status = run([*command, "--device", DEVICE], log, RECORDING)
    print(log.read_text(errors="replace"), end="", flush=True)
    print(f"cuDNN results: {'written to' if status == 0 else 'FAILED, not in'} {folder}\n")
    return status == 0


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
