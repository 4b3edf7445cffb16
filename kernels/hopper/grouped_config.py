"""The shape of the grouped kernel: how many rows a block takes, and what its shared memory holds."""
import dataclasses

from nvfp4jax.kernels.hopper.grouped_plan import Table
from nvfp4jax.kernels.hopper.machine import SHARED_MEMORY, SMS

STEP = 256  # K of a pipeline step: a 128-byte row of packed codes
CHUNK = 64  # K of a token tile's 128-byte row


@dataclasses.dataclass(frozen=True)
class Config:
    """tiles: the token tiles that a block may load, multiples of 8; computes: those it may compute with (each its own
    code).

    warpgroups of 64 weight rows a CTA, per_sm CTAs an SM. x_rows: 128-byte rows in a stage of tokens: 4, 2 or 1 chunks
    of 64 of K, as many as the tile leaves room for. Where that is a whole step for every tile, weights and tokens share
    their stages and barriers. crowd: the tile for an expert that has half of all rows, where it is not the largest.
    """

    tiles: tuple[int, ...]
    computes: tuple[int, ...]
    x_rows: int
    warpgroups: int = 4
    per_sm: int = 1
    sms: int = SMS
    crowd: int = 0

    def compute(self, tile):
        """The tile that a loaded one is computed with."""
        return min(t for t in self.computes if t >= tile)

    def chunks(self, compute):
        """64-chunks of K in a stage of tokens."""
        return max(q for q in (1, 2, 4) if q * compute <= self.x_rows)

    @property
    def scale_block(self):
        """K of a row of scales in shared memory: 64 bytes of it, so that more weights fit; 128 where rows are few."""
        return 1024 if self.warpgroups > 2 else 2048

    @property
    def together(self):
        """Whether a stage holds a step's weights and tokens."""
        return self.chunks(self.computes[-1]) * CHUNK == STEP


def config(m, experts, n, k, *, gated):
    """The kernel's shape for M rows of E experts, N output channels: a rule on the rows an expert gets on average.

    Every choice gives the same bits. The largest tile is for routings far from the average: with it, all rows on a few
    experts make one or two waves of CTAs.
    """
    rows = 128 if gated else 256  # output channels of a tile of 4 warpgroups
    mean = m / experts
    most = mean + 2 * mean**0.5  # 19 of 20 experts have fewer, where tokens choose evenly
    tiles = -(-n // rows)
    if min(m, experts) * tiles < 2 * SMS and mean <= 8:  # too few tiles: 64 rows a CTA, two CTAs an SM
        return Config((8,), (8,), 32, warpgroups=1, per_sm=2)
    if mean <= 1:
        return Config((8,), (8,), 32)
    crowd = -(-m // (SMS // tiles) // 8) * 8 if tiles <= SMS else 0  # all rows on one expert: one wave
    if mean <= 6:
        largest = min(32, max(24, crowd))
        return Config(tuple(range(8, largest + 1, 8)), (8, largest), 4 * largest)
    if mean <= 20:  # all rows on 8 experts: two waves
        largest = min(64, max(40, -(-m // 64 // max(1, 2 * SMS // (8 * tiles))) * 8))
        if not largest < crowd <= 96:
            return Config((8, 16, 24, 32, largest), (16, 24, 32, largest), 128)
        return Config((8, 16, 24, 32, largest, crowd), (16, 24, 32, largest, crowd), 128, crowd=crowd)
    if most <= 96:
        low, high = (-(-int(rows) // 8) * 8 for rows in (mean, most))
        return Config(tuple(range(max(8, low - 16), high + 1, 8)), (low, high), 2 * high)
    # Tokens bind: two warpgroups of 64 rows with up to 256 tokens; the smaller tile is what an even split of `most`
    # gives.
    low = -(-int(most / -(-most // 256)) // 16) * 16
    return Config((low - 32, low, 256), (low, 256), 256, warpgroups=2)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Shared memory of a kernel: weight rows a stage, bytes of a row of scales, stages of weights, of tokens and of
    scales."""

    rows: int
    scale_row: int
    w_stages: int
    x_stages: int
    s_stages: int


def layout_of(c: Config, k: int, halves: int, table: Table) -> Layout:
    """The rings that fit. Raises NotImplementedError where K is too long for rows of scales that TMA cannot cut."""
    rows = c.warpgroups * 64
    scale_row = k // 16 if k % STEP else min(k, c.scale_block) // 16
    x_bytes, w_bytes = c.x_rows * CHUNK * 2, rows * STEP // 2
    x_stages_a_step = STEP // CHUNK // c.chunks(c.computes[0])
    # Pallas aligns arrays to 1024 bytes; the last 1024 are for the barriers.
    free = SHARED_MEMORY // c.per_sm - 1024 - -(-table.words * 4 // 1024) * 1024
    for s_stages in ((2, 1) if c.per_sm == 1 else (1,)):
        left = free - s_stages * -(-halves * scale_words(rows // halves, scale_row, k) * 4 // 1024) * 1024
        if c.together:  # a power of two: the number of a stage then costs one instruction
            x_stages = w_stages = max((q for q in (2, 4, 8) if q * (w_bytes + x_bytes) <= left), default=0)
        else:  # tokens come from the L2: a step less of them does not delay the weights
            w_stages = max(2, min(8, (left + x_bytes * x_stages_a_step) // (w_bytes + x_bytes * x_stages_a_step)))
            x_stages = min(8, (left - w_stages * w_bytes) // x_bytes)
        if w_stages >= 2 and x_stages >= 2:
            return Layout(rows, scale_row, w_stages, x_stages, s_stages)
    raise NotImplementedError(f"K = {k} is too long: {rows} rows of scales do not fit the shared memory; a multiple of "
                              f"{STEP} is cut into pieces, other K go up to about 20000")


def scale_words(rows: int, scale_row: int, k: int) -> int:
    """i32 words of the scales of `rows` rows in shared memory. K that TMA cannot stride over: whole rows, in copies of
    256."""
    return rows * scale_row // 4 if k % STEP == 0 else -(-(rows * scale_row // 4 + 4) // 256) * 256
