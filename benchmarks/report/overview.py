"""The README in the folder of results: every table, of every machine."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from ..providers import PROVIDERS, provider
from ..speed.figures import number, ratio, time
from ..speed.results import Results, Row, load
from . import charts, tables
from .groups import OURS, Group, groups
from .tables import what


def overview(folder: Path) -> str:
    """Make the text of the README: every table, of every machine."""
    parts = [
        "# Results",
        "Made by `python -m benchmarks report` from the files beside it. Times are medians, in "
        "microseconds a call; a peer's column says how many times as long it takes in the same "
        "rounds, in bold where it is faster. The floor is the time of the multiplications at the "
        "rate of a large product, or of the bytes at the rate of a copy, both measured in the "
        "same run. The error is the largest against float64, as a share of the largest value.",
    ]
    for results in speed_results(folder):
        assert results.file is not None
        parts += [f"## {results.file.name}", tables.caption(results), tables.protocol(results)]
        parts += [
            f"![{name}]({charts.picture(results, name).name})" for name in charts.charts(results)
        ]
        parts += ["### Where a peer is faster", tables.loss_table(results)]
        parts += [everything(results), "### Peers", tables.peers(results)]
    return "\n\n".join(parts) + "\n"


def speed_results(folder: Path) -> list[Results]:
    """Load the results of `speed` and of `gpu` in a folder."""
    return [load(file) for file in sorted(folder.glob("*-speed.json"))]


def everything(results: Results) -> str:
    """Make the tables of every measurement, with every provider that took part."""
    parts = []
    by_group: dict[str, list[Group]] = defaultdict(list)
    for group in groups(results.rows):
        by_group[next(iter(group.values()))["group"] or "other shapes"].append(group)
    for title, found in by_group.items():
        timed = {name for group in found for name, row in group.items() if "p50_us" in row}
        others = [name for name in PROVIDERS if name in timed and name != OURS]
        labels = " | ".join(provider(name).label for name in others)
        lines = [
            f"| case | I, H, L, D, B, T | what | µs (p20-p80) | µs a step | x floor | error "
            f"| peak MiB | first call s | {labels} |",
            "|---|---|---|---:|---:|---:|---:|---:|---:|" + "---:|" * len(others),
        ]
        for group in found:
            row = group.get(OURS) or next(iter(group.values()))
            cells = [row["case"], row["shape"].replace(",", ", "), what(row, results)]
            cells += _own(row) + [_peer(group.get(name)) for name in others]
            lines.append(f"| {' | '.join(cells)} |")
        parts.append(f"### {title}\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def _own(row: Row) -> list[str]:
    if "p50_us" not in row:
        return [row.get("error", row.get("skipped", "")).splitlines()[0], *[""] * 5]
    return [
        f"{time(row)} ({number(row['p20_us'])}-{number(row['p80_us'])})",
        number(row["us_per_step"]),
        f"{row['times_floor']:.1f}" if "times_floor" in row else "",
        f"{row['max_error']:.1e}" if "max_error" in row else "",
        f"{row['peak_bytes'] / 2**20:.1f}" if row.get("peak_bytes") is not None else "",
        number(row["first_call_s"]) if "first_call_s" in row else "",
    ]


def _peer(row: Row | None) -> str:
    if row is None or "skipped" in row:
        return ""
    return "fails" if "error" in row else ratio(row["ratio"])
