"""What the studies' tables have in common, and where tables, rows and plots go: a folder, and docs/comparison.md."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean as mean
from statistics import stdev

from studies.comparison.tasks import TASKS

logger = logging.getLogger("compare")
PAGE = Path(__file__).resolve().parents[3] / "docs" / "comparison.md"
OPTIMIZERS = {"sgd": "SGD", "adamw": "AdamW"}

Table = Callable[[list[dict]], str]
Plot = Callable[[list[dict], Path], None]


def spread(scores: Sequence[float]) -> float:
    """Standard deviation over the seeds; 0 for one."""
    return stdev(scores) if len(scores) > 1 else 0.0


def percent(task: str, scores: Sequence[float]) -> list[float]:
    return [100 * score for score in scores] if TASKS[task].percent else list(scores)


def score_text(task: str, scores: Sequence[float], bold: bool = False) -> str:
    """Mean and deviation over the seeds."""
    scores, digits = percent(task, scores), 1 if TASKS[task].percent else 3
    text = f"{mean(scores):.{digits}f}" + (f" ± {spread(scores):.{digits}f}" if len(scores) > 1 else "")
    return f"**{text}**" if bold else text


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def unit(task: str) -> str:
    return f"{TASKS[task].score}{', %' if TASKS[task].percent else ''}"


class Results:
    """Writes tables, rows and plots to a folder and, if asked, into the page of the documentation."""

    def __init__(self, folder: Path, docs: bool):
        self.folder, self.docs = folder, docs

    def table(self, name: str, text: str) -> None:
        (self.folder / f"{name}.md").write_text(text)
        print(f"\n{text}", flush=True)
        if self.docs and not fill(PAGE, name, text):
            logger.warning("%s has no place for %r", PAGE.name, name)

    def write(self, name: str, rows: list[dict], table: Table, plot: Plot | None = None) -> None:
        """NAME.jsonl, NAME.md and, with ``plot``, NAME.png."""
        path = self.folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self._keep(path)
        self.table(name, table(rows))
        if plot is not None:
            path = path.with_suffix(".png")
            plot(rows, path)
            self._keep(path)

    def _keep(self, path: Path) -> None:
        if self.docs:
            (PAGE.parent / "comparison").mkdir(exist_ok=True)
            shutil.copyfile(path, PAGE.parent / "comparison" / path.name)


def fill(page: Path, name: str, content: str) -> bool:
    """Put ``content`` between the lines ``<!-- NAME -->`` and ``<!-- end -->``; False if ``page`` has no such lines."""
    text = page.read_text()
    pattern = rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)"
    new, count = re.subn(pattern, lambda match: match[1] + content.rstrip("\n") + "\n" + match[2], text, flags=re.S)
    if count and new != text:
        page.write_text(new)
    return bool(count)
