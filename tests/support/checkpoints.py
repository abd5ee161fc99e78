"""Comparing, and spoiling, native checkpoints."""

import json

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hf_rps.integrations.transformers.tensor_list import digest, entries_of_state


def equal(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def edit_config(folder, **changes):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"].update(changes)
    file.write_text(json.dumps(config))


def rewrite(folder, change=lambda tensors: None, metadata=lambda metadata: None, listed=False):
    """Write the weights file again with changed tensors or metadata; ``listed``: as if they had been saved so."""
    file = folder / "model.safetensors"
    with safe_open(file, framework="pt") as reader:
        kept = reader.metadata()
    tensors = load_file(file)
    change(tensors)
    if listed:
        kept |= {"rps_tensors": str(len(tensors)), "rps_list": digest(entries_of_state(tensors))}
    metadata(kept)
    save_file(tensors, file, metadata=kept)
