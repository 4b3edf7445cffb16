"""Tokens to experts and back, around the grouped matmuls: the router's choice, sort, weighted combine. Deterministic, no host sync.

    weights, expert_ids = top_k_experts(logits, k, normalize=True)
    routing = route(expert_ids, num_experts, valid)
    rows = x[routing.token_of_row]                  # [T*k, H], sorted by expert: what the grouped matmuls read
    y = combine(grouped matmuls of rows, routing, weights)

`top_k_experts` gives a token to a warp, which finds one maximum after another. `route` is one launch of a CTA, or of one cluster
where a CTA's lanes are fewer than the slots: a stable counting sort. Each warp counts its stretch of slots by expert, the counts
of (expert, CTA, warp) are added up in that order, each warp places its slots. `combine` adds a token's k rows in slot order. No
atomics: the order of every sum and of every row follows from the inputs. `nvfp4jax.routing` is the same in plain jnp.
"""
import math

import jax
import jax.numpy as jnp

from nvfp4jax.kernels.hopper import _old as mg
from nvfp4jax.routing import Routing, check_combine, check_route, check_top_k

WARP = 32
MAX_EXPERTS = 1024  # of top_k_experts: 32 logits a lane


# --- the router's choice ---------------------------------------------------------------------------------------------

# Float32 bits that order like the numbers, as unsigned integers: -0 as +0, NaN above all; and back.
KEY = ("{.reg .pred p; .reg .b32 x,a; add.rn.f32 x,$1,0f00000000; and.b32 a,x,0x7FFFFFFF; shr.s32 $0,x,31; or.b32 $0,$0,0x80000000;"
       "xor.b32 $0,$0,x; setp.gt.u32 p,a,0x7F800000; selp.b32 $0,-1,$0,p;}")
VALUE = "{.reg .b32 m; not.b32 m,$1; shr.s32 m,m,31; or.b32 m,m,0x80000000; xor.b32 $0,$1,m;}"
# exp($1 - $2) for $1 <= $2: the product with log2(e) in two parts, the second put back to first order.
EXP = ("{.reg .b32 d,h,l; sub.rn.f32 d,$1,$2; max.f32 d,d,0fC3480000; mul.rn.f32 h,d,0f3FB8AA3B; neg.f32 l,h; fma.rn.f32 l,d,0f3FB8AA3B,l;"
       "fma.rn.f32 l,d,0f32A57060,l; mul.rn.f32 l,l,0f3F317218; ex2.approx.ftz.f32 h,h; fma.rn.f32 $0,h,l,h;}")
SUM_STEP = "{{.reg .b32 o; shfl.sync.bfly.b32 o,$1,{step},31,-1; add.rn.f32 $0,$1,o;}}"


def _top_k_program(refs, tokens, experts, k, normalize, warps):
    """One thread's program: a warp a token, a lane owning logits lane, lane + 32, ..."""
    asm, add, pure = mg.asm, mg.add, dict(effects=False)
    lane, warp = mg.rem(mg.thread_index(), WARP), mg.div(mg.thread_index(), WARP)
    token = add(mg.mul(asm("mov.u32 $0,%ctaid.x;"), warps), warp)
    here = mg.flag("lt", token, tokens)

    def maximum(values):
        out = values[0]
        for v in values[1:]:
            out = asm("max.u32 $0,$1,$2;", [out, v], **pure)
        return asm("redux.sync.max.u32 $0,$1,-1;", [out])

    def total(value):
        for step in (1, 2, 4, 8, 16):
            value = asm(SUM_STEP.format(step=step), [value])
        return value

    index = [add(lane, j) for j in range(0, experts, WARP)]
    inside = [mg.bit_and(here, mg.flag("lt", i, experts)) for i in index]
    logits = [mg.load_global(mg.gmem_element(refs["logits"], token, experts, i, 4), 1, ok)[0] for i, ok in zip(index, inside)]
    keys = [mg.select(ok, asm(KEY, [x], **pure), 0) for x, ok in zip(logits, inside)]
    best = maximum(keys)
    finite = mg.bit_and(mg.flag("lt", 0x007FFFFF, best), mg.flag("lt", best, 0xFF800000))
    largest = asm(VALUE, [best], **pure)
    sums = mg.i32(0)
    for x, ok in zip(logits, inside):
        sums = asm("add.rn.f32 $0,$1,$2;", [sums, mg.select(ok, asm(EXP, [x, largest], **pure), 0)], **pure)
    sums = total(sums)
    keys = [mg.select(finite, key, ok) for key, ok in zip(keys, inside)]  # else all are equal, and the first k chosen
    best = mg.select(finite, best, 1)
    own_key, own_id = best, mg.i32(0)  # of slot `lane`
    for slot in range(k):
        if slot:
            best = maximum(keys)
        chosen = mg.i32(0x7FFFFFFF)
        for key, i in reversed(list(zip(keys, index))):
            chosen = mg.select(mg.flag("eq", key, best), i, chosen)
        chosen = asm("redux.sync.min.u32 $0,$1,-1;", [chosen])
        keys = [mg.select(mg.flag("eq", i, chosen), 0, key) for key, i in zip(keys, index)]
        mine = mg.flag("eq", lane, slot)
        own_key, own_id = mg.select(mine, best, own_key), mg.select(mine, chosen, own_id)
    weight = asm("div.rn.f32 $0,$1,$2;", [asm(EXP, [asm(VALUE, [own_key], **pure), largest], **pure), sums], **pure)
    mine = mg.flag("lt", lane, k)
    if normalize:
        weight = asm("div.rn.f32 $0,$1,$2;", [weight, total(mg.select(mine, weight, 0))], **pure)
    weight = mg.select(finite, weight, 0x7FC00000)
    mine = mg.bit_and(here, mine)
    for name, value in (("weights", weight), ("ids", own_id)):
        mg.store_global(mg.gmem_element(refs[name], token, k, lane, 4), [value], mine)


