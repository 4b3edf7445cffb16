"""How fast do new weights reach a rollout, against reading the same bytes raw, and against bfloat16?

    python benchmarks/bench_reload.py [--directory DIR] [--layers 2] [--json FILE]

A Qwen3-MoE of 128 experts, hidden 2048 (the layers of Qwen3-30B-A3B), published in bfloat16 and in NVFP4. Times are medians of 3, with
the files dropped from the page cache before each ("disk"; posix_fadvise, no root needed) or not ("memory"). Raw: every file read
into memory of its own and put on the device. Load: Orbax alone. Checked: `orbax.restore_state`, with digests and health. In memory:
`Quantizer` on a bfloat16 state that lies on the device.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import nvfp4jax
from nvfp4jax import models
from nvfp4jax.checkpoint import orbax
from nvfp4jax.checkpoint.reload import Quantizer, publish


def files(path: Path) -> list[Path]:
    return [file for file in path.rglob("*") if file.is_file()]


def drop_from_cache(path: Path) -> None:
    for file in files(path):
        with open(file, "rb") as handle:
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_raw(path: Path) -> list[jax.Array]:
    return [jax.device_put(np.fromfile(file, np.uint8)) for file in files(path)]


def median_seconds(work, path: Path | None, cold: bool) -> float:
    times = []
    for _ in range(4):  # the first compiles
        if cold and path is not None:
            drop_from_cache(path)
        start = time.perf_counter()
        jax.block_until_ready(work())
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--directory", type=Path, help="on the disk to be measured; a temporary folder by default")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    config = dict(
        architectures=["Qwen3MoeForCausalLM"], model_type="qwen3_moe", vocab_size=32768, hidden_size=2048, intermediate_size=6144,
        moe_intermediate_size=768, num_hidden_layers=options.layers, num_attention_heads=32, num_key_value_heads=4, head_dim=128,
        num_experts=options.experts, num_experts_per_tok=8, norm_topk_prob=True, tie_word_embeddings=True,
    )  # fmt: skip
    floats = models.build(config, rngs=nnx.Rngs(0))
    nnx.update(floats, jax.device_put(nnx.state(floats), jax.devices()[0]))
    live = nvfp4jax.quantize_model(floats, [nvfp4jax.Rule(".*/mlp/gate", skip=True), nvfp4jax.Rule(".*")])
    rows = []
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        for name, model in (("bfloat16", floats), ("NVFP4", live)):
            start = time.perf_counter()
            path = publish(Path(folder) / name, 1, model, config)
            saved = time.perf_counter() - start
            os.sync()
            size = sum(file.stat().st_size for file in files(path))
            nested = orbax._nested({k: orbax._abstract(v) for k, v in orbax.flatten(nnx.state(model)).items()})
            for cold in (True, False):
                raw = median_seconds(lambda path=path: read_raw(path), path, cold)
                load = median_seconds(lambda path=path, nested=nested: orbax.ocp.load(path, nested), path, cold)
                checked = median_seconds(lambda path=path, model=model: orbax.restore_state(path, model), path, cold)
                rows.append(
                    dict(weights=name, source="disk" if cold else "memory", megabytes=size / 1e6, save=saved, raw=raw, load=load, checked=checked)
                )
        quantize = Quantizer(live)
        requantize = median_seconds(lambda: quantize(floats), None, False)
    device = jax.devices()[0].device_kind
    print(f"{device}, jax {jax.__version__}, {os.cpu_count()} cores; quantizing the bfloat16 state in memory: {requantize:.2f} s")
    for row in rows:
        print(
            f"{row['weights']:9} {row['source']:7} {row['megabytes']:7.0f} MB  save {row['save']:.2f} s  raw {row['raw']:.2f} s  load {row['load']:.2f} s "
            f"({row['raw'] / row['load']:.0%} of raw)  checked {row['checked']:.2f} s ({row['raw'] / row['checked']:.0%})"
        )
    print(f"bytes of a step, bfloat16 / NVFP4: {rows[0]['megabytes'] / rows[2]['megabytes']:.2f}")
    if options.json:
        options.json.write_text(json.dumps(dict(device=device, requantize=requantize, rows=rows), indent=2) + "\n")


if __name__ == "__main__":
    jnp.zeros(()).block_until_ready()
    main()
