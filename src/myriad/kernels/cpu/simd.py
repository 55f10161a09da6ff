"""What Numba lacks: prefetching, and bfloat16 numbers, which arrays hold as their 16 bits in int16."""

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core import config as numba_config
from numba.extending import intrinsic as numba_intrinsic
from numba.extending import overload
from torch import Tensor

FAST = {"reassoc", "contract", "nsz", "arcp"}
"""Sums may be taken in any order, so that they run in vector registers; NaN and infinity keep their meaning."""
HERE = Path(__file__).parent
LINE = 64
"""Bytes of a cache line."""
WORD = 64
"""Bits of a word: numbers that are compared at once."""

intrinsic: Any = numba_intrinsic  # what it makes of a function takes other arguments
config: Any = numba_config  # a module whose names are made when it is imported


def compiled(function: Any) -> Any:
    """Compile a function of arrays and numbers when it is first called, and keep it on disk where that can be."""
    options = {"nogil": True, "fastmath": FAST, "error_model": "numpy"}
    asked, config.CACHE_DIR = config.CACHE_DIR, _folder(config.CACHE_DIR)
    try:
        return njit(function, cache=True, **options)
    except RuntimeError:  # no folder can be written
        return njit(function, **options)
    finally:
        config.CACHE_DIR = asked


def _folder(asked: str) -> str:
    """Where compiled functions are kept: in a folder for the sources that they are made of.

    Numba looks whether a function's own file has changed, not whether those have that it takes inlined parts from.
    """
    return str((Path(asked) if asked else HERE / "__pycache__") / f"kernels-{_sources()}")


@cache
def _sources() -> str:
    parts = [path.read_bytes() for path in sorted(HERE.glob("*.py"))]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def inlined(function: Any) -> Any:
    """The same for a function that only compiled ones call."""
    return njit(function, nogil=True, fastmath=FAST, error_model="numpy", forceinline=True)


def array(tensor: Tensor) -> np.ndarray:
    """A contiguous view of a float32, bfloat16 or integer tensor for a compiled function."""
    if tensor.requires_grad or not tensor.is_contiguous():  # each costs a microsecond: as much as a kernel's work
        tensor = tensor.detach().contiguous()
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


@intrinsic
def _prefetch_line(typing: Any, table: Any, offset: Any) -> Any:
    """Ask for the cache line at a byte offset of a contiguous array, into the second level of the cache: more lines
    can be on their way to it than to the first."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        place = builder.gep(builder.bitcast(data, ir.IntType(8).as_pointer()), [arguments[1]])
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [place.type, number, number, number])
        prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(prefetch, [place, number(0), number(2), number(1)])
        return context.get_dummy_value()

    return types.none(table, types.intp), generate


@inlined
def prefetch_row(table: Any, row: int) -> None:
    """Ask for a row of a contiguous table, so that it is on its way while others are computed with."""
    size = table.shape[1] * table.itemsize
    for offset in range(0, size, LINE):
        _prefetch_line(table, row * size + offset)


@intrinsic
def bits_of(typing: Any, x: Any) -> Any:
    """The 32 bits of a float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), generate


@intrinsic
def wide(typing: Any, x: Any) -> Any:
    """An element of a float32 or bfloat16 array as float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if signature.args[0] == types.float32:
            return arguments[0]
        word = builder.zext(arguments[0], ir.IntType(32))
        return builder.bitcast(builder.shl(word, ir.IntType(32)(16)), ir.FloatType())

    return types.float32(x), generate


@inlined
def to_bfloat16(x: float) -> Any:
    """The 16 bits of the bfloat16 nearest to a float32, ties to even."""
    if x != x:
        return np.int16(0x7FC0)
    bits = bits_of(x)
    return np.int16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


def as_element(array, x):
    """A float32 as an array holds it."""
    raise NotImplementedError("for compiled functions")


@overload(as_element)
def _as_element(array, x):
    if array.dtype == types.int16:
        return lambda array, x: to_bfloat16(x)
    return lambda array, x: x


def _to_bfloat16s(builder: Any, numbers: Any) -> Any:
    """A vector of float32 as `to_bfloat16` rounds them."""

    def constant(value: int) -> Any:
        return ir.Constant(words.type, [value] * words.type.count)

    words = builder.bitcast(numbers, ir.VectorType(ir.IntType(32), numbers.type.count))
    odd = builder.and_(builder.lshr(words, constant(16)), constant(1))
    rounded = builder.lshr(builder.add(words, builder.add(odd, constant(0x7FFF))), constant(16))
    is_nan = builder.fcmp_unordered("uno", numbers, numbers)
    kept = builder.select(is_nan, constant(0x7FC0), rounded)
    return builder.trunc(kept, ir.VectorType(ir.IntType(16), words.type.count))


@intrinsic
def store_line_past_cache(typing: Any, rows: Any, place: Any, numbers: Any, first: Any) -> Any:
    """Write a whole line of memory, from element `place` of a float32 or bfloat16 array on, that is not wanted in the
    cache: it need not be read before. The numbers are those from `first` on of a float32 array."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kinds = signature.args
        target, source = (context.make_array(kinds[i])(context, builder, arguments[i]).data for i in (0, 2))
        count = 8 * LINE // kinds[0].dtype.bitwidth
        source = builder.gep(source, [arguments[3]])
        read = builder.load(builder.bitcast(source, ir.VectorType(ir.FloatType(), count).as_pointer()), align=4)
        line = _to_bfloat16s(builder, read) if kinds[0].dtype == types.int16 else read
        target = builder.bitcast(builder.gep(target, [arguments[1]]), line.type.as_pointer())
        stored = builder.store(line, target, align=LINE)
        stored.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))
        return context.get_dummy_value()

    return types.none(rows, types.intp, numbers, types.intp), generate


