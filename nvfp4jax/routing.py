"""Tokens to experts and back, around the grouped matmuls, in plain jnp: the router's choice, sort, weighted combine.

    weights, expert_ids = top_k_experts(logits, k, normalize=True)
    routing = route(expert_ids, num_experts, valid)
    rows = x[routing.token_of_row]                  # [T*k, H], sorted by expert: what the grouped matmuls read
    y = combine(grouped matmuls of rows, routing, weights)

The contract of every backend's own routing, and its tests' reference. Deterministic, no host sync.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Routing(NamedTuple):
    """token_of_row i32 [T*k]: the token whose slot each sorted row is; row_of_slot i32 [T, k]: its inverse, -1 for tokens
    that are not valid; group_sizes i32 [E]: rows of each expert. Rows past sum(group_sizes) belong to no expert."""

    token_of_row: jax.Array
    row_of_slot: jax.Array
    group_sizes: jax.Array


def check_route(expert_ids, valid):
    if expert_ids.ndim != 2 or expert_ids.dtype != jnp.int32:
        raise ValueError(f"route: expert_ids must be i32 [T, k], got {expert_ids.dtype}{expert_ids.shape}")
    if valid is not None and valid.shape != expert_ids.shape[:1]:
        raise ValueError(f"route: valid has shape {valid.shape}; expert_ids of shape {expert_ids.shape} wants {expert_ids.shape[:1]}")


def check_combine(rows, routing, weights, residual=None, out_dtype=None):
    if rows.ndim != 2 or rows.shape[0] != weights.size or routing.row_of_slot.shape != weights.shape:
        raise ValueError(f"combine: rows {rows.shape}, weights {weights.shape} and routing of {routing.row_of_slot.shape} do not match: "
                         "want [T*k, H], [T, k], [T, k]")
    if residual is not None and (residual.shape != (len(weights), rows.shape[1]) or residual.dtype != out_dtype):
        raise ValueError(f"combine: residual {residual.dtype}{residual.shape} is not {jnp.dtype(out_dtype)}{(len(weights), rows.shape[1])}")


def check_top_k(logits, k):
    if not logits.ndim or logits.dtype != jnp.float32 or not 0 < k <= logits.shape[-1]:
        raise ValueError(f"top_k_experts: wants float32 logits [..., E] and 0 < k <= E, got {logits.dtype}{logits.shape} and k={k}")


def top_k_experts(logits, k: int, *, normalize: bool):
    """(weights f32, ids i32) [..., k] of the k likeliest experts, by the order of the probabilities; of equal ones the lower id first."""
    check_top_k(logits, k)
    weights, ids = lax.top_k(jax.nn.softmax(logits, axis=-1), k)
    return weights / weights.sum(-1, keepdims=True) if normalize else weights, ids


def sigmoid_top_k_experts(logits, bias, k: int, *, groups: int = 1, top_groups: int = 1, normalize: bool, scale: float = 1.0):
    """(weights f32, ids i32) [..., k] by the router of DeepSeek-V3: a score an expert, chosen within the best groups.

    logits: f32 [..., E]; an expert's score is its sigmoid. bias: f32 [E], added to the score for the choice alone.
    groups: E / groups neighbours make a group; only experts of the top_groups best count, a group standing for the sum of its two
        largest biased scores. Of equal experts or groups the lower one comes first; ids are in falling order of the biased score.
    weights: the scores without the bias, normalize: divided by their sum over the k; times scale. Gradients reach the logits through
        the weights; the choice and the bias have none.

    ValueError for other dtypes and shapes, groups of fewer than two experts (where there are several), or fewer than k experts in
    top_groups groups. Source: arXiv 2412.19437 section 2.1.2; the two largest of a group and the 1e-20 as in transformers.
    """
    check_top_k(logits, k)
    experts = logits.shape[-1]
    if bias.shape != (experts,) or bias.dtype != jnp.float32:
        raise ValueError(f"sigmoid_top_k_experts: bias is {bias.dtype}{bias.shape}; logits of shape {logits.shape} want float32 {(experts,)}")
    size = experts // groups if groups > 0 else 0
    if size * groups != experts or (groups > 1 and size < 2) or not 0 < top_groups <= groups or top_groups * size < k:
        raise ValueError(f"sigmoid_top_k_experts: {experts} experts in groups={groups}, top_groups={top_groups}, k={k}: want equal groups "
                         "of at least 2, and at least k experts in the top groups")
    scores = jax.nn.sigmoid(logits)
    biased = lax.stop_gradient(scores) + lax.stop_gradient(bias).reshape((1,) * (scores.ndim - 1) + bias.shape)
    if top_groups < groups:
        grouped = biased.reshape(*biased.shape[:-1], groups, size)
        _, best = lax.top_k(lax.top_k(grouped, 2)[0].sum(-1), top_groups)
        inside = (best[..., None] == jnp.arange(groups, dtype=jnp.int32).reshape((1,) * best.ndim + (groups,))).any(-2)
        biased = jnp.where(inside[..., None], grouped, -jnp.inf).reshape(biased.shape)
    _, ids = lax.top_k(biased, k)
    weights = jnp.take_along_axis(scores, ids, -1)
    if normalize:
        weights = weights / (weights.sum(-1, keepdims=True) + jnp.float32(1e-20))
    return weights * jnp.float32(scale), ids


def route(expert_ids, num_experts: int, valid=None) -> Routing:
    """Sorts the slots of expert_ids i32 [T, k] by expert, stably. valid: bool [T]; tokens where it is False get no row."""
    check_route(expert_ids, valid)
    tokens, k = expert_ids.shape
    known = (expert_ids >= 0) & (expert_ids < num_experts)
    known = known if valid is None else known & valid[:, None]
    ids = jnp.where(known, expert_ids, jnp.int32(num_experts)).reshape(-1)
    order = jnp.argsort(ids, stable=True).astype(jnp.int32)
    row_of_slot = jnp.zeros_like(order).at[order].set(jnp.arange(tokens * k, dtype=jnp.int32)).reshape(tokens, k)
    sizes = jnp.bincount(ids, length=num_experts + 1)[:num_experts].astype(jnp.int32)
    return Routing(order // jnp.int32(k), jnp.where(known, row_of_slot, jnp.int32(-1)), sizes)


def combine(rows, routing: Routing, weights, *, out_dtype=jnp.bfloat16, residual=None):
    """rows [T*k, H] -> [T, H]: the weighted sum of each token's rows, in slot order, in float32, rounded; residual: added to that."""
    check_combine(rows, routing, weights, residual, out_dtype)
    total = jnp.zeros((weights.shape[0], rows.shape[1]), jnp.float32)
    for j in range(weights.shape[1]):
        row = routing.row_of_slot[:, j, None]
        value = rows[jnp.maximum(row[:, 0], jnp.int32(0))].astype(jnp.float32)
        value = jnp.where(row >= 0, value, jnp.float32(0))  # where no row is any expert's, row 0 may hold NaN, and a weight's gradient reads it
        total = jnp.where(row >= 0, total + value * weights[:, j, None].astype(jnp.float32), total)
    return total.astype(out_dtype) if residual is None else residual + total.astype(out_dtype)
