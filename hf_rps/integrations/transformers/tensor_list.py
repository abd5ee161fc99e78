"""The list of a save's tensors, of which every weights file carries a digest: names, dtypes, shapes, some numbers.

Names and shapes in a damaged or edited header can fit a model and still be wrong: a tensor that nothing is called after
is left out, and two tensors of one shape may have exchanged their names. The digest tells, whatever class loads the
file. It reads the first and the last bytes of every tensor, so it costs a page or two of a file for each.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor

_ENDS = 64  # bytes at either end of a tensor


class Entry(NamedTuple):
    """A tensor as a header of safetensors has it, and the bytes at its ends, or None where they are not in memory."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    ends: bytes | None


def entries_of_state(state: dict[str, Tensor]) -> list[Entry]:
    """What a file of the tensors in ``state`` will have."""
    return [
        Entry(name, dtype_in_files(t.dtype), tuple(t.shape), None if t.is_meta else _ends_of(t))
        for name, t in state.items()
    ]


def entries_in_file(file: str) -> list[Entry]:
    """What a safetensors file has, which safetensors has accepted before."""
    with open(file, "rb") as reader:
        (length,) = struct.unpack("<Q", reader.read(8))
        header = json.loads(reader.read(length))
        header.pop("__metadata__", None)
        entries = []
        for name, found in header.items():
            start, stop = (8 + length + offset for offset in found["data_offsets"])
            ends = b""
            for first, last in ((start, min(stop, start + _ENDS)), (max(start, stop - _ENDS), stop)):
                reader.seek(first)
                ends += reader.read(last - first)
            entries.append(Entry(name, found["dtype"], tuple(found["shape"]), ends))
    return entries


def digest(entries: Iterable[Entry], kind: str | None = None) -> str:
    """Digest of ``entries`` in any order, after its ``kind``: "numbers", or "names" if some numbers are unknown."""
    entries = sorted(entries, key=lambda entry: entry.name)
    kind = kind or ("names" if any(entry.ends is None for entry in entries) else "numbers")
    found = hashlib.sha256()
    for name, dtype, shape, ends in entries:
        found.update(json.dumps([name, dtype, shape, ends.hex() if kind == "numbers" else ""]).encode())
    return f"{kind}-{found.hexdigest()[:32]}"


def fits(entries: Iterable[Entry], recorded: str | None) -> bool:
    """True where ``recorded`` is the digest of ``entries``."""
    kind = (recorded or "").partition("-")[0]
    return kind in ("names", "numbers") and digest(entries, kind) == recorded


def _ends_of(tensor: Tensor) -> bytes:
    flat = tensor.detach().reshape(-1)
    count = -(-_ENDS // tensor.element_size())
    head, tail = (bytes(part.cpu().view(torch.uint8).numpy()) for part in (flat[:count], flat[-count:]))
    return head[:_ENDS] + tail[-_ENDS:]


@cache
def dtype_in_files(dtype: torch.dtype) -> str:
    """What headers of safetensors call a dtype."""
    file = save({"x": torch.empty(0, dtype=dtype)})
    (length,) = struct.unpack("<Q", file[:8])
    return json.loads(file[8 : 8 + length])["x"]["dtype"]
