"""How fast is a rollout at real size: a decode step and a prefill, random weights made on the device?

    python benchmarks/bench_rollout.py [--geometry qwen3-30b-a3b] [--scalings token none bf16] [--batches 1 16 64 256] [--contexts 1024]
                                       [--prefill 8x1024] [--cache-dtype float8_e4m3fn] [--unrolled] [--profile] [--json FILE] [--plot FILE]       (on a Hopper GPU)

A step is the wall time of N steps of `rollout.decode` less that of N / 4, divided, the median of three; the cache holds random keys and
values of `context` slots. "floor" is the time that memory (4.3 TB/s) or the tensor cores (790 TFLOP/s, bf16) need at least, kind of work
by kind of work: weights read once, those of the experts that a batch reaches on average, the cache's slots in use, the head.

    python benchmarks/bench_rollout.py --batches --prompts 64 --samples 16 [--length 1024] [--new 512]

runs whole rollouts of several samples a prompt, the prompts held once and held by each sample (as many prompts at a time as fit), and

    python benchmarks/bench_rollout.py --batches --prefix-prompts 1209 [--prefix 850] [--own 100] [--mean 121] [--new 512]
                                       [--rows-in-flight 256 512 1024]

one `generate` of prompts that begin alike, with the prefix held once and without, at temperature 1. Answers are as uneven as GSM8K's reference
answers (openai/grade-school-math, test.jsonl: 123 words, digits and marks on average, the logarithm's deviation .43): lognormal, `mean` on
average. Prefill is counted in both; "ms" is the time for a step of all rows. With --rows-in-flight the same
prompts, each with a key of its own, in batches of so many and through a queue with so many in flight, the prefix held once.
XLA_PYTHON_CLIENT_MEM_FRACTION=.95 gives them the memory. --reload 64x1024: what it costs a rollout of so many rows that bfloat16 weights are
quantized and taken while it runs.
"memory" is arguments and temporaries of the compiled step; of `generate` and --reload, the process' peak so far. --profile splits a step by kernel, by jax's profiler.
"""

import argparse
import collections
import dataclasses
import functools
import glob
import json
import math
import tempfile
import time
import types
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

import nvfp4jax
from nvfp4jax import Rule
from nvfp4jax.layers import NVFP4Param
from nvfp4jax.models import build, cache, stack_layers
from nvfp4jax.models.stacking import depths
from nvfp4jax.rollout import Controls, DecodeState, Sampling, Settings, decode, prefill, row_keys
from nvfp4jax.rollout.generate import _split
from nvfp4jax.scaling import Static

