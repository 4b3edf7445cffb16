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

from nvfp4jax.kernels.hopper import attention, attention_decode, attention_plan, attention_prefill, threads

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

def ptx_decode(monkeypatch, q, keys, values, layer, starts, *, ctas, window=None, soft_cap=None):
    monkeypatch.setattr(threads, "thread_kernel", ptx_attention.run_thread_kernel)
    plan = attention_plan.plan(starts, tokens=q.shape[1], heads=keys.shape[2], capacity=keys.shape[3], window=window, ctas=ctas)
    plan = jax.tree.map(np.array, plan)
    out = attention_decode.decode(q, keys, values, layer, plan, scale=q.shape[3]**-0.5, window=window, soft_cap=soft_cap)
    monkeypatch.undo()
    assert not plan.counters.any()
    return out, set(plan.table[:, 1:][plan.table[:, 1:, 3] > 0][:, 4])


def ptx_prefill(q, keys, values, layer, starts, counts, *, ctas, window=None, soft_cap=None):
    f = lambda *a: attention_prefill.prefill(*a, scale=q.shape[3]**-0.5, window=window, soft_cap=soft_cap, ctas=ctas)
    args = q, keys, values, layer, starts, counts
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
    """The compiled program of a scan over layers: nothing in it has the size of a layer's keys but the cache itself."""
    args = structs(4, tokens, 2, 8, 128, 600, layers=3)

    def f(q, keys, values, starts):
        plan = attention.plan(starts, q, keys)
        return jax.lax.fori_loop(0, 3, lambda i, q: attention.attention(q, keys, values, starts, layer=i, plan=plan), q)

    text = ptx_attention.compiled_text(f, *args[:4])
    assert "custom-call" in text and "bf16[3,4,2,600,128]" in text
    made = [line for line in text.splitlines() if "=" in line and any(
        f" = bf16[{shape}]" in line for shape in ("3,4,2,600,128", "4,2,600,128", "1,4,2,600,128", "24,600,128"))]
    allowed = "parameter(", "get-tuple-element(", "bitcast("
    assert made and all(any(a in line for a in allowed) for line in made), made


# --- on a GPU ---------------------------------------------------------------------------------------------------------

def run(q, keys, values, layer, starts, counts=None, **options):
    f = jax.jit(lambda q, k, v, s, i, c: attention.attention(q, k, v, s, layer=i, counts=c, **options))
    return np.asarray(f(q, keys, values, starts, layer, counts))


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


# --- refusals ---------------------------------------------------------------------------------------------------------

def test_refusals():
    q, keys, values, starts, layer = (jnp.zeros(a.shape, a.dtype) for a in structs(2, 1, 2, 4, 64, 32))
    with pytest.raises(NotImplementedError, match="only bfloat16"):
        attention.attention(q.astype(jnp.float32), keys, values, starts, layer=layer)
    with pytest.raises(NotImplementedError, match="head dimension of 32"):
        attention.attention(q[..., :32], keys[..., :32], values[..., :32], starts, layer=layer)
    for bad in (dict(q=q[:1]), dict(q=q[:, :, :3]), dict(values=values[:, :, :, :5]), dict(layer=None), dict(starts=starts[:1])):
        arguments = dict(q=q, keys=keys, values=values, starts=starts, layer=layer) | bad
        with pytest.raises(ValueError, match="attention: q"):
            attention.attention(**arguments)
