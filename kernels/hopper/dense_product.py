"""What the dense kernels share: the product that they compute, and its last steps, alike to the bit.

A sum over K is made of `slices` float32 chains, one a contiguous slice of K, added from left to right (`dense.slices`). Then every
kernel does fma(sum, row_scale * (global_scale * 2**7), bias), and one rounding to the result's dtype.
"""
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nvfp4jax.kernels.hopper.decode import DECODE_FACTOR
from nvfp4jax.kernels.hopper.mosaic import Memory, Register, asm, gmem_address, gmem_element, inline, minimum, settled, thread_index

STEP = 256  # K of a pipeline step: 128 bytes of codes and 16 of scales a row
CHUNK = 64  # K of a 128-byte row of tokens
SCALE_STEPS = 8  # steps in 128 bytes of scales


@dataclasses.dataclass(frozen=True)
class Product:
    """y [M, N] = x [M, K] W[N, K].T * row_scale * global_scale + bias, rounded; then residual + y, rounded again, where there is one.

    per_row: row_scale is f32 [M], else [1]. bias_dtype: None without one. stacked: weights and scales carry an axis of layers;
    bias_stacked: the bias does too."""

    n: int
    k: int
    m: int
    per_row: bool = False
    bias_dtype: Any = None
    out_dtype: Any = jnp.bfloat16
    stacked: bool = False
    bias_stacked: bool = False
    residual: bool = False

    @property
    def steps(self) -> int:
        return -(-self.k // STEP)

    @property
    def out_type(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.m, self.n), self.out_dtype)


@dataclasses.dataclass(frozen=True)
class Refs:
    """In global memory: w i32 [(L,) N, K/8], s i32 [(L,) N, K/64], x bf16 [M, K] (K permuted), row_scale f32 [1] or [M], global_scale
    f32 [1 or L], bias [N or L * N] or f32 [1], residual of the result's dtype [M, N] or f32 [1], layer i32 [1], out [M, N]."""

    w: Any
    s: Any
    x: Any
    row_scale: Any
    global_scale: Any
    bias: Any
    residual: Any
    layer: Any
    out: Any


def pitch(rows: int) -> int:
    """Floats of a token's row of sums in shared memory: 8-byte stores without bank conflicts."""
    return rows + 4


def chunks_at_once(tokens: int) -> int:
    """64-chunks between two full waits for wgmma: what the registers hold beside the sums."""
    return 4 if tokens <= 64 else 2 if tokens <= 96 else 1


# --- scale, bias, store ---------------------------------------------------------------------------------------------

def load_bias(ref, index: Register, dtype) -> Register:
    """bias[index] as f32, in an i32 register."""
    pointer = gmem_address(ref, index * dtype.itemsize)
    if dtype == jnp.float32:
        return asm("ld.global.nc.f32 $0,[$1];", [pointer])
    return asm("{.reg .b16 h; ld.global.nc.b16 h,[$1]; mov.b32 $0,{0,h};}", [pointer])


def scaled(v: Register, factor: Register, bias: Register | None) -> Register:
    """acc * factor + bias with one rounding each way: the same instruction in every kernel."""
    if bias is None:
        return asm("mul.rn.f32 $0,$1,$2;", [v, factor], "f", effects=False)
    return asm("fma.rn.f32 $0,$1,$2,$3;", [v, factor, bias], "f", effects=False)


def plus_residual(pointer: Register, values, flags, dtype, *, aligned: bool) -> list[Register]:
    """Neighbouring f32 results, rounded to dtype, plus what stands at an address of global memory, in f32. Read where a flag is not 0."""
    predicate = "{{.reg .pred p; setp.ne.u32 p,${flag},0; {text}}}"
    load = functools.partial(asm, effects=False)  # nothing in this kernel writes there
    if dtype == jnp.float32:
        if aligned:
            text = "mov.b32 $0,0; mov.b32 $1,0; @p ld.global.nc.v2.f32 {$0,$1},[$2];"
            old = load(predicate.format(flag=3, text=text), [pointer, flags[0]], "ff")
        else:
            old = [load(predicate.format(flag=2, text=f"mov.b32 $0,0; @p ld.global.nc.f32 $0,[$1+{4 * e}];"), [pointer, flag], "f")
                   for e, flag in enumerate(flags)]
        return [asm("add.rn.f32 $0,$1,$2;", pair, "f", effects=False) for pair in zip(values, old)]
    if aligned:
        text = ".reg .b32 q; mov.b32 q,0; @p ld.global.nc.b32 q,[$2]; shl.b32 $0,q,16; and.b32 $1,q,0xffff0000;"
        old = load(predicate.format(flag=3, text=text), [pointer, flags[0]], "rr")
    else:
        text = ".reg .b16 h; mov.b16 h,0; @p ld.global.nc.b16 h,[$1+{at}]; mov.b32 $0,{{0,h}};"
        old = [load(predicate.format(flag=2, text=text.format(at=2 * e)), [pointer, flag], "r") for e, flag in enumerate(flags)]
    text = "{.reg .b16 h; .reg .f32 a, b; cvt.rn.bf16.f32 h,$1; mov.b32 a,{0,h}; mov.b32 b,$2; add.rn.f32 $0,a,b;}"
    return [asm(text, pair, "f", effects=False) for pair in zip(values, old)]


