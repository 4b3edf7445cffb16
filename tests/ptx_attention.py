"""Runs the PTX of the attention kernels on the CPU: `ptx_hopper`, and the asynchronous copies that a thread issues itself.

A copy poisons its target at once and lands when its thread has waited for its group. Powers of two are exact to
float32 here, so that two kernels with one order of sums agree to the bit.
"""
import re

import aot
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import ptx
import ptx_hopper


def run_thread_kernel(program, names, out_types, *, grid, warps, shared_words=0, seed=None):
    """Stands in for `threads.thread_kernel`, one CTA after another, in random order."""
    def call(*inputs):
        inputs = [np.ascontiguousarray(x) for x in inputs]
        types = tuple((x.shape, jnp.dtype(x.dtype)) for x in inputs)
        captured = tuple(cell.cell_contents for cell in program.__closure__ or ())
        text, order = ptx._compiled(program, program.__code__, captured, tuple(names), tuple(out_types), types, grid, warps, 1,
                                    shared_words, 0)
        outputs = [np.frombuffer(b"\xa5" * (int(np.prod(o.shape)) * o.dtype.itemsize), np.dtype(o.dtype)).reshape(o.shape).copy()
                   for o in out_types]
        buffers = dict(zip(names, [*inputs, *outputs]))
        rng = np.random.default_rng(seed)
        instructions, labels = _parse(text)
        flat = [buffers[name] for name in order]
        for cta in rng.permutation(grid):
            _Run(instructions, labels, flat, cta, cta + 1, warps * 32, 1, shared_words * 4, rng, [], 0, {}).run()
        return outputs

    return call


_parsed = {}


def _parse(text):
    if text not in _parsed:
        instructions, labels = ptx.parse(text)
        _parsed[text] = [(*i[:3], ptx_hopper._whole(i[3])) for i in instructions], labels
    return _parsed[text]


