"""The internals of jax and Mosaic GPU that our kernels lean on. An upgrade of jax touches this file alone.

A kernel is Pallas (barriers, TMA copies, loops) with stretches of one thread's code in between. `inline` runs such a stretch: a
Python function of `Register`s, once in each thread, where `asm` writes PTX and operators do integer arithmetic:

    def program(tid_word, out):                   # an i32 a thread, a ref in global memory
        lane = thread_index() % 32
        asm("st.global.b32 [$0],$1;", [gmem_address(out, lane * 4), tid_word + 1], "")

    inline(program, words, Memory(out))
"""
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf, vector

# How an array of Pallas lies over the 128 threads of a warpgroup.
SPLAT = plgpu.Layout.WG_SPLAT  # one value, known to all
PER_THREAD = plgpu.Layout.WG_STRIDED((128,), vec_size=1)  # i32 [128]: one a thread, computed before the data arrive
WGMMA = plgpu.Layout.WGMMA  # f32 [64, columns]: the accumulator of wgmma


# --- registers ------------------------------------------------------------------------------------------------------

def _int(bits):
    return ir.IntegerType.get_signless(bits)


def _integers(op):
    """A method of two integer registers, or a register and an int."""
    return lambda a, b: Register(op(a.value, a._like(b)))


def _compared(predicate):
    return lambda a, b: Register(arith.extui(_int(32), arith.cmpi(predicate, a.value, a._like(b))))


@dataclasses.dataclass(frozen=True, eq=False)
class Register:
    """A value of each thread: i32 (unsigned in all arithmetic), an i64 address, or f32 (which only multiplies).

    A comparison gives an i32, 1 or 0. The other operand may be an int; an i64 address also takes an i32 register.
    """

    value: ir.Value

    def _like(self, other):
        """`other` as a value of this register's type."""
        if not isinstance(other, Register):
            return arith.constant(self.value.type, int(other))
        if other.value.type == self.value.type:
            return other.value
        return arith.extui(self.value.type, other.value)

    def __mul__(self, other):
        return Register((arith.muli if isinstance(self.value.type, ir.IntegerType) else arith.mulf)(self.value, self._like(other)))

    __add__, __sub__ = _integers(arith.addi), _integers(arith.subi)
    __floordiv__, __mod__ = _integers(arith.divui), _integers(arith.remui)
    __and__, __xor__, __rshift__ = _integers(arith.andi), _integers(arith.xori), _integers(arith.shrui)
    __lt__, __le__ = _compared(arith.CmpIPredicate.ult), _compared(arith.CmpIPredicate.ule)
    __gt__, __ge__ = _compared(arith.CmpIPredicate.ugt), _compared(arith.CmpIPredicate.uge)
    __eq__, __ne__ = _compared(arith.CmpIPredicate.eq), _compared(arith.CmpIPredicate.ne)

    def __rsub__(self, other):
        return Register(self._like(other)) - self

    def __bool__(self):
        raise TypeError("a register's value is not known while the kernel is built; use select or branch")


def i32(value: int) -> Register:
    return Register(arith.constant(_int(32), int(value)))


def _i32(value):
    return value if isinstance(value, Register) else i32(value)


def minimum(a: Register, b) -> Register:
    """Of unsigned numbers."""
    return Register(arith.minui(a.value, a._like(b)))


def signed_less(a: Register, b) -> Register:
    return Register(arith.extui(_int(32), arith.cmpi(arith.CmpIPredicate.slt, a.value, a._like(b))))


def _nonzero(condition):
    return arith.cmpi(arith.CmpIPredicate.ne, condition.value, arith.constant(_int(32), 0))


def select(condition: Register, a, b) -> Register:
    """a where the i32 condition is not zero, else b; i32 registers or ints."""
    return Register(arith.select(_nonzero(condition), _i32(a).value, _i32(b).value))


def bits_of(value: Register) -> Register:
    """f32 -> i32."""
    return Register(arith.bitcast(_int(32), value.value))


def float_of(bits: Register) -> Register:
    """i32 -> f32."""
    return Register(arith.bitcast(ir.F32Type.get(), bits.value))


def halves(value: Register) -> list[Register]:
    """i32 -> its low and its high 16 bits."""
    return [Register(arith.trunci(_int(16), v.value)) for v in (value, value >> 16)]


def wide(value: Register) -> Register:
    """i32 -> i64, unsigned."""
    return Register(arith.extui(_int(64), value.value))


def with_bits(value: Register, bits: int) -> Register:
    """The bits of a constant set in an i64."""
    return Register(llvm.or_(value.value, arith.constant(_int(64), bits)))


def bits(value: Register) -> int:
    """How wide an integer register is."""
    return ir.IntegerType(value.value.type).width


