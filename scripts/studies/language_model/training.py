"""The loop of all runs: a fixed order of batches, AdamW, a cosine schedule with 5 % warmup, bfloat16 products.

It is a loop of its own because all distilled runs share the teacher's last hidden states, made once, and because the
head's logits are never kept: that is a third of a step's time and most of its memory on one CPU core.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup

from studies.language_model.data import write
from studies.language_model.scores import arithmetic

CHUNK = 256  # tokens whose logits are there at once

Loss = Callable[[Tensor, int], Tensor]  # of the last hidden states (tokens, hidden) of a step's batch, and the step


def train(
    model: nn.Module, batches: Tensor, loss: Loss, rate: float, autocast: bool = True, table_rate: float | None = None
) -> tuple[list[float], float]:
    """Train what is trainable in ``model`` on ``batches`` (steps, size, tokens), the embedding at ``table_rate``.

    Returns:
        The loss of every step, and seconds per step.
    """
    table = model.get_input_embeddings().weight
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError("nothing in this model is trainable")
    steps = len(batches)
    groups = [{"params": [p for p in trained if p is not table]}]
    if table.requires_grad:
        groups.append({"params": [table]} | ({} if table_rate is None else {"lr": table_rate}))
    optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, max(1, round(0.05 * steps)), steps)
    body, losses, start = model.get_decoder(), [], time.perf_counter()
    model.train()
    for step, ids in enumerate(tqdm(batches, desc="steps", leave=False)):
        with arithmetic(ids.device, autocast):
            hidden = body(input_ids=ids, use_cache=False).last_hidden_state
            value = loss(hidden.flatten(0, 1), step)
        value.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(round(value.item(), 5))
    return losses, (time.perf_counter() - start) / steps


def learn(model: nn.Module, embeddings: bool = False) -> None:
    """Make trainable what has one axis (norms, biases, the codebooks of a compressed model), and nothing else.

    So the targeted weights of a model that is rounded stay as they are: no library trains rounded weights. With
    ``embeddings`` the embedding is trained, which is the head, too.
    """
    table = model.get_input_embeddings().weight
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(parameter.dim() == 1 or (embeddings and parameter is table))


# ---- losses, by the last hidden states


class FromHead(torch.autograd.Function):
    """Mean over tokens of a loss of logits, and its gradient for the hidden states, a chunk of tokens at a time.

    ``chunk_loss(logits, part)`` gives the loss (summed) and its gradient for the logits (tokens, vocabulary), float32.
    The head is frozen.
    """

    @staticmethod
    def forward(ctx, hidden, head, chunk_loss):
        total, gradients, dtype = 0.0, [], head.dtype
        with torch.autocast(hidden.device.type, enabled=False):  # all dtypes are said here, and sums are float32
            for start in range(0, len(hidden), CHUNK):
                part = slice(start, min(start + CHUNK, len(hidden)))
                logits = (hidden[part].to(dtype) @ head.t()).float()
                value, gradient = chunk_loss(logits, part)
                total += value.item()
                gradients.append(gradient.to(dtype) @ head)
        ctx.save_for_backward(torch.cat(gradients) / len(hidden))
        ctx.dtype = hidden.dtype
        return hidden.new_tensor(total / len(hidden), dtype=torch.float32)

    @staticmethod
    def backward(ctx, gradient):
        (saved,) = ctx.saved_tensors
        return (saved * gradient).to(ctx.dtype), None, None


def divergence(hidden: Tensor, teacher: Tensor, head: Tensor, table: Tensor | None = None) -> Tensor:
    """Mean over tokens of KL(teacher || student), whose logits are ``hidden @ head^T`` and ``teacher @ table^T``.

    Args:
        hidden, teacher: Last hidden states (tokens, hidden size).
        head: (vocabulary, hidden size). Trained or, in the dtype of the products, frozen.
        table: That of the teacher; default ``head``.
    """
    table = head.detach() if table is None else table
    if head.requires_grad:
        return divergence_by_definition(hidden, teacher, head, table)

    def chunk_loss(logits: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        aim = (teacher[part].to(table.dtype) @ table.t()).float().log_softmax(-1)
        own = logits.log_softmax(-1)
        aim_p = aim.exp()
        return torch.linalg.vecdot(aim_p, aim - own).sum(), own.exp_().sub_(aim_p)

    return FromHead.apply(hidden, head, chunk_loss)


def divergence_by_definition(hidden: Tensor, teacher: Tensor, head: Tensor, table: Tensor) -> Tensor:
    own, aim = (F.linear(x, w.to(x.dtype)).float().log_softmax(-1) for x, w in ((hidden, head), (teacher, table)))
    return F.kl_div(own, aim, reduction="batchmean", log_target=True)


def next_token(hidden: Tensor, ids: Tensor, head: Tensor) -> Tensor:
    """Mean cross-entropy of the next token; hidden (sequences * tokens, hidden size), ids (sequences, tokens)."""
    hidden = hidden.view(*ids.shape, -1)[:, :-1].flatten(0, 1)
    labels = ids[:, 1:].flatten()

    def chunk_loss(logits: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        own = logits.log_softmax(-1)
        place = labels[part, None]
        value = -own.gather(1, place).sum()
        return value, own.exp_().scatter_add_(1, place, -torch.ones_like(place, dtype=own.dtype))

    return FromHead.apply(hidden, head, chunk_loss)


def frozen_head(model: nn.Module, autocast: bool = True) -> Tensor:
    """The head (vocabulary, hidden size) as it is now, in the dtype of the products."""
    weight = model.get_output_embeddings().weight.detach()
    return weight.to(torch.bfloat16 if autocast else torch.float32, copy=True)


@torch.no_grad()
def teacher_states(model: nn.Module, batches: Tensor, file: Path, autocast: bool = True) -> Tensor:
    """The dense model's last hidden states for ``batches`` (steps, size, tokens): bfloat16 (steps, tokens, hidden).

    Kept in ``file``, a step after the other, and made only where more steps are asked for than it holds.
    """
    known = torch.load(file, map_location=batches.device) if file.exists() else torch.empty(0)
    if len(known) >= len(batches):
        return known[: len(batches)]
    rows, body = list(known), model.eval().get_decoder()
    for ids in tqdm(batches[len(known) :], desc="teacher", leave=False):
        with arithmetic(ids.device, autocast):
            rows.append(body(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1).bfloat16())
    states = torch.stack(rows)
    write(file, states)
    return states
