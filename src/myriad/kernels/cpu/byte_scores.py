"""Scores of queries and sub-keys in products of bytes: four times as many at a time as in float32.

A query is rounded to 127 steps either way of its own largest number, the sub-keys of a half to as many of theirs.
Products of bytes add up without error, so that all a score is off by comes from rounding the two, and by Cauchy and
Schwarz |q . c - q' . c'| <= |q - q'| |c| + |q'| |c - c'|. These norms are computed for each query, and the largest is
taken of a half's sub-keys.

The processor multiplies bytes without a sign by bytes with one, so sub-keys are stored 128 larger, and the sum of a
query's bytes, times 128, is taken off again.

Legend: `H` heads, `P` = 2 halves, `S` sub-keys, `Q` width of a half, `W` words of 64 sub-keys, `F` fours of Q.
"""

from functools import cache
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target
from torch import Tensor

from myriad.kernels.cpu.memory import new_tensor
from myriad.kernels.cpu.rows import ROWS
from myriad.kernels.cpu.selection import LOWEST, WORD
from myriad.kernels.cpu.simd import (
    INT16,
    INT32,
    INT64,
    LANES,
    TINY,
    array,
    compiled,
    from_ordered,
    inlined,
    intrinsic,
    magnitude,
    nearest,
    place_in,
    splat,
    vector,
)
from myriad.kernels.cpu.threads import in_parallel

STEPS = 127
"""Of a byte, either way of zero."""
EPSILON = 2.0**-24
"""The largest relative error of a number rounded to float32."""
WIDEST = 2**16
"""Numbers of a query whose products with a sub-key's surely add up in 32 bits."""
FOURS = WORD // LANES
"""Vectors of a word of sub-keys."""


@cache
def multiplies_bytes() -> bool:
    """Whether the processor that functions are compiled for adds up products of bytes: AVX512-VNNI."""
    context: Any = cpu_target.target_context
    _, _, features = context.codegen().magic_tuple()
    return {"+avx512vnni", "+avx512bw", "+avx512vl"} <= set(features.split(","))


