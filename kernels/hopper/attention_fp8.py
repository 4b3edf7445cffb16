"""What decode attention does with an FP8 cache: E4M3 codes to bfloat16 in registers, and a power of two for each slot and head.

    scores    (q . codes) * scale            weights    bfloat16(p) * scale

Codes are exact in bfloat16 and a power of two rounds nothing, so the sums are those of `attention_sums` over the decoded keys and
values, to the bit, until a vector's largest element is so small (2**-60 or so) that a product leaves float32's range. A fragment has the
elements that a bfloat16 cache gives it, in the same k16 step and place; only the head dimensions of a warp's values lie otherwise in its
registers (`attention_merge.dimensions`).
"""
from nvfp4jax.kernels.hopper import mosaic as mg
from nvfp4jax.kernels.hopper.attention_sums import PIECE

SCALE = 4  # bytes of a scale: the least that cp.async copies
# Two codes -> their bfloat16: by way of half and float32, with a rounding that has nothing to round. What shifts and masks would do as
# well takes more instructions, and of the busiest kind.
KEYS = ("{{.reg .b16 c,l,u; .reg .b32 f; .reg .f32 x,y; ld.shared.b16 c,[$1+{offset}]; cvt.rn.f16x2.e4m3x2 f,c; mov.b32 {{l,u}},f;"
        "cvt.f32.f16 x,l; cvt.f32.f16 y,u; cvt.rn.bf16x2.f32 $0,y,x;}}")
# 4 codes, of head dimensions d and d + 1 of one slot and of the next -> d of both slots, d + 1 of both.
VALUES = ("{.reg .b16 a,b,l,u; .reg .b32 f,g; .reg .f32 p,q,r,s; mov.b32 {a,b},$2; cvt.rn.f16x2.e4m3x2 f,a; cvt.rn.f16x2.e4m3x2 g,b;"
          "mov.b32 {l,u},f; cvt.f32.f16 p,l; cvt.f32.f16 q,u; mov.b32 {l,u},g; cvt.f32.f16 r,l; cvt.f32.f16 s,u;"
          "cvt.rn.bf16x2.f32 $0,r,p; cvt.rn.bf16x2.f32 $1,s,q;}")
LDMATRIX_TRANSPOSED = "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {{$0,$1,$2,$3}},[$4+{offset}];"
# One scale a lane: of a key where the lane is below 16, else of a value.
COPY_SCALE = ("{.reg .pred p; .reg .b64 a; setp.lt.u32 p,$3,16; selp.b64 a,$1,$2,p; cp.async.ca.shared.global [$0],[a],4,$4;}")


def issue_scales(thread, stage, head, slot, rest):
    """Starts the loads of the scales of the warp's 16 slots. slot: the first, in the cache; rest: how far the row's end lies beyond it."""
    s = thread.s
    own = thread.lane % 16
    sources = [mg.gmem_element(thread.refs[f"{name}_scale"], head, s.capacity, mg.i32(0), SCALE) + (slot + own) * SCALE for name in ("keys", "values")]
    to = stage + thread.warp * (16 * SCALE) + (thread.lane // 16 * (PIECE * SCALE) + own * SCALE + s.scales_at)
    mg.asm(COPY_SCALE, [to, *sources, thread.lane, mg.signed_less(own, rest) * SCALE], "")


def scales(thread, stage, name):
    """Of the thread's two slots, row and row + 8 of its warp's."""
    at = stage + thread.scale_at + (PIECE * SCALE if name == "values" else 0)
    return [mg.asm(f"ld.shared.f32 $0,[$1+{8 * h * SCALE}];", [at], "f") for h in range(2)]


def keys(thread, at):
    """A fragment of 16 slots and 16 head dimensions."""
    row = 8 * thread.s.row
    return [mg.asm(KEYS.format(offset=offset), [at]) for offset in (0, row, 8, row + 8)]


def values(thread, at, pair):
    """Two fragments of 16 head dimensions and 16 slots each: rows r and r + 8 are the dimensions 2 r and 2 r + 1 of the slice."""
    words = mg.asm(LDMATRIX_TRANSPOSED.format(offset=32 * pair * thread.s.row), [at], "rrrr")
    split = [mg.asm(VALUES, [word], "rr", effects=False) for word in words]
    return [[*split[2 * i], *split[2 * i + 1]] for i in range(2)]
