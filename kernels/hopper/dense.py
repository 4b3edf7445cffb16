"""Dense NVFP4 matmul on Hopper: y[M, N] = x[M, K] @ dequantized(W)[N, K].T, from one token to prefill.

The operand is bf16 whatever the activations were (q * s for W4A4, x itself for W4A16), its K in `permute_k` order; the
weights are read in the checkpoint's layout and decoded in registers.

A row of the result has the same bits for every M, position and neighbours. A sum over K is made of `slices(N, K)` chains of
m16n8k16 / k16 steps in float32, one a contiguous slice of K, added from left to right; all kernels make that sum:

- `_narrow` (up to 32 tokens, or 64 in tiles that make one wave; weights of few rows): mma.sync. A CTA owns 16 to 128 rows and
  all of K, one slice a warp, so that all SMs and all warps have work; the partial sums meet in shared memory.
- `_split` (where the tokens no longer fit beside the weights): wgmma, one slice a CTA of a cluster.
- `_wide`: wgmma, persistent. Warpgroups of 64 rows share the tokens; the slices follow one another in time.

(mma.sync and wgmma round alike: checked on the GPU by the tests.)
"""
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from nvfp4jax.kernels.hopper import mosaic as mo

SMS = 132
STEP = 256  # K of a pipeline step: 128 bytes of codes and 16 of scales a row
SCALE_STEPS = 8  # steps in 128 bytes of scales
_BARRIERS = 32  # the most that Mosaic takes in an array
_MMA = ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{$0,$1,$2,$3},{$4,$5,$6,$7},{$8,$9},{$10,$11,$12,$13};")


# --- rules: from the shape to the schedule --------------------------------------------------------------------------

