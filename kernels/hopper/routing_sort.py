"""A stable counting sort of slots by expert, in one launch of one CTA or one cluster.

    slots     warp w of CTA r takes `stretch` of them, in order, in steps of 32; a lane takes a slot of each 32
    buckets   the experts; bucket E takes slots of no expert, bucket E + 1 those past the end

    shared memory, i32          written by                                   read by
    counts [warps, buckets]     its warp: slots of a bucket; then, by the    its warp: the place of the next slot of a bucket
                                bucket's thread, sums over lower warps
    totals [buckets]            the bucket's thread: this CTA's slots        the same threads of all CTAs of the cluster
    chunk_sums                  a warp: the slots of its 32 buckets          the threads of higher buckets
    starts [buckets]            the bucket's thread: its first row           all

    1. each warp walks over its slots and counts      -- CTA meets --
    2. thread b: sums of bucket b over warps          -- cluster meets -- and over CTAs; over lower buckets   -- CTA meets twice --
    3. each warp walks again, and places its slots

No atomics: a bucket's rows come in the order of CTA, warp and lane, which is that of the slots.
"""
import dataclasses

from nvfp4jax.kernels.hopper.machine import CLUSTER, WARP
from nvfp4jax.kernels.hopper.mosaic import Register, asm, gmem_element, i32, loop, minimum, select, smem_address, thread_index
from nvfp4jax.kernels.hopper.threads import LOAD_SHARED, STORE_SHARED, load_global, store_global, store_shared

# The inclusive sum over lower lanes.
SCAN_STEP = "{{.reg .b32 o; .reg .pred p; shfl.sync.up.b32 o|p,$1,{step},0,-1; mov.b32 $0,$1; @p add.u32 $0,$0,o;}}"
ONE_CTA = 16  # warps that one CTA takes; more slots go to a cluster


