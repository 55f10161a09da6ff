"""What Numba lacks: prefetching, whole vectors, and bfloat16 numbers, which arrays hold as their 16 bits in int16."""

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit as numba_njit
from numba import types
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
INT16, INT32, INT64, FLOAT32 = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
LARGEST, INFINITY = 2**31 - 1, 0x7F800000
"""The largest int32, and the bits of a float32 that is infinite."""
LANES = 16
"""Float32 numbers of a vector."""
ROUNDING, ROUNDING_BITS = np.float32(1.5 * 2**23), np.uint32(0x4B400000)
"""A float32 whose last binary digit is worth one, and its bits."""
TINY = np.float32(1e-30)
"""A float32 whose reciprocal may soon be no number: shorter steps are rounded to zero."""

njit: Any = numba_njit  # takes options that it does not declare
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
    """The same for a function that only compiled ones call, and that makes no arrays.

    So it counts no references to those it is given: an atomic operation for each row that is looked at takes longer
    than to look at it.
    """
    return _inlined(function, FAST)


def inlined_as_written(function: Any) -> Any:
    """The same, with sums in the order in which they are written: digits that one loses another may have kept."""
    return _inlined(function, {"contract"})


def _inlined(function: Any, fastmath: set[str]) -> Any:
    return njit(function, nogil=True, fastmath=fastmath, error_model="numpy", forceinline=True, _nrt=False)


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
def float_of(typing: Any, bits: Any) -> Any:
    """The float32 of 32 bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], FLOAT32)

    return types.float32(types.uint32), generate


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


@intrinsic
def ordered(typing: Any, x: Any) -> Any:
    """A float32 as an int32 of the same order; NaN above all."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return in_order(builder, builder.bitcast(arguments[0], INT32))

    return types.int32(types.float32), generate


def in_order(builder: Any, words: Any) -> Any:
    """The bits of float32 numbers, or of one, as int32 of the same order; NaN above all."""
    kind = words.type
    largest = _filled(kind, LARGEST)
    flipped = builder.xor(words, builder.and_(builder.ashr(words, _filled(kind, 31)), largest))
    is_nan = builder.icmp_signed(">", builder.and_(words, largest), _filled(kind, INFINITY))
    return builder.select(is_nan, largest, flipped)


def _filled(kind: Any, number: int) -> Any:
    return ir.Constant(kind, [number] * kind.count if isinstance(kind, ir.VectorType) else number)


@intrinsic
def from_ordered(typing: Any, number: Any) -> Any:
    """The float32 that `ordered` made an int32 of."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        flip = builder.and_(builder.ashr(arguments[0], INT32(31)), INT32(LARGEST))
        return builder.bitcast(builder.xor(arguments[0], flip), ir.FloatType())

    return types.float32(types.int32), generate


@inlined
def magnitude(x: float) -> Any:
    """The absolute value of a float32 as an int32 of the same order; infinity and then NaN above all."""
    return np.int32(bits_of(x) & np.uint32(LARGEST))


@inlined
def nearest(x: float) -> Any:
    """The integer nearest to a float32 of less than 2**22, ties to even; any integer of a larger one or NaN."""
    return np.int32(bits_of(x + ROUNDING) - ROUNDING_BITS)


def vector(kind: Any, numbers: Any) -> Any:
    """A constant vector."""
    return ir.Constant(ir.VectorType(kind, len(numbers)), list(numbers))


def splat(builder: Any, number: Any, count: int) -> Any:
    """A vector of one number."""
    nothing = ir.Constant(ir.VectorType(number.type, count), ir.Undefined)
    one = builder.insert_element(nothing, number, INT32(0))
    return builder.shuffle_vector(one, nothing, vector(INT32, [0] * count))


def place_in(context: Any, builder: Any, kind: Any, array: Any, first: Any, *, count: int) -> Any:
    """A pointer to so many numbers of a contiguous array, from one on, as a vector."""
    data = builder.gep(context.make_array(kind)(context, builder, array).data, [first])
    return builder.bitcast(data, ir.VectorType(context.get_data_type(kind.dtype), count).as_pointer())


@intrinsic
def bit_count(typing: Any, bits: Any) -> Any:
    """How many bits of a uint64 are set."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.intp(types.uint64), generate
