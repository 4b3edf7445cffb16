"""Linear layers with NVFP4 weights."""

import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes as flax_dtypes
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from nvfp4jax import arguments, ops
from nvfp4jax import scaling as modes
from nvfp4jax.array import NVFP4Array, QuantizedActivation
from nvfp4jax.layers.state import (
    UNCHANGED,
    DecodedKernel,
    NVFP4Param,
    NVFP4Source,
    metadata_of,
    note,
    quantize_transposed,
    quantize_weight,
    refuse,
    require,
    scalar_metadata,
    scaling_of,
    set_scaling,
    set_view,
    shapes_or_values,
    squeeze,
    valid_of,
)
from nvfp4jax.ops import Implementation
from nvfp4jax.scaling import Name, Scaling


class NVFP4Linear(nnx.Module):
    """y = x w^T + bias with w in NVFP4; takes the place of `nnx.Linear`.

    Leaves: kernel_packed u8 [N, K/2], kernel_scale float8_e4m3fn [N, K/16], kernel_global_scale f32 []; bias as the float layer had it,
    or None; input_scale f32 [] (static scaling) or None; input_amax: an `AmaxHistory` (delayed) or None. `scaling`: see the module's
    docstring. The products are exact whatever the float layer's `precision` was; its `preferred_element_type` is the result's dtype.
    `kernel` reads like the float layer's Param, decoded.
    """

    inputs = ("input",)
    scaling: Scaling | None

    def __init__(
        self,
        kernel: nnx.Variable,
        bias: nnx.Variable | None,
        *,
        name: str,
        features: tuple[tuple[int, ...], tuple[int, ...]],
        dtype: jnp.dtype | None,
        scaling: Name | Scaling | None = "token",
        weight_four_over_six: str | None = None,
        implementation: Implementation = None,
        preferred_element_type: DTypeLike | None = None,
    ):
        self.name = name
        modes.check_four_over_six(weight_four_over_six, f"{name}: weight_four_over_six")
        self.contracted, self.features = features
        self.weight_four_over_six = weight_four_over_six
        self.implementation = ops.check_implementation(implementation)
        self.dtype = dtype
        self.preferred_element_type = preferred_element_type
        self.param_dtype = jnp.dtype(kernel.dtype)
        self.layer_index = nnx.data(None)
        self.kernel_source = nnx.data(None)
        lead = len(kernel.shape) - len(self._kernel_axes()[0]) - len(self._kernel_axes()[1])
        self.kernel_shape = tuple(kernel.shape[lead:])
        n_axes, k_axes = ([lead + a for a in axes] for axes in self._kernel_axes())
        meta = metadata_of(kernel, (*((a,) for a in range(lead)), tuple(n_axes), tuple(k_axes)))
        w = self._quantize(kernel.get_value())
        self.kernel_packed = NVFP4Param(w.packed, **meta)
        self.kernel_scale = NVFP4Param(w.scale, **meta)
        self.kernel_global_scale = NVFP4Param(squeeze(w.global_scale, lead), **scalar_metadata(meta))
        self.bias = nnx.data(None) if bias is None else bias
        set_scaling(self, scaling)

    @classmethod
    def from_float(cls, layer: nnx.Linear, *, name: str = "linear", **options) -> "NVFP4Linear":
        """layer: nnx.Linear, kernel [in, out] (or a stack of them). options: scaling and the rest of the constructor's.

        ValueError, naming it, for a layer with a dot_general or promote_dtype of its own.
        """
        require(layer, name, nnx.Linear, "kernel")
        refuse(layer, name, {"dot_general": lax.dot_general, "promote_dtype": flax_dtypes.promote_dtype})
        features = (layer.in_features,), (layer.out_features,)
        return cls(layer.kernel, layer.bias, name=name, features=features, dtype=layer.dtype,
                   preferred_element_type=layer.preferred_element_type, **options)  # fmt: skip

    def set_view(self, scaling: Name | Scaling | None | object = UNCHANGED) -> None:
        """For `nnx.view(model, scaling=...)`: static scaling keeps an input scale that there is, delayed an earlier history."""
        set_view(self, scaling)

    @property
    def lead(self) -> tuple[int, ...]:
        """The leading axes that a stack adds."""
        return tuple(self.kernel_global_scale.shape)

    @property
    def in_features(self) -> int | tuple[int, ...]:
        return self.contracted[0]

    @property
    def out_features(self) -> int | tuple[int, ...]:
        return self.features[0]

    @property
    def use_bias(self) -> bool:
        return self.bias is not None

    @property
    def kernel(self) -> DecodedKernel:
        """The kernel in the float layer's shape and dtype, decoded where it is read; of a stack, all its layers."""
        return DecodedKernel((*self.lead, *self.kernel_shape), self.param_dtype, self._decode_kernel)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(N, K)."""
        return math.prod(self.features), math.prod(self.contracted)

    def _kernel_axes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The axes of the float kernel that make N, and K, in that order."""
        return (1,), (0,)

    def _quantize(self, kernel: Array) -> NVFP4Array:
        """The float kernel [(stack), ...] -> [(stack), N, K]; one whose contracted axes come first is quantized as it lies."""
        n_axes, k_axes = self._kernel_axes()
        if (*k_axes, *n_axes) != tuple(range(len(k_axes) + len(n_axes))):
            return quantize_weight(shapes_or_values(self._matrix, kernel), self.weight_four_over_six, self.name)
        lead, (n, k) = len(kernel.shape) - len(k_axes) - len(n_axes), self.matrix_shape
        columns = shapes_or_values(lambda kernel: kernel.reshape(*kernel.shape[:lead], k, n), kernel)
        return quantize_transposed((columns,), self.weight_four_over_six, self.name)

    def _matrix(self, kernel: Array) -> Array:
        """The float kernel [(stack), ...] -> [(stack), N, K]."""
        n_axes, k_axes = self._kernel_axes()
        lead = kernel.ndim - len(n_axes) - len(k_axes)
        order = (*range(lead), *(lead + a for a in n_axes), *(lead + a for a in k_axes))
        return kernel.transpose(order).reshape(*kernel.shape[:lead], *self.matrix_shape)

    def _kernel_of(self, matrix: Array) -> Array:
        """The inverse of `_matrix`."""
        lead = matrix.ndim - 2
        split = matrix.reshape(*matrix.shape[:lead], *self.features, *self.contracted)
        axes = [lead + a for group in self._kernel_axes() for a in group]
        return split.transpose(*range(lead), *(lead + axes.index(lead + a) for a in range(len(axes))))

    def _decode_kernel(self) -> Array:
        global_scale = self.kernel_global_scale.get_value()
        global_scale = global_scale[..., None, None] if self.lead else global_scale
        w = NVFP4Array(self.kernel_packed.get_value(), self.kernel_scale.get_value(), global_scale)
        return self._kernel_of(w.dequantize(self.param_dtype))

    def merged(self, kernel: Array, lora_a: Array, lora_b: Array, factor: float) -> Array:
        """The float kernel with a low-rank adapter's product in it, in kernel's dtype.

        lora_a: [(stack), contracted axes, r]; lora_b: [(stack), r, features]; factor: alpha / r.
        """
        lead = kernel.ndim - len(self.kernel_shape)
        stack, rank = kernel.shape[:lead], lora_a.shape[-1]
        n, k = self.matrix_shape
        # The axes as well as the sizes: a transposed lora_b is as large.
        fits = lora_a.shape[:lead] == stack and lora_b.shape[: lead + 1] == (*stack, rank)
        if not fits or lora_a.size != math.prod(stack) * k * rank or lora_b.size != math.prod(stack) * rank * n:
            raise ValueError(f"{self.name}: adapters of shapes {lora_a.shape} and {lora_b.shape} do not fit a kernel of shape {kernel.shape}")
        a = lora_a.astype(jnp.float32).reshape(*stack, k, rank)
        b = lora_b.astype(jnp.float32).reshape(*stack, rank, n)
        product = jnp.einsum("...kr,...rn->...nk", a, b, precision=lax.Precision.HIGHEST)
        return (kernel.astype(jnp.float32) + jnp.float32(factor) * self._kernel_of(product)).astype(kernel.dtype)

    def float_names(self) -> tuple[tuple[str, ...], ...]:
        """Where the float layer keeps what this one is made of."""
        return (("kernel",),) if self.bias is None else (("kernel",), ("bias",))

    def float_shapes(self) -> dict[tuple[str, ...], tuple[int, ...]]:
        """The shapes that the float layer's arrays had."""
        shapes = {("kernel",): (*self.lead, *self.kernel_shape)}
        return shapes if self.bias is None else shapes | {("bias",): tuple(self.bias.shape)}

    def quantize_params(self, params: Mapping[tuple[str, ...], Array]) -> dict[tuple[str, ...], Array]:
        """The float layer's arrays -> this layer's, by name. Pure."""
        kernel = params[("kernel",)]
        lead = kernel.ndim - len(self._kernel_axes()[0]) - len(self._kernel_axes()[1])
        w = self._quantize(kernel)
        out = {("kernel_packed",): w.packed, ("kernel_scale",): w.scale, ("kernel_global_scale",): squeeze(w.global_scale, lead)}
        if self.bias is not None:
            out[("bias",)] = params[("bias",)]
        return out

    def set_sources(self, params: Mapping[tuple[str, ...], Array]) -> None:
        """Lets gradients of the weight pass to the float layer's arrays."""
        self.kernel_source = NVFP4Source(params[("kernel",)])

    def weight(self) -> NVFP4Array:
        """The weight as an NVFP4Array [N, K]."""
        source = None if self.kernel_source is None else self._matrix(self.kernel_source.get_value())
        return NVFP4Array(
            self.kernel_packed.get_value(), self.kernel_scale.get_value(), self.kernel_global_scale.get_value(), self.layer_index, source
        )

    def compute_dtype(self, dtype: jnp.dtype) -> jnp.dtype:
        """What an input of `dtype` is computed in, as the float layer does."""
        return jnp.dtype(self.dtype) if self.dtype is not None else jnp.promote_types(dtype, self.param_dtype)

    def out_dtype(self, dtype: jnp.dtype) -> jnp.dtype:
        """What an activation of `dtype` gives."""
        return dtype if self.preferred_element_type is None else jnp.dtype(self.preferred_element_type)

    def _matmul(self, x: Array | QuantizedActivation, bias: Array | None, valid: Array | None, residual: Array | None = None) -> Array:
        """x [..., K] -> [..., N]."""
        a = x
        if not isinstance(x, QuantizedActivation):
            arguments.array(f"{self.name}: inputs", x, "float", ("...", self.matrix_shape[1]))
            x = x.astype(self.compute_dtype(x.dtype))
            options = dict(valid=valid_of(self, x, valid), implementation=self.implementation, name=self.name)
            a = ops.quantize_activation(x, scaling_of(self, "input"), **options)
            note(self, "input", a.carried)
        return ops.matmul(a, self.weight(), bias=bias, residual=residual, out_dtype=self.out_dtype(a.dtype),
                          implementation=self.implementation, name=self.name)  # fmt: skip

    def __call__(
        self,
        inputs: Float[Array, "... K"] | QuantizedActivation,
        out_sharding=None,
        *,
        valid: Bool[Array, "..."] | None = None,
        residual: Float[Array, "... N"] | None = None,
    ) -> Float[Array, "... N"]:
        """inputs: float, or a QuantizedActivation from `feed`. valid: bool inputs.shape[:-1], rows that count in an amax. residual: added."""
        bias = None if self.bias is None else self.bias.get_value()
        return _constrain(self._matmul(inputs, bias, valid, residual), out_sharding)


