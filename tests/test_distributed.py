"""``torchrun -m benchmarks mnist --distributed``: processes that share every batch.

Two processes run the command itself on the digits of scikit-learn, once for most of the tests.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, distributed, nn

from benchmarks import BenchmarkError, __main__
from benchmarks.tasks import data, mnist, train
from benchmarks.tasks import distributed as ours
from benchmarks.tasks.distributed import Processes

PROVIDERS = tuple(train.PROVIDERS)
SMALL = data.small_digits()
ROOT = Path(__file__).parents[1]
WORLD, BATCH, EPOCHS = 2, 100, 4

needs_processes = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()),
    reason="this torch has no torch.distributed with gloo",
)


def torchrun(cache: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """The command in two processes that find neither MNIST nor a network."""
    removed = ("FASTLSTM_DATA", "OMP_NUM_THREADS", *ours.VARIABLES)
    environment = {name: value for name, value in os.environ.items() if name not in removed}
    environment |= {"FASTLSTM_CACHE": str(cache), "https_proxy": "localhost:9", "no_proxy": ""}
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(WORLD), "-m", "benchmarks", "mnist", "--distributed"),
            *options,
        ],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


class Run(NamedTuple):
    """What the command has printed, and the records in its JSON file."""

    out: str
    records: list[dict[str, Any]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("run")
    path = folder / "records.json"
    done = torchrun(folder, "--batch", str(BATCH), "--epochs", str(EPOCHS), "--json", str(path))
    assert done.returncode == 0, done.stderr
    return Run(done.stdout, json.loads(path.read_text()))


class Double(mnist.Mnist):
    """The task in float64, from the same weights."""

    def build(self, lstm: type[nn.Module]) -> nn.Module:
        return super().build(lstm).double()


def in_one_process(task: type[mnist.Mnist], digits: data.Digits) -> list[dict[str, Any]]:
    """The records of the same training, as they would be in JSON."""
    protocol = replace(mnist.PROTOCOLS["lstm"], batch=BATCH, epochs=EPOCHS)
    trainees = train.train(task(digits, "lstm", protocol), PROVIDERS, quiet=True)
    return [asdict(trainee.record()) for trainee in trainees]


def losses(records: Sequence[dict[str, Any]]) -> Tensor:
    """Training and test losses, float64 ``[providers, points, 2]``."""
    curves = [[(p["loss"], p["test"]["loss"]) for p in r["curve"]] for r in records]
    return torch.tensor(curves, dtype=torch.float64)


@pytest.fixture
def one_thread() -> None:
    """On small layers, a second thread is mostly waited for."""
    torch.set_num_threads(1)


@pytest.mark.slow
@needs_processes
@pytest.mark.usefixtures("one_thread")
def test_processes_learn_what_one_does(run: Run) -> None:
    """As close to float64 as one process: the order of sums is all that differs."""
    double = replace(
        SMALL, train_images=SMALL.train_images.double(), test_images=SMALL.test_images.double()
    )
    one = in_one_process(mnist.Mnist, SMALL)
    exact = losses(in_one_process(Double, double))
    yardstick = (losses(one) - exact).abs().max()
    bound = 2 * yardstick + torch.finfo(torch.float32).eps * exact
    assert ((losses(run.records) - exact).abs() <= bound).all()
    for single, spread in zip(one, run.records, strict=True):
        for name in ("task", "provider", "settings", "exact", "rows", "accuracy", "steps"):
            assert spread[name] == single[name], name
        assert [p["step"] for p in spread["curve"]] == [p["step"] for p in single["curve"]]
        accuracies = [[p["accuracy"] for p in r["curve"]] for r in (single, spread)]
        assert accuracies[1] == pytest.approx(accuracies[0], rel=1e-12)  # sums of counts
        assert (single["processes"], single["efficiency"]) == (1, None)
        assert single["samples_per_second"] == pytest.approx(
            1000 * BATCH / single["step_ms"]["p50"]
        )


@pytest.mark.slow
@needs_processes
def test_the_records_and_the_table_have_the_scaling(run: Run) -> None:
    rows = run.out.splitlines()
    header = next(i for i, row in enumerate(rows) if row.startswith("task "))
    assert rows[header].split()[-3:] == ["processes", "samples/s", "efficiency"]
    for record, row in zip(run.records, rows[header + 2 :], strict=False):
        assert record["processes"] == WORLD
        rate = 1000 * BATCH / WORLD / record["step_ms"]["p50"]
        assert record["samples_per_second"] == pytest.approx(rate)
        assert record["efficiency"] > 0
        assert row.split()[-3:] == [str(WORLD), f"{rate:,.0f}", f"{record['efficiency']:.0%}"]
        assert record["environment"]["threads"] == ours._threads(WORLD)


@pytest.mark.slow
@needs_processes
def test_only_one_process_prints(run: Run) -> None:
    for start, times in (("data: ", 1), ("mnist lstm .* step ", 2 * EPOCHS), ("task ", 1)):
        assert len(re.findall(f"^{start}", run.out, re.MULTILINE)) == times, start


@pytest.mark.slow
@needs_processes
def test_a_batch_that_cannot_be_shared_evenly_is_refused(tmp_path: Path) -> None:
    done = torchrun(tmp_path, "--batch", "31")
    assert done.returncode != 0
    assert "error: 2 processes cannot share a batch of 31 rows evenly" in done.stderr
    assert "Traceback" not in done.stderr.partition("error: ")[0]
    assert "step" not in done.stdout


def test_shares_make_up_the_whole() -> None:
    rows = torch.randperm(14)
    shares = [Processes(rank, 4).share(rows) for rank in range(4)]
    assert torch.equal(torch.cat(shares), rows)
    assert {len(share) for share in shares} == {3, 4}
    with pytest.raises(BenchmarkError, match="4 processes cannot share a batch of 14 rows"):
        Processes(0, 4).check(14)


class OneOfTwo(Processes):
    """One of two processes, without the other one."""

    def replicate(self, model: nn.Module) -> nn.Module:
        return model

    def sum(self, values: Sequence[float]) -> list[float]:
        return [2 * value for value in values]

    def wait(self) -> None: ...


def dropped(rank: int, provider: str) -> Tensor:
    """Where a step of training drops outputs, bool ``[B, features]``."""
    protocol = replace(mnist.PROTOCOLS["blstm"], batch=BATCH, samples=10 * BATCH)
    task = mnist.Mnist(SMALL, "blstm", protocol, processes=OneOfTwo(rank, 2))
    (trainee,) = train.start(task, [provider])
    masks = []
    trainee.model.dropout.register_forward_hook(lambda _, x, y: masks.append(y == 0))
    trainee.run([next(task.batches())])
    return masks[0]


@pytest.mark.usefixtures("one_thread")
def test_processes_draw_their_own_dropout_and_providers_share_it() -> None:
    first, second = (dropped(rank, "fastlstm") for rank in range(2))
    assert first.shape == (BATCH // 2, 128)
    assert first.any()
    assert not torch.equal(first, second)
    assert torch.equal(dropped(1, "torch"), second)


def refusal(argv: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What the command says in this process, which refuses before it joins others."""
    assert __main__.main(["mnist", "--distributed", *argv]) == 1
    return capsys.readouterr().err


def test_without_torchrun_its_command_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ours.VARIABLES:
        monkeypatch.setenv(name, "0")
    monkeypatch.delenv("RANK")
    said = refusal([], capsys)
    assert said.startswith("error: --distributed")
    assert "(RANK not set): torchrun --nproc-per-node 2 -m benchmarks mnist --distributed" in said


@pytest.mark.parametrize(
    ("device", "message"), [("cuda:1", "not cuda:1"), ("cuda", "process 3 of this machine sees 3")]
)
def test_every_process_has_a_gpu_of_its_own(
    device: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ours.VARIABLES:
        monkeypatch.setenv(name, "3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert message in refusal(["--device", device], capsys)
    assert ours._gpu("cuda", 2) == "cuda:2"


@pytest.mark.parametrize(
    ("variable", "processes", "threads"),
    [(None, 2, 4), ("1", 2, 4), ("3", 2, None), (None, 3, 2), (None, 16, 1)],
)
def test_threads_of_a_process(
    variable: str | None, processes: int, threads: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    assert ours._threads(processes) == threads
