"""Qwen3 and Qwen3-MoE in numpy float64, written from the Hugging Face code alone: one row, no padding, no cache."""

import numpy as np


def forward(
    weights: dict[str, np.ndarray], config: dict, tokens: np.ndarray, seen: dict[str, float] | None = None
) -> tuple[np.ndarray, list[np.ndarray]]:
    """(logits [T, V], experts of each token [T, k] for each mixture layer); weights [out, in] by Hugging Face names.

    seen: takes the largest absolute value that each linear module has read, by its name.
    """
    get = lambda name: np.asarray(weights[name], np.float64)  # noqa: E731

    def norm(x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + config["rms_norm_eps"]) * get(name)

    def linear(x, name):
        if seen is not None:
            seen[name] = max(seen.get(name, 0.0), np.abs(x).max())
        y = x @ get(name + ".weight").T
        return y + get(name + ".bias") if name + ".bias" in weights else y

    def mlp(x, name):
        gate = linear(x, name + ".gate_proj")
        return linear(gate / (1 + np.exp(-gate)) * linear(x, name + ".up_proj"), name + ".down_proj")

    length, dim = len(tokens), config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    frequencies = config["rope_parameters"]["rope_theta"] ** (-np.arange(0, dim, 2) / dim)
    angles = np.concatenate([np.arange(length)[:, None] * frequencies] * 2, -1)[:, None]

    def rotate(x):
        half = np.concatenate([-x[..., dim // 2 :], x[..., : dim // 2]], -1)
        return x * np.cos(angles) + half * np.sin(angles)

    x = get("model.embed_tokens.weight")[tokens]
    routed = []
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        h = norm(x, f"{at}.input_layernorm.weight")
        project = lambda name, n: linear(h, f"{at}.self_attn.{name}_proj").reshape(length, n, dim)  # noqa: B023, E731
        q = rotate(norm(project("q", heads), f"{at}.self_attn.q_norm.weight"))
        k = rotate(norm(project("k", kv_heads), f"{at}.self_attn.k_norm.weight"))
        v = project("v", kv_heads)
        out = np.zeros((length, heads, dim))
        for head in range(heads):
            kv = head // (heads // kv_heads)
            scores = q[:, head] @ k[:, kv].T / np.sqrt(dim)
            scores[np.triu_indices(length, 1)] = -np.inf
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            out[:, head] = scores / scores.sum(-1, keepdims=True) @ v[:, kv]
        x = x + linear(out.reshape(length, -1), f"{at}.self_attn.o_proj")
        h = norm(x, f"{at}.post_attention_layernorm.weight")
        experts = config.get("num_experts", config.get("num_local_experts", 0))
        if not experts or layer in config["mlp_only_layers"] or (layer + 1) % config["decoder_sparse_step"]:
            x = x + mlp(h, f"{at}.mlp")
            continue
        scores = linear(h, f"{at}.mlp.gate")
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        scores /= scores.sum(-1, keepdims=True)
        chosen = np.argsort(-scores, axis=-1, kind="stable")[:, : config["num_experts_per_tok"]]
        routed.append(chosen)
        y = np.zeros_like(x)
        for t in range(length):
            p = scores[t, chosen[t]]
            p = p / p.sum() if config["norm_topk_prob"] else p
            for expert, weight in zip(chosen[t], p, strict=True):
                y[t] += weight * mlp(h[t : t + 1], f"{at}.mlp.experts.{expert}")[0]
        x = x + y
    x = norm(x, "model.norm.weight")
    head = "model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"
    return x @ get(head).T, routed
