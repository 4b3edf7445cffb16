"""Runs the PTX of a per-thread kernel on the CPU, all threads of a cluster at once as numpy vectors. No GPU.

The Mosaic GPU interpreter cannot run inline PTX; this runs the very text that the compiler made (`aot`). Threads that are
not waiting run at the lowest program counter, so that diverged warps meet again; which warps may run is drawn at random
until they wait at a barrier, so that a missing barrier shows. Reads and writes outside the buffers raise, and shuffles,
reductions and matches demand whole warps. Approximate instructions are off by up to an ulp at random.
"""
import re

import aot
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from nvfp4jax.kernels.hopper import threads as hopper_threads

U32, F32, BF16 = np.uint32, np.float32, ml_dtypes.bfloat16
SPACE = 1 << 32  # bytes between two global buffers
SLEEPS = 200  # a thread that lets the others run first
PEER = 1 << 24  # bytes between the shared memories of a cluster


def run_thread_kernel(program, names, out_types, *, grid, warps, cluster=1, shared_words=0, zeroed_words=0, seed=None):
    """Stands in for `threads.thread_kernel`: compiles for an H200 and runs here, on numpy arrays."""
    def call(*inputs):
        inputs = [np.ascontiguousarray(x) for x in inputs]
        types = tuple((x.shape, np.dtype(x.dtype)) for x in inputs)
        captured = tuple(cell.cell_contents for cell in program.__closure__ or ())
        text, order = _compiled(program, program.__code__, captured, tuple(names), tuple(out_types), types, grid, warps, cluster, shared_words,
                                zeroed_words)
        outputs = [np.frombuffer(b"\xa5" * (int(np.prod(o.shape)) * o.dtype.itemsize), np.dtype(o.dtype)).reshape(o.shape).copy()
                   for o in out_types]
        buffers = dict(zip(names, [*inputs, *outputs])) | {"zeroed": np.zeros(zeroed_words, np.int32)}
        emulate(text, [buffers[name] for name in order], grid=grid, threads=warps * 32, cluster=cluster, shared=shared_words * 4,
                seed=seed)
        return outputs

    return call


THREAD_KERNEL = hopper_threads.thread_kernel
_texts = {}


def _compiled(program, code, captured, names, out_types, in_types, grid, warps, cluster, shared_words, zeroed_words):
    """The PTX of a program, and its buffers in the order of their first use, which is how the compiler passes them.

    Each program compiles once: jax 0.12 dumps a kernel once a process."""
    key = code, captured, names, tuple((o.shape, o.dtype) for o in out_types), in_types, grid, warps, cluster, zeroed_words
    if key not in _texts:
        order = []

        class Recorded(dict):
            def __getitem__(self, name):
                if name not in order and name != "shared":
                    order.append(name)
                return super().__getitem__(name)

        build = THREAD_KERNEL(lambda refs: program(Recorded(refs)), names, out_types, grid=grid, warps=warps, cluster=cluster,
                              shared_words=shared_words, zeroed_words=zeroed_words)
        kernel, = aot.compile(build, *(jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape, dtype in in_types))
        _texts[key] = kernel.ptx, order
    return _texts[key]


# --- parsing ---------------------------------------------------------------------------------------------------------

def parse(text):
    """-> instructions (predicate, negated, opcode, operands) and labels; names of inner scopes get a suffix."""
    body = text[text.index("{", text.index(".entry")) + 1:text.index("$L__func_end0:")]  # debug sections follow
    body = re.sub(r"//[^\n]*|^\s*\.loc[^\n]*", "", body, flags=re.M)
    instructions, labels, scopes, count, pending, vector = [], {}, [{}], 0, "", False
    for i, c in enumerate(body):
        if c == "{" and re.match(r"\s*\.reg", body[i + 1:i + 20]):
            _statement(pending.strip(), scopes, labels, instructions)  # a label in front
            count, pending = count + 1, ""
            scopes.append({"": str(count)})
        elif c == "}" and not vector:
            _statement(pending.strip(), scopes, labels, instructions)
            scopes.pop()
            pending = ""
        elif c == ";":
            _statement(pending.strip(), scopes, labels, instructions)
            pending = ""
        else:
            vector = c == "{" or (vector and c != "}")
            pending += c
    _statement(pending.strip(), scopes, labels, instructions)
    return instructions, labels


