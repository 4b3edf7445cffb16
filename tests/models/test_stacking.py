"""Stacked layers: the conversions, and what the compiled scan may not hold."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import nvfp4jax
from models import loading
from nvfp4jax import models
from nvfp4jax.layers import InputScale

RULES = [
    nvfp4jax.Rule(r"layers/0/.*|lm_head|.*/gate", skip=True),  # keeps the first layer
    nvfp4jax.Rule(r"layers/.*", scaling="token"),
]


def quantized_moe():
    return nvfp4jax.quantize_model(loading.load("qwen3-moe-tiny", jnp.bfloat16), RULES)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.parametrize("graph", [True, False], ids=["graph", "tree"])
def test_round_trip(graph):
    with nnx.set_graph_mode(graph):
        model = quantized_moe()
        before = jax.tree.map(np.asarray, nnx.state(model))
        stacked = models.stack_layers(model)
        assert models.depths(stacked) == (None, 3)  # the first layer is bf16, so it cannot be stacked with the others
        back = models.unstack_layers(stacked)
        assert nnx.graphdef(back) == nnx.graphdef(model)
        assert_same(nnx.state(back), before)
        assert_same(nnx.state(model), before)  # neither touched the model it was given
        assert back.layers[2].self_attn.q_proj.name == "layers/2/self_attn/q_proj"
        assert stacked.layers[1].self_attn.q_proj.name == "layers/1-3/self_attn/q_proj"
        codes = stacked.layers[1].mlp.experts.gate_up_packed.get_value()
        np.testing.assert_array_equal(codes[2], model.layers[3].mlp.experts.gate_up_packed.get_value())
        with pytest.raises(ValueError, match="stacked already"):
            models.stack_layers(stacked)


def test_states_convert_under_jit():
    """What a hot reload needs: the state of an unrolled model into that of a stacked one, and back, without a model."""
    model = quantized_moe()
    lengths = (1, 3)
    state = jax.jit(lambda s: models.stack_state(s, lengths))(nnx.state(model))
    assert_same(state, nnx.state(models.stack_layers(model)))
    assert_same(jax.jit(lambda s: models.unstack_state(s, lengths))(state), nnx.state(model))
    with pytest.raises(ValueError, match=r"lengths \(1, 2\) make 3"):
        models.stack_state(nnx.state(model), (1, 2))
    with pytest.raises(ValueError, match=r"layers/1/.* exists in 3 of the 4"):
        models.stack_state(nnx.state(model), (1, 4))
    with pytest.raises(ValueError, match="layers/0/.* exists in 1 of the 4"):  # layers that do not share a structure
        models.stack_state(nnx.state(model), (4,))


def test_abstract_models_stack():
    config = loading.config("qwen3-moe-tiny")
    abstract = models.stack_layers(nvfp4jax.quantize_model(models.build(config), RULES))
    real = models.stack_layers(quantized_moe())
    for x, y in zip(jax.tree.leaves(nnx.state(abstract)), jax.tree.leaves(nnx.state(real)), strict=True):
        assert isinstance(x, jax.ShapeDtypeStruct)
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
    assert nnx.graphdef(abstract) == nnx.graphdef(real)


def test_stacking_and_quantizing_commute():
    """Layers stacked first and quantized then hold the same bytes, in every mode that keeps an input scale too."""
    model = loading.load("qwen3-moe-tiny", jnp.bfloat16)
    rules = [nvfp4jax.Rule(r"lm_head|.*/gate", skip=True), nvfp4jax.Rule(r"layers/.*")]
    one = nvfp4jax.quantize_model(models.stack_layers(model), rules)
    two = models.stack_layers(nvfp4jax.quantize_model(model, rules))
    assert_same(nnx.state(one), nnx.state(two))
    assert_same(nvfp4jax.quantize_params(nnx.state(models.stack_layers(model)), two), nnx.state(two))


def test_scanned_equals_unrolled():
    """Static scales that differ from layer to layer, biases, experts' own scales: the scan gives each layer its own."""
    config = dict(
        architectures=["Qwen3MoeForCausalLM"],
        model_type="qwen3_moe",
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        attention_bias=True,
    )
    rules = [
        nvfp4jax.Rule(r".*/gate|lm_head", skip=True),
        nvfp4jax.Rule(r".*/self_attn/.*", scaling="static"),
        nvfp4jax.Rule(r".*/experts", scaling="expert"),
    ]
    model = nvfp4jax.quantize_model(models.build(config, jnp.float32, rngs=nnx.Rngs(0)), rules)
    for i, layer in enumerate(model.layers):
        for j, name in enumerate(("q_proj", "k_proj", "v_proj", "o_proj")):
            linear = getattr(layer.self_attn, name)
            linear.input_scale = InputScale(jnp.float32(0.002 * (1 + i) + 0.001 * j))
            linear.bias.set_value(jax.random.normal(jax.random.key(4 * i + j), linear.bias.shape))
    stacked = models.stack_layers(model)
    assert models.depths(stacked) == (2,)
    assert stacked.layers[0].self_attn.k_proj.input_scale.shape == (2,)
    tokens = jnp.arange(10, dtype=jnp.int32)[None]

    def logits_of(model):
        graphdef, state = nnx.split(model)
        return np.asarray(jax.jit(lambda s: nnx.merge(graphdef, s)(tokens, tokens).logits)(state))

    logits = [logits_of(model), logits_of(stacked)]
    np.testing.assert_allclose(*logits, atol=1e-4)
    # Layers in another order are another model: each layer's place counts.
    swapped = models.stack_layers(model)
    codes = swapped.layers[0].mlp.experts.down_packed
    codes.set_value(codes.get_value()[::-1])
    assert np.abs(logits_of(swapped) - logits[1]).max() > 1e-2


