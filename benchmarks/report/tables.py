"""Timings as Markdown: every figure in a table of a README comes from here."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from statistics import geometric_mean

from ..providers import PROVIDERS, provider
from ..speed.cases import CASES, TASK_SHAPES, TASKS, USERS, Case
from ..speed.figures import behind, ratio, time
from ..speed.results import Results, Row
from .groups import NAMED, OURS, Group, best_peer, by_case, default_rows, groups, is_peer

# The cases of the small table on the first page: typical uses, one in which a peer is faster.
SUMMARY = ("mnist-lstm", "mnist-blstm", "step", "rl-resets", "mnist-blstm-packed", "lm")


def caption(results: Results) -> str:
    """Say on what the results were measured."""
    facts = results.environment
    where = facts.get("gpu") or facts["cpu"]
    isa = f" ({facts['isa']})" if facts.get("isa") and not facts.get("gpu") else ""
    return (
        f"{where}{isa}, {facts['threads']} threads, torch {facts['torch']}, "
        f"{facts['date'][:10]}, commit {str(facts['commit'])[:7]}"
    )


def protocol(results: Results) -> str:
    """Say what a call of training was when the results were measured."""
    steps = results.environment.get(
        "training_call", "forward and backward, without an optimizer's step"
    )
    return f"Training is {steps}."


def main_table(results: Results) -> str:
    """Make the table of the named cases: our time, and the ratios of nn.LSTM and of others."""
    lines = [
        "| case | I, H, L, D, B, T | inference µs | `nn.LSTM` | best other peer | training µs "
        "| `nn.LSTM` | best other peer |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    found = by_case(results)
    for case in TASKS + USERS:
        if case.name not in found:
            continue
        cells = [case.who, case.shape.replace(",", ", ")]
        for mode in ("inference", "training"):
            cells += _three(found[case.name].get(mode, {}))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def summary(results: Results) -> str:
    """Make the small table: the cases of `SUMMARY`, with their shapes in short."""
    lines = [
        "| case | inference, µs | `nn.LSTM` | best other peer | training, µs | `nn.LSTM` "
        "| best other peer |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    found = by_case(results)
    for name in SUMMARY:
        case = CASES[name]
        cells = [f"{case.who}, {_short_shape(case)}"]
        for mode in ("inference", "training"):
            cells += _three(found[name].get(mode, {}))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _short_shape(case: Case) -> str:
    units = f"2x{case.H}" if case.D == 2 else f"{case.H}"
    return f"{'→'.join([str(case.I), *[units] * case.L])}, B={case.B}, T={case.T}"


def means(results: Results) -> str:
    """Make a list of the geometric means over the named cases."""
    return "\n".join(_means(results))


def _means(results: Results) -> Iterable[str]:
    found = groups(default_rows(results))
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


def _three(group: Group) -> list[str]:
    ours = group.get(OURS, {})
    best = best_peer(group, "torch")
    other = f"{ratio(best['ratio'])} {provider(best['provider']).label}" if best else ""
    return [time(ours), ratio(group.get("torch", {}).get("ratio")), other]


def losses(results: Results) -> str:
    """Make a table of the named cases in which a peer is faster, and count the other ones."""
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
    """Make a table of the measurements (all, or those in `found`) in which a peer is faster."""
    lines = []
    for group in groups(results.rows) if found is None else found:
        for row in group.values():
            if is_peer(row["provider"]) and row.get("ratio") and behind(row["ratio"]):
                lines.append(
                    f"| {row['case']} | {row['shape'].replace(',', ', ')} | {what(row, results)} "
                    f"| {provider(row['provider']).label} | {time(row)} | {time(group[OURS])} "
                    f"| {ratio(row['ratio'])} |"
                )
    if not lines:
        return "No peer is faster in any of these measurements."
    head = "| case | I, H, L, D, B, T | what | faster peer | its µs | ours | ratio |"
    return "\n".join([head, "|---|---|---|---|---:|---:|---:|", *lines])


def peers(results: Results) -> str:
    """Make the table of providers: their versions, and what they could not do, and why."""
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
    """Make the table of what the options of a cell cost, with a column for each case."""
    names = list(dict.fromkeys(row["case"] for row in results.rows))
    title = "times as long as the plain cell, inference / training"
    lines = [
        f"| {title} | {' | '.join(map(_who, names))} |",
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


def tasks(records: Sequence[Row]) -> str:
    """Make the table of the trained tasks: what is right on the test set."""
    lines = ["| task | seed | training steps | right on the test set |", "|---|---:|---:|---:|"]
    for record in records:
        lines.append(
            f"| {record['task']} | {record['settings']['seed']} | {record['steps']:,} "
            f"| {record['exact']:,} of {record['rows']:,} |"
        )
    return "\n".join(lines)


def scaling(records: Sequence[Row]) -> str:
    """Make the table of training in several processes: accuracy and efficiency."""
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


def _who(case: str) -> str:
    """Return a case in words, or its name."""
    return CASES[case].who if case in CASES else case


def what(row: Row, results: Results) -> str:
    """Return what was called, and on how many threads if not on those of the other rows."""
    others = row["threads"] != results.environment["threads"]
    threads = f", threads: {row['threads']}" if others else ""
    return f"{row['mode']}{' graph' if row['graph'] else ''}{threads}"
