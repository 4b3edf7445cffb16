"""How long does a whole rollout, prefill and decode in one program, take to compile for an H200? No GPU needed, but the extra `aot`.

    python benchmarks/bench_compile.py [--geometries qwen3-30b-a3b] [--kinds stacked unrolled] [--layers N] [--batch 8] [--length 1024]

CPU seconds of tracing, lowering and compiling, all kernels in it; no weight is made. The persistent cache saves the third alone.
"""

import argparse
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
import jax
import jax.numpy as jnp
from flax import nnx

sys.path.append(str(Path(__file__).parents[1] / "tests"))
import aot
import bench_rollout

from nvfp4jax.layers import InputAmax
from nvfp4jax.ops import choice
from nvfp4jax.rollout import Controls, Sampling, Settings, decoding


def measured(geometry: str, kind: str, layers: int | None, batch: int, length: int) -> dict[str, float]:
    config = bench_rollout.config_of(geometry, layers)
    model = nnx.eval_shape(lambda: bench_rollout.random_model(config, "token", kind == "stacked"))
    graphdef, params, seen = nnx.split(model, nnx.Not(InputAmax), ...)
    settings = Settings(new_tokens=512, cache_length=length + 512, sampling=Sampling(greedy=False))
    controls = Controls(jnp.float32(1), jnp.float32(1), jnp.zeros((0,), jnp.int32))
    ids, lengths = jax.ShapeDtypeStruct((batch, length), jnp.int32), jax.ShapeDtypeStruct((batch,), jnp.int32)
    args = params, ids, lengths, jax.eval_shape(lambda: jax.random.key(0)), jnp.int32(512), controls
    device, sharding = aot._device("h200")
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args)
    times = [time.process_time()]
    with aot._default_device(device):
        traced = decoding.rollout.trace(graphdef, *args, settings, seen)
        times.append(time.process_time())
        lowered = traced.lower()
        times.append(time.process_time())
        compiled = lowered.compile()
        times.append(time.process_time())
    trace, lower, build = (b - a for a, b in zip(times, times[1:], strict=False))
    used = compiled.memory_analysis()
    return dict(trace=trace, lower=lower, compile=build, sum=times[-1] - times[0], temporary_gb=used.temp_size_in_bytes / 1e9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometries", nargs="+", choices=list(bench_rollout.GEOMETRIES), default=["qwen3-30b-a3b"])
    parser.add_argument("--kinds", nargs="+", choices=["stacked", "unrolled"], default=["stacked", "unrolled"])
    parser.add_argument("--layers", type=int)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024)
    args = parser.parse_args()
    choice._default_order = lambda: ("hopper", "xla")  # the default device is a CPU
    print(f"jax {jax.__version__}; CPU seconds")
    for geometry in args.geometries:
        for kind in args.kinds:
            jax.clear_caches()
            found = measured(geometry, kind, args.layers, args.batch, args.length)
            print(f"{geometry:16} {kind:9}", "  ".join(f"{name} {value:.1f}" for name, value in found.items()), flush=True)


if __name__ == "__main__":
    main()
