"""What users would take: a model quantised by bitsandbytes or torchao, on a CPU.

Its weights stay as they are, whatever is trained: biases, norms and embeddings around them can learn. So a run trains a
dense model in which the targeted weights are those that the quantised layers multiply by, frozen (finetune.py's
``--mode frozen``), and what it learned is then put around the quantised layers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import AutoModel, BitsAndBytesConfig

from hf_rps import RPSConfig
from hf_rps.targets import find_targets

QUANTISERS = ("nf4", "int8", "int4")


class _InBfloat16(nn.Module):
    """A layer that computes in bfloat16, for which torchao's kernel has its scales in 16 bits, in a float32 model."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    @property
    def bias(self) -> nn.Parameter | None:
        return self.layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.bfloat16()).to(x.dtype)


def quantised(folder: str, method: str, group: int | None, config: RPSConfig) -> nn.Module:
    """The model in ``folder`` with the weights that ``config`` targets quantised.

    Args:
        folder: A float32 model.
        method: "nf4" and "int8" of bitsandbytes (NF4 with blocks of 64 and double quantisation; LLM.int8, which
            quantises the inputs too), "int4" of torchao (weights only, asymmetric).
        group: With int4, how many weights of a row share a scale and a zero.
        config: Whose targets must be all Linear layers but those that it excludes.
    """
    if method == "int4":
        model = AutoModel.from_pretrained(folder, dtype=torch.float32)
        for target in find_targets(model, config):
            parent, _, name = target.name.rpartition(".")
            setattr(model.get_submodule(parent), name, int4_layer(target.module, group))
        return model.eval()
    options = {
        "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        "int8": {"load_in_8bit": True},
    }[method]
    return AutoModel.from_pretrained(
        folder, dtype=torch.float32, device_map="cpu",
        quantization_config=BitsAndBytesConfig(**options, llm_int8_skip_modules=list(config.exclude_modules or ())),
    ).eval()  # fmt: skip


def int4_layer(layer: nn.Linear, group: int) -> nn.Module:
    """``layer``, changed, with the weight-only int4 of torchao: ``group`` weights of a row share a scale and a zero."""
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig  # the one of torchao's for CPUs
    from torchao.quantization import quantize_

    layer = layer.bfloat16()
    quantize_(layer, PrototypeInt4WeightOnlyConfig(group_size=group))
    return _InBfloat16(layer)


def quantised_bytes(model: nn.Module, names: list[str]) -> int:
    """Bytes of all that the layers ``names`` store but for their biases: codes, scales, tables. Before any pass, in
    which bitsandbytes lays its tensors out anew for the CPU."""
    total = 0
    for name in names:
        layer = model.get_submodule(name)
        for key, tensor in layer.state_dict().items():
            if key.rpartition(".")[2] != "bias":
                total += sum(part.numel() * part.element_size() for part in _parts(tensor))
    return total


def _parts(tensor: Tensor) -> list[Tensor]:
    """The tensors that a stored one holds: of torchao's several."""
    return [getattr(tensor, name) for name in getattr(tensor, "tensor_data_names", ())] or [tensor]


@torch.no_grad()
def multiplied_by(layer: nn.Module, columns: int) -> Tensor:
    """W (rows, columns), as the quantised layer multiplies by it."""
    zero = layer(torch.zeros(1, columns))
    return (layer(torch.eye(columns)) - zero).t().contiguous()


@torch.no_grad()
def dense_student(teacher: nn.Module, model: nn.Module, config: RPSConfig) -> nn.Module:
    """``teacher`` with the targeted weights that the quantised ``model`` multiplies by; in place."""
    for target in find_targets(teacher, config):
        target.weight.copy_(multiplied_by(model.get_submodule(target.name), target.weight.shape[1]))
    return teacher


@torch.no_grad()
def put_around(model: nn.Module, trained: nn.Module, start: nn.Module, config: RPSConfig) -> nn.Module:
    """The quantised ``model`` with all that ``trained`` learned around its targeted weights.

    Raises:
        ValueError: A targeted weight is another one than in ``start``, so that it was trained.
    """
    before = {target.name: target.weight for target in find_targets(start, config)}
    frozen = set()
    for target in find_targets(trained, config):
        frozen.add(f"{target.name}.weight")
        if not torch.equal(target.weight, before[target.name]):
            raise ValueError(f"{target.name} was trained, and can't be that of a quantised model")
    for name, value in trained.named_parameters():
        if name in frozen:
            continue
        owner, _, last = name.rpartition(".")
        getattr(model.get_submodule(owner), last).copy_(value)
    return model
