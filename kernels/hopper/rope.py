"""What lies between q, k, v and attention, in one launch: norm of the heads, rotary embedding, keys and values into their slots.

A thread owns 16 neighbouring elements of a head; the D / 16 lanes of a head sum its squares and exchange their rotated halves. The
norm is `numerics.rms_norm` to the bit. The cache is written where it lies (a Ref, an aliased operand of the launch), in bfloat16 or as
E4M3 codes with a power of two for each slot and head, `fp8.quantize` to the bit.
"""
import dataclasses
import functools

import jax
import jax.numpy as jnp

from nvfp4jax.kernels.hopper import quantize_ptx as ptx
from nvfp4jax.kernels.hopper import threads
from nvfp4jax.kernels.hopper.machine import WARP
from nvfp4jax.kernels.hopper.mosaic import asm, gmem_address, gmem_element, minimum, select, thread_index
from nvfp4jax.kernels.hopper.threads import load_global, offset_address, store_global

HEAD_DIMS = 64, 128
WARPS = 4
# Two elements x, their partners y in the other half, two cosines, two sines (negative in the first half): x cos + y sin, rounded.
ROTATE = ("{.reg .b32 x0,x1,y0,y1; shl.b32 x0,$1,16; and.b32 x1,$1,0xFFFF0000; shl.b32 y0,$2,16; and.b32 y1,$2,0xFFFF0000;"
          "mul.rn.f32 x0,x0,$3; mul.rn.f32 x1,x1,$4; mul.rn.f32 y0,y0,$5; mul.rn.f32 y1,y1,$6;"
          "add.rn.f32 x0,x0,y0; add.rn.f32 x1,x1,y1; cvt.rn.bf16x2.f32 $0,x1,x0;}")
# 8 words of two bf16 -> the float32 bits of the largest magnitude; then of all lanes of the head.
LARGEST = ("{.reg .b32 m,t; and.b32 m,$1,0x7FFF7FFF;" + "".join(f"and.b32 t,${i},0x7FFF7FFF; max.u16x2 m,m,t;" for i in range(2, 9)) +
           "shl.b32 t,m,16; and.b32 m,m,0xFFFF0000; max.u32 $0,m,t;}")
BUTTERFLY_MAX = "{{.reg .b32 o; shfl.sync.bfly.b32 o,$1,{step},31,-1; max.u32 $0,$1,o;}}"
# Those bits -> the scale of FP8 and its inverse: the mantissa of 448 is 1.75, what is above it carries into the exponent.
FP8_SCALE = ("{.reg .pred p; .reg .b32 e,i; add.u32 e,$2,0x1FFFFF; shr.u32 e,e,23; max.u32 e,e,20; sub.u32 e,e,8; min.u32 e,e,246;"
             "sub.u32 i,254,e; shl.b32 e,e,23; setp.lt.u32 p,$2,0x7F800000; selp.b32 $0,e,0x7FC00000,p; shl.b32 $1,i,23;}")
