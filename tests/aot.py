"""Compile the kernels for a GPU that is not there, and read what the compiler says of them.

Needs the extra aot or aot-cuda12 (`jax-cuda13-plugin` and `jax-cuda13-pjrt`, or 12) beside jax, JAX_PLATFORMS=cpu, and for the machine code `nvdisasm`
(the package `nvidia-cuda-nvdisasm`, or a CUDA toolkit). A test holds "no spills", "no serialized wgmma" and
"N instructions in the main loop" as numbers:

    kernel, = aot.compile(f, ((4096, 1024), jnp.int32), ...)
    assert kernel.spills == 0 and not kernel.warnings and kernel.registers <= 128
    assert sum(kernel.loop("HGMMA").values()) <= 400
"""
import collections
import contextlib
import dataclasses
import functools
import importlib.util
import os
import pathlib
import re
import shutil
import tempfile

import jax

# The fields that the compiler asks for, as in openxla/xla `xla/backends/gpu/target_config/specs`.
_TARGET = """gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: {sms} fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: {bandwidth} l2_cache_size: {l2}
  clock_rate_ghz: {ghz} device_memory_size: {memory} shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: {major} feature_extension: ACCELERATED_FEATURES }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 thread_dim_limit_x: 1024 thread_dim_limit_y: 1024
  thread_dim_limit_z: 64 device_vendor: "NVIDIA Corporation" platform_version: "Compute Capability {major}.0a"
  device_address_bits: 64 ecc_enabled: true name: "{name}" driver_version: "13.0.0" runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} device_description_str: "{name}"
"""
TARGETS = {
    "h200": dict(name="NVIDIA H200", major=9, sms=132, l2=52428800, bandwidth=4800000000000, memory=151397597184,
                 ghz=1.98),
    "b200": dict(name="NVIDIA B200", major=10, sms=148, l2=132644864, bandwidth=7672320000000, memory=191514411008,
                 ghz=1.965),
}
_reports: dict[tuple[str, ...], list["Kernel"]] = {}
_DUMPS = ("PTX", "PTXAS", "SASS", "RESOURCES")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What the compiler said of one Mosaic GPU kernel. `sass` is "" where there is no nvdisasm."""

    name: str
    registers: int  # a thread, at launch
    spills: int  # bytes, stores and loads together
    stack: int  # bytes
    smem: int  # bytes of the CTA's dynamic shared memory, barriers excluded
    warnings: tuple[str, ...]  # e.g. C7510..C7514: wgmma serialized; C7508: setmaxnreg ignored
    ptx: str
    sass: str

    def loop(self, opcode: str) -> collections.Counter:
        """Opcode counts of the innermost loop that holds the most `opcode` instructions (modifiers dropped)."""
        if not self.sass:
            raise RuntimeError(f"{self.name}: no machine code; install nvidia-cuda-nvdisasm")
        label_at, body, loops = {}, [], []
        for line in self.sass.splitlines():
            if label := re.match(r"(\.L_x_\d+):", line):
                label_at[label[1]] = len(body)
            elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)(.*)", line):
                target = re.search(r"`\((\.L_x_\d+)\)", instruction[2])
                if instruction[1] == "BRA" and target and target[1] in label_at:
                    loops.append((label_at[target[1]], len(body) + 1))
                body.append(instruction[1])
        counts = [(a, b, collections.Counter(body[a:b])) for a, b in loops]
        counts = [c for c in counts if c[2][opcode]]
        innermost = [c for c in counts if not any(c[0] <= o[0] and o[1] <= c[1] and o is not c for o in counts)]
        return max((c[2] for c in innermost), key=lambda c: c[opcode], default=collections.Counter())


@functools.cache
def _device(target: str):
    """The topology's device and a sharding on it. One target a process: Mosaic caches the architecture."""
    from jax.experimental import topologies

    if _device.cache_info().currsize:
        raise RuntimeError("aot.compile: this process compiles for another target already; start a new process")
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=_TARGET.format(**TARGETS[target]), topology="1x1x1")
    device = topology.devices[0]
    mesh = topologies.make_mesh(topology, (1,), ("x",))
    return device, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


@contextlib.contextmanager
def _default_device(device):
    """Mosaic asks the default device for its architecture. Put back afterwards: eager jax needs the real one."""
    from jax._src.interpreters import pxla
    from jax.experimental.mosaic.gpu import utils as mosaic_utils
    from jax.extend import backend

    modules = {id(m): m for m in (pxla, backend, mosaic_utils.jex_backend)}.values()
    before = [module.get_default_device for module in modules]
    for module in modules:
        module.get_default_device = lambda: device
    try:
        yield
    finally:
        for module, function in zip(modules, before, strict=True):
            module.get_default_device = function


