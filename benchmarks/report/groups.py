"""The rows that were measured together, and the fastest peer among them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from ..speed.results import Results, Row

Group = dict[str, Row]  # the rows of one measurement, by provider
OURS = "fastlstm"
NAMED = ("tasks", "users")  # the groups of cases that have names
MODES = {"infer": "inference", "step": "inference", "train": "training"}


def groups(rows: Iterable[Row]) -> list[Group]:
    """Return the rows that were measured together."""
    found: dict[tuple[Any, ...], Group] = defaultdict(dict)
    names = ("group", "case", "shape", "mode", "precision", "graph", "threads")
    for row in rows:
        found[tuple(row.get(name) for name in names)][row["provider"]] = row
    return list(found.values())


def is_peer(name: str) -> bool:
    """Return whether a provider is not this library in one of its forms."""
    return not name.startswith(OURS)


def best_peer(group: Group, *without: str) -> Row | None:
    """Return the row of the fastest peer, or None; `without` names providers to leave out."""
    peers = [row for name, row in group.items() if is_peer(name) and row.get("ratio")]
    peers = [row for row in peers if row["provider"] not in without]
    return min(peers, key=lambda row: row["ratio"], default=None)


def by_case(results: Results) -> dict[str, dict[str, Group]]:
    """Return the default measurements of the named cases: "inference" and "training" of each."""
    found: dict[str, dict[str, Group]] = defaultdict(dict)
    for group in groups(default_rows(results)):
        row = next(iter(group.values()))
        found[row["case"]][MODES[row["mode"]]] = group
    return found


def default_rows(results: Results) -> list[Row]:
    """Return the rows of the named cases that were called in the default way.

    Where none has the default precision, those of all others count.
    """
    measured = {row["precision"] for row in results.rows}
    precisions = measured & {"exact", "tf32"} or measured
    return [
        row
        for row in results.rows
        if row["group"] in NAMED
        and row["mode"] in ("train", "step" if row["shape"].endswith(",1") else "infer")
        and row["precision"] in precisions
        and not row["graph"]
        and row["threads"] == results.environment["threads"]
    ]
