"""How fast are the grouped FP4 matmuls of experts, and against which bf16 grouped matmul?

    python benchmarks/bench_grouped.py [--only even skewed prefill models] [--json FILE]

Kernel time (CUPTI), medians, weights beyond the L2 (batch 1: other experts each launch). Peers, where they can be had:
`jax.lax.ragged_dot` bf16, tokamax's Mosaic ragged_dot bf16, torch's grouped_mm bf16 (in a process of its own, as CUDA
graphs). They do gate+up without the SiLU. Floor: bytes over the measured copy bandwidth or operations over the
measured bf16 rate.
"""
import argparse
import json
import multiprocessing
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np

EXPERTS, TOP = 128, 8
QWEN3_30B = {"gate+up": (768, 2048), "down": (2048, 768)}
# name: (experts, top, {product: (N, K)})
MODELS = {
    "Qwen3-235B-A22B": (128, 8, {"gate+up": (1536, 4096), "down": (4096, 1536)}),
    "DeepSeek-V3": (256, 8, {"gate+up": (2048, 7168), "down": (7168, 2048)}),
    "Mixtral-8x7B": (8, 2, {"gate+up": (14336, 4096), "down": (4096, 14336)}),
}
# Copy bandwidth (read + written) and bf16 matmul rate, measured.
CEILINGS = {"NVIDIA H200": (4.3e12, 790e12), "NVIDIA H100 80GB HBM3": (3.0e12, 790e12)}


def routing(rng, kind, tokens, experts, top):
    """Rows of each expert. kind: "even" (each token draws `top` experts), or how many experts get all rows."""
    if kind == "even":
        chosen = np.stack([rng.choice(experts, top, replace=False) for _ in range(tokens)])
        return np.bincount(chosen.ravel(), minlength=experts)
    if kind == "zipf":  # expert e with probability ~ 1 / (e + 1)
        p = 1 / np.arange(1, experts + 1)
        return rng.multinomial(tokens * top, p / p.sum())
    chosen = rng.choice(experts, kind, replace=False)
    return np.bincount(chosen[np.arange(tokens * top) % kind], minlength=experts)


def cases(rng, only):
    """(table, kind, batch, product, N, K, experts, routings)"""
    def case(table, kind, batch, product, n, k, experts=EXPERTS, top=TOP):
        repeats = 12 if batch * top <= 64 and kind == "even" else 1
        sizes = [routing(rng, kind, batch, experts, top) for _ in range(repeats)]
        return table, kind, batch, product, n, k, experts, sizes

    out = []
    for product, (n, k) in QWEN3_30B.items():
        out += [case("even", "even", b, product, n, k) for b in (1, 16, 64, 256, 1024)]
        out += [case("skewed", kind, b, product, n, k) for kind in (1, 2, 8, "zipf") for b in (16, 64, 256, 1024)]
        out += [case("prefill", kind, 8192, product, n, k) for kind in ("even", "zipf", 8)]
    for name, (experts, top, products) in MODELS.items():
        for product, (n, k) in products.items():
            out += [case(f"models {name}", "even", b, product, n, k, experts, top) for b in (1, 64, 512)]
    return [c for c in out if c[0].split()[0] in only]


def columns_of(product, n):
    """Output channels of a product before any SiLU: gate and up are beside one another."""
    return 2 * n if product == "gate+up" else n


