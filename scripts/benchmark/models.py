"""The dense models: stacks of linear layers, language models and a convolutional network, all randomly initialised."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    ResNetConfig,
    ResNetForImageClassification,
)

from benchmark.settings import Settings

LLAMA_1B_LAYERS, LLAMA_1B_VOCABULARY = 16, 128256


@dataclass(frozen=True)
class Shape:
    """The linear layers of a transformer: ``blocks`` blocks of width ``hidden``.

    Attributes:
        kv: Width of keys and values.
        inner: Width inside the MLP.
        bias: Whether layers have biases.
        joint: Queries, keys and values come from one layer, as in GPT-2.
        gated: The MLP has a gate, as in Llama.
    """

    blocks: int
    hidden: int
    kv: int
    inner: int
    bias: bool = True
    joint: bool = False
    gated: bool = False


STACKS = {
    "tiny": Shape(4, 64, 64, 256),
    "bert": Shape(12, 768, 768, 3072),
    "gpt2": Shape(12, 768, 768, 3072, joint=True),
    "llama-1b": Shape(LLAMA_1B_LAYERS, 2048, 512, 8192, bias=False, gated=True),
}
LANGUAGE_MODELS = ("tiny", "gpt2", "llama-97m", "llama-1b")
CONVOLUTIONAL = ("tiny", "resnet-18")


class Block(nn.Module):
    """The linear layers of one block, joined by as little else as keeps the numbers finite.

    Input and output (tokens, hidden). Queries, keys and values are added up instead of attended with; where keys are
    narrower than queries (grouped-query attention), they and the values are repeated to the full width.
    """

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape, hidden = shape, shape.hidden
        if shape.joint:
            self.qkv = nn.Linear(hidden, hidden + 2 * shape.kv, shape.bias)
        else:
            self.query = nn.Linear(hidden, hidden, shape.bias)
            self.key, self.value = (nn.Linear(hidden, shape.kv, shape.bias) for _ in range(2))
        self.output = nn.Linear(hidden, hidden, shape.bias)
        if shape.gated:
            self.gate = nn.Linear(hidden, shape.inner, shape.bias)
        self.up, self.down = nn.Linear(hidden, shape.inner, shape.bias), nn.Linear(shape.inner, hidden, shape.bias)

    def forward(self, x: Tensor) -> Tensor:
        hidden, kv = self.shape.hidden, self.shape.kv
        if self.shape.joint:
            query, key, value = self.qkv(x).split([hidden, kv, kv], dim=-1)
        else:
            query, key, value = self.query(x), self.key(x), self.value(x)
        x = x + self.output(query + (key + value).repeat(1, hidden // kv))
        up = self.up(x)
        return x + self.down(torch.sigmoid(self.gate(x)) * up if self.shape.gated else torch.relu(up))


class Stack(nn.Module):
    """Blocks one after the other, input and output (tokens, hidden)."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.hidden = shape.hidden
        self.blocks = nn.Sequential(*(Block(shape) for _ in range(shape.blocks)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


def language_config(name: str, part: float) -> PreTrainedConfig:
    """The configuration of one of LANGUAGE_MODELS; ``part`` shortens llama-1b (Llama-3.2-1B) only.

    llama-97m is GPT-2-small's depth and width as a Llama with a small vocabulary.
    """
    if name == "gpt2":
        return GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    if name == "llama-1b":
        return LlamaConfig(
            hidden_size=2048, intermediate_size=8192, num_hidden_layers=layers_kept(LLAMA_1B_LAYERS, part),
            num_attention_heads=32, num_key_value_heads=8, vocab_size=round(LLAMA_1B_VOCABULARY * part),
            max_position_embeddings=4096, tie_word_embeddings=True,
        )  # fmt: skip
    if name == "llama-97m":
        return LlamaConfig(
            hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12, vocab_size=8192,
            max_position_embeddings=1024,
        )  # fmt: skip
    return LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=128,
        max_position_embeddings=1024,
    )  # fmt: skip


def layers_kept(layers: int, part: float) -> int:
    """How many of ``layers`` the fraction ``part`` keeps, at least one."""
    return max(1, round(layers * part))


def make(work: str, name: str, settings: Settings) -> nn.Module:
    """The dense model ``name`` of ``work`` on the settings' device and in their dtype."""
    with torch.device(settings.device):
        if work == "stack":
            shape = STACKS[name]
            if name == "llama-1b":
                shape = replace(shape, blocks=layers_kept(shape.blocks, settings.part))
            return Stack(shape).to(settings.torch_dtype)
        if work == "convolution":
            sizes, depths = ([8, 16], [1, 1]) if name == "tiny" else ([64, 128, 256, 512], [2, 2, 2, 2])
            config = ResNetConfig(
                embedding_size=sizes[0], layer_type="basic", depths=depths, hidden_sizes=sizes, num_labels=10
            )
            return ResNetForImageClassification(config).to(settings.torch_dtype)
        return AutoModelForCausalLM.from_config(language_config(name, settings.part), dtype=settings.torch_dtype)
