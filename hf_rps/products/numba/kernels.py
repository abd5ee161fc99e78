"""Numba kernels over packed codes: few tokens times W^T, W made, and its adjoint, each for a range of rows.

    W[r, c] = books[r, c // group * entries + code of (r, c)]          entries = 2**bits

Arrays are what :mod:`hf_rps.mappings.codes` has packed, flat, and the codebooks of a row side by side (rows, groups *
entries), float32. Rows are independent in all three, so that ranges of them can be given to different threads; a row is
summed in one order, however the rows are shared out.

A codebook of up to 16 numbers fits one or two vector registers, where one instruction looks up 16 or 8 codes at a
time: :func:`_look_up` is written in LLVM's own terms, because no loop over an array is compiled to it. On other
processors, for 8 bits, and at the ends of rows and groups, a code is looked up in memory.

Importing this module needs Numba, and compiles the kernels or takes them from Numba's cache. All is in one file because
that cache notices no change in another.
"""

from __future__ import annotations

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic

FEW_TOKENS = 32  # of few_tokens; above, making W for the library's product costs less (docs/design.md)
_LANES = 16  # codes that _look_up takes at once
# sums may be taken in any order, but what is not finite stays so
_OPTIONS = {"nogil": True, "fastmath": {"reassoc", "contract"}, "error_model": "numpy"}


def _compiled(signature: str):
    """Compile for one signature now, so that a failure is known before the first use."""

    def decorate(function):
        try:
            return numba.njit(signature, cache=True, **_OPTIONS)(function)
        except (RuntimeError, OSError):  # no folder for the cache that can be written, or no space in it
            return numba.njit(signature, **_OPTIONS)(function)

    return decorate


_helper = numba.njit(**_OPTIONS)


def _features() -> str:
    """Of the processor that Numba compiles for, as LLVM names them: '+avx2,-avx512f,...'."""
    return cpu_target.target_context.codegen().magic_tuple()[2]


_HAS_AVX512 = "+avx512f" in _features()
_HAS_VECTORS = _HAS_AVX512 or "+avx2" in _features()
_I32, _F32 = ir.IntType(32), ir.FloatType()


def _vector(element: ir.Type, lanes: int = _LANES) -> ir.VectorType:
    return ir.VectorType(element, lanes)


def _lanes(values: list[int]) -> ir.Constant:
    return ir.Constant(_vector(_I32, len(values)), [ir.Constant(_I32, value) for value in values])