def _statement(line, scopes, labels, instructions):
    inner = f"@{scopes[-1]['']}" if len(scopes) > 1 else ""  # labels of inline PTX are its own
    while m := re.match(r"([\w$]+):(?!:)\s*", line):
        labels[m[1] + inner] = len(instructions)
        line = line[m.end():]
    if not line or line.startswith((".loc", ".shared", ".file", ".pragma", ".explicit")):
        return
    if line.startswith(".reg"):
        for name in re.sub(r"^\.reg\s+\.\w+\s+", "", line).split(","):
            if len(scopes) > 1:
                scopes[-1][name.strip()] = name.strip() + "@" + scopes[-1][""]
        return
    m = re.match(r"(?:@(!?)([%\w]+)\s+)?([a-z][\w.:]*)\s*(.*)$", line, re.S)
    if not m:
        raise NotImplementedError(f"PTX statement {line!r}")
    operands = [o.strip() for o in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,]+", m[4]) if o.strip()]
    operands = [o + inner for o in operands] if m[3].startswith("bra") else [_scoped(o, scopes) for o in operands]
    instructions.append((_scoped(m[2], scopes) if m[2] else None, m[1] == "!", m[3], operands))


def _scoped(name, scopes):
    names = {k: v for scope in scopes[1:] for k, v in scope.items() if k}
    return re.sub(r"(?<![%\w.$@])[A-Za-z_]\w*(?![\w@])", lambda m: names.get(m[0], m[0]), name)


# --- arithmetic ------------------------------------------------------------------------------------------------------

def _f(x):
    return x.astype(U32).view(F32)


def _u(x):
    return np.asarray(x, F32).view(U32).astype(np.uint64)


def fma(a, b, c):
    """float32 fused multiply-add: float64 sums rounded to odd, so that the second rounding is right."""
    with np.errstate(all="ignore"):
        p, c = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
        s = p + c
        t = s - p
        error = (p - (s - t)) + (c - t)
        even = (s.view(np.uint64) & np.uint64(1)) == 0
        odd = np.nextafter(s, np.where(error > 0, np.inf, -np.inf))
        return np.where((error != 0) & even & np.isfinite(s), odd, s).astype(F32)


def _halves(x):
    return [(x.astype(U32) >> s).astype(np.uint16).view(BF16).astype(F32) for s in (0, 16)]


def _join(low, high):
    low, high = (np.asarray(v, F32).astype(BF16).view(np.uint16).astype(np.uint64) for v in (low, high))
    return low | high << np.uint64(16)


def _saturate(x):
    return np.where(np.isnan(x), F32(0), np.clip(x, F32(0), F32(1)))


def _flush(x):
    return np.where(np.abs(x) < np.finfo(F32).tiny, F32(0) * x, x)


