"""What does a whole MoE layer cost above its two matmuls, what does the online scale cost, and how long is a requantization?

    python benchmarks/bench_moe.py [--only layer linear requantize] [--json FILE]

Kernel time by CUPTI, medians, a Qwen3-30B-A3B layer (128 experts, 2048 -> 2x768 -> 2048, top 8), weights beyond the L2; small batches
rotate over inputs that are routed elsewhere. A layer is router, choice of experts, sort, quantize, gate+up with SiLU, quantize, down,
combine. "matmuls" is the time of the two grouped kernels within the same calls.
"""

import argparse
import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import nvfp4jax
from nvfp4jax import ops
from nvfp4jax.array import NVFP4Array

E, H, I, TOP = 128, 2048, 768, 8
BF16 = jnp.bfloat16


def profiles(cases):
    """(key, f, argument sets, calls) each -> (key, kernels, us): of a call of f the kernels, (name, median us) in order, and the
    median of their sum. All calls launch the same kernels. Everything is compiled first, in threads: nothing else runs while one is
    measured."""
    with ThreadPoolExecutor(12) as pool:
        waiting = [(*case, pool.submit(jax.jit(lambda *a, f=case[1]: f(*a)).lower(*case[2][0]).compile)) for case in cases]
        compiled = [(key, future.result(), sets, calls) for key, _, sets, calls, future in waiting]
    for key, f, sets, calls in compiled:
        yield key, *profile(f, sets, calls)


def profile(f, argument_sets, calls):
    from jax._src.lib import mosaic_gpu

    cupti = mosaic_gpu._mosaic_gpu_ext
    jax.block_until_ready([f(*a) for a in argument_sets])
    sets = [argument_sets[i % len(argument_sets)] for i in range(max(calls, len(argument_sets)))]
    cupti._cupti_init()
    for a in sets:
        out = f(*a)
    jax.block_until_ready(out)
    timings = cupti._cupti_get_timings(True)
    names = [name for name, _ in timings]
    each = len(timings) // len(sets)
    times = np.array([ms for _, ms in timings]).reshape(len(sets), each) * 1e3
    return list(zip(names[:each], np.median(times, 0), strict=True)), float(np.median(times.sum(1)))