MEMORY, PEAK = 4.3e12, 790e12  # bytes/s, bf16 FLOP/s: measured ceilings of an H200
NEW = 48  # tokens that a timed run may make
SPREAD = 0.43  # of the logarithm of an answer's length
cache_dtype: str | None = None  # --cache-dtype
_QWEN3 = dict(vocab_size=151936, head_dim=128, rms_norm_eps=1e-6, rope_theta=1e6, tie_word_embeddings=False)
_QWEN3_MOE = _QWEN3 | dict(
    architectures=["Qwen3MoeForCausalLM"], model_type="qwen3_moe", num_experts=128, num_experts_per_tok=8, norm_topk_prob=True,
    decoder_sparse_step=1, mlp_only_layers=[], num_key_value_heads=4,
)  # fmt: skip
_QWEN3_DENSE = _QWEN3 | dict(architectures=["Qwen3ForCausalLM"], model_type="qwen3", num_key_value_heads=8)
# config.json of the models; qwen3-235b-a22b and deepseek-v3 have as many layers as fit one GPU.
GEOMETRIES = {
    "qwen3-30b-a3b": _QWEN3_MOE | dict(hidden_size=2048, intermediate_size=6144, num_hidden_layers=48, num_attention_heads=32, moe_intermediate_size=768),
    "qwen3-235b-a22b": _QWEN3_MOE | dict(hidden_size=4096, intermediate_size=12288, num_hidden_layers=48, num_attention_heads=64,
                                         moe_intermediate_size=1536),
    "qwen3-8b": _QWEN3_DENSE | dict(hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32),
    "qwen3-32b": _QWEN3_DENSE | dict(hidden_size=5120, intermediate_size=25600, num_hidden_layers=64, num_attention_heads=64),
    "deepseek-v3": dict(
        architectures=["DeepseekV3ForCausalLM"], model_type="deepseek_v3", vocab_size=129280, hidden_size=7168, intermediate_size=18432,
        moe_intermediate_size=2048, num_hidden_layers=10, num_attention_heads=128, num_key_value_heads=128, n_shared_experts=1,
        n_routed_experts=256, routed_scaling_factor=2.5, kv_lora_rank=512, q_lora_rank=1536, qk_rope_head_dim=64, v_head_dim=128,
        qk_nope_head_dim=128, n_group=8, topk_group=4, num_experts_per_tok=8, first_k_dense_replace=3, norm_topk_prob=True,
        scoring_func="sigmoid", topk_method="noaux_tc", hidden_act="silu", max_position_embeddings=4096, rms_norm_eps=1e-6,
        rope_theta=10000, attention_bias=False, tie_word_embeddings=False,
    ),
    "tiny": _QWEN3_MOE | dict(vocab_size=512, head_dim=64, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
                              num_key_value_heads=2, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=64),
}  # fmt: skip
# What a kernel's name in a profile starts with or has in it -> what it is counted to.
KINDS = (("attention", ("table_counters", "attention", "flash", "_prefill", "_lambda_")), ("bf16 matmul", ("float_dense",)), ("quantize", ("operand", "packed_scale", "partials", "weight_values")),
         ("route and combine", ("expert_ids", "row_of_slot", "logits_weights")), ("rope and cache write", ("q_k_v_cos", "scatter", "write")),
         ("FP4 matmul", ("body_mosaic", "kernel_mosaic", "dense", "grouped")), ("bf16 matmul", ("gemm", "dot", "cutlass", "nvjet", "xmma")),
         ("copy", ("memcpy", "Memcpy", "copy", "dynamic_slice")))  # fmt: skip


def config_of(geometry: str, layers: int | None) -> dict:
    config = dict(GEOMETRIES[geometry])
    return config if layers is None else config | dict(num_hidden_layers=layers)


def random_model(config: dict, scaling: str, stacked: bool, seed: int = 0) -> nnx.Module:
    """scaling: a mode's name, "none" (weights only) or "bf16"."""
    model = build(config)
    if scaling != "bf16":
        mode = {"none": None, "static": Static(jnp.float32(2e-3))}.get(scaling, scaling)
        rules = [Rule("lm_head|.*/mlp/gate", skip=True), Rule(".*", scaling=mode)]
        model = nvfp4jax.quantize_model(model, rules)
    if stacked:
        model = stack_layers(model)
    graphdef, state = nnx.split(model)

    @functools.partial(jax.jit, static_argnums=(1, 2, 3))
    def make(key, shape, dtype, kind):
        if dtype == "uint8":
            return jax.random.bits(key, shape, jnp.uint8)
        if dtype == "float8_e4m3fn":
            return lax.bitcast_convert_type(jax.random.randint(key, shape, 48, 96).astype(jnp.uint8), jnp.float8_e4m3fn)
        if kind == "scale":
            return jnp.full(shape, 2e-4, dtype)
        if kind == "norm":
            return jnp.ones(shape, dtype)
        return jax.random.normal(key, shape, dtype) * jnp.asarray(0.02, dtype)

    def leaf(i, path, x):
        text = jax.tree_util.keystr(path)
        kind = "scale" if "global_scale" in text or "input_scale" in text else "norm" if "norm" in text else "weight"
        return make(jax.random.key(seed + i), tuple(x.shape), str(x.dtype), kind)

    leaves, tree = jax.tree_util.tree_flatten_with_path(state)
    state = jax.tree.unflatten(tree, [leaf(i, path, x) for i, (path, x) in enumerate(leaves)])
    return nnx.merge(graphdef, state)


