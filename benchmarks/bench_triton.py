"""How fast are the Triton kernels on this GPU: dense, grouped, quantize; against cuBLAS, torch's grouped_mm and a copy?

    python benchmarks/bench_triton.py [--only dense grouped quantize] [--json FILE] [--no-torch]

Kernel time by CUPTI (all kernels of a call), medians; weights beyond the L2 (rotated). Ratios are taken within the run. torch's bf16
grouped matmul runs in a process of its own and does gate+up without SwiGLU. "copy" is what XLA's elementwise kernel moves of 1 GiB.
"""

import argparse
import json
import multiprocessing
import os
from concurrent.futures import ThreadPoolExecutor

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_enable_triton_gemm=false"  # bf16 goes to cuBLAS

import numpy as np  # noqa: E402
from bench_grouped import QWEN3_30B, cases, torch_times  # noqa: E402

DENSE = [(n, k, m) for n, k in ((33792, 8192), (14336, 4096), (5120, 2048)) for m in (1, 8, 16, 32, 64, 256, 1024)]
QUANTIZE = [(64, 2048), (8192, 2048), (16384, 8192)]
EXPERTS, TOP, L2 = 128, 8, 64e6


def weight(jax, *shape):
    import jax.numpy as jnp

    *lead, n, k = shape
    codes, scales = jax.random.split(jax.random.key(0))
    packed = jax.random.bits(codes, (*lead, n, k // 2), jnp.uint8)
    scale = jax.random.randint(scales, (*lead, n, k // 16), 40, 80).astype(jnp.uint8)
    return packed, jax.lax.bitcast_convert_type(scale, jnp.float8_e4m3fn), jnp.ones(lead, jnp.float32)


def measure(jobs, calls=24):
    """(key, function, argument sets) each -> {key: us of a call}. All is compiled first, in threads."""
    import jax
    from jax._src.lib import mosaic_gpu

    cupti = mosaic_gpu._mosaic_gpu_ext
    with ThreadPoolExecutor(12) as pool:
        compiled = list(pool.map(lambda job: jax.jit(lambda *a, f=job[1]: f(*a)).lower(*job[2][0]).compile(), jobs))
    found = {}
    for (key, _, sets), f in zip(jobs, compiled):
        sets = [sets[i % len(sets)] for i in range(calls)]
        jax.block_until_ready([f(*a) for a in sets[:4]])
        cupti._cupti_init()
        outs = [f(*a) for a in sets]
        jax.block_until_ready(outs)
        del outs
        times = np.array([ms for _, ms in cupti._cupti_get_timings(True)]) * 1e3
        found[key] = float(np.median(times.reshape(len(sets), -1).sum(1)))
    return found


def dense_rows(jax):
    import jax.numpy as jnp

    from nvfp4jax.kernels.triton import dense

    out = []
    for n, k in dict.fromkeys((n, k) for n, k, _ in DENSE):
        copies = max(1, int(-(-2 * L2 // (n * k * 0.5625))))
        packed, scale, one = jax.jit(lambda copies=copies, n=n, k=k: weight(jax, copies, n, k))()
        fp4 = [(packed[i], scale[i]) for i in range(copies)]
        bf16 = [jax.random.normal(jax.random.key(i), (n, k), jnp.bfloat16) for i in range(max(1, -(-copies // 3)))]
        jobs = []
        for m in (m for nn, kk, m in DENSE if (nn, kk) == (n, k)):
            x, row_scale = jax.random.normal(jax.random.key(2), (m, k), jnp.float16), jnp.ones((m, 1), jnp.float32)
            jobs.append(((m, "fp4"), lambda x, r, p, s: dense.matmul(x, r, p, s, jnp.float32(1)), [(x, row_scale, *w) for w in fp4]))
            jobs.append(((m, "bf16"), lambda x, w: x @ w.T, [(x.astype(jnp.bfloat16), w) for w in bf16]))
        times = measure(jobs)
        for m in sorted({m for m, _ in times}):
            out.append(dict(table="dense", n=n, k=k, m=m, us=times[m, "fp4"], bf16_us=times[m, "bf16"],
                            bytes=n * k * .5625 + 2 * m * (n + k)))
            print(f"{n}x{k} M={m:<5} {times[m, 'fp4']:9.2f} us  cuBLAS bf16 {times[m, 'bf16']:9.2f}  ratio "
                  f"{times[m, 'bf16'] / times[m, 'fp4']:5.2f}  {out[-1]['bytes'] / times[m, 'fp4'] / 1e6:5.2f} TB/s", flush=True)
    return out


def grouped_rows(jax, todo, torch_us):
    import jax.numpy as jnp

    from nvfp4jax.kernels.triton import grouped

    weights = {}
    for product, (n, k) in QWEN3_30B.items():
        lead = (EXPERTS, 2) if product == "gate+up" else (EXPERTS,)
        packed, scale, _ = jax.jit(lambda lead=lead, n=n, k=k: weight(jax, *lead, n, k))()
        weights[product] = packed, scale, jnp.ones(EXPERTS, jnp.float32)
    jobs = []
    for index, (_, _, _, product, _, k, _, sizes) in enumerate(todo):
        m = int(sizes[0].sum())
        f = grouped.gate_up if product == "gate+up" else grouped.matmul
        x, row_scale = jax.random.normal(jax.random.key(2), (m, k), jnp.float16), jnp.ones((m, 1), jnp.float32)
        jobs.append((index, f, [(x, row_scale, *weights[product], jnp.asarray(s, jnp.int32)) for s in sizes]))
    times, out = measure(jobs), []
    for index, (_, _, batch, product, n, k, _, sizes) in enumerate(todo):
        touched = np.mean([(s > 0).sum() for s in sizes]) * n * k * (2 if product == "gate+up" else 1) * .5625
        peer = torch_us[index] if torch_us else None
        out.append(dict(table="grouped", product=product, batch=batch, us=times[index], torch_bf16_us=peer, bytes=touched))
        print(f"{product:8} batch={batch:<5} {times[index]:9.2f} us  torch bf16 {peer or float('nan'):9.2f}  ratio "
              f"{(peer or float('nan')) / times[index]:5.2f}  {touched / times[index] / 1e6:5.2f} TB/s of weights", flush=True)
    return out


def quantize_rows(jax):
    import jax.numpy as jnp

    from nvfp4jax.kernels.triton import quantize as q

    big = jnp.ones((1 << 14, 1 << 15), jnp.bfloat16)
    copied = measure([("copy", lambda x: x + jnp.bfloat16(1), [(big,)])], calls=8)["copy"]
    bandwidth = 2 * big.nbytes / copied
    print(f"copy of 1 GiB: {bandwidth / 1e6:.2f} TB/s")
    jobs, moved = [], {}
    for m, k in QUANTIZE:
        x = jax.random.normal(jax.random.key(m), (m, k), jnp.bfloat16)
        w = jnp.ones(k, jnp.bfloat16)
        for name, f, arguments, size in (
            ("packed token", lambda x: q.quantize(x, scaling="token"), (x,), 2.5625),
            ("packed tensor", lambda x: q.quantize(x, scaling="tensor"), (x,), 2.5625),
            ("operand token", lambda x: q.operand(x, scaling="token"), (x,), 4),
            ("norm + operand token", lambda x, w: q.operand(x, w, eps=1e-6, scaling="token"), (x, w), 4),
            ("SwiGLU + operand token", lambda x: q.operand(x, x, scaling="token"), (x,), 4),
        ):
            jobs.append(((name, m, k), f, [arguments]))
            moved[name, m, k] = size * m * k
    out = []
    for key, us in measure(jobs).items():
        out.append(dict(table="quantize", what=key[0], m=key[1], k=key[2], us=us, of_copy=moved[key] / us / bandwidth))
        print(f"{key[0]:24} {key[1]}x{key[2]:<6} {us:9.2f} us  {moved[key] / us / 1e6:5.2f} TB/s  {out[-1]['of_copy']:5.2f} of copy", flush=True)
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=["dense", "grouped", "quantize"])
    parser.add_argument("--json")
    parser.add_argument("--no-torch", action="store_true")
    options = parser.parse_args()
    todo = [c for c in cases(np.random.default_rng(), ["even"]) if c[2] <= 256]
    torch_us = None
    if "grouped" in options.only and not options.no_torch:
        context = multiprocessing.get_context("spawn")
        queue = context.Queue()
        child = context.Process(target=torch_times, args=(todo, queue))
        child.start()
        torch_us = queue.get()
        child.join()
        if isinstance(torch_us, str):
            print(torch_us)
            torch_us = None
    import jax

    print(jax.devices()[0].device_kind, "jax", jax.__version__, flush=True)
    rows = []
    if "dense" in options.only:
        rows += dense_rows(jax)
    if "grouped" in options.only:
        rows += grouped_rows(jax, todo, torch_us)
    if "quantize" in options.only:
        rows += quantize_rows(jax)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
