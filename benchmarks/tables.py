"""Results as Markdown: every number in a table of the README comes from here."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from statistics import geometric_mean
from typing import Any

from .cases import CASES, TASKS, USERS
from .jobs import TASK_SHAPES
from .providers import PROVIDERS, provider
from .results import Results, Row

Group = dict[str, Row]  # the rows of one measurement, by provider
OURS = "fastlstm"
NAMED = ("tasks", "users")  # the groups of cases that have names
MODES = {"infer": "inference", "step": "inference", "train": "training"}


def groups(rows: Iterable[Row]) -> list[Group]:
    """The rows that were measured together."""
    found: dict[tuple[Any, ...], Group] = defaultdict(dict)
    names = ("group", "case", "shape", "mode", "precision", "graph", "threads")
    for row in rows:
        found[tuple(row.get(name) for name in names)][row["provider"]] = row
    return list(found.values())


def is_peer(name: str) -> bool:
    """Whether it is not this library in one of its forms."""
    return not name.startswith(OURS)


def best_peer(group: Group, *without: str) -> Row | None:
    """The fastest of the others."""
    peers = [row for name, row in group.items() if is_peer(name) and row.get("ratio")]
    peers = [row for row in peers if row["provider"] not in without]
    return min(peers, key=lambda row: row["ratio"], default=None)


def caption(results: Results) -> str:
    """On what it was measured."""
    facts = results.environment
    where = facts.get("gpu") or facts["cpu"]
    isa = f" ({facts['isa']})" if facts.get("isa") and not facts.get("gpu") else ""
    return (
        f"{where}{isa}, {facts['threads']} threads, torch {facts['torch']}, "
        f"{facts['date'][:10]}, commit {str(facts['commit'])[:7]}"
    )


def main_table(results: Results) -> str:
    """The named cases: our time, and how many times as long nn.LSTM and the others take."""
    lines = [
        "| case | I, H, L, D, B, T | inference µs | `nn.LSTM` | best other peer | training µs "
        "| `nn.LSTM` | best other peer |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    by_case: dict[str, dict[str, Group]] = defaultdict(dict)
    for group in groups(_default(results)):
        row = next(iter(group.values()))
        by_case[row["case"]][MODES[row["mode"]]] = group
    for case in TASKS + USERS:
        if case.name not in by_case:
            continue
        cells = [case.who, case.shape.replace(",", ", ")]
        for mode in ("inference", "training"):
            cells += _three(by_case[case.name].get(mode, {}))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _three(group: Group) -> list[str]:
    ours = group.get(OURS, {})
    best = best_peer(group, "torch")
    other = f"{ratio(best['ratio'])} {provider(best['provider']).label}" if best else ""
    return [time(ours), ratio(group.get("torch", {}).get("ratio")), other]


def means(results: Results) -> str:
    """What the named cases come to."""
    return "\n".join(_means(results))


def _means(results: Results) -> Iterable[str]:
    found = groups(_default(results))
    wholes: list[tuple[str, Callable[[Row], bool]]] = [
        ("all cases", lambda row: True),
        ("the dense task shapes", lambda row: row["case"] in TASK_SHAPES),
    ]
    for title, belongs in wholes:
        parts = []
        for modes, name in ((("infer", "step"), "inference"), (("train",), "training")):
            chosen = [
                group
                for group in found
                if belongs(row := next(iter(group.values()))) and row["mode"] in modes
            ]
            torch = [g["torch"]["ratio"] for g in chosen if g.get("torch", {}).get("ratio")]
            best = [row["ratio"] for group in chosen if (row := best_peer(group))]
            if torch and best:
                parts.append(
                    f"{name} {geometric_mean(torch):.2f}x of `nn.LSTM`, "
                    f"{geometric_mean(best):.2f}x of the fastest peer of each case (n={len(best)})"
                )
        if parts:
            yield f"- {title}: {'; '.join(parts)}"


def losses(results: Results) -> str:
    """The named cases in which a peer is faster, and how many of the other measurements."""
    named, others = [], []
    for group in groups(results.rows):
        row = next(iter(group.values()))
        (named if row["group"] in NAMED else others).append(group)
    text = loss_table(results, named)
    slower = [
        row["ratio"] for group in others if (row := best_peer(group)) and behind(row["ratio"])
    ]
    if slower:
        text += (
            f"\n\nOf {len(others)} measurements of other shapes, a peer is faster in "
            f"{len(slower)}, the worst at {ratio(min(slower))}."
        )
    return text


def loss_table(results: Results, found: Iterable[Group] | None = None) -> str:
    """The measurements, all or those found, in which a peer is faster."""
    lines = []
    for group in groups(results.rows) if found is None else found:
        for row in group.values():
            if is_peer(row["provider"]) and row.get("ratio") and behind(row["ratio"]):
                lines.append(
                    f"| {row['case']} | {row['shape'].replace(',', ', ')} | {_what(row, results)} "
                    f"| {provider(row['provider']).label} | {time(row)} | {time(group[OURS])} "
                    f"| {ratio(row['ratio'])} |"
                )
    if not lines:
        return "No peer is faster in any of these measurements."
    head = "| case | I, H, L, D, B, T | what | faster peer | its µs | ours | ratio |"
    return "\n".join([head, "|---|---|---|---|---:|---:|---:|", *lines])


def behind(ratio: float) -> bool:
    """Whether a peer is faster, as far as two decimals show it."""
    return round(ratio, 2) < 1


def everything(results: Results) -> str:
    """Every measurement, with every provider that was in it."""
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
            cells = [row["case"], row["shape"].replace(",", ", "), _what(row, results)]
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


def peers(results: Results) -> str:
    """Who took part, in which version, and who could not, and why."""
    lines = ["| provider | version | without what, and why |", "|---|---|---|"]
    rows: dict[str, list[Row]] = defaultdict(list)
    for row in results.rows:
        rows[row["provider"]].append(row)
    for name in PROVIDERS:
        reasons = list(dict.fromkeys(r["skipped"] for r in rows[name] if "skipped" in r))
        errors = list(
            dict.fromkeys(r["error"].splitlines()[0] for r in rows[name] if "error" in r)
        )
        timed = [row for row in rows[name] if "p50_us" in row]
        version = next((row["version"] for row in rows[name] if row.get("version")), None)
        if not rows[name]:
            missing = results.environment.get("missing", {}).get(name)
            reasons = [missing or "not asked for"]
        why = "; ".join(reasons + [f"fails: {error}" for error in errors])
        lines.append(f"| {provider(name).label} | {version or '' if timed else ''} | {why} |")
    return "\n".join(lines)


def cells(results: Results) -> str:
    """What the options cost: a column for each case, inference / training."""
    names = list(dict.fromkeys(row["case"] for row in results.rows))
    title = "times as long as the plain cell, inference / training"
    lines = [
        f"| {title} | {' | '.join(map(who, names))} |",
        "|---|" + "---|" * len(names),
    ]
    for module in dict.fromkeys(row["module"] for row in results.rows):
        found = {
            (row["case"], row["mode"]): row["ratio"]
            for row in results.rows
            if row["module"] == module
        }
        unit = "x" if module == "RNN" else ""
        title = "`fastlstm.RNN`: `nn.RNN` takes" if module == "RNN" else f"`{module}`"
        values = [
            f"{found[name, 'infer']:.2f}{unit} / {found[name, 'train']:.2f}{unit}"
            for name in names
        ]
        lines.append(f"| {title} | {' | '.join(values)} |")
    return "\n".join(lines)


def scaling(records: Sequence[Row]) -> str:
    """Training in several processes: the same accuracy, and what the processes gain."""
    lines = [
        "| task | provider | processes | test accuracy | samples/s of each | efficiency |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for record in records:
        lines.append(
            f"| {record['task']} | {record['provider']} | {record['processes']} "
            f"| {record['accuracy']:.2%} | {record['samples_per_second']:,.0f} "
            f"| {record['efficiency']:.0%} |"
        )
    return "\n".join(lines)


def who(case: str) -> str:
    """The sentence of a case, or its name."""
    return CASES[case].who if case in CASES else case


def time(row: Row) -> str:
    """Microseconds, as precise as they are known."""
    return number(row["p50_us"]) if "p50_us" in row else ""


def number(value: float) -> str:
    """Three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def ratio(value: float | None) -> str:
    """How many times as long a peer takes; in bold where it is faster."""
    if value is None:
        return ""
    text = f"{value:.2f}x"
    return f"**{text}**" if behind(value) else text


def _what(row: Row, results: Results) -> str:
    """What was called, and on how many threads if not on those of the rest."""
    others = row["threads"] != results.environment["threads"]
    threads = f", threads: {row['threads']}" if others else ""
    return f"{row['mode']}{' graph' if row['graph'] else ''}{threads}"


def _default(results: Results) -> list[Row]:
    """Of the named cases, in the way they are called by default."""
    return [
        row
        for row in results.rows
        if row["group"] in NAMED
        and row["mode"] in ("train", "step" if row["shape"].endswith(",1") else "infer")
        and row["precision"] in ("exact", "tf32")
        and not row["graph"]
        and row["threads"] == results.environment["threads"]
    ]
