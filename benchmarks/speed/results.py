"""Files of results: the machine and the versions once, then a row a line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import BenchmarkError

Row = dict[str, Any]
FOLDER = Path(__file__).parents[1] / "results"
NEEDED = ("cpu", "threads", "torch", "commit", "date")  # of an environment
DIGITS = 5  # of a figure; no timing has more
# What tells one measurement from another.
JOB = (
    *("group", "case", "shape", "mode", "precision", "graph", "threads", "device"),
    "input_gradient",
)


class Results:
    """`environment` says what the rows were measured on; `file` is None where nothing is kept.

    Where there are many rows, `columns` name what all of them have: once in the file.
    """

    def __init__(
        self, file: Path | None, environment: Mapping[str, Any], columns: Sequence[str] = ()
    ) -> None:
        self.file = file
        self.environment = dict(environment)
        self.columns = columns
        self.rows: list[Row] = []

    def resume(self) -> None:
        """Takes over the rows of the file, if there is one.

        Raises BenchmarkError if they are of another machine, commit or version.
        """
        if self.file is None or not self.file.exists():
            return
        before = load(self.file)
        for name in before.environment.keys() | self.environment.keys():
            value, now = before.environment.get(name), self.environment.get(name)
            if name not in ("date", "machine", "missing") and now != value:
                raise BenchmarkError(
                    f"{self.file} has rows of {name} {value}, and this is {now}: start again with "
                    "--fresh, or name another file"
                )
        self.environment, self.rows = before.environment, before.rows

    def add(self, rows: Iterable[Row]) -> None:
        """Appends rows and writes the file; one that is killed leaves it whole."""
        self.rows += [{name: _rounded(value) for name, value in row.items()} for row in rows]
        if self.file is None:
            return
        part = self.file.with_suffix(".part")
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(self.text())
            part.replace(self.file)
        except OSError as error:
            raise BenchmarkError(f"{self.file} cannot be written: {error}") from error

    def text(self) -> str:
        """What is written: JSON, with one row a line."""
        columns = self.columns
        rows = ",\n".join(
            json.dumps([row[name] for name in columns] if columns else row) for row in self.rows
        )
        head = f'"environment": {json.dumps(self.environment, indent=1)}'
        if columns:
            head += f',\n"columns": {json.dumps(columns)}'
        return f'{{{head},\n"rows": [\n{rows}\n]}}\n'


def load(file: Path) -> Results:
    """What a file has; raises BenchmarkError where it is not one of ours."""
    try:
        found = json.loads(file.read_text())
        columns = found.get("columns", ())
        results = Results(file, found["environment"], columns)
        results.rows = [
            dict(zip(columns, row, strict=True)) if columns else dict(row.items())
            for row in found["rows"]
        ]
        absent = [name for name in NEEDED if name not in results.environment]
    except OSError as error:
        raise BenchmarkError(f"{file} cannot be read: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BenchmarkError(
            f"{file} is not a file of results: expected a JSON object with environment and rows"
        ) from error
    if absent:
        raise BenchmarkError(f"{file}: its environment says nothing of {', '.join(absent)}")
    return results


def key(row: Row) -> tuple[Any, ...]:
    """What a row is about; the rows of all providers in one measurement share it."""
    return tuple(row.get(name) or False for name in JOB)


def _rounded(value: Any) -> Any:
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value