def top_k_experts(logits, k: int, *, normalize: bool):
    """The k likeliest experts of each token and their probabilities, in one launch, in place of softmax, top_k and a division.

    logits: float32 [..., E]. -> weights f32 [..., k], the softmax over all experts (normalize: divided by its sum over the k), in
    falling order; ids i32 [..., k]. Of equal logits the lower id comes first; where the probabilities of unequal logits round to the
    same float32, the order is that of the logits. A token whose largest logit is NaN or infinite has NaN weights and ids
    0 .. k-1. NotImplementedError for k > 32 or E > 1024.
    """
    check_top_k(logits, k)
    *lead, experts = logits.shape
    tokens = math.prod(lead)
    if k > WARP or experts > MAX_EXPERTS:
        raise NotImplementedError(f"top_k_experts: {k} of {experts} experts; at most {WARP} of {MAX_EXPERTS}; use top_k_experts_xla")
    if tokens == 0:
        return jnp.zeros((*lead, k), jnp.float32), jnp.zeros((*lead, k), jnp.int32)
    warps = 4
    call = mg.thread_kernel(
        lambda refs: _top_k_program(refs, tokens, experts, k, normalize, warps), ["logits", "weights", "ids"],
        [jax.ShapeDtypeStruct((tokens, k), dtype) for dtype in (jnp.float32, jnp.int32)], grid=-(-tokens // warps), warps=warps)
    return tuple(out.reshape(*lead, k) for out in call(logits.reshape(tokens, experts)))


# --- the sort --------------------------------------------------------------------------------------------------------

# The inclusive sum over lower lanes.
SCAN_STEP = "{{.reg .b32 o; .reg .pred p; shfl.sync.up.b32 o|p,$1,{step},0,-1; mov.b32 $0,$1; @p add.u32 $0,$0,o;}}"
LOAD_SHARED, STORE_SHARED = "ld.shared.b32 $0,[$1];", "st.shared.b32 [$0],$1;"
CLUSTER = 16  # CTAs: the largest cluster that Hopper has
ONE_CTA = 16  # warps that one CTA takes; more slots go to a cluster


def _match_text(keys):
    """Lanes whose key $2 (below `keys`) is this lane's: their number, how many lie below this lane. A vote a bit of the
    key: match.any takes 7 times as long. A lane's own bit comes in as a mask: predicates are few."""
    text = "{.reg .pred p; .reg .b32 m,v,o,l; mov.b32 m,-1;"
    for bit in range((keys - 1).bit_length()):
        text += (f"shl.b32 o,$2,{31 - bit}; shr.s32 o,o,31; setp.ne.u32 p,o,0; vote.sync.ballot.b32 v,p,-1;"
                 "xor.b32 v,v,o; not.b32 v,v; and.b32 m,m,v;")
    return text + "popc.b32 $0,m; mov.u32 l,%lanemask_lt; and.b32 m,m,l; popc.b32 $1,m;}"


def _of_cluster_text(cluster):
    """Shared memory address $2, this CTA's rank $3 -> the sum of that word over all CTAs of the cluster; over those of lower rank.

    Masks, not comparisons: predicates are few."""
    words = [f"v{i}" for i in range(cluster)]
    text = "{.reg .b32 a,m," + ",".join(words) + "; mov.b32 $0,0; mov.b32 $1,0;"
    text += "".join(f"mapa.shared::cluster.u32 a,$2,{i}; ld.shared::cluster.b32 {v},[a];" for i, v in enumerate(words))
    text += "".join(f"add.u32 $0,$0,{v}; sub.s32 m,{i},$3; shr.s32 m,m,31; and.b32 {v},{v},m; add.u32 $1,$1,{v};" for i, v in enumerate(words))
    return text + "}"


def _sort_program(refs, n, k, experts, warps, cluster, masked):
    """One thread's program. Bucket `experts` takes slots of no expert, one more those past the end."""
    asm, add, mul, div, rem = mg.asm, mg.add, mg.mul, mg.div, mg.rem
    threads, buckets = warps * WARP, experts + 2
    tid = mg.thread_index()
    lane, warp = rem(tid, WARP), div(tid, WARP)
    rank = asm("mov.u32 $0,%cluster_ctarank;") if cluster > 1 else mg.i32(0)
    counts, totals, starts, chunk_sums = (add(mg.smem_address(refs["shared"]), 4 * o) for o in _sort_offsets(experts, warps)[:4])
    steps = -(-n // (threads * cluster))  # of 32 slots, each warp
    match = _match_text(buckets)

    def synchronize():
        asm("bar.sync 0;", outputs="")

    def slot_of(step):
        return add(mul(add(mul(add(mul(rank, warps), warp), steps), step), WARP), lane)

    def bucket_of(slot):
        """The expert of a slot, loaded."""
        here = mg.flag("lt", slot, n)
        bucket, = mg.load_global(mg.gmem_element(refs["expert_ids"], slot, 1, mg.i32(0), 4), 1, here)
        bucket = mg.minimum(bucket, experts)  # unsigned: negative ids too
        if masked:
            valid, = mg.load_global(mg.gmem_element(refs["valid"], div(slot, k), 1, mg.i32(0), 1), 1, here, form="u8")
            bucket = mg.select(valid, bucket, experts)
        return mg.select(here, bucket, experts + 1)

    opening = bucket_of(slot_of(mg.i32(0)))
    once = asm(match, [opening], "rr") if steps == 1 else None  # one step: both walks share the match

    def walk(visit=None):
        """visit(slot, bucket, place) for this warp's slots in order; place: the running count of the bucket, before it."""
        def body(step, bucket):
            following = bucket_of(slot_of(add(step, 1))) if once is None else bucket
            count, below = once or asm(match, [bucket], "rr")
            address = add(counts, mul(add(mul(warp, buckets), bucket), 4))
            base = asm(LOAD_SHARED, [address])
            if once is None or visit is None:
                asm("bar.warp.sync -1;", outputs="")
                mg.store_shared(address, [add(base, count)], mg.flag("eq", below, 0))
                asm("bar.warp.sync -1;", outputs="")
            if visit is not None:
                visit(slot_of(step), bucket, add(base, below))
            return [following]

        if once is None:
            mg.loop(0, steps, 1, [opening], body)
        else:
            body(mg.i32(0), opening)

    def clear(i):
        asm(STORE_SHARED, [add(counts, mul(add(mul(warp, buckets), i), 4)), mg.i32(0)], "")
        return []

    mg.loop(lane, buckets, WARP, [], clear)
    asm("bar.warp.sync -1;", outputs="")
    walk()
    synchronize()

    own = []  # this thread's buckets: (bucket, its address offset, whether it exists, its count in this CTA)
    for first in range(0, buckets, threads):
        bucket = add(tid, first)
        exists = mg.flag("lt", bucket, buckets)
        offset = mul(mg.minimum(bucket, buckets - 1), 4)
        column = add(counts, offset)
        found = [asm(LOAD_SHARED, [add(column, 4 * w * buckets)]) for w in range(warps)]
        total = mg.i32(0)
        for w, count in enumerate(found):  # counts become sums over lower warps
            mg.store_shared(add(column, 4 * w * buckets), [total], exists)
            total = add(total, count)
        total = mul(total, exists)
        if cluster > 1:
            mg.store_shared(add(totals, offset), [total], exists)
        own.append((bucket, offset, exists, total))

    if cluster > 1:  # what the CTAs of lower ranks have of a bucket, and all of them
        asm("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;", outputs="")
        for i, (bucket, offset, exists, _) in enumerate(own):
            total, lower = asm(_of_cluster_text(cluster), [add(totals, offset), rank], "rr")
            own[i] = bucket, offset, exists, mul(total, exists), lower
        asm("barrier.cluster.arrive.release.aligned;", outputs="")  # nobody reads this CTA's totals from here on
    else:
        own = [(*o, mg.i32(0)) for o in own]

    before = []  # the count of lower buckets of the same 32
    for first, (bucket, _, _, total, _) in zip(range(0, buckets, threads), own):
        through = total
        for step in (1, 2, 4, 8, 16):
            through = asm(SCAN_STEP.format(step=step), [through])
        mg.store_shared(add(chunk_sums, mul(add(warp, first // WARP), 4)), [through], mg.flag("eq", lane, WARP - 1))
        here = mg.bit_and(mg.flag("lt", bucket, experts), mg.flag("eq", rank, 0))
        mg.store_global(mg.gmem_element(refs["group_sizes"], bucket, 1, mg.i32(0), 4), [total], here)
        before.append(mg.sub(through, total))
    synchronize()
    for so_far, (bucket, offset, exists, _, lower) in zip(before, own):
        def add_lower(i, so_far):
            return [add(so_far, asm(LOAD_SHARED, [add(chunk_sums, mul(i, 4))]))]

        so_far, = mg.loop(0, div(bucket, WARP), 1, [so_far], add_lower)
        mg.store_shared(add(starts, offset), [add(so_far, lower)], exists)
    synchronize()

    def place(slot, bucket, row):
        here = mg.flag("lt", slot, n)
        known = mg.flag("lt", bucket, experts)
        row = add(row, asm(LOAD_SHARED, [add(starts, mul(bucket, 4))]))
        mg.store_global(mg.gmem_element(refs["row_of_slot"], slot, 1, mg.i32(0), 4), [mg.select(known, row, -1)], here)
        mg.store_global(mg.gmem_element(refs["token_of_row"], row, 1, mg.i32(0), 4), [div(slot, k)], here)

    walk(place)
    if cluster > 1:
        asm("barrier.cluster.wait.aligned;", outputs="")  # the others may still read this CTA's totals


def _sort_offsets(experts, warps):
    """Word offsets in shared memory of: counts [warps, buckets], the CTA's totals, each bucket's first row, sums of 32
    buckets each; the total."""
    buckets, offsets = experts + 2, [0]
    for size in (warps * buckets, buckets, buckets, -(-buckets // (warps * WARP)) * warps):
        offsets.append(offsets[-1] + size)
    return offsets


def _sort_plan(n):
    """(warps, CTAs of the one cluster) for n slots: one CTA, where a slot a lane fits it; else a cluster."""
    warps = 1 << (-(-n // WARP) - 1).bit_length()
    if warps <= ONE_CTA:
        return max(4, warps), 1
    return min(16, max(4, warps // CLUSTER // 2)), CLUSTER  # two steps before more warps, which start later


def route(expert_ids, num_experts: int, valid=None) -> Routing:
    """Sorts the slots of the tokens by expert, stably, in one launch.

    expert_ids: i32 [T, k]; an id outside 0..num_experts-1 counts as no expert. valid: bool [T]; slots of tokens that are
    not valid count in no group, and their rows come last. NotImplementedError where the counts do not fit the shared memory.
    """
    check_route(expert_ids, valid)
    tokens, k = expert_ids.shape
    n = tokens * k
    if n == 0:
        return Routing(jnp.zeros(0, jnp.int32), jnp.zeros((tokens, k), jnp.int32), jnp.zeros(num_experts, jnp.int32))
    warps, cluster = _sort_plan(n)
    words = _sort_offsets(num_experts, warps)[-1]
    if 4 * words > mg.SHARED_MEMORY:
        raise NotImplementedError(f"route: the counts of {num_experts} experts do not fit the shared memory; use route_xla")
    outputs, masked = dict(token_of_row=(n,), row_of_slot=(tokens, k), group_sizes=(num_experts,)), valid is not None
    names = ["expert_ids", *(["valid"] if masked else []), *outputs, "shared"]
    call = mg.thread_kernel(
        lambda refs: _sort_program(refs, n, k, num_experts, warps, cluster, masked), names,
        [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in outputs.values()], grid=cluster, warps=warps, cluster=cluster,
        shared_words=words)
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
    check_combine(rows, routing, weights)
    (tokens, k), hidden, dtypes = weights.shape, rows.shape[1], (jnp.bfloat16, jnp.float32)
    if hidden % 8 or rows.dtype not in dtypes or weights.dtype not in dtypes or out_dtype not in dtypes:
        raise NotImplementedError(f"combine: rows {rows.dtype}{rows.shape}, weights {weights.dtype}, out {jnp.dtype(out_dtype)}: H must "
                                  "be a multiple of 8, dtypes bfloat16 or float32; use nvfp4jax.routing.combine")
    if tokens == 0:
        return jnp.zeros((0, hidden), out_dtype)
    warps, single, single_out, weight_single = 4, *(d == jnp.float32 for d in (rows.dtype, out_dtype, weights.dtype))
    call = mg.thread_kernel(
        lambda refs: _combine_program(refs, tokens, hidden, k, single, single_out, weight_single, warps),
        ["rows", "row_of_slot", "weights", "out"], [jax.ShapeDtypeStruct((tokens, hidden), out_dtype)],
        grid=-(-tokens * hidden // 8 // (warps * WARP)), warps=warps)
    return call(rows, routing.row_of_slot, weights)[0]
