"""Gated experts, in floating point and in NVFP4, and raw weights."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from nvfp4jax import arguments, numerics, ops, routing
from nvfp4jax import array as nvfp4_array
from nvfp4jax import scaling as modes
from nvfp4jax.array import NVFP4Array
from nvfp4jax.layers.state import (
    UNCHANGED,
    Decoded,
    NVFP4Param,
    NVFP4Source,
    is_abstract,
    metadata_of,
    note,
    quantize_transposed,
    require,
    scaling_of,
    set_scaling,
    set_view,
    valid_of,
    watch,
)
from nvfp4jax.ops import Implementation
from nvfp4jax.scaling import Name, Scaling


class Experts(nnx.Module):
    """The experts of a gated mixture, in floating point: silu(x gate) * (x up), times down, weighted and summed.

    Params gate_proj, up_proj [E, K, N] = [E, hidden, intermediate] and down_proj [E, intermediate, hidden], raw, as trainers
    keep them. Call: x [T, hidden], expert_ids i32 [T, k], weights f32 [T, k] -> [T, hidden]. The products are `ops.ragged_dot`'s:
    on a GPU a token's bits may depend on the others of its call; those of `NVFP4Experts` on Hopper do not.
    """

    def __init__(self, num_experts: int, hidden: int, intermediate: int, *, dtype=None, param_dtype=jnp.float32, rngs: nnx.Rngs):
        sizes = {"num_experts": num_experts, "hidden": hidden, "intermediate": intermediate}
        self.num_experts, self.hidden, self.intermediate = (arguments.whole(f"Experts: {what}", size, 1) for what, size in sizes.items())
        self.dtype = None if dtype is None else arguments.dtype("Experts: dtype", dtype)
        param_dtype = arguments.dtype("Experts: param_dtype", param_dtype)
        arguments.module("Experts: rngs", rngs, nnx.Rngs)

        def init(inputs, outputs):
            scale = jnp.asarray(inputs**-0.5, param_dtype)
            return nnx.Param(jax.random.normal(rngs.params(), (num_experts, inputs, outputs), param_dtype) * scale)

        self.gate_proj, self.up_proj = init(hidden, intermediate), init(hidden, intermediate)
        self.down_proj = init(intermediate, hidden)
        self.gate_up_input_amax, self.down_input_amax = nnx.data(None), nnx.data(None)

    def __call__(
        self,
        x: Float[Array, "T H"],
        expert_ids: Int[Array, "T k"],
        weights: Float[Array, "T k"],
        *,
        valid: Bool[Array, "T"] | None = None,
        residual: Float[Array, "T H"] | None = None,
        route: routing.Routing | None = None,
    ) -> Float[Array, "T H"]:
        """valid: bool [T]; a token where it is False goes to no expert, and counts in no amax that a calibration notes. residual: added to
        the result. route: of these expert_ids and this mask, where `choose_experts` gave them; otherwise they are sorted here."""
        ops.check_routed(x, expert_ids, weights, valid, route, "experts", self.num_experts, self.hidden)
        if residual is not None:
            arguments.array("experts: residual", residual, "float", x.shape)
        dtype = self.dtype if self.dtype is not None else jnp.promote_types(x.dtype, self.gate_proj.dtype)
        route = routing.route(expert_ids, self.num_experts, valid) if route is None else route
        # What a kernel leaves in rows of no expert reaches no token and no weight, in a gradient either.
        kept = (lambda rows: rows) if valid is None else lambda rows: modes.within(rows, route.group_sizes)
        rows = kept(x.astype(dtype)[route.token_of_row])
        if self.gate_up_input_amax is not None:
            valid = modes.current_valid(x, "experts") if valid is None else valid
            valid = None if valid is None else valid[route.token_of_row]

        def product(rows, w):
            return ops.ragged_dot(rows, w.get_value().astype(dtype), route.group_sizes)

        watch(self, "gate_up_input", rows, valid)
        h = numerics.silu_mul(*(kept(product(rows, w)) for w in (self.gate_proj, self.up_proj)))
        watch(self, "down_input", h, valid)
        return routing.combine(product(h, self.down_proj), route, weights, out_dtype=dtype, residual=residual)


class NVFP4Experts(nnx.Module):
    """`Experts` with NVFP4 weights; both matmuls take an online scale, the second on the SwiGLU output.

    Leaves: gate_up_packed u8 [E, 2, I, H/2] (gate first), gate_up_scale [E, 2, I, H/16], gate_up_global_scale f32 [E], shared by gate
    and up; down_packed u8 [E, H, I/2], down_scale, down_global_scale; gate_up_input_scale and down_input_scale f32 [] or [E] (static
    scaling) or None. `scaling` as in the module's docstring; gate_up_input_amax and down_input_amax: an `AmaxHistory`, of all experts
    together (delayed), or None.
    """

    inputs = ("gate_up_input", "down_input")
    scaling: Scaling | None

    def __init__(
        self,
        gate_proj: nnx.Variable,
        up_proj: nnx.Variable,
        down_proj: nnx.Variable,
        *,
        name: str,
        dtype: jnp.dtype | None,
        scaling: Name | Scaling | None = "token",
        weight_four_over_six: str | None = None,
        implementation: Implementation = None,
        input_scales: tuple[Array, Array] | None = None,
    ):
        self.name = name
        modes.check_four_over_six(weight_four_over_six, f"{name}: weight_four_over_six")
        self.num_experts, self.hidden, self.intermediate = gate_proj.shape[-3:]
        self.weight_four_over_six = weight_four_over_six
        self.implementation = ops.check_implementation(implementation)
        self.dtype = dtype
        self.param_dtype = jnp.dtype(gate_proj.dtype)
        self.layer_index = nnx.data(None)
        self.gate_up_source, self.down_source = nnx.data(None), nnx.data(None)
        values = {(n,): p.get_value() for n, p in (("gate_proj", gate_proj), ("up_proj", up_proj), ("down_proj", down_proj))}
        abstract = is_abstract(*values.values())
        made = self._quantize_abstract(values) if abstract else self.quantize_params(values)
        lead = tuple((a,) for a in range(len(gate_proj.shape) - 2))
        n = len(lead)
        for weight, param, axes in (("gate_up", gate_proj, (*lead, (), (n + 1,), (n,))), ("down", down_proj, (*lead, (n + 1,), (n,)))):
            meta = metadata_of(param, axes)
            setattr(self, f"{weight}_packed", NVFP4Param(made[(f"{weight}_packed",)], **meta))
            setattr(self, f"{weight}_scale", NVFP4Param(made[(f"{weight}_scale",)], **meta))
            setattr(self, f"{weight}_global_scale", NVFP4Param(made[(f"{weight}_global_scale",)], **metadata_of(param, lead)))
        set_scaling(self, scaling, None if input_scales is None else dict(zip(self.inputs, input_scales, strict=True)))

    @classmethod
    def from_float(cls, layer: nnx.Module, *, name: str = "experts", **options) -> "NVFP4Experts":
        """layer: `Experts`, or any module with Params gate_proj, up_proj [E, hidden, I] and down_proj [E, I, hidden] (or stacks)."""
        require(layer, name, Experts, "gate_proj", "up_proj", "down_proj")
        return cls(layer.gate_proj, layer.up_proj, layer.down_proj, name=name, dtype=getattr(layer, "dtype", None), **options)

    def set_view(self, scaling: Name | Scaling | None | object = UNCHANGED) -> None:
        """For `nnx.view(model, scaling=...)`."""
        set_view(self, scaling)

    @property
    def lead(self) -> tuple[int, ...]:
        """The leading axes that a stack adds."""
        return tuple(self.gate_up_global_scale.shape[:-1])

    def float_names(self) -> tuple[tuple[str, ...], ...]:
        return (("gate_proj",), ("up_proj",), ("down_proj",))

    def float_shapes(self) -> dict[tuple[str, ...], tuple[int, ...]]:
        wide = (*self.lead, self.num_experts, self.hidden, self.intermediate)
        return {("gate_proj",): wide, ("up_proj",): wide, ("down_proj",): (*wide[:-2], self.intermediate, self.hidden)}

    def _quantize_abstract(self, params):
        nvfp4_array.check_k(self.hidden, f"{self.name}: gate_proj", params[("gate_proj",)].shape)
        nvfp4_array.check_k(self.intermediate, f"{self.name}: down_proj", params[("down_proj",)].shape)
        return jax.eval_shape(self.quantize_params, params)

    def quantize_params(self, params: Mapping[tuple[str, ...], Array]) -> dict[tuple[str, ...], Array]:
        """The float layer's arrays [E, K, N] -> this layer's, by name. Pure."""
        gate, up, down = (params[n] for n in self.float_names())
        both = quantize_transposed((gate, up), self.weight_four_over_six, f"{self.name}: gate_up")
        down = quantize_transposed((down,), self.weight_four_over_six, f"{self.name}: down")
        halves = lambda v: v.reshape(*v.shape[:-2], 2, v.shape[-2] // 2, v.shape[-1])  # noqa: E731
        return {
            ("gate_up_packed",): halves(both.packed),
            ("gate_up_scale",): halves(both.scale),
            ("gate_up_global_scale",): both.global_scale[..., 0, 0],
            ("down_packed",): down.packed,
            ("down_scale",): down.scale,
            ("down_global_scale",): down.global_scale[..., 0, 0],
        }

    def set_sources(self, params: Mapping[tuple[str, ...], Array]) -> None:
        """Lets gradients of the weights pass to the float layer's arrays."""
        gate, up, down = (jnp.swapaxes(params[n], -1, -2) for n in self.float_names())
        self.gate_up_source, self.down_source = NVFP4Source(jnp.stack([gate, up], -3)), NVFP4Source(down)

    def weights(self) -> tuple[NVFP4Array, NVFP4Array]:
        """gate_up [E, 2, I, H] and down [E, H, I] as NVFP4Arrays."""
        gate, down = self.gate_up_global_scale.get_value(), self.down_global_scale.get_value()
        sources = [None if s is None else s.get_value() for s in (self.gate_up_source, self.down_source)]
        return (
            NVFP4Array(self.gate_up_packed.get_value(), self.gate_up_scale.get_value(), gate[..., None, None, None], self.layer_index, sources[0]),
            NVFP4Array(self.down_packed.get_value(), self.down_scale.get_value(), down[..., None, None], self.layer_index, sources[1]),
        )

    def __call__(
        self,
        x: Float[Array, "T H"],
        expert_ids: Int[Array, "T k"],
        weights: Float[Array, "T k"],
        *,
        valid: Bool[Array, "T"] | None = None,
        residual: Float[Array, "T H"] | None = None,
        route: routing.Routing | None = None,
    ) -> Float[Array, "T H"]:
        """valid: bool [T]; a token where it is False counts in no amax and goes to no expert. residual: added to the result, of its dtype.
        route: of these expert_ids and this mask, where `choose_experts` gave them; otherwise they are sorted here."""
        ops.check_routed(x, expert_ids, weights, valid, route, self.name, self.num_experts, self.hidden)
        for weight in (self.gate_up_packed, self.down_packed):
            nvfp4_array.check_unsplit(weight.get_value(), range(len(weight.shape)), self.name, "keep experts whole on each device")
        dtype = self.dtype if self.dtype is not None else jnp.promote_types(x.dtype, self.param_dtype)
        x = x.astype(dtype)
        scaling = tuple(scaling_of(self, name) for name in self.inputs)
        y, carried = ops.experts_carrying(
            x, expert_ids, weights, *self.weights(), valid, scaling=scaling, counted=valid_of(self, x, valid), residual=residual,
            route=route, out_dtype=dtype, implementation=self.implementation, name=self.name,
        )  # fmt: skip
        for name, state in zip(self.inputs, carried, strict=True):
            note(self, name, state)
        return y


