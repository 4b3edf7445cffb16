"""The main job, end to end, on a real Hugging Face checkpoint: `nvfp4jax demo DIR`.

Loads the model, swaps its layers to NVFP4, saves and restores it through Orbax, rolls out a batch of prompts with a jitted
function, reloads new weights 20 times and rolls out again; then prints what each activation mode costs against bfloat16.
"""

import json
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console
from rich.table import Table
from safetensors.numpy import save_file

import nvfp4jax
from nvfp4jax import Rule, Static, Token, models, ops
from nvfp4jax.array import NVFP4Array
from nvfp4jax.checkpoint import convert, saved_model
from nvfp4jax.layers import set_scaling
from nvfp4jax.rollout import rollout as jitted_rollout
from nvfp4jax.rollout.prompts import pack
from nvfp4jax.swap import quantized_layers

console = Console(width=110, highlight=False)


def relative(a, b) -> float:
    """|a - b| / |b| in float64."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def forward(model: nnx.Module):
    """logits(params, packed prompts) of `model`, compiled once."""
    graphdef, _ = nnx.split(model)
    run = jax.jit(lambda params, ids, positions, valid: nnx.merge(graphdef, params)(ids, positions, valid=valid).logits)
    return lambda params, packed: run(params, *map(jnp.asarray, (packed.ids, packed.positions(), packed.valid)))


def one_level(qmodel: nnx.Module, model: nnx.Module) -> nnx.Module:
    """The same layers without a global scale (fixed at 1), for weights and activations: what one-level FP4 makes of a model."""
    floats = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    out = nnx.clone(qmodel)
    for path, layer in quantized_layers(out).items():

        def store(name, matrix, layer=layer):
            w = ops.quantize(matrix.astype(jnp.bfloat16), Static(jnp.float32(1)))
            for suffix, value in (("_packed", w.packed), ("_scale", w.scale)):
                param = getattr(layer, name + suffix)
                param[...] = value.reshape(param.shape)
            scale = getattr(layer, f"{name}_global_scale")
            scale[...] = jnp.ones_like(scale[...])

        turned = {name[-1]: jnp.swapaxes(floats[(*path, *name)].get_value(), -1, -2) for name in layer.float_names()}
        if isinstance(layer, nvfp4jax.NVFP4Experts):
            store("gate_up", jnp.stack([turned["gate_proj"], turned["up_proj"]], -3))
            store("down", turned["down_proj"])
            set_scaling(layer, Static(jnp.ones_like(layer.gate_up_global_scale[...])))
        else:
            store("kernel", turned["kernel"])
            set_scaling(layer, Static(jnp.ones_like(layer.kernel_global_scale[...])))
    return out


TINY = dict(
    architectures=["Qwen3MoeForCausalLM"], model_type="qwen3_moe", vocab_size=512, hidden_size=128, intermediate_size=256,
    moe_intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_experts=8,
    num_experts_per_tok=2, norm_topk_prob=True, rms_norm_eps=1e-6, rope_theta=1e6, tie_word_embeddings=False, mlp_only_layers=[0],
)  # fmt: skip


def write_tiny_folder(directory: Path) -> None:
    """A Hugging Face folder with a small random Qwen3-MoE, for who has no checkpoint at hand."""
    family = models.family_of(TINY)
    tensors = {}
    for path, variable in nnx.to_flat_state(nnx.state(models.build(TINY, rngs=nnx.Rngs(0)))):
        value = np.asarray(variable.get_value())
        if path[-1] in ("gate_proj", "up_proj", "down_proj"):
            owner = family.module_name(path[:-1])
            tensors |= {f"{owner}.{e}.{path[-1]}.weight": np.ascontiguousarray(value[e].T) for e in range(value.shape[0])}
        else:
            tensors[family.tensor_name(path)] = np.ascontiguousarray(value.T) if path[-1] == "kernel" else value
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(TINY))


def run(directory: Path, new_tokens: int = 16) -> None:
    """The whole job on one folder, told as it goes."""
    start = time.time()

    def say(text: str) -> None:
        console.print(f"[{time.time() - start:5.1f} s] {text}")

    config = json.loads((directory / "config.json").read_text())
    reference = np.load(directory / "reference.npz") if (directory / "reference.npz").exists() else None
    rng = np.random.default_rng(0)
    if reference is not None:
        ids, mask = reference["input_ids"], reference["attention_mask"]
    else:
        ids = rng.integers(0, config["vocab_size"], (3, 24))
        mask = np.arange(24)[None] >= np.array([0, 5, 11])[:, None]
    ids, mask = np.asarray(ids, np.int32), np.asarray(mask, bool)
    packed = pack(ids, mask)

    say(f"loading {directory}")
    model = nvfp4jax.load_model(directory, jnp.float32, scan_layers=True)
    base = forward(model)(nnx.state(model), packed)
    if reference is not None:
        wanted = np.take_along_axis(reference["logits_f32"], packed.columns[..., None], 1)
        error = np.abs(np.asarray(base) - wanted)[packed.valid].max()
        say(f"float32 logits: largest difference to transformers' (reference.npz) {error:.1e}")

    half = nvfp4jax.load_model(directory, jnp.bfloat16, scan_layers=True)
    rules = convert.rules_for(half, models.family_of(config), convert.Selection())
    qmodel = nvfp4jax.quantize_model(half, rules)
    sizes = [sum(v.size * v.dtype.itemsize for v in jax.tree.leaves(nnx.state(m))) for m in (half, qmodel)]
    say(f"swapped {len(quantized_layers(qmodel))} stacks of layers to NVFP4: {sizes[0] / 1e6:.2f} MB -> {sizes[1] / 1e6:.2f} MB")

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint"
        saved_model.save_model(path, qmodel, config, rules=rules)
        restored = nvfp4jax.load_model(path, scan_layers=True)
        pairs = zip(jax.tree.leaves(nnx.state(qmodel)), jax.tree.leaves(nnx.state(restored)), strict=True)
        equal = all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in pairs)
        say(f"saved to Orbax and restored: every byte equal: {equal}")
        assert equal

    roll = dict(max_new_tokens=new_tokens, temperature=0.7, top_p=0.95, key=jax.random.key(0), num_samples=2)
    result = nvfp4jax.generate(restored, ids, mask, **roll)
    say(f"rolled out {result.tokens.shape[0]} rows of {result.tokens.shape[1]} tokens; first row {np.asarray(result.tokens[0]).tolist()}")
    say(f"  its logprobs {[float(f'{v:.2f}') for v in result.logprobs[0]]}")

    requantize = jax.jit(lambda state: nvfp4jax.quantize_params(state, restored))
    state = nnx.state(half, nnx.Param)
    before = jitted_rollout._cache_size()
    tick = time.time()
    for step in range(20):
        noise = jax.random.key(step)
        state = jax.tree.map(lambda v: v * (1 + 0.02 * jax.random.normal(noise, v.shape, jnp.float32)).astype(v.dtype), state)  # noqa: B023
        nnx.update(restored, requantize(state))
        again = nvfp4jax.generate(restored, ids, mask, **roll)
    traces = 1 + jitted_rollout._cache_size() - before
    moved = float((np.asarray(again.tokens) != np.asarray(result.tokens)).mean())
    say(f"20 weight swaps, each requantized and rolled out, {(time.time() - tick) / 20:.2f} s each: {traces} trace of the rollout, "
        f"{requantize._cache_size()} of the requantizer; {moved:.0%} of the tokens changed")
    assert traces == 1

    exact = np.asarray(base)[packed.valid]
    table = Table("weights", "activations", "logits: error against float32", "likeliest token equal", title=config["architectures"][0])
    experts = any(isinstance(m, nvfp4jax.NVFP4Experts) for m in quantized_layers(qmodel).values())

    def row(weights: str, activations: str, m: nnx.Module) -> None:
        logits = np.asarray(forward(m)(nnx.state(m), packed))[packed.valid]
        same = (logits.argmax(-1) == exact.argmax(-1)).mean()
        table.add_row(weights, activations, f"{relative(logits, exact):.4f}", f"{same:.0%}")

    row("bfloat16", "bfloat16", half)
    for scaling in (None, "tensor", "tensor_pow2", "token", *(["expert"] if experts else [])):
        rules = [r if r.skip else Rule(r".*/experts", scaling=scaling) for r in rules] if scaling == "expert" else [
            r if r.skip else Rule(".*", scaling=scaling) for r in rules
        ]
        row("NVFP4" + (" (experts only)" if scaling == "expert" else ""), scaling or "bfloat16", nvfp4jax.quantize_model(half, rules))
    best = [r if r.skip else Rule(".*", scaling=Token(four_over_six="mse"), weight_four_over_six="mse") for r in rules]
    row("NVFP4, four over six", "token, four over six", nvfp4jax.quantize_model(half, best))
    row("one-level FP4", "one-level FP4", one_level(qmodel, half))
    console.print(table)
    x = jax.random.normal(jax.random.key(1), (256, 512))
    table = Table("standard deviation", "NVFP4, online", "one-level FP4", title="relative error of a Gaussian tensor")
    for std in (1e-4, 1e-3, 1e-2, 1.0, 1e4):
        y = x * jnp.float32(std)
        bare: NVFP4Array = ops.quantize(y, Static(jnp.float32(1)))
        table.add_row(f"{std:g}", f"{relative(nvfp4jax.quantize(y).dequantize(), y):.4f}", f"{relative(bare.dequantize(), y):.4f}")
    console.print(table)
    say("done")
