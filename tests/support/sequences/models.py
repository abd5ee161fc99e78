"""The small dense models that sequences begin with, and the models that they are put into."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass

import torch
import transformers
from torch import Tensor, nn
from transformers import EncoderDecoderModel, PreTrainedModel

VOCAB = 31
_TEXT = {"vocab_size": VOCAB, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24,
         "max_position_embeddings": 32}  # fmt: skip
_BERT = _TEXT | {"num_hidden_layers": 2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_LLAMA = _TEXT | {"num_hidden_layers": 2, "num_key_value_heads": 1, "use_cache": False}


@dataclass(frozen=True)
class Kind:
    """A kind of model: its class with a head, its class without, its config, and where its blocks are."""

    head: str
    base: str
    arguments: dict
    block: str
    layer: str
    inputs: tuple[str, ...] = ("input_ids",)

    @property
    def head_class(self) -> type[PreTrainedModel]:
        return getattr(transformers, self.head)

    @property
    def base_class(self) -> type[PreTrainedModel]:
        return getattr(transformers, self.base)

    @functools.cached_property
    def batch(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(3)
        ids = torch.randint(3, VOCAB - 1, (2, 5), generator=generator)
        pixels = torch.randn(2, 3, 16, 16, generator=generator)
        return {name: pixels if name == "pixel_values" else ids for name in self.inputs}


def fresh(kind: Kind, seed: int) -> PreTrainedModel:
    """The dense model in eval mode; norms and biases are moved off ones and zeros, small weights are enlarged."""
    torch.manual_seed(seed)
    model = kind.head_class(kind.head_class.config_class(**kind.arguments)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
            elif parameter.square().mean() < 0.05**2:
                parameter.mul_(6)
    return model


KINDS = {
    "bert": Kind("BertForSequenceClassification", "BertModel", _BERT | {"num_labels": 3}, "encoder.layer.1",
                 "encoder.layer.0.output.dense"),
    "llama": Kind("LlamaForCausalLM", "LlamaModel", _LLAMA, "layers.0", "layers.1.mlp.up_proj"),
    "llama tied": Kind("LlamaForCausalLM", "LlamaModel", _LLAMA | {"tie_word_embeddings": True}, "layers.1",
                       "layers.0.self_attn.q_proj"),
    "gpt2": Kind("GPT2LMHeadModel", "GPT2Model", {"vocab_size": VOCAB, "n_embd": 16, "n_layer": 2, "n_head": 2,
                 "n_positions": 32, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "use_cache": False,
                 "bos_token_id": 1, "eos_token_id": 2}, "h.0", "h.1.attn.c_attn"),
    "t5": Kind("T5ForConditionalGeneration", "T5Model", {"vocab_size": VOCAB, "d_model": 16, "d_kv": 8, "d_ff": 24,
               "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0, "dropout_rate": 0.0, "use_cache": False},
               "encoder.block.0", "decoder.block.0.layer.2.DenseReluDense.wo", ("input_ids", "decoder_input_ids")),
    "resnet": Kind("ResNetForImageClassification", "ResNetModel", {"embedding_size": 4, "hidden_sizes": [4, 8],
                   "depths": [1, 1], "layer_type": "basic", "num_labels": 3}, "encoder.stages.1",
                   "embedder.embedder.convolution", ("pixel_values",)),
}  # fmt: skip


@functools.cache
def _built(name: str, seed: int) -> PreTrainedModel:
    return fresh(KINDS[name], seed)


def build(name: str, seed: int = 0) -> PreTrainedModel:
    """The dense model of a kind, the same for the same seed, with memory of its own."""
    return copy.deepcopy(_built(name, seed))


# ---- what a model may be put into


class OuterBert(PreTrainedModel):
    """A transformers model that knows nothing of what is inside, under a prefix that is not the inner model's."""

    config_class, base_model_prefix, inner_class = transformers.BertConfig, "none", transformers.BertModel
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.inner, self.scale = self.inner_class(config), nn.Parameter(torch.ones(3))
        self.post_init()

    def get_input_embeddings(self):
        return self.inner.get_input_embeddings()

    def forward(self, **batch):
        found = self.inner(**batch)
        return {"first": found[0] * self.scale[0]}


class OuterLlama(OuterBert):
    config_class, inner_class = transformers.LlamaConfig, transformers.LlamaModel


class OuterGPT2(OuterBert):
    config_class, inner_class = transformers.GPT2Config, transformers.GPT2Model


class OuterResNet(OuterBert):
    config_class, inner_class, main_input_name = transformers.ResNetConfig, transformers.ResNetModel, "pixel_values"


OUTER = {outer.inner_class: outer for outer in (OuterBert, OuterLlama, OuterGPT2, OuterResNet)}


class Towers(nn.Module):
    """Two models in a module that is none of transformers'."""

    def __init__(self, one: nn.Module, two: nn.Module):
        super().__init__()
        self.one, self.two = one, two

    def forward(self, **batch):
        one, two = self.one(**batch), self.two(**batch)
        return {"sum": one[0] + two[0]}


class Chain(nn.Sequential):
    """A model in a container."""

    def forward(self, **batch):
        return self[0](**batch)


def run(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """All float outputs, in whatever the model is wrapped."""
    if isinstance(model, EncoderDecoderModel):
        batch = batch | {"decoder_input_ids": batch["input_ids"]}
    if "pixel_values" in batch:  # images come in the model's dtype
        weights = (getattr(module, "weight", None) for module in model.modules())
        first = next(weight for weight in weights if isinstance(weight, Tensor) and weight.ndim == 4)
        batch = batch | {"pixel_values": batch["pixel_values"].to(first.dtype)}
    found = model(**batch)
    return {key: value for key, value in found.items() if isinstance(value, Tensor) and value.is_floating_point()}
