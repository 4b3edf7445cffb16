"""Hugging Face folders for tests: a reader, a writer and a decoder apart from the library's."""

import json
import shutil
import struct
from pathlib import Path

import ml_dtypes
import numpy as np

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


# The safetensors library's numpy half knows no float8.
DTYPES = {
    "U8": np.uint8, "I8": np.int8, "F32": np.float32, "BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn,
}  # fmt: skip


def tensors(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a folder's files."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        raw = file.read_bytes()
        start = 8 + struct.unpack("<Q", raw[:8])[0]
        for name, entry in json.loads(raw[8:start]).items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                found[name] = np.frombuffer(raw[start + begin : start + end], DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return found


def save_file(weights: dict[str, np.ndarray], path: Path) -> None:
    header, data = {}, b""
    for name, value in weights.items():
        tag = next(tag for tag, dtype in DTYPES.items() if np.dtype(dtype) == value.dtype)
        raw = np.ascontiguousarray(value).tobytes()
        header[name] = {"dtype": tag, "shape": list(value.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


def decode(packed: np.ndarray, scale: np.ndarray, global_scale: np.ndarray) -> np.ndarray:
    """(code * scale) * global_scale in float32, low nibble first."""
    codes = np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:-1], -1)
    values = E2M1[codes].reshape(*scale.shape, 16) * scale.astype(np.float32)[..., None]
    return values.reshape(codes.shape) * np.float32(global_scale)


def decoded(folder: Path, module: str) -> np.ndarray:
    """A module's weight in float32, whatever NVFP4 format the folder has."""
    t = tensors(folder)
    if f"{module}.weight_packed" in t:
        return decode(t[f"{module}.weight_packed"], t[f"{module}.weight_scale"], np.float32(1) / t[f"{module}.weight_global_scale"])
    return decode(t[f"{module}.weight"], t[f"{module}.weight_scale"], t[f"{module}.weight_scale_2"])


def write(folder: Path, config: dict, weights: dict[str, np.ndarray], shards: int = 1) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    names = list(weights)
    if shards == 1:
        save_file(weights, folder / "model.safetensors")
        return folder
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = names[shard::shards]
        save_file({name: weights[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def copy(source: Path, target: Path, change: dict | None = None, config: dict | None = None) -> Path:
    """A copy of a folder with some tensors replaced (or dropped, where None) and config keys changed."""
    shutil.copytree(source, target)
    if change is not None:
        (target / "model.safetensors.index.json").unlink(missing_ok=True)
        new = {name: value for name, value in (tensors(source) | change).items() if value is not None}
        save_file(new, target / "model.safetensors")
    if config is not None:
        old = json.loads((target / "config.json").read_text())
        merged = {key: value for key, value in (old | config).items() if value is not None}
        (target / "config.json").write_text(json.dumps(merged))
    return target


def small_config(**changes) -> dict:
    """A Qwen3-MoE of one dense and one sparse layer."""
    return dict(
        architectures=["Qwen3MoeForCausalLM"], model_type="qwen3_moe", vocab_size=64, hidden_size=32, intermediate_size=48,
        moe_intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16, num_experts=3,
        num_experts_per_tok=2, norm_topk_prob=True, mlp_only_layers=[0], tie_word_embeddings=False, rope_theta=1e4,
    ) | changes  # fmt: skip


def small_weights(config: dict, seed: int = 0) -> dict[str, np.ndarray]:
    """Random bfloat16 weights of `small_config` by their Hugging Face names."""
    rng = np.random.default_rng(seed)
    h, heads, kv, d = config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], h), "model.norm.weight": (h,), "lm_head.weight": (config["vocab_size"], h)}
    for layer in range(config["num_hidden_layers"]):
        p = f"model.layers.{layer}."
        shapes |= {p + "input_layernorm.weight": (h,), p + "post_attention_layernorm.weight": (h,)}
        shapes |= {p + "self_attn.q_norm.weight": (d,), p + "self_attn.k_norm.weight": (d,), p + "self_attn.o_proj.weight": (h, heads * d)}
        shapes |= {p + f"self_attn.{n}_proj.weight": (m * d, h) for n, m in (("q", heads), ("k", kv), ("v", kv))}
        mlps = {p + "mlp.": config["intermediate_size"]}
        if layer not in config["mlp_only_layers"]:
            mlps = {f"{p}mlp.experts.{e}.": config["moe_intermediate_size"] for e in range(config["num_experts"])}
            shapes[p + "mlp.gate.weight"] = (config["num_experts"], h)
        for prefix, i in mlps.items():
            shapes |= {prefix + "gate_proj.weight": (i, h), prefix + "up_proj.weight": (i, h), prefix + "down_proj.weight": (h, i)}
    return {name: (rng.normal(size=shape) * 0.1).astype(ml_dtypes.bfloat16) for name, shape in shapes.items()}
