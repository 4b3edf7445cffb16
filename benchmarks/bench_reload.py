"""How fast do new weights reach a rollout, against reading the same bytes raw, and how many bytes are they?

    python benchmarks/bench_reload.py [--directory DIR] [--layers 2] [--weights bfloat16 NVFP4] [--repeat 3] [--json FILE]

Qwen3-30B-A3B, but for its depth: N of its 48 layers, and N / 48 of its vocabulary, so that embeddings weigh as much in it as in the
whole. Published in bfloat16 and in NVFP4. Before each time the files leave the page cache (posix_fadvise; no root needed), the cases
take turns, and the median is given:

    raw, one thread   each file in turn, whole, into memory of its own (numpy.fromfile), then to the device
    raw, threads      each file in pieces of 16 MiB by 16 threads (pread into one buffer), then to the device
    load              Orbax alone
    checked           `saved_model.restore_state`: metadata compared, every leaf's digest and health
    ready             `Reader.poll`: a step found, checked, quantized where it is bfloat16, its scales compared with the live ones

Percentages are of the faster raw reader. Then a bfloat16 state that lies on the device through `Quantizer`, and the bytes of the
whole model, from shapes alone.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from flax import nnx

import nvfp4jax
from nvfp4jax import models
from nvfp4jax.checkpoint import orbax, saved_model
from nvfp4jax.checkpoint.reload import Quantizer, Reader, publish

CONFIG = dict(
    architectures=["Qwen3MoeForCausalLM"], model_type="qwen3_moe", vocab_size=151936, hidden_size=2048, intermediate_size=6144,
    moe_intermediate_size=768, num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_experts=128,
    num_experts_per_tok=8, norm_topk_prob=True, tie_word_embeddings=False,
)  # fmt: skip
RULES = [nvfp4jax.Rule("lm_head|.*/mlp/gate", skip=True), nvfp4jax.Rule(".*")]
PIECE = 16 << 20


def files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file())


def drop_from_cache(path: Path) -> None:
    for file in files(path):
        with open(file, "rb") as handle:
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_raw(path: Path) -> list[jax.Array]:
    return [jax.device_put(np.fromfile(file, np.uint8)) for file in files(path)]


def read_raw_by_threads(path: Path) -> list[jax.Array]:
    arrays, pieces, handles = [], [], []
    for file in files(path):
        handles.append(os.open(file, os.O_RDONLY))
        arrays.append(np.empty(os.fstat(handles[-1]).st_size, np.uint8))
        pieces += [(handles[-1], arrays[-1][at : at + PIECE], at) for at in range(0, arrays[-1].size, PIECE)]
    with ThreadPoolExecutor(16) as pool:
        read = sum(pool.map(lambda piece: os.preadv(piece[0], [piece[1]], piece[2]), pieces))
    for handle in handles:
        os.close(handle)
    assert read == sum(array.size for array in arrays)
    return [jax.device_put(array) for array in arrays]


def poll(reader: Reader) -> nnx.State:
    assert reader.poll() is not None, reader.failures
    return reader.take().state


def cases(path: Path, model: nnx.Module, live: nnx.Module) -> dict[str, Callable[[], Callable]]:
    """name -> what makes, untimed, the function to be timed."""
    nested = orbax._nested({k: orbax._abstract(v) for k, v in orbax.flatten(nnx.state(model)).items()})

    def ready():
        reader = Reader(path.parent, live)
        return lambda: poll(reader)

    return {
        "raw, one thread": lambda: lambda: read_raw(path),
        "raw, threads": lambda: lambda: read_raw_by_threads(path),
        "load": lambda: lambda: orbax.ocp.load(path, nested),
        "checked": lambda: lambda: saved_model.restore_state(path, model),
        "ready": ready,
    }


def medians(work: dict[str, Callable[[], Callable]], path: Path | None, repeat: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(repeat + 1):  # the first compiles
        for name, prepare in work.items():
            function = prepare()
            if path is not None:
                drop_from_cache(path)
            start = time.perf_counter()
            jax.block_until_ready(function())
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def bytes_of(config: dict) -> dict[str, float]:
    """GB in bfloat16 and in NVFP4, of the layers that are packed and of everything; nothing is allocated."""
    floats = models.build(config)
    packed = nvfp4jax.quantize_model(floats, RULES)
    kept = orbax.flatten(nnx.state(packed))
    sizes = {}
    for name, model in (("bfloat16", floats), ("NVFP4", packed)):
        leaves = {path: leaf.size * leaf.dtype.itemsize for path, leaf in orbax.flatten(nnx.state(model)).items()}
        same = sum(size for path, size in leaves.items() if path in kept and kept[path].dtype == floats.dtypes.dtype)
        sizes[name] = sum(leaves.values()) / 1e9
        sizes[f"{name}, packed layers"] = (sum(leaves.values()) - same) / 1e9
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--directory", type=Path, help="on the disk to be measured; a temporary folder by default")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--weights", nargs="+", choices=("bfloat16", "NVFP4"), default=("bfloat16", "NVFP4"))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    config = CONFIG | dict(num_hidden_layers=options.layers, vocab_size=CONFIG["vocab_size"] * options.layers // 48)
    floats = models.build(config, rngs=nnx.Rngs(0))
    nnx.update(floats, jax.device_put(nnx.state(floats), jax.devices()[0]))
    live = nvfp4jax.quantize_model(floats, RULES)
    device = jax.devices()[0].device_kind
    print(f"{device}, jax {jax.__version__}, {os.cpu_count()} cores, {options.layers} layers", flush=True)
    rows = []
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        for name in options.weights:
            model = floats if name == "bfloat16" else live
            start = time.perf_counter()
            path = publish(Path(folder) / name, 1, model, config)
            row = dict(weights=name, megabytes=sum(file.stat().st_size for file in files(path)) / 1e6, publish=time.perf_counter() - start)
            os.sync()
            row |= medians(cases(path, model, live), path, options.repeat)
            rows.append(row)
            raw = min(row["raw, one thread"], row["raw, threads"])
            print(
                f"{name}: {row['megabytes']:.0f} MB, publish {row['publish']:.2f} s; raw {row['raw, one thread']:.2f} s by one thread, "
                f"{row['raw, threads']:.2f} s by 16 ({row['megabytes'] / raw / 1e3:.2f} GB/s); "
                + ", ".join(f"{kind} {row[kind]:.2f} s ({raw / row[kind]:.0%})" for kind in ("load", "checked", "ready")),
                flush=True,
            )
    requantize = None
    if "bfloat16" in options.weights:
        quantizer = Quantizer(live)
        requantize = medians({"": lambda: lambda: quantizer(floats)}, None, options.repeat)[""]
        print(f"quantizing the bfloat16 state in memory: {requantize:.2f} s")
    whole = bytes_of(CONFIG)
    for what in ("", ", packed layers"):
        a, b = whole[f"bfloat16{what}"], whole[f"NVFP4{what}"]
        print(f"48 layers{what}: {a:.2f} GB in bfloat16, {b:.2f} GB in NVFP4: {a / b:.2f} times fewer bytes")
    if options.json:
        options.json.write_text(json.dumps(dict(device=device, requantize=requantize, rows=rows, bytes=whole), indent=2) + "\n")


if __name__ == "__main__":
    main()
