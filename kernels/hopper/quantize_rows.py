"""A group of rows in a quantizer: who owns what, and what a thread does with its blocks.

    CTA      a group of rows at a time, `warps_per_row` warps a row
    lane     whole blocks of 16 elements, in its registers: block (part + j * warps_per_row) * 32 + lane of its row, j = 0, 1, ...

    amax of a row     maximum over a lane's blocks -> over the warp (redux) -> over the row's warps, through `max_slots` in shared memory,
                      which the row's warps wait for (`synchronize_row`); slots of either parity, so that a warp that is a group
                      ahead does not meet one that still reads
    operand           a warp's 32 blocks are decoded into its own `transpose`, where a quad's 4 blocks become a 64-chunk in
                      `permute_k` order, and go to memory in runs of 16 bytes; nobody else waits

A register is a word of two bf16, or a float32 (`Spec.single`).
"""
import dataclasses
import functools

from nvfp4jax import numerics
from nvfp4jax.kernels.hopper import mosaic
from nvfp4jax.kernels.hopper import quantize_ptx as ptx
from nvfp4jax.kernels.hopper.decode import SCALE, decode_codes
from nvfp4jax.kernels.hopper.machine import WARP
from nvfp4jax.kernels.hopper.mosaic import Register, asm, branch, gmem_element, i32, select, smem_address, thread_index
from nvfp4jax.kernels.hopper.quantize_plan import TRANSPOSE_WORDS, Offsets, Plan, Spec, groups_of_matrix
from nvfp4jax.kernels.hopper.threads import LOAD_SHARED, STORE_SHARED, load_global, store_global

BLOCK_BYTES = 8  # packed codes of one block