def _splat(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    empty = ir.Constant(_vector(value.type), ir.Undefined)
    return builder.shuffle_vector(builder.insert_element(empty, value, _I32(0)), empty, _lanes([0] * _LANES))


def _load(builder: ir.IRBuilder, address: ir.Value, kind: ir.Type) -> ir.Value:
    """From any address, aligned or not."""
    loaded = builder.load(builder.inttoptr(address, kind.as_pointer()))
    loaded.align = 1
    return loaded


def _table(builder: ir.IRBuilder, book: ir.Value, bits: ir.Value) -> ir.Value:
    """The codebook at the address ``book``, repeated until it has 16 entries: the codes' upper bits do not matter."""
    place = cgutils.alloca_once(builder, _vector(_F32))
    for size in (2, 3, 4):
        with builder.if_then(builder.icmp_signed("==", bits, ir.Constant(bits.type, size))):
            entries = _load(builder, book, _vector(_F32, 2**size))
            repeated = _lanes([i % 2**size for i in range(_LANES)])
            builder.store(builder.shuffle_vector(entries, entries, repeated), place)
    return builder.load(place)


def _permuted(builder: ir.IRBuilder, table: ir.Value, indices: ir.Value) -> ir.Value:
    """Entries of a table of 16 at the lower four bits of 16 ``indices``."""

    def instruction(name: str, lanes: int):
        kind = ir.FunctionType(_vector(_F32, lanes), [_vector(_F32, lanes), _vector(_I32, lanes)])
        return cgutils.get_or_insert_function(builder.module, kind, name)

    if _HAS_AVX512:
        return builder.call(instruction("llvm.x86.avx512.permvar.sf.512", 16), [table, indices])
    permute, first, second = instruction("llvm.x86.avx2.permps", 8), _lanes(list(range(8))), _lanes(list(range(8, 16)))
    halves = []
    for part in (first, second):
        few = builder.shuffle_vector(indices, indices, part)
        low = builder.call(permute, [builder.shuffle_vector(table, table, first), few])
        high = builder.call(permute, [builder.shuffle_vector(table, table, second), few])
        is_high = builder.icmp_unsigned("!=", builder.and_(few, _lanes([8] * 8)), _lanes([0] * 8))
        halves.append(builder.select(is_high, high, low))
    return builder.shuffle_vector(*halves, _lanes(list(range(_LANES))))


@intrinsic
def _look_up(typing, codes, book, out, bits, count):
    """Write ``count`` * 16 weights to ``out``: the entries of ``book`` at as many packed codes of 2, 3 or 4 bits.

    The first three are addresses. Of the last codes it reads 4 - ``bits`` bytes more than they take.
    """

    def codegen(context, builder, signature, arguments):
        codes, book, out, bits, count = arguments
        table = _table(builder, book, bits)
        shifts = builder.mul(_splat(builder, builder.trunc(bits, _I32)), _lanes([i % 8 for i in range(_LANES)]))
        with cgutils.for_range(builder, count) as loop:
            step = builder.mul(loop.index, builder.shl(bits, ir.Constant(bits.type, 1)))
            first = builder.add(codes, step)  # of 8 codes, which take up to 4 bytes; the second 8 begin ``bits`` later
            pair = [_splat(builder, _load(builder, at, _I32)) for at in (first, builder.add(first, bits))]
            words = builder.shuffle_vector(*pair, _lanes([0] * 8 + [_LANES] * 8))
            values = _permuted(builder, table, builder.lshr(words, shifts))
            to = builder.add(out, builder.mul(loop.index, ir.Constant(out.type, 4 * _LANES)))
            builder.store(values, builder.inttoptr(to, values.type.as_pointer())).align = 4
        return context.get_dummy_value()

    return types.void(*[types.intp] * 5), codegen


@intrinsic
def _load_word(typing, address):
    """The four bytes at any address as uint32, the first byte being the lowest."""

    def codegen(context, builder, signature, arguments):
        return _load(builder, arguments[0], _I32)

    return types.uint32(types.intp), codegen


@_helper
def _word(codes, at, bits):
    """The eight codes of up to 4 bits that begin on byte ``at``, as one number; its bits above them are any."""
    if at + 4 <= codes.size:
        return _load_word(codes.ctypes.data + at)
    word = np.uint32(0)
    for i in range(codes.size - at):
        word |= np.uint32(codes[at + i]) << np.uint32(8 * i)
    return word


@_helper
def _code(codes, begin, column, bits):
    """One code of the row whose bytes begin on ``begin``."""
    if bits == 8:
        return np.int64(codes[begin + column])
    word = _word(codes, begin + column // 8 * bits, bits)
    return np.int64(word >> np.uint32(column % 8 * bits)) & ((1 << bits) - 1)


# Helpers are given arrays and places in them: a slice would cost as much as several vectors.


@_helper
def _one_by_one(codes, begin, books, row, place, out, line, bits, first, stop):
    """``out``[line, first:stop]: weights of one group of a row, whose book begins on ``place``."""
    if bits == 8:
        for column in range(first, stop):
            out[line, column] = books[row, np.uint64(place) + np.uint64(codes[begin + column])]
        return
    for column in range(first, stop):
        out[line, column] = books[row, place + _code(codes, begin, column, bits)]


@_helper
def _expand(codes, books, row, out, line, bits, group):
    """``out``[line] (cols,): one row of W, 16 codes at a time where so many begin on a byte."""
    rows, cols = books.shape[0], out.shape[1]
    begin, place = row * (-(-cols // 8) * bits), 0
    codes_at, book_at = codes.ctypes.data + begin, books.ctypes.data + 4 * row * books.shape[1]
    out_at = out.ctypes.data + 4 * line * cols
    # _look_up reads beyond its last codes, of which only the last row's may be the last bytes of all
    limit = 0 if bits == 8 else cols if row + 1 < rows else (cols - 1) // 8 * 8
    for first in range(0, cols, group):
        head, stop = first, min(cols, first + group)
        if _HAS_VECTORS and first < limit:
            if first & 7:
                head = min(stop, (first | 7) + 1)
                _one_by_one(codes, begin, books, row, place, out, line, bits, first, head)
            count = max(0, min(stop, limit) - head) >> 4
            _look_up(codes_at + (head >> 3) * bits, book_at + 4 * place, out_at + 4 * head, bits, count)
            head += 16 * count
        if head < stop:
            _one_by_one(codes, begin, books, row, place, out, line, bits, head, stop)
        place += 1 << bits


@_compiled("void(u1[::1], f4[:, ::1], f4[:, ::1], i8, i8, i8, i8)")
def make(codes, books, out, bits, group, first, stop):
    """Rows first to stop - 1 of ``out`` (rows, cols) become those of W."""
    for row in range(first, stop):
        _expand(codes, books, row, out, row, bits, group)


@_helper
def _one_token(weights, line, x, y, bias, token, row):
    total = np.float32(0)
    for c in range(x.shape[1]):
        total += weights[line, c] * x[token, c]
    y[token, row] = total + (bias[row] if bias.size else np.float32(0))


@_helper
def _four_tokens(weights, x, y, bias, token, row):
    """Of two rows: in a loop of its own each product would load two numbers, here it is six for eight products."""
    a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = np.float32(0)
    for c in range(x.shape[1]):
        a, b = weights[0, c], weights[1, c]
        x0, x1, x2, x3 = x[token, c], x[token + 1, c], x[token + 2, c], x[token + 3, c]
        a0, a1, a2, a3 = a0 + a * x0, a1 + a * x1, a2 + a * x2, a3 + a * x3
        b0, b1, b2, b3 = b0 + b * x0, b1 + b * x1, b2 + b * x2, b3 + b * x3
    for i, total in enumerate(((a0, a1, a2, a3), (b0, b1, b2, b3))):
        added = bias[row + i] if bias.size else np.float32(0)
        for j in range(4):
            y[token + j, row + i] = total[j] + added


@_helper
def _all_tokens(weights, lines, x, y, bias, row):
    """Of one row or two, whose ``weights`` (2, cols) are there."""
    tokens = x.shape[0]
    fours = tokens // 4 * 4 if lines == 2 else 0
    for token in range(0, fours, 4):
        _four_tokens(weights, x, y, bias, token, row)
    for token in range(fours, tokens):
        for line in range(lines):
            _one_token(weights, line, x, y, bias, token, row + line)


@_compiled("void(u1[::1], f4[:, ::1], f4[:, ::1], f4[:, ::1], f4[::1], i8, i8, i8, i8)")
def few_tokens(codes, books, x, y, bias, bits, group, first, stop):
    """Columns first to stop - 1 of ``y`` (tokens, rows) become those of x (tokens, cols) W^T + bias.

    ``bias`` (rows,), or empty. Two rows of W at a time are expanded, for all tokens.
    """
    weights = np.empty((2, x.shape[1]), np.float32)
    for row in range(first, stop, 2):
        lines = min(2, stop - row)
        for line in range(lines):
            _expand(codes, books, row + line, weights, line, bits, group)
        _all_tokens(weights, lines, x, y, bias, row)


@_helper
def _add_eights(codes, at, gradient, place, sums, step, bits, count):
    """Of ``count`` whole eights of columns, whose codes begin on byte ``at``, and gradients on place ``place[0]``."""
    # places are unsigned: a signed one might be counted from the end, which is asked each time
    mask, line, to, step = np.uint32((1 << bits) - 1), np.uint64(place[0]), np.uint64(place[1]), np.uint64(step)
    for _ in range(count):
        word = _word(codes, at, bits)
        for i in range(np.uint64(8)):
            code = np.uint64((word >> np.uint32(i * np.uint64(bits))) & mask)
            sums[to + i * step + code] += gradient[line + i]
        at += bits
        line += np.uint64(8)


@_helper
def _add_one_by_one(codes, begin, gradient, line, sums, place, step, bits, first, stop):
    for column in range(first, stop):
        sums[(column & 7) * step + place + _code(codes, begin, column, bits)] += gradient[line + column]


@_helper
def _add_group(codes, begin, gradient, line, sums, place, step, bits, first, stop):
    """Add one group of a row, columns first to stop - 1 of what begins on gradient[line], to ``sums``.

    Column c goes to table c mod 8: an addition need not wait for the one before it to have the same number.
    """
    head, tail = min(stop, (first + 7) & ~7), stop & ~7
    if bits == 8 or head >= tail:
        _add_one_by_one(codes, begin, gradient, line, sums, place, step, bits, first, stop)
        return
    if first < head:
        _add_one_by_one(codes, begin, gradient, line, sums, place, step, bits, first, head)
    at, count, places = begin + (head >> 3) * bits, (tail - head) >> 3, (line + head, place)
    if bits == 4:  # constants, for which the compiler has cheaper shifts
        _add_eights(codes, at, gradient, places, sums, step, 4, count)
    elif bits == 3:
        _add_eights(codes, at, gradient, places, sums, step, 3, count)
    else:
        _add_eights(codes, at, gradient, places, sums, step, 2, count)
    if tail < stop:
        _add_one_by_one(codes, begin, gradient, line, sums, place, step, bits, tail, stop)


@_compiled("void(u1[::1], f4[:, ::1], f4[:, ::1], i8, i8, i8, i8)")
def add_adjoint(codes, into, gradient, bits, group, first, stop):
    """Rows first to stop - 1 of ``into`` (rows, groups * entries) += sums of the ``gradient`` (rows, cols) by code."""
    cols, size, flat = gradient.shape[1], into.shape[1], gradient.ravel()
    # eight tables are emptied and added up for each row, which must not cost more than it saves
    tables, step = (8, size) if 8 * size <= 2 * cols else (1, 0)
    sums = np.empty(tables * size, np.float32)
    for row in range(first, stop):
        sums[:] = 0
        begin, place = row * (-(-cols // 8) * bits), 0
        for start in range(0, cols, group):
            _add_group(codes, begin, flat, row * cols, sums, place, step, bits, start, min(cols, start + group))
            place += 1 << bits
        for table in range(tables):
            for i in range(size):
                into[row, i] += sums[table * size + i]


# ---- books of vectors, which all rows read:
#
#     W[r, c] = scale of r * books[(c // group * entries + code of (r, c // tile)) * tile + c % tile]
#
# ``books`` is flat. A row's bytes are its packed codes and its scale, the upper half of a float32.


@_helper
def _scale(codes, at):
    return np.uint32(np.uint32(codes[at]) << 16 | np.uint32(codes[at + 1]) << 24).view(np.float32)


def _each_byte(typing, step):
    """An intrinsic (codes, books, numbers, scale, tile, count): ``step`` for each of ``count`` codes of 8 bits.

    Vectors have 2, 4 or 8 numbers. The first three are addresses; ``numbers`` are the columns of a row.

    ``step(builder, book, column, scale)`` is given pointers to vectors and the scale as one.
    """

    def codegen(context, builder, signature, arguments):
        codes, books, numbers, scale, tile, count = arguments
        for lanes in (2, 4, 8):
            kind = _vector(_F32, lanes)
            with builder.if_then(builder.icmp_signed("==", tile, ir.Constant(tile.type, lanes))):
                empty = ir.Constant(kind, ir.Undefined)
                first = builder.insert_element(empty, scale, _I32(0))
                factor, width = (
                    builder.shuffle_vector(first, empty, _lanes([0] * lanes)),
                    ir.Constant(tile.type, 4 * lanes),
                )
                with cgutils.for_range(builder, count) as loop:
                    byte = _load(builder, builder.add(codes, loop.index), ir.IntType(8))
                    book = builder.add(books, builder.mul(builder.zext(byte, books.type), width))
                    column = builder.add(numbers, builder.mul(loop.index, width))
                    step(builder, *(builder.inttoptr(at, kind.as_pointer()) for at in (book, column)), factor)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 3, types.float32, types.intp, types.intp), codegen


def _read(builder: ir.IRBuilder, pointer: ir.Value) -> ir.Value:
    found = builder.load(pointer)
    found.align = 4
    return found


@intrinsic
def _look_up_vectors(typing, codes, books, numbers, scale, tile, count):
    """``numbers`` = scale times the entries of ``books``."""

    def step(builder, book, column, scale):
        builder.store(builder.fmul(_read(builder, book), scale), column).align = 4

    return _each_byte(typing, step)


@intrinsic
def _add_vectors(typing, codes, books, numbers, scale, tile, count):
    """The entries of ``books`` += scale times ``numbers``."""

    def step(builder, book, column, scale):
        added = builder.fmul(_read(builder, column), scale)
        builder.store(builder.fadd(_read(builder, book), added), book).align = 4

    return _each_byte(typing, step)


@_helper
def _expand_vectors(codes, books, row, out, line, bits, tile, group):
    """``out``[line] (cols,): one row of W."""
    cols = out.shape[1]
    tiles, entries = -(-cols // tile), 1 << bits
    size = -(-tiles // 8) * bits
    begin = row * (size + 2)
    scale, done = _scale(codes, begin + size), 0
    if bits == 8 and group >= cols and (tile == 2 or tile == 4 or tile == 8):
        done = cols // tile
        to = out.ctypes.data + 4 * line * cols
        _look_up_vectors(codes.ctypes.data + begin, books.ctypes.data, to, scale, tile, done)
    for t in range(done, tiles):
        column = t * tile
        place = (column // group * entries + _code(codes, begin, t, bits)) * tile
        for j in range(min(tile, cols - column)):
            out[line, column + j] = scale * books[place + j]


@_compiled("void(u1[::1], f4[::1], f4[:, ::1], i8, i8, i8, i8, i8)")
def make_vectors(codes, books, out, bits, tile, group, first, stop):
    """Rows first to stop - 1 of ``out`` (rows, cols) become those of W."""
    for row in range(first, stop):
        _expand_vectors(codes, books, row, out, row, bits, tile, group)


@_compiled("void(u1[::1], f4[::1], f4[:, ::1], f4[:, ::1], f4[::1], i8, i8, i8, i8, i8)")
def few_tokens_vectors(codes, books, x, y, bias, bits, tile, group, first, stop):
    """:func:`few_tokens` with books of vectors."""
    weights = np.empty((2, x.shape[1]), np.float32)
    for row in range(first, stop, 2):
        lines = min(2, stop - row)
        for line in range(lines):
            _expand_vectors(codes, books, row + line, weights, line, bits, tile, group)
        _all_tokens(weights, lines, x, y, bias, row)


@_compiled("void(u1[::1], f4[::1], f4[:, ::1], i8, i8, i8, i8, i8)")
def add_adjoint_vectors(codes, into, gradient, bits, tile, group, first, stop):
    """``into`` (size,) += rows first to stop - 1 of the ``gradient`` (rows, cols) by code, times the row's scale."""
    cols, entries = gradient.shape[1], 1 << bits
    tiles = -(-cols // tile)
    size = -(-tiles // 8) * bits
    for row in range(first, stop):
        begin = row * (size + 2)
        scale, done = _scale(codes, begin + size), 0
        if bits == 8 and group >= cols and (tile == 2 or tile == 4 or tile == 8):
            done = cols // tile
            numbers = gradient.ctypes.data + 4 * row * cols
            _add_vectors(codes.ctypes.data + begin, into.ctypes.data, numbers, scale, tile, done)
        for t in range(done, tiles):
            column = t * tile
            place = np.uint64((column // group * entries + _code(codes, begin, t, bits)) * tile)
            for j in range(np.uint64(min(tile, cols - column))):
                into[place + j] += scale * gradient[row, np.uint64(column) + j]