def floor(config: dict, model: nnx.Module, batch: int, context: int, steps: int = 1) -> float:
    """Seconds for `steps` tokens a row, `context` slots in use a row at the end."""
    tokens, total = batch * steps, 0.0
    state = jax.tree_util.tree_flatten_with_path(nnx.state(model))[0]
    experts = config.get("num_experts", config.get("n_routed_experts", 0))
    k = config.get("num_experts_per_tok", 0)
    reached = 1 - (1 - k / experts) ** tokens if experts else 1
    for path, x in state:
        name, size = jax.tree_util.keystr(path), math.prod(x.shape) * x.dtype.itemsize
        elements = math.prod(x.shape) * (2 if x.dtype == jnp.uint8 else 1)
        if "embed_tokens" in name or "norm" in name or "scale" in name:
            total += 0 if "embed_tokens" in name else size * (reached if "experts" in name else 1) / MEMORY
        elif "experts" in name:
            total += max(size * reached / MEMORY, 2 * tokens * elements * k / experts / PEAK)
        else:
            rows = batch if "lm_head" in name else tokens
            total += max(size / MEMORY, 2 * rows * elements / PEAK)
    for array in cache.arrays(jax.eval_shape(lambda: model.init_cache(batch, context, cache_dtype))):
        size = math.prod(array.value.shape) * array.value.dtype.itemsize
        heads = config["num_attention_heads"] / config.get("num_key_value_heads", 1)
        products = 2 * math.prod(array.value.shape) * heads * steps * (0.5 if steps > 1 else 1)
        total += max(size / MEMORY, products / PEAK)
    return total


def kernels_of(run, calls: int) -> dict[str, tuple[float, float]]:
    """name -> (us, launches) a call, of what `run` launches on the GPU."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        file = glob.glob(folder + "/**/*.xplane.pb", recursive=True)[0]
        found = collections.defaultdict(lambda: [0.0, 0])
        for plane in jax.profiler.ProfileData.from_file(file).planes:
            for line in plane.lines if "GPU" in plane.name else ():
                for event in line.events if "Stream" in line.name else ():
                    found[event.name][0] += event.duration_ns / 1e3
                    found[event.name][1] += 1
    return {name: (us / calls, count / calls) for name, (us, count) in found.items()}


def by_kind(kernels: dict[str, tuple[float, float]]) -> dict[str, float]:
    """kind -> us."""
    kinds = collections.Counter()
    for name, (us, _) in kernels.items():
        kinds[next((kind for kind, parts in KINDS if any(part in name for part in parts)), "the rest")] += us
    return {kind: round(us, 1) for kind, us in kinds.most_common()}


def profiled(run, calls: int) -> dict:
    """The time, launches and kernels a call of what `run` does `calls` times."""
    kernels = kernels_of(run, calls)
    total, launches = (sum(cell[i] for cell in kernels.values()) for i in (0, 1))
    return dict(kernel_ms=total / 1e3, launches=launches, by_kind=by_kind(kernels), kernels=kernels)


def fill_cache(shapes):
    """Uniform numbers of variance 1, other ones in each slot: rows that remember alike would choose the same experts, fewer than rows do.
    By the hardware's own generator and from bytes, since gigabytes take long otherwise. Scales are 1."""
    leaves, tree = jax.tree.flatten(shapes)

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def fill(key, shape, dtype):
        if dtype == jnp.float32 and cache_dtype is not None:
            return jnp.ones(shape, dtype)

        def layer(key):  # one at a time: the bytes are half as large as what they become
            return ((jax.random.bits(key, shape[1:], jnp.uint8).astype(jnp.bfloat16) - 127.5) / 74).astype(dtype)

        return lax.map(layer, jax.random.split(key, shape[0]))

    return jax.tree.unflatten(tree, [fill(jax.random.key(i, impl="rbg"), tuple(x.shape), x.dtype) for i, x in enumerate(leaves)])