def emulate(text, buffers, *, grid, threads, cluster, shared, seed):
    instructions, labels = parse(text)
    rng = np.random.default_rng(seed)
    for first in range(0, grid, max(cluster, 4096 // threads // cluster * cluster)):
        last = min(grid, first + max(cluster, 4096 // threads // cluster * cluster))
        _Run(instructions, labels, buffers, first, last, threads, cluster, shared, rng).run()


class _Run:
    """CTAs first .. last - 1."""

    def __init__(self, instructions, labels, buffers, first, last, threads, cluster, shared, rng):
        self.instructions, self.labels, self.buffers, self.rng = instructions, labels, buffers, rng
        self.threads, self.cluster = threads, cluster
        ctas = last - first
        self.n = ctas * threads
        index = np.arange(self.n, dtype=np.uint64)
        self.cta = (index // threads).astype(int)
        tid = index % threads
        block = index // threads + first
        lane = (tid % 32).astype(U32)
        self.special = {"%tid.x": tid, "%ctaid.x": block, "%cluster_ctarank": block % cluster, "%clusterid.x": block // cluster,
                        "%lanemask_lt": ((np.uint64(1) << lane.astype(np.uint64)) - np.uint64(1))}
        self.lane, self.warp = lane.astype(int), (index // 32).astype(int)
        self.shared = [np.frombuffer(b"\x5a" * (shared + 1024), np.uint8).copy() for _ in range(ctas)]
        self.shared_size = shared
        self.bytes = [b.reshape(-1).view(np.uint8) for b in buffers]
        self.registers, self.pc = {}, np.zeros(self.n, int)
        self.waiting = np.zeros(self.n, int)  # 0: runs; 1 + id: at a barrier of the CTA; 100: at the cluster's
        self.wanted = np.zeros(self.n, int)
        self.arrived = np.zeros(self.n, int)  # phases of the cluster barrier
        self.passed = np.zeros(self.n, int)
        self.done = np.zeros(self.n, bool)

    def run(self):
        drawn = True  # a random part of the warps goes first, then all
        while not self.done.all():
            ready = ~self.done & (self.waiting == 0)
            if not ready.any():
                raise RuntimeError(f"deadlock: waiting {np.unique(self.waiting[~self.done])}")
            warps = np.unique(self.warp[ready])
            chosen = np.isin(self.warp, warps[self.rng.random(len(warps)) < 0.5] if drawn else warps)
            drawn = not drawn
            if not (chosen & ready).any():
                chosen[:] = True
            while (ready := chosen & ~self.done & (self.waiting == 0)).any():
                pc = self.pc[ready].min()
                self.step(np.flatnonzero(ready & (self.pc == pc)), pc)
            self.release()

    def release(self):
        self.waiting[self.waiting == SLEEPS] = 0
        for cta in np.unique(self.cta):
            for barrier in np.unique(self.waiting[(self.cta == cta) & (self.waiting > 0) & (self.waiting < 100)]):
                at = (self.cta == cta) & (self.waiting == barrier)
                wanted = self.wanted[at]
                assert (wanted == wanted[0]).all() and at.sum() <= wanted[0], "a barrier meets different or too many threads"
                if at.sum() == wanted[0]:
                    self.waiting[at] = 0
        groups = self.cta // self.cluster
        for group in np.unique(groups):
            mine = groups == group
            if (self.waiting[mine] == 100).any():
                complete = self.arrived[mine].min()
                go = mine & (self.waiting == 100) & (self.passed <= complete)
                self.waiting[go] = 0

    def value(self, name, at):
        if name in self.special:
            return self.special[name][at]
        if name.startswith("0f"):
            return np.full(len(at), int(name[2:], 16), np.uint64)
        if re.fullmatch(r"-?\d+|0x[0-9a-fA-F]+", name):
            return np.full(len(at), int(name, 0) % 2**64, np.uint64)
        if name == "__dynamic_shmem__0":
            return np.zeros(len(at), np.uint64)
        return self.registers[name][at]

    def write(self, name, at, value):
        store = self.registers.setdefault(name, np.full(self.n, 0xDEADBEEF, np.uint64))
        store[at] = np.asarray(value).astype(np.uint64)

    def address(self, text, at):
        inside = text.strip("[] ")
        m = re.match(r"([%\w@$]+)\s*(?:\+\s*(-?\d+))?$", inside)
        return self.value(m[1], at) + np.uint64(int(m[2] or 0) % 2**64)

    def memory(self, op, address, at, size):
        """-> (array of bytes, byte offsets) groups: [(bytes, positions among `at`, offsets)]."""
        out = []
        if ".global" in op:
            buffer = (address // np.uint64(SPACE)).astype(int) - 1
            offset = (address % np.uint64(SPACE)).astype(int)
            for b in np.unique(buffer):
                where = np.flatnonzero(buffer == b)
                if not 0 <= b < len(self.bytes) or offset[where].max() + size > len(self.bytes[b]):
                    raise IndexError(f"{op}: outside buffer {b} at byte {offset[where].max()}")
                out.append((self.bytes[b], where, offset[where]))
        else:
            address = address % np.uint64(1 << 32)
            if "shared::cluster" in op:
                target = (self.cta[at] // self.cluster) * self.cluster + (address // np.uint64(PEER)).astype(int)
                address = address % np.uint64(PEER)
            else:
                target = self.cta[at]
            offset = address.astype(int)
            if offset.max() + size > self.shared_size:
                raise IndexError(f"{op}: outside shared memory at byte {offset.max()} of {self.shared_size}")
            out += [(self.shared[c], np.flatnonzero(target == c), offset[target == c]) for c in np.unique(target)]
        if (address % np.uint64(size)).any():
            raise ValueError(f"{op}: misaligned address")
        return out

    def whole_warps(self, at, op):
        assert len(at) % 32 == 0 and (self.lane[at].reshape(-1, 32) == np.arange(32)).all(), f"{op}: a diverged warp"

    def step(self, at, pc):
        if pc >= len(self.instructions):
            self.done[at] = True
            return
        predicate, negated, op, operands = self.instructions[pc]
        self.pc[at] = pc + 1
        if predicate is not None:
            taken = (self.registers[predicate][at] != 0) != negated
            at = at[taken]
            if not len(at):
                return
        parts = op.split(".")
        with np.errstate(all="ignore"):
            if parts[0] == "bra":
                self.pc[at] = self.labels[operands[0]]
            elif parts[0] in ("ret", "exit"):
                self.done[at] = True
            elif parts[0] in ("ld", "st"):
                self.transfer(op, parts, operands, at)
            elif op.startswith(("bar.sync", "barrier.sync")):
                self.waiting[at] = 1 + self.value(operands[0], at).astype(int)
                self.wanted[at] = self.value(operands[1], at).astype(int) if len(operands) > 1 else self.threads
            elif op.startswith("barrier.cluster.arrive"):
                self.arrived[at] += 1
            elif op.startswith("barrier.cluster.wait"):
                self.passed[at] += 1
                self.waiting[at] = 100
            elif op == "bar.warp.sync":
                self.whole_warps(at, op)
            elif op.startswith("fence"):
                pass
            elif op.startswith("nanosleep"):
                self.waiting[np.isin(self.warp, self.warp[at]) & (self.waiting == 0)] = SLEEPS
            elif op == "atom.global.add.u32":
                self.atomic_add(operands, at)
            else:
                self.compute(op, parts, operands, at)

    def atomic_add(self, operands, at):
        for thread in at:
            one = np.array([thread])
            (memory, _, offset), = self.memory("atom.global", self.address(operands[1], one), one, 4)
            word = memory[offset[0]:offset[0] + 4].view(np.uint32)
            self.write(operands[0], one, word.astype(np.uint64))
            word += self.value(operands[2], one).astype(np.uint32)

    def transfer(self, op, parts, operands, at):
        if "param" in op:
            index = int(re.search(r"param_(\d+)", operands[1])[1])
            self.write(operands[0], at, np.full(len(at), (index + 1) * SPACE, np.uint64))
            return
        size = int(parts[-1][1:]) // 8
        target, source = (operands[1], operands[0]) if parts[0] == "st" else (operands[0], operands[1])
        if parts[0] == "ld":
            target, source = operands[0], operands[1]
        else:
            source, target = operands[0], operands[1]
        names = [v.strip() for v in target.strip("{} ").split(",")]
        address = self.address(source, at)
        for memory, where, offset in self.memory(op, address, at, size * len(names)):
            for i, name in enumerate(names):
                lanes = at[where]
                columns = offset[:, None] + i * size + np.arange(size)
                if parts[0] == "ld":
                    raw = memory[columns].astype(np.uint64)
                    self.write(name, lanes, (raw << (8 * np.arange(size, dtype=np.uint64))).sum(1).astype(np.uint64))
                else:
                    value = self.value(name, lanes)
                    memory[columns] = (value[:, None] >> (8 * np.arange(size, dtype=np.uint64))).astype(np.uint8)

    def compute(self, op, parts, operands, at):
        base, kind = parts[0], parts[-1]
        v = lambda i: self.value(operands[i], at)
        bits = int(re.search(r"\d+$", kind)[0]) if re.fullmatch(r"[bus]\d+", kind) else 32
        mask = np.uint64(2**bits - 1)
        signed = lambda x: (x << np.uint64(64 - bits)).view(np.int64) >> np.int64(64 - bits)
        put = lambda x: self.write(operands[0], at, np.asarray(x).astype(np.uint64) & mask)
        if base == "elect":
            self.write(operands[0].split("|")[1], at, self.lane[at] == 0)
        elif base == "shfl":
            self.whole_warps(at, op)
            x, by = v(1).reshape(-1, 32), v(2).reshape(-1, 32).astype(int)
            lanes = np.arange(32)[None] + 0 * by
            source = {"bfly": lanes ^ by, "idx": by, "up": lanes - by}[parts[2]]
            valid = source >= 0
            names = operands[0].split("|")
            self.write(names[0], at, np.take_along_axis(x, np.where(valid, source, lanes), 1).reshape(-1))
            if len(names) > 1:
                self.write(names[1], at, valid.reshape(-1))
        elif base == "redux":
            self.whole_warps(at, op)
            reduced = getattr((v(1) & mask).reshape(-1, 32), parts[2])(1)
            put(np.repeat(reduced, 32))
        elif base == "vote":
            self.whole_warps(at, op)
            votes = (v(1) != 0).reshape(-1, 32).astype(np.uint64)
            put(np.repeat((votes << np.arange(32, dtype=np.uint64)).sum(1), 32))
        elif base == "match":
            self.whole_warps(at, op)
            x = v(1).reshape(-1, 32)
            same = (x[:, :, None] == x[:, None, :]).astype(np.uint64)
            put((same << np.arange(32, dtype=np.uint64)).sum(2).reshape(-1))
        elif base == "mapa":
            put(v(1) + v(2) * np.uint64(PEER))
        elif base == "setp":
            a, b = v(1), v(2)
            if kind == "f32":
                a, b = _f(a), _f(b)
            elif kind.startswith("s"):
                a, b = signed(a), signed(b)
            else:
                a, b = a & mask, b & mask
            out = getattr(np, {"lt": "less", "le": "less_equal", "gt": "greater", "ge": "greater_equal", "eq": "equal",
                               "ne": "not_equal"}[parts[1]])(a, b)
            if len(operands) > 3:  # combined with another predicate
                other = (self.value(operands[3].lstrip("!"), at) != 0) != operands[3].startswith("!")
                out = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[parts[2]](out, other)
            self.write(operands[0], at, out)
        elif base == "selp":
            put(np.where(v(3) != 0, v(1), v(2)))
        elif op in ("and.pred", "or.pred"):
            self.write(operands[0], at, {"and": np.logical_and, "or": np.logical_or}[base](v(1) != 0, v(2) != 0))
        elif kind == "bf16x2":
            a, b = _halves(v(1)), _halves(v(2))
            if base == "mul":
                put(_join(a[0] * b[0], a[1] * b[1]))
            else:
                c = _halves(v(3))
                put(_join(fma(a[0], b[0], c[0]), fma(a[1], b[1], c[1])))
        elif base == "cvt":
            self.convert(op, operands, at, v, put)
        elif kind == "f32":
            put(_u(self.single(base, parts, v)))
        elif op == "max.u16x2":
            a, b = v(1), v(2)
            low, high = (np.maximum(a >> np.uint64(s) & np.uint64(0xFFFF), b >> np.uint64(s) & np.uint64(0xFFFF)) for s in (0, 16))
            put(low | high << np.uint64(16))
        elif base == "mov" and operands[1].startswith("{"):
            low, high = (self.value(n.strip(), at) for n in operands[1].strip("{} ").split(","))
            put(low & np.uint64(0xFFFF) | high << np.uint64(16))
        elif base == "mov" and operands[0].startswith("{"):
            low, high = (n.strip() for n in operands[0].strip("{} ").split(","))
            self.write(low, at, v(1) & np.uint64(0xFFFF))
            self.write(high, at, v(1) >> np.uint64(16) & np.uint64(0xFFFF))
        elif base == "prmt":
            both = (v(1) & mask) | (v(2) & mask) << np.uint64(32)
            selector, out = v(3), np.zeros(len(at), np.uint64)
            for i in range(4):
                s = selector >> np.uint64(4 * i) & np.uint64(7)
                out |= (both >> (s * np.uint64(8)) & np.uint64(255)) << np.uint64(8 * i)
            put(out)
        elif base in ("mul", "mad"):
            if "wide" in parts:
                factor = signed if kind[0] == "s" else lambda x: (x & mask).astype(np.int64)
                product = (factor(v(1)) * factor(v(2))).view(np.uint64)
                self.write(operands[0], at, product + (v(3) if base == "mad" else np.uint64(0)))
            elif "hi" in parts:
                product = (v(1) & mask).astype(object) * (v(2) & mask).astype(object)
                put(product >> bits)
            else:
                put(v(1) * v(2) + (v(3) if base == "mad" else np.uint64(0)))
        elif op == "shf.l.wrap.b32":
            put(((v(2) & mask) << np.uint64(32) | v(1) & mask) >> (np.uint64(32) - (v(3) & np.uint64(31))))
        elif base == "bfe":
            put((v(1) & mask) >> v(2) & ((np.uint64(1) << v(3)) - np.uint64(1)))
        elif base == "popc":
            put(np.bitwise_count(v(1) & mask))
        elif base == "neg":
            put(np.uint64(0) - v(1))
        elif base == "shl":
            put(np.where(v(2) >= bits, np.uint64(0), v(1) << (v(2) % np.uint64(64))))
        elif base == "shr":
            amount = v(2) % np.uint64(64)
            put((signed(v(1)) >> amount.astype(np.int64)).view(np.uint64) if kind.startswith("s") else (v(1) & mask) >> amount)
        elif base in ("min", "max"):
            f = np.minimum if base == "min" else np.maximum
            put(f(signed(v(1)), signed(v(2))).view(np.uint64) if kind.startswith("s") else f(v(1) & mask, v(2) & mask))
        else:
            simple = {"mov": lambda: v(1), "add": lambda: v(1) + v(2), "sub": lambda: v(1) - v(2), "and": lambda: v(1) & v(2),
                      "or": lambda: v(1) | v(2), "xor": lambda: v(1) ^ v(2), "not": lambda: ~v(1)}
            if base not in simple:
                raise NotImplementedError(f"PTX {op}")
            put(simple[base]())

    def single(self, base, parts, v):
        f = lambda i: _f(v(i))
        if base == "fma":
            out = fma(f(1), f(2), f(3))
        elif base in ("rcp", "rsqrt", "ex2"):
            x = f(1).astype(np.float64)
            out = {"rcp": lambda: 1 / x, "rsqrt": lambda: 1 / np.sqrt(x), "ex2": lambda: np.exp2(x)}[base]().astype(F32)
            if "approx" in parts:
                up = np.nextafter(out, F32(np.inf) * np.ones_like(out))
                out = np.where(np.isfinite(out) & (out != 0) & (self.rng.random(out.shape) < 0.5), up, out)
        else:
            out = {"add": lambda: f(1) + f(2), "sub": lambda: f(1) - f(2), "mul": lambda: f(1) * f(2), "div": lambda: f(1) / f(2),
                   "min": lambda: np.fmin(f(1), f(2)), "max": lambda: np.fmax(f(1), f(2)), "abs": lambda: np.abs(f(1)),
                   "neg": lambda: -f(1)}[base]()
        if "sat" in parts:
            out = _saturate(out)
        return _flush(out) if "ftz" in parts else out

    def convert(self, op, operands, at, v, put):
        if op == "cvt.rn.bf16x2.f32":
            put(_join(_f(v(2)), _f(v(1))))
        elif op == "cvt.rn.satfinite.e4m3x2.f32":
            high, low = (np.clip(_f(v(i)), F32(-448), F32(448)).astype(ml_dtypes.float8_e4m3fn).view(np.uint8).astype(np.uint64)
                         for i in (1, 2))
            put(low | high << np.uint64(8))
        elif op == "cvt.rn.f16x2.e4m3x2":
            low, high = ((v(1) >> np.uint64(s)).astype(np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float16).view(np.uint16)
                         .astype(np.uint64) for s in (0, 8))
            put(low | high << np.uint64(16))
        elif op == "cvt.rn.bf16.f32":
            put(_join(_f(v(1)), np.zeros(len(at), F32)) & np.uint64(0xFFFF))
        elif op == "cvt.f32.f16":
            put(_u(v(1).astype(np.uint16).view(np.float16).astype(F32)))
        elif op in ("cvt.u32.u16", "cvt.u16.u32", "cvt.u64.u16"):
            put(v(1) & np.uint64(0xFFFF))
        elif op in ("cvt.u32.u64", "cvt.u64.u32"):
            self.write(operands[0], at, v(1) & np.uint64(2**32 - 1))
        elif op == "cvt.s64.s32":
            self.write(operands[0], at, v(1).astype(U32).view(np.int32).astype(np.int64).view(np.uint64))
        else:
            raise NotImplementedError(f"PTX {op}")
