"""`python -m benchmarks speed`: its rows, its turns, and that it refuses to time wrong results."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastlstm
from benchmarks import __main__ as command
from benchmarks import contenders, memory
from benchmarks.cases import CASES, Case, parse
from benchmarks.timing import Timing, take_turns

TINY = ("--case", "3,5,2,1,2,4")
QUICKLY = ("--repeat", "2", "--seconds", "0.01")


def speed(tmp_path: Path, *options: str) -> list[dict[str, Any]]:
    """The rows that the command writes."""
    target = tmp_path / "rows.json"
    assert command.main(["speed", *options, *QUICKLY, "--json", str(target)]) == 0
    return json.loads(target.read_text())


def test_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = speed(tmp_path, *TINY, "--modes", "infer", "train", "step")
    modes = {
        mode: {r["provider"]: r for r in rows if r["mode"] == mode} for mode in contenders.MODES
    }
    assert set(modes["infer"]) == set(modes["step"]) == {"fastlstm", "torch", "onnxruntime"}
    assert set(modes["train"]) == {"fastlstm", "torch"}
    for row in rows:
        assert 0 < row["p20_us"] <= row["p50_us"] <= row["p80_us"]
        assert row["blocks"] == 2
        assert row["shape"] == "3,5,2,1,2,4"
        assert row["cpu"] and row["threads"] == torch.get_num_threads()
        assert row["torch"] == torch.__version__
        assert {"python", "numpy", "triton", "fastlstm", "isa", "commit", "date"} <= row.keys()
        assert row["ratio"] > 0
        assert row["ratio"] == 1 or row["provider"] != "fastlstm"
    printed = capsys.readouterr().out
    assert "without onnxruntime (forward only)" in printed
    assert "infer: " in printed and "geometric mean, n=1" in printed


@pytest.mark.parametrize("shape", ["5,7,1,2,4,6", "5,7,3,2,4,6", "5,7,3,1,4,6"])
def test_onnx_peer_agrees(shape: str) -> None:
    peers = ["torch", "onnxruntime"]
    assert list(contenders.build(peers, parse(shape), "infer", torch.float32)) == peers


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_other_dtypes(tmp_path: Path, dtype: str) -> None:
    rows = speed(tmp_path, *TINY, "--dtype", dtype, "--input-gradient")
    assert {(r["mode"], r["provider"], r["dtype"]) for r in rows} == {
        (mode, provider, dtype)
        for mode in ("infer", "train")
        for provider in ("fastlstm", "torch")
    }


def test_packed_case_is_compared_with_the_dense_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = speed(tmp_path, "--cases", "mnist-blstm-packed", "--modes", "infer")
    assert {row["provider"] for row in rows} == {"fastlstm", "torch", "fastlstm, dense"}
    case = CASES["mnist-blstm-packed"]
    assert {row["real_steps"] for row in rows} == {int(case.lengths.sum())}
    assert case.lengths.min() == 1 and case.lengths.max() == case.T
    assert "as fast as one of the dense batch" in capsys.readouterr().out


def test_one_mode_has_no_place_for_a_case(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["speed", "--case", "3,5,1,2,2,4", "--modes", "step", *QUICKLY]) == 0
    assert "a stream has one direction" in capsys.readouterr().out


def test_memory(tmp_path: Path) -> None:
    rows = speed(tmp_path, *TINY, "--memory")
    assert [row["provider"] for row in rows] == ["fastlstm", "torch"]
    assert all(row["bytes"] > 0 and row["values_of_H"] > 0 for row in rows)


def test_memory_counts_storages_once_and_neither_parameters_nor_input() -> None:
    class Product(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            product = x * self.weight  # keeps x and weight, which are not counted
            return product * product.view(2, 2).flatten()  # keeps one storage of 16 bytes twice

    assert memory.kept_bytes(Product(), torch.ones(4)) == 16


class Wrong(fastlstm.LSTM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        y, state = super().forward(*args, **kwargs)
        return y + 1e-4, state


@pytest.mark.parametrize("mode", contenders.MODES)
def test_wrong_results_are_not_timed(
    mode: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fastlstm, "LSTM", Wrong)
    assert command.main(["speed", *TINY, "--modes", mode]) == 1
    assert f"{mode}: y from fastlstm is off float64 by 0.0001" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["1,2,3", "28,64,1,3,8,5", "28,64,1,1,8,0", "a,b,c,d,e,f", ""])
def test_case_that_makes_no_sense(text: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        parse(text)


def test_case() -> None:
    assert parse("28,64,1,2,8,5") == Case("28,64,1,2,8,5", I=28, H=64, L=1, D=2, B=8, T=5)


def test_contenders_take_turns() -> None:
    turns: list[str] = []
    calls = {name: (lambda name=name: turns.append(name)) for name in "ab"}
    timings = take_turns(calls, seconds=0.001, repeat=4)
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
    assert timing.scaled(2).percentiles == (4.0, 7.0, 10.0)
