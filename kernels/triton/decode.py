"""NVFP4 weights from the checkpoint's layout to float16 in registers, exactly, and what the matmuls share.

A 64-bit word of codes is one block of 16 and has one scale, so words and scales are tiles of one shape [rows, K/16] and nothing moves
between threads. The two 32-bit halves of a word hold planes: nibbles t and t + 4 of a half become, by shifts and masks alone, the two
float16 of one register (code * 2**-14), and one packed product gives both code * scale * 2**-7. Every such value is a float16, smallest
2**-17. `quantize.permute_k` orders the activations' K to match.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # the interpreter knows no inline PTX
SHARED = {75: 65536, 80: 166912, 86: 101376, 87: 166912, 89: 101376, 90: 232448, 100: 232448, 103: 232448}
BK = 256  # of K a step: a chunk of `permute_k`. One for all tiles: the order of a sum over K is the same for every M


def shared_memory(sm: int) -> int:
    """Bytes that a program may take on compute capability sm; 101376 is the least of those since 8.0."""
    return SHARED.get(sm, 101376)


def stages(sm: int, step_bytes: int, programs: int) -> int:
    """Stages of the pipeline over K: 2 to 4 steps in flight, so that `programs` share a multiprocessor's memory where 3 steps of each fit.

    With mma.sync Triton keeps one step less in memory than it has stages, with the matrix instructions that read shared memory as many."""
    room = shared_memory(sm) - 2048
    while programs > 1 and room // programs < 3 * step_bytes:
        programs -= 1
    return max(2, min(4, room // programs // step_bytes) + (not reads_shared_memory(sm)))


def reads_shared_memory(sm: int) -> bool:
    """Whether Triton's matrix instruction takes its second operand from shared memory: wgmma, tcgen05."""
    return sm in (90, 100, 103)


def least_tokens(sm: int) -> int:
    """The narrowest tile of tokens for which Triton takes the same matrix instruction as for the others: a row's bits depend on it."""
    return 16 if reads_shared_memory(sm) else 8


@triton.jit
def factors(bits):
    """E4M3 bits u8 -> f16 scale * 2**7, exact (at most 57344); NaN stays NaN."""
    magnitude = (bits & 0x7F).to(tl.int32)
    value = (magnitude << 7).to(tl.int16).to(tl.float16, bitcast=True) * 32768.0
    return tl.where(magnitude == 0x7F, float("nan"), value).to(tl.float16)


@triton.jit
def plane(words, factor, P: tl.constexpr):
    """Plane P of words i64 [R, W] with factors f16 [R, W] -> f16 [R, 2 W] of code * scale * 2**-7."""
    half = (words >> (32 * (P // 4))).to(tl.int32)
    T: tl.constexpr = P % 4
    if T == 3:
        pair = ((half >> 3) & 0x0E000E00) | (half & -0x7FFF8000)
    else:
        pair = ((half << (9 - 4 * T)) & 0x0E000E00) | ((half << (12 - 4 * T)) & -0x7FFF8000)
    if INTERPRETED:
        low = pair.to(tl.int16).to(tl.float16, bitcast=True) * factor
        high = (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True) * factor
    else:
        low, high = tl.inline_asm_elementwise(
            "{.reg .b32 f,z; mov.b32 f,{$3,$3}; mul.rn.f16x2 z,$2,f; mov.b32 {$0,$1},z;}", "=h,=h,r,h", [pair, factor],
            dtype=(tl.float16, tl.float16), is_pure=True, pack=1)
    return tl.join(low, high).reshape(words.shape[0], 2 * words.shape[1])


@triton.jit
def load_weights(w_ptrs, s_ptrs, inside, MASKED: tl.constexpr):
    """Words i64 and factors f16."""
    if MASKED:
        return tl.load(w_ptrs, mask=inside, other=0), factors(tl.load(s_ptrs, mask=inside, other=0))
    return tl.load(w_ptrs), factors(tl.load(s_ptrs))


@triton.jit
def multiply(acc, words, factor, x_ptrs, inside, W: tl.constexpr):
    """acc f32 [R, BM] += a chunk of W words a row of the weights times the tokens; x_ptrs [32, BM] at the chunk's first plane."""
    for p in tl.static_range(8):
        acc = tl.dot(plane(words, factor, p), tl.load(x_ptrs + 2 * W * p, mask=inside, other=0.0), acc)
    return acc


@triton.jit
def multiply_tail(acc, w_ptrs, s_ptrs, x_ptrs, rows_inside, tokens, K: tl.constexpr):
    """The last chunk of K, which is not whole."""
    W: tl.constexpr = K % 256 // 16
    whole: tl.constexpr = K // 256
    words, factor = load_weights(w_ptrs + whole * 16, s_ptrs + whole * 16, rows_inside & (tl.arange(0, 16) < W)[None, :], True)
    return multiply(acc, words, factor, x_ptrs + whole * 256, tokens & (tl.arange(0, 32) < 2 * W)[:, None], W)
