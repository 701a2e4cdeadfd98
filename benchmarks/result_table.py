"""Files of results, written as they come: a table as CSV, and as JSON where its numbers come from."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.command import Command
from benchmarks.host import busy_note
from benchmarks.provenance import provenance


class ResultTable:
    """A benchmark's `<name>.csv` and `<name>.json`; an interrupted run keeps the rows that it has.

    Args:
        command: whose folder is written to.
        name: of the benchmark.
        columns: of the table; a row may leave some out.
        measured: what else to say in the JSON, or better than `provenance` does.
    """

    def __init__(self, command: Command, name: str, columns: Iterable[str], **measured: Any) -> None:
        command.folder.mkdir(parents=True, exist_ok=True)
        self.csv = command.folder / f"{name}.csv"
        origin = provenance(command.device) | {"size": command.size} | measured
        if command.device.type == "cpu" and (note := busy_note(origin["load_before"])):
            print(note, file=sys.stderr)
        self.csv.with_suffix(".json").write_text(json.dumps(origin, indent=2) + "\n")
        self.rows: list[dict[str, str]] = []
        self._file = self.csv.open("w", newline="")
        self._columns = list(columns)
        self._writer = csv.DictWriter(self._file, self._columns, lineterminator="\n")
        self._writer.writeheader()

    def __enter__(self) -> ResultTable:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        print(f"\nwrote {self.csv} and .json")

    def add(self, **row: Any) -> None:
        """Writes one row."""
        self._writer.writerow(row)
        self._file.flush()
        self.rows.append({name: "" if row.get(name) is None else str(row[name]) for name in self._columns})


def read(file: Path) -> tuple[list[dict[str, str]], dict[str, Any]]:
    """The rows of a table and where they come from."""
    with file.open() as rows:
        return list(csv.DictReader(rows)), json.loads(file.with_suffix(".json").read_text())
