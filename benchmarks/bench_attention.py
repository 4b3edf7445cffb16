"""How near does attention come to the memory (decode) and to the tensor cores (prefill), and to cuDNN?

    python benchmarks/bench_attention.py [--only decode prefill shared] [--cache-dtype float8_e4m3fn] [--json FILE]       (on a Hopper GPU)

32 query heads, 4 key heads of 128, bf16: Qwen3-30B-A3B. Kernel time by CUPTI, medians, cuDNN by way of
`jax.nn.dot_product_attention` in the same run; caches come from memory (layers take turns, more than the L2 holds). The
floor of decode is the bytes of the slots that are seen, of prefill the operations of the causal half. "shared": decode of rows that begin
alike, against our own decode of rows that hold all their slots, in the column of cuDNN. An FP8 cache's decode has its own bytes for a
floor, scales among them, and our own decode of bfloat16 in that column.
"""
import argparse
import json
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from nvfp4jax import fp8
from nvfp4jax.kernels.hopper import attention

HEADS, GROUP, D = 4, 8, 128
BANDWIDTH, RATE = 4.3e12, 790e12  # of one H200, measured: bytes and bf16 operations a second
L2 = 200e6  # bytes of caches that take turns
DECODE = [(1, 1088, False), (1, 8192, False), (1, 32768, False), (8, 1088, False), (16, 1088, False), (64, 1088, False), (64, 1088, True),
          (256, 1088, False), (256, 1088, True), (1024, 1088, False), (16, 8192, False), (64, 8192, False), (64, 8192, True)]
PREFILL = [(8, 1024), (8, 4096), (1, 16384)]
SHARED = [(64, 16, 1024, 256), (64, 4, 1024, 256), (8, 16, 8192, 256), (1, 1209, 768, 250)]  # shared rows, rows of each, slots shared, own


def kernel_us(f, argument_sets, calls):
    """Median time of a call: the sum of its kernels' times. The argument sets take turns."""
    from jax._src.lib import mosaic_gpu
    cupti = mosaic_gpu._mosaic_gpu_ext
    jax.block_until_ready([f(*a) for a in argument_sets[:2]])
    sets = [argument_sets[i % len(argument_sets)] for i in range(calls)]
    cupti._cupti_init()
    jax.block_until_ready([f(*a) for a in sets])
    times = np.array([ms for _, ms in cupti._cupti_get_timings(True)]) * 1e3
    return float(np.median(times.reshape(len(sets), -1).sum(1)))


def compiled(f, *arguments):
    struct = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype)
    return jax.jit(f).lower(*jax.tree.map(struct, arguments)).compile()


normal = jax.jit(lambda key, shape: jax.random.normal(key, shape, jnp.bfloat16), static_argnums=1)


def cache(seed, layers, rows, capacity):
    return [normal(jax.random.key(seed + i), (layers, rows, HEADS, capacity, D)) for i in range(2)]


def in_fp8(arrays):
    """Codes, scales."""
    cut = [jax.jit(fp8.quantize)(x) for x in arrays]
    return [x.qvalue for x in cut], tuple(x.scale for x in cut)


def cudnn(q, keys, values, lengths=None):
    options = dict(is_causal=True) if lengths is None else dict(key_value_seq_lengths=lengths, query_seq_lengths=jnp.ones_like(lengths))
    return jax.nn.dot_product_attention(q, keys, values, implementation="cudnn", **options)


def transposed(a):
    """cuDNN's layout."""
    return jnp.swapaxes(a, 1, 2)