def torch_times(todo, queue):
    """us of torch's bf16 grouped matmul, by case; a CUDA graph of launches over the case's routings."""
    try:
        import torch
        grouped_mm = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm
        weights, out = {}, []
        for _, _, batch, product, n, k, experts, sizes in todo:
            columns = columns_of(product, n)
            if (experts, columns, k) not in weights:
                weights.clear()
                weights[experts, columns, k] = torch.randn(experts, columns, k, device="cuda", dtype=torch.bfloat16)
            w = weights[experts, columns, k].transpose(1, 2)
            x = torch.randn(int(sizes[0].sum()), k, device="cuda", dtype=torch.bfloat16)
            offsets = [torch.tensor(np.cumsum(s), device="cuda", dtype=torch.int32) for s in sizes]
            launches = [offsets[i % len(offsets)] for i in range(12 if batch < 8192 else 3)]
            for o in offsets:
                grouped_mm(x, w, offs=o)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for o in launches:
                    grouped_mm(x, w, offs=o)
            times = []
            for _ in range(4):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                graph.replay()
                end.record()
                end.synchronize()
                times.append(start.elapsed_time(end) * 1e3 / len(launches))
            out.append(float(np.median(times[1:])))
            del graph
        queue.put(out)
    except Exception as error:  # a peer that does not run is reported, and the table goes on without it
        queue.put(f"torch: {type(error).__name__}: {error}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=["even", "skewed", "prefill", "models"])
    parser.add_argument("--json")
    parser.add_argument("--no-peers", action="store_true")
    arguments = parser.parse_args()
    seed = int(np.random.SeedSequence().entropy % 2**31)
    rng = np.random.default_rng(seed)
    todo = cases(rng, arguments.only)

    with_torch = None
    if not arguments.no_peers:
        queue = multiprocessing.get_context("spawn").Queue()
        child = multiprocessing.get_context("spawn").Process(target=torch_times, args=([c for c in todo], queue))
        child.start()
        with_torch = queue.get()
        child.join()
        if isinstance(with_torch, str):
            print(with_torch)
            with_torch = None

    import jax
    import jax.numpy as jnp
    from jax import lax
    from jax._src.lib import mosaic_gpu

    from nvfp4jax.kernels.hopper import grouped

    try:
        if arguments.no_peers:
            raise ImportError("not asked for")
        import tokamax
    except Exception as error:
        print("no tokamax:", error)
        tokamax = None
    cupti = mosaic_gpu._mosaic_gpu_ext
    device = jax.devices()[0].device_kind
    bandwidth, rate = CEILINGS.get(device, (np.nan, np.nan))
    print(device, "jax", jax.__version__, "seed", seed)

    def kernel_us(f, argument_sets, launches):
        """Median over launches of the kernel time of a call; its longest kernel, and all of its kernels."""
        jax.block_until_ready([f(*a) for a in argument_sets])
        cupti._cupti_init()
        jax.block_until_ready([f(*argument_sets[i % len(argument_sets)]) for i in range(launches)])
        times = [ms * 1e3 for _, ms in cupti._cupti_get_timings(True)]
        calls = np.array(times).reshape(launches, -1)
        return float(np.median(calls.sum(1))), float(np.median(calls.max(1)))

    keys = iter(jax.random.split(jax.random.key(seed), 4096))
    held, rows = {}, []

    def fp4_weights(gated, experts, n, k):
        lead = (experts, 2, n) if gated else (experts, n)
        packed = jax.random.bits(next(keys), (*lead, k // 2), jnp.uint8)
        scale = jax.random.randint(next(keys), (*lead, k // 16), 0, 120).astype(jnp.uint8)
        return packed, lax.bitcast_convert_type(scale, jnp.float8_e4m3fn), jnp.full(experts, 1e-4, jnp.float32)

    def peer(name, shape, argument_sets, launches):
        try:
            return kernel_us(compiled[name, *shape].result(), argument_sets, launches)[0]
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {str(error)[:200]}")
            return np.nan

    functions = {
        "gate+up": grouped.gate_up, "down": grouped.matmul, "ragged_dot": lax.ragged_dot,
        "tokamax": lambda a, b, g: tokamax.ragged_dot(a, b, g, implementation="mosaic")}

    def compile_for(name, product, experts, n, k, m):
        """The program of ours or of a peer for shapes; nothing else runs while one is measured."""
        array, bf16 = jax.ShapeDtypeStruct, jnp.bfloat16
        columns = columns_of(product, n)
        lead = (experts, 2, n) if product == "gate+up" else (experts, n)
        if name == product:
            operands = (array((m, k), bf16), array((m, 1), jnp.float32), array((*lead, k // 2), jnp.uint8),
                        array((*lead, k // 16), jnp.float8_e4m3fn), array((experts,), jnp.float32))
        else:
            operands = array((m, k), bf16), array((experts, k, columns), bf16)
        return jax.jit(functions[name]).lower(*operands, array((experts,), jnp.int32)).compile()

    def peers_of(experts, columns, k, m):
        if arguments.no_peers or experts * columns * k * 2 >= 2**31:
            return []
        return [*(["ragged_dot"] if m <= 2048 else []), *(["tokamax"] if tokamax else [])]  # beyond, it takes 8 to 60 ms

    wanted = set()
    for *_, product, n, k, experts, sizes in todo:
        shape = product, experts, n, k, int(sizes[0].sum())
        wanted |= {(name, *shape) for name in (product, *peers_of(experts, columns_of(product, n), k, shape[-1]))}
    with ThreadPoolExecutor(12) as pool:
        compiled = {key: pool.submit(compile_for, *key) for key in sorted(wanted)}
    print(f"{'table':22} {'experts':>8} {'batch':>5} {'product':8} {'us':>7} {'of all':>7} {'TB/s':>5} {'TFLOP/s':>7} "
          f"{'floor':>6} {'floor/us':>8} {'ragged':>7} {'tokamax':>7} {'torch':>7} {'best peer/ours':>14}")
    for index, (table, kind, batch, product, n, k, experts, sizes) in enumerate(todo):
        gated, m = product == "gate+up", int(sizes[0].sum())
        if (gated, experts, n, k) not in held:
            held.clear()
            held[gated, experts, n, k] = fp4_weights(gated, experts, n, k)
        weights = held[gated, experts, n, k]
        x = jax.random.normal(next(keys), (m, k), jnp.bfloat16)
        row_scale = jnp.ones((m, 1), jnp.float32)
        groups = [jnp.asarray(s, jnp.int32) for s in sizes]
        launches = 36 if m <= 512 else 20 if m <= 8192 else 7
        shape = product, experts, n, k, m
        total, us = kernel_us(compiled[product, *shape].result(), [(x, row_scale, *weights, g) for g in groups], launches)
        active = float(np.mean([np.count_nonzero(s) for s in sizes]))
        columns = columns_of(product, n)
        moved = active * columns * k * 9 / 16 + m * k * 2 + m * n * 2
        operations = 2 * m * columns * k
        floor = max(moved / bandwidth, operations / rate) * 1e6
        peers = {"ragged_dot": np.nan, "tokamax": np.nan, "torch": with_torch[index] if with_torch else np.nan}
        if names := peers_of(experts, columns, k, m):
            if ("bf16", experts, columns, k) not in held:
                held["bf16", experts, columns, k] = jax.random.normal(next(keys), (experts, k, columns), jnp.bfloat16)
            sets = [(x, held["bf16", experts, columns, k], g) for g in groups]
            for name in names:
                peers[name] = peer(name, shape, sets, 12 if len(sets) > 1 else 5 if m <= 8192 else 3)
        best = np.nanmin(list(peers.values())) if not np.isnan(list(peers.values())).all() else np.nan
        rows.append(dict(table=table, routing=str(kind), batch=batch, product=product, us=us, floor=floor, **peers))
        print(f"{table:22} {kind!s:>8} {batch:5d} {product:8} {us:7.1f} {total:7.1f} {moved / us / 1e6:5.2f} "
              f"{operations / us / 1e6:7.0f} {floor:6.1f} {floor / us:8.2f} "
              + " ".join(f"{v:7.1f}" for v in peers.values()) + f" {best / us:14.2f}", flush=True)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(dict(device=device, jax=jax.__version__, seed=seed, rows=rows), file, indent=1)


if __name__ == "__main__":
    sys.exit(main())
