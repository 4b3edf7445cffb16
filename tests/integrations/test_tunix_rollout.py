"""The rollout engine in tunix 0.1.7: its conventions, its updates, and GRPO that learns."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("tunix", reason="needs google-tunix==0.1.7")
    import grain
    import optax
    import qwix
    from tunix.generate import tokenizer_adapter
    from tunix.rl import common, rl_cluster
    from tunix.rl.grpo import grpo_learner
    from tunix.rl.rollout import base_rollout

    from integrations import tunix_models

import nvfp4jax
from nvfp4jax import models
from nvfp4jax.integrations import tunix
from nvfp4jax.integrations.tunix_rollout import NVFP4Rollout, TunixModel

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]
PAD, EOS, BOS = 0, 1, 2
LETTERS = [chr(ord("!") + i) for i in range(tunix_models.VOCABULARY - 3)]


@pytest.fixture(autouse=True)
def as_tunix_promotes():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


class Letters:
    """A token a character."""

    def encode(self, text):
        return [LETTERS.index(c) + 3 for c in text]

    def decode(self, ids):
        return "".join(LETTERS[i - 3] for i in ids if i >= 3)

    pad_id = lambda self: PAD  # noqa: E731
    eos_id = lambda self: EOS  # noqa: E731
    bos_id = lambda self: BOS  # noqa: E731


TOKENIZER = tokenizer_adapter.TokenizerAdapter(Letters())
PROMPTS = ["ABC", "ABC", "X", "X", "HELLO", "HELLO"]


def config(**options) -> base_rollout.RolloutConfig:
    return base_rollout.RolloutConfig(
        **dict(max_tokens_to_generate=6, max_prompt_length=8, temperature=0.8, return_logprobs=True) | options
    )


def engine(actor, mesh=None, **options) -> NVFP4Rollout:
    return NVFP4Rollout(rollout_actor=actor, tokenizer=TOKENIZER, mesh=mesh, rollout_config=config(), **options)


def weights(model: nnx.Module) -> dict[tuple, np.ndarray]:
    return {path: np.asarray(leaf.get_value()) for path, leaf in nnx.to_flat_state(nnx.state(model))}


def assert_weights(got: nnx.Module, expected: nnx.Module):
    got, expected = weights(got), weights(expected)
    assert got.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_array_equal(got[path], value, err_msg=str(path))


def test_answers_are_generates_own():
    """Ids, padding, repeats, stop tokens, logprobs and texts; and the logprobs again, from the finished texts."""
    actor = tunix_models.make("qwen3")
    roll = engine(actor, rules=tunix_models.RULE)
    key = jax.random.key(7)
    plain = nvfp4jax.generate(
        tunix.Decoder(nvfp4jax.quantize_model(actor, tunix_models.RULE)),
        *nvfp4jax.rollout.prompts.pad_left([[BOS, *Letters().encode(p)] for p in PROMPTS]),
        max_new_tokens=6, temperature=0.8, top_p=0.9, key=key,
    )  # fmt: skip
    stop = int(plain.tokens[3, 2])
    out = roll.generate(PROMPTS, config(seed=key, top_p=0.9, eos_tokens=[stop]))
    assert out.left_padded_prompt_tokens.shape == (6, 8) and out.logits == []
    for row, prompt in enumerate(PROMPTS):
        ids = [BOS, *Letters().encode(prompt)]
        assert out.left_padded_prompt_tokens[row].tolist() == [PAD] * (8 - len(ids)) + ids
        whole = np.asarray(plain.tokens[row]).tolist()
        expected = whole[: whole.index(stop) + 1] if stop in whole else whole
        assert out.tokens[row].tolist() == expected and out.text[row] == Letters().decode(expected)
        np.testing.assert_allclose(out.logprobs[row], plain.logprobs[row, : len(expected)], atol=1e-5)
    completions = np.full((6, 6), PAD)
    for row, tokens in enumerate(out.tokens):
        completions[row, : len(tokens)] = tokens
    logps = np.asarray(roll.get_per_token_logps(jnp.asarray(out.left_padded_prompt_tokens), jnp.asarray(completions)))
    assert sum(PAD not in tokens for tokens in out.tokens) >= 3
    for row, tokens in enumerate(out.tokens):
        end = tokens.tolist().index(PAD) if PAD in tokens else len(tokens)  # tunix takes a drawn pad for padding
        np.testing.assert_allclose(logps[row, :end], out.logprobs[row][:end], atol=1e-3)
        assert (logps[row, len(tokens) :] == 0).all()
    # Longer than max_prompt_length: the next power of two, as tunix's sampler does; greedy whatever top_p says; no logprobs.
    wide = roll.generate(["ABCDEFGHIJ"], config(temperature=0.0, top_p=0.5, return_logprobs=False))
    assert wide.left_padded_prompt_tokens.shape == (1, 16) and wide.logprobs is None
    again = [roll.generate(["ABC"], config(temperature=2.0)).tokens[0].tolist() for _ in range(3)]
    assert len({tuple(row) for row in again}) > 1  # without a seed each call draws anew


def test_updates_leave_the_actor_alone():
    actor, trained = tunix_models.make("qwen3"), tunix_models.make("qwen3", seed=1)
    before = weights(actor)
    roll = engine(actor, rules=tunix_models.RULE)
    assert_weights(roll.qmodel, nvfp4jax.quantize_model(actor, tunix_models.RULE))
    roll.generate(PROMPTS, config())
    compiled = nvfp4jax.rollout.decoding.rollout._cache_size()
    with jax.transfer_guard_device_to_host("disallow_explicit"), jax.transfer_guard_host_to_device("disallow_explicit"):
        roll.update_params(nnx.state(trained, (nnx.Param,)), (nnx.Param,))  # as RLCluster.sync_weights does on a CPU
    assert_weights(roll.qmodel, nvfp4jax.quantize_model(trained, tunix_models.RULE))
    roll.generate(PROMPTS, config())
    assert nvfp4jax.rollout.decoding.rollout._cache_size() == compiled
    for path, value in weights(actor).items():
        np.testing.assert_array_equal(value, before[path])
    # No array is the trainer's: its next step may donate them.
    jax.tree.map(lambda x: x.delete(), nnx.state(trained))
    roll.generate(PROMPTS, config())
    # The engine's own state comes back verbatim, as after an offload; another's does not pass.
    own = jax.tree.map(lambda x: x + jnp.zeros_like(x), nnx.state(roll.qmodel))
    roll.update_params(own)
    assert_weights(roll.qmodel, nvfp4jax.quantize_model(tunix_models.make("qwen3", seed=1), tunix_models.RULE))
    other = nvfp4jax.quantize_model(actor, nvfp4jax.Rule("layers/0/.*"))
    with pytest.raises(ValueError, match="is not the one of this engine's model"):
        roll.update_params(nnx.state(other))


def adapted(base: nnx.Module) -> nnx.Module:
    """base with qwix' adapters on einsums and linears; alpha / rank is 1.5."""
    provider = qwix.LoraProvider(module_path=".*(q_proj|kv_proj|o_proj|gate_proj|down_proj|up_proj)", rank=4, alpha=6.0)
    return qwix.apply_lora_to_model(base, provider, **base.get_model_input(), rngs=nnx.Rngs(3))


