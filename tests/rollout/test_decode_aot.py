"""A decode step compiled for an H200 with no GPU: the stacked cache is written and read in place."""

import re

import aot
import jax
import jax.numpy as jnp
import pytest
from jax import lax

from nvfp4jax import ops
from nvfp4jax.models.cache import CacheArray, LayerCache

pytestmark = [pytest.mark.aot, pytest.mark.skipif(not aot.available(), reason="needs the extra `aot`")]


def instructions(text: str) -> list[str]:
    """Those outside of fusions."""
    computations = re.split(r"\n(?=%|ENTRY)", text)
    return [line for c in computations if "fused_computation" not in c.split("(")[0] for line in c.splitlines() if " = " in line]


def test_a_stacked_cache_is_never_copied():
    layers, rows, heads, slots, d = 3, 5, 2, 300, 128
    shape = jax.ShapeDtypeStruct((layers, rows, heads, slots, d), jnp.bfloat16)
    new = jax.ShapeDtypeStruct((layers, rows, 1, heads, d), jnp.bfloat16)
    q = jax.ShapeDtypeStruct((rows, 1, 4 * heads, d), jnp.bfloat16)

    def step(keys, values, new, q, starts):
        plan = ops.attention_plan(starts, q, keys, implementation="hopper")

        def layer(carry, scanned):
            x, part = carry
            index, new = scanned
            part = part._replace(layer=index).write(starts, keys=new, values=new)
            x = ops.attention(x, part["keys"], part["values"], starts, layer=index, plan=plan, implementation="hopper")
            return (x, part._replace(layer=None)), None

        part = LayerCache({"keys": CacheArray(keys, -4, -2), "values": CacheArray(values, -4, -2)})
        (x, part), _ = lax.scan(layer, (q, part), (jnp.arange(layers, dtype=jnp.int32), new))
        return x, part["keys"], part["values"]

    def steps(keys, values, new, q, starts):
        def again(carry):
            q, keys, values, starts = carry
            q, keys, values = step(keys, values, new, q, starts)
            return q, keys, values, starts + 1

        return lax.while_loop(lambda carry: carry[3][0] < slots, again, (q, keys, values, starts))

    device, sharding = aot._device("h200")
    args = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding) for a in (shape, shape, new, q, jax.ShapeDtypeStruct((rows,), jnp.int32))]
    with aot._default_device(device):
        compiled = jax.jit(steps, donate_argnums=(0, 1)).lower(*args).compile()
    cache = rf"bf16\[({layers},)?{rows},{heads},{slots},{d}\]"
    made = [line for line in instructions(compiled.as_text()) if re.match(rf"\s*(ROOT )?%\S+ = {cache}", line)]
    # Whatever gives a cache, or a layer of it, writes into the one that it was given.
    moved = [line for line in made if not re.search(r" (parameter|get-tuple-element|bitcast)\(|output_to_operand_aliasing|scatter", line)]
    assert made and not moved, moved
