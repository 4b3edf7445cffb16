"""The Hopper quantizers against the golden vectors and against `nvfp4jax.array.quantize` on the CPU, bit for bit.

Most tests run twice: on a GPU, and, on fewer and smaller inputs, on the CPU from the PTX that the compiler made (`ptx`).
"""
import functools
import pathlib

import aot
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import ptx
import pytest
from jax import lax

from nvfp4jax import array, numerics
from nvfp4jax.kernels.hopper import quantize as quantize_hopper
from nvfp4jax.kernels.hopper import quantize_plan, threads
from nvfp4jax.scaling import Request

GOLDEN = pathlib.Path(__file__).parents[2] / "data" / "nvfp4_te_reference.npz"
BF16, F32 = jnp.bfloat16, jnp.float32
gpu = pytest.mark.gpu
needs_aot = pytest.mark.skipif(not aot.available(), reason="needs jax-cuda13-plugin and -pjrt")


@pytest.fixture(params=[pytest.param("gpu", marks=gpu), pytest.param("ptx", marks=[pytest.mark.aot, needs_aot])])
def machine(request, monkeypatch):
    """What runs the kernels: a GPU, or numpy on the PTX."""
    if request.param == "ptx":
        monkeypatch.setattr(threads, "thread_kernel", ptx.run_thread_kernel)
    return request.param


@functools.cache
def golden():
    return dict(np.load(GOLDEN))


def cpu(f, *args, **kw):
    """f on the CPU, eager, with numpy in and out."""
    with jax.default_device(jax.devices("cpu")[0]):
        return jax.tree.map(np.asarray, f(*(jnp.asarray(a) for a in args), **kw))


def request(scaling="tensor", valid=None, **kw):
    """The arguments of the kernels as a Request."""
    return Request(per_row=scaling == "token", pow2=scaling == "tensor_pow2", valid=None if scaling == "token" else valid, **kw)


def oracle(x, **kw):
    """-> codes u8, scale bits u8, global scale, by the plain-jnp contract on the CPU."""
    kw = {name: None if v is None else jnp.asarray(v) if name in ("amax", "valid") else v for name, v in kw.items()}
    def f(x):
        q = array.quantize(x, request(**kw))
        return q.packed, lax.bitcast_convert_type(q.scale, jnp.uint8), q.global_scale
    return cpu(f, x)


@functools.cache
def jitted(f, **kw):
    return jax.jit(functools.partial(f, **kw))


def poisoned(machine, f, *args, **kw):
    """f with outputs that nobody has written to before it runs."""
    if machine == "ptx":  # its buffers start out filled
        return jax.tree.map(np.asarray, f(*args, **kw))
    filler = jax.block_until_ready([jnp.full((1 << 20,), jnp.nan, F32) for _ in range(8)])
    del filler
    return jax.tree.map(np.asarray, jitted(f, **kw)(*args))


def assert_same_bits(got, want, what):
    packed, scale, global_scale = got
    for name, a, b in (("codes", packed, want[0]), ("scales", scale.view(np.uint8), want[1])):
        assert a.shape == b.shape, (what, name, a.shape, b.shape)
        assert (a == b).all(), (what, name, int((a != b).sum()), a.size, np.argwhere(a != b)[:4].tolist())
    np.testing.assert_array_equal(global_scale, want[2], err_msg=f"{what} global scale")
    assert global_scale.shape == want[2].shape, what


