"""`python -m benchmarks speed`: its rows, its turns, and that it refuses to time wrong results."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastlstm
from benchmarks import BenchmarkError
from benchmarks import __main__ as command
from benchmarks.providers import PROVIDERS, Provider, provider, pytorch
from benchmarks.speed import floor, memory, results
from benchmarks.speed.cases import ALL, CASES, GROUPS, Case, parse
from benchmarks.speed.check import Judge
from benchmarks.speed.contender import Contender, on_host
from benchmarks.speed.timing import Timing, take_turns
from benchmarks.speed.update import Update
from benchmarks.speed.workload import MODES, Workload, make_workload

Row = dict[str, Any]
TINY = ("--case", "3,5,2,1,2,4")
ROOT = Path(__file__).parent.parent
QUICKLY = ("--repeat", "2", "--seconds", "0.01")
THREE = ("--providers", "fastlstm", "torch", "onnxruntime")


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for the rates of the machine."""
    rates = floor.Machine({"exact": 1e12, "bf16": 1e12, "fp64": 1e12}, {1: 1e12}, launch=1e-6)
    monkeypatch.setattr(floor, "measure", lambda *_: rates)


def run(*options: str) -> int:
    return command.main(["speed", *QUICKLY, *options])


def speed(tmp_path: Path, *options: str) -> list[Row]:
    """The rows that the command writes."""
    target = tmp_path / "rows.json"
    assert run(*options, "--json", str(target)) == 0
    return results.load(target).rows


def test_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = speed(tmp_path, *TINY, *THREE, "--modes", *MODES)
    modes = {mode: {r["provider"]: r for r in rows if r["mode"] == mode} for mode in MODES}
    assert modes["train"]["onnxruntime"]["skipped"] == "forward only"
    for mode, found in modes.items():
        assert set(found) == {"fastlstm", "torch", "onnxruntime"}
        for row in found.values():
            assert row["shape"] == "3,5,2,1,2,4"
            assert row["threads"] == torch.get_num_threads()
            assert row["version"]
            if "skipped" in row:
                continue
            assert 0 < row["p20_us"] <= row["p50_us"] <= row["p80_us"]
            assert row["blocks"] == 2
            assert row["ratio"] > 0
            assert row["ratio"] == 1 or row["provider"] != "fastlstm"
            assert 0 < row["max_error"] < 1e-5
            assert row["first_call_s"] > 0
            assert row["times_floor"] > 0
            assert ("kept_bytes" in row) == (mode == "train")
    environment = results.load(tmp_path / "rows.json").environment
    assert {"cpu", "isa", "python", "torch", "numpy", "commit", "date"} <= environment.keys()
    printed = capsys.readouterr().out
    assert "infer: " in printed and "geometric mean, n=1" in printed


@pytest.mark.slow
def test_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one = (*TINY, "--providers", "fastlstm", "--modes", "infer")
    first = speed(tmp_path, *one)
    assert speed(tmp_path, *one) == first
    both = speed(tmp_path, *TINY, "--providers", "fastlstm", "torch", "--modes", "infer")
    assert [row["provider"] for row in both] == ["fastlstm", "torch"]  # paired again
    assert both[0] != first[0]
    assert speed(tmp_path, *one) == both
    others = ("--providers", "fastlstm-reference", "--modes", "infer")
    three = speed(tmp_path, *TINY, *others)  # none of the others is lost
    assert {row["provider"] for row in three} == {"fastlstm", "torch", "fastlstm-reference"}
    train = (*TINY, "--providers", "fastlstm", "--modes", "train")
    assert len(speed(tmp_path, *train)) + 1 == len(speed(tmp_path, *train, "--input-gradient"))
    target = tmp_path / "rows.json"
    written = json.loads(target.read_text())
    written["environment"]["commit"] = "another"
    target.write_text(json.dumps(written))
    assert run(*one, "--json", str(target)) == 1
    assert "rows of commit another, and this is" in capsys.readouterr().err
    assert len(speed(tmp_path, *one, "--fresh")) == 1


def test_budget_leaves_the_rest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert speed(tmp_path, *TINY, "--providers", "torch", "--budget", "1e-9") == []
    assert "left out, for want of time: 3,5,2,1,2,4 infer, 3,5,2,1,2,4 train" in (
        capsys.readouterr().out
    )


def test_what_is_too_long_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert speed(tmp_path, *TINY, "--providers", "torch", "--longest", "1e-9") == []
    assert "longer than --longest: 3,5,2,1,2,4 infer" in capsys.readouterr().out


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"environment": {}}', "\0", '{"environment": {}, "rows": [1, 2]}'],
)
def test_file_that_is_none_of_ours(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "rows.json"
    target.write_text(content)
    assert run(*TINY, "--json", str(target)) == 1
    assert "is not a file of results" in capsys.readouterr().err
    assert target.read_text() == content


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--repeat", "1"), "--repeat: 1: expected 2 or more"),
        (("--seconds", "0"), "--seconds: 0: expected a number above 0"),
        (("--budget", "-1"), "--budget: -1: expected a number above 0"),
        (("--longest", "nan"), "--longest: nan: expected a number above 0"),
        (("--case", "1,2"), "expected six positive integers"),
    ],
)
def test_options_that_make_no_sense(
    options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(*options)
    assert message in capsys.readouterr().err


def test_a_file_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert run(*TINY, "--json", str(tmp_path / "file/rows.json")) == 1
    error = capsys.readouterr().err
    assert "rows.json" in error and "cannot be" in error


def test_an_interruption_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("benchmarks.speed.command.measure", interrupt)
    assert run(*TINY) == 130
    assert capsys.readouterr().err.endswith("interrupted\n")


def test_a_busy_machine_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (1000.0, 0.0, 0.0), raising=False)
    assert run(*TINY, "--providers", "torch", "--modes", "infer") == 0
    assert "the machine is busy (load 1000.0)" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["mnist-blstm-packed", "rl-resets"])
