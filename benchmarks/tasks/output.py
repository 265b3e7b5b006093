"""What a training run leaves behind: a table, a JSON file and a picture of the curves."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from .plot import plot
from .record import LABELS, Record, speed_up

HEADER = (
    "task", "provider", "test loss", "accuracy", "exact", "steps", "time, s", "ms/step", "speed-up"
)  # fmt: skip
SCALING = ("processes", "samples/s", "efficiency")  # where there are several processes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options for what one command leaves behind."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to FILE")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw the curves to FILE, as PNG"
    )
    parser.add_argument(
        "--tensorboard", type=Path, metavar="DIR", help="write TensorBoard summaries below DIR"
    )


def finish(records: Sequence[Record], *, json_file: Path | None, plot_file: Path | None) -> None:
    """Prints the table; writes the files and says where they are."""
    print(f"\n{table(records)}\n")
    if json_file:
        write_json(records, json_file)
        print(f"results: {json_file}")
    if plot_file:
        plot(records, plot_file)
        print(f"curves:  {plot_file}")


def table(records: Sequence[Record]) -> str:
    """One row for each record.

    Loss, accuracy and exact rows are those of the test set after training; the time is that
    inside training steps, and the speed-up that over ``nn.LSTM`` in the same task. Of several
    processes also how many, samples per second of each and scaling efficiency.
    """
    scaled = any(record.processes > 1 for record in records)
    rows = [[*HEADER, *(SCALING if scaled else ())]]
    for record in records:
        gain = speed_up(record, records)
        row = [
            record.task,
            LABELS[record.provider],
            f"{record.loss:.5f}",
            f"{record.accuracy:.3%}",
            f"{record.exact:,} of {record.rows:,}",
            f"{record.steps:,}",
            f"{record.seconds:.1f}",
            f"{record.step_ms['p50']:.2f}",
            f"{gain:.2f}x" if gain else "",
        ]
        if scaled:
            row += [
                f"{record.processes}",
                f"{record.samples_per_second:,.0f}",
                f"{record.efficiency:.0%}" if record.efficiency else "",
            ]
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    lines.append("accuracy: images or bits that are right; exact: images or numbers all right")
    if scaled:
        lines.append(
            "samples/s: of each process; efficiency: ms/step of one process alone / processes / "
            "ms/step"
        )
    return "\n".join(lines)


def write_json(records: Sequence[Record], path: Path) -> None:
    """The records as a JSON list."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(record) for record in records], indent=1) + "\n")
