"""Text that needs no network: sentences and code of Python's documentation and standard library, as JSON lines."""

from __future__ import annotations

import ast
import hashlib
import inspect
import io
import json
import re
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path

NOT_READ = {"site-packages", "dist-packages", "pydoc_data", "test", "tests", "idle_test"}  # suites are mostly literals
# texts of a split (None: all), and below which share of the hash's range its files lie
SPLITS = {"test": (5000, 0.13), "validation": (1000, 0.17), "train": (None, 1.0)}


def sentences(block: str) -> Iterator[tuple[str, str]]:
    """Natural sentences of a docstring, comment or message, and its paragraphs of more than one sentence."""
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(block)):
        if ">>>" in paragraph or "::=" in paragraph:
            continue
        parts = re.split(r"(?<=[.!?:;])\s+(?=[A-Z\"'(`*])", " ".join(paragraph.split()))
        for kind, texts in (("sentence", parts), ("paragraph", [" ".join(parts)] if len(parts) > 1 else [])):
            for text in (text.strip(" *#-=~_|") for text in texts):
                letters = re.sub(r"[^A-Za-z]", "", text)
                mostly = (
                    len(letters) >= 0.65 * len(text.replace(" ", "")),
                    sum(map(str.islower, letters)) >= 0.7 * len(letters),
                )
                if len(re.findall("[A-Za-z]{2,}", text)) >= 4 and all(mostly):
                    yield kind, text


def texts_of_source(source: str) -> Iterator[tuple[str, str]]:
    """Sentences of the strings (docstrings, messages) and comments of a Python file, and its statements in one line."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from sentences(node.value)
    lines, comment, comment_end, start, strings_only = source.splitlines(), [], 0, 0, True
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            if token.start[0] > comment_end + 1:
                yield from sentences("\n".join(comment))
                comment = []
            comment.append(token.string.lstrip("#! "))
            comment_end = token.start[0]
        elif token.type == tokenize.NEWLINE:
            if start and not strings_only:
                yield "code", " ".join(" ".join(lines[start - 1 : token.end[0]]).split())
            start, strings_only = 0, True
        elif token.type not in (tokenize.NL, tokenize.INDENT, tokenize.DEDENT):
            start, strings_only = start or token.start[0], strings_only and token.type == tokenize.STRING
    yield from sentences("\n".join(comment))


def documents() -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Name and texts of each topic of Python's documentation and each file of its standard library."""
    from pydoc_data.topics import topics

    for name, text in topics.items():
        yield f"topics/{name}", list(sentences(text))
    root = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(root.rglob("*.py")):
        path = file.relative_to(root)
        if NOT_READ.isdisjoint(path.parts):
            try:
                with tokenize.open(file) as stream, warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of escapes in old sources
                    texts = list(texts_of_source(stream.read()))
            except (SyntaxError, UnicodeDecodeError):  # a fixture that is meant to be wrong
                continue
            yield path.as_posix(), texts


def order(text: str) -> int:
    """A fixed shuffle."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def write_corpus(folder: Path) -> None:
    """train.jsonl, validation.jsonl and test.jsonl of {"text", "kind"}: each file or topic is in one split only."""
    found = list(documents())
    folder.mkdir(parents=True, exist_ok=True)
    seen = set()
    for split, (size, share) in SPLITS.items():
        kinds = {"sentence": [], "paragraph": [], "code": []}
        here = [texts for name, texts in found if order(name) < share * 2**64]
        found = [(name, texts) for name, texts in found if order(name) >= share * 2**64]
        for kind, text in (pair for texts in here for pair in texts):
            key = re.sub(r"[\d\W]+", " ", text.lower()).strip()
            if 16 <= len(text) <= 400 and key not in seen:
                seen.add(key)
                kinds[kind].append(text)
        if size:  # what is judged on is four fifths natural language
            kinds.pop("paragraph")
            cut = {"sentence": size * 4 // 5, "code": size // 5}
            kinds = {kind: sorted(texts, key=order)[: cut[kind]] for kind, texts in kinds.items()}
        rows = [{"text": text, "kind": kind} for kind, texts in kinds.items() for text in texts]
        rows.sort(key=lambda row: order(row["text"]))
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
