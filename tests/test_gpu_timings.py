"""The timings of `python -m benchmarks gpu`: who gets which time, and what the targets say."""

import gc
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from weakref import ref

import pytest
import torch
from test_gpu_command import MACHINE, Inline, job
from torch import nn

from benchmarks.gpu import map as sample
from benchmarks.gpu import targets, timings
from benchmarks.gpu.plan import GROUPS, plan_of_gpu
from benchmarks.speed import floor, gpu_timing
from benchmarks.speed import measure as rows_of
from benchmarks.speed.cases import CASES, TASK_SHAPES, Case
from benchmarks.speed.contender import Contender
from benchmarks.speed.job import Job
from benchmarks.speed.results import NEEDED, Results, load
from benchmarks.speed.worker import Failed
from fastlstm.kernels.base import get


def result(of: Job, ratio: float | None, us_per_step: float = 1.0) -> list[rows_of.Row]:
    own = {
        **rows_of.describe_job(of, "fastlstm", "cuda", "triton"),
        "ratio": 1.0,
        "us_per_step": us_per_step,
    }
    return [
        own,
        {**rows_of.describe_job(of, "torch", "cuda"), "ratio": ratio, "us_per_step": 9.0},
    ]


def test_a_graph_keeps_the_weights_that_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = SimpleNamespace(replay=lambda: None)
    monkeypatch.setattr(gpu_timing, "capture", lambda work: work() or graph)

    def captured() -> tuple[Contender, Any]:
        lstm, x = nn.LSTM(3, 4), torch.zeros(2, 1, 3)
        own = Contender(partial(lstm, x), lambda: {"y": lstm(x)[0].detach()})
        return gpu_timing.captured(own), ref(lstm.weight_hh_l0)

    found, weight = captured()
    gc.collect()
    found.call()
    assert weight() is not None
    assert found.results().keys() == {"y"}


def test_every_group_has_its_share_of_any_time() -> None:
    jobs = plan_of_gpu()
    dealt = timings.spread(jobs)
    assert sorted(map(str, dealt)) == sorted(map(str, jobs))
    sizes = Counter(job.group for job in jobs)
    for end in range(len(jobs)):
        done = Counter(job.group for job in dealt[:end])
        for group, size in sizes.items():
            assert abs(done[group] - size * end / len(jobs)) <= 1.5, (end, group)
    for group in sizes:  # the most important ones first, as before
        assert [j for j in dealt if j.group == group] == [j for j in jobs if j.group == group]


def test_every_group_is_timed_however_short_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0

    def perform(of: Job, *_: Any, **__: Any) -> list[rows_of.Row]:
        nonlocal now
        now += 1
        return [{**row, "skipped": "for the test"} for row in result(of, 2.0)]

    monkeypatch.setattr(timings, "Worker", Inline)
    monkeypatch.setattr(timings, "measure", perform)
    work = partial(rows_of.work_through, clock=lambda: now)
    monkeypatch.setattr(timings, "work_through", work)
    monkeypatch.setattr(floor, "measure", lambda device: MACHINE)
    results = Results(tmp_path / "rows.json", {"cpu": "one"})
    jobs = plan_of_gpu()
    took = timings.Timings(results, "triton", "cuda", lambda job: job.group, quick=True)
    left = took.run(jobs, deadline=50)
    own = [row for row in results.rows if row["provider"] == "fastlstm"]
    assert len(own) == 50
    assert {row["group"] for row in own} == set(GROUPS)
    assert all(row["tests"] == row["group"] for row in own)
    assert len(left) == len(jobs) - 50
    assert left == timings.pending(left, results, "cuda")
    assert len(timings.pending(jobs, results, "cuda")) == len(left)


