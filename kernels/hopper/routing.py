"""Tokens to experts and back, around the grouped matmuls: the router's choice, sort, weighted combine. Deterministic, no host sync.

    weights, expert_ids = top_k_experts(logits, k, normalize=True)
    routing = route(expert_ids, num_experts, valid)
    rows = x[routing.token_of_row]                  # [T*k, H], sorted by expert: what the grouped matmuls read
    y = combine(grouped matmuls of rows, routing, weights)

    weights, expert_ids, routing = choose_and_route(logits[None], tokens, k, normalize=True)    # the first two, of few tokens in one launch

`top_k_experts` gives a token to a warp, which finds one maximum after another. `route` is one launch of a CTA, or of one cluster
where a CTA's lanes are fewer than the slots: a stable counting sort (`routing_sort`). `combine` adds a token's k rows in slot order. No
atomics: the order of every sum and of every row follows from the inputs. `nvfp4jax.routing` is the same in plain jnp.
"""
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from nvfp4jax.kernels.hopper import threads
from nvfp4jax.kernels.hopper.machine import CLUSTER, SCHEDULERS, SHARED_MEMORY, WARP
from nvfp4jax.kernels.hopper.mosaic import asm, gmem_element, i32, select, thread_index
from nvfp4jax.kernels.hopper.routing_sort import ONE_CTA, Shared, Sort, plan_of, sort_program
from nvfp4jax.kernels.hopper.threads import load_global, store_global
from nvfp4jax.routing import Routing, check_combine, check_route, check_top_k

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


def _maximum(values):
    """Over a list of registers and the lanes of the warp."""
    out = functools.reduce(lambda a, b: asm("max.u32 $0,$1,$2;", [a, b], effects=False), values)
    return asm("redux.sync.max.u32 $0,$1,-1;", [out])


def _total(value):
    """Float32, over the lanes of the warp, in all of them."""
    for step in (1, 2, 4, 8, 16):
        value = asm(SUM_STEP.format(step=step), [value])
    return value


def _logits(refs, c, token, i, ok):
    """The parts' sum, from left to right."""
    found = [load_global(gmem_element(refs["logits"], token + part * c.rows, c.experts, i, 4), 1, ok)[0] for part in range(c.parts)]
    return functools.reduce(lambda a, b: asm("add.rn.f32 $0,$1,$2;", [a, b], effects=False), found)


@dataclasses.dataclass(frozen=True)
class Choice:
    """k of `experts` for each of `tokens`, whose logits lie in so many parts of so many rows."""

    tokens: int
    experts: int
    k: int
    normalize: bool
    parts: int
    rows: int


def _choose(refs, c: Choice, token):
    """A warp's choice for a token, one a warp: stores weights and ids, slot `lane` of the k by a lane; -> that slot's id.

        lane      logits lane, lane + 32, ...; at the end slot `lane` of the k
        a slot    the largest key of the lanes' own, then over the warp; the lowest id that has it; that key is struck out

    Nothing lies in shared memory, and no warp waits for another."""
    lane, here = thread_index() % WARP, token < c.tokens
    index = [lane + j for j in range(0, c.experts, WARP)]
    inside = [here & (i < c.experts) for i in index]
    logits = [_logits(refs, c, token, i, ok) for i, ok in zip(index, inside)]
    keys = [select(ok, asm(KEY, [x], effects=False), 0) for x, ok in zip(logits, inside)]
    best = _maximum(keys)
    finite = (i32(0x007FFFFF) < best) & (best < 0xFF800000)
    largest = asm(VALUE, [best], effects=False)
    sums = i32(0)
    for x, ok in zip(logits, inside):
        sums = asm("add.rn.f32 $0,$1,$2;", [sums, select(ok, asm(EXP, [x, largest], effects=False), 0)], effects=False)
    sums = _total(sums)
    keys = [select(finite, key, ok) for key, ok in zip(keys, inside)]  # else all are equal, and the first k chosen
    best = select(finite, best, 1)
    own_key, own_id = best, i32(0)  # of slot `lane`
    for slot in range(c.k):
        if slot:
            best = _maximum(keys)
        chosen = i32(0x7FFFFFFF)
        for key, i in reversed(list(zip(keys, index))):
            chosen = select(key == best, i, chosen)
        chosen = asm("redux.sync.min.u32 $0,$1,-1;", [chosen])
        keys = [select(i == chosen, 0, key) for key, i in zip(keys, index)]
        mine = lane == slot
        own_key, own_id = select(mine, best, own_key), select(mine, chosen, own_id)
    weight = asm("div.rn.f32 $0,$1,$2;", [asm(EXP, [asm(VALUE, [own_key], effects=False), largest], effects=False), sums], effects=False)
    mine = lane < c.k
    if c.normalize:
        weight = asm("div.rn.f32 $0,$1,$2;", [weight, _total(select(mine, weight, 0))], effects=False)
    weight = select(finite, weight, 0x7FC00000)
    mine = here & mine
    for name, value in (("weights", weight), ("ids", own_id)):
        store_global(gmem_element(refs[name], token, c.k, lane, 4), [value], mine)
    return own_id


