"""Four programs of a quantizing thread, by where the amax comes from (`Spec.amax`).

    "row", "rows", "scalar", "partials"   a CTA takes group after group; the loads of the next are on their way while it works on one
    emit "amax"                           the same walk, for the maximum alone: one a CTA, which "partials" reads in the next launch
    "scan"                                one launch: every cluster reads all rows for their maximum; a CTA keeps its own group in
                                          registers meanwhile, and quantizes it. Maxima meet in `cta_slots` (a CTA's warps) and
                                          `cluster_slots` (a cluster's CTAs, each of which writes its own into all others)
    "matrices"                            one launch: `draw_tiles`
"""
from nvfp4jax.kernels.hopper import quantize_columns as columns
from nvfp4jax.kernels.hopper import quantize_ptx as ptx
from nvfp4jax.kernels.hopper.machine import WARP
from nvfp4jax.kernels.hopper.mosaic import asm, branch, gmem_address, gmem_element, i32, loop, minimum, select, while_loop
from nvfp4jax.kernels.hopper.quantize_plan import Plan, Spec
from nvfp4jax.kernels.hopper.quantize_rows import (
    Thread,
    block_maxima,
    fetch,
    maximum,
    produce,
    quantize_group,
    quantize_produced,
    scales_of,
    this_thread,
)
from nvfp4jax.kernels.hopper.quantize_rows import minimum as least
from nvfp4jax.kernels.hopper.threads import LOAD_SHARED, STORE_SHARED, load_global, store_global, store_shared

# --- one amax of many rows ------------------------------------------------------------------------------------------

def cta_maximum(t: Thread, value):
    """The maximum over all threads of the CTA, in all of them."""
    value = asm(ptx.WARP_MAX, [value])
    branch(t.lane == 0, lambda: asm(STORE_SHARED, [t.cta_slots + t.warp * 4, value], ""))
    asm("bar.sync 0;", outputs="")
    return asm(ptx.WARP_MAX, [asm(LOAD_SHARED, [t.cta_slots + minimum(t.lane, t.plan.warps - 1) * 4])])


def cluster_maximum(t: Thread, value, rank):
    """The maximum over the cluster: lane i of warp 0 writes the CTA's into CTA i's slot of this rank."""
    asm("barrier.cluster.wait.aligned;", outputs="")  # all CTAs of the cluster have started
    send = (t.warp == 0) & (t.lane < t.plan.cluster)
    branch(send, lambda: asm(
        "{.reg .b32 a; mapa.shared::cluster.u32 a,$0,$1; st.shared::cluster.b32 [a],$2;}",
        [t.cluster_slots + rank * 4, t.lane, value], ""))
    asm("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;", outputs="")
    return asm(ptx.WARP_MAX, [asm(LOAD_SHARED, [t.cluster_slots + t.lane % t.plan.cluster * 4])])


def largest(t: Thread, group, maxima):
    """The largest finite magnitude of this thread's blocks, if its row takes part."""
    found = maximum([finite for _, finite in maxima])
    if t.spec.masked:
        row = group * t.plan.rows + t.row_of_group
        valid, = load_global(gmem_element(t.refs["valid"], row, 1, 0, 1), 1, row < t.spec.m, form="u8")
        found = select(valid, found, 0)
    return found


def scan(t: Thread, order, start, stop, step, best, parity):
    """The largest finite magnitude that this thread meets in groups order(start), order(start + step), ..."""
    def body(i, best, parity, *raw):
        following = fetch(t, order(i + step))
        found = largest(t, order(i), [block_maxima(t, block) for block in produce(t, raw, parity)])
        return (asm(ptx.MAX, [best, found], effects=False), parity ^ 1, *following)

    best, *_ = loop(start, stop, step, [best, parity, *fetch(t, order(start))], body)
    return best


def scalar_scales(t: Thread, amax, cta):
    """The scales of one amax for all rows; one thread leaves the global scale."""
    scaled = scales_of(t, amax)
    if t.spec.emit != "amax":
        store_global(gmem_address(t.refs["global_scale"]), scaled[:1], cta + t.tid == 0)
    return scaled


