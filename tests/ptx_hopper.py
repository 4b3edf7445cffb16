"""Runs the PTX of a Hopper kernel with TMA, mbarriers and wgmma on the CPU: `ptx` and what those instructions do.

Data are exact to float32 sums; time is not modelled, but every TMA copy completes at once or late, at random, and a
warp that waits at an mbarrier lets the others run. A barrier that nothing completes raises.
"""
import dataclasses
import re

import ml_dtypes
import numpy as np
import ptx

WAITS, MEETS = 1000, 1001  # at an mbarrier; for the other warps of the warpgroup, to act together


@dataclasses.dataclass(frozen=True)
class TensorMap:
    """array [..., inner] as TMA sees it, the box (inner first) that it copies, and the bytes of its rows that are
    swizzled: 0, 64 or 128."""

    array: np.ndarray
    box: tuple[int, ...]
    swizzled: int


def run(text, buffers, maps, *, grid, threads, shared, seed=None):
    """buffers: arrays in global memory by how the kernel reaches them, e.g. {"ld.global.nc.f32": [..], "st.global":
    [..]}, in the order of its parameters and written in place; maps: TensorMaps in the order of their use."""
    rng = np.random.default_rng(seed)
    parameters = re.findall(r"\.param[^\n]*", text[:text.index("{")])
    base = next(i for i, line in enumerate(parameters) if ".b8" in line)  # the parameter that holds the maps
    flat, left = [np.zeros(1, np.uint8)] * len(parameters), {role: list(arrays) for role, arrays in buffers.items()}
    pointers = re.findall(r"ld\.param::entry\.b64\s+(%rd\d+), \[\w+_param_(\d+)\]", text)
    for register, index in sorted(pointers, key=lambda m: int(m[1])):
        accesses = _accesses(text, register)
        role, = (role for role in buffers if any(a.startswith(role) for a in accesses))
        flat[int(index)] = left[role].pop(0)
    text = re.sub(r"(mov\.b64\s+%rd\d+), \w+_param_(\d+);", lambda m: f"{m[1]}, {(int(m[2]) + 1) * ptx.SPACE};", text)
    tables = {}

    def table(m):
        tables[m[1]] = [label.strip() for label in m[2].split(",")]
        return ""

    text = re.sub(r"(\w+):\s*\.branchtargets([^;]*);", table, text)
    instructions, labels = ptx.parse(text)
    instructions = [(*i[:3], _whole(i[3])) for i in instructions]
    for cta in range(grid):
        machine = instructions, labels, flat, cta, cta + 1, threads, 1, shared, rng
        _Run(*machine, maps, (base + 1) * ptx.SPACE, tables).run()


def _accesses(text, register):
    """The global memory instructions that the pointer in a register reaches."""
    reached = {register}
    derived = re.findall(r"(?:add\.s64|or\.b64|cvta\.to\.global\.u64|mov\.b64)\s+(%rd\d+), ([^;]*);", text)
    while new := {r for r, source in derived if r not in reached and reached & set(re.findall(r"%rd\d+", source))}:
        reached |= new
    return {op for op, names in re.findall(r"((?:ld|st)\.global[\w.]*)([^;]*);", text)
            if any(r in reached for r in re.findall(r"\[(%rd\d+)", names))}


def _whole(operands):
    """Operands, those in braces and brackets in one piece."""
    out, depth = [], 0
    for operand in operands:
        if depth:
            out[-1] += "," + operand
        else:
            out.append(operand)
        depth += sum(operand.count(c) for c in "{[") - sum(operand.count(c) for c in "}]")
    return out


