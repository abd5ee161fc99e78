"""What is compared: a dense model, and what each method makes of its attention and MLP projections.

A row is named by its method and its settings, as ``codebook:bits=2,group_size=64`` (fields of RPSConfig) or
``bitsandbytes:format=nf4``. The peers' weights are rounded by the peer's own functions, given back as floats, and
multiplied as all rows' are, so that what differs is the weights alone: their kernels' speed, and the rounding of
*inputs* by bitsandbytes' int8 layers, are no part of this.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_rps import RPSConfig, get_rps_model, size_report
from hf_rps.targets import find_targets
from studies.language_model.data import Texts

CODEBOOK = "codebook"
MORE = {"long": (3, "train"), "task": (1, "code")}  # so many times the tokens besides, of which texts
TARGETS = RPSConfig(mapping=CODEBOOK)  # every attention and MLP projection


@dataclass(frozen=True)
class Row:
    """A method and its settings.

    >>> Row.parse("codebook:bits=2,group_size=64").options
    {'bits': 2, 'group_size': 64}
    """

    name: str

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"row {self.name!r}: {self.method!r} is none of the methods {list(METHODS)}")

    @classmethod
    def parse(cls, text: str) -> Row:
        row = cls(text)
        row.options  # noqa: B018 (malformed ones raise)
        return row

    @property
    def method(self) -> str:
        return self.name.partition(":")[0]

    @property
    def options(self) -> dict[str, Any]:
        options = {}
        for setting in filter(None, self.name.partition(":")[2].split(",")):
            name, equals, value = setting.partition("=")
            if not (name and equals and value):
                raise ValueError(f"row {self.name!r}: {setting!r} is no setting; write name=value, as bits=3")
            known = {"True": True, "False": False}
            options[name] = int(value) if re.fullmatch(r"-?\d+", value) else known.get(value, value)
        return options

    @property
    def folder(self) -> str:
        """The name as that of a folder."""
        return self.name.replace(":", "-").replace(",", "-").replace("=", "")

    @property
    def title(self) -> str:
        """The name for a table."""
        return METHODS[self.method].title(**self.options)

    def apply(self, model: nn.Module, texts: Texts | None) -> float:
        """Compress ``model`` in place, and say how many bits a targeted weight takes then.

        Args:
            model: Dense.
            texts: Those on which maps are learned; None for methods that learn nothing.
        """
        return METHODS[self.method].apply(model, texts, **self.options)


@dataclass(frozen=True)
class Method:
    """``apply(model, texts, **options)``: bits per targeted weight; ``title(**options)``: for tables."""

    apply: Callable[..., float]
    title: Callable[..., str]


def dense(model: nn.Module, texts: Texts) -> float:
    return 32.0


def codebook(model: nn.Module, texts: Texts, calibration: str = "documentation", **fields) -> float:
    """hf_rps's learned maps.

    Args:
        model: Dense.
        texts: Of the study.
        calibration: "documentation", or "mixed": half of it, and as much that the model itself writes; "long": four
            times as many tokens, the others from what is distilled on; or "task": twice as many, the others from what
            is fine-tuned on.
        fields: Of RPSConfig.
    """
    if calibration not in (known := ("documentation", "mixed", *MORE)):
        raise ValueError(f"codebook: calibration={calibration!r} is none of {', '.join(known)}")
    tokens = texts.calibration
    if calibration in MORE:
        (times, name), (count, length) = MORE[calibration], tokens.shape
        tokens = torch.cat([tokens, getattr(texts, name).flatten()[: times * count * length].view(-1, length)])
    if calibration == "mixed":
        count, length = tokens.shape
        tokens = torch.cat([tokens[: count // 2], written_by(model, count - count // 2, length).to(tokens.device)])
    get_rps_model(model, codebook_config(**fields), calibration=[{"input_ids": ids} for ids in tokens.split(8)])
    return codebook_bits(model)


@torch.no_grad()
def written_by(model: nn.Module, count: int, length: int, seed: int = 0) -> Tensor:
    """What ``model`` writes if nothing is asked, drawn from its predictions: token ids (count, length)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        start = torch.full((count, 1), model.config.bos_token_id, device=model.device)
        return model.generate(
            input_ids=start, attention_mask=torch.ones_like(start), do_sample=True, top_k=0, top_p=1.0, temperature=1.0,
            min_new_tokens=length - 1, max_new_tokens=length - 1,
        )  # fmt: skip