def merged(actor: nnx.Module, roll: NVFP4Rollout) -> nnx.Module:
    """The model without adapters whose weights hold them, as the engine merges them."""
    flat = nnx.to_flat_state(nnx.state(actor, nnx.Param))
    parts = [nnx.from_flat_state([(p, v) for p, v in flat if ("_lora_" in p[-1]) == lora]) for lora in (False, True)]
    plain = tunix_models.make("qwen3")
    nnx.update(plain, roll._merge(*parts, jnp.float32(1.5)))
    return plain


def test_adapters_are_merged():
    """qwix' adapters on einsums and linears: the merged weights compute what the adapted model does, and are what is quantized."""
    base = tunix_models.make("qwen3")
    actor = adapted(base)
    rng = np.random.default_rng()
    adapters = nnx.state(actor, nnx.LoRAParam)
    drawn = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.1, x.shape), x.dtype), adapters)
    assert len(jax.tree.leaves(drawn)) >= 2 * 2 * 5
    with pytest.raises(ValueError, match="lora_scale"):
        engine(actor, rules=tunix_models.RULE)
    roll = engine(actor, rules=tunix_models.RULE, lora_scale=1.5)
    assert_weights(roll.qmodel, nvfp4jax.quantize_model(base, tunix_models.RULE))  # b starts at zero
    nnx.update(actor, drawn)
    rows = np.random.default_rng().integers(3, tunix_models.VOCABULARY, (2, 9))
    expected = tunix_models.forward(actor, rows)
    assert np.abs(expected - tunix_models.forward(base, rows)).max() > 1e-2
    roll.update_params(nnx.state(actor, (nnx.LoRAParam,)), (nnx.LoRAParam,))
    plain = merged(actor, roll)
    np.testing.assert_allclose(tunix_models.forward(plain, rows), expected, atol=1e-4)
    assert_weights(roll.qmodel, nvfp4jax.quantize_model(plain, tunix_models.RULE))


