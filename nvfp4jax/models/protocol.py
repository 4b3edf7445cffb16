"""What the rollout asks of a model: the Decoder protocol and the value that a call gives back."""

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
        valid: False at padding and in finished rows: such a token takes no part in an activation's amax, and what is
            computed for it is read by nobody; it must be finite. None: all are valid.
        last: the logits of that one of the T tokens in each row are wanted, the others' are not.
        A mixture of experts may take `return_experts=True` and then fill `Output.experts`.
        """
