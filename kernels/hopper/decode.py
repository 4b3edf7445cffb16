"""NVFP4 weights on their way from shared memory to the tensor cores: the decode, and a product with decoded weights.

Weights stay in the checkpoint's layout (u8 [..., N, K/2] and e4m3 [..., N, K/16], viewed as i32 words of 8 codes and of 4
scales); the activations' K is permuted inside 64-chunks instead (`permute_k`), so that a lane of a tensor core fragment owns
one whole block of 16: 8 neighbouring bytes of codes and one scale.

    a 64-chunk of a weight row, 32 bytes      | quad 0: 8 B | quad 1: 8 B | quad 2: 8 B | quad 3: 8 B |     and 4 scales, 1 B each
    a lane's two words, in four k16 steps       codes j and j + 4 of both words are the bf16 pairs of step j

A warp owns 16 weight rows, 2 for each of its 8 quads: fragment rows r and r + 8 of mma and wgmma (`lanes`).

The decode multiplies by 2**-7: a kernel's epilogue multiplies by `global_scale * DECODE_FACTOR`.
"""
import dataclasses
import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nvfp4jax.kernels.hopper.machine import ROWS_128, WARP, WARPGROUP, scale_rows
from nvfp4jax.kernels.hopper.mosaic import (
    Memory,
    Register,
    asm,
    i32,
    inline,
    load_shared,
    settled,
    smem_address,
    thread_index,
    wide,
    with_bits,
)

DECODE_FACTOR = 2.0**7  # what the decode leaves out

# One u32 of 8 codes -> 4 bf16x2 in mma and wgmma order; nibble j pairs with nibble j+4. An E2M1 code's sign goes to
# bit 15 and its other bits to bits 8..6 of a bf16: the value times 2**-126, subnormals included. Nibbles 3 and 7 have
# their sign in place. $5: scale * 2**119.
_DECODE = (  # of k16 step 0 .. 3: code j and j + 4 of x, in z = x >> 6
    ("and.b32 {r},{x},0x000F000F;", "mul.lo.u32 {r},{r},4160;", "and.b32 {r},{r},0x81C081C0;"),
    ("and.b32 {r},{x},0x00F000F0;", "mul.lo.u32 {r},{r},260;", "and.b32 {r},{r},0x81C081C0;"),
    ("and.b32 {r},{z},0x003C003C;", "mul.lo.u32 {r},{r},1040;", "and.b32 {r},{r},0x81C081C0;"),
    ("and.b32 {r},{z},0x01C001C0;", "and.b32 {t},{x},0x80008000;", "or.b32 {r},{r},{t};"))
DECODE = "{.reg .b32 z,a,b,c,d; shr.u32 z,$4,6;\n" + "\n".join(
    " ".join(line.format(r=r, x="$4", z="z", t="z") for line, r in zip(lines, "abcd")) for lines in zip(*_DECODE)
) + "\nmul.rn.bf16x2 $0,a,$5; mul.rn.bf16x2 $1,b,$5; mul.rn.bf16x2 $2,c,$5; mul.rn.bf16x2 $3,d,$5;\n}"
DECODE_STEP = ["{.reg .b32 r,t; " + " ".join(lines).format(r="r", x="$1", z="$2", t="t") + " mul.rn.bf16x2 $0,r,$3;}"
               for lines in _DECODE]  # the same of one step; $2: x >> 6
# One e4m3 byte of a scale word (selector 0x4440 + byte) -> bf16x2 of scale * 2**119: exact, subnormals included.
SCALE = """{
.reg .b32 t,u,v;
mov.b32 u,0x7B807B80; mov.b32 v,0x7B007B00;
prmt.b32 t,$1,0,$2;
mul.lo.u32 t,t,0x00100010;
mul.rn.bf16x2 t,t,u;
mul.rn.bf16x2 $0,t,v;
}"""
# The same byte of two words (selector 0x4400 + 0x1111 * byte) at once. The last moves become .H0_H0 operands: free.
SCALE_PAIR = """{
.reg .b32 t,u,v; .reg .b16 lo,hi;
mov.b32 u,0x7B807B80; mov.b32 v,0x7B007B00;
prmt.b32 t,$2,$3,$4;
and.b32 t,t,0x007F007F;
mul.lo.u32 t,t,16;
mul.rn.bf16x2 t,t,u;
mul.rn.bf16x2 t,t,v;
mov.b32 {lo,hi},t;
mov.b32 $0,{lo,lo};
mov.b32 $1,{hi,hi};
}"""
SELECTOR = "mad.lo.u32 $0,$1,0x1111,0x4400;"  # for SCALE_PAIR: byte `quad` of both words


# --- in JAX ---------------------------------------------------------------------------------------------------------

