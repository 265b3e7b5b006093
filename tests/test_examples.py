"""The examples of benchmarks/examples, at a small size: each shows what it says it shows."""

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import torch

from benchmarks.examples import (
    export_onnx,
    packed_classifier,
    rl_resets,
    sentence_tagger,
    streaming_audio,
)

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted(file.stem for file in (ROOT / "benchmarks/examples").glob("[!_]*.py"))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small gain nothing from more threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_rl_resets() -> None:
    share, difference = rl_resets.main(["--updates", "60"])
    assert share > 0.8, "chance is 0.5"
    assert difference < 1e-5


def test_streaming_audio(capsys: pytest.CaptureFixture[str]) -> None:
    assert streaming_audio.main(["--frames", "50"]) < 1e-5
    assert "torch.nn.LSTM: " in capsys.readouterr().out


def test_sentence_tagger() -> None:
    share, simple = sentence_tagger.main(["--steps", "40", "--batch", "32"])
    assert share > simple + 0.1


def test_packed_classifier(capsys: pytest.CaptureFixture[str]) -> None:
    difference, before, after = packed_classifier.main(["--steps", "40", "--batch", "32"])
    assert difference < 1e-5
    assert after > max(before, 1 / packed_classifier.SYMBOLS + 0.1)
    assert "lstm: nn.LSTM -> fastlstm.LSTM" in capsys.readouterr().out


def test_export_onnx() -> None:
    before, after, nodes, difference = export_onnx.main(["--steps", "30"])
    assert after < before / 2
    assert nodes == 2
    assert difference < 1e-5


@pytest.mark.parametrize("name", EXAMPLES)
def test_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        import_module(f"benchmarks.examples.{name}").main(["--help"])
    assert "(default: " in capsys.readouterr().out


def test_every_example_is_tested() -> None:
    assert {f"test_{name}" for name in EXAMPLES} <= globals().keys()
