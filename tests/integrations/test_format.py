"""Checkpoints of the present format, stored in the repository, still load and still compute what they computed.

They were written once, by the first version of format 2, and are never written again: a change of the library that
can't read them, or reads them otherwise, is a change of format.
"""

import pytest
import torch
import transformers
from paths import FIXTURES
from peft import PeftModel
from safetensors.torch import load_file

from hf_rps.conversion import find_bank

FOLDER = FIXTURES / "format_2"
IDS = torch.arange(16).view(2, 8) * 5 % 61
IMAGES = torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)
CLASSES = {
    "bert": transformers.BertForSequenceClassification,
    "llama-block-element": transformers.LlamaForCausalLM,
    "gpt2-hash": transformers.GPT2LMHeadModel,
    "gpt2-roast": transformers.GPT2LMHeadModel,
    "resnet": transformers.ResNetForImageClassification,
}


def close_to_recorded(logits, folder):
    torch.testing.assert_close(logits, load_file(folder / "expected.safetensors")["logits"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CLASSES)
@torch.no_grad()
def test_native_checkpoint(name):
    model = CLASSES[name].from_pretrained(FOLDER / name)
    assert find_bank(model) is not None
    logits = model(pixel_values=IMAGES).logits if name == "resnet" else model(IDS).logits
    close_to_recorded(logits, FOLDER / name)


@pytest.mark.parametrize("mode", ["delta", "replace"])
@torch.no_grad()
def test_adapter(mode):
    base = transformers.GPT2LMHeadModel.from_pretrained(FOLDER / "adapter-base")
    model = PeftModel.from_pretrained(base, FOLDER / f"adapter-{mode}").eval()
    close_to_recorded(model(input_ids=IDS).logits, FOLDER / f"adapter-{mode}")
