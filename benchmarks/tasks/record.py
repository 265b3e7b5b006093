"""What is recorded of a training run: the points of its curve, and its result."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .task import Score

LABELS = {"fastlstm": "fastlstm.LSTM", "torch": "torch.nn.LSTM"}


@dataclass(frozen=True)
class Point:
    """A point of a curve: means over the training steps since the last point, and maybe a test."""

    step: int
    seconds: float
    loss: float
    accuracy: float
    test: Score | None


@dataclass(frozen=True)
class Record:
    """The result of one provider in one task.

    `seconds` is the time inside training steps: batch, forward, loss, backward, optimizer.
    `step_ms` has the 20th, 50th and 80th percentile of the time of a step, in milliseconds, where
    a step's time is the mean of its turn. `loss`, `accuracy`, `exact` and `rows` are those of the
    test set after the last step. `samples_per_second` is of each of the `processes`, in a median
    step; `efficiency` is the median step of one process alone, by that of all and by their number,
    or None where there is only one.
    """

    task: str
    provider: str
    settings: dict[str, Any]
    loss: float
    accuracy: float
    exact: int
    rows: int
    seconds: float
    step_ms: dict[str, float]
    steps: int
    environment: dict[str, Any]
    curve: tuple[Point, ...]
    processes: int = 1
    samples_per_second: float | None = None
    efficiency: float | None = None


def speed_up(record: Record, records: Iterable[Record]) -> float | None:
    """How many times as long a step of ``nn.LSTM`` takes in the same task; None if it was not run.

    A ratio of median steps, which a machine that stalls for a while does not move.
    """
    for peer in records:
        if peer.task == record.task and peer.provider == "torch":
            return peer.step_ms["p50"] / record.step_ms["p50"]
    return None


def describe(point: Point) -> str:
    """One line for a point of a curve."""
    line = (
        f"step {point.step:6,}  {point.seconds:7.2f} s  loss {point.loss:.5f}  "
        f"accuracy {point.accuracy:8.4%}"
    )
    if (test := point.test) is None:
        return line
    return (
        f"{line}  test loss {test.loss:.5f}  accuracy {test.accuracy:8.4%}  "
        f"exact {test.exact:,} of {test.rows:,}"
    )
