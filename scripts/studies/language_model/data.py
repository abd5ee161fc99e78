"""Texts that need no network, as blocks of tokens, and a small multiple-choice task made from them.

The documentation is Python's own (``pydoc_data.topics``), split by topic: every third topic is held out. What is
trained on is the rest of it and the docstrings of the standard library. The other kind of text, which nothing is
trained on, is Debian's `fortunes`; where that is not installed, Python's licence and its Zen. What is fine-tuned on is
the standard library's code, split by file.
"""

from __future__ import annotations

import ast
import codecs
import contextlib
import io
import os
import random
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from studies.corpus import NOT_READ, order

FORTUNES = ("computers", "law", "literature", "science", "songs-poems", "wisdom")
MOST_CHARACTERS = 2_000_000  # of docstrings, and of code: more than the longest run reads
CHOICES, CONTEXT, CONTINUATION = 200, 24, 12  # items; tokens
BLOCK, TRAINED_BLOCK = 256, 128  # tokens of a sequence that is judged, or trained on


@dataclass(frozen=True)
class Choice:
    """Which of four continuations belongs to a context. Token ids; the first continuation is the right one."""

    context: list[int]
    continuations: list[list[int]]


@dataclass(frozen=True)
class Texts:
    """Token ids: int64 (blocks, tokens).

    Attributes:
        calibration: What maps are learned on, 8,192 tokens of documentation.
        train: What is distilled on, in the order of a shuffle.
        validation: What learning rates are chosen by: documentation of held-out topics.
        held_out: What is judged by: documentation of held-out topics.
        other: Another kind of text, named by ``other_name``.
        choices: Made from held-out topics.
        code, code_validation, code_held_out: The standard library's, split by file.
    """

    calibration: Tensor
    train: Tensor
    validation: Tensor
    held_out: Tensor
    other: Tensor
    other_name: str
    choices: list[Choice]
    code: Tensor
    code_validation: Tensor
    code_held_out: Tensor


def load(tokenizer, fortunes: Path) -> Texts:
    """All texts of the study in the tokens of ``tokenizer``.

    Args:
        tokenizer: Of the model.
        fortunes: Folder of Debian's sayings; where there is none, another text is taken.
    """
    from pydoc_data.topics import topics

    def tokens(text: str) -> Tensor:
        return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64)

    names = sorted(topics)
    judged = [tokens(topics[name]) for i, name in enumerate(names) if i % 3 == 0]
    held_out = tokens("\n".join(topics[name] for i, name in enumerate(names) if i % 3 == 0))
    learned = tokens("\n".join(topics[name] for i, name in enumerate(names) if i % 3 != 0))
    calibration, train = blocks(learned, BLOCK, 32), learned[32 * BLOCK :]
    train = torch.cat([train, tokens("\n\n".join(_up_to(MOST_CHARACTERS, docstrings())))])
    other, other_name = other_text(fortunes)
    code, code_held_out = ("\n".join(_up_to(MOST_CHARACTERS, sources(held_out=held))) for held in (False, True))
    code_held_out = blocks(tokens(code_held_out[:400_000]), BLOCK, 48)
    return Texts(
        calibration=calibration,
        train=shuffled(blocks(train, TRAINED_BLOCK)),
        validation=blocks(held_out, BLOCK, 80)[64:],
        held_out=blocks(held_out, BLOCK, 64),
        other=blocks(tokens(other), BLOCK, 32),
        other_name=other_name,
        choices=make_choices(judged),
        code=shuffled(blocks(tokens(code), TRAINED_BLOCK)),
        code_validation=code_held_out[32:],
        code_held_out=code_held_out[:32],
    )


def write(file: Path, content: Texts | Tensor) -> None:
    """Keep it in a file, whole or not at all: other processes may read it."""
    whole = file.with_suffix(f".{os.getpid()}")
    torch.save(content, whole)
    whole.replace(file)


def read(file: Path) -> Texts:
    """Texts that :func:`write` wrote."""
    with torch.serialization.safe_globals([Texts, Choice]):
        return torch.load(file)


def blocks(tokens: Tensor, length: int, count: int | None = None) -> Tensor:
    """The first ``count`` (None: all) whole blocks of ``length`` of ``tokens`` (n,): (count, length)."""
    count = len(tokens) // length if count is None else min(count, len(tokens) // length)
    return tokens[: count * length].view(count, length)


def shuffled(rows: Tensor, seed: int = 0) -> Tensor:
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]


def batches(rows: Tensor, size: int, steps: int, seed: int = 0) -> Tensor:
    """Batches of ``rows`` (n, tokens), pass after pass, each in an order of its own: (steps, size, tokens)."""
    passes = -(-steps * size // len(rows))
    orders = [torch.arange(len(rows))] if seed == 0 else []  # the rows come shuffled
    random_ = torch.Generator().manual_seed(seed)
    orders += [torch.randperm(len(rows), generator=random_) for _ in range(passes - len(orders))]
    return rows[torch.cat(orders)[: steps * size]].view(steps, size, -1)


def make_choices(topics: list[Tensor], count: int = CHOICES, seed: int = 0) -> list[Choice]:
    """Items of ``CONTEXT`` tokens of one topic, what follows there, and three passages as long of other topics."""
    draw, needed = random.Random(seed), CONTEXT + CONTINUATION
    topics = [topic for topic in topics if len(topic) > needed]
    if len(topics) < 4:
        raise ValueError(f"choices are made of at least 4 topics of more than {needed} tokens, got {len(topics)}")
    items = []
    for _ in range(count):
        chosen = draw.sample(topics, 4)
        places = [draw.randrange(len(topic) - needed) for topic in chosen]
        ends = [topic[at + CONTEXT : at + needed].tolist() for topic, at in zip(chosen, places, strict=True)]
        items.append(Choice(chosen[0][places[0] : places[0] + CONTEXT].tolist(), ends))
    return items


def other_text(fortunes: Path) -> tuple[str, str]:
    """Text that is no documentation, and its name."""
    if fortunes.is_dir():
        entries = [entry for name in FORTUNES for entry in (fortunes / name).read_text().split("\n%\n")]
        return "\n\n".join(sorted(entries, key=order)), "sayings of Debian's fortunes"
    import this

    licence = Path(sysconfig.get_paths()["stdlib"]) / "LICENSE.txt"
    text = licence.read_text() if licence.is_file() else ""
    return f"{codecs.decode(this.s, 'rot13')}\n{text}", "Python's licence and Zen"


def sources(held_out: bool) -> Iterator[str]:
    """The standard library's Python files, in a fixed order: an eighth of them, or the others."""
    for text in _files():
        if (order(text) % 8 == 0) == held_out:
            yield text


def docstrings() -> Iterator[str]:
    """Docstrings of the standard library of at least 200 characters, each once."""
    seen = set()
    for text in _files():
        with contextlib.suppress(SyntaxError), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in old sources
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                    found = ast.get_docstring(node)
                    if found and len(found) >= 200 and found not in seen:
                        seen.add(found)
                        yield found


def _files() -> Iterator[str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [file for file in root.rglob("*.py") if NOT_READ.isdisjoint(file.relative_to(root).parts)]
    for file in sorted(files, key=lambda file: order(file.relative_to(root).as_posix())):
        with contextlib.suppress(SyntaxError, UnicodeDecodeError), tokenize.open(file) as stream:
            text = stream.read()
            if len(text) > 1000:
                yield text


def _up_to(characters: int, texts: Iterator[str]) -> Iterator[str]:
    with io.StringIO() as written:
        for text in texts:
            if written.tell() > characters:
                return
            written.write(text)
            yield text
