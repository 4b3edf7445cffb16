"""Who computes an operation: the backends, and which of them is taken."""

import dataclasses
import functools
import importlib.util
import logging
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, Literal

import jax
from jaxtyping import Array, Float

from nvfp4jax import scaling as scaling_modes
from nvfp4jax.array import NVFP4Array, QuantizedActivation
from nvfp4jax.backends import xla

log = logging.getLogger("nvfp4jax")
Backend = Literal["xla", "hopper", "triton", "cudnn"]
Implementation = Backend | Sequence[Backend] | None
Activation = Float[Array, "... K"] | NVFP4Array | QuantizedActivation


def _hopper() -> ModuleType:
    from nvfp4jax.backends import hopper

    return hopper


def _triton() -> ModuleType:
    from nvfp4jax.backends import triton

    return triton


def _cudnn() -> ModuleType:
    from nvfp4jax.backends import cudnn

    return cudnn


# Modules with the same functions (see `backends.xla`), imported where first used: those of GPUs need what a CPU's rollout does not.
BACKENDS: dict[str, Callable[[], ModuleType]] = {"xla": lambda: xla, "hopper": _hopper, "triton": _triton, "cudnn": _cudnn}


def backend_named(name: str) -> ModuleType:
    return BACKENDS[name]()


def check_implementation(implementation: Implementation) -> tuple[Backend, ...] | Backend | None:
    """The argument as something hashable; ValueError for a name that is no backend's."""
    names = (implementation,) if isinstance(implementation, str) else implementation
    if names is not None:
        if not isinstance(names, Sequence) or any(not isinstance(name, str) for name in names):
            raise ValueError(f"implementation={str(implementation)[:40]}: one of {', '.join(BACKENDS)}, a sequence of them, or None")
        names = tuple(names)
        if not names:
            raise ValueError(f"implementation is an empty sequence; give names of backends ({', '.join(BACKENDS)}), or None")
        if unknown := [name for name in names if name not in BACKENDS]:
            raise ValueError(f"implementation={unknown[0]!r}: one of {', '.join(BACKENDS)}, a sequence of them, or None")
    return implementation if isinstance(implementation, str) else names


@functools.cache
def _default_order() -> tuple[str, ...]:
    """Hopper's kernels where the default device is one, Triton's on other CUDA GPUs, then XLA."""
    device = jax.devices()[0]
    capability = getattr(device, "compute_capability", None)
    if device.platform != "gpu" or not isinstance(capability, str) or "." not in capability:
        return ("xla",)
    if capability == "9.0":
        return ("hopper", "xla")
    if importlib.util.find_spec("jax_triton") is None:
        log.warning("%s: decoding weights in XLA; for fused kernels pip install 'nvfp4jax[triton]'", device.device_kind)
        return ("xla",)
    return ("triton", "xla")


@functools.cache
def _log_fallback(op: str, name: str, reason: str) -> None:
    log.warning("%s: %s does not apply (%s); trying the next implementation", op, name, reason)


def _check_device(device: Any) -> None:
    """NotImplementedError for a call that no Hopper kernel could run; traced on a CPU, a program may yet be compiled for a GPU."""
    if device.platform == "cpu":
        if not scaling_modes.is_tracing():
            raise NotImplementedError(f"implementation='hopper' needs a Hopper GPU; the default device is {device}")
        _log_hopper_on_cpu()


@functools.cache
def _log_hopper_on_cpu() -> None:
    log.warning("implementation='hopper' is traced where the default device is a CPU: the program runs only where it is compiled for a Hopper GPU")


def first_of[T](op: str, implementation: tuple[Backend, ...] | Backend | None, call: Callable[[ModuleType], T]) -> T:
    """call(backend) by the first backend that supports the case."""
    order = (implementation,) if isinstance(implementation, str) else implementation or _default_order()
    errors = []
    for name in order:
        try:
            if name == "hopper":
                _check_device(jax.devices()[0])
            return call(backend_named(name))
        except NotImplementedError as error:
            if isinstance(implementation, str):
                raise NotImplementedError(f"{op}: {error}") from error
            errors.append(error)
            if len(order) > 1:
                _log_fallback(op, name, str(error))
    raise ExceptionGroup(f"{op}: none of {', '.join(order)} supports this case", errors)


def read_by(backend: ModuleType, a: QuantizedActivation) -> QuantizedActivation:
    """The activation as `backend` reads it."""
    if a.backend == backend.NAME:
        return a
    operand, _ = backend.activation(backend_named(a.backend).natural(a.operand), None)
    return dataclasses.replace(a, operand=operand, backend=backend.NAME)
