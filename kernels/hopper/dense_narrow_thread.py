"""`dense_narrow`, one thread's part: where its data lie, decode and mma.sync of a 64-chunk or of a step of 256, the sums' way out."""
import dataclasses

import jax
import numpy as np

from nvfp4jax.kernels.hopper.decode import SCALE_PAIR, SELECTOR, decode_codes
from nvfp4jax.kernels.hopper.dense_product import CHUNK, SCALE_STEPS, STEP, finish_tile, pitch
from nvfp4jax.kernels.hopper.machine import WARP
from nvfp4jax.kernels.hopper.mosaic import asm, load_shared, settled, smem_address, thread_index

CHUNKS = STEP // CHUNK
_MMA = ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{$0,$1,$2,$3},{$4,$5,$6,$7},{$8,$9},{$10,$11,$12,$13};")


@dataclasses.dataclass(frozen=True)
class Addresses:
    """Of a thread, i32 [128] each, computed before the data arrive: its sums, the codes of fragment rows r and r + 8 (weight rows 2 r
    and 2 r + 1), the tokens of k16 steps 0 1 and 2 3 of a chunk, and the scales, of each round where all lie in memory."""

    sums: jax.Array
    codes: tuple[jax.Array, ...]
    tokens: tuple[jax.Array, ...]
    scales: tuple[jax.Array, ...]


def place(tiles):
    """Of this thread: its lane, row of quads and place in its quad, and its warp's 16-row tile and slice."""
    tid = thread_index()
    lane, warp = tid % WARP, tid // WARP
    return lane, lane // 4, lane % 4, warp % tiles, warp // tiles


def addresses(w_sm, s_sm, x_sm, partial, *, c):
    lane, r, quad, tile, p = place(c.tiles)
    row = tile * 16 + r * 2
    out = [smem_address(partial, ((p * c.tokens + quad * 2) * pitch(c.rows) + row) * 4)]
    for h in range(2):
        phase = r * 2 + h & 7
        line = (p * c.rows + row) * 128 + 128 * h
        out.append(smem_address(w_sm, line + ((quad // 2 ^ phase) * 16 + quad % 2 * 8)))
    t, matrix = lane % 8, lane // 8
    for half in range(2):
        unit = matrix + 4 * half ^ t
        out.append(smem_address(x_sm, p * c.slice_bytes + (t * 128 + unit * 16)))
    if not c.resident:
        return *out, smem_address(s_sm, (p * c.rows + row) * 16)
    for i in range(c.rounds):
        step = p * c.rounds + i
        unit = step % SCALE_STEPS ^ row % 8
        line = step // SCALE_STEPS * c.rows + row
        out.append(smem_address(s_sm, line * 128 + unit * 16))
    return out


def _decode(u, w0, w1, w_at, s0, s1):
    """A 64-chunk of a step -> for each of four k16 steps the operand of mma: rows r and r + 8 in turn."""
    selector = asm(SELECTOR, [thread_index() % 4], effects=False)
    factors = asm(SCALE_PAIR, [s0, s1, selector], "rr", effects=False)
    words = [[decode_codes(word, factor) for word in load_shared(base ^ 32 * u, w_at, 2)] for base, factor in zip((w0, w1), factors)]
    return [[words[0][0][q], words[1][0][q], words[0][1][q], words[1][1][q]] for q in range(4)]


def _load_tokens(address, offset):
    """8 tokens of two k16 steps."""
    return asm(f"ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{$0,$1,$2,$3}},[$4+{offset}];", [address], "rrrr")


def _mma(left, right, sums):
    return asm(_MMA, [*left, *right, *sums], "ffff", effects=False)


def decode_chunk(*addresses, u, w_at):
    w0, w1, scale_at = settled(addresses)
    (s0,), (s1,) = load_shared(scale_at, 4 * u, 1), load_shared(scale_at ^ 16, 128 + 4 * u, 1)
    return [v for step in _decode(u, w0, w1, w_at, s0, s1) for v in step]


def add_chunk(acc, *registers, x_at):
    x0, x1, *left = settled(registers)
    sums = [settled(pair.reshape(-1)) for pair in acc]
    for half, address in enumerate((x0, x1)):  # half of the tokens' registers at a time
        right = [_load_tokens(address, x_at + j * 1024) for j in range(len(acc))]
        for q in range(2):
            for j in range(len(acc)):
                sums[j] = _mma(left[8 * half + 4 * q:][:4], right[j][2 * q:][:2], sums[j])
    return np.array(sums, object).reshape(acc.shape)


def add_round(acc, stage, *addresses, c, i):
    w0, w1, x0, x1, scale_at = settled(addresses)
    w_at, x_at = (i * c.slices * c.rows * 128, i * c.slices * c.slice_bytes) if c.resident else (0, 0)
    if not c.resident:
        w0, w1 = (v + stage * (c.slices * c.rows * 128) for v in (w0, w1))
        x0, x1 = (v + stage * (c.slices * c.slice_bytes) for v in (x0, x1))
        scale_at = scale_at + stage * (c.slices * c.rows * 16)
    # rows r and r + 8 are neighbours: their scales' units differ in the lowest bit of the swizzle
    s0 = load_shared(scale_at, 0, 4)
    s1 = load_shared(scale_at ^ 16, 128, 4) if c.resident else load_shared(scale_at, 16, 4)
    sums = [settled(pair.reshape(-1)) for pair in acc]
    chunk_bytes, group_bytes = (1024, CHUNKS * 1024) if c.x_tiled else (c.tokens * 128, 1024)
    for u in range(CHUNKS):
        right = [[_load_tokens(v, x_at + u * chunk_bytes + j * group_bytes) for v in (x0, x1)] for j in range(len(acc))]
        left = _decode(u, w0, w1, w_at, s0[u], s1[u])
        for q in range(4):
            for j in range(len(acc)):
                sums[j] = _mma(left[q], right[j][q // 2][2 * (q % 2):][:2], sums[j])
    return np.array(sums, object).reshape(acc.shape)


def put_sums(acc, address, _, *, rows):
    for j, e in np.ndindex(len(acc), 2):
        asm(f"st.shared.v2.f32 [$0+{(8 * j + e) * pitch(rows) * 4}],{{$1,$2}};", [address, *acc[j, :, e]], "")


def finish(first_token, first, residual, out, partial, *factors, tile, slices):
    floats = pitch(tile.rows)
    finish_tile(tile, lambda token, row: smem_address(partial, (token * floats + row) * 4),
                [p * tile.tokens * floats * 4 for p in range(slices)], factors, first_token, first, residual, out)
