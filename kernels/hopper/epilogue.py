"""From the accumulator of `decode.multiply_decoded` to global memory: scale, SiLU, transpose, store.

A lane of the accumulator holds two tokens (columns 8 j + 2 quad and the next) of fragment rows r and r + 8, whose weight rows
are two channels of the result. Results are [M, channels], so a lane should hold several channels of one token:

    float32     r and r + 8 are neighbouring channels: 8 bytes a token as they are
    bf16        `movmatrix` turns 8 x 8 tiles over: 4 neighbouring channels of one token, 8 bytes
    gated       silu(r) * (r + 8) first; then 2 channels, in the interleaved order, put right among lanes: 4 bytes
"""
import dataclasses
import functools

import jax.numpy as jnp

from nvfp4jax.kernels.hopper.decode import lanes
from nvfp4jax.kernels.hopper.mosaic import (
    Memory,
    Register,
    asm,
    bits,
    bits_of,
    float_of,
    gmem_element,
    halves,
    i32,
    inline,
    load_shared,
    select,
    settled,
    signed_less,
    smem_address,
)

SILU_MUL = ("{.reg .f32 e; mul.f32 e,$1,0fBFB8AA3B; ex2.approx.ftz.f32 e,e; add.f32 e,e,0f3F800000; "
            "rcp.approx.ftz.f32 e,e; mul.f32 e,e,$1; mul.f32 $0,e,$2;}")
PACK_TRANSPOSE = "{.reg .b32 q; cvt.rn.bf16x2.f32 q,$1,$2; movmatrix.sync.aligned.m8n8.trans.b16 $0,q;}"
# Lanes q and q^2 swap halves, which undoes the interleaved row order of `lanes`.
SWAP = ("{.reg .b32 o; .reg .pred z; shfl.sync.bfly.b32 o,$1,2,31,-1; setp.eq.u32 z,$2,0; "
        "@z prmt.b32 $0,$1,o,0x5410; @!z prmt.b32 $0,o,$1,0x7632;}")
# Stores of a token below the count in $2; the immediates stand in the text so that they are not kept in registers.
STORE = "{{.reg .pred p; setp.gt.s32 p,$2,{token}; @p st.global.{kind} [$0+{offset}],{value};}}"


@dataclasses.dataclass(frozen=True)
class _Tile:
    """A warpgroup's results, [count, width] of them from a row and a channel on."""

    tokens: int
    width: int
    gated: bool
    masked: bool

    def left(self, count, token, channel):
        """How many tokens from `token` on this lane writes in a channel."""
        tokens_left = count - token
        return select(signed_less(channel, self.width), tokens_left, i32(0)) if self.masked else tokens_left


@dataclasses.dataclass(frozen=True)
class _Target:
    """A lane's address in the result and, where something is added to the results, in that."""

    out: Register
    residual: Register | None


def _plus(pointer: Register, token, count, offset, value, single):
    """A value (f32, a pair of bf16 or one), and what stands at the address, added in float32 and rounded again."""
    width, text = bits(value), "{{.reg .pred p; .reg .b{width} q; mov.b{width} q,0; setp.gt.s32 p,$3,{token}; @p ld.global.nc.b{width} q,[$1+{offset}]; {add}}}"
    add = ".reg .f32 a, b; mov.b32 a,q; mov.b32 b,$2; add.rn.f32 a,a,b; mov.b32 $0,a;"
    if not single:
        one = ".reg .f32 a, b; .reg .b16 z; mov.b16 z,0; mov.b32 a,{z,q}; mov.b32 b,{z,$2}; add.rn.f32 a,a,b; cvt.rn.bf16.f32 $0,a;"
        two = (".reg .f32 a, b, c, d; .reg .b32 t; shl.b32 t,q,16; mov.b32 a,t; and.b32 t,q,0xffff0000; mov.b32 b,t; shl.b32 t,$2,16; "
               "mov.b32 c,t; and.b32 t,$2,0xffff0000; mov.b32 d,t; add.rn.f32 a,a,c; add.rn.f32 b,b,d; cvt.rn.bf16x2.f32 $0,b,a;")
        add = one if width == 16 else two
    return asm(text.format(width=width, token=token, offset=offset, add=add), [pointer, value, count], "h" if width == 16 else "r", effects=False)


def _store(target: _Target, token, count, offset, values, single=False):
    """values at consecutive elements: b16, b32 or two b32. single: they are float32."""
    if target.residual is not None:
        size = bits(values[0]) // 8
        values = [_plus(target.residual, token, count, offset + size * i, v, single) for i, v in enumerate(values)]
    pointer = target.out
    width = bits(values[0])
    kind, value = (f"b{width}", "$1") if len(values) == 1 else (f"v2.b{width}", "{$1,$3}")
    asm(STORE.format(token=token, kind=kind, offset=offset, value=value), [pointer, values[0], count, *values[1:]], "")