def _constrain(y: Array, out_sharding) -> Array:
    if out_sharding is None:
        return y
    explicit = not jax.sharding.get_abstract_mesh().empty and jax.sharding.get_abstract_mesh().are_all_axes_explicit
    return jax.sharding.reshard(y, out_sharding) if explicit else jax.lax.with_sharding_constraint(y, out_sharding)


class NVFP4LinearGeneral(NVFP4Linear):
    """Takes the place of `nnx.LinearGeneral` without batch axes: several axes contracted, several features."""

    def __init__(self, *args, axis: tuple[int, ...], **kwargs):
        self.axis = axis
        super().__init__(*args, **kwargs)

    @classmethod
    def from_float(cls, layer: nnx.LinearGeneral, *, name: str = "linear_general", **options) -> "NVFP4LinearGeneral":
        require(layer, name, nnx.LinearGeneral, "kernel")
        if layer.batch_axis:
            raise ValueError(f"{name}: LinearGeneral with batch_axis={dict(layer.batch_axis)} has one weight a batch entry; leave it "
                             "in bfloat16 (Rule(..., skip=True)) or use nvfp4jax.Experts")
        refuse(layer, name, {"dot_general": lax.dot_general, "dot_general_cls": None, "promote_dtype": flax_dtypes.promote_dtype})
        return cls(layer.kernel, layer.bias, name=name, features=(layer.in_features, layer.out_features), axis=layer.axis,
                   dtype=layer.dtype, preferred_element_type=layer.preferred_element_type, **options)  # fmt: skip

    in_features = property(lambda self: self.contracted)
    out_features = property(lambda self: self.features)

    def _kernel_axes(self):
        n_in = len(self.contracted)
        return tuple(range(n_in, n_in + len(self.features))), tuple(range(n_in))

    def __call__(self, inputs: Float[Array, "..."], out_sharding=None, *, valid: Bool[Array, "..."] | None = None) -> Float[Array, "..."]:
        arguments.array(f"{self.name}: inputs", inputs)
        if inputs.ndim < len(self.axis) or tuple(inputs.shape[a] for a in self.axis) != self.contracted:
            raise ValueError(f"{self.name}: inputs of shape {inputs.shape} at axes {self.axis} need sizes {self.contracted}")
        x = contracted_last(self, inputs)
        y = self._matmul(x, None if self.bias is None else self.bias.get_value().reshape(-1), valid)
        return _constrain(y.reshape(*x.shape[:-1], *self.features), out_sharding)