def reduced_scales(t: Thread, cta):
    """From the partial maxima of the launch before."""
    spec = t.spec
    positions = [t.lane + WARP * i for i in range(-(-spec.partials // WARP))]
    loads = [load_global(gmem_element(t.refs["amax"], p, 1, 0, 4), 1, p < spec.partials)[0] for p in positions]
    return scalar_scales(t, asm(ptx.WARP_MAX, [maximum(loads)]), cta)


def scan_and_quantize(t: Thread, cta) -> None:
    plan = t.plan
    if plan.cluster > 1:
        rank, cluster = asm("mov.u32 $0,%cluster_ctarank;"), asm("mov.u32 $0,%clusterid.x;")
        asm("barrier.cluster.arrive.relaxed.aligned;", outputs="")
    else:
        rank, cluster = i32(0), cta
    clusters = plan.grid // plan.cluster

    def others(i):
        return rank + (cluster + i) % clusters * plan.cluster

    own = others(i32(0))
    raw = fetch(t, own)
    at_once = [others(i32(i)) for i in range(1, clusters)] if plan.cluster == 1 else []
    fetched = [(group, fetch(t, group)) for group in at_once]
    produced = produce(t, raw, i32(0))  # stays in registers
    maxima = [block_maxima(t, block) for block in produced]
    best = largest(t, own, maxima)
    for i, (group, raw) in enumerate(fetched):
        of_group = [block_maxima(t, block) for block in produce(t, raw, i32(1 - i % 2))]
        best = asm(ptx.MAX, [best, largest(t, group, of_group)], effects=False)
    if clusters > 1 and not at_once:
        best = scan(t, others, 1, clusters, 1, best, i32(1))
    best = cta_maximum(t, best)
    if plan.cluster > 1:
        best = cluster_maximum(t, best, rank)
    quantize_produced(t, own, produced, maxima, i32(0), scalar_scales(t, best, cta))


# --- group after group ----------------------------------------------------------------------------------------------

def quantize_groups(t: Thread, first, step, scales=None, *, reverse: bool = False) -> None:
    """Groups first, first + step, ...; scales: makes those of the one amax, once the first loads are on their way."""
    def order(group):
        return t.groups - 1 - group if reverse else group

    raw = fetch(t, order(first))
    scaled = scales() if scales else None
    if step >= t.groups:
        quantize_group(t, order(first), raw, i32(0), scaled)
        return

    def body(group, parity, *raw):
        # Past the end a row is >= m (in reverse by unsigned wrap): all zeros, nothing stored.
        following = fetch(t, order(group + step))
        quantize_group(t, order(group), list(raw), parity, scaled)
        return (parity ^ 1, *following)

    loop(first, t.groups, step, [i32(0), *raw], body)


# --- one amax a matrix ----------------------------------------------------------------------------------------------

def _word(t, i):
    return gmem_element(t.refs["zeroed"], i, 1, 0, 4)


def _amax_word(t, i, here):
    """A tile's, as far as it is known; where there is none, one that is known and zero."""
    return asm("{.reg .pred p; setp.ne.u32 p,$2,0; mov.b32 $0,0x80000000; @p ld.relaxed.gpu.global.b32 $0,[$1];}", [_word(t, i), here])


def _draw(t, first):
    """One thread's; the others get 0."""
    return asm("{.reg .pred p; setp.ne.u32 p,$2,0; mov.b32 $0,0; @p atom.global.add.u32 $0,[$1],1;}", [_word(t, i32(0)), first])


def _fetch(t, group):
    return columns.fetch(t, group) if t.spec.columns else fetch(t, group)


def _first_group(t, there):
    """Of a tile that is not there the last group alone, which fetches what follows."""
    return select(there, 0, t.plan.tile - 1)


def _amax_of_tile(t, tile, there, following_tile, raw):
    """-> the largest finite magnitude that this warp meets in a tile (of columns `marked`), and the first raw registers of the following
    tile."""
    size, kinds = t.plan.tile, 2 if t.spec.columns else 1

    def amax_of_group(r, *carry):
        best, raw = carry[:kinds], carry[kinds:]
        following = _fetch(t, select(r == size - 1, following_tile * size, tile * size + r + 1))
        found = zip(*(block_maxima(t, raw[i:i + 8])[-kinds:] for i in range(0, len(raw), 8)))
        return [*(maximum([b, *values]) for b, values in zip(best, found)), *following]

    out = loop(_first_group(t, there), size, 1, [*[i32(0)] * kinds, *raw], amax_of_group)
    best, raw = out[:kinds], out[kinds:]
    return columns.marked(*best) if t.spec.columns else asm(ptx.WARP_MAX, best), raw


def _quantize_tile(t, tile, there, following_tile, raw, scaled):
    """-> the first raw registers of the following tile."""
    size = t.plan.tile

    def quantize_one(r, parity, *raw):
        group = tile * size + r
        following = _fetch(t, select(r == size - 1, following_tile * size, group + 1))
        if t.spec.columns:
            columns.quantize_group(t, group, list(raw), scaled)
        else:
            quantize_group(t, group, list(raw), parity, scaled)
        return [parity ^ 1, *following]

    _, *raw = loop(_first_group(t, there), size, 1, [i32(0), *raw], quantize_one)
    return raw


def draw_tiles(t: Thread) -> None:
    """CTAs draw numbers. Draw d: the amax of tile d, then the codes of tile d - lag.

        word 0 of `zeroed`        counts the draws
        word 1 + d                tile d's amax with the sign set, once it is known
        d - lag                   its matrix has only tiles below d, all drawn before: whoever has them never waits for d

    The first unfinished draw so never waits, however many CTAs run at once. In shared memory: the warps' maxima and the CTA's next draw,
    of either parity. The next draw is made a step ahead."""
    spec, plan = t.spec, t.plan
    per = t.groups_of_matrix // plan.tile  # tiles of a matrix
    tiles = spec.m // spec.matrix * per
    lag = per + plan.grid  # others are at work on the last `grid` draws
    first = t.tid == 0
    draw_slots = t.cta_slots + 4 * plan.warps  # of either parity

    def step(d, parity, pending, *raw):
        begun = i32(lag) <= d
        q = select(begun, d - lag, tiles)  # `tiles`: nothing there
        matrix = q // per
        base = matrix * per + 1
        words = []  # the amax of each tile of the matrix; used after the loads of x are on their way
        for i in range(0, per, WARP):
            words.append(_amax_word(t, base + (t.lane + i), begun & (t.lane + i < per)))
        best, raw = _amax_of_tile(t, d, d < tiles, q, raw)
        slots, draw_slot = t.cta_slots + parity * (4 * (plan.warps + 2)), draw_slots + parity * (4 * (plan.warps + 2))
        store_shared(slots + t.warp * 4, [best], t.lane == 0)
        store_shared(draw_slot, [pending], first)
        asm("bar.sync 0;", outputs="")
        best = asm(LOAD_SHARED, [slots + minimum(t.lane, plan.warps - 1) * 4])
        best = columns.marked_of(best) if spec.columns else asm(ptx.WARP_MAX, [best])
        asm("{.reg .pred p; .reg .b32 v; setp.ne.u32 p,$2,0; or.b32 v,$1,0x80000000; @p st.relaxed.gpu.global.b32 [$0],v;}",
            [_word(t, d + 1), best, first & (d < tiles)], "")
        following = asm(LOAD_SHARED, [draw_slot])
        pending = _draw(t, first)
        known = asm("redux.sync.min.u32 $0,$1,-1;", [least(words)])
        amax = asm(ptx.WAIT, [maximum(words), known, _word(t, base + t.lane), per - minimum(t.lane, per)])
        amax, poisoned = asm(ptx.WARP_MAX, [amax]) & 0x7FFFFFFF, []
        if spec.columns:
            amax, *poisoned = columns.amax_of(t, amax, lambda i: _amax_word(t, base + i, begun), per)
        scaled = scales_of(t, amax) + poisoned
        owner = first & begun & (q % per == 0)
        store_global(gmem_element(t.refs["global_scale"], matrix, 1, 0, 4), scaled[:1], owner)
        raw = _quantize_tile(t, q, begun, following, raw, scaled)
        return [following, parity ^ 1, pending, *raw]

    store_shared(draw_slots, [_draw(t, first)], first)
    asm("bar.sync 0;", outputs="")
    d = asm(LOAD_SHARED, [draw_slots])
    asm("bar.sync 0;", outputs="")
    while_loop([d, i32(0), _draw(t, first), *_fetch(t, d * plan.tile)], lambda d, *_: d < tiles + lag, step)


def quantize_program(refs, spec: Spec, plan: Plan) -> None:
    """One thread's program; refs: name -> ref."""
    t = this_thread(refs, spec, plan)
    cta = asm("mov.u32 $0,%ctaid.x;")
    if spec.amax == "scan":
        scan_and_quantize(t, cta)
    elif spec.emit == "amax":
        best = cta_maximum(t, scan(t, lambda i: i, cta, t.groups, plan.grid, i32(0), i32(0)))
        store_global(gmem_element(refs["partials"], cta, 1, 0, 4), [best], t.tid == 0)
    elif spec.amax == "matrices":
        draw_tiles(t)
    elif spec.amax == "partials":
        quantize_groups(t, cta, plan.grid, lambda: reduced_scales(t, cta), reverse=True)
    elif spec.amax == "scalar":
        quantize_groups(t, cta, plan.grid, lambda: scalar_scales(t, *load_global(gmem_address(refs["amax"]), 1, i32(1)), cta))
    else:
        quantize_groups(t, cta, plan.grid, reverse=spec.amax == "rows")
