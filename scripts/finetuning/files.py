"""Files that are there whole or not at all: JSON files, folders, checkpoints; and the history of a run."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

logger = logging.getLogger(__name__)

COMPRESSED = "compressed"  # in the output folder: with a learned map, the model before the first step
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def write_json(path: Path, content: dict) -> None:
    """Write a file so that readers see all of it or nothing."""
    _write(path, json.dumps(content, indent=2) + "\n")


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    _flush(temporary)
    os.replace(temporary, path)


def save_folder(path: Path, save: Callable[[Path], None], main: bool = True, wait: Callable = lambda: None) -> None:
    """Let ``save`` fill a sibling folder and rename it to ``path``, which is thus never half a model.

    Args:
        path: The folder; replaced if it exists.
        save: Fills the folder that it is given.
        main: Whether this process renames; with many processes one does.
        wait: Waits for all processes.

    Raises:
        OSError: The folder that the main process made is not seen here.
    """
    temporary, old = path.with_name(path.name + ".tmp"), path.with_name(path.name + ".old")
    if main:
        for leftover in (temporary, old):
            shutil.rmtree(leftover, ignore_errors=True)
        temporary.mkdir(parents=True)
    wait()
    if not temporary.is_dir():
        raise OSError(
            f"{temporary} was made by the main process and is not there on this machine; all machines must share the "
            f"file system of --output_dir"
        )
    save(temporary)
    wait()  # else a file is flushed here that another process is about to rename
    for file in temporary.rglob("*"):
        if file.is_file():
            _flush(file)
    wait()
    if main:
        if path.exists():
            path.rename(old)
        temporary.rename(path)
        _flush(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    wait()


def _flush(path: Path) -> None:
    """Have the disk hold what was written, so that a rename is never there before its content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checkpoints(folder: Path) -> dict[int, Path]:
    """The whole checkpoints in ``folder`` by step, in order."""
    found = ((_CHECKPOINT.fullmatch(path.name), path) for path in folder.glob("checkpoint-*"))
    return dict(sorted((int(match[1]), path) for match, path in found if match))


def delete_checkpoints(folder: Path, keep: int, best: int | None) -> None:
    """Delete all but the newest ``keep`` checkpoints and the one of step ``best``."""
    found = checkpoints(folder)
    for step in list(found)[:-keep]:
        if step != best:
            # under another name first: a deletion that is cut short leaves no half checkpoint behind
            doomed = found[step].with_name(found[step].name + ".old")
            shutil.rmtree(doomed, ignore_errors=True)
            found[step].rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)


class History:
    """The rows of metrics.jsonl: append only, but for what came after the checkpoint from which a run is resumed."""

    def __init__(self, path: Path):
        self.path = path

    def append(self, row: dict) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps(row) + "\n")

    def rows(self) -> list[dict]:
        rows = []
        for line in self.path.read_text().splitlines() if self.path.exists() else []:
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                logger.warning("%s has a row that was cut short, and is left out", self.path.name)
        return rows

    def cut(self, count: int) -> None:
        """Keep the first ``count`` rows."""
        _write(self.path, "".join(json.dumps(row) + "\n" for row in self.rows()[:count]))
