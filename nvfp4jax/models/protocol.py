"""What the rollout asks of a model: the Decoder protocol and the value that a call gives back.

A `Decoder` is all that `generate` and `calibrate` need. What follows is for models whose equal layers are to be stacked and run
by one `lax.scan` (`stack_layers`, `load_model(..., scan_layers=True)`), so that compile time does not grow with depth:

    model.layers  an nnx.List of modules, one a layer; nothing else of the model is stacked.
    layer.depth   None for a single layer. `stack_layers` makes runs of layers of equal structure into one, whose Params have a
                  leading axis L, and sets its depth to L. A model's own code never sets it to a number.
    the call      layer(x, part, inputs) -> (x, part, experts): x comes out in the shape and dtype in which it went in; part is the
                  layer's `LayerCache`, or None without a cache; inputs is a pytree that all layers of a call share (positions,
                  `valid`, ...); experts is i32 [B, T, k], or None.
    LayerCache    a layer's cache arrays by name, and `layer`, its place in a stack, or None: the arrays of a stack are handed in
                  whole, with their axis L, are written in place by `part.write(starts, name=new)` (or `replace`), and go back whole.
                  `part[name]` is a whole array; the operations take `part.layer` beside it.
    running them  for each entry: `run = layer if layer.depth is None else stack_of(layer)`, then `x, part, experts = run(x, part,
                  inputs)`; behind a stack, experts has an axis L in front. `depths(model)` tells `init_cache` which arrays have one.
    in a stack    NVFP4 weights are not sliced: their layers get `layer_index`, the turn of the scan, and read their part in place.

`models.blocks.Transformer` does so; see it for an example. Folders hold single layers, however a model ran when it was saved.
"""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
    """What a call of a `Decoder` gives back.

    logits: [B, T, V], or [B, 1, V] where the call named one token a row (`last`).
    cache: the cache after the call, None where there was none.
    experts: None, or i32 [L_moe, B, T, k], the experts that each token was routed to, a layer an entry.
    """

    logits: Float[Array, "B P V"]
    cache: Any = None
    experts: Int[Array, "L B T k"] | None = None


@runtime_checkable
class Decoder(Protocol):
    """A causal language model that `generate` can run; any nnx.Module with these two methods.

    One that also has `features(tokens, positions, *, valid) -> [B, T, H]`, of whole rows, and the head apart,
    `logits(features [B, P, H], valid) -> [B, P, V]`, spares `logprobs` the logits of all tokens at once. With `cache_dtype=` too,
    it rounds keys and values as a cache of that dtype does (`models.cache.as_read`).

    The tokens of a row lie in the cache from slot 0 on, a token's slot is its position, and rows are padded on the
    right, each with a length of its own. So no mask over keys is needed: a query sees the slots up to its own.
    """

    def init_cache(self, batch: int, length: int, dtype: DTypeLike | None = None) -> Any:
        """An empty cache of `length` slots for `batch` rows, made of `models.cache.CacheArray`s; dtype None: the model's."""

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        cache: Any,
        *,
        valid: Bool[Array, "B T"] | None = None,
        last: Int[Array, "B"] | None = None,
    ) -> Output:
        """Runs T more tokens of each row.

        positions: row b's are positions[b, 0] + (0, 1, ..., T - 1). Token t is written to slot positions[b, t] and sees
            the slots 0 to positions[b, t].
        cache: what `init_cache` or the last call gave.
        valid: False at padding and in finished rows: such a token takes no part in an activation's amax and need not go to
            an expert, and what is computed for it is read by nobody; it must be finite. None: all are valid. A finished row
            comes with the position of the first slot that is its own, which may be overwritten.
        last: the logits of that one of the T tokens in each row are wanted, the others' are not.
        A mixture of experts may take `return_experts=True` and then fill `Output.experts`. A model with an attribute
        `takes_shared_cache` that is true may be given a `models.cache.SharedCache` too, with a prefix or without,
        and gives one back.
        """
