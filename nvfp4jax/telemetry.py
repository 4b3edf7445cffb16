"""What NVFP4 makes of a model's activations, layer by layer: `generate(..., telemetry=True)`, and for any module `observed` and `read`."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Float, Int

from nvfp4jax import arguments, counting, pytree, swap
from nvfp4jax.layers import InputCounts
from nvfp4jax.models import stacking


@dataclasses.dataclass(frozen=True)
class Telemetry:
    """What the inputs of the NVFP4 layers looked like, and what quantizing did to them; a pytree of arrays on the host.

    layers: their paths, in order; of experts one for each input, .../gate_up_input and .../down_input; of stacked layers one each. All
        else has an entry for each.
    amax: f32, the largest magnitude. blocks: i64, the blocks of 16 that were quantized; 0 where the mode is None.
    saturated, flushed, beyond: f64, shares of them, NaN where there are none. Where a block's E4M3 scale, its amax over 6 global
        scales, rounds to more than 448 the block is saturated, and its largest elements clip; where it rounds to 0 the block is
        flushed, and all its elements become 0. A block is beyond a shared scale's range where a global scale that other rows or calls
        have a part in (all modes but "token") makes its scale saturate or fall below 2**-6, where E4M3 has fewer bits, and an amax of
        its own row would not.

    Rows that are padding or finished, and rows that hold NaN or infinity, count in no share. A prompt that is run once counts once.
    """

    layers: tuple[str, ...]
    amax: Float[np.ndarray, "n"]
    blocks: Int[np.ndarray, "n"]
    saturated: Float[np.ndarray, "n"]
    flushed: Float[np.ndarray, "n"]
    beyond: Float[np.ndarray, "n"]

    def summary(self, worst: int = 8) -> str:
        """The shares of all blocks, and a table of the `worst` layers: those that saturate, then those beyond range, then those flushed."""
        worst = arguments.whole("summary: worst", worst, 0)
        total = max(int(self.blocks.sum()), 1)
        shares = {what: getattr(self, what) for what in ("saturated", "beyond", "flushed")}
        overall = ", ".join(f"{what} {_percent(float(np.nansum(share * self.blocks) / total))}" for what, share in shares.items())
        lines = [f"{len(self.layers)} inputs of NVFP4 layers, {int(self.blocks.sum()):,} blocks: {overall}"]
        order = sorted(range(len(self.layers)), key=lambda i: [-np.nan_to_num(share[i]) for share in shares.values()])[:worst]
        rows = [(self.layers[i], f"{self.amax[i]:.3g}", *(_percent(float(share[i])) for share in shares.values())) for i in order]
        rows = [("layer", "amax", *shares), *rows] if rows else []
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines += ["  ".join([f"{row[0]:<{widths[0]}}", *(f"{v:>{w}}" for v, w in zip(row[1:], widths[1:], strict=True))]) for row in rows]
        return "\n".join(lines)

    __str__ = summary

    def plot(self, to: Any = None) -> Any:
        """Draws the three shares and the amax of each layer with matplotlib; returns the axes.

        to: the matplotlib Axes to draw on, the path of a .png, .svg or .pdf to write, or None: axes of a new figure.
        ValueError for another `to`, a file in no folder, and where matplotlib is missing.
        """
        try:
            import matplotlib.pyplot as plt
            from matplotlib.figure import Figure
        except ImportError:
            raise ValueError("plot: needs matplotlib: pip install matplotlib") from None
        file = Path(to) if isinstance(to, str | os.PathLike) else None
        if file is not None:
            if file.suffix not in (".png", ".svg", ".pdf") or not file.absolute().parent.is_dir():
                raise ValueError(f"plot: to={str(file)[:80]}: a file that ends in .png, .svg or .pdf is needed, in a folder that exists")
            figure = Figure(figsize=(10, 5), layout="tight")
            axes = figure.subplots()
        elif to is None:
            axes = plt.subplots(figsize=(10, 5), layout="tight")[1]
        elif hasattr(to, "twinx"):
            axes = to
        else:
            raise ValueError(f"plot: to: {arguments.shown(to)} is neither matplotlib Axes nor the path of a file")
        at = np.arange(len(self.layers))
        for what, marker in (("saturated", "^"), ("beyond", "s"), ("flushed", "v")):
            axes.plot(at, getattr(self, what), marker, label=what, markersize=4)
        axes.set_yscale("symlog", linthresh=1e-4)
        axes.set(ylim=(0, 1), ylabel="share of blocks")
        axes.set_xticks(at, self.layers, rotation=90, fontsize=min(7, 400 / max(len(at), 1)))
        beside = axes.twinx()
        beside.semilogy(at, np.where(self.amax > 0, self.amax, np.nan), "-", color="0.6", linewidth=1, label="amax")
        beside.set_ylabel("amax")
        axes.legend(*([*a, *b] for a, b in zip(axes.get_legend_handles_labels(), beside.get_legend_handles_labels(), strict=True)), fontsize=7)
        if file is not None:
            figure.savefig(file)
        return axes


pytree.register(Telemetry, "amax", "blocks", "saturated", "flushed", "beyond")


def _percent(share: float) -> str:
    if np.isnan(share):
        return "-"
    return "0" if share == 0 else "<0.01%" if share < 1e-4 else f"{share:.2%}"


def observed[M: nnx.Module](qmodel: M) -> M:
    """A model with the weights of `qmodel`, shared, whose NVFP4 layers count what each call makes of their inputs; see `read`.

    The counts are state of its layers (`layers.InputCounts`), as a history of amaxes is: under jit they move by `nnx.jit`, or split,
    merged and handed back. ValueError for a model without an NVFP4 layer.
    """
    model = nnx.merge(*nnx.split(arguments.module("observed: qmodel", qmodel)))
    layers = swap.scaled_layers(model)
    if not layers:
        raise ValueError("telemetry: qmodel: no layer of the model is in NVFP4, so there is nothing to count; see nvfp4jax.quantize_model")
    for layer in layers.values():
        for name in layer.inputs:
            setattr(layer, f"{name}_counts", InputCounts(counting.zeros(layer.lead)))
    return model


def read(model: nnx.Module) -> Telemetry:
    """What the calls of an `observed` model have counted so far. ValueError for another."""
    arguments.module("read: model", model)
    stacked = hasattr(model, "layers") and all(hasattr(layer, "depth") for layer in model.layers)
    depths = [depth or 1 for depth in stacking.depths(model)] if stacked else []
    rows: list[tuple[tuple, np.ndarray, np.ndarray]] = []
    for path, layer in swap.scaled_layers(model).items():
        for name in layer.inputs:
            variable = getattr(layer, f"{name}_counts", None)
            if variable is None:
                raise ValueError(f"read: model: {swap.path_string(path)} counts nothing; read what telemetry.observed made of the model")
            counts = variable.get_value()
            amaxes, blocks = np.asarray(counts.amax), np.asarray(counts.blocks, np.int64)
            for index in np.ndindex(amaxes.shape):
                rows.append((_place((*path, *([name] if len(layer.inputs) > 1 else [])), index, depths), amaxes[index], blocks[index]))
    rows.sort(key=lambda row: [(isinstance(part, str), part) for part in row[0]])
    amax = np.array([amax for _, amax, _ in rows], np.float32)
    pairs = np.array([pairs for *_, pairs in rows], np.int64).reshape(-1, 4, 2)
    total, *bad = (pairs[..., 0] + (pairs[..., 1] << 24)).T
    with np.errstate(invalid="ignore"):
        return Telemetry(tuple(swap.path_string(path) for path, *_ in rows), amax, total, *(n / total for n in bad))


def _place(path: tuple, index: tuple[int, ...], depths: list[int]) -> tuple:
    """The path of entry `index` of a stack, as if the layers were not stacked."""
    if index and depths and path[0] == "layers":
        path, index = ("layers", sum(depths[: path[1]]) + index[0], *path[2:]), index[1:]
    elif depths and path[0] == "layers":
        path = ("layers", sum(depths[: path[1]]), *path[2:])
    return (*path, *index)
