"""Tokens to experts and back, around the grouped matmuls: sort, gather, weighted combine. Deterministic, no host sync.

    routing = route(expert_ids, num_experts, valid)
    rows = x[routing.token_of_row]                  # [T*k, H], sorted by expert: what the grouped matmuls read
    y = combine(grouped matmuls of rows, routing, weights)

`route` is one launch of one CTA, a stable counting sort: each warp counts its stretch of slots by expert, the counts of
(expert, warp) are added up in that order, each warp places its slots. `combine` adds a token's k rows in slot order. No
atomics: the order of every sum and of every row follows from the inputs. `route_xla` and `combine_xla` are the same in
plain jnp, for any device, and the tests' reference.
"""
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nvfp4jax.kernels import mosaic as mg

WARP = 32


class Routing(NamedTuple):
    """token_of_row i32 [T*k]: the token whose slot each sorted row is; row_of_slot i32 [T, k]: its inverse, -1 for tokens
    that are not valid; group_sizes i32 [E]: rows of each expert. Rows past sum(group_sizes) belong to no expert."""

    token_of_row: jax.Array
    row_of_slot: jax.Array
    group_sizes: jax.Array


def _check_route(expert_ids, valid):
    if expert_ids.ndim != 2 or expert_ids.dtype != jnp.int32:
        raise ValueError(f"route: expert_ids must be i32 [T, k], got {expert_ids.dtype}{expert_ids.shape}")
    if valid is not None and valid.shape != expert_ids.shape[:1]:
        raise ValueError(f"route: valid has shape {valid.shape}; expert_ids of shape {expert_ids.shape} wants {expert_ids.shape[:1]}")


def _check_combine(rows, routing, weights):
    if rows.ndim != 2 or rows.shape[0] != weights.size or routing.row_of_slot.shape != weights.shape:
        raise ValueError(f"combine: rows {rows.shape}, weights {weights.shape} and routing of {routing.row_of_slot.shape} do not match: "
                         "want [T*k, H], [T, k], [T, k]")


# --- plain jnp -------------------------------------------------------------------------------------------------------