def _top_k_program(refs, c: Choice, warps):
    _choose(refs, c, asm("mov.u32 $0,%ctaid.x;") * warps + thread_index() // WARP)


def _choice(parts, tokens, k, normalize):
    count, rows, experts = parts.shape
    if k > WARP or experts > MAX_EXPERTS:
        raise NotImplementedError(f"top_k_experts: {k} of {experts} experts; at most {WARP} of {MAX_EXPERTS}; use nvfp4jax.routing.top_k_experts")
    return Choice(tokens, experts, k, normalize, count, rows)


def _chosen_types(tokens, k):
    return [jax.ShapeDtypeStruct((tokens, k), dtype) for dtype in (jnp.float32, jnp.int32)]


def top_k_of_parts(parts, tokens: int, k: int, *, normalize: bool):
    """`top_k_experts` of the logits parts[0, :tokens] + parts[1, :tokens] + ..., added up in that order; parts: float32 [P, >= tokens, E]."""
    choice, warps = _choice(parts, tokens, k, normalize), 4
    if tokens == 0:
        return jnp.zeros((0, k), jnp.float32), jnp.zeros((0, k), jnp.int32)
    call = threads.thread_kernel(lambda refs: _top_k_program(refs, choice, warps), ["logits", "weights", "ids"], _chosen_types(tokens, k),
                                 grid=-(-tokens // warps), warps=warps)
    return call(parts.reshape(-1, choice.experts))


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
    return tuple(out.reshape(*lead, k) for out in top_k_of_parts(logits.reshape(1, tokens, experts), tokens, k, normalize=normalize))


# --- the sort --------------------------------------------------------------------------------------------------------

def _routing_types(s: Sort):
    return [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((s.n,), (s.n // s.k, s.k), (s.experts,))]


def _masks(valid):
    return {} if valid is None else dict(valid=valid)


def _route_program(refs, s: Sort):
    sort_program(refs, s, lambda slot, here: load_global(gmem_element(refs["expert_ids"], slot, 1, 0, 4), 1, here)[0])


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
    sort = Sort(n, k, num_experts, *plan_of(n), valid is not None)
    words = Shared.of(num_experts, sort.warps).words
    if 4 * words > SHARED_MEMORY:
        raise NotImplementedError(f"route: the counts of {num_experts} experts do not fit the shared memory; use route_xla")
    call = threads.thread_kernel(
        lambda refs: _route_program(refs, sort), ["expert_ids", *_masks(valid), *Routing._fields, "shared"], _routing_types(sort),
        grid=sort.cluster, warps=sort.warps, cluster=sort.cluster, shared_words=words)
    return Routing(*call(expert_ids, *_masks(valid).values()))


# --- both in one launch ----------------------------------------------------------------------------------------------

# Operations of a scheduler that the launch which is saved is worth, by CTAs. Of one CTA: predicted (1.2 us, and 0.25 between two; 1.4 cycles each).
# Of a cluster, whose turns came slower, measured: none take 0.14 us less than two launches (64 tokens), 1104 take 1.1 us more (256).
LAUNCH = {1: 1900, CLUSTER: 700}


def plan_of_one_launch(tokens: int, k: int, experts: int) -> tuple[int, int] | None:
    """(warps, CTAs of the one cluster) for a choice and a sort in one launch, a token a warp; None where two launches take less time.

    Two launches choose on all SMs. One CTA or one cluster has few schedulers, on each of which tokens take turns: one launch is worth it
    while the turns behind the first have no more operations than `LAUNCH` says. 8 of 128 experts have 368 operations: up to 128 tokens, 2 turns.
    """
    a_lane = -(-experts // WARP)
    operations = k * (5 * a_lane + 8) + 24 * a_lane + 48  # of `_choose`, of logits in one part; slow paths left out
    for cluster in (1, CLUSTER):
        turns = -(-tokens // (SCHEDULERS * cluster))
        if 0 < SCHEDULERS * turns <= ONE_CTA and (turns - 1) * operations <= LAUNCH[cluster]:
            return SCHEDULERS * turns, cluster
    return None


def _choose_and_route_program(refs, c: Choice, s: Sort):
    """One thread's program. A warp sorts the slots of the token that it chose for: their ids stay in its registers."""
    rank = asm("mov.u32 $0,%cluster_ctarank;") if s.cluster > 1 else i32(0)
    chosen = _choose(refs, c, rank * s.warps + thread_index() // WARP)
    sort_program(refs, s, lambda slot, here: chosen)


def choose_and_route(parts, tokens: int, k: int, *, normalize: bool, valid=None):
    """`top_k_of_parts` and `route` of its ids: in one launch where that takes less time, else in two; the bits are the same.

    parts: float32 [P, >= tokens, E]; valid: bool [tokens]. -> weights f32 [tokens, k], ids i32 [tokens, k], Routing.
    NotImplementedError for k > 32 or E > 1024.
    """
    check_top_k(parts, k)
    check_route(jax.ShapeDtypeStruct((tokens, k), jnp.int32), valid)
    experts = parts.shape[-1]
    plan = plan_of_one_launch(tokens, k, experts)
    if plan is None:
        weights, ids = top_k_of_parts(parts, tokens, k, normalize=normalize)
        return weights, ids, route(ids, experts, valid)
    warps, cluster = plan
    choice = _choice(parts, tokens, k, normalize)
    sort = Sort(tokens * k, k, experts, warps, cluster, k, valid is not None)
    call = threads.thread_kernel(
        lambda refs: _choose_and_route_program(refs, choice, sort), ["logits", *_masks(valid), "weights", "ids", *Routing._fields, "shared"],
        _chosen_types(tokens, k) + _routing_types(sort), grid=cluster, warps=warps, cluster=cluster,
        shared_words=Shared.of(experts, warps).words)
    weights, ids, *routing = call(parts.reshape(-1, experts), *_masks(valid).values())
    return weights, ids, Routing(*routing)


# --- the combine -----------------------------------------------------------------------------------------------------

PLUS_PRODUCT = "{.reg .b32 p; mul.rn.f32 p,$2,$3; add.rn.f32 $0,$1,p;}"  # not contracted: the same on every backend


def _floats(words):
    """Float32 bits of the two bfloat16 in each word."""
    return [asm(text, [w], effects=False) for w in words for text in ("shl.b32 $0,$1,16;", "and.b32 $0,$1,0xFFFF0000;")]


def _plus_residual(refs, sums, token, hidden, column, here, single_out):
    """The sums, rounded to the result's dtype, plus the residual, in float32."""
    words = load_global(gmem_element(refs["residual"], token, hidden, column, 4 if single_out else 2), 8 if single_out else 4, here)
    if not single_out:
        words = _floats(words)
        rounded = "{.reg .b16 h; .reg .f32 f; mov.b32 f,$1; cvt.rn.bf16.f32 h,f; mov.b32 $0,{0,h};}"
        sums = [asm(rounded, [v], effects=False) for v in sums]
    plus = "{.reg .f32 a, b; mov.b32 a,$1; mov.b32 b,$2; add.rn.f32 a,a,b; mov.b32 $0,a;}"
    return [asm(plus, pair, effects=False) for pair in zip(words, sums)]


def _combine_program(refs, tokens, hidden, k, single, single_out, weight_single, warps):
    """One thread's program: 8 neighbouring elements of one token, its k rows one after another. No thread waits for another."""
    chunks = hidden // 8
    index = asm("mov.u32 $0,%ctaid.x;") * (warps * WARP) + thread_index()
    here = index < tokens * chunks
    token, column = index // chunks, index % chunks * 8
    slot = token * k
    loaded = []
    for j in range(k):
        row, = load_global(gmem_element(refs["row_of_slot"], slot + j, 1, 0, 4), 1, here)
        weight, = load_global(gmem_element(refs["weights"], slot + j, 1, 0, 4 if weight_single else 2), 1, here,
                              form="b32" if weight_single else "u16")
        if not weight_single:
            weight = asm("shl.b32 $0,$1,16;", [weight], effects=False)
        taken = here & asm("{.reg .pred p; setp.ge.s32 p,$1,0; selp.b32 $0,1,0,p;}", [row], effects=False)
        words = load_global(gmem_element(refs["rows"], row, hidden, column, 4 if single else 2), 8 if single else 4, taken)
        loaded.append((taken, weight, words))
    sums = [i32(0)] * 8
    for taken, weight, words in loaded:
        if not single:
            words = _floats(words)
        weight = select(taken, weight, 0)  # a row of no expert may hold anything; its weight may too
        sums = [asm(PLUS_PRODUCT, [s, w, weight], effects=False) for s, w in zip(sums, words)]
    if "residual" in refs:
        sums = _plus_residual(refs, sums, token, hidden, column, here, single_out)
    address = gmem_element(refs["out"], token, hidden, column, 4 if single_out else 2)
    if single_out:
        for i in (0, 4):
            store_global(address + 4 * i, sums[i:i + 4], here)
    else:
        pairs = [asm("cvt.rn.bf16x2.f32 $0,$2,$1;", sums[i:i + 2], effects=False) for i in (0, 2, 4, 6)]
        store_global(address, pairs, here)


def combine(rows, routing: Routing, weights, *, out_dtype=jnp.bfloat16, residual=None):
    """out[t] = sum over j, in order, of weights[t, j] * rows[row_of_slot[t, j]], in float32 with separate roundings.

    rows: bfloat16 or float32 [T*k, H], H a multiple of 8; weights: bfloat16 or float32 [T, k]. Slots of no expert add
    nothing, whatever their rows hold; a token that is not valid gets zeros. residual: out_dtype [T, H], added to the
    rounded sum, and rounded again. -> out_dtype (bfloat16 or float32) [T, H].
    """
    check_combine(rows, routing, weights, residual, out_dtype)
    (tokens, k), hidden, dtypes = weights.shape, rows.shape[1], (jnp.bfloat16, jnp.float32)
    if hidden % 8 or rows.dtype not in dtypes or weights.dtype not in dtypes or out_dtype not in dtypes:
        raise NotImplementedError(f"combine: rows {rows.dtype}{rows.shape}, weights {weights.dtype}, out {jnp.dtype(out_dtype)}: H must "
                                  "be a multiple of 8, dtypes bfloat16 or float32; use nvfp4jax.routing.combine")
    if tokens == 0:
        return jnp.zeros((0, hidden), out_dtype)
    added = () if residual is None else (residual,)
    warps, single, single_out, weight_single = 4, *(d == jnp.float32 for d in (rows.dtype, out_dtype, weights.dtype))
    call = threads.thread_kernel(
        lambda refs: _combine_program(refs, tokens, hidden, k, single, single_out, weight_single, warps),
        ["rows", "row_of_slot", "weights", *(["residual"] if added else []), "out"], [jax.ShapeDtypeStruct((tokens, hidden), out_dtype)],
        grid=-(-tokens * hidden // 8 // (warps * WARP)), warps=warps)
    return call(rows, routing.row_of_slot, weights, *added)[0]