class NVFP4Einsum(NVFP4Linear):
    """Takes the place of `nnx.Einsum` whose string contracts input and kernel without a shared batch axis."""

    def __init__(self, *args, einsum_str: str, **kwargs):
        self.einsum_str = einsum_str
        super().__init__(*args, **kwargs)

    @classmethod
    def from_float(cls, layer: nnx.Einsum, *, name: str = "einsum", **options) -> "NVFP4Einsum":
        require(layer, name, nnx.Einsum, "kernel")
        if layer.einsum_str is None:
            raise ValueError(f"{name}: this Einsum takes its string at each call; give it one at construction to quantize it")
        refuse(layer, name, {"einsum_op": jnp.einsum, "promote_dtype": flax_dtypes.promote_dtype})
        n_letters, k_letters = einsum_letters(layer.einsum_str, name)
        sizes = dict(zip(einsum_operands(layer.einsum_str)[1], layer.kernel_shape, strict=True))
        features = tuple(sizes[c] for c in k_letters), tuple(sizes[c] for c in n_letters)
        return cls(layer.kernel, layer.bias, name=name, features=features, einsum_str=layer.einsum_str, dtype=layer.dtype,
                   preferred_element_type=layer.preferred_element_type, **options)  # fmt: skip

    def _kernel_axes(self):
        letters = einsum_operands(self.einsum_str)[1]
        return tuple(tuple(letters.index(c) for c in group) for group in einsum_letters(self.einsum_str, self.name))

    def __call__(
        self, inputs: Float[Array, "..."], einsum_str: str | None = None, out_sharding=None, *, valid: Bool[Array, "..."] | None = None
    ) -> Float[Array, "..."]:
        if einsum_str is not None:
            raise ValueError(f"{self.name}: quantized for {self.einsum_str!r}; it takes no einsum_str at the call")
        arguments.array(f"{self.name}: inputs", inputs)
        lhs, out = spelled_out(self.einsum_str, inputs.ndim)
        n_letters, k_letters = einsum_letters(self.einsum_str, self.name)
        if len(lhs) != inputs.ndim:
            raise ValueError(f"{self.name}: inputs of shape {inputs.shape} do not fit {self.einsum_str!r}")
        x = contracted_last(self, inputs)
        bias = None
        if self.bias is not None:  # kept as the float layer had it: the features in the order of the result
            order = [c for c in out if c in n_letters]
            shape = dict(zip(n_letters, self.features, strict=True))
            bias = self.bias.get_value().reshape([shape[c] for c in order]).transpose([order.index(c) for c in n_letters]).reshape(-1)
        y = self._matmul(x, bias, valid).reshape(*x.shape[:-1], *self.features)
        letters = [*(c for c in lhs if c not in k_letters), *n_letters]
        return _constrain(y.transpose([letters.index(c) for c in out]), out_sharding)


