"""Codebooks and codes for one weight matrix: weighted k-means, error feedback, and rounds of descent on the same error.

What is made small is the layer's error on its inputs, ``tr((W' - W) H (W' - W)^T)`` with ``H`` (cols, cols) the mean of
``x x^T``: that of W' on typical inputs. Without inputs H is the identity.

1. Codebooks by k-means, every weight counted by the root of H's diagonal.
2. Codes column by column (or tile by tile), with feedback of each one's error.
3. In turn, for a few rounds: the codebooks that are best for the codes (least squares), and for each column the code
   that is best while all others stay (coordinate descent). Neither can make the error larger.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hf_rps.learning.codebooks import RowCodebooks
from hf_rps.learning.vectors import VectorCodebooks

DAMPING = 0.005  # of the mean of H's diagonal, added to it: few inputs tell little of some directions
CORRECTION = 0.05  # likewise, where the weight is fitted to what the dense layer gives out
ROUNDS = 2


class Learned(NamedTuple):
    """Codebooks, what is stored of the rows, uint8 (rows, bytes), and the W' (rows, cols) that they stand for."""

    books: Tensor
    packed: Tensor
    weight: Tensor


def damped(hessian: Tensor) -> Tensor:
    """H (cols, cols) with a part of its mean diagonal added to the diagonal; inputs that are never there get one."""
    mean = hessian.diagonal().mean()
    return hessian + torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device) * (
        DAMPING * mean if mean > 0 else 1.0
    )


def corrected(weight: Tensor, hessian: Tensor, cross: Tensor) -> Tensor:
    """The weight that does best on inputs x what ``weight`` W does on the inputs d that the dense layer has instead.

    It is W + W E[(d - x) x^T] (E[x x^T] + damping)^-1, the least-squares fit of W d by x. As in 'GPTAQ: efficient
    finetuning-free quantization for asymmetric calibration' (ICML 2025), which does it column by column.
    """
    if not hessian.diagonal().any():
        return weight
    inner = hessian + torch.eye(len(hessian), device=hessian.device) * (CORRECTION * hessian.diagonal().mean())
    return weight + weight @ torch.linalg.solve(inner, (cross - hessian).t()).t()


def learn(
    weight: Tensor,
    bits: int,
    group_size: int | None = None,
    hessian: Tensor | None = None,
    cross: Tensor | None = None,
    *,
    rounds: int = ROUNDS,
    tile: int = 1,
) -> Learned:
    """Codebooks and codes of one weight matrix, determined by the arguments.

    Args:
        weight: W (rows, cols).
        bits: Of a code; a codebook has 2**bits entries.
        group_size: Columns that share a codebook; None: all.
        hessian: Mean of ``x x^T`` over inputs, (cols, cols); None: every direction counts the same.
        cross: Mean of ``d x^T``, (cols, cols), d being the input that the dense layer has where this one has x; None:
            the same.
        rounds: Of least squares and descent.
        tile: Columns that share a code; more than one: of books of vectors, see :mod:`hf_rps.mappings.codebook`.
    """
    dtype, weight = weight.dtype, weight.detach().float()
    cols = weight.shape[1]
    if hessian is not None and cross is not None:
        weight = corrected(weight, hessian.float(), cross.float())
    group = min(group_size or cols, cols)
    hessian = None if hessian is None else damped(hessian.float())
    importance = weight.new_ones(cols) if hessian is None else hessian.diagonal().sqrt()
    if tile == 1:
        state = RowCodebooks(weight, 2**bits, group, importance)
    else:
        state = VectorCodebooks(weight, 2**bits, group, importance, tile)
        hessian = None if hessian is None else state.padded(hessian)
    if hessian is None:
        state.round()
    else:
        state.feed_back(hessian)
        for _ in range(rounds):
            state.refit(hessian)
            if state.descend(hessian) == 0:
                break
        state.refit(hessian)
    return Learned(state.books.to(dtype), state.packed(bits), state.made()[:, :cols].to(dtype))
