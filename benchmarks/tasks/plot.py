"""Draws what was learnt, over steps and over time, for all tasks and providers in one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import extra
from .record import LABELS, Record, speed_up

COLORS = {"fastlstm": "#d1495b", "torch": "#30638e"}
PANELS = (("training loss", "steps"), ("training loss", "s"), ("training accuracy", "s"))
STYLE = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titleweight": "bold",
    "font.size": 10,
    "grid.alpha": 0.3,
    "legend.frameon": False,
}


def plot(records: Sequence[Record], path: Path) -> None:
    """A column of panels for each task, as PNG: loss over steps, loss and accuracy over time."""
    matplotlib = extra("matplotlib")
    matplotlib.use("agg")  # a file, on machines without a screen too
    pyplot = extra("matplotlib.pyplot")
    tasks: dict[str, list[Record]] = {}
    for record in records:
        tasks.setdefault(record.task, []).append(record)
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(
            3, len(tasks), figsize=(1 + 3.6 * len(tasks), 8), squeeze=False, layout="constrained"
        )
        for column, (task, group) in zip(axes.T, tasks.items(), strict=True):
            # nn.LSTM first and wide: where the curves are equal, it shows on both sides of ours.
            for record in sorted(group, key=lambda record: record.provider, reverse=True):
                _draw(column, record)
            gains = [speed_up(r, group) for r in group if r.provider == "fastlstm"]
            column[0].set_title(f"{task}: {gains[0]:.1f}x" if gains and gains[0] else task)
            _scale(column)
        for panel, (label, _) in zip(axes[:, 0], PANELS, strict=True):
            panel.set_ylabel(label)
        axes[0, 0].legend(loc="lower left")
        figure.supxlabel(_caption(records[0]), fontsize=9, color="#666666", wrap=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=160)
        pyplot.close(figure)


def _draw(column: Any, record: Record) -> None:
    """One record's curves in its task's panels: the points pale, their running mean strong."""
    ours = record.provider == "fastlstm"
    color = COLORS[record.provider]
    steps = [point.step for point in record.curve]
    seconds = [point.seconds for point in record.curve]
    losses = [point.loss for point in record.curve]
    accuracies = [point.accuracy for point in record.curve]
    curves = ((steps, losses), (seconds, losses), (seconds, accuracies))
    for panel, (x, y) in zip(column, curves, strict=True):
        panel.plot(x, y, color=color, alpha=0.2, linewidth=1)
        panel.plot(
            x,
            _running_mean(y),
            color=color,
            linewidth=1.6 if ours else 3.6,
            alpha=1 if ours else 0.6,
            label=LABELS[record.provider],
        )
        panel.plot(x[-1], _running_mean(y)[-1], "o", color=color, markersize=5)
    column[2].annotate(
        f"{seconds[-1]:.1f} s",
        (seconds[-1], _running_mean(accuracies)[-1]),
        xytext=(0, 8),
        textcoords="offset points",
        ha="center",
        color=color,
        fontweight="bold",
    )


def _scale(column: Any) -> None:
    ticker = extra("matplotlib.ticker")
    for panel, (label, unit) in zip(column, PANELS, strict=True):
        panel.set_xlabel("training time, s" if unit == "s" else unit)
        panel.margins(x=0.1, y=0.15)
        panel.set_xlim(left=0)
        if label.endswith("loss"):
            panel.set_yscale("log")
            panel.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            panel.yaxis.set_major_formatter("{x:g}")
            panel.yaxis.set_minor_formatter("")
        else:
            panel.yaxis.set_major_formatter(ticker.PercentFormatter(1, decimals=0))


def _caption(record: Record) -> str:
    facts = record.environment
    threads = facts["threads"]
    processes = f"{record.processes} processes of " if record.processes > 1 else ""
    return (
        f"{facts.get('gpu') or facts['cpu']}, "
        f"{processes}{threads} thread{'s' if threads > 1 else ''}, "
        f"torch {facts['torch']}: same weights, batches and dropout for both"
    )


def _running_mean(values: Sequence[float], reach: int = 2) -> list[float]:
    """The mean of each value and of up to `reach` values on either side."""
    windows = [values[max(0, i - reach) : i + reach + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]
