"""`python -m benchmarks gpu`: the kernels of a backend beside cuDNN, tested, recorded and timed.

Two phases, which may be two calls. `--tests`: the tests that need a GPU, and the cuDNN results
that machines without one are tested against. `--timings`: the kernels beside cuDNN (timings.py).
Without either, both. All of it is written as it comes; a call goes on where the one before was
ended. `--map` is for itself: where the kernels are faster than cuDNN (map.py).
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path
from time import monotonic
from typing import Any

import torch

from .. import BenchmarkError
from ..speed.environment import environment
from ..speed.job import Job
from ..speed.results import Results
from . import map as sample
from . import targets
from .plan import GROUPS, plan_of_gpu
from .testing import ROOT, Tests, run
from .timings import Timings, pending

DEVICE = "cuda"
BACKENDS = ("triton", "cuda", "reference")

TESTS_SHARE = 0.5  # of the budget, at most, where timings follow
RECORDING = 90  # seconds for the cuDNN results
SOURCES = ("fastlstm/kernels", "csrc", "tests")  # what outcomes of tests depend on
SUFFIXES = (".py", ".cpp", ".h", ".cu")


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
        help="start nothing after this time; beside timings, tests get half (%(default)s)",
    )
    add("--tests", action="store_true", help="only test and record, no timings")
    add("--timings", action="store_true", help="only time; rows tell how the tests have ended")
    add("--map", action="store_true", help="only time a sample of calls, for the table of auto")
    add("--fresh", action="store_true", help="start anew, whatever earlier calls have written")
    add("--quick", action="store_true", help="take a quarter of the time for every measurement")
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
    start = monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    facts = environment(DEVICE)
    facts["commit"] = args.commit or facts["commit"]
    facts["source"] = digest(ROOT)
    print("\n".join(f"{name:16} {value}" for name, value in facts.items()), flush=True)
    if args.map:
        draw_map(args, facts, start + args.budget)
        return 0
    tests = Tests(args.out, args.backend, facts)
    both = args.tests == args.timings
    failed = False
    if both or args.tests:
        limit = start + args.budget * (TESTS_SHARE if both else 1)
        failed = not test(args, tests, limit)
    if both or args.timings:
        failed |= not time(args, facts, tests, start + args.budget)
    overall = tests.status()
    if overall != "passed":
        print(f"Not to be published: tests {overall}.")
    return int(failed or overall in ("failed", "unfinished"))


def draw_map(args: argparse.Namespace, facts: dict[str, Any], deadline: float) -> None:
    """Time a sample of the calls that a backend computes, and write gpu-BACKEND-map.json."""
    rows, left_out = sample.work(args.backend, DEVICE, deadline)
    results = Results(args.out / f"gpu-{args.backend}-map.json", facts, sample.COLUMNS)
    results.add(rows)
    print(f"{len(rows)} calls in {results.file}, {left_out} left out")


def test(args: argparse.Namespace, tests: Tests, deadline: float) -> bool:
    """Run the tests, and record cuDNN's results whatever became of them.

    Returns whether the results were recorded.
    """
    if args.fresh:
        tests.forget()
    tests.run(max(deadline - monotonic(), 1))
    return run_recorder(args.fixtures, args.out / "gpu-recording.log")


def time(args: argparse.Namespace, facts: dict[str, Any], tests: Tests, deadline: float) -> bool:
    """Time what has not been timed yet; return whether no row is an error."""
    results = Results(args.out / f"gpu-{args.backend}-speed.json", facts)
    if not args.fresh:
        resume(results)
    for row in results.rows:  # the tests may have gone on since
        row["tests"] = tests.status(row["precision"])
    jobs = [job for job in plan_of_gpu() if job.group in args.groups]

    def of_tests(job: Job) -> str:
        return tests.status(job.precision.name)

    timings = Timings(results, args.backend, DEVICE, of_tests, args.quick)
    left_out = timings.run(pending(jobs, results, DEVICE), deadline)
    results.add([])  # writes what the tests have become, too
    print(f"\nrows: {results.file}")
    print("\n".join(targets.verdicts(jobs, results.rows, targets.targets_of(args.backend))))
    if left_out:
        print(f"left out, for want of time: {len(left_out)} of {len(jobs)} measurements:")
        print("\n".join(f"  {job}" for job in left_out))
    failures = sum("error" in row for row in results.rows)
    if failures:
        print(f"{failures} rows are errors.")
    return failures == 0


def resume(results: Results) -> None:
    """Take over the rows of the file; those of another machine or source are put aside."""
    try:
        results.resume()
    except BenchmarkError as error:
        assert results.file is not None
        aside = results.file.with_suffix(".json.old")
        results.file.replace(aside)
        print(f"{error}; it is now {aside}", flush=True)


def digest(root: Path) -> str:
    """Return a text that is another one for other sources, wherever they are checked out."""
    found = hashlib.sha256()
    for folder in SOURCES:
        for file in sorted((root / folder).rglob("*")):
            if file.suffix in SUFFIXES:
                found.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes())
    return found.hexdigest()[:12]


def require(device: str) -> None:
    """Raises BenchmarkError where the device cannot be used."""
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise BenchmarkError(
            "this command needs a CUDA GPU, and here torch.cuda.is_available() is False "
            f"(torch {torch.__version__})"
        )


def run_recorder(folder: Path, log: Path) -> bool:
    """Writes what `tests/test_cudnn.py` compares with; True if it worked."""
    command = [sys.executable, str(ROOT / "tests/recorder.py"), str(folder.resolve())]
    status = run([*command, "--device", DEVICE], log, RECORDING)
    print(log.read_text(errors="replace"), end="", flush=True)
    print(f"cuDNN results: {'written to' if status == 0 else 'FAILED, not in'} {folder}\n")
    return status == 0
