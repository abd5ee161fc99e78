"""Triton kernels over packed codes: few tokens times W^T, W made, and its adjoint, one launch each.

    W[r, c] = psi[start + (r * GROUPS + c // GROUP) * ENTRIES + code of (r, c)]

A *pack* is the fewest codes that end on a byte (:mod:`hf_rps.mappings.codes`): PACK codes in BYTES bytes, which are 4
in 1 for codes of 2 bits, 8 in 3 for 3, 2 in 1 for 4 and 1 in 1 for 8. A program reads the bytes of many packs, which
lie side by side, and takes them apart in registers: tiles are (rows, packs, PACK). A row's codebook is looked up where
it lies; it fits a few cache lines. Rows have 64-bit offsets, for a matrix may have more than 2^31 weights; what is
inside a row has 32-bit ones, for which :func:`hf_rps.products.triton.codebook.can_serve` is the condition.

Importing this module needs Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

FEW_TOKENS = 16  # of few_tokens
_WIDEN = tl.constexpr(triton.knobs.runtime.interpret)  # the interpreter has no product of bfloat16


@triton.jit
def _codes(codes, row, pack, inside, COLS: tl.constexpr, BITS: tl.constexpr, BYTES: tl.constexpr, PACK: tl.constexpr):
    """Of rows ``row`` (R,), int64, and packs ``pack`` (R or 1, P): their codes and columns, (R, P, PACK) and
    (R or 1, P, PACK).

    Nothing is read where ``inside`` (R, 1) is False or behind the row's last pack.
    """
    PACKS: tl.constexpr = (COLS + 7) // 8 * 8 // PACK
    mask = inside & (pack < PACKS)
    address = codes + (row * (PACKS * BYTES))[:, None] + pack * BYTES
    word = tl.load(address, mask=mask, other=0).to(tl.int32)
    for i in tl.static_range(1, BYTES):
        word |= tl.load(address + i, mask=mask, other=0).to(tl.int32) << (8 * i)
    place = tl.arange(0, PACK)[None, None, :]
    return (word[:, :, None] >> (place * BITS)) & (2**BITS - 1), pack[:, :, None] * PACK + place


@triton.jit
def _weights(
    psi, codes, row, pack, inside,
    COLS: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, BYTES: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """W's numbers (R, P, PACK) at rows ``row`` (R,), int64, and packs ``pack`` (1, P), and their columns (1, P, PACK).

    ``psi`` points to the matrix's first codebook. Weights are 0 outside of W.
    """
    GROUPS: tl.constexpr = (COLS + GROUP - 1) // GROUP
    code, col = _codes(codes, row, pack, inside, COLS, BITS, BYTES, PACK)
    if GROUPS > 1:
        code += col // GROUP * 2**BITS
    books = psi + (row * (GROUPS * 2**BITS))[:, None, None]
    return tl.load(books + code, mask=inside[:, :, None] & (col < COLS), other=0.0), col


@triton.jit(do_not_specialize=["start", "rows"])
def one_token(
    x, psi, y, bias, codes, start, rows,
    COLS: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, BYTES: tl.constexpr, PACK: tl.constexpr,
    BIAS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_PACKS: tl.constexpr,
):  # fmt: skip
    """y (rows,) = W x (COLS,) + bias, summed in float32. Each program takes BLOCK_ROWS rows."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = row < rows
    total = tl.zeros((BLOCK_ROWS, BLOCK_PACKS, PACK), tl.float32)
    for first in tl.range(0, (COLS + PACK - 1) // PACK, BLOCK_PACKS, loop_unroll_factor=4):
        pack = (first + tl.arange(0, BLOCK_PACKS))[None, :]
        weight, col = _weights(
            psi + start, codes, row.to(tl.int64), pack, inside[:, None], COLS, GROUP, BITS, BYTES, PACK
        )
        token = tl.load(x + col, mask=col < COLS, other=0.0)
        total += weight.to(tl.float32) * token.to(tl.float32)
    out = tl.sum(tl.sum(total, axis=2), axis=1)
    if BIAS:
        out += tl.load(bias + row, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row, out.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens", "start", "rows"])
def few_tokens(
    x, psi, y, bias, codes, tokens, start, rows,
    COLS: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, BYTES: tl.constexpr, PACK: tl.constexpr,
    BIAS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_PACKS: tl.constexpr,
):  # fmt: skip
    """y (tokens, rows) = x (tokens, COLS) W^T + bias for up to 16 tokens, on the matrix units, summed in float32."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = row < rows
    token = tl.arange(0, 16)
    total = tl.zeros((BLOCK_ROWS, 16), tl.float32)
    for first in range(0, (COLS + PACK - 1) // PACK, BLOCK_PACKS):
        pack = (first + tl.arange(0, BLOCK_PACKS))[None, :]
        weight, _ = _weights(
            psi + start, codes, row.to(tl.int64), pack, inside[:, None], COLS, GROUP, BITS, BYTES, PACK
        )
        weight = tl.reshape(weight, (BLOCK_ROWS, BLOCK_PACKS * PACK))
        col = first * PACK + tl.arange(0, BLOCK_PACKS * PACK)
        mask = (col[:, None] < COLS) & (token[None, :] < tokens)
        inputs = tl.load(x + token[None, :] * COLS + col[:, None], mask=mask, other=0.0)
        if _WIDEN:
            weight, inputs = weight.to(tl.float32), inputs.to(tl.float32)
        total = tl.dot(weight, inputs, total, input_precision="ieee")
    if BIAS:
        total += tl.load(bias + row, mask=inside, other=0.0).to(tl.float32)[:, None]
    mask = inside[:, None] & (token[None, :] < tokens)
    tl.store(y + token[None, :].to(tl.int64) * rows + row[:, None], total.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["start", "rows"])
def whole_weight(
    psi, out, codes, start, rows,
    COLS: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, BYTES: tl.constexpr, PACK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_PACKS: tl.constexpr,
):  # fmt: skip
    """out (rows, COLS) = W. Each program writes BLOCK_ROWS rows of BLOCK_PACKS packs."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    pack = (tl.program_id(1) * BLOCK_PACKS + tl.arange(0, BLOCK_PACKS))[None, :]
    inside, row = row < rows, row.to(tl.int64)
    weight, col = _weights(psi + start, codes, row, pack, inside[:, None], COLS, GROUP, BITS, BYTES, PACK)
    mask = inside[:, None, None] & (col < COLS)
    tl.store(out + (row * COLS)[:, None, None] + col, weight, mask=mask)


@triton.jit(do_not_specialize=["start", "books"])
def add_adjoint(
    gradient, into, codes, start, books,
    COLS: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, BYTES: tl.constexpr, PACK: tl.constexpr,
    SPAN: tl.constexpr, BLOCK_BOOKS: tl.constexpr, BLOCK_PACKS: tl.constexpr,
):  # fmt: skip
    """into (m,) += R^T gradient (rows, COLS). Each program has BLOCK_BOOKS codebooks, one per group of a row.

    A codebook's group lies in SPAN packs at most. The program compares each code with each entry, so that every sum is
    taken in one order and no atomic addition is needed: the result does not change from run to run.
    """
    ENTRIES: tl.constexpr = 2**BITS
    GROUPS: tl.constexpr = (COLS + GROUP - 1) // GROUP
    book = tl.program_id(0) * BLOCK_BOOKS + tl.arange(0, BLOCK_BOOKS)
    inside = book < books
    row, begin = (book // GROUPS).to(tl.int64), book % GROUPS * GROUP
    stop = tl.minimum(begin + GROUP, COLS)
    entry = tl.arange(0, ENTRIES)
    total = tl.zeros((BLOCK_BOOKS, BLOCK_PACKS * PACK, ENTRIES), tl.float32)
    for first in range(0, SPAN, BLOCK_PACKS):
        pack = (begin // PACK)[:, None] + first + tl.arange(0, BLOCK_PACKS)[None, :]
        code, col = _codes(codes, row, pack, inside[:, None], COLS, BITS, BYTES, PACK)
        mask = inside[:, None, None] & (col >= begin[:, None, None]) & (col < stop[:, None, None])
        part = tl.load(gradient + (row * COLS)[:, None, None] + col, mask=mask, other=0.0).to(tl.float32)
        code = tl.reshape(code, (BLOCK_BOOKS, BLOCK_PACKS * PACK))[:, :, None]
        part = tl.reshape(part, (BLOCK_BOOKS, BLOCK_PACKS * PACK))[:, :, None]
        total += tl.where(code == entry[None, None, :], part, 0.0)
    target = into + start + book.to(tl.int64)[:, None] * ENTRIES + entry[None, :]
    before = tl.load(target, mask=inside[:, None], other=0.0).to(tl.float32)
    after = before + tl.sum(total, axis=1)
    tl.store(target, after.to(into.dtype.element_ty), mask=inside[:, None])