def permute_k(x: jax.Array) -> jax.Array:
    """[..., K] -> [..., K]: k = 64t+16c+8h+4b+s goes to 64t+16s+8h+2c+b. K must be a multiple of 64.

    It is the order in which the decode hands the codes of a 64-chunk to the tensor cores.
    """
    if x.shape[-1] % 64:
        raise ValueError(f"permute_k: K must be a multiple of 64, got an array of shape {x.shape}")
    chunks = x.reshape(-1, x.shape[-1] // 64, 4, 2, 2, 4)  # rows, t, c, h, b, s
    return chunks.transpose(0, 1, 5, 3, 2, 4).reshape(x.shape)


def as_words(packed: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    """u8 [..., K/2], e4m3 [..., K/16] -> i32 [..., K/8], i32 [..., K/64], the kernels' view: a bitcast, no copy."""
    k = packed.shape[-1] * 2
    if k % 64 or scale.shape[-1] * 16 != k or scale.shape[:-1] != packed.shape[:-1]:
        raise ValueError(f"packed codes {packed.shape} want K/2 a multiple of 32 and scales "
                         f"{(*packed.shape[:-1], k // 16)}, got {scale.shape}")
    words, scales = (lax.bitcast_convert_type(a.reshape(*a.shape[:-1], -1, 4), jnp.int32) for a in (packed, scale))
    return words, scales


# --- in a thread ----------------------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Lane:
    """Of this thread: its warp of the warpgroup, its place in its quad, the fragment row of the quad, and which weight row of the
    warp that fragment row holds."""

    warp: Register
    quad: Register
    fragment_row: Register
    weight_row: Register


def lanes(interleaved: bool, *, pinned: bool = False) -> Lane:
    """Who owns which rows.

        fragment row        0  1  2  3  4  5  6  7 | 8  9 10 11 12 13 14 15
        weight row          0  2  4  6  8 10 12 14 | 1  3  5  7  9 11 13 15
        interleaved         0  2  4  6  1  3  5  7 | 0  2  4  6  1  3  5  7      of gate | of up

    Either way the 4 rows of a half warp fall into different units of the 128-byte swizzle, so that 8-byte loads have no bank
    conflicts; the epilogue undoes it. pinned: computed where it stands, not hoisted out of loops, where it would hold registers.
    """
    tid = (asm("mov.u32 $0,%tid.x;") if pinned else thread_index()) % WARPGROUP
    lane, warp = tid % WARP, tid // WARP
    row = lane // 4
    weight_row = row % 4 * 2 + row // 4 if interleaved else row * 2
    return Lane(warp, lane % 4, row, weight_row)


def decode_codes(word: Register, factor: Register) -> list[Register]:
    """8 codes and a bf16x2 factor (scale * 2**119) -> 4 bf16x2 times 2**-7: code j pairs with code j+4."""
    return asm(DECODE, [word, factor], "rrrr", effects=False)


# --- wgmma with decoded weights -------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Addresses:
    """What `multiply_decoded` wants of a thread, i32 [128] each: the selector of its scale's byte; of fragment rows r and r + 8,
    bytes to their scales; and to their codes, of each 64-chunk in turn."""

    selector: jax.Array
    scales: tuple[jax.Array, ...]
    codes: tuple[jax.Array, ...]


def _addresses(wg, *shifts, scale_row, other, chunks):
    at = lanes(bool(other), pinned=True)
    rows_wg, rows_warp = (32, 8) if other else (64, 16)
    row = wg * rows_wg + at.warp * rows_warp + at.weight_row
    codes, scales = [], []
    for h, r in enumerate((row, row + (0 if other else 1))):  # of fragment rows r and r + 8
        further_rows, further_scales = other if other and h else (0, 0)
        phase = r & 7  # of the swizzle: the unit of 64-chunk c is (2 c + quad / 2) ^ phase
        unit = (at.quad // 2 ^ phase) * 16 + at.quad % 2 * 8
        codes.append(r * 128 + unit + further_rows * 128)
        scale_phase = {128: phase, 64: r >> 1 & 3}.get(scale_row, i32(0))
        scales.append(r * scale_row + scale_phase * 16 + further_scales + shifts[h])
    selector = asm(SELECTOR, [at.quad], effects=False)
    # With effects: else they are computed anew in the loop, to save registers.
    codes += [asm(f"xor.b32 $0,$1,{32 * chunk};", [code_at]) for chunk in range(1, chunks) for code_at in codes]
    return selector, *scales, *codes


def fragment_addresses(wg, shifts=(0, 0), *, scale_row: int, other: tuple[int, int] | None = None, chunks: int = 4) -> Addresses:
    """Computed where it stands (outside the loop over K).

    wg: the warpgroup (i32), of 64 weight rows, or, where two operands interleave (gate and up), 32 of each. other:
    None, or how far on the second one lies: rows of w_ref (a multiple of 8), bytes of s_ref (of 1024 if swizzled).
    shifts: i32, bytes by which the scales of the rows r and r + 8 lie further on.
    chunks: 4, or 1 to save registers: the 64-chunks whose addresses are kept, the others' are computed from the first's.
    """
    program = functools.partial(_addresses, scale_row=scale_row, other=other, chunks=chunks)
    selector, scale0, scale1, *codes = inline(program, wg, *map(jnp.int32, shifts), returns=3 + 2 * chunks)
    return Addresses(selector, (scale0, scale1), tuple(codes))


def _wgmma(sums, left, descriptor, tokens, at, in_flight):
    """Adds left[k16 step] times the tokens `at` (16 bytes on from `descriptor`), and waits until `in_flight` such groups run."""
    n, left = len(sums), [register for step in left for register in step]
    text = ["{.reg .b64 d; .reg .pred p; setp.eq.u32 p,0,0; wgmma.fence.sync.aligned;"]
    accumulator = "{" + ",".join(f"${i}" for i in range(n)) + "}"
    for i in range(len(left) // 4):
        a = ",".join(f"${2 * n + 4 * i + j}" for j in range(4))
        text.append(f"add.s64 d,${2 * n + len(left)},{at[i]}; "
                    f"wgmma.mma_async.sync.aligned.m64n{tokens}k16.f32.bf16.bf16 {accumulator},{{{a}}},d,p,1,1,0;")
    text.append(f"wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned {in_flight};}}")
    return asm("\n".join(text), [*sums, *left, descriptor], "f" * n, in_place=n)


def _codes_of(chunk, codes_at):
    """A chunk's two words of fragment rows r and r + 8."""
    if len(codes_at) == 2:
        return [load_shared(at ^ 32 * chunk, 0, 2) for at in codes_at]
    return [load_shared(at, 0, 2) for at in codes_at[2 * chunk:2 * chunk + 2]]


def _multiply(acc, selector, scale0, scale1, *rest, first, chunks, tokens, scale_row, running):
    *codes_at, w, s, x, unit = rest
    selector, = settled([selector])
    unit = unit * 16
    in_row = operator.xor if scale_rows(scale_row) else operator.add
    scale_at = [smem_address(s) + in_row(v, unit) for v in (scale0, scale1)]
    # A stage is a multiple of 1024 bytes on: what is xored in does not meet it.
    codes_at = [smem_address(w) + v for v in codes_at]
    stride = tokens * 128  # bytes of a 64-chunk of tokens
    # Of rows of 128 swizzled bytes in groups of 8: address / 16, 1, 1024 / 16 between groups, 128-byte swizzle.
    descriptor = with_bits(wide((smem_address(x) & 0x3FFFF) >> 4), (1 << 62) | (64 << 32) | (1 << 16))
    sums = settled(acc.reshape(-1))
    if scale_row % 16:
        scales = [[load_shared(at, 4 * (first + t), 1)[0] for t in range(chunks)] for at in scale_at]
    else:
        scales = [load_shared(at, 4 * first, chunks) for at in scale_at]
    tokens_at = [[(chunk * stride + 32 * step) >> 4 for step in range(4)] for chunk in range(chunks)]
    codes = _codes_of(first, codes_at)
    for c in range(chunks):
        factors = asm(SCALE_PAIR, [scales[0][c], scales[1][c], selector], "rr", effects=False)
        words = [(codes[h][i], codes[h][i] >> 6, factors[h]) for i in range(2) for h in range(2)]
        if c + 1 < chunks:
            codes = _codes_of(first + c + 1, codes_at)
        for q in (0, 2):  # with effects: in this place
            left = [[asm(DECODE_STEP[step], word) for word in words] for step in range(q, q + 2)]
            in_flight = running if (c, q) == (chunks - 1, 2) else 1
            sums = _wgmma(sums, left, descriptor, tokens, tokens_at[c][q:q + 2], in_flight)
    return np.array(sums, object).reshape(acc.shape)


def multiply_decoded(acc, addresses: Addresses, w_ref, s_ref, x_ref, unit, *, first: int, chunks: int, tokens: int, scale_row: int,
                     running: int = 0):
    """acc f32 (64, tokens) + decoded weights times tokens over 64-chunks first .. first + chunks - 1 of 256 codes.

    The weights are A of wgmma, from registers, times 2**-7. w_ref: i32 [rows, 32], ROWS_128: 256 codes a row. s_ref: the scales of
    the same rows, `scale_row` bytes a row, `scale_rows`. unit: which 16 bytes of a row of scales belong to these codes (i32).
    x_ref: bf16 [>= chunks * tokens, 64], ROWS_128: the 64-chunks of the tokens, one behind the other. running: 1 leaves the last
    wgmmas running, while the next call decodes; the last call must say 0.

        decode steps 0 1 | wgmmas 0 1 start | decode 2 3 | wait for 0 1 | wgmmas 2 3 start | decode 0 1 of the next chunk ...

    The wgmmas go in groups of two k16 steps, with the decode of the next two behind each: a warp that has issued wgmmas
    cannot decode before the last of them has begun.
    """
    program = functools.partial(_multiply, first=first, chunks=chunks, tokens=tokens, scale_row=scale_row, running=running)
    return inline(program, acc, addresses.selector, *addresses.scales, *addresses.codes, Memory(w_ref, ROWS_128),
                  Memory(s_ref, scale_rows(scale_row)), Memory(x_ref, ROWS_128), unit, returns=(64, tokens))
