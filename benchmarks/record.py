"""A file of results, one JSON line each, so that a benchmark that was stopped goes on where it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class Record:
    """Results on disk.

    Args:
        path: The file; its folder is made if it is not there. A last line that a kill cut short is dropped.

    Attributes:
        rows: All complete lines, also those of other settings.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        if lines and not lines[-1].endswith("\n"):
            lines.pop()
            path.write_text("".join(lines))
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def count(self, **values: object) -> int:
        """Return how many rows have all these values."""
        return sum(all(key in row and row[key] == values[key] for key in values) for row in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        """Append a row, on disk when this returns, and print it."""
        line = json.dumps(row)
        with self._path.open("a") as file:
            file.write(line + "\n")
        self.rows.append(row)
        print(line, flush=True)
