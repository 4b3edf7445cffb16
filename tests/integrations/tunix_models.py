"""Tiny models of google-tunix with random weights; run as a script, the table of what swapping them packs and costs.

    python tests/integrations/tunix_models.py [NAME ...]        with google-tunix==0.1.7, on a CPU
"""

import json
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # tunix and what it imports
    from tunix.models.gemma import model as gemma
    from tunix.models.gemma3 import model as gemma3
    from tunix.models.llama3 import model as llama3
    from tunix.models.qwen2 import model as qwen2
    from tunix.models.qwen3 import model as qwen3

import nvfp4jax
from nvfp4jax.integrations import tunix

VOCABULARY = 96
SHAPE = dict(num_layers=2, embed_dim=64, hidden_dim=96, num_heads=4, head_dim=16, num_kv_heads=2)
COMMON = SHAPE | dict(vocab_size=VOCABULARY, rope_theta=10_000, norm_eps=1e-6)
GEMMA = SHAPE | dict(num_embed=VOCABULARY, sliding_window_size=5)
GEMMA2 = GEMMA | dict(
    attention_types=(gemma.AttentionType.LOCAL_SLIDING, gemma.AttentionType.GLOBAL), use_post_attn_norm=True, use_post_ffw_norm=True,
    attn_logits_soft_cap=50.0, final_logit_softcap=30.0,
)  # fmt: skip
MODELS = {
    "qwen3": lambda rngs: qwen3.Qwen3(qwen3.ModelConfig(**COMMON), rngs=rngs),
    "qwen3-moe": lambda rngs: qwen3.Qwen3(
        qwen3.ModelConfig(**COMMON | dict(hidden_dim=32, num_experts=4, num_experts_per_tok=2)), rngs=rngs
    ),
    "llama3": lambda rngs: llama3.Llama3(llama3.ModelConfig(**COMMON), rngs=rngs),
    "qwen2": lambda rngs: qwen2.Qwen2(qwen2.ModelConfig(**COMMON, use_tied_embedding=True), rngs=rngs),
    "gemma": lambda rngs: gemma.Gemma(gemma.ModelConfig(**GEMMA2), rngs=rngs),
    "gemma3": lambda rngs: gemma3.Gemma3(  # as many key heads as query heads: one qkv_einsum
        gemma3.ModelConfig(**GEMMA | dict(num_kv_heads=4), param_dtype=jnp.float32), rngs=rngs
    ),
}
RULE = nvfp4jax.Rule(r"layers/.*|lm_head")


def make(name: str, seed: int = 0) -> nnx.Module:
    """tunix starts many weights at zero: all of them are drawn here."""
    model, rng = MODELS[name](nnx.Rngs(seed)), np.random.default_rng(seed)
    state = nnx.state(model)
    for _, leaf in nnx.to_flat_state(state):
        leaf.set_value(leaf.get_value() + jnp.asarray(rng.normal(size=leaf.shape) * 0.15, leaf.dtype))
    nnx.update(model, state)
    return model


_forward = jax.jit(lambda graphdef, state, *args: nnx.merge(graphdef, state)(*args)[0])


def forward(model: nnx.Module, rows: np.ndarray) -> np.ndarray:
    """tunix's own forward of unpadded rows [B, T], without a cache: logits [B, T, V]."""
    steps = rows.shape[1]
    seen = np.broadcast_to(np.tril(np.ones((steps, steps), bool)), (len(rows), steps, steps))
    positions = np.broadcast_to(np.arange(steps, dtype=np.int32), rows.shape)
    return np.asarray(_forward(*nnx.split(model), jnp.asarray(rows, jnp.int32), positions, None, seen))


def greedy(model: nnx.Module, prompt: np.ndarray, count: int, length: int) -> list[int]:
    """The tokens that tunix's own forward adds to one prompt; `length`: what rows are filled up to behind their end."""
    row = list(map(int, prompt))
    for _ in range(count):
        logits = forward(model, np.asarray([row + [0] * (length - len(row))]))
        row.append(int(logits[0, len(row) - 1].argmax()))
    return row[len(prompt) :]


def row_of_table(name: str) -> dict:
    """What a swap of the model packs and leaves, and what it costs: of the logits of 64 tokens, the relative error and how
    many maxima stay; of greedy rollouts, the tokens until they part (of 16)."""
    model = make(name)
    float_bytes = sum(leaf.get_value().nbytes for _, leaf in nnx.to_flat_state(nnx.state(model)))
    rows = np.random.default_rng(1).integers(1, VOCABULARY, (4, 16))
    wanted, result = forward(model, rows), {"model": name, "float_bytes": float_bytes}
    for label, scaling in (("weights_only", None), ("token", "token")):
        qmodel = nvfp4jax.quantize_model(model, nvfp4jax.Rule(RULE.module_path, scaling=scaling))
        report, logits = nvfp4jax.describe(qmodel), forward(qmodel, rows)
        result |= {"layers": len(report.packed), "packed_bytes": report.packed_bytes, "left_bytes": report.left_bytes}
        result[f"logits_error_{label}"] = float(np.sqrt(((logits - wanted) ** 2).mean() / (wanted**2).mean()))
        result[f"argmax_equal_{label}"] = float((logits.argmax(-1) == wanted.argmax(-1)).mean())
    tokens, quantized = (
        np.asarray(nvfp4jax.generate(tunix.Decoder(m), rows, max_new_tokens=16).tokens) for m in (model, qmodel)
    )
    result["tokens_until_they_part_token"] = float(np.cumprod(tokens == quantized, axis=1).sum(1).mean())
    return result


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for name in sys.argv[1:] or MODELS:
        print(json.dumps(row_of_table(name)), flush=True)
