"""NVFP4 quantizers in Triton, alone or with RMSNorm or SwiGLU's product in front: bit for bit what `numerics` does.

A program owns whole rows and keeps them in registers. An amax that spans rows (a tensor's, a matrix's, an expert's) takes a launch that
leaves each row's amax, and XLA's maximum over them; "token" takes one launch.

The matmuls read an activation as its operand: code * scale in float16, exact, with K in the order that `permute_k` defines. A lane of
the matmul holds 64-bit words of the checkpoint's codes: a word is one block of 16.
"""

import math

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from nvfp4jax import numerics
from nvfp4jax.kernels.triton.call import call
from nvfp4jax.kernels.triton.encode import bits_of, block_scales, encode_e2m1, float_of, global_scales, inverse_rms, pack, round_e2m1, silu

CHUNK = 256  # K in the operand: at most 16 words of 16 codes
MAX_K = 32768  # a row is kept in registers
ELEMENTS = 2048  # of a program, where rows are shorter
THREAD = 32  # elements of a thread that is one of many
MANY = 1 << 22  # elements from which threads are many


def permute_k(x: jax.Array) -> jax.Array:
    """[..., K] in the order of an operand: element 16 i + 8 h + 4 u + t of a chunk of W words lies at 2 W (4 h + t) + 2 i + u.

    W is 16, and less in a last chunk that is not whole. So a 32-bit half h of word i gives, in one register, the neighbours u = 0, 1 of
    plane 4 h + t."""
    whole = x.shape[-1] // CHUNK * CHUNK

    def chunks(x, count):
        lead = tuple(range(x.ndim))
        words = x.reshape(*x.shape[:-1], count, -1, 2, 2, 4)
        return words.transpose(*lead, *(x.ndim + axis for axis in (1, 3, 0, 2))).reshape(x.shape)

    parts = [chunks(x[..., :whole], whole // CHUNK)] if whole else []
    return jnp.concatenate(parts + ([chunks(x[..., whole:], 1)] if x.shape[-1] > whole else []), -1)


# --- the kernels: SOURCE is x, RMSNorm ("norm", second the weight [K]) or SwiGLU's product ("silu", second the other factor) -----------

@triton.jit
def _inside(rows, M, K: tl.constexpr, BLOCK: tl.constexpr):
    """Which blocks there are, [R, B]: known without a look where a program has one row and that fills its registers."""
    if rows.shape[0] == 1 and K == BLOCK:
        return tl.full((1, BLOCK // 16), 1, tl.int1)
    return (rows < M)[:, None] & (tl.arange(0, BLOCK // 16) < K // 16)[None, :]


@triton.jit
def _half(x_ptr, rows, inside, H: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):
    """Half H of each block of 16, f32 [R, B, 8]: as two tiles of 16 bytes a thread, each block belongs to one thread."""
    R: tl.constexpr = rows.shape[0]
    B: tl.constexpr = BLOCK // 16
    block = rows.to(tl.int64)[:, None] * (K // 16) + tl.arange(0, B)[None, :]
    inside = inside[:, :, None]
    if x_ptr.dtype.element_ty == tl.bfloat16:  # two in a word are one instruction each
        at = block[:, :, None] * 8 + (4 * H + tl.arange(0, 4))[None, None, :]
        pair = tl.load(x_ptr.to(tl.pointer_type(tl.int32)) + at, mask=inside, other=0)
        return tl.join(float_of(pair << 16), float_of(pair & -65536)).reshape(R, B, 8)
    at = block[:, :, None] * 16 + (8 * H + tl.arange(0, 8))[None, None, :]
    return tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _rows(x_ptr, second_ptr, rows, inside, K: tl.constexpr, BLOCK: tl.constexpr, EPS: tl.constexpr, SOURCE: tl.constexpr):
    """The halves of the rows to quantize, in float32, with the values they have in their own dtype."""
    dtype = x_ptr.dtype.element_ty
    x, y = _half(x_ptr, rows, inside, 0, K, BLOCK), _half(x_ptr, rows, inside, 1, K, BLOCK)
    if SOURCE == "norm":
        inverse = inverse_rms(x, y, EPS, K)  # one row a program
        u, v = _half(second_ptr, rows * 0, inside, 0, K, BLOCK), _half(second_ptr, rows * 0, inside, 1, K, BLOCK)
        x = ((x * inverse).to(dtype).to(tl.float32) * u.to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
        y = ((y * inverse).to(dtype).to(tl.float32) * v.to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
    elif SOURCE == "silu":
        u, v = _half(second_ptr, rows, inside, 0, K, BLOCK), _half(second_ptr, rows, inside, 1, K, BLOCK)
        x = (silu(x, dtype == tl.bfloat16).to(dtype).to(tl.float32) * u).to(dtype).to(tl.float32)
        y = (silu(y, dtype == tl.bfloat16).to(dtype).to(tl.float32) * v).to(dtype).to(tl.float32)
    return x, y


@triton.jit
def _statistics(x, y):
    """Halves -> (the same with zeros in rows that hold NaN or infinity; the magnitude of each block [R, B]; the largest finite one of
    each row; whether a row holds NaN or infinity). Bits of magnitudes order like integers, NaN and infinity above all."""
    magnitude = tl.maximum(tl.max(bits_of(x) & 0x7FFFFFFF, 2), tl.max(bits_of(y) & 0x7FFFFFFF, 2))
    top = tl.max(magnitude, 1)
    amax, poisoned = float_of(top), top >= 0x7F800000
    if tl.max(top, 0) >= 0x7F800000:  # rare: a second look
        a, b = bits_of(x) & 0x7FFFFFFF, bits_of(y) & 0x7FFFFFFF
        finite = tl.maximum(tl.max(tl.where(a < 0x7F800000, a, 0), 2), tl.max(tl.where(b < 0x7F800000, b, 0), 2))
        amax = float_of(tl.max(finite, 1))
        x = tl.where(poisoned[:, None, None], 0.0, x)
        y = tl.where(poisoned[:, None, None], 0.0, y)
        magnitude = tl.where(poisoned[:, None], 0, magnitude)
    return x, y, float_of(magnitude), amax, poisoned


@triton.jit
def amax_kernel(x_ptr, second_ptr, M, amax_ptr, K: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, EPS: tl.constexpr,
                SOURCE: tl.constexpr):
    """amax f32 [M]: the largest finite magnitude of each row."""
    rows = tl.program_id(0) * R + tl.arange(0, R)
    inside = _inside(rows, M, K, BLOCK)
    x, y = _rows(x_ptr, second_ptr, rows, inside, K, BLOCK, EPS, SOURCE)
    _, _, _, amax, _ = _statistics(x, y)
    tl.store(amax_ptr + rows, amax, mask=rows < M)


@triton.jit
def _scaled(x_ptr, second_ptr, amax_ptr, rows, M, K: tl.constexpr, BLOCK: tl.constexpr, EPS: tl.constexpr,
            SOURCE: tl.constexpr, AMAX: tl.constexpr, PER: tl.constexpr, TOP: tl.constexpr, POW2: tl.constexpr,
            FOUR_OVER_SIX: tl.constexpr):
    """-> halves that E2M1 is to round [R, B, 8], scale bits, scales, global scales [R], poisoned [R], which blocks there are.

    AMAX: "row", "given" or "static" (a global scale is given); entry row // PER of amax_ptr, PER 0 for a scalar."""
    inside = _inside(rows, M, K, BLOCK)
    x, y = _rows(x_ptr, second_ptr, rows, inside, K, BLOCK, EPS, SOURCE)
    x, y, block_amax, row_amax, poisoned = _statistics(x, y)
    if AMAX == "row":
        g, global_scale, amax = global_scales(row_amax, TOP, POW2)
    else:
        at = rows * 0 if PER == 0 else rows // PER
        given = tl.load(amax_ptr + at, mask=rows < M, other=1.0)
        if AMAX == "static":
            g, global_scale, amax = tl.div_rn(tl.zeros_like(given) + 1.0, given), given, given * TOP
        else:
            g, global_scale, amax = global_scales(given, TOP, POW2)
    multiplier, bits, scale = block_scales(x, y, block_amax, g, amax, FOUR_OVER_SIX)
    return x * multiplier[:, :, None], y * multiplier[:, :, None], bits, scale, global_scale, poisoned, inside


@triton.jit
def packed_kernel(x_ptr, second_ptr, amax_ptr, M, packed_ptr, scale_ptr, global_ptr, K: tl.constexpr, R: tl.constexpr,
                  BLOCK: tl.constexpr, EPS: tl.constexpr, SOURCE: tl.constexpr, AMAX: tl.constexpr, PER: tl.constexpr,
                  TOP: tl.constexpr, POW2: tl.constexpr, FOUR_OVER_SIX: tl.constexpr):
    """packed u8 [M, K/2], scale bits u8 [M, K/16], global scale f32 [M]."""
    rows = tl.program_id(0) * R + tl.arange(0, R)
    x, y, bits, _, global_scale, poisoned, inside = _scaled(
        x_ptr, second_ptr, amax_ptr, rows, M, K, BLOCK, EPS, SOURCE, AMAX, PER, TOP, POW2, FOUR_OVER_SIX)
    block = tl.arange(0, BLOCK // 16)
    at = rows.to(tl.int64)[:, None] * (K // 16) + block[None, :]
    words = tl.join(pack(encode_e2m1(x)), pack(encode_e2m1(y)))
    tl.store(packed_ptr.to(tl.pointer_type(tl.int32)) + at[:, :, None] * 2 + tl.arange(0, 2)[None, None, :], words, mask=inside[:, :, None])
    tl.store(scale_ptr + at, tl.where(poisoned[:, None], 0x7F, bits).to(tl.uint8), mask=inside)
    tl.store(global_ptr + rows, global_scale, mask=rows < M)


@triton.jit
def _store_half(values, o_ptr, to, inside, H: tl.constexpr, K: tl.constexpr):
    """Stores half H of the blocks, f16 [R, B, 8], in the order of `permute_k`."""
    R: tl.constexpr = values.shape[0]
    B: tl.constexpr = values.shape[1]
    values = tl.permute(values.reshape(R, B, 2, 4), (0, 1, 3, 2))
    block = tl.arange(0, B)
    words = tl.where(block // 16 == K // 256, K % 256 // 16, 16)  # of the block's chunk
    place = (block // 16 * 256 + block % 16 * 2)[:, None] + 2 * words[:, None] * (4 * H + tl.arange(0, 4))[None, :]
    at = to.to(tl.int64)[:, None, None, None] * K + (place[:, :, None] + tl.arange(0, 2)[None, None, :])[None, :, :, :]
    tl.store(o_ptr + at, values, mask=inside[:, :, None, None])


@triton.jit
def _store_operand(x, y, copies_ptr, o_ptr, scale_ptr, row_scale, rows, M, inside, K: tl.constexpr, COPIES: tl.constexpr):
    """COPIES 0: as these rows, else as the rows copies[row, :] where not negative."""
    for copy in tl.static_range(1 if COPIES == 0 else COPIES):
        if COPIES == 0:
            to, held, stored = rows, inside, rows < M
        else:
            to = tl.load(copies_ptr + rows * COPIES + copy, mask=rows < M, other=-1)
            held, stored = inside & (to >= 0)[:, None], to >= 0
        _store_half(x, o_ptr, to, held, 0, K)
        _store_half(y, o_ptr, to, held, 1, K)
        tl.store(scale_ptr + to, row_scale, mask=stored)


@triton.jit
def operand_kernel(x_ptr, second_ptr, amax_ptr, copies_ptr, M, o_ptr, scale_ptr, K: tl.constexpr, R: tl.constexpr,
                   BLOCK: tl.constexpr, EPS: tl.constexpr, SOURCE: tl.constexpr, AMAX: tl.constexpr, PER: tl.constexpr,
                   TOP: tl.constexpr, POW2: tl.constexpr, FOUR_OVER_SIX: tl.constexpr, COPIES: tl.constexpr):
    """code * scale f16, K permuted, and the global scales f32 [M]. A row with NaN or infinity is NaN."""
    rows = tl.program_id(0) * R + tl.arange(0, R)
    x, y, _, scale, global_scale, poisoned, inside = _scaled(
        x_ptr, second_ptr, amax_ptr, rows, M, K, BLOCK, EPS, SOURCE, AMAX, PER, TOP, POW2, FOUR_OVER_SIX)
    scale = tl.where(poisoned[:, None], float("nan"), scale)[:, :, None]
    _store_operand((round_e2m1(x) * scale).to(tl.float16), (round_e2m1(y) * scale).to(tl.float16), copies_ptr, o_ptr, scale_ptr, global_scale,
                   rows, M, inside, K, COPIES)


@triton.jit
def plain_kernel(x_ptr, second_ptr, scales_ptr, M, o_ptr, scale_ptr, K: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
                 EPS: tl.constexpr, SOURCE: tl.constexpr, PER: tl.constexpr):
    """Unquantized rows times a power of two that brings their amax to [2**14, 2**15), in float16, K permuted; the power of two comes
    back in the row scale, times an entry of scales_ptr (as in `_scaled`)."""
    rows = tl.program_id(0) * R + tl.arange(0, R)
    inside = _inside(rows, M, K, BLOCK)
    x, y = _rows(x_ptr, second_ptr, rows, inside, K, BLOCK, EPS, SOURCE)
    x, y, _, amax, poisoned = _statistics(x, y)
    exponent = tl.maximum(bits_of(amax) >> 23, 15)  # 2**(exponent - 127) <= amax
    power = tl.where(poisoned, float("nan"), float_of((268 - exponent) << 23))[:, None, None]
    given = tl.load(scales_ptr + (rows * 0 if PER == 0 else rows // PER), mask=rows < M, other=1.0)
    _store_operand((x * power).to(tl.float16), (y * power).to(tl.float16), scales_ptr, o_ptr, scale_ptr,
                   float_of((exponent - 14) << 23) * given, rows, M, inside, K, 0)


# --- calls ---------------------------------------------------------------------------------------------------------------------------

def plan(m: int, k: int, source: str, four_over_six: bool) -> tuple[int, int, int]:
    """(rows of a program, padded K in registers, warps). Four-over-six keeps two candidates: half the elements a thread."""
    block = max(CHUNK, triton.next_power_of_2(k))
    rows = 1 if source == "norm" else max(1, ELEMENTS // block)
    if four_over_six:
        return max(1, rows // 2), block, min(16, max(4, block // 256))
    elements = THREAD if m * k >= MANY else 16  # of a thread: many share what a row costs each; few end sooner
    return rows, block, min(16, max(1, rows * block // (32 * elements)))


FLOATS = (jnp.bfloat16, jnp.float16, jnp.float32)


def _check(what, x, second):
    if x.ndim != 2 or x.dtype not in FLOATS or x.shape[1] % 16 or not 0 < x.shape[1] <= MAX_K or not x.size:
        raise NotImplementedError(f"{what}: wants a float [M, K], not empty, K a multiple of 16 and at most {MAX_K}; got {x.dtype}{x.shape}")
    if second is not None and (second.dtype not in FLOATS or second.shape not in (x.shape, x.shape[1:])):
        raise NotImplementedError(f"{what}: {second.dtype}{second.shape} beside {x.dtype}{x.shape}")


def _launch(kernel, x, second, others, outputs, constants):
    """Runs a kernel of the rows of x."""
    source = "x" if second is None else "norm" if second.ndim == 1 else "silu"
    (m, k), (rows, block, warps) = x.shape, plan(*x.shape, source, constants.get("FOUR_OVER_SIX", 0) > 0)
    constants = dict(K=k, R=rows, BLOCK=block, EPS=0.0, SOURCE=source) | constants
    return call(kernel, [x, x if second is None else second, *others], [m], outputs, grid=(-(-m // rows),), warps=warps,
                constants=constants)


def _float32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def row_amax(x, second=None, *, eps=0.0):
    """f32 [M]: the largest finite magnitude of each row of x [M, K], or of what `operand` would quantize."""
    _check("amax", x, second)
    return _launch(amax_kernel, x, second, [], [_float32(x.shape[0])], dict(EPS=eps))[0]


def _top(four_over_six):
    return numerics.E2M1_MAX * (numerics.E4M3_MAX if four_over_six is None else numerics.E4M3_MAX_FOUR_OVER_SIX)


def _mode(x, second, eps, scaling, four_over_six, amax, static, valid, per=1):
    """-> (the array of amaxes, constants, the scalar global scale or None where each row has its own)."""
    constants = dict(EPS=eps, PER=per, TOP=_top(four_over_six), POW2=scaling == "tensor_pow2",
                     FOUR_OVER_SIX=(None, "mae", "mse").index(four_over_six))
    if static is None and amax is None and scaling == "token":
        return jnp.zeros(1, jnp.float32), constants | dict(AMAX="row"), None
    if static is None and amax is None:
        amax = row_amax(x, second, eps=eps)
        amax = (amax if valid is None else jnp.where(valid, amax, jnp.float32(0))).max()
    given = jnp.asarray(amax if static is None else static, jnp.float32)
    constants |= dict(AMAX="given" if static is None else "static")
    if given.size > 1 or per > 1:
        return given.reshape(-1), constants, None
    scalar = given.reshape(()) if given.ndim == 0 else None
    if scalar is not None and static is None:
        scalar = numerics.global_scales(scalar, pow2=constants["POW2"], four_over_six=four_over_six is not None)[1]
    return given.reshape(1), constants | dict(PER=0), scalar


def _packed(x, amaxes, constants):
    m, k = x.shape
    packed, bits, scales = _launch(packed_kernel, x, None, [amaxes], [
        jax.ShapeDtypeStruct((m, k // 2), jnp.uint8), jax.ShapeDtypeStruct((m, k // 16), jnp.uint8), _float32(m)], constants)
    return packed, jax.lax.bitcast_convert_type(bits, jnp.float8_e4m3fn), scales


def quantize(x, *, scaling="tensor", four_over_six=None, amax=None, global_scale=None, valid=None):
    """Quantizes activations or weights to NVFP4, bit for bit as `numerics` on a CPU.

    x: float [M, K], K a multiple of 16. scaling: "tensor", "tensor_pow2" or "token". four_over_six: None, "mae" or "mse".
    amax: f32 [] or [M, 1], where a producer knows it. global_scale: f32 [] or [M, 1], a static scale (it multiplies).
    valid: bool [M]; rows where it is False take no part in a tensor's amax.
    -> packed u8 [M, K/2], scale float8_e4m3fn [M, K/16], global_scale f32 [] or [M, 1].
    A row with NaN or infinity gets NaN scales and zero codes, alone. NotImplementedError for what does not fit.
    """
    _check("quantize", x, None)
    amaxes, constants, scalar = _mode(x, None, 0.0, scaling, four_over_six, amax, global_scale, valid)
    packed, scale, scales = _packed(x, amaxes, constants)
    return packed, scale, scales[:, None] if scalar is None else scalar


def quantize_weight(w, *, four_over_six=None):
    """Weights with one global scale for each [N, K] matrix, as `nvfp4jax.array.quantize_weight`.

    w: bfloat16 [..., N, K]. -> packed u8 [..., N, K/2], scale float8_e4m3fn [..., N, K/16], global_scale f32 [..., 1, 1], or [].
    """
    *lead, n, k = w.shape
    rows = w.reshape(math.prod(lead) * n, k)
    _check("quantize_weight", rows, None)
    amax = row_amax(rows).reshape(-1, n).max(1)
    amaxes, constants, _ = _mode(rows, None, 0.0, "tensor", four_over_six, amax, None, None, per=n)
    packed, scale, scales = _packed(rows, amaxes, constants)
    global_scale = scales.reshape(-1, n)[:, 0]
    return (packed.reshape(*lead, n, k // 2), scale.reshape(*lead, n, k // 16),
            global_scale.reshape(*lead, 1, 1) if lead else global_scale.reshape(()))


def operand(x, second=None, *, eps=0.0, scaling="tensor", four_over_six=None, amax=None, global_scale=None, valid=None, copies=None):
    """Quantizes as `quantize` does, and decodes at once: what the matmuls read.

    second: None, the weight [K] of an RMSNorm of x with eps, or up [M, K] for silu(x) * up, as `numerics.rms_norm` and `silu_mul`.
    copies: i32 [M, c], to hand out c copies of each row: row i becomes the rows copies[i] of the M * c results (-1: nowhere). Rows of
    the results that are nobody's hold anything.
    -> float16 [M or M * c, K]; row scale f32 [] or [M or M * c, 1].
    """
    _check("operand", x, second)
    m, k = x.shape
    rows = m * (1 if copies is None else copies.shape[1])
    amaxes, constants, scalar = _mode(x, second, eps, scaling, four_over_six, amax, global_scale, valid)
    values, scales = _launch(
        operand_kernel, x, second, [amaxes, jnp.zeros(1, jnp.int32) if copies is None else copies],
        [jax.ShapeDtypeStruct((rows, k), jnp.float16), _float32(rows)], constants | dict(COPIES=0 if copies is None else copies.shape[1]))
    return values, scales[:, None] if scalar is None else scalar


def plain(x, row_scale=None):
    """An activation that stays unquantized, float [M, K], as the matmuls read it: (float16 [M, K], row scale f32 [M, 1]).

    Each row is multiplied by a power of two. What float16 then loses of a bfloat16 or float16 row lies below 2**-39 of the row's amax.
    row_scale: f32 [] or [M, 1] that goes with x already.
    """
    _check("plain", x, None)
    given = jnp.ones(1, jnp.float32) if row_scale is None else row_scale.reshape(-1)
    values, scales = _launch(plain_kernel, x, None, [given], [jax.ShapeDtypeStruct(x.shape, jnp.float16), _float32(x.shape[0])],
                             dict(PER=1 if given.size > 1 else 0))
    return values, scales[:, None]
