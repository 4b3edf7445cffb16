"""Layers against float64 products of what they hold; the swap; and quantize_params, bit-equal to the swap."""

import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import DATA
from flax import nnx
from test_array import decode
from test_ops import check

import nvfp4jax
from nvfp4jax import Rule, quantize, swap
from nvfp4jax.array import NVFP4Array, quantize_weight
from nvfp4jax.checkpoint.reload import Quantizer
from nvfp4jax.layers import NVFP4Weight
from nvfp4jax.scaling import Static, Tensor

BF16 = jnp.bfloat16


def values(tree):
    return [np.atleast_1d(np.asarray(v)) for v in jax.tree.leaves(tree)]


class Net(nnx.Module):
    """One of everything: lists, a tied layer, LinearGeneral, Einsum with bias, experts, and a raw expert weight."""

    def __init__(self, rngs, dtype=BF16):
        kw = dict(param_dtype=dtype, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(64, 64, **kw) for _ in range(2)])
        self.split = nnx.LinearGeneral(64, (4, 16), **kw)
        self.join = nnx.LinearGeneral((4, 16), 64, axis=(-2, -1), **kw)
        self.kv = nnx.Einsum("BTD,CNDH->CBTNH", (2, 4, 64, 16), (2, 1, 1, 4, 16), bias_init=nnx.initializers.normal(1.0), **kw)
        self.experts = nvfp4jax.Experts(4, 64, 32, dtype=dtype, param_dtype=dtype, rngs=rngs)
        self.raw = nnx.Param(jax.random.normal(rngs.params(), (4, 64, 32), dtype) * jnp.asarray(0.1, dtype))
        self.norm = nnx.RMSNorm(64, **kw)
        self.head = nnx.Linear(64, 10, use_bias=False, **kw)

    def __call__(self, x):
        for block in self.blocks:
            x = x + block(x)
        x = self.norm(x + self.join(self.split(x)))
        k, v = self.kv(x).reshape(2, *x.shape)
        x = x + k * v
        tokens = x.reshape(-1, 64)
        ids = jnp.argsort(tokens[:, :4], axis=1)[:, :2].astype(jnp.int32)
        x = x + self.experts(tokens, ids, jnp.full(ids.shape, 0.5, jnp.float32)).reshape(x.shape)
        return self.head(x) + jnp.einsum("btk,ekn->bt", x, self.raw[...])[..., None]


RULES = [Rule("head", skip=True), Rule("raw", scaling=None), Rule(".*", scaling="token")]


@pytest.mark.parametrize("scaling", [None, "tensor", "tensor_pow2", "token"])
@pytest.mark.parametrize("bias", [True, False])
def test_linear(key, scaling, bias):
    layer = nnx.Linear(96, 40, use_bias=bias, bias_init=nnx.initializers.normal(1.0), rngs=nnx.Rngs(key))
    x = jax.random.normal(key, (2, 5, 96))
    q = nvfp4jax.NVFP4Linear.from_float(layer, scaling=scaling)
    assert (q.kernel_packed.shape, q.kernel_scale.shape, q.kernel_global_scale.shape) == ((40, 48), (40, 6), ())
    y = q(x).reshape(10, 40)
    a = np.asarray(x, np.float64) if scaling is None else decode(quantize(x, scaling=scaling))
    if bias:
        y = y - layer.bias[...][None]
    assert np.abs(np.asarray(y) - a.reshape(10, 96) @ decode(quantize_weight(layer.kernel[...].T)).T).max() < 1e-4


def test_output_dtypes_follow_the_float_layer(key):
    for dtype, param_dtype, x_dtype in ((None, jnp.float32, BF16), (BF16, jnp.float32, jnp.float32), (None, BF16, BF16), (jnp.float32, BF16, BF16)):
        layer = nnx.Linear(32, 16, dtype=dtype, param_dtype=param_dtype, rngs=nnx.Rngs(0))
        x = jax.random.normal(key, (3, 32), x_dtype)
        with jax.numpy_dtype_promotion("standard"):
            assert nvfp4jax.NVFP4Linear.from_float(layer)(x).dtype == layer(x).dtype


