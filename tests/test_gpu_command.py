"""`python -m benchmarks gpu` as far as a machine without a GPU can tell: all but the figures."""

import os
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cases
import gpu as judges
import oracle
import pytest
import torch

import fastlstm
from benchmarks import __main__ as command
from benchmarks.gpu import command as gpu
from benchmarks.gpu import timings
from benchmarks.gpu.plan import GROUPS, plan_of_gpu
from benchmarks.speed import floor
from benchmarks.speed import measure as rows_of
from benchmarks.speed.cases import CASES, TASK_SHAPES, Case
from benchmarks.speed.job import Job
from benchmarks.speed.precision import PRECISIONS, Precision
from benchmarks.speed.results import load
from benchmarks.speed.timing import take_turns
from benchmarks.speed.worker import Failed, Worker

TINY = Case("tiny", 3, 5, 2, 2, 2, 4)
PACKED = Case("packed", 3, 5, 1, 2, 4, 6, packed=True)
MACHINE = floor.Machine({name: 1e12 for name in PRECISIONS}, {1: 1e12}, launch=1e-6)


def job(case: Case = TINY, precision: str = "exact", mode: str = "infer", **other: Any) -> Job:
    return Job(other.get("group", "tasks"), case, PRECISIONS[precision], mode, False)


def measure(of: Job) -> list[rows_of.Row]:
    return rows_of.measure(of, MACHINE, "cpu", timings.PROVIDERS, 0.001, 2, backend="reference")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_an_honest_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["gpu", "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "needs a CUDA GPU" in error
    assert "torch.cuda.is_available() is False" in error
    assert not (tmp_path / "out").exists()


def test_grid_has_what_was_asked_for_and_the_tasks_first() -> None:
    jobs = plan_of_gpu()
    assert len(set(jobs)) == len(jobs)
    assert {j.group for j in jobs} == set(GROUPS)
    assert [j.group for j in jobs] == sorted((j.group for j in jobs), key="tasks".__ne__)
    tasks = {(j.case, j.precision.name, j.mode, j.graph) for j in jobs if j.group == "tasks"}
    both = (False, True)
    assert tasks == {
        (CASES[name], precision, mode, graph)
        for name in TASK_SHAPES
        for precision in PRECISIONS
        for mode in ("infer", "train")
        for graph in both
    }
    wide = [j for j in jobs if j.group == "wide"]
    assert {(j.case.H, j.case.B) for j in wide} == {
        (H, B) for H in (256, 512, 1024) for B in (1, 16, 64, 256)
    }
    assert all(j.case.I == j.case.H and j.case.T == 256 for j in wide)
    packed = [j.case for j in jobs if j.group == "packed"]
    assert {int(case.lengths.max()) for case in packed} == {500, 4000}
    assert {j.case.H for j in jobs if j.group == "float32"} == {64, 128, 256, 512}


@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=str)
def test_every_precision_has_the_yardsticks_of_the_cpu(
    precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is worse than PyTorch is held against PyTorch step by step, and the reference."""
    monkeypatch.setattr(judges, "DEVICE", "cpu")
    case = cases.Case(T=3, B=2, I=3, H=5)
    with fastlstm.backend("reference"):
        judges.check(case, precision)
        asked = []
        monkeypatch.setattr(oracle, "complaints", lambda *_: ["too far off"])
        monkeypatch.setattr(oracle, "with_products", lambda *args: asked.append(args) or args[-2])
        with pytest.raises(AssertionError, match="too far off"):
            judges.check(case, precision)
    assert len(asked) == 1


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("mode", ["infer", "train"])
@pytest.mark.parametrize("case", [TINY, PACKED], ids=["tiny", "packed"])
def test_rows(case: Case, mode: str, precision: str) -> None:
    ours, theirs = measure(job(case, precision, mode))
    assert (ours["provider"], ours["backend"]) == ("fastlstm", "reference")
    assert (theirs["provider"], theirs["version"]) == ("torch", version("torch"))
    for row in (ours, theirs):
        assert 0 < row["p20_us"] <= row["p50_us"] <= row["p80_us"]
        assert row["us_per_step"] == row["p50_us"] / case.T
        assert row["times_floor"] == row["p50_us"] / row["floor_us"]
        assert row["precision"] == precision and row["graph"] is False
        assert case.name in rows_of.line(row)
    assert ours["ratio"] == 1
    assert theirs["ratio"] > 0


def test_what_one_provider_cannot_do_is_a_row_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(self: object, *args: object, **kwargs: object) -> None:
        raise RuntimeError("too wide\nfor this machine")

    monkeypatch.setattr("fastlstm.LSTM.forward", refuse)
    ours, theirs = measure(job())
    assert ours["error"] == "RuntimeError: too wide\nfor this machine"
    assert theirs["p50_us"] > 0 and theirs["ratio"] is None
    assert rows_of.line(ours).endswith("RuntimeError: too wide")


def test_wrong_results_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = torch.nn.functional.linear

    def wrong(*args: torch.Tensor) -> torch.Tensor:
        return right(*args) * 1.01

    monkeypatch.setattr("fastlstm.reference.linear", wrong)
    ours, theirs = measure(job())
    assert ours["error"].startswith("Mismatch: tiny, infer: y from fastlstm is off float64 by")
    assert "error" not in theirs


def test_precision_sets_and_restores_tf32() -> None:
    def flags() -> tuple[bool, bool]:
        return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32

    before = flags()
    for name, precision in PRECISIONS.items():
        with precision.applied():
            assert flags() == {"tf32": (True, True), "exact": (False, False)}.get(name, before)
        assert flags() == before
    assert PRECISIONS["tf32"].eps == 2**-10
    assert PRECISIONS["exact"].eps == 2**-23


def test_floor_is_the_largest_of_three() -> None:
    case, exact = Case("", I=4, H=8, L=1, D=1, B=2, T=16), PRECISIONS["exact"]
    weights = 4 * 8 * (4 + 8)
    slow = {"flops": {"exact": 1e6}}

    def least(mode: str, **machine: Any) -> float:
        instant = {"flops": {"exact": 1e30}, "bandwidth": {1: 1e30}, "launch": 0.0}
        return floor.floor(case, exact, mode, floor.Machine(**instant | machine)) / 1e6

    assert least("infer", flops=slow["flops"]) == pytest.approx(2 * 32 * weights / 1e6)
    backward = weights + 4 * 8 * 8  # of W and of h, but not of x
    assert least("train", flops=slow["flops"]) == pytest.approx(
        2 * 32 * (weights + backward) / 1e6
    )
    values = 32 * 4 + 32 * 8 + 2 * 2 * 8 + weights + 2 * 4 * 8
    caches = {1: 1e30, 2**20: 1e6, 2**30: 1.0}
    assert least("infer", bandwidth=caches) == pytest.approx(4 * values / 1e6)
    assert least("infer", launch=1.0) == pytest.approx(1.0)


def test_machine_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(floor.MATRIX, "cpu", 32)
    monkeypatch.setitem(floor.COPIES, "cpu", (2**10, 2**16))
    machine = floor.measure("cpu", seconds=0.01)
    assert machine.flops.keys() == PRECISIONS.keys()
    assert machine.bandwidth.keys() == {2**10, 2**16}
    rates = (*machine.flops.values(), *machine.bandwidth.values(), machine.launch)
    assert all(value > 0 for value in rates)
    assert machine.rate(2**10 + 1) == machine.rate(2**20) == machine.bandwidth[2**16]


def test_timings_are_what_the_timer_says() -> None:
    made = []

    def timer(times: int) -> float:
        made.extend([1] * times)
        return times * 0.5

    timings = take_turns({"a": timer}, seconds=4, repeat=5)
    assert timings["a"].figures == {
        "p20_us": 5e5,
        "p50_us": 5e5,
        "p80_us": 5e5,
        "blocks": 5,
        "calls_per_block": 2,
    }
    assert len(made) == 1 + 1 + 5 * (1 + 2)  # lazy set-up, warm-up; before and in every block


def test_a_fault_costs_one_job() -> None:
    with Worker(partial(int, "0")) as worker:
        first = worker.run(os.getpid, timeout=60)
        with pytest.raises(Failed, match="ValueError: invalid literal"):
            worker.run(int, "x", timeout=60)
        assert worker.run(os.getpid, timeout=60) == first
        with pytest.raises(Failed, match="exit status 7"):
            worker.run(os._exit, 7, timeout=60)
        with pytest.raises(Failed, match="no answer within 0 s"):
            worker.run(time.sleep, 60, timeout=0.1)
        assert worker.run(os.getpid, timeout=60) != first


def test_a_process_past_use_is_replaced() -> None:
    with Worker(partial(int, "the GPU is lost")) as worker:
        first = worker.run(os.getpid, timeout=60)
        with pytest.raises(Failed, match="ValueError"):
            worker.run(int, "x", timeout=60)
        assert worker.run(os.getpid, timeout=60) != first


def test_measures_in_another_process() -> None:
    with Worker(partial(rows_of.synchronize, "cpu")) as worker:
        arguments = (job(), MACHINE, "cpu", timings.PROVIDERS, 0.001, 2)
        rows = worker.run(rows_of.measure, *arguments, timeout=60)
    assert [row["provider"] for row in rows] == ["fastlstm", "torch"]
    assert not any("error" in row for row in rows)


class Inline:
    """Stands in for Worker: in this process."""

    def __init__(self, probe: object) -> None: ...

    def __enter__(self) -> "Inline":
        return self

    def __exit__(self, *_: object) -> None: ...

    def run(self, function: Callable[..., Any], *args: Any, timeout: float) -> Any:
        return function(*args)


class Told:
    """Stands in for Tests: what their outcome is."""

    outcome = ""

    def __init__(self, *_: object) -> None: ...

    def run(self, timeout: float) -> str:
        assert 0 < timeout <= 480
        return self.outcome

    def status(self, precision: str | None = None) -> str:
        return self.outcome


@pytest.mark.slow
@pytest.mark.parametrize("outcome", ["passed", "failed", "unfinished", "skipped"])
def test_the_command(
    outcome: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """From start to end, on the CPU, with two jobs; then a call that finds all of it done."""
    jobs = [job(mode=mode) for mode in ("infer", "train")]
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(timings, "SECONDS", 0.01)
    monkeypatch.setattr(timings, "Worker", Inline)
    monkeypatch.setattr(gpu, "plan_of_gpu", lambda: jobs)
    monkeypatch.setattr(Told, "outcome", outcome)
    monkeypatch.setattr(gpu, "Tests", Told)
    monkeypatch.setattr(gpu, "run_recorder", lambda folder, log: True)
    monkeypatch.setattr(floor, "measure", lambda device: MACHINE)
    options = ["--out", str(tmp_path), "--quick", "--commit", "abc", "--backend", "reference"]
    options += ["--timings"] * (outcome == "skipped")
    status = command.main(["gpu", *options])
    assert status == (outcome in ("failed", "unfinished"))
    results = load(tmp_path / "gpu-reference-speed.json")
    assert results.environment["commit"] == "abc"
    assert results.environment["machine"]["launch"] == MACHINE.launch
    assert {"torch", "triton", "date", "source"} <= results.environment.keys()
    assert len(results.rows) == 4
    for row in results.rows:
        assert row["tests"] == outcome
        assert {"p50_us", "floor_us"} <= row.keys()
    printed = capsys.readouterr().out
    assert "tasks, eager, forward, exact" in printed
    assert ("Not to be published" in printed) == (outcome != "passed")
    monkeypatch.setattr(Told, "outcome", "passed")  # by now
    assert command.main(["gpu", *options, "--timings"]) == 0
    again = load(tmp_path / "gpu-reference-speed.json").rows
    assert again == [row | {"tests": "passed"} for row in results.rows]
    monkeypatch.setattr(gpu, "digest", lambda root: "another source")
    assert command.main(["gpu", *options, "--timings"]) == 0
    assert load(tmp_path / "gpu-reference-speed.json").environment["source"] == "another source"
    assert (tmp_path / "gpu-reference-speed.json.old").exists()


@pytest.mark.parametrize("phase", ["--tests", "--timings"])
def test_a_phase_comes_alone(phase: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(gpu, "test", lambda *_: seen.append("--tests") or True)
    monkeypatch.setattr(gpu, "time", lambda *_: seen.append("--timings") or True)
    assert command.main(["gpu", "--out", str(tmp_path), phase]) == 0
    assert seen == [phase]


def test_the_recorder_is_a_command_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    assert gpu.run_recorder(tmp_path / "data", tmp_path / "log")
    assert len(list((tmp_path / "data").glob("cudnn-*.npz"))) == len(PRECISIONS)
    assert "cudnn-bf16.npz: " in capsys.readouterr().out