def random_weight(key, *shape):
    """Random codes and scales of [..., N, K], as an NVFP4Array with one global scale for each leading index."""
    *lead, n, k = shape
    codes, scales = jax.random.split(key)
    packed = jax.random.bits(codes, (*lead, n, k // 2), jnp.uint8)
    scale = lax.bitcast_convert_type(jax.random.randint(scales, (*lead, n, k // 16), 40, 80).astype(jnp.uint8), jnp.float8_e4m3fn)
    return NVFP4Array(packed, scale, jnp.full((*lead[:1], *(1,) * (len(shape) - 1)) if lead else (), 1e-3, jnp.float32))


def layer(x, router, gate_up, down, scaling, scales):
    logits = jnp.dot(x, router, preferred_element_type=jnp.float32)
    weights, ids, route = ops.choose_and_route(logits, TOP, normalize=True)
    mode = tuple(map(nvfp4jax.Static, scales)) if scaling == "static" else scaling
    return nvfp4jax.experts(x, ids, weights, gate_up, down, scaling=mode, route=route)


def bench_layer(rows):
    key = jax.random.key(0)
    gate_up, down = random_weight(key, E, 2, I, H), random_weight(jax.random.key(1), E, H, I)
    router = jax.random.normal(key, (H, E), BF16)
    scales = jnp.float32(0.002), jnp.float32(0.5)
    cases = []
    for batch in (1, 16, 64, 256, 1024, 8192):
        sets = [(jax.random.normal(jax.random.key(i), (batch, H), BF16), router, gate_up, down) for i in range(12 if batch < 16 else 2)]
        for scaling in ("static", "token", "tensor", *(["tensor_pow2"] if batch in (16, 256) else [])):
            f = lambda *a, scaling=scaling: layer(*a, scaling, scales)
            cases.append(((batch, scaling), f, sets, 24 if batch < 8192 else 8))
    print(f"{'layer':24} {'us':>8} {'matmuls':>8} {'ratio':>6} {'/static':>8} {'kernels':>7}")
    static = 0.0
    for (batch, scaling), kernels, us in profiles(cases):
        matmuls = sum(sorted((t for _, t in kernels), reverse=True)[:2])
        static = us if scaling == "static" else static
        tflops = 2 * batch * TOP * 3 * H * I / matmuls / 1e6
        row = dict(batch=batch, scaling=scaling, us=us, matmuls=matmuls, ratio=us / matmuls, over_static=us / static, kernels=len(kernels))
        rows.append(row | dict(table="layer", tflops=tflops))
        extra = f" {tflops:6.0f} TFLOP/s" if batch == 8192 else ""
        print(f"batch {batch:5} {scaling:12} {us:8.1f} {matmuls:8.1f} {us / matmuls:6.2f} {us / static:8.3f} {len(kernels):7}{extra}", flush=True)
        if scaling == "token" and batch in (1, 64, 256, 8192):
            print("   " + "  ".join(f"{name[-22:]} {t:.1f}" for name, t in kernels), flush=True)


def bench_linear(rows):
    cases = []
    for n, k in ((5120, 2048), (33792, 8192)):
        copies = max(2, -(-150_000_000 // (n * k * 9 // 16)))
        weights = [random_weight(jax.random.key(i), n, k) for i in range(copies)]
        for m in (16, 64, 256, 2048):
            sets = [(jax.random.normal(jax.random.key(i), (m, k), BF16), w) for i, w in enumerate(weights)]
            for scaling in ("static", "token", "tensor", None):
                mode = nvfp4jax.Static(jnp.float32(0.002)) if scaling == "static" else scaling
                f = lambda x, w, mode=mode: nvfp4jax.matmul(x, w, scaling=mode)
                cases.append(((n, k, m, scaling), f, sets, 24))
    print(f"{'linear':24} {'us':>8} {'/static':>8} {'kernels':>7}")
    static = 0.0
    for (n, k, m, scaling), kernels, us in profiles(cases):
        static = us if scaling == "static" else static
        rows.append(dict(table="linear", n=n, k=k, m=m, scaling=str(scaling), us=us, over_static=us / static, kernels=len(kernels)))
        print(f"{n}x{k} M={m:5} {scaling!s:11} {us:8.2f} {us / static:8.3f} {len(kernels):7}", flush=True)


def bench_requantize(rows):
    """One layer's experts and attention, times 48; as a checkpoint has them [N, K], and as a trainer does [K, N], gate and up apart."""
    key = jax.random.key(0)
    shapes = [(E, 2 * I, H), (E, H, I), (5120, H), (H, 4096)]
    kept = [jax.random.normal(key, s, BF16) for s in shapes]
    turned = [tuple(jnp.swapaxes(w, -1, -2).copy() for w in (jnp.split(weight, 2, -2) if i == 0 else [weight])) for i, weight in enumerate(kept)]
    # Their source, the floats, transposed or not, would be written out with the result.
    cases = [("[N, K]", lambda w: dataclasses.replace(ops.quantize_weight(w), source=None), [(w,)], 6) for w in kept]
    cases += [("[K, N]", lambda *ws: dataclasses.replace(ops.quantize_transposed(ws), source=None), [ws], 6) for ws in turned]
    measured = list(profiles(cases))
    moved = 48 * sum(w.size * (2 + 0.5625) for w in kept)
    for name in ("[N, K]", "[K, N]"):
        each = [us for key, _, us in measured if key == name]
        total = sum(each) * 48 / 1e3
        rows.append(dict(table="requantize", layout=name, ms=total, us=each, bytes=moved))
        print(f"requantize 48 layers from bf16 {name}: {total:6.1f} ms, {moved / total / 1e9:.2f} TB/s of {moved / 1e9:.1f} GB; us each: "
              + "  ".join(f"{us:.0f}" for us in each), flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="*", default=["layer", "linear", "requantize"])
    parser.add_argument("--json")
    args = parser.parse_args()
    rows = []
    device = jax.devices()[0].device_kind
    print(device)
    for name in args.only:
        {"layer": bench_layer, "linear": bench_linear, "requantize": bench_requantize}[name](rows)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(dict(device=device, jax=jax.__version__, rows=rows), file, indent=1)


if __name__ == "__main__":
    main()