def test_a_step_of_any_case(name: str, tmp_path: Path) -> None:
    rows = speed(tmp_path, "--cases", name, "--modes", "step", "--providers", "fastlstm", "torch")
    assert all(("p50_us" in row) == (name == "rl-resets") for row in rows)


@pytest.mark.parametrize("shape", ["5,7,1,2,4,6", "5,7,3,2,4,6", "5,7,3,1,4,6"])
@pytest.mark.parametrize("packed", [False, True])
def test_onnx_runtime_agrees(shape: str, packed: bool) -> None:
    case = parse(shape)
    work = make_workload(
        Case("", case.I, case.H, case.L, case.D, case.B, case.T, packed), "infer", F32
    )
    contender = provider("onnxruntime").contender(work)
    assert Judge(work).error("onnxruntime", contender, ours=True) < 1e-5


F32 = torch.float32
WAYS = [
    Case("dense", 3, 5, 2, 2, 2, 4),
    Case("packed", 3, 5, 2, 2, 3, 4, packed=True),
    Case("reset", 3, 5, 2, 1, 2, 40, reset=True),
    Case("step", 3, 5, 2, 1, 2, 1),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", WAYS, ids=lambda case: case.name)
@pytest.mark.parametrize("name", ["fastlstm-reference", "fastlstm-cpu", "cell-compiled"])
def test_ways_to_compute_the_same(name: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    for mode in ("step",) if case.T == 1 else ("infer", "train"):
        work = make_workload(case, mode, F32, input_gradient=True)
        who = provider(name)
        if who.missing() or who.refuses(work):
            continue
        with torch.inference_mode(mode != "train"):
            contender = who.contender(work)
            assert Judge(work).error(name, contender, ours=True) < 1e-5
            first = contender.results()
            contender.call()
            again = contender.results()
        assert all(torch.equal(first[what], again[what]) for what in first), "no memory of calls"


@pytest.mark.parametrize("name", ["fastlstm", "fastlstm-reference", "torch"])
def test_a_call_of_training_changes_all_weights(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an optimizer does: who keeps a copy of them has to make it anew in every call."""
    made: list[Update] = []

    class Seen(Update):
        def __init__(self, weights: Any) -> None:
            super().__init__(weights)
            made.append(self)

    monkeypatch.setattr(pytorch, "Update", Seen)
    contender = provider(name).contender(make_workload(WAYS[0], "train", F32))
    contender.call()
    (update,) = made
    assert len(update.weights) == 16
    assert all((w != first).any() for w, first in zip(update.weights, update.first, strict=True))


def test_resets_restart_and_lengths_end() -> None:
    """What the truth of the check is: nn.LSTM itself, called as its users have to call it."""
    work = make_workload(WAYS[2], "infer", F32)
    assert work.reset is not None and work.reset.any() and not work.reset.all()
    y = provider("torch").contender(work).results()["y"]
    whole, _ = work.lstm(work.x)
    first = int(work.reset.any(1).nonzero()[0])
    assert torch.allclose(y[:first], whole[:first]) and not torch.allclose(
        y[first:], whole[first:]
    )
    packed = make_workload(WAYS[1], "infer", F32)
    assert packed.lengths is not None
    y = provider("torch").contender(packed).results()["y"]
    for row, length in enumerate(packed.lengths.tolist()):
        assert y[:length, row].all() and not y[length:, row].any()


def test_every_provider_says_whether_it_is_there() -> None:
    for name in PROVIDERS:
        who = provider(name)
        assert who.name == name and who.label
        if who.missing() is None:
            assert who.version()


def test_cases() -> None:
    assert len({(case.group, case.name) for case in ALL}) == len(ALL)
    assert {"tasks", "users", "deepbench", "flashrnn", "map"} < set(GROUPS)
    assert all(case.who for case in CASES.values())


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp64", "bf16"])
def test_other_precisions(tmp_path: Path, precision: str) -> None:
    options = ("--precision", precision, "--input-gradient", "--providers", "fastlstm", "torch")
    rows = speed(tmp_path, *TINY, *options)
    assert {(r["mode"], r["provider"], r["precision"]) for r in rows} == {
        (mode, name, precision) for mode in ("infer", "train") for name in ("fastlstm", "torch")
    }
    assert all("error" not in row for row in rows)


def test_threads_are_set_and_given_back(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    rows = speed(
        tmp_path, *TINY, "--providers", "torch", "--modes", "infer", "--threads", "1", "2"
    )
    assert [row["threads"] for row in rows] == [1, 2]
    assert torch.get_num_threads() == before


def test_a_step_has_one_direction(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    rows = speed(tmp_path, "--case", "3,5,1,2,2,1", "--providers", "fastlstm", "torch")
    assert rows[0]["skipped"] == "a stream has one direction and no lengths"


def test_memory_counts_storages_once_and_neither_parameters_nor_input() -> None:
    class Product(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            product = x * self.weight  # keeps x and weight, which are not counted
            return product * product.view(2, 2).flatten()  # keeps one storage of 16 bytes twice

    module, x = Product(), torch.ones(4)
    assert memory.kept_bytes(lambda: module(x), [x, module.weight]) == 16


def test_peak_of_memory() -> None:
    size = 64 * 2**20
    found = memory.peak(lambda: torch.ones(size, dtype=torch.uint8))
    assert found is None or 0.9 * size < found < 1.5 * size  # it counts pages


class Wrong(fastlstm.LSTM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        y, state = super().forward(*args, **kwargs)
        return y + 1e-4, state


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_wrong_results_are_not_timed(
    mode: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fastlstm, "LSTM", Wrong)
    assert run(*TINY, "--modes", mode, "--providers", "fastlstm", "torch") == 1
    assert f"{mode}: y from fastlstm is off float64 by 0.0001" in capsys.readouterr().out


def test_a_peer_may_be_less_exact_but_not_wrong() -> None:
    work = make_workload(WAYS[0], "infer", F32)
    right = provider("torch").contender(work)

    def off(by: float) -> Contender:
        return Contender(right.call, lambda: {k: v + by for k, v in right.results().items()})

    assert Judge(work).error("peer", off(1e-5), ours=False) > 1e-6
    with pytest.raises(BenchmarkError, match="half of the digits"):
        Judge(work).error("peer", off(1e-2), ours=False)
    with pytest.raises(BenchmarkError, match="twice the error"):
        Judge(work).error("ours", off(1e-5), ours=True)
    with pytest.raises(BenchmarkError, match="nan"):
        Judge(work).error("peer", off(float("nan")), ours=False)


@pytest.mark.slow
def test_entries_of_pytest_benchmark() -> None:
    """`pytest benchmarks`, of one case, without timing it."""
    quick = ["--benchmark-disable", "-p", "no:cacheprovider", "-q", "-k", "hello-infer or step"]
    command = [sys.executable, "-m", "pytest", "benchmarks", *quick]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout and "failed" not in done.stdout


@pytest.mark.slow
def test_a_process_of_its_own() -> None:
    """A remote provider's calls, results and memory come from there, and its failure is told."""
    from benchmarks.providers.remote import Remote
    from benchmarks.speed.worker import Failed

    work = make_workload(WAYS[1], "train", F32, input_gradient=True)
    with Remote("torch") as remote:
        contender = remote.contender(work)
        assert Judge(work).error("torch", contender, ours=True) < 1e-5
        assert 0 < contender.seconds(3) < 10
    with Remote("no such provider") as remote, pytest.raises(Failed, match="KeyError"):
        remote.contender(work)


class Broken(Provider):
    name = label = "torch"
    packages = ("torch",)

    def refuses(self, work: Workload) -> str | None:
        return None

    def contender(self, work: Workload) -> Contender:
        raise RuntimeError("out of order")


def test_a_peer_that_fails_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "benchmarks.speed.measure.provider",
        lambda name: Broken() if name == "torch" else provider(name),
    )
    rows = speed(tmp_path, *TINY, "--modes", "infer", "--providers", "fastlstm", "torch")
    assert rows[0]["p50_us"] > 0
    assert rows[1]["error"] == "RuntimeError: out of order"
    assert "out of order" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["1,2,3", "28,64,1,3,8,5", "28,64,1,1,8,0", "a,b,c,d,e,f", ""])
def test_case_that_makes_no_sense(text: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        parse(text)


def test_case() -> None:
    assert parse("28,64,1,2,8,5") == Case("28,64,1,2,8,5", I=28, H=64, L=1, D=2, B=8, T=5)


def test_contenders_take_turns() -> None:
    turns: list[str] = []
    timers = {name: partial(on_host, partial(turns.append, name)) for name in "ab"}
    timings = take_turns(timers, seconds=0.001, repeat=4)
    assert all(len(timing.blocks) == 4 for timing in timings.values())
    counts = {name: timing.calls + 1 for name, timing in timings.items()}  # one to warm up
    expected = [
        name for pair in ("ab", "ba", "ab", "ba") for name in pair for _ in range(counts[name])
    ]
    assert turns[-len(expected) :] == expected


def test_statistics() -> None:
    timing = Timing((5.0, 1.0, 3.0, 2.0, 4.0, 6.0), calls=1)
    assert timing.percentiles == (2.0, 3.5, 5.0)
    assert timing.ratio(Timing((5.0, 2.0, 6.0, 4.0, 8.0, 12.0), calls=7)) == 0.5