def packed(keys_HPSQ: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Sub-keys as bytes, and what must be known of them.

    Returns:
        four numbers of a sub-key as one int32, next to those of the other 63 of its word, of shape (H, 2, W, F, 64);
        and for each half its step, its largest norm and its largest change by rounding, float32 of shape (H, 2, 3).
    """
    heads, _, side, width = keys_HPSQ.shape
    words_HPWFL = array(new_tensor((heads, 2, -(-side // WORD), -(-width // 4), WORD), torch.int32))
    measures_HP3 = np.empty((heads, 2, 3), np.float32)
    in_parallel(_pack, heads * 2, array(keys_HPSQ), words_HPWFL, measures_HP3, grain=1)
    return words_HPWFL, measures_HP3


@compiled
def _pack(start: int, stop: int, keys_HPSQ: Any, words_HPWFL: Any, measures_HP3: Any) -> None:
    side = keys_HPSQ.shape[2]
    bytes_Q = np.zeros(4 * words_HPWFL.shape[3], np.int8)
    for unit in range(start, stop):
        head, half = unit // 2, unit % 2
        words_WFL = words_HPWFL[head, half]
        words_WFL[-1] = 0  # where there are no sub-keys
        largest = longest = moved = np.float32(0)
        for key in range(side):
            largest = _larger(_largest(keys_HPSQ[head, half, key]), largest)
        step = _step(largest)
        for key in range(side):
            norm, change, _ = _rounded(keys_HPSQ[head, half, key], step, bytes_Q)
            longest, moved = _larger(norm, longest), _larger(change, moved)
            word, lane = key // WORD, key % WORD
            fours_F = bytes_Q.view(np.int32)
            for four in range(len(fours_F)):
                words_WFL[word, four, lane] = fours_F[four] ^ np.int32(-0x7F7F7F80)  # 128 more, byte by byte
        measures_HP3[head, half, 0] = step
        measures_HP3[head, half, 1] = longest
        measures_HP3[head, half, 2] = moved


@inlined
def _larger(new: float, old: float) -> Any:
    """NaN where either is."""
    return new if new > old or new != new else old


@inlined
def _largest(numbers: Any) -> Any:
    """Of the absolute values; no number if one is none."""
    largest = np.int32(0)
    for d in range(len(numbers)):
        largest = max(largest, magnitude(numbers[d]))
    return from_ordered(largest)


@inlined
def _step(largest: float) -> Any:
    step = np.float32(largest / np.float32(STEPS))
    return step if step > TINY else np.float32(0)


@inlined
def _rounded(numbers: Any, step: float, bytes_Q: Any) -> Any:
    """Round a row to bytes; its norm, that of what rounding changed, and the sum of the bytes."""
    inverse = np.float32(1) / step if step > 0 else np.float32(0)
    norm = error = np.float32(0)
    total = np.int32(0)
    for d in range(len(numbers)):
        byte = nearest(numbers[d] * inverse)
        bytes_Q[d] = byte
        total += np.int32(byte)
        change = numbers[d] - np.float32(byte) * step
        norm += numbers[d] * numbers[d]
        error += change * change
    return np.sqrt(norm), np.sqrt(error), total


@inlined
def coarse_scores(
    queries_BQ: Any,
    words_WFL: Any,
    measures_3: Any,
    side: int,
    bytes_BQ: Any,
    starts_B: Any,
    coarse_BS: Any,
    steps_B: Any,
    errors_B: Any,
) -> None:
    """Four queries' scores with a half's sub-keys as int16, how many of their steps go to a unit, and by how many units
    they may be off."""
    width = queries_BQ.shape[1]
    shift = _shift(width)
    for row in range(ROWS):
        step = _step(_largest(queries_BQ[row]))
        norm, change, total = _rounded(queries_BQ[row], step, bytes_BQ[row])
        starts_B[row] = -128 * total
        unit = step * measures_3[0] * np.float32(1 << shift)
        steps_B[row] = np.float32(1) / unit  # infinite, so that all are candidates, where all round to zero
        sums = np.float32((width + 2) * EPSILON) * norm * measures_3[1]
        errors_B[row] = np.float32(1.01) * (change * measures_3[1] + (norm + change) * measures_3[2] + sums)
    for word in range(len(words_WFL)):
        _score_word(bytes_BQ, words_WFL, word, starts_B, shift, coarse_BS)
    coarse_BS[:, side:] = LOWEST


@inlined
def _shift(width: int) -> Any:
    """By how many bits the largest sum of `width` products of bytes must be shifted to fit into 16."""
    shift = 0
    while (width * STEPS * STEPS) >> shift >= 2**15 - 1:
        shift += 1
    return shift


@intrinsic
def _score_word(typing: Any, queries: Any, words: Any, word: Any, starts: Any, shift: Any, coarse: Any) -> Any:
    """Products of four rows of bytes with a word of sub-keys, added to each row's start, and shifted into 16 bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kinds = signature.args
        queries, words, coarse = (context.make_array(kinds[i])(context, builder, arguments[i]) for i in (0, 1, 5))
        fours = builder.extract_value(words.shape, 1)
        side = builder.extract_value(coarse.shape, 1)
        word = arguments[2]
        starts = builder.load(place_in(context, builder, kinds[3], arguments[3], INT64(0), count=ROWS), align=4)
        totals = [
            [cgutils.alloca_once_value(builder, splat(builder, start, LANES)) for _ in range(FOURS)]
            for start in (builder.extract_element(starts, INT32(row)) for row in range(ROWS))
        ]
        line = ir.VectorType(INT32, LANES)
        query = builder.bitcast(queries.data, INT32.as_pointer())
        key = builder.bitcast(words.data, line.as_pointer())
        first = builder.mul(builder.mul(word, fours), INT64(FOURS))
        bytes_64 = ir.VectorType(ir.IntType(8), 4 * LANES)
        kind = ir.FunctionType(line, [line, bytes_64, bytes_64])
        add_products = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.vpdpbusd.512")
        with cgutils.for_range(builder, fours) as loop:
            place = builder.add(first, builder.mul(loop.index, INT64(FOURS)))
            keys = [builder.load(builder.gep(key, [builder.add(place, INT64(four))]), align=4) for four in range(FOURS)]
            for row in range(ROWS):
                place = builder.add(builder.mul(fours, INT64(row)), loop.index)
                mine = splat(builder, builder.load(builder.gep(query, [place]), align=1), LANES)
                mine = builder.bitcast(mine, bytes_64)
                for four in range(FOURS):
                    total = builder.load(totals[row][four])
                    total = builder.call(add_products, [total, builder.bitcast(keys[four], bytes_64), mine])
                    builder.store(total, totals[row][four])
        shift = splat(builder, arguments[4], LANES)
        for row in range(ROWS):
            target = builder.add(builder.mul(side, INT64(row)), builder.mul(word, INT64(WORD)))
            for four in range(0, FOURS, 2):
                two = [builder.ashr(builder.load(totals[row][four + i]), shift) for i in range(2)]
                both = builder.trunc(
                    builder.shuffle_vector(*two, vector(INT32, range(2 * LANES))), ir.VectorType(INT16, 2 * LANES)
                )
                place = builder.gep(coarse.data, [builder.add(target, INT64(four * LANES))])
                builder.store(both, builder.bitcast(place, both.type.as_pointer()), align=2)
        return context.get_dummy_value()

    return types.none(queries, words, types.intp, starts, types.int32, coarse), generate
