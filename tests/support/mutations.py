"""Seeded mutations of saved checkpoints: of their JSON files, of safetensors headers, and of the set of their files."""

from __future__ import annotations

import copy
import itertools
import json
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

Apply = Callable[[Path], None]

_OTHER_TYPES = (None, True, False, 0, -1, 10**9, 10**400, 0.5, 1e300, float("inf"), float("nan"), -3.5, "", "x", [],
                ["x"], [None], {}, {"a": [1]}, [[{}]])  # fmt: skip


@dataclass(frozen=True)
class Mutation:
    """One change of the files in a folder.

    Attributes:
        name: Says what is changed, and is the same in every run.
        apply: Makes the change in the folder that it is given.
        field: The path of the changed field, of a JSON file that is edited, with dots.
    """

    name: str
    apply: Apply
    field: str = ""


# ---- JSON files


def _fields(value, path=()) -> Iterator[tuple]:
    """Paths of all fields of a JSON object, also of objects inside lists and objects."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        if isinstance(value, dict):
            yield (*path, key)
        if isinstance(inner, dict) or (isinstance(inner, list) and inner and isinstance(inner[0], dict)):
            yield from _fields(inner, (*path, key))


def _at(value, path: tuple):
    for key in path:
        value = value[key]
    return value


def _renamed(text: str, rng: random.Random) -> str:
    i = rng.randrange(len(text)) if text else 0
    return text[:i] + chr(ord(text[i]) ^ 1 if text else 97) + text[i + 1 :]


def _others(value, rng: random.Random) -> list:
    """Other values of the same type."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value * 2, value + 1, value - 1, 0, -value, value // 2]
    if isinstance(value, float):
        return [value * 2, value / 2, value * (1 + 2**-50), 0.0, -value]
    if isinstance(value, str):
        return [_renamed(value, rng), value + "x", value.upper()]
    if isinstance(value, list) and value:
        return [_changed_list(value, rng) for _ in range(6)]
    return []


def _changed_list(values: list, rng: random.Random) -> list:
    """One entry is gone, twice there, in another place, or changed."""
    values, i, j = list(values), rng.randrange(len(values)), rng.randrange(len(values))
    how = rng.choice(["drop", "repeat", "exchange", "edit", "edit", "last digit", "shape"])
    if how == "drop":
        del values[i]
    elif how == "repeat":
        values.insert(j, values[i])
    elif how == "exchange":
        values[i], values[j] = values[j], values[i]
    elif not isinstance(values[i], str):
        values[i] = rng.choice([None, "x", *_others(values[i], rng)])
    elif how == "last digit":
        values[i] = values[i][:-1] + str((int(values[i][-1]) + 1) % 10) if values[i][-1:].isdigit() else "x"
    elif how == "shape":
        words = values[i].split(" ")
        words[1:2] = ["x".join(reversed(word.split("x"))) for word in words[1:2]]
        values[i] = " ".join(words)
    else:
        values[i] = _renamed(values[i], rng)
    return values


def json_mutations(file: Path, rng: random.Random, count: int, under: tuple = (), outside: tuple = ()) -> list:
    """``count`` changes of one field each, below the path ``under`` of a JSON file, none of them below ``outside``.

    Sizes of the model itself never get huge: it would be built.
    """
    whole = json.loads(file.read_text())
    paths = [path for path in _fields(_at(whole, under), under) if not outside or path[: len(outside)] != outside]
    return [_json_mutation(file.name, whole, paths, rng, i, safe=not outside) for i in range(count)]


def _json_mutation(name: str, whole: dict, paths: list[tuple], rng: random.Random, index: int, safe: bool) -> Mutation:
    path = paths[index] if index < len(paths) else rng.choice(paths)  # every field once, then any
    old = _at(whole, path)
    changed = copy.deepcopy(whole)
    parent = _at(changed, path[:-1])
    how = rng.choice(["type", "type", "value", "value", "value", "gone", "unknown"])
    others = [value for value in _others(old, rng) if value != old]
    if how == "value" and others:
        parent[path[-1]] = rng.choice(others)
    elif how == "gone":
        del parent[path[-1]]
    elif how == "unknown":
        parent[_renamed(path[-1], rng)] = parent.pop(path[-1])
    else:
        parent[path[-1]] = rng.choice([v for v in _OTHER_TYPES if type(v) is not type(old) and (v != 10**9 or safe)])
    what = ".".join(map(str, path))
    new = {key: value for key, value in parent.items() if key not in _at(whole, path[:-1])} or parent.get(path[-1], "-")
    text = json.dumps(changed)
    return Mutation(f"{name}: {what} {how} {str(new)[:90]}", lambda folder: _write(folder / name, text), what)


def _write(file: Path, text: str) -> None:
    file.write_text(text)


# ---- safetensors files


