"""The examples of fastlstm/README.md: every block of Python, as it stands there."""

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastlstm

GUIDE = (Path(__file__).parent.parent / "fastlstm" / "README.md").read_text()
FEATURES = "What nn.LSTM cannot do"
T, B = 7, 3


def blocks(features: bool) -> Iterator[Any]:
    """The blocks of Python of the section of features, or of all others, by their headings."""
    for section in re.split(r"^## ", GUIDE, flags=re.MULTILINE)[1:]:
        if section.startswith(f"{FEATURES}\n") is features:
            for part in re.split(r"^### ", section, flags=re.MULTILINE):
                codes = re.findall(r"^```python\n(.*?)^```$", part, re.MULTILINE | re.DOTALL)
                title = part.partition("\n")[0]
                for number, code in enumerate(codes, 1):
                    yield pytest.param(code, id=title if number == 1 else f"{title} {number}")


class Tagger(nn.Module):
    """A model as the examples mean it."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(5, 8)
        self.head = nn.Linear(8, 2)


def test_the_blocks_are_found() -> None:
    assert len(list(blocks(features=True))) == 14
    assert GUIDE.count("```python\n") == 14 + len(list(blocks(features=False)))


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"], indirect=True)
@pytest.mark.parametrize("code", list(blocks(features=True)))
def test_feature(code: str, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "100_000" in code:
        if backend == "triton":
            pytest.skip("hours in the interpreter")
        if backend == "reference":
            code = code.replace("100_000", "1_000")  # a step at a time
    if backend != "cpu" and 'Dim("T")' in code:
        pytest.skip("the reference unrolls T, and so does what is interpreted")
    if backend != "cpu" and "torch.equal(whole" in code:
        pytest.skip("the matrix products of torch and numpy do not promise it")
    run(code, tmp_path, monkeypatch)


@pytest.mark.parametrize("code", list(blocks(features=False)))
def test_other_example(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with fastlstm.backend("auto"):
        run(code, tmp_path, monkeypatch)


def run(code: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a block with the names that the guide supposes."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch.compiler.reset()
    episode_start = torch.zeros(T, B, dtype=torch.bool)
    episode_start[4] = True
    model = Tagger()
    names: dict[str, Any] = {
        "torch": torch,
        "nn": nn,
        "pack_padded_sequence": pack_padded_sequence,
        "pad_packed_sequence": pad_packed_sequence,
        "fastlstm": fastlstm,
        "grad": torch.func.grad,
        "vmap": torch.func.vmap,
        "lstm": fastlstm.LSTM(5, 8),
        "x": torch.randn(T, B, 5, requires_grad="create_graph" in code),
        "samples": torch.randn(T, B, 4, 5),
        "lengths": torch.tensor([2, 7, 0]),
        "episode_start": episode_start,
        "terminated": episode_start.roll(-1, 0),
        "truncated": torch.rand(T, B) < 0.1,
        "previous_done": torch.ones(B, dtype=torch.bool),
        "hx": (torch.randn(1, B, 8), torch.randn(1, B, 8)),
        "W": torch.randn(1, 32, 5),
        "R": torch.randn(1, 32, 8),
        "B": torch.randn(1, 64),
        "keras_weights": [torch.randn(5, 32), torch.randn(8, 32), torch.randn(32)],
        "model": model,
        "old_checkpoint": Tagger().state_dict(),
    }
    exec(code, names)
