"""Checkpoints to mutate, native ones and adapters: how each is saved and loaded, and what it computes."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import transformers
from convolutional_models import pixels, resnet
from peft import PeftModel, get_peft_model
from peft_adapters import config as adapter_config
from tiny_configs import tiny_config
from torch import nn

from hf_rps import RPSConfig, get_rps_model, to_dense
from hf_rps.conversion import find_banks

IDS = torch.arange(18).view(2, 9) * 5 % 97


def moved(model: nn.Module, seed: int) -> nn.Module:
    """No parameter is what a new model would have, or what the model beside it has."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


@dataclass(frozen=True)
class Native:
    """A compressed model: ``build`` makes a dense one, ``parts`` of which are compressed, and ``load`` reads it."""

    build: object
    load: type
    parts: tuple[str, ...] = ("",)
    options: dict = field(default_factory=dict)
    inputs: dict = field(default_factory=lambda: {"input_ids": IDS})
    config = "config.json"
    own = ("quantization_config",)

    def save(self, folder: Path, seed: int = 0) -> None:
        model = self._model(seed)
        model.save_pretrained(folder, **self.options)

    def save_dense(self, folder: Path) -> None:
        """The same model decompressed, for what a dense one makes of a change of its config."""
        to_dense(self._model(0)).save_pretrained(folder)

    def _model(self, seed: int):
        torch.manual_seed(0)
        model = moved(self.build(), 7)
        for i, part in enumerate(self.parts):
            get_rps_model(model.get_submodule(part) if part else model, RPSConfig(ratio=0.25, seed=i))
        return moved(model, seed)

    def load_from(self, folder: Path, **options):
        torch.manual_seed(3)
        model, info = self.load.from_pretrained(folder, output_loading_info=True, **options)
        return model.eval(), {*info["missing_keys"]}

    def outputs(self, model) -> torch.Tensor:
        with torch.no_grad():
            return model(**self.inputs)[0]


@dataclass(frozen=True)
class Adapter:
    """An adapter on a GPT-2, loaded by PEFT, or by transformers where ``by_transformers``."""

    mode: str
    by_transformers: bool
    changes: dict
    config = "adapter_config.json"
    own = ()

    def base(self):
        torch.manual_seed(0)
        return moved(transformers.GPT2LMHeadModel(tiny_config("gpt2")), 7).eval()

    def save(self, folder: Path, seed: int = 0) -> None:
        model = get_peft_model(self.base(), adapter_config(self.mode, **self.changes))
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.05)
        model.save_pretrained(folder)

    def load_from(self, folder: Path):
        base = self.base()
        torch.manual_seed(3)
        if self.by_transformers:
            base.load_adapter(str(folder))
            return base.eval(), set()
        return PeftModel.from_pretrained(base, folder).eval(), set()

    def outputs(self, model) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=IDS).logits


def gpt2():
    return transformers.GPT2LMHeadModel(tiny_config("gpt2"))


def bert(head=transformers.BertModel, **changes):
    return head(tiny_config("bert", **changes))


def llama():
    return transformers.LlamaForCausalLM(tiny_config("llama"))


def encoder_decoder():
    decoder = bert(transformers.BertLMHeadModel, is_decoder=True, add_cross_attention=True)
    return transformers.EncoderDecoderModel(encoder=bert(), decoder=decoder)


CHECKPOINTS = {
    "one file": Native(llama, transformers.LlamaForCausalLM),
    "shards": Native(llama, transformers.LlamaForCausalLM, options={"max_shard_size": "24KB"}),
    "two banks": Native(encoder_decoder, transformers.EncoderDecoderModel, ("encoder", "decoder"),
                        inputs={"input_ids": IDS, "decoder_input_ids": IDS}),
    "tied": Native(gpt2, transformers.GPT2LMHeadModel),
    "head taken off": Native(gpt2, transformers.GPT2Model),
    "head put on": Native(bert, transformers.BertForMaskedLM),
    "convolutions": Native(partial(resnet, 0), transformers.ResNetForImageClassification,
                           inputs={"pixel_values": pixels()}),
    "delta": Adapter("delta", False, {"bias": "rps_only"}),
    "replace": Adapter("replace", False, {"modules_to_save": ["ln_f"]}),
    "delta, transformers": Adapter("delta", True, {"modules_to_save": ["ln_f"]}),
    "replace, transformers": Adapter("replace", True, {}),
}  # fmt: skip


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def arrays_of(model: nn.Module) -> list:
    return [(bank.psi_name, bank.grad_scaling) for bank in find_banks(model)]
