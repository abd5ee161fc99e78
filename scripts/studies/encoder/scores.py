"""What is measured: how near a student's embeddings are to the teacher's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetuning.objective import mean_pool

SCORES = {"cosine": "cosine", "cosine_p5": "cosine, 5th percentile", "recall_at_10": "recall@10"}


@torch.no_grad()
def embed(model: nn.Module, tokenizer, texts: list[str], max_length: int, batch_size: int = 100) -> Tensor:
    """Normalised means of the last hidden states, (texts, hidden)."""
    rows = {}
    for start in range(0, len(texts), batch_size):  # in the order of length, for little padding
        part = sorted(texts, key=len)[start : start + batch_size]
        batch = tokenizer(part, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
        pooled = mean_pool(model.eval()(**batch).last_hidden_state, batch["attention_mask"])
        rows |= zip(part, F.normalize(pooled, dim=-1), strict=True)
    return torch.stack([rows[text] for text in texts])


def score(student: Tensor, teacher: Tensor, k: int = 10) -> dict[str, float]:
    """Cosine of normalised embeddings (texts, hidden) row by row, and how far the rows' nearest neighbours agree."""
    cosines = (student * teacher).sum(-1)
    neighbours = [(x @ x.T).fill_diagonal_(-2).topk(k).indices for x in (student, teacher)]
    common = (neighbours[0][:, :, None] == neighbours[1][:, None, :]).any(-1)
    scores = cosines.mean(), cosines.quantile(0.05), common.float().mean()
    return {name: round(value.item(), 4) for name, value in zip(SCORES, scores, strict=True)}
