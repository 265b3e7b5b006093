"""Records what cuDNN computes, for tests on machines without a GPU.

    PYTHONPATH=. python tests/recorder.py tests/data

writes one small file for each precision: the numbers of a few cases, the outputs and gradients of
cuDNN's nn.LSTM, and the largest error that the oracle allows there, with cuDNN as the yardstick.
`python -m benchmarks gpu` does it too.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cases import Case, Results, draw, evaluate, plain
from oracle import judge
from torch import Tensor

from benchmarks.speed.environment import environment
from benchmarks.speed.precision import PRECISIONS, Precision

CASES = (
    Case(T=20, B=4, I=10, H=16),
    Case(T=7, B=5, I=12, H=16, directions=2, hx=False),
    Case(T=5, B=4, I=6, H=8, layers=2, directions=2),
    Case(T=6, B=5, I=10, H=9, lengths=(2, 6, 1, 6, 3), packed=True, directions=2),
    Case(T=5, B=3, I=8, H=16, proj=8, batch_first=True),
)


@dataclass(frozen=True)
class Record:
    """A case, its `numbers`, what the recorded kernel made of them, and the errors `allowed`."""

    case: Case
    precision: Precision
    numbers: Results
    results: Results
    allowed: dict[str, float]
    facts: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.precision}-{self.case}"


def record(
    folder: Path, device: str, cases: Iterable[Case] = CASES, facts: dict[str, Any] | None = None
) -> list[Path]:
    """Runs nn.LSTM on the device and writes a file for each precision; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = facts or environment(device)
    paths = []
    for precision in PRECISIONS.values():
        arrays: dict[str, np.ndarray] = {}
        described = []
        for k, case in enumerate(cases):
            numbers = draw(case, precision.dtype)
            results, allowed = solve(case, precision, numbers, device)
            described.append({"case": asdict(case), "allowed": allowed})
            for part, values in {"numbers": numbers, "results": results}.items():
                for name, value in values.items():
                    arrays[f"{k}/{part}/{name}"] = to_numpy(value.to(precision.dtype))
        header = {"precision": precision.name, "facts": facts, "records": described}
        path = folder / f"cudnn-{precision}.npz"
        np.savez_compressed(path, header=json.dumps(header), **arrays)
        paths.append(path)
    return paths


def solve(
    case: Case, precision: Precision, numbers: Results, device: str
) -> tuple[Results, dict[str, float]]:
    """What nn.LSTM makes of the numbers on the device, and the errors that the oracle allows."""
    there = {name: value.to(device) for name, value in numbers.items()}
    with precision.applied(), deterministic():
        results = evaluate(case, precision.dtype, there, plain)
        _, allowed = judge(
            lambda dtype, n: evaluate(case, dtype, n, plain),
            precision.dtype,
            there,
            arithmetic=precision.eps if precision.tf32 else None,
        )
    return {name: value.cpu() for name, value in results.items()}, allowed


def load(path: Path) -> Iterator[Record]:
    """The records of a file."""
    with np.load(path) as arrays:
        header = json.loads(str(arrays["header"]))
        precision = PRECISIONS[header["precision"]]
        for k, described in enumerate(header["records"]):
            fields = {
                name: tuple(value) if isinstance(value, list) else value
                for name, value in described["case"].items()
            }
            parts: dict[str, Results] = {"numbers": {}, "results": {}}
            for key in arrays.files:
                if key.startswith(f"{k}/"):
                    _, part, name = key.split("/")
                    parts[part][name] = from_numpy(arrays[key], precision.dtype).double()
            yield Record(
                Case(**fields),
                precision,
                parts["numbers"],
                parts["results"],
                described["allowed"],
                header["facts"],
            )


def to_numpy(value: Tensor) -> np.ndarray:
    """The array of the same numbers; bfloat16, which NumPy lacks, as its bits in uint16."""
    value = value.detach()
    return (value.view(torch.uint16) if value.dtype == torch.bfloat16 else value).numpy()


def from_numpy(array: np.ndarray, dtype: torch.dtype) -> Tensor:
    """What `to_numpy` was given."""
    value = torch.from_numpy(array)
    return value.view(dtype) if dtype == torch.bfloat16 else value


@contextmanager
def deterministic() -> Iterator[None]:
    """The algorithms that a second recording would take too."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = before


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        parser.error("cuDNN needs a CUDA GPU, and torch.cuda.is_available() is False")
    for path in record(args.folder, args.device):
        print(f"{path.name}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
