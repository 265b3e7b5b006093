"""The targets of a GPU run, and a verdict on each, computed from the rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from statistics import geometric_mean
from typing import Any

from ..speed.job import Job

Row = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """A `limit` for a `statistic` of the rows of one group, mode and way to call.

    The statistics "lowest" and "mean" (geometric) are those of the ratios to cuDNN, which must be
    at least `limit`. "step" is the longest time of a step in microseconds, which must be at most
    `limit`. `H` and `most` restrict the target to shapes of H units, or of at most so many
    sequences.
    """

    group: str
    mode: str
    graph: bool
    statistic: str
    limit: float
    H: int | None = None
    most: int | None = None

    def __str__(self) -> str:
        how = "graph" if self.graph else "eager"
        direction = "forward + backward" if self.mode == "train" else "forward"
        width = f", H = {self.H}" if self.H else ""
        return f"{self.group}, {how}, {direction}{width}"

    def covers(self, shape: str) -> bool:
        """Return whether the target is about this shape, I,H,L,D,B,T."""
        _, H, _, _, B, _ = map(int, shape.split(","))
        return self.H in (None, H) and (self.most is None or self.most >= B)


TARGETS = (
    Target("tasks", "infer", False, "lowest", 4),
    Target("tasks", "train", False, "lowest", 3),
    Target("tasks", "infer", True, "lowest", 5),
    Target("tasks", "train", True, "lowest", 4),
    Target("steps", "infer", True, "step", 0.5, H=64),
    Target("steps", "infer", True, "step", 0.7, H=128),
    Target("steps", "infer", True, "step", 1.0, H=512),
    # What cuDNN takes there by FlashRNN's authors: 2.01 and 5.19 ms for 1,024 steps.
    *(
        Target("flashrnn", mode, graph, "step", limit)
        for mode, limit in (("infer", 2010 / 1024), ("train", 5190 / 1024))
        for graph in (False, True)
    ),
    *(
        Target("wide", mode, graph, statistic, limit)
        for mode in ("infer", "train")
        for graph in (False, True)
        for statistic, limit in (("mean", 1.5), ("lowest", 0.95))
    ),
    Target("packed", "infer", False, "lowest", 5),
    Target("packed", "train", False, "lowest", 5),
    *(
        Target("float32", mode, graph, "mean", 1.3)
        for mode in ("infer", "train")
        for graph in (False, True)
    ),
)


# For the CUDA kernels some targets differ.
CUDA_TARGETS = (
    *(target for target in TARGETS if target.group != "wide"),
    *(
        Target("wide", mode, graph, "mean", 2, most=64)
        for mode in ("infer", "train")
        for graph in (False, True)
    ),
    Target("wide", "infer", True, "step", 1.2, H=512, most=64),
)


def targets_of(backend: str) -> tuple[Target, ...]:
    """Return the targets of a backend."""
    return CUDA_TARGETS if backend == "cuda" else TARGETS


def verdicts(
    jobs: Iterable[Job], rows: list[Row], targets: Iterable[Target] = TARGETS
) -> Iterator[str]:
    """Yield a line for every target and precision: met, missed, or not measured in full."""
    jobs = list(jobs)
    for target in targets:
        expected = Counter(
            job.precision.name
            for job in jobs
            if (job.group, job.mode, job.graph) == (target.group, target.mode, target.graph)
            and target.covers(job.case.shape)
        )
        for precision, count in expected.items():
            yield _verdict(target, precision, count, list(_values(target, precision, rows)))


def _values(target: Target, precision: str, rows: list[Row]) -> Iterator[float]:
    step = target.statistic == "step"
    figure, provider = ("us_per_step", "fastlstm") if step else ("ratio", "torch")
    names = ("group", "mode", "graph", "precision", "provider")
    key = (target.group, target.mode, target.graph, precision, provider)
    for row in rows:
        same = tuple(row[name] for name in names) == key and target.covers(row["shape"])
        if same and row.get(figure) is not None:
            yield row[figure]


def _verdict(target: Target, precision: str, expected: int, values: list[float]) -> str:
    head = f"{target}, {precision}"
    count = f"{len(values)} of {expected} measurements"
    if not values:
        return f"not measured  {head}: {count}"
    if target.statistic == "step":
        met, figure = max(values) <= target.limit, f"{max(values):.3g} µs a step at most"
        limit = f"{target.limit:.3g} µs"
    else:
        low, mean = min(values), geometric_mean(values)
        met = (low if target.statistic == "lowest" else mean) >= target.limit
        figure = f"geometric mean {mean:.2f}x, lowest {low:.2f}x"
        limit = f"{target.statistic} {target.limit:g}x"
    if met and len(values) < expected:  # what is missing could have missed it
        return f"not measured  {head}: {figure} (target: {limit}), but only {count}"
    return f"{'met' if met else 'missed':12}  {head}: {figure} (target: {limit}; {count})"
