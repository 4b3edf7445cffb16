"""Compiles the Triton kernels for GPUs that are not there, with Triton's own compiler, and says what they use.

    python tests/triton_compile.py SM CASE...      one JSON line a kernel; a process of its own, since it must not interpret
"""

import collections
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp

MATRIX = r"(wgmma\.mma_async\.\S+|mma\.sync\.\S+|tcgen05\.mma\.\S+)"
_DTYPES = {"uint8": "u8", "int32": "i32", "float16": "fp16", "float32": "fp32", "bfloat16": "bf16"}


@dataclasses.dataclass(frozen=True)
class Launch:
    """What `call` was asked for."""

    kernel: object
    signature: tuple[str, ...]
    constants: dict
    warps: int
    stages: int


def launches(sm: int, f, *shapes) -> list[Launch]:
    """The kernels that f launches for arrays of (shape, dtype) on compute capability sm."""
    from nvfp4jax.kernels.triton import call, combine, dense, grouped, quantize

    found = []

    def record(kernel, inputs, sizes, outputs, *, grid, warps, stages=1, constants):
        pointers = ["*" + _DTYPES[jnp.dtype(a.dtype).name] for a in (*inputs, *outputs)]
        signature = (*pointers[:len(inputs)], *["i32"] * len(sizes), *pointers[len(inputs):])
        found.append(Launch(kernel, signature, constants, warps, stages))
        return [jnp.zeros(s.shape, s.dtype) for s in outputs]

    modules, before = (combine, dense, grouped, quantize), (call.call, call.capability)
    call.capability = lambda: sm
    for module in modules:
        module.call = record
    try:
        jax.eval_shape(f, *(jax.ShapeDtypeStruct(*s) for s in shapes))
    finally:
        call.capability = before[1]
        for module in modules:
            module.call = before[0]
    return found


def compile(sm: int, launch: Launch) -> dict:
    """The kernel's name and constants, registers, spilled bytes, shared memory, matrix instructions, PTX and machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = launch.kernel.arg_names
    signature = dict(zip(names, launch.signature)) | dict.fromkeys(launch.constants, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(launch.signature) if kind.startswith("*")}
    source = ASTSource(launch.kernel, signature=signature, constexprs=launch.constants, attrs=aligned)
    options = dict(num_warps=launch.warps, num_stages=launch.stages, enable_fp_fusion=False)
    compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    tools = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        run = lambda *command: subprocess.run(command, capture_output=True, text=True, check=True).stdout
        usage = re.search(r"REG:(\d+) STACK:(\d+) \S+ LOCAL:(\d+)", run(f"{tools}/cuobjdump", "-res-usage", file.name))
        sass = run(f"{tools}/nvdisasm", "-c", file.name)
    ptx = compiled.asm["ptx"]
    return dict(kernel=launch.kernel.__name__, sm=sm, constants=launch.constants, registers=int(usage[1]),
                spills=len(re.findall(r"\b(?:LDL|STL)\b", sass)), local=int(usage[3]), shared=compiled.metadata.shared,
                matrix=dict(collections.Counter(re.findall(MATRIX, ptx))), ptx=ptx, sass=sass,
                instructions=len(re.findall(r"/\*[0-9a-f]{4,}\*/\s", sass)))


def _weight(n, k, lead=()):
    return ((*lead, n, k // 2), jnp.uint8), ((*lead, n, k // 16), jnp.float8_e4m3fn), (lead, jnp.float32)


def _case(name: str):
    """A function and its (shape, dtype)s, by a name like "dense-16-33792-8192"."""
    from nvfp4jax.kernels.triton import combine, dense, grouped, quantize

    kind, *sizes = name.split("-")
    sizes = [int(s) if s.isdigit() else s for s in sizes]
    scalar, bf16 = ((), jnp.float32), jnp.bfloat16
    if kind == "dense":
        m, n, k = sizes
        return dense.matmul, ((m, k), jnp.float16), ((m, 1), jnp.float32), *_weight(n, k)
    if kind == "gated":
        m, e, n, k = sizes
        return (grouped.gate_up, ((m, k), jnp.float16), ((m, 1), jnp.float32),
                ((e, 2, n, k // 2), jnp.uint8), ((e, 2, n, k // 16), jnp.float8_e4m3fn), ((e,), jnp.float32), ((e,), jnp.int32))
    if kind == "grouped":
        m, e, n, k = sizes
        return grouped.matmul, ((m, k), jnp.float16), ((m, 1), jnp.float32), *_weight(n, k, (e,)), ((e,), jnp.int32)
    if kind == "combine":
        t, k, h = sizes
        return (lambda rows, slots, weights: combine.combine(rows, slots, weights, out_dtype=bf16), ((t * k, h), bf16),
                ((t, k), jnp.int32), ((t, k), jnp.float32))
    if kind == "weight":
        return quantize.quantize_weight, (tuple(sizes), bf16)
    m, k, scaling, four_over_six = sizes
    options = dict(scaling=None if scaling == "none" else scaling, four_over_six=None if four_over_six == "none" else four_over_six)
    x = ((m, k), bf16)
    if kind == "quantize":
        return (lambda x: quantize.quantize(x, **options)), x
    if kind == "operand":
        return (lambda x: quantize.operand(x, **options)), x
    if kind == "plain":
        return quantize.plain, x
    if kind == "norm":
        return (lambda x, w: quantize.operand(x, w, eps=1e-6, **options)), x, ((k,), bf16)
    if kind == "silu":
        return (lambda x, up: quantize.operand(x, up, **options)), x, x
    raise ValueError(f"no case {name!r}: {kind} is unknown ({scalar})")


def main(sm: str, *names: str) -> None:
    for name in names:
        f, *shapes = _case(name)
        for launch in launches(int(sm), f, *shapes):
            report = compile(int(sm), launch)
            report["opcodes"] = dict(collections.Counter(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)", report.pop("sass"))))
            report["f16x2"] = report.pop("ptx").count("mul.rn.f16x2")
            print(json.dumps(dict(case=name, **report)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