class _Run(ptx_hopper._Run):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.copies, self.groups = {}, {}  # of each warp: since the last commit; committed, in order
        self.come = {}  # threads that have arrived at a named barrier and gone on

    def step(self, at, pc):
        if pc >= len(self.instructions):
            return super().step(at, pc)
        predicate, negated, op, operands = self.instructions[pc]
        own = op.startswith(("cp.async.cg", "cp.async.ca", "cp.async.commit", "cp.async.wait", "atom.", "ldmatrix", "bar.arrive"))
        if not own or op.startswith("cp.async.bulk"):
            return super().step(at, pc)
        self.pc[at] = pc + 1
        if predicate is not None:
            at = at[(self.registers[predicate][at] != 0) != negated]
        if not len(at):
            return None
        if op.startswith("atom."):
            return self.atomic_add(operands, at)
        if op.startswith("bar.arrive"):
            barrier = int(self.value(operands[0], at[:1])[0])
            self.come[barrier] = self.come.get(barrier, 0) + len(at)
            return None
        if op.startswith("ldmatrix"):
            return self.load_matrix(op, operands, at)
        for warp in np.unique(self.warp[at]):
            lanes = at[self.warp[at] == warp]
            if op.startswith(("cp.async.cg", "cp.async.ca")):
                self.copy(operands, lanes, warp)
            elif op.startswith("cp.async.commit"):
                self.groups.setdefault(warp, []).append(self.copies.pop(warp, []))
            else:
                left = 0 if "all" in op else int(operands[0])
                waiting = self.groups.get(warp, [])
                for group in waiting[:len(waiting) - left]:
                    for offsets, data in group:
                        self.shared[0][offsets] = data
                self.groups[warp] = waiting[len(waiting) - left:]

    def release(self):
        for barrier, come in self.come.items():
            at = self.waiting == 1 + barrier
            if at.any() and at.sum() + come >= self.wanted[at][0]:
                self.come[barrier] -= self.wanted[at][0] - at.sum()
                self.waiting[at] = 0
        super().release()

    def copy(self, operands, lanes, warp):
        to = (self.address(operands[0], lanes) % np.uint64(1 << 32)).astype(int)
        width = int(operands[2])
        assert (to % width == 0).all() and to.max() + width <= self.shared_size, "cp.async outside shared memory or misaligned"
        size = self.value(operands[3], lanes).astype(int) if len(operands) > 3 else np.full(len(lanes), width)
        assert np.isin(size, (0, width)).all()
        offsets, data = to[:, None] + np.arange(width), np.zeros((len(lanes), width), np.uint8)
        some = np.flatnonzero(size)
        if len(some):
            for memory, where, start in self.memory("cp.async.global", self.address(operands[1], lanes)[some], lanes[some], width):
                data[some[where]] = memory[start[:, None] + np.arange(width)]
        self.shared[0][offsets] = 0xA5
        self.copies.setdefault(warp, []).append((offsets, data))

    def load_matrix(self, op, operands, at):
        self.whole_warps(at, op)
        names = [name.strip() for name in operands[0].strip("{} ").split(",")]
        starts = (self.address(operands[1], at) % np.uint64(1 << 32)).astype(int).reshape(-1, 4, 8)
        assert len(names) == 4 and (starts % 16 == 0).all() and starts.max() + 16 <= self.shared_size
        values = self.shared[0][starts[..., None] + np.arange(16)].view(np.uint16)  # warp, matrix, row, 8
        if ".trans" in op:
            values = values.swapaxes(-1, -2)
        words = np.ascontiguousarray(values).view(np.uint32)
        for i, name in enumerate(names):
            self.write(name, at, words[:, i].reshape(-1))

    def wgmma(self, op, operands, group):
        n = int(re.search(r"m64n(\d+)k16", op)[1])
        sums, left, right, keep, _, _, *transposed = operands
        names = [name.strip() for name in sums.strip("{} ").split(",")]
        if left.startswith("{"):
            a, thread = np.zeros((64, 16)), np.arange(128)
            rows, quad = thread // 32 * 16 + thread % 32 // 4, thread % 4
            for i, name in enumerate(left.strip("{} ").split(",")):
                for e, column in enumerate(self.pairs(name.strip(), group).T):
                    a[rows + 8 * (i % 2), 2 * quad + 8 * (i // 2) + e] = column
        else:
            assert transposed[0] == "0"
            a = self.matrix(left, group, 64, False)
        product = a @ self.matrix(right, group, n, transposed[-1] == "1").T
        keep = self.value(keep, group[:1])[0] != 0
        thread = np.arange(128)
        rows, quad = thread // 32 * 16 + thread % 32 // 4, thread % 4
        for i, name in enumerate(names):
            old = ptx._f(self.value(name, group)).astype(np.float64) if keep else 0.0
            with np.errstate(all="ignore"):
                new = (old + product[rows + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * quad + i % 2]).astype(np.float32)
            self.write(name, group, ptx._u(new))

    def matrix(self, name, group, rows, transposed):
        """[rows, 16] of rows of 128 swizzled bytes: rows of K, or of 64 columns where transposed."""
        descriptor = int(self.value(name, group[:1])[0])
        assert descriptor >> 62 == 1
        start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
        row, k = np.arange(rows)[:, None], np.arange(16)[None]
        if transposed:
            offsets = start + row // 64 * leading + k // 8 * stride + k % 8 * 128 + row % 64 * 2
        else:
            offsets = start + row // 8 * stride + row % 8 * 128 + 2 * k
        offsets = offsets ^ ((offsets >> 7 & 7) << 4)
        raw = self.shared[0][offsets[..., None] + np.arange(2)]
        return raw.view(ml_dtypes.bfloat16)[..., 0].astype(np.float64)

    def single(self, base, parts, v):
        if base in ("ex2", "rcp"):
            x = ptx._f(v(1)).astype(np.float64)
            out = (np.exp2(x) if base == "ex2" else 1 / x).astype(np.float32)
            return ptx._flush(out) if "ftz" in parts else out
        return super().single(base, parts, v)

    def compute(self, op, parts, operands, at):
        if op == "mov.f32" or op == "mov.b32" and re.match(r"0f", operands[1]):
            self.write(operands[0], at, self.value(operands[1], at))
        else:
            super().compute(op, parts, operands, at)


def _cache_maps(*arrays):
    """Pieces of 128 slots, 64 columns at a time."""
    return [ptx_hopper.TensorMap(a.reshape(-1, *a.shape[3:]), (64, 128, 1), 128) for a in arrays]


def _in_turn(*pairs):
    """Keys of all pairs that there are, then values: as a producer first names them."""
    return [pair[i] for i in range(2) for pair in pairs if pair]


def _run_warpgroups(kernel, loaded, stored, maps, grid, seed):
    before, ptx_hopper._Run = ptx_hopper._Run, _Run
    try:
        ptx_hopper.run(kernel.ptx, {"ld.global": loaded, "st.global": stored}, maps, grid=grid, threads=384, shared=kernel.smem, seed=seed)
    finally:
        ptx_hopper._Run = before


def run_prefill(kernel, inputs, out, *, grid, seed=None):
    """The PTX of a prefill on numpy inputs (q, keys, values, layer, starts, counts, and shared keys, values, slots where rows share, and
    keys and values in front of these), written to `out`."""
    q, keys, values, layer, starts, counts, *shared = inputs
    shared, front = shared[:3], shared[3:]
    tokens = q.swapaxes(1, 2)  # what a copy has one of comes last; an axis of 1 is left out
    maps = [ptx_hopper.TensorMap(tokens if len(q) > 1 else tokens[0], (64, 64, 1, 1)[:3 + (len(q) > 1)], 128)]
    maps += _cache_maps(*_in_turn(front, shared[:2], (keys, values)))
    _run_warpgroups(kernel, [starts, counts, layer.reshape(1), *shared[2:]], [out], maps, grid, seed)


def run_shared(kernel, inputs, padded, each, outs, *, grid, seed=None):
    """The PTX of `attention_shared` on numpy inputs (q, keys, values, layer, slots, table, and keys and values of a prefix), written to
    `outs`. A copy of q has `each` rows of `padded` queries."""
    q, keys, values, layer, slots, table, *front = inputs
    rows, heads, d = keys.shape[1], keys.shape[2], q.shape[-1]
    q = q.reshape(rows, len(q) // rows, heads, -1, d)
    q = np.pad(q, ((0, 0),) * 3 + ((0, padded - q.shape[3]), (0, 0))).swapaxes(1, 2)
    box = [size for size, axis in zip((64, padded, each, 1, 1), q.shape[::-1]) if (size, axis) != (1, 1)]
    maps = [ptx_hopper.TensorMap(q.reshape([axis for size, axis in zip((1, 1, each, padded, 64), q.shape) if (size, axis) != (1, 1)]),
                                 tuple(box), 128)]
    _run_warpgroups(kernel, [table, slots, layer.reshape(1)], outs, maps + _cache_maps(*_in_turn(front, (keys, values))), grid, seed)


def compiled_text(f, *structs, donate=()):
    """The program that XLA makes of jit(f) for an H200. donate: arguments that it may write into."""
    device, sharding = aot._device("h200")
    structs = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding) for a in structs]
    with aot._default_device(device):
        return jax.jit(f, donate_argnums=tuple(donate)).lower(*structs).compile().as_text()