# Two words of two bf16, the inverse of their scale -> 4 codes.
FP8_CODES = ("{.reg .b16 a,b; .reg .b32 x0,x1,y0,y1; shl.b32 x0,$1,16; and.b32 x1,$1,0xFFFF0000; shl.b32 y0,$2,16; and.b32 y1,$2,0xFFFF0000;"
             "mul.rn.f32 x0,x0,$3; mul.rn.f32 x1,x1,$3; mul.rn.f32 y0,y0,$3; mul.rn.f32 y1,y1,$3;"
             "cvt.rn.satfinite.e4m3x2.f32 a,x1,x0; cvt.rn.satfinite.e4m3x2.f32 b,y1,y0; mov.b32 $0,{a,b};}")


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a kernel is compiled for. eps: of the norm of the heads, None where there is none; fp8: whether the caches are."""

    rows: int
    tokens: int
    heads: int
    kv_heads: int
    d: int
    capacity: int
    eps: float | None
    fp8: bool = False

    @property
    def lanes(self):
        """Threads of a head."""
        return self.d // 16

    @property
    def vectors(self):
        return self.rows * self.tokens * (self.heads + 2 * self.kv_heads)


def _either(loads):
    """Of (address, condition) the 8 words where the condition holds, zeros where none does."""
    words = [load_global(address, 8, condition) for address, condition in loads]
    return [functools.reduce(lambda a, b: asm("or.b32 $0,$1,$2;", [a, b], effects=False), alike) for alike in zip(*words)]


def _fp8(words, s: Shape):
    """A thread's 16 elements -> the scale of its head's vector, 4 words of codes."""
    largest = asm(LARGEST, words, effects=False)
    step = s.lanes // 2
    while step:
        largest = asm(BUTTERFLY_MAX.format(step=step), [largest])
        step //= 2
    scale, inverse = asm(FP8_SCALE, [largest], "rr", effects=False)
    return scale, [asm(FP8_CODES, [*words[i:i + 2], inverse], effects=False) for i in range(0, 8, 2)]


def _program(refs, s: Shape):
    """One thread's program."""
    thread = asm("mov.u32 $0,%ctaid.x;", effects=False) * (WARPS * WARP) + thread_index()
    vector, lane = thread // s.lanes, thread % s.lanes
    here = vector < s.vectors
    per_token = s.heads + 2 * s.kv_heads
    token, head = vector // per_token, vector % per_token
    of_q, rotated = head < s.heads, head < s.heads + s.kv_heads
    kinds = {"q": here & of_q, "k": here & (rotated - of_q), "v": here & (1 - rotated)}
    own = select(of_q, head, (head - s.heads) % s.kv_heads)
    column = lane * 16

    def element(name, array):
        """The address of this thread's elements of head `own` in [tokens, heads of `name`, D]."""
        return gmem_element(refs[array], token * (s.heads if name == "q" else s.kv_heads) + own, s.d, column, 2)

    raw = _either([(element(name, name), of) for name, of in kinds.items()])
    words = raw
    if s.eps is not None:
        total = asm(ptx.SQUARES, raw, effects=False)
        step = s.lanes // 2
        while step:
            total = asm(ptx.BUTTERFLY_ADD.format(step=step), [total])
            step //= 2
        constants = dict(share=1 / s.d, eps=s.eps, half=.5, one=1, two=2 + 2.0**-22)
        inverse = asm(ptx.INVERSE_RMS.format(**{name: ptx.f32(value) for name, value in constants.items()}), [total], effects=False)
        weights = _either([(gmem_element(refs[f"{name}_weight"], 0, 0, column, 2), kinds[name]) for name in "qk"])
        words = [asm(ptx.NORM, [word, inverse, w], effects=False) for word, w in zip(words, weights)]
    half = lane % (s.lanes // 2) * 16
    cosines, sines = (load_global(gmem_element(refs[name], token, s.d // 2, half, 4), 16, here & rotated) for name in ("cos", "sin"))
    sign = (lane < s.lanes // 2) * 2**31
    out = []
    for i, (word, plain) in enumerate(zip(words, raw)):
        partner = asm(f"shfl.sync.bfly.b32 $0,$1,{s.lanes // 2},31,-1;", [word])
        turned = asm(ROTATE, [word, partner, *cosines[2 * i:2 * i + 2], *(x ^ sign for x in sines[2 * i:2 * i + 2])], effects=False)
        out.append(select(rotated, turned, plain))
    row = token // s.tokens
    slot = asm("ld.global.nc.b32 $0,[$1];", [gmem_element(refs["starts"], minimum(row, s.rows - 1), 1, 0, 4)]) + token % s.tokens
    layer = asm("ld.global.nc.b32 $0,[$1];", [gmem_address(refs["layer"])])
    cache_head = (layer * s.rows + row) * s.kv_heads + own
    scale, codes = _fp8(out, s) if s.fp8 else (None, None)
    for name, array in (("q", "out"), ("k", "keys"), ("v", "values")):
        at, stored = element(name, array), kinds[name]
        if s.fp8 and name != "q":
            stored = stored & (slot < s.capacity)
            at = gmem_element(refs[array], cache_head, s.capacity, slot, s.d) + column
            store_global(at, codes, stored)
            store_global(gmem_element(refs[f"{array}_scale"], cache_head, s.capacity, slot, 4), [scale], stored & (lane == 0))
            continue
        if name != "q":
            at = gmem_element(refs[array], cache_head, s.capacity, slot, 2 * s.d) + column * 2
            stored = stored & (slot < s.capacity)
        for i in (0, 4):
            store_global(offset_address(at, 4 * i), out[i:i + 4], stored)


def _kernel(s: Shape):
    """-> a function of q, k, v, cos, sin, starts, layer, (the weights of the norms,) keys and values (and their scales), which it writes
    into."""
    caches = ["keys", "values", *(["keys_scale", "values_scale"] if s.fp8 else [])]
    names = ["q", "k", "v", "cos", "sin", "starts", "layer", *([] if s.eps is None else ["q_weight", "k_weight"]), *caches, "out"]
    out = jax.ShapeDtypeStruct((s.rows, s.tokens, s.heads, s.d), jnp.bfloat16)
    return threads.thread_kernel(lambda refs: _program(refs, s), names, [out], grid=-(-s.vectors * s.lanes // (WARPS * WARP)), warps=WARPS)


@functools.partial(jax.jit, static_argnames="s")
def _launch(s: Shape, inputs, *caches):
    """Behind its own jit: equal layers are lowered once."""
    refs = [jax.new_ref(x) for x in caches]
    (out,) = _kernel(s)(*inputs, *refs)
    return out, *(jax.freeze(ref) for ref in refs)


def rope_write(q, k, v, cos, sin, starts, keys, values, *, layer=None, norm=None, scales=None):
    """Norms the heads of q and k, rotates them, and writes keys and values into their slots.

    Args:
      q: bf16 [B, T, Hq, D]; k, v: bf16 [B, T, Hkv, D]. cos, sin: f32 [B, T, D / 2].
      starts: i32 [B]: token t of row b goes to slot starts[b] + t; what would lie past the last slot is dropped.
      keys, values: bf16 [B, Hkv, S, D], or [L, B, Hkv, S, D] with `layer`, an i32 scalar: written in place where nobody else reads them.
      norm: None, or (weight of q, weight of k, eps): bf16 [D] each.
      scales: None, or those of keys and values, f32 [(L,) B, Hkv, S], written in place too: then keys and values are float8_e4m3fn.

    Returns:
      q, bf16 [B, T, Hq, D], and the two caches; with scales also those.

    Raises:
      NotImplementedError: other dtypes or head dimensions, a rotation of a part of the head, or nothing to write.
      ValueError: shapes that do not fit together, or angles in another dtype.
    """
    rows, tokens, heads, d = q.shape
    *_, kv_heads, capacity, _ = keys.shape
    arrays, cached = [q, k, v, *(norm[:2] if norm else [])], jnp.dtype(jnp.bfloat16 if scales is None else jnp.float8_e4m3fn)
    dtypes = {a.dtype for a in arrays} == {jnp.dtype(jnp.bfloat16)} and keys.dtype == values.dtype == cached
    if not dtypes or d not in HEAD_DIMS or 2 * cos.shape[-1] != d or values.shape != keys.shape:
        raise NotImplementedError(f"rope_write on Hopper: {[f'{a.dtype}{a.shape}' for a in (*arrays, keys, values)]}, cos {cos.shape}: bfloat16 heads of {HEAD_DIMS}, "
                                  "rotated whole, are supported")
    # The kernel goes by q's and the keys' shapes alone.
    angles, new, cache = (rows, tokens, d // 2), (rows, tokens, kv_heads, d), (rows, kv_heads, capacity, d)
    fits = cos.shape == sin.shape == angles and k.shape == v.shape == new and starts.shape == (rows,) and keys.shape[-4:] == cache
    if not fits or {cos.dtype, sin.dtype} != {jnp.dtype(jnp.float32)}:
        raise ValueError(f"rope_write: q {q.shape} and keys {keys.shape} want k and v {new}, cos and sin float32{angles}, starts {(rows,)}, caches of "
                         f"{cache}; got {k.shape}, {v.shape}, {cos.dtype}{cos.shape}, {sin.dtype}{sin.shape}, {starts.shape}")
    if 0 in (*q.shape, *keys.shape):
        raise NotImplementedError(f"rope_write on Hopper: nothing to do for q {q.shape} and keys {keys.shape}")
    s = Shape(rows, tokens, heads, kv_heads, d, capacity, norm[2] if norm else None, scales is not None)
    layer = jnp.zeros(1, jnp.int32) if layer is None else layer.astype(jnp.int32).reshape(1)
    return _launch(s, (q, k, v, cos, sin, starts.astype(jnp.int32), layer, *(norm[:2] if norm else ())), keys, values, *(scales or ()))