def step(config: dict, model: nnx.Module, batch: int, context: int, profile: bool, steps: int = NEW) -> dict:
    graphdef, params, seen = _split(model)
    settings = Settings(new_tokens=steps, cache_length=context + steps, sampling=Sampling(False, None, False), cache_dtype=cache_dtype)
    controls = Controls(jnp.float32(1), jnp.float32(1), jnp.zeros((0,), jnp.int32))
    ids = jnp.asarray(np.random.default_rng(0).integers(0, config["vocab_size"], batch), jnp.int32)

    def state() -> DecodeState:
        return DecodeState(
            cache=fill_cache(jax.eval_shape(lambda: model.init_cache(batch, context + steps, cache_dtype))), keys=row_keys(jax.random.key(1), batch, 1), token=ids + 0,
            position=jnp.full((batch,), context, jnp.int32), step=jnp.int32(1), done=jnp.zeros(batch, bool),
            tokens=jnp.zeros((batch, steps), jnp.int32), logprobs=jnp.zeros((batch, steps), jnp.float32),
            lengths=jnp.ones(batch, jnp.int32), experts=None, prompt_experts=None, used=None, top_tokens=None,
            top_logprobs=None, seen=seen,
        )  # fmt: skip

    run_step = jax.jit(decode, static_argnames="settings", donate_argnames="state")
    start = time.time()
    lowered = run_step.lower(graphdef, params, jax.eval_shape(state), jnp.int32(steps), controls, settings=settings)
    lowering = time.time() - start
    compiled = lowered.compile()
    compile_s = time.time() - start
    memory = compiled.memory_analysis()

    def run(n: int) -> float:
        before = jax.block_until_ready(state())
        start = time.time()
        jax.block_until_ready(compiled(graphdef, params, before, jnp.int32(n), controls).tokens)
        return time.time() - start

    run(steps)
    seconds = float(np.median([(run(steps) - run(steps // 4)) / (steps - steps // 4) for _ in range(3)]))
    used = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    found = dict(
        kind="decode", batch=batch, context=context, ms=seconds * 1e3, tokens_per_s=batch / seconds,
        floor_ms=floor(config, model, batch, context) * 1e3, memory_gb=used / 1e9, compile_s=compile_s, lowering_s=lowering,
    )  # fmt: skip
    if profile:
        count = min(9, steps)
        before = jax.block_until_ready(state())
        found |= profiled(lambda: jax.block_until_ready(compiled(graphdef, params, before, jnp.int32(count), controls).tokens), count - 1)
    return found


def prompt(config: dict, model: nnx.Module, batch: int, length: int, profile: bool) -> dict:
    graphdef, params, seen = _split(model)
    settings = Settings(new_tokens=16, cache_length=length + 16, sampling=Sampling(False, None, False), cache_dtype=cache_dtype)
    controls = Controls(jnp.float32(1), jnp.float32(1), jnp.zeros((0,), jnp.int32))
    ids = jnp.asarray(np.random.default_rng(0).integers(0, config["vocab_size"], (batch, length)), jnp.int32)
    args = graphdef, params, ids, jnp.full((batch,), length, jnp.int32), row_keys(jax.random.key(1), batch, 1), controls
    run_prefill = jax.jit(prefill, static_argnames="settings")
    start = time.time()
    compiled = run_prefill.lower(*args, settings=settings, seen=seen).compile()
    compile_s, memory = time.time() - start, compiled.memory_analysis()

    def run() -> float:
        start = time.time()
        jax.block_until_ready(compiled(*args, seen=seen).tokens)
        return time.time() - start

    run()
    seconds = float(np.median([run() for _ in range(3)]))
    used = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    found = dict(
        kind="prefill", batch=batch, context=length, ms=seconds * 1e3, tokens_per_s=batch * length / seconds,
        floor_ms=floor(config, model, batch, length, length) * 1e3, memory_gb=used / 1e9, compile_s=compile_s,
    )  # fmt: skip
    if profile:
        found |= profiled(run, 1)
    return found


def floor_of_samples(config: dict, model: nnx.Module, prompts: int, samples: int, length: int, new: int, share: bool) -> float:
    """Seconds of a step on average: each row's own slots, and the prompts' once or for each row."""
    if not share:
        return floor(config, model, prompts * samples, length + new // 2)
    return floor(config, model, prompts * samples, new // 2) + floor(config, model, prompts, length) - floor(config, model, prompts, 0)


def samples(config: dict, model: nnx.Module, prompts: int, number: int, length: int, new: int, share: bool, profile: bool) -> dict:
    """`prompts` prompts of `length` tokens with `number` samples of `new` tokens each, as many prompts at a time as fit."""
    graphdef, params, seen = _split(model)
    weights = sum(x.nbytes for x in jax.tree.leaves(params))
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", 2**60)
    slot = sum(x.value.size * x.value.dtype.itemsize for x in cache.arrays(jax.eval_shape(lambda: model.init_cache(1, 1, cache_dtype))))
    a_prompt = slot * (length + number * (new + 128) if share else number * (length + new))
    turn = max(1, min(prompts, int((0.95 * limit - weights - 4e9) / a_prompt)))
    turn = max(n for n in range(1, turn + 1) if prompts % n == 0)
    settings = Settings(new_tokens=new, cache_length=length + new, num_samples=number, sampling=Sampling(False, None, False), share_prompts=share, cache_dtype=cache_dtype)
    controls = Controls(jnp.float32(1), jnp.float32(1), jnp.zeros((0,), jnp.int32))
    ids = jnp.asarray(np.random.default_rng(0).integers(0, config["vocab_size"], (prompts, length)), jnp.int32)
    lengths, keys = jnp.full((turn,), length, jnp.int32), row_keys(jax.random.key(1), turn, number)
    start = time.time()
    args = graphdef, params, ids[:turn], lengths, keys, controls
    run_prefill = jax.jit(prefill, static_argnames="settings").lower(*args, settings=settings, seen=seen).compile()
    shapes = jax.eval_shape(functools.partial(prefill, settings=settings, seen=seen), *args)
    run_decode = jax.jit(decode, static_argnames="settings", donate_argnames="state")
    run_decode = run_decode.lower(graphdef, params, shapes, jnp.int32(new), controls, settings=settings).compile()
    compile_s, memory = time.time() - start, run_decode.memory_analysis()

    def run(first: int, tokens: int) -> tuple[float, float]:
        start = time.time()
        state = jax.block_until_ready(run_prefill(graphdef, params, ids[first : first + turn], lengths, keys, controls, seen=seen))
        between = time.time()
        jax.block_until_ready(run_decode(graphdef, params, state, jnp.int32(tokens), controls).tokens)
        return between - start, time.time() - between

    run(0, 3)
    times = np.sum([run(first, new) for first in range(0, prompts, turn)], 0)
    used = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    found = dict(
        kind=f"{number} samples, {'shared' if share else 'repeated'}", batch=prompts * number, at_a_time=turn * number, context=length,
        ms=times[1] * 1e3 / (new - 1) / (prompts // turn), tokens_per_s=prompts * number * new / times.sum(), prefill_s=times[0],
        floor_ms=floor_of_samples(config, model, turn, number, length, new, share) * 1e3, memory_gb=used / 1e9, compile_s=compile_s,
    )  # fmt: skip
    if profile:  # of late steps: the rows' own slots are nearly full
        first, state = max(1, new - 9), run_prefill(graphdef, params, ids[:turn], lengths, keys, controls, seen=seen)
        state = jax.block_until_ready(run_decode(graphdef, params, state, jnp.int32(first), controls))
        found |= profiled(lambda: jax.block_until_ready(run_decode(graphdef, params, state, jnp.int32(new), controls).tokens), new - first)
    return found


def beginning_alike(
    config: dict, model: nnx.Module, prompts: int, prefix: int, own: int, mean: int, new: int, share: bool, rows: int | None = None, queue: bool = False
) -> dict:
    """Prompts that have `prefix` tokens in common and about `own` more; answers of `mean` tokens on average, `new` at most. rows: None, all at
    once; or in batches of so many, or through a queue with so many in flight."""
    rng = np.random.default_rng(0)
    counts = prefix + rng.integers(own * 3 // 5, own * 7 // 5 + 1, prompts)
    ids = rng.integers(0, config["vocab_size"], (prompts, counts.max()))
    ids[:, :prefix] = ids[0, :prefix]
    mask = np.arange(ids.shape[1]) < counts[:, None]
    answers = np.clip(rng.lognormal(np.log(mean) - SPREAD**2 / 2, SPREAD, prompts), 1, new).astype(np.int32)
    taken, type(model).takes_shared_cache = type(model).takes_shared_cache, share
    times, options = [], dict(temperature=1.0, cache_dtype=cache_dtype)
    turns = [slice(None)] if rows is None or queue else [slice(start, start + rows) for start in range(0, prompts, rows)]
    try:
        for seed in (1, 2):  # the first one compiles
            keys = jax.vmap(jax.random.key)(np.arange(prompts, dtype=np.uint32) + np.uint32(seed * prompts))
            start = time.time()
            more = dict(rows_in_flight=rows) if queue else {}
            out = [nvfp4jax.generate(model, ids[turn], mask[turn], max_new_tokens=answers[turn], key=keys[turn], **options, **more) for turn in turns]
            lengths = np.concatenate([np.asarray(o.lengths) for o in out])
            times.append(time.time() - start)
    finally:
        type(model).takes_shared_cache = taken
    steps = int(lengths.sum()) / rows if queue else sum(int(np.asarray(o.lengths).max()) for o in out)
    kind = f"prefix, {'shared' if share else 'repeated'}" + ("" if rows is None else f", {'a queue' if queue else 'batches'} of {rows}")
    return dict(
        kind=kind, batch=prompts, context=int(counts.mean()), ms=times[1] * 1e3 / steps,
        tokens_per_s=int(lengths.sum()) / times[1], mean_tokens=float(lengths.mean()), floor_ms=floor(config, model, rows or prompts, own + mean // 2) * 1e3,
        memory_gb=(jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) / 1e9, compile_s=times[0] - times[1],
    )  # fmt: skip


@dataclasses.dataclass
class _Trainer:
    """A source of weights: float ones in the device's memory, quantized when the rollout looks for the `wanted`-th time."""

    requantize: Callable
    state: nnx.State
    wanted: int
    looks: int = 0
    active_step: int = 0

    def take(self):
        self.looks += 1
        if self.looks == self.wanted:
            return types.SimpleNamespace(state=self.requantize(self.state), step=1)


def reload(config: dict, model: nnx.Module, batch: int, length: int, new: int = 96) -> dict:
    """What new weights cost a rollout that runs: bfloat16 ones, as a Flax trainer holds them, quantized and taken between two chunks."""
    state = nnx.state(random_model(config, "bf16", any(depths(model)), seed=1))
    requantize = jax.jit(lambda state: nvfp4jax.quantize_params(state, model))
    jax.block_until_ready(requantize(state))
    packed = [x.nbytes for x in jax.tree.leaves(nnx.state(model, NVFP4Param))]
    moved = sum(packed) * (1 + 2 / 0.5625)  # read once, two bytes an element for 4.5 bits that are written
    ids = np.random.default_rng(0).integers(0, config["vocab_size"], (batch, length))

    def run(wanted: int) -> float:
        start = time.time()
        out = nvfp4jax.generate(
            model, ids, max_new_tokens=new, temperature=1.0, key=jax.random.key(0), cache_dtype=cache_dtype, swap_every=new // 4,
            weights=_Trainer(requantize, state, wanted),
        )  # fmt: skip
        assert (np.asarray(out.weight_versions).max() == 1) == (wanted > 0)
        return time.time() - start

    run(2)
    pairs = [(run(0), run(2)) for _ in range(5)]
    kept, taken = (float(np.median(times)) for times in zip(*pairs, strict=True))
    alone = []
    for _ in range(3):
        start = time.time()
        jax.block_until_ready(requantize(state))
        alone.append(time.time() - start)
    return dict(
        kind="new weights in a rollout", batch=batch, context=length, ms=float(np.median([b - a for a, b in pairs])) * 1e3, requantize_ms=float(np.median(alone)) * 1e3,
        tokens_per_s=batch * new / kept, tokens_per_s_with=batch * new / taken, floor_ms=moved / MEMORY * 1e3,
        memory_gb=(jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) / 1e9, compile_s=0.0,
    )  # fmt: skip


def plot(results: list[dict], file: str) -> None:
    """Tokens/s over the batch, a line a scaling and context; needs matplotlib."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots()
    lines = collections.defaultdict(list)
    for r in results:
        if r["kind"] == "decode":
            lines[f"{r['scaling']}, {'stacked' if r['stacked'] else 'unrolled'}, {r['context']} slots"].append(r)
    for label, cells in lines.items():
        cells = sorted(cells, key=lambda r: r["batch"])
        (line,) = axes.loglog([r["batch"] for r in cells], [r["tokens_per_s"] for r in cells], marker="o", label=label)
        axes.loglog([r["batch"] for r in cells], [1e3 * r["batch"] / r["floor_ms"] for r in cells], ls=":", color=line.get_color())
    axes.set(xlabel="rows", ylabel="tokens/s (dotted: floor)", title=results[0]["geometry"])
    axes.legend()
    figure.savefig(file)


def table(results: list[dict]) -> str:
    lines = ["| scaling | layers | what | batch x context | ms | tokens/s | floor ms | floor / time | memory GB | compile s | launches |",
             "|" + "---|" * 11]  # fmt: skip
    for r in results:
        lines.append(f"| {r['scaling']} | {'stacked' if r['stacked'] else 'unrolled'} | {r['kind']} | {r['batch']} x {r['context']} | {r['ms']:.2f} | "
                     f"{r['tokens_per_s']:,.0f} | {r['floor_ms']:.2f} | {r['floor_ms'] / r['ms']:.2f} | {r['memory_gb']:.1f} | {r['compile_s']:.0f} | "
                     f"{r.get('launches', 0):.0f} |")  # fmt: skip
    return "\n".join(lines) + (f"\nKeys and values in {cache_dtype}." if cache_dtype else "")


def main(argv: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=GEOMETRIES, default="qwen3-30b-a3b")
    parser.add_argument("--layers", type=int, help="a model cut to so many")
    parser.add_argument("--scalings", nargs="*", default=["token"], help="token, tensor, tensor_pow2, static, delayed, none (weights only), bf16")
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 16, 64, 256])
    parser.add_argument("--contexts", nargs="*", type=int, default=[1024])
    parser.add_argument("--prefill", nargs="*", default=[], metavar="ROWSxTOKENS")
    parser.add_argument("--prompts", type=int, help="with --samples: so many prompts")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=1024, help="of these prompts")
    parser.add_argument("--prefix-prompts", type=int, help="so many prompts that begin alike")
    parser.add_argument("--prefix", type=int, default=850)
    parser.add_argument("--own", type=int, default=100)
    parser.add_argument("--mean", type=int, default=121)
    parser.add_argument("--new", type=int, default=512, help="tokens of a row, at most")
    parser.add_argument("--rows-in-flight", nargs="*", type=int, default=[], help="with --prefix-prompts: so many at a time, in batches and in a queue")
    parser.add_argument("--shared-only", action="store_true", help="leaves out the rollouts that share nothing")
    parser.add_argument("--cache-dtype", help="of keys and values, e.g. float8_e4m3fn; the model's without it")
    parser.add_argument("--reload", nargs="*", default=[], metavar="ROWSxTOKENS")
    parser.add_argument("--steps", type=int, default=NEW)
    parser.add_argument("--unrolled", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--json")
    parser.add_argument("--plot")
    options = parser.parse_args(argv)
    global cache_dtype
    cache_dtype = options.cache_dtype
    config, results = config_of(options.geometry, options.layers), []

    def keep(scaling: str, run, *cell) -> None:
        common = dict(geometry=options.geometry, layers=config["num_hidden_layers"], scaling=scaling, stacked=not options.unrolled,
                      cache_dtype=cache_dtype)
        try:
            results.append(common | run(config, model, *cell))
        except jax.errors.JaxRuntimeError as error:  # out of memory: the next cell may fit
            print(f"{scaling} {cell}: {str(error)[:300]}", flush=True)
            return
        shown = {key: value for key, value in results[-1].items() if key != "kernels"}
        print(json.dumps(shown), flush=True)
        for name, (us, count) in sorted(results[-1].get("kernels", {}).items(), key=lambda item: -item[1][0])[:30]:
            print(f"    {us:9.1f} us {count:7.1f}  {name[:100]}", flush=True)
        if options.json:  # after each cell, should the time end
            with open(options.json, "w") as file:
                json.dump(results, file)

    for scaling in options.scalings:
        model = random_model(config, scaling, not options.unrolled)
        for cell in options.prefill:
            keep(scaling, prompt, *map(int, cell.split("x")), options.profile)
        for cell in options.reload if scaling != "bf16" else ():
            keep(scaling, reload, *map(int, cell.split("x")))
        for context in options.contexts:
            for batch in options.batches:
                keep(scaling, step, batch, context, options.profile, options.steps)
        for share in (True,) if options.shared_only else (True, False):
            if options.prompts:
                keep(scaling, samples, options.prompts, options.samples, options.length, options.new, share, options.profile)
            if options.prefix_prompts:
                cell = options.prefix_prompts, options.prefix, options.own, options.mean, options.new
                if not options.rows_in_flight:
                    keep(scaling, beginning_alike, *cell, share)
                for rows in options.rows_in_flight if share else ():
                    for queue in (False, True):
                        keep(scaling, beginning_alike, *cell, share, rows, queue)
        del model
    print(table(results))
    if options.plot:
        plot(results, options.plot)
    return results


if __name__ == "__main__":
    main()