def route_xla(expert_ids, num_experts: int, valid=None) -> Routing:
    """`route` in plain jnp."""
    _check_route(expert_ids, valid)
    tokens, k = expert_ids.shape
    known = (expert_ids >= 0) & (expert_ids < num_experts)
    known = known if valid is None else known & valid[:, None]
    ids = jnp.where(known, expert_ids, jnp.int32(num_experts)).reshape(-1)
    order = jnp.argsort(ids, stable=True).astype(jnp.int32)
    row_of_slot = jnp.zeros_like(order).at[order].set(jnp.arange(tokens * k, dtype=jnp.int32)).reshape(tokens, k)
    sizes = jnp.bincount(ids, length=num_experts + 1)[:num_experts].astype(jnp.int32)
    return Routing(order // jnp.int32(k), jnp.where(known, row_of_slot, jnp.int32(-1)), sizes)


def combine_xla(rows, routing: Routing, weights, *, out_dtype=jnp.bfloat16):
    """`combine` in plain jnp."""
    _check_combine(rows, routing, weights)
    total = jnp.zeros((weights.shape[0], rows.shape[1]), jnp.float32)
    for j in range(weights.shape[1]):
        row = routing.row_of_slot[:, j, None]
        product = rows[jnp.maximum(row[:, 0], jnp.int32(0))].astype(jnp.float32) * weights[:, j, None].astype(jnp.float32)
        total = jnp.where(row >= 0, total + product, total)
    return total.astype(out_dtype)


# --- the sort --------------------------------------------------------------------------------------------------------

# Lanes with this lane's key: their number, how many lie below this lane.
MATCH = "{.reg .b32 m,l; match.any.sync.b32 m,$2,-1; popc.b32 $0,m; mov.u32 l,%lanemask_lt; and.b32 m,m,l; popc.b32 $1,m;}"
# The inclusive sum over lower lanes.
SCAN_STEP = "{{.reg .b32 o; .reg .pred p; shfl.sync.up.b32 o|p,$1,{step},0,-1; mov.b32 $0,$1; @p add.u32 $0,$0,o;}}"


def _sort_program(refs, n, k, experts, warps, masked):
    """One thread's program. Bucket `experts` takes slots of no expert, one more those past the end."""
    asm, add, mul, div, rem = mg.asm, mg.add, mg.mul, mg.div, mg.rem
    threads, buckets = warps * WARP, experts + 2
    tid = mg.thread_index()
    lane, warp = rem(tid, WARP), div(tid, WARP)
    counts = mg.smem_address(refs["shared"])  # [warps, buckets], then the sums of 32 buckets each
    chunk_sums = add(counts, 4 * warps * buckets)
    steps = -(-n // threads)  # of 32 slots, each warp

    def synchronize():
        asm("bar.sync 0;", outputs="")

    def slot_of(step):
        return add(mul(add(mul(warp, steps), step), WARP), lane)

    def bucket_of(slot):
        """The expert of a slot, loaded."""
        here = mg.flag("lt", slot, n)
        bucket, = mg.load_global(mg.gmem_element(refs["expert_ids"], slot, 1, mg.i32(0), 4), 1, here)
        bucket = mg.minimum(bucket, experts)  # unsigned: negative ids too
        if masked:
            valid, = mg.load_global(mg.gmem_element(refs["valid"], div(slot, k), 1, mg.i32(0), 1), 1, here, form="u8")
            bucket = mg.select(valid, bucket, experts)
        return mg.select(here, bucket, experts + 1)

    def walk(visit):
        """visit(slot, bucket, place) for this warp's slots in order; place: the running count of the bucket, before it."""
        def body(step, bucket):
            following = bucket_of(slot_of(add(step, 1)))
            count, below = asm(MATCH, [bucket], "rr")
            address = add(counts, mul(add(mul(warp, buckets), bucket), 4))
            base = asm("ld.shared.b32 $0,[$1];", [address])
            asm("bar.warp.sync -1;", outputs="")
            mg.branch(mg.flag("eq", below, 0), lambda: asm("st.shared.b32 [$0],$1;", [address, add(base, count)], ""))
            asm("bar.warp.sync -1;", outputs="")
            if visit is not None:
                visit(slot_of(step), bucket, add(base, below))
            return [following]

        mg.loop(0, steps, 1, [bucket_of(slot_of(mg.i32(0)))], body)

    def clear(i, *_):
        asm("st.shared.b32 [$0],$1;", [add(counts, mul(i, 4)), mg.i32(0)], "")
        return []

    mg.loop(tid, warps * buckets, threads, [], clear)
    synchronize()
    walk(None)
    synchronize()

    own = []  # this thread's buckets: (bucket, whether it exists, its count, the count of lower buckets of its 32)
    for first in range(0, buckets, threads):
        bucket = add(tid, first)
        exists = mg.flag("lt", bucket, buckets)
        column = add(counts, mul(mg.minimum(bucket, buckets - 1), 4))
        total = mg.i32(0)
        for w in range(warps):  # counts become sums over lower warps
            count = asm("ld.shared.b32 $0,[$1];", [add(column, 4 * w * buckets)])
            store = "{.reg .pred p; setp.ne.u32 p,$2,0; @p st.shared.b32 [$0],$1;}"
            asm(store, [add(column, 4 * w * buckets), total, exists], "")
            total = add(total, count)
        total = mul(total, exists)
        through = total
        for step in (1, 2, 4, 8, 16):
            through = asm(SCAN_STEP.format(step=step), [through])
        last = mg.flag("eq", lane, WARP - 1)
        mg.branch(last, lambda: asm("st.shared.b32 [$0],$1;", [add(chunk_sums, mul(add(warp, first // WARP), 4)), through], ""))
        here = mg.flag("lt", bucket, experts)
        mg.store_global(mg.gmem_element(refs["group_sizes"], bucket, 1, mg.i32(0), 4), [total], here)
        own.append((bucket, exists, mg.sub(through, total)))
    synchronize()
    for bucket, exists, before in own:
        def add_lower(i, so_far):
            return [add(so_far, asm("ld.shared.b32 $0,[$1];", [add(chunk_sums, mul(i, 4))]))]

        before, = mg.loop(0, div(bucket, WARP), 1, [before], add_lower)
        def shift():
            for w in range(warps):
                address = add(counts, mul(add(bucket, w * buckets), 4))
                asm("st.shared.b32 [$0],$1;", [address, add(asm("ld.shared.b32 $0,[$1];", [address]), before)], "")
        mg.branch(exists, shift)
    synchronize()

    def place(slot, bucket, row):
        here = mg.flag("lt", slot, n)
        known = mg.flag("lt", bucket, experts)
        mg.store_global(mg.gmem_element(refs["row_of_slot"], slot, 1, mg.i32(0), 4), [mg.select(known, row, -1)], here)
        mg.store_global(mg.gmem_element(refs["token_of_row"], row, 1, mg.i32(0), 4), [div(slot, k)], here)

    walk(place)


def route(expert_ids, num_experts: int, valid=None) -> Routing:
    """Sorts the slots of the tokens by expert, stably, in one launch.

    expert_ids: i32 [T, k]; an id outside 0..num_experts-1 counts as no expert. valid: bool [T]; slots of tokens that are
    not valid count in no group, and their rows come last. NotImplementedError where the counts do not fit the shared memory.
    """
    _check_route(expert_ids, valid)
    tokens, k = expert_ids.shape
    n = tokens * k
    if n == 0:
        return Routing(jnp.zeros(0, jnp.int32), jnp.zeros((tokens, k), jnp.int32), jnp.zeros(num_experts, jnp.int32))
    warps = min(32, max(4, 1 << (-(-n // WARP) - 1).bit_length()))
    words = warps * (num_experts + 2) + -(-(num_experts + 2) // (warps * WARP)) * warps
    if 4 * words > mg.SHARED_MEMORY:
        raise NotImplementedError(f"route: the counts of {num_experts} experts do not fit the shared memory; use route_xla")
    outputs, masked = dict(token_of_row=(n,), row_of_slot=(tokens, k), group_sizes=(num_experts,)), valid is not None
    names = ["expert_ids", *(["valid"] if masked else []), *outputs, "shared"]
    call = mg.thread_kernel(
        lambda refs: _sort_program(refs, n, k, num_experts, warps, masked), names,
        [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in outputs.values()], grid=1, warps=warps, shared_words=words)
    return Routing(*call(expert_ids, *([valid] if masked else [])))


# --- the combine -----------------------------------------------------------------------------------------------------

PLUS_PRODUCT = "{.reg .b32 p; mul.rn.f32 p,$2,$3; add.rn.f32 $0,$1,p;}"  # not contracted: the same on every backend


def _combine_program(refs, tokens, hidden, k, single, single_out, weight_single, warps):
    """One thread's program: 8 neighbouring elements of one token."""
    asm, add, mul = mg.asm, mg.add, mg.mul
    chunks = hidden // 8
    index = add(mul(asm("mov.u32 $0,%ctaid.x;"), warps * WARP), mg.thread_index())
    here = mg.flag("lt", index, tokens * chunks)
    token, column = mg.div(index, chunks), mul(mg.rem(index, chunks), 8)
    slot = mul(token, k)
    loaded = []
    for j in range(k):
        row, = mg.load_global(mg.gmem_element(refs["row_of_slot"], add(slot, j), 1, mg.i32(0), 4), 1, here)
        weight, = mg.load_global(mg.gmem_element(refs["weights"], add(slot, j), 1, mg.i32(0), 4 if weight_single else 2), 1, here,
                                 form="b32" if weight_single else "u16")
        if not weight_single:
            weight = asm("shl.b32 $0,$1,16;", [weight], effects=False)
        taken = mg.bit_and(here, asm("{.reg .pred p; setp.ge.s32 p,$1,0; selp.b32 $0,1,0,p;}", [row], effects=False))
        words = mg.load_global(mg.gmem_element(refs["rows"], row, hidden, column, 4 if single else 2), 8 if single else 4, taken)
        loaded.append((taken, weight, words))
    sums = [mg.i32(0)] * 8
    for taken, weight, words in loaded:
        if not single:
            words = [asm(text, [w], effects=False) for w in words for text in ("shl.b32 $0,$1,16;", "and.b32 $0,$1,0xFFFF0000;")]
        weight = mg.select(taken, weight, 0)  # a row of no expert may hold anything; its weight may too
        sums = [asm(PLUS_PRODUCT, [s, w, weight], effects=False) for s, w in zip(sums, words)]
    address = mg.gmem_element(refs["out"], token, hidden, column, 4 if single_out else 2)
    if single_out:
        for i in (0, 4):
            mg.store_global(mg.offset_address(address, 4 * i), sums[i:i + 4], here)
    else:
        pairs = [asm("cvt.rn.bf16x2.f32 $0,$2,$1;", sums[i:i + 2], effects=False) for i in (0, 2, 4, 6)]
        mg.store_global(address, pairs, here)


def combine(rows, routing: Routing, weights, *, out_dtype=jnp.bfloat16):
    """out[t] = sum over j, in order, of weights[t, j] * rows[row_of_slot[t, j]], in float32 with separate roundings.

    rows: bfloat16 or float32 [T*k, H], H a multiple of 8; weights: bfloat16 or float32 [T, k]. Slots of no expert add
    nothing, whatever their rows hold; a token that is not valid gets zeros. -> out_dtype (bfloat16 or float32) [T, H].
    """
    _check_combine(rows, routing, weights)
    (tokens, k), hidden, dtypes = weights.shape, rows.shape[1], (jnp.bfloat16, jnp.float32)
    if hidden % 8 or rows.dtype not in dtypes or weights.dtype not in dtypes or out_dtype not in dtypes:
        raise NotImplementedError(f"combine: rows {rows.dtype}{rows.shape}, weights {weights.dtype}, out {jnp.dtype(out_dtype)}: H must "
                                  "be a multiple of 8, dtypes bfloat16 or float32; use combine_xla")
    if tokens == 0:
        return jnp.zeros((0, hidden), out_dtype)
    warps, single, single_out, weight_single = 4, *(d == jnp.float32 for d in (rows.dtype, out_dtype, weights.dtype))
    call = mg.thread_kernel(
        lambda refs: _combine_program(refs, tokens, hidden, k, single, single_out, weight_single, warps),
        ["rows", "row_of_slot", "weights", "out"], [jax.ShapeDtypeStruct((tokens, hidden), out_dtype)],
        grid=-(-tokens * hidden // 8 // (warps * WARP)), warps=warps)
    return call(rows, routing.row_of_slot, weights)[0]