def _scaled(pair, j, factor, scales_at):
    """Registers [r or r + 8][token of the pair], times the factor and, where `scales_at` says, the token's own."""
    factors = [factor] * 2
    if scales_at is not None:
        factors = [float_of(load_shared(scales_at, 4 * (8 * j + e), 1)[0]) * factor for e in range(2)]
    return [[v * s for v, s in zip(settled(row), factors)] for row in pair]


def _target(out, residual, *place) -> _Target:
    return _Target(gmem_element(out, *place), None if residual is None else gmem_element(residual, *place))


def _store_float32(tile, out, residual, acc, scaled, row, count, channel, lane):
    """Registers of fragment rows r and r + 8 are neighbouring channels of one token."""
    token, channel = lane.quad * 2, channel + lane.weight_row
    target = _target(out, residual, row + token, tile.width, channel, 4)
    counts = [tile.left(count, token, channel + i) for i in range(2)]
    for j in range(tile.tokens // 8):
        for e, values in enumerate(zip(*scaled(acc[j], j))):
            values = [bits_of(v) for v in values]
            offset = 4 * (8 * j + e) * tile.width
            if tile.width % 2:
                for i in range(2):
                    _store(target, 8 * j + e, counts[i], offset + 4 * i, values[i:i + 1], True)
            else:
                _store(target, 8 * j + e, counts[0], offset, values, True)


def _store_bfloat16(tile, out, residual, acc, scaled, row, count, channel, lane):
    """After the transposition a lane holds 2 (gated) or 4 channels of one token."""
    high = lane.quad // 2
    lane_channels = 2 if tile.gated else 4
    channel = channel + (lane.quad % 2 * 4 + high * 2 if tile.gated else lane.quad * 4)
    target = _target(out, residual, row + lane.fragment_row, tile.width, channel, 2)
    counts = [tile.left(count, lane.fragment_row, channel + i) for i in range(lane_channels)]
    for j in range(tile.tokens // 8):
        rows = scaled(acc[j], j)
        offset = 2 * 8 * j * tile.width
        if tile.gated:
            low, top = (asm(SILU_MUL, gate_up, "f", effects=False) for gate_up in zip(*rows))
            values = [asm(SWAP, [asm(PACK_TRANSPOSE, [top, low]), high])]
        else:  # channels (0, 2) and (1, 3) -> (0, 1) and (2, 3)
            even, odd = (asm(PACK_TRANSPOSE, [top, low]) for low, top in rows)
            values = [asm(f"prmt.b32 $0,$1,$2,{selector};", [even, odd], effects=False) for selector in (0x5410, 0x7632)]
        if tile.width % lane_channels == 0:
            _store(target, 8 * j, counts[0], offset, values)
        elif tile.width % 2 == 0:
            for i, value in enumerate(values):
                _store(target, 8 * j, counts[2 * i], offset + 4 * i, [value])
        else:
            for i, value in enumerate(v for pair in values for v in halves(pair)):
                _store(target, 8 * j, counts[i], offset + 2 * i, [value])


def _store_tokens(acc, factor, out, row, count, channel, *more, tile, single, added):
    lane = lanes(tile.gated, pinned=True)
    channel = channel + lane.warp * (8 if tile.gated else 16)
    residual, (row_scales, shift) = more[0] if added else None, more[added:] or (None, None)
    scales_at = None if row_scales is None else smem_address(row_scales) + (shift + lane.quad * 2) * 4
    scaled = functools.partial(_scaled, factor=factor, scales_at=scales_at)
    (_store_float32 if single else _store_bfloat16)(tile, out, residual, acc, scaled, row, count, channel, lane)


def store_tokens(acc, factor, row_scales, out, row, count, channel, *, tokens: int, width: int, gated: bool = False,
                 masked: bool = True, residual=None) -> None:
    """f32 (64, tokens), decoded weights x tokens -> out[row + t, channel...] of token t < count; out [M, width].

    acc: the accumulator of `multiply_decoded` (its row order is undone here). factor: f32 scalar; row_scales: None, or
    shared memory with bits of f32 [>= shift + tokens], and shift: token t is multiplied by row_scales[shift + t] * factor.
    out: bf16 or f32. gated: bf16 silu(r) * (r + 8) of 32 channels, else 64 channels. channel: the warpgroup's first.
    masked: channels may reach past `width`. residual: what is added to the rounded results, of out's dtype and shape.
    """
    single = out.dtype == jnp.float32
    if gated and single:
        raise NotImplementedError("store_tokens: gated results are bf16")
    program = functools.partial(_store_tokens, tile=_Tile(tokens, width, gated, masked), single=single, added=residual is not None)
    more = () if residual is None else (Memory(residual),)
    more += () if row_scales is None else (Memory(row_scales[0]), row_scales[1])
    inline(program, acc, factor, Memory(out), row, count, channel, *more)
