"""Small models and the device for the tests that only a GPU can decide."""

import copy
import os

import pytest
import torch
from transformers import GPT2Config, LlamaConfig

DEVICE = os.environ.get("HF_RPS_TEST_DEVICE", "cuda")
only_cuda = pytest.mark.skipif(DEVICE != "cuda", reason="needs CUDA itself")

CONFIGS = {
    "gpt2": GPT2Config(
        n_embd=128, n_layer=2, n_head=4, vocab_size=256, n_positions=128, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
        bos_token_id=1, eos_token_id=1,
    ),
    "llama": LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=256, max_position_embeddings=128, pad_token_id=0,
    ),
}  # fmt: skip


@pytest.fixture
def exact_products():
    """Float32 products in float32, as on the CPU."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def ids(batch=2, tokens=24):
    return (torch.arange(batch * tokens) * 7 % 251).view(batch, tokens)


def loss_and_gradients(model, device, **forward):
    model = copy.deepcopy(model).to(device)
    loss = model(input_ids=ids().to(device), labels=ids().to(device), **forward).loss
    loss.backward()
    return loss.item(), {name: p.grad.float().cpu() for name, p in model.named_parameters() if p.grad is not None}


def distance(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)).item()
