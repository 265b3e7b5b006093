"""Results as pictures: SVG files that carry a digest of the rows they were drawn from."""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .. import extra
from ..providers import provider
from ..speed.results import Results, Row
from ..tasks.plot import COLORS, STYLE
from .groups import OURS, best_peer, groups
from .tables import caption

Draw = Callable[[Any, Sequence[Row], str], Any]
PALETTE = {
    "fastlstm": COLORS["fastlstm"],
    "torch": COLORS["torch"],
    "torch-compiled": "#7fb2d6",
    "cell-compiled": "#9a8c98",
    "onnxruntime": "#edae49",
    "jax": "#2a9d8f",
    "flax": "#8ab17d",
    "keras-torch": "#6d597a",
    "keras-jax": "#b56576",
    "torchrl": "#444444",
}
LEAST = 2**20  # bytes worth a bar: pages are what is counted
AXES = {"T": "time steps T", "B": "batch B", "H": "units H", "L": "layers L"}
SWEEPS = [f"sweep-{letter}" for letter in AXES]


def charts(results: Results) -> dict[str, tuple[list[Row], Draw]]:
    """The pictures that there are rows for: the end of their name, their rows, who draws them."""
    rows = [row for row in results.rows if "p50_us" in row]
    found = {
        "map": ([row for row in rows if row["group"] == "map"], heat_map),
        "scaling": ([row for row in rows if row["group"] in SWEEPS], curves),
        "memory": (
            [
                row
                for row in rows
                if row["mode"] == "train"
                and row["group"] in ("tasks", "users")
                and row.get("peak_bytes") is not None
            ],
            memory_bars,
        ),
    }
    return {name: (chosen, draw) for name, (chosen, draw) in found.items() if chosen}


def picture(results: Results, name: str) -> Path:
    """The file of a picture beside that of its results."""
    assert results.file is not None
    return results.file.with_name(f"{results.file.stem.removesuffix('-speed')}-{name}.svg")


def digest(rows: Sequence[Row]) -> str:
    """Of the numbers that are drawn."""
    return hashlib.sha256(json.dumps(list(rows), sort_keys=True).encode()).hexdigest()[:16]


def drawn_from(file: Path) -> str | None:
    """The digest in a picture; None if there is none."""
    if not file.exists():
        return None
    found = re.search(r"rows ([0-9a-f]{16})", file.read_text())
    return found[1] if found else None


def save(file: Path, rows: Sequence[Row], draw: Draw, results: Results) -> None:
    """Draws the picture."""
    matplotlib = extra("matplotlib")
    matplotlib.use("agg")  # a file, on machines without a screen too
    pyplot = extra("matplotlib.pyplot")
    with pyplot.rc_context({**STYLE, "svg.hashsalt": "fastlstm", "svg.fonttype": "none"}):
        figure = draw(pyplot, rows, caption(results))
        metadata = {"Date": None, "Description": f"rows {digest(rows)}"}
        figure.savefig(file, metadata=metadata)
        pyplot.close(figure)


def heat_map(pyplot: Any, rows: Sequence[Row], where: str) -> Any:
    """How many times as long the fastest peer takes, over H x B; red where it is faster."""
    colors = extra("matplotlib.colors")
    modes = [mode for mode in ("infer", "train") if any(row["mode"] == mode for row in rows)]
    figure, panels = pyplot.subplots(
        1, len(modes), figsize=(1 + 4.4 * len(modes), 4.6), squeeze=False, layout="constrained"
    )
    for panel, mode in zip(panels[0], modes, strict=True):
        cells = {}
        for group in groups(row for row in rows if row["mode"] == mode):
            if best := best_peer(group):
                _, H, _, _, B, _ = map(int, best["shape"].split(","))
                cells[H, B] = best
        heights = sorted({H for H, _ in cells})
        batches = sorted({B for _, B in cells})
        values = [
            [cells[H, B]["ratio"] if (H, B) in cells else float("nan") for B in batches]
            for H in heights
        ]
        norm = colors.TwoSlopeNorm(1, vmin=0.5, vmax=4)  # white where both are equally fast
        panel.imshow(values, norm=norm, cmap="RdBu", origin="lower", aspect="auto")
        for (H, B), row in cells.items():
            text = f"{row['ratio']:.2f}x\n{provider(row['provider']).label}"
            far = row["ratio"] > 3 or row["ratio"] < 0.65
            panel.text(
                batches.index(B),
                heights.index(H),
                text,
                ha="center",
                va="center",
                fontsize=6.5,
                color="white" if far else "black",
            )
        panel.set_xticks(range(len(batches)), batches)
        panel.set_yticks(range(len(heights)), heights)
        panel.grid(False)
        panel.set_xlabel("batch B")
        panel.set_title("inference" if mode == "infer" else "training")
    panels[0, 0].set_ylabel("units H (I = H, T = 32)")
    figure.suptitle("The fastest peer takes so many times as long as fastlstm", fontsize=11)
    figure.supxlabel(where, fontsize=8, color="#666666")
    return figure