def asm(text: str, args: Sequence[Register] = (), outputs: str = "r", *, effects: bool = True, in_place: int = 0):
    """Inline PTX. outputs: one letter a result, r (i32), f (f32) or h (i16). -> a register, a list of registers, or None.

    effects: keeps its place and is never removed; pure computation says False, so that it can be moved and shared.
    in_place: so many of the arguments, the first, are in the registers of the first results.
    """
    kinds = {"r": _int(32), "f": ir.F32Type.get(), "h": _int(16)}
    letters = {str(_int(32)): "r", "i16": "h", "i64": "l", "f32": "f"}
    values = [a.value for a in args]
    given = [str(i) if i < in_place else letters[str(v.type)] for i, v in enumerate(values)]
    constraints = ",".join(["=" + o for o in outputs] + given)
    results = [kinds[o] for o in outputs]
    result = (ir.Type.parse("!llvm.void") if not results else results[0] if len(results) == 1 else
              llvm.StructType.get_literal(results))
    out = llvm.inline_asm(result, values, text, constraints, has_side_effects=effects)
    if len(results) < 2:
        return Register(out) if results else None
    return [Register(llvm.extractvalue(kind, out, [i])) for i, kind in enumerate(results)]


# --- memory ---------------------------------------------------------------------------------------------------------

def smem_address(ref, offset=0) -> Register:
    """i32 shared memory address of a ref, plus bytes."""
    return Register(llvm.ptrtoint(_int(32), utils.memref_ptr(ref))) + offset


def gmem_address(ref, offset: Register | None = None) -> Register:
    """i64 address of a ref in global memory, plus an i32 register of bytes, unsigned."""
    base = Register(llvm.ptrtoint(_int(64), utils.memref_ptr(ref)))
    return base if offset is None else base + offset


def gmem_element(ref, row, width: int, column, itemsize: int) -> Register:
    """i64 address of element (row, column) of a row-major [.., width] array in global memory: 64-bit throughout."""
    row, column = (arith.extsi(_int(64), _i32(v).value) for v in (row, column))
    row, column = (arith.muli(v, arith.constant(_int(64), s)) for v, s in ((row, width * itemsize), (column, itemsize)))
    return Register(llvm.add(gmem_address(ref).value, arith.addi(row, column), overflow_flags=llvm.IntegerOverflowFlags.none))


def load_shared(address: Register, offset: int, n: int) -> list[Register]:
    """n i32 words (1, 2 or 4, aligned to their size) of shared memory at an i32 address plus a constant of bytes."""
    pointer = llvm.PointerType.get(3)
    p = llvm.getelementptr(pointer, llvm.inttoptr(pointer, address.value), [], [int(offset)], _int(8), llvm.GEPNoWrapFlags.none)
    words = llvm.load(ir.VectorType.get((n,), _int(32)), p, alignment=4 * n)
    return [Register(vector.extract(words, [], [i])) for i in range(n)]


# --- one thread's code inside a kernel ------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Memory:
    """A ref as an argument of `inline`; transforms: as it was declared with."""

    ref: Any
    transforms: tuple = ()


def _layout(argument):
    if isinstance(argument, Memory):
        return plgpu.RefType(argument.transforms)
    return (SPLAT, PER_THREAD, WGMMA)[jnp.ndim(argument)]


class _Element(Register):
    """An element of a vector, extracted where it is first used."""

    def __init__(self, vector_value, index):
        object.__setattr__(self, "source", (vector_value, index))

    @functools.cached_property
    def value(self):
        vector_value, index = self.source
        return vector.extract(vector_value, [], [index])


def settled(registers) -> list[Register]:
    """The same, arguments of the program of `inline` among them, as values of this place. The machine code depends on it: LLVM visits
    sums in the order of their terms' definitions."""
    for register in registers:
        _ = register.value
    return list(registers)


def _registers(argument, value):
    """What the program of `inline` gets for an argument."""
    if isinstance(argument, Memory):
        return value
    if jnp.ndim(argument) == 0:
        return Register(value.registers.item())
    if jnp.ndim(argument) == 1:
        return _Element(value.registers.flat[0], 0)
    pairs = value.registers.reshape(-1, 2)
    out = np.empty((*pairs.shape, 2), object)
    for (j, h), pair in np.ndenumerate(pairs):
        out[j, h] = [_Element(pair, e) for e in range(2)]
    return out


def _scalar(register):
    return fa.FragmentedArray.splat(register.value, (), is_signed=True if isinstance(register.value.type, ir.IntegerType) else None)


def _per_thread(register):
    registers = np.array([vector.broadcast(ir.VectorType.get((1,), _int(32)), register.value)], dtype=object)
    return fa.FragmentedArray(_registers=registers, _layout=PER_THREAD.to_mgpu(), _is_signed=True)


