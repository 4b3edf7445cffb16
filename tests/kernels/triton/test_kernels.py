"""The Triton kernels against the contract in plain jnp on a CPU, bit for bit, and against float64 products.

Each test runs on a GPU and, on small shapes, in Triton's interpreter.
"""

import functools
import pathlib
import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from nvfp4jax import array, numerics, routing
from nvfp4jax.kernels.triton import call, combine, dense, grouped, quantize
from nvfp4jax.scaling import Request

BF16, F16, F32 = jnp.bfloat16, jnp.float16, jnp.float32
DATA = pathlib.Path(__file__).parents[2] / "data"
TOP = {None: 2688, "mae": 1536, "mse": 1536}


@pytest.fixture
def rng():
    seed = int.from_bytes(np.random.default_rng().bytes(4), "little")
    print("seed", seed)
    return np.random.default_rng(seed)


def cpu(f, *args):
    with jax.default_device(jax.devices("cpu")[0]):
        return jax.tree.map(np.asarray, f(*(jnp.asarray(a) for a in args)))


def want(x, *, scaling="token", four_over_six=None, valid=None):
    """(packed, scale bits, global scale, decoded in f32 without the global scale) by the contract on the CPU."""

    def f(x):
        request = Request(per_row=scaling == "token", pow2=scaling == "tensor_pow2", four_over_six=four_over_six,
                          valid=None if valid is None else jnp.asarray(valid))
        q = array.quantize(x, request)
        return q.packed, jax.lax.bitcast_convert_type(q.scale, jnp.uint8), q.global_scale, q.dequantize_blocks(F32)

    return cpu(f, x)


def bits(x):
    return np.ascontiguousarray(np.atleast_1d(np.asarray(x))).view(np.uint8)


def assert_quantized(got, expected, what=""):
    for name, a, b in zip(("codes", "scales", "global scale"), got, expected):
        assert np.shape(a) == np.shape(b), (what, name, np.shape(a), np.shape(b))
        wrong = bits(a) != bits(b)
        assert not wrong.any(), (what, name, int(wrong.sum()), wrong.size)


