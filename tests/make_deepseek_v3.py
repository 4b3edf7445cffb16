"""Makes the DeepSeek-V3 folders of tests/data with torch and transformers: weights by a seed, logits and greedy tokens in float32.

    python tests/make_deepseek_v3.py [tests/data]        (torch 2.13, transformers 5.24, accelerate, safetensors)

Each folder has config.json, model.safetensors and reference.npz: input_ids and attention_mask [2, 24] (row 1 is padded on the
left), logits_f32 [2, 24, vocab] (rows of padding carry no meaning), greedy_12 [2, 12]: the tokens that greedy decoding adds.
The FP8 folder is read back by transformers' own FP8 loader (dequantize=True), the others by from_pretrained in float32.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, FineGrainedFP8Config

COMMON = dict(
    vocab_size=96, hidden_size=64, intermediate_size=80, moe_intermediate_size=32, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=4, kv_lora_rank=32, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=24, n_routed_experts=8,
    num_experts_per_tok=3, max_position_embeddings=64, initializer_range=0.1,
)  # fmt: skip
FOLDERS = {
    # No q_lora, no groups, weights not normalized, plain rotary halves, biases, two shared experts, all layers sparse, a tied head.
    "deepseek-v3-plain": dict(
        q_lora_rank=None, n_group=1, topk_group=1, norm_topk_prob=False, routed_scaling_factor=1.5, rope_interleave=False,
        attention_bias=True, n_shared_experts=2, first_k_dense_replace=0, tie_word_embeddings=True, rms_norm_eps=1e-4,
        rope_parameters={"rope_type": "default", "rope_theta": 5e3},
    ),
    # Yarn whose two mscales differ, so that cos and sin are scaled too; 2 of 4 groups.
    "deepseek-v3-yarn": dict(
        q_lora_rank=48, n_group=4, topk_group=2, routed_scaling_factor=2.5, first_k_dense_replace=2, rms_norm_eps=1e-5,
        rope_parameters={
            "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 32.0,
            "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 0.5,
        },
    ),
    # As published: yarn with equal mscales, FP8 weights with a scale a block.
    "deepseek-v3-fp8": dict(
        q_lora_rank=48, n_group=2, topk_group=1, num_experts_per_tok=2, first_k_dense_replace=1,
        rope_parameters={
            "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 32,
            "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
        },
    ),
}  # fmt: skip
FP8_BLOCK = (8, 16)


def to_fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, K] -> (e4m3 [N, K], f32 [N / block, K / block]), the largest of a block at 448."""
    n, k = weight.shape
    rows, columns = FP8_BLOCK
    blocks = weight.float().reshape(n // rows, rows, k // columns, columns)
    scale = blocks.abs().amax((1, 3)) / 448
    return (blocks / scale[:, None, :, None]).reshape(n, k).to(torch.float8_e4m3fn), scale


def random_model(config: DeepseekV3Config) -> DeepseekV3ForCausalLM:
    """Norms near one, a router that tells experts apart, and correction biases that change its choice."""
    model = DeepseekV3ForCausalLM(config)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if "norm" in name:
            tensor.data.normal_(1.0, 0.2)
        elif name.endswith(("mlp.gate.weight", "proj.bias", "mqa.bias")):
            tensor.data.normal_(0.0, 0.3)
        elif name.endswith("e_score_correction_bias"):
            tensor.data.normal_(0.0, 0.2)
    return model


def make(folder: Path, settings: dict) -> None:
    config = DeepseekV3Config(**COMMON | settings)
    random_model(config).to(torch.bfloat16).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    options = {}
    if folder.name.endswith("fp8"):
        tensors = {}
        for name, tensor in load_file(folder / "model.safetensors").items():
            if "_proj" in name and tensor.ndim == 2:
                tensors[name], tensors[f"{name}_scale_inv"] = to_fp8(tensor)
            else:
                tensors[name] = tensor
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        path = folder / "config.json"
        quantization = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": FP8_BLOCK}
        path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": quantization}, indent=2) + "\n")
        options["quantization_config"] = FineGrainedFP8Config(weight_block_size=FP8_BLOCK, dequantize=True)
    model = DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", **options).eval()
    input_ids = torch.randint(2, config.vocab_size, (2, 24))
    mask = torch.ones_like(input_ids)
    mask[1, :9] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(input_ids, attention_mask=mask, position_ids=positions).logits
        greedy = model.generate(input_ids, attention_mask=mask, max_new_tokens=12, min_new_tokens=12, do_sample=False, eos_token_id=None)
    np.savez(
        folder / "reference.npz", input_ids=input_ids.numpy().astype(np.int32), attention_mask=mask.numpy().astype(np.int32),
        logits_f32=logits.float().numpy(), greedy_12=greedy[:, 24:].numpy().astype(np.int32),
    )  # fmt: skip


if __name__ == "__main__":
    data = Path(sys.argv[1] if len(sys.argv) > 1 else "tests/data")
    for seed, (name, settings) in enumerate(FOLDERS.items()):
        torch.manual_seed(seed)
        make(data / name, settings)
        print(name, sum(f.stat().st_size for f in (data / name).iterdir()), "bytes")