def test_a_mesh_of_its_own():
    """An actor spread over four devices, a rollout over four others: the same weights, on the rollout's."""
    devices = np.asarray(jax.devices()).reshape(2, 2, 2)
    trainers, rollouts = (jax.sharding.Mesh(d, ("fsdp", "tp")) for d in devices)
    actor = tunix_models.make("qwen3")
    state = nnx.state(actor)
    specs = nnx.get_partition_spec(state)
    place = lambda x, spec: jax.device_put(x, jax.sharding.NamedSharding(trainers, spec or jax.sharding.PartitionSpec()))  # noqa: E731
    nnx.update(actor, jax.tree.map(place, state, specs))
    roll = engine(actor, rollouts, rules=tunix_models.RULE)
    used = {device for leaf in jax.tree.leaves(nnx.state(roll.qmodel)) for device in leaf.devices()}
    assert used == set(devices[1].ravel())
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(nnx.state(roll.qmodel)))
    assert_weights(roll.qmodel, nvfp4jax.quantize_model(tunix_models.make("qwen3"), tunix_models.RULE))
    trained = tunix_models.make("qwen3", seed=1)
    nnx.update(actor, jax.tree.map(place, nnx.state(trained), specs))
    shardings = jax.tree.map(lambda x: x.sharding, nnx.state(roll.qmodel))
    roll.update_params(nnx.state(actor, (nnx.Param,)), (nnx.Param,))
    assert_weights(roll.qmodel, nvfp4jax.quantize_model(trained, tunix_models.RULE))
    assert shardings == jax.tree.map(lambda x: x.sharding, nnx.state(roll.qmodel))


def ours() -> TunixModel:
    settings = dict(
        architectures=["Qwen3ForCausalLM"], model_type="qwen3", vocab_size=tunix_models.VOCABULARY, hidden_size=64, intermediate_size=96,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-6, rope_theta=1e4,
        tie_word_embeddings=False,
    )  # fmt: skip
    return TunixModel(models.build(settings, jnp.float32, rngs=nnx.Rngs(0)))


