"""How rows lie over threads, and what a launch of the quantizers does."""
import dataclasses

from nvfp4jax.kernels.hopper.machine import CLUSTER, SMS, WARP

CLUSTERS = 2  # up to so many clusters, one launch beats two
MAX_K = 16 * WARP * 16 * 8
MAX_TILES = 512  # of a matrix: each warp reads their maxima
COLUMNS, CHUNK = 32, 64  # of a warp, where columns of x are quantized: of N, and of K
TRANSPOSE_WORDS = 36 * 8  # of a warp: 8 rows (64-chunks of K) of 32 words, padded against bank conflicts


@dataclasses.dataclass(frozen=True)
class Plan:
    """`grid` CTAs of `warps` warps; `warps_per_row` of them share a row, a lane owning `blocks` blocks of it, 32 *
    warps_per_row blocks apart. cluster: CTAs of a cluster, which share one reading of the whole tensor. tile: groups of rows
    that a CTA draws at a time, where it draws."""

    warps: int
    warps_per_row: int
    blocks: int
    grid: int
    cluster: int = 1
    tile: int = 1

    @property
    def rows(self) -> int:
        """Rows a CTA works on at a time: a group."""
        return self.warps // self.warps_per_row


def _power_of_two_at_least(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def scan_plan(m: int, k: int, words: int) -> Plan | None:
    """One launch for one amax: every cluster reads all rows, every CTA quantizes one group. None where two launches win.

    While the loads of all rows fit a thread's registers, CTAs of 4 warps that each read everything: an L2 latency instead of
    a cluster, which costs 0.8 us more than a plain launch; a second launch costs 1.2 us and its gap. Small CTAs start sooner."""
    units = -(-k // (16 * WARP))  # warps that one block a lane would take
    per_row = min(16, _power_of_two_at_least(units))
    blocks = -(-units // per_row)
    warps = max(4, per_row)
    groups = -(-m // (warps // per_row))
    if groups == 1 or groups * blocks * words <= 64:
        return Plan(warps, per_row, blocks, groups)
    warps = max(8, per_row)
    clusters = -(-m // (warps // per_row * CLUSTER))
    return Plan(warps, per_row, blocks, clusters * CLUSTER, CLUSTER) if clusters <= CLUSTERS else None


def plan_of(m: int, k: int, words: int, emit: str = "packed") -> Plan:
    """words: 32-bit registers that a block takes: 8, or 16 where it is float32 or has two inputs.

    Few rows: one block a lane, for latency. Many: up to 4 (2) blocks a lane and few warps a row, which saves reductions and
    the row's scalars. CTAs stay and fetch the next rows while they work on these; for codes of full lanes as many as their registers
    leave room for; operands of full lanes, four times as many bytes to store, come sooner from CTAs that each do one group."""
    units = -(-k // (16 * WARP))
    if m * units <= 16 * SMS:
        per_row = min(16, _power_of_two_at_least(units))
        warps = max(4, per_row)
        return Plan(warps, per_row, -(-units // per_row), -(-m // (warps // per_row)))
    per_row = min(16, _power_of_two_at_least(-(-units // (32 // words))))
    blocks = -(-units // per_row)
    warps = max(4, per_row)
    groups = -(-m // (warps // per_row))
    resident = 16 // (warps // 4) if blocks * words < 32 else groups if emit in ("operand", "values") else max(1, 12 // warps)
    return Plan(warps, per_row, blocks, min(groups, SMS * resident))


def matrices_plan(n: int, k: int) -> tuple[int, Plan]:
    """For many matrices [n, k]: how many rows are read as one, so that every lane has whole blocks, and a plan of tiles."""
    pack = next((p for p in (1, 2, 4, 8) if n % p == 0 and p * k % (16 * WARP) == 0 and p * k <= 2048), 1)
    n, k = n // pack, pack * k
    units = -(-k // (16 * WARP))
    per_row = min(16, _power_of_two_at_least(-(-units // 4)))
    warps = max(4, per_row)
    rows = warps // per_row
    return pack, _tiles(Plan(warps, per_row, -(-units // per_row), 0), -(-n // rows), rows * k * 2, n * k * 2)


def columns_plan(n: int, k: int, parts: int) -> Plan:
    """For matrices that lie as `parts` arrays [k, n]: a group is CHUNK of k and a CTA's columns, side by side."""
    warps = 4
    groups = parts * -(-n // (warps * COLUMNS)) * (k // CHUNK)
    return _tiles(Plan(warps, 1, 4, 0), groups, warps * COLUMNS * CHUNK * 2, parts * n * k * 2)


def _tiles(plan: Plan, groups: int, group_size: int, matrix_size: int) -> Plan:
    """The plan with tiles of some 32 KiB, at most MAX_TILES a matrix; sizes in bytes. As many CTAs as registers leave room for, three
    an SM, while their tiles, which the L2 must keep beside a matrix, are no more than 10 MB; a matrix that the L2 cannot keep is read
    twice from memory."""
    tile = max(1, (1 << 15) // group_size, -(-groups // MAX_TILES))
    tile = -(-groups // -(-groups // tile))  # tiles of a matrix alike
    resident = 12 // plan.warps
    if matrix_size <= 20_000_000:
        resident = min(resident, 10_000_000 // (tile * group_size * SMS))
    return dataclasses.replace(plan, grid=max(1, resident) * SMS, tile=tile)


@dataclasses.dataclass(frozen=True)
class Spec:
    """What a kernel does. source: "x", "rmsnorm" or "silu". amax: where it comes from: "row", "scalar" or "rows" (given; static:
    the given are global scales), "partials" (of an earlier launch), "scan" (of the tensor, in this launch) or "matrices" (of each
    `matrix` rows, in this launch). emit: "amax" (the partials: one a CTA), "packed", "operand", or "values": nothing quantized."""

    m: int
    k: int
    source: str
    single: bool  # float32 input
    amax: str
    emit: str
    static: bool = False
    pow2: bool = False
    four_over_six: str | None = None
    eps: float = 0.0
    masked: bool = False
    copies: int = 0  # row i of x goes to rows rows[i, 0], rows[i, 1], ... of this many
    values: bool = False  # also the bfloat16 values that are quantized, in natural order
    partials: int = 0
    matrix: int = 0
    pack: int = 1  # rows of x that are read as one of m; NaN or infinity still poisons only its own
    columns: int = 0  # rows lie as columns: x is one or several arrays [.., k, columns], which make a matrix one after another

    @property
    def row_blocks(self) -> int:
        return self.k // 16

    @property
    def parts(self) -> int:
        """Arrays that x is."""
        return self.matrix // self.columns if self.columns else 1

    @property
    def words(self) -> int:
        """i32 registers of a block's inputs."""
        return 16 if self.single or self.source == "silu" else 8


def groups_of_matrix(spec: Spec, plan: Plan) -> int:
    """In whole tiles."""
    if spec.columns:
        groups = spec.parts * -(-spec.columns // (plan.warps * COLUMNS)) * (spec.k // CHUNK)
    else:
        groups = -(-spec.matrix // plan.rows)
    return -(-groups // plan.tile) * plan.tile


@dataclasses.dataclass(frozen=True)
class Offsets:
    """Words of shared memory, and their number: row maxima (2 of a warp, of either parity), sums of squares, a warp's transposition,
    maxima of the CTA's warps (and draws), maxima of the cluster's CTAs."""

    max_slots: int
    square_slots: int
    transpose: int
    cta_slots: int
    cluster_slots: int
    words: int

    @classmethod
    def of(cls, spec: Spec, plan: Plan) -> "Offsets":
        sizes = (2 * 2 * plan.warps, 2 * plan.warps * plan.blocks if spec.source == "rmsnorm" else 0,
                 plan.warps * TRANSPOSE_WORDS if spec.emit == "operand" else 0,
                 2 * (plan.warps + 2) if spec.amax == "matrices" else plan.warps, plan.cluster)
        offsets = [0]
        for size in sizes:
            offsets.append(offsets[-1] + size)
        return cls(*offsets)