def random_rows(rng, m, k, dtype, kind="normal"):
    x = rng.normal(size=(m, k)) * np.exp2(rng.integers(-6, 6, (m, 1)).astype(np.float64))
    if kind == "heavy":  # blocks of very different size, many E4M3 subnormals and zeros
        x *= np.exp2(rng.integers(-24, 12, (m, k // 16, 1)).astype(np.float64)).repeat(16, 2).reshape(m, k)
    if kind == "ties":  # products land on rounding ties
        x = rng.choice(np.array([.25, .75, 1.25, 1.75, 2.5, 3.5, 5, 6, 0, -0., -.25, -5, -6]), (m, k))
        x[:, ::16] = 6
    if kind == "edges":
        x[0] = 0
        x[1 % m, k // 2] = np.nan
        x[2 % m, 3] = -np.inf
        x[3 % m] = -0.0
        x[4 % m, :16] = 0
        x[5 % m] *= 1e-30
        x[6 % m, 5] = 3e4
    return x.astype(np.float32).astype(np.dtype(dtype))


# --- on either -------------------------------------------------------------------------------------------------------

def golden_cases():
    """(x, granularity, four_over_six, expected) of every golden set that a row-wise quantizer covers."""
    z = golden()
    for key in z:
        if key.endswith("/x_f32"):
            name = key.removesuffix("/x_f32")
            x = z[key].astype(ml_dtypes.bfloat16 if name.endswith("bf16") else np.float32)
            for granularity in ("tensor", "row"):
                for kind in (None, "mae", "mse"):
                    base = f"{name}/{granularity}" + ("" if kind is None else f"/4over6-{kind}-256")
                    yield base, x, granularity, kind, z[f"{base}/codes"], z[f"{base}/block_scale"], z[f"{name}/{granularity}/amax"]


def test_golden_vectors_in_the_kernel(machine):
    cases = list(golden_cases())
    assert len(cases) == 540
    if machine == "ptx":
        cases = [cases[i] for i in np.random.default_rng().permutation(len(cases))[:8]]
    for base, x, granularity, kind, codes, scale, amax in cases:
        scaling = "tensor" if granularity == "tensor" else "token"
        got = poisoned(machine, quantize_hopper.quantize, x, scaling=scaling, four_over_six=kind)
        assert (got[0] == codes).all() and (got[1].view(np.uint8) == scale).all(), base
        top = np.float32(2688 if kind is None else 1536)
        want = np.where(amax == 0, np.float32(1), amax.astype(np.float32) / top).reshape(got[2].shape)
        np.testing.assert_array_equal(got[2], want, err_msg=base)


@gpu
def test_golden_vectors_in_plain_jnp_under_jit():
    groups = {}  # a stack of inputs of one shape compiles once; float32 holds the bfloat16 inputs exactly
    for base, x, granularity, kind, codes, scale, _ in golden_cases():
        groups.setdefault((x.shape, granularity, kind), []).append((base, x.astype(np.float32), codes, scale))
    for (_, granularity, kind), sets in groups.items():
        def f(x):
            q = array.quantize(x, request("tensor" if granularity == "tensor" else "token", four_over_six=kind))
            return q.packed, lax.bitcast_convert_type(q.scale, jnp.uint8)
        got = jax.tree.map(np.asarray, jax.jit(jax.vmap(f))(np.stack([x for _, x, _, _ in sets])))
        for i, (base, _, codes, scale) in enumerate(sets):
            assert (got[0][i] == codes).all() and (got[1][i] == scale).all(), base


SHAPES = dict(gpu=((1, 16), (3, 48), (17, 80), (256, 2048), (37, 768), (9, 7168), (600, 512), (1500, 3072)),
              ptx=((3, 48), (9, 80), (20, 1040), (70, 512)))  # one CTA, some that read everything, clusters, two launches


@pytest.mark.parametrize("dtype", (BF16, F32), ids=("bf16", "f32"))
@pytest.mark.parametrize("scaling", ("tensor", "tensor_pow2", "token"))
def test_fresh_inputs(machine, scaling, dtype):
    rng = np.random.default_rng()
    kinds = ("normal", "heavy", "ties", "edges")
    for m, k in SHAPES[machine]:
        for kind in kinds if machine == "gpu" and m < 300 else (kinds[rng.integers(4)],):
            x = random_rows(rng, m, k, dtype, kind)
            got = poisoned(machine, quantize_hopper.quantize, x, scaling=scaling)
            assert_same_bits(got, oracle(x, scaling=scaling), (scaling, m, k, kind))


@pytest.mark.parametrize("kind", ("mae", "mse"))
@pytest.mark.parametrize("dtype", (BF16, F32), ids=("bf16", "f32"))
def test_four_over_six(machine, kind, dtype):
    rng = np.random.default_rng()
    shapes = (("tensor", 65, 256), ("tensor_pow2", 64, 2048), ("token", 130, 768), ("token", 3, 16))
    for scaling, m, k in shapes if machine == "gpu" else (("tensor", 5, 80),):
        for data in ("normal", "heavy", "edges"):
            x = random_rows(rng, m, k, dtype, data)
            kw = dict(scaling=scaling, four_over_six=kind)
            assert_same_bits(poisoned(machine, quantize_hopper.quantize, x, **kw), oracle(x, **kw), (kw, m, k, data))


def quantize_masked(x, valid, scaling):
    return quantize_hopper.quantize(x, scaling=scaling, valid=valid)


def quantize_given(x, amax, scaling):
    return quantize_hopper.quantize(x, scaling=scaling, amax=amax)


def quantize_static(x, global_scale):
    return quantize_hopper.quantize(x, global_scale=global_scale)


def test_masks_and_given_amax(machine):
    rng = np.random.default_rng()
    for m, k in ((6, 64), (300, 768), (2000, 1024)) if machine == "gpu" else ((6, 64), (40, 512)):
        x = random_rows(rng, m, k, BF16, "edges")
        for scaling in ("tensor", "tensor_pow2", "token") if machine == "gpu" else ("tensor",):
            for mask in (rng.random(m) < 0.5, np.zeros(m, bool)):
                got = poisoned(machine, quantize_masked, x, mask, scaling=scaling)
                assert_same_bits(got, oracle(x, scaling=scaling, valid=mask), (scaling, m, k, "mask"))
        if machine == "ptx" and m > 6:
            continue
        for amax in (np.array(3.7, np.float32), np.array(0, np.float32), rng.uniform(.1, 9, (m, 1)).astype(np.float32)):
            for scaling in ("tensor", "tensor_pow2") if machine == "gpu" else ("tensor_pow2",):
                got = poisoned(machine, quantize_given, x, amax, scaling=scaling)
                assert_same_bits(got, oracle(x, scaling=scaling, amax=amax), (scaling, m, k, "amax", amax.shape))
        for static in (np.array(0.0123, np.float32), rng.uniform(1e-4, .1, (m, 1)).astype(np.float32)):
            def f(x):
                q = array.quantize(x, Request(global_scale=jnp.asarray(static)))
                return q.packed, lax.bitcast_convert_type(q.scale, jnp.uint8), q.global_scale
            assert_same_bits(poisoned(machine, quantize_static, x, static), cpu(f, x), (m, k, "static", static.shape))


def test_extreme_magnitudes(machine):
    """The ends of float32: tensors that count as zero, products that underflow, multipliers that saturate.

    XLA:CPU, where the oracle runs, flushes denormals to zero: a negative one then gives code 0 for 8 (the same value)."""
    rng = np.random.default_rng()
    tiny = np.finfo(np.float32).tiny
    for dtype in (BF16, F32):
        for exponent in (-149, -130, -118, -114, -60, 60, 110, 126) if machine == "gpu" else (-130, -114, 126):
            x = (rng.normal(size=(8, 128)).clip(-1.9, 1.9) * 2.0**exponent).astype(np.float32).astype(np.dtype(dtype))
            x[3, :8] *= np.dtype(dtype).type(2.0**-100)
            x[4] *= np.dtype(dtype).type(2.0**-40)
            flushed = np.where(np.abs(x.astype(np.float32)) < tiny, np.dtype(dtype).type(0), x)
            for scaling in ("tensor", "token") if machine == "gpu" else ("token",):
                got = poisoned(machine, quantize_hopper.quantize, flushed, scaling=scaling)
                want = oracle(flushed, scaling=scaling)
                assert_same_bits(got, want, (dtype, exponent, scaling))
                got = poisoned(machine, quantize_hopper.quantize, x, scaling=scaling)
                np.testing.assert_array_equal(decoded(got[0], got[1].view(np.uint8)), decoded(want[0], want[1]))


def decoded(packed, bits):
    """numpy: codes and scale bits -> code * scale, float32."""
    values = np.array([0, .5, 1, 1.5, 2, 3, 4, 6], np.float32)
    codes = np.stack([packed & 15, packed >> 4], -1).reshape(packed.shape[0], -1)
    v = np.where(codes >= 8, -1, 1) * values[codes & 7]
    return (v * np.repeat(bits.view(ml_dtypes.float8_e4m3fn).astype(np.float32), 16, 1)).astype(np.float32)


def permuted(x):
    """numpy, index by index: k = 64t+16c+8h+4b+s goes to 64t+16s+8h+2c+b."""
    k = np.arange(x.shape[1])
    t, c, h, b, s = k // 64, k // 16 % 4, k // 8 % 2, k // 4 % 2, k % 4
    out = np.empty_like(x)
    out[:, 64 * t + 16 * s + 8 * h + 2 * c + b] = x
    return out


@pytest.mark.parametrize("scaling", ("tensor", "tensor_pow2", "token"))
def test_operand_is_the_decoded_quantization(machine, scaling):
    rng = np.random.default_rng()
    shapes = dict(gpu=((1, 64), (7, 192), (256, 2048), (300, 768), (1100, 1024), (2050, 3584)), ptx=((7, 192), (24, 1088), (70, 512)))
    for m, k in shapes[machine]:
        for dtype in (BF16, F32) if machine == "gpu" else (BF16,):
            x = random_rows(rng, m, k, dtype, "edges" if m < 300 else "heavy")
            packed, bits, global_scale = oracle(x, scaling=scaling)
            got, scale = poisoned(machine, quantize_hopper.operand, x, scaling=scaling)
            np.testing.assert_array_equal(got.astype(np.float32), permuted(decoded(packed, bits)), err_msg=str((scaling, m, k, dtype)))
            np.testing.assert_array_equal(scale, global_scale)


def copied(x, rows, valid, scaling):
    return quantize_hopper.operand(x, scaling=scaling, rows=rows, valid=valid)


def copies_of_rows(rng, m, copies):
    """i32 [m, copies]: where the copies of each row go, some nowhere; and, of each row of the result, whose it is or -1."""
    rows = rng.permutation(m * copies).astype(np.int32).reshape(m, copies)
    rows[rng.random(rows.shape) < 0.2] = -1
    whose = np.full(m * copies, -1)
    whose[rows[rows >= 0]] = np.broadcast_to(np.arange(m)[:, None], rows.shape)[rows >= 0]
    return rows, whose


@pytest.mark.parametrize("scaling", ("tensor", "token"))
def test_operand_copies_rows(machine, scaling):
    rng = np.random.default_rng()
    for m, c, k in ((1, 8, 2048), (64, 8, 2048), (700, 8, 768), (300, 1, 7168)) if machine == "gpu" else ((1, 3, 64), (9, 4, 512), (70, 2, 512)):
        x = random_rows(rng, m, k, BF16, "edges")
        rows, whose = copies_of_rows(rng, m, c)
        valid = np.ones(m, bool)
        valid[m // 2:] = m < 3
        packed, bits, global_scale = oracle(x, scaling=scaling, valid=valid)
        got, scale = poisoned(machine, copied, x, rows, valid, scaling=scaling)
        assert got.shape == (m * c, k)
        want = permuted(decoded(packed, bits))[whose[whose >= 0]]
        np.testing.assert_array_equal(got[whose >= 0].astype(np.float32), want, err_msg=str((scaling, m, c, k)))
        assert scale.shape == (() if scaling == "tensor" else (m * c, 1))
        np.testing.assert_array_equal(scale if scaling == "tensor" else scale[whose >= 0],
                                      global_scale if scaling == "tensor" else global_scale[whose[whose >= 0]])


def norm(x, w, given=None, static=False, **kw):
    return quantize_hopper.rmsnorm_operand(x, w, eps=1e-6, normed=True, **{"global_scale" if static else "amax": given}, **kw)


def swiglu(gate, up, given=None, static=False, **kw):
    return quantize_hopper.silu_mul_operand(gate, up, product=True, **{"global_scale" if static else "amax": given}, **kw)


def normed_by_contract(x, w):
    return cpu(jitted(numerics.rms_norm, eps=1e-6), x, w)


def product_by_contract(gate, up):
    return cpu(jitted(numerics.silu_mul), gate, up)


def flushed(x):
    """In float32, without the denormals and the smallest normal number: XLA:CPU flushes before it rounds."""
    x = x.astype(np.float32)
    return np.where(np.abs(x) <= np.finfo(np.float32).tiny, np.float32(0), x)


def assert_fused(got, values, what, given=None, static=False, **kw):
    """(values, operand, global scale) of a fused kernel against the values of the contract, then quantized by the contract."""
    np.testing.assert_array_equal(flushed(got[0]), flushed(values), err_msg=str(what))
    want = oracle(values, **{"global_scale" if static else "amax": None if given is None else jnp.asarray(given)}, **kw)
    operand = permuted(decoded(*want[:2])).astype(np.float32)
    operand[~np.isfinite(values.astype(np.float32)).all(1)] = np.nan
    np.testing.assert_array_equal(got[1].astype(np.float32), operand, err_msg=str(what))
    np.testing.assert_array_equal(got[2], want[2], err_msg=str(what))


def test_rms_norm_alone(machine, monkeypatch):
    """To the bit the contract's; K of one block to many a lane, and CTAs that walk over many rows."""
    rng = np.random.default_rng()
    f = lambda x, w: quantize_hopper.rms_norm(x, w, eps=1e-6)
    for m, k in ((1, 2048), (64, 2048), (1024, 2048), (8192, 4096), (3, 7168), (5, 48)) if machine == "gpu" else ((1, 16), (9, 512), (5, 2624)):
        x, w = random_rows(rng, m, k, BF16, "edges"), rng.normal(size=k).astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(flushed(poisoned(machine, f, x, w)), flushed(normed_by_contract(x, w)), err_msg=str((m, k)))
    monkeypatch.setattr(quantize_plan, "SMS", 1)
    x, w = random_rows(rng, 75, 512, BF16), rng.normal(size=512).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(flushed(poisoned(machine, f, x, w)), flushed(normed_by_contract(x, w)))
    assert quantize_hopper.rms_norm(jnp.zeros((0, 64), BF16), jnp.ones(64, BF16), eps=1e-6).shape == (0, 64)


FUSED_MODES = (dict(scaling="tensor"), dict(scaling="token"), dict(scaling="tensor_pow2"), dict(scaling="token", four_over_six="mse"),
               dict(given=np.float32(3.7)), dict(given=np.float32(0.004), static=True))


@pytest.mark.parametrize("mode", FUSED_MODES, ids=lambda mode: "-".join(map(str, mode.values())))
def test_rmsnorm_and_silu_follow_the_contract(machine, mode):
    """As if `numerics.rms_norm` (`silu_mul`) had run and then `quantize`, whatever the plan."""
    rng = np.random.default_rng()
    mode = dict(mode)
    given = [mode.pop("given")] if "given" in mode else []
    shapes = [(1, 64), (256, 2048), (33, 768), (5, 7168), (1100, 1024), (700, 2048), (300, 1088)]
    kernels = [(norm, normed_by_contract), (swiglu, product_by_contract)]
    if machine == "ptx":  # the first two: several units and warps a row, and less than a unit
        first = mode in FUSED_MODES[:2]
        shapes, kernels = ([(2, 64), (24, 1088)], kernels) if first else ([(3, 64)], kernels["static" in mode or "four_over_six" in mode:][:1])
    for m, k in shapes:
        x, y = (random_rows(rng, m, k, BF16, "edges" if m > 6 else "normal") for _ in range(2))
        y[:2] = np.abs(y[:2])  # the row of NaN is x's alone
        w = rng.normal(size=k).astype(ml_dtypes.bfloat16)
        kw = dict(given=given[0], **mode) if given else mode
        for kernel, contract in kernels:
            other = w if kernel is norm else y
            # No denormal x or silu(x): what follows can make it a normal number, and XLA:CPU would flush it before.
            wide = x.astype(np.float64)
            with np.errstate(all="ignore"):
                smallest = np.abs(wide) if kernel is norm else np.abs(wide / (1 + np.exp(-wide)))
            x = np.where(smallest < 4 * np.finfo(np.float32).tiny, x.dtype.type(0), x)
            assert_fused(poisoned(machine, kernel, x, other, *given, **mode), contract(x, other), (m, k), **kw)


def test_silu_of_every_bfloat16(machine):
    """Every gate, among them those whose silu lies next to a tie."""
    gate = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16)
    with np.errstate(invalid="ignore"):
        wide = gate.astype(np.float32)
    if machine == "ptx":  # a silu of larger gates is the gate or zero
        gate = gate[(np.abs(wide) < 128) & (np.abs(wide) >= 2.0**-10) | ~np.isfinite(wide)]
    gate = np.resize(gate, (-(-gate.size // 512), 512))
    one = np.ones_like(gate)
    got = poisoned(machine, swiglu, gate, one, scaling="token")[0]
    np.testing.assert_array_equal(flushed(got), flushed(product_by_contract(gate, one)))


def test_a_sum_of_squares_that_overflows(machine):
    """As in torch: a finite row becomes zeros."""
    x = np.ones((2, 64), ml_dtypes.bfloat16)
    x[1] = 1e25
    w = np.full(64, 2, ml_dtypes.bfloat16)
    got = poisoned(machine, norm, x, w, scaling="token")
    assert_fused(got, normed_by_contract(x, w), "overflow", scaling="token")
    assert not got[0][1].astype(np.float32).any()


def test_a_cta_walks_over_many_groups(machine, monkeypatch):
    """A small card, so that few rows make every CTA loop: prefetches, alternating slots, backwards order, ragged ends."""
    monkeypatch.setattr(quantize_plan, "SMS", 1)
    rng = np.random.default_rng()
    for m, k in ((301, 512), (75, 2624)):  # one warp a row; two
        x, w = random_rows(rng, m, k, BF16, "edges"), rng.normal(size=k).astype(ml_dtypes.bfloat16)
        for scaling in ("tensor", "token"):
            assert_same_bits(poisoned(machine, quantize_hopper.quantize, x, scaling=scaling), oracle(x, scaling=scaling), (m, k, scaling))
        (rows, whose), packed_of = copies_of_rows(rng, m, 2), oracle(x, scaling="tensor")
        got, _ = poisoned(machine, copied, x, rows, np.ones(m, bool), scaling="tensor")
        np.testing.assert_array_equal(got[whose >= 0].astype(np.float32), permuted(decoded(*packed_of[:2]))[whose[whose >= 0]])
        x = random_rows(rng, m, k, BF16)
        assert_fused(poisoned(machine, norm, x, w, scaling="token"), normed_by_contract(x, w), (m, k), scaling="token")


def test_weights_get_a_global_scale_a_matrix(machine, monkeypatch):
    """Among them: one matrix, rows read two at a time, tiles that end past a matrix, many more matrices than CTAs draw at once."""
    rng = np.random.default_rng()
    shapes = dict(gpu=((3, 2, 16, 2048), (257, 768), (64, 100, 512), (128, 256, 768), (150, 48, 7168), (5, 4096, 2048)),
                  ptx=((6, 64), (3, 5, 80), (7, 12, 768), (2, 3, 9, 2624)))
    if machine == "ptx":
        monkeypatch.setattr(quantize_plan, "SMS", 1)
    for shape in shapes[machine]:
        w = random_rows(rng, int(np.prod(shape[:-1])), shape[-1], BF16, "heavy")
        w[1, 3], w[-1, -1], w[-2] = np.nan, -np.inf, 0
        w = w.reshape(shape)
        for kind in (None, "mse") if w.size < 1 << 16 else (None,):
            def f(w):
                q = array.quantize_weight(w, four_over_six=kind)
                return q.packed, lax.bitcast_convert_type(q.scale, jnp.uint8), q.global_scale
            assert_same_bits(poisoned(machine, quantize_hopper.quantize_weight, w, four_over_six=kind), cpu(f, w), (shape, kind))


def test_transposed_weights_give_the_bits_of_their_transposition(machine, monkeypatch):
    """As trainers hold them, [.., K, N], one or two that share a global scale. Among them: one matrix, columns that fill no warp, more
    tiles than CTAs, tiles that end past a matrix, matrices without NaN and infinity beside others with."""
    rng = np.random.default_rng()
    cases = dict(gpu=(((3, 2, 2048, 64), 2), ((768, 130), 1), ((64, 512, 100), 1), ((128, 768, 256), 2), ((50, 7168, 48), 1), ((5, 2048, 4096), 1),
                      ((320, 4098), 2), ((6400, 12800), 1)),
                 ptx=(((64, 2), 1), ((2, 64, 134), 2), ((3, 192, 6), 3)))
    if machine == "ptx":
        monkeypatch.setattr(quantize_plan, "SMS", 1)
        monkeypatch.setattr(quantize_plan, "MAX_TILES", 2)
    for (*lead, k, n), parts in cases[machine]:
        ws = [random_rows(rng, int(np.prod(lead)) * n, k, BF16, "heavy").reshape(*lead, n, k) for _ in range(parts)]
        matrices = ws[-1].reshape(-1, n, k)
        matrices[0, -1, 3], matrices[-1, 0, -1], matrices[-1, 1] = np.nan, -np.inf, 0
        for kind in (None, "mse") if ws[0].size < (1 << 8 if machine == "ptx" else 1 << 16) else (None,):
            def f(*ws):
                q = array.quantize_weight(jnp.concatenate(ws, -2), four_over_six=kind)
                return q.packed, lax.bitcast_convert_type(q.scale, jnp.uint8), q.global_scale
            turned = tuple(np.ascontiguousarray(np.swapaxes(w, -1, -2)) for w in ws)
            got = poisoned(machine, quantize_hopper.quantize_transposed, turned, four_over_six=kind)
            assert_same_bits(got, cpu(f, *ws), ((*lead, k, n), parts, kind))


def test_a_row_keeps_its_bits_in_any_batch(machine):
    rng = np.random.default_rng()
    most, batches = (4096, (1, 7, 256, 2048)) if machine == "gpu" else (40, (1,))
    for k in (768, 2048, 5120) if machine == "gpu" else (1088,):
        x = random_rows(rng, most, k, BF16)
        w = rng.normal(size=k).astype(ml_dtypes.bfloat16)
        whole = poisoned(machine, norm, x, w, scaling="token")
        for m in batches:
            rows = rng.permutation(most)[:m]
            for got, want in zip(poisoned(machine, norm, x[rows], w, scaling="token"), whole):
                assert (got.view(np.uint8) == want[rows].view(np.uint8)).all(), (k, m)


def test_two_runs_give_the_same_bits(machine):
    rng = np.random.default_rng()
    x, w = random_rows(rng, 24, 1088, BF16), rng.normal(size=1088).astype(ml_dtypes.bfloat16)
    if machine == "ptx":
        pytest.skip("its approximate instructions are random")
    for one, two in zip(*(poisoned(machine, norm, x, w, scaling="tensor") for _ in range(2))):
        assert one.tobytes() == two.tobytes()


def test_powers_of_two_move_only_the_global_scale(machine):
    rng = np.random.default_rng()
    x = random_rows(rng, *((64, 768) if machine == "gpu" else (3, 64)), BF16)
    for scaling in ("tensor", "tensor_pow2", "token"):
        base = poisoned(machine, quantize_hopper.quantize, x, scaling=scaling)
        for e in (-20, 7):
            got = poisoned(machine, quantize_hopper.quantize, x * ml_dtypes.bfloat16(2.0**e), scaling=scaling)
            assert (got[0] == base[0]).all() and (got[1].view(np.uint8) == base[1].view(np.uint8)).all()
            np.testing.assert_array_equal(got[2], base[2] * np.float32(2.0**e))


# --- without one -----------------------------------------------------------------------------------------------------

# Instructions an element in the main loop, of which about a third wait for NaN, infinity or a product that underflows.
LOOP = {"token": 23, "token operand": 27, "tensor, two launches": 23, "weights, transposed": 24, "gate and up, transposed": 24}


@pytest.mark.aot
@needs_aot
def test_no_spills_and_few_instructions():
    """Each kernel by itself: registers leave room for the CTAs that its plan counts on, nothing spills."""
    q = quantize_hopper
    cases = {
        "token": (lambda x: q.quantize(x, scaling="token"), ((16384, 2048), BF16)),
        "token f32": (lambda x: q.quantize(x, scaling="token"), ((16384, 2048), F32)),
        "token operand": (lambda x: q.operand(x, scaling="token"), ((16384, 2048), BF16)),
        "tensor, two launches": (lambda x: q.quantize(x), ((16384, 2048), BF16)),
        "tensor, clusters": (lambda x: q.quantize(x), ((64, 2048), BF16)),
        "tensor, one CTA": (lambda x: q.operand(x), ((1, 2048), BF16)),
        "tensor, CTAs that read everything": (lambda x: q.operand(x), ((8, 2048), BF16)),
        "copies": (lambda x, r: q.operand(x, scaling="token", rows=r), ((8192, 2048), BF16), ((8192, 8), jnp.int32)),
        "weights": (q.quantize_weight, ((64, 256, 2048), BF16)),
        "weights, two rows as one": (q.quantize_weight, ((64, 256, 768), BF16)),
        "weights, transposed": (lambda w: q.quantize_transposed([w]), ((64, 768, 2048), BF16)),
        "gate and up, transposed": (lambda *ws: q.quantize_transposed(ws), ((64, 2048, 768), BF16), ((64, 2048, 768), BF16)),
        "one matrix, transposed": (lambda w: q.quantize_transposed([w]), ((2048, 4096), BF16)),
        "four over six, transposed": (lambda w: q.quantize_transposed([w], four_over_six="mse"), ((64, 2048, 2048), BF16)),
        "odd K": (lambda x: q.operand(x, scaling="token"), ((4096, 7168), BF16)),
        "small": (lambda x: q.quantize(x, scaling="tensor_pow2"), ((2, 48), BF16)),
        "rmsnorm, clusters": (lambda x, w: q.rmsnorm_operand(x, w, eps=1e-6)[1:], ((64, 2048), BF16), ((2048,), BF16)),
        "rmsnorm token": (lambda x, w: q.rmsnorm_operand(x, w, eps=1e-6, scaling="token", normed=True), ((256, 2048), BF16), ((2048,), BF16)),
        "rmsnorm alone": (lambda x, w: q.rms_norm(x, w, eps=1e-6), ((8192, 2048), BF16), ((2048,), BF16)),
        "silu": (lambda x, y: q.silu_mul_operand(x, y)[1:], ((8192, 768), BF16), ((8192, 768), BF16)),
        "four over six": (lambda x: q.quantize(x, four_over_six="mse"), ((4096, 2048), BF16)),
    }
    for name, (f, *args) in cases.items():
        for kernel in aot.compile(f, *args):
            assert kernel.spills == 0 and kernel.stack == 0 and not kernel.warnings, (name, kernel.spills, kernel.stack, kernel.warnings)
            limit = 224 if name == "four over six, transposed" else 168  # its tiles leave room in the L2 for two CTAs an SM
            assert kernel.registers <= limit, (name, kernel.registers)
            if name in LOOP and kernel.sass:  # the last kernel of two: the one that quantizes
                per_element = sum(kernel.loop("FFMA").values()) / 64
        if name in LOOP and kernel.sass:
            assert per_element <= LOOP[name], (name, per_element)


def test_arguments_are_checked():
    q, x = quantize_hopper, jnp.zeros((4, 64), BF16)
    for error, match, f in (
        (NotImplementedError, "multiple of 16", lambda: q.quantize(jnp.zeros((4, 24), BF16))),
        (NotImplementedError, "multiple of 64", lambda: q.operand(jnp.zeros((4, 48), BF16))),
        (NotImplementedError, r"\[M, K\]", lambda: q.quantize(jnp.zeros((2, 4, 64), BF16))),
        (NotImplementedError, "float16", lambda: q.quantize(x.astype(jnp.float16))),
        (NotImplementedError, "float32", lambda: q.rmsnorm_operand(x.astype(F32), jnp.zeros(64, F32), eps=1e-6)),
        (ValueError, "weight", lambda: q.rmsnorm_operand(x, jnp.zeros(32, BF16), eps=1e-6)),
        (NotImplementedError, "weight is float32", lambda: q.rmsnorm_operand(x, jnp.zeros(64, F32), eps=1e-6)),
        (NotImplementedError, "up is float32", lambda: q.silu_mul_operand(x, x.astype(F32))),
        (ValueError, "scaling", lambda: q.quantize(x, scaling="expert")),
        (ValueError, "four_over_six", lambda: q.quantize(x, four_over_six="max")),
        (ValueError, "valid", lambda: q.quantize(x, valid=jnp.zeros(3, bool))),
        (ValueError, "rows", lambda: q.operand(x, rows=jnp.zeros(4, jnp.int32))),
        (NotImplementedError, "multiple of 64", lambda: q.quantize_transposed([jnp.zeros((48, 64), BF16)])),
        (NotImplementedError, "N of 2", lambda: q.quantize_transposed([jnp.zeros((64, 63), BF16)])),
        (NotImplementedError, "float32", lambda: q.quantize_transposed([x, x.astype(F32)])),
        (NotImplementedError, "not empty", lambda: q.quantize_transposed([jnp.zeros((0, 64, 64), BF16)])),
        (ValueError, r"\(4, 1\)", lambda: q.quantize(x, amax=jnp.zeros(4, F32))),
    ):
        with pytest.raises(error, match=match):
            f()


def test_inverse_root_is_exact_from_any_first_guess():
    """INVERSE_RMS in numpy, with a first guess off by up to 6 ulps, which is more than the hardware's."""
    rng, f32, fma = np.random.default_rng(), np.float32, ptx.fma
    root = f32(2) - f32(2.0**-23)  # its reciprocal lies next to a tie
    v = np.concatenate([np.exp2(rng.uniform(0, 2, 20000)).astype(f32), np.nextafter(f32(4), np.full(8, 0, f32)), [root * root]]).astype(f32)
    v = (v.view(np.int32) + rng.integers(-3, 4, v.shape, np.int32)).view(f32)
    guess = (f32(1) / np.sqrt(v)).astype(f32)
    for off in range(-6, 7):
        y = (guess.view(np.int32) + np.int32(off)).view(f32)
        s, h, half, one = v * y, f32(.5) * y, np.full_like(v, .5), np.ones_like(v)
        d = fma(-s, h, half)
        s, h = fma(s, d, s), fma(h, d, h)
        s = fma(fma(-s, s, v), h, s)
        np.testing.assert_array_equal(s, np.sqrt(v))
        y = h * f32(2 + 2.0**-22)
        y = fma(fma(-s, y, one), y, y)
        np.testing.assert_array_equal(fma(fma(-s, y, one), y, y), one / s)


def test_an_empty_batch_launches_nothing():
    packed, scale, global_scale = quantize_hopper.quantize(jnp.zeros((0, 64), BF16))
    assert packed.shape == (0, 32) and scale.shape == (0, 4) and global_scale.shape == () and float(global_scale) == 1
    assert quantize_hopper.operand(jnp.zeros((0, 64), BF16), scaling="token")[1].shape == (0, 1)


def test_every_block_belongs_to_one_thread():
    for m in (1, 2, 7, 132, 256, 1000, 5000):
        for k in (16, 64, 80, 512, 768, 1024, 2048, 3584, 5120, 7168, 12288, 25600, quantize_plan.MAX_K):
            for words in (8, 16):
                for p in (quantize_plan.plan_of(m, k, words), quantize_plan.scan_plan(m, k, words), quantize_plan.matrices_plan(m, k)[1]):
                    if p is None:
                        continue
                    assert p.warps % 4 == 0 and p.warps <= 32 and p.warps % p.warps_per_row == 0
                    assert p.warps_per_row == 1 or p.rows <= 15  # named barriers 1..15
                    units = sorted(part + j * p.warps_per_row for part in range(p.warps_per_row) for j in range(p.blocks))
                    whole = k * (quantize_plan.matrices_plan(m, k)[0] if p.tile > 1 else 1)
                    assert units == list(range(len(units))) and len(units) * 512 >= whole, (m, k, p)
                    assert p.grid % p.cluster == 0
                scan = quantize_plan.scan_plan(m, k, words)
                assert scan is None or scan.grid * scan.rows >= m  # one group a CTA