def test_our_model_answers_as_tunix_calls_it():
    """Left-padded prompts and right-padded answers through tunix's own logprobs, against rows without padding."""
    model = ours()
    prompts, answers = np.full((2, 6), PAD), np.full((2, 5), PAD)
    rng = np.random.default_rng()
    for row, (p, a) in enumerate(((6, 3), (2, 5))):
        prompts[row, 6 - p :], answers[row, :a] = rng.integers(3, 90, p), rng.integers(3, 90, a)
    graphdef, state = nnx.split(model)
    got = common.compute_per_token_logps(graphdef, state, jnp.asarray(prompts), jnp.asarray(answers), pad_id=PAD, eos_id=EOS)
    for row, (p, a) in enumerate(((6, 3), (2, 5))):
        text = np.concatenate([prompts[row, 6 - p :], answers[row, :a]])[None]
        expected = nvfp4jax.logprobs(model.model, text)[0, p:]
        np.testing.assert_allclose(got[row, :a], expected, atol=1e-4)
    with pytest.raises(NotImplementedError, match="NVFP4Rollout"):
        model(jnp.asarray(prompts), jnp.asarray(prompts), cache={})


STEPS = 12


def kinds_of_memory(model: nnx.Module) -> set[str]:
    return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(nnx.state(model))}


QWEN3 = functools.partial(tunix_models.make, "qwen3")
QWEN3_ADAPTED = lambda: adapted(QWEN3())  # noqa: E731


@pytest.mark.parametrize("actor, offload", [(QWEN3, False), (ours, False), (QWEN3, True), (QWEN3_ADAPTED, True)],
                         ids=["tunix-qwen3", "ours", "offloaded", "adapters-offloaded"])
def test_grpo_learns(actor, offload):
    """GRPO on answers full of small letters, sampled in NVFP4: the reward rises, and the rollout follows the trainer.

    Offloaded: both models wait for their turn in the host's memory, and nothing compiles again for it. Adapters: they alone are trained
    and handed over.
    """
    rate, adapters = (2e-2, True) if actor is QWEN3_ADAPTED else (4e-3, False)
    rewards, programs = [], []

    def reward(prompts, completions, **rest):
        assert kinds_of_memory(cluster.rollout.qmodel) == {"pinned_host" if offload else "device"}
        programs.append(nvfp4jax.rollout.decoding.rollout._cache_size())
        shares = [sum(c.islower() for c in text) / 8 for text in completions]
        rewards.append(np.mean(shares))
        return shares

    rule = nvfp4jax.Rule(r"(model/)?(layers/.*|lm_head)")
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    actor = actor()
    cluster = rl_cluster.RLCluster(
        actor=actor, reference=None, tokenizer=Letters(),
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh={role: mesh for role in (rl_cluster.Role.ACTOR, rl_cluster.Role.REFERENCE, rl_cluster.Role.ROLLOUT)},
            rollout_engine=functools.partial(NVFP4Rollout, rules=rule, lora_scale=1.5), offload_to_cpu=offload,
            training_config=rl_cluster.RLTrainingConfig(actor_optimizer=optax.adam(rate), eval_every_n_steps=1000, max_steps=STEPS),
            rollout_config=config(max_tokens_to_generate=8, temperature=1.0, kv_cache_size=32),
        ),
    )  # fmt: skip
    learner = grpo_learner.GRPOLearner(
        rl_cluster=cluster, reward_fns=reward, algo_config=grpo_learner.GRPOConfig(num_generations=8, num_iterations=1, beta=0.0)
    )
    data = grain.MapDataset.source([{"prompts": p} for p in ("ABC", "X", "HELLO", "OK") * STEPS]).batch(4)
    learner.train(data)
    print("mean reward of each step", np.round(rewards, 3).tolist())
    assert len(rewards) == STEPS == cluster.global_steps and len(set(programs)) == 1
    # Behind the last step, in which the engine was handed the weights anew.
    assert kinds_of_memory(cluster.rollout.qmodel) == {"pinned_host" if offload else "device"}
    assert kinds_of_memory(cluster.actor_trainer.model) == {"pinned_host" if offload else "device"}
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.25
    trained = jax.tree.map(lambda x: jax.device_put(x, x.sharding.with_memory_kind("device")), cluster.actor_trainer.model)
    if adapters:
        trained = merged(trained, cluster.rollout)
    assert_weights(cluster.rollout.qmodel, nvfp4jax.quantize_model(trained, rule))
