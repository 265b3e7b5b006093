"""`python -m benchmarks report`: tables and pictures of all results, and the README's own tables.

Everything comes from the files of `speed`, `cells`, `gpu` and `mnist --distributed` in
benchmarks/results. With --check nothing is written: the command fails if anything is stale.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import BenchmarkError, charts, tables
from .results import FOLDER, Results, load

README = Path(__file__).parents[1] / "README.md"
ALL = "README.md"  # in the folder of results: every table
# What stands between <!-- report: KIND FILE --> and <!-- end of report --> in the README.
SECTIONS: dict[str, Callable[[Results], str]] = {
    "caption": tables.caption,
    "speed": tables.main_table,
    "means": tables.means,
    "losses": tables.losses,
    "peers": tables.peers,
    "cells": tables.cells,
}
_MARKED = re.compile(r"(<!-- report: (\w+) (\S+) -->\n).*?(<!-- end of report -->)", re.DOTALL)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `report`."""
    add = parser.add_argument
    add("--results", type=Path, default=FOLDER, metavar="DIR", help="default: %(default)s")
    add("--readme", type=Path, default=README, metavar="FILE", help="default: %(default)s")
    add("--check", action="store_true", help="write nothing; 1 if anything is stale")


def main(args: argparse.Namespace) -> int:
    """Write all of it, or with --check name what is stale."""
    stale = []
    for file, text in texts(args.results, args.readme).items():
        if not file.exists() or file.read_text() != text:
            stale.append(file)
        if not args.check:
            file.write_text(text)
    for results in speed_results(args.results):
        for name, (rows, draw) in charts.charts(results).items():
            file = picture(results, name)
            if charts.drawn_from(file) != charts.digest(rows):
                stale.append(file)
            if not args.check:
                charts.save(file, rows, draw, results)
    for file in stale:
        print(f"{'stale' if args.check else 'new'}: {file}")
    if args.check and stale:
        print("python -m benchmarks report brings them up to date")
    return int(args.check and bool(stale))


def texts(folder: Path, readme: Path) -> dict[Path, str]:
    """The text that each file should have."""
    try:
        text = readme.read_text()
    except OSError as error:
        raise BenchmarkError(f"{readme} cannot be read: {error}") from error
    return {folder / ALL: overview(folder), readme: refreshed(text, folder)}


def speed_results(folder: Path) -> list[Results]:
    """Of `speed` and of `gpu`."""
    return [load(file) for file in sorted(folder.glob("*-speed.json"))]


def picture(results: Results, name: str) -> Path:
    """The file of a picture beside that of its results."""
    assert results.file is not None
    return results.file.with_name(f"{results.file.stem.removesuffix('-speed')}-{name}.svg")


def refreshed(text: str, folder: Path) -> str:
    """The README with new contents between its markers."""

    def content(match: re.Match[str]) -> str:
        head, kind, name, end = match.groups()
        if kind == "scaling":
            made = tables.scaling(_records(folder / name))
        elif kind in SECTIONS:
            made = SECTIONS[kind](load(folder / name))
        else:
            expected = ", ".join([*SECTIONS, "scaling"])
            raise BenchmarkError(f"the README asks for a report of {kind}; there are: {expected}")
        return f"{head}{made}\n{end}"

    found = _MARKED.findall(text)
    if not found or len(found) != text.count("<!-- report:"):
        raise BenchmarkError(
            f"the README has {text.count('<!-- report:')} markers of a report, and an end for "
            f"{len(found)} of them"
        )
    return _MARKED.sub(content, text)


def _records(file: Path) -> list[dict[str, Any]]:
    try:
        return list(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise BenchmarkError(f"{file} cannot be read: {error}") from error


def overview(folder: Path) -> str:
    """Every table, of every machine."""
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
        parts += [f"## {results.file.name}", tables.caption(results)]
        parts += [f"![{name}]({picture(results, name).name})" for name in charts.charts(results)]
        parts += ["### Where a peer is faster", tables.loss_table(results)]
        parts += [tables.everything(results), "### Peers", tables.peers(results)]
    return "\n\n".join(parts) + "\n"