def _store_pair(pointer, values, flags, dtype, *, aligned):
    """Two neighbouring results at an address of global memory, each where its flag is not zero."""
    predicate = "{{.reg .pred p; setp.ne.u32 p,${flag},0; {text}}}"
    if dtype == jnp.float32:
        if aligned:
            asm(predicate.format(flag=3, text="@p st.global.v2.f32 [$0],{$1,$2};"), [pointer, *values, flags[0]], "")
        else:
            for e in range(2):
                asm(predicate.format(flag=2, text=f"@p st.global.f32 [$0+{4 * e}],$1;"), [pointer, values[e], flags[e]], "")
    elif aligned:
        asm(predicate.format(flag=3, text=".reg .b32 q; cvt.rn.bf16x2.f32 q,$2,$1; @p st.global.b32 [$0],q;"),
            [pointer, *values, flags[0]], "")
    else:
        for e in range(2):
            asm(predicate.format(flag=2, text=f".reg .b16 q; cvt.rn.bf16.f32 q,$1; @p st.global.b16 [$0+{2 * e}],q;"),
                [pointer, values[e], flags[e]], "")


def finish_pair(p: Product, parts, token, column, inside, scale, biases, residual, out) -> None:
    """The slices' sums of two neighbouring columns, added from left to right, scaled, and stored where `inside` is not zero."""
    total = functools.reduce(
        lambda a, b: [asm("add.rn.f32 $0,$1,$2;", list(ab), "f", effects=False) for ab in zip(a, b)], parts)
    values = [scaled(v, scale, b) for v, b in zip(total, biases)]
    flags = [inside & (column + e < p.n) for e in range(2)]
    place = token, p.n, column, jnp.dtype(p.out_dtype).itemsize
    if p.residual:
        values = plus_residual(gmem_element(residual, *place), values, flags, p.out_dtype, aligned=p.n % 2 == 0)
    _store_pair(gmem_element(out, *place), values, flags, p.out_dtype, aligned=p.n % 2 == 0)


# --- a tile whose sums lie in shared memory, finished by a whole CTA ------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Tile:
    """`rows` weight rows by `tokens` tokens, whose sums `threads` threads finish: each takes pairs of neighbouring rows of a token.

    threads is a multiple of rows / 2, so the rows of a thread are the same for each of its pairs."""

    product: Product
    rows: int
    tokens: int
    threads: int

    @property
    def pairs(self) -> int:
        """A thread's."""
        return -(-self.tokens * self.rows // 2 // self.threads)

    def place(self, t: int) -> tuple[Register, Register]:
        """(token, row) in the tile of this thread's t-th pair."""
        index = thread_index()
        return index // (self.rows // 2) + t * (self.threads // (self.rows // 2)), index % (self.rows // 2) * 2


@dataclasses.dataclass(frozen=True)
class Factors:
    """What a thread multiplies and adds, fetched before it is needed, i32 [128] each: bits of the global scale, of the row scales of
    its pairs (or of the one of all), and of the biases of its two rows."""

    global_scale: jax.Array
    row_scales: tuple[jax.Array, ...]
    biases: tuple[jax.Array, ...]


def _fetch_factors(row_scale, global_scale, bias, layer, first_token, first, *, tile):
    p = tile.product
    out = [asm("ld.global.nc.b32 $0,[$1];", [gmem_address(global_scale, layer * 4 if p.stacked else None)])]
    for t in range(tile.pairs if p.per_row else 1):
        token, row = tile.place(t)
        at = minimum(first_token + token, p.m - 1) * 4 if p.per_row else None
        out.append(asm("ld.global.nc.f32 $0,[$1];", [gmem_address(row_scale, at)]))
    if p.bias_dtype is not None:
        for e in range(2):
            column = minimum(first + row + e, p.n - 1)
            column = layer * p.n + column if p.bias_stacked else column
            out.append(load_bias(bias, column, p.bias_dtype))
    return out


def fetch_factors(tile: Tile, refs: Refs, first_token, first) -> Factors:
    p = tile.product
    count = tile.pairs if p.per_row else 1
    layer = refs.layer[0] if p.stacked else jnp.int32(0)
    out = inline(functools.partial(_fetch_factors, tile=tile), *map(Memory, (refs.row_scale, refs.global_scale, refs.bias)), layer,
                 first_token, first, returns=1 + count + 2 * (p.bias_dtype is not None))
    return Factors(out[0], out[1:1 + count], out[1 + count:])


def finish_tile(tile: Tile, source, offsets, factors, first_token, first, residual, out) -> None:
    """In a thread: the slices' sums in shared memory, added from left to right, scaled, and stored.

    source: (token, row) -> address of a pair of a slice's sums; offsets: bytes on to those of each slice. factors: registers, as in
    `Factors`."""
    p = tile.product
    global_scale, *factors = settled(factors)
    factor = asm(f"{{.reg .f32 f; mov.b32 f,0x{np.float32(DECODE_FACTOR).view(np.uint32):08x}; mul.rn.f32 $0,$1,f;}}",
                 [global_scale], "f", effects=False)
    biases = [None, None] if p.bias_dtype is None else factors[-2:]
    for t in range(tile.pairs):
        token, row = tile.place(t)
        inside = token < tile.tokens
        at = source(minimum(token, tile.tokens - 1), row)
        parts = [asm(f"ld.shared.v2.f32 {{$0,$1}},[$2+{offset}];", [at], "ff") for offset in offsets]
        scale = asm("mul.rn.f32 $0,$1,$2;", [factors[t if p.per_row else 0], factor], "f", effects=False)
        token = first_token + token
        inside = inside & (token < p.m)
        finish_pair(p, parts, token, first + row, inside, scale, biases, residual, out)
