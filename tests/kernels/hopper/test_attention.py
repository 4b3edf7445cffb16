"""Attention on Hopper against float64: from the PTX on the CPU, on a GPU; and what the compiler says of the kernels.

What lies behind a row's last query is NaN in every cache here.
"""
import aot
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import ptx_attention
import pytest

from nvfp4jax import fp8
from nvfp4jax.kernels.hopper import attention, attention_decode, attention_plan, attention_prefill, attention_shared, threads

BF16 = ml_dtypes.bfloat16
needs_aot = pytest.mark.skipif(not aot.available(), reason="needs jax-cuda13-plugin and -pjrt")
TOLERANCE = 2.6e-3  # of bfloat16 weights and outputs: 2.0e-3 to 2.2e-3


def reference(q, keys, values, starts, *, window=None, soft_cap=None, scale=None):
    """float64, of one layer."""
    q, keys, values = (np.asarray(a).astype(np.float64) for a in (q, keys, values))
    rows, tokens, heads, d = q.shape
    out, group = np.zeros(q.shape), heads // keys.shape[1]
    for b, t, h in np.ndindex(rows, tokens, heads):
        end = starts[b] + t + 1
        seen = slice(0 if window is None else max(0, end - window), end)
        s = keys[b, h // group, seen] @ q[b, t, h] * (d**-0.5 if scale is None else scale)
        if soft_cap:
            s = soft_cap * np.tanh(s / soft_cap)
        p = np.exp(s - s.max())
        out[b, t, h] = p @ values[b, h // group, seen] / p.sum()
    return out


def inputs(rng, rows, tokens, heads, group, d, capacity, starts=None, counts=None):
    """q, keys, values (two layers), layer, starts, counts; keys differ in size, so that maxima move."""
    starts = rng.integers(0, capacity - tokens + 1, rows) if starts is None else starts
    starts = np.asarray(starts, np.int32)
    counts = np.full(rows, tokens, np.int32) if counts is None else np.asarray(counts, np.int32)
    q = rng.normal(size=(rows, tokens, heads * group, d))
    keys, values = rng.normal(size=(2, 2, rows, heads, capacity, d))
    keys *= 2 ** rng.normal(size=(capacity, 1))
    dead = np.arange(capacity) >= (starts + counts)[:, None]
    keys[:, dead[:, None].repeat(heads, 1)] = values[:, dead[:, None].repeat(heads, 1)] = np.nan
    return *(a.astype(BF16) for a in (q, keys, values)), np.int32(1), starts, counts


def error(got, want, counts):
    """Over the queries that count; the others are finite."""
    got = np.asarray(got).astype(np.float64)
    assert np.isfinite(got).all()
    counted = np.arange(got.shape[1]) < counts[:, None]
    return np.linalg.norm((got - want)[counted]) / np.linalg.norm(want[counted])


def bits(a):
    return np.asarray(a).view(np.uint16)


# --- the plan ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("rows, heads, capacity, tokens, window", [(37, 4, 1088, 1, None), (5, 2, 3000, 3, 700)])
def test_every_piece_is_planned_once(rows, heads, capacity, tokens, window):
    starts = np.random.default_rng().integers(0, capacity - tokens + 1, rows).astype(np.int32)
    plan = jax.jit(lambda s: attention_plan.plan(s, tokens=tokens, heads=heads, capacity=capacity, window=window))(starts)
    assert not plan.counters.any()
    kinds, slots, groups = {}, [], {}
    for cta in np.asarray(plan.table):
        units = cta[1:][cta[1:, 3] > 0]
        assert cta[0, 0] == units[:, 3].sum() and cta[0, 1] in (0, len(units)) and (cta[1 + len(units):, 3] == 0).all()
        for which, end, first, count, kind, piece_slot, group_slot, _ in units:
            assert end == starts[which // heads] + tokens
            for piece in range(first, first + count):
                assert (which, piece) not in kinds
                kinds[which, piece] = kind
                if kind == attention_plan.PIECES:
                    slots.append(piece_slot + piece)
                if kind != attention_plan.WHOLE:
                    groups.setdefault(group_slot + piece // 8, set()).add((which, piece // 8))
    low = np.zeros(rows, int) if window is None else np.maximum(starts + 1 - window, 0) // 128
    wanted = {(b * heads + h, piece) for b in range(rows) for h in range(heads)
              for piece in range(low[b], (starts[b] + tokens - 1) // 128 + 1)}
    assert set(kinds) == wanted
    assert len(set(slots)) == len(slots) and all(0 <= s < attention_plan.SLOTS for s in slots)
    assert all(len(owners) == 1 and attention_plan.SLOTS <= s < 2 * attention_plan.SLOTS for s, owners in groups.items())


# --- from the PTX, on the CPU -----------------------------------------------------------------------------------------

def ptx_decode(monkeypatch, q, keys, values, layer, starts, *, ctas, window=None, soft_cap=None, scales=()):
    monkeypatch.setattr(threads, "thread_kernel", ptx_attention.run_thread_kernel)
    plan = attention_plan.plan(starts, tokens=q.shape[1], heads=keys.shape[2], capacity=keys.shape[3], window=window, ctas=ctas)
    plan = jax.tree.map(np.array, plan)
    out = attention_decode.decode(q, keys, values, layer, plan, scale=q.shape[3]**-0.5, window=window, soft_cap=soft_cap, scales=scales)
    monkeypatch.undo()
    assert not plan.counters.any()
    return out, set(plan.table[:, 1:][plan.table[:, 1:, 3] > 0][:, 4])


def ptx_prefill(q, keys, values, layer, starts, counts, *shared, ctas, window=None, soft_cap=None):
    f = lambda *a: attention_prefill.prefill(*a[:6], shared=a[6:], scale=q.shape[3]**-0.5, window=window, soft_cap=soft_cap, ctas=ctas)
    args = q, keys, values, layer, starts, counts, *shared
    kernel, = aot.compile(f, *(jax.ShapeDtypeStruct(np.shape(a), a.dtype) for a in args))
    out = np.full(q.shape, np.nan, BF16)
    ptx_attention.run_prefill(kernel, args, out, grid=ctas)
    return out


# Kinds of units: whole; pieces of up to two groups; pieces of more groups; groups.
DECODE = {
    "whole": dict(shape=(2, 1, 1, 8, 64, 200), ctas=1, starts=[90, 199], kind=0),
    "whole, D 128": dict(shape=(2, 1, 1, 8, 128, 300), ctas=1, starts=[130, 299], kind=0),
    "pieces": dict(shape=(1, 1, 1, 5, 64, 1100), ctas=3, starts=[1050], kind=1),
    "pieces of three groups": dict(shape=(1, 1, 1, 8, 64, 2300), ctas=5, starts=[2298], kind=1),
    "groups, two tokens": dict(shape=(1, 2, 1, 10, 64, 2300), ctas=3, starts=[2290], sizes=(1 << 24, 8), kind=2),
    "window and cap": dict(shape=(3, 3, 2, 6, 64, 400), ctas=2, window=150, soft_cap=5.0, kind=0),
}


@pytest.mark.parametrize("case", [c if c == "whole" else pytest.param(c, marks=pytest.mark.slow) for c in DECODE])
@pytest.mark.aot
@needs_aot
def test_decode_ptx(monkeypatch, case):
    case = dict(DECODE[case])
    shape, kind, starts = case.pop("shape"), case.pop("kind"), case.pop("starts", None)
    sizes = case.pop("sizes", attention_plan.SIZES)
    q, keys, values, layer, starts, counts = inputs(np.random.default_rng(), *shape, starts)
    with monkeypatch.context() as m:
        m.setattr(attention_plan, "SIZES", sizes)
        out, kinds = ptx_decode(m, q, keys, values, layer, starts, **case)
    case.pop("ctas")
    assert kind in kinds and error(out, reference(q, keys[1], values[1], starts, **case), counts) < TOLERANCE


@pytest.mark.aot
@needs_aot
@pytest.mark.parametrize("shape, starts, counts, window, soft_cap", [
    ((1, 70, 1, 2, 64, 200), [100], None, None, None),
    pytest.param((1, 70, 1, 2, 128, 300), [100], None, None, None, marks=pytest.mark.slow),
    pytest.param((2, 40, 1, 2, 64, 1500), [1300, 3], [30, 40], 1200, 5.0, marks=pytest.mark.slow)], ids=["D 64", "D 128", "window, cap, counts"])
def test_prefill_ptx_and_its_bits_in_decode(monkeypatch, shape, starts, counts, window, soft_cap):
    """Of two heads a CTA has two tiles. A query of decode has the bits that it has here."""
    rng = np.random.default_rng()
    q, keys, values, layer, starts, counts = inputs(rng, *shape, starts, counts)
    options = dict(window=window, soft_cap=soft_cap)
    out = ptx_prefill(q, keys, values, layer, starts, counts, ctas=len(q), **options)
    assert error(out, reference(q, keys[1], values[1], starts, **options), counts) < TOLERANCE
    t = rng.integers(counts[0])
    alone, _ = ptx_decode(monkeypatch, q[:1, t:t + 1], keys[:, :1], values[:, :1], layer, starts[:1] + np.int32(t), ctas=2, **options)
    assert (bits(alone)[0, 0] == bits(out)[0, t]).all()


# --- FP8 caches -------------------------------------------------------------------------------------------------------

def in_fp8(rng, *caches):
    """Of each cache: codes and scales, of which slots of NaN have NaN and codes of any kind; and decoded, bf16. Scales differ from slot to
    slot."""
    out = []
    for cache in caches:
        cache = cache.astype(np.float32) * 2.0 ** rng.integers(-3, 4, cache.shape[:-1])[..., None]
        x = fp8.quantize(jnp.asarray(cache))
        codes, scale = np.array(x.qvalue), np.array(x.scale)
        dead = np.isnan(scale)
        codes.view(np.uint8)[dead] = rng.integers(0, 256, (dead.sum(), cache.shape[-1]))
        decoded = np.where(dead[..., None], np.nan, codes.astype(np.float32) * scale[..., None]).astype(BF16)
        out.append((codes, scale, decoded))
    return zip(*out)


@pytest.mark.parametrize("case", [c if c == "whole" else pytest.param(c, marks=pytest.mark.slow) for c in DECODE])
@pytest.mark.aot
@needs_aot
def test_fp8_decode_ptx(monkeypatch, case):
    """The bits of a bfloat16 cache that has the decoded keys and values; codes of both signs, subnormal ones too."""
    case, rng = dict(DECODE[case]), np.random.default_rng()
    shape, kind, starts = case.pop("shape"), case.pop("kind"), case.pop("starts", None)
    sizes = case.pop("sizes", attention_plan.SIZES)
    q, keys, values, layer, starts, counts = inputs(rng, *shape, starts)
    keys[..., ::5] = keys[..., ::5] * BF16(2.0**-10)
    codes, scales, decoded = in_fp8(rng, keys, values)
    with monkeypatch.context() as m:
        m.setattr(attention_plan, "SIZES", sizes)
        out, kinds = ptx_decode(m, q, *codes, layer, starts, scales=scales, **case)
        same, _ = ptx_decode(m, q, *decoded, layer, starts, **case)
    case.pop("ctas")
    assert kind in kinds and (bits(out) == bits(same)).all()
    assert error(out, reference(q, decoded[0][1], decoded[1][1], starts, **case), counts) < TOLERANCE


# --- rows that begin alike --------------------------------------------------------------------------------------------

def divide(rng, keys, values, slots, rows, room):
    """Caches [L, N, H, S, D] of which each of `rows` rows has the first slots[n] slots in common -> the rows whole, what they share, and
    their own behind it, with `room` slots."""
    each = rows // keys.shape[1]
    whole, own = [], []
    for a in (keys, values):
        wide = np.concatenate([a.repeat(each, 1), np.full((*a.shape[:1], rows, a.shape[2], room, a.shape[4]), np.nan, a.dtype)], 3)
        for b in range(rows):
            rest = wide[:, b, :, slots[b // each]:slots[b // each] + room]
            rest[...] = rng.normal(size=rest.shape)
        whole.append(wide)
        own.append(np.stack([wide[:, b, :, slots[b // each]:slots[b // each] + room] for b in range(rows)], 1))
    return whole, own


def cut_off(front, *caches):
    """Caches [L, N, H, S, D] whose rows are made to begin with the same `front` slots -> what lies behind these, and these, [L, 1, H, F, D]."""
    for a in caches:
        a[:, :, :, :front] = a[:, :1, :, :front]
    return [a[:, :, :, front:] for a in caches], tuple(a[:, :1, :, :front] for a in caches) if front else ()


def ptx_shared_decode(monkeypatch, q, own, shared, front, slots, layer, starts, *, ctas, soft_cap=None, scales=()):
    """slots: of each row. front: nothing, or a prefix. scales: of their own keys and values, where these are FP8."""
    heads, scale = shared[0].shape[2], q.shape[3]**-0.5
    s = attention_shared.shape_of(q, shared[0], front, scale, soft_cap)
    args = q, *shared, layer, slots, np.array(attention_shared.units(slots, s)), *front
    f = lambda *a: attention_shared.shared_sums(*a, scale=scale, soft_cap=soft_cap, ctas=ctas)[:2]
    kernel, = aot.compile(f, *(jax.ShapeDtypeStruct(np.shape(a), a.dtype) for a in args))
    outs = [np.full((s.units, *q.shape[:1], q.shape[2], last), np.nan, np.float32) for last in (q.shape[3], attention_shared.MARKS)]
    ptx_attention.run_shared(kernel, args, s.padded, s.each, outs, grid=ctas)
    monkeypatch.setattr(threads, "thread_kernel", ptx_attention.run_thread_kernel)
    plan = attention_plan.plan(starts, tokens=1, heads=heads, capacity=own[0].shape[3], shared=slots, ctas=ctas)
    plan = jax.tree.map(np.array, plan)
    out = attention_decode.decode(q, *own, layer, plan, scale=scale, soft_cap=soft_cap, shared=(*outs, s.unit), scales=scales)
    monkeypatch.undo()
    assert not plan.counters.any()
    return out, set(plan.table[:, 1:][plan.table[:, 1:, 3] > 0][:, 4])


SHARED = {
    "a piece and nothing": dict(shape=(4, 2, 1, 8, 64), slots=[128, 0], own=[0, 100, 20, 130], room=140, ctas=2, kind=0, few=0),
    "groups, five of 64, a cap": dict(shape=(3, 1, 2, 5, 64), slots=[1280], own=[900, 3, 1200], room=1300, ctas=3, kind=2, sizes=(8,),
                                      soft_cap=5.0, few=0),
    "pieces apart": dict(shape=(4, 2, 1, 8, 64), slots=[1408, 256], own=[0, 700, 20, 130], room=800, ctas=3, kind=0),
    "two consumers, D 128": dict(shape=(6, 1, 1, 16, 128), slots=[256], own=range(6), room=20, ctas=2, kind=0, few=0),
    "a prefix, a piece more, no more": dict(shape=(4, 2, 2, 8, 64), front=1, slots=[256, 128], own=[0, 100, 20, 30], room=120, ctas=2, kind=0, few=0),
    "a prefix into a group, a cap": dict(shape=(3, 1, 1, 5, 64), front=9, slots=[1408], own=[7, 130, 2], room=140, ctas=2, kind=0, few=0,
                                         soft_cap=5.0),
    "a prefix of pieces apart": dict(shape=(6, 3, 1, 4, 128), front=2, slots=[384, 256, 0], own=[0, 3, 20, 30, 5, 129], room=130, ctas=3, kind=0),
}


@pytest.mark.parametrize("case, in_codes", [(c, f) if (c, f) == ("a piece and nothing", False) else pytest.param(c, f, marks=pytest.mark.slow)
                                            for c in SHARED for f in (False, True)])
@pytest.mark.aot
@needs_aot
def test_shared_ptx(monkeypatch, case, in_codes):
    """The bits of rows that share nothing. own: slots of a row before its query, behind those that it shares. in_codes: an FP8 cache of
    their own beside decoded keys and values that they share."""
    case = dict(SHARED[case])
    rows, shared_rows, heads, group, d = case.pop("shape")
    rng, kind, room, ctas = np.random.default_rng(), case.pop("kind"), case.pop("room"), case.pop("ctas")
    few, front = case.pop("few", attention_shared.FEW), case.pop("front", 0) * 128
    of_row = np.repeat(case.pop("slots"), rows // shared_rows).astype(np.int32)
    starts = (of_row + np.array(case.pop("own"))).astype(np.int32)
    sizes = case.pop("sizes", attention_plan.SIZES)
    capacity = max(128, of_row.max(), front + 16)
    _, keys, values, layer, _, _ = inputs(rng, shared_rows, 1, heads, group, d, capacity, [capacity - 1] * shared_rows)
    shared, prefix = cut_off(front, keys, values)
    q, counts = rng.normal(size=(rows, 1, heads * group, d)).astype(BF16), np.ones(rows, np.int32)
    whole, own = divide(rng, keys, values, of_row[::rows // shared_rows], rows, room)
    scales = ()
    if in_codes:
        codes, scales, own = in_fp8(rng, *own)
        for cache, decoded in zip(whole, own, strict=True):
            for b, slot in enumerate(of_row):
                cache[:, b, :, slot:slot + room] = decoded[:, b]
    alone, _ = ptx_decode(monkeypatch, q, *whole, layer, starts, ctas=ctas, **case)
    with monkeypatch.context() as m:
        m.setattr(attention_plan, "SIZES", sizes)
        m.setattr(attention_shared, "FEW", few)
        own = codes if in_codes else own
        out, kinds = ptx_shared_decode(m, q, own, shared, prefix, of_row, layer, starts, ctas=ctas, scales=scales, **case)
    assert kind in kinds and (bits(out) == bits(alone)).all()
    assert error(out, reference(q, whole[0][1], whole[1][1], starts, **case), counts) < TOLERANCE


@pytest.mark.aot
@pytest.mark.slow
@needs_aot
@pytest.mark.parametrize("slots, front", [([128, 0], 0), ([256, 128], 128)], ids=["alone", "behind a prefix"])
def test_shared_prefill_ptx(slots, front):
    """Two rows of a prefill behind 128 slots that they share, two that share none; and so behind 128 slots of all."""
    rng, layer, of_row = np.random.default_rng(), np.int32(1), np.repeat(slots, 2).astype(np.int32)
    _, keys, values, _, _, _ = inputs(rng, 2, 1, 1, 2, 64, 140 + front, [139 + front] * 2)
    shared, prefix = cut_off(front, keys, values)
    q = rng.normal(size=(4, 30, 2, 64)).astype(BF16)
    whole, own = divide(rng, keys, values, of_row[::2], 4, 50)
    starts, counts = of_row + np.array([0, 20, 5, 11], np.int32), np.array([30, 10, 30, 30], np.int32)
    out = ptx_prefill(q, *own, layer, starts, counts, *shared, of_row, *prefix, ctas=2)
    alone = ptx_prefill(q, *whole, layer, starts, counts, ctas=2)
    some = np.arange(30) < counts[:, None]
    assert (bits(out)[some] == bits(alone)[some]).all()
    assert error(out, reference(q, whole[0][1], whole[1][1], starts), counts) < TOLERANCE


# --- what the compiler says -------------------------------------------------------------------------------------------

def structs(rows, tokens, heads, group, d, capacity, layers=2):
    struct = jax.ShapeDtypeStruct
    cache = struct((layers, rows, heads, capacity, d), jnp.bfloat16)
    return struct((rows, tokens, heads * group, d), jnp.bfloat16), cache, cache, struct((rows,), jnp.int32), struct((), jnp.int32)


@pytest.mark.aot
@needs_aot
@pytest.mark.parametrize("shape, options, registers, main_loop", [
    ((64, 1, 4, 8, 128, 1088), {}, 184, 450),
    pytest.param((3, 4, 4, 8, 128, 8192), {}, 248, 1200, marks=pytest.mark.slow),
    pytest.param((3, 1, 2, 7, 64, 2000), dict(window=1000, soft_cap=50.0), 184, 450, marks=pytest.mark.slow)])
def test_decode_compiles(shape, options, registers, main_loop):
    def f(q, keys, values, starts, layer):
        return attention.attention(q, keys, values, starts, layer=layer, **options)

    kernel, = aot.compile(f, *structs(*shape))
    assert not kernel.spills and not kernel.warnings and kernel.registers <= registers
    assert not kernel.sass or sum(kernel.loop("HMMA").values()) <= main_loop


@pytest.mark.aot
@needs_aot
@pytest.mark.parametrize("shape, options, registers, main_loop", [
    ((64, 1, 4, 8, 128, 1088), {}, 184, 720),
    pytest.param((3, 4, 4, 8, 128, 8192), {}, 248, 1500, marks=pytest.mark.slow),
    pytest.param((3, 1, 2, 7, 64, 2000), dict(window=1000, soft_cap=50.0), 184, 680, marks=pytest.mark.slow)])
def test_fp8_decode_compiles(shape, options, registers, main_loop):
    """The memory's time has room for 882 instructions of a warp and piece; some 80 of the loop's run only where a unit begins or ends."""
    def f(q, keys, values, starts, layer, *scales):
        return attention.attention(q, keys, values, starts, layer=layer, scales=scales, **options)

    q, cache, _, starts, layer = structs(*shape)
    codes, scale = jax.ShapeDtypeStruct(cache.shape, jnp.float8_e4m3fn), jax.ShapeDtypeStruct(cache.shape[:-1], jnp.float32)
    kernel, = aot.compile(f, q, codes, codes, starts, layer, scale, scale)
    assert not kernel.spills and not kernel.warnings and kernel.registers <= registers
    assert not kernel.sass or sum(kernel.loop("HMMA").values()) <= main_loop


@pytest.mark.aot
@needs_aot
@pytest.mark.parametrize("shape, shared_rows, capacity, front, main_loop", [
    ((1024, 1, 4, 8, 128, 640), 64, 1024, 0, 700), ((1008, 1, 4, 8, 128, 640), 63, 232, 768, 700),
    *(pytest.param(*x, marks=pytest.mark.slow) for x in (
        ((48, 1, 2, 7, 64, 200), 4, 2000, 0, 1250), ((48, 1, 2, 7, 64, 260), 4, 100, 256, 1250), ((8, 300, 4, 8, 128, 640), 1, 1024, 0, None),
        ((8, 300, 4, 8, 128, 640), 2, 300, 768, None)))])
def test_shared_compiles(shape, shared_rows, capacity, front, main_loop):
    """Decode fetches a unit's first sums in the main loop, those of single pieces in more instructions."""
    def f(q, keys, values, starts, layer, shared):
        return attention.attention(q, keys, values, starts, layer=layer, shared=shared)

    q, keys, values, starts, layer = structs(*shape)
    shared = [jax.ShapeDtypeStruct((*a.shape[:1], shared_rows, *a.shape[2:3], capacity, a.shape[4]), a.dtype) for a in (keys, values)]
    prefix = tuple(jax.ShapeDtypeStruct((*a.shape[:1], 1, *a.shape[2:3], front, a.shape[4]), a.dtype) for a in (keys, values)) if front else ()
    kernels = aot.compile(lambda *a: f(*a[:5], attention.Shared(*a[5:8], a[8:] or None)), q, keys, values, starts, layer, *shared, starts, *prefix)
    assert [k.registers <= limit for k, limit in zip(kernels, (168, 200), strict=shape[1] == 1)] == [True] * len(kernels)
    assert not any(k.spills or k.warnings for k in kernels)
    assert not kernels[-1].sass or main_loop is None or sum(kernels[-1].loop("HMMA").values()) <= main_loop


@pytest.mark.aot
@needs_aot
@pytest.mark.parametrize("shape, options", [
    pytest.param((8, 1024, 4, 8, 128, 1088), {}, marks=pytest.mark.slow), pytest.param((3, 300, 2, 7, 64, 2000), {}, marks=pytest.mark.slow),
    pytest.param((3, 100, 4, 8, 128, 8192), dict(window=1000, soft_cap=50.0), marks=pytest.mark.slow)])
def test_prefill_compiles(shape, options):
    def f(q, keys, values, starts, layer):
        return attention.attention(q, keys, values, starts, layer=layer, **options)

    kernel, = aot.compile(f, *structs(*shape))
    assert not kernel.spills and not kernel.warnings and kernel.registers == 168
    if kernel.sass:
        assert kernel.sass.count("HGMMA") == 2 * (shape[4] // 16 + 8)  # in the loop; the first scores, the last values


@pytest.mark.aot
@needs_aot
@pytest.mark.parametrize("tokens", [1, pytest.param(200, marks=pytest.mark.slow)])
def test_a_loop_over_layers_copies_no_cache(tokens):
    """The compiled program of a scan over layers: nothing in it has the size of a layer's keys but the cache itself, and what rows share."""
    args = structs(4, tokens, 2, 8, 128, 600, layers=3)
    shared = [jax.ShapeDtypeStruct((3, rows, 2, slots, 128), jnp.bfloat16) for rows, slots in ((2, 300), (2, 300), (1, 256), (1, 256))]

    def f(q, keys, values, starts, *shared):
        shared = attention.Shared(*shared[:2], starts // 256 * 128, shared[2:])
        plan = attention.plan(starts, q, keys, shared=shared)
        return jax.lax.fori_loop(0, 3, lambda i, q: attention.attention(q, keys, values, starts, layer=i, plan=plan, shared=shared), q)

    text = ptx_attention.compiled_text(f, *args[:4], *shared)
    assert "custom-call" in text and "bf16[3,4,2,600,128]" in text and "bf16[3,2,2,300,128]" in text
    sizes = "3,4,2,600,128", "4,2,600,128", "1,4,2,600,128", "24,600,128", "3,2,2,300,128", "2,2,300,128", "1,2,2,300,128", "12,300,128"
    sizes += "3,1,2,256,128", "1,2,256,128", "1,1,2,256,128", "6,256,128"
    made = [line for line in text.splitlines() if "=" in line and any(f" = bf16[{size}]" in line for size in sizes)]
    allowed = "parameter(", "get-tuple-element(", "bitcast("
    assert made and all(any(a in line for a in allowed) for line in made), made


# --- on a GPU ---------------------------------------------------------------------------------------------------------

def run(q, keys, values, layer, starts, counts=None, scales=None, **options):
    f = jax.jit(lambda q, k, v, s, i, c, scales: attention.attention(q, k, v, s, layer=i, counts=c, scales=scales, **options))
    return np.asarray(f(q, keys, values, starts, layer, counts, scales))


GPU = {
    "edges": dict(shape=(17, 1, 4, 8, 128, 1088),
                  starts=[0, 14, 15, 16, 126, 127, 128, 254, 255, 256, 510, 512, 1022, 1023, 1024, 1086, 1087]),
    "long": dict(shape=(3, 1, 4, 8, 128, 8192), starts=[8191, 7999, 4096]),
    "long window": dict(shape=(2, 1, 2, 8, 128, 8192), starts=[8191, 5000], window=1500),
    "7 of 64, cap": dict(shape=(5, 1, 2, 7, 64, 700), soft_cap=20.0),
    "3 tokens, window": dict(shape=(6, 3, 4, 6, 128, 900), window=200),
    "no groups": dict(shape=(4, 1, 32, 1, 128, 500)),
    "32 columns": dict(shape=(3, 2, 3, 16, 64, 4000)),
    "prefill": dict(shape=(2, 200, 2, 4, 128, 300), starts=[0, 100], counts=[200, 150]),
    "prefill, window": dict(shape=(2, 300, 2, 2, 64, 2600), starts=[2200, 77], window=1500),
    "prefill, cap": dict(shape=(1, 130, 4, 1, 128, 2000), starts=[1870], soft_cap=20.0),
    "prefill, a row of no query": dict(shape=(2, 150, 1, 2, 128, 200), starts=[0, 10], counts=[0, 140]),
}


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU)
def test_on_a_gpu(case):
    case = dict(GPU[case])
    given = case.pop("counts", None)
    *args, counts = inputs(np.random.default_rng(), *case.pop("shape"), case.pop("starts", None), given)
    out = run(*args, None if given is None else counts, **case)
    q, keys, values, _, starts = args
    with np.errstate(invalid="ignore"):  # of queries that do not count
        want = reference(q, keys[1], values[1], starts, **case)
    assert error(out, want, counts) < TOLERANCE


@pytest.mark.gpu
@pytest.mark.parametrize("case", [case for case in GPU if not case.startswith("prefill")])
def test_fp8_on_a_gpu(case):
    """The bits of a bfloat16 cache that has the decoded keys and values."""
    case, rng = dict(GPU[case]), np.random.default_rng()
    q, keys, values, layer, starts, counts = inputs(rng, *case.pop("shape"), case.pop("starts", None))
    keys[..., ::5] = keys[..., ::5] * BF16(2.0**-10)
    codes, scales, decoded = in_fp8(rng, keys, values)
    out = run(q, *codes, layer, starts, scales=scales, **case)
    assert (bits(out) == bits(run(q, *decoded, layer, starts, **case))).all()
    assert error(out, reference(q, decoded[0][1], decoded[1][1], starts, **case), counts) < TOLERANCE


@pytest.mark.gpu
def test_bits_of_a_row_in_every_batch():
    """Batches of 1 to 256, permuted, in larger caches, and whatever the counters' last use."""
    rng = np.random.default_rng()
    q, keys, values, layer, starts, _ = inputs(rng, 256, 1, 4, 8, 128, 1088)
    whole = bits(run(q, keys, values, layer, starts))
    for count, wider in ((1, 0), (2, 0), (8, 0), (64, 0), (256, 0), (64, 12), (8, 960)):
        own = rng.permutation(256)[:count]
        wide = [np.pad(a[:, own], ((0, 0),) * 3 + ((0, wider), (0, 0)), constant_values=np.nan) for a in (keys, values)]
        assert (bits(run(q[own], *wide, layer, starts[own])) == whole[own]).all(), (count, wider)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 1100])
def test_bits_of_a_query_in_prefill_chunks_and_decode(window):
    rng = np.random.default_rng()
    tokens = 2500
    q, keys, values, layer, starts, _ = inputs(rng, 2, tokens, 2, 8, 128, tokens + 100, [0, 0])
    whole = bits(run(q, keys, values, layer, starts, window=window))
    for first, count in ((0, 100), (100, 700), (801, 1699), (77, 3)):
        part = run(q[:, first:first + count], keys, values, layer, starts + np.int32(first), window=window)
        assert (bits(part) == whole[:, first:first + count]).all(), (first, count)
    for few in (3, 64):  # divided and whole
        at = rng.permutation(tokens)[:few]
        cache = (np.repeat(a[:, :1], few, 1) for a in (keys, values))
        assert (bits(run(q[0, at][:, None], *cache, layer, at.astype(np.int32), window=window))[:, 0] == whole[0, at]).all()


@pytest.mark.gpu
@pytest.mark.parametrize("rows, shared_rows, heads, group, d, capacity, room, soft_cap", [
    (128, 8, 4, 8, 128, 1024, 300, None), (48, 3, 2, 7, 64, 3000, 700, None), (5, 1, 4, 16, 128, 2100, 3000, 20.0),
    (300, 1, 8, 4, 128, 768, 200, None), (6, 6, 4, 1, 128, 500, 100, None)])
def test_bits_of_rows_that_share(rows, shared_rows, heads, group, d, capacity, room, soft_cap):
    """Decode, and a prefill of what follows the shared slots, against rows that hold all of theirs."""
    rng = np.random.default_rng()
    slots = rng.integers(0, capacity // 128 + 1, shared_rows).astype(np.int32) * 128
    of_row = slots.repeat(rows // shared_rows)
    starts = (of_row + rng.integers(0, room, rows)).astype(np.int32)
    _, keys, values, layer, _, _ = inputs(rng, shared_rows, 1, heads, group, d, capacity, [capacity - 1] * shared_rows)
    q = rng.normal(size=(rows, 1, heads * group, d)).astype(BF16)
    whole, own = divide(rng, keys, values, slots, rows, room)
    options = {} if soft_cap is None else dict(soft_cap=soft_cap)
    shared = attention.Shared(keys, values, of_row)

    @jax.jit
    def call(q, keys, values, starts, layer, shared):
        return attention.attention(q, keys, values, starts, layer=layer, shared=shared, **options)

    alone = bits(run(q, *whole, layer, starts, **options))
    assert (bits(call(q, *own, starts, layer, shared)) == alone).all()
    if shared_rows == 1:  # its first slots as a prefix
        behind, prefix = cut_off(256, keys, values)
        assert (bits(call(q, *own, starts, layer, attention.Shared(*behind, of_row, prefix))) == alone).all()
    few, tokens = slice(0, rows // shared_rows * min(2, shared_rows)), 70
    some = attention.Shared(*(a[:, :min(2, shared_rows)] for a in (keys, values)), of_row[few])
    q = rng.normal(size=(len(of_row[few]), tokens, heads * group, d)).astype(BF16)
    first = of_row[few] + np.int32(room - tokens)  # behind slots of the rows' own
    out = call(q, *(a[:, few] for a in own), first, layer, some)
    assert (bits(out) == bits(run(q, *(a[:, few] for a in whole), layer, first, **options))).all()


# --- refusals ---------------------------------------------------------------------------------------------------------

def test_refusals():
    q, keys, values, starts, layer = (jnp.zeros(a.shape, a.dtype) for a in structs(2, 1, 2, 4, 64, 32))
    with pytest.raises(NotImplementedError, match="only bfloat16"):
        attention.attention(q.astype(jnp.float32), keys, values, starts, layer=layer)
    with pytest.raises(NotImplementedError, match="head dimension of 32"):
        attention.attention(q[..., :32], keys[..., :32], values[..., :32], starts, layer=layer)
    with pytest.raises(NotImplementedError, match="a window over slots that rows share"):
        attention.attention(q, keys, values, starts, layer=layer, window=5, shared=attention.Shared(keys[:, :1], values[:, :1], starts))
    for empty in ((q[:0], keys[:, :0], values[:, :0], starts[:0]), (q[:, :0], keys, values, starts), (q, keys[..., :0, :], values[..., :0, :], starts)):
        with pytest.raises(NotImplementedError, match="nothing to do"):
            attention.attention(*empty, layer=layer)
    scale = jnp.zeros(keys.shape[:-1], jnp.float32)
    codes = keys.astype(jnp.float8_e4m3fn)
    with pytest.raises(NotImplementedError, match="only bfloat16, or float8_e4m3fn keys and values with scales"):
        attention.attention(q, codes, codes, starts, layer=layer)
    with pytest.raises(ValueError, match="attention: scales"):
        attention.attention(q, codes, codes, starts, layer=layer, scales=(scale, scale[:, :1]))
    with pytest.raises(NotImplementedError, match="40 queries a row of an FP8 cache"):
        attention.attention(q.repeat(40, 1), codes, codes, starts, layer=layer, scales=(scale, scale))
    for wrong in (dict(keys=keys[:, :, :1]), dict(values=values[:, :1]), dict(slots=starts[:1]), dict(keys=keys[:1], values=values[:1])):
        with pytest.raises(ValueError, match="attention: shared keys"):
            attention.attention(q, keys, values, starts, layer=layer, shared=attention.Shared(keys, values, starts)._replace(**wrong))
    front = jnp.zeros((*keys.shape[:1], 1, *keys.shape[2:3], 128, *keys.shape[4:]), keys.dtype)
    for wrong in (front[:, :, :1], front[..., :100, :], front[:1], front.astype(jnp.float32)):
        with pytest.raises(ValueError, match="attention: a prefix"):
            attention.attention(q, keys, values, starts, layer=layer, shared=attention.Shared(keys, values, starts, (front, wrong)))
    for bad in (dict(q=q[:1]), dict(q=q[:, :, :3]), dict(values=values[:, :, :, :5]), dict(layer=None), dict(starts=starts[:1])):
        arguments = dict(q=q, keys=keys, values=values, starts=starts, layer=layer) | bad
        with pytest.raises(ValueError, match="attention: q"):
            attention.attention(**arguments)
