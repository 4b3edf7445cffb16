"""Makes the tiny Hugging Face folders under tests/data that transformers' own models are the oracle of.

    python tests/make_models.py [NAME ...]      with torch, transformers and safetensors (not needed by the tests)

Each folder: config.json and bfloat16 model.safetensors as `save_pretrained` writes them, and reference.npz of
`from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")`: input_ids and attention_mask [3, 24] (rows 1 and
2 padded on the left), logits_f32 [3, 24, V] (padding's are zero), greedy_16 [3, 16].
"""

import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config

SMALL = dict(
    vocab_size=256, hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=256, bos_token_id=None, eos_token_id=None, pad_token_id=None,
)  # fmt: skip
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16, rope_theta=5e5)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64, rope_theta=1e4)
CONFIGS = {
    "llama3-tiny": LlamaConfig(**SMALL, num_hidden_layers=2, rope_parameters=LLAMA3, tie_word_embeddings=True, rms_norm_eps=1e-5),
    "llama2-tiny": LlamaConfig(**SMALL | dict(num_key_value_heads=4), num_hidden_layers=2, head_dim=24, attention_bias=True, mlp_bias=True),
    "mistral-tiny": MistralConfig(**SMALL, num_hidden_layers=2, sliding_window=None, head_dim=32),
    "qwen2-tiny": Qwen2Config(**SMALL, num_hidden_layers=3, rope_parameters=YARN),
}


def make(name: str, target: Path) -> None:
    torch.manual_seed(sum(map(ord, name)))
    model = AutoModelForCausalLM.from_config(CONFIGS[name])
    with torch.no_grad():
        for key, value in model.named_parameters():  # as loud as trained weights, no two norms or biases alike
            value.copy_(torch.randn_like(value) * (0.1 if value.ndim == 2 else 0.3) + (1.0 if "norm" in key else 0.0))
    model.to(torch.bfloat16).save_pretrained(target)
    (target / "generation_config.json").unlink(missing_ok=True)
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32, attn_implementation="eager").eval()
    rng = np.random.default_rng(sum(map(ord, name)))
    ids = rng.integers(0, SMALL["vocab_size"], (3, 24))
    mask = (np.arange(24)[None] >= np.array([[0], [5], [11]])).astype(np.int64)
    ids = np.where(mask == 1, ids, 0)
    with torch.no_grad():
        logits = np.zeros((3, 24, SMALL["vocab_size"]), np.float32)
        greedy = np.zeros((3, 16), np.int64)
        for row in range(3):  # one by one, without padding
            tokens = torch.tensor(ids[row, mask[row] == 1])[None]
            logits[row, mask[row] == 1] = model(tokens).logits[0].numpy()
            for step in range(16):
                best = model(tokens).logits[0, -1].argmax()
                greedy[row, step] = int(best)
                tokens = torch.cat([tokens, best[None, None]], 1)
    np.savez_compressed(target / "reference.npz", input_ids=ids, attention_mask=mask, logits_f32=logits, greedy_16=greedy)


if __name__ == "__main__":
    for name in sys.argv[1:] or CONFIGS:
        make(name, Path(__file__).parent / "data" / name / "bf16")
