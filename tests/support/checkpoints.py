"""Comparing, and spoiling, native checkpoints."""

import json

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file


def equal(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def edit_config(folder, **changes):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"].update(changes)
    file.write_text(json.dumps(config))


def rewrite(folder, change=lambda tensors: None, metadata=lambda metadata: None):
    """Write the weights file again with changed tensors or metadata."""
    file = folder / "model.safetensors"
    with safe_open(file, framework="pt") as reader:
        kept = reader.metadata()
    tensors = load_file(file)
    change(tensors)
    metadata(kept)
    save_file(tensors, file, metadata=kept)
