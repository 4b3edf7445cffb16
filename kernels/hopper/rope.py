"""What lies between q, k, v and attention, in one launch: norm of the heads, rotary embedding, keys and values into their slots.

A thread owns 16 neighbouring elements of a head; the D / 16 lanes of a head sum its squares and exchange their rotated halves. The
norm is `numerics.rms_norm` to the bit. The cache is written where it lies (a Ref, an aliased operand of the launch).
"""
import dataclasses
import functools

import jax
import jax.numpy as jnp

from nvfp4jax.kernels.hopper import attention_sums as sums
from nvfp4jax.kernels.hopper import mosaic as mg
from nvfp4jax.kernels.hopper import quantize

HEAD_DIMS = 64, 128
WARPS = 4
# Two elements x, their partners y in the other half, two cosines, two sines (negative in the first half): x cos + y sin, rounded.
ROTATE = ("{.reg .b32 x0,x1,y0,y1; shl.b32 x0,$1,16; and.b32 x1,$1,0xFFFF0000; shl.b32 y0,$2,16; and.b32 y1,$2,0xFFFF0000;"
          "mul.rn.f32 x0,x0,$3; mul.rn.f32 x1,x1,$4; mul.rn.f32 y0,y0,$5; mul.rn.f32 y1,y1,$6;"
          "add.rn.f32 x0,x0,y0; add.rn.f32 x1,x1,y1; cvt.rn.bf16x2.f32 $0,x1,x0;}")


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a kernel is compiled for. eps: of the norm of the heads, None where there is none."""

    rows: int
    tokens: int
    heads: int
    kv_heads: int
    d: int
    capacity: int
    eps: float | None

    @property
    def lanes(self):
        """Threads of a head."""
        return self.d // 16

    @property
    def vectors(self):
        return self.rows * self.tokens * (self.heads + 2 * self.kv_heads)


def _either(loads):
    """Of (address, condition) the 8 words where the condition holds, zeros where none does."""
    words = [mg.load_global(address, 8, condition) for address, condition in loads]
    return [functools.reduce(sums.bit_or, alike) for alike in zip(*words)]


def _program(refs, s: Shape):
    """One thread's program."""
    asm, add, sub, mul, div, rem = mg.asm, mg.add, mg.sub, mg.mul, mg.div, mg.rem
    pure = dict(effects=False)
    thread = add(mul(asm("mov.u32 $0,%ctaid.x;", **pure), WARPS * 32), mg.thread_index())
    vector, lane = div(thread, s.lanes), rem(thread, s.lanes)
    here = mg.flag("lt", vector, s.vectors)
    per_token = s.heads + 2 * s.kv_heads
    token, head = div(vector, per_token), rem(vector, per_token)
    of_q = mg.flag("lt", head, s.heads)
    rotated = mg.flag("lt", head, s.heads + s.kv_heads)
    kinds = {"q": of_q, "k": sub(rotated, of_q), "v": sub(1, rotated)}
    kinds = {name: mg.bit_and(here, of) for name, of in kinds.items()}
    own = mg.select(of_q, head, rem(sub(head, s.heads), s.kv_heads))
    column = mul(lane, 16)

    def line(name, array, row):
        """The address of this thread's elements of head `own` in [.., heads of `name`, D]."""
        return mg.gmem_element(refs[array], add(mul(row, s.heads if name == "q" else s.kv_heads), own), s.d, column, 2)

    raw = _either([(line(name, name, token), of) for name, of in kinds.items()])
    words = raw
    if s.eps is not None:
        total = asm(quantize.SQUARES, raw, **pure)
        step = s.lanes // 2
        while step:
            total = asm(quantize.BUTTERFLY_ADD.format(step=step), [total])
            step //= 2
        f32 = quantize._f32
        constants = dict(share=f32(1 / s.d), eps=f32(s.eps), half=f32(.5), one=f32(1), two=f32(2 + 2.0**-22))
        inverse = asm(quantize.INVERSE_RMS.format(**constants), [total], **pure)
        weights = _either([(mg.gmem_element(refs[f"{name}_weight"], mg.i32(0), 0, column, 2), kinds[name]) for name in "qk"])
        words = [asm(quantize.NORM, [word, inverse, w], **pure) for word, w in zip(words, weights)]
    half = rem(lane, s.lanes // 2)
    angles = [mg.load_global(mg.gmem_element(refs[name], token, s.d // 2, mul(half, 16), 4), 16, mg.bit_and(here, rotated)) for name in ("cos", "sin")]
    sign = mul(mg.flag("lt", lane, s.lanes // 2), 1 << 31)
    out = []
    for i, (word, plain) in enumerate(zip(words, raw)):
        partner = asm(f"shfl.sync.bfly.b32 $0,$1,{s.lanes // 2},31,-1;", [word])
        cos, sin = (a[2 * i:2 * i + 2] for a in angles)
        turned = asm(ROTATE, [word, partner, *cos, *(mg.bit_xor(x, sign) for x in sin)], **pure)
        out.append(mg.select(rotated, turned, plain))
    row, t = div(token, s.tokens), rem(token, s.tokens)
    slot = add(asm("ld.global.nc.b32 $0,[$1];", [mg.gmem_element(refs["starts"], mg.minimum(row, s.rows - 1), 1, mg.i32(0), 4)]), t)
    layer = asm("ld.global.nc.b32 $0,[$1];", [mg.gmem_address(refs["layer"])])
    inside = mg.flag("lt", slot, s.capacity)
    for name, array in (("q", "out"), ("k", "keys"), ("v", "values")):
        at, stored = line(name, array, token), kinds[name]
        if name != "q":
            head = add(mul(add(mul(layer, s.rows), row), s.kv_heads), own)
            at, stored = mg.gmem_element(refs[array], head, s.capacity, slot, 2 * s.d), mg.bit_and(stored, inside)
            at = sums.wide_add(at, mul(column, 2))
        for i in (0, 4):
            mg.store_global(mg.offset_address(at, 4 * i), out[i:i + 4], stored)


def _kernel(s: Shape):
    """-> a function of q, k, v, cos, sin, starts, layer, (the weights of the norms,) keys and values, which it writes into."""
    names = ["q", "k", "v", "cos", "sin", "starts", "layer", *([] if s.eps is None else ["q_weight", "k_weight"]), "keys", "values", "out"]
    out = jax.ShapeDtypeStruct((s.rows, s.tokens, s.heads, s.d), jnp.bfloat16)
    return mg.thread_kernel(lambda refs: _program(refs, s), names, [out], grid=-(-s.vectors * s.lanes // (WARPS * 32)), warps=WARPS)


@functools.partial(jax.jit, static_argnames="s")
def _launch(s: Shape, inputs, keys, values):
    """Behind its own jit: equal layers are lowered once."""
    refs = [jax.new_ref(x) for x in (keys, values)]
    (out,) = _kernel(s)(*inputs, *refs)
    return out, *(jax.freeze(ref) for ref in refs)


def rope_write(q, k, v, cos, sin, starts, keys, values, *, layer=None, norm=None):
    """Norms the heads of q and k, rotates them, and writes keys and values into their slots.

    Args:
      q: bf16 [B, T, Hq, D]; k, v: bf16 [B, T, Hkv, D]. cos, sin: f32 [B, T, D / 2].
      starts: i32 [B]: token t of row b goes to slot starts[b] + t; what would lie past the last slot is dropped.
      keys, values: bf16 [B, Hkv, S, D], or [L, B, Hkv, S, D] with `layer`, an i32 scalar: written in place where nobody else reads them.
      norm: None, or (weight of q, weight of k, eps): bf16 [D] each.

    Returns:
      q, bf16 [B, T, Hq, D], and the two caches.

    Raises:
      NotImplementedError: other dtypes or head dimensions, or a rotation of a part of the head.
    """
    rows, tokens, heads, d = q.shape
    *_, kv_heads, capacity, _ = keys.shape
    arrays = [q, k, v, keys, values, *(norm[:2] if norm else [])]
    if {a.dtype for a in arrays} != {jnp.dtype(jnp.bfloat16)} or d not in HEAD_DIMS or 2 * cos.shape[-1] != d or values.shape != keys.shape:
        raise NotImplementedError(f"rope_write on Hopper: {[f'{a.dtype}{a.shape}' for a in arrays]}, cos {cos.shape}: bfloat16 heads of {HEAD_DIMS}, "
                                  "rotated whole, are supported")
    s = Shape(rows, tokens, heads, kv_heads, d, capacity, norm[2] if norm else None)
    layer = jnp.zeros(1, jnp.int32) if layer is None else layer.astype(jnp.int32).reshape(1)
    return _launch(s, (q, k, v, cos, sin, starts.astype(jnp.int32), layer, *(norm[:2] if norm else ())), keys, values)
