"""Where tensors lie: at addresses from which a matrix product reads alike, in memory and already in the file.

The last bit of a CPU matrix product depends on the address that it reads from, and reloaded outputs must be bit-equal.
safetensors maps a file into memory, so a tensor's address is its place in the file. The header before the data is
padded so that the most bytes lie at good addresses; what does not is copied after loading.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from hf_rps.integrations.transformers.tensor_list import dtype_in_files

ALIGNMENT = 64  # bytes: that of torch's own memory, and of a cache line
_STEP = 8  # bytes: safetensors pads a header to a multiple of it
PADDING = "rps_padding"  # the entry of a file's metadata that holds the padding


def align(model: nn.Module) -> None:
    """Move CPU parameters that lie at other addresses to memory of torch's own, one by one."""
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter.data_ptr() % ALIGNMENT:
            parameter.data = parameter.data.clone()


def padding(state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """The metadata entry with which most bytes of the file that ``state`` is written to lie at good addresses.

    Of a model in several files, whose metadata are the same, what lies elsewhere is copied after loading.

    Args:
        state: What is written, without copies of tied tensors.
        metadata: The rest of the file's metadata.
    """
    layout = _layout(state.items())
    bad = {length: _misplaced(layout, {**metadata, PADDING: " " * length}) for length in range(0, ALIGNMENT, _STEP)}
    return " " * min(bad, key=bad.get)


def _layout(tensors: Iterable[tuple[str, Tensor]]) -> list[tuple[str, str, Tensor, int]]:
    """(name, safetensors' name of the dtype, tensor, offset in the data) in the order in which safetensors writes."""
    ordered, offset, found = sorted(tensors, key=lambda pair: (-pair[1].element_size(), pair[0])), 0, []
    for name, tensor in ordered:
        found.append((name, dtype_in_files(tensor.dtype), tensor, offset))
        offset += tensor.numel() * tensor.element_size()
    return found


def _misplaced(layout: list[tuple[str, str, Tensor, int]], metadata: Mapping[str, str]) -> int:
    """Bytes of a file that lie at other addresses."""
    header: dict = {"__metadata__": {**metadata, "format": "pt"}}
    for name, dtype, tensor, offset in layout:
        size = tensor.numel() * tensor.element_size()
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [offset, offset + size]}
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    start = 8 + (length + _STEP - 1) // _STEP * _STEP
    sizes = ((tensor.numel() * tensor.element_size(), offset) for _, _, tensor, offset in layout)
    return sum(size for size, offset in sizes if (start + offset) % ALIGNMENT)
