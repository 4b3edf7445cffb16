"""How fast is a dense FP4 linear layer, from one token to prefill, against bf16 cuBLAS and XLA's own scaled dot?

    python benchmarks/bench_dense.py [--only large small models] [--json FILE]
    python benchmarks/bench_dense.py --random 40 [--seed 0]     # layers of the field's models at M drawn from 1 to 512; the worst ten

Kernel time by CUPTI, medians; the weights come from memory (rotated among more than the L2 holds). W4A4 and W4A16 are the
same kernel: the operand is bf16 either way. The floor is the larger of bytes over the measured copy bandwidth and
operations over the measured bf16 rate.
"""
import argparse
import json
import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_enable_triton_gemm=false"  # bf16 goes to cuBLAS

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax import lax  # noqa: E402

from nvfp4jax.kernels.hopper import dense as dense_hopper  # noqa: E402
from nvfp4jax.kernels.hopper.decode import permute_k  # noqa: E402

# Copy bandwidth (bytes read plus written a second) and bf16 rate (a second), as measured with large sizes.
CEILINGS = {"NVIDIA H200": (4.3e12, 790e12), "NVIDIA H100 80GB HBM3": (3.0e12, 790e12)}
L2 = 50e6
TABLES = {
    "large": [(33792, 8192, m) for m in (1, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)],
    "small": [(n, k, m) for n, k in ((4096, 2048), (2048, 4096), (5120, 2048), (1024, 2048)) for m in (1, 8, 16, 32, 64, 256)],
    "models": [(n, k, m) for n, k in ((10240, 5120), (5120, 25600), (51200, 5120), (151936, 2048), (7168, 18432), (4096, 14336))
               for m in (1, 16, 64, 256, 2048)],
}

# Of published decoders: hidden size, intermediate sizes, widths of the query and of the key and value heads together.
MODELS = {
    "Qwen3-0.6B": (1024, (3072,), 2048, 1024), "Qwen3-1.7B": (2048, (6144,), 2048, 1024), "Qwen3-4B": (2560, (9728,), 4096, 1024),
    "Qwen3-8B": (4096, (12288,), 4096, 1024), "Qwen3-14B": (5120, (17408,), 5120, 1024), "Qwen3-32B": (5120, (25600,), 8192, 1024),
    "Qwen3-30B-A3B": (2048, (), 4096, 512), "Qwen3-235B-A22B": (4096, (), 8192, 512), "Llama-3.2-1B": (2048, (8192,), 2048, 512),
    "Llama-3.2-3B": (3072, (8192,), 3072, 1024), "Llama-3-8B": (4096, (14336,), 4096, 1024), "Llama-3-70B": (8192, (28672,), 8192, 1024),
    "Mistral-Small": (5120, (32768,), 4096, 1024), "Gemma-2-9B": (3584, (14336,), 4096, 2048), "Gemma-2-27B": (4608, (36864,), 4096, 2048),
    "Phi-4": (5120, (17920,), 5120, 1280), "DeepSeek-V3": (7168, (18432, 2048), 24576, 1536), "SmolLM2-1.7B": (2048, (8192,), 2048, 2048),
}  # fmt: skip


def drawn(count, seed):
    """(N, K, M): a linear layer of a model, M log-uniform."""
    rng, out = np.random.default_rng(seed), []
    while len(out) < count:
        hidden, wide, q, kv = list(MODELS.values())[rng.integers(len(MODELS))]
        layers = [(q, hidden), (kv, hidden), (q + 2 * kv, hidden), (hidden, q), *((i, hidden) for i in wide), *((hidden, i) for i in wide),
                  *((2 * i, hidden) for i in wide)]
        out.append((*layers[rng.integers(len(layers))], int(np.exp(rng.uniform(0, np.log(512))))))
    return out


def kernel_us(f, argument_sets, calls=36):
    """Median time of a call: the sum of its kernels' times. The argument sets take turns."""
    from jax._src.lib import mosaic_gpu
    cupti = mosaic_gpu._mosaic_gpu_ext
    jax.block_until_ready([f(*a) for a in argument_sets[:2]])
    sets = [argument_sets[i % len(argument_sets)] for i in range(max(calls, len(argument_sets)))]
    cupti._cupti_init()
    for a in sets:
        out = f(*a)
    jax.block_until_ready(out)
    times = np.array([ms for _, ms in cupti._cupti_get_timings(True)]) * 1e3
    return float(np.median(times.reshape(len(sets), -1).sum(1)))


