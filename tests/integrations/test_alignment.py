"""What is loaded lies where it is read from, mapped from the file, and is not copied to be bit-equal."""

import json
import struct

import pytest
import torch
from checkpoints import equal
from tiny_configs import tiny_config
from transformers import BertForSequenceClassification, GPT2LMHeadModel, LlamaForCausalLM, ResNetConfig
from transformers import ResNetForImageClassification as ResNet

from hf_rps import RPSConfig, get_rps_model
from hf_rps.conversion import find_bank
from hf_rps.integrations.transformers.alignment import ALIGNMENT

RESNET = ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], num_labels=7, layer_type="basic")
MODELS = {
    "llama": lambda: LlamaForCausalLM(tiny_config("llama")),
    "bert": lambda: BertForSequenceClassification(tiny_config("bert", num_labels=3)),
    "gpt2": lambda: GPT2LMHeadModel(tiny_config("gpt2")),
    "resnet": lambda: ResNet(RESNET),
}


def misplaced(file, more=0):
    """Bytes of a file that lie at other addresses, if its header were ``more`` bytes longer."""
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__")
    places = [entry["data_offsets"] for entry in header.values()]
    return sum(end - start for start, end in places if (8 + length + more + start) % ALIGNMENT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shards", ["50GB", "20KB"])
@pytest.mark.parametrize("name", MODELS)
def test_as_many_bytes_as_can_lie_at_good_addresses(name, shards, dtype, tmp_path):
    model = get_rps_model(MODELS[name]().to(dtype), RPSConfig(ratio=0.3))
    model.save_pretrained(tmp_path, max_shard_size=shards)
    if shards == "50GB":
        paddings = [misplaced(tmp_path / "model.safetensors", more) for more in range(0, ALIGNMENT, 8)]
        assert paddings[0] == min(paddings) < max(paddings)
    loaded = type(model).from_pretrained(tmp_path)
    assert all(parameter.data_ptr() % ALIGNMENT == 0 for parameter in loaded.parameters())
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_the_array_is_mapped_and_not_copied(tmp_path, monkeypatch):
    model = get_rps_model(MODELS["llama"](), RPSConfig(ratio=0.3))
    model.save_pretrained(tmp_path)
    copied, clone = [], torch.Tensor.clone
    monkeypatch.setattr(torch.Tensor, "clone", lambda self, *args: (copied.append(self.numel()), clone(self, *args))[1])
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert sum(copied) < 0.01 * find_bank(loaded).weight_map.m
    monkeypatch.undo()
    ids = torch.arange(2, 12)[None]
    equal(loaded(ids).logits, model.eval()(ids).logits)
