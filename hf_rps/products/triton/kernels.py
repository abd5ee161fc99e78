"""Triton kernels over the slots of a folded matrix: each reads psi where it lies and launches once.

All of them find slots by the fold's own arithmetic (:class:`hf_rps.mappings.fold.Rotations`), so that nothing is stored
for a row but its factor. Weight j of W (row-major) is on slot

    base + (t mod m + shifts[t div m]) mod m,    t = start + j.

A row is not longer than m, so that it meets two partitions at most and each of its weights needs a comparison where a
division would be. ``m``, ``base``, ``start`` and the shifts come divided by ALIGN, the greatest power of two up to 8
that divides them and the row length: the products with ALIGN tell the compiler that neighbours come in packs of ALIGN,
which it then loads and stores at once. All offsets are int32; :func:`hf_rps.products.triton.matrix.can_serve` is the
condition.

Importing this module needs Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

FEW_TOKENS = 16  # of few_tokens
_WIDEN = tl.constexpr(triton.knobs.runtime.interpret)  # the interpreter has no product of bfloat16


@triton.jit
def _row_start(row, shifts, m, start, COLS: tl.constexpr, ALIGN: tl.constexpr):
    """Where rows begin: place in their partition, that partition's shift and the next one's; each as ``row``."""
    t = start + row * COLS
    partition = t // m
    here = tl.load(shifts + partition) * ALIGN
    following = tl.load(shifts + partition + 1) * ALIGN
    return t - partition * m, here, following


@triton.jit
def _slot(place, here, following, m):
    """Slots, without base, of weights ``place`` from the beginning of a partition with shift ``here``."""
    beyond = place >= m
    slot = place - tl.where(beyond, m, 0) + (tl.where(beyond, following, here) - m)
    return slot + tl.where(slot < 0, m, 0)


@triton.jit(do_not_specialize=["m", "start", "base", "rows"])
def one_token(
    x, psi, y, bias, shifts, factor, m, start, base, rows,
    COLS: tl.constexpr, ALIGN: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """y (rows,) = W x (COLS,) + bias, summed in float32. Each program takes BLOCK_ROWS rows.

    It is bound by memory, so the sum stays one of products in registers; they are added up over a row at the end.
    """
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = row < rows
    row = tl.where(inside, row, 0)
    m, start = m * ALIGN, start * ALIGN
    psi += base * ALIGN
    place, here, following = _row_start(row, shifts, m, start, COLS, ALIGN)
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    for first in tl.range(0, COLS, BLOCK_COLS, loop_unroll_factor=4):
        col = first + tl.arange(0, BLOCK_COLS)
        slot = _slot(place[:, None] + col[None, :], here[:, None], following[:, None], m)
        weight = tl.load(psi + slot, mask=col[None, :] < COLS, other=0.0)
        token = tl.load(x + col, mask=col < COLS, other=0.0)
        total += weight.to(tl.float32) * token.to(tl.float32)[None, :]
    out = tl.sum(total, axis=1) * tl.load(factor + row)
    if BIAS:
        out += tl.load(bias + row).to(tl.float32)
    tl.store(y + row, out.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["m", "start", "base", "rows", "tokens"])
def few_tokens(
    x, psi, y, bias, tokens, shifts, factor, m, start, base, rows,
    COLS: tl.constexpr, ALIGN: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """y (tokens, rows) = x (tokens, COLS) W^T + bias for up to 16 tokens, on the matrix units, summed in float32."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = row < rows
    row = tl.where(inside, row, 0)
    m, start = m * ALIGN, start * ALIGN
    psi += base * ALIGN
    place, here, following = _row_start(row, shifts, m, start, COLS, ALIGN)
    token = tl.arange(0, 16)
    total = tl.zeros((BLOCK_ROWS, 16), tl.float32)
    for first in range(0, COLS, BLOCK_COLS):
        col = first + tl.arange(0, BLOCK_COLS)
        slot = _slot(place[:, None] + col[None, :], here[:, None], following[:, None], m)
        weight = tl.load(psi + slot, mask=col[None, :] < COLS, other=0.0)
        mask = (col[:, None] < COLS) & (token[None, :] < tokens)
        inputs = tl.load(x + token[None, :] * COLS + col[:, None], mask=mask, other=0.0)
        if _WIDEN:
            weight, inputs = weight.to(tl.float32), inputs.to(tl.float32)
        total = tl.dot(weight, inputs, total, input_precision="ieee")
    out = total * tl.load(factor + row)[:, None]
    if BIAS:
        out += tl.load(bias + row).to(tl.float32)[:, None]
    mask = inside[:, None] & (token[None, :] < tokens)
    tl.store(y + token[None, :] * rows + row[:, None], out.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["m", "start", "base", "rows"])
def whole_weight(
    psi, out, added, shifts, factor, m, start, base, rows,
    COLS: tl.constexpr, ALIGN: tl.constexpr, ADDED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """out (rows, COLS) = W or added + W, rounded once. Each program writes BLOCK_ROWS x BLOCK_COLS of it."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col = tl.program_id(1) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    inside = row < rows
    row = tl.where(inside, row, 0)
    m, start = m * ALIGN, start * ALIGN
    psi += base * ALIGN
    place, here, following = _row_start(row, shifts, m, start, COLS, ALIGN)
    slot = _slot(place[:, None] + col[None, :], here[:, None], following[:, None], m)
    mask = inside[:, None] & (col[None, :] < COLS)
    weight = tl.load(psi + slot, mask=mask, other=0.0).to(tl.float32) * tl.load(factor + row)[:, None]
    flat = row[:, None] * COLS + col[None, :]
    if ADDED:
        weight += tl.load(added + flat, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + flat, weight.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["m", "start", "base", "rows", "partitions"])
def add_adjoint(
    gradient, into, shifts, factor, m, start, base, rows, partitions,
    COLS: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """into (m,) += R^T gradient (rows, COLS). Each program gathers what falls on BLOCK slots; no atomics.

    Program (b, i) takes block b of the slots of partition i, and leaves out what partition 0 reaches where i is 1.
    Every partition after these two lies on slots that they reach. Each slot is thus written once, with its sum taken in
    the order of the partitions: the result does not change from run to run.
    """
    i = tl.program_id(1)
    m, start = m * ALIGN, start * ALIGN
    into += base * ALIGN
    weights = rows * COLS
    place = tl.where(i == 0, start, 0) + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    owned = (place < m) & (place - start < weights - i * m)
    slot = place + (tl.load(shifts + i) * ALIGN - m)
    slot += tl.where(slot < 0, m, 0)
    if i == 1:  # not those that partition 0 reaches, which program (., 0) has
        first = slot - tl.load(shifts) * ALIGN
        first += tl.where(first < 0, m, 0)
        owned = owned & ((first < start) | (first - start >= weights))
    total = tl.zeros((BLOCK,), tl.float32)
    j = 0
    while j < partitions:  # a range over it is more than the interpreter takes
        weight = slot - tl.load(shifts + j) * ALIGN
        weight += tl.where(weight < 0, m, 0) + (j * m - start)
        mask = owned & (weight >= 0) & (weight < weights)
        part = tl.load(gradient + weight, mask=mask, other=0.0).to(tl.float32)
        total += part * tl.load(factor + weight // COLS, mask=mask, other=0.0)
        j += 1
    target = into + slot
    before = tl.load(target, mask=owned, other=0.0)
    tl.store(target, before + total.to(into.dtype.element_ty), mask=owned)
