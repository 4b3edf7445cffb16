"""What a rollout will hold, against the bytes that the compiler counts; a batch that cannot fit is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nvfp4jax import models, rollout
from nvfp4jax.models import cache
from nvfp4jax.rollout import memory, queue
from nvfp4jax.rollout.decoding import Settings, prefill
from nvfp4jax.rollout.sampling import row_keys

CONFIG = dict(
    architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-6, rope_theta=1e4, hidden_act="silu", attention_bias=False,
    max_position_embeddings=2048,
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return models.build(CONFIG, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("share", [False, True])
def test_the_cache_is_what_prefill_leaves(model, share):
    prompts, steps, samples, new = 3, 256, 4, 40
    settings = Settings(new_tokens=new, cache_length=steps + new, num_samples=samples, share_prompts=share)
    graphdef, params = nnx.split(model)
    controls = rollout.Controls(jnp.float32(1), jnp.float32(1), jnp.zeros((0,), jnp.int32))
    args = graphdef, params, jnp.zeros((prompts, steps), jnp.int32), jnp.full((prompts,), steps), row_keys(jax.random.key(0), prompts, samples)
    held = jax.eval_shape(lambda *a: jax.tree.leaves(prefill(*a, controls, settings).cache), *args)
    left = sum(x.size * x.dtype.itemsize for x in held if x.dtype == jnp.bfloat16)
    of_prompts = prompts * steps * 3 * 2 * 2 * 16 * 2  # layers, keys and values, heads, features, bytes
    found = memory.predict(model, prompts, steps, settings, 64)
    assert found.cache == left + (0 if share else of_prompts) and found.logits == 4 * 12 * 64 * 4


def test_an_fp8_cache(model):
    """Codes and a scale each; what is shared is held decoded beside what prefill made."""
    prompts, steps, samples, new = 3, 256, 4, 40
    slot, scales = 3 * 2 * 2 * 16, 3 * 2 * 2 * 4  # layers, keys and values, heads, features
    settings = Settings(new_tokens=new, cache_length=steps + new, num_samples=samples, cache_dtype=jnp.float8_e4m3fn)
    assert memory.predict(model, prompts, steps, settings, 64).cache == (slot + scales) * (prompts * steps + prompts * samples * (steps + new))
    found = memory.predict(model, prompts, steps, dataclasses.replace(settings, share_prompts=True), 64).cache
    assert found == (slot + scales) * (prompts * steps + prompts * samples * (128 + new)) + 2 * slot * prompts * steps


def slot_bytes(model) -> int:
    return sum(x.value.size * x.value.dtype.itemsize for x in cache.arrays(jax.eval_shape(lambda: model.init_cache(1, 1))))


@pytest.mark.parametrize("samples, prefix", [(1, 0), (1, 128), (2, 0), (2, 128)])
def test_the_cache_of_a_pool_and_of_a_refill(model, samples, prefix):
    """That of the places is what `_empty` makes; a refill's is what its program holds for a moment, and the prefix twice, in the pool and
    beside it."""
    size, few, steps, new = 8, 2, 256, 40
    settings = Settings(new_tokens=new, cache_length=steps + new, num_samples=samples, share_prompts=samples > 1, prefix=prefix)
    graphdef, params = nnx.split(model)
    controls = rollout.Controls(jnp.float32(1), jnp.float32(1), jnp.zeros((0,), jnp.int32))
    first = queue._run_prefix(graphdef, params, jnp.zeros((1, prefix), jnp.int32), settings, nnx.State({}))[0] if prefix else None
    pool = queue._empty(graphdef, params, first, nnx.State({}), jax.random.key(0), controls, size, steps, settings)
    held = sum(x.nbytes for x in jax.tree.leaves(pool.cache) if x.dtype == jnp.bfloat16)
    refill = few * (steps - prefix + (samples * 128 if samples > 1 else 0))
    found = memory.predict(model, size, steps, settings, 64, queue.refill_settings(settings, steps), few)
    assert found.cache == held + slot_bytes(model) * (refill + 3 * prefix)  # with the refill's view of the prefix
    assert found.logits == 4 * size * samples * 64 * 4


@pytest.fixture
def full(monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class Full:
        platform: str = "cuda"

        def memory_stats(self):
            return dict(bytes_limit=10_000_000, bytes_in_use=9_000_000)

    monkeypatch.setattr(type(jnp.zeros(1)), "devices", lambda self: {Full()})


def test_prompts_that_begin_alike_are_counted_once(model, full):
    """40 rows of 32 slots of their own, and 1024 that all share, fit; they were refused by 40 times 1040."""
    settings = Settings(new_tokens=16, cache_length=1040 + 16, prefix=1024)
    found = memory.predict(model, 40, 1040, settings, None)
    assert found.cache == slot_bytes(model) * (1024 + 40 * 32)
    memory.check(model, nnx.state(model), 40, 1040, settings, None)


def test_room_for_a_smaller_pool(model, full):
    assert memory.has_room(nnx.state(model), 1_000_000) and not memory.has_room(nnx.state(model), 1_000_001)


def test_too_many_rows_in_flight_are_refused(model, full):
    with pytest.raises(ValueError, match=r"rows_in_flight: 32 prompts .* at a time .* need .* GB.*About rows_in_flight=(\d+) fit"):
        rollout.generate(model, np.arange(64)[:, None].repeat(16, 1), max_new_tokens=1000, rows_in_flight=32)


def test_too_large_a_batch_is_refused(model, full):
    with pytest.raises(ValueError, match=r"input_ids: 64 prompts .* need .* GB.*About (\d+) prompts at a time fit"):
        rollout.generate(model, np.arange(64)[:, None].repeat(16, 1), max_new_tokens=16)


def test_more_tokens_than_any_machine_holds(model):
    """On a CPU, whose memory is this machine's: XLA's own error would name no argument."""
    with pytest.raises(ValueError, match="input_ids: 2 prompts .* GB are free. Not even one prompt fits; more with .* a smaller max_new_tokens"):
        rollout.generate(model, np.arange(2)[:, None].repeat(16, 1), max_new_tokens=10**9)