def _ordered(builder: Any, word: Any, width: int, infinity: int) -> Any:
    """The bits of a floating point number as an integer of the same order; NaN above all."""
    kind = ir.IntType(width)
    rest = kind(2 ** (width - 1) - 1)
    flipped = builder.xor(word, builder.and_(builder.ashr(word, kind(width - 1)), rest))
    is_nan = builder.icmp_signed(">", builder.and_(word, rest), kind(infinity))
    return builder.select(is_nan, rest, flipped)


@intrinsic
def ordered(typing: Any, x: Any) -> Any:
    """An element of a float32 or bfloat16 array as an int32 or int16 of the same order; NaN above all."""
    result = types.int32 if x == types.float32 else types.int16

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if signature.args[0] == types.float32:
            return _ordered(builder, builder.bitcast(arguments[0], ir.IntType(32)), 32, 0x7F800000)
        return _ordered(builder, arguments[0], 16, 0x7F80)

    return result(x), generate


@intrinsic
def from_ordered(typing: Any, number: Any) -> Any:
    """The float32 that `ordered` made an int32 or int16 of."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        width = signature.args[0].bitwidth
        kind = ir.IntType(width)
        flip = builder.and_(builder.ashr(arguments[0], kind(width - 1)), kind(2 ** (width - 1) - 1))
        word = builder.zext(builder.xor(arguments[0], flip), ir.IntType(32)) if width < 32 else None
        if word is None:
            return builder.bitcast(builder.xor(arguments[0], flip), ir.FloatType())
        return builder.bitcast(builder.shl(word, ir.IntType(32)(16)), ir.FloatType())

    return types.float32(number), generate


def _word(builder: Any, context: Any, kind: Any, array: Any, first: Any) -> Any:
    """A pointer to 64 numbers of an array, from one on."""
    data = builder.gep(context.make_array(kind)(context, builder, array).data, [first])
    return builder.bitcast(data, ir.VectorType(ir.IntType(kind.dtype.bitwidth), WORD).as_pointer())


@intrinsic
def keep_larger(typing: Any, best: Any, place: Any, numbers: Any, first: Any) -> Any:
    """The larger of 64 integers each: best[place :] = max(best[place :], numbers[first :])."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        align = signature.args[0].dtype.bitwidth // 8
        mine = _word(builder, context, signature.args[0], *arguments[:2])
        theirs = _word(builder, context, signature.args[2], *arguments[2:])
        old, new = builder.load(mine, align=align), builder.load(theirs, align=align)
        builder.store(builder.select(builder.icmp_signed(">", new, old), new, old), mine, align=align)
        return context.get_dummy_value()

    return types.none(best, types.intp, numbers, types.intp), generate


def _compared(comparison: str) -> Any:
    def compare(typing: Any, numbers: Any, first: Any, bound: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            place = _word(builder, context, signature.args[0], *arguments[:2])
            mine = builder.load(place, align=signature.args[0].dtype.bitwidth // 8)
            nothing = ir.Constant(mine.type, ir.Undefined)
            one = builder.insert_element(nothing, arguments[2], ir.IntType(32)(0))
            zeros = ir.Constant(ir.VectorType(ir.IntType(32), WORD), [0] * WORD)
            bounds = builder.shuffle_vector(one, nothing, zeros)
            return builder.bitcast(builder.icmp_signed(comparison, mine, bounds), ir.IntType(WORD))

        return types.uint64(numbers, types.intp, numbers.dtype), generate

    return compare


reaching = intrinsic(_compared(">="))
"""reaching(numbers, first, bound): the bits of those of 64 integers, from `first` on, that are at least the bound."""
above = intrinsic(_compared(">"))
"""The same of those above it."""


@intrinsic
def as_ordered(typing: Any, numbers: Any, number: Any) -> Any:
    """An int64 as an array of smaller integers holds it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.trunc(arguments[1], ir.IntType(signature.args[0].dtype.bitwidth))

    return numbers.dtype(numbers, types.int64), generate


@intrinsic
def lowest_bit(typing: Any, bits: Any) -> Any:
    """The number of the lowest set bit of a uint64 other than zero."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.IntType(1)(1))

    return types.intp(types.uint64), generate


@intrinsic
def bit_count(typing: Any, bits: Any) -> Any:
    """How many bits of a uint64 are set."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.intp(types.uint64), generate