def read_raw(file: Path) -> tuple[dict, bytes]:
    """Header and data of a safetensors file."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_raw(file: Path, header: dict, data: bytes) -> None:
    """A safetensors file of this header, whatever it says."""
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def flip(file: Path, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(bytes(content))


_SAME_SIZE = {"F32": ("I32", "U32"), "F16": ("BF16", "I16"), "BF16": ("F16", "I16"), "I64": ("F64", "U64")}


def _rename(header, data, names, rng):
    name = rng.choice(names)
    header[_renamed(name, rng)] = header.pop(name)
    return data


def _exchange(header, data, names, rng):
    """Two tensors of one shape exchange their names."""
    like = [[b for b in names if b != a and _form(header[a]) == _form(header[b])] for a in names]
    a = rng.choice([name for name, others in zip(names, like, strict=True) if others] or names)
    b = rng.choice(like[names.index(a)] or names)
    header[a], header[b] = header[b], header[a]
    return data


def _form(entry: dict) -> tuple:
    return entry["dtype"], entry["shape"]


def _retype(header, data, names, rng):
    entry = header[rng.choice(names)]
    entry["dtype"] = rng.choice(_SAME_SIZE.get(entry["dtype"], ("F8_E4M3",)))
    return data


def _reshape(header, data, names, rng):
    entry = header[rng.choice(names)]
    entry["shape"] = rng.choice([entry["shape"][::-1], [*entry["shape"], 1], [1, *entry["shape"]]])
    return data


def _append(header, data, names, rng):
    header["extra.weight"] = {"dtype": "F32", "shape": [2], "data_offsets": [len(data), len(data) + 8]}
    return data + bytes(8)


def _remove(header, data, names, rng):
    """The last tensor is gone, or an empty one, so that the file is whole without it."""
    empty = [n for n in names if len(set(header[n]["data_offsets"])) == 1]
    name = rng.choice([max(names, key=lambda n: header[n]["data_offsets"][1]), *empty])
    start, _ = header.pop(name)["data_offsets"]
    return data[:start] if name not in empty else data


def _metadata(header, data, names, rng):
    entries = header.get("__metadata__") or {"format": "pt"}
    key = rng.choice([*entries])
    how = rng.choice(["value", "gone", "new"])
    if how == "gone":
        entries.pop(key)
    else:
        entries[key if how == "value" else "new"] = _renamed(entries[key], rng)
    header["__metadata__"] = entries
    return data


_EDITS = {"a name": _rename, "names exchanged": _exchange, "a dtype": _retype, "a shape": _reshape,
          "a tensor more": _append, "a tensor less": _remove, "metadata": _metadata}  # fmt: skip


def header_mutations(folder: Path, rng: random.Random, count: int) -> list[Mutation]:
    """Flipped bits in the headers of safetensors files, edits of what they say, and files that are cut short."""
    files = sorted(folder.rglob("*.safetensors"))
    return [_header_mutation(rng.choice(files).relative_to(folder), folder, rng, i) for i in range(count)]


def _header_mutation(name: Path, folder: Path, rng: random.Random, index: int) -> Mutation:
    content = (folder / name).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    kinds = [*_EDITS, "bit", "bit", "bit", "bit", "length", "cut"]
    how, seed = kinds[index] if index < len(kinds) else rng.choice(kinds), rng.random()
    if how == "cut":
        keep = rng.randrange(len(content))
        return Mutation(f"{name}: cut at {keep}", lambda where: _cut(where / name, keep))
    if how in ("bit", "length"):
        bit = rng.randrange(64) if how == "length" else 64 + rng.randrange(8 * length)
        around = content[max(8, bit // 8 - 12) : bit // 8 + 12]
        return Mutation(f"{name}: bit {bit} of {around!r}", lambda where: flip(where / name, bit))

    def apply(where: Path) -> None:
        header, data = read_raw(where / name)
        data = _EDITS[how](header, data, [key for key in header if key != "__metadata__"], random.Random(seed))
        write_raw(where / name, header, data)

    return Mutation(f"{name}: {how} ({seed:.4f})", apply)


def _cut(file: Path, keep: int) -> None:
    file.write_bytes(file.read_bytes()[:keep])


# ---- the set of files


def file_mutations(folder: Path, other: Path) -> list[Mutation]:
    """Files missing, exchanged with each other, or taken from the ``other`` save of the same model."""
    files = sorted(file.relative_to(folder) for file in folder.rglob("*.*") if file.suffix in (".json", ".safetensors"))
    files = [file for file in files if file.name != "generation_config.json"]
    found = []
    for file in files:
        if file.name != "config.json":  # without it transformers builds a model of the default size, of billions
            found.append(Mutation(f"{file} is missing", lambda where, file=file: (where / file).unlink()))
        if (other / file).exists():
            found.append(Mutation(f"{file} of another save", lambda w, file=file: shutil.copy(other / file, w / file)))
    weights = [file for file in files if file.suffix == ".safetensors"]
    for a, b in itertools.pairwise(weights):
        found.append(Mutation(f"{a} and {b} exchanged", lambda where, a=a, b=b: _swap(where / a, where / b)))
        found.append(Mutation(f"{b} is {a}", lambda where, a=a, b=b: shutil.copy(where / a, where / b)))
    return found


def _swap(a: Path, b: Path) -> None:
    content = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(content)
