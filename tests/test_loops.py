"""`python -m benchmarks loops`, and what modules hold between calls."""

from pathlib import Path

import pytest
import torch

import fastlstm
from benchmarks import BenchmarkError
from benchmarks import __main__ as command
from benchmarks.speed import memory, results


def test_loops(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "rows.json"
    quickly = ("--repeat", "2", "--seconds", "0.01")
    tiny = ("--case", "3,5,1,1,2,4")
    assert command.main(["loops", *quickly, *tiny, "--json", str(target)]) == 0
    rows = results.load(target).rows
    weights = (20 * (3 + 5) + 2 * 20) * 4
    for mode, providers in (
        ("infer", ["fastlstm", "onnxruntime", "torch"]),
        ("train", ["fastlstm", "torch"]),
    ):
        found = {row["provider"]: row for row in rows if row["mode"] == mode}
        assert sorted(found) == sorted(providers)
        assert found["torch"]["rest_bytes"] == weights <= found["fastlstm"]["rest_bytes"]
    assert "nn.LSTMCell" in capsys.readouterr().out
    with pytest.raises(BenchmarkError, match="one layer"):
        arguments = command.parse(["loops", "--case", "3,5,2,1,2,4"])
        arguments.main(arguments)


def test_calls_that_read_stored_weights_keep_no_copy() -> None:
    for rnn in (fastlstm.LSTM(200, 200), torch.nn.LSTM(200, 200)):
        with torch.no_grad():
            rnn(torch.randn(1, 2, 200))
        assert memory.rest_bytes(rnn) == sum(p.nbytes for p in rnn.parameters())
