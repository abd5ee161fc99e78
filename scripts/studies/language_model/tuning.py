"""Fine-tuning on one kind of text: all weights, LoRA, QLoRA, the codebooks of a compressed model, or LoRA on these.

The text is the standard library's code, which the model reads worse than what codebooks were calibrated on. The
embedding, which is the head too, is frozen everywhere. Memory is what training holds for the weights: frozen ones as
they are stored (bfloat16, or the bits of the row), and 16 bytes for each trained number (itself, its gradient and
AdamW's two averages in float32). Activations are the same for all and not in it.
"""

from __future__ import annotations

from dataclasses import dataclass

from peft import LoraConfig, get_peft_model
from torch import nn

from hf_rps import size_report
from hf_rps.conversion import shared_layers
from hf_rps.targets import find_targets
from studies.language_model.rows import TARGETS, bitsandbytes

TRAINED_BYTES = 16  # of a trained number, its gradient and its optimizer's states in float32
NF4_BITS = 4.5
# the rates that are tried: as many for each
TUNED = {
    "full": (1e-5, 3e-5, 1e-4, 3e-4),
    "lora": (3e-4, 1e-3, 3e-3, 1e-2),
    "qlora": (3e-4, 1e-3, 3e-3, 1e-2),
    "codebooks": (3e-5, 1e-4, 3e-4, 1e-3),
    "codebooks+lora": (3e-4, 1e-3, 3e-3, 1e-2),
}
TITLES = {
    "full": "all weights",
    "lora": "LoRA on bfloat16 weights",
    "qlora": "QLoRA, NF4",
    "codebooks": "codebooks and norms",
    "codebooks+lora": "LoRA on codebooks",
}


@dataclass(frozen=True)
class Memory:
    """Bytes that training holds for the weights of a model.

    Attributes:
        frozen: Of what is not trained.
        trained: Numbers that are.
    """

    frozen: float
    trained: int

    @property
    def bytes(self) -> float:
        return self.frozen + TRAINED_BYTES * self.trained


def sizes(model: nn.Module) -> tuple[int, int, int]:
    """Of a dense model: targeted weights, what one rank of LoRA on them has, and all other numbers, norms left out."""
    weights = [candidate.weight for candidate in find_targets(model, TARGETS)]
    n = sum(weight.numel() for weight in weights)
    norms = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() == 1)
    return n, sum(sum(weight.shape) for weight in weights), sum(p.numel() for p in model.parameters()) - n - norms


def rank_for(memory: float, frozen: float, per_rank: int) -> int:
    """The rank of LoRA whose memory is nearest to ``memory``, ``frozen`` bytes being taken; 1 at least."""
    return max(1, round((memory - frozen) / (TRAINED_BYTES * per_rank)))


def low_rank(model: nn.Module, rank: int, names: list[str]) -> nn.Module:
    """LoRA on the layers called ``names``, as PEFT ships it; alpha is twice the rank."""
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names))


def prepare(method: str, model: nn.Module, codebooks: Memory | None = None) -> tuple[nn.Module, Memory]:
    """What is trained, from a dense model (for "codebooks" the compressed one), and its memory.

    Args:
        method: One of :data:`TUNED`.
        model: Changed in place.
        codebooks: Memory of the codebooks' training, to which the rank of LoRA on codebooks is fitted, and that of both
            other kinds on NF4 weights.
    """
    if method == "codebooks+lora":
        layers, report = shared_layers(model), size_report(model)
        numbers = sum(p.numel() for p in model.parameters() if p.is_floating_point())
        frozen = report.code_bytes + 2 * numbers
        rank = rank_for(codebooks.bytes, frozen, sum(sum(layer.weight_shape) for layer in layers.values()))
        model = low_rank(model, rank, list(layers))
        return model, Memory(frozen, sum(p.numel() for p in model.parameters() if p.requires_grad))
    if method == "full":
        n, _, others = sizes(model)
        tables = {p for t in (model.get_input_embeddings(), model.get_output_embeddings()) for p in t.parameters()}
        for parameter in model.parameters():
            parameter.requires_grad_(parameter not in tables)
        return model, Memory(2 * others, sum(p.numel() for p in model.parameters() if p.requires_grad))
    n, per_rank, others = sizes(model)
    rank = rank_for(codebooks.bytes, n * NF4_BITS / 8 + 2 * others, per_rank)
    names = [candidate.name for candidate in find_targets(model, TARGETS)]
    if method == "qlora":
        bitsandbytes(model, None, format="nf4")
    norms = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() == 1)
    model = low_rank(model, rank, names)
    frozen = n * (NF4_BITS if method == "qlora" else 16) / 8 + 2 * (others + norms)
    return model, Memory(frozen, sum(p.numel() for p in model.parameters() if p.requires_grad))
