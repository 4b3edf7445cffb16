"""A decode step compiled for an H200 with no GPU: the stacked cache is written and read in place."""

import re

import aot
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import lax

import nvfp4jax
from nvfp4jax import ops
from nvfp4jax.backends import hopper
from nvfp4jax.fp8 import FP8Array
from nvfp4jax.models import build, stack_layers
from nvfp4jax.models import cache as caches
from nvfp4jax.models.cache import CacheArray, LayerCache
from nvfp4jax.ops import choice
from nvfp4jax.rollout.sampling import Sampling, sample

pytestmark = [pytest.mark.aot, pytest.mark.skipif(not aot.available(), reason="needs the extra `aot`")]


def instructions(text: str) -> list[str]:
    """Those outside of fusions."""
    computations = re.split(r"\n(?=%|ENTRY)", text)
    return [line for c in computations if "fused_computation" not in c.split("(")[0] for line in c.splitlines() if " = " in line]


@pytest.mark.parametrize("prompts", [0, 3])
def test_a_stacked_cache_is_never_copied(prompts):
    """prompts: None are shared, or each by two rows."""
    layers, rows, heads, slots, d = 3, 6, 2, 300, 128
    shape = jax.ShapeDtypeStruct((layers, rows, heads, slots, d), jnp.bfloat16)
    shared = [jax.ShapeDtypeStruct((layers, prompts, heads, 200, d), jnp.bfloat16)] * 2 if prompts else []
    new = jax.ShapeDtypeStruct((layers, rows, 1, heads, d), jnp.bfloat16)
    q = jax.ShapeDtypeStruct((rows, 1, 4 * heads, d), jnp.bfloat16)

    def step(keys, values, new, q, starts, *shared):
        part = LayerCache({"keys": CacheArray(keys, -4, -2), "values": CacheArray(values, -4, -2)})
        if shared:
            arrays = {name: CacheArray(x, -4, -2) for name, x in zip(("keys", "values"), shared, strict=True)}
            part = part._replace(shared=arrays, shared_slots=jnp.full(rows, 128, jnp.int32))
        places = starts - jnp.int32(128) if shared else starts
        plan = ops.attention_plan(starts, q, keys, shared=part.shared_rows("keys", "values"), implementation="hopper")

        def layer(carry, scanned):
            x, part = carry
            index, new = scanned
            part = part._replace(layer=index).write(places, keys=new, values=new)
            common = part.shared_rows("keys", "values")
            x = ops.attention(x, part["keys"], part["values"], starts, layer=index, plan=plan, shared=common, implementation="hopper")
            return (x, part._replace(layer=None)), None

        (x, part), _ = lax.scan(layer, (q, part), (jnp.arange(layers, dtype=jnp.int32), new))
        return x, part["keys"], part["values"]

    def steps(keys, values, new, q, starts, *shared):
        def again(carry):
            q, keys, values, starts, *shared = carry
            q, keys, values = step(keys, values, new, q, starts, *shared)
            return q, keys, values, starts + 1, *shared

        return lax.while_loop(lambda carry: carry[3][0] < slots, again, (q, keys, values, starts, *shared))

    device, sharding = aot._device("h200")
    args = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding) for a in (shape, shape, new, q, jax.ShapeDtypeStruct((rows,), jnp.int32), *shared)]
    with aot._default_device(device):
        compiled = jax.jit(steps, donate_argnums=(0, 1, *range(5, len(args)))).lower(*args).compile()
    cache = rf"bf16\[({layers},)?({rows},{heads},{slots}|{prompts},{heads},200),{d}\]"
    made = [line for line in instructions(compiled.as_text()) if re.match(rf"\s*(ROOT )?%\S+ = {cache}", line)]
    # Whatever gives a cache, or a layer of it, writes into the one that it was given.
    moved = [line for line in made if not re.search(r" (parameter|get-tuple-element|bitcast)\(|output_to_operand_aliasing|scatter", line)]
    assert made and not moved, moved


