"""Which layer takes the place of which."""

from collections.abc import Callable

from flax import nnx

from nvfp4jax import arguments
from nvfp4jax.layers.experts import Experts, NVFP4Experts
from nvfp4jax.layers.linear import NVFP4Einsum, NVFP4Linear, NVFP4LinearGeneral

CONVERTERS: dict[type, Callable[..., nnx.Module]] = {
    nnx.Linear: NVFP4Linear.from_float,
    nnx.LinearGeneral: NVFP4LinearGeneral.from_float,
    nnx.Einsum: NVFP4Einsum.from_float,
    Experts: NVFP4Experts.from_float,
}


def register(module_type: type[nnx.Module]) -> Callable[[Callable[..., nnx.Module]], Callable[..., nnx.Module]]:
    """Teaches `quantize_model` a layer of yours: decorate `convert(layer, *, name, scaling,
    weight_four_over_six, implementation) -> nnx.Module`.

    The result may be one of this package's layers, or hold some. If `quantize_params` is to requantize it, it has their
    `float_names()` and `quantize_params(params)`.
    """
    if not isinstance(module_type, type) or not issubclass(module_type, nnx.Module):
        raise ValueError(f"register: module_type: {arguments.shown(module_type)} is no class of nnx.Module")

    def decorate(convert):
        if not callable(convert):
            raise ValueError(f"register: convert: {arguments.shown(convert)} is no function of a layer")
        CONVERTERS[module_type] = convert
        return convert

    return decorate