def compiled_step(model, slots: int = 40) -> str:
    """The optimized program of one decode step, its cache donated."""
    graphdef, state = nnx.split(model)

    def step(state, cache, tokens, valid):
        out = nnx.merge(graphdef, state)(tokens, tokens, cache, valid=valid)
        return out.logits, out.cache

    cache = jax.eval_shape(lambda: model.init_cache(3, slots))
    args = state, cache, jnp.zeros((3, 1), jnp.int32), jnp.ones((3, 1), bool)
    return jax.jit(step, donate_argnums=1).lower(*args).compile().as_text()


def outside_fusions(text: str):
    """(opcode, dtype, shape) of what the program itself materializes: its instructions but for those in a fusion."""
    fused = set(re.findall(r"fusion\(.*calls=%([\w.\-]+)", text))
    computation, found = None, []
    for line in text.splitlines():
        if header := re.match(r"(?:ENTRY )?%([\w.\-]+) \(.*\) -> .* \{$", line):
            computation = header[1]
        elif (
            m := re.match(r"\s+(?:ROOT )?%[\w.\-]+ = (\w+)\[([\d,]*)\]\S* ([\w\-]+)\(", line)
        ) and computation not in fused:
            found.append((m[3], m[1], tuple(int(d) for d in m[2].split(",") if d)))
    return found


FREE = {"parameter", "get-tuple-element", "bitcast", "while", "conditional", "tuple"}  # these copy nothing


def test_the_scan_copies_no_packed_weight():
    model = models.stack_layers(quantized_moe())
    params = {path: leaf.get_value() for path, leaf in nnx.to_flat_state(nnx.state(model)) if path[:2] == ("layers", 1)}
    packed = {v.shape for v in params.values() if v.dtype in (jnp.uint8, jnp.float8_e4m3fn)}
    assert len(packed) == 8  # codes and scales of q and o, k and v, gate_up, down
    program = outside_fusions(compiled_step(model))
    squeezed = lambda shape: tuple(d for d in shape if d != 1)  # noqa: E731
    # The stack itself, a layer of it, and an expert of that: none may be written anywhere.
    forbidden = {squeezed(shape[i:]) for shape in packed for i in range(len(shape) - 1)}
    copies = [
        (op, dtype, shape)
        for op, dtype, shape in program
        if dtype in ("u8", "f8e4m3fn") and squeezed(shape) in forbidden
    ]
    assert {op for op, _, _ in copies} >= {"parameter", "get-tuple-element"}  # the shapes are those of this program
    assert not [c for c in copies if c[0] not in FREE]
    # The same program does write decoded weights, so the check sees what is materialized.
    assert any(op == "fusion" and dtype in ("bf16", "f32") and shape == (128, 128) for op, dtype, shape in program)


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_a_step_copies_no_cache(scan):
    """The donated cache is updated in place: no instruction copies it whole."""
    model = loading.load("qwen3-tiny", scan_layers=scan)  # float32: a CPU converts a bfloat16 cache to multiply with it
    cache = jax.eval_shape(lambda: model.init_cache(3, 40))
    program = outside_fusions(compiled_step(model))
    arrays = jax.tree.leaves(cache)
    shapes = {x.shape for x in arrays}
    written = [op for op, dtype, shape in program if shape in shapes and op not in FREE]
    assert "copy" not in written
    assert 0 < len(written) <= len(arrays)  # one update of each


def test_the_check_for_copies_can_fail():
    """A plain slice of the stacked codes ahead of their use is found."""

    @jax.jit
    def f(w, x):
        def body(x, w):
            codes = jax.lax.optimization_barrier(w)
            return jnp.tanh(x @ codes.astype(jnp.float32)), None

        return jax.lax.scan(body, x, w)[0]

    text = f.lower(jnp.ones((4, 128, 128), jnp.uint8), jnp.ones((3, 128))).compile().as_text()
    assert [
        op
        for op, dtype, shape in outside_fusions(text)
        if dtype == "u8" and shape[-2:] == (128, 128) and op not in FREE
    ]


def _equations(jaxpr) -> int:
    """Of a program, what it calls counted at each call."""
    inner = lambda value: _equations(getattr(value, "jaxpr", value)) if hasattr(value, "eqns") or hasattr(value, "jaxpr") else 0  # noqa: E731
    values = [v for eqn in jaxpr.eqns for v in eqn.params.values()]
    return len(jaxpr.eqns) + sum(inner(v) for value in values for v in (value if isinstance(value, tuple) else (value,)))


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_program_size_against_depth(scan):
    """Twice the layers: the scanned program stays as it is, the unrolled one grows."""
    sizes = []
    for depth in (3, 6):
        config = loading.config("qwen3-tiny") | dict(num_hidden_layers=depth, layer_types=None)
        model = nvfp4jax.quantize_model(models.build(config), nvfp4jax.Rule(r"layers/.*"))
        model = models.stack_layers(model) if scan else model
        graphdef, state = nnx.split(model)
        cache = jax.eval_shape(lambda: model.init_cache(3, 40))  # noqa: B023
        tokens, valid = jnp.zeros((3, 1), jnp.int32), jnp.ones((3, 1), bool)
        jaxpr = jax.make_jaxpr(lambda state, cache: nnx.merge(graphdef, state)(tokens, tokens, cache, valid=valid))(
            state, cache
        )  # noqa: B023
        sizes.append(_equations(jaxpr.jaxpr))
    assert (sizes[1] < sizes[0] * 1.05) == scan
    assert scan or sizes[1] > 1.7 * sizes[0]
