"""What the lookups do with rows of a table: dot products and sums, in whole vectors.

Left to itself, LLVM takes half as wide vectors as it could on some processors.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from myriad.kernels.cpu.simd import FLOAT32, INT16, INT32, INT64, LANES, inlined, intrinsic, splat, vector

AHEAD = 4
"""Rows that are on their way while one is computed with."""
GRAIN = 8
"""Tokens worth a thread of their own."""
ROWS = 4
"""Rows whose products with one vector are made at a time: it is read once for all."""
TOTALS = 4
"""Sums that a dot product of one row adds up side by side: additions to one would wait for each other."""

BFLOAT16S, FLOAT32S = ir.VectorType(INT16, LANES), ir.VectorType(FLOAT32, LANES)
NO_NUMBERS = vector(FLOAT32, [0.0] * LANES)


class Rows:
    """A contiguous table of float32 or bfloat16 rows, for an intrinsic to read and write as vectors of float32."""

    def __init__(self, context: Any, builder: Any, kind: Any, array: Any) -> None:
        table = context.make_array(kind)(context, builder, array)
        self.builder = builder
        self.data = table.data
        self.width = builder.extract_value(table.shape, 1)

    def at(self, row: Any) -> Any:
        """The address of a row."""
        return self.builder.gep(self.data, [self.builder.mul(row, self.width)])


def read(builder: Any, row: Any, first: Any, there: Any = None) -> Any:
    """A vector of a row's numbers from one on, as float32; of those that are `there`, and zeros, if not all are."""
    halved = row.type.pointee == INT16
    kind = BFLOAT16S if halved else FLOAT32S
    place = builder.bitcast(builder.gep(row, [first]), kind.as_pointer())
    if there is None:
        numbers = builder.load(place, align=2 if halved else 4)
    else:
        name = f"llvm.masked.load.v{LANES}{'i16' if halved else 'f32'}.p0"
        function = ir.FunctionType(kind, [place.type, INT32, there.type, kind])
        load = cgutils.get_or_insert_function(builder.module, function, name)
        nothing = vector(INT16, [0] * LANES) if halved else NO_NUMBERS
        numbers = builder.call(load, [place, INT32(2 if halved else 4), there, nothing])
    if not halved:
        return numbers
    words = builder.zext(numbers, ir.VectorType(INT32, LANES))
    return builder.bitcast(builder.shl(words, vector(INT32, [16] * LANES)), FLOAT32S)


def write(builder: Any, row: Any, first: Any, numbers: Any, there: Any = None) -> None:
    """Write a vector to a row of float32, from one number on; of it what is `there`."""
    place = builder.bitcast(builder.gep(row, [first]), FLOAT32S.as_pointer())
    if there is None:
        builder.store(numbers, place, align=4)
        return
    function = ir.FunctionType(ir.VoidType(), [FLOAT32S, place.type, INT32, there.type])
    store = cgutils.get_or_insert_function(builder.module, function, f"llvm.masked.store.v{LANES}f32.p0")
    builder.call(store, [numbers, place, INT32(4), there])


def multiply_add(builder: Any, a: Any, b: Any, total: Any) -> Any:
    """a * b + total, rounded once where the hardware can."""
    product = builder.fmul(a, b, flags=["contract"])
    return builder.fadd(total, product, flags=["contract"])


def for_vectors(builder: Any, start: Any, width: Any, body: Callable[[Any, Any], None]) -> None:
    """body(first, there) for each vector of a row from `start` on; `there` is None but for one that is not whole."""
    end = builder.add(start, builder.and_(builder.sub(width, start), INT64(-LANES)))
    with cgutils.for_range_slice(builder, start, end, INT64(LANES), inc=True) as (first, _):
        body(first, None)
    left = builder.sub(width, end)
    with builder.if_then(builder.icmp_signed(">", left, INT64(0)), likely=False):
        there = builder.icmp_signed("<", vector(INT32, range(LANES)), splat(builder, builder.trunc(left, INT32), LANES))
        body(end, there)