@dataclasses.dataclass(frozen=True)
class Thread:
    """A thread, what it works on, and where it writes in shared memory."""

    refs: dict
    spec: Spec
    plan: Plan
    tid: Register
    lane: Register
    warp: Register
    row_of_group: Register
    part: Register  # of the row: which of its warps
    index: list[Register]  # of each own block in the row
    inside: list[Register]  # whether it exists
    max_slots: Register
    square_slots: Register
    transpose: Register
    cta_slots: Register
    cluster_slots: Register

    @property
    def full(self) -> bool:
        """Every lane has all its blocks."""
        return self.spec.row_blocks == WARP * self.plan.warps_per_row * self.plan.blocks

    @property
    def groups(self) -> int:
        return -(-self.spec.m // self.plan.rows)

    @property
    def groups_of_matrix(self) -> int:
        return groups_of_matrix(self.spec, self.plan)


def this_thread(refs, spec: Spec, plan: Plan) -> Thread:
    tid = thread_index()
    lane, warp = tid % WARP, tid // WARP
    row_of_group, part = warp // plan.warps_per_row, warp % plan.warps_per_row
    index = [(part + j * plan.warps_per_row) * WARP + lane for j in range(plan.blocks)]
    full = spec.row_blocks == WARP * plan.warps_per_row * plan.blocks
    inside = [i32(1) if full else i < spec.row_blocks for i in index]
    shared, at = smem_address(refs["shared"]), Offsets.of(spec, plan)
    slots = [shared + 4 * o for o in (at.max_slots, at.square_slots, at.transpose, at.cta_slots, at.cluster_slots)]
    return Thread(refs, spec, plan, tid, lane, warp, row_of_group, part, index, inside, *slots)


def maximum(values):
    return functools.reduce(lambda a, b: asm(ptx.MAX, [a, b], effects=False), values)


def minimum(values):
    return functools.reduce(mosaic.minimum, values)


def synchronize_row(t: Thread) -> None:
    """The warps of a row meet."""
    if t.plan.rows == 1:
        asm("bar.sync 0;", outputs="")
    else:
        asm(f"bar.sync $0,{WARP * t.plan.warps_per_row};", [t.row_of_group + 1], "")


# --- from memory to what is quantized -------------------------------------------------------------------------------

def row_of(t: Thread, group: Register) -> tuple[Register, Register]:
    """This thread's row of a group, and whether there is one."""
    spec, rows = t.spec, t.plan.rows
    if spec.matrix:  # whole groups to a matrix
        row = group % t.groups_of_matrix * rows + t.row_of_group
        ok = row < spec.matrix
        row = group // t.groups_of_matrix * spec.matrix + row
        return row, ok & (row < spec.m)
    row = group * rows + t.row_of_group
    return row, row < spec.m


def fetch(t: Thread, group: Register) -> list[Register]:
    """The raw registers of this thread's blocks of a group of rows."""
    spec, plan = t.spec, t.plan
    row, ok = row_of(t, group)
    out = []
    itemsize, words = (4, 16) if spec.single else (2, 8)
    for name in ("x", "up") if spec.source == "silu" else ("x",):
        first = gmem_element(t.refs[name], row, spec.k, (t.part * WARP + t.lane) * 16, itemsize)
        for j in range(plan.blocks):
            address = first + j * plan.warps_per_row * WARP * 16 * itemsize
            out += load_global(address, words, ok if t.full else ok & t.inside[j])
    return out


def inverse_rms(t: Thread, raw, parity) -> Register:
    """1 / sqrt(mean(x**2) + eps), summed as in `numerics.rms_norm`: a block's even and odd elements in order, the 32 blocks
    of a unit by halves (lanes by a butterfly), then the units in order."""
    spec, per_row, blocks = t.spec, t.plan.warps_per_row, t.plan.blocks
    sums = []
    for block in raw:
        total = asm(ptx.SQUARES, block, effects=False)
        for step in (16, 8, 4, 2, 1):
            total = asm(ptx.BUTTERFLY_ADD.format(step=step), [total])
        sums.append(total)
    if per_row > 1:
        slot = t.square_slots + (parity * t.plan.rows + t.row_of_group) * (4 * per_row * blocks)

        def publish():
            for j, total in enumerate(sums):
                asm(STORE_SHARED, [slot + (t.part + j * per_row) * 4, total], "")

        branch(t.lane == 0, publish)
        synchronize_row(t)
        sums = [asm(LOAD_SHARED, [slot + 4 * i]) for i in range(per_row * blocks)]
    total = sums[0]
    for other in sums[1:-(-spec.row_blocks // WARP)]:
        total = asm(ptx.ADD, [total, other], effects=False)
    constants = dict(share=1 / spec.k, eps=spec.eps, half=.5, one=1, two=2 + 2.0**-22)
    return asm(ptx.INVERSE_RMS.format(**{name: ptx.f32(value) for name, value in constants.items()}), [total], effects=False)


def produce(t: Thread, raw, parity):
    """Raw registers -> what is quantized: for each block 8 words of two bf16 without -0, or 16 float32."""
    spec, plan = t.spec, t.plan
    n = 16 if spec.single else 8
    raw = [raw[i:i + n] for i in range(0, len(raw), n)]
    if spec.single:
        return raw
    if spec.source == "silu":
        pairs = zip(raw[:plan.blocks], raw[plan.blocks:])
        return [[asm(ptx.SILU, pair, effects=False) for pair in zip(*gate_up)] for gate_up in pairs]
    if spec.source == "rmsnorm":
        inverse = inverse_rms(t, raw, parity)
        first = gmem_element(t.refs["weight"], 0, 0, (t.part * WARP + t.lane) * 16, 2)
        for j in range(plan.blocks):
            weight = load_global(first + j * plan.warps_per_row * WARP * 32, 8, t.inside[j])
            raw[j] = [asm(ptx.NORM, [word, inverse, w], effects=False) for word, w in zip(raw[j], weight)]
        return raw
    return [[asm(ptx.CANONICAL, [word], effects=False) for word in block] for block in raw]


# --- maxima ---------------------------------------------------------------------------------------------------------

def block_maxima(t: Thread, block) -> list[Register]:
    """(of all, of the finite) magnitudes."""
    return asm(ptx.block_max_text(t.spec.single), block, "rr", effects=False)


def row_maxima(t: Thread, maxima, parity) -> list[Register]:
    """(raw, finite) of the row from those of this thread's blocks."""
    per_row = t.plan.warps_per_row
    out = [asm(ptx.WARP_MAX, [maximum(v)]) for v in zip(*maxima)]
    if per_row == 1:
        return out
    slot = t.max_slots + (parity * t.plan.warps + t.row_of_group * per_row) * 8
    branch(t.lane == 0, lambda: asm("st.shared.v2.b32 [$0],{$1,$2};", [slot + t.part * 8, *out], ""))
    synchronize_row(t)
    pairs = [asm("ld.shared.v2.b32 {$0,$1},[$2];", [slot + 8 * i], "rr") for i in range(per_row)]
    return [maximum(v) for v in zip(*pairs)]


def poisoned_blocks(t: Thread, maxima) -> list[Register]:
    """For each of this thread's blocks, whether its row of the `pack` holds NaN or infinity. A warp has all of them."""
    bad = [i32(0x7F800000) <= raw for raw, _ in maxima]
    at = [i // (t.spec.row_blocks // t.spec.pack) for i in t.index]
    out = [i32(0)] * t.plan.blocks
    for r in range(t.spec.pack):
        here = [a == r for a in at]
        any_bad = asm(ptx.WARP_MAX, [maximum([b & h for b, h in zip(bad, here)])])
        out = [select(h, any_bad, o) for h, o in zip(here, out)]
    return out


# --- codes and scales -----------------------------------------------------------------------------------------------

def scales_of(t: Thread, amax) -> list[Register]:
    """-> the global scale, (its g, 2**-e, m), and the amax that they stand for, of one amax."""
    spec = t.spec
    top = numerics.E2M1_MAX * (numerics.E4M3_MAX if spec.four_over_six is None else numerics.E4M3_MAX_FOUR_OVER_SIX)
    return asm(ptx.global_text(top, spec.pow2, spec.static), [amax], "rrrrr", effects=False)


def _candidate(wanted, power, mantissa):
    """-> E4M3 bits, value, multiplier."""
    return asm(ptx.SCALE, [wanted, power, mantissa], "rrr", effects=False)


def quantize_block(t: Thread, block, finite, scaled):
    """-> E4M3 bits and two words of codes."""
    spec = t.spec
    _, g, power, mantissa, amax = scaled
    if spec.four_over_six is None:
        sixth = asm(f"mul.rn.f32 $0,$1,{ptx.f32(1 / 6)};", [g], effects=False)
        bits, _, multiplier = _candidate(asm(ptx.WANTED, [finite, sixth], effects=False), power, mantissa)
    else:
        if not spec.single:
            block = asm(ptx.unpack_text(), block, "r" * 16, effects=False)
        base = asm(ptx.WANTED_SIX, [finite, g], effects=False)
        parts = asm(ptx.SPLIT, [amax], "rr", effects=False)
        parts[0] = select(amax, parts[0], 0)
        tried = []
        for wanted in (base, asm(ptx.TIMES_1_5, [base], effects=False)):
            bits, value, multiplier = _candidate(wanted, power, mantissa)
            error = asm(ptx.error_text(spec.four_over_six), [*block, multiplier, value, *parts], effects=False)
            tried.append((error, bits, multiplier))
        six, four = tried
        bits, multiplier = (asm(ptx.CHOOSE, [four[0], six[0], four[i], six[i]], effects=False) for i in (1, 2))
    if spec.single or spec.four_over_six:
        return bits, [asm(ptx.codes_single_text(), [*block[i:i + 8], multiplier], effects=False) for i in (0, 8)]
    block = asm(ptx.underflow_text(), [*block, multiplier], "r" * 8, effects=False)
    return bits, [asm(ptx.codes_text(), [*block[i:i + 4], multiplier], effects=False) for i in (0, 4)]


# --- to memory ------------------------------------------------------------------------------------------------------

def targets_of(t: Thread, row, ok):
    """(row of the result, whether there is one) of each copy of a row."""
    spec = t.spec
    if not spec.copies:
        return [(row, ok)]
    at = [gmem_element(t.refs["rows"], row, spec.copies, i, 4) for i in range(spec.copies)]
    targets = [load_global(a, 1, ok)[0] for a in at]
    return [(target, ok & (target < spec.m * spec.copies)) for target in targets]  # unsigned: none of -1


def write_operand(t: Thread, targets, j, words, bits, poisoned) -> None:
    """Decodes and stores a warp's 32 blocks: a quad's 4 blocks are a 64-chunk, which the permutation mixes."""
    factor = asm(SCALE, [bits, i32(0x4440)], effects=False)
    factor = select(poisoned, 0x7FC07FC0, factor)
    base = t.transpose + t.warp * (4 * TRANSPOSE_WORDS)
    at = base + (t.lane // 4 * 144 + t.lane % 4 * 4)
    for h, word in enumerate(words):
        for s, pair in enumerate(decode_codes(word, factor)):
            pair = asm("{.reg .b32 f; mov.b32 f,0x43004300; mul.rn.bf16x2 $0,$1,f;}", [pair], effects=False)  # the decode's 2**7
            asm(f"st.shared.b32 [$0+{32 * s + 16 * h}],$1;", [at, pair], "")
    asm("bar.warp.sync -1;", outputs="")
    chunk = t.part * WARP + j * t.plan.warps_per_row * WARP  # the warp's first block
    source = base + (t.lane // 8 * 144 + t.lane % 8 * 16)
    for i in range(2):
        values = asm(f"ld.shared.v4.b32 {{$0,$1,$2,$3}},[$4+{i * 4 * 144}];", [source], "rrrr")
        here = i32(1) if t.full else chunk + (t.lane // 8 * 4 + 16 * i) < t.spec.row_blocks
        for row, ok in targets:
            start = gmem_element(t.refs["operand"], row, t.spec.k, chunk * 16 + t.lane * 8, 2)
            store_global(start + 512 * i, values, ok & here)
    asm("bar.warp.sync -1;", outputs="")


def write_packed(t: Thread, row, here, j, words, bits, poisoned) -> None:
    words = [select(poisoned, 0, word) for word in words]
    bits = select(poisoned, numerics.E4M3_NAN, bits)
    address = gmem_element(t.refs["packed"], row, t.spec.k // 2, t.index[j] * BLOCK_BYTES, 1)
    store_global(address, words, here)
    store_global(gmem_element(t.refs["scale"], row, t.spec.k // 16, t.index[j], 1), [bits], here, form="u8")


def write_values(t: Thread, row, here, j, block) -> None:
    address = gmem_element(t.refs["values"], row, t.spec.k, t.index[j] * 16, 2)
    for i in range(2):
        store_global(address + 16 * i, block[4 * i:4 * i + 4], here)


def quantize_produced(t: Thread, group, produced, maxima, parity, scaled) -> None:
    """scaled: `scales_of` the one amax, or None where each row has its own."""
    spec = t.spec
    row, ok = row_of(t, group)
    if spec.emit == "values":
        for j, block in enumerate(produced):
            write_values(t, row, ok if t.full else ok & t.inside[j], j, block)
        return
    targets = targets_of(t, row, ok)
    raw_max, finite_max = (None, None) if spec.pack > 1 else row_maxima(t, maxima, parity)
    poisoned = poisoned_blocks(t, maxima) if spec.pack > 1 else [i32(0x7F800000) <= raw_max] * t.plan.blocks
    if spec.amax == "row":
        scaled = scales_of(t, finite_max)
    elif spec.amax == "rows":
        scaled = scales_of(t, *load_global(gmem_element(t.refs["amax"], row, 1, 0, 4), 1, ok))
    if spec.amax in ("row", "rows"):
        first = t.part + t.lane == 0
        for target, there in targets:
            store_global(gmem_element(t.refs["global_scale"], target, 1, 0, 4), scaled[:1], there & first)
    for j, (block, (_, finite)) in enumerate(zip(produced, maxima)):
        here = ok if t.full else ok & t.inside[j]
        if spec.values:
            write_values(t, row, here, j, block)
        bits, words = quantize_block(t, block, finite, scaled)
        if spec.emit == "operand":
            write_operand(t, targets, j, words, bits, poisoned[j])
        else:
            write_packed(t, row, here, j, words, bits, poisoned[j])


def quantize_group(t: Thread, group, raw, parity, scaled) -> None:
    produced = produce(t, raw, parity)
    quantize_produced(t, group, produced, [block_maxima(t, block) for block in produced], parity, scaled)
