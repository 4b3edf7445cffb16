"""What the Hopper kernels share of Pallas Mosaic GPU: the one place that touches its internals.

The NVFP4 decode is here once. Weights stay in the checkpoint's layout (u8 [..., N, K/2] and e4m3 [..., N, K/16],
viewed as i32 words of 8 codes and of 4 scales); the activations' K is permuted inside 64-chunks instead (`permute_k`),
so that a lane of a tensor core fragment owns one whole block of 16: 8 neighbouring bytes of codes and one scale.

The decode multiplies by 2**-7: a kernel's epilogue multiplies by `global_scale * DECODE_FACTOR`.
"""
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf, vector

Layout = plgpu.Layout
REF, SPLAT, WGMMA = plgpu.RefType(), Layout.WG_SPLAT, Layout.WGMMA
PER_THREAD = Layout.WG_STRIDED((128,), vec_size=1)  # one i32 a thread: values computed before the data arrive

WARPGROUP = 128  # threads
SHARED_MEMORY = 227 * 1024  # bytes an SM
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


# --- in JAX ---------------------------------------------------------------------------------------------------------

def permute_k(x):
    """[..., K] -> [..., K]: k = 64t+16c+8h+4b+s goes to 64t+16s+8h+2c+b. K must be a multiple of 64.

    It is the order in which the decode hands the codes of a 64-chunk to the tensor cores.
    """
    if x.shape[-1] % 64:
        raise ValueError(f"permute_k: K must be a multiple of 64, got an array of shape {x.shape}")
    chunks = x.reshape(-1, x.shape[-1] // 64, 4, 2, 2, 4)  # rows, t, c, h, b, s
    return chunks.transpose(0, 1, 5, 3, 2, 4).reshape(x.shape)


def as_words(packed, scale):
    """u8 [..., K/2], e4m3 [..., K/16] -> i32 [..., K/8], i32 [..., K/64], the kernels' view: a bitcast, no copy."""
    k = packed.shape[-1] * 2
    if k % 64 or scale.shape[-1] * 16 != k or scale.shape[:-1] != packed.shape[:-1]:
        raise ValueError(f"packed codes {packed.shape} want K/2 a multiple of 32 and scales "
                         f"{(*packed.shape[:-1], k // 16)}, got {scale.shape}")
    return tuple(lax.bitcast_convert_type(a.reshape(*a.shape[:-1], -1, 4), jnp.int32) for a in (packed, scale))


def decode_words(words, scales):
    """What the decode does, in jnp: i32 [N, K/8], i32 [N, K/64] -> bf16 [N, K] times 2**-7, K permuted (`permute_k`).

    The interpreter's twin of the inline PTX, and the tests' bridge between the two.
    """
    n, k = words.shape[0], words.shape[1] * 8
    shifts = 4 * lax.broadcasted_iota(jnp.int32, (1, 1, 8), 2)
    codes = (words[:, :, None] >> shifts) & 15
    low = codes & 7
    doubled = jnp.where(low < 4, low, jnp.where(low < 6, 2 * low - 4, 4 * low - 16))
    values = (jnp.where(codes < 8, 0.5, -0.5) * doubled.astype(jnp.float32)).reshape(n, k)  # no table: a kernel
    factors = lax.bitcast_convert_type(scales, jnp.float8_e4m3fn).astype(jnp.float32).reshape(n, k // 16, 1)
    decoded = values.reshape(n, k // 16, 16) * (factors * jnp.float32(1 / DECODE_FACTOR))
    return permute_k(decoded.reshape(n, k).astype(jnp.bfloat16))


# --- budgets and layouts --------------------------------------------------------------------------------------------

# 128-byte rows in shared memory, 16-byte unit u of row r at u ^ r % 8: TMA writes them so, from any row and past any
# edge (zeros), and the decode reads them so.
ROWS_128 = (plgpu.SwizzleTransform(128),)


def scale_rows(size):
    """Transforms of rows of `size` bytes of scales: 128 and 64 bytes are swizzled, the latter with unit u of row r at
    u ^ r / 2 % 4."""
    return (plgpu.SwizzleTransform(size),) if size in (64, 128) else ()


def swizzled(itemsize):
    """Transforms of a shared memory operand of wgmma, K in 128-byte rows.

    An array of these and one of ROWS_128 hold the same bytes while a row is 128 bytes, but Pallas fills this one only
    from rows at multiples of 8 of an array that has a multiple of 8.
    """
    return plgpu.TilingTransform((8, 128 // itemsize)), plgpu.SwizzleTransform(128)


def register_budget(consumers, *, per_sm=1, producer=32):
    """Registers a thread for `consumers` warpgroups and one producer warpgroup: (consumer, producer), for setmaxnreg.

    A CTA owns registers-at-launch x threads for its whole life; asking for more waits for ever and hangs the GPU, so
    the numbers are chosen here only. ptxas launches with the lesser of the consumers' number and a thread's share.
    """
    threads = (consumers + 1) * WARPGROUP
    share = min(232, 65536 // (threads * per_sm) // 8 * 8)
    pooled = min(232, (share * (consumers + 1) - producer) // consumers // 8 * 8)
    consumer = pooled if per_sm == 1 else share  # more than the share would leave room for one CTA only
    launched = min(share, consumer)
    if consumer * consumers + producer > launched * (consumers + 1) or launched * threads * per_sm > 65536:
        raise ValueError(f"no register budget for {consumers} consumers of {consumer} and a producer of {producer}: "
                         f"{threads} threads are launched with {launched} each, {per_sm} CTAs an SM")
    return consumer, producer


# --- MLIR: only inside `plgpu.inline_mgpu` --------------------------------------------------------------------------

def i32(value=None):
    """The type, or a constant of it."""
    t = ir.IntegerType.get_signless(32)
    return t if value is None else arith.constant(t, int(value))


def _integers(op):
    def f(a, b):
        return op(*(v if isinstance(v, ir.Value) else i32(v) for v in (a, b)))
    return f


# i32 registers or Python ints; unsigned.
add, sub, mul, div, rem = map(_integers, (arith.addi, arith.subi, arith.muli, arith.divui, arith.remui))
bit_and, bit_xor, shift_right, minimum = map(_integers, (arith.andi, arith.xori, arith.shrui, arith.minui))


def less(a, b):
    """Signed a < b."""
    return _integers(lambda x, y: arith.cmpi(arith.CmpIPredicate.slt, x, y))(a, b)


def asm(text, args=(), outputs="r", *, effects=True):
    """Inline PTX. outputs: one letter a result, r (i32) or f (f32). -> a value, a list of values, or None.

    effects: keeps its place and is never removed; pure computation says False, so that it can be moved and shared.
    """
    types = {"r": i32(), "f": ir.F32Type.get()}
    letters = {str(i32()): "r", "i16": "h", str(ir.IntegerType.get_signless(64)): "l", str(ir.F32Type.get()): "f"}
    constraints = ",".join(["=" + o for o in outputs] + [letters[str(a.type)] for a in args])
    if not outputs:
        llvm.inline_asm(ir.Type.parse("!llvm.void"), list(args), text, constraints, has_side_effects=effects)
        return None
    if len(outputs) == 1:
        return llvm.inline_asm(types[outputs], list(args), text, constraints, has_side_effects=effects)
    struct = llvm.StructType.get_literal([types[o] for o in outputs])
    packed = llvm.inline_asm(struct, list(args), text, constraints, has_side_effects=effects)
    return [llvm.extractvalue(types[o], packed, [i]) for i, o in enumerate(outputs)]


def scalar(array):
    """The register of a scalar argument (Layout WG_SPLAT) of `inline_mgpu`."""
    return array.registers.item()


def splat(value):
    """A register as a scalar result of `inline_mgpu`."""
    return fa.FragmentedArray.splat(value, (), is_signed=True if isinstance(value.type, ir.IntegerType) else None)


def per_thread(value):
    """An i32 register of each thread as a (128,) result of `inline_mgpu` in PER_THREAD."""
    vector_type = ir.VectorType.get((1,), i32())
    registers = np.array([vector.broadcast(vector_type, value)], dtype=object)
    return fa.FragmentedArray(_registers=registers, _layout=PER_THREAD.to_mgpu(), _is_signed=True)


def of_thread(array):
    """The register of a PER_THREAD argument."""
    return vector.extract(array.registers.flat[0], [], [0])


def elements(register):
    """The two elements of a pair register of a WGMMA array."""
    return [vector.extract(register, [], [i]) for i in range(2)]


def pair(low, high):
    """Two f32 registers as a pair register of a WGMMA array."""
    out = llvm.mlir_undef(ir.VectorType.get((2,), ir.F32Type.get()))
    for i, value in enumerate((low, high)):
        out = vector.insert(value, out, [], [i])
    return out


def wgmma_array(registers, shape):
    """Registers [columns / 8, 2] -> (64, columns) in WGMMA: [j, h] holds row r + 8h, columns 8j + 2 quad + 0, 1."""
    registers = registers.reshape(fa.WGMMA_LAYOUT.registers_shape(shape))
    return fa.FragmentedArray(_registers=registers, _layout=fa.WGMMA_LAYOUT, _is_signed=None)


def smem_address(ref, offset=0):
    """i32 shared memory address of a ref, plus bytes."""
    return add(llvm.ptrtoint(i32(), utils.memref_ptr(ref)), offset)


def gmem_address(ref, offset=None):
    """i64 address of a ref in global memory, plus an i32 register of bytes, unsigned."""
    i64 = ir.IntegerType.get_signless(64)
    base = llvm.ptrtoint(i64, utils.memref_ptr(ref))
    return base if offset is None else arith.addi(base, arith.extui(i64, offset))


def gmem_element(ref, row, width, column, itemsize):
    """i64 address of element (row, column) of a row-major [.., width] array in global memory: 64-bit throughout."""
    i64 = ir.IntegerType.get_signless(64)
    row, column = (arith.extsi(i64, v) for v in (row, column))
    row, column = (arith.muli(v, arith.constant(i64, s)) for v, s in ((row, width * itemsize), (column, itemsize)))
    return llvm.add(gmem_address(ref), arith.addi(row, column), overflow_flags=llvm.IntegerOverflowFlags.none)


def load_shared(address, offset, n):
    """n i32 words (1, 2 or 4, aligned to their size) of shared memory at an i32 address plus a constant of bytes."""
    pointer = llvm.PointerType.get(3)
    p = llvm.getelementptr(pointer, llvm.inttoptr(pointer, address), [], [int(offset)], ir.IntegerType.get_signless(8),
                           llvm.GEPNoWrapFlags.none)
    words = llvm.load(ir.VectorType.get((n,), i32()), p, alignment=4 * n)
    return [vector.extract(words, [], [i]) for i in range(n)]


def decode_codes(word, factor):
    """8 codes and a bf16x2 factor (scale * 2**119) -> 4 bf16x2 times 2**-7: code j pairs with code j+4."""
    return asm(DECODE, [word, factor], "rrrr", effects=False)


def lanes(interleaved, *, pinned=False):
    """Of this thread: warp, place in its quad, fragment row, and which weight row of its warp the fragment row holds.

    interleaved (gate and up): fragment rows 0..7 and 8..15 hold rows 0 2 4 6 1 3 5 7 of the two operands. Otherwise
    fragment rows r and r + 8 hold rows 2 r and 2 r + 1. Either way the 4 rows of a half warp fall into different units
    of the 128-byte swizzle, so that 8-byte loads have no bank conflicts; `store_tokens` undoes it. pinned: computed
    where it stands, not hoisted out of loops, where it would hold registers.
    """
    tid = rem(asm("mov.u32 $0,%tid.x;") if pinned else utils.thread_idx(), WARPGROUP)
    lane, warp = rem(tid, 32), div(tid, 32)
    row = div(lane, 4)
    weight_row = add(mul(rem(row, 4), 2), div(row, 4)) if interleaved else mul(row, 2)
    return warp, rem(lane, 4), row, weight_row


def fragment_lanes(wg, shifts, *, scale_row, other=None, chunks=4):
    """What `multiply_decoded` wants of a thread: PER_THREAD values, computed where it stands (outside the loop over
    K).

    wg: the warpgroup (i32), of 64 weight rows, or, where two operands interleave (gate and up), 32 of each. other:
    None, or how far on the second one lies: rows of w_ref (a multiple of 8), bytes of s_ref (of 1024 if swizzled).
    shifts: i32, bytes by which the scales of the rows r and r + 8 lie further on.
    chunks: 4, or 1 to save registers: the 64-chunks whose addresses are kept, the others' are computed from the first's.
    -> selector of the scale's byte, then of rows r and r + 8: where their scales are, and the codes of each chunk.
    """
    value = plgpu.ShapeDtypeStruct((128,), jnp.int32, layout=PER_THREAD)

    @plgpu.inline_mgpu(arg_types=(SPLAT,) * 3, return_type=(value,) * (3 + 2 * chunks))
    def f(ctx, wg, *shifts):
        del ctx
        warp, quad, _, weight_row = lanes(bool(other), pinned=True)
        rows_wg, rows_warp = (32, 8) if other else (64, 16)
        row = add(add(mul(scalar(wg), rows_wg), mul(warp, rows_warp)), weight_row)
        codes, scales = [], []
        for h, r in enumerate((row, add(row, 0 if other else 1))):  # of fragment rows r and r + 8
            further_rows, further_scales = other if other and h else (0, 0)
            phase = bit_and(r, 7)  # of the swizzle: the unit of 64-chunk c is (2 c + quad / 2) ^ phase
            unit = add(mul(bit_xor(div(quad, 2), phase), 16), mul(rem(quad, 2), 8))
            codes.append(add(add(mul(r, 128), unit), further_rows * 128))
            scale_phase = {128: phase, 64: bit_and(shift_right(r, 1), 3)}.get(scale_row, 0)
            at = add(add(mul(r, scale_row), mul(scale_phase, 16)), further_scales)
            scales.append(add(at, scalar(shifts[h])))
        selector = asm("mad.lo.u32 $0,$1,0x1111,0x4400;", [quad], effects=False)  # byte `quad` of both words
        # With effects: else they are computed anew in the loop, to save registers.
        codes += [asm(f"xor.b32 $0,$1,{32 * chunk};", [at]) for chunk in range(1, chunks) for at in codes]
        return tuple(per_thread(v) for v in (selector, *scales, *codes))

    return f(wg, *shifts)


def multiply_decoded(acc, lane_values, w_ref, s_ref, x_ref, unit, *, first, chunks, tokens, scale_row, running=0):
    """acc f32 (64, tokens) + decoded weights times tokens over 64-chunks first .. first + chunks - 1 of 256 codes.

    The weights are A of wgmma, from registers, times 2**-7. lane_values: `fragment_lanes`. w_ref: i32 [rows, 32],
    ROWS_128: 256 codes a row. s_ref: the scales of the same rows, `scale_row` bytes a row, `scale_rows`. unit: which 16
    bytes of a row of scales belong to these codes (i32). x_ref: bf16 [>= chunks * tokens, 64], ROWS_128: the 64-chunks
    of the tokens, one behind the other. running: 1 leaves the last wgmmas running, while the next call decodes; the last
    call must say 0.

    The wgmmas go in groups of two k16 steps, with the decode of the next two behind each: a warp that has issued wgmmas
    cannot decode before the last of them has begun.
    """
    rows = plgpu.RefType(ROWS_128)

    @plgpu.inline_mgpu(
        arg_types=(WGMMA, *[PER_THREAD] * len(lane_values), rows, plgpu.RefType(scale_rows(scale_row)), rows, SPLAT),
        return_type=plgpu.ShapeDtypeStruct((64, tokens), jnp.float32, layout=WGMMA))
    def f(ctx, acc, selector, scale0, scale1, *rest):
        del ctx
        *codes_at, w, s, x, unit = rest
        selector, unit = of_thread(selector), mul(scalar(unit), 16)
        in_row = bit_xor if scale_rows(scale_row) else add
        scale_at = [add(smem_address(s), in_row(of_thread(v), unit)) for v in (scale0, scale1)]

        # A stage is a multiple of 1024 bytes on: what is xored in does not meet it.
        codes_at = [add(smem_address(w), of_thread(v)) for v in codes_at]

        def load_codes(chunk):
            if len(codes_at) == 2:
                return [load_shared(bit_xor(at, 32 * chunk), 0, 2) for at in codes_at]
            return [load_shared(at, 0, 2) for at in codes_at[2 * chunk:2 * chunk + 2]]

        i64 = ir.IntegerType.get_signless(64)
        stride = tokens * 128  # bytes of a 64-chunk of tokens
        # Of rows of 128 swizzled bytes in groups of 8: address / 16, 1, 1024 / 16 between groups, 128-byte swizzle.
        address = arith.extui(i64, shift_right(bit_and(smem_address(x), 0x3FFFF), 4))
        descriptor = llvm.or_(address, arith.constant(i64, (1 << 62) | (64 << 32) | (1 << 16)))
        sums = [v for register in acc.registers.flat for v in elements(register)]
        if scale_row % 16:
            scales = [[load_shared(at, 4 * (first + t), 1)[0] for t in range(chunks)] for at in scale_at]
        else:
            scales = [load_shared(at, 4 * first, chunks) for at in scale_at]
        at = [[(chunk * stride + 32 * step) >> 4 for step in range(4)] for chunk in range(chunks)]  # in the tokens
        codes = load_codes(first)
        for c in range(chunks):
            factors = asm(SCALE_PAIR, [scales[0][c], scales[1][c], selector], "rr", effects=False)
            words = [(word, shift_right(word, 6), factors[h]) for i in range(2) for h, word in enumerate([codes[0][i], codes[1][i]])]
            if c + 1 < chunks:
                codes = load_codes(first + c + 1)
            for q in (0, 2):  # with effects: in this place
                left = [[asm(DECODE_STEP[step], word) for word in words] for step in range(q, q + 2)]
                in_flight = running if (c, q) == (chunks - 1, 2) else 1
                sums = _wgmma(sums, left, descriptor, tokens, at[c][q:q + 2], in_flight)
        registers = np.array([pair(*sums[i:i + 2]) for i in range(0, len(sums), 2)], dtype=object)
        return wgmma_array(registers, (64, tokens))

    return f(acc, *lane_values, w_ref, s_ref, x_ref, unit)


def _wgmma(sums, left, descriptor, tokens, at, in_flight):
    """Adds left[k16 step] times the tokens `at` (16 bytes on from `descriptor`), and waits until `in_flight` such groups
    run."""
    f32, n = ir.F32Type.get(), len(sums)
    left = [register for step in left for register in step]
    text = ["{.reg .b64 d; .reg .pred p; setp.eq.u32 p,0,0; wgmma.fence.sync.aligned;"]
    accumulator = "{" + ",".join(f"${i}" for i in range(n)) + "}"
    for i in range(len(left) // 4):
        a = ",".join(f"${2 * n + 4 * i + j}" for j in range(4))
        text.append(f"add.s64 d,${2 * n + len(left)},{at[i]}; "
                    f"wgmma.mma_async.sync.aligned.m64n{tokens}k16.f32.bf16.bf16 {accumulator},{{{a}}},d,p,1,1,0;")
    text.append(f"wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned {in_flight};}}")
    constraints = ",".join(["=f"] * n + [str(i) for i in range(n)] + ["r"] * len(left) + ["l"])
    struct = llvm.inline_asm(llvm.StructType.get_literal([f32] * n), [*sums, *left, descriptor], "\n".join(text),
                             constraints, has_side_effects=True)
    return [llvm.extractvalue(f32, struct, [i]) for i in range(n)]


SILU_MUL = ("{.reg .f32 e; mul.f32 e,$1,0fBFB8AA3B; ex2.approx.ftz.f32 e,e; add.f32 e,e,0f3F800000; "
            "rcp.approx.ftz.f32 e,e; mul.f32 e,e,$1; mul.f32 $0,e,$2;}")
PACK_TRANSPOSE = "{.reg .b32 q; cvt.rn.bf16x2.f32 q,$1,$2; movmatrix.sync.aligned.m8n8.trans.b16 $0,q;}"
# Lanes q and q^2 swap halves, which undoes the interleaved row order of `lanes`.
SWAP = ("{.reg .b32 o; .reg .pred z; shfl.sync.bfly.b32 o,$1,2,31,-1; setp.eq.u32 z,$2,0; "
        "@z prmt.b32 $0,$1,o,0x5410; @!z prmt.b32 $0,o,$1,0x7632;}")
# Stores of a token below the count in $2; the immediates stand in the text so that they are not kept in registers.
STORE = "{{.reg .pred p; setp.gt.s32 p,$2,{token}; @p st.global.{kind} [$0+{offset}],{value};}}"


def store_tokens(acc, factor, row_scales, out, row, count, channel, *, tokens, width, gated=False, masked=True):
    """f32 (64, tokens), decoded weights x tokens -> out[row + t, channel...] of token t < count; out [M, width].

    acc: the WGMMA accumulator of `multiply_decoded` (its row order is undone here). factor: f32 scalar; row_scales:
    None, or shared memory with bits of f32 [>= shift + tokens], and shift: token t is multiplied by row_scales[shift + t] *
    factor.
    out: bf16 or f32. gated: bf16 silu(r) * (r + 8) of 32 channels, else 64 channels. channel: the warpgroup's first.
    masked: channels may reach past `width`.
    """
    single = out.dtype == jnp.float32
    if gated and single:
        raise NotImplementedError("store_tokens: gated results are bf16")

    @plgpu.inline_mgpu(arg_types=(WGMMA, SPLAT, REF, *[SPLAT] * 3, *((REF, SPLAT) if row_scales else ())))
    def f(ctx, acc, factor, out, row, count, channel, *row_scales):
        del ctx
        factor, row, count, channel = map(scalar, (factor, row, count, channel))
        warp, quad, fragment_row, weight_row = lanes(gated, pinned=True)
        channel = add(channel, mul(warp, 8 if gated else 16))
        registers = acc.registers.reshape(tokens // 8, 2)
        pair_token = mul(quad, 2)  # the first token of an accumulator's pair register
        if row_scales:
            scales_at = add(smem_address(row_scales[0]), mul(add(scalar(row_scales[1]), pair_token), 4))

        def scaled(j):
            """f32 of both fragment rows: [r or r + 8][token of the pair]."""
            factors = [factor] * 2 if not row_scales else [
                arith.mulf(arith.bitcast(ir.F32Type.get(), load_shared(scales_at, 4 * (8 * j + e), 1)[0]), factor) for e in range(2)]
            return [[arith.mulf(v, s) for v, s in zip(elements(registers[j, h]), factors)] for h in range(2)]

        def left(token, channel):
            """How many tokens from `token` on this lane writes in a channel."""
            tokens_left = sub(count, token)
            return arith.select(less(channel, width), tokens_left, i32(0)) if masked else tokens_left

        def store(pointer, token, count, offset, values):
            """values at consecutive elements: b16, b32 or two b32."""
            bits = 16 if str(values[0].type) == "i16" else 32
            kind, value = (f"b{bits}", "$1") if len(values) == 1 else (f"v2.b{bits}", "{$1,$3}")
            text = STORE.format(token=token, kind=kind, offset=offset, value=value)
            asm(text, [pointer, values[0], count, *values[1:]], "")

        def halves(register):
            i16 = ir.IntegerType.get_signless(16)
            return [arith.trunci(i16, v) for v in (register, shift_right(register, 16))]

        if single:  # registers of fragment rows r and r + 8 are neighbouring channels of one token
            channel = add(channel, weight_row)
            pointer = gmem_element(out, add(row, pair_token), width, channel, 4)
            counts = [left(pair_token, add(channel, i)) for i in range(2)]
            for j in range(tokens // 8):
                for e, values in enumerate(zip(*scaled(j))):
                    values = [arith.bitcast(i32(), v) for v in values]
                    offset = 4 * (8 * j + e) * width
                    if width % 2:
                        for i in range(2):
                            store(pointer, 8 * j + e, counts[i], offset + 4 * i, values[i:i + 1])
                    else:
                        store(pointer, 8 * j + e, counts[0], offset, values)
            return

        high = div(quad, 2)  # after the transposition a lane holds 2 (gated) or 4 channels of one token
        lane_channels = 2 if gated else 4
        channel = add(channel, add(mul(rem(quad, 2), 4), mul(high, 2)) if gated else mul(quad, 4))
        pointer = gmem_element(out, add(row, fragment_row), width, channel, 2)
        counts = [left(fragment_row, add(channel, i)) for i in range(lane_channels)]
        for j in range(tokens // 8):
            rows = scaled(j)
            offset = 2 * 8 * j * width
            if gated:
                low, top = (asm(SILU_MUL, gu, "f", effects=False) for gu in zip(*rows))
                values = [asm(SWAP, [asm(PACK_TRANSPOSE, [top, low]), high])]
            else:  # channels (0, 2) and (1, 3) -> (0, 1) and (2, 3)
                even, odd = (asm(PACK_TRANSPOSE, [top, low]) for low, top in rows)
                values = [asm(f"prmt.b32 $0,$1,$2,{selector};", [even, odd], effects=False)
                          for selector in (0x5410, 0x7632)]
            if width % lane_channels == 0:
                store(pointer, 8 * j, counts[0], offset, values)
            elif width % 2 == 0:
                for i, value in enumerate(values):
                    store(pointer, 8 * j, counts[2 * i], offset + 4 * i, [value])
            else:
                for i, value in enumerate(v for pair_value in values for v in halves(pair_value)):
                    store(pointer, 8 * j, counts[i], offset + 2 * i, [value])

    f(acc, factor, out, row, count, channel, *(row_scales or ()))


# --- MLIR: per-thread programs (loops and branches inside one `plgpu.inline_mgpu`) ----------------------------------

def thread_kernel(program, names, out_types, *, grid, warps, cluster=1, shared_words=0, zeroed_words=0):
    """A kernel that is one thread's program, written with the functions of this section.

    program: refs by name -> None; names: of the inputs, the outputs, and "shared" (i32 [shared_words] of the CTA's
    shared memory) where shared_words > 0, and last "zeroed" (i32 [zeroed_words] of global memory that all CTAs share, zero at
    the start of a launch) where zeroed_words > 0. grid: CTAs, in clusters of `cluster`. -> a function of the inputs, a
    tuple of outputs.
    """
    def body(*refs):
        if zeroed_words:
            refs = *refs, pl.get_global(plgpu.SemaphoreType.REGULAR((zeroed_words,)))

        @plgpu.inline_mgpu(arg_types=(REF,) * len(refs))
        def inline(ctx, *refs):
            del ctx
            program(dict(zip(names, refs)))

        inline(*refs)

    axes = dict(grid=(grid // cluster,), grid_names=("cta",))
    if cluster > 1:
        axes |= dict(cluster=(cluster,), cluster_names=("rank",))
    return plgpu.kernel(
        body, out_type=tuple(out_types), scratch_types=(plgpu.SMEM((shared_words,), jnp.int32),) if shared_words else (),
        num_threads=warps // 4, thread_name="wg", compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True), **axes)


def thread_index():
    """i32 index of this thread in its CTA."""
    return utils.thread_idx()


def flag(predicate, a, b):
    """i32 1 where `a predicate b`, else 0. predicate: "lt", "le" or "eq", unsigned."""
    kind = {"lt": arith.CmpIPredicate.ult, "le": arith.CmpIPredicate.ule, "eq": arith.CmpIPredicate.eq}[predicate]
    return arith.extui(i32(), _integers(lambda x, y: arith.cmpi(kind, x, y))(a, b))


def loop(start, stop, step, carry, body):
    """for i in range(start, stop, step): carry = body(i, *carry); i32 throughout. -> the last carry, a list."""
    bounds = [v if isinstance(v, ir.Value) else i32(v) for v in (start, stop, step)]
    op = scf.ForOp(*bounds, list(carry))
    with ir.InsertionPoint(op.body):
        scf.yield_(list(body(op.induction_variable, *op.inner_iter_args)))
    return list(op.results)


def while_loop(carry, condition, body):
    """while condition(*carry): carry = body(*carry); i32 throughout, the condition an i32 that is not zero. -> the last carry."""
    types = [i32()] * len(carry)
    op = scf.WhileOp(types, list(carry))
    before, after = (region.blocks.append(*types) for region in (op.before, op.after))
    with ir.InsertionPoint(before):
        values = list(before.arguments)
        scf.condition(_integers(lambda x, y: arith.cmpi(arith.CmpIPredicate.ne, x, y))(condition(*values), 0), values)
    with ir.InsertionPoint(after):
        scf.yield_(list(body(*after.arguments)))
    return list(op.results)


def branch(condition, body):
    """body() where the i32 condition is not zero."""
    op = scf.IfOp(_integers(lambda x, y: arith.cmpi(arith.CmpIPredicate.ne, x, y))(condition, 0))
    with ir.InsertionPoint(op.then_block):
        body()
        scf.yield_([])


def offset_address(address, size):
    """An i64 address plus a constant number of bytes."""
    return arith.addi(address, arith.constant(ir.IntegerType.get_signless(64), int(size)))


def select(condition, a, b):
    """a where the i32 condition is not zero, else b; i32 registers or ints."""
    a, b = (v if isinstance(v, ir.Value) else i32(v) for v in (a, b))
    return arith.select(_integers(lambda x, y: arith.cmpi(arith.CmpIPredicate.ne, x, y))(condition, 0), a, b)


def load_global(address, words, condition, form="b32"):
    """`words` i32 registers (1, or a multiple of 4) of read-only global memory, zeros where the i32 condition is
    zero."""
    registers = [f"${i}" for i in range(words)]
    zeros = "".join(f"mov.b32 {r},0;" for r in registers)
    loads = f"@p ld.global.nc.{form} $0,[$1];" if words == 1 else "".join(
        f"@p ld.global.nc.v4.b32 {{{','.join(registers[i:i + 4])}}},[${words}+{4 * i}];" for i in range(0, words, 4))
    out = asm(f"{{.reg .pred p; setp.ne.u32 p,${words + 1},0; {zeros} {loads}}}", [address, condition], "r" * words)
    return [out] if words == 1 else out


def store_global(address, values, condition, form="b32"):
    """Stores 1, 2 or 4 i32 registers to global memory where the i32 condition is not zero."""
    registers = ",".join(f"${i}" for i in range(1, len(values) + 1))
    vector_form = f".v{len(values)}" if len(values) > 1 else ""
    target = f"{{{registers}}}" if len(values) > 1 else registers
    asm(f"{{.reg .pred p; setp.ne.u32 p,${len(values) + 1},0; @p st.global{vector_form}.{form} [$0],{target};}}",
        [address, *values, condition], "")


def store_shared(address, values, condition):
    """Stores 1, 2 or 4 i32 registers at an i32 shared memory address where the i32 condition is not zero."""
    registers = ",".join(f"${i}" for i in range(1, len(values) + 1))
    form, target = (f".v{len(values)}", f"{{{registers}}}") if len(values) > 1 else ("", registers)
    asm(f"{{.reg .pred p; setp.ne.u32 p,${len(values) + 1},0; @p st.shared{form}.b32 [$0],{target};}}",
        [address, *values, condition], "")


def warp_scan(value):
    """Inclusive sum of an i32 register over the lanes of a warp."""
    for distance in (1, 2, 4, 8, 16):
        value = asm("{.reg .b32 t; .reg .pred q; shfl.sync.up.b32 t|q,$1," + str(distance) + ",0,-1; "
                    "@!q mov.b32 t,0; add.s32 $0,$1,t;}", [value])
    return value


def warpgroup_barrier():
    """Waits for the other threads of the warpgroup, and for what they wrote to shared memory."""
    utils.warpgroup_barrier()


def count_in_warpgroup(condition, barrier):
    """How many threads of the warpgroup have a non-zero i32 condition. All of them wait here, at hardware barrier
    `barrier`, which must be free."""
    text = f"{{.reg .pred p; setp.ne.u32 p,$1,0; barrier.cta.red.popc.aligned.u32 $0,{barrier},128,p;}}"
    return asm(text, [condition])


def opaque(value):
    """An i32 scalar that the compiler knows nothing of: it bounds a loop that must not be unrolled."""
    @plgpu.inline_mgpu(arg_types=(SPLAT,), return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=SPLAT))
    def f(ctx, value):
        del ctx
        return splat(asm("mov.u32 $0,$1;", [scalar(value)], effects=False))
    return f(jnp.int32(value))
