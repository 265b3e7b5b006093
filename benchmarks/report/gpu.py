"""The timings of a GPU as tables: both ways to call a layer, beside cuDNN."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from ..speed.cases import CASES
from ..speed.figures import number, ratio, time
from ..speed.results import Results, Row
from .groups import MODES, OURS, Group, groups

_PRECISIONS = {
    "exact": "float32, exact",
    "tf32": "float32, TF32",
    "bf16": "bfloat16",
    "fp16": "float16",
}


def table(results: Results) -> str:
    """Make the table; a line has a call in both ways."""
    calls: dict[tuple[Any, ...], dict[bool, Group]] = defaultdict(dict)
    for group in groups(results.rows):
        row = next(iter(group.values()))
        what = row["shape"].replace(",", ", "), _PRECISIONS[row["precision"]], MODES[row["mode"]]
        calls[(row["case"], *what)][row["graph"]] = group
    lines = [
        "| case | I, H, L, D, B, T | numbers | what | eager µs | cuDNN | CUDA graph µs | cuDNN |",
        "|---|---|---|---|---:|---:|---:|---:|",
    ]
    for call, ways in calls.items():
        cells = [*call, *_two(ways.get(False, {})), *_two(ways.get(True, {}))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _two(group: Group) -> tuple[str, str]:
    return time(group.get(OURS, {})), ratio(group.get("torch", {}).get("ratio"))


def users(results: Results) -> str:
    """Make the table of the users' calls in a map: inference and training, in both ways."""
    calls: dict[tuple[str, str], dict[tuple[bool, bool], Row]] = defaultdict(dict)
    for row in results.rows:
        if row["case"] and row["us"] is not None:
            calls[row["case"], row["precision"]][row["training"], row["graph"]] = row
    lines = [
        "| who | I, H, L, D, B, T | numbers | inference, eager µs | cuDNN | graph µs | cuDNN "
        "| training, eager µs | cuDNN | graph µs | cuDNN |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for (name, precision), ways in calls.items():
        case = CASES[name]
        cells = [case.who, case.shape.replace(",", ", "), _PRECISIONS[precision]]
        for way in ((False, False), (False, True), (True, False), (True, True)):
            row = ways.get(way)
            cells += [number(row["us"]), ratio(row["ratio"])] if row else ["", ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