def decode(case, rng):
    """-> the programs' inputs (built late: they are large), and the row."""
    rows, capacity, ragged = case
    layers = max(1, int(-(-L2 // (rows * HEADS * capacity * D * 4))))
    lengths = jnp.asarray(rng.integers(1, capacity + 1, rows) if ragged else [capacity] * rows, jnp.int32)
    q = normal(jax.random.key(0), (rows, 1, HEADS * GROUP, D))
    struct = jax.ShapeDtypeStruct((layers, rows, HEADS, capacity, D), jnp.bfloat16)
    peer = jax.ShapeDtypeStruct((rows, capacity, HEADS, D), jnp.bfloat16)
    plan = jax.jit(lambda starts: attention.plan(starts, q, struct))(lengths - 1)
    ours = compiled(lambda q, k, v, starts, layer, plan: attention.attention(q, k, v, starts, layer=layer, plan=plan),
                    q, struct, struct, lengths, jnp.int32(0), plan)
    theirs = compiled(cudnn, q, peer, peer, lengths)

    def measure():
        keys, values = cache(1, layers, rows, capacity)
        us = kernel_us(ours, [(q, keys, values, lengths - 1, jnp.int32(i), plan) for i in range(layers)], 36)
        own = min(layers, 40)
        peer_us = kernel_us(theirs, [(q, transposed(keys[i]), transposed(values[i]), lengths) for i in range(own)], 36)
        floor = int(lengths.sum()) * HEADS * D * 4 / BANDWIDTH * 1e6
        return dict(kind="decode", rows=rows, capacity=capacity, ragged=ragged, us=us, cudnn_us=peer_us, floor_us=floor)

    return measure


def decode_fp8(case, rng):
    """Beside it, in the place of cuDNN, the same cache in bfloat16."""
    rows, capacity, ragged = case
    layers = max(1, int(-(-L2 // (rows * HEADS * capacity * D * 2))))
    lengths = jnp.asarray(rng.integers(1, capacity + 1, rows) if ragged else [capacity] * rows, jnp.int32)
    q = normal(jax.random.key(0), (rows, 1, HEADS * GROUP, D))
    struct = lambda dtype, *last: jax.ShapeDtypeStruct((layers, rows, HEADS, capacity, *last), dtype)
    codes, scale, floats = struct(jnp.float8_e4m3fn, D), struct(jnp.float32), struct(jnp.bfloat16, D)
    plan = jax.jit(lambda starts: attention.plan(starts, q, floats))(lengths - 1)

    def attend(q, k, v, starts, layer, plan, scales):
        return attention.attention(q, k, v, starts, layer=layer, plan=plan, scales=scales)

    ours = compiled(attend, q, codes, codes, lengths, jnp.int32(0), plan, (scale, scale))
    theirs = compiled(attend, q, floats, floats, lengths, jnp.int32(0), plan, None)

    def measure():
        arrays = cache(1, layers, rows, capacity)
        cut, scales = in_fp8(arrays)
        peer_us = kernel_us(theirs, [(q, *arrays, lengths - 1, jnp.int32(i), plan, None) for i in range(layers)], 36)
        us = kernel_us(ours, [(q, *cut, lengths - 1, jnp.int32(i), plan, scales) for i in range(layers)], 36)
        floor = int(lengths.sum()) * HEADS * (D + 4) * 2 / BANDWIDTH * 1e6
        return dict(kind="FP8 decode", rows=rows, capacity=capacity, ragged=ragged, us=us, cudnn_us=peer_us, floor_us=floor)

    return measure


def prefill(case, rng):
    rows, tokens = case
    q = normal(jax.random.key(0), (rows, tokens, HEADS * GROUP, D))
    struct, starts = jax.ShapeDtypeStruct((1, rows, HEADS, tokens, D), jnp.bfloat16), jnp.zeros((rows,), jnp.int32)
    peer = jax.ShapeDtypeStruct((rows, tokens, HEADS, D), jnp.bfloat16)
    ours = compiled(lambda q, k, v, starts: attention.attention(q, k, v, starts, layer=0), q, struct, struct, starts)
    theirs = compiled(cudnn, q, peer, peer)

    def measure():
        keys, values = cache(1, 1, rows, tokens)
        us = kernel_us(ours, [(q, keys, values, starts)], 12)
        peer_us = kernel_us(theirs, [(q, transposed(keys[0]), transposed(values[0]))], 12)
        floor = 4 * D * HEADS * GROUP * rows * tokens * (tokens + 1) / 2 / RATE * 1e6
        return dict(kind="prefill", rows=rows, capacity=tokens, ragged=False, us=us, cudnn_us=peer_us, floor_us=floor)

    return measure


def shared(case, rng):
    """Beside it, in the place of cuDNN, rows that hold all their slots."""
    shared_rows, each, slots, own = case
    rows, capacity = shared_rows * each, slots + own
    q = normal(jax.random.key(0), (rows, 1, HEADS * GROUP, D))
    struct = lambda rows, capacity: jax.ShapeDtypeStruct((1, rows, HEADS, capacity, D), jnp.bfloat16)
    starts, of_row = jnp.full((rows,), capacity - 1, jnp.int32), jnp.full((rows,), slots, jnp.int32)
    held = attention.Shared(struct(shared_rows, slots), struct(shared_rows, slots), of_row)
    plan = jax.jit(lambda starts, of_row: attention.plan(starts, q, struct(rows, own), shared=held._replace(slots=of_row)))(starts, of_row)
    whole_plan = jax.jit(lambda starts: attention.plan(starts, q, struct(rows, capacity)))(starts)
    attend = lambda q, k, v, starts, plan, shared: attention.attention(q, k, v, starts, layer=0, plan=plan, shared=shared)
    ours = compiled(attend, q, struct(rows, own), struct(rows, own), starts, plan, held)
    repeated = compiled(attend, q, struct(rows, capacity), struct(rows, capacity), starts, whole_plan, None)

    def measure():
        us = kernel_us(ours, [(q, *cache(1, 1, rows, own), starts, plan, attention.Shared(*cache(3, 1, shared_rows, slots), of_row))], 12)
        peer_us = kernel_us(repeated, [(q, *cache(1, 1, rows, capacity), starts, whole_plan, None)], 12)
        floor = (rows * own + shared_rows * slots) * HEADS * D * 4 / BANDWIDTH * 1e6
        return dict(kind=f"{shared_rows} x {each} rows, shared", rows=rows, capacity=capacity, ragged=False, us=us, cudnn_us=peer_us, floor_us=floor)

    return measure


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=["decode", "prefill"], choices=["decode", "prefill", "shared"])
    parser.add_argument("--cache-dtype", choices=["bfloat16", "float8_e4m3fn"], default="bfloat16", help="of decode's keys and values")
    parser.add_argument("--json", help="write the rows to this file")
    options = parser.parse_args()
    print(jax.devices()[0].device_kind, "jax", jax.__version__)
    rng, rows = np.random.default_rng(), []
    kinds = (decode if options.cache_dtype == "bfloat16" else decode_fp8, "decode", DECODE), (prefill, "prefill", PREFILL), (shared, "shared", SHARED)
    cases = [(f, case) for f, name, all_cases in kinds if name in options.only for case in all_cases]
    with ThreadPoolExecutor(12) as pool:
        measures = list(pool.map(lambda c: c[0](c[1], rng), cases))
    print(f"{'rows x slots':>27} {'floor us':>8} {'us':>8} {'of it':>5} {'cuDNN':>8} {'cuDNN / ours':>12}")
    for measure in measures:
        r = measure()
        rows.append(r)
        name = f"{r['kind']} {r['rows']} x {r['capacity']}" + " ragged" * r["ragged"]
        print(f"{name:>27} {r['floor_us']:8.1f} {r['us']:8.2f} {r['floor_us'] / r['us']:5.2f} {r['cudnn_us']:8.1f} "
              f"{r['cudnn_us'] / r['us']:12.2f}", flush=True)
    if "decode" in options.only:
        starts, q, keys = jnp.full((64,), 1087, jnp.int32), normal(jax.random.key(0), (64, 1, 32, D)), cache(1, 1, 64, 1088)[0]
        us = kernel_us(compiled(lambda s: attention.plan(s, q, keys), starts), [(starts,)], 12)
        print(f"plan of 64 x 1088, once a step for all layers: {us:.1f} us")
        rows.append(dict(kind="plan", rows=64, capacity=1088, us=us))
    if options.json:
        with open(options.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
