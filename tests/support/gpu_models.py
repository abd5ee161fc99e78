"""Small models and the device for the tests that only a GPU can decide."""

import copy
import os

import pytest
import torch
from transformers import GPT2Config, LlamaConfig

from hf_rps.conversion import find_bank

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


def check_compiled(model):
    """Inference and training under torch.compile equal those without."""
    batch, psi = ids().to(DEVICE), find_bank(model).psi
    compiled = torch.compile(model)
    with torch.no_grad():
        torch.testing.assert_close(compiled(batch).logits, model(batch).logits, rtol=1e-3, atol=1e-3)
    model(input_ids=batch, labels=batch).loss.backward()
    expected = psi.grad.clone()
    model.zero_grad()
    compiled(input_ids=batch, labels=batch).loss.backward()
    assert distance(psi.grad, expected) < 1e-3


def check_captured(model, tokens):
    """Inference in a CUDA graph: nothing in a pass waits for the device, and addresses stay."""
    batch = tokens.to(DEVICE)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            model(batch, use_cache=False)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = model(batch, use_cache=False).logits
    batch.copy_((tokens + 3) % 251)
    graph.replay()
    torch.testing.assert_close(captured, model(batch, use_cache=False).logits)
