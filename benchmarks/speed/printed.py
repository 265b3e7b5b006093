"""What `python -m benchmarks speed` prints: a table of its rows, and geometric means."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from statistics import geometric_mean
from typing import Any

from ..providers import PROVIDERS
from .figures import behind, number
from .results import Row, key


def table(rows: list[Row]) -> str:
    """One line per case and mode: our time, and how many times as long the others take."""
    groups: dict[tuple[Any, ...], dict[str, Row]] = defaultdict(dict)
    for row in rows:
        groups[key(row)][row["provider"]] = row
    names = [
        name for name in PROVIDERS if any("p50_us" in g.get(name, ()) for g in groups.values())
    ]
    others = [name for name in names if name != "fastlstm"]
    ours = ["fastlstm µs (p20-p80)"] if "fastlstm" in names else []
    lines = [["case", "mode", "I,H,L,D,B,T", *ours, *others]]
    for group in groups.values():
        row = next(iter(group.values()))
        how = row["mode"] + " graph" * row["graph"]
        how += f", {row['threads']} threads" * (len({row["threads"] for row in rows}) > 1)
        lines.append([row["case"], how, row["shape"]])
        for name in names:
            lines[-1].append(_cell(group.get(name), timed=name == "fastlstm" or not ours))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(
            cell.ljust(width) if i < 3 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    return "\n".join(line.rstrip() for line in [*text, "", *_summary(rows)])


def _cell(row: Row | None, timed: bool) -> str:
    if row is None or "skipped" in row:
        return "- "
    if "error" in row:
        return "error "
    return _time(row) if timed or row["ratio"] is None else _ratio(row["ratio"])


def _time(row: Row) -> str:
    return f"{number(row['p50_us'])} ({number(row['p20_us'])}-{number(row['p80_us'])})"


def _ratio(ratio: float) -> str:
    return f"{ratio:.2f}x" + ("*" if behind(ratio) else " ")


def _summary(rows: list[Row]) -> Iterator[str]:
    ratios: dict[tuple[str, str], list[float]] = defaultdict(list)
    several = len({row["threads"] for row in rows}) > 1
    for row in rows:
        if row["provider"] != "fastlstm" and row.get("ratio"):
            mode = row["mode"] + f", {row['threads']} threads" * several
            ratios[mode, row["provider"]].append(row["ratio"])
    for (mode, peer), values in ratios.items():
        yield f"{mode}: {geometric_mean(values):.2f}x {peer} (geometric mean, n={len(values)})"
    if any(behind(value) for values in ratios.values() for value in values):
        yield "* the other one is faster"