def slices(n: int, k: int) -> int:
    """Into how many slices a sum over K is split. From the weight's shape alone, or rows would not keep their bits.

    Weights of few rows need it: a warp decodes 16 rows, and the 132 SMs want about 8 busy warps each.
    """
    wanted = 8 if n <= 2048 else 4 if n <= 10240 else 2 if n <= 16384 else 1
    steps = -(-k // STEP)
    while wanted > steps:
        wanted //= 2
    return wanted


def _narrow_tiles(n, k):
    """16-row tiles of a CTA of `_narrow`: one wave of CTAs where they fit, whole warpgroups."""
    tiles = min(-(-n // 16 // SMS), 8)
    return tiles if slices(n, k) % 4 == 0 else tiles + tiles % 2


def _tokens(m, most):
    """The token tile: a multiple of 8, the rows of M spread evenly over tiles of at most `most`."""
    return -(-(-(-m // (-(-m // most)))) // 8) * 8


def _narrow_memory(k, tokens, slices, tiles):
    """What `_narrow` holds in shared memory at once, and in how many stages.

    "all" of K, a stage a step of each slice; the "weights", and a ring of tokens, a stage a 64-chunk of each slice; or a ring
    of "steps" of both; ("", 0): it cannot run.
    """
    rows = 16 * tiles
    rounds = -(-(-(-k // STEP)) // slices)
    box, chunk = rows * STEP // 2 + tokens * STEP * 2, slices * tokens * 128
    room = mo.SHARED_MEMORY - 2048 - slices * tokens * _pitch(rows) * 4
    weights = rounds * slices * rows * STEP // 2 + -(-rounds * slices // SCALE_STEPS) * rows * 128
    if weights + rounds * slices * tokens * STEP * 2 <= room:
        return "all", rounds
    steps = min(8, room // (slices * (box + rows * 16)))
    chunks = min(8, _BARRIERS // slices, (room - weights) // chunk)
    if steps < 2 and chunks >= 2 and rounds * slices <= _BARRIERS:
        return "weights", chunks
    return ("steps", steps) if steps >= 2 else ("", 0)


def _pitch(rows):
    """Floats of a token's row of sums in shared memory: 8-byte stores without bank conflicts."""
    return rows + 4


def _chunks(tokens):
    """64-chunks between two full waits for wgmma: what the registers hold beside the sums."""
    return 4 if tokens <= 64 else 2 if tokens <= 96 else 1


# --- epilogue -------------------------------------------------------------------------------------------------------

def _load_bias(ref, index, dtype):
    """Inside inline_mgpu: bias[index] as f32, in an i32 register."""
    pointer = mo.gmem_address(ref, mo.mul(index, dtype.itemsize))
    if dtype == jnp.float32:
        return mo.asm("ld.global.nc.f32 $0,[$1];", [pointer])
    return mo.asm("{.reg .b16 h; ld.global.nc.b16 h,[$1]; mov.b32 $0,{0,h};}", [pointer])


def _scaled(v, factor, bias):
    """acc * factor + bias with one rounding each way: the same instruction in both kernels."""
    if bias is None:
        return mo.asm("mul.rn.f32 $0,$1,$2;", [v, factor], "f", effects=False)
    return mo.asm("fma.rn.f32 $0,$1,$2,$3;", [v, factor, bias], "f", effects=False)


def _place(threads, rows, t):
    """Of this thread's t-th pair of neighbouring rows of a token: (token, row) in a tile of `rows` rows. `threads` is a multiple of
    rows / 2, so the rows are the same for every t."""
    index = mo.thread_index()
    return mo.add(mo.div(index, rows // 2), t * (threads // (rows // 2))), mo.mul(mo.rem(index, rows // 2), 2)


def _factors(row_scale, g, bias, layer, first_token, first, *, bias_stacked, stacked, n, m, rows, tokens, threads, per_row, bias_dtype):
    """What `_finish` multiplies and adds, fetched before it is needed, PER_THREAD: the global scale, row scales of a thread's pairs
    (or the one of all), and the biases of its two rows."""
    count = -(-tokens * rows // 2 // threads) if per_row else 1
    value = plgpu.ShapeDtypeStruct((128,), jnp.int32, layout=mo.PER_THREAD)

    @plgpu.inline_mgpu(arg_types=(mo.REF, mo.REF, mo.REF, *[mo.SPLAT] * 3),
                       return_type=(value,) * (1 + count + 2 * (bias_dtype is not None)))
    def f(ctx, row_scale, g, bias, *rest):
        del ctx
        layer, first_token, first = map(mo.scalar, rest)
        out = [mo.asm("ld.global.nc.b32 $0,[$1];", [mo.gmem_address(g, mo.mul(layer, 4) if stacked else None)])]
        for t in range(count):
            token, row = _place(threads, rows, t)
            at = mo.mul(mo.minimum(mo.add(first_token, token), m - 1), 4) if per_row else None
            out.append(mo.asm("ld.global.nc.f32 $0,[$1];", [mo.gmem_address(row_scale, at)]))
        if bias_dtype is not None:
            for e in range(2):
                column = mo.minimum(mo.add(mo.add(first, row), e), n - 1)
                column = mo.add(mo.mul(layer, n), column) if bias_stacked else column
                out.append(_load_bias(bias, column, bias_dtype))
        return tuple(map(mo.per_thread, out))

    return f(row_scale, g, bias, layer[0] if stacked else jnp.int32(0), first_token, first)


def _finish(source, offsets, factors, first_token, first, o, *, n, m, rows, tokens, threads, per_row, bias_dtype, out_dtype):
    """Inside inline_mgpu: the slices' sums in shared memory, added from left to right, scaled, and stored.

    source: (token, row) -> address of a pair of a slice's sums; offsets: bytes on to those of each slice."""
    global_scale, *factors = [mo.of_thread(v) for v in factors]
    factor = mo.asm(f"{{.reg .f32 f; mov.b32 f,0x{np.float32(mo.DECODE_FACTOR).view(np.uint32):08x}; mul.rn.f32 $0,$1,f;}}",
                    [global_scale], "f", effects=False)
    biases = [None, None] if bias_dtype is None else factors[-2:]
    for t in range(-(-tokens * rows // 2 // threads)):
        token, row = _place(threads, rows, t)
        inside = mo.flag("lt", token, tokens)
        at = source(mo.minimum(token, tokens - 1), row)
        parts = [mo.asm(f"ld.shared.v2.f32 {{$0,$1}},[$2+{offset}];", [at], "ff") for offset in offsets]
        scale = mo.asm("mul.rn.f32 $0,$1,$2;", [factors[t if per_row else 0], factor], "f", effects=False)
        token = mo.add(first_token, token)
        inside = mo.bit_and(inside, mo.flag("lt", token, m))
        _finish_pair(parts, token, mo.add(first, row), inside, scale, biases, o, n=n, out_dtype=out_dtype)


def _finish_pair(parts, token, column, inside, scale, biases, o, *, n, out_dtype):
    """The slices' sums of two neighbouring columns, added from left to right, scaled, and stored where `inside` is not zero."""
    total = functools.reduce(
        lambda a, b: [mo.asm("add.rn.f32 $0,$1,$2;", list(ab), "f", effects=False) for ab in zip(a, b)], parts)
    values = [_scaled(v, scale, b) for v, b in zip(total, biases)]
    flags = [mo.bit_and(inside, mo.flag("lt", mo.add(column, e), n)) for e in range(2)]
    pointer = mo.gmem_element(o, token, n, column, jnp.dtype(out_dtype).itemsize)
    _store_pair(pointer, values, flags, out_dtype, aligned=n % 2 == 0)


def _store_pair(pointer, values, flags, dtype, *, aligned):
    """Two neighbouring results at an address of global memory, each where its flag is not zero."""
    predicate = "{{.reg .pred p; setp.ne.u32 p,${flag},0; {text}}}"
    if dtype == jnp.float32:
        if aligned:
            mo.asm(predicate.format(flag=3, text="@p st.global.v2.f32 [$0],{$1,$2};"), [pointer, *values, flags[0]], "")
        else:
            for e in range(2):
                mo.asm(predicate.format(flag=2, text=f"@p st.global.f32 [$0+{4 * e}],$1;"), [pointer, values[e], flags[e]], "")
    elif aligned:
        mo.asm(predicate.format(flag=3, text=".reg .b32 q; cvt.rn.bf16x2.f32 q,$2,$1; @p st.global.b32 [$0],q;"),
               [pointer, *values, flags[0]], "")
    else:
        for e in range(2):
            mo.asm(predicate.format(flag=2, text=f".reg .b16 q; cvt.rn.bf16.f32 q,$1; @p st.global.b16 [$0+{2 * e}],q;"),
                   [pointer, values[e], flags[e]], "")


# --- few tokens -----------------------------------------------------------------------------------------------------

def _narrow(n, k, m, *, slices, tiles, tokens, per_row, bias_dtype, out_dtype, stacked, bias_stacked=False, twin=False):
    """w i32 [(L,) N, K/8], s i32 [(L,) N, K/64], x bf16 [M, K], row_scale f32 [1] or [M], g f32 [1 or L], bias
    [(L,) N] or f32 [1], layer i32 [1] -> [M, N]. tiles: 16-row tiles of a CTA; tokens: the tile of M, a multiple of 8. twin: jnp
    in place of PTX."""
    rows, warps = 16 * tiles, tiles * slices
    wgs = warps // 4
    groups, token_tiles = tokens // 8, -(-m // tokens)
    steps = -(-k // STEP)
    rounds = -(-steps // slices)  # steps of a slice
    pitch = _pitch(rows)
    scale_blocks = -(-rounds * slices // SCALE_STEPS)
    memory, stages = _narrow_memory(k, tokens, slices, tiles)
    resident = memory != "steps"  # the weights are
    if wgs * 4 != warps or warps > 24 or not stages:
        raise NotImplementedError(f"dense: no schedule for weights [{n}, {k}] at M={m}")
    # x by whole 8-row groups in one copy where M allows it, else a 64-chunk a copy: the same bytes in another order.
    x_tiled = (m <= 8 or m % 8 == 0) and memory != "weights"
    chunks = STEP // 64
    x_shape = ((stages, slices, tokens, 64) if memory == "weights" else (stages, slices, tokens, STEP) if x_tiled else
               (stages, slices, chunks, tokens, 64))
    chunk_bytes, group_bytes = (1024, chunks * 1024) if x_tiled else (tokens * 128, 1024)
    slice_bytes = tokens * (64 if memory == "weights" else STEP) * 2  # of tokens in a stage
    x_transforms = mo.swizzled(2) if x_tiled else mo.ROWS_128

    def kernel(w, s, x, row_scale, g, bias, layer, o, w_sm, s_sm, x_sm, red, full, empty, s_full, done, w_full=None):
        wg = lax.axis_index("wg")
        tile = lax.axis_index("tile")  # CTAs of the same weights are neighbours
        token, first = lax.rem(tile, jnp.int32(token_tiles)) * tokens, lax.div(tile, jnp.int32(token_tiles)) * rows
        zero = tile * 0  # jax 0.12 refuses static slices that reach past the end
        own = pl.ds(first, rows)
        at = (layer[0],) if stacked else ()

        def fetch_weights(i, stage):
            for p in range(slices):
                step = p * rounds + i + zero
                plgpu.copy_gmem_to_smem(
                    w.at[(*at, own, pl.ds(step * (STEP // 8), STEP // 8))], w_sm.at[stage, p],
                    (full if w_full is None else w_full).at[stage * slices + p])

        def fetch_tokens(i, stage):
            for p in range(slices):
                start, target, barrier = (p * rounds + i + zero) * STEP, x_sm.at[stage, p], full.at[stage * slices + p]
                if x_tiled:
                    plgpu.copy_gmem_to_smem(x.at[pl.ds(token, tokens), pl.ds(start, STEP)], target, barrier)
                else:
                    for c in range(chunks):
                        plgpu.copy_gmem_to_smem(
                            x.at[pl.ds(token, tokens), pl.ds(start + c * 64, 64)], target.at[c], barrier)

        if resident:
            @pl.when(wg == 0)
            def _():
                for i in range(rounds):
                    fetch_weights(i, i)

            @pl.when(wg == wgs - 1)
            def _():
                for b in range(scale_blocks):
                    plgpu.copy_gmem_to_smem(s.at[(*at, own, pl.ds(b * 32 + zero, 32))], s_sm.at[b], s_full)
                if memory == "all":
                    for i in range(rounds):
                        fetch_tokens(i, i)

        if memory == "weights":
            @pl.when(wg == wgs)
            def _():
                @pl.loop(0, rounds * chunks)
                def _(c):
                    stage = lax.rem(c, jnp.int32(stages))
                    pl.when(c >= stages)(lambda: plgpu.barrier_wait(empty.at[stage]))
                    for p in range(slices):
                        plgpu.copy_gmem_to_smem(x.at[pl.ds(token, tokens), pl.ds((p * rounds * chunks + c) * 64, 64)],
                                                x_sm.at[stage, p], full.at[stage * slices + p])
        elif memory == "steps":
            @pl.when(wg == wgs)
            def _():
                @pl.loop(0, rounds)
                def _(i):
                    stage = lax.rem(i, jnp.int32(stages))

                    @pl.when(i >= stages)
                    def _():
                        plgpu.barrier_wait(empty.at[stage])

                    fetch_weights(i, stage)
                    for p in range(slices):
                        step = p * rounds + i
                        plgpu.copy_gmem_to_smem(s.at[(*at, own, pl.ds(step * 4, 4))], s_sm.at[stage, p], full.at[stage * slices + p])
                    fetch_tokens(i, stage)

                if twin:  # the interpreter wants every phase of a barrier observed
                    for stage in range(min(stages, rounds)):
                        plgpu.barrier_wait(empty.at[(rounds + stage) % stages if rounds > stages else stage])

        def wait(barriers, stage, own_slice):
            if own_slice is not None:
                plgpu.barrier_wait(barriers.at[stage * slices + own_slice])
                return
            # for the slices of all this warpgroup's warps
            least, most = lax.div(wg * 4, jnp.int32(tiles)), lax.div(wg * 4 + 3, jnp.int32(tiles))
            for d in range(min(3 // tiles + 2, 4)):
                pl.when(least + d <= most)(lambda d=d: plgpu.barrier_wait(barriers.at[stage * slices + least + d]))

        @pl.when(wg < wgs)
        def _():
            own_slice = None
            if twin:
                addresses = None
                acc = jnp.zeros((64, tokens), jnp.float32)
            else:
                factors = _factors(row_scale, g, bias, layer, token, first, stacked=stacked, bias_stacked=bias_stacked, **epilogue)
                addresses = prepare(w_sm, s_sm, x_sm, red)
                if memory == "weights":
                    own_slice = slice_of_warp()
                # Each warp's sums of 16 rows stand as its 16 rows of a (64, tokens) array.
                acc = plgpu.layout_cast(jnp.zeros((64, tokens), jnp.float32), mo.WGMMA)

            def round_(acc, i, stage):
                if twin:
                    return add_twin(acc, wg, i, stage, w_sm, s_sm, x_sm)
                return add_round(acc, i, stage, addresses)

            if resident:
                plgpu.barrier_wait(s_full)
            if memory == "all":
                for i in range(rounds):
                    wait(full, i, None)
                    acc = round_(acc, i, i)
            elif memory == "weights":
                for c in range(rounds * chunks):
                    (i, u), stage = divmod(c, chunks), c % stages
                    if u == 0:
                        wait(w_full, i, own_slice)
                    if not twin:  # before the tokens have come, and beside the products of the chunk before
                        decoded = decode_chunk(i, u, addresses)
                    wait(full, stage, own_slice)
                    if twin:
                        acc = add_twin(acc, wg, i, stage, w_sm, s_sm, x_sm, u)
                        plgpu.commit_smem()  # as below
                    else:
                        acc = add_chunk(acc, stage, decoded, addresses)
                    if c + stages < rounds * chunks:
                        plgpu.barrier_arrive(empty.at[stage])
            else:
                def body(i, acc):
                    stage = lax.rem(i, jnp.int32(stages))
                    wait(full, stage, None)
                    acc = round_(acc, i, stage)
                    if twin:  # the interpreter orders reads before the next copy by this fence; the hardware by the barrier
                        plgpu.commit_smem()
                    plgpu.barrier_arrive(empty.at[stage])
                    return acc

                acc = lax.fori_loop(0, rounds, body, acc)

            if twin:
                finish_twin(acc, wg, g, row_scale, bias, at, token, first, o, red, done)
            else:
                put_sums(acc, addresses[0], red)
                plgpu.barrier_arrive(done)
                plgpu.barrier_wait(done)
                finish(factors, token, first, o, red)

    epilogue = dict(n=n, m=m, rows=rows, tokens=tokens, threads=128 * wgs, per_row=per_row, bias_dtype=bias_dtype)

    # --- of a thread: its warp's 16-row tile and slice
    def place():
        tid = mo.thread_index()
        lane, warp = mo.rem(tid, 32), mo.div(tid, 32)
        r, quad = mo.div(lane, 4), mo.rem(lane, 4)
        return lane, mo.rem(warp, tiles), mo.div(warp, tiles), r, quad

    register = plgpu.ShapeDtypeStruct((128,), jnp.int32, layout=mo.PER_THREAD)
    scale_addresses = rounds if resident else 1

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(mo.ROWS_128), plgpu.RefType(mo.ROWS_128 if resident else ()),
                   plgpu.RefType(x_transforms), mo.REF),
        return_type=(register,) * (5 + scale_addresses))
    def prepare(ctx, w_sm, s_sm, x_sm, red):
        """Addresses, computed before the data arrive: of the partial sums, the codes of fragment rows r and r + 8 (weight
        rows 2r and 2r + 1), two of the tokens, and the scales."""
        del ctx
        lane, tile, p, r, quad = place()
        row = mo.add(mo.mul(tile, 16), mo.mul(r, 2))
        out = [mo.smem_address(red, mo.mul(mo.add(mo.mul(mo.add(mo.mul(p, tokens), mo.mul(quad, 2)), pitch), row), 4))]
        for h in range(2):
            phase = mo.bit_and(mo.add(mo.mul(r, 2), h), 7)
            line = mo.add(mo.mul(mo.add(mo.mul(p, rows), row), 128), 128 * h)
            unit = mo.add(mo.mul(mo.bit_xor(mo.div(quad, 2), phase), 16), mo.mul(mo.rem(quad, 2), 8))
            out.append(mo.smem_address(w_sm, mo.add(line, unit)))
        t, matrix = mo.rem(lane, 8), mo.div(lane, 8)
        for half in range(2):
            unit = mo.bit_xor(mo.add(matrix, 4 * half), t)
            out.append(mo.smem_address(x_sm, mo.add(mo.mul(p, slice_bytes), mo.add(mo.mul(t, 128), mo.mul(unit, 16)))))
        if resident:
            for i in range(rounds):
                step = mo.add(mo.mul(p, rounds), i)
                unit = mo.bit_xor(mo.rem(step, SCALE_STEPS), mo.rem(row, 8))
                line = mo.add(mo.mul(mo.div(step, SCALE_STEPS), rows), row)
                out.append(mo.smem_address(s_sm, mo.add(mo.mul(line, 128), mo.mul(unit, 16))))
        else:
            out.append(mo.smem_address(s_sm, mo.mul(mo.add(mo.mul(p, rows), row), 16)))
        return tuple(mo.per_thread(a) for a in out)

    @plgpu.inline_mgpu(return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=mo.SPLAT))
    def slice_of_warp(ctx):
        """An index of barriers that is another for the warps of a warpgroup: each waits for its own."""
        del ctx
        return mo.splat(place()[2])

    def decode(u, w0, w1, w_at, s0, s1):
        """A 64-chunk of a step -> for each of four k16 steps the operand of mma: rows r and r + 8 in turn."""
        selector = mo.asm("mad.lo.u32 $0,$1,0x1111,0x4400;", [mo.rem(mo.thread_index(), 4)], effects=False)
        factors = mo.asm(mo.SCALE_PAIR, [s0, s1, selector], "rr", effects=False)
        a = {}
        for h, base in enumerate((w0, w1)):
            for word_index, word in enumerate(mo.load_shared(mo.bit_xor(base, 32 * u), w_at, 2)):
                a[h, word_index] = mo.decode_codes(word, factors[h])
        return [[a[0, 0][q], a[1, 0][q], a[0, 1][q], a[1, 1][q]] for q in range(4)]

    def load_tokens(address, offset):
        """8 tokens of two k16 steps."""
        return mo.asm(f"ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{$0,$1,$2,$3}},[$4+{offset}];", [address], "rrrr")

    def decode_chunk(i, u, addresses):
        """`decode` of a 64-chunk of the weights that lie in shared memory as a whole."""
        @plgpu.inline_mgpu(arg_types=(mo.PER_THREAD,) * 3, return_type=(register,) * 16)
        def f(ctx, *values):
            del ctx
            w0, w1, sa = map(mo.of_thread, values)
            (s0,), (s1,) = mo.load_shared(sa, 4 * u, 1), mo.load_shared(mo.bit_xor(sa, 16), 128 + 4 * u, 1)
            left = decode(u, w0, w1, i * slices * rows * 128, s0, s1)
            return tuple(mo.per_thread(v) for step in left for v in step)

        return f(*addresses[1:3], addresses[5 + i])

    def add_chunk(acc, stage, decoded, addresses):
        """A decoded 64-chunk times the tokens of a stage."""
        @plgpu.inline_mgpu(arg_types=(mo.WGMMA,) + (mo.PER_THREAD,) * 18,
                           return_type=plgpu.ShapeDtypeStruct((64, tokens), jnp.float32, layout=mo.WGMMA))
        def f(ctx, acc, *values):
            del ctx
            x0, x1, *left = map(mo.of_thread, values)
            sums = [[v for part in pair for v in mo.elements(part)] for pair in acc.registers.reshape(groups, 2)]
            for half, address in enumerate((x0, x1)):  # half of the tokens' registers at a time
                right = [load_tokens(address, stage * slices * slice_bytes + j * 1024) for j in range(groups)]
                for q in range(2):
                    for j in range(groups):
                        sums[j] = mo.asm(_MMA, [*left[8 * half + 4 * q:][:4], *right[j][2 * q:][:2], *sums[j]], "ffff", effects=False)
            return as_array(sums)

        return f(acc, *addresses[3:5], *decoded)

    def as_array(sums):
        out = np.empty((groups, 2), dtype=object)
        for j, h in np.ndindex(groups, 2):
            out[j, h] = mo.pair(*sums[j][2 * h:2 * h + 2])
        return mo.wgmma_array(out, (64, tokens))

    def add_round(acc, i, stage, addresses):
        """One step of the warp's slice: 16 weight rows x 256 of K, four mma for each 64 and 8 tokens."""
        _, *a = addresses
        scale_address = a[4 + i] if resident else a[4]
        offset = 0 if resident else stage  # a static round, or the stage of the ring

        @plgpu.inline_mgpu(
            arg_types=(mo.WGMMA, mo.SPLAT) + (mo.PER_THREAD,) * 5,
            return_type=plgpu.ShapeDtypeStruct((64, tokens), jnp.float32, layout=mo.WGMMA))
        def f(ctx, acc, stage, *addresses):
            del ctx
            w0, w1, x0, x1, sa = map(mo.of_thread, addresses)
            w_at, x_at = (i * slices * rows * 128, i * slices * slice_bytes) if resident else (0, 0)
            if not resident:
                stage = mo.scalar(stage)
                w0, w1 = (mo.add(v, mo.mul(stage, slices * rows * 128)) for v in (w0, w1))
                x0, x1 = (mo.add(v, mo.mul(stage, slices * slice_bytes)) for v in (x0, x1))
                sa = mo.add(sa, mo.mul(stage, slices * rows * 16))
            # rows r and r + 8 are neighbours: their scales' units differ in the lowest bit of the swizzle
            s0 = mo.load_shared(sa, 0, 4)
            s1 = mo.load_shared(mo.bit_xor(sa, 16), 128, 4) if resident else mo.load_shared(sa, 16, 4)
            sums = [[v for part in pair for v in mo.elements(part)] for pair in acc.registers.reshape(groups, 2)]
            for u in range(STEP // 64):
                right = [[load_tokens(v, x_at + u * chunk_bytes + j * group_bytes) for v in (x0, x1)] for j in range(groups)]
                left = decode(u, w0, w1, w_at, s0[u], s1[u])
                for q in range(4):
                    for j in range(groups):
                        sums[j] = mo.asm(_MMA, [*left[q], *right[j][q // 2][2 * (q % 2):][:2], *sums[j]], "ffff", effects=False)
            return as_array(sums)

        return f(acc, jnp.int32(offset), *a[:4], scale_address)

    def put_sums(acc, address, red):
        @plgpu.inline_mgpu(arg_types=(mo.WGMMA, mo.PER_THREAD, mo.REF))
        def f(ctx, acc, address, red):
            del ctx, red
            for j, (upper, lower) in enumerate(acc.registers.reshape(groups, 2)):
                for e, values in enumerate(zip(mo.elements(upper), mo.elements(lower))):
                    mo.asm(f"st.shared.v2.f32 [$0+{(8 * j + e) * pitch * 4}],{{$1,$2}};",
                           [mo.of_thread(address), *values], "")

        f(acc, address, red)

    def finish(factors, token, first, o, red):
        @plgpu.inline_mgpu(arg_types=(mo.SPLAT, mo.SPLAT, mo.REF, mo.REF, *[mo.PER_THREAD] * len(factors)))
        def f(ctx, token, first, o, red, *factors):
            del ctx
            _finish(lambda token, row: mo.smem_address(red, mo.mul(mo.add(mo.mul(token, pitch), row), 4)),
                    [p * tokens * pitch * 4 for p in range(slices)], factors, mo.scalar(token), mo.scalar(first), o,
                    out_dtype=out_dtype, **epilogue)

        f(token, first, o, red, *factors)

    # --- the interpreter's twins
    def warp_twin(wg, v):
        index = wg * 4 + v
        return lax.rem(index, jnp.int32(tiles)), lax.div(index, jnp.int32(tiles))

    def add_twin(acc, wg, i, stage, w_sm, s_sm, x_sm, chunk=None):
        """A step, or a 64-chunk of it."""
        out = []
        for v in range(4):
            tile, p = warp_twin(wg, v)
            own = pl.ds(tile * 16, 16)
            words = w_sm[i if resident else stage, p, own]
            step = p * rounds + i
            scales = (s_sm[lax.div(step, SCALE_STEPS), own, pl.ds(lax.rem(step, SCALE_STEPS) * 4, 4)] if resident
                      else s_sm[stage, p, own])
            if chunk is not None:
                words, scales = words[:, 8 * chunk:8 * chunk + 8], scales[:, chunk:chunk + 1]
            right = x_sm[stage, p] if x_tiled or chunk is not None else x_sm[stage, p].transpose(1, 0, 2).reshape(tokens, STEP)
            out.append(jnp.dot(mo.decode_words(words, scales), right.T, preferred_element_type=jnp.float32))
        return acc + jnp.concatenate(out)

    def finish_twin(acc, wg, g, row_scale, bias, at, token, first, o, red, done):
        for v in range(4):
            tile, p = warp_twin(wg, v)
            red[p, :, pl.ds(tile * 16, 16)] = acc[16 * v:16 * v + 16].T
        plgpu.barrier_arrive(done)
        plgpu.barrier_wait(done)

        @pl.when(wg == 0)
        def _():
            own, rows_of = min(m, tokens), pl.ds(first, rows)
            total = functools.reduce(jnp.add, [red[p, pl.ds(0, own), pl.ds(0, rows)] for p in range(slices)])
            scales = row_scale[pl.ds(token, own)].reshape(-1, 1) if per_row else row_scale[...].reshape(1, 1)
            total = total * (scales * (g[0] * mo.DECODE_FACTOR))
            if bias_dtype is not None:
                total = total + bias[(*(at if bias_stacked else ()), rows_of)].astype(jnp.float32)[None]
            o[pl.ds(token, own), rows_of] = total.astype(out_dtype)

    return plgpu.kernel(
        kernel, out_type=jax.ShapeDtypeStruct((m, n), out_dtype),
        scratch_types=dict(
            w_sm=plgpu.SMEM((rounds if resident else stages, slices, rows, STEP // 8), jnp.int32, transforms=mo.ROWS_128),
            s_sm=(plgpu.SMEM((scale_blocks, rows, 32), jnp.int32, transforms=mo.ROWS_128) if resident else
                  plgpu.SMEM((stages, slices, rows, STEP // 64), jnp.int32)),
            x_sm=plgpu.SMEM(x_shape, jnp.bfloat16, transforms=x_transforms),
            red=plgpu.SMEM((slices, tokens, pitch), jnp.float32),
            full=plgpu.Barrier(num_arrivals={"all": 1, "weights": 0, "steps": 2}[memory] +
                               (1 if x_tiled or memory == "weights" else chunks), num_barriers=stages * slices),
            **(dict(w_full=plgpu.Barrier(num_barriers=rounds * slices)) if memory == "weights" else {}),
            empty=plgpu.Barrier(num_arrivals=wgs, num_barriers=stages),
            s_full=plgpu.Barrier(num_arrivals=scale_blocks),
            done=plgpu.Barrier(num_arrivals=wgs)),
        grid=(-(-n // rows) * token_tiles,), grid_names=("tile",), num_threads=wgs if memory == "all" else wgs + 1, thread_name="wg",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True))


# --- more tokens, few rows of weights -------------------------------------------------------------------------------

def _split(n, k, m, *, slices, wgs, tokens, per_row, bias_dtype, out_dtype, stacked, bias_stacked=False, twin=False):
    """As `_wide`, but the slices run beside one another, one a CTA of a cluster, and meet through its shared memory."""
    rows = 64 * wgs
    steps = -(-k // STEP)
    rounds = -(-steps // slices)
    row_tiles, token_tiles = -(-n // rows), -(-m // tokens)
    box = rows * (STEP // 2 + 16) + tokens * STEP * 2
    resident = rounds * box <= mo.SHARED_MEMORY // 2 - 2048  # two CTAs an SM, each all of its slice
    stages = rounds if resident else min(8, (mo.SHARED_MEMORY - 2048) // box)
    pitch = _pitch(rows)
    share = tokens // slices  # tokens whose sums a CTA finishes
    if share * slices != tokens or stages < 2 and not resident:
        raise NotImplementedError(f"dense: no schedule for weights [{n}, {k}] at M={m}, tiles of {tokens} tokens")
    x_stages = max(stages, -(-pitch * 4 // (STEP * 2)))  # the sums take the place of the tokens
    chunks = _chunks(tokens)

    def kernel(w, s, x, row_scale, g, bias, layer, o, w_sm, s_sm, x_sm, full, empty, done):
        wg, p = lax.axis_index("wg"), lax.axis_index("slice")
        zero = p * 0
        row_tile = lax.div(lax.axis_index("tile"), jnp.int32(token_tiles))
        token_tile = lax.rem(lax.axis_index("tile"), jnp.int32(token_tiles))
        at = (layer[0],) if stacked else ()

        def fetch(i, stage):
            step, own = p * rounds + i, pl.ds(row_tile * rows, rows)
            plgpu.copy_gmem_to_smem(
                w.at[(*at, own, pl.ds(step * (STEP // 8), STEP // 8))], w_sm.at[stage], full.at[stage])
            plgpu.copy_gmem_to_smem(s.at[(*at, own, pl.ds(step * 4, 4))], s_sm.at[stage], full.at[stage])
            for c in range(STEP // 64):
                plgpu.copy_gmem_to_smem(x.at[pl.ds(token_tile * tokens, tokens), pl.ds(step * STEP + c * 64, 64)],
                                        x_sm.at[stage, c], full.at[stage])

        if resident:
            @pl.when(wg == 0)
            def _():
                for i in range(rounds):
                    fetch(i + zero, i)
        else:
            @pl.when(wg == wgs)
            def _():
                if not twin:
                    plgpu.set_max_registers(producer_registers, action="decrease")

                @pl.loop(0, rounds)
                def _(i):
                    stage = lax.rem(i, jnp.int32(stages))
                    pl.when(i >= stages)(lambda: plgpu.barrier_wait(empty.at[stage]))
                    fetch(i, stage)

                if twin:
                    for back in range(min(stages, rounds)):
                        plgpu.barrier_wait(empty.at[(max(rounds - stages, 0) + back) % stages])

        @pl.when(wg < wgs)
        def _():
            if not twin and not resident:
                plgpu.set_max_registers(consumer_registers, action="increase")
            acc = jnp.zeros((64, tokens), jnp.float32)
            if not twin:
                acc = plgpu.layout_cast(acc, mo.WGMMA)
                lane_values = mo.fragment_lanes(wg, [jnp.int32(0)] * 2, scale_row=16)

            def add_step(i, acc):
                stage = lax.rem(i, jnp.int32(stages)) if not resident else i
                plgpu.barrier_wait(full.at[stage])
                if twin:
                    own = pl.ds(wg * 64, 64)
                    a = mo.decode_words(w_sm[stage, own], s_sm[stage, own])
                    b = x_sm[stage].transpose(1, 0, 2).reshape(tokens, STEP)
                    plgpu.commit_smem()
                    acc = acc + jnp.dot(a, b.T, preferred_element_type=jnp.float32)
                else:
                    for c in range(0, STEP // 64, chunks):
                        acc = mo.multiply_decoded(
                            acc, lane_values, w_sm.at[stage], s_sm.at[stage], x_sm.at[stage, pl.ds(c, chunks)], jnp.int32(0),
                            first=c, chunks=chunks, tokens=tokens, scale_row=16)
                if not resident:
                    plgpu.barrier_arrive(empty.at[stage])
                return acc

            acc = lax.fori_loop(0, rounds, add_step, acc)
            if twin:
                own = pl.ds(row_tile * rows + wg * 64, 64)
                o[p, pl.ds(token_tile * tokens, tokens), own] = acc.T
            else:
                plgpu.barrier_arrive(done)
                plgpu.barrier_wait(done)  # all warpgroups have read their tokens
                factor = g[layer[0] if stacked else 0] * mo.DECODE_FACTOR
                bias_at = layer[0] * n if bias_stacked else jnp.int32(0)
                meet(acc, x_sm, p, wg, factor, row_scale, bias, bias_at, token_tile * tokens, row_tile * rows, o)

    consumer_registers, producer_registers = mo.register_budget(wgs)

    def meet(acc, x_sm, *rest):
        """Puts this CTA's sums into shared memory, and finishes its share of the tokens from those of the whole cluster."""
        @plgpu.inline_mgpu(arg_types=(mo.WGMMA, plgpu.RefType(mo.ROWS_128), *[mo.SPLAT] * 3, mo.REF, mo.REF,
                                      *[mo.SPLAT] * 3, mo.REF))
        def f(ctx, acc, sums, p, wg, factor, row_scale, bias, bias_at, first_token, first, o):
            del ctx
            p, wg, factor, bias_at, first_token, first = map(mo.scalar, (p, wg, factor, bias_at, first_token, first))
            warp, quad, _, weight_row = mo.lanes(False)
            row = mo.add(mo.add(mo.mul(wg, 64), mo.mul(warp, 16)), weight_row)
            base = mo.smem_address(sums)
            target = mo.add(base, mo.mul(mo.add(mo.mul(mo.mul(quad, 2), pitch), row), 4))
            for j, (upper, lower) in enumerate(acc.registers.reshape(tokens // 8, 2)):
                for e, values in enumerate(zip(mo.elements(upper), mo.elements(lower))):
                    mo.asm(f"st.shared.v2.f32 [$0+{(8 * j + e) * pitch * 4}],{{$1,$2}};", [target, *values], "")
            mo.asm("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;", (), "")
            sources = [mo.asm(f"mapa.shared::cluster.u32 $0,$1,{q};", [base], effects=False) for q in range(slices)]
            pairs, threads = rows // 2 * share, 128 * wgs
            for t in range(-(-pairs // threads)):
                index = mo.add(mo.thread_index(), t * threads)
                inside = mo.flag("lt", index, pairs)
                safe = mo.minimum(index, pairs - 1)
                token = mo.add(mo.mul(p, share), mo.div(safe, rows // 2))
                row = mo.mul(mo.rem(safe, rows // 2), 2)
                at = mo.mul(mo.add(mo.mul(token, pitch), row), 4)
                parts = [mo.asm("ld.shared::cluster.v2.f32 {$0,$1},[$2];", [mo.add(source, at)], "ff") for source in sources]
                token = mo.add(first_token, token)
                inside = mo.bit_and(inside, mo.flag("lt", token, m))
                token = mo.minimum(token, m - 1)
                of_row = mo.gmem_address(row_scale, mo.mul(token, 4) if per_row else None)
                scale = mo.asm("{.reg .f32 s; ld.global.nc.f32 s,[$1]; mul.rn.f32 $0,s,$2;}", [of_row, factor], "f")
                columns = [mo.minimum(mo.add(mo.add(first, row), e), n - 1) for e in range(2)]
                biases = [None if bias_dtype is None else _load_bias(bias, mo.add(bias_at, c), bias_dtype) for c in columns]
                _finish_pair(parts, token, mo.add(first, row), inside, scale, biases, o, n=n, out_dtype=out_dtype)
            # No CTA leaves while another reads its sums.
            mo.asm("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;", (), "")

        f(acc, x_sm, *rest)

    tiles = row_tiles * token_tiles
    if twin:  # the slices' sums, which the interpreter cannot exchange in a cluster
        names = dict(grid=(tiles, slices), grid_names=("tile", "slice"))
        out_type = jax.ShapeDtypeStruct((slices, token_tiles * tokens, n), jnp.float32)
    else:
        names = dict(grid=(tiles,), grid_names=("tile",), cluster=(slices,), cluster_names=("slice",))
        out_type = jax.ShapeDtypeStruct((m, n), out_dtype)
    run = plgpu.kernel(
        kernel, out_type=out_type,
        scratch_types=dict(
            w_sm=plgpu.SMEM((stages, rows, STEP // 8), jnp.int32, transforms=mo.ROWS_128),
            s_sm=plgpu.SMEM((stages, rows, STEP // 64), jnp.int32),
            x_sm=plgpu.SMEM((x_stages, STEP // 64, tokens, 64), jnp.bfloat16, transforms=mo.ROWS_128),
            full=plgpu.Barrier(num_arrivals=2 + STEP // 64, num_barriers=stages),
            empty=plgpu.Barrier(num_arrivals=wgs, num_barriers=stages), done=plgpu.Barrier(num_arrivals=wgs)),
        num_threads=wgs if resident else wgs + 1, thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True), **names)
    if not twin:
        return run

    def finished(w, s, x, row_scale, g, bias, layer):
        total = functools.reduce(jnp.add, run(w, s, x, row_scale, g, bias, layer))[:m]
        total = total * (row_scale.reshape(-1, 1) * (g[0] * mo.DECODE_FACTOR))
        return (total if bias_dtype is None else total + bias.astype(jnp.float32)[None]).astype(out_dtype)

    return finished


# --- many tokens, or many rows of weights ---------------------------------------------------------------------------

def _wide(n, k, m, *, slices, wgs, tokens, paired, per_row, bias_dtype, out_dtype, stacked, bias_stacked=False, twin=False):
    """As `_narrow`, for any M. wgs: warpgroups of 64 rows that share the tokens; tokens: the tile of M, a multiple of 8;
    paired: CTAs of two neighbouring row tiles share the tokens too, each fetches half of them for both."""
    rows, width = 64 * wgs, 2 if paired else 1
    steps = -(-k // STEP)
    slice_steps = -(-steps // slices)
    row_tiles, token_tiles = -(-n // (rows * width)), -(-m // tokens)  # row tiles of the pair
    tiles = row_tiles * token_tiles
    # TMA takes about 2 cycles for each row of a box, however short. While the tensor cores are not the limit, scales come
    # 128 bytes a row (2048 of K) at a time; else with each step, in less shared memory.
    blocked = tokens <= 32
    scale_row = 128 if blocked else 16
    blocks = -(-steps // SCALE_STEPS)
    box = rows * STEP // 2 + tokens * STEP * 2 + (0 if blocked else rows * 16)
    stages = min(8, (mo.SHARED_MEMORY - 2048 - (2 * rows * 128 if blocked else 0)) // box)
    if stages < 2:
        raise NotImplementedError(f"dense: no schedule for weights [{n}, {k}] at M={m}, tiles of {tokens} tokens")
    chunks = _chunks(tokens)
    scale_pitch = -(-tokens // 32) * 32  # floats of a tile's row scales: TMA writes to multiples of 128 bytes
    consumer_registers, producer_registers = mo.register_budget(wgs)

    def kernel(w, s, x, row_scale, g, bias, layer, o, w_sm, s_sm, x_sm, r_sm, full, empty, s_full, s_empty, r_full, r_empty,
               x_free=None):
        wg, sm = lax.axis_index("wg"), lax.axis_index("sm")
        at = (layer[0],) if stacked else ()
        zero = sm * 0

        def tile_at(linear):
            if token_tiles == 1:
                row_tile, token_tile = linear, zero
            else:
                row_tile, token_tile = plgpu.planar_snake(linear, (row_tiles, token_tiles), 0, min(12 // width, row_tiles))
            return row_tile * 2 + lax.axis_index("pair") if paired else row_tile, token_tile

        @pl.when(wg == wgs)
        def _():
            if not twin:
                plgpu.set_max_registers(producer_registers, action="decrease")

            @plgpu.nd_loop((tiles,), collective_axes="sm", init_carry=jnp.int32(0))
            def count(info, carry):
                row_tile, token_tile = tile_at(info.index[0])
                own, r_slot = pl.ds(row_tile * rows, rows), lax.rem(carry, jnp.int32(2))

                @pl.loop(0, steps)
                def _(i):
                    it = carry * steps + i
                    st = lax.rem(it, jnp.int32(stages))
                    if blocked:
                        block = carry * blocks + lax.div(i, jnp.int32(SCALE_STEPS))
                        slot = lax.rem(block, jnp.int32(2))

                        @pl.when(lax.rem(i, jnp.int32(SCALE_STEPS)) == 0)
                        def _():
                            pl.when(block >= 2)(lambda: plgpu.barrier_wait(s_empty.at[slot]))
                            plgpu.copy_gmem_to_smem(s.at[(*at, own, pl.ds(i * 4, 32))], s_sm.at[slot], s_full.at[slot])

                    @pl.when(it >= stages)
                    def _():
                        plgpu.barrier_wait(empty.at[st])

                    plgpu.copy_gmem_to_smem(
                        w.at[(*at, own, pl.ds(i * (STEP // 8), STEP // 8))], w_sm.at[st], full.at[st])
                    if not blocked:
                        plgpu.copy_gmem_to_smem(s.at[(*at, own, pl.ds(i * 4, 4))], s_sm.at[st], full.at[st])
                    if paired:  # both CTAs must have released the stage
                        @pl.when(it >= stages)
                        def _():
                            plgpu.barrier_arrive(x_free.at[st])
                            plgpu.barrier_wait(x_free.at[st])

                    for c in range(STEP // 64):
                        plgpu.copy_gmem_to_smem(
                            x.at[pl.ds(token_tile * tokens, tokens), pl.ds(i * STEP + c * 64, 64)],
                            x_sm.at[st, c], full.at[st], collective_axes="pair" if paired else None)

                if per_row:  # last, for they are used last
                    pl.when(carry >= 2)(lambda: plgpu.barrier_wait(r_empty.at[r_slot]))
                    plgpu.copy_gmem_to_smem(row_scale.at[pl.ds(token_tile * tokens, tokens)], r_sm.at[r_slot, pl.ds(0, tokens)],
                                            r_full.at[r_slot])
                return carry + 1

            if twin:  # the interpreter wants every completed phase of a barrier observed
                for back in range(stages):
                    it = count * steps - 1 - (stages - 1 - back)
                    pl.when(it >= 0)(lambda it=it: plgpu.barrier_wait(empty.at[lax.rem(it, jnp.int32(stages))]))
                for back in range(2 if per_row else 0):
                    tile = count - 2 + back
                    pl.when(tile >= 0)(lambda tile=tile: plgpu.barrier_wait(r_empty.at[lax.rem(tile, jnp.int32(2))]))
                for back in range(2 if blocked else 0):
                    block = count * blocks - 2 + back
                    pl.when(block >= 0)(lambda block=block: plgpu.barrier_wait(s_empty.at[lax.rem(block, jnp.int32(2))]))

        @pl.when(wg < wgs)
        def _():
            if not twin:
                plgpu.set_max_registers(consumer_registers, action="increase")
                lane_values = mo.fragment_lanes(wg, [jnp.int32(0)] * 2, scale_row=scale_row)
            factor = g[layer[0] if stacked else 0] * mo.DECODE_FACTOR
            if not per_row:
                factor = row_scale[0] * factor

            @plgpu.nd_loop((tiles,), collective_axes="sm", init_carry=jnp.int32(0))
            def _(info, carry):
                row_tile, token_tile = tile_at(info.index[0])
                r_slot = lax.rem(carry, jnp.int32(2))

                def add_step(i, acc):
                    it = carry * steps + i
                    st = lax.rem(it, jnp.int32(stages))
                    if blocked:
                        slot = lax.rem(carry * blocks + lax.div(i, jnp.int32(SCALE_STEPS)), jnp.int32(2))
                        unit = lax.rem(i, jnp.int32(SCALE_STEPS))
                        pl.when(unit == 0)(lambda: plgpu.barrier_wait(s_full.at[slot]))
                        scales = s_sm.at[slot]
                    else:
                        unit, scales = jnp.int32(0), s_sm.at[st]
                    plgpu.barrier_wait(full.at[st])
                    if twin:
                        own = pl.ds(wg * 64, 64)
                        a = mo.decode_words(w_sm[st, own], scales[own, pl.ds(unit * 4, 4)])
                        b = x_sm[st].transpose(1, 0, 2).reshape(tokens, STEP)
                        plgpu.commit_smem()  # as in `_narrow`
                        acc = acc + jnp.dot(a, b.T, preferred_element_type=jnp.float32)
                    else:
                        for c in range(0, STEP // 64, chunks):
                            acc = mo.multiply_decoded(
                                acc, lane_values, w_sm.at[st], scales, x_sm.at[st, pl.ds(c, chunks)], unit, first=c,
                                chunks=chunks, tokens=tokens, scale_row=scale_row)
                    plgpu.barrier_arrive(empty.at[st])
                    if blocked:
                        last = (unit == SCALE_STEPS - 1) | (i == steps - 1)
                        pl.when(last)(lambda: plgpu.barrier_arrive(s_empty.at[slot]))
                    return acc

                def slice_sum(first, last):
                    start = jnp.zeros((64, tokens), jnp.float32)
                    return lax.fori_loop(first, last, add_step, start if twin else plgpu.layout_cast(start, mo.WGMMA))

                if slices == 1:
                    total = slice_sum(0, steps)
                else:  # from left to right
                    def add_slice(p, total):
                        return total + slice_sum(p * slice_steps, jnp.minimum((p + 1) * slice_steps, steps))

                    start = slice_sum(0, slice_steps)
                    total = lax.fori_loop(1, -(-steps // slice_steps), add_slice, start)
                row, channel = token_tile * tokens, row_tile * rows + wg * 64
                if per_row:
                    plgpu.barrier_wait(r_full.at[r_slot])
                if twin:
                    total = total * (r_sm[r_slot, pl.ds(0, tokens)].reshape(1, -1) * factor if per_row else factor)
                    if bias_dtype is not None:
                        total = total + bias[(*(at if bias_stacked else ()), pl.ds(channel, 64))].astype(jnp.float32)[:, None]
                    o[pl.ds(row, tokens), pl.ds(channel, 64)] = total.T.astype(out_dtype)
                else:
                    bias_at = layer[0] * n if bias_stacked else jnp.int32(0)
                    total = scaled(total, factor, r_sm, r_slot, bias, bias_at, channel)
                    mo.store_tokens(total, jnp.float32(1), None, o, row, m - row, channel,
                                    tokens=tokens, width=n, masked=n % (rows * width) != 0)
                if per_row:
                    if twin:
                        plgpu.commit_smem()  # as in `_narrow`
                    plgpu.barrier_arrive(r_empty.at[r_slot])
                return carry + 1

    def scaled(acc, factor, row_scales, slot, bias, bias_at, channel):
        """acc * (row_scale * factor) + bias, before `store_tokens`."""
        @plgpu.inline_mgpu(
            arg_types=(mo.WGMMA, mo.SPLAT, mo.REF, mo.SPLAT, mo.REF, *[mo.SPLAT] * 2),
            return_type=plgpu.ShapeDtypeStruct((64, tokens), jnp.float32, layout=mo.WGMMA))
        def f(ctx, acc, factor, row_scales, slot, bias, bias_at, channel):
            del ctx
            factor, slot, bias_at, channel = map(mo.scalar, (factor, slot, bias_at, channel))
            warp, quad, _, weight_row = mo.lanes(False)
            channel = mo.add(channel, mo.add(mo.mul(warp, 16), weight_row))
            biases = [None if bias_dtype is None else
                      _load_bias(bias, mo.add(bias_at, mo.minimum(mo.add(channel, h), n - 1)), bias_dtype) for h in range(2)]
            scales_at = mo.smem_address(row_scales, mo.mul(mo.add(mo.mul(slot, scale_pitch), mo.mul(quad, 2)), 4))
            registers = acc.registers.reshape(tokens // 8, 2)
            out = np.empty_like(registers)
            for j in range(tokens // 8):
                scales = [factor] * 2
                if per_row:
                    pair = mo.asm(f"ld.shared.v2.f32 {{$0,$1}},[$2+{32 * j}];", [scales_at], "ff")
                    scales = [mo.asm("mul.rn.f32 $0,$1,$2;", [v, factor], "f", effects=False) for v in pair]
                for h in range(2):
                    out[j, h] = mo.pair(*(_scaled(v, scales[e], biases[h]) for e, v in enumerate(mo.elements(registers[j, h]))))
            return mo.wgmma_array(out, (64, tokens))

        return f(acc, factor, row_scales, slot, bias, bias_at, channel)

    return plgpu.kernel(
        kernel, out_type=jax.ShapeDtypeStruct((m, n), out_dtype),
        scratch_types=dict(
            w_sm=plgpu.SMEM((stages, rows, STEP // 8), jnp.int32, transforms=mo.ROWS_128),
            s_sm=(plgpu.SMEM((2, rows, 32), jnp.int32, transforms=mo.ROWS_128) if blocked else
                  plgpu.SMEM((stages, rows, STEP // 64), jnp.int32)),
            x_sm=plgpu.SMEM((stages, STEP // 64, tokens, 64), jnp.bfloat16, transforms=mo.ROWS_128),
            r_sm=plgpu.SMEM((2, scale_pitch), jnp.float32),
            r_full=plgpu.Barrier(num_barriers=2), r_empty=plgpu.Barrier(num_arrivals=wgs, num_barriers=2),
            full=plgpu.Barrier(num_arrivals=STEP // 64 + (1 if blocked else 2), num_barriers=stages),
            empty=plgpu.Barrier(num_arrivals=wgs, num_barriers=stages),
            s_full=plgpu.Barrier(num_barriers=2), s_empty=plgpu.Barrier(num_arrivals=wgs, num_barriers=2),
            **(dict(x_free=plgpu.ClusterBarrier(collective_axes=("pair",), num_barriers=stages)) if paired else {})),
        grid=(min(SMS // width, tiles),), grid_names=("sm",), num_threads=wgs + 1, thread_name="wg",
        **(dict(cluster=(2,), cluster_names=("pair",)) if paired else {}),
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True))


# --- the operation --------------------------------------------------------------------------------------------------

def _plan(n, k, m):
    """The kernel for a shape, and its schedule."""
    count = slices(n, k)
    if count == 1:
        return _wide, dict(slices=1, wgs=4, tokens=_tokens(m, 128), paired=m > 8 and n > 256)
    tiles = _narrow_tiles(n, k)
    # 64 tokens a CTA read more of them than they save in decodes where it has more than 32 rows (measured).
    for most in (32, 64) if m <= 64 and tiles <= 2 else (32,):
        tokens = _tokens(m, most)
        memory, _ = _narrow_memory(k, tokens, count, tiles)
        one_wave = -(-n // (16 * tiles)) * -(-m // tokens) <= SMS
        if (m <= 32 or one_wave) and memory in (("all", "weights", "steps") if most == 32 else ("all", "weights")):
            return _narrow, dict(slices=count, tiles=tiles, tokens=tokens)
    tokens = _tokens(m, 32)
    if m <= 32 or m <= 64 and count == 8:
        return _split, dict(slices=count, wgs=1 if n * count <= 16384 else 2, tokens=tokens)
    wgs, most = min(_TILE_TIMES, key=lambda tile: -(-(-(-n // (64 * tile[0])) * -(-m // tile[1])) // SMS) * _TILE_TIMES[tile])
    return _wide, dict(slices=count, wgs=wgs, tokens=_tokens(m, most), paired=False)


# Measured time of a tile of `_wide` by warpgroups and tokens, in some unit: tiles of sliced sums run in waves over the SMs.
_TILE_TIMES = {(1, 32): 46, (1, 64): 60, (2, 64): 92, (2, 128): 130}


def matmul(operand, row_scale, packed, scale, global_scale, *, bias=None, out_dtype=jnp.bfloat16, layer=None):
    """operand @ dequantized(packed, scale, global_scale).T * row_scale + bias, accumulated in float32.

    Args:
        operand: bf16 [M, K], K in `mosaic.permute_k` order: the activations, or their decoded codes q * s.
        row_scale: f32 [] or [M, 1], multiplies the rows of the result: the activations' global scale, or ones.
        packed, scale: uint8 [N, K/2] and float8_e4m3fn [N, K/16], as in a checkpoint. K must be a multiple of 64.
        global_scale: f32 [], multiplies.
        bias: f32 or bf16 [N], added in float32.
        out_dtype: bfloat16 or float32.
        layer: i32 []: the weights, their scales and, if it has one too, the bias have one more leading axis, of which this index
            is read in place.

    Returns:
        out_dtype [M, N]. The bits of a row depend on nothing but the row and the weights.

    Raises:
        ValueError: shapes or dtypes do not fit together. NotImplementedError: no schedule for them.
    """
    return _matmul(operand, row_scale, packed, scale, global_scale, bias, out_dtype, layer, None, False)


def _matmul(operand, row_scale, packed, scale, global_scale, bias, out_dtype, layer, plan, twin):
    stacked = layer is not None
    lead, (n, half) = packed.shape[:-2], packed.shape[-2:]
    k = 2 * half
    if len(lead) != stacked or operand.ndim != 2 or operand.shape[1] != k:
        raise ValueError(f"dense.matmul: operand {operand.shape} and packed {packed.shape} want [M, K] and "
                         f"[{'layers, ' * stacked}N, K/2]; flatten leading axes, and give `layer` for stacked weights")
    m = operand.shape[0]
    if k % 64:
        raise NotImplementedError(f"dense.matmul: K must be a multiple of 64, got K={k} of packed {packed.shape}")
    if m == 0 or n == 0:
        raise NotImplementedError(f"dense.matmul: nothing to do for M={m}, N={n}")
    if operand.dtype != jnp.bfloat16 or packed.dtype != jnp.uint8 or scale.dtype != jnp.float8_e4m3fn:
        raise ValueError(f"dense.matmul: want a bfloat16 operand, uint8 codes and float8_e4m3fn scales, got "
                         f"{operand.dtype}, {packed.dtype}, {scale.dtype}")
    if row_scale.shape not in ((), (m, 1)) or global_scale.shape != lead or (
            bias is not None and bias.shape not in ((n,), (*lead, n))):
        raise ValueError(f"dense.matmul: row_scale {row_scale.shape} wants [] or {(m, 1)}, global_scale "
                         f"{global_scale.shape} wants {lead}, bias {None if bias is None else bias.shape} {(n,)} or {(*lead, n)}")
    if jnp.dtype(out_dtype) not in (jnp.bfloat16, jnp.float32) or (
            bias is not None and bias.dtype not in (jnp.bfloat16, jnp.float32)):
        raise NotImplementedError(f"dense.matmul: out_dtype {out_dtype} and bias must be bfloat16 or float32")
    words, scales = mo.as_words(packed, scale)
    if scales.shape[-1] % 4:  # TMA wants rows of whole 16 bytes: a copy of the scales, where K is no multiple of 256
        scales = jnp.pad(scales, [(0, 0)] * (scales.ndim - 1) + [(0, -scales.shape[-1] % 4)])
    make, settings = plan or _plan(n, k, m)
    kernel = make(n, k, m, per_row=row_scale.ndim == 2, bias_dtype=None if bias is None else jnp.dtype(bias.dtype),
                  out_dtype=out_dtype, stacked=stacked, bias_stacked=bias is not None and bias.ndim == 2, twin=twin, **settings)
    float32 = lambda a: a.astype(jnp.float32).reshape(-1)
    return kernel(words, scales, operand, float32(row_scale), float32(global_scale),
                  float32(global_scale) if bias is None else bias.reshape(-1) if not twin else bias,
                  jnp.zeros(1, jnp.int32) if layer is None else layer.astype(jnp.int32).reshape(1))
