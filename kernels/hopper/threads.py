"""Kernels that are one thread's program, and what such programs are written with: loads, stores, sums over a warp.

    def double(refs):                              # a thread's program; refs: by name
        i = thread_index()
        word, = load_global(gmem_element(refs["x"], i, 1, 0, 4), 1, i < 100)
        store_global(gmem_element(refs["out"], i, 1, 0, 4), [word + word], i < 100)

    out, = thread_kernel(double, ["x", "out"], [jax.ShapeDtypeStruct((100,), jnp.int32)], grid=1, warps=4)(x)
"""
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from nvfp4jax.kernels.hopper.mosaic import Memory, Register, asm, inline

LOAD_SHARED, STORE_SHARED = "ld.shared.b32 $0,[$1];", "st.shared.b32 [$0],$1;"


def thread_kernel(program: Callable, names: Sequence[str], out_types: Sequence[jax.ShapeDtypeStruct], *, grid: int, warps: int,
                  cluster: int = 1, shared_words: int = 0, zeroed_words: int = 0) -> Callable:
    """A kernel that is one thread's program.

    program: refs by name -> None; names: of the inputs, the outputs, and "shared" (i32 [shared_words] of the CTA's
    shared memory) where shared_words > 0, and last "zeroed" (i32 [zeroed_words] of global memory that all CTAs share, zero at
    the start of a launch) where zeroed_words > 0. grid: CTAs, in clusters of `cluster`. -> a function of the inputs, a
    tuple of outputs.
    """
    def body(*refs):
        if zeroed_words:
            refs = *refs, pl.get_global(plgpu.SemaphoreType.REGULAR((zeroed_words,)))
        inline(lambda *refs: program(dict(zip(names, refs))), *map(Memory, refs))

    body.__name__ = "_".join(name for name in names if name not in ("shared", "zeroed"))  # what a profile calls the kernel
    axes = dict(grid=(grid // cluster,), grid_names=("cta",))
    if cluster > 1:
        axes |= dict(cluster=(cluster,), cluster_names=("rank",))
    return plgpu.kernel(
        body, out_type=tuple(out_types), scratch_types=(plgpu.SMEM((shared_words,), jnp.int32),) if shared_words else (),
        num_threads=warps // 4, thread_name="wg", compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True), **axes)


def offset_address(address: Register, size: int) -> Register:
    """An i64 address plus a constant number of bytes."""
    return address + int(size)


def load_global(address: Register, words: int, condition: Register, form: str = "b32") -> list[Register]:
    """`words` i32 registers (1, or a multiple of 4) of read-only global memory, zeros where the i32 condition is
    zero."""
    registers = [f"${i}" for i in range(words)]
    zeros = "".join(f"mov.b32 {r},0;" for r in registers)
    loads = f"@p ld.global.nc.{form} $0,[$1];" if words == 1 else "".join(
        f"@p ld.global.nc.v4.b32 {{{','.join(registers[i:i + 4])}}},[${words}+{4 * i}];" for i in range(0, words, 4))
    out = asm(f"{{.reg .pred p; setp.ne.u32 p,${words + 1},0; {zeros} {loads}}}", [address, condition], "r" * words)
    return [out] if words == 1 else out


def _store(space: str, address, values, condition, form):
    """1, 2 or 4 i32 registers, where the i32 condition is not zero."""
    registers = ",".join(f"${i}" for i in range(1, len(values) + 1))
    vector, target = (f".v{len(values)}", f"{{{registers}}}") if len(values) > 1 else ("", registers)
    asm(f"{{.reg .pred p; setp.ne.u32 p,${len(values) + 1},0; @p st.{space}{vector}.{form} [$0],{target};}}",
        [address, *values, condition], "")


def store_global(address: Register, values: Sequence[Register], condition: Register, form: str = "b32") -> None:
    """Stores 1, 2 or 4 i32 registers to global memory where the i32 condition is not zero."""
    _store("global", address, values, condition, form)


def store_shared(address: Register, values: Sequence[Register], condition: Register) -> None:
    """Stores 1, 2 or 4 i32 registers at an i32 shared memory address where the i32 condition is not zero."""
    _store("shared", address, values, condition, "b32")


def warp_scan(value: Register) -> Register:
    """Inclusive sum of an i32 register over the lanes of a warp."""
    for distance in (1, 2, 4, 8, 16):
        value = asm("{.reg .b32 t; .reg .pred q; shfl.sync.up.b32 t|q,$1," + str(distance) + ",0,-1; "
                    "@!q mov.b32 t,0; add.s32 $0,$1,t;}", [value])
    return value


def count_in_warpgroup(condition: Register, barrier: int) -> Register:
    """How many threads of the warpgroup have a non-zero i32 condition. All of them wait here, at hardware barrier
    `barrier`, which must be free."""
    text = f"{{.reg .pred p; setp.ne.u32 p,$1,0; barrier.cta.red.popc.aligned.u32 $0,{barrier},128,p;}}"
    return asm(text, [condition])


def opaque(value):
    """In Pallas: an i32 scalar that the compiler knows nothing of. It bounds a loop that must not be unrolled."""
    return inline(lambda v: asm("mov.u32 $0,$1;", [v], effects=False), jnp.int32(value), returns="scalar")


