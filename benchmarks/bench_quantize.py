"""How near do the quantizers, and the routing around experts, come to the copy bandwidth, and how do they compare with XLA?

    python benchmarks/bench_quantize.py [--only TEXT] [--no-xla]       (on a Hopper GPU)

Kernel time by CUPTI (all kernels of a call), medians. Bytes are those that have to move: inputs once, outputs once; two
launches over a large tensor read it twice, which counts against them. From 64 MiB read, "copy" is the time of the fastest of
some copy kernels that moves as many bytes, half of them read, in the same run; below, it is bytes over the bandwidth of 1 GiB.
Tensors under 25 MiB stay in the L2 between runs, as behind their producer.
"""
import argparse
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import profiler

from nvfp4jax import array
from nvfp4jax import routing as plain
from nvfp4jax.backends import xla as xla_backend
from nvfp4jax.kernels.hopper import quantize as q
from nvfp4jax.kernels.hopper import routing
from nvfp4jax.kernels.hopper.decode import permute_k
from nvfp4jax.kernels.hopper.mosaic import asm, gmem_element, i32, thread_index
from nvfp4jax.kernels.hopper.threads import load_global, store_global, thread_kernel
from nvfp4jax.scaling import Request

BF16 = jnp.bfloat16


def microseconds(f, *arguments, iterations=30):
    """Median over calls of the sum of a call's kernel times, and the number of kernels of a call."""
    f = jax.jit(f)
    jax.block_until_ready(f(*arguments))
    _, runs = profiler.measure(f, iterations=iterations, aggregate=False)(*arguments)
    runs = runs[len(runs) // 4:]
    return float(np.median([sum(ms for _, ms in run) for run in runs])) * 1e3, len(runs[0])


def copy(x, vectors, warps):
    """A copy kernel: a thread moves `vectors` times 16 bytes, its CTA a stretch."""
    words = warps * 32 * vectors

    def program(refs):
        first = asm("mov.u32 $0,%ctaid.x;") * words + thread_index()
        at = [first + i * warps * 32 for i in range(vectors)]
        values = [load_global(gmem_element(refs["x"], i, 4, 0, 4), 4, i32(1)) for i in at]
        for i, value in zip(at, values):
            store_global(gmem_element(refs["out"], i, 4, 0, 4), value, i32(1))

    return thread_kernel(program, ["x", "out"], [jax.ShapeDtypeStruct(x.shape, x.dtype)], grid=x.nbytes // 16 // words, warps=warps)(x)[0]


@functools.cache
def copy_time(size):
    """us of the fastest copy that reads size / 2 bytes and writes them."""
    x = jax.random.normal(jax.random.key(0), (round(size / 4 / 65536) * 65536,), BF16)
    copies = [functools.partial(copy, vectors=v, warps=w) for v, w in ((1, 8), (2, 8), (4, 4))]
    return min(microseconds(f, x)[0] for f in (*copies, lambda x: -x)) * size / (2 * x.nbytes)


def request(scaling="tensor", **kw):
    """The arguments of the kernels as a Request."""
    return Request(per_row=scaling == "token", pow2=scaling == "tensor_pow2", **kw)


def xla_operand(x, **kw):
    a = array.quantize(x, request(**kw))
    return permute_k(a.dequantize_blocks(BF16)), a.global_scale


def xla_quantize(x, **kw):
    a = array.quantize(x, request(**kw))
    return a.packed, a.scale, a.global_scale


def rmsnorm(x, w, eps=1e-6):
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + jnp.float32(eps))
    return normed.astype(x.dtype) * w[None]


def silu_mul(gate, up):
    return (jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(gate.dtype)


def cases():
    """(name, kernel, XLA version, input shapes, bytes an element read and written)."""
    packed, operand = 2 + 0.5625, 2 + 2
    for m, k in ((16384, 2048), (65536, 2048), (16384, 7168)):
        for scaling in ("token", "tensor", "tensor_pow2"):
            if scaling == "tensor_pow2" and m > 16384:
                continue
            kw = dict(scaling=scaling)
            yield f"quantize {scaling} {m}x{k}", (lambda x, kw=kw: q.quantize(x, **kw)), (lambda x, kw=kw: xla_quantize(x, **kw)), [(m, k)], packed
            yield f"operand {scaling} {m}x{k}", (lambda x, kw=kw: q.operand(x, **kw)), (lambda x, kw=kw: xla_operand(x, **kw)), [(m, k)], operand
    m, k = 16384, 2048
    amax = jnp.float32(4)
    yield f"quantize given amax {m}x{k}", lambda x: q.quantize(x, amax=amax), lambda x: xla_quantize(x, amax=amax), [(m, k)], packed
    for kind in ("mae", "mse"):
        kw = dict(scaling="token", four_over_six=kind)
        yield f"quantize token 4/6 {kind} {m}x{k}", (lambda x, kw=kw: q.quantize(x, **kw)), (lambda x, kw=kw: xla_quantize(x, **kw)), [(m, k)], packed
    for m, k in ((256, 2048), (1, 2048), (16, 2048), (64, 2048), (1024, 2048), (8192, 2048), (16384, 2048)):
        for scaling in ("token", "tensor"):
            kw = dict(scaling=scaling)
            yield (f"RMSNorm + operand {scaling} {m}x{k}", (lambda x, w, kw=kw: q.rmsnorm_operand(x, w, eps=1e-6, **kw)[1:]),
                   (lambda x, w, kw=kw: xla_operand(rmsnorm(x, w), **kw)), [(m, k), (k,)], operand)
    for m, k in ((8, 768), (512, 768), (2048, 768), (65536, 768)):
        for scaling in ("token", "tensor"):
            kw = dict(scaling=scaling)
            yield (f"SiLU * up + operand {scaling} {m}x{k}", (lambda g, u, kw=kw: q.silu_mul_operand(g, u, **kw)[1:]),
                   (lambda g, u, kw=kw: xla_operand(silu_mul(g, u), **kw)), [(m, k), (m, k)], 6)
    for m, k in ((1, 2048), (64, 2048), (256, 2048), (512, 2048), (1024, 2048)):
        for scaling in ("token", "tensor"):
            kw = dict(scaling=scaling)
            yield f"operand {scaling} {m}x{k}", (lambda x, kw=kw: q.operand(x, **kw)), (lambda x, kw=kw: xla_operand(x, **kw)), [(m, k)], operand


def weight_cases():
    """One layer's experts of Qwen3-30B-A3B; a whole set is 48 of them."""
    for shape in ((128, 1536, 2048), (128, 2048, 768)):
        yield f"requantize {'x'.join(map(str, shape))}", q.quantize_weight, xla_weight, [shape], 2 + 0.5625


def xla_weight(w):
    a = array.quantize_weight(w)
    return a.packed, a.scale, a.global_scale


def routing_cases(experts=128, k=8, hidden=2048):
    """(name, kernel, XLA version, arguments, bytes)."""
    for tokens in (1, 16, 64, 256, 1024, 8192):
        key = jax.random.key(tokens)
        ids = jax.lax.top_k(jax.random.uniform(key, (tokens, experts)), k)[1].astype(jnp.int32)
        route = plain.route(ids, experts)
        yield (f"route {tokens} tokens", lambda i: routing.route(i, experts), lambda i: plain.route(i, experts), [ids], tokens * k * 12)
        rows = jax.random.normal(key, (tokens * k, hidden), BF16)
        weights = jax.random.uniform(key, (tokens, k))
        logits = jax.random.normal(key, (tokens, experts))
        choose = [functools.partial(f, k=k, normalize=True) for f in (routing.top_k_experts, plain.top_k_experts)]
        yield f"choose {k} of {experts} experts, {tokens} tokens", *choose, [logits], tokens * (experts + 2 * k) * 4
        both = [functools.partial(f, tokens=tokens, k=k, normalize=True) for f in (routing.choose_and_route, xla_backend.choose_and_route)]
        yield f"choose and route, {tokens} tokens", *both, [logits[None]], tokens * (experts + 4 * k) * 4
        yield (f"combine {tokens} tokens", routing.combine, plain.combine, [rows, route, weights], tokens * (k + 1) * hidden * 2)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="run the cases whose name holds this text")
    parser.add_argument("--no-xla", action="store_true", help="leave the XLA version out")
    parser.add_argument("--json", help="append one JSON line a case to this file")
    options = parser.parse_args()
    device = jax.devices()[0].device_kind
    bandwidth = (1 << 30) / copy_time(1 << 30)  # bytes a microsecond
    print(f"{device}, jax {jax.__version__}: copy {bandwidth / 1e6:.2f} TB/s")
    print(f"{'case':38} {'MB':>7} {'us':>8} {'launches':>8} {'copy':>7} {'of copy':>8} {'XLA us':>8} {'kernels':>7} {'ratio':>6}")
    def drawn():
        for name, kernel, xla, shapes, element_bytes in (*cases(), *weight_cases()):
            if options.only in name:
                arguments = [jax.random.normal(jax.random.key(i), shape, BF16) for i, shape in enumerate(shapes)]
                yield name, kernel, xla, arguments, arguments[0].size * element_bytes
        yield from (case for case in routing_cases() if options.only in case[0])

    failures = 0
    for name, kernel, xla, arguments, size in drawn():
        try:
            us, launches = microseconds(kernel, *arguments)
            read = sum(a.nbytes for a in jax.tree.leaves(arguments))
            floor = copy_time(size) if read >= 64 << 20 and "route" not in name else size / bandwidth
            row = dict(case=name, device=device, jax=jax.__version__, mb=size / 1e6, us=us, launches=launches, copy_us=floor)
            text = f"{name:38} {size / 1e6:7.1f} {us:8.2f} {launches:8} {floor:7.2f} {floor / us:8.2f}"
            if not options.no_xla:
                row["xla_us"], row["xla_kernels"] = microseconds(xla, *arguments, iterations=10)
                text += f" {row['xla_us']:8.2f} {row['xla_kernels']:7} {row['xla_us'] / us:6.2f}"
            print(text, flush=True)
        except Exception as error:  # a case that fails must not hide the others; it is printed and fails the run below
            failures += 1
            failed = f"{name}: {type(error).__name__}: {str(error)[-300:]}"
            print("FAILED", failed, flush=True)
            row = dict(case=name, error=failed)
        if options.json:
            with open(options.json, "a") as file:
                print(json.dumps(row), file=file)
        del arguments
    if failures:
        raise SystemExit(f"{failures} cases failed")


if __name__ == "__main__":
    main()