def einsum_operands(einsum_str: str) -> tuple[str, str, str]:
    inputs, out = einsum_str.replace(" ", "").split("->")
    lhs, kernel = inputs.split(",")
    return lhs, kernel, out


def spelled_out(einsum_str: str, ndim: int) -> tuple[str, str]:
    """The letters of an input with `ndim` axes, and of the result, an ellipsis replaced by letters."""
    lhs, kernel, out = einsum_operands(einsum_str)
    unused = [c for c in map(chr, range(ord("A"), ord("Z") + 1)) if c not in lhs + kernel + out]
    dots = "".join(unused[: ndim - len(lhs) + 3])
    return lhs.replace("...", dots), out.replace("...", dots)


def contracted_last(layer: nnx.Module, inputs: Float[Array, "..."]) -> Float[Array, "... K"]:
    """What a linear layer (of Flax or of ours) reads, the axes that it contracts made one and put last."""
    if isinstance(layer, nnx.LinearGeneral | NVFP4LinearGeneral):
        axes = layer.axis
    elif isinstance(layer, nnx.Einsum | NVFP4Einsum):
        letters, _ = spelled_out(layer.einsum_str, inputs.ndim)
        axes = [letters.index(c) for c in einsum_letters(layer.einsum_str, "einsum")[1]]
    else:
        axes = [inputs.ndim - 1]
    return merged_last(inputs, axes)


