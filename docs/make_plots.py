"""Draws the figures of docs/performance.md out of the tables of benchmarks/README.md; conf.py runs it at each build.

    python docs/make_plots.py
"""

import re
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402

HERE = Path(__file__).parent
TABLES = HERE.parent / "benchmarks" / "README.md"
FOLDER = HERE / "_plots"
SIZE = 4.4, 3.0  # inches: a phone shows it a little smaller than drawn
BLUE, ORANGE, GREEN, RED, SOFT = "#1f5fa8", "#c7661a", "#2c7d3f", "#a8324a", "#65737e"


def table(title: str) -> list[dict[str, str]]:
    """The rows of the table behind the paragraph that begins with **title; the second column of a name is "NAME again"."""
    text = TABLES.read_text(encoding="utf-8")
    start = text.index(f"**{title}")
    lines = text[text.index("\n|", start) + 1 :].split("\n\n")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    names = [f"{name} again" if name in cells[0][:i] else name for i, name in enumerate(cells[0])]
    return [dict(zip(names, row, strict=True)) for row in cells[2:]]


def numbers(cell: str) -> list[float]:
    """The numbers of a cell, several between slashes: "1.10x / 1.05x", "17.5*", "4.06 (1.33x)" without what is in brackets."""
    return [float(found[0].replace(",", "")) for part in re.sub(r"\(.*?\)", "", cell).split("/") if (found := re.search(r"[\d.,]*\d", part))]


def column(rows: list[dict[str, str]], name: str) -> list[float]:
    return [number for row in rows for number in numbers(row[name])]


def in_brackets(cell: str) -> float:
    return float(re.search(r"\(([\d.]+)x", cell)[1])  # type: ignore[index]


def speed_up(axes: plt.Axes, what: str) -> None:
    axes.axhline(1, color=SOFT, linewidth=1, linestyle="--")
    axes.text(0.01, 0.97, "as fast", color=SOFT, va="top", transform=axes.get_yaxis_transform(), fontsize=9)
    axes.set_xscale("log", base=2)
    axes.set(xlabel=what, ylabel="times as fast", ylim=(0, 3.7))


def ticks(axes: plt.Axes, places: list[float]) -> None:
    axes.set_xticks(places, [f"{place:g}" for place in places])
    axes.minorticks_off()


def dense(axes: plt.Axes) -> None:
    rows = table("Dense, K=8192 N=33792")
    axes.plot(column(rows, "M"), column(rows, "ratio"), "o-", color=BLUE, label="33792 x 8192")
    small = table("Small dense")
    sizes = [float(name.removeprefix("M=")) for name in small[0] if name.removeprefix("M=").isdigit()]
    for row, color, mark in zip(small, (ORANGE, GREEN, RED, SOFT), "s^vD", strict=True):
        cells = [cell for name, cell in row.items() if name.removeprefix("M=").isdigit()]
        axes.plot(sizes, [in_brackets(cell) for cell in cells], mark + "-", color=color, label=row["N x K"].replace("x", " x "), markersize=4)
    speed_up(axes, "rows")
    ticks(axes, [1, 8, 64, 512, 4096])
    axes.legend(title="N x K", fontsize=8, title_fontsize=8)


def experts(axes: plt.Axes) -> None:
    rows = table("Experts, 128 x 2048")
    first, second = ([float(row[name].removesuffix("x")) for row in rows] for name in ("ratio", "ratio again"))
    axes.plot(column(rows, "batch"), first, "o-", color=BLUE, label="gate, up and SiLU")
    axes.plot(column(rows, "batch"), second, "s-", color=ORANGE, label="down")
    speed_up(axes, "tokens")
    ticks(axes, [1, 16, 256, 1024, 8192])
    axes.legend(fontsize=8)


def step(axes: plt.Axes) -> None:
    rows = [row for row in table("A rollout of Qwen3-30B-A3B") if row["rows"].isdigit()]
    names = [row["rows"] for row in rows]
    axes.bar(names, column(rows, "ms"), color=BLUE, label="measured")
    axes.bar(names, column(rows, "floor ms"), color=SOFT, width=0.5, label="floor: bytes and operations")
    for place, row in enumerate(rows):
        axes.text(place, numbers(row["ms"])[0] + 0.2, row["ms"], ha="center", va="bottom", fontsize=9)
    axes.set(xlabel="rows", ylabel="ms a decode step", ylim=(0, 20))
    axes.legend(fontsize=8)


def accuracy(axes: plt.Axes) -> None:
    rows = [row for row in table("A trained model") if row["mode"] != "bf16"][::-1]
    values, lows, highs = zip(*(map(float, re.findall(r"[\d.]+", row["over bf16 (95 %)"])) for row in rows), strict=True)
    spread = [[v - x for v, x in zip(values, lows, strict=True)], [x - v for v, x in zip(values, highs, strict=True)]]
    names = [row["mode"].replace("`", "").replace(", ", ",\n") for row in rows]
    axes.barh(names, values, xerr=spread, color=BLUE, error_kw=dict(ecolor=SOFT, capsize=3))
    for place, value in enumerate(values):
        axes.text(1.01, place, f"{value:.2f}", color="white", va="center", fontsize=9)
    axes.set(xlabel="perplexity over bfloat16's (from 1)", xlim=(1, 1.65))
    axes.tick_params(axis="y", labelsize=8)


PLOTS: dict[str, tuple[Callable[[plt.Axes], None], str]] = {
    "dense": (dense, "Dense layers against cuBLAS bf16"),
    "experts": (experts, "Experts against the best bf16 grouped matmul"),
    "step": (step, "Decoding with Qwen3-30B-A3B"),
    "accuracy": (accuracy, "SmolLM2-135M in NVFP4"),
}


def main() -> None:
    """Raises where a table is not what is drawn here: the docs are not built then."""
    FOLDER.mkdir(exist_ok=True)
    plt.rcParams["svg.hashsalt"] = "nvfp4jax"
    for name, (draw, title) in PLOTS.items():
        figure, axes = plt.subplots(figsize=(SIZE[0], 4.4) if name == "accuracy" else SIZE, layout="constrained")
        draw(axes)
        axes.set_title(title, fontsize=10, loc="left" if name != "accuracy" else "center")
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(FOLDER / f"{name}.svg", metadata={"Date": None})
        plt.close(figure)


if __name__ == "__main__":
    main()