def curves(pyplot: Any, rows: Sequence[Row], where: str) -> Any:
    """Microseconds a call over T, B, H and L, for everybody."""
    letters = [letter for letter in AXES if any(r["group"] == f"sweep-{letter}" for r in rows)]
    modes = [mode for mode in ("infer", "train") if any(row["mode"] == mode for row in rows)]
    figure, panels = pyplot.subplots(
        len(modes),
        len(letters),
        figsize=(3.3 * len(letters), 3.1 * len(modes) + 0.8),
        squeeze=False,
        layout="constrained",
    )
    for line, mode in zip(panels, modes, strict=True):
        for panel, letter in zip(line, letters, strict=True):
            chosen = [
                row
                for row in rows
                if row["group"] == f"sweep-{letter}" and row["mode"] in (mode, "step")
                if row["mode"] == mode or mode == "infer"
            ]
            lines: dict[str, list[tuple[float, float]]] = defaultdict(list)
            for row in chosen:
                lines[row["provider"]].append((float(row["case"].split("=")[1]), row["p50_us"]))
            for name, points in lines.items():
                x, y = zip(*sorted(points), strict=True)
                ours = name == OURS
                panel.plot(
                    x,
                    y,
                    "o-",
                    color=PALETTE.get(name, "#999999"),
                    linewidth=2.4 if ours else 1.2,
                    markersize=4 if ours else 2.5,
                    zorder=3 if ours else 2,
                    label=provider(name).label,
                )
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.set_xlabel(AXES[letter])
        line[0].set_ylabel(f"{'inference' if mode == 'infer' else 'training'}, µs a call")
    handles, labels = [], []
    for panel in panels.flat:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            if label not in labels:
                handles.append(handle)
                labels.append(label)
    figure.legend(handles, labels, loc="outside upper center", ncols=5, fontsize=8)
    figure.supxlabel(where, fontsize=8, color="#666666")
    return figure


def memory_bars(pyplot: Any, rows: Sequence[Row], where: str) -> Any:
    """What a training call takes at its peak, as a share of what nn.LSTM takes."""
    found = [g for g in groups(rows) if g.get("torch", {}).get("peak_bytes", 0) >= LEAST]
    names = [
        name
        for name in PALETTE
        if any(group.get(name, {}).get("peak_bytes") is not None for group in found)
    ]
    figure, panel = pyplot.subplots(figsize=(8, 1 + 0.42 * len(found)), layout="constrained")
    height = 0.8 / len(names)
    for number, name in enumerate(names):
        positions, values = [], []
        for place, group in enumerate(found):
            if group.get(name, {}).get("peak_bytes") is not None:
                positions.append(place + number * height)
                values.append(group[name]["peak_bytes"] / group["torch"]["peak_bytes"])
        panel.barh(positions, values, height, color=PALETTE[name], label=provider(name).label)
    cases = [
        f"{group['torch']['case']} ({group['torch']['peak_bytes'] / 2**20:.3g} MiB)"
        for group in found
    ]
    panel.set_yticks([place + 0.4 for place in range(len(found))], cases)
    panel.invert_yaxis()
    panel.axvline(1, color=COLORS["torch"], linewidth=1)
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_formatter("{x:g}")
    panel.set_xlabel("peak memory of a training call, nn.LSTM = 1 (its MiB in brackets)")
    panel.legend(fontsize=8)
    figure.supxlabel(where, fontsize=8, color="#666666")
    return figure
