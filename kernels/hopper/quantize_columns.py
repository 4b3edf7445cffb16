"""A group of columns in a quantizer: weights [.., K, N], as trainers hold them, to codes and scales [.., N, K].

    group    CHUNK = 64 of K, and COLUMNS = 32 neighbouring columns a warp; one array (`Spec.parts`) holds them all
    lane     two neighbouring columns n, n + 1, and 32 of K: two whole blocks of either. Lanes 0 to 15 hold the first 32 of K, the
             others the next, so that a warp reads 64 bytes of a row of K at a time, and writes 32 bytes of a row of codes

A raw register is x[k, n] and x[k, n + 1]. Two of them, of k and k + 1, change halves and are a word of either column's block.

What reaches past the last column reads the last ones again, which changes no amax, and stores nothing.

A column is in many groups, so no thread sees whether NaN or infinity is in it. A tile's amax says whether any is in the tile (`marked`);
where one is in the matrix, which is rare, a thread reads all of its two columns.
"""
import dataclasses

from nvfp4jax import numerics
from nvfp4jax.kernels.hopper import quantize_ptx as ptx
from nvfp4jax.kernels.hopper.machine import WARP
from nvfp4jax.kernels.hopper.mosaic import Register, asm, gmem_element, i32, loop, minimum, select
from nvfp4jax.kernels.hopper.quantize_plan import CHUNK, COLUMNS
from nvfp4jax.kernels.hopper.quantize_rows import BLOCK_BYTES, Thread, block_maxima, maximum, produce, quantize_block
from nvfp4jax.kernels.hopper.threads import load_global, store_global

INFINITY = 0x7F800000
K_OF_LANE = CHUNK // 2
AT_ONCE = 8  # loads of a column on their way


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a thread is in a group."""

    column: Register  # the first of its two, which exist, in its part
    part: Register
    k: Register
    matrix: Register
    here: Register  # whether anything is to be stored


def place_of(t: Thread, group: Register) -> Place:
    spec, columns = t.spec, t.plan.warps * COLUMNS
    strips = -(-spec.columns // columns)  # of a part
    matrix, inside = group // t.groups_of_matrix, group % t.groups_of_matrix
    strip, chunk = inside // (spec.k // CHUNK), inside % (spec.k // CHUNK)
    part = minimum(strip // strips, spec.parts - 1)
    column = (strip - part * strips) * columns + t.warp * COLUMNS + t.lane % 16 * 2
    here = (column < spec.columns) & (matrix < spec.m // spec.matrix)
    return Place(minimum(column, spec.columns - 2), part, chunk * CHUNK + t.lane // 16 * K_OF_LANE,
                 minimum(matrix, spec.m // spec.matrix - 1), here)


def _address(t: Thread, place: Place, k: Register) -> Register:
    row = place.matrix * t.spec.k + k
    addresses = [gmem_element(t.refs[f"x{i}"], row, t.spec.columns, place.column, 2) for i in range(t.spec.parts)]
    address = addresses[0]
    for i, other in enumerate(addresses[1:], 1):
        address = select(place.part == i, other, address)
    return address


def fetch(t: Thread, group: Register) -> list[Register]:
    """The raw registers of this thread: of 32 of K, two columns each."""
    place = place_of(t, group)
    first = _address(t, place, place.k)
    return [load_global(first + 2 * t.spec.columns * k, 1, i32(1))[0] for k in range(K_OF_LANE)]


# --- maxima ---------------------------------------------------------------------------------------------------------

def _finite(word: Register) -> Register:
    return select(i32(INFINITY) <= word, (word & 0x7FFF) * 0x10000, word)


def marked(raw: Register, finite: Register) -> Register:
    """One word of the (raw, finite) maxima of a warp's threads: the finite one, of bf16, and, in the place of the exponent of infinity,
    whether there is NaN or infinity."""
    raw, finite = (asm(ptx.WARP_MAX, [v]) for v in (raw, finite))
    return select(i32(INFINITY) <= raw, (finite >> 16) + INFINITY, finite)


def marked_of(word: Register) -> Register:
    """One word of a warp's such words."""
    return marked(word, _finite(word))


def amax_of(t: Thread, amax: Register, word_of, count: int) -> tuple[Register, Register]:
    """(the finite maximum, whether there is NaN or infinity) of a matrix. amax: the largest of its `count` words, which word_of(i) are."""
    poisoned = i32(INFINITY) <= amax

    def body(i, best):
        return [maximum([best, _finite(word_of(minimum(t.lane + i * WARP, count - 1)) & 0x7FFFFFFF)])]

    best, = loop(0, select(poisoned, -(-count // WARP), 0), 1, [i32(0)], body)
    return select(poisoned, asm(ptx.WARP_MAX, [best]), amax), poisoned


def _poisoned_columns(t: Thread, place: Place, poisoned: Register) -> list[Register]:
    """Whether NaN or infinity is in either of this thread's columns; poisoned: whether one is in the matrix."""
    def body(i, largest):
        row = _address(t, place, i * AT_ONCE)
        for word in [load_global(row + 2 * t.spec.columns * k, 1, i32(1))[0] for k in range(AT_ONCE)]:
            largest = asm(ptx.MAX_OF_PAIR, [largest, word], effects=False)
        return [largest]

    largest, = loop(0, select(poisoned, t.spec.k // AT_ONCE, 0), 1, [i32(0)], body)
    return [i32(INFINITY >> 16) <= half for half in (largest & 0xFFFF, largest >> 16)]


# --- codes and scales -----------------------------------------------------------------------------------------------

def quantize_group(t: Thread, group: Register, raw, scaled) -> None:
    """scaled: `scales_of` the matrix, and whether NaN or infinity is in it."""
    spec, place = t.spec, place_of(t, group)
    *scaled, poisoned = scaled
    poisoned = _poisoned_columns(t, place, poisoned)
    words = [word for block in produce(t, raw, None) for word in block]
    first = place.matrix * spec.matrix + place.part * spec.columns + place.column
    for c, exchange in enumerate((ptx.LOW_HALVES, ptx.HIGH_HALVES)):
        column = [asm(exchange, words[i:i + 2], effects=False) for i in range(0, len(words), 2)]
        codes, scale = [], i32(0)
        for i in range(2):
            block = column[8 * i:8 * i + 8]
            bits, two = quantize_block(t, block, block_maxima(t, block)[1], scaled)
            codes += [select(poisoned[c], 0, word) for word in two]
            scale = scale + select(poisoned[c], numerics.E4M3_NAN, bits) * 256**i
        index = place.k // 16
        store_global(gmem_element(t.refs["packed"], first + c, spec.k // 2, index * BLOCK_BYTES, 1), codes, place.here)
        store_global(gmem_element(t.refs["scale"], first + c, spec.k // 16, index, 1), [scale], place.here, form="u16")