def dots_of(builder: Any, mine: Any, rows: Any, width: Any) -> Any:
    """The dot products of a row with one or four others; a vector of as many. Each has the same digits either way."""
    totals = [[cgutils.alloca_once_value(builder, NO_NUMBERS) for _ in range(TOTALS)] for _ in rows]

    def add(first: Any, there: Any, total: int) -> None:
        numbers = read(builder, mine, first, there)
        for row, place in zip(rows, totals, strict=True):
            theirs = read(builder, row, first, there)
            builder.store(multiply_add(builder, numbers, theirs, builder.load(place[total])), place[total])

    end = builder.and_(width, INT64(-LANES * TOTALS))
    with cgutils.for_range_slice(builder, INT64(0), end, INT64(LANES * TOTALS), inc=True) as (first, _):
        for total in range(TOTALS):
            add(builder.add(first, INT64(LANES * total)), None, total)
    for_vectors(builder, end, width, lambda first, there: add(first, there, 0))
    sums = []
    for place in totals:
        a, b, c, d = (builder.load(total) for total in place)
        sums.append(builder.fadd(builder.fadd(a, b), builder.fadd(c, d)))
    return _sums_of_lanes(builder, sums)


def _sums_of_lanes(builder: Any, vectors: Any) -> Any:
    """A vector of the sums of the lanes of one or four vectors."""

    def pick(a: Any, b: Any, lanes: Any) -> Any:
        return builder.shuffle_vector(a, b, vector(INT32, lanes))

    def halved(numbers: Any, count: int) -> Any:
        return builder.fadd(pick(numbers, numbers, range(count)), pick(numbers, numbers, range(count, 2 * count)))

    quarters = [halved(halved(numbers, 8), 4) for numbers in vectors]
    if len(quarters) == 1:
        return halved(halved(quarters[0], 2), 1)
    a, b, c, d = quarters
    ab = builder.fadd(pick(a, b, [0, 4, 1, 5]), pick(a, b, [2, 6, 3, 7]))
    cd = builder.fadd(pick(c, d, [0, 4, 1, 5]), pick(c, d, [2, 6, 3, 7]))
    return builder.fadd(pick(ab, cd, [0, 1, 4, 5]), pick(ab, cd, [2, 3, 6, 7]))


@intrinsic
def dot(typing: Any, x: Any, token: Any, table: Any, row: Any) -> Any:
    """x[token] . table[row]"""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x, table = (Rows(context, builder, signature.args[i], arguments[i]) for i in (0, 2))
        sums = dots_of(builder, x.at(arguments[1]), [table.at(arguments[3])], x.width)
        return builder.extract_element(sums, INT32(0))

    return types.float32(x, types.intp, table, types.intp), generate