def weights(n, k, copies):
    """FP4 weights with their global scale, and as many bytes of bf16 weights."""
    def one(key):
        codes, scales = jax.random.split(key)
        return (jax.random.bits(codes, (n, k // 2), jnp.uint8),
                lax.bitcast_convert_type(jax.random.randint(scales, (n, k // 16), 1, 120).astype(jnp.uint8), jnp.float8_e4m3fn))

    make = jax.jit(one)
    fp4 = [make(key) for key in jax.random.split(jax.random.key(0), copies)]
    dense = jax.jit(lambda key: jax.random.normal(key, (n, k), jnp.bfloat16))
    return fp4, [dense(key) for key in jax.random.split(jax.random.key(1), max(1, -(-copies // 3)))]


def scaled_dot(x, packed, scale):
    codes = lax.bitcast_convert_type(packed, jnp.float4_e2m1fn).reshape(packed.shape[0], -1)
    return lax.scaled_dot(x, codes.T, rhs_scale=scale.T, preferred_element_type=jnp.bfloat16)


def fp4_matmul(x, packed, scale, row_scale, global_scale, plan=None):
    return dense_hopper._matmul(x, row_scale, packed, scale, global_scale, None, jnp.bfloat16, None, plan)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(TABLES), choices=list(TABLES))
    parser.add_argument("--random", type=int, metavar="COUNT", help="so many layers drawn at random, in place of the tables")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="write the rows to this file")
    parser.add_argument("--no-scaled-dot", action="store_true", help="leave the slow peer out")
    options = parser.parse_args()
    kind = jax.devices()[0].device_kind
    bandwidth, rate = CEILINGS[kind]
    print(kind, "jax", jax.__version__)
    rows, one = [], jnp.float32(1)
    tables = TABLES if options.random is None else {"random": drawn(options.random, options.seed)}
    for table in options.only if options.random is None else tables:
        print(f"{'N x K':>13} {'M':>5} {'us':>8} {'MB':>7} {'TB/s':>5} {'floor':>7} {'of it':>5} "
              f"{'cuBLAS':>8} {'ratio':>6} {'scaled_dot':>10}  schedule", flush=True)
        shape = None
        for n, k, m in tables[table]:
            if shape != (n, k):
                shape, fp4, bf16 = (n, k), None, None  # frees the last shape's first
                fp4, bf16 = weights(n, k, max(1, int(-(-3 * L2 // (n * k * 0.5625)))))
            x = jax.random.normal(jax.random.key(2), (m, k), jnp.bfloat16)
            ours = kernel_us(jax.jit(fp4_matmul), [(permute_k(x), *w, one, one) for w in fp4])
            cublas = kernel_us(jax.jit(lambda x, w: x @ w.T), [(x, w) for w in bf16])
            peer = None
            if not options.no_scaled_dot and table in ("large", "small") and m in (16, 256):
                peer = kernel_us(jax.jit(scaled_dot), [(x, *w) for w in fp4[:1]], calls=6)
            moved = n * k * 0.5625 + m * k * 2 + m * n * 2
            floor = max(moved / bandwidth, 2 * n * k * m / rate) * 1e6
            make, settings = dense_hopper.plan_of(n, k, m)
            rows.append(dict(table=table, n=n, k=k, m=m, us=ours, bytes=moved, floor_us=floor, cublas_us=cublas,
                             scaled_dot_us=peer, device=kind))
            print(f"{f'{n}x{k}':>13} {m:>5} {ours:8.2f} {moved / 1e6:7.1f} {moved / ours / 1e6:5.2f} {floor:7.2f} {floor / ours:5.2f} "
                  f"{cublas:8.2f} {cublas / ours:6.2f} {'-' if peer is None else f'{peer:.1f}':>10}  "
                  f"{make.__name__.lower()} {settings}", flush=True)
    if options.random is not None:
        print("the worst ten against cuBLAS:")
        for r in sorted(rows, key=lambda r: r["cublas_us"] / r["us"])[:10]:
            print(f"{r['n']}x{r['k']} M={r['m']}: {r['cublas_us'] / r['us']:.2f} of cuBLAS, {r['floor_us'] / r['us']:.2f} of the floor")
        ratios = np.array([r["cublas_us"] / r["us"] for r in rows])
        print(f"{len(rows)} layers: median {np.median(ratios):.2f}, slower than cuBLAS {(ratios < 1).sum()}")
    if options.json:
        with open(options.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