def nvdisasm_root() -> str | None:
    """The directory whose bin/ holds nvdisasm, or None."""
    roots = [pathlib.Path(found).parents[1]] if (found := shutil.which("nvdisasm")) else []
    if spec := importlib.util.find_spec("nvidia"):
        roots += [p for location in spec.submodule_search_locations for p in pathlib.Path(location).iterdir()]
    roots.append(pathlib.Path("/usr/local/cuda"))
    return next((str(root) for root in roots if (root / "bin" / "nvdisasm").exists()), None)


@contextlib.contextmanager
def _environment(**values):
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def available() -> bool:
    """Whether this installation can compile for a GPU that is not there."""
    return importlib.util.find_spec("jax_plugins") is not None and any(
        importlib.util.find_spec(f"jax_plugins.xla_cuda{v}") for v in (12, 13))


def compile(f, *args, target: str = "h200") -> list[Kernel]:
    """Compiles jit(f) for `target` ("h200" or "b200", one a process) and reports its Mosaic GPU kernels in order.

    Args:
        f: a function of arrays.
        *args: its arguments: arrays, ShapeDtypeStructs or (shape, dtype) pairs.
    """
    device, sharding = _device(target)
    from jax.experimental.pallas import mosaic_gpu as _  # noqa: F401  (overwrites MOSAIC_GPU_CUDA_ROOT on import)

    structs = [a if hasattr(a, "shape") else jax.ShapeDtypeStruct(*a) for a in args]
    structs = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding) for a in structs]
    root = nvdisasm_root()
    dumps = {f"MOSAIC_GPU_DUMP_{what}": "1" for what in _DUMPS if what != "SASS" or root}
    with tempfile.TemporaryDirectory() as folder:
        with _default_device(device), _environment(MOSAIC_GPU_DUMP_TO=folder, **dumps, **({"MOSAIC_GPU_CUDA_ROOT": root} if root else {})):
            lowered = jax.jit(lambda *a: f(*a)).lower(*structs)
            hashes = tuple(re.findall(r'kernel_hash = "((?:[^"\\]|\\.)*)"', lowered.as_text()))
            if hashes in _reports:  # jax 0.12 compiles and dumps a kernel once a process
                return _reports[hashes]
            lowered.compile()
        # Each kind of dump counts for itself; what was lowered but compiled before has no assembler's report.
        resources, reports = (_numbered(folder, suffix) for suffix in (".resources.txt", ".ptxas"))
        if not reports or len(reports) != len(resources):
            raise RuntimeError(f"aot.compile: {len(reports)} reports for {len(resources)} Mosaic GPU kernels; the others were "
                               "compiled before in this process inside another function: compile them one by one")
        kernels = [_read(*paths) for paths in zip(reports, resources)]
    _reports[hashes] = kernels
    return kernels


def _numbered(folder, suffix):
    """NAME_0suffix, NAME_1suffix, ... in `folder`, in order."""
    number = lambda path: int(re.search(r"_(\d+)$", path.name.removesuffix(suffix))[1])
    return sorted(pathlib.Path(folder).glob(f"*{suffix}"), key=number)


def _read(ptxas: pathlib.Path, resources: pathlib.Path) -> Kernel:
    log = ptxas.read_text()
    number = lambda pattern, text=log: sum(int(n) for n in re.findall(pattern, text))
    sass = list(ptxas.parent.glob(ptxas.stem + ".sass*"))
    ptx, registers = ptxas.with_suffix(".ptx").read_text(), number(r"Used (\d+) registers")
    _check_registers(ptxas.stem, ptx, registers)
    return Kernel(
        name=ptxas.stem, registers=registers,
        spills=number(r"(\d+) bytes spill"), stack=number(r"(\d+) bytes stack frame"),
        smem=number(r"smem_scratch_bytes=(\d+)", resources.read_text()),
        warnings=tuple(re.findall(r".*\(C7\d+\).*", log)), ptx=ptx,
        sass=sass[0].read_text() if sass else "")


def _check_registers(name: str, ptx: str, registers: int) -> None:
    """setmaxnreg waits until the CTA has so many left: where one warpgroup gives and the others take more than it gave, forever."""
    (gives, *_), (takes, *_) = ([*sorted(map(int, re.findall(rf"setmaxnreg\.{way}\S* (\d+)", ptx))), 0] for way in ("dec", "inc"))
    (threads,) = re.findall(r"\.(?:maxntid|reqntid) (\d+)", ptx)
    groups = int(threads) // 128
    if takes and gives + (groups - 1) * takes > groups * -(-registers // 8) * 8:
        raise RuntimeError(f"{name}: {groups} warpgroups are launched with {registers} registers a thread; one keeps {gives}, the others "
                           f"ask for {takes}: they wait forever")
