"""Is the library right on this GPU, and how fast? Five minutes, then a text to paste into an issue.

    python benchmarks/check_gpu.py

Correctness of every backend that can run on the card, against plain XLA on the CPU and float64, then a short table. On a Hopper GPU
that is Triton's too, where jax-triton is installed, although the library takes Hopper's kernels there.
"""

import importlib.util
import platform
import time
import traceback

import jax
import jax.numpy as jnp
import numpy as np

import nvfp4jax
from nvfp4jax import ops
from nvfp4jax.ops import choice

BF16, F32 = jnp.bfloat16, jnp.float32


def on_cpu(f, *args, **options):
    with jax.default_device(jax.devices("cpu")[0]):
        return jax.tree.map(np.asarray, f(*jax.tree.map(lambda v: jnp.asarray(np.asarray(v)), args), implementation="xla", **options))


def same_bits(got, expected):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected)):
        a, b = np.asarray(a), np.asarray(b)
        if a.shape != b.shape or a.tobytes() != b.tobytes():
            return f"differ in {int((a != b).sum())} of {a.size}" if a.shape == b.shape else f"shapes {a.shape}, {b.shape}"
    return None


def close(got, expected, limit=1e-2):
    error = np.linalg.norm(np.asarray(got, np.float64) - expected) / np.linalg.norm(expected)
    return None if error < limit else f"relative error {error:.1e}"


def checks(backend):
    """(what, a function that gives None or what is wrong)"""
    rng = np.random.default_rng()
    x = jnp.asarray(rng.normal(size=(33, 512)), BF16)
    w = jnp.asarray(rng.normal(size=(192, 512)), BF16)

    def quantize(scaling):
        return same_bits(ops.quantize(x, scaling, implementation=backend), on_cpu(ops.quantize, x, scaling=scaling))

    def weight():
        return same_bits(ops.quantize_weight(w, implementation=backend), on_cpu(ops.quantize_weight, w))

    def transposed():
        ws = [w.T, w.T * 3]
        return same_bits(ops.quantize_transposed(ws, implementation=backend), on_cpu(ops.quantize_transposed, ws))

    def matmul(scaling):
        q = on_cpu(ops.quantize_weight, w)
        expected = on_cpu(ops.matmul, x, q, scaling=scaling, out_dtype=F32)
        got = jax.jit(lambda x, q: ops.matmul(x, q, scaling=scaling, out_dtype=F32, implementation=backend))(x, jax.tree.map(jnp.asarray, q))
        return close(got, expected.astype(np.float64), 1e-5)

    def rows():
        q = ops.quantize_weight(w, implementation=backend)
        f = jax.jit(lambda x: ops.matmul(x, q, scaling="token", implementation=backend))
        return same_bits([f(x[:m])[:1] for m in (1, 8, 17, 33)], [f(x)[:1]] * 4)

    def experts():
        gate_up = on_cpu(ops.quantize_weight, jnp.asarray(rng.normal(size=(8, 256, 512)) / 20, BF16))
        gate_up = nvfp4jax.NVFP4Array(gate_up.packed.reshape(8, 2, 128, -1), gate_up.scale.reshape(8, 2, 128, -1), gate_up.global_scale[..., None])
        down = on_cpu(ops.quantize_weight, jnp.asarray(rng.normal(size=(8, 512, 128)) / 10, BF16))
        ids = jnp.asarray(np.stack([rng.choice(8, 2, replace=False) for _ in range(33)]), jnp.int32)
        weights = jnp.asarray(rng.random((33, 2)), F32)
        got = ops.experts(x, ids, weights, *jax.tree.map(jnp.asarray, (gate_up, down)), implementation=backend)
        # Two roundings of the SwiGLU output apart: an FP4 step here and there.
        return close(got, on_cpu(ops.experts, x, ids, weights, gate_up, down).astype(np.float64), 5e-2)

    def gradient():
        f = lambda x, w, how: ops.matmul(x, w, scaling="token", implementation=how).astype(F32).sum()
        got = jax.grad(f, (0, 1))(x, w, backend)
        expected = on_cpu(lambda x, w, implementation: jax.grad(f, (0, 1))(x, w, implementation), x, w)
        return close(got[0], expected[0].astype(np.float64)) or close(got[1], expected[1].astype(np.float64))

    for scaling in ("token", "tensor", "tensor_pow2"):
        yield f"quantize, {scaling}: bits", lambda scaling=scaling: quantize(scaling)
    yield "quantize_weight: bits", weight
    yield "quantize_transposed: bits", transposed
    for scaling in ("token", "tensor", None):
        yield f"matmul, {scaling}", lambda scaling=scaling: matmul(scaling)
    yield "a row's bits at other batch sizes", rows
    yield "experts", experts
    yield "gradients", gradient


def milliseconds(f, *arguments):
    """Median wall time of a call of a jitted function; for a table of ratios, not of kernels."""
    f = jax.jit(f)
    jax.block_until_ready(f(*arguments))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(10):
            out = f(*arguments)
        jax.block_until_ready(out)
        times.append((time.perf_counter() - start) * 100)
    return float(np.median(times))


def table(backends):
    lines = ["", f"{'N x K':>12} {'M':>5} {'bf16 ms':>9} " + " ".join(f"{b + ' ms':>10}" for b in backends)]
    for n, k in ((14336, 4096), (4096, 4096)):
        bf16 = jax.random.normal(jax.random.key(0), (n, k), BF16)
        w = ops.quantize_weight(bf16)
        for m in (1, 16, 64, 512):
            x = jax.random.normal(jax.random.key(1), (m, k), BF16)
            times = [milliseconds(lambda x, w: x @ w.T, x, bf16)]
            times += [milliseconds(lambda x, w, b=b: ops.matmul(x, w, scaling="token", implementation=b), x, w) for b in backends]
            lines.append(f"{f'{n}x{k}':>12} {m:>5} {times[0]:9.3f} " + " ".join(f"{t:10.3f}" for t in times[1:]))
    return lines


def backends(device):
    """Those taken by default, and Triton's where it could run."""
    default = choice._default_order()
    if device.platform == "gpu" and hasattr(device, "compute_capability") and importlib.util.find_spec("jax_triton") is not None:
        return tuple(dict.fromkeys((*default[:-1], "triton", *default[-1:])))
    return default


def main():
    device = jax.devices()[0]
    lines = [f"{device.device_kind}, compute capability {getattr(device, 'compute_capability', '-')}, jax {jax.__version__}, nvfp4jax "
             f"{getattr(nvfp4jax, '__version__', '')}, python {platform.python_version()}"]
    works = []
    checked = backends(device)
    lines.append(f"backends taken by default: {', '.join(choice._default_order())}; checked: {', '.join(checked)}")
    for backend in checked:
        wrong = 0
        for what, check in checks(backend):
            try:
                problem = check()
            except NotImplementedError as error:
                problem = f"not supported: {error}"
            except Exception as error:  # whatever a new card brings belongs in the report
                traceback.print_exc()
                problem = f"{type(error).__name__}: {str(error)[:200]}"
            wrong += problem is not None
            lines.append(f"  {backend:7} {what:36} {'ok' if problem is None else problem}")
            print(lines[-1], flush=True)
        works += [backend] if not wrong else []
    try:
        lines += table(works)
    except Exception as error:
        lines.append(f"table: {type(error).__name__}: {str(error)[:200]}")
    print("\nPaste this into an issue:\n\n```\n" + "\n".join(lines) + "\n```")


if __name__ == "__main__":
    main()