def fp8_cache(layers, rows, heads, slots, d):
    kv = [{"keys": (heads, None, d), "values": (heads, None, d)}]
    return jax.eval_shape(lambda: caches.init_cache(kv, [layers], rows, slots, jnp.float8_e4m3fn))


def compiled(f, *args, donate=()):
    device, sharding = aot._device("h200")
    args = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), args)
    with aot._default_device(device):
        return jax.jit(f, donate_argnums=donate).lower(*args).compile().as_text()


@pytest.mark.parametrize("prompts, prefix", [(0, 0), (3, 0), pytest.param(3, 256, marks=pytest.mark.slow)])
def test_an_fp8_cache_is_never_copied(prompts, prefix):
    """Written by `rope_write` and read by `attention`, codes and scales, in a scan over layers in a loop over steps; so is what prompts
    share, decoded, and what stands in front of that."""
    layers, rows, heads, slots, d = 3, 6, 2, 300, 128
    own, of_prompts = fp8_cache(layers, rows, heads, slots, d), fp8_cache(layers, prompts or 1, heads, 200, d)
    q, k = (jax.ShapeDtypeStruct((rows, 1, n * heads, d), jnp.bfloat16) for n in (4, 1))
    angle = jax.ShapeDtypeStruct((rows, 1, d // 2), jnp.float32)

    def step(own, q, k, angle, starts, shared):
        shared, front = shared
        (part,) = caches.parts(caches.SharedCache(own, shared, jnp.full(rows, prefix + 128, jnp.int32), front) if prompts else own)
        keys, common = part["keys"], part.shared_rows("keys", "values")
        assert isinstance(keys, FP8Array)
        places = starts if common is None else starts - (prefix + 128)
        plan = ops.attention_plan(starts, q, jax.ShapeDtypeStruct(keys.shape, keys.dtype), shared=common, implementation="hopper")

        def layer(carry, index):
            x, part = carry
            x, keys, values = ops.rope_write(x, k, k, angle, angle, places, part["keys"], part["values"], layer=index, implementation="hopper")
            common = part.shared_rows("keys", "values")
            x = ops.attention(x, keys, values, starts, layer=index, plan=plan, shared=common, implementation="hopper")
            return (x, part.replace(keys=keys, values=values)), None

        (x, part), _ = lax.scan(layer, (q, part), jnp.arange(layers, dtype=jnp.int32))
        return (part.arrays,), x

    def steps(own, q, k, angle, starts, shared):
        again = lambda carry: (*step(carry[0], carry[1], k, angle, carry[2], carry[3]), carry[2] + 1, carry[3])
        return lax.while_loop(lambda carry: carry[2][0] < slots, again, (own, q, starts, shared))

    front = jax.eval_shape(caches.decoded, fp8_cache(layers, 1, heads, prefix, d)) if prefix else None
    args = own, q, k, angle, jax.ShapeDtypeStruct((rows,), jnp.int32), (jax.eval_shape(caches.decoded, of_prompts), front)
    text = compiled(steps, *args, donate=(0, 5))
    shape = rf"(f8e4m3fn|u8|bf16|f32)\[({layers},|1,)?({rows},{heads},{slots}|{prompts},{heads},200|1,{heads},{prefix})(,{d})?\]"
    made = [line for line in instructions(text) if re.match(rf"\s*(ROOT )?%\S+ = {shape}", line)]
    moved = [line for line in made if not re.search(r" (parameter|get-tuple-element|bitcast)\(|output_to_operand_aliasing", line)]
    assert made and not moved, moved


@pytest.mark.parametrize("prompts", [0, 3])
def test_prefill_of_an_fp8_cache_says_that_it_decodes(prompts, caplog):
    """A layer at a time, and once in the log."""
    hopper._log_decoded.cache_clear()
    layers, rows, heads, slots, d, tokens = 3, 6, 2, 300, 128, 80
    (own,), (common,) = (fp8_cache(layers, n, heads, size, d) for n, size in ((rows, slots), (prompts or 1, 256)))
    q, starts = jax.ShapeDtypeStruct((rows, tokens, 4 * heads, d), jnp.bfloat16), jax.ShapeDtypeStruct((rows,), jnp.int32)

    def prefill(q, own, common, starts):
        part = LayerCache(own, shared=common if prompts else None, shared_slots=starts if prompts else None)
        shared, keys, values = part.shared_rows("keys", "values"), part["keys"], part["values"]
        attend = lambda i, q: ops.attention(q, keys, values, starts, layer=i, shared=shared, implementation="hopper")
        return lax.fori_loop(0, layers, attend, q)

    text = compiled(prefill, q, own, common, starts)
    assert f"bf16[1,{rows},{heads},{slots},{d}]" in text and f"bf16[{layers},{rows},{heads},{slots},{d}]" not in text
    said = [r.getMessage() for r in caplog.records if "decoded to bfloat16" in r.getMessage()]
    assert len(said) == (2 if prompts else 1) and any("keys and values for prefill" in line for line in said)


@pytest.mark.parametrize("how", [Sampling(False, 20, True), Sampling(False, 200), Sampling(False, None, True)])
def test_no_sort_of_the_vocabulary(how):
    """On a GPU lax.top_k of more than 16 is a sort of everything."""
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 64))
    args = jax.ShapeDtypeStruct((64, 151936), jnp.float32), keys, *[jax.ShapeDtypeStruct((), jnp.float32)] * 2
    text = compiled(lambda *args: sample(*args, how), *args)
    sorted_columns = [int(n) for n in re.findall(r"\[64,(\d+)\]\S* sort\(", text)] + [int(n) for n in re.findall(r"sort\(\S+\[64,(\d+)\]", text)]
    assert all(n < 151936 / 8 for n in sorted_columns) and "TopK" not in text
    assert bool(re.search(r"\bsort\(", text)) == (how.top_k is not None)