class NVFP4Weight(Decoded, nnx.Module):
    """A raw Param [..., K, N] held in NVFP4, weights only: `w[...]`, `w.get_value()` or jnp functions see it decoded.

    Takes the place of the Param itself in a module that nobody registered, e.g. expert weights [E, K, N] used in an einsum.
    The decoded copy is the user's: prefer `NVFP4Experts`, which keeps none.
    """

    def __init__(self, param: nnx.Variable, *, name: str, weight_four_over_six: str | None = None):
        self.name = name
        self.weight_four_over_six = weight_four_over_six
        self.matrix_shape, self.dtype = tuple(param.shape[-2:]), jnp.dtype(param.dtype)
        self.kernel_source = nnx.data(None)
        lead = tuple((a,) for a in range(len(param.shape) - 2))
        n = len(lead)
        meta = metadata_of(param, (*lead, (n + 1,), (n,)))
        value = param.get_value()
        made = jax.eval_shape(self.quantize_params, {(): value}) if is_abstract(value) else self.quantize_params({(): value})
        self.kernel_packed = NVFP4Param(made[("kernel_packed",)], **meta)
        self.kernel_scale = NVFP4Param(made[("kernel_scale",)], **meta)
        self.kernel_global_scale = NVFP4Param(made[("kernel_global_scale",)], **metadata_of(param, lead))

    def float_names(self) -> tuple[tuple[str, ...], ...]:
        return ((),)

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.kernel_global_scale.shape, *self.matrix_shape)

    def float_shapes(self) -> dict[tuple[str, ...], tuple[int, ...]]:
        return {(): self.shape}

    def quantize_params(self, params: Mapping[tuple[str, ...], Array]) -> dict[tuple[str, ...], Array]:
        w = quantize_transposed((params[()],), self.weight_four_over_six, self.name)
        return {("kernel_packed",): w.packed, ("kernel_scale",): w.scale, ("kernel_global_scale",): w.global_scale[..., 0, 0]}

    def set_sources(self, params: Mapping[tuple[str, ...], Array]) -> None:
        self.kernel_source = NVFP4Source(jnp.swapaxes(params[()], -1, -2))

    def get_value(self) -> Float[Array, "... K N"]:
        global_scale = self.kernel_global_scale.get_value()[..., None, None]
        source = None if self.kernel_source is None else self.kernel_source.get_value()
        w = NVFP4Array(self.kernel_packed.get_value(), self.kernel_scale.get_value(), global_scale, source=source)
        return jnp.swapaxes(w.dequantize(self.dtype), -1, -2)
