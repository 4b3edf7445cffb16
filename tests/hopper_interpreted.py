"""The Hopper matmuls under the Mosaic GPU interpreter: what it cannot run, in jnp.

It has no inline PTX, no wgmma from registers, no clusters that share memory and no register budgets, and it wants every phase
of a barrier observed. The kernels here are the shipped ones, their rings and copies, with other arithmetic.
"""
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from nvfp4jax.kernels.hopper import dense_narrow, dense_split, dense_wide, grouped_kernel
from nvfp4jax.kernels.hopper.decode import DECODE_FACTOR, permute_k
from nvfp4jax.kernels.hopper.dense_product import SCALE_STEPS, STEP


def decode_words(words, scales):
    """What the decode does: i32 [N, K/8], i32 [N, K/64] -> bf16 [N, K] times 2**-7, K permuted (`permute_k`)."""
    n, k = words.shape[0], words.shape[1] * 8
    shifts = 4 * lax.broadcasted_iota(jnp.int32, (1, 1, 8), 2)
    codes = (words[:, :, None] >> shifts) & 15
    low = codes & 7
    doubled = jnp.where(low < 4, low, jnp.where(low < 6, 2 * low - 4, 4 * low - 16))
    values = (jnp.where(codes < 8, 0.5, -0.5) * doubled.astype(jnp.float32)).reshape(n, k)  # no table: a kernel
    factors = lax.bitcast_convert_type(scales, jnp.float8_e4m3fn).astype(jnp.float32).reshape(n, k // 16, 1)
    decoded = values.reshape(n, k // 16, 16) * (factors * jnp.float32(1 / DECODE_FACTOR))
    return permute_k(decoded.reshape(n, k).astype(jnp.bfloat16))


class Interpreted:
    """In place of `machine.Hardware`."""

    def set_registers(self, count, action):
        pass

    def zeros(self, columns):
        return jnp.zeros((64, columns), jnp.float32)

    def drain(self, ring, uses):
        ring.drain(uses)


def multiply(words, scales, tokens):
    """[rows, tokens]. The fence orders the reads before the next copy, as the barrier does on the hardware."""
    a = decode_words(words, scales)
    plgpu.commit_smem()
    return jnp.dot(a, tokens.T, preferred_element_type=jnp.float32)


def scaled(product, total, row_scale, global_scale, bias):
    """total [tokens, channels] -> what the kernel stores."""
    total = total * (row_scale * (global_scale * DECODE_FACTOR))
    if product.bias_dtype is not None:
        total = total + bias.astype(jnp.float32)[None]
    return total.astype(product.out_dtype)


class Narrow(Interpreted, dense_narrow.Narrow):
    def prepare(self, refs, sm, at):
        return dense_narrow._Prepared(None, None, None)

    def of_warp(self, wg, v):
        """Tile and slice."""
        index = wg * 4 + v
        return lax.rem(index, jnp.int32(self.tiles)), lax.div(index, jnp.int32(self.tiles))

    def add(self, acc, i, stage, sm, wg, chunk=None):
        """A step, or a 64-chunk of it."""
        out = []
        for v in range(4):
            tile, p = self.of_warp(wg, v)
            own = pl.ds(tile * 16, 16)
            words = sm.w_sm[i if self.resident else stage, p, own]
            step = p * self.rounds + i
            scales = (sm.s_sm[lax.div(step, SCALE_STEPS), own, pl.ds(lax.rem(step, SCALE_STEPS) * 4, 4)] if self.resident
                      else sm.s_sm[stage, p, own])
            if chunk is not None:
                words, scales = words[:, 8 * chunk:8 * chunk + 8], scales[:, chunk:chunk + 1]
            right = sm.x_sm[stage, p]
            if right.ndim == 3:  # a 64-chunk a copy
                right = right.transpose(1, 0, 2).reshape(self.tokens, STEP)
            out.append(multiply(words, scales, right))
        return acc + jnp.concatenate(out)

    def add_round(self, acc, i, stage, prepared, sm, wg):
        return self.add(acc, i, stage, sm, wg)

    def decode_chunk(self, i, u, prepared):
        pass

    def add_chunk(self, acc, i, u, stage, decoded, prepared, sm, wg):
        return self.add(acc, i, stage, sm, wg, u)

    def finish(self, acc, prepared, refs, sm, at, wg):
        for v in range(4):
            tile, p = self.of_warp(wg, v)
            sm.partial[p, :, pl.ds(tile * 16, 16)] = acc[16 * v:16 * v + 16].T
        plgpu.barrier_arrive(sm.done)
        plgpu.barrier_wait(sm.done)

        @pl.when(wg == 0)
        def _():
            own, rows = min(self.product.m, self.tokens), pl.ds(at.first, self.rows)
            total = functools.reduce(jnp.add, [sm.partial[p, pl.ds(0, own), pl.ds(0, self.rows)] for p in range(self.slices)])
            row_scale = refs.row_scale[pl.ds(at.token, own)].reshape(-1, 1) if self.product.per_row else refs.row_scale[...].reshape(1, 1)
            bias = refs.bias[rows] if self.product.bias_dtype is not None else None
            refs.out[pl.ds(at.token, own), rows] = scaled(self.product, total, row_scale, refs.global_scale[0], bias)


class Split(Interpreted, dense_split.Split):
    """The kernel leaves the slices' sums, which the interpreter cannot exchange in a cluster."""

    def prepare(self, wg):
        pass

    def multiply(self, acc, addresses, sm, stage, wg):
        own = pl.ds(wg * 64, 64)
        tokens = sm.x_sm[stage].transpose(1, 0, 2).reshape(self.tokens, STEP)
        return acc + multiply(sm.w_sm[stage, own], sm.s_sm[stage, own], tokens)

    def finish(self, acc, refs, sm, at, wg):
        own = pl.ds(at.row_tile * self.rows + wg * 64, 64)
        refs.out[at.slice, pl.ds(at.token_tile * self.tokens, self.tokens), own] = acc.T

    def axes(self, ctas):
        return dict(grid=(ctas, self.slices), grid_names=("tile", "slice"))

    def build(self):
        p = self.product
        sums = jax.ShapeDtypeStruct((self.slices, self.token_tiles * self.tokens, p.n), jnp.float32)
        run = self.launch(self.body, sums, self.ctas)

        def finished(w, s, x, row_scale, global_scale, bias, residual, layer):
            total = functools.reduce(jnp.add, run(w, s, x, row_scale, global_scale, bias, residual, layer))[:p.m]
            return scaled(p, total, row_scale.reshape(-1, 1), global_scale[0], bias)

        return finished


class Wide(Interpreted, dense_wide.Wide):
    def prepare(self, wg):
        pass

    def multiply(self, acc, addresses, sm, stage, scales, unit, wg):
        own = pl.ds(wg * 64, 64)
        tokens = sm.x_sm[stage].transpose(1, 0, 2).reshape(self.tokens, STEP)
        return acc + multiply(sm.w_sm[stage, own], scales[own, pl.ds(unit * 4, 4)], tokens)

    def finish(self, acc, factor, row, channel, slot, refs, sm):
        p = self.product
        acc = acc * (sm.r_sm[slot, pl.ds(0, self.tokens)].reshape(1, -1) * factor if p.per_row else factor)
        if p.bias_dtype is not None:
            acc = acc + refs.bias[pl.ds(channel, 64)].astype(jnp.float32)[:, None]
        refs.out[pl.ds(row, self.tokens), pl.ds(channel, 64)] = acc.T.astype(p.out_dtype)
        plgpu.commit_smem()


def pad(x, *sizes):
    return jnp.pad(x, [(0, size - have) for size, have in zip(sizes, x.shape)])


class Grouped(Interpreted, grouped_kernel.Grouped):
    """No rows past an edge either: weights, tokens and results are padded."""

    def list_blocks(self, sizes, table):
        c, at, sizes = self.config, self.at, sizes[...]
        pieces = [lax.div(sizes + (tile - 1), jnp.int32(tile)) for tile in (max(t for t in c.tiles if t != c.crowd), c.crowd or 1)]
        table[pl.ds(at.ends, self.experts)] = jnp.cumsum(jnp.where((sizes >= -(-self.m // 2)) & bool(c.crowd), *pieces[::-1]))
        table[at.starts] = jnp.int32(0)
        table[pl.ds(at.starts + 1, self.experts)] = jnp.cumsum(sizes)

    def expert_of(self, table, number):
        return jnp.sum((table[pl.ds(self.at.ends, self.experts)] <= number).astype(jnp.int32))

    def opaque(self, value):
        return jnp.int32(value)

    def prepare(self, wg, shifts):
        return shifts

    def multiply(self, acc, shifts, w, s, x, unit, wg, *, first, chunks, tokens, running):
        """gated: 32 rows of gate, then 32 of up."""
        height, words, scales, width = 64 // self.halves, [], [], self.layout.scale_row // 4
        for h in range(self.halves):
            words.append(w[pl.ds(h * self.rows + wg * height, height), pl.ds(first * 8, chunks * 8)])
            if self.flat:
                table = lax.dynamic_slice(s[h], (shifts[h],), (self.rows * width,)).reshape(self.rows, width)
                table = jnp.pad(table, ((0, 0), (0, 4)))
                scales.append(lax.dynamic_slice(table, (wg * height, unit * 4 + first), (height, chunks)))
            else:
                scales.append(s[h, pl.ds(wg * height, height), pl.ds(unit * 4 + first, chunks)])
        x = x[...].reshape(chunks, tokens, 64).transpose(1, 0, 2).reshape(tokens, chunks * 64)
        return acc + multiply(jnp.concatenate(words), jnp.concatenate(scales), x)

    def store(self, acc, scale, row_scales, out, start, rows, channel, *, tokens):
        values, width = acc.T, 64 // self.halves

        @pl.loop(0, rows)
        def _(token):
            factor = scale
            if row_scales is not None:
                factor = lax.bitcast_convert_type(row_scales[0][row_scales[1] + token], jnp.float32) * scale
            value = lax.dynamic_slice(values, (token, 0), (1, 64))[0] * factor
            if self.gated:
                value = jax.nn.silu(value[:width]) * value[width:]
            out[start + token, pl.ds(channel, width)] = value.astype(out.dtype)

        plgpu.commit_smem()

    def build(self):
        wide, long = self.tiles * self.rows, self.steps * STEP
        run = self.launch(wide)

        def padded(layer, w, s, x, row_scale, sizes, global_scale):
            w = pad(w, *w.shape[:2], wide, long // 8)
            blocks = -(-self.k // self.config.scale_block) * self.config.scale_block
            s = jnp.pad(s, (0, self.rows * (self.k // 64) + 256)) if self.flat else pad(s, *s.shape[:2], wide, blocks // 64)
            x = pad(x, self.m + self.config.tiles[-1], long)
            row_scale = pad(row_scale, self.m + 4 + self.config.computes[-1]) if self.row_scaled else row_scale
            return run(layer, w, s, x, row_scale, sizes, global_scale)[:, :self.n]

        return padded