def codebook_config(**fields) -> RPSConfig:
    return RPSConfig(**{"mapping": CODEBOOK, "grad_scaling": "norm"} | fields)


def codebook_bits(model: nn.Module) -> float:
    """Bits per targeted weight with codebooks in bfloat16."""
    report = size_report(model)
    return (8 * report.code_bytes + 16 * report.m) / report.n


def codebook_title(**fields) -> str:
    fields = dict(fields)
    text = f"codebooks, {fields.pop('bits')} bits"
    group = fields.pop("group_size", None)
    text += f", groups of {group}" if group else ""
    text += f", {fields.pop('calibration')} calibration" if "calibration" in fields else ""
    text += ", embedding too" if fields.pop("share_embeddings", False) else ""
    return text + "".join(f", {name} {value}" for name, value in fields.items())


def round_weights(model: nn.Module, rounded: Callable[[Tensor], tuple[Tensor, float]]) -> float:
    """Put in the place of every targeted weight (rows, cols) what ``rounded`` makes of it; mean bits per weight."""
    bits = count = 0.0
    for candidate in find_targets(model, TARGETS):
        weight, took = rounded(candidate.weight.detach().clone())
        candidate.weight.detach().copy_(weight)
        bits, count = bits + took * weight.numel(), count + weight.numel()
    return bits / count


def bitsandbytes(model: nn.Module, texts: Texts | None, format: str, blocksize: int = 64) -> float:
    """``format`` nf4, fp4 (a float32 scale for each of ``blocksize`` weights) or int8 (a float32 scale per row)."""
    from bitsandbytes import functional

    def rounded(weight: Tensor) -> tuple[Tensor, float]:
        if format == "int8":
            codes, scales, _ = functional.int8_vectorwise_quant(weight.half())
            return functional.int8_vectorwise_dequant(codes, scales), 8 + 32 / weight.shape[1]
        codes, state = functional.quantize_4bit(weight, blocksize=blocksize, quant_type=format)
        return functional.dequantize_4bit(codes, state), 4 + 32 / blocksize

    if format not in ("nf4", "fp4", "int8"):
        raise ValueError(f"bitsandbytes: format={format!r} is none of nf4, fp4, int8")
    return round_weights(model, rounded)


def bitsandbytes_title(format: str, blocksize: int = 64) -> str:
    return "bitsandbytes int8" if format == "int8" else f"bitsandbytes {format.upper()}, blocks of {blocksize}"


def torchao(model: nn.Module, texts: Texts | None, bits: int, group_size: int) -> float:
    """torchao's weight-only integers, affine in groups of a row: a bfloat16 scale and an int8 zero for each."""
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_
    from torchao.quantization.quant_primitives import MappingType

    dtype = getattr(torch, f"int{bits}")
    config = IntxWeightOnlyConfig(
        weight_dtype=dtype, granularity=PerGroup(group_size), mapping_type=MappingType.ASYMMETRIC
    )

    def rounded(weight: Tensor) -> tuple[Tensor, float]:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.bfloat16)
        layer.weight = nn.Parameter(weight.bfloat16(), requires_grad=False)
        quantize_(layer, config)
        return layer.weight.dequantize().float(), bits + (16 + 8) / group_size

    return round_weights(model, rounded)


def torchao_title(bits: int, group_size: int) -> str:
    return f"torchao int{bits}, groups of {group_size}"


METHODS = {
    "dense": Method(dense, lambda: "dense"),
    CODEBOOK: Method(codebook, codebook_title),
    "bitsandbytes": Method(bitsandbytes, bitsandbytes_title),
    "torchao": Method(torchao, torchao_title),
}