def merged_last(x: Float[Array, "..."], axes: Sequence[int]) -> Float[Array, "... K"]:
    """x with `axes`, in their order, made one and put behind the others."""
    axes = [a % x.ndim for a in axes]
    free = [a for a in range(x.ndim) if a not in axes]
    return x.transpose(*free, *axes).reshape(*(x.shape[a] for a in free), math.prod(x.shape[a] for a in axes))


def einsum_letters(einsum_str: str, name: str) -> tuple[str, str]:
    """The kernel's letters that are features, and those that are contracted, each in the kernel's order."""
    lhs, kernel, out = einsum_operands(einsum_str)
    features = "".join(c for c in kernel if c in out and c not in lhs)
    contracted = "".join(c for c in kernel if c in lhs and c not in out)
    plain = len(set(kernel)) == len(kernel) == len(features) + len(contracted) and "." not in kernel
    plain = plain and all(len(set(letters)) == len(letters) for letters in (lhs.replace("...", ""), out.replace("...", "")))
    if not plain or not features or not contracted or any(c not in out and c not in contracted for c in lhs.replace("...", "")):
        raise ValueError(f"{name}: einsum {einsum_str!r} is no plain matmul (a batch axis in the kernel, an axis summed on its own, or a diagonal); "
                         "leave it in bfloat16 (Rule(..., skip=True)) or use nvfp4jax.Experts")
    return features, contracted
