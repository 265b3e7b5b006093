"""The examples of the README: every row of its table of features, as it stands there."""

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastlstm

README = (Path(__file__).parent.parent / "README.md").read_text()
T, B = 7, 3


def rows() -> Iterator[Any]:
    """Name and code of each row."""
    section = README.split("## What nn.LSTM cannot do")[1].split("\n## ")[0]
    for line in section.splitlines():
        cells = line.strip("|").split(" | ")
        if len(cells) == 3 and "`" in cells[1]:
            code = "\n".join(re.findall(r"`([^`]*)`", cells[1]))
            yield pytest.param(code, id=cells[0].strip())


class Tagger(nn.Module):
    """A model as the examples mean it."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(5, 8)
        self.head = nn.Linear(8, 2)


def test_the_table_is_found() -> None:
    assert len(list(rows())) == 15
    assert all(param.values[0].count("\n") == 2 for param in rows()), "three lines each"


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"], indirect=True)
@pytest.mark.parametrize("code", list(rows()))
def test_example(code: str, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "100_000" in code:
        if backend == "triton":
            pytest.skip("hours in the interpreter")
        if backend == "reference":
            code = code.replace("100_000", "1_000")  # a step at a time
    if backend != "cpu" and 'Dim("T")' in code:
        pytest.skip("the reference unrolls T, and so does what is interpreted")
    if backend != "cpu" and "torch.equal(whole" in code:
        pytest.skip("the matrix products of torch and numpy do not promise it")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch.compiler.reset()
    done = torch.zeros(T, B, dtype=torch.bool)
    done[4] = True
    model = Tagger()
    names: dict[str, Any] = {
        "torch": torch,
        "fastlstm": fastlstm,
        "grad": torch.func.grad,
        "vmap": torch.func.vmap,
        "lstm": fastlstm.LSTM(5, 8),
        "x": torch.randn(T, B, 5, requires_grad="create_graph" in code),
        "samples": torch.randn(T, B, 4, 5),
        "lengths": torch.tensor([2, 7, 0]),
        "done": done,
        "hx": (torch.randn(1, B, 8), torch.randn(1, B, 8)),
        "keras_weights": [torch.randn(5, 32), torch.randn(8, 32), torch.randn(32)],
        "model": model,
        "old_checkpoint": Tagger().state_dict(),
    }
    exec(code, names)
