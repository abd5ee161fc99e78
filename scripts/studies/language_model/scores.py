"""What is measured: perplexity, choices among continuations, and what a model writes."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from studies.language_model.data import Choice

PROMPTS = (
    "The capital of France is",
    "A list in Python is",
    "To make a good cup of tea, first",
)
SAMPLED = 24  # tokens


def arithmetic(device: torch.device, autocast: bool = True):
    """In which all rows compute: products in bfloat16, or everything in float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=autocast)


@torch.no_grad()
def perplexity(model: nn.Module, blocks: Tensor, batch_size: int = 4) -> float:
    """exp of the mean loss per predicted token of ``blocks`` (n, tokens)."""
    total = count = 0.0
    for ids in blocks.to(model.device).split(batch_size):
        with arithmetic(model.device):
            logits = model.eval()(input_ids=ids).logits
        total += F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum").item()
        count += ids[:, 1:].numel()
    return math.exp(total / count)


@torch.no_grad()
def accuracy(model: nn.Module, tokenizer, choices: list[Choice], batch_size: int = 32) -> float:
    """Share of choices whose right continuation has the largest log-likelihood per byte of its text."""
    rows = [choice.context + continuation for choice in choices for continuation in choice.continuations]
    start, scores = len(choices[0].context), []
    for ids in torch.tensor(rows, device=model.device).split(batch_size):
        with arithmetic(model.device):
            logits = model.eval()(input_ids=ids, logits_to_keep=ids.shape[1] - start + 1).logits[:, :-1]
        ends = ids[:, start:]
        likelihood = logits.float().log_softmax(-1).gather(-1, ends[..., None]).sum((1, 2))
        bytes_ = [max(1, len(tokenizer.decode(end).encode())) for end in ends]
        scores.append(likelihood.cpu() / torch.tensor(bytes_))
    best = torch.cat(scores).view(len(choices), -1).argmax(1)
    return (best == 0).float().mean().item()


@torch.no_grad()
def samples(model: nn.Module, tokenizer, prompts: tuple[str, ...] = PROMPTS) -> list[str]:
    """What the model writes after each prompt, greedily."""
    written = []
    for prompt in prompts:
        batch = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
        ids = model.eval().generate(**batch, max_new_tokens=SAMPLED, do_sample=False)[0]
        written.append(tokenizer.decode(ids[batch["input_ids"].shape[1] :], skip_special_tokens=True))
    return written