QWEN3_MOE = dict(
    architectures=["Qwen3MoeForCausalLM"], model_type="qwen3_moe", vocab_size=512, hidden_size=2048, intermediate_size=6144, num_hidden_layers=2,
    num_attention_heads=32, num_key_value_heads=4, head_dim=128, rms_norm_eps=1e-6, rope_theta=1e6, tie_word_embeddings=False, num_experts=128,
    num_experts_per_tok=8, moe_intermediate_size=768, norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[],
)  # fmt: skip


@pytest.mark.parametrize("rows, kernels", [(1, 14), (128, 14), (256, 15)])
def test_launches_of_a_layer(rows, kernels, monkeypatch):
    """The kernels of a stacked Qwen3-MoE, and the counter of layers, which an unrolled one does not have. From 129 rows on two launches choose
    and sort faster than one."""
    monkeypatch.setattr(choice, "_default_order", lambda: ("hopper", "xla"))  # the default device is a CPU
    model = nnx.eval_shape(lambda: stack_layers(nvfp4jax.quantize_model(build(QWEN3_MOE), nvfp4jax.Rule("layers/.*(proj|experts)"))))
    graphdef, state = nnx.split(model)

    def step(state, tokens, cache, starts):
        out = nnx.merge(graphdef, state)(tokens, starts[:, None], cache)
        return out.logits, out.cache

    cache = jax.eval_shape(lambda: model.init_cache(rows, 1024))
    args = state, jax.ShapeDtypeStruct((rows, 1), jnp.int32), cache, jax.ShapeDtypeStruct((rows,), jnp.int32)
    computations = re.split(r"\n(?=%|ENTRY)", compiled(step, *args, donate=(2,)))
    (layer,) = [c for c in computations if c.count('custom_call_target="mosaic_gpu') > 5]
    kinds = [(line, found[1]) for line in layer.splitlines() if (found := re.search(r" = .*? ([a-z-]+)\(", line))]
    launched = [line for line, kind in kinds if kind not in ("parameter", "constant", "tuple", "get-tuple-element", "bitcast")]
    counter = [line for line in launched if re.search(r" = s32\[\]\S* fusion\(", line)]
    assert len(counter) == 1 and len(launched) == kernels + 1, launched