def test_budget_ends_the_run_and_names_what_is_left() -> None:
    jobs, now, saved = plan_of_gpu()[:5], 0.0, []

    def perform(one: Job, timeout: float) -> list[rows_of.Row]:
        nonlocal now
        assert timeout == rows_of.LONGEST
        now += 10
        if one is jobs[1]:
            raise Failed("the process died with exit status -11")
        return [failed(one)]

    def failed(one: Job) -> rows_of.Row:
        return rows_of.describe_job(one, "fastlstm", "cuda", "triton")

    left = rows_of.work_through(
        jobs, perform, saved.append, failed=failed, deadline=30, clock=lambda: now
    )
    assert left == jobs[3:]
    assert [rows[0]["case"] for rows in saved] == [one.case.name for one in jobs[:3]]
    assert saved[1][0]["error"] == "the process died with exit status -11"


def test_targets_are_computed_from_the_rows() -> None:
    jobs = [job(CASES[name], "bf16") for name in TASK_SHAPES[:2]]
    rows = result(jobs[0], 4.0, 0.5) + result(jobs[1], 9.0, 0.7)
    lowest, mean, step = (
        targets.Target("tasks", "infer", False, statistic, limit)
        for statistic, limit in (("lowest", 4), ("mean", 6.1), ("step", 0.7))
    )
    lines = list(targets.verdicts(jobs, rows, (lowest, mean, step)))
    assert [line.split()[0] for line in lines] == ["met", "missed", "met"]
    assert "tasks, eager, forward, bf16: geometric mean 6.00x, lowest 4.00x" in lines[0]
    assert "2 of 2 measurements" in lines[0]
    assert "0.7 µs a step at most" in lines[2]


def test_a_target_is_not_met_by_what_was_not_measured() -> None:
    jobs = [job(CASES[name], "bf16") for name in TASK_SHAPES[:2]]
    (target,) = targets.TARGETS[:1]
    (nothing,) = targets.verdicts(jobs, [], [target])
    assert nothing.startswith("not measured") and "0 of 2" in nothing
    (half,) = targets.verdicts(jobs, result(jobs[0], 9.0) + result(jobs[1], None), [target])
    assert half.startswith("not measured") and "only 1 of 2" in half
    (low,) = targets.verdicts(jobs, result(jobs[0], 1.0), [target])
    assert low.startswith("missed")


def test_every_target_has_its_measurements() -> None:
    lines = list(targets.verdicts(plan_of_gpu(), []))
    kinds = {(j.group, j.mode, j.graph) for j in plan_of_gpu()}
    assert kinds == {(target.group, target.mode, target.graph) for target in targets.TARGETS}
    assert len(lines) > len(targets.TARGETS)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_any_part_of_the_map_is_a_sample_of_calls(backend: str) -> None:
    found = sample.points(backend)
    assert found == sample.points(backend)
    every = {(p.precision, p.training, p.graph, p.case.packed) for p in found}
    named = sum(bool(point.case.name) for point in found)
    for part in (found[named:][:300], found[named:][-300:]):
        assert {(p.precision, p.training, p.graph, p.case.packed) for p in part} == every
    assert all(not (point.graph and point.case.packed) for point in found)


def test_a_row_of_the_map(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def on_clock(call: Callable[[], object], times: int) -> float:
        start = time.perf_counter()
        for _ in range(times):
            call()
        return time.perf_counter() - start

    monkeypatch.setattr(sample, "on_gpu", on_clock)
    monkeypatch.setattr(type(get("reference")), "is_ready", lambda *given: True)
    for packed, training in ((False, False), (False, True), (True, True)):
        point = sample.Point(Case("", 3, 5, 2, 2, 4, 6, packed=packed), "exact", training, False)
        found = sample.measure(point, "reference", "cpu")
        assert found.keys() == set(sample.COLUMNS)
        assert found["shape"] == "3,5,2,2,4,6" and found["packed"] is packed
        assert found["ratio"] > 0 and found["us"] > 0 and found["torch_us"] > 0
        assert found["difference"] < 1e-5
    monkeypatch.setattr(type(get("reference")), "is_ready", lambda *given: False)
    assert sample.measure(point, "reference", "cpu")["ratio"] is None
    results = Results(
        tmp_path / "map.json", {"commit": "c"} | dict.fromkeys(NEEDED), sample.COLUMNS
    )
    results.add([found])
    assert load(results.file or tmp_path).rows == results.rows