class _Run(ptx._Run):
    def __init__(self, *arguments):
        *arguments, self.maps, self.map_base, self.tables = arguments
        super().__init__(*arguments)
        self.barriers, self.late = {}, []
        self.wait_for = {}

    def arrive(self, address, threads=0, expected=0, arrived=0):
        state = self.barriers[address]
        state["pending"] -= threads
        state["bytes"] += expected - arrived
        assert state["pending"] >= 0, f"more arrivals at the barrier at {address} than it counts"
        if state["pending"] == 0 and state["bytes"] == 0:
            state["pending"], state["phase"] = state["count"], state["phase"] + 1

    def value(self, name, at):
        return super().value(name[:-1] if re.fullmatch(r"0x\w+U|\d+U", name) else name, at)

    def release(self):
        copies, self.late = self.late, []
        for copy in copies:
            copy()
        super().release()
        for thread in np.flatnonzero(self.waiting == WAITS):
            address, parity = self.wait_for[thread]
            if self.barriers[address]["phase"] % 2 != parity:
                self.waiting[thread] = 0
        for group in np.arange(self.n).reshape(-1, 128):
            if (self.waiting[group] == MEETS).all():
                assert (self.pc[group] == self.pc[group[0]]).all(), "warps of a warpgroup meet apart"
                _, _, op, operands = self.instructions[self.pc[group[0]] - 1]
                self.waiting[group] = 0
                (self.wgmma if op.startswith("wgmma") else self.vote)(op, operands, group)

    def step(self, at, pc):
        if pc >= len(self.instructions):
            return super().step(at, pc)
        predicate, negated, op, operands = self.instructions[pc]
        special = ("mbarrier", "cp.async.bulk.tensor", "wgmma", "setmaxnreg", "prefetch", "movmatrix", "barrier.cta.red",
                   "cvta", "elect", "fence", "brx", "ldmatrix", "mma.sync")
        if not op.startswith(special):
            return super().step(at, pc)
        self.pc[at] = pc + 1
        if predicate is not None:
            at = at[(self.registers[predicate][at] != 0) != negated]
        if len(at):
            self.special_step(op, operands, at, pc)

    def special_step(self, op, operands, at, pc):
        if op.startswith("brx"):
            table = np.array([self.labels[label] for label in self.tables[operands[1]]])
            self.pc[at] = table[self.value(operands[0], at).astype(int)]
        elif op.startswith("mbarrier.init"):
            for address, count in zip(self.address(operands[0], at), self.value(operands[1], at)):
                self.barriers[int(address)] = dict(count=int(count), pending=int(count), bytes=0, phase=0)
        elif op.startswith("mbarrier.arrive"):
            addresses = self.address(operands[1], at) % np.uint64(1 << 32)
            expected = self.value(operands[2], at) if "expect_tx" in op else np.zeros(len(at), np.uint64)
            for address in np.unique(addresses):
                mine = addresses == address
                self.arrive(int(address), int(mine.sum()), int(expected[mine].sum()))
        elif op.startswith("mbarrier.try_wait"):
            parity = self.value(operands[2], at) % np.uint64(2)
            addresses = self.address(operands[1], at) % np.uint64(1 << 32)
            complete = np.array([self.barriers[int(a)]["phase"] % 2 != p for a, p in zip(addresses, parity)])
            self.write(operands[0], at, np.ones(len(at)))
            for thread, address, p in zip(at[~complete], addresses[~complete], parity[~complete]):
                self.pc[thread], self.waiting[thread] = pc, WAITS
                self.wait_for[thread] = int(address), int(p)
        elif op.startswith("cp.async.bulk.tensor"):
            for thread in at:
                self.tma(np.array([thread]), operands)
        elif op.startswith("wgmma.mma_async"):
            self.waiting[at] = MEETS
        elif op.startswith("movmatrix"):
            self.whole_warps(at, op)
            x = self.value(operands[1], at).astype(np.uint32).reshape(-1, 32)
            tiles = np.stack([x & 0xFFFF, x >> 16], -1).reshape(-1, 8, 8).transpose(0, 2, 1).reshape(-1, 32, 2)
            self.write(operands[0], at, (tiles[..., 0] | tiles[..., 1] << 16).reshape(-1))
        elif op.startswith("ldmatrix"):
            self.whole_warps(at, op)
            starts = (self.address(operands[1], at) % np.uint64(1 << 32)).astype(int).reshape(-1, 4, 8)
            assert op == "ldmatrix.sync.aligned.m8n8.x4.shared.b16" and (starts % 16 == 0).all()
            rows = self.shared[0][starts[..., None] + np.arange(16)].view(np.uint32)  # warp, matrix, row, 4 words
            for i, name in enumerate(operands[0].strip("{} ").split(",")):
                self.write(name.strip(), at, rows[:, i].reshape(-1))
        elif op.startswith("mma.sync"):
            self.whole_warps(at, op)
            for warp in at.reshape(-1, 32):
                self.mma(op, operands, warp)
        elif op.startswith("barrier.cta.red.popc"):
            self.waiting[at] = MEETS
        elif op.startswith("cvta"):
            self.write(operands[0], at, self.value(operands[1], at))
        elif op.startswith("elect"):
            target, predicate = operands[0].split("|")
            self.write(target, at, np.zeros(len(at)))
            self.write(predicate, at, self.lane[at] == 0)

    def compute(self, op, parts, operands, at):
        if op in ("div.s32", "rem.s32", "div.u32", "rem.u32"):
            dtype = np.int32 if op.endswith("s32") else np.uint32
            a, b = (self.value(operands[i], at).astype(np.uint32).view(dtype).astype(np.int64) for i in (1, 2))
            quotient = np.where(b == 0, 0, np.sign(a) * np.sign(b) * (np.abs(a) // np.maximum(np.abs(b), 1)))
            out = quotient if op.startswith("div") else a - quotient * b
            self.write(operands[0], at, out.view(np.uint64) & np.uint64(2**32 - 1))
        elif op in ("xor.pred", "not.pred", "mov.pred"):
            truth = [self.value(o, at) != 0 if o != "-1" else np.ones(len(at), bool) for o in operands[1:]]
            out = ~truth[0] if op == "not.pred" else np.logical_xor(*truth) if len(truth) > 1 else truth[0]
            self.write(operands[0], at, out)
        elif op == "mul.hi.s32":
            a, b = (self.value(operands[i], at).astype(np.uint32).view(np.int32).astype(np.int64) for i in (1, 2))
            self.write(operands[0], at, (a * b >> 32).view(np.uint64) & np.uint64(2**32 - 1))
        elif op == "mov.f32":
            self.write(operands[0], at, self.value(operands[1], at))
        else:
            super().compute(op, parts, operands, at)

    def vote(self, op, operands, group):
        negated = operands[3].startswith("!")
        votes = (self.value(operands[3].lstrip("!"), group) != 0) != negated
        self.write(operands[0], group, np.full(len(group), votes.sum()))

    def tma(self, at, operands):
        target, name, coordinates, barrier = re.match(
            r"\[(.*?)\],\[([^,]+),\{(.*)\}\s*\],\[(.*?)\]$", ",".join(operands)).groups()
        target, barrier = (int(self.address(a, at)[0] % (1 << 32)) for a in (target, barrier))
        tensor = self.maps[int((int(self.value(name, at)[0]) - self.map_base) // 128)]
        start = [int(np.int32(np.uint32(self.value(c.strip(), at)[0] % (1 << 32)))) for c in coordinates.split(",")]
        assert target % (1024 if tensor.swizzled else 128) == 0 and len(start) == tensor.array.ndim == len(tensor.box)
        assert start[0] * tensor.array.itemsize % 16 == 0, "TMA starts at 16 bytes"

        def copy():
            box = np.zeros(tensor.box[::-1], tensor.array.dtype)
            sizes = tensor.array.shape[::-1]
            inside = [slice(max(s, 0), min(s + b, n)) for s, b, n in zip(start, tensor.box, sizes)]
            if all(i.start < i.stop for i in inside):
                put = [slice(i.start - s, i.stop - s) for i, s in zip(inside, start)]
                box[tuple(put[::-1])] = tensor.array[tuple(inside[::-1])]
            raw = box.reshape(-1).view(np.uint8)
            offsets = target + np.arange(len(raw))
            if tensor.swizzled:
                offsets = offsets ^ ((offsets >> 7 & tensor.swizzled // 16 - 1) << 4)
            assert offsets.max() < self.shared_size
            self.shared[0][offsets] = raw
            self.arrive(barrier, arrived=len(raw))

        if self.rng.random() < 0.5:
            copy()
        else:
            self.late.append(copy)

    def mma(self, op, operands, warp):
        assert ".m16n8k16.row.col.f32.bf16.bf16.f32" in op
        out, left, right, old = [[name.strip() for name in o.strip("{} ").split(",")] for o in operands]
        row, quad = np.arange(32) // 4, np.arange(32) % 4
        a, b = np.zeros((16, 16)), np.zeros((16, 8))
        for i, name in enumerate(left):
            a[(row + 8 * (i % 2))[:, None], (2 * quad + 8 * (i // 2))[:, None] + np.arange(2)] = self.pairs(name, warp)
        for i, name in enumerate(right):
            b[(2 * quad + 8 * i)[:, None] + np.arange(2), row[:, None]] = self.pairs(name, warp)
        product = a @ b
        sums = [ptx._f(self.value(name, warp)).astype(np.float64) for name in old]
        for i, name in enumerate(out):
            with np.errstate(all="ignore"):
                new = (sums[i] + product[row + 8 * (i // 2), 2 * quad + i % 2]).astype(np.float32)
            self.write(name, warp, ptx._u(new))

    def pairs(self, name, at):
        return self.value(name, at).astype(np.uint32)[:, None].view(ml_dtypes.bfloat16).astype(np.float64)

    def wgmma(self, op, operands, group):
        n = int(re.search(r"m64n(\d+)k16", op)[1])
        names = [[r.strip() for r in o.strip("{} ").split(",")] for o in operands[:2]]
        descriptor = int(self.value(operands[2], group[:1])[0])
        start, stride = (descriptor & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4
        row, k = np.arange(n)[:, None], np.arange(32)[None]
        offsets = start + row // 8 * stride + row % 8 * 128 + k
        offsets = offsets ^ ((offsets >> 7 & 7) << 4)
        b = self.shared[0][offsets].view(ml_dtypes.bfloat16).astype(np.float64)
        thread = np.arange(128)
        rows, quad = thread // 32 * 16 + thread % 32 // 4, thread % 4
        a = np.zeros((64, 16))
        for i, name in enumerate(names[1]):
            pair = self.pairs(name, group)
            for e in range(2):
                a[rows + 8 * (i % 2), 2 * quad + 8 * (i // 2) + e] = pair[:, e]
        product = a @ b.T
        for i, name in enumerate(names[0]):
            column = 8 * (i // 4) + 2 * quad + i % 2
            old = ptx._f(self.value(name, group)).astype(np.float64)
            with np.errstate(all="ignore"):
                new = (old + product[rows + 8 * (i // 2 % 2), column]).astype(np.float32)
            self.write(name, group, ptx._u(new))