def plan_of(n: int) -> tuple[int, int, int]:
    """(warps, CTAs of the one cluster, slots a warp) for n slots: one CTA, where a slot a lane fits it; else a cluster."""
    warps = 1 << (-(-n // WARP) - 1).bit_length()
    if warps <= ONE_CTA:
        warps, cluster = max(4, warps), 1
    else:
        warps, cluster = min(16, max(4, warps // CLUSTER // 2)), CLUSTER  # two steps before more warps, which start later
    return warps, cluster, -(-n // (warps * WARP * cluster)) * WARP


@dataclasses.dataclass(frozen=True)
class Sort:
    """n slots, k a token, a stretch of them a warp; masked: slots of tokens that are not valid belong to no expert."""

    n: int
    k: int
    experts: int
    warps: int
    cluster: int
    stretch: int
    masked: bool

    @property
    def buckets(self) -> int:
        return self.experts + 2

    @property
    def threads(self) -> int:
        return self.warps * WARP

    @property
    def steps(self) -> int:
        """Of 32 slots, each warp."""
        return -(-self.stretch // WARP)


@dataclasses.dataclass(frozen=True)
class Shared:
    """Word offsets in shared memory, and their number."""

    counts: int
    totals: int
    starts: int
    chunk_sums: int
    words: int

    @classmethod
    def of(cls, experts: int, warps: int) -> "Shared":
        buckets, offsets = experts + 2, [0]
        for size in (warps * buckets, buckets, buckets, -(-buckets // (warps * WARP)) * warps):
            offsets.append(offsets[-1] + size)
        return cls(*offsets)


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


def _synchronize():
    asm("bar.sync 0;", outputs="")


@dataclasses.dataclass(frozen=True)
class _Thread:
    """Of a thread: its place, and addresses in shared memory."""

    tid: Register
    lane: Register
    warp: Register
    rank: Register
    counts: Register
    totals: Register
    starts: Register
    chunk_sums: Register


@dataclasses.dataclass
class _Bucket:
    """One that this thread looks after. offset: bytes; total: its slots in this CTA, then in all; lower: in CTAs of lower rank; before:
    slots of lower buckets of the same 32."""

    bucket: Register
    offset: Register
    exists: Register
    total: Register
    lower: Register | None = None
    before: Register | None = None


def _slot_of(s, at, step):
    """n, behind the last slot, for a lane behind its warp's stretch."""
    place = step * WARP + at.lane
    slot = (at.rank * s.warps + at.warp) * s.stretch + place
    return select(place < s.stretch, slot, s.n) if s.stretch % WARP else slot


def _bucket_of(refs, s, slot, expert_of):
    here = slot < s.n
    bucket = minimum(expert_of(slot, here), s.experts)  # unsigned: negative ids too
    if s.masked:
        valid, = load_global(gmem_element(refs["valid"], slot // s.k, 1, 0, 1), 1, here, form="u8")
        bucket = select(valid, bucket, s.experts)
    return select(here, bucket, s.experts + 1)


def _walk(refs, s, at, expert_of, opening, match, once, visit=None):
    """visit(slot, bucket, place) for this warp's slots in order; place: the running count of the bucket, before it. once: the match
    of the only step, which both walks share."""
    def body(step, bucket):
        following = _bucket_of(refs, s, _slot_of(s, at, step + 1), expert_of) if once is None else bucket
        count, below = once or asm(match, [bucket], "rr")
        address = at.counts + (at.warp * s.buckets + bucket) * 4
        base = asm(LOAD_SHARED, [address])
        if once is None or visit is None:
            asm("bar.warp.sync -1;", outputs="")
            store_shared(address, [base + count], below == 0)
            asm("bar.warp.sync -1;", outputs="")
        if visit is not None:
            visit(_slot_of(s, at, step), bucket, base + below)
        return [following]

    if once is None:
        loop(0, s.steps, 1, [opening], body)
    else:
        body(i32(0), opening)


def _clear_counts(s, at):
    def clear(i):
        asm(STORE_SHARED, [at.counts + (at.warp * s.buckets + i) * 4, i32(0)], "")
        return []

    loop(at.lane, s.buckets, WARP, [], clear)
    asm("bar.warp.sync -1;", outputs="")


def _add_warps(s, at):
    """This thread's buckets; their counts become sums over lower warps."""
    own = []
    for first in range(0, s.buckets, s.threads):
        bucket = at.tid + first
        exists = bucket < s.buckets
        offset = minimum(bucket, s.buckets - 1) * 4
        column = at.counts + offset
        found = [asm(LOAD_SHARED, [column + 4 * w * s.buckets]) for w in range(s.warps)]
        total = i32(0)
        for w, count in enumerate(found):
            store_shared(column + 4 * w * s.buckets, [total], exists)
            total = total + count
        total = total * exists
        if s.cluster > 1:
            store_shared(at.totals + offset, [total], exists)
        own.append(_Bucket(bucket, offset, exists, total))
    return own


def _add_ctas(s, at, own):
    """What the CTAs of lower ranks have of a bucket, and all of them."""
    if s.cluster == 1:
        for b in own:
            b.lower = i32(0)
        return
    asm("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;", outputs="")
    for b in own:
        total, b.lower = asm(_of_cluster_text(s.cluster), [at.totals + b.offset, at.rank], "rr")
        b.total = total * b.exists
    asm("barrier.cluster.arrive.release.aligned;", outputs="")  # nobody reads this CTA's totals from here on


def _add_buckets(refs, s, at, own):
    """Each bucket's first row, and the sizes of the groups."""
    for first, b in zip(range(0, s.buckets, s.threads), own):
        through = b.total
        for step in (1, 2, 4, 8, 16):
            through = asm(SCAN_STEP.format(step=step), [through])
        store_shared(at.chunk_sums + (at.warp + first // WARP) * 4, [through], at.lane == WARP - 1)
        here = (b.bucket < s.experts) & (at.rank == 0)
        store_global(gmem_element(refs["group_sizes"], b.bucket, 1, 0, 4), [b.total], here)
        b.before = through - b.total
    _synchronize()

    def add_lower(i, so_far):
        return [so_far + asm(LOAD_SHARED, [at.chunk_sums + i * 4])]

    for b in own:
        so_far, = loop(0, b.bucket // WARP, 1, [b.before], add_lower)
        store_shared(at.starts + b.offset, [so_far + b.lower], b.exists)
    _synchronize()


def sort_program(refs, s: Sort, expert_of) -> None:
    """One thread's program. expert_of(slot, here): the id of the expert of a slot, anything where the i32 `here` is zero."""
    tid = thread_index()
    lane, warp = tid % WARP, tid // WARP
    rank = asm("mov.u32 $0,%cluster_ctarank;") if s.cluster > 1 else i32(0)
    offsets = Shared.of(s.experts, s.warps)
    at = _Thread(tid, lane, warp, rank, *(smem_address(refs["shared"]) + 4 * o for o in (
        offsets.counts, offsets.totals, offsets.starts, offsets.chunk_sums)))
    match = _match_text(s.buckets)
    opening = _bucket_of(refs, s, _slot_of(s, at, i32(0)), expert_of)
    once = asm(match, [opening], "rr") if s.steps == 1 else None

    _clear_counts(s, at)
    _walk(refs, s, at, expert_of, opening, match, once)
    _synchronize()
    own = _add_warps(s, at)
    _add_ctas(s, at, own)
    _add_buckets(refs, s, at, own)

    def place(slot, bucket, row):
        here = slot < s.n
        known = bucket < s.experts
        row = row + asm(LOAD_SHARED, [at.starts + bucket * 4])
        store_global(gmem_element(refs["row_of_slot"], slot, 1, 0, 4), [select(known, row, -1)], here)
        store_global(gmem_element(refs["token_of_row"], row, 1, 0, 4), [slot // s.k], here)

    _walk(refs, s, at, expert_of, opening, match, once, place)
    if s.cluster > 1:
        asm("barrier.cluster.wait.aligned;", outputs="")  # the others may still read this CTA's totals