def rows(rng, m, k, dtype=BF16, kind="normal"):
    x = rng.normal(size=(m, k)) * np.exp2(rng.integers(-6, 6, (m, 1)).astype(np.float64))
    if kind == "heavy":  # blocks of very different size, many E4M3 denormals and zeros
        x *= np.exp2(rng.integers(-24, 12, (m, k // 16, 1)).astype(np.float64)).repeat(16, 2).reshape(m, k)
    if kind == "ties":
        x = rng.choice(np.array([.25, .75, 1.25, 1.75, 2.5, 3.5, 5, 6, 0, -.25, -5, -6]), (m, k))
        x[:, ::16] = 6
    if kind == "edges":
        x[0] = 0
        x[1 % m, k // 2] = np.nan
        x[2 % m, 3] = -np.inf
        x[4 % m, :16] = 0
        x[5 % m] *= 1e-30
    return x.astype(np.float32).astype(np.dtype(dtype))


@functools.cache
def golden():
    """name -> (x, scaling, four_over_six, codes, scale bits), for every set that a row-wise quantizer covers."""
    z = dict(np.load(DATA / "nvfp4_te_reference.npz"))
    sets = {}
    for key in z:
        if key.endswith("/x_f32"):
            name = key.removesuffix("/x_f32")
            x = z[key].astype(ml_dtypes.bfloat16 if name.endswith("bf16") else np.float32)
            for granularity, scaling in (("tensor", "tensor"), ("row", "token")):
                for kind in (None, "mae", "mse"):
                    base = f"{name}/{granularity}" + ("" if kind is None else f"/4over6-{kind}-256")
                    sets[base] = x, scaling, kind, z[f"{base}/codes"], z[f"{base}/block_scale"]
    return sets


@pytest.mark.parametrize("part", range(12))
def test_golden_sets(machine, part):
    """TransformerEngine's reference, the sets of one part; the interpreter takes one of each."""
    names = sorted(golden())[part::12]
    assert len(names) >= 30
    for name in names if machine == "gpu" else names[:1]:
        x, scaling, kind, codes, scales = golden()[name]
        packed, scale, _ = quantize.quantize(jnp.asarray(x), scaling=scaling, four_over_six=kind)
        packed = np.asarray(packed)
        got = np.stack([packed & 15, packed >> 4], -1).reshape(codes.shape) if codes.shape != packed.shape else packed
        # The reference gives code 8 for a product that rounds to minus zero, and so does the contract unless it underflows.
        assert (np.where(got == 8, 0, got) == np.where(codes == 8, 0, codes)).all(), name
        np.testing.assert_array_equal(np.asarray(scale).view(np.uint8).reshape(scales.shape), scales, name)


@pytest.mark.parametrize("kind", ["normal", "heavy", "ties", "edges"])
@pytest.mark.parametrize("four_over_six", [None, "mae", "mse"])
def test_quantize_is_the_contract(machine, rng, kind, four_over_six):
    for scaling in ("token", "tensor", "tensor_pow2"):
        for dtype in (BF16, F32):
            x = rows(rng, 9, 272, dtype, kind)
            got = quantize.quantize(jnp.asarray(x), scaling=scaling, four_over_six=four_over_six)
            assert_quantized(got, want(x, scaling=scaling, four_over_six=four_over_six), (kind, scaling, dtype))


def test_masked_rows_take_no_part_in_the_amax(machine, rng):
    x = rows(rng, 6, 64)
    x[2] *= 1000
    valid = np.array([True, True, False, True, True, True])
    got = quantize.quantize(jnp.asarray(x), scaling="tensor", valid=jnp.asarray(valid))
    assert_quantized(got, want(x, scaling="tensor", valid=valid))


def test_given_amaxes_and_static_scales(machine, rng):
    x = rows(rng, 5, 64)
    amax = np.abs(x.astype(np.float32)).max(1, keepdims=True)
    assert_quantized(quantize.quantize(jnp.asarray(x), amax=jnp.asarray(amax)), want(x))
    one = amax.max()
    assert_quantized(quantize.quantize(jnp.asarray(x), amax=jnp.asarray(one)), want(x, scaling="tensor"))
    for scale in (np.float32(.01), amax / np.float32(2000)):
        def static(x, scale=scale):
            q = array.quantize(x, Request(global_scale=jnp.asarray(scale)))
            return q.packed, q.scale, q.global_scale
        got = quantize.quantize(jnp.asarray(x), global_scale=jnp.asarray(scale))
        assert_quantized(got, cpu(static, x))


def test_weights_have_one_scale_a_matrix(machine, rng):
    w = np.stack([rows(rng, 6, 48) * np.float32(2.0**i).astype(ml_dtypes.bfloat16) for i in range(3)])
    w[1, 2, 3] = np.nan

    def f(w):
        q = array.quantize_weight(w)
        return q.packed, q.scale, q.global_scale

    assert_quantized(quantize.quantize_weight(jnp.asarray(w)), cpu(f, w))
    assert_quantized(quantize.quantize_weight(jnp.asarray(w[0])), cpu(f, w[0]))


@pytest.mark.parametrize("k", [256, 272])
@pytest.mark.parametrize("scaling", ["token", "tensor"])
def test_operand_is_decoded_and_permuted(machine, rng, k, scaling):
    x = rows(rng, 5, k)
    _, _, global_scale, decoded = want(x, scaling=scaling)
    got, row_scale = map(np.asarray, quantize.operand(jnp.asarray(x), scaling=scaling))
    np.testing.assert_array_equal(got, cpu(quantize.permute_k, decoded).astype(np.float16))
    np.testing.assert_array_equal(row_scale, global_scale)
    copies = rng.permutation(10).reshape(5, 2).astype(np.int32)
    copies[2, 1] = -1
    many, scales = map(np.asarray, quantize.operand(jnp.asarray(x), scaling=scaling, copies=jnp.asarray(copies)))
    for (i, j), to in np.ndenumerate(copies):
        if to >= 0:
            np.testing.assert_array_equal(many[to], got[i])
            if scaling == "token":
                assert scales[to] == row_scale[i], (i, j)


@pytest.mark.parametrize("k", [48, 1040])
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_norm_and_product_in_front(machine, rng, k, dtype):
    """bfloat16: to the bit. float32: its last bit of SwiGLU is the backend's, so codes may differ where it decides."""
    x, up, weight = rows(rng, 5, k, dtype), rows(rng, 5, k, dtype), rows(rng, 1, k, dtype)[0]
    for second, value in ((weight, cpu(lambda x, w: numerics.rms_norm(x, w, 1e-6), x, weight)), (up, cpu(numerics.silu_mul, x, up))):
        _, _, global_scale, decoded = want(value)
        got, row_scale = quantize.operand(jnp.asarray(x), jnp.asarray(second), eps=1e-6, scaling="token")
        expected = cpu(quantize.permute_k, decoded).astype(np.float16)
        if dtype == F32 and second.ndim == 2:
            np.testing.assert_allclose(row_scale, global_scale, rtol=1e-5)
            assert (np.asarray(got) != expected).mean() < .01
        else:
            np.testing.assert_array_equal(got, expected)
            np.testing.assert_array_equal(row_scale, global_scale)


@functools.cache
def order(k):
    return np.argsort(cpu(quantize.permute_k, np.arange(k, dtype=np.int32)))


def exact(x, operand, row_scale):
    """float64 of what the matmuls read, K in its natural order."""
    return np.asarray(operand, np.float64)[:, order(x.shape[1])] * np.asarray(row_scale, np.float64)


def test_unquantized_rows_keep_their_values(machine, rng):
    x = rows(rng, 7, 272, BF16, "heavy")
    x[3], x[4, 5] = 0, np.inf
    operand, scale = quantize.plain(jnp.asarray(x), jnp.asarray(3, F32))
    got, value = exact(x, operand, scale), x.astype(np.float64) * 3
    assert np.isnan(got[4]).all()
    keep = np.arange(7) != 4
    assert (np.abs(got - value)[keep].max(1) <= 2.0**-39 * np.abs(value[keep]).max(1)).all()


def weight(rng, *shape):
    """A random NVFP4 weight [..., N, K], made and decoded in numpy: (its arrays, its values in float64)."""
    *lead, n, k = shape
    packed = rng.integers(0, 256, (*lead, n, k // 2), dtype=np.uint8)
    scale = rng.integers(30, 70, (*lead, n, k // 16), dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
    global_scale = np.asarray(np.exp2(rng.normal(size=(*lead, *(1, 1) * bool(lead)))), np.float32)
    codes = np.stack([packed & 15, packed >> 4], -1).reshape(shape)
    value = np.array([0, .5, 1, 1.5, 2, 3, 4, 6, -0., -.5, -1, -1.5, -2, -3, -4, -6])[codes]
    return types.SimpleNamespace(packed=packed, scale=scale, global_scale=global_scale), value * scale.astype(np.float64).repeat(16, -1) * global_scale


def np_to_device(v):
    return jnp.asarray(np.asarray(v))


def close(got, expected, scale):
    """Only float32 accumulation may differ: an error relative to the sum of magnitudes."""
    assert np.isfinite(got).all()
    error = (np.abs(np.asarray(got, np.float64) - expected) / scale).max()
    assert error < 3e-6, error


@pytest.mark.parametrize("sm", [75, 90])
@pytest.mark.parametrize("m, n, k", [(1, 64, 256), (5, 70, 272), (3, 80, 2048)])
def test_dense(machine, rng, monkeypatch, sm, m, n, k):
    if machine == "gpu":
        if sm != 90:
            pytest.skip("one architecture on a GPU")
    else:
        monkeypatch.setattr(call, "capability", lambda: sm)
    x, (w, decoded) = rows(rng, m, k), weight(rng, n, k)
    bias = rng.normal(size=n).astype(np.float32)
    for operand, scale in (quantize.operand(jnp.asarray(x), scaling="token"), quantize.operand(jnp.asarray(x), scaling="tensor"), quantize.plain(jnp.asarray(x))):
        y = dense.matmul(operand, scale, *map(np_to_device, (w.packed, w.scale, w.global_scale)), bias=jnp.asarray(bias), out_dtype=F32)
        a = exact(x, operand, scale)
        close(y, a @ decoded.T + bias, np.abs(a) @ np.abs(decoded).T + np.abs(bias))


def test_dense_reads_its_layer_of_a_stack(machine, rng):
    x, (w, decoded) = rows(rng, 4, 64), weight(rng, 3, 32, 64)
    bias = rng.normal(size=(3, 32)).astype(np.float32)
    operand, scale = quantize.operand(jnp.asarray(x), scaling="token")
    a = exact(x, operand, scale)
    for layer in (0, 2):
        y = dense.matmul(operand, scale, *map(np_to_device, (w.packed, w.scale, w.global_scale.reshape(-1))), bias=jnp.asarray(bias),
                         out_dtype=F32, layer=jnp.asarray(layer, jnp.int32))
        close(y, a @ decoded[layer].T + bias[layer], np.abs(a) @ np.abs(decoded[layer]).T + np.abs(bias[layer]))


def test_a_poisoned_row_stays_alone(machine, rng):
    x, (w, _) = rows(rng, 4, 64), weight(rng, 32, 64)
    clean = x.copy()
    x[1, 7] = np.nan
    arrays = [np_to_device(v) for v in (w.packed, w.scale, w.global_scale)]
    y, z = (np.asarray(dense.matmul(*quantize.operand(jnp.asarray(v), scaling="token"), *arrays, out_dtype=F32)) for v in (x, clean))
    assert np.isnan(y[1]).all()
    np.testing.assert_array_equal(y[[0, 2, 3]], z[[0, 2, 3]])


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("sizes", [(3, 0, 9, 0, 4), (20, 0, 0, 0, 0), (0, 0, 0, 0, 20), (1, 1, 1, 1, 1), (0, 0, 0, 0, 0)])
def test_grouped(machine, rng, sizes, gated):
    x, n, k = rows(rng, 20, 272), 70, 272
    w, decoded = weight(rng, 5, 2 * n if gated else n, k)
    operand, scale = quantize.operand(jnp.asarray(x), scaling="token")
    halves = (lambda v: v.reshape(5, 2, n, -1)) if gated else (lambda v: v)
    y = (grouped.gate_up if gated else grouped.matmul)(
        operand, scale, *map(jnp.asarray, (halves(w.packed), halves(w.scale), w.global_scale.reshape(-1))), jnp.asarray(sizes, jnp.int32),
        out_dtype=F32)
    a, first = exact(x, operand, scale), 0
    for e, size in enumerate(sizes):
        mine = slice(first, first + size)
        product, magnitude = a[mine] @ decoded[e].T, np.abs(a[mine]) @ np.abs(decoded[e]).T
        if gated:
            gate, up = product[:, :n], product[:, n:]
            silu = gate / (1 + np.exp(np.minimum(-gate, 700)))
            magnitude = (np.abs(silu) + 1.1 * magnitude[:, :n]) * magnitude[:, n:]
            product = silu * up
        close(np.asarray(y)[mine], product, magnitude) if size else None
        first += size


@pytest.mark.parametrize("gated", [False, True])
def test_grouped_sizes_of_more_rows_than_there_are(machine, rng, monkeypatch, gated):
    """The rows that there are come out right, and nothing is written behind them."""
    x, n, k, m = rows(rng, 6, 64), 32, 64, 6
    w, _ = weight(rng, 2, 2 * n if gated else n, k)
    operand, scale = quantize.operand(jnp.asarray(x), scaling="token")
    halves = (lambda v: v.reshape(2, 2, n, -1)) if gated else (lambda v: v)
    args = operand, scale, *map(jnp.asarray, (halves(w.packed), halves(w.scale), w.global_scale.reshape(-1)))
    f, launch = grouped.gate_up if gated else grouped.matmul, grouped.call

    def watched(kernel, inputs, sizes, outputs, **how):
        """With room behind the rows, of which the kernel knows nothing."""
        inputs = [jnp.pad(a, ((0, 32), *[(0, 0)] * (a.ndim - 1)), constant_values=1) for a in inputs[:2]] + inputs[2:]
        (out,) = launch(kernel, inputs, sizes, [jax.ShapeDtypeStruct((m + 32, n), outputs[0].dtype)], **how)
        if machine == "interpreter":  # where memory is poisoned before
            assert np.isnan(np.asarray(out)[m:]).all()
        return [out[:m]]

    right = f(*args, jnp.asarray([1, 5], jnp.int32), out_dtype=F32)
    monkeypatch.setattr(grouped, "call", watched)
    np.testing.assert_array_equal(f(*args, jnp.asarray([1, 20], jnp.int32), out_dtype=F32), right)


def test_grouped_reads_its_layer_of_a_stack(machine, rng):
    x, (w, decoded) = rows(rng, 6, 64), weight(rng, 2, 3, 32, 64)
    operand, scale = quantize.operand(jnp.asarray(x), scaling="token")
    y = grouped.matmul(operand, scale, *map(np_to_device, (w.packed, w.scale, w.global_scale.reshape(2, 3))), jnp.asarray([2, 1, 3], jnp.int32),
                       out_dtype=F32, layer=jnp.asarray(1, jnp.int32))
    a = exact(x, operand, scale)
    for i, e in enumerate((0, 0, 1, 2, 2, 2)):
        close(np.asarray(y)[i], a[i] @ decoded[1, e].T, np.abs(a[i]) @ np.abs(decoded[1, e]).T)


def test_combine_is_the_contract(machine, rng):
    route = cpu(lambda ids: routing.route(ids, 5), rng.integers(0, 6, (7, 3)).astype(np.int32))
    values, weights = rows(rng, 21, 136), rng.random((7, 3)).astype(np.float32)
    values[np.setdiff1d(np.arange(21), route.row_of_slot)] = np.nan  # rows of nobody
    expected = cpu(lambda v, w: routing.combine(v, routing.Routing(*map(jnp.asarray, route)), w), values, weights)
    got = combine.combine(jnp.asarray(values), jnp.asarray(route.row_of_slot), jnp.asarray(weights))
    assert np.asarray(got).tobytes() == expected.tobytes()


# --- what only a GPU shows -----------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("n, k", [(512, 2048), (96, 272)])
def test_a_rows_bits_do_not_depend_on_the_batch(rng, n, k):
    """Unquantized rows too: sums of FP4 products may be exact, and exact sums do not tell."""
    x, (w, _) = rows(rng, 300, k), weight(rng, n, k)
    arrays = [np_to_device(v) for v in (w.packed, w.scale, w.global_scale)]
    for operand in (quantize.plain, functools.partial(quantize.operand, scaling="token")):
        run = jax.jit(lambda x, operand=operand: dense.matmul(*operand(x), *arrays, out_dtype=F32))
        whole = np.asarray(run(jnp.asarray(x)))
        for m in (1, 8, 17, 33, 65, 129):
            np.testing.assert_array_equal(run(jnp.asarray(x[:m])), whole[:m], f"{m} rows")
        np.testing.assert_array_equal(run(jnp.asarray(x[::-1].copy())), whole[::-1])


@pytest.mark.gpu
def test_a_rows_bits_do_not_depend_on_its_group(rng):
    x, (w, _) = rows(rng, 200, 512), weight(rng, 2, 128, 512)
    arrays = [np_to_device(v) for v in (w.packed, w.scale, w.global_scale.reshape(-1))]
    run = jax.jit(lambda x, sizes: grouped.matmul(*quantize.plain(x), *arrays, sizes, out_dtype=F32))
    whole = np.asarray(run(jnp.asarray(x), jnp.asarray([200, 0], jnp.int32)))
    for m in (1, 7, 40):
        np.testing.assert_array_equal(run(jnp.asarray(x[:m]), jnp.asarray([m, 0], jnp.int32)), whole[:m])
