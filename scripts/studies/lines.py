"""Files of JSON lines that grow by a line per run, so that a study that was killed goes on where it was."""

from __future__ import annotations

import json
from pathlib import Path


def read(file: Path) -> list[dict]:
    """The records of ``file``, none where there is no such file.

    A line that a kill has cut short is left out, and ended, so that what is added does not join it.
    """
    if not file.exists():
        return []
    content = file.read_text()
    if content and not content.endswith("\n"):
        with file.open("a") as opened:
            opened.write("\n")
    records = []
    for line in content.splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def add(file: Path, record: dict) -> None:
    """Write one more."""
    with file.open("a") as opened:
        opened.write(json.dumps(record) + "\n")
