"""Small models to prune: two layers in float64 for formulas, and tiny transformers models with a batch each."""

from types import SimpleNamespace

import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)


class Net(nn.Module):
    """y = W2 act(W1 x), with half the squared error to labels as its loss, in float64."""

    def __init__(self, activation=torch.tanh, middle=None, dropout=0.0):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False)
        self.activation, self.middle, self.dropout = activation, middle or nn.Identity(), nn.Dropout(dropout)
        self.double()

    def forward(self, x, labels=None):
        logits = self.second(self.dropout(self.middle(self.activation(self.first(x)))))
        if labels is None:
            return logits
        return SimpleNamespace(loss=(logits - labels).square().sum() / 2, logits=logits)


def seeded(make, *args, **kwargs):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make(*args, **kwargs)


def batches_of(count=2, size=5):
    generator = torch.Generator().manual_seed(1)
    draw = lambda width: torch.randn(size, width, generator=generator, dtype=torch.float64)  # noqa: E731
    return [{"x": draw(3), "labels": draw(2)} for _ in range(count)]


def tiny_model(kind):
    if kind == "resnet":
        config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=3)
        model = seeded(ResNetForImageClassification, config)
    elif kind == "vit":
        config = ViTConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=8,
            patch_size=4, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1, num_labels=3,
        )  # fmt: skip
        model = seeded(ViTForImageClassification, config)
    elif kind == "llama":
        config = LlamaConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=20,
        )  # fmt: skip
        model = seeded(LlamaForCausalLM, config)
    else:
        model = seeded(GPT2LMHeadModel, GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=20, n_positions=12))
    generator = torch.Generator().manual_seed(3)
    if kind in ("gpt2", "llama"):
        ids = torch.randint(0, 20, (2, 6), generator=generator)
        return model.train(), [{"input_ids": ids, "labels": ids}], {"inputs_embeds": torch.ones(1, 6, 16)}
    size = 8 if kind == "vit" else 32
    pixels = torch.randn(4, 3, size, size, generator=generator)
    batch = {"pixel_values": pixels, "labels": torch.tensor([0, 1, 2, 0])}
    return model.train(), [batch, batch], {"pixel_values": torch.ones(1, 3, size, size)}