def _scaling(is_added: bool) -> Any:
    def scale_row(typing: Any, totals: Any, place: Any, coefficient: Any, table: Any, row: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            totals, table = (Rows(context, builder, signature.args[i], arguments[i]) for i in (0, 3))
            total, row = totals.at(arguments[1]), table.at(arguments[4])
            coefficient = splat(builder, arguments[2], LANES)

            def scale(first: Any, there: Any) -> None:
                before = read(builder, total, first, there) if is_added else NO_NUMBERS
                theirs = read(builder, row, first, there)
                write(builder, total, first, multiply_add(builder, coefficient, theirs, before), there)

            for_vectors(builder, INT64(0), totals.width, scale)
            return context.get_dummy_value()

        return types.none(totals, types.intp, types.float32, table, types.intp), generate

    return scale_row


add_row = intrinsic(_scaling(True))
"""totals[place] += coefficient * table[row], of the arguments totals, place, coefficient, table, row"""
set_row = intrinsic(_scaling(False))
"""totals[place] = coefficient * table[row]"""


@inlined
def sum_row(total: Any, coefficient: float, table: Any, row: int, is_first: bool) -> None:
    """total[0] += coefficient * table[row], and = for the first, for which it need not be cleared"""
    if is_first:
        set_row(total, 0, coefficient, table, row)
    else:
        add_row(total, 0, coefficient, table, row)


def _four_rows(builder: Any, table: Rows, ids: Any, first: Any) -> Any:
    """The addresses of the rows that four int64 name, from one on."""
    places = [builder.gep(ids, [builder.add(first, INT64(lane))]) for lane in range(ROWS)]
    return [table.at(builder.load(place)) for place in places]


@intrinsic
def dot_four(typing: Any, x: Any, token: Any, table: Any, ids: Any, first: Any, dots: Any, at: Any) -> Any:
    """dots[at + n] = x[token] . table[ids[first + n]] for n below four"""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kinds = signature.args
        x, table = (Rows(context, builder, kinds[i], arguments[i]) for i in (0, 2))
        ids, dots = (context.make_array(kinds[i])(context, builder, arguments[i]).data for i in (3, 5))
        sums = dots_of(builder, x.at(arguments[1]), _four_rows(builder, table, ids, arguments[4]), x.width)
        builder.store(sums, builder.bitcast(builder.gep(dots, [arguments[6]]), sums.type.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.none(x, types.intp, table, ids, types.intp, dots, types.intp), generate


@intrinsic
def add_four(typing: Any, totals: Any, place: Any, coefficients: Any, at: Any, table: Any, ids: Any, first: Any) -> Any:
    """totals[place] += coefficients[at + n] * table[ids[first + n]] for n below four"""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kinds = signature.args
        totals, table = (Rows(context, builder, kinds[i], arguments[i]) for i in (0, 4))
        coefficients, ids = (context.make_array(kinds[i])(context, builder, arguments[i]).data for i in (2, 5))
        rows = _four_rows(builder, table, ids, arguments[6])
        places = [builder.gep(coefficients, [builder.add(arguments[3], INT64(lane))]) for lane in range(ROWS)]
        shares = [splat(builder, builder.load(place), LANES) for place in places]
        total = totals.at(arguments[1])

        def add(first: Any, there: Any) -> None:
            numbers = read(builder, total, first, there)
            for share, row in zip(shares, rows, strict=True):
                numbers = multiply_add(builder, share, read(builder, row, first, there), numbers)
            write(builder, total, first, numbers, there)

        for_vectors(builder, INT64(0), totals.width, add)
        return context.get_dummy_value()

    return types.none(totals, types.intp, coefficients, types.intp, table, ids, types.intp), generate


@inlined
def dot_rows(x: Any, token: int, table: Any, ids: Any, first: int, count: int, dots: Any, at: int) -> None:
    """dots[at + n] = x[token] . table[ids[first + n]] for n below `count`, which is four or less"""
    if count == ROWS:
        dot_four(x, token, table, ids, first, dots, at)
    else:
        for n in range(count):
            dots[at + n] = dot(x, token, table, ids[first + n])


@inlined
def add_rows(totals: Any, place: int, coefficients: Any, at: int, table: Any, ids: Any, first: int, count: int) -> None:
    """totals[place] += coefficients[at + n] * table[ids[first + n]] for n below `count`, which is four or less"""
    if count == ROWS:
        add_four(totals, place, coefficients, at, table, ids, first)
    else:
        for n in range(count):
            add_row(totals, place, coefficients[at + n], table, ids[first + n])


@inlined
def dot_all(x: Any, table: Any, dots: Any) -> None:
    """dots[m, n] = x[m] . table[n], four by four at a time: a number read takes part in four products"""
    tokens, side = dots.shape
    fours, rows = tokens - tokens % ROWS, side - side % ROWS
    for row in range(0, rows, ROWS):
        for token in range(0, fours, ROWS):
            _dot_four_by_four(x, token, table, row, dots)
        for token in range(fours, tokens):
            _dot_one_by_four(x, token, table, row, dots)
    for row in range(rows, side):
        for token in range(tokens):
            dots[token, row] = dot(x, token, table, row)


def _dotting(tokens: int) -> Any:
    def dot_with_four(typing: Any, x: Any, token: Any, table: Any, row: Any, dots: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            kinds = signature.args
            x, table, dots = (Rows(context, builder, kinds[i], arguments[i]) for i in (0, 2, 4))
            token, row = arguments[1], arguments[3]
            mine = [x.at(builder.add(token, INT64(n))) for n in range(tokens)]
            theirs = [table.at(builder.add(row, INT64(n))) for n in range(ROWS)]
            totals = [[cgutils.alloca_once_value(builder, NO_NUMBERS) for _ in theirs] for _ in mine]

            def add(first: Any, there: Any) -> None:
                others = [read(builder, other, first, there) for other in theirs]
                for one, places in zip(mine, totals, strict=True):
                    numbers = read(builder, one, first, there)
                    for other, place in zip(others, places, strict=True):
                        builder.store(multiply_add(builder, numbers, other, builder.load(place)), place)

            for_vectors(builder, INT64(0), x.width, add)
            for n, places in enumerate(totals):
                sums = _sums_of_lanes(builder, [builder.load(place) for place in places])
                place = builder.gep(dots.at(builder.add(token, INT64(n))), [row])
                builder.store(sums, builder.bitcast(place, sums.type.as_pointer()), align=4)
            return context.get_dummy_value()

        return types.none(x, types.intp, table, types.intp, dots), generate

    return dot_with_four


_dot_four_by_four = intrinsic(_dotting(ROWS))
"""dots[token + m, row + n] = x[token + m] . table[row + n] for m and n below four"""
_dot_one_by_four = intrinsic(_dotting(1))
"""The same for one token."""