def _accumulator(registers, shape):
    pairs = np.empty((shape[1] // 8, 2), object)
    for at in np.ndindex(pairs.shape):
        pairs[at] = llvm.mlir_undef(ir.VectorType.get((2,), ir.F32Type.get()))
        for e, register in enumerate(registers[at]):
            pairs[at] = vector.insert(register.value, pairs[at], [], [e])
    pairs = pairs.reshape(fa.WGMMA_LAYOUT.registers_shape(shape))
    return fa.FragmentedArray(_registers=pairs, _layout=fa.WGMMA_LAYOUT, _is_signed=None)


def inline(program: Callable, *arguments, returns: int | str | tuple[int, int] | list | None = None):
    """Runs program(*arguments) once in each thread of a warpgroup.

    arguments: Memory (the program gets a ref, for `smem_address` and `gmem_address`), or arrays of Pallas, whose rank says how they
    lie over the threads: [] i32 or f32 (a Register), [128] i32 (each thread's own Register), f32 [64, columns] in WGMMA (the
    accumulator: an array of Registers [columns / 8, 2, 2], of which [j, h, e] is row r + 8 h, column 8 j + 2 quad + e).
    returns: what the program returns: None; n: n i32 Registers, as a tuple of i32 [128]; "scalar": an i32 Register; the shape (64,
    columns) of an accumulator; or a list of shapes of accumulators, then of i32 Registers one by one, each named "each".
    """
    kinds = {"scalar": plgpu.ShapeDtypeStruct((), jnp.int32, layout=SPLAT),
             "each": plgpu.ShapeDtypeStruct((128,), jnp.int32, layout=PER_THREAD)}

    def kind_of(returns):
        return plgpu.ShapeDtypeStruct(returns, jnp.float32, layout=WGMMA) if isinstance(returns, tuple) else kinds.get(returns, ())

    if isinstance(returns, int):
        kind = (kinds["each"],) * returns
    else:
        kind = tuple(map(kind_of, returns)) if isinstance(returns, list) else kind_of(returns)

    @plgpu.inline_mgpu(arg_types=tuple(map(_layout, arguments)), return_type=kind)
    def run(_, *values):
        out = program(*map(_registers, arguments, values))
        if isinstance(returns, int):
            return tuple(map(_per_thread, out))
        if isinstance(returns, tuple):
            return _accumulator(out, returns)
        if isinstance(returns, list):
            return tuple(_per_thread(o) if r == "each" else _accumulator(o, r) for o, r in zip(out, returns, strict=True))
        return _scalar(out) if returns else None

    return run(*(a.ref if isinstance(a, Memory) else a for a in arguments))


def zero_accumulator(columns: int) -> jax.Array:
    """In Pallas: f32 [64, columns] of zeros, in the registers of a warpgroup."""
    return plgpu.layout_cast(jnp.zeros((64, columns), jnp.float32), WGMMA)


# --- control flow of one thread -------------------------------------------------------------------------------------

def thread_index() -> Register:
    """i32 index of this thread in its CTA."""
    return Register(utils.thread_idx())


def warpgroup_barrier() -> None:
    """Waits for the other threads of the warpgroup, and for what they wrote to shared memory."""
    utils.warpgroup_barrier()


def loop(start, stop, step, carry: Sequence[Register], body: Callable) -> list[Register]:
    """for i in range(start, stop, step): carry = body(i, *carry); i32 throughout. -> the last carry."""
    op = scf.ForOp(*(_i32(v).value for v in (start, stop, step)), [c.value for c in carry])
    with ir.InsertionPoint(op.body):
        scf.yield_([c.value for c in body(Register(op.induction_variable), *map(Register, op.inner_iter_args))])
    return [Register(v) for v in op.results]


def while_loop(carry: Sequence[Register], condition: Callable, body: Callable) -> list[Register]:
    """while condition(*carry): carry = body(*carry); i32 throughout, the condition an i32 that is not zero. -> the last carry."""
    types = [_int(32)] * len(carry)
    op = scf.WhileOp(types, [c.value for c in carry])
    before, after = (region.blocks.append(*types) for region in (op.before, op.after))
    with ir.InsertionPoint(before):
        values = list(before.arguments)
        scf.condition(_nonzero(condition(*map(Register, values))), values)
    with ir.InsertionPoint(after):
        scf.yield_([c.value for c in body(*map(Register, after.arguments))])
    return [Register(v) for v in op.results]


def branch(condition: Register, body: Callable[[], None]) -> None:
    """body() where the i32 condition is not zero."""
    op = scf.IfOp(_nonzero(condition))
    with ir.InsertionPoint(op.then_block):
        body()
        scf.yield_([])


def branch_values(condition: Register, body: Callable[[], Sequence[Register]], otherwise: Sequence[Register]) -> list[Register]:
    """body() where the i32 condition is not zero, else `otherwise`, registers of the same types."""
    op = scf.IfOp(_nonzero(condition), [v.value.type for v in otherwise], has_else=True)
    for block, values in ((op.then_block, body), (op.else_block, lambda: otherwise)):
        with ir.InsertionPoint(block):
            scf.yield_([v.value for v in values()])
    return [Register(v) for v in op.results]
