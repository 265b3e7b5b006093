"""`python -m benchmarks report`: tables and pictures of all results, in every README that asks.

Everything comes from the files in benchmarks/results, which `speed`, `cells`, `gpu` and the tasks
have written. A README asks for a table by a pair of markers, `<!-- report: KIND FILE -->`
and `<!-- end of report -->`; the README in the folder of results is written as a whole. With
--check nothing is written, and the command fails if anything is stale.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from .. import BenchmarkError
from ..speed import contention, quantized
from ..speed.results import FOLDER, Results, Row, load
from . import charts, gpu, tables
from .overview import overview, speed_results

ROOT = Path(__file__).parents[2]
READMES = (ROOT / "README.md", ROOT / "benchmarks/README.md")
ALL = "README.md"  # in the folder of results: every table
# What can stand between <!-- report: KIND FILE --> and <!-- end of report --> in a README.
SECTIONS: dict[str, Callable[[Results], str]] = {
    "caption": tables.caption,
    "summary": tables.summary,
    "speed": tables.main_table,
    "means": tables.means,
    "losses": tables.losses,
    "peers": tables.peers,
    "cells": tables.cells,
    "gpu": gpu.table,
    "users": gpu.users,
    "errors": quantized.error_table,
    "small": quantized.task_table,
    "quantized": quantized.time_table,
    "contention": contention.table,
}
TASK_SECTIONS: dict[str, Callable[[list[Row]], str]] = {  # from the records of training tasks
    "tasks": tables.tasks,
    "scaling": tables.scaling,
}
_MARKED = re.compile(
    r"^(<!-- report: (\w+) (\S+) -->\n).*?^(<!-- end of report -->)", re.DOTALL | re.MULTILINE
)
_BEGIN = re.compile(r"^<!-- report:", re.MULTILINE)  # in a sentence it is no marker


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `report`."""
    add = parser.add_argument
    add(
        "--results",
        type=Path,
        default=FOLDER,
        metavar="DIR",
        help="folder of the results (default: benchmarks/results)",
    )
    add(
        "--readme",
        type=Path,
        nargs="+",
        default=READMES,
        metavar="FILE",
        help="files with markers (default: README.md and benchmarks/README.md)",
    )
    add("--check", action="store_true", help="write nothing; exit status 1 if anything is stale")


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
            file = charts.picture(results, name)
            if charts.drawn_from(file) != charts.digest(rows):
                stale.append(file)
            if not args.check:
                charts.save(file, rows, draw, results)
    for file in stale:
        print(f"{'stale' if args.check else 'new'}: {file}")
    if args.check and stale:
        print("python -m benchmarks report brings them up to date")
    return int(args.check and bool(stale))


def texts(folder: Path, readmes: Iterable[Path]) -> dict[Path, str]:
    """The text that each file should have."""
    found = {folder / ALL: overview(folder)}
    for readme in readmes:
        try:
            text = readme.read_text()
        except OSError as error:
            raise BenchmarkError(f"{readme} cannot be read: {error}") from error
        found[readme] = refreshed(readme, text, folder)
    return found


def refreshed(readme: Path, text: str, folder: Path) -> str:
    """The text of a README with new contents between its markers."""

    def content(match: re.Match[str]) -> str:
        head, kind, name, end = match.groups()
        if kind in TASK_SECTIONS:
            made = TASK_SECTIONS[kind](_records(folder / name))
        elif kind in SECTIONS:
            made = SECTIONS[kind](load(folder / name))
        else:
            expected = ", ".join([*SECTIONS, *TASK_SECTIONS])
            raise BenchmarkError(f"{readme} asks for a report of {kind}; there are: {expected}")
        return f"{head}{made}\n{end}"

    found, begun = len(_MARKED.findall(text)), len(_BEGIN.findall(text))
    if not found or found != begun:
        raise BenchmarkError(
            f"{readme} has {begun} markers of a report, and an end for {found} of them"
        )
    return _MARKED.sub(content, text)


def _records(file: Path) -> list[Row]:
    try:
        return list(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise BenchmarkError(f"{file} cannot be read: {error}") from error
