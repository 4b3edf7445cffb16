"""A decode step with layers kept in bfloat16, compiled for an H200 with no GPU: every product is a kernel of ours."""

import re

import aot
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import nvfp4jax
from nvfp4jax import models
from nvfp4jax.ops import choice

pytestmark = [pytest.mark.aot, pytest.mark.skipif(not aot.available(), reason="needs the extra `aot`")]
CONFIG = dict(
    architectures=["Qwen3ForCausalLM"], model_type="qwen3", vocab_size=256, hidden_size=256, intermediate_size=512, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=2, head_dim=128, attention_bias=True,
)  # fmt: skip
PRODUCT = re.compile(r"\bdot\(|cublas|gemm", re.IGNORECASE)


@pytest.mark.parametrize("heads, stacked, whole", [(128, False, True), (128, True, True), (32, False, False)])
def test_every_product_of_a_decode_step_is_a_kernel(heads, stacked, whole, monkeypatch, caplog):
    """The first layer and the last two are kept, with biases and residuals. Heads of 32: attention is XLA's, and the search finds its products."""
    model = nvfp4jax.quantize_model(models.build(CONFIG | dict(head_dim=heads), rngs=nnx.Rngs(0)), nvfp4jax.Rule("layers/1/.*"))
    model = models.stack_layers(model) if stacked else model
    graphdef, params = nnx.split(model)
    monkeypatch.setattr(choice, "_default_order", lambda: ("hopper", "xla"))
    choice._log_fallback.cache_clear()
    device, sharding = aot._device("h200")
    shaped = lambda tree: jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tree)  # noqa: E731

    def step(params, tokens, positions, kv):
        out = nnx.merge(graphdef, params)(tokens, positions, kv)
        return out.logits, out.cache

    column = jax.ShapeDtypeStruct((3, 1), jnp.int32)
    args = shaped((params, column, column, jax.eval_shape(lambda: model.init_cache(3, 64))))
    with aot._default_device(device):
        text = jax.jit(step, donate_argnums=3).lower(*args).compile().as_text()
    found = [line.strip()[:140] for line in text.splitlines() if PRODUCT.search(line)]
    assert bool(found) != whole, found
    said = {record.getMessage() for record in caplog.records if "does not apply" in record.getMessage()}
    assert bool(said) != whole, said
