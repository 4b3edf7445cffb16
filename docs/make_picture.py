"""Draws docs/nvfp4.svg, the picture of the README: the two levels, and where the scale is computed.

    python docs/make_picture.py
"""

from pathlib import Path

WIDTH, HEIGHT = 480, 440  # as narrow as a phone can show with its letters readable
INK, SOFT, CODES, SCALES, GLOBAL = "#1f2933", "#65737e", "#cfe3fa", "#ffe2b8", "#d5efd0"


def text(x: float, y: float, content: str, size: int = 15, anchor: str = "start", color: str = INK, weight: str = "normal") -> str:
    return f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}" fill="{color}" font-weight="{weight}">{content}</text>'


def box(x: float, y: float, width: float, height: float, fill: str, stroke: str = INK, dash: str = "") -> str:
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="4" fill="{fill}" stroke="{stroke}" stroke-dasharray="{dash}"/>'


def arrow(x0: float, y0: float, x1: float, y1: float) -> str:
    return f'<line x1="{x0}" y1="{y0}" x2="{x1}" y2="{y1}" stroke="{INK}" stroke-width="1.5" marker-end="url(#head)"/>'


def draw() -> str:
    parts = [text(16, 30, "A row in NVFP4: two levels of scale", 17, weight="bold")]
    parts += [text(128, 60, "16 codes, E2M1", 14, "middle", SOFT), text(356, 60, "the next 16 codes", 14, "middle", SOFT)]
    for x in (16, 244):
        parts += [box(x + 14 * i, 70, 14, 26, CODES) for i in range(16)]
        parts += [box(x + 57, 108, 110, 28, SCALES), text(x + 112, 127, "scale, E4M3", 14, "middle")]
    parts += [box(16, 148, 452, 30, GLOBAL), text(242, 168, "global scale, float32: of row, tensor or expert", 15, "middle")]
    parts += [text(242, 202, "value = code &#215; scale &#215; global scale: 4.5 bits a number", 15, "middle", SOFT)]
    parts += [text(16, 242, "Where the global scale of activations is from", 17, weight="bold")]
    parts += [box(16, 256, 452, 76, "#ffffff", SOFT, "5 4"), text(30, 278, "static", 15, weight="bold")]
    parts += [text(30, 300, "calibrated once, stored beside the weights;", 15), text(30, 320, "the policy moves on, the scale does not", 15)]
    parts += [box(16, 346, 452, 78, "#ffffff"), text(30, 369, "online: inside jit, in every call", 15, weight="bold")]
    for x, width, label in ((26, 76, "amax(x)"), (132, 140, "amax / (6 &#183; 448)"), (302, 156, "quantize, multiply")):
        parts += [box(x, 382, width, 30, GLOBAL), text(x + width / 2, 402, label, 15, "middle")]
    parts += [arrow(102, 397, 128, 397), arrow(272, 397, 298, 397)]
    head = f'<marker id="head" markerWidth="9" markerHeight="9" refX="7" refY="4" orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="{INK}"/></marker>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'font-family="Helvetica, Arial, sans-serif"><defs>{head}</defs><rect width="100%" height="100%" fill="#ffffff"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


if __name__ == "__main__":
    Path(__file__).with_name("nvfp4.svg").write_text(draw())