EINSUMS = [
    ("BTD,NDH->BTNH", (4, 32, 8), None, (2, 3, 32)),
    ("BTD,CKDH->CBTKH", (2, 4, 32, 8), (2, 1, 1, 4, 8), (2, 3, 32)),
    ("BTNH,NHD->BTD", (4, 8, 24), (24,), (2, 3, 4, 8)),
    ("...d,df->...f", (32, 24), (24,), (2, 1, 3, 32)),
    ("dT,dN->NT", (32, 24), None, (32, 5)),
]


@pytest.mark.parametrize("string, kernel, bias, shape", EINSUMS)
def test_einsum_is_the_same_einsum_on_decoded_operands(key, string, kernel, bias, shape):
    layer = nnx.Einsum(string, kernel, bias, bias_init=nnx.initializers.normal(1.0), rngs=nnx.Rngs(key))
    q = nvfp4jax.NVFP4Einsum.from_float(layer, scaling=None)
    x = jax.random.normal(key, shape)
    # The same float layer with the decoded weight put back, letter by letter.
    letters = string.split(",")[1].split("->")[0]
    out = string.split("->")[1]
    n = [c for c in letters if c in out]
    k = [c for c in letters if c not in out]
    sizes = dict(zip(letters, kernel, strict=True))
    decoded = decode(q.weight()).reshape([sizes[c] for c in n + k]).transpose([(n + k).index(c) for c in letters])
    reference = nnx.clone(layer)
    reference.kernel = nnx.Param(jnp.asarray(decoded, jnp.float32))
    np.testing.assert_allclose(q(x), reference(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("inputs, outputs, axis, shape", [(32, (4, 8), -1, (2, 3, 32)), ((4, 8), 24, (-2, -1), (2, 3, 4, 8)), ((4, 8), (3, 5), (0, 2), (4, 6, 8))])
def test_linear_general(key, inputs, outputs, axis, shape):
    layer = nnx.LinearGeneral(inputs, outputs, axis=axis, bias_init=nnx.initializers.normal(1.0), rngs=nnx.Rngs(key))
    q = nvfp4jax.NVFP4LinearGeneral.from_float(layer, scaling=None)
    w = decode(q.weight())
    reference = nnx.clone(layer)
    reference.kernel = nnx.Param(jnp.asarray(w.T.reshape(layer.kernel.shape), jnp.float32))
    x = jax.random.normal(key, shape)
    np.testing.assert_allclose(q(x), reference(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="batch_axis"):
        nvfp4jax.NVFP4LinearGeneral.from_float(nnx.LinearGeneral(16, 16, batch_axis={0: 2}, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("string, kernel", [("ecd,edf->ecf", (4, 32, 16)), ("bd,df->b", (32, 16)), ("bdx,df->bf", (32, 16)), ("bdd,df->bf", (32, 16))])
def test_einsums_that_are_no_matmul_are_refused(string, kernel):
    with pytest.raises(ValueError, match="mlp/up: einsum .* is no plain matmul"):
        nvfp4jax.NVFP4Einsum.from_float(nnx.Einsum(string, kernel, rngs=nnx.Rngs(0)), name="mlp/up")


@pytest.mark.parametrize("scaling", [None, "static", "tensor", "tensor_pow2", "token", "expert"])
def test_experts(key, scaling):
    """Both matmuls of an expert against float64: each activation decoded as its mode says, rows of one expert together."""
    e, h, i, t, k = 5, 64, 32, 11, 2
    layer = nvfp4jax.Experts(e, h, i, rngs=nnx.Rngs(key))
    x = jax.random.normal(key, (t, h))
    ids = jnp.stack([jax.random.permutation(jax.random.fold_in(key, n), e)[:k] for n in range(t)]).astype(jnp.int32)
    weights = jax.nn.softmax(jax.random.normal(key, (t, k)))
    kw = dict(input_scales=(jnp.full(e, 0.0012), jnp.full(e, 0.002))) if scaling == "static" else {}
    y = nvfp4jax.NVFP4Experts.from_float(layer, scaling=scaling, **kw)(x, ids, weights)
    q = nvfp4jax.NVFP4Experts.from_float(layer)
    gate_up, down = (decode(w) for w in q.weights())

    def act(rows, owners, which):
        if scaling is None:
            return np.asarray(rows, np.float64)
        if scaling == "static":
            return decode(nvfp4jax.quantize(rows, Static(kw["input_scales"][which][0])))
        if scaling == "expert":
            out = np.zeros(rows.shape)
            for one in set(owners):
                out[owners == one] = decode(quantize(rows[np.flatnonzero(owners == one)]))
            return out
        return decode(quantize(rows, scaling=scaling))

    owners = np.asarray(ids).ravel()
    rows = act(x[np.repeat(np.arange(t), k)], owners, 0)
    gate, up = (np.einsum("mh,mih->mi", rows, gate_up[owners, n]) for n in (0, 1))
    hidden = jnp.asarray(gate / (1 + np.exp(-gate)) * up, jnp.float32)
    out = np.einsum("mi,mhi->mh", act(hidden, owners, 1), down[owners]).reshape(t, k, h)
    expected = (out * np.asarray(weights, np.float64)[..., None]).sum(1)
    # A value next to a rounding boundary of the second quantization may fall on its other side.
    assert np.linalg.norm(y - expected) / np.linalg.norm(expected) < (1e-5 if scaling is None else 0.03)
    assert np.median(np.abs(y - expected)) < 1e-5 * np.abs(expected).max()
    reference = layer(x, ids, weights)
    assert np.linalg.norm(y - reference) / np.linalg.norm(reference) < 0.4


def test_padding_takes_no_part_in_an_amax(key):
    layer = nnx.Linear(64, 32, use_bias=False, rngs=nnx.Rngs(key))
    experts = nvfp4jax.Experts(3, 64, 32, rngs=nnx.Rngs(key))
    x = jax.random.normal(key, (2, 4, 64))
    valid = jnp.array([[False, True, True, True], [True, True, True, False]])
    noisy = jnp.where(valid[..., None], x, x * 1e6)
    ids, weights = jax.random.randint(key, (8, 2), 0, 3), jnp.full((8, 2), 0.5)
    for scaling in ("tensor", "tensor_pow2", "token", "expert"):
        q = nvfp4jax.NVFP4Experts.from_float(experts, scaling=scaling)
        calls = [lambda x, valid=None, q=q: q(x.reshape(8, 64), ids, weights, valid=None if valid is None else valid.reshape(-1)).reshape(x.shape)]
        if scaling != "expert":
            linear = nvfp4jax.NVFP4Linear.from_float(layer, scaling=scaling)
            calls.append(lambda x, valid=None, q=linear: q(x, valid=valid))
        for call in calls:
            masked, plain = jax.jit(lambda x, call=call: call(x, valid=valid)), jax.jit(lambda x, call=call: call(x))
            np.testing.assert_array_equal(np.asarray(masked(noisy))[valid], np.asarray(masked(x))[valid])
            if scaling in ("tensor", "expert"):
                assert (np.asarray(plain(noisy))[valid] != np.asarray(plain(x))[valid]).any()


def test_swap(key):
    net = Net(nnx.Rngs(key))
    before = values(nnx.state(net))
    x = jax.random.normal(key, (2, 5, 64), BF16)
    q = nvfp4jax.quantize_model(net, RULES)
    assert [type(m).__name__ for m in (q.blocks[0], q.split, q.kv, q.experts, q.raw, q.head, q.norm)] == [
        "NVFP4Linear", "NVFP4LinearGeneral", "NVFP4Einsum", "NVFP4Experts", "NVFP4Weight", "Linear", "RMSNorm",
    ]  # fmt: skip
    assert isinstance(net.blocks[0], nnx.Linear) and all((a == b).all() for a, b in zip(before, values(nnx.state(net)), strict=True))
    with jax.numpy_dtype_promotion("standard"):  # Flax's own layers promote
        y, exact = (np.asarray(jax.jit(m.__call__)(x), np.float32) for m in (q, net))
    assert np.isfinite(y).all() and 0.01 < np.linalg.norm(y - exact) / np.linalg.norm(exact) < 0.6
    np.testing.assert_allclose(decode(NVFP4Array(q.raw.kernel_packed[...], q.raw.kernel_scale[...], q.raw.kernel_global_scale[...][:, None, None])).swapaxes(1, 2), q.raw[...].astype(jnp.float32), rtol=0.01)


def test_quantize_params_is_the_offline_route(key):
    net = Net(nnx.Rngs(key))
    q = nvfp4jax.quantize_model(net, RULES)
    state, own = nnx.state(net, nnx.Param), nnx.state(q)
    traced = []

    @jax.jit
    def requantize(state):
        traced.append(1)
        return nvfp4jax.quantize_params(state, q)

    for source in (state, jax.tree.map(lambda v: v.astype(jnp.float32), state), nnx.to_pure_dict(state), net, own):
        made = nvfp4jax.quantize_params(source, q)
        assert jax.tree.structure(made) == jax.tree.structure(own)
        for a, b in zip(values(made), values(own), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8))
    for _ in range(20):
        made = requantize(state)
    assert len(traced) == 1
    assert all((a.view(np.uint8) == b.view(np.uint8)).all() for a, b in zip(values(made), values(own), strict=True))
    abstract = nvfp4jax.quantize_model(nnx.eval_shape(lambda: Net(nnx.Rngs(0))), RULES)
    assert [(v.shape, v.dtype) for v in jax.tree.leaves(nnx.state(abstract))] == [(v.shape, v.dtype) for v in jax.tree.leaves(own)]
    made = nvfp4jax.quantize_params(state, abstract)
    assert all((a.view(np.uint8) == b.view(np.uint8)).all() for a, b in zip(values(made), values(own), strict=True))


def test_stacks_of_layers_quantize_each_layer_alone(key):
    """A stack [L, ...], as scanned models hold it, gives each layer the bits it has alone."""
    alone = [nnx.Linear(64, 32, use_bias=False, rngs=nnx.Rngs(jax.random.fold_in(key, i))) for i in range(3)]
    experts = [nvfp4jax.Experts(2, 64, 32, rngs=nnx.Rngs(jax.random.fold_in(key, i))) for i in range(3)]
    for layers_, convert in ((alone, nvfp4jax.NVFP4Linear.from_float), (experts, nvfp4jax.NVFP4Experts.from_float)):
        graphdef, _ = nnx.split(layers_[0])
        stacked = nnx.merge(graphdef, jax.tree.map(lambda *v: jnp.stack(v), *(nnx.state(m) for m in layers_)))
        together = nnx.state(convert(stacked))
        for i, layer in enumerate(layers_):
            one = nnx.state(convert(layer))
            assert all((np.atleast_1d(a[i]).view(np.uint8) == b.view(np.uint8)).all() for a, b in zip(values(together), values(one), strict=True))


def test_rules(key, unchecked):
    net = Net(nnx.Rngs(key))
    q = nvfp4jax.quantize_model(net, [Rule("blocks/1", skip=True), Rule(r"blocks/\d", scaling=Tensor(pow2=True, four_over_six="mse"))])
    assert type(q.blocks[1]) is nnx.Linear and type(q.split) is nnx.LinearGeneral
    assert q.blocks[0].scaling == Tensor(pow2=True, four_over_six="mse")
    for rules, message in (
        ([Rule("block/.*")], r"rule 'block/\.\*' matches no layer .* the layers are: blocks/0, "),
        ([Rule(".*"), Rule("head")], "rule 'head' matches no layer that an earlier rule has not taken"),
    ):
        with pytest.raises(ValueError, match=message):
            nvfp4jax.quantize_model(net, rules)
    for wrong, message in ((dict(module_path="("), r"Rule\('\('\): module_path is no regular expression"), (dict(module_path=7), "module_path=7"),
                           (dict(module_path="head", scaling="row"), r"Rule\('head'\): scaling='row' is not one of token"),
                           (dict(module_path="head", weight_four_over_six="mze"), "weight_four_over_six='mze': None, 'mae' or 'mse'"),
                           (dict(module_path="head", implementation="hoper"), "implementation='hoper': one of xla, hopper")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            Rule(**wrong)
    with pytest.raises(ValueError, match=r"layers/0 of shape \(24, 8\): the contraction axis K=24"):
        nvfp4jax.quantize_model(nnx.Sequential(nnx.Linear(24, 8, rngs=nnx.Rngs(0))), [Rule(".*")])


def test_rules_that_skip_a_container(key):
    """Of all rules that match a layer, or, among those that skip, a module around it, the first decides."""

    class Outer(nnx.Module):
        def __init__(self):
            self.head = nnx.Linear(32, 32, rngs=nnx.Rngs(0))
            self.inner = nnx.List([nnx.Dict(up=nnx.Linear(32, 32, rngs=nnx.Rngs(0)), norm=nnx.RMSNorm(32, rngs=nnx.Rngs(0))) for _ in range(2)])
            self.last = nnx.Dict(norm=nnx.RMSNorm(32, rngs=nnx.Rngs(0)))

    for rules, packed in (
        ([Rule(".*(1/up|head)"), Rule("inner/.*", skip=True)], {"inner/1/up", "head"}),
        ([Rule("inner/0", skip=True), Rule(".*")], {"inner/1/up", "head"}),
        ([Rule("inner/0/.*"), Rule("inner", skip=True), Rule(".*")], {"inner/0/up", "head"}),
        ([Rule(".*"), Rule("last", skip=True)], {"inner/0/up", "inner/1/up", "head"}),  # there is no layer in it
    ):
        assert {"/".join(map(str, path)) for path in swap.quantized_layers(nvfp4jax.quantize_model(Outer(), rules))} == packed
    for name in ("inner/0", "inner/0/.*"):  # with a norm, which no rule takes
        with pytest.raises(ValueError, match=re.escape(f"rule {name!r} matches no layer that an earlier rule has not taken")):
            nvfp4jax.quantize_model(Outer(), [Rule(".*"), Rule(name, skip=True)])


def test_shared_layers_stay_shared():
    class Tied(nnx.Module):
        def __init__(self):
            self.a = nnx.Linear(32, 32, rngs=nnx.Rngs(0))
            self.b = self.a

    q = nvfp4jax.quantize_model(Tied(), [Rule(".*")])
    assert q.a is q.b and isinstance(q.a, nvfp4jax.NVFP4Linear)


def test_a_layer_of_ones_own(key):
    class Mine(nnx.Module):
        def __init__(self, w):
            self.w = nnx.Param(w)

        def __call__(self, x):
            return x @ self.w[...]

    class MineNVFP4(nnx.Module):
        def __init__(self, layer, name, scaling):
            q = quantize_weight(layer.w[...].T)
            self.scaling = scaling
            self.packed, self.scale, self.global_scale = nnx.Param(q.packed), nnx.Param(q.scale), nnx.Param(q.global_scale)

        def __call__(self, x):
            return nvfp4jax.matmul(x, NVFP4Array(self.packed[...], self.scale[...], self.global_scale[...]), scaling=self.scaling)

    model = nnx.Sequential(Mine(jax.random.normal(key, (32, 16))))
    with pytest.raises(ValueError, match="matches no layer"):
        nvfp4jax.quantize_model(model, [Rule(".*")])

    @nvfp4jax.register(Mine)
    def convert(layer, *, name, scaling, **options):
        return MineNVFP4(layer, name, scaling)

    x = jax.random.normal(key, (4, 32))
    y = nvfp4jax.quantize_model(model, [Rule(".*", scaling=None)])(x)
    check(y, np.asarray(x, np.float64), decode(quantize_weight(model.layers[0].w[...].T)))


def test_quantize_params_names_what_is_wrong(key):
    net = Net(nnx.Rngs(key))
    q = nvfp4jax.quantize_model(net, RULES)
    state = nnx.to_pure_dict(nnx.state(net, nnx.Param))
    del state["experts"]["up_proj"]
    with pytest.raises(ValueError, match="experts: the state has no experts/up_proj"):
        nvfp4jax.quantize_params(state, q)
    state = nnx.to_pure_dict(nnx.state(net, nnx.Param))
    state["head"]["kernel"] = state["head"]["kernel"].T
    with pytest.raises(ValueError, match=r"head/kernel: shape \(10, 64\) in the state, \(64, 10\) in the model"):
        nvfp4jax.quantize_params(state, q)


def test_weights_that_are_not_finite_are_refused(key):
    for bad in (jnp.nan, jnp.inf):
        net = Net(nnx.Rngs(key))
        net.experts.down_proj[...] = net.experts.down_proj[...].at[1, 2, 3].set(bad)
        with pytest.raises(ValueError, match=r"experts: down: the weight of shape \(4, 32, 64\) holds NaN or infinity"):
            nvfp4jax.quantize_model(net, RULES)


def test_a_packed_state_is_taken_as_a_reader_takes_it(key):
    """The inverse of a global scale, as compressed-tensors stores it, would be weights 10**8 times too large."""
    q = nvfp4jax.quantize_model(Net(nnx.Rngs(key)), RULES)
    state = nnx.to_pure_dict(nnx.state(q))
    nvfp4jax.quantize_params(state, q)
    for bad in (1 / state["split"]["kernel_global_scale"], jnp.float32(0), jnp.float32(jnp.nan)):
        state["split"]["kernel_global_scale"] = bad
        with pytest.raises(ValueError, match="split/kernel_global_scale: a global scale that is not finite, not positive, or the inverse"):
            nvfp4jax.quantize_params(state, q)


@pytest.mark.slow
def test_tree_mode(key):
    """The swap, a call and quantize_params under NNX tree mode, in a process of its own: the mode is set at import."""
    program = """
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
import nvfp4jax
from nvfp4jax import Rule
folder = %r
model = nvfp4jax.load_model(folder, scan_layers=True)
q = nvfp4jax.quantize_model(model, [Rule("lm_head|.*/mlp/gate", skip=True), Rule(".*")])
made = jax.jit(lambda s: nvfp4jax.quantize_params(s, q))(nnx.state(model, nnx.Param))
assert all((np.asarray(a) == np.asarray(b)).all() for a, b in zip(jax.tree.leaves(made), jax.tree.leaves(nnx.state(q))))
out = nvfp4jax.generate(q, np.arange(8)[None] + 5, max_new_tokens=4)
print(np.asarray(out.tokens).tolist())
"""
    program %= str(DATA / "qwen3-moe-tiny" / "bf16")
    printed = [
        subprocess.run([sys.executable, "-c", program], env=os.environ | {"NNX_GRAPH_MODE": mode, "NNX_GRAPH_UPDATES": mode},
                       capture_output=True, text=True, check=True).stdout
        for mode in ("true", "false")
    ]  # fmt: skip
    assert printed[0] == printed[1] and printed[0].startswith("[[")


def test_shardings_follow_the_weight():
    """A kernel sharded (in, out) gives codes and block scales sharded (N, K); both mesh kinds."""
    for kind in (jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit):
        mesh = jax.make_mesh((2, 2), ("fsdp", "tp"), axis_types=(kind, kind))
        with jax.set_mesh(mesh):
            layer = nnx.Linear(64, 32, use_bias=False, rngs=nnx.Rngs(0), kernel_metadata={"out_sharding": ("fsdp", "tp")})
            q = nvfp4jax.NVFP4Linear.from_float(layer)
            assert tuple(q.kernel_packed.get_metadata()["out_sharding"]) == ("tp", "fsdp")
            assert tuple(q.kernel_scale.get_metadata()["out_sharding"]) == ("tp", "fsdp")
            assert nnx.get_partition_spec(nnx.state(q))["kernel_packed"].get_value() == jax.sharding.PartitionSpec("tp", "fsdp")
        plain = nvfp4jax.NVFP4Linear.from_float(nnx.Linear(64, 32, use_bias=False, rngs=nnx.Rngs(0)))
        np.testing.assert_array_equal(np.asarray(q.kernel_packed[...]), plain.kernel_packed[...])


def test_raw_weight_reads_like_a_param(key):
    raw = nnx.Param(jax.random.normal(key, (2, 32, 16), BF16))
    w = NVFP4Weight(raw, name="w")
    assert w.shape == raw.shape and w.dtype == BF16 and w.ndim == 3
    np.testing.assert_array_equal(jnp.asarray(w), w[...])
    np.testing.assert_array_equal(w[0], w.get_value()[0])


def test_a_packed_kernel_reads_like_the_float_layers():
    """What others' code asks of a Param, of a linear layer's kernel and of a raw weight."""
    linear = nnx.Linear(32, 16, param_dtype=BF16, rngs=nnx.Rngs(0))
    kernel = nvfp4jax.NVFP4Linear.from_float(linear).kernel
    raw = NVFP4Weight(nnx.Param(jnp.ones((2, 32, 16), BF16)), name="w")
    for view, shape in ((kernel, (32, 16)), (raw, (2, 32, 16))):
        assert (view.shape, view.ndim, view.size, view.dtype) == (shape, len(shape), np.prod(shape), BF16)
        assert view.value.shape == view.get_value().shape == view[...].shape == shape and view.T.shape == shape[::-1]
        assert view.astype(jnp.float32).dtype == jnp.float32 and jnp.asarray(view).shape == shape
    assert np.abs(np.asarray(kernel.value - linear.kernel[...], np.float32)).max() < 0.25 * np.abs(np.asarray(linear.kernel[...], np.float32)).max()


class _Tied(nnx.Module):
    """Two layers of one kernel, and a table that is a layer's too."""

    def __init__(self, rngs):
        self.a = nnx.Linear(32, 32, use_bias=False, rngs=rngs)
        self.b = nnx.Linear(32, 32, use_bias=False, rngs=rngs)
        self.b.kernel = self.a.kernel
        self.table = nnx.Embed(16, 32, rngs=rngs)
        self.first = nnx.Linear(16, 32, use_bias=False, rngs=rngs)
        self.last = nnx.Linear(16, 32, use_bias=False, rngs=rngs)
        self.first.kernel = self.table.embedding  # 'first' comes before 'table' in a state
        self.other = nnx.Embed(16, 32, rngs=rngs)
        self.last.kernel = self.other.embedding  # 'last' before 'other'


def test_a_param_that_layers_share_is_found():
    """A float state has it once, at the first of its places; each layer is made of it."""
    net = _Tied(nnx.Rngs(0))
    qnet = nvfp4jax.quantize_model(net, Rule("a|b|first|last"))
    nnx.update(net, jax.tree.map(lambda x: 2 * x, nnx.state(net)))
    made = nnx.to_pure_dict(nvfp4jax.quantize_params(nnx.state(net), qnet))
    apart = nnx.to_pure_dict(nvfp4jax.quantize_params(nnx.state(net.a), nvfp4jax.quantize_model(nnx.Sequential(net.a), Rule(".*")).layers[0]))
    for name in ("kernel_packed", "kernel_scale", "kernel_global_scale"):
        np.testing.assert_array_equal(made["a"][name], made["b"][name])
        np.testing.assert_array_equal(made["a"][name], apart[name])
    for linear, table in (("first", "table"), ("last", "other")):
        embedding = getattr(net, table).embedding.get_value()
        np.testing.assert_array_equal(made[linear]["kernel_packed"], nvfp4jax.NVFP4Linear.from_float(getattr(net, linear)).kernel_packed[...])
        np.testing.assert_array_equal(made[table]["embedding"], embedding)
    for state in (nnx.state(net), nnx.clone(net)):
        for one, other in zip(jax.tree.leaves(Quantizer(qnet)(state)), jax.tree.leaves(nvfp4jax.quantize_params(state, qnet)), strict=True):
            np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    loss = lambda net: nvfp4jax.straight_through(qnet, net).table(jnp.array([3])).sum()  # noqa: E731
    gradient = nnx.to_pure_dict(nnx.grad(loss)(net))
    assert np.asarray(gradient["first"]["kernel"])[3].sum() == 32  # the one Param, through its other place


def test_what_a_rule_leaves_in_float_is_said(caplog):
    """A rule whose path matches more bytes than it can pack: one warning, with the class and the way out."""

    class Fancy(nnx.Linear):
        pass

    net = nnx.Dict(small=nnx.Linear(16, 16, rngs=nnx.Rngs(0)), big=Fancy(64, 64, rngs=nnx.Rngs(0)))

    class Net(nnx.Module):
        def __init__(self):
            self.net = net

    nvfp4jax.quantize_model(Net(), Rule(".*"))
    (said,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert "rule '.*' packed" in said and "net/big/kernel (Fancy): a subclass of Linear; teach it with nvfp4jax.register(Fancy)" in said
