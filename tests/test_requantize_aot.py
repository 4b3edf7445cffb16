"""A requantization compiled for an H200 with no GPU: the weights are read where they lie, [K, N]."""

import math
import re

import aot
import jax
import pytest
from flax import nnx

import nvfp4jax
from nvfp4jax import layers, models
from nvfp4jax.backends import hopper
from nvfp4jax.backends.operands import rows_of
from nvfp4jax.ops import choice
from nvfp4jax.swap import quantized_layers

pytestmark = [pytest.mark.aot, pytest.mark.skipif(not aot.available(), reason="needs the extra `aot`")]
CONFIG = dict(
    architectures=["Qwen3MoeForCausalLM"], model_type="qwen3_moe", vocab_size=320, hidden_size=256, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=128, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=192, intermediate_size=512,
)  # fmt: skip
MADE = re.compile(r"= bf16\[([\d,]+)\]\S* ([\w-]+)\(")
IN_PLACE = {"parameter", "bitcast", "get-tuple-element"}


@pytest.mark.parametrize("turned", [False, True])
def test_no_weight_is_copied_in_front_of_its_kernel(turned, monkeypatch, caplog):
    """turned: the other way, where each weight is transposed first, to show that the search finds it."""
    if turned:
        monkeypatch.setattr(hopper, "quantize_transposed", lambda ws, four_over_six: hopper.quantize_weight(rows_of(ws), four_over_six))
    floats = models.stack_layers(models.build(CONFIG))
    qmodel = nvfp4jax.quantize_model(floats, nvfp4jax.Rule("layers/.*/(.*_proj|experts)"))
    weights = [(*path, *name) for path, layer in quantized_layers(qmodel).items() for name in layer.float_names()]
    state = dict(nnx.to_flat_state(nnx.state(floats)))
    sizes = {math.prod(state[path].shape) for path in weights}
    sizes |= {2 * math.prod(state[path].shape) for path in weights if path[-1] == "gate_proj"}  # with up
    assert len(weights) == 7 and not sizes & {math.prod(v.shape) for path, v in state.items() if path not in weights}
    monkeypatch.setattr(choice, "_default_order", lambda: ("hopper", "xla"))
    choice._log_fallback.cache_clear()
    hopper._log_transposed.cache_clear()
    layers.state._quantize_transposed.clear_cache()
    device, sharding = aot._device("h200")
    shaped = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), nnx.state(floats))
    with aot._default_device(device):
        text = jax.jit(lambda state: nvfp4jax.quantize_params(state, qmodel)).lower(shaped).compile().as_text()
    layers.state._quantize_transposed.clear_cache()
    made = [(shape, op) for shape, op in MADE.findall(text) if op not in IN_PLACE and math.prod(map(int, shape.split(","))) in sizes]
    assert bool(made) == turned, made
    assert text.count("custom-call(") == len(weights) - 1  # gate and up are one launch
    said = [record.getMessage() for record in caplog.records]
    assert not any("does not apply" in message or "transposed copy" in message for message in said), said
