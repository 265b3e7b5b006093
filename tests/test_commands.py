"""``python -m benchmarks``: what its commands print, write and refuse."""

import json
import re
from pathlib import Path

import pytest
import torch

from benchmarks import BenchmarkError, __main__, extra
from benchmarks.speed import environment
from benchmarks.tasks import binary, data, hello, train

PROVIDERS = tuple(train.PROVIDERS)
SMALL = data.small_digits()


@pytest.fixture
def small_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tasks in seconds: small digits, and numbers of 12 bits."""
    monkeypatch.setattr(data, "load", lambda folder: SMALL)
    monkeypatch.setattr(binary, "BITS", 12)
    monkeypatch.setattr(binary, "NUMBERS", 2**12 - 1)
    monkeypatch.setattr(binary, "TRAINING_ROWS", 2**10)


@pytest.mark.usefixtures("small_data")
def test_the_main_job_leaves_a_table_a_picture_and_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(__main__, "LSTM_SAMPLES", 2560)
    monkeypatch.setattr(__main__, "BLSTM_SAMPLES", 2560)
    assert __main__.main(["--out", str(tmp_path / "runs")]) == 0
    out = capsys.readouterr().out
    records = json.loads((tmp_path / "runs" / "results.json").read_text())
    assert [(r["task"], r["provider"]) for r in records] == [
        (task, provider)
        for task in ("binary", "mnist lstm", "mnist blstm (last)")
        for provider in PROVIDERS
    ]
    for record in records:
        assert record["steps"] > 0
        assert record["environment"]["threads"] == torch.get_num_threads()
        assert record["environment"].keys() == environment.environment().keys()
        assert f"{record['loss']:.5f}" in out
    assert (tmp_path / "runs" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path / "runs" / "curves.png") in out


@pytest.mark.usefixtures("small_data")
def test_mnist_with_both_heads_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "records.json"
    argv = ["mnist", "--model", "blstm", "--head", "both", "--samples", "600", "--batch", "50"]
    assert __main__.main([*argv, "--hidden", "8", "--provider", "torch", "--json", str(path)]) == 0
    records = json.loads(path.read_text())
    assert [r["task"] for r in records] == ["mnist blstm (last)", "mnist blstm (final)"]
    assert [p["step"] for p in records[0]["curve"]] == [10, 12]
    assert records[0]["settings"]["hidden"] == 8
    assert capsys.readouterr().out.count("step     10") == 2


@pytest.mark.usefixtures("small_data")
def test_binary_from_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main(["binary", "--epochs", "1", "--failures", "1"]) == 0
    out = capsys.readouterr().out
    assert "expected" in out
    assert "786,372" in out


@pytest.mark.parametrize("command", [[], *([name] for name in __main__.COMMANDS)])
def test_help_says_what_every_option_does(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as done:
        __main__.main([*command, "--help"])
    assert done.value.code == 0
    assert "usage: python -m benchmarks" in capsys.readouterr().out


@pytest.mark.usefixtures("small_data")
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["mnist", "--head", "final"], "--head final is for --model blstm"),
        (["mnist", "--batch", "5000"], "1 to 1,500 rows"),
        (["mnist", "--samples", "9"], "cover one batch of 128"),
        (["binary", "--epochs", "0"], "cover one batch of 512"),
        (["mnist", "--device", "toaster"], "--device toaster cannot be used"),
        (["hello", "--threads", "0"], "--threads must be 1 or more, not 0"),
        (["hello", "--steps", "1", "--provider", "torch"], 'torch says ".*" after 1 steps'),
    ],
)
def test_a_wrong_request_is_one_line_and_status_1(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert __main__.main(argv) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert re.search(message, error)


def test_a_data_folder_without_the_files_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert __main__.main(["mnist", "--data", str(tmp_path)]) == 1
    assert "train-images-idx3-ubyte.gz is missing" in capsys.readouterr().err


def test_a_missing_package_is_named_with_the_extra() -> None:
    with pytest.raises(BenchmarkError, match=r"no_such_package is missing.*\[bench\]"):
        extra("no_such_package")


def test_hello_prints_every_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main(["hello", "--provider", "fastlstm"]) == 0
    out = capsys.readouterr().out
    assert all(recipe.__doc__ in out for recipe in hello.RECIPES)
    for loss in ("0.596759", "0.513015", "0.371101", "1.31326", "0.646595"):
        assert f": {loss}\n" in out
